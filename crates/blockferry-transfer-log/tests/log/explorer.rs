//! Every crash of every story: production code on the simulated machine, checked against a model.
//!
//! A story is a list of steps over a list of images. Each promise that a step makes is noted; after a crash
//! recovery must keep all of them, the target must be exactly at one of the two images it can be at, and the
//! work must go on from there to the end.

use std::collections::BTreeMap;
use std::time::Duration;

use blockferry_testkit::{Events, ExploreOptions, ImageLimits, Report, Scenario, SimDisk, explore};
use blockferry_transfer_log::{
    DecisionKind, Inspection, Prepared, Recovered, Replica, Strategy, Unwritten, inspect,
};

use crate::harness::{PAGE, Setup, TARGET, id, image, quiet, root};

/// Owner, mode and the like of the first target.
const ATTRIBUTES: u64 = 77;

/// What a story does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Sync to this image with a session of this number.
    Sync(usize, u8),
    /// Stage only so many groups of this image, then the process ends.
    Stage(usize, u8, usize),
    /// Go on with the unfinished session, to this image.
    Resume(usize),
    /// Go on with the unfinished session, towards this image, but do not commit.
    Restage(usize),
    /// Write as much as one group of this image, make nothing of it durable, then the process ends.
    Abandon(usize, u8),
    /// Find that the target, as it is, holds a point of this number.
    Adopt(u8),
    Rollback,
    Accept,
    Cancel,
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Self::Sync(..) | Self::Stage(..) | Self::Abandon(..) => "begin",
            Self::Resume(_) | Self::Restage(_) => "resume",
            Self::Adopt(_) => "adopt",
            Self::Rollback => "roll back",
            Self::Accept => "accept",
            Self::Cancel => "cancel",
        }
    }
}

/// What was promised, or begun, before a crash.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Promise {
    /// The target may move to this image from now on, by this session.
    Heading(usize, u8),
    /// The decision to move was on its way.
    Deciding,
    /// The target is at this image.
    At(usize),
    /// So much is durable: sequence, and bytes staged.
    Acknowledged(u64, u64),
    Cancelling,
    Cancelled,
    Accepting,
    Accepted,
    Adopting,
    Adopted,
}

pub(crate) struct Story {
    pub(crate) setup: Setup,
    pub(crate) images: Vec<Option<Vec<u8>>>,
    /// Done before the crashes begin.
    pub(crate) before: Vec<Step>,
    pub(crate) steps: Vec<Step>,
}

/// What the model knows after a list of promises.
#[derive(Clone, Debug)]
struct Model {
    at: usize,
    heading: Option<(usize, u8)>,
    deciding: bool,
    acknowledged: Option<(u64, u64)>,
    cancelling: bool,
    /// Given up by name and not whole again.
    given_up: bool,
    /// The image before, while there is a way back.
    way_back: Option<usize>,
}

impl Model {
    fn after(promises: &[Promise]) -> Self {
        let mut model = Self {
            at: 0,
            heading: None,
            deciding: false,
            acknowledged: None,
            cancelling: false,
            given_up: false,
            way_back: None,
        };
        promises.iter().for_each(|p| model.take(p));
        model
    }

    fn take(&mut self, promise: &Promise) {
        match promise {
            Promise::Heading(image, session) => {
                if self.heading.is_some_and(|(before, _)| before != *image) {
                    // In a working file, what was acknowledged may be overwritten with something else now.
                    self.acknowledged = self.acknowledged.map(|(sequence, _)| (sequence, 0));
                }
                self.heading = Some((*image, *session));
            }
            Promise::Deciding => self.deciding = true,
            Promise::At(image) => {
                let back = self.heading.is_some_and(|(_, session)| session == 0);
                self.way_back = Some(self.at).filter(|_| !back);
                self.given_up = false;
                self.at = *image;
                self.settle();
            }
            Promise::Acknowledged(sequence, bytes) => {
                self.acknowledged = Some((*sequence, *bytes));
            }
            Promise::Cancelling => self.cancelling = true,
            Promise::Cancelled => {
                self.given_up = true;
                self.settle();
            }
            Promise::Accepting | Promise::Adopting => {}
            Promise::Accepted | Promise::Adopted => self.way_back = None,
        }
    }

