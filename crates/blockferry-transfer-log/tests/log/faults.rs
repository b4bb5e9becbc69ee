//! Every call that can fail, failing in each of its ways, once or for ever, in every strategy.

use std::collections::BTreeMap;

use blockferry_testkit::{
    Events, Fault, FaultKind, ImageLimits, Operation, OperationKind, Repeat, Scenario, SimDisk,
    SimOptions, Snapshot,
};
use blockferry_transfer_log::Strategy;

use crate::explorer::{four_images, seed, story};
use crate::harness::{Setup, TARGET, quiet, root};
use crate::model::{Promise, check};
use crate::story::{Step, Story};

/// How a call that changes something fails.
const OF_OPERATIONS: [FaultKind; 5] = [
    FaultKind::Io,
    FaultKind::Gone,
    FaultKind::NoSpace,
    FaultKind::Short,
    FaultKind::Interrupted,
];
/// How one fails that only asks, which needs no space.
const OF_QUERIES: [FaultKind; 3] = [FaultKind::Io, FaultKind::Short, FaultKind::Interrupted];

/// Runs, and how many of them failed.
#[derive(Clone, Copy, Default)]
struct Runs {
    all: u64,
    failed: u64,
}

/// What the faults of one setup came to.
#[derive(Default)]
struct Outcomes {
    of_operations: BTreeMap<String, Runs>,
    of_queries: BTreeMap<String, Runs>,
}

impl Outcomes {
    fn count(&mut self, hit: &Operation, kind: FaultKind, failed: bool) {
        let runs = if hit.kind.is_query() {
            &mut self.of_queries
        } else {
            &mut self.of_operations
        };
        let runs = runs.entry(format!("{kind:?}")).or_default();
        runs.all += 1;
        runs.failed += u64::from(failed);
    }

    fn report(&self, setup: &Setup) {
        let (strategy, place) = (setup.strategy, if setup.device { "device" } else { "file" });
        let way_back = if setup.is_without_undo() {
            ", no way back"
        } else {
            ""
        };
        for (what, runs) in [
            ("operations", &self.of_operations),
            ("queries", &self.of_queries),
        ] {
            let all: u64 = runs.values().map(|r| r.all).sum();
            let failed: u64 = runs.values().map(|r| r.failed).sum();
            let kinds: Vec<String> = runs
                .iter()
                .map(|(kind, r)| format!("{kind} {} of {}", r.failed, r.all))
                .collect();
            println!(
                "{strategy} on a {place}{way_back}: {all} faults of {what}, {failed} of them ended the run ({})",
                kinds.join(", ")
            );
            assert!(failed * 2 > all, "hardly any fault was noticed");
        }
    }
}

/// Runs the story with this fault, then recovers after a kill and after power losses.
fn check_fault(
    story: &Story,
    start: &Snapshot,
    hit: &Operation,
    kind: FaultKind,
    repeat: Repeat,
    outcomes: &mut Outcomes,
) -> Result<(), String> {
    let disk = start.after_kill();
    let fault = if hit.kind.is_query() {
        Fault::at_query(hit.number, kind)
    } else {
        Fault::at(hit.number, kind)
    };
    disk.inject(fault.repeat(repeat));
    let events = Events::new(&disk);

    let run = story.run(&disk, &events);

    outcomes.count(hit, kind, run.is_err());
    run.or_else(|message| {
        if is_given_up(&message, hit, repeat) {
            return Ok(());
        }
        check_message(&message, hit, repeat)
    })?;
    story.check_misuses(&disk)?;
    let promises: Vec<Promise> = events.all();
    let snapshot = disk.snapshot();
    let lost = snapshot.crash_images(seed(), images_after(hit));
    for restarted in std::iter::once(snapshot.after_kill()).chain(lost.map(|i| i.disk())) {
        let recovered = story.recover_and_go_on(&restarted, &promises, &Events::new(&restarted));
        recovered.or_else(|e| {
            if is_given_up(&e, hit, repeat) {
                Ok(())
            } else {
                Err(e)
            }
        })?;
    }
    Ok(())
}

/// A query changes nothing: what a power loss makes of the run around it is seen at the operations around it.
fn images_after(hit: &Operation) -> ImageLimits {
    let (exhaustive, samples, damaged) = if hit.kind.is_query() {
        (1, 1, 0)
    } else {
        (4, 4, 1)
    };
    ImageLimits {
        exhaustive,
        samples,
        damaged,
    }
}

/// What was acknowledged and is staged again all the same; the target is at its old point.
///
/// - A reservation that got half way, and a log that takes no note of it: only the file's evidence tells who changed
///   it, and that says no more than that somebody did. A log that could be written once more would keep the session.
/// - A working file that cannot be read: what does not come back at the second try counts as lost.
fn is_given_up(message: &str, hit: &Operation, repeat: Repeat) -> bool {
    let working = hit.subject.contains(".blockferry");
    match hit.kind {
        OperationKind::Reserve => repeat == Repeat::Forever && message.contains("cannot go on"),
        OperationKind::Read if working => {
            repeat == Repeat::Forever && message.ends_with("staged again")
        }
        _ => false,
    }
}

