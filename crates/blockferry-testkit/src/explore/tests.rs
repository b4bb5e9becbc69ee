//! The explorer explored: a small write-ahead protocol that is right, and every way to break it.

use blockferry_device::{BlockTarget, StorageFile};

use super::*;
use crate::random::mix;

/// What can be left out of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Without {
    Nothing,
    LogFlush,
    LogName,
    TargetFlush,
    Order,
    Checksum,
    RecoveryLogFlush,
    RecoveryTargetFlush,
    CacheDrop,
}

/// Changes two far apart sectors of a device atomically by way of a log file.
struct Toy {
    without: Without,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Promise {
    Committed,
    Applied,
}

const OLD: [u8; 512] = [1; 512];
const NEW: [u8; 512] = [2; 512];
const PLACES: [u64; 2] = [0, 4096];

impl Toy {
    fn barrier(&self, name: Without, act: impl FnOnce() -> blockferry_device::Result<()>) -> Step {
        if self.without == name {
            Ok(())
        } else {
            act().map_err(|e| e.to_string())
        }
    }

    fn record() -> Vec<u8> {
        let mut record = [NEW, NEW].concat();
        record.extend(sum(&record));
        record
    }

    fn apply(target: &dyn BlockTarget, record: &[u8]) -> Step {
        let mut pieces = PLACES.iter().zip(record.chunks(512));
        pieces
            .try_for_each(|(place, piece)| target.write_at(*place, piece))
            .map_err(|e| e.to_string())
    }

    fn valid_record(&self, log: &dyn StorageFile) -> Option<Vec<u8>> {
        let mut record = vec![0; 1032];
        if log.size_bytes() != 1032 || log.read_at(0, &mut record).is_err() {
            return None;
        }
        let valid = record[1024..] == sum(&record[..1024]);
        (valid || self.without == Without::Checksum).then_some(record)
    }

    fn replay(&self, disk: &SimDisk) -> Step {
        let (dir, target) = (disk.dir("state"), disk.device("target", 8192));
        let Some(log) = dir.open("log").map_err(|e| e.to_string())? else {
            return Ok(());
        };
        self.barrier(Without::RecoveryLogFlush, || log.flush())?;
        if self.without != Without::CacheDrop {
            log.drop_cache();
        }
        if let Some(record) = self.valid_record(&*log) {
            // What the name points to must be durable, and so must the name, before the target changes.
            dir.sync().map_err(|e| e.to_string())?;
            Self::apply(&*target, &record)?;
            self.barrier(Without::RecoveryTargetFlush, || target.flush())?;
        }
        dir.remove("log")
            .and_then(|()| dir.sync())
            .map_err(|e| e.to_string())
    }
}

type Step = Result<(), String>;

fn sum(bytes: &[u8]) -> [u8; 8] {
    bytes
        .iter()
        .fold(9, |sum, byte| mix(sum ^ u64::from(*byte)))
        .to_le_bytes()
}

impl Scenario for Toy {
    type Event = Promise;

    fn prepare(&self, disk: &SimDisk) {
        disk.install_device("target", &OLD.repeat(16));
        assert!(disk.dir("state").names().unwrap().is_empty());
    }

    fn run(&self, disk: &SimDisk, events: &Events<Promise>) -> Step {
        let (dir, target) = (disk.dir("state"), disk.device("target", 8192));
        let record = Self::record();
        disk.label("stage");
        let log = dir.create("log").map_err(|e| e.to_string())?;
        if self.without == Without::Order {
            Self::apply(&*target, &record)?;
        }
        log.write_at(0, &record).map_err(|e| e.to_string())?;
        disk.label("commit");
        self.barrier(Without::LogFlush, || log.flush())?;
        self.barrier(Without::LogName, || dir.sync())?;
        events.push(Promise::Committed);
        disk.label("apply");
        Self::apply(&*target, &record)?;
        self.barrier(Without::TargetFlush, || target.flush())?;
        events.push(Promise::Applied);
        disk.label("retire");
        dir.remove("log")
            .and_then(|()| dir.sync())
            .map_err(|e| e.to_string())
    }

