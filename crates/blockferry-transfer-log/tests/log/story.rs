//! A story: steps over a list of images, on the simulated machine. Each promise that a step makes is noted; after
//! a crash recovery must keep all of them, the target must be exactly at one of the two images it can be at, and
//! the work must go on from there to the end.

use blockferry_testkit::{Events, Scenario, SimDisk};
use blockferry_transfer_log::{Prepared, Recovered, Replica, Strategy, Unwritten, inspect};

use crate::harness::{Setup, TARGET, id, quiet, root};
use crate::looked::check_looked;
use crate::model::{Model, Promise, check};

/// As much as one run of a story may write.
const SEGMENT_BYTES: u64 = 64 * 1024;
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
    /// Keep the image that the target is at.
    Anchor,
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
            Self::Anchor => "anchor",
            Self::Rollback => "roll back",
            Self::Accept => "accept",
            Self::Cancel => "cancel",
        }
    }
}

pub(crate) struct Story {
    pub(crate) setup: Setup,
    pub(crate) images: Vec<Option<Vec<u8>>>,
    /// Done before the crashes begin.
    pub(crate) before: Vec<Step>,
    pub(crate) steps: Vec<Step>,
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
            Step::Anchor => {
                replica.keep_anchor().map_err(failed)?;
                events.push(Promise::Anchored);
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

    /// No file that failed is written or flushed again through the handle it failed on (I8). A device has one handle
    /// only: what was written through it is all restored through it and read back from the medium.
    pub(crate) fn check_misuses(&self, disk: &SimDisk) -> Result<(), String> {
        let of_device = format!(" of {TARGET}");
        let allowed = |misuse: &String| self.setup.device && misuse.contains(&of_device);
        let misuses = disk.misuses();
        let mut misuses = misuses.into_iter().filter(|misuse| !allowed(misuse));
        misuses.next().map_or(Ok(()), Err)
    }

    /// Whatever became of the sessions since, the image that is kept can be read.
    fn check_anchor(&self, replica: &mut Replica, model: &Model) -> Result<(), String> {
        let Some(image) = model.anchor else {
            return Ok(());
        };
        let found = replica.anchored_point();
        let found = found.map_err(|e| format!("the anchor cannot be read: {e:?}"))?;
        let anchor = found.ok_or("nothing is kept of the anchored image")?;
        let mut content = vec![0; usize::try_from(anchor.source.size_bytes()).unwrap_or(0)];
        let read = anchor.source.read_at(0, &mut content);
        read.map_err(|e| format!("read the anchor: {e:?}"))?;
        check!(
            content == self.image(image),
            "the anchor shows something else"
        );
        check!(
            anchor.point.root == root(&content),
            "the anchor names another point"
        );
        Ok(())
    }

    /// Opening what was opened before changes nothing; leaves it open.
    fn check_twice(&self, disk: &SimDisk) -> Result<Replica, String> {
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
        Ok(replica)
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
    fn finish(
        &self,
        disk: &SimDisk,
        mut replica: Replica,
        model: &Model,
        events: &Events<Promise>,
    ) -> Result<(), String> {
        let unfinished = replica.unfinished().map(|header| header.session);
        if let (Some((image, _)), Some(unfinished)) = (model.heading, unfinished) {
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
                // Another run needs another segment; what a compaction that was cut short left does not count.
                .resume(self.setup.log_limit_bytes.saturating_add(SEGMENT_BYTES))
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
            // A roll back may have been on its way before a cancelled session came back with the lost end of its
            // cancellation: it is that session which moves the target now, not the way back.
            events.push(Promise::Heading(image, unfinished.as_bytes()[0]));
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
        self.check_twice(disk).map(drop)
    }
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
        let mut replica = self.open(disk)?;
        check_looked(looked.as_ref(), &replica)?;
        let at = self.check_place(disk, &replica, &model)?;
        self.check_anchor(&mut replica, &model)?;
        if !model.deciding || (at == model.at && replica.unfinished().is_some()) {
            self.check_acknowledged(&replica, &model)?;
        }
        if model.heading.is_none() {
            check!(
                replica.unfinished().is_none(),
                "a session came back that was done with"
            );
        }
        // Opening has reported where the target is: that must not revert either (I5).
        if model.deciding && replica.unfinished().is_none() && at != model.at {
            events.push(Promise::At(at));
        }
        Ok(())
    }

    fn go_on(
        &self,
        disk: &SimDisk,
        before: &[Promise],
        events: &Events<Promise>,
    ) -> Result<(), String> {
        let replica = self.check_twice(disk)?;
        let model = Model::after(before);
        self.finish(disk, replica, &model, events)?;
        if model.anchor.is_some() {
            self.check_anchor(&mut self.open(disk)?, &model)?;
        }
        Ok(())
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
                Step::Anchor => vec![Promise::Anchored],
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
