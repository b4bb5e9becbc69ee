//! Rates and remaining times from a few recent observations. Pure: the caller says what time it is.

use std::collections::VecDeque;
use std::time::Duration;

/// How far back the rate looks; long enough to be calm, short enough to follow a change.
const WINDOW: Duration = Duration::from_secs(5);

/// Measures one phase.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    /// (time since the start, bytes done), oldest first, never empty once fed.
    observations: VecDeque<(Duration, u64)>,
}

impl Meter {
    /// Takes one observation; times never go back.
    pub(crate) fn observe(&mut self, at: Duration, done_bytes: u64) {
        self.observations.push_back((at, done_bytes));
        while self.observations.len() > 2 && at.saturating_sub(self.observations[1].0) >= WINDOW {
            self.observations.pop_front();
        }
    }

    /// Bytes per second over the window; `None` before there is anything to measure.
    pub(crate) fn bytes_per_second(&self) -> Option<f64> {
        let (&(start, from), &(end, to)) = (self.observations.front()?, self.observations.back()?);
        let seconds = end.saturating_sub(start).as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let bytes = to.saturating_sub(from) as f64;
        (seconds > 0.0).then(|| bytes / seconds)
    }

    /// Seconds until `total_bytes` at this rate.
    pub(crate) fn remaining_seconds(&self, total_bytes: u64) -> Option<f64> {
        let done = self.observations.back()?.1;
        let rate = self.bytes_per_second().filter(|&rate| rate >= 1.0)?;
        #[expect(clippy::cast_precision_loss, reason = "an estimate for people")]
        let remaining = total_bytes.saturating_sub(done) as f64;
        Some(remaining / rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steady(bytes_per_second: u64, seconds: u64) -> Meter {
        let mut meter = Meter::default();
        for second in 0..=seconds {
            meter.observe(Duration::from_secs(second), second * bytes_per_second);
        }
        meter
    }

    #[test]
    fn a_steady_rate_is_that_rate() {
        let meter = steady(1000, 20);

        assert_eq!(meter.bytes_per_second(), Some(1000.0));
        assert_eq!(meter.remaining_seconds(30_000), Some(10.0));
    }

    #[test]
    fn an_old_rate_is_forgotten_after_the_window() {
        let mut meter = steady(1000, 20);
        for second in 21..=30 {
            meter.observe(Duration::from_secs(second), 20_000 + (second - 20) * 10);
        }

        assert_eq!(meter.bytes_per_second(), Some(10.0));
    }

    #[test]
    fn nothing_is_claimed_without_two_moments() {
        let mut meter = Meter::default();
        assert_eq!(meter.bytes_per_second(), None);

        meter.observe(Duration::ZERO, 5);
        assert_eq!(meter.bytes_per_second(), None);
        assert_eq!(meter.remaining_seconds(10), None);
    }

    #[test]
    fn a_stalled_run_promises_no_end() {
        let mut meter = Meter::default();
        meter.observe(Duration::ZERO, 5);
        meter.observe(Duration::from_secs(1), 5);

        assert_eq!(meter.remaining_seconds(10), None);
    }
}
