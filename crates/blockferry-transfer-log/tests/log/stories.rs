//! Crashes of what happens rarely: compaction, frames, adopted points, and faults while recovering.

use std::sync::atomic::{AtomicU64, Ordering};

use blockferry_testkit::{
    Events, ExploreOptions, FaultKind, ImageLimits, Random, Repeat, Scenario, SimDisk, SimOptions,
    explore,
};
use blockferry_transfer_log::Strategy;

use crate::explorer::{Explored, four_images, options, run_with, seed, sizes, story};
use crate::harness::{PAGE, Setup, id, image};
use crate::model::Promise;
use crate::story::{Step, Story};

/// Every page of every image is another one.
fn busy_images() -> Vec<Option<Vec<u8>>> {
    let of = |n: u8| image(&[n, n + 1, n + 2, n + 3, n + 4, n + 5], 6 * PAGE);
    [10, 20, 30, 40].map(|n| Some(of(n))).to_vec()
}

/// A session that restages so much that its log is compacted.
pub(crate) fn compacting() -> Story {
    let setup = Setup {
        log_limit_bytes: 192 * 1024,
        ..Setup::file(Strategy::Redo)
    };
    let before = [Step::Stage(1, 1, 99), Step::Restage(2), Step::Restage(3)];
    let steps = [Step::Restage(1), Step::Resume(3)];
    story(setup, busy_images(), &before, &steps)
}

#[test]
fn compaction_survives_every_crash() {
    let story = compacting();

    assert_compacts(&story);
    // Many boundaries, and most of them alike.
    let options = ExploreOptions {
        images: ImageLimits {
            samples: 24,
            exhaustive: 64,
            ..options().images
        },
        ..options()
    };
    let mut explored = Explored::of("compaction");
    explored.add(&run_with(&options, &story.name(), &story));
    explored.finish();
}

/// Without compaction the session would still have its first segment.
fn assert_compacts(story: &Story) {
    let disk = SimDisk::new(SimOptions::default());
    story.prepare(&disk);
    let first = format!("state/{}.log.0000", id(1));
    assert!(disk.content(&first).is_some());

    story.run(&disk, &Events::new(&disk)).unwrap();

    assert_eq!(disk.content(&first), None, "nothing was compacted");
}

#[test]
fn pages_that_came_compressed_survive_every_crash() {
    let mut explored = Explored::of("frames");
    for setup in [
        Setup::file(Strategy::Redo),
        Setup::device(Strategy::Redo),
        Setup::file(Strategy::Clone),
    ] {
        let setup = Setup {
            frames: true,
            ..setup
        };
        let mut one = |before: &[Step], steps: &[Step]| {
            explored.story(&story(setup, four_images(), before, steps));
        };
        one(&[Step::Sync(1, 1)], &[Step::Sync(2, 2)]);
        one(&[], &[Step::Stage(1, 1, 1), Step::Resume(2)]);
        one(&[Step::Sync(1, 1)], &[Step::Rollback]);
        if !setup.device {
            explored.story(&story(setup, sizes(), &[], &[Step::Sync(1, 1)]));
        }
    }
    explored.finish();
}

#[test]
fn a_session_that_stages_nothing_survives_every_crash() {
    let mut explored = Explored::of("nothing staged");
    let content = image(&[1, 2, 3, 4], 4 * PAGE);
    let mut grown = content.clone();
    grown.resize(6 * PAGE, 0);
    for setup in [
        Setup::file(Strategy::Redo),
        Setup::file(Strategy::Redo).without_undo(),
        Setup::file(Strategy::Clone),
    ] {
        let images = vec![Some(content.clone()), Some(grown.clone())];
        explored.story(&story(setup, images, &[], &[Step::Sync(1, 1)]));
    }
    explored.finish();
}

#[test]
fn an_anchored_point_survives_every_crash_of_every_session() {
    let mut explored = Explored::of("anchoring");
    let (at, anchored) = ([Step::Sync(1, 1)], [Step::Sync(1, 1), Step::Anchor]);
    let moved = [anchored[0], Step::Anchor, Step::Sync(2, 2)];
    let mut one = |setup: Setup, images, before: &[Step], steps: &[Step]| {
        explored.story(&story(setup, images, before, steps));
    };
    let file = Setup::file(Strategy::Redo);
    for setup in [file, Setup::device(Strategy::Redo)] {
        let steps = [Step::Sync(2, 2), Step::Sync(3, 3)];
        one(setup, four_images(), &anchored, &steps);
    }
    let (unfinished, back) = (
        [Step::Stage(3, 3, 1), Step::Resume(0)],
        [Step::Rollback, Step::Sync(3, 3)],
    );
    one(file, four_images(), &at, &[Step::Anchor, Step::Sync(2, 2)]);
    one(file, four_images(), &moved, &unfinished);
    one(file, four_images(), &moved, &back);
    let sized = [Step::Sync(2, 2), Step::Sync(0, 3)];
    one(file, sizes(), &anchored, &sized);
    explored.finish();
}

