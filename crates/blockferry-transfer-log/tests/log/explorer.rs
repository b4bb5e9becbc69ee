//! Every crash of every story: production code on the simulated machine, checked against a model.

use std::collections::BTreeMap;
use std::time::Duration;

use blockferry_testkit::{ExploreOptions, ImageLimits, Report, Scenario, explore};
use blockferry_transfer_log::Strategy;

use crate::harness::{PAGE, Setup, image};
use crate::story::{Step, Story};

/// How much is explored: `BLOCKFERRY_EXPLORE` is `brief` or `long`, or it is not set.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Effort {
    /// Enough to notice a change of the code in seconds: for mutants.
    Brief,
    /// What every change must pass.
    Usual,
    /// As much as the machine's owner has time for.
    Long,
}

fn effort() -> Effort {
    match std::env::var("BLOCKFERRY_EXPLORE").as_deref() {
        Err(_) => Effort::Usual,
        Ok("brief") => Effort::Brief,
        Ok("long") => Effort::Long,
        Ok(other) => panic!("BLOCKFERRY_EXPLORE is `brief` or `long`, not {other:?}"),
    }
}

/// Another seed draws other samples; every report prints its own.
pub(crate) fn seed() -> u64 {
    let wanted = std::env::var("BLOCKFERRY_EXPLORE_SEED").ok();
    wanted.map_or(1, |text| text.parse().expect("a seed is a number"))
}

/// Bounded by numbers, not by time: what is explored must not depend on what else the machine is doing.
pub(crate) fn options() -> ExploreOptions {
    let limits = |exhaustive, samples, damaged| ImageLimits {
        exhaustive,
        samples,
        damaged,
    };
    let (depth, images, crashed_recoveries, recovery_images) = match effort() {
        Effort::Brief => (1, limits(32, 12, 6), 0, limits(0, 0, 0)),
        Effort::Usual => (2, limits(256, 52, 10), 1, limits(16, 8, 3)),
        Effort::Long => (3, limits(4096, 256, 64), 4, limits(16, 24, 6)),
    };
    // Depth 3 has no end: what there is time for is taken from everywhere.
    let max_recoveries = if effort() == Effort::Long {
        250_000
    } else {
        u64::MAX
    };
    ExploreOptions {
        seed: seed(),
        depth,
        images,
        crashed_recoveries,
        recovery_images,
        max_recoveries,
        max_time: HOUR,
        ..ExploreOptions::default()
    }
}

const HOUR: Duration = Duration::from_secs(3600);

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

/// Explores, prints what was explored, and fails if a promise was broken or, except in the long run, a limit was hit.
pub(crate) fn run_with<S: Scenario>(options: &ExploreOptions, name: &str, scenario: &S) -> Report {
    let report = explore(options, scenario);
    println!("{name}\n{report}");
    report.assert_clean();
    let whole = !report.cut_short || effort() == Effort::Long;
    assert!(whole, "{name}: not all of it was explored");
    report
}

/// The least that the usual effort explores, in distinct crash images of each test: together what a change must pass.
const LEAST: [(&str, usize); 14] = [
    ("redo on a file", 40_000),
    ("redo on a device", 34_000),
    ("redo without undo", 5_000),
    ("clone", 25_000),
    ("shadow", 21_000),
    ("direct", 19_000),
    ("direct to an absent file", 4_000),
    ("compaction", 11_000),
    ("frames", 30_000),
    ("adopting", 10_000),
    ("anchoring", 35_000),
    ("a restart in the cache", 14_000),
    ("a group", 5_000),
    ("nothing staged", 3_000),
];

#[test]
fn no_less_than_two_hundred_thousand_images_are_explored() {
    let least: usize = LEAST.iter().map(|(_, images)| images).sum();

    assert!(least >= 200_000, "{least}");
}

/// What one test explores, in one or several reports.
pub(crate) struct Explored {
    name: &'static str,
    images: usize,
    recoveries: u64,
    /// Recoveries by protocol step.
    steps: BTreeMap<String, u64>,
}

impl Explored {
    /// Nothing so far; the name is one of [`LEAST`].
    pub(crate) fn of(name: &'static str) -> Self {
        Self {
            name,
            images: 0,
            recoveries: 0,
            steps: BTreeMap::new(),
        }
    }

    pub(crate) fn story(&mut self, story: &Story) {
        self.add(&run_with(&options(), &story.name(), story));
    }

    pub(crate) fn add(&mut self, report: &Report) {
        self.images += report.distinct_images;
        self.recoveries += report.recoveries;
        for (step, counts) in &report.steps {
            *self.steps.entry(step.clone()).or_default() += counts.recoveries;
        }
    }

    /// Prints the sum and fails if it is less than it must be. The lines of all tests add up to the whole.
    pub(crate) fn finish(&self) {
        let (name, images, recoveries) = (self.name, self.images, self.recoveries);
        let least = LEAST.iter().find(|(of, _)| *of == name);
        let least = least.expect("every test has its least").1;
        println!("explored {images} distinct images in {recoveries} recoveries of {name}");
        assert!(
            effort() == Effort::Brief || images >= least,
            "{name}: only {images} images, expected {least}"
        );
    }

    /// A step of which nothing is explored would be a hole in the proof.
    fn assert_covers(&self, strategy: Strategy, steps: &[&str]) {
        for (step, recoveries) in &self.steps {
            println!("  {step}: {recoveries} recoveries");
        }
        for step in steps {
            let run = format!("{strategy} {step}");
            let recovery = format!("{run}, then in recovery");
            for name in std::iter::once(run).chain((options().depth > 1).then_some(recovery)) {
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

fn explore_all(name: &'static str, setup: Setup, steps: &[&str]) {
    let mut explored = Explored::of(name);
    for story in stories(setup) {
        explored.story(&story);
    }
    explored.finish();
    explored.assert_covers(setup.strategy, steps);
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
    explore_all(
        "redo on a file",
        Setup::file(Strategy::Redo),
        &WITH_A_WAY_BACK,
    );
}

#[test]
fn redo_on_a_device_survives_every_crash() {
    explore_all(
        "redo on a device",
        Setup::device(Strategy::Redo),
        &WITH_A_WAY_BACK,
    );
}

#[test]
fn clone_survives_every_crash() {
    explore_all("clone", Setup::file(Strategy::Clone), &WITH_A_WAY_BACK);
}

#[test]
fn shadow_survives_every_crash() {
    explore_all("shadow", Setup::file(Strategy::Shadow), &WITH_A_WAY_BACK);
}

#[test]
fn direct_in_place_survives_every_crash() {
    explore_all(
        "direct",
        Setup::file(Strategy::Direct).without_undo(),
        &EVERYWHERE,
    );
}

#[test]
fn direct_to_an_absent_file_survives_every_crash() {
    let mut explored = Explored::of("direct to an absent file");
    let mut images = four_images();
    images[0] = None;
    let setup = Setup::file(Strategy::Direct).without_undo();
    let unfinished = [Step::Stage(2, 1, 1), Step::Resume(1)];
    explored.story(&story(setup, images.clone(), &[], &[Step::Sync(1, 1)]));
    explored.story(&story(setup, images, &[], &unfinished));
    explored.finish();
}

#[test]
fn redo_without_undo_survives_every_crash() {
    let mut explored = Explored::of("redo without undo");
    let setup = Setup::file(Strategy::Redo).without_undo();
    explored.story(&story(setup, four_images(), &[], &[Step::Sync(1, 1)]));
    explored.story(&story(setup, sizes(), &[], &[Step::Sync(1, 1)]));
    explored.finish();
}
