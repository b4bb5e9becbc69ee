//! What an exploration found, in numbers and in words.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::reproduce::{Crash, as_test};
use crate::sim::Fault;

/// What an exploration did and found. Its display form is meant for people.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Report {
    /// Reproduces the exploration.
    pub seed: u64,
    /// Recorded runs: one, or one per fault.
    pub runs: usize,
    /// Moments of these runs at which the power was cut.
    pub boundaries: usize,
    /// Different storage contents after a power loss, over all of them.
    pub distinct_images: usize,
    /// Recoveries done: one for each start and each set of promises made before.
    pub recoveries: u64,
    /// Different states that recoveries ended in and from which the work went on.
    pub continuations: u64,
    /// Images and recoveries by protocol step.
    pub steps: BTreeMap<String, StepCounts>,
    /// What went wrong.
    pub violations: Vec<Violation>,
    /// A limit of time or number was hit.
    pub cut_short: bool,
    /// Time taken.
    pub elapsed: Duration,
}

/// Counts of one protocol step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StepCounts {
    /// Crash images formed, distinct at each boundary.
    pub images: u64,
    /// Recoveries done.
    pub recoveries: u64,
    /// Recoveries that broke a promise.
    pub violations: u64,
}

/// A broken promise and the way there.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Violation {
    /// What the check said.
    pub message: String,
    /// Faults, operations and crashes that lead to it, in order.
    pub path: Vec<String>,
    /// The promises made before the last crash.
    pub promises: Vec<String>,
    /// The unflushed changes that survived the last crash, as few as show the violation.
    pub survivors: Vec<String>,
    /// How many unflushed changes did not survive it.
    pub lost: usize,
    /// The faults of the run.
    pub faults: Vec<Fault>,
    /// The crashes, in order: with the faults all that [`reproduce`](super::reproduce) needs. Empty if the run itself
    /// went wrong.
    pub crashes: Vec<Crash>,
}

impl Violation {
    pub(super) fn of_run(message: String, path: Vec<String>) -> Self {
        Self {
            message,
            path,
            promises: Vec::new(),
            survivors: Vec::new(),
            lost: 0,
            faults: Vec::new(),
            crashes: Vec::new(),
        }
    }
}

impl Report {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            seed,
            ..Self::default()
        }
    }

    pub(super) fn add(&mut self, violation: Violation) {
        self.violations.push(violation);
    }

    pub(super) fn step(&mut self, name: &str) -> &mut StepCounts {
        if !self.steps.contains_key(name) {
            self.steps.insert(name.to_owned(), StepCounts::default());
        }
        self.steps.get_mut(name).expect("inserted above")
    }

    /// Panics with the whole report unless every promise was kept and something was explored.
    ///
    /// # Panics
    /// There is a violation, or nothing was explored.
    pub fn assert_clean(&self) {
        assert!(self.violations.is_empty(), "{self}");
        assert!(
            self.recoveries > 0 && self.boundaries > 1,
            "nothing was explored\n{self}"
        );
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "seed {}: {} runs, {} boundaries, {} distinct images, {} recoveries, {} went on in {:.2} s{}",
            self.seed,
            self.runs,
            self.boundaries,
            self.distinct_images,
            self.recoveries,
            self.continuations,
            self.elapsed.as_secs_f64(),
            if self.cut_short {
                " (cut short by a limit)"
            } else {
                ""
            },
        )?;
        for (step, counts) in &self.steps {
            writeln!(
                f,
                "  {step}: {} images, {} recoveries, {} violations",
                counts.images, counts.recoveries, counts.violations
            )?;
        }
        self.violations
            .iter()
            .try_for_each(|violation| violation.fmt(f))
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  violation: {}", self.message)?;
        self.path
            .iter()
            .try_for_each(|step| writeln!(f, "    {step}"))?;
        self.promises
            .iter()
            .try_for_each(|promise| writeln!(f, "    promised: {promise}"))?;
        self.survivors
            .iter()
            .try_for_each(|change| writeln!(f, "    survived: {change}"))?;
        writeln!(f, "    lost: {} unflushed changes", self.lost)?;
        if self.crashes.is_empty() {
            return Ok(());
        }
        writeln!(
            f,
            "  as a test, where `options` and `scenario` are at hand:\n"
        )?;
        writeln!(f, "{}", as_test(&self.faults, &self.crashes))
    }
}
