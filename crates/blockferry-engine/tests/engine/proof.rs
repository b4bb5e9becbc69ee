//! What is read back from the medium, and what a caller that believes the flush gives up.

use blockferry_engine::{Context, Mode, Proof, Strategy, verify_target};
use blockferry_testkit::{Fault, FaultKind, OperationKind};

use crate::harness::{Machine, Source, edited, image, options};

const WAYS: [(Mode, Strategy); 2] = [
    (Mode::Full, Strategy::Shadow),
    (Mode::Delta, Strategy::Redo),
];

fn images() -> (Vec<u8>, Vec<u8>) {
    let bytes = 3 << 20;
    let old = image(42, bytes);
    let new = edited(43, &old, bytes, 400);
    (old, new)
}

#[test]
fn what_a_lying_flush_lost_is_found_before_the_run_counts_as_done() {
    let (old, new) = images();
    for (mode, strategy) in WAYS {
        let machine = with_a_lying_flush(&old);

        let outcome = machine.sync(
            &Source::new(new.clone()),
            &options(|o| (o.mode, o.strategy) = (mode, Some(strategy))),
        );

        // A shadow stages again what was lost; what apply wrote is rolled back.
        match strategy {
            Strategy::Shadow => assert!(outcome.unwrap().proven_bytes > 0),
            _ => assert!(outcome.is_err(), "{outcome:?}"),
        }
        let expected = if strategy == Strategy::Shadow {
            &new
        } else {
            &old
        };
        assert!(machine.content().as_ref() == Some(expected), "{strategy}");
    }
}

#[test]
fn a_flush_that_is_believed_is_not_read_back_and_verification_finds_its_lies() {
    let (old, new) = images();
    for (mode, strategy) in WAYS {
        let machine = with_a_lying_flush(&old);

        let receipt = machine
            .sync(
                &Source::new(new.clone()),
                &options(|o| {
                    (o.mode, o.strategy, o.proof) = (mode, Some(strategy), Proof::Flush);
                }),
            )
            .unwrap();

        assert_eq!((&*receipt.proof, receipt.proven_bytes), ("flush", 0));
        let verified = verify_target(&mut machine.open(), &Context::default()).unwrap();
        assert!(!verified.matches && verified.different_bytes > 0);
    }
}

/// The first flush of the target, or of the file that is to take its place, loses a part of what it should keep.
fn with_a_lying_flush(old: &[u8]) -> Machine {
    let machine = Machine::file(old);
    let lies = Fault::on(OperationKind::Flush, "home/", 1, FaultKind::SilentLoss);
    machine.disk.inject(lies);
    machine
}
