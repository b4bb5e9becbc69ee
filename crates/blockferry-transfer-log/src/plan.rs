//! What a session is going to do, decided before it begins.

use std::fmt;

use blockferry_core::Geometry;

use crate::format::{SessionId, SourceStamp};

/// How a target is brought from point to point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(
    clippy::exhaustive_enums,
    reason = "every layer decides for each of the four"
)]
pub enum Strategy {
    /// Reflink to a sibling, write into it, exchange. Old point: the old file.
    Clone,
    /// Write a complete new sibling, exchange. Old point: the old file.
    Shadow,
    /// Stage new and old pages in the log, commit, apply. Old point: the pre-images in the log.
    Redo,
    /// Write in place: absent targets, or an old content that was given up by name. Old point: none.
    Direct,
}

impl Strategy {
    const ALL: [Self; 4] = [Self::Clone, Self::Shadow, Self::Redo, Self::Direct];

    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Clone => 1,
            Self::Shadow => 2,
            Self::Redo => 3,
            Self::Direct => 4,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.code() == code)
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Clone => "clone",
            Self::Shadow => "shadow",
            Self::Redo => "redo",
            Self::Direct => "direct",
        })
    }
}

/// Whether the old point can be returned to after the new one is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "there is no third way")]
pub enum Undo {
    /// Pre-images or the old file are kept until the point is accepted.
    Keep,
    /// Nothing is kept.
    None,
}

impl Undo {
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Keep => 1,
            Self::None => 2,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        [Self::Keep, Self::None]
            .into_iter()
            .find(|u| u.code() == code)
    }
}

/// How far the result is proven before it is reported as done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "callers decide for each")]
pub enum Proof {
    /// What was written to the target is read back from the medium after its flush.
    #[default]
    ReadBack,
    /// The flush is believed: what the medium lost or misplaced all the same is found by a later verification only.
    Flush,
}

/// The plan of one session.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Plan {
    /// Random; also names the point the session makes.
    pub session: SessionId,
    /// How.
    pub strategy: Strategy,
    /// Whether the old point is kept.
    pub undo: Undo,
    /// The engine's number of its mode.
    pub mode: u8,
    /// The image to come.
    pub geometry: Geometry,
    /// The source.
    pub source: SourceStamp,
    /// Seconds since 1970, for people.
    pub started_unix: u64,
    /// The log may not grow beyond this many bytes.
    pub log_limit_bytes: u64,
    /// How far this run proves what it writes; recovery always reads back.
    pub proof: Proof,
}

impl Plan {
    /// A plan without a limit for the log.
    #[must_use]
    pub fn new(
        session: SessionId,
        strategy: Strategy,
        geometry: Geometry,
        source: SourceStamp,
    ) -> Self {
        Self {
            session,
            strategy,
            undo: Undo::Keep,
            mode: 0,
            geometry,
            source,
            started_unix: 0,
            log_limit_bytes: u64::MAX,
            proof: Proof::ReadBack,
        }
    }
}
