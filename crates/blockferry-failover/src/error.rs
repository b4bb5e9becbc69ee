//! The error of a job: its kind is what the caller, and the command line's exit code, need to know.

use std::fmt;

use blockferry_engine::ErrorKind as EngineKind;

/// Result of an operation on a job.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request makes no sense: a specification that cannot be, a job that does not exist.
    Usage,
    /// The job's state does not allow it; nothing was changed.
    Refused,
    /// The source, or the machine it belongs to, failed; it goes on running unless the message says otherwise.
    Source,
    /// Another host cannot be reached, or the way to it failed.
    Peer,
    /// A target was refused or failed; all are at a consistent point.
    Target,
    /// A hook failed.
    Hook,
    /// The database of jobs failed.
    Store,
    /// Another process is at this job.
    Busy,
    /// A durable decision waits to be carried out.
    DecisionPending,
    /// Stored bytes are not what was written.
    Corruption,
    /// Cancelled by the caller; the job goes on when it is started again.
    Cancelled,
    /// A bug of ours.
    Internal,
}

/// A failed operation on a job.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    cause: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error with a complete message.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            cause: None,
        }
    }

    /// What kind of failure it was.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    pub(crate) fn because(
        kind: ErrorKind,
        message: impl Into<String>,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self {
            kind,
            message: message.into(),
            cause: Some(cause.into()),
        }
    }

    /// The machine, or what it exports, failed.
    pub(crate) fn source(message: impl Into<String>, cause: blockferry_device::Error) -> Self {
        let kind = match cause.kind() {
            blockferry_device::ErrorKind::Cancelled => ErrorKind::Cancelled,
            _ => ErrorKind::Source,
        };
        Self::because(kind, message, cause)
    }

    /// A sync of its targets failed.
    pub(crate) fn engine(message: impl Into<String>, cause: blockferry_engine::Error) -> Self {
        let kind = match cause.kind() {
            EngineKind::Usage => ErrorKind::Usage,
            EngineKind::Peer if cause.is_lost_link() => ErrorKind::Peer,
            EngineKind::Source | EngineKind::Peer => ErrorKind::Source,
            EngineKind::DecisionPending => ErrorKind::DecisionPending,
            EngineKind::Corruption => ErrorKind::Corruption,
            EngineKind::Hook => ErrorKind::Hook,
            EngineKind::Cancelled => ErrorKind::Cancelled,
            EngineKind::Internal => ErrorKind::Internal,
            _ => ErrorKind::Target,
        };
        Self::because(kind, message, cause)
    }

    pub(crate) fn store(message: impl Into<String>, cause: rusqlite::Error) -> Self {
        Self::because(ErrorKind::Store, message, cause)
    }

    /// The message with those of its causes.
    #[must_use]
    pub fn in_full(&self) -> String {
        let mut text = self.message.clone();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            text.push_str(&format!(": {cause}"));
            next = cause.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}