#[test]
fn adopting_a_point_survives_every_crash() {
    let mut explored = Explored::of("adopting");
    for setup in [
        Setup::file(Strategy::Redo),
        Setup::device(Strategy::Redo),
        Setup::file(Strategy::Clone),
    ] {
        let mut one = |before: &[Step], steps: &[Step]| {
            explored.story(&story(setup, four_images(), before, steps));
        };
        one(&[], &[Step::Adopt(5), Step::Adopt(6)]);
        one(&[Step::Sync(1, 1)], &[Step::Adopt(5)]);
        one(
            &[Step::Sync(1, 1), Step::Adopt(5)],
            &[Step::Sync(2, 2), Step::Rollback],
        );
    }
    explored.finish();
}

#[test]
fn a_restart_with_records_that_nobody_flushed_survives_every_crash() {
    let mut explored = Explored::of("a restart in the cache");
    for setup in [
        Setup::device(Strategy::Redo),
        Setup::file(Strategy::Clone),
        Setup::file(Strategy::Shadow),
    ] {
        let steps = [Step::Abandon(1, 1), Step::Resume(1)];
        explored.story(&story(setup, four_images(), &[], &steps));
    }
    let setup = Setup::file(Strategy::Redo);
    let steps = [Step::Abandon(2, 2), Step::Resume(3)];
    explored.story(&story(setup, four_images(), &[Step::Sync(1, 1)], &steps));
    explored.finish();
}

/// A story whose first recovery is hit by a fault; the next one must do what the first could not.
struct Faulty {
    story: Story,
    /// Faults that made an open fail.
    failed: AtomicU64,
}

impl Faulty {
    /// Recovers with a fault at one of its operations, then again without.
    fn recover_twice(
        &self,
        disk: &SimDisk,
        operation: u64,
        kind: FaultKind,
        before: &[Promise],
    ) -> Result<(), String> {
        disk.fail_operation(operation, kind, Repeat::Once);
        let mut promises = before.to_vec();
        match self.story.open(disk) {
            // The fault hit something that the outcome does not need, and the outcome was reported.
            Ok(replica) if replica.unfinished().is_none() => {
                let deciding = before.contains(&Promise::Deciding);
                let at = self.story.shows(disk).filter(|_| deciding);
                promises.extend(at.map(Promise::At));
            }
            Ok(_) => {}
            Err(_) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.story.check_misuses(disk)?;
        let restarted = disk.snapshot().after_kill();
        let events = Events::new(&restarted);
        self.story
            .recover_and_go_on(&restarted, &promises, &events)
            .map_err(|e| format!("after {kind:?} at operation {operation} of an open: {e}"))
    }
}

impl Scenario for Faulty {
    type Event = Promise;

    fn prepare(&self, disk: &SimDisk) {
        self.story.prepare(disk);
    }

    fn run(&self, disk: &SimDisk, events: &Events<Promise>) -> Result<(), String> {
        self.story.run(disk, events)
    }

    fn recover(
        &self,
        disk: &SimDisk,
        before: &[Promise],
        _: &Events<Promise>,
    ) -> Result<(), String> {
        let start = disk.snapshot();
        let whole = start.after_kill();
        drop(self.story.open(&whole)?);
        let mut random = Random::part(seed(), start.fingerprint());
        for kind in [FaultKind::Io, FaultKind::NoSpace] {
            let operation = 1 + random.below(whole.operations());
            self.recover_twice(&start.after_kill(), operation, kind, before)?;
        }
        Ok(())
    }
}

#[test]
fn a_fault_while_recovering_leaves_a_target_that_the_next_open_recovers() {
    let options = ExploreOptions {
        depth: 1,
        images: ImageLimits {
            exhaustive: 64,
            samples: 24,
            damaged: 6,
        },
        ..options()
    };
    for setup in Setup::of_every_kind() {
        let mut stories = vec![
            story(
                setup,
                four_images(),
                &[Step::Sync(1, 1)],
                &[Step::Sync(2, 2)],
            ),
            story(
                setup,
                four_images(),
                &[],
                &[Step::Stage(1, 1, 1), Step::Cancel],
            ),
        ];
        if setup.strategy != Strategy::Direct && !setup.is_without_undo() {
            let before = [Step::Sync(1, 1)];
            stories.push(story(setup, four_images(), &before, &[Step::Rollback]));
            stories.push(story(setup, four_images(), &before, &[Step::Accept]));
        }
        for story in stories {
            let name = story.name();
            let faulty = Faulty {
                story,
                failed: AtomicU64::new(0),
            };
            let report = explore(&options, &faulty);
            let failed = faulty.failed.into_inner();
            println!("{name}, {failed} opens failed\n{report}");
            report.assert_clean();
            assert!(failed > 0, "{name}: no fault hit anything that mattered");
        }
    }
}
