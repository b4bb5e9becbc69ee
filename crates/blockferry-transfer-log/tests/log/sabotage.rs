//! The proof can fail: what protects a target is taken away, one piece at a time, and each loss shows.
//!
//! A barrier is skipped by the simulated machine and a way past its cache is blocked there, so production code
//! has no switch for it. What a check of production code would catch is put on the disk, and the check has to
//! catch exactly that. `docs/guarantees.md` has the table.

use blockferry_testkit::{
    Bypass, Events, ExploreOptions, Fault, FaultKind, Operation, OperationKind, Report, Scenario,
    SimDisk, SimOptions, explore, explore_with, sensitivity,
};
use blockferry_transfer_log::{Recovered, Strategy};

use crate::explorer::{four_images, options, story};
use crate::harness::{PAGE, Setup, TARGET, id, image, quiet, root};
use crate::model::Promise;
use crate::sessions::stage_some;
use crate::stories::compacting;
use crate::story::{Step, Story};

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
    let options = of_one_depth();
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
        let barriers = sensitivity(&options, &story);
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

/// A story whose recoveries skip the first operation of this kind on this subject.
struct WithoutBarrier {
    story: Story,
    kind: OperationKind,
    subject: &'static str,
}

impl Scenario for WithoutBarrier {
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
        events: &Events<Promise>,
    ) -> Result<(), String> {
        let skipped = Fault::on(self.kind, self.subject, 1, FaultKind::Skipped);
        disk.inject(skipped);
        self.story.recover(disk, before, events)
    }

    fn go_on(
        &self,
        disk: &SimDisk,
        before: &[Promise],
        events: &Events<Promise>,
    ) -> Result<(), String> {
        self.story.go_on(disk, before, events)
    }
}

#[test]
fn every_barrier_of_recovery_is_needed() {
    let sync = |setup: Setup| {
        let before = [Step::Sync(1, 1)];
        story(setup, four_images(), &before, &[Step::Sync(2, 2)])
    };
    let flush = OperationKind::Flush;
    let cases = [
        // A decision that only the cache shows is carried out.
        (Setup::file(Strategy::Redo), flush, "state/state"),
        (Setup::device(Strategy::Redo), flush, "state/state"),
        // The outcome is recorded before the target is durable.
        (Setup::file(Strategy::Redo), flush, "images/disk.raw"),
        (Setup::device(Strategy::Redo), flush, "disk.raw"),
        // The outcome is recorded before the exchange is durable.
        (
            Setup::file(Strategy::Clone),
            OperationKind::SyncDirectory,
            "images",
        ),
        (
            Setup::file(Strategy::Shadow),
            OperationKind::SyncDirectory,
            "images",
        ),
    ];
    for (setup, kind, subject) in cases {
        let sabotaged = WithoutBarrier {
            story: sync(setup),
            kind,
            subject,
        };

        let report = explore(&options(), &sabotaged);

        println!(
            "{} without {kind:?} of {subject} in recovery\n{report}",
            setup.strategy
        );
        assert!(
            !report.violations.is_empty(),
            "{kind:?} of {subject}: {setup:?}"
        );
    }
}

fn of_one_depth() -> ExploreOptions {
    ExploreOptions {
        depth: 1,
        ..options()
    }
}

/// The barriers of a story that are caught when they are skipped.
fn caught(story: &Story) -> Vec<(Operation, Report)> {
    let all = sensitivity(&of_one_depth(), story);
    let caught = all.into_iter().filter(|(barrier, report)| {
        let caught = !report.violations.is_empty();
        println!(
            "{} without {barrier} [{}]: caught {caught}",
            story.name(),
            barrier.label
        );
        caught
    });
    caught.collect()
}

#[test]
fn what_a_restart_finds_in_the_cache_must_be_flushed_before_it_counts() {
    for setup in [Setup::file(Strategy::Redo), Setup::device(Strategy::Redo)] {
        let steps = [Step::Abandon(1, 1), Step::Resume(1)];
        let story = story(setup, four_images(), &[], &steps);

        let caught = caught(&story);

        let log = |operation: &Operation| {
            operation.kind == OperationKind::Flush
                && operation.subject.contains(".log.0000")
                && operation.label.ends_with("open")
        };
        assert!(caught.iter().any(|(barrier, _)| log(barrier)), "{setup:?}");
    }
}