    fn settle(&mut self) {
        self.heading = None;
        self.deciding = false;
        self.acknowledged = None;
        self.cancelling = false;
    }
}

macro_rules! check {
    ($holds:expr, $($text:tt)+) => {
        if !$holds {
            return Err(format!($($text)+));
        }
    };
}

impl Story {
    pub(crate) fn name(&self) -> String {
        format!(
            "{} {:?} after {:?}",
            self.setup.strategy, self.steps, self.before
        )
    }

    pub(crate) fn image(&self, number: usize) -> &[u8] {
        self.images[number].as_deref().unwrap_or_default()
    }

    fn do_step(&self, disk: &SimDisk, step: Step, events: &Events<Promise>) -> Result<(), String> {
        self.label(disk, "open");
        let mut replica = self.open(disk)?;
        self.label(disk, step.name());
        let failed = |e: blockferry_transfer_log::Error| format!("{step:?}: {e:?}");
        match step {
            Step::Sync(image, session) => {
                events.push(Promise::Heading(image, session));
                self.stage_and_commit(
                    disk,
                    &mut replica,
                    image,
                    Some(session),
                    usize::MAX,
                    events,
                )?;
                events.push(Promise::At(image));
            }
            Step::Stage(image, session, groups) => {
                events.push(Promise::Heading(image, session));
                self.stage_and_commit(disk, &mut replica, image, Some(session), groups, events)?;
            }
            Step::Resume(image) => {
                let model = Model::after(&events.all());
                let (_, session) = model.heading.ok_or("the story has no session")?;
                events.push(Promise::Heading(image, session));
                self.stage_and_commit(disk, &mut replica, image, None, usize::MAX, events)?;
                events.push(Promise::At(image));
            }
            Step::Restage(image) => {
                let model = Model::after(&events.all());
                let (_, session) = model.heading.ok_or("the story has no session")?;
                events.push(Promise::Heading(image, session));
                self.stage_and_commit(disk, &mut replica, image, None, usize::MAX - 1, events)?;
            }
            Step::Abandon(image, session) => {
                events.push(Promise::Heading(image, session));
                self.abandon(&mut replica, image, session).map_err(failed)?;
            }
            Step::Adopt(point) => {
                let here = self.image(Model::after(&events.all()).at);
                let plan = self.setup.plan(point, here);
                events.push(Promise::Adopting);
                replica
                    .adopt(id(point), root(here), plan.geometry, plan.source, 0)
                    .map_err(failed)?;
                events.push(Promise::Adopted);
            }
            Step::Rollback => {
                let model = Model::after(&events.all());
                let back = model.way_back.ok_or("the story has no way back")?;
                events.push(Promise::Heading(back, 0));
                events.push(Promise::Deciding);
                replica.rollback(&quiet).map_err(failed)?;
                events.push(Promise::At(back));
            }
            Step::Accept => {
                events.push(Promise::Accepting);
                replica.accept().map_err(failed)?;
                events.push(Promise::Accepted);
            }
            Step::Cancel => {
                events.push(Promise::Cancelling);
                replica.cancel().map_err(failed)?;
                events.push(Promise::Cancelled);
            }
        }
        Ok(())
    }

    /// Records are written that nobody flushed: a restart finds them in the cache.
    fn abandon(
        &self,
        replica: &mut Replica,
        image: usize,
        session: u8,
    ) -> blockferry_transfer_log::Result<()> {
        let new = self.image(image);
        let target = replica.target();
        let mut session = replica.begin(&self.setup.plan(session, new))?;
        // The names are durable, the records to come are not.
        session.close_group()?;
        let batches = self.setup.batches(&session, target.as_ref(), new)?;
        batches
            .into_iter()
            .take(self.setup.group_batches)
            .try_for_each(|batch| session.stage(batch))
    }

