//! How long a lost connection is sought again, and what an attempt knows of the ones before.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::engine::{self, Attempt, Context, Event, SessionId, Target};

/// Given up when no connection held for so long.
const PATIENCE: Duration = Duration::from_secs(600);
/// A connection that lasted for so long got somewhere.
const HELD: Duration = Duration::from_secs(30);
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(100);

/// Waits longer each time, unless a connection held in between.
#[derive(Debug)]
pub(crate) struct Patience {
    /// Of every attempt.
    context: Context,
    run: SessionId,
    /// An attempt took the target, as far as was heard.
    took: Arc<AtomicBool>,
    /// When the first attempt began, or the last connection that held was lost.
    since: Duration,
    /// When the connection of this attempt was made.
    connected: Option<Duration>,
    wait: Duration,
}

impl Patience {
    /// Beginning with the first attempt, of a run in this context.
    pub(crate) fn new(context: &Context) -> Result<Self, engine::Error> {
        let (took, since) = (Arc::<AtomicBool>::default(), context.clock.now());
        let (heard, observer) = (Arc::clone(&took), Arc::clone(&context.observer));
        let listening = move |event: &Event| {
            // Decided is what to do with a target that was taken.
            if let Event::Decision(_) | Event::Checkpoint { .. } = event {
                heard.store(true, Ordering::Relaxed);
            }
            observer.event(event);
        };
        Ok(Self {
            context: context.clone().with_observer(listening),
            run: Target::random_id()?,
            took,
            since,
            connected: None,
            wait: FIRST_WAIT,
        })
    }

    /// What the run of an attempt reports to.
    pub(crate) fn context(&self) -> &Context {
        &self.context
    }

    /// What this attempt is to the target.
    pub(crate) fn attempt(&self) -> Attempt {
        Attempt::new(self.run, self.took.load(Ordering::Relaxed))
    }

    /// Whether this attempt is not the first.
    pub(crate) fn has_lost(&self) -> bool {
        self.wait > FIRST_WAIT
    }

    /// This attempt has a connection.
    pub(crate) fn connected(&mut self) {
        self.connected = Some(self.context.clock.now());
    }

    /// After a connection was lost, or not found again: waits, and says whether to try once more.
    pub(crate) fn try_again(&mut self, why: &str) -> bool {
        let (clock, cancel) = (&self.context.clock, &self.context.cancel);
        let now = clock.now();
        let connected = self.connected.take();
        if connected.is_some_and(|at| now.saturating_sub(at) >= HELD) {
            (self.since, self.wait) = (now, FIRST_WAIT);
        }
        if now.saturating_sub(self.since) >= PATIENCE || cancel.is_cancelled() {
            return false;
        }
        self.context.observer.event(&Event::Warning {
            code: "reconnecting".into(),
            message: format!("{why}; trying again in {} s", self.wait.as_secs()),
        });
        let end = now + self.wait;
        while clock.now() < end && !cancel.is_cancelled() {
            clock.sleep(TICK);
        }
        self.wait = (self.wait * 2).min(LONGEST_WAIT);
        !cancel.is_cancelled()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use blockferry_testkit::VirtualClock;

    use super::*;
    use crate::engine::Clock;

    fn context() -> (Context, Arc<VirtualClock>) {
        let clock = Arc::new(VirtualClock::default());
        let mut context = Context::default();
        context.clock = Arc::clone(&clock) as Arc<dyn Clock>;
        (context, clock)
    }

    /// The waits of attempts that take so long, each with or without a connection, until it is given up.
    fn waits(takes: Duration, connects: bool, most: usize) -> Vec<u64> {
        let (context, clock) = context();
        let mut patience = Patience::new(&context).expect("random");
        let mut waits = Vec::new();
        while waits.len() < most {
            if connects {
                patience.connected();
            }
            clock.sleep(takes);
            let before = clock.now();
            if !patience.try_again("lost") {
                break;
            }
            waits.push((clock.now() - before).as_secs());
        }
        waits
    }

    #[test]
    fn waits_grow_and_end_after_ten_minutes_in_which_no_connection_held() {
        for (takes, connects) in [(1, true), (1, false), (120, false)] {
            let waits = waits(Duration::from_secs(takes), connects, 1000);

            assert!(waits.is_sorted() && waits[0] == 1, "{waits:?}");
            assert!(waits.iter().all(|wait| *wait <= 30), "{waits:?}");
            let all = waits.iter().sum::<u64>() + (waits.len() as u64 + 1) * takes;
            assert!(
                (600..=600 + 30 + takes).contains(&all),
                "{all} s: {waits:?}"
            );
        }
    }

    #[test]
    fn connections_that_hold_are_made_again_for_ever_and_at_once() {
        assert_eq!(waits(Duration::from_secs(31), true, 100), vec![1; 100]);
    }

    #[test]
    fn an_attempt_goes_on_once_it_was_heard_that_the_target_was_taken() {
        let (context, _clock) = context();
        let patience = Patience::new(&context).expect("random");
        let first = patience.attempt();
        assert!(!first.is_another);

        patience
            .context()
            .observer
            .event(&Event::Decision("delta".to_owned()));

        assert_eq!(patience.attempt(), Attempt::new(first.run, true));
    }

    #[test]
    fn a_wait_ends_when_the_run_is_cancelled() {
        let (context, _clock) = context();
        let mut patience = Patience::new(&context).expect("random");
        assert!(!patience.has_lost());
        assert!(patience.try_again("lost"));
        assert!(patience.has_lost());

        context.cancel.cancel();

        assert!(!patience.try_again("lost"));
    }
}