#[test]
fn a_compaction_is_durable_before_what_it_replaces_is_removed() {
    let caught = caught(&compacting());

    let stage = |operation: &&(Operation, Report)| operation.0.label.ends_with("stage");
    let kinds: Vec<OperationKind> = caught.iter().filter(stage).map(|(o, _)| o.kind).collect();
    assert!(kinds.contains(&OperationKind::Flush), "{kinds:?}");
    assert!(kinds.contains(&OperationKind::SyncDirectory), "{kinds:?}");
}

/// A story that acknowledges what it staged before anything made it durable.
struct Hasty(Story);

impl Scenario for Hasty {
    type Event = Promise;

    fn prepare(&self, disk: &SimDisk) {
        self.0.prepare(disk);
    }

    fn run(&self, disk: &SimDisk, events: &Events<Promise>) -> Result<(), String> {
        let failed = |e: blockferry_transfer_log::Error| e.to_string();
        let (setup, new) = (self.0.setup, self.0.image(1));
        let mut replica = self.0.open(disk)?;
        events.push(Promise::Heading(1, 1));
        let target = replica.target();
        let mut session = replica.begin(&setup.plan(1, new)).map_err(failed)?;
        let batches = setup
            .batches(&session, target.as_ref(), new)
            .map_err(failed)?;
        for (batch, sequence) in batches.into_iter().zip(1..) {
            session.stage(batch).map_err(failed)?;
            events.push(Promise::Acknowledged(sequence, 0));
            session.close_group().map_err(failed)?;
        }
        Ok(())
    }

    fn recover(
        &self,
        disk: &SimDisk,
        before: &[Promise],
        events: &Events<Promise>,
    ) -> Result<(), String> {
        self.0.recover(disk, before, events)
    }

    fn go_on(
        &self,
        disk: &SimDisk,
        before: &[Promise],
        events: &Events<Promise>,
    ) -> Result<(), String> {
        self.0.go_on(disk, before, events)
    }
}

#[test]
fn an_acknowledgement_before_its_flush_is_caught() {
    for setup in [
        Setup::file(Strategy::Redo),
        Setup::file(Strategy::Clone),
        Setup::file(Strategy::Shadow),
    ] {
        let hasty = Hasty(story(setup, four_images(), &[], &[]));

        let report = explore(&of_one_depth(), &hasty);

        println!("{} in haste\n{report}", setup.strategy);
        assert!(!report.violations.is_empty(), "{setup:?}");
    }
}

#[test]
fn a_flush_that_lies_is_caught_only_by_reading_the_medium() {
    for setup in [Setup::file(Strategy::Redo), Setup::device(Strategy::Redo)] {
        let before = [Step::Sync(1, 1)];
        let story = story(setup, four_images(), &before, &[Step::Sync(2, 2)]);
        let lies = Fault::on(OperationKind::Flush, TARGET, 1, FaultKind::SilentLoss);
        let explored = |bypass| {
            let options = ExploreOptions {
                sim: SimOptions {
                    bypass,
                    ..SimOptions::default()
                },
                ..of_one_depth()
            };
            explore_with(&options, std::slice::from_ref(&lies), &story)
        };

        let (read, cached) = (explored(Bypass::All), explored(Bypass::DropsOnly));
        let undropped = explored(Bypass::MediumOnly);

        println!(
            "{} with a lie\n{read}\n{cached}\n{undropped}",
            setup.strategy
        );
        read.assert_clean();
        // What counts is read from the medium, so nothing is left for dropping to do.
        undropped.assert_clean();
        assert!(!cached.violations.is_empty(), "{setup:?}");
    }
}

fn old() -> Vec<u8> {
    image(&[1, 2, 3, 4], 4 * PAGE)
}

fn segment(session: u8, number: u32) -> String {
    format!("{}.log.{number:04}", id(session))
}

/// A machine on which session 1 has staged two groups towards pages of these bytes.
fn staged(fill: u8) -> SimDisk {
    let setup = Setup::file(Strategy::Redo);
    let disk = setup.machine(Some(&old()));
    let new = image(&[fill, fill + 1, fill + 2, fill + 3], 4 * PAGE);
    stage_some(&setup, &disk, 1, &new, 9, false);
    disk
}