    fn stage_and_commit(
        &self,
        disk: &SimDisk,
        replica: &mut Replica,
        image: usize,
        begin: Option<u8>,
        groups: usize,
        events: &Events<Promise>,
    ) -> Result<(), String> {
        let failed = |e: blockferry_transfer_log::Error| format!("sync to image {image}: {e:?}");
        let new = self.image(image);
        let target = replica.target();
        let mut session = match begin {
            Some(number) => replica.begin(&self.setup.plan(number, new)),
            None => replica.resume(self.setup.log_limit_bytes),
        }
        .map_err(failed)?;
        let manifest = session.create_manifest().map_err(failed)?;
        self.label(disk, "stage");
        let mut left = groups;
        while left > 0 {
            let before = session.checkpoint();
            self.setup
                .stage(&mut session, target.as_ref(), new, 1, &mut |_| {})
                .map_err(failed)?;
            if session.checkpoint() == before {
                break;
            }
            // A resumed session may replace what was acknowledged by something smaller.
            let live = session.totals().live_bytes;
            let bytes = if begin.is_some() { live } else { 0 };
            events.push(Promise::Acknowledged(session.checkpoint().sequence, bytes));
            left -= 1;
        }
        check!(
            session.totals().restaged_bytes == 0,
            "{} durable bytes were staged again",
            session.totals().restaged_bytes
        );
        if groups != usize::MAX {
            return Ok(());
        }
        self.label(disk, "prepare");
        manifest.finish().map_err(failed)?;
        self.setup
            .finish(&mut session, target.as_ref(), new)
            .map_err(failed)?;
        events.push(Promise::Deciding);
        self.label(disk, "commit");
        let applying = |_, _| self.label(disk, "apply");
        session.commit(root(new), &applying).map_err(failed)?;
        Ok(())
    }

    /// Names the protocol step that follows, for the report.
    fn label(&self, disk: &SimDisk, step: &str) {
        disk.label(&format!("{} {step}", self.setup.strategy));
    }

    pub(crate) fn open(&self, disk: &SimDisk) -> Result<Replica, String> {
        self.setup.open(disk).map_err(|e| format!("open: {e:?}"))
    }

    fn is_in_place(&self) -> bool {
        self.setup.strategy == Strategy::Direct && self.images[0].is_some()
    }

    /// In place, the old content is gone from the start, and after a cancel until the next sync.
    fn may_be_torn(&self, model: &Model) -> bool {
        self.is_in_place() && (model.heading.is_some() || model.given_up)
    }

    pub(crate) fn shows(&self, disk: &SimDisk) -> Option<usize> {
        let content = self.setup.content(disk);
        self.images.iter().position(|image| *image == content)
    }

    /// What must hold of the bytes before anything is recovered (I1).
    fn check_untouched(&self, disk: &SimDisk, model: &Model) -> Result<(), String> {
        let in_flight = model.deciding || self.may_be_torn(model);
        check!(
            in_flight || self.shows(disk) == Some(model.at),
            "the target changed although nothing was decided"
        );
        Ok(())
    }

    fn check_place(
        &self,
        disk: &SimDisk,
        replica: &Replica,
        model: &Model,
    ) -> Result<usize, String> {
        let shown = self.shows(disk);
        if self.may_be_torn(model) && !matches!(replica.recovered(), Recovered::Applied(_)) {
            return Ok(shown.unwrap_or(model.at));
        }
        let mut allowed = vec![model.at];
        if model.deciding {
            allowed.extend(model.heading.map(|(image, _)| image));
        }
        if !self.setup.device && self.images[0].is_some() {
            let attributes = disk.attributes(&format!("images/{TARGET}"));
            check!(
                attributes == Some(ATTRIBUTES),
                "owner and mode were lost: {attributes:?}"
            );
        }
        let shown = shown.filter(|image| allowed.contains(image));
        let at = shown.ok_or_else(|| {
            format!(
                "after recovery ({:?}) the target is none of the images {allowed:?}",
                replica.recovered()
            )
        })?;
        check!(
            replica.unfinished().is_none()
                || at == model.at
                || self.images[at] == self.images[model.at],
            "the target moved, but its session is still staging"
        );
        if let (Some(point), Ok(Unwritten::Proven)) = (replica.point(), replica.unwritten()) {
            check!(
                point.root == root(self.image(at)),
                "the state claims another point than the target is at"
            );
        }
        Ok(at)
    }

