//! Whether another pass makes the last one small enough: pure.
//!
//! What is dirtied while a pass is copied is what the next one has to copy. With a steady writer the bytes of passes
//! shrink by the ratio of how fast it dirties to how fast we copy; where that ratio is not below one, no number of passes
//! helps.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A pass that was copied.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Pass {
    /// Its number.
    pub number: u64,
    /// Bytes that differed.
    pub changed_bytes: u64,
    /// From its cut until the targets held it, in seconds.
    pub seconds: f64,
    /// Between the cut before and this one, in seconds; nothing for the first.
    pub since_last_cut: Option<f64>,
}

impl Pass {
    /// A pass.
    #[must_use]
    pub fn new(number: u64, changed_bytes: u64, seconds: f64, since_last_cut: Option<f64>) -> Self {
        Self {
            number,
            changed_bytes,
            seconds,
            since_last_cut,
        }
    }
}

/// What to do after a pass.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "callers decide for each")]
pub enum Next {
    /// Copy another one at once.
    Again,
    /// The last pass would fit.
    Ready,
    /// The last pass would not fit, and more passes do not make it smaller: why, with figures.
    Diverging(String),
}

/// Passes that have to bring nothing before it is said that none will.
const PATIENCE: usize = 3;
/// A pass below this share of the one before it brings something.
const WORTHWHILE: f64 = 0.9;

/// How long the source would stand still if it were stopped `idle_seconds` after the last pass was done: what was dirtied
/// since its cut has to be copied. `None` before the second pass: one pass tells nothing of what is dirtied.
#[must_use]
pub fn predicted_downtime(passes: &[Pass], idle_seconds: f64) -> Option<f64> {
    let last = passes.last()?;
    let interval = last.since_last_cut.filter(|seconds| *seconds > 0.0)?;
    let dirtied_per_second = as_f64(last.changed_bytes) / interval;
    let to_copy = dirtied_per_second * (last.seconds + idle_seconds);
    // What a pass takes however little it copies, from the smallest one; what it takes for each byte, from the largest.
    let fixed = passes
        .iter()
        .map(|p| p.seconds)
        .fold(f64::INFINITY, f64::min);
    let largest = passes
        .iter()
        .max_by_key(|pass| pass.changed_bytes)
        .filter(|pass| pass.changed_bytes > 0);
    let per_byte = largest.map_or(0.0, |pass| pass.seconds / as_f64(pass.changed_bytes));
    Some(fixed + to_copy * per_byte)
}

/// What to do after the last of these passes.
#[must_use]
pub fn next(passes: &[Pass], budget: Duration) -> Next {
    let Some(predicted) = predicted_downtime(passes, 0.0) else {
        return Next::Again;
    };
    if predicted <= budget.as_secs_f64() {
        return Next::Ready;
    }
    let brings =
        |pair: &[Pass]| as_f64(pair[1].changed_bytes) < WORTHWHILE * as_f64(pair[0].changed_bytes);
    let lately = passes.len().saturating_sub(PATIENCE + 1);
    let is_patient = passes.len() <= PATIENCE || passes[lately..].windows(2).any(brings);
    if is_patient {
        return Next::Again;
    }
    let last = passes[passes.len() - 1];
    Next::Diverging(format!(
        "the last {PATIENCE} passes brought nothing: {} bytes change while a pass of {:.2} s is copied, so the source \
         would stand still for about {predicted:.2} s, and the budget is {:.2} s",
        last.changed_bytes,
        last.seconds,
        budget.as_secs_f64()
    ))
}

/// Until the `remaining` bytes of `all` are sent, if that goes on as in the time since it began.
pub(crate) fn time_left(all: u64, remaining: u64, since: Duration) -> Duration {
    let sent = as_f64(all.saturating_sub(remaining));
    let seconds = since.as_secs_f64() * as_f64(remaining) / sent;
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "an estimate needs no more digits"
)]
fn as_f64(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Passes of a disk of `disk` bytes, copied at `copies` bytes a second with 20 ms for each pass, that is dirtied at
    /// `dirties` bytes a second, until something else than another pass is to be done.
    fn run(disk: f64, copies: f64, dirties: f64, budget: f64) -> (Vec<Pass>, Next) {
        let mut passes: Vec<Pass> = Vec::new();
        let mut bytes = disk;
        loop {
            let seconds = 0.02 + bytes / copies;
            let since = passes.last().map(|last| last.seconds);
            let number = passes.len() as u64 + 1;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "bytes of a test"
            )]
            passes.push(Pass::new(number, bytes as u64, seconds, since));
            let next = next(&passes, Duration::from_secs_f64(budget));
            if next != Next::Again || passes.len() > 200 {
                return (passes, next);
            }
            bytes = (dirties * seconds).min(disk);
        }
    }

    #[test]
    fn a_quiet_disk_is_ready_after_its_second_pass() {
        let (passes, next) = run(1e9, 5e8, 1e6, 0.5);

        assert_eq!((passes.len(), next), (2, Next::Ready));
    }

    #[test]
    fn a_writer_that_is_faster_than_the_link_is_noticed_and_said_with_figures() {
        let (passes, next) = run(1e10, 1e7, 2e7, 2.0);

        let Next::Diverging(why) = next else {
            panic!("{next:?}");
        };
        assert!(why.contains("budget is 2.00 s"), "{why}");
        assert!(passes.len() <= 5, "{}", passes.len());
    }

    proptest! {
        #[test]
        fn passes_come_to_an_end_whatever_the_rates(
            disk in 1e6..1e12f64, copies in 1e5..1e10f64, dirties in 0.0..1e10f64, budget in 0.0..100.0f64,
        ) {
            let (passes, next) = run(disk, copies, dirties, budget);

            prop_assert!(next != Next::Again);
            // Each pass but the last few is smaller by a tenth at least.
            prop_assert!(passes.len() < 150, "{}", passes.len());
        }

        #[test]
        fn ready_is_what_keeps_its_word(
            disk in 1e6..1e12f64, copies in 1e6..1e10f64, share in 0.0..0.8f64, budget in 0.05..100.0f64,
        ) {
            let (passes, next) = run(disk, copies, copies * share, budget);

            if next == Next::Ready {
                let last = passes.last().expect("there is one");
                let stands_still = 0.02 + copies * share * last.seconds / copies;
                prop_assert!(stands_still <= budget * 1.2 + 0.05, "{stands_still} of {budget}");
            }
        }

        #[test]
        fn a_larger_budget_never_takes_longer(
            disk in 1e6..1e11f64, copies in 1e6..1e10f64, dirties in 0.0..1e10f64, budget in 0.0..10.0f64,
        ) {
            let (small, _) = run(disk, copies, dirties, budget);
            let (large, _) = run(disk, copies, dirties, budget * 2.0);

            prop_assert!(large.len() <= small.len());
        }
    }

    #[test]
    fn what_is_left_takes_as_long_as_what_was_sent() {
        let second = Duration::from_secs(1);
        assert_eq!(time_left(400, 100, 3 * second), second);
        assert_eq!(time_left(400, 0, second), Duration::ZERO);
        // Nothing is known of how fast it goes.
        assert_eq!(time_left(400, 400, second), Duration::MAX);
        assert_eq!(time_left(0, 0, second), Duration::MAX);
        assert_eq!(time_left(u64::MAX, u64::MAX - 1, second), Duration::MAX);
    }
}
