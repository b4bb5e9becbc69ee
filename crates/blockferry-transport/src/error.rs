//! The error of this crate: what was attempted, what was expected, what was found, and what the caller can do next.

use std::fmt;

/// Result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// What the caller can do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The link ended or failed: connect again and resume.
    Lost,
    /// The peer was silent for longer than agreed: connect again and resume.
    TimedOut,
    /// The peer sent what the protocol does not allow: do not go on with it.
    Protocol,
    /// The two sides have no version in common: update the older one.
    UnknownVersion,
    /// The peer refuses, and says why.
    Refused,
    /// Certificates or keys cannot be used, or one side does not trust the other's: see to them.
    Credentials,
}

/// A failed operation of this crate.
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

    /// The peer sent what the protocol does not allow.
    pub fn protocol(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Protocol, message)
    }

    /// The link failed under `attempt`.
    pub fn lost(attempt: impl Into<String>, cause: std::io::Error) -> Self {
        Self::with_cause(ErrorKind::Lost, attempt, cause)
    }

    /// As [`Self::lost`], unless the stream found out more about its peer than that.
    pub(crate) fn of_stream(attempt: &str, cause: std::io::Error) -> Self {
        cause
            .downcast::<Self>()
            .unwrap_or_else(|cause| Self::lost(attempt, cause))
    }

    /// `attempt` failed because of `cause`.
    pub(crate) fn with_cause(
        kind: ErrorKind,
        attempt: impl Into<String>,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self {
            kind,
            message: attempt.into(),
            cause: Some(cause.into()),
        }
    }

    /// A body that cannot be read as what its frame says it is.
    pub(crate) fn undecodable(what: &str, cause: blockferry_core::Error) -> Self {
        Self::with_cause(
            ErrorKind::Protocol,
            format!("message {what} of the peer"),
            cause,
        )
    }

    /// What the caller can do next.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
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
