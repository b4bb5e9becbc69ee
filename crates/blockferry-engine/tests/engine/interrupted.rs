//! Runs that end early: what was durable is not staged again, whatever happened to the source meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockferry_device::CancelToken;
use blockferry_engine::{Context, ErrorKind, Mode, Strategy, SyncOptions, Undo, cancel};
use blockferry_pipeline::Event;
use blockferry_testkit::{Fault, FaultKind, OperationKind, Random, Repeat};
use proptest::prelude::*;

use crate::harness::{
    Machine, On, Source, assert_rolls_back_to, assert_synced, block_size, cancelled_by, edited,
    failure, image, listening, one_of, options, warnings,
};

const SMALL: u64 = 4096;
const BYTES: u64 = 6 << 20;

fn with(mode: Mode, strategy: Option<Strategy>) -> SyncOptions {
    options(|o| {
        o.block_size = block_size(SMALL);
        o.mode = mode;
        o.strategy = strategy;
        o.threads = Some(1);
    })
}

/// Every way a target may be brought up to date.
fn ways() -> Vec<(On, bool, bool, SyncOptions)> {
    let redo = Some(Strategy::Redo);
    let mut in_place = with(Mode::Delta, None);
    in_place.in_place = true;
    let mut in_place_full = with(Mode::Full, None);
    in_place_full.in_place = true;
    let mut no_undo = with(Mode::Delta, redo);
    no_undo.undo = Undo::None;
    vec![
        (On::File, false, true, with(Mode::Delta, redo)),
        (On::File, false, true, with(Mode::Full, redo)),
        (On::File, false, true, no_undo),
        (On::File, false, true, with(Mode::Full, None)),
        (
            On::File,
            false,
            true,
            with(Mode::Delta, Some(Strategy::Shadow)),
        ),
        (On::File, true, true, with(Mode::Delta, None)),
        (
            On::File,
            true,
            true,
            with(Mode::Full, Some(Strategy::Clone)),
        ),
        (On::File, false, true, in_place.clone()),
        (On::File, false, true, in_place_full.clone()),
        (On::File, false, false, with(Mode::Auto, None)),
        (On::Device, false, true, with(Mode::Delta, None)),
        (On::Device, false, true, with(Mode::Full, None)),
        (On::Device, false, true, in_place),
        (On::Device, false, true, in_place_full),
    ]
}

fn makes_old_point(options: &SyncOptions) -> bool {
    options.undo == Undo::Keep && !options.in_place
}

