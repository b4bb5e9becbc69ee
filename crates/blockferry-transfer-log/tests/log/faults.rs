//! Every operation that can fail, failing once or for ever, in every strategy.

use blockferry_testkit::{
    Events, Fault, FaultKind, ImageLimits, Operation, OperationKind, Repeat, Scenario, SimDisk,
    SimOptions,
};
use blockferry_transfer_log::Strategy;

use crate::explorer::{four_images, seed, story};
use crate::harness::{Setup, TARGET};
use crate::model::Promise;
use crate::story::{Step, Story};

/// What one fault came to.
#[derive(Default)]
struct Outcomes {
    runs: u64,
    failed: u64,
}

/// Runs the story with this fault, then recovers after a kill and after power losses.
fn check(
    story: &Story,
    operation: &Operation,
    kind: FaultKind,
    repeat: Repeat,
    outcomes: &mut Outcomes,
) {
    let disk = prepared(story);
    let fault = Fault::at(operation.number, kind).repeat(repeat);
    disk.inject(fault.clone());
    let events = Events::new(&disk);

    let run = story.run(&disk, &events);

    let told = || format!("{}: {fault:?} at {operation}", story.name());
    outcomes.runs += 1;
    if let Err(message) = run {
        outcomes.failed += 1;
        // Where everything fails from here on, the error may be of what was tried next.
        let file = operation.subject.rsplit('/').next().unwrap_or_default();
        let places = match repeat {
            Repeat::Once => vec![file, "decision"],
            Repeat::Forever => vec!["state", "images", TARGET, "decision"],
        };
        assert!(
            places.iter().any(|place| message.contains(place)),
            "{}: the error names none of {places:?}: {message}",
            told()
        );
    }
    let of_device = format!(" of {TARGET}");
    let misuses = disk.misuses();
    let mut misuses = misuses
        .iter()
        .filter(|m| !(story.setup.device && m.contains(&of_device)));
    assert_eq!(misuses.next(), None, "{}", told());
    let promises: Vec<Promise> = events.all();
    let snapshot = disk.snapshot();
    let limits = ImageLimits {
        exhaustive: 4,
        samples: 4,
        damaged: 1,
    };
    let lost = snapshot.crash_images(seed(), limits).map(|i| i.disk());
    for restarted in std::iter::once(snapshot.after_kill()).chain(lost) {
        let recovered = story.recover_and_go_on(&restarted, &promises, &Events::new(&restarted));
        // A reservation that got half way, and a log that takes no note of it: nobody can tell who changed the
        // file, so what was staged is compared and staged again. The target is at its old point.
        let untold = operation.kind == OperationKind::Reserve && repeat == Repeat::Forever;
        let given_up = matches!(&recovered, Err(e) if untold && e.contains("cannot go on"));
        assert!(given_up || recovered.is_ok(), "{}: {recovered:?}", told());
    }
}

fn prepared(story: &Story) -> SimDisk {
    let disk = SimDisk::new(SimOptions::default());
    story.prepare(&disk);
    disk.snapshot().after_kill()
}

fn operations(story: &Story) -> Vec<Operation> {
    let disk = prepared(story);
    disk.record();
    story
        .run(&disk, &Events::new(&disk))
        .expect("nothing fails yet");
    let trace = disk.take_trace().into_iter();
    trace.filter_map(|boundary| boundary.operation).collect()
}

#[test]
fn any_failure_at_any_operation_leaves_old_new_or_resumable() {
    for setup in Setup::of_every_kind() {
        let mut outcomes = Outcomes::default();
        let mut stories = vec![story(setup, four_images(), &[], &[Step::Sync(1, 1)])];
        if setup.strategy != Strategy::Direct && !setup.is_without_undo() {
            let before = [Step::Sync(1, 1)];
            stories.push(story(setup, four_images(), &before, &[Step::Rollback]));
            stories.push(story(setup, four_images(), &before, &[Step::Accept]));
        }
        for story in &stories {
            for operation in operations(story) {
                for kind in [FaultKind::Io, FaultKind::NoSpace] {
                    for repeat in [Repeat::Once, Repeat::Forever] {
                        check(story, &operation, kind, repeat, &mut outcomes);
                    }
                }
            }
        }
        let Outcomes { runs, failed } = outcomes;
        let (strategy, place) = (setup.strategy, if setup.device { "device" } else { "file" });
        println!("{strategy} on a {place}: {runs} faults, {failed} of them ended the run");
        assert!(failed * 2 > runs, "hardly any fault was noticed");
    }
}
