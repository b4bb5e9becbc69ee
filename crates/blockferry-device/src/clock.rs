//! Time as an argument, so that whatever waits can be tested without waiting.

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// A monotonic clock that can be waited on.
pub trait Clock: Debug + Send + Sync {
    /// Time since an arbitrary start; never goes back.
    fn now(&self) -> Duration;

    /// Returns once at least `duration` has passed.
    fn sleep(&self, duration: Duration);
}

/// The real clock of this machine.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// A clock that starts now.
    #[must_use]
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
        }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}