    fn check_twice(&self, disk: &SimDisk) -> Result<(), String> {
        let names = |dir: &str| disk.dir(dir).names().unwrap_or_default();
        let before = (self.setup.content(disk), names("state"), names("images"));
        let replica = self.open(disk)?;
        check!(
            matches!(replica.recovered(), Recovered::Clean | Recovered::Staging),
            "opening again recovered {:?}",
            replica.recovered()
        );
        let after = (self.setup.content(disk), names("state"), names("images"));
        check!(
            before == after,
            "opening again changed something: {:?} {:?}, {:?} {:?}",
            before.1,
            before.2,
            after.1,
            after.2
        );
        Ok(())
    }

    /// An acknowledgement holds: the session is there, and what it staged reads back.
    fn check_acknowledged(&self, replica: &Replica, model: &Model) -> Result<(), String> {
        let Some((sequence, _)) = model.acknowledged.filter(|_| !model.cancelling) else {
            return Ok(());
        };
        let header = replica.unfinished().map(|h| h.session);
        let expected = model.heading.map(|(_, session)| id(session));
        check!(
            header.is_some() && header == expected,
            "record {sequence} was acknowledged, but recovery found session {header:?}"
        );
        check!(
            matches!(replica.can_resume(), Ok(true)),
            "record {sequence} was acknowledged, but the session cannot go on"
        );
        Ok(())
    }

    /// Whatever is left must be able to go on: to the new image, or back to the old one.
    fn go_on(
        &self,
        disk: &SimDisk,
        mut replica: Replica,
        model: &Model,
        events: &Events<Promise>,
    ) -> Result<(), String> {
        if let (Some((image, _)), true) = (model.heading, replica.unfinished().is_some()) {
            if !matches!(replica.can_resume(), Ok(true)) {
                check!(
                    model.acknowledged.is_none() || model.cancelling,
                    "cannot resume"
                );
                replica.cancel().map_err(|e| format!("cancel: {e:?}"))?;
                return self.check_twice_after(disk, replica);
            }
            let acknowledged = model.acknowledged.filter(|_| !model.cancelling);
            let new = self.image(image);
            let target = replica.target();
            let mut session = replica
                // Without a limit: what compactions that were cut short left counts as well.
                .resume(u64::MAX)
                .map_err(|e| format!("resume: {e:?}"))?;
            let resumed = session.totals().resumed_bytes;
            let watermark = session.checkpoint().sequence;
            if let Some((sequence, bytes)) = acknowledged {
                check!(
                    watermark >= sequence,
                    "record {sequence} was acknowledged, but only {watermark} came back"
                );
                check!(
                    resumed >= bytes,
                    "{bytes} bytes were acknowledged, but only {resumed} came back"
                );
            }
            if acknowledged.is_some_and(|(_, bytes)| bytes > 0) {
                let found = session.prepare().map_err(|e| format!("resumed: {e:?}"))?;
                check!(
                    matches!(found, Prepared::Complete),
                    "what was acknowledged did not read back: {found:?}"
                );
            }
            self.setup
                .finish(&mut session, target.as_ref(), new)
                .map_err(|e| format!("resumed: {e:?}"))?;
            let totals = session.totals();
            check!(
                totals.restaged_bytes == 0,
                "{} bytes staged again",
                totals.restaged_bytes
            );
            events.push(Promise::Deciding);
            session
                .commit(root(new), &quiet)
                .map_err(|e| format!("commit after resume: {e:?}"))?;
            events.push(Promise::At(image));
            check!(self.shows(disk) == Some(image), "resumed to something else");
            return self.check_twice_after(disk, replica);
        }
        let proven = matches!(replica.unwritten(), Ok(Unwritten::Proven));
        if replica.retained().is_some() && proven {
            let back = model
                .way_back
                .ok_or("a way back is kept, but the model knows none")?;
            events.push(Promise::Heading(back, 0));
            events.push(Promise::Deciding);
            replica
                .rollback(&quiet)
                .map_err(|e| format!("rollback: {e:?}"))?;
            events.push(Promise::At(back));
            check!(
                self.shows(disk) == Some(back),
                "rolled back to something else"
            );
            return self.check_twice_after(disk, replica);
        }
        Ok(())
    }

