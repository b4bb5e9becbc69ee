//! What a long operation tells the one who started it: [`Event`]s to an [`Observer`].

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What a run is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Phase {
    /// Opening the state and finishing what an earlier run left.
    Recovering,
    /// Sampling blocks to choose a mode.
    Sampling,
    /// Reading the source, comparing, staging what differs.
    Scanning,
    /// Reading back what was staged and checking it is complete.
    Preparing,
    /// Writing the one durable decision.
    Committing,
    /// Writing the staged pages to the target.
    Applying,
    /// Reading the written pages back from the target's medium.
    Proving,
    /// Returning the target to its old point.
    RollingBack,
    /// Letting go of the old point.
    Accepting,
    /// Computing digests or comparing without writing.
    Verifying,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Recovering => "recovering",
            Self::Sampling => "sampling",
            Self::Scanning => "scanning",
            Self::Preparing => "preparing",
            Self::Committing => "committing",
            Self::Applying => "applying",
            Self::Proving => "proving",
            Self::RollingBack => "rolling back",
            Self::Accepting => "accepting",
            Self::Verifying => "verifying",
        })
    }
}

/// How far a phase has come. Bytes count the image, holes included, unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Bytes of the phase's work that are done.
    pub done_bytes: u64,
    /// Bytes of the phase's work in all.
    pub total_bytes: u64,
    /// Bytes found to differ so far (4 KiB pages).
    pub changed_bytes: u64,
}

impl Progress {
    /// A progress report.
    #[must_use]
    pub fn new(phase: Phase, done_bytes: u64, total_bytes: u64, changed_bytes: u64) -> Self {
        Self {
            phase,
            done_bytes,
            total_bytes,
            changed_bytes,
        }
    }
}

/// Something the one who started a run may want to know. Between two machines it travels as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// How far the run is; sent often (several times a second).
    Progress(Progress),
    /// A decision and its reason, for people: which strategy, which mode, and the numbers behind it.
    Decision(String),
    /// Something that went on, but not as hoped: a manifest that could not be used, a fallback.
    /// `code` is stable and machine-readable (`manifest_unusable`), `message` is for people.
    Warning {
        /// Stable, machine-readable.
        code: Cow<'static, str>,
        /// For people.
        message: String,
    },
    /// An older point that was kept until now went with this run's commit, in words.
    Accepted(String),
    /// A group became durable: everything up to it is never sent again.
    Checkpoint {
        /// Last durable record.
        sequence: u64,
        /// Bytes of the log that are durable.
        durable_bytes: u64,
    },
}

/// Receives events. It is called from the threads that do the work, so it must return quickly and never block.
pub trait Observer: Send + Sync {
    /// Takes one event.
    fn event(&self, event: &Event);
}

impl<F: Fn(&Event) + Send + Sync> Observer for F {
    fn event(&self, event: &Event) {
        self(event);
    }
}

/// Discards every event.
#[derive(Clone, Copy, Debug, Default)]
#[expect(clippy::exhaustive_structs, reason = "a unit struct")]
pub struct Silent;

impl Observer for Silent {
    fn event(&self, _event: &Event) {}
}
