//! The crash explorer: runs a scenario once, then at every boundary forms the crash images that the fault
//! model allows, lets the scenario recover on each and checks what came out; at depth 2 the recovery is
//! crashed in the same way.
//!
//! A [`Scenario`] is production code on a [`SimDisk`] plus a model of what must hold. What it promised to
//! anyone (an acknowledgement, an outcome) it pushes to [`Events`] at the moment of the promise; recovery
//! is then checked against exactly the promises made before the crash. A violation is made as small as it can be
//! and printed with a test that goes straight there ([`reproduce`]).
//!
//! Everything follows from [`ExploreOptions::seed`]; only the time limit makes two runs differ, and the
//! report says when it was hit.

mod report;
mod reproduce;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub use report::{Report, StepCounts, Violation};
pub use reproduce::{Crash, reproduce};

use crate::random::mix;
use crate::sim::{
    Boundary, CrashImage, Fault, FaultKind, ImageLimits, Operation, OperationKind, SimDisk,
    SimOptions, Snapshot,
};

/// Production code under test and the model it is checked against.
pub trait Scenario {
    /// A promise that recovery must keep.
    type Event: Clone + Debug + Hash;

    /// Puts the initial content in place. Nothing it does is crashed; everything must end durable.
    fn prepare(&self, disk: &SimDisk);

    /// Does the work and pushes each promise when it is made.
    ///
    /// # Errors
    /// The work failed. Fine where a fault was injected, a violation otherwise.
    fn run(&self, disk: &SimDisk, events: &Events<Self::Event>) -> Result<(), String>;

    /// Recovers from what is on `disk`, pushing its own promises, and checks the outcome against the
    /// promises made `before`. Leaves nothing open.
    ///
    /// # Errors
    /// What is wrong.
    fn recover(
        &self,
        disk: &SimDisk,
        before: &[Self::Event],
        events: &Events<Self::Event>,
    ) -> Result<(), String>;

    /// Goes on with the work after a recovery, and checks that it can: finish what was begun, or take it back.
    /// Recoveries of many crash images end in one and the same state; where `disk` and the promises made
    /// `before`, those of the recovery included, are what they were another time, the explorer does not ask again.
    ///
    /// # Errors
    /// What is wrong.
    fn go_on(
        &self,
        disk: &SimDisk,
        before: &[Self::Event],
        events: &Events<Self::Event>,
    ) -> Result<(), String> {
        let _ = (disk, before, events);
        Ok(())
    }

    /// Recovers and goes on. `events` are those of this recovery: none yet.
    ///
    /// # Errors
    /// What is wrong.
    fn recover_and_go_on(
        &self,
        disk: &SimDisk,
        before: &[Self::Event],
        events: &Events<Self::Event>,
    ) -> Result<(), String> {
        self.recover(disk, before, events)?;
        self.go_on(disk, &[before, &events.all()].concat(), events)
    }
}

/// The promises made so far, each with the number of operations done by then. A clone adds to the same ones, as an
/// observer does that has to own what it notes them in.
#[derive(Clone, Debug)]
pub struct Events<E> {
    disk: SimDisk,
    list: Arc<Mutex<Vec<(u64, E)>>>,
}

impl<E: Clone> Events<E> {
    /// No promises yet, on this disk.
    #[must_use]
    pub fn new(disk: &SimDisk) -> Self {
        Self {
            disk: disk.clone(),
            list: Arc::default(),
        }
    }

    /// Notes a promise made now.
    pub fn push(&self, event: E) {
        let number = self.disk.operations();
        self.list
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((number, event));
    }

    /// All promises so far.
    #[must_use]
    pub fn all(&self) -> Vec<E> {
        self.until(u64::MAX)
    }

    /// The promises made before the operation after `number` began.
    fn until(&self, number: u64) -> Vec<E> {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.iter()
            .take_while(|(at, _)| *at <= number)
            .map(|(_, event)| event.clone())
            .collect()
    }
}