    fn check_twice_after(&self, disk: &SimDisk, replica: Replica) -> Result<(), String> {
        drop(replica);
        self.check_twice(disk)
    }
}

/// What was seen without a lock and without recovering agrees with what opening then found and did.
pub(crate) fn check_looked(looked: Option<&Inspection>, replica: &Replica) -> Result<(), String> {
    let recovered = replica.recovered();
    let Some(looked) = looked else {
        check!(
            *recovered == Recovered::Clean && replica.point().is_none(),
            "no state was seen, but opening recovered {recovered:?}"
        );
        return Ok(());
    };
    let unfinished = looked.unfinished.as_ref();
    let seen = unfinished.map(|u| (u.header.session, u.decision));
    let expected = match (seen, recovered) {
        (None, Recovered::Clean) => true,
        // Only the decision that says so had to be written again.
        (None, Recovered::Applied(done)) => looked.point.as_ref().is_some_and(|p| p.id == *done),
        (Some((session, None | Some(DecisionKind::GiveUp))), Recovered::Staging) => {
            replica.unfinished().map(|h| h.session) == Some(session)
        }
        // Of a prepared member its group decides, which looking does not ask.
        (Some((_, Some(DecisionKind::Prepared))), Recovered::Clean) => true,
        (Some((session, Some(DecisionKind::Prepared))), Recovered::GroupPending(done)) => {
            session == *done
        }
        (Some((session, Some(decision))), Recovered::Applied(done)) => {
            let carried_out = [
                DecisionKind::Prepared,
                DecisionKind::Commit,
                DecisionKind::Applied,
            ];
            session == *done && carried_out.contains(&decision)
        }
        (Some((session, Some(decision))), Recovered::RolledBack(done)) => {
            let carried_out = [DecisionKind::Rollback, DecisionKind::RolledBack];
            session == *done && carried_out.contains(&decision)
        }
        _ => false,
    };
    check!(
        expected,
        "looking saw {seen:?}, but opening recovered {recovered:?}"
    );
    let settled = matches!(recovered, Recovered::Clean | Recovered::Staging);
    check!(
        !settled || looked.point.as_ref() == replica.point(),
        "looking saw the point {:?}, opening found {:?}",
        looked.point,
        replica.point()
    );
    check!(
        !settled || looked.retained.as_ref() == replica.retained(),
        "looking saw {:?} kept, opening found {:?}",
        looked.retained,
        replica.retained()
    );
    Ok(())
}

impl Scenario for Story {
    type Event = Promise;

    fn prepare(&self, disk: &SimDisk) {
        self.setup.install(disk, self.images[0].as_deref());
        disk.set_attributes(&format!("images/{TARGET}"), ATTRIBUTES);
        let events = Events::new(disk);
        for step in &self.before {
            self.do_step(disk, *step, &events)
                .expect("the story begins well");
        }
        for dir in ["state", "images"] {
            disk.dir(dir).sync().expect("no faults yet");
        }
    }

    fn run(&self, disk: &SimDisk, events: &Events<Promise>) -> Result<(), String> {
        for promise in self.promises_before() {
            events.push(promise);
        }
        for step in &self.steps {
            self.do_step(disk, *step, events)?;
        }
        Ok(())
    }