/// Another run of the session on `disk`, towards pages of these bytes: a second segment.
fn stage_more(disk: &SimDisk, fill: u8) {
    let setup = Setup::file(Strategy::Redo);
    let new = image(&[fill, fill + 1, fill + 2, fill + 3], 4 * PAGE);
    let mut replica = setup.open(disk).unwrap();
    let target = replica.target();
    let mut session = replica.resume(u64::MAX).unwrap();
    setup
        .stage(&mut session, target.as_ref(), &new, 9, &mut |_| {})
        .unwrap();
}

/// The pages that the unfinished session has staged: the first byte of each.
fn shows_staged(disk: &SimDisk) -> Vec<u8> {
    let setup = Setup::file(Strategy::Redo);
    let mut replica = setup.open(disk).unwrap();
    let session = replica.resume(u64::MAX).unwrap();
    let mut bytes = old();
    let whole = blockferry_core::Extent::from_range(0..bytes.len() as u64);
    session.staged_view().patch(whole, &mut bytes).unwrap();
    bytes.iter().step_by(PAGE).copied().collect()
}

fn first_bytes(fill: u8) -> Vec<u8> {
    let pages = image(&[fill, fill + 1, fill + 2, fill + 3], 4 * PAGE);
    pages.iter().step_by(PAGE).copied().collect()
}

#[test]
fn a_record_counts_only_after_its_own_predecessor() {
    let (ours, theirs) = (staged(10), staged(20));
    let name = segment(1, 0);
    let [mut log, other] = [&ours, &theirs].map(|d| d.content(&format!("state/{name}")).unwrap());
    assert_eq!(log.len(), other.len());
    // The header, then records of a header, two new pages and two old ones each: the second one is the other's.
    let second = PAGE + 5 * PAGE;
    log[second..].copy_from_slice(&other[second..]);
    ours.install("state", &name, &log);

    let expected: Vec<u8> = [&first_bytes(10)[..2], &first_bytes(3)[..2]].concat();
    assert_eq!(
        shows_staged(&ours),
        expected,
        "only the first record counts"
    );
}

#[test]
fn a_segment_counts_only_after_its_own_predecessor() {
    let (ours, theirs, control) = (staged(10), staged(20), staged(10));
    stage_more(&theirs, 30);
    stage_more(&control, 30);
    let name = segment(1, 1);
    let [foreign, own] = [&theirs, &control].map(|d| d.content(&format!("state/{name}")).unwrap());

    let with_own = ours.snapshot().after_kill();
    with_own.install("state", &name, &own);
    assert_eq!(shows_staged(&with_own), first_bytes(30), "its own counts");
    ours.install("state", &name, &foreign);

    assert_eq!(shows_staged(&ours), first_bytes(10), "the other's does not");
}

#[test]
fn a_segment_counts_only_for_its_own_session() {
    let setup = Setup::file(Strategy::Redo);
    let disk = staged(10);
    let log = disk.content(&format!("state/{}", segment(1, 0))).unwrap();
    let fresh = setup.machine(Some(&old()));
    fresh.install("state", &segment(2, 0), &log);

    let mut replica = setup.open(&fresh).unwrap();

    assert_eq!(*replica.recovered(), Recovered::Clean);
    assert!(replica.unfinished().is_none());
    let new = image(&[7, 8], 4 * PAGE);
    setup.sync(&mut replica, 3, &new).unwrap();
    assert_eq!(replica.point().map(|p| p.root), Some(root(&new)));
    replica.rollback(&quiet).unwrap();
    assert_eq!(setup.content(&fresh), Some(old()));
}

#[test]
fn a_page_counts_only_with_its_own_digest() {
    let disk = staged(10);
    let name = format!("state/{}", segment(1, 0));
    let log = disk.content(&name).unwrap();
    // Behind the first record's header: the first byte of its first new page.
    assert!(disk.flip_bit(&name, 2 * PAGE as u64));
    assert_ne!(disk.content(&name).unwrap(), log);
    let setup = Setup::file(Strategy::Redo);
    let new = image(&[10, 11, 12, 13], 4 * PAGE);

    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut session = replica.resume(u64::MAX).unwrap();
    let found = session.prepare().unwrap();

    assert!(
        matches!(&found, blockferry_transfer_log::Prepared::Missing(lost) if lost.extents.covers(
            blockferry_core::Extent::from_range(0..2 * PAGE as u64)
        )),
        "{found:?}"
    );
    setup.finish(&mut session, target.as_ref(), &new).unwrap();
    session.commit(root(&new), &quiet).unwrap();
    assert_eq!(setup.content(&disk), Some(new));
}
