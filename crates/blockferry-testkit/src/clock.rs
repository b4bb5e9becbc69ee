//! Time under control.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use blockferry_device::Clock;

/// Time that passes only by waiting: what takes hours takes none, and nothing depends on how busy the machine is.
#[derive(Debug, Default)]
pub struct VirtualClock(Mutex<Duration>);

impl Clock for VirtualClock {
    fn now(&self) -> Duration {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sleep(&self, duration: Duration) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) += duration;
    }
}