    fn recover(&self, disk: &SimDisk, before: &[Promise], events: &Events<Promise>) -> Step {
        self.replay(disk)?;
        let content = disk.content("target").expect("the device is always there");
        let new = content.starts_with(&NEW);
        if content[4096..].starts_with(&NEW) != new || !(new || content.starts_with(&OLD)) {
            return Err("the target is neither old nor new".to_owned());
        }
        if !new && !before.is_empty() {
            return Err("an acknowledged commit was lost".to_owned());
        }
        if new {
            events.push(Promise::Committed);
        }
        Ok(())
    }
}

fn report(without: Without, depth: u32) -> Report {
    explore(
        &ExploreOptions {
            depth,
            ..ExploreOptions::default()
        },
        &Toy { without },
    )
}

#[test]
fn a_right_protocol_has_no_violation_at_depth_two() {
    let report = report(Without::Nothing, 2);

    report.assert_clean();
    assert!(!report.cut_short && report.distinct_images > 30, "{report}");
    for step in [
        "stage",
        "commit",
        "apply",
        "retire",
        "apply, then in recovery",
    ] {
        assert!(
            report.steps[step].recoveries > 0,
            "{step} was not explored\n{report}"
        );
    }
}

#[test]
fn every_missing_barrier_of_the_run_is_caught_at_depth_one() {
    use Without::{Checksum, LogFlush, LogName, Order, TargetFlush};
    for without in [LogFlush, LogName, TargetFlush, Order, Checksum] {
        assert!(
            !report(without, 1).violations.is_empty(),
            "{without:?} was not caught"
        );
    }
}

#[test]
fn a_missing_barrier_of_recovery_is_caught_at_depth_two_only() {
    for without in [Without::RecoveryLogFlush, Without::RecoveryTargetFlush] {
        assert!(report(without, 1).violations.is_empty(), "{without:?}");
        assert!(
            !report(without, 2).violations.is_empty(),
            "{without:?} was not caught"
        );
    }
}

#[test]
fn sensitivity_finds_the_needed_barriers_by_itself() {
    let options = ExploreOptions {
        depth: 1,
        ..ExploreOptions::default()
    };

    let caught: Vec<(OperationKind, bool)> = sensitivity(
        &options,
        &Toy {
            without: Without::Nothing,
        },
    )
    .into_iter()
    .map(|(barrier, report)| (barrier.kind, !report.violations.is_empty()))
    .collect();

    use OperationKind::{Flush, SyncDirectory};
    // The last one only tidies up.
    let expected = [
        (Flush, true),
        (SyncDirectory, true),
        (Flush, true),
        (SyncDirectory, false),
    ];
    assert_eq!(caught, expected);
}

#[test]
fn no_single_fault_breaks_a_right_protocol() {
    let kinds = [FaultKind::Io, FaultKind::NoSpace, FaultKind::PowerLoss];

    let report = explore_faults(
        &ExploreOptions::default(),
        &kinds,
        &Toy {
            without: Without::Nothing,
        },
    );

    report.assert_clean();
    assert!(report.runs >= 8 * kinds.len(), "{report}");
}

#[test]
fn trusting_the_cache_after_a_failed_write_is_caught() {
    let toy = Toy {
        without: Without::CacheDrop,
    };

    explore(&ExploreOptions::default(), &toy).assert_clean();
    let report = explore_faults(&ExploreOptions::default(), &[FaultKind::Io], &toy);

    assert!(!report.violations.is_empty(), "{report}");
}

#[test]
fn a_lying_flush_is_caught() {
    let faults = [Fault::on(
        OperationKind::Flush,
        "log",
        1,
        FaultKind::SilentLoss,
    )];
    let toy = Toy {
        without: Without::Nothing,
    };
    let is_caught = |seed: u64| {
        let sim = SimOptions {
            seed,
            ..SimOptions::default()
        };
        let options = ExploreOptions {
            sim,
            ..ExploreOptions::default()
        };
        !explore_with(&options, &faults, &toy).violations.is_empty()
    };

    assert!((0..8).any(is_caught));
}

#[test]
fn a_violation_tells_the_shortest_story() {
    let options = ExploreOptions {
        depth: 1,
        max_violations: 100,
        ..ExploreOptions::default()
    };

    let report = explore(
        &options,
        &Toy {
            without: Without::Order,
        },
    );

    let half = |violation: &Violation| {
        violation.message == "the target is neither old nor new"
            && violation.survivors == ["target sector 0: as operation 2 made it"]
    };
    assert!(report.violations.iter().any(half), "{report}");
    assert!(report.to_string().contains("seed 1"), "{report}");
}

/// Goes on using a file after its flush failed.
struct Stubborn;

impl Scenario for Stubborn {
    type Event = ();