/// How far the explorer goes.
#[derive(Clone, Copy, Debug)]
#[expect(
    clippy::exhaustive_structs,
    reason = "plain options, written out by callers"
)]
pub struct ExploreOptions {
    /// The machine.
    pub sim: SimOptions,
    /// Decides every sample.
    pub seed: u64,
    /// 1: crash the run. 2: crash the recoveries as well. 3: and the recoveries from that.
    pub depth: u32,
    /// Images per boundary of the run.
    pub images: ImageLimits,
    /// Images per boundary of the run whose recovery is crashed in turn.
    pub crashed_recoveries: usize,
    /// Images per boundary of such a recovery.
    pub recovery_images: ImageLimits,
    /// No more recoveries than this.
    pub max_recoveries: u64,
    /// No longer than this.
    pub max_time: Duration,
    /// Exploration stops after this many violations.
    pub max_violations: usize,
}

impl Default for ExploreOptions {
    fn default() -> Self {
        Self {
            sim: SimOptions::default(),
            seed: 1,
            depth: 2,
            images: ImageLimits::default(),
            crashed_recoveries: 8,
            recovery_images: ImageLimits {
                exhaustive: 64,
                samples: 32,
                damaged: 4,
            },
            max_recoveries: 1_000_000,
            max_time: Duration::from_secs(60),
            max_violations: 1,
        }
    }
}

/// Explores a run without faults.
pub fn explore<S: Scenario>(options: &ExploreOptions, scenario: &S) -> Report {
    explore_with(options, &[], scenario)
}

/// Explores a run that is hit by faults; it may fail, but recovery must still keep the promises made.
pub fn explore_with<S: Scenario>(
    options: &ExploreOptions,
    faults: &[Fault],
    scenario: &S,
) -> Report {
    let mut explorer = Explorer::new(options, scenario);
    explorer.explore_run(faults, 0);
    explorer.finish()
}

/// Explores one run for each operation and each of `kinds`, in which that operation is hit by that fault.
/// Crashes before the fault are left to [`explore`].
pub fn explore_faults<S: Scenario>(
    options: &ExploreOptions,
    kinds: &[FaultKind],
    scenario: &S,
) -> Report {
    let operations = Run::record(options, &[], scenario).operations();
    let mut explorer = Explorer::new(options, scenario);
    for operation in &operations {
        for &kind in kinds {
            explorer.explore_run(&[Fault::at(operation.number, kind)], operation.number);
        }
    }
    explorer.finish()
}

/// Leaves out each barrier of the run (flush or directory sync) in turn and reports whether anything is
/// caught: a barrier that can go missing unnoticed is redundant, covered by another, or badly tested.
pub fn sensitivity<S: Scenario>(
    options: &ExploreOptions,
    scenario: &S,
) -> Vec<(Operation, Report)> {
    let is_barrier = |operation: &Operation| {
        matches!(
            operation.kind,
            OperationKind::Flush | OperationKind::SyncDirectory
        )
    };
    let without = |barrier: Operation| {
        let fault = Fault::at(barrier.number, FaultKind::Skipped);
        let report = explore_with(options, &[fault], scenario);
        (barrier, report)
    };
    let operations = Run::record(options, &[], scenario).operations();
    operations
        .into_iter()
        .filter(is_barrier)
        .map(without)
        .collect()
}

/// One recorded run.
struct Run<E> {
    result: Result<(), String>,
    trace: Vec<Boundary>,
    events: Events<E>,
    misuses: Vec<String>,
}

impl<E: Clone + Debug + Hash> Run<E> {
    fn record<S: Scenario<Event = E>>(
        options: &ExploreOptions,
        faults: &[Fault],
        scenario: &S,
    ) -> Self {
        let disk = SimDisk::new(options.sim);
        scenario.prepare(&disk);
        let prepared = disk.snapshot().after_kill();
        faults
            .iter()
            .for_each(|fault| prepared.inject(fault.clone()));
        Self::observe(&prepared, |disk, events| scenario.run(disk, events))
    }

