//! The engine's error: its kind is what the caller, and the command line's exit code, need to know.

use std::error::Error as _;
use std::fmt;

use blockferry_pipeline::{Failure, Side};

/// Result of an engine operation.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request makes no sense.
    Usage,
    /// The source failed, is not at rest, or changed under way.
    Source,
    /// The target was refused or failed; it is at its old point.
    Target,
    /// The run was cut off otherwise than by a signal, as by a log that ran full; it resumes.
    Interrupted,
    /// A durable decision waits to be carried out.
    DecisionPending,
    /// Stored bytes are not what was written, or the proof failed.
    Corruption,
    /// The peer or the transport failed.
    Peer,
    /// A hook failed.
    Hook,
    /// Cancelled by the caller.
    Cancelled,
    /// A bug of ours.
    Internal,
}

/// A failed engine operation.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    resumable: bool,
    cause: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// What an error of a group's member says that failed only because another one did.
const ANOTHER_MEMBER: &str = "another disk of the group failed: nothing was committed";

impl Error {
    /// An error with a complete message.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            resumable: false,
            cause: None,
        }
    }

    /// What kind of failure it was.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether what was done so far is kept, and the same sync goes on from there.
    #[must_use]
    pub fn is_resumable(&self) -> bool {
        self.resumable
    }

    /// Whether the connection to the other side ended or fell silent: the same run over another one goes on.
    #[must_use]
    pub fn is_lost_link(&self) -> bool {
        use blockferry_transport::ErrorKind as K;
        causes_of(self)
            .filter_map(|cause| cause.downcast_ref::<blockferry_transport::Error>())
            .any(|cause| matches!(cause.kind(), K::Lost | K::TimedOut))
    }

    /// Whether somebody else uses what is needed, and may be done with it later.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        let device = |cause: &(dyn std::error::Error + 'static)| {
            let cause = cause.downcast_ref::<blockferry_device::Error>();
            cause.is_some_and(|e| e.kind() == blockferry_device::ErrorKind::Busy)
        };
        causes_of(self).any(device)
    }

    pub(crate) fn because(
        kind: ErrorKind,
        message: impl Into<String>,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self {
            kind,
            message: message.into(),
            resumable: false,
            cause: Some(cause.into()),
        }
    }

    pub(crate) fn source(message: impl Into<String>, cause: blockferry_device::Error) -> Self {
        Self::because(device_kind(&cause, ErrorKind::Source), message, cause)
    }

    pub(crate) fn target(message: impl Into<String>, cause: blockferry_device::Error) -> Self {
        Self::because(device_kind(&cause, ErrorKind::Target), message, cause)
    }

    pub(crate) fn log(message: impl Into<String>, cause: blockferry_transfer_log::Error) -> Self {
        Self::because(log_kind(&cause), message, cause)
    }

    pub(crate) fn cancelled() -> Self {
        Self::new(ErrorKind::Cancelled, "cancelled")
    }

    pub(crate) fn of_another_member() -> Self {
        Self::new(ErrorKind::Interrupted, ANOTHER_MEMBER)
    }

    pub(crate) fn is_of_another_member(&self) -> bool {
        self.message == ANOTHER_MEMBER
    }

    pub(crate) fn resumable(mut self, resumable: bool) -> Self {
        self.resumable = resumable;
        self
    }

    /// The error that ended a run. A log that ran full is no fault of the target: with room, or a larger limit, the
    /// run goes on.
    pub(crate) fn ending_run(mut self, resumable: bool) -> Self {
        if resumable && self.kind == ErrorKind::Target && is_full_log(&self) {
            self.kind = ErrorKind::Interrupted;
        }
        self.resumable(resumable)
    }
}

/// Whether the log, or a manifest beside it, found no more room; one that the target lacks does not count.
fn is_full_log(error: &Error) -> bool {
    use blockferry_transfer_log::ErrorKind as K;
    let causes = || causes_of(error);
    let mut kinds = causes()
        .filter_map(|cause| cause.downcast_ref::<blockferry_transfer_log::Error>())
        .map(blockferry_transfer_log::Error::kind);
    let is_manifest = || causes().any(|cause| cause.is::<blockferry_core::Error>());
    match kinds.next() {
        Some(K::LimitExceeded) => true,
        Some(K::Log) => causes().any(lacks_room),
        Some(_) => false,
        None => is_manifest() && causes().any(lacks_room),
    }
}

/// What led to an error, the nearest first.
pub(crate) fn causes_of<'e>(
    error: &'e Error,
) -> impl Iterator<Item = &'e (dyn std::error::Error + 'static)> {
    let mut next = error.source();
    std::iter::from_fn(move || {
        let cause: &'e (dyn std::error::Error + 'static) = next?;
        next = cause.source();
        Some(cause)
    })
}

fn lacks_room(cause: &(dyn std::error::Error + 'static)) -> bool {
    use std::io::ErrorKind as K;
    let device = cause.downcast_ref::<blockferry_device::Error>();
    let system = cause.downcast_ref::<std::io::Error>();
    device.is_some_and(|e| e.kind() == blockferry_device::ErrorKind::NoSpace)
        || system.is_some_and(|e| {
            matches!(
                e.kind(),
                K::StorageFull | K::QuotaExceeded | K::FileTooLarge
            )
        })
}

fn device_kind(cause: &blockferry_device::Error, kind: ErrorKind) -> ErrorKind {
    match cause.kind() {
        blockferry_device::ErrorKind::Cancelled => ErrorKind::Cancelled,
        _ => kind,
    }
}

fn log_kind(cause: &blockferry_transfer_log::Error) -> ErrorKind {
    use blockferry_transfer_log::ErrorKind as K;
    match cause.kind() {
        K::DecisionPending => ErrorKind::DecisionPending,
        K::Corrupt => ErrorKind::Corruption,
        K::Cancelled => ErrorKind::Cancelled,
        // The log lives on the target's side: what it lacks, the target's host lacks.
        _ => ErrorKind::Target,
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let side = failure.side();
        let message = failure.to_string();
        let Some(cause) = failure.into_cause() else {
            return Self::cancelled();
        };
        let device = cause.downcast_ref::<blockferry_device::Error>();
        let log = cause.downcast_ref::<blockferry_transfer_log::Error>();
        let kind = match (side, device, log) {
            (Side::Source, Some(e), _) => device_kind(e, ErrorKind::Source),
            (Side::Source, None, _) => ErrorKind::Source,
            (_, Some(e), _) => device_kind(e, ErrorKind::Target),
            (_, None, Some(e)) => log_kind(e),
            _ => ErrorKind::Target,
        };
        if kind == ErrorKind::Cancelled {
            return Self::cancelled();
        }
        Self {
            kind,
            message,
            resumable: false,
            cause: Some(cause),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_deref().map(|c| c as _)
    }
}
