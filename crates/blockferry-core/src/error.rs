//! The error of this crate: what was attempted, where, what was expected, what was found.

use std::fmt;
use std::io;

/// Result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// What the caller can do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A value given by the caller is outside what is accepted: correct it.
    Invalid,
    /// The bytes end too early: fetch the rest, or treat what is there as lost.
    Truncated,
    /// The bytes are complete but wrong: make or fetch them again.
    Corrupt,
    /// Written by a version this build does not know: use the other version.
    UnknownVersion,
    /// A count or length is above the agreed limit: refuse, nothing was allocated.
    LimitExceeded,
    /// The underlying reader or writer failed; see `source()`.
    Io,
}

/// A failed operation of this crate.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    cause: Option<io::Error>,
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

    /// The reader or writer underneath failed; `attempt` says what it was for.
    pub(crate) fn from_io(attempt: impl Into<String>, cause: io::Error) -> Self {
        Self {
            kind: ErrorKind::Io,
            message: attempt.into(),
            cause: Some(cause),
        }
    }

    /// What the caller can do next.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The same error, with the place it happened at put in front: `"{place}: {message}"`.
    #[must_use]
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_ref().map(|cause| cause as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn the_cause_stays_in_source_and_out_of_the_text() {
        let error =
            Error::from_io("write of manifest", io::Error::other("disk on fire")).at("a.manifest");

        assert_eq!(error.to_string(), "a.manifest: write of manifest");
        assert_eq!(error.kind(), ErrorKind::Io);
        assert_eq!(error.source().unwrap().to_string(), "disk on fire");
    }
}