    fn observe(
        disk: &SimDisk,
        work: impl FnOnce(&SimDisk, &Events<E>) -> Result<(), String>,
    ) -> Self {
        disk.record();
        let events = Events::new(disk);
        let result = guarded(|| work(disk, &events));
        Self {
            result,
            trace: disk.take_trace(),
            events,
            misuses: disk.misuses(),
        }
    }

    fn operations(&self) -> Vec<Operation> {
        self.trace
            .iter()
            .filter_map(|boundary| boundary.operation.clone())
            .collect()
    }
}

fn hash_of<E: Hash>(events: &[E]) -> u64 {
    let mut hasher = DefaultHasher::new();
    events.hash(&mut hasher);
    hasher.finish()
}

/// A write or flush through a handle that had failed before is never right.
fn no_misuse(disk: &SimDisk) -> Result<(), String> {
    disk.misuses().into_iter().next().map_or(Ok(()), Err)
}

/// A panic is a failed check.
fn guarded(work: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("panicked: {}", text.unwrap_or("without a message")))
    })
}

/// What recovery starts from.
enum Start {
    /// The process died, the machine did not.
    Kill(Snapshot),
    PowerLoss(CrashImage),
}

impl Start {
    fn disk(&self) -> SimDisk {
        match self {
            Self::Kill(snapshot) => snapshot.after_kill(),
            Self::PowerLoss(image) => image.disk(),
        }
    }

    fn fingerprint(&self) -> u64 {
        match self {
            Self::Kill(snapshot) => mix(snapshot.fingerprint()),
            Self::PowerLoss(image) => image.fingerprint(),
        }
    }
}

struct Explorer<'a, S: Scenario> {
    options: &'a ExploreOptions,
    scenario: &'a S,
    started: Instant,
    report: Report,
    /// Fingerprints of images, for counting.
    distinct: HashSet<u64>,
    /// Start and promises of recoveries that were done.
    checked: HashSet<(u64, u64)>,
    /// Start, promises and depth of recoveries that were crashed.
    crashed: HashSet<(u64, u64, u32)>,
    /// States and promises whose images were formed.
    formed: HashSet<(u64, u64)>,
    /// States and promises after a recovery from which the work went on well.
    went_on: HashSet<(u64, u64)>,
}

/// One boundary and the promises made before it.
struct Moment<'a, E> {
    boundary: &'a Boundary,
    events: Vec<E>,
    events_hash: u64,
    step: String,
    path: Vec<String>,
    faults: &'a [Fault],
    /// The crashes that led into the recovery this is a moment of.
    crashes: Vec<Crash>,
}

impl<'a, E: Clone + Hash> Moment<'a, E> {
    fn of_run(run: &Events<E>, boundary: &'a Boundary, faults: &'a [Fault]) -> Self {
        let operation = boundary.operation.as_ref();
        let label = operation.map_or("", |operation| &operation.label);
        let step = if label.is_empty() {
            "(no label)"
        } else {
            label
        };
        let mut path: Vec<String> = faults
            .iter()
            .map(|fault| format!("fault: {fault:?}"))
            .collect();
        path.push(after(operation));
        let mut moment = Self::new(boundary, run.until(boundary.number), step.to_owned(), path);
        moment.faults = faults;
        moment
    }

    fn of_recovery<'b>(
        &self,
        run: &Events<E>,
        boundary: &'b Boundary,
        start: &Start,
    ) -> Moment<'b, E>
    where
        'a: 'b,
    {
        let mut events = self.events.clone();
        events.extend(run.until(boundary.number));
        let mut path = self.path.clone();
        path.push(match start {
            Start::Kill(_) => "the process is killed".to_owned(),
            Start::PowerLoss(image) => format!("the power is lost, left: {:?}", image.survivors()),
        });
        path.push(format!(
            "in recovery {}",
            after(boundary.operation.as_ref())
        ));
        let step = self.step.strip_suffix(RECOVERY).unwrap_or(&self.step);
        let mut moment = Moment::new(boundary, events, format!("{step}{RECOVERY}"), path);
        moment.faults = self.faults;
        moment.crashes.clone_from(&self.crashes);
        moment.crashes.push(Crash::of(self.boundary.number, start));
        moment
    }

    fn new(boundary: &'a Boundary, events: Vec<E>, step: String, path: Vec<String>) -> Self {
        Self {
            boundary,
            events_hash: hash_of(&events),
            events,
            step,
            path,
            faults: &[],
            crashes: Vec::new(),
        }
    }
}

