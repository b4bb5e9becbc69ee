//! The error of the transfer log: what was attempted, where, and what the caller can do next.

use std::fmt;

/// Result of a transfer log operation.
pub type Result<T> = std::result::Result<T, Error>;

/// What the caller can do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The log or state failed or is full; what was acknowledged is safe, the session resumes later.
    Log,
    /// The target failed or refused; it is at its old point or a durable decision says what to do.
    Target,
    /// A durable decision waits to be carried out: open again and it is.
    DecisionPending,
    /// The operation does not fit the state (nothing to roll back, target was written since, …).
    Refused,
    /// Stored bytes are not what was written and nothing here can repair them.
    Corrupt,
    /// Written by a version this one does not know.
    UnknownVersion,
    /// Someone else holds the state directory or the target.
    Busy,
    /// A limit of this session is reached.
    LimitExceeded,
    /// The caller cancelled.
    Cancelled,
}

/// A failed transfer log operation.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    cause: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error with a complete message and no further cause.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            cause: None,
        }
    }

    /// What the caller can do next.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The log, its directory or the state file failed.
    pub(crate) fn log(attempt: impl Into<String>, cause: blockferry_device::Error) -> Self {
        let kind = match cause.kind() {
            blockferry_device::ErrorKind::Busy => ErrorKind::Busy,
            blockferry_device::ErrorKind::Cancelled => ErrorKind::Cancelled,
            _ => ErrorKind::Log,
        };
        Self {
            kind,
            message: attempt.into(),
            cause: Some(Box::new(cause)),
        }
    }

    /// The target failed.
    pub(crate) fn target(attempt: impl Into<String>, cause: blockferry_device::Error) -> Self {
        let kind = match cause.kind() {
            blockferry_device::ErrorKind::Cancelled => ErrorKind::Cancelled,
            _ => ErrorKind::Target,
        };
        Self {
            kind,
            message: attempt.into(),
            cause: Some(Box::new(cause)),
        }
    }

    /// The device below is gone: nothing can be done with it until it is back.
    pub(crate) fn is_of_lost_device(&self) -> bool {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = cause {
            let device = error.downcast_ref::<blockferry_device::Error>();
            if device.is_some_and(|e| e.kind() == blockferry_device::ErrorKind::Lost) {
                return true;
            }
            cause = error.source();
        }
        false
    }

    /// The same failure, now with a decision that waits to be carried out.
    pub(crate) fn pending(attempt: impl Into<String>, cause: Self) -> Self {
        Self {
            kind: ErrorKind::DecisionPending,
            message: attempt.into(),
            cause: Some(Box::new(cause)),
        }
    }

    /// The same failure, caused by this, if anything.
    pub(crate) fn because(self, cause: Option<Self>) -> Self {
        match cause {
            Some(cause) => Self {
                cause: Some(Box::new(cause)),
                ..self
            },
            None => self,
        }
    }

    pub(crate) fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Refused, message)
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

#[cfg(test)]
mod tests {
    use super::*;
    use blockferry_device::{Error as DeviceError, ErrorKind as DeviceErrorKind};

    #[test]
    fn what_a_device_says_is_told_as_what_the_caller_can_do_next() {
        for (said, of_the_log, of_the_target) in [
            (
                DeviceErrorKind::Cancelled,
                ErrorKind::Cancelled,
                ErrorKind::Cancelled,
            ),
            (DeviceErrorKind::Busy, ErrorKind::Busy, ErrorKind::Target),
            (DeviceErrorKind::NoSpace, ErrorKind::Log, ErrorKind::Target),
        ] {
            let cause = || DeviceError::new(said, "write of disk");

            assert_eq!(Error::log("stage", cause()).kind(), of_the_log);
            assert_eq!(Error::target("apply", cause()).kind(), of_the_target);
        }
    }
}