#[test]
fn a_read_error_at_any_point_is_resumed_without_staging_anything_durable_again() {
    for (number, (on, clones, present, options)) in ways().into_iter().enumerate() {
        let mut random = Random::part(1, number as u64);
        let old = image(20, BYTES);
        let machine = Machine::new(on, clones, present.then_some(&old[..]));
        let source = Source::new(edited(20, &old, BYTES, 300));
        let mut interrupted = 0;
        let receipt = loop {
            match interrupted {
                0..4 => source.fail_from(60 + random.below(40)),
                _ => source.heal(),
            }
            let error = match machine.sync(&source, &options) {
                Ok(receipt) => break receipt,
                Err(error) => error,
            };
            assert_eq!(error.kind(), ErrorKind::Source, "{error}");
            assert!(error.is_resumable(), "way {number}: {error}");
            interrupted += 1;
            if makes_old_point(&options) && present {
                let content = machine.content().unwrap();
                assert_eq!(content, old, "way {number}: the old point");
            }
        };

        assert!(interrupted > 0, "way {number} was not interrupted");
        assert!(receipt.resumed_bytes > 0, "way {number} resumed nothing");
        assert_synced(&machine, &source.bytes(), options.block_size, &receipt);
        if makes_old_point(&options) && present {
            assert_rolls_back_to(&machine, &old);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 0, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_source_that_changes_between_runs_is_what_the_target_becomes(seed: u64) {
        let mut random = Random::new(seed);
        let all = ways();
        let (on, clones, present, options) = &one_of(&mut random, &all);
        println!("{on:?} clones {clones} present {present} {options:?}");
        let old = image(seed, BYTES);
        let machine = Machine::new(*on, *clones, present.then_some(&old[..]));
        let source = if random.chance(1, 2) { Source::new(old.clone()) } else { Source::anonymous(old.clone()) };
        for round in 0..3 {
            // Changes, or returns to what the target holds.
            let back = random.chance(1, 4);
            let next = edited(seed ^ round, &source.bytes(), BYTES, 100);
            source.change(|bytes| *bytes = if back { old.clone() } else { next });
            source.fail_from(20 + random.below(200));
            if let Ok(receipt) = machine.sync(&source, options) {
                prop_assert_eq!(receipt.restaged_bytes, 0);
            }
        }
        source.heal();

        let receipt = machine.sync(&source, options).unwrap();

        assert_synced(&machine, &source.bytes(), options.block_size, &receipt);
    }
}

#[test]
fn a_source_that_returns_to_an_earlier_version_is_not_mistaken_for_what_was_staged_meanwhile() {
    for (number, (on, clones, present, options)) in ways().into_iter().enumerate() {
        let old = image(21, BYTES);
        let (one, other) = (edited(1, &old, BYTES, 300), edited(2, &old, BYTES, 300));
        let machine = Machine::new(on, clones, present.then_some(&old[..]));
        // Its evidence is its content: it returns with it.
        let versions = [&one, &other, &one].map(|bytes| {
            use blockferry_device::{Identity, MemoryDevice};
            let memory = MemoryDevice::from_bytes("memory", bytes.clone());
            Arc::new(memory.with_identity(Identity::from_bytes(b"memory")))
        });
        for memory in &versions[..2] {
            let faulty = blockferry_testkit::FaultySource::new(Arc::clone(memory) as _);
            let faulty = Arc::new(
                faulty.fail_reads_in(blockferry_core::Extent::from_range(BYTES - 4096..BYTES)),
            );
            blockferry_engine::sync(faulty, &mut machine.open(), &options, &Context::default())
                .unwrap_err();
        }

        let receipt = blockferry_engine::sync(
            Arc::clone(&versions[2]) as _,
            &mut machine.open(),
            &options,
            &Context::default(),
        );

        println!("way {number}");
        assert_synced(&machine, &one, options.block_size, &receipt.unwrap());
    }
}

#[test]
fn a_staged_page_whose_source_went_back_to_the_targets_content_is_not_applied() {
    for (on, clones, present, options) in ways().into_iter().filter(|w| w.2) {
        let old: Vec<u8> = image(22, BYTES);
        let machine = Machine::new(on, clones, present.then_some(&old[..]));
        let source = Source::new(edited(22, &old, BYTES, 300));
        source.fail_from(74);
        machine.sync(&source, &options).unwrap_err();
        source.heal();
        source.change(|bytes| *bytes = old.clone());

        let receipt = machine.sync(&source, &options).unwrap();

        assert_synced(&machine, &old, options.block_size, &receipt);
    }
}

#[test]
fn cancelling_begins_no_new_read_and_keeps_what_was_staged() {
    for (number, (on, clones, present, mut options)) in ways().into_iter().enumerate() {
        options.threads = Some(3);
        let old = image(23, BYTES);
        let machine = Machine::new(on, clones, present.then_some(&old[..]));
        let source = Source::new(edited(23, &old, BYTES, 300));
        let token = CancelToken::new();
        let begun_after = Arc::new(AtomicU64::new(0));
        let (hook_token, after) = (token.clone(), Arc::clone(&begun_after));
        source.on_read(move |n| {
            if hook_token.is_cancelled() {
                after.fetch_add(1, Ordering::SeqCst);
            }
            if n == 124 {
                hook_token.cancel();
            }
            Ok(())
        });

        let error = machine
            .sync_in(&source, &options, &cancelled_by(&token))
            .unwrap_err();

        assert_eq!(error.kind(), ErrorKind::Cancelled, "way {number}");
        assert!(error.is_resumable(), "way {number}");
        // Reads that passed the check before the signal may still arrive: at most one for each other worker.
        assert!(
            begun_after.load(Ordering::SeqCst) <= 2,
            "way {number}: {begun_after:?} reads began"
        );
        source.heal();
        let receipt = machine.sync(&source, &options).unwrap();
        assert!(receipt.resumed_bytes > 0, "way {number}");
        assert_synced(&machine, &source.bytes(), options.block_size, &receipt);
    }
}

#[test]
fn a_source_written_under_way_commits_nothing() {
    for (number, (on, clones, present, options)) in ways().into_iter().enumerate() {
        let old = image(24, BYTES);
        let machine = Machine::new(on, clones, present.then_some(&old[..]));
        let source = Source::new(edited(24, &old, BYTES, 300));
        let writer = Arc::downgrade(&source);
        source.on_read(move |n| {
            if n == 124 {
                writer.upgrade().unwrap().change(|bytes| bytes[100] ^= 1);
            }
            Ok(())
        });

        let error = machine.sync(&source, &options).unwrap_err();

        assert_eq!(error.kind(), ErrorKind::Source, "way {number}: {error}");
        assert!(error.is_resumable());
        if makes_old_point(&options) {
            assert_eq!(machine.content(), present.then_some(old), "way {number}");
        }
        source.heal();
        let receipt = machine.sync(&source, &options).unwrap();
        assert_synced(&machine, &source.bytes(), options.block_size, &receipt);
    }
}

#[test]
fn a_source_that_shrinks_under_way_is_an_error_of_the_source() {
    let old = image(25, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(25, &old, BYTES, 300));
    let writer = Arc::downgrade(&source);
    source.on_read(move |n| {
        if n == 5 {
            writer
                .upgrade()
                .unwrap()
                .change(|bytes| bytes.truncate(1 << 20));
        }
        Ok(())
    });

    let error = machine
        .sync(&source, &with(Mode::Delta, Some(Strategy::Redo)))
        .unwrap_err();

    assert_eq!(error.kind(), ErrorKind::Source, "{error}");
    assert_eq!(machine.content().unwrap(), old);
}

/// A machine with an unfinished session.
fn unfinished(options: &SyncOptions) -> (Machine, Arc<Source>, Vec<u8>) {
    let old = image(26, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(26, &old, BYTES, 300));
    source.fail_from(74);
    machine.sync(&source, options).unwrap_err();
    source.heal();
    (machine, source, old)
}

#[test]
fn a_session_for_another_sync_is_dropped_and_said() {
    let begun = with(Mode::Delta, Some(Strategy::Redo));
    let changes: [fn(&mut SyncOptions); 4] = [
        |o| o.mode = Mode::Full,
        |o| o.strategy = Some(Strategy::Shadow),
        |o| o.block_size = block_size(65_536),
        |o| o.undo = Undo::None,
    ];
    for change in changes {
        let (machine, source, _) = unfinished(&begun);
        let mut other = begun.clone();
        change(&mut other);
        let (context, events) = listening();

        let receipt = machine.sync_in(&source, &other, &context).unwrap();

        assert_eq!(warnings(&events), ["session_dropped"], "{other:?}");
        assert_eq!(receipt.resumed_bytes, 0);
        assert_synced(&machine, &source.bytes(), other.block_size, &receipt);
    }
}

#[test]
fn a_session_from_a_source_of_another_size_is_dropped_and_said() {
    let begun = with(Mode::Delta, Some(Strategy::Redo));
    for bytes in [BYTES - 4096 * 3, BYTES + 77] {
        let (machine, source, old) = unfinished(&begun);
        source.change(|b| *b = edited(4, b, bytes, 10));
        let (context, events) = listening();

        let receipt = machine.sync_in(&source, &begun, &context).unwrap();

        assert_eq!(warnings(&events), ["session_dropped"]);
        assert_synced(&machine, &source.bytes(), begun.block_size, &receipt);
        assert_rolls_back_to(&machine, &old);
    }
}

#[test]
fn auto_resumes_whatever_was_begun() {
    for mode in [Mode::Delta, Mode::Full] {
        let (machine, source, _) = unfinished(&with(mode, Some(Strategy::Redo)));

        let receipt = machine.sync(&source, &with(Mode::Auto, None)).unwrap();

        assert_eq!(
            (receipt.mode, receipt.strategy),
            (mode, Some(Strategy::Redo))
        );
        assert!(receipt.resumed_bytes > 0);
        assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
    }
}

#[test]
fn a_target_written_under_a_session_is_compared_afresh() {
    let options = with(Mode::Delta, Some(Strategy::Redo));
    let (machine, source, _) = unfinished(&options);
    machine.scribble(5000, b"somebody else");
    let (context, events) = listening();

    let receipt = machine.sync_in(&source, &options, &context).unwrap();

    assert_eq!(warnings(&events), ["target_written"]);
    assert!(receipt.resumed_bytes > 0, "what is staged still counts");
    assert_synced(&machine, &source.bytes(), options.block_size, &receipt);
}

#[test]
fn cancel_drops_what_is_staged_and_the_target_keeps_its_point() {
    for (number, (on, clones, present, options)) in ways().into_iter().enumerate() {
        if options.in_place {
            continue;
        }
        let old = image(27, BYTES);
        let machine = Machine::new(on, clones, present.then_some(&old[..]));
        let source = Source::new(edited(27, &old, BYTES, 300));
        source.fail_from(74);
        machine.sync(&source, &options).unwrap_err();
        source.heal();

        let outcome = cancel(&mut machine.open(), &Context::default()).unwrap();

        assert_eq!(outcome.outcome, "cancelled", "way {number}");
        assert!(outcome.freed_bytes > 0, "way {number}");
        assert_eq!(machine.content(), present.then_some(old), "way {number}");
        let again = cancel(&mut machine.open(), &Context::default()).unwrap();
        assert_eq!(again.outcome, "nothing_to_do");
        let receipt = machine.sync(&source, &options).unwrap();
        assert_eq!(receipt.resumed_bytes, 0, "way {number}");
        assert_synced(&machine, &source.bytes(), options.block_size, &receipt);
    }
}

#[test]
fn a_resumed_run_counts_what_differs_from_the_old_point_once() {
    let options = with(Mode::Delta, Some(Strategy::Redo));
    let (machine, source, old) = unfinished(&options);
    let pages = |bytes: &[u8]| bytes.chunks(4096).map(<[u8]>::to_vec).collect::<Vec<_>>();
    let (old, new) = (pages(&old), pages(&source.bytes()));
    let differing = old.iter().zip(&new).filter(|(a, b)| a != b).count() as u64;

    let receipt = machine.sync(&source, &options).unwrap();

    assert_eq!(receipt.changed_bytes, Some(differing * SMALL));
}

#[test]
fn events_tell_progress_decisions_and_checkpoints() {
    let old = image(28, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(28, &old, BYTES, 30));
    let (context, events) = listening();

    machine
        .sync_in(&source, &with(Mode::Delta, None), &context)
        .unwrap();

    let events = events.lock().unwrap();
    let progress = events.iter().filter_map(|e| match e {
        Event::Progress(p) => Some(*p),
        _ => None,
    });
    let scanned: Vec<u64> = progress
        .filter(|p| p.phase == blockferry_pipeline::Phase::Scanning)
        .inspect(|p| assert_eq!(p.total_bytes, BYTES))
        .map(|p| p.done_bytes)
        .collect();
    assert!(
        scanned.is_sorted() && scanned.last() == Some(&BYTES),
        "{scanned:?}"
    );
    assert!(
        events
            .iter()
            .any(|e| matches!(e, Event::Decision(why) if why.contains("redo")))
    );
    assert_eq!(failure().kind(), blockferry_device::ErrorKind::Io);
}

#[test]
fn pages_that_never_survive_are_staged_three_times_and_no_more() {
    let old = blockferry_testkit::images::random_image(28, BYTES);
    let machine = Machine::file(&old);
    // The medium loses a part of every group and says nothing.
    let forgetting = Fault::on(OperationKind::Flush, ".log.", 1, FaultKind::SilentLoss);
    machine.disk.inject(forgetting.repeat(Repeat::Forever));
    let source = Source::new(edited(28, &old, BYTES, 500));
    let (context, events) = listening();

    let error = machine
        .sync_in(&source, &with(Mode::Delta, Some(Strategy::Redo)), &context)
        .unwrap_err();

    assert_eq!(error.kind(), ErrorKind::Corruption, "{error}");
    assert_eq!(warnings(&events), ["staged_pages_lost"; 2]);
    let cause = std::error::Error::source(&error).expect("what reading it back met");
    assert!(cause.to_string().contains(".log."), "{cause}");
    assert_eq!(machine.content().unwrap(), old);
}
