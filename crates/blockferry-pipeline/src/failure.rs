//! Why a worker stopped: which side failed, and the cause.

use std::error::Error;
use std::fmt;

use crate::walk::Stopped;

/// Which side of a run failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Side {
    /// The source could not be read.
    Source,
    /// The target could not be read or written.
    Target,
    /// The transfer log or a saved manifest failed.
    Log,
    /// The walk ended for another reason, which is reported by whoever ended it.
    Ended,
}

/// A worker's failure.
#[derive(Debug)]
pub struct Failure {
    side: Side,
    cause: Option<Box<dyn Error + Send + Sync>>,
}

impl Failure {
    /// The source failed.
    pub fn source(cause: impl Error + Send + Sync + 'static) -> Self {
        Self {
            side: Side::Source,
            cause: Some(Box::new(cause)),
        }
    }

    /// The target failed.
    pub fn target(cause: impl Error + Send + Sync + 'static) -> Self {
        Self {
            side: Side::Target,
            cause: Some(Box::new(cause)),
        }
    }

    /// The log or a manifest failed.
    pub fn log(cause: impl Error + Send + Sync + 'static) -> Self {
        Self {
            side: Side::Log,
            cause: Some(Box::new(cause)),
        }
    }

    /// Which side failed.
    #[must_use]
    pub fn side(&self) -> Side {
        self.side
    }

    /// The cause, to be wrapped by a layer that knows more.
    #[must_use]
    pub fn into_cause(self) -> Option<Box<dyn Error + Send + Sync>> {
        self.cause
    }
}

impl From<Stopped> for Failure {
    fn from(_stopped: Stopped) -> Self {
        Self {
            side: Side::Ended,
            cause: None,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.side {
            Side::Source => "the source failed",
            Side::Target => "the target failed",
            Side::Log => "the transfer log failed",
            Side::Ended => "the run ended",
        })
    }
}

impl Error for Failure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_deref().map(|c| c as _)
    }
}
