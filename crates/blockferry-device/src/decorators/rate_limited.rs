//! [`RateLimited`]: moves bytes no faster than agreed, so that a sync leaves room for others.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use blockferry_core::Extent;

use super::forward::{forward_source_facts, forward_target_facts};
use crate::{
    BlockSource, BlockTarget, CancelToken, Clock, ReadRequest, Result, Status, WriteRequest,
};

/// Idle time that is credited at most: a pause must not allow a burst afterwards.
const MAX_CREDIT: Duration = Duration::from_millis(20);
/// Longest sleep without looking at the cancel token.
const MAX_NAP: Duration = Duration::from_millis(50);

/// A token bucket that several devices and threads may share; clones are the same bucket.
#[derive(Clone, Debug)]
pub struct RateLimiter {
    bytes_per_second: u64,
    clock: Arc<dyn Clock>,
    cancel: CancelToken,
    /// When everything granted so far will have been paid for.
    paid_until: Arc<Mutex<Duration>>,
}

impl RateLimiter {
    /// A bucket that grants `bytes_per_second`; waiting ends early once `cancel` is cancelled.
    ///
    /// # Panics
    /// If `bytes_per_second` is 0: no limit is no limiter.
    #[must_use]
    pub fn new(bytes_per_second: u64, clock: Arc<dyn Clock>, cancel: CancelToken) -> Self {
        assert!(bytes_per_second > 0, "a rate of 0 would wait for ever");
        let paid_until = Arc::new(Mutex::new(clock.now()));
        Self {
            bytes_per_second,
            clock,
            cancel,
            paid_until,
        }
    }

    /// Waits until `bytes` more may be moved. Bytes are paid for before they move, so the rate is never
    /// exceeded by more than 20 ms allow, however large a request is.
    ///
    /// # Errors
    /// `ErrorKind::Cancelled`.
    pub fn take(&self, bytes: u64) -> Result<()> {
        let until = self.charge(bytes);
        loop {
            self.cancel.check("the next transfer")?;
            let wait = until.saturating_sub(self.clock.now());
            if wait.is_zero() {
                return Ok(());
            }
            self.clock.sleep(wait.min(MAX_NAP));
        }
    }

    /// Books `bytes` behind all earlier ones and says when they are paid for.
    fn charge(&self, bytes: u64) -> Duration {
        let mut paid_until = self
            .paid_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let start = (*paid_until).max(self.clock.now().saturating_sub(MAX_CREDIT));
        *paid_until = start.saturating_add(self.cost(bytes));
        *paid_until
    }

    fn cost(&self, bytes: u64) -> Duration {
        const NANOSECONDS: u128 = 1_000_000_000;
        let nanoseconds = u128::from(bytes) * NANOSECONDS / u128::from(self.bytes_per_second);
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

/// A device whose reads and writes share one [`RateLimiter`].
#[derive(Debug)]
pub struct RateLimited<D: ?Sized> {
    limiter: RateLimiter,
    inner: Arc<D>,
}

impl<D: BlockSource + ?Sized> RateLimited<D> {
    /// Wraps `inner`.
    pub fn new(inner: Arc<D>, limiter: RateLimiter) -> Self {
        Self { limiter, inner }
    }
}

impl<D: BlockSource + ?Sized> BlockSource for RateLimited<D> {
    forward_source_facts!();

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.limiter.take(buffer.len() as u64)?;
        self.inner.read_at(offset, buffer)
    }

    fn read_batch(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        self.limiter
            .take(requests.iter().map(|r| r.buffer.len() as u64).sum())?;
        self.inner.read_batch(requests)
    }

    fn status_at(&self, offset: u64) -> Result<(Status, u64)> {
        self.inner.status_at(offset)
    }
}

impl<D: BlockTarget + ?Sized> BlockTarget for RateLimited<D> {
    forward_target_facts!();

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.limiter.take(bytes.len() as u64)?;
        self.inner.write_at(offset, bytes)
    }

    fn write_batch(&self, requests: &[WriteRequest<'_>]) -> Result<()> {
        self.limiter
            .take(requests.iter().map(|r| r.bytes.len() as u64).sum())?;
        self.inner.write_batch(requests)
    }

    fn write_zeroes(&self, extent: Extent) -> Result<()> {
        self.inner.write_zeroes(extent)
    }

    fn punch(&self, extent: Extent) -> Result<bool> {
        self.inner.punch(extent)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn read_medium(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        self.limiter
            .take(requests.iter().map(|r| r.buffer.len() as u64).sum())?;
        self.inner.read_medium(requests)
    }

    fn reserve(&self, extents: &[Extent]) -> Result<Vec<Extent>> {
        self.inner.reserve(extents)
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.inner.resize(size_bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{ErrorKind, MemoryDevice};

    /// Time passes only by sleeping, and by what the test adds for work.
    #[derive(Debug, Default)]
    struct VirtualClock(Mutex<Duration>);

    impl Clock for VirtualClock {
        fn now(&self) -> Duration {
            *self.0.lock().unwrap()
        }

        fn sleep(&self, duration: Duration) {
            *self.0.lock().unwrap() += duration;
        }
    }

    proptest! {
        #[test]
        fn the_rate_holds_within_five_percent(
            rate in 1_000_000u64..1_000_000_000,
            requests in prop::collection::vec((1u64..4 << 20, 0u64..2000), 50..200),
        ) {
            let clock = Arc::new(VirtualClock::default());
            let limiter = RateLimiter::new(rate, clock.clone() as _, CancelToken::new());
            let mut moved = 0.0;
            let mut worked = Duration::ZERO;

            // At least two seconds of transfer, some microseconds of other work in between.
            for (bytes, work_us) in requests.into_iter().cycle() {
                limiter.take(bytes).unwrap();
                moved += bytes as f64;
                clock.sleep(Duration::from_micros(work_us));
                worked += Duration::from_micros(work_us);
                if moved >= 2.0 * rate as f64 {
                    break;
                }
            }

            let elapsed = clock.now().as_secs_f64();
            let ideal = moved / rate as f64;
            prop_assert!(ideal <= elapsed * 1.05, "not faster: {ideal} s in {elapsed} s");
            let slowest = ideal.max(worked.as_secs_f64()) * 1.05 + worked.as_secs_f64();
            prop_assert!(elapsed <= slowest, "nor slower: {ideal} s took {elapsed} s");
        }
    }

    #[test]
    fn an_idle_hour_does_not_buy_a_burst() {
        let clock = Arc::new(VirtualClock::default());
        let limiter = RateLimiter::new(1_000_000, clock.clone() as _, CancelToken::new());
        clock.sleep(Duration::from_hours(1));
        let resumed = clock.now();

        limiter.take(10_000_000).unwrap();

        assert!(clock.now() - resumed >= Duration::from_millis(9_980));
    }

    #[test]
    fn cancelling_ends_the_wait() {
        let (clock, cancel) = (Arc::new(VirtualClock::default()), CancelToken::new());
        let limiter = RateLimiter::new(1, clock as _, cancel.clone());
        let memory = Arc::new(MemoryDevice::zeroed("memory", 4096));
        let device = RateLimited::new(memory, limiter);

        cancel.cancel();

        let refused = device.read_at(0, &mut [0; 4096]).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Cancelled);
    }
}