    fn recover(
        &self,
        disk: &SimDisk,
        before: &[Promise],
        events: &Events<Promise>,
    ) -> Result<(), String> {
        let model = Model::after(before);
        self.check_untouched(disk, &model)?;
        let looked = inspect(&self.setup.place(disk), &*disk.dir("state"))
            .map_err(|e| format!("looking failed: {e:?}"))?;
        let replica = self.open(disk)?;
        check_looked(looked.as_ref(), &replica)?;
        let at = self.check_place(disk, &replica, &model)?;
        if !model.deciding || (at == model.at && replica.unfinished().is_some()) {
            self.check_acknowledged(&replica, &model)?;
        }
        if model.heading.is_none() {
            check!(
                replica.unfinished().is_none(),
                "a session came back that was done with"
            );
        }
        let mut model = model;
        if model.deciding && replica.unfinished().is_none() {
            // Opening has reported where the target is: that must not revert either (I5).
            if at != model.at {
                events.push(Promise::At(at));
                model.take(&Promise::At(at));
            }
        }
        drop(replica);
        self.check_twice(disk)?;
        let replica = self.open(disk)?;
        self.go_on(disk, replica, &model, events)
    }
}

impl Story {
    /// The promises of `before`, made again for the model.
    fn promises_before(&self) -> Vec<Promise> {
        let mut promises = Vec::new();
        let mut model = Model::after(&[]);
        for step in &self.before {
            let made = match *step {
                Step::Sync(image, session) => {
                    vec![Promise::Heading(image, session), Promise::At(image)]
                }
                Step::Stage(image, session, _) => vec![Promise::Heading(image, session)],
                Step::Resume(image) => {
                    let (_, session) = model.heading.expect("the story has a session");
                    vec![Promise::Heading(image, session), Promise::At(image)]
                }
                Step::Restage(image) => {
                    let (_, session) = model.heading.expect("the story has a session");
                    vec![Promise::Heading(image, session)]
                }
                Step::Abandon(image, session) => vec![Promise::Heading(image, session)],
                Step::Adopt(_) => vec![Promise::Adopted],
                Step::Rollback => {
                    let back = model.way_back.expect("the story has a way back");
                    vec![Promise::Heading(back, 0), Promise::At(back)]
                }
                Step::Accept => vec![Promise::Accepted],
                Step::Cancel => vec![Promise::Cancelled],
            };
            made.iter().for_each(|p| model.take(p));
            promises.extend(made);
        }
        promises
    }
}

/// Explores as much as the machine's owner has time for instead of a sample.
fn is_long() -> bool {
    std::env::var_os("BLOCKFERRY_EXPLORE_LONG").is_some()
}

/// Another seed draws other samples; every report prints its own.
pub(crate) fn seed() -> u64 {
    let wanted = std::env::var("BLOCKFERRY_EXPLORE_SEED").ok();
    wanted.map_or(1, |text| text.parse().expect("a seed is a number"))
}

/// Bounded by numbers, not by time: what is explored must not depend on what else the machine is doing.
pub(crate) fn options() -> ExploreOptions {
    let long = is_long();
    ExploreOptions {
        seed: seed(),
        depth: 2,
        images: if long { MANY } else { FEW },
        crashed_recoveries: if long { 8 } else { 1 },
        recovery_images: ImageLimits {
            exhaustive: 16,
            samples: if long { 64 } else { 12 },
            damaged: if long { 16 } else { 3 },
        },
        max_recoveries: if long { u64::MAX } else { 20_000 },
        max_time: if long { HOUR } else { HOUR / 6 },
        ..ExploreOptions::default()
    }
}

const HOUR: Duration = Duration::from_secs(3600);

const FEW: ImageLimits = ImageLimits {
    exhaustive: 256,
    samples: 56,
    damaged: 10,
};

const MANY: ImageLimits = ImageLimits {
    exhaustive: 4096,
    samples: 256,
    damaged: 64,
};

pub(crate) fn four_images() -> Vec<Option<Vec<u8>>> {
    let whole = 6 * PAGE;
    vec![
        Some(image(&[1, 2, 0, 4, 5, 6], whole)),
        Some(image(&[1, 9, 3, 4, 0, 6], whole)),
        Some(image(&[1, 9, 0, 14, 15, 6], whole)),
        Some(image(&[0, 2, 7, 4, 15, 16], whole)),
    ]
}