const RECOVERY: &str = ", then in recovery";

fn after(operation: Option<&Operation>) -> String {
    operation.map_or_else(
        || "before the first operation".to_owned(),
        |o| format!("after {o}"),
    )
}

impl<'a, S: Scenario> Explorer<'a, S> {
    fn new(options: &'a ExploreOptions, scenario: &'a S) -> Self {
        Self {
            options,
            scenario,
            started: Instant::now(),
            report: Report::new(options.seed),
            distinct: HashSet::new(),
            checked: HashSet::new(),
            crashed: HashSet::new(),
            formed: HashSet::new(),
            went_on: HashSet::new(),
        }
    }

    fn finish(mut self) -> Report {
        self.report.distinct_images = self.distinct.len();
        self.report.elapsed = self.started.elapsed();
        self.report
    }

    fn is_over(&mut self) -> bool {
        if self.report.recoveries >= self.options.max_recoveries
            || self.started.elapsed() >= self.options.max_time
        {
            self.report.cut_short = true;
        }
        self.report.cut_short || self.report.violations.len() >= self.options.max_violations
    }

    /// Explores the boundaries from operation `first` on: all of them at depth 1, then all at depth 2 and so on, in
    /// no order that would let a limit cut off the last boundaries rather than the deep end.
    fn explore_run(&mut self, faults: &[Fault], first: u64) {
        let run = Run::record(self.options, faults, self.scenario);
        self.note_run(&run, faults);
        let moments: Vec<_> = run
            .trace
            .iter()
            .filter(|boundary| boundary.number >= first)
            .map(|boundary| Moment::of_run(&run.events, boundary, faults))
            .collect();
        self.report.boundaries += moments.len();
        for moment in &moments {
            self.check_moment(moment, self.options.images);
        }
        let mut scattered: Vec<&Moment<'_, S::Event>> = moments.iter().collect();
        scattered.sort_by_key(|moment| mix(self.seed(moment)));
        for depth in 2..=self.options.depth {
            scattered
                .iter()
                .for_each(|moment| self.crash_recoveries(moment, depth));
        }
    }

    fn note_run(&mut self, run: &Run<S::Event>, faults: &[Fault]) {
        self.report.runs += 1;
        let path = || {
            faults
                .iter()
                .map(|fault| format!("fault: {fault:?}"))
                .collect()
        };
        if let (Err(message), true) = (&run.result, faults.is_empty()) {
            self.report.add(Violation::of_run(
                format!("the run failed: {message}"),
                path(),
            ));
        }
        for misuse in &run.misuses {
            self.report.add(Violation::of_run(misuse.clone(), path()));
        }
    }

    fn seed(&self, moment: &Moment<'_, S::Event>) -> u64 {
        self.options.seed ^ mix(moment.boundary.number)
    }

    fn check_moment(&mut self, moment: &Moment<'_, S::Event>, limits: ImageLimits) {
        let snapshot = &moment.boundary.snapshot;
        if !self
            .formed
            .insert((snapshot.fingerprint(), moment.events_hash))
        {
            return;
        }
        self.check(&Start::Kill(snapshot.clone()), moment);
        for image in snapshot.crash_images(self.seed(moment), limits) {
            if self.is_over() {
                return;
            }
            self.report.step(&moment.step).images += 1;
            self.distinct.insert(image.fingerprint());
            self.check(&Start::PowerLoss(image), moment);
        }
    }