    fn prepare(&self, disk: &SimDisk) {
        disk.install("state", "log", &[0; 512]);
    }

    fn run(&self, disk: &SimDisk, _: &Events<()>) -> Step {
        let log = disk
            .dir("state")
            .open("log")
            .ok()
            .flatten()
            .ok_or("no log")?;
        log.write_at(0, &[1; 512]).map_err(|e| e.to_string())?;
        if log.flush().is_err() {
            log.flush().map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    fn recover(&self, _: &SimDisk, _: &[()], _: &Events<()>) -> Step {
        Ok(())
    }
}

#[test]
fn a_second_flush_after_a_failed_one_is_caught() {
    explore(&ExploreOptions::default(), &Stubborn).assert_clean();

    let report = explore_faults(&ExploreOptions::default(), &[FaultKind::Io], &Stubborn);

    assert!(
        report.violations[0].message.contains("had failed before"),
        "{report}"
    );
}

#[test]
fn a_panic_in_recovery_is_a_violation() {
    struct Panics;
    impl Scenario for Panics {
        type Event = ();
        fn prepare(&self, _: &SimDisk) {}
        fn run(&self, disk: &SimDisk, _: &Events<()>) -> Step {
            disk.device("v", 512).flush().map_err(|e| e.to_string())
        }
        fn recover(&self, _: &SimDisk, _: &[()], _: &Events<()>) -> Step {
            Err(format!("reached {}", [0][std::hint::black_box(1)]))
        }
    }

    let report = explore(&ExploreOptions::default(), &Panics);

    assert!(
        report.violations[0].message.starts_with("panicked: "),
        "{report}"
    );
}

#[test]
fn a_violation_is_reproduced_from_what_it_prints() {
    let broken = [Without::Order, Without::LogFlush, Without::RecoveryLogFlush];
    for without in broken {
        let report = report(without, 2);
        let violation = &report.violations[0];

        let again = |toy: &Toy| {
            reproduce(
                &ExploreOptions::default(),
                &violation.faults,
                &violation.crashes,
                toy,
            )
        };

        assert_eq!(again(&Toy { without }), Err(violation.message.clone()));
        let mended = Toy {
            without: Without::Nothing,
        };
        // Without the barrier the operations have other numbers, but the right protocol stands any crash.
        let stands = |outcome: &Result<(), String>| match outcome {
            Ok(()) => true,
            Err(message) => message.contains("any more"),
        };
        assert!(stands(&again(&mended)));
        let printed = report.to_string();
        assert!(printed.contains("let crashes = [Crash::"), "{printed}");
        assert!(printed.contains("reproduce(&options, &faults"), "{printed}");
    }
}

#[test]
fn a_crash_that_cannot_happen_any_more_is_said_to_be_gone() {
    let toy = Toy {
        without: Without::Nothing,
    };

    let gone = reproduce(&ExploreOptions::default(), &[], &[Crash::kill(1000)], &toy);

    assert!(gone.unwrap_err().contains("no operation 1000"));
}

#[test]
fn depth_three_crashes_the_recovery_from_a_crashed_recovery() {
    let (two, three) = (report(Without::Nothing, 2), report(Without::Nothing, 3));

    three.assert_clean();
    assert!(three.recoveries > two.recoveries, "{three}");
}