pub(crate) fn sizes() -> Vec<Option<Vec<u8>>> {
    vec![
        Some(image(&[1, 2, 0, 4], 4 * PAGE - 50)),
        Some(image(&[1, 9, 3, 4, 5, 0, 7], 7 * PAGE - 3)),
        Some(image(&[8, 9], PAGE + 90)),
    ]
}

pub(crate) fn story(
    setup: Setup,
    images: Vec<Option<Vec<u8>>>,
    before: &[Step],
    steps: &[Step],
) -> Story {
    Story {
        setup,
        images,
        before: before.to_vec(),
        steps: steps.to_vec(),
    }
}

/// Explores, prints what was explored, and fails if a promise was broken or a limit was hit.
pub(crate) fn run_with<S: Scenario>(options: &ExploreOptions, name: &str, scenario: &S) -> Report {
    let report = explore(options, scenario);
    println!("{name}\n{report}");
    report.assert_clean();
    assert!(!report.cut_short, "{name}: not all of it was explored");
    report
}

pub(crate) fn run_story(story: &Story) -> Report {
    run_with(&options(), &story.name(), story)
}

/// Counts of several reports by protocol step.
#[derive(Default)]
struct Explored {
    images: usize,
    recoveries: u64,
    steps: BTreeMap<String, u64>,
}

impl Explored {
    fn add(&mut self, report: &Report) {
        self.images += report.distinct_images;
        self.recoveries += report.recoveries;
        for (step, counts) in &report.steps {
            *self.steps.entry(step.clone()).or_default() += counts.recoveries;
        }
    }

    /// A step of which nothing is explored would be a hole in the proof.
    fn assert_covers(&self, strategy: Strategy, steps: &[&str]) {
        println!(
            "{strategy}: {} distinct images, {} recoveries",
            self.images, self.recoveries
        );
        for (step, recoveries) in &self.steps {
            println!("  {step}: {recoveries} recoveries");
        }
        for step in steps {
            for name in [
                format!("{strategy} {step}"),
                format!("{strategy} {step}, then in recovery"),
            ] {
                let explored = self.steps.get(&name).copied().unwrap_or(0);
                assert!(
                    explored > 0,
                    "nothing was explored of {name:?}: {:?}",
                    self.steps
                );
            }
        }
    }
}

fn stories(setup: Setup) -> Vec<Story> {
    let one = |before: &[Step], steps: &[Step]| story(setup, four_images(), before, steps);
    let mut all = vec![
        one(&[], &[Step::Sync(1, 1)]),
        one(&[Step::Sync(1, 1)], &[Step::Sync(2, 2)]),
        one(&[], &[Step::Stage(1, 1, 1), Step::Resume(1)]),
        one(&[], &[Step::Stage(2, 1, 1), Step::Resume(1)]),
        one(
            &[Step::Sync(1, 1)],
            &[Step::Stage(2, 2, 1), Step::Cancel, Step::Sync(3, 3)],
        ),
    ];
    if setup.strategy != Strategy::Direct {
        all.push(one(&[Step::Sync(1, 1)], &[Step::Accept]));
        all.push(one(&[Step::Sync(1, 1)], &[Step::Accept, Step::Sync(2, 2)]));
    }
    if setup.strategy != Strategy::Direct {
        all.push(one(&[Step::Sync(1, 1)], &[Step::Rollback]));
        all.push(one(
            &[Step::Sync(1, 1), Step::Sync(2, 2)],
            &[Step::Rollback, Step::Sync(3, 3)],
        ));
    }
    if !setup.device {
        all.push(story(setup, sizes(), &[], &[Step::Sync(1, 1)]));
        all.push(story(
            setup,
            sizes(),
            &[Step::Sync(1, 1)],
            &[Step::Sync(2, 2)],
        ));
    }
    if !setup.device && setup.strategy != Strategy::Direct {
        all.push(story(
            setup,
            sizes(),
            &[Step::Sync(1, 1)],
            &[Step::Rollback],
        ));
        all.push(story(
            setup,
            sizes(),
            &[Step::Sync(2, 1)],
            &[Step::Rollback],
        ));
    }
    all
}

