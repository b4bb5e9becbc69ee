//! What a caller asks for, and what a run is given to work with.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use blockferry_core::{BlockSize, ChangeMap, Root};
use blockferry_device::{CancelToken, Clock, SystemClock};
use blockferry_pipeline::{Event, Observer, Phase, Progress, Silent};
use blockferry_transfer_log::{Proof, Strategy, Undo};
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind};
use crate::fence::Attempt;

/// How the target is brought up to date.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(clippy::exhaustive_enums, reason = "callers decide for each")]
pub enum Mode {
    /// Sample, measure, predict both, choose, and say why.
    #[default]
    Auto,
    /// Compare, send what differs.
    Delta,
    /// No comparison: send everything that is not zero.
    Full,
}

impl Mode {
    /// As the transfer log keeps it.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Auto => 0,
            Self::Delta => 1,
            Self::Full => 2,
        }
    }

    pub(crate) fn from_code(code: u8) -> Self {
        match code {
            1 => Self::Delta,
            2 => Self::Full,
            _ => Self::Auto,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Delta => "delta",
            Self::Full => "full",
        })
    }
}

impl FromStr for Mode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        [Self::Auto, Self::Delta, Self::Full]
            .into_iter()
            .find(|m| m.to_string() == text)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::Usage,
                    format!("mode {text:?}: expected auto, delta or full"),
                )
            })
    }
}

/// How a sync is done. Build it with `default()` and set what differs.
#[derive(Clone, Debug)]
#[non_exhaustive]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag of its own, named where it is set"
)]
pub struct SyncOptions {
    /// How.
    pub mode: Mode,
    /// Unit of digests.
    pub block_size: BlockSize,
    /// Whether the old point can be returned to afterwards.
    pub undo: Undo,
    /// Workers; by default as many as there are processors.
    pub threads: Option<usize>,
    /// Most bytes staged in a second.
    pub bwlimit_bytes_per_second: Option<u64>,
    /// Most bytes the transfer log may hold.
    pub log_limit_bytes: Option<u64>,
    /// A file target that is larger than the source may be cut.
    pub allow_shrink: bool,
    /// The old content is given up: write in place, keep nothing.
    pub in_place: bool,
    /// How far the result is proven before the run counts as done.
    pub proof: Proof,
    /// Fallbacks are errors.
    pub strict: bool,
    /// Trust no saved manifest: read both sides.
    pub rescan: bool,
    /// The strategy, instead of the planner's choice.
    pub strategy: Option<Strategy>,
    /// How the source was named, so that a resume can find it again.
    pub source_address: String,
    /// What is said to have changed in the source since the target's point.
    pub changes: Option<ChangesSince>,
    /// Which run this is an attempt of, where one may need several because its connection does not hold.
    pub attempt: Option<Attempt>,
    /// Nothing but the content with this root is committed.
    pub expected_root: Option<Root>,
    /// Asked when the source was read for the last time, and before anything is committed.
    pub check: Option<SourceCheck>,
}

/// Whether what was read of a source counts, where only the caller can know: a snapshot may have been lost meanwhile. An
/// error ends the run, and nothing is committed.
#[derive(Clone)]
pub struct SourceCheck(Arc<dyn Fn() -> blockferry_device::Result<()> + Send + Sync>);

impl SourceCheck {
    /// Asks `check`; again where the source has to be read again, because something did not survive or was doubted.
    pub fn new(check: impl Fn() -> blockferry_device::Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(check))
    }

    pub(crate) fn ask(&self) -> blockferry_device::Result<()> {
        (self.0)()
    }
}

impl fmt::Debug for SourceCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SourceCheck")
    }
}

/// A change map of the source, and the sync point it is relative to. What a map below
/// [`Trust::Trusted`](blockferry_core::Trust::Trusted) claims to be the same is read in samples all the same; of a source
/// on the other side of a connection such a map is not used.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ChangesSince {
    /// Id of the sync point ([`Receipt::sync_point`](crate::Receipt::sync_point)): to a target that is at
    /// another one the map means nothing.
    pub point: String,
    /// What is claimed.
    pub map: Arc<ChangeMap>,
}

impl ChangesSince {
    /// What `map` claims to have happened since `point`.
    #[must_use]
    pub fn new(point: impl Into<String>, map: Arc<ChangeMap>) -> Self {
        Self {
            point: point.into(),
            map,
        }
    }
}

impl Default for SyncOptions {
    fn default() -> Self {
        Self {
            mode: Mode::Auto,
            block_size: BlockSize::DEFAULT,
            undo: Undo::Keep,
            threads: None,
            bwlimit_bytes_per_second: None,
            log_limit_bytes: None,
            allow_shrink: false,
            in_place: false,
            proof: Proof::ReadBack,
            strict: false,
            rescan: false,
            strategy: None,
            source_address: String::new(),
            changes: None,
            attempt: None,
            expected_root: None,
            check: None,
        }
    }
}

impl SyncOptions {
    pub(crate) fn threads(&self) -> usize {
        let processors = || std::thread::available_parallelism().map_or(2, usize::from);
        self.threads.unwrap_or_else(processors).clamp(1, 64)
    }
}

/// What a run reports to, how it is cancelled, and its clock.
#[derive(Clone)]
#[non_exhaustive]
pub struct Context {
    /// Hears what happens.
    pub observer: Arc<dyn Observer>,
    /// Ends the run cleanly.
    pub cancel: CancelToken,
    /// Times and rate limits.
    pub clock: Arc<dyn Clock>,
}

impl Default for Context {
    fn default() -> Self {
        Self {
            observer: Arc::new(Silent),
            cancel: CancelToken::new(),
            clock: Arc::new(SystemClock::new()),
        }
    }
}

impl Context {
    /// Silent and never cancelled, on the system's clock; set the fields that matter.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Reports to `observer`.
    #[must_use]
    pub fn with_observer(mut self, observer: impl Observer + 'static) -> Self {
        self.observer = Arc::new(observer);
        self
    }

    pub(crate) fn progress(&self, phase: Phase, done: u64, total: u64, changed: u64) {
        self.observer
            .event(&Event::Progress(Progress::new(phase, done, total, changed)));
    }

    pub(crate) fn check_cancelled(&self) -> Result<(), Error> {
        if self.cancel.is_cancelled() {
            Err(Error::cancelled())
        } else {
            Ok(())
        }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("cancel", &self.cancel)
            .finish_non_exhaustive()
    }
}