/// The error names the call that failed and where. Where everything fails from there on, it may be of what was tried
/// next.
fn check_message(message: &str, hit: &Operation, repeat: Repeat) -> Result<(), String> {
    let (cause, places) = match repeat {
        Repeat::Once => (hit.to_string(), vec![&*hit.subject]),
        Repeat::Forever => ("injected".to_owned(), vec!["state", "images", TARGET]),
    };
    check!(
        message.contains(&cause) && places.iter().any(|place| message.contains(place)),
        "the error does not name {cause:?} in one of {places:?}: {message}"
    );
    Ok(())
}

/// Every call of the story.
fn calls(story: &Story, start: &Snapshot) -> Vec<Operation> {
    let disk = start.after_kill();
    disk.record();
    story
        .run(&disk, &Events::new(&disk))
        .expect("nothing fails yet");
    let queries = disk.take_queries();
    let operations = disk.take_trace().into_iter();
    let operations = operations.filter_map(|boundary| boundary.operation);
    operations.chain(queries).collect()
}

fn stories(setup: Setup) -> Vec<Story> {
    let one = |before: &[Step], steps: &[Step]| story(setup, four_images(), before, steps);
    let mut all = vec![
        one(&[], &[Step::Sync(1, 1)]),
        one(&[Step::Stage(1, 1, 1)], &[Step::Resume(1)]),
        one(&[Step::Stage(1, 1, 1)], &[Step::Cancel]),
    ];
    if setup.strategy != Strategy::Direct && !setup.is_without_undo() {
        all.push(one(&[Step::Sync(1, 1)], &[Step::Rollback]));
        all.push(one(&[Step::Sync(1, 1)], &[Step::Accept]));
    }
    all
}

#[test]
fn any_failure_at_any_operation_leaves_old_new_or_resumable() {
    let mut violations = Vec::new();
    for setup in Setup::of_every_kind() {
        let mut outcomes = Outcomes::default();
        for story in stories(setup) {
            let disk = SimDisk::new(SimOptions::default());
            story.prepare(&disk);
            let start = disk.snapshot();
            for call in calls(&story, &start) {
                let kinds: &[FaultKind] = if call.kind.is_query() {
                    &OF_QUERIES
                } else {
                    &OF_OPERATIONS
                };
                for kind in kinds {
                    for repeat in [Repeat::Once, Repeat::Forever] {
                        let checked =
                            check_fault(&story, &start, &call, *kind, repeat, &mut outcomes);
                        if let Err(violation) = checked {
                            let name = story.name();
                            violations.push(format!(
                                "{name}: {kind:?} {repeat:?} at {call}: {violation}"
                            ));
                        }
                    }
                }
            }
        }
        outcomes.report(&setup);
    }
    let few: Vec<&String> = violations.iter().take(20).collect();
    assert!(
        violations.is_empty(),
        "{} violations: {few:#?}",
        violations.len()
    );
}

/// A sync whose caller hears of no error as long as it can go on.
fn sync_stubbornly(story: &Story, disk: &SimDisk) -> Option<()> {
    let (setup, new) = (story.setup, story.image(1));
    let mut replica = story.open(disk).ok()?;
    let target = replica.target();
    let mut session = replica.begin(&setup.plan(1, new)).ok()?;
    for batch in setup.batches(&session, target.as_ref(), new).ok()? {
        for outcome in [session.stage(batch), session.close_group().map(drop)] {
            outcome.ok();
        }
    }
    for _ in 0..2 {
        session.prepare().ok();
    }
    session.commit(root(new), &quiet).map(drop).ok()
}

#[test]
fn a_caller_that_goes_on_after_a_failure_gets_no_dead_handle_used() {
    for setup in Setup::of_every_kind() {
        let story = story(setup, four_images(), &[], &[Step::Sync(1, 1)]);
        let disk = SimDisk::new(SimOptions::default());
        story.prepare(&disk);
        let start = disk.snapshot();
        let whole = start.after_kill();
        assert!(sync_stubbornly(&story, &whole).is_some());
        for number in 1..=whole.operations() {
            for kind in OF_OPERATIONS {
                let disk = start.after_kill();
                disk.inject(Fault::at(number, kind));

                let done = sync_stubbornly(&story, &disk);

                let told = format!("{}: {kind:?} at operation {number}", story.name());
                assert_eq!(story.check_misuses(&disk), Ok(()), "{told}");
                if done.is_some() {
                    assert_eq!(story.shows(&disk), Some(1), "{told}");
                } else if setup.strategy != Strategy::Direct {
                    let recovered = story.open(&disk.snapshot().after_kill());
                    assert!(recovered.is_ok(), "{told}: {recovered:?}");
                }
            }
        }
    }
}