fn explore_all(setup: Setup, steps: &[&str]) {
    let mut explored = Explored::default();
    for story in stories(setup) {
        explored.add(&run_story(&story));
    }
    explored.assert_covers(setup.strategy, steps);
    assert!(explored.recoveries > 1000);
}

/// Of every strategy.
const EVERYWHERE: [&str; 7] = [
    "open", "begin", "stage", "prepare", "commit", "resume", "cancel",
];
/// Where an old point is kept.
const WITH_A_WAY_BACK: [&str; 9] = [
    "open",
    "begin",
    "stage",
    "prepare",
    "commit",
    "resume",
    "cancel",
    "roll back",
    "accept",
];

#[test]
fn redo_on_a_file_survives_every_crash() {
    explore_all(Setup::file(Strategy::Redo), &WITH_A_WAY_BACK);
}

#[test]
fn redo_on_a_device_survives_every_crash() {
    explore_all(Setup::device(Strategy::Redo), &WITH_A_WAY_BACK);
}

#[test]
fn clone_survives_every_crash() {
    explore_all(Setup::file(Strategy::Clone), &WITH_A_WAY_BACK);
}

#[test]
fn shadow_survives_every_crash() {
    explore_all(Setup::file(Strategy::Shadow), &WITH_A_WAY_BACK);
}

#[test]
fn direct_in_place_survives_every_crash() {
    explore_all(Setup::file(Strategy::Direct).without_undo(), &EVERYWHERE);
}

#[test]
fn direct_to_an_absent_file_survives_every_crash() {
    let mut images = four_images();
    images[0] = None;
    let setup = Setup::file(Strategy::Direct).without_undo();
    run_story(&story(setup, images.clone(), &[], &[Step::Sync(1, 1)]));
    run_story(&story(
        setup,
        images,
        &[],
        &[Step::Stage(2, 1, 1), Step::Resume(1)],
    ));
}

#[test]
fn redo_without_undo_survives_every_crash() {
    let setup = Setup::file(Strategy::Redo).without_undo();
    run_story(&story(setup, four_images(), &[], &[Step::Sync(1, 1)]));
    run_story(&story(setup, sizes(), &[], &[Step::Sync(1, 1)]));
}

/// Barriers whose loss this story cannot show, and why.
///
/// | barrier | why |
/// |---|---|
/// | state, at open | only a killed predecessor leaves something unflushed; nobody was killed before this story |
/// | manifest | it checks itself; without it the next sync reads the target |
/// | state, after apply | COMMIT is durable and its log is still there: recovery reaches the same point again |
fn is_covered(operation: &str, label: &str, number: usize, of: usize) -> bool {
    let at_open = number == 0;
    let last = number + 1 == of && (label.ends_with(" commit") || label.ends_with(" apply"));
    at_open || last || operation.ends_with(".manifest")
}

#[test]
fn the_explorer_catches_every_harmful_barrier_that_goes_missing() {
    let options = ExploreOptions {
        depth: 1,
        ..options()
    };
    let setups = [
        (Setup::file(Strategy::Redo), true),
        (Setup::device(Strategy::Redo), true),
        (Setup::file(Strategy::Clone), true),
        (Setup::file(Strategy::Shadow), true),
        // Without a way back the log is removed at once: then even the last barrier shows.
        (Setup::file(Strategy::Redo).without_undo(), false),
    ];
    for (setup, keeps_log) in setups {
        let story = story(
            setup,
            four_images(),
            &[Step::Sync(1, 1)],
            &[Step::Sync(2, 2)],
        );
        let barriers = blockferry_testkit::sensitivity(&options, &story);
        let count = barriers.len();
        for (number, (barrier, report)) in barriers.into_iter().enumerate() {
            let caught = !report.violations.is_empty();
            println!("{:?} without {barrier}: caught {caught}", setup.strategy);
            let covered = is_covered(&barrier.subject, &barrier.label, number, count);
            let last_shows = !keeps_log && number + 1 == count;
            assert!(
                caught || (covered && !last_shows),
                "{:?} without {barrier} [{}] went unnoticed",
                setup.strategy,
                barrier.label
            );
        }
    }
}
