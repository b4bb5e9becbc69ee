//! The wish to stop: set once from anywhere (a signal handler, another thread), seen everywhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Error, ErrorKind, Result};

/// Shared flag that says "begin no new work"; clones are the same flag, and it is never taken back.
#[derive(Clone, Debug, Default)]
pub struct CancelToken {
    cancelled: Arc<AtomicBool>,
}

impl CancelToken {
    /// A token that is not cancelled.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A token over a flag that somebody else sets, such as a signal handler.
    #[must_use]
    pub fn from_flag(flag: Arc<AtomicBool>) -> Self {
        Self { cancelled: flag }
    }

    /// Cancels this token and all its clones.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }

    /// Whether it was cancelled.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// `Ok` while not cancelled.
    ///
    /// # Errors
    /// `ErrorKind::Cancelled` once cancelled; `attempt` is what was about to begin.
    pub fn check(&self, attempt: &str) -> Result<()> {
        if self.is_cancelled() {
            return Err(Error::new(
                ErrorKind::Cancelled,
                format!("cancelled before {attempt}"),
            ));
        }
        Ok(())
    }
}
