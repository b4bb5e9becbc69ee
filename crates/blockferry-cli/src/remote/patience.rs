//! How long a lost connection is sought again.

use std::thread;
use std::time::{Duration, Instant};

use crate::engine::{Context, Event};

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
    /// When the first attempt began, or the last connection that held was lost.
    since: Instant,
    begun: Instant,
    wait: Duration,
    has_lost: bool,
}

impl Patience {
    /// Beginning with the first attempt.
    pub(crate) fn new() -> Self {
        Self {
            since: Instant::now(),
            begun: Instant::now(),
            wait: FIRST_WAIT,
            has_lost: false,
        }
    }

    /// Whether this attempt is not the first.
    pub(crate) fn has_lost(&self) -> bool {
        self.has_lost
    }

    /// After a connection was lost, or not found again: waits, and says whether to try once more.
    pub(crate) fn try_again(&mut self, why: &str, context: &Context) -> bool {
        if self.begun.elapsed() >= HELD {
            (self.since, self.wait) = (Instant::now(), FIRST_WAIT);
        }
        if self.since.elapsed() >= PATIENCE || context.cancel.is_cancelled() {
            return false;
        }
        context.observer.event(&Event::Warning {
            code: "reconnecting".into(),
            message: format!("{why}; trying again in {} s", self.wait.as_secs()),
        });
        let end = Instant::now() + self.wait;
        while Instant::now() < end && !context.cancel.is_cancelled() {
            thread::sleep(TICK);
        }
        (self.begun, self.has_lost) = (Instant::now(), true);
        self.wait = (self.wait * 2).min(LONGEST_WAIT);
        !context.cancel.is_cancelled()
    }
}