    fn check(&mut self, start: &Start, moment: &Moment<'_, S::Event>) {
        if self.is_over()
            || !self
                .checked
                .insert((start.fingerprint(), moment.events_hash))
        {
            return;
        }
        self.report.recoveries += 1;
        self.report.step(&moment.step).recoveries += 1;
        if let Err(message) = self.recover(&start.disk(), moment) {
            self.note_violation(start, moment, message);
        }
    }

    fn recover(&mut self, disk: &SimDisk, moment: &Moment<'_, S::Event>) -> Result<(), String> {
        let events = Events::new(disk);
        guarded(|| self.scenario.recover(disk, &moment.events, &events))?;
        no_misuse(disk)?;
        let promises = [&*moment.events, &events.all()].concat();
        let reached = (disk.snapshot().fingerprint(), hash_of(&promises));
        if !self.went_on.contains(&reached) {
            guarded(|| self.scenario.go_on(disk, &promises, &events))?;
            no_misuse(disk)?;
            self.went_on.insert(reached);
            self.report.continuations += 1;
        }
        Ok(())
    }

    fn note_violation(&mut self, start: &Start, moment: &Moment<'_, S::Event>, message: String) {
        let (mut path, mut crashes) = (moment.path.clone(), moment.crashes.clone());
        let number = moment.boundary.number;
        let (mut survivors, mut lost) = (Vec::new(), 0);
        match start {
            Start::Kill(_) => {
                path.push("the process is killed".to_owned());
                crashes.push(Crash::kill(number));
            }
            Start::PowerLoss(image) => {
                let smallest =
                    image.minimised(|image| self.recover(&image.disk(), moment).is_err());
                path.push("the power is lost".to_owned());
                (survivors, lost) = (smallest.survivors(), smallest.lost());
                crashes.push(Crash::of(number, &Start::PowerLoss(smallest)));
            }
        }
        self.report.step(&moment.step).violations += 1;
        let promises = moment
            .events
            .iter()
            .map(|event| format!("{event:?}"))
            .collect();
        self.report.add(Violation {
            message,
            path,
            promises,
            survivors,
            lost,
            faults: moment.faults.to_vec(),
            crashes,
        });
    }

    /// Runs recovery from a few starts of this moment again, recorded, and crashes it at every boundary, as long as
    /// `depth` is more than 1.
    fn crash_recoveries(&mut self, moment: &Moment<'_, S::Event>, depth: u32) {
        if depth <= 1 {
            return;
        }
        let snapshot = &moment.boundary.snapshot;
        let images = snapshot.crash_images(self.seed(moment), self.options.images);
        let images = spread(images, self.options.crashed_recoveries);
        let starts = images.into_iter().map(Start::PowerLoss);
        for start in std::iter::once(Start::Kill(snapshot.clone())).chain(starts) {
            if self.is_over() {
                return;
            }
            if self
                .crashed
                .insert((start.fingerprint(), moment.events_hash, depth))
            {
                self.crash_recovery(&start, moment, depth - 1);
            }
        }
    }

    fn crash_recovery(&mut self, start: &Start, moment: &Moment<'_, S::Event>, depth: u32) {
        let run = Run::observe(&start.disk(), |disk, events| {
            self.scenario
                .recover_and_go_on(disk, &moment.events, events)
        });
        let inner = |boundary| moment.of_recovery(&run.events, boundary, start);
        for moment in run.trace.iter().map(inner) {
            self.check_moment(&moment, self.options.recovery_images);
            self.crash_recoveries(&moment, depth);
        }
    }
}

/// The first two (nothing and everything survives, or nearly) and others spread over the rest.
fn spread(images: impl Iterator<Item = CrashImage>, wanted: usize) -> Vec<CrashImage> {
    let mut images: Vec<CrashImage> = images.collect();
    let step = images.len().div_ceil(wanted.max(1)).max(1);
    let last = images.len().saturating_sub(1);
    let mut number = 0;
    images.retain(|_| {
        let keep = number % step == 0 || number == last;
        number += 1;
        keep && wanted > 0
    });
    images
}
