//! A life of a replica read from bytes: syncs, cuts, faults, recoveries, ways back. A model knows at each moment which
//! images the target may be at; it is never at anything else, and the work can always go on.
#![no_main]

#[allow(dead_code)]
#[path = "../../crates/blockferry-transfer-log/tests/log/harness.rs"]
mod harness;

use arbitrary::Arbitrary;
use blockferry_fuzz::text;
use blockferry_testkit::{FaultKind, ImageLimits, Repeat, SimDisk};
use blockferry_transfer_log::{Error, Replica, SessionId, Strategy, Unwritten, inspect};
use libfuzzer_sys::fuzz_target;

use harness::{PAGE, Setup, image, quiet, root};

const MAX_STEPS: usize = 10;
const MAX_PAGES: usize = 4;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Operation {
    Sync(u8),
    Stage(u8, u8),
    Rollback,
    Accept,
    Cancel,
    Reopen,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Cut {
    Kill,
    /// Which of the images that power loss may leave.
    PowerLoss(u8),
    Io,
    NoSpace,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Step {
    operation: Operation,
    /// After how many operations of the machine, and how.
    cut: Option<(u8, Cut)>,
    /// The same for the recovery that follows.
    again: Option<(u8, Cut)>,
}

#[derive(Arbitrary, Debug)]
struct Input {
    kind: u8,
    options: u8,
    images: [[u8; MAX_PAGES]; 3],
    /// Bytes that each image lacks at its end.
    shorter: [u16; 3],
    steps: Vec<Step>,
}

impl Input {
    fn setup(&self) -> Setup {
        let mut setup = match self.kind % 4 {
            0 => Setup::device(Strategy::Redo),
            1 => Setup::file(Strategy::Redo),
            2 => Setup::file(Strategy::Clone),
            _ => Setup::file(Strategy::Shadow),
        };
        if self.options & 1 != 0 {
            setup = setup.without_undo();
        }
        if self.options & 2 != 0 {
            setup = setup.at_once();
        }
        setup.frames = self.options & 4 != 0;
        setup
    }

    fn image(&self, number: u8, setup: &Setup) -> Vec<u8> {
        let number = usize::from(number) % self.images.len();
        // A device has one size; a file may have any.
        let shorter = if setup.device {
            0
        } else {
            usize::from(self.shorter[number]) % (MAX_PAGES * PAGE)
        };
        image(&self.images[number], MAX_PAGES * PAGE - shorter)
    }
}

/// The machine, and what may be on it.
struct Life {
    setup: Setup,
    disk: SimDisk,
    at: Vec<u8>,
    /// What a way back leads to; nothing where that is not certain.
    before: Option<Vec<u8>>,
    sessions: u8,
    /// The last record that was acknowledged, while its session must still be there.
    acknowledged: Option<(SessionId, u64)>,
}

fuzz_target!(|input: Input| {
    let setup = input.setup();
    let at = input.image(0, &setup);
    let disk = setup.machine(Some(&at));
    let mut life = Life {
        setup,
        disk,
        at,
        before: None,
        sessions: 0,
        acknowledged: None,
    };
    for step in input.steps.iter().take(MAX_STEPS) {
        life.live(&input, step);
    }
    // Whatever happened, the work goes on to the end.
    for number in [1, 2] {
        let new = input.image(number, &life.setup);
        life.run(&Operation::Sync(number), &new)
            .expect("nothing is in the way");
        life.expect_at(&[&new]);
        life.arrive(new);
    }
});

impl Life {
    fn live(&mut self, input: &Input, step: &Step) {
        let goal = match step.operation {
            Operation::Sync(image) => input.image(image, &self.setup),
            Operation::Stage(image, _) => input.image(image, &self.setup),
            Operation::Rollback | Operation::Accept | Operation::Cancel | Operation::Reopen => {
                Vec::new()
            }
        };
        self.cut_in(step.cut);
        let done = self.run(&step.operation, &goal);
        let may_move_to = match step.operation {
            Operation::Sync(_) => Some(goal),
            Operation::Rollback => self
                .before
                .clone()
                .or_else(|| self.setup.content(&self.disk)),
            _ => None,
        };
        match (done, step.cut) {
            (Ok(true), _) => self.arrive_at(may_move_to, &step.operation),
            (Ok(false), _) => self.expect_at(&[&self.at]),
            (Err(error), Some(cut)) => {
                drop(text::of_error(&error));
                self.recover(cut, step.again);
                self.settle(may_move_to, &step.operation);
            }
            (Err(error), None) => panic!("{:?}: {error:?}", step.operation),
        }
        match step.operation {
            Operation::Stage(..) | Operation::Reopen => self.expect_acknowledged(),
            _ => self.acknowledged = None,
        }
        let (disk, after) = (self.disk.snapshot(), self.disk.misuses());
        assert!(after.is_empty(), "{after:?}");
        // Faults end with their step.
        self.disk = disk.after_kill();
    }

    fn cut_in(&self, cut: Option<(u8, Cut)>) {
        let Some((after, cut)) = cut else { return };
        let number = self.disk.operations() + 1 + u64::from(after);
        match cut {
            Cut::Kill | Cut::PowerLoss(_) => self.disk.crash_at(number),
            Cut::Io => self
                .disk
                .fail_operation(number, FaultKind::Io, Repeat::Once),
            Cut::NoSpace => self
                .disk
                .fail_operation(number, FaultKind::NoSpace, Repeat::Once),
        }
    }

    /// The machine as it is after a cut.
    fn reboot(&mut self, cut: Cut) {
        let snapshot = self.disk.snapshot();
        self.disk = match cut {
            Cut::PowerLoss(which) => {
                let limits = ImageLimits {
                    exhaustive: 64,
                    samples: 64,
                    ..ImageLimits::default()
                };
                let mut images = snapshot.crash_images(u64::from(which), limits);
                images
                    .nth(usize::from(which) % 32)
                    .map_or_else(|| snapshot.after_kill(), |image| image.disk())
            }
            Cut::Kill | Cut::Io | Cut::NoSpace => snapshot.after_kill(),
        };
    }

    fn recover(&mut self, (_, cut): (u8, Cut), again: Option<(u8, Cut)>) {
        self.reboot(cut);
        if let Some((after, cut)) = again {
            self.cut_in(Some((after, cut)));
            drop(self.setup.open(&self.disk));
            self.reboot(cut);
        }
        drop(
            self.setup
                .open(&self.disk)
                .expect("recovery without a fault"),
        );
    }

    /// Runs one operation where it is possible; tells whether it was.
    fn run(&mut self, operation: &Operation, goal: &[u8]) -> Result<bool, Error> {
        let setup = self.setup;
        let mut replica = setup.open(&self.disk)?;
        match operation {
            Operation::Sync(_) => self.sync(&mut replica, goal, usize::MAX)?,
            Operation::Stage(_, groups) => {
                self.sync(&mut replica, goal, usize::from(groups % 4))?
            }
            Operation::Rollback => {
                let possible = replica.retained().is_some()
                    && replica.unfinished().is_none()
                    && replica.unwritten()? == Unwritten::Proven;
                if !possible {
                    return Ok(false);
                }
                replica.rollback(&quiet)?;
            }
            Operation::Accept => drop(replica.accept()?),
            Operation::Cancel => drop(replica.cancel()?),
            Operation::Reopen => {}
        }
        Ok(true)
    }

    fn sync(&mut self, replica: &mut Replica, goal: &[u8], groups: usize) -> Result<(), Error> {
        let setup = self.setup;
        let fits = replica
            .unfinished()
            .is_some_and(|h| h.geometry == setup.geometry(goal));
        let resumes = fits && replica.can_resume()?;
        if !resumes {
            self.acknowledged = None;
        }
        if !resumes && replica.unfinished().is_some() {
            replica.cancel()?;
        }
        let target = replica.target();
        let mut session = if resumes {
            replica.resume(u64::MAX)?
        } else {
            self.sessions = self.sessions.wrapping_add(1).max(1);
            replica.begin(&setup.plan(self.sessions, goal))?
        };
        if groups != usize::MAX {
            let id = session.id();
            return setup.stage(&mut session, target.as_ref(), goal, groups, &mut |last| {
                self.acknowledged = Some((id, last.sequence));
            });
        }
        setup.finish(&mut session, target.as_ref(), goal)?;
        session.commit(root(goal), &quiet).map(drop)
    }

    /// What was acknowledged is there to be resumed from, whatever happened since.
    fn expect_acknowledged(&self) {
        let Some((session, sequence)) = self.acknowledged else {
            return;
        };
        let looked = inspect(&self.setup.place(&self.disk), &*self.disk.dir("state"));
        let text = text::of_result(&looked);
        let unfinished = looked.ok().flatten().and_then(|looked| looked.unfinished);
        assert!(
            unfinished.is_some_and(|u| u.header.session == session && u.records >= sequence),
            "{session} was acknowledged up to {sequence}, and now: {text}"
        );
    }

    fn expect_at(&self, allowed: &[&[u8]]) {
        let found = self.setup.content(&self.disk).expect("the target is there");
        assert!(allowed.contains(&&found[..]), "the target is torn");
    }

    fn arrive_at(&mut self, goal: Option<Vec<u8>>, operation: &Operation) {
        match goal {
            Some(goal) => {
                self.expect_at(&[&goal]);
                let back = matches!(operation, Operation::Rollback);
                self.arrive(goal);
                if back {
                    self.before = None;
                }
            }
            None => self.expect_at(&[&self.at]),
        }
    }

    fn arrive(&mut self, goal: Vec<u8>) {
        let before = std::mem::replace(&mut self.at, goal);
        self.before = Some(before);
    }

    /// After a cut the target is at one of two images.
    fn settle(&mut self, goal: Option<Vec<u8>>, operation: &Operation) {
        let Some(goal) = goal.filter(|goal| *goal != self.at) else {
            self.expect_at(&[&self.at]);
            if matches!(operation, Operation::Sync(_) | Operation::Rollback) {
                // From an image to the same one: nothing tells whether it was done.
                self.before = None;
            }
            return;
        };
        self.expect_at(&[&self.at, &goal]);
        if self.setup.content(&self.disk) == Some(goal.clone()) {
            self.arrive_at(Some(goal), operation);
        }
    }
}
