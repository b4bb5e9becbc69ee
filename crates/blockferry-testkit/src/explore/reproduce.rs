//! Going straight to one crash again: what a violation prints as a test that can be pasted.

use std::fmt::Write;

use super::{Events, ExploreOptions, Run, Scenario, Start, guarded, no_misuse};
use crate::sim::{Boundary, Fault, SimDisk};

/// One crash on the way to a violation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crash {
    /// The number of the last operation before it; 0: before the first.
    after: u64,
    /// What survived of the unflushed changes, and what garbage looks like; nothing if only the process died.
    power_loss: Option<(Vec<(usize, u16)>, u64)>,
}

impl Crash {
    /// The process dies after this operation; the machine lives on.
    #[must_use]
    pub fn kill(after: u64) -> Self {
        Self {
            after,
            power_loss: None,
        }
    }

    /// The power is lost after this operation. Of the unflushed changes those `survived` of which it is said, by
    /// their number, what became of them.
    #[must_use]
    pub fn power_loss(after: u64, survived: &[(usize, u16)], noise: u64) -> Self {
        Self {
            after,
            power_loss: Some((survived.to_vec(), noise)),
        }
    }

    pub(super) fn of(after: u64, start: &Start) -> Self {
        match start {
            Start::Kill(_) => Self::kill(after),
            Start::PowerLoss(image) => Self::power_loss(after, &image.outcomes(), image.noise()),
        }
    }

    fn disk(&self, boundary: &Boundary) -> SimDisk {
        match &self.power_loss {
            None => boundary.snapshot.after_kill(),
            Some((survived, noise)) => boundary.snapshot.crash_image(survived, *noise).disk(),
        }
    }

    /// As it is written in a test.
    fn code(&self) -> String {
        match &self.power_loss {
            None => format!("Crash::kill({})", self.after),
            Some((survived, noise)) => {
                format!(
                    "Crash::power_loss({}, &{survived:?}, {noise:#x})",
                    self.after
                )
            }
        }
    }
}

/// Runs a scenario into these faults and crashes, one after the other, recovers after the last one and checks.
///
/// # Errors
/// What is wrong; or there is no such operation any more, because the code or the scenario changed.
pub fn reproduce<S: Scenario>(
    options: &ExploreOptions,
    faults: &[Fault],
    crashes: &[Crash],
    scenario: &S,
) -> Result<(), String> {
    let mut run = Run::record(options, faults, scenario);
    let mut promises = Vec::new();
    for (number, crash) in crashes.iter().enumerate() {
        let boundary = run.trace.iter().find(|b| b.number == crash.after);
        let boundary = boundary.ok_or_else(|| {
            format!(
                "there is no operation {} to crash after any more",
                crash.after
            )
        })?;
        promises.extend(run.events.until(boundary.number));
        let disk = crash.disk(boundary);
        if number + 1 == crashes.len() {
            let events = Events::new(&disk);
            guarded(|| scenario.recover_and_go_on(&disk, &promises, &events))?;
            return no_misuse(&disk);
        }
        run = Run::observe(&disk, |disk, events| {
            scenario.recover_and_go_on(disk, &promises, events)
        });
    }
    run.result
}

/// The test to paste.
pub(super) fn as_test(faults: &[Fault], crashes: &[Crash]) -> String {
    let codes = |codes: Vec<String>| codes.join(", ");
    let mut text = String::new();
    let last = crashes.last().map_or(0, |crash| crash.after);
    // Writing to a string does not fail.
    let _infallible = write!(
        text,
        "#[test]\nfn a_crash_after_operation_{last}_keeps_every_promise() {{\n    \
         let faults = [{}];\n    let crashes = [{}];\n\n    \
         let outcome = reproduce(&options, &faults, &crashes, &scenario);\n\n    \
         assert_eq!(outcome, Ok(()));\n}}\n",
        codes(faults.iter().map(Fault::code).collect()),
        codes(crashes.iter().map(Crash::code).collect()),
    );
    text
}
