//! Choosing, predicting, limits: what is decided before the first byte, and what holds a run back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use blockferry_device::Clock;
use blockferry_engine::{Context, ErrorKind, Mode, Strategy, SyncOptions, Undo, accept};
use blockferry_pipeline::{Event, Phase};

use crate::harness::{
    Machine, On, Source, assert_rolls_back_to, assert_synced, block_size, edited, image, options,
};

const BYTES: u64 = 6 << 20;

#[test]
fn auto_chooses_by_how_much_differs_and_says_so_with_numbers() {
    let old = blockferry_testkit::images::random_image(40, BYTES);
    for (per_mille, clones, mode, strategy) in [
        (10, false, Mode::Delta, Strategy::Redo),
        (10, true, Mode::Delta, Strategy::Clone),
        (700, false, Mode::Full, Strategy::Shadow),
    ] {
        let machine = Machine::new(On::File, clones, Some(&old));
        let source = Source::new(edited(40, &old, BYTES, per_mille));

        let receipt = machine
            .sync(&source, &options(|o| o.mode = Mode::Auto))
            .unwrap();

        assert_eq!(
            (receipt.mode, receipt.strategy),
            (mode, Some(strategy)),
            "{}",
            receipt.reason
        );
        assert_eq!(receipt.requested_mode, Mode::Auto);
        for part in [
            "% of the sampled data differs",
            "predicted delta",
            "full",
            &strategy.to_string(),
        ] {
            assert!(
                receipt.reason.contains(part),
                "{part:?} in {:?}",
                receipt.reason
            );
        }
        assert_synced(&machine, &source.bytes(), block_size(65_536), &receipt);
    }
}

#[test]
fn where_nothing_is_left_to_choose_nothing_is_read_to_choose_it() {
    let old = blockferry_testkit::images::random_image(52, BYTES);
    let named = |mode, strategy| {
        options(|o| {
            o.mode = mode;
            o.strategy = strategy;
        })
    };
    for (on, present, clones, options) in [
        (
            On::File,
            true,
            false,
            named(Mode::Delta, Some(Strategy::Redo)),
        ),
        (
            On::File,
            true,
            false,
            named(Mode::Delta, Some(Strategy::Shadow)),
        ),
        (On::File, true, true, named(Mode::Delta, None)),
        (On::File, true, false, named(Mode::Full, None)),
        (On::Device, true, false, named(Mode::Delta, None)),
        (On::File, false, false, named(Mode::Auto, None)),
    ] {
        let machine = Machine::new(on, clones, present.then_some(&old[..]));
        let source = Source::new(edited(52, &old, BYTES, 30));

        let receipt = machine.sync(&source, &options).unwrap();

        assert_eq!(source.sampled_bytes(), Some(0), "{options:?}");
        assert_synced(&machine, &source.bytes(), block_size(65_536), &receipt);
    }
}

#[test]
fn space_that_may_not_suffice_is_worth_a_sample() {
    let old = blockferry_testkit::images::random_image(53, BYTES);
    let machine = Machine::file(&old);
    // Room for what differs, not for everything.
    machine.disk.limit_space("state", BYTES / 2);
    let source = Source::new(edited(53, &old, BYTES, 30));
    let named = options(|o| {
        o.mode = Mode::Delta;
        o.strategy = Some(Strategy::Redo);
    });

    let receipt = machine.sync(&source, &named).unwrap();

    assert_eq!(source.sampled_bytes(), Some(BYTES));
    assert_synced(&machine, &source.bytes(), block_size(65_536), &receipt);
}

#[test]
fn a_sample_of_a_sparse_image_is_taken_where_its_data_is() {
    const SPARSE: u64 = 48 << 20;
    let mut old = vec![0; usize::try_from(SPARSE).unwrap()];
    let mut random = blockferry_testkit::Random::new(54);
    // One page of 64 holds data, and every fourth of these differs.
    let pages = old.chunks_mut(4096).step_by(64);
    pages.for_each(|page| random.fill(page));
    let mut new = old.clone();
    let pages = new.chunks_mut(4096).step_by(256);
    pages.for_each(|page| page[7] ^= 1);
    let machine = Machine::file(&old);
    let source = Source::new(new.clone());

    let receipt = machine
        .sync(&source, &options(|o| o.block_size = block_size(4096)))
        .unwrap();

    let data = SPARSE / 64;
    assert_eq!(source.sampled_bytes(), Some(data), "holes were sampled");
    let share = "25.0 % of the sampled data differs (192.0 KiB of 768.0 KiB)";
    assert!(receipt.reason.starts_with(share), "{}", receipt.reason);
    assert_synced(&machine, &new, block_size(4096), &receipt);
}

#[test]
fn auto_downloads_an_absent_target_in_full_and_says_why() {
    let machine = Machine::new(On::File, false, None);
    let source = Source::new(image(41, BYTES));

    let receipt = machine.sync(&source, &options(|_| ())).unwrap();

    assert_eq!(
        (receipt.mode, receipt.strategy),
        (Mode::Full, Some(Strategy::Direct))
    );
    assert!(receipt.reason.contains("absent"), "{}", receipt.reason);
    assert_synced(&machine, &source.bytes(), block_size(65_536), &receipt);
}

#[test]
fn a_device_never_gets_a_strategy_that_needs_a_file() {
    let old = image(42, BYTES);
    for per_mille in [10, 1000] {
        for mode in [Mode::Auto, Mode::Delta, Mode::Full] {
            let machine = Machine::new(On::Device, true, Some(&old));
            let source = Source::new(edited(42, &old, BYTES, per_mille));

            let receipt = machine.sync(&source, &options(|o| o.mode = mode)).unwrap();

            assert_eq!(receipt.strategy, Some(Strategy::Redo));
            assert_synced(&machine, &source.bytes(), block_size(65_536), &receipt);
        }
    }
    for strategy in [Strategy::Shadow, Strategy::Clone] {
        let machine = Machine::new(On::Device, true, Some(&old));
        let source = Source::new(edited(42, &old, BYTES, 10));

        let error = machine
            .sync(&source, &options(|o| o.strategy = Some(strategy)))
            .unwrap_err();

        assert!(
            matches!(error.kind(), ErrorKind::Target | ErrorKind::Usage),
            "{error}"
        );
        assert_eq!(machine.content().unwrap(), old);
    }
}

#[test]
fn a_log_without_room_is_refused_before_the_first_byte_naming_the_way_out() {
    let old = blockferry_testkit::images::random_image(43, BYTES);
    let machine = Machine::new(On::Device, false, Some(&old));
    machine.disk.limit_space("state", 2 << 20);
    let source = Source::new(edited(43, &old, BYTES, 700));
    drop(machine.open());
    let mut failed = None;

    let changes =
        machine.changes(|| failed = Some(machine.sync(&source, &options(|_| ())).unwrap_err()));

    let error = failed.unwrap();
    assert_eq!(error.kind(), ErrorKind::Target);
    assert!(error.to_string().contains("--in-place"), "{error}");
    assert_eq!(changes, Vec::<String>::new());
    assert_eq!(machine.content().unwrap(), old);
}

#[test]
fn a_log_limit_that_is_reached_ends_the_run_resumable_at_the_old_point() {
    let old = blockferry_testkit::images::random_image(44, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(44, &old, BYTES, 500));
    let limited = |bytes| {
        options(|o| {
            o.mode = Mode::Delta;
            o.strategy = Some(Strategy::Redo);
            o.log_limit_bytes = Some(bytes);
        })
    };

    let error = machine.sync(&source, &limited(2 << 20)).unwrap_err();

    assert_eq!(error.kind(), ErrorKind::Interrupted);
    assert!(error.is_resumable());
    assert_eq!(machine.content().unwrap(), old);
    let receipt = machine.sync(&source, &limited(64 << 20)).unwrap();
    assert!(receipt.resumed_bytes > 0);
    assert_synced(&machine, &source.bytes(), block_size(65_536), &receipt);
}

#[test]
fn a_log_that_cannot_take_even_the_first_record_leaves_nothing_to_resume() {
    let old = blockferry_testkit::images::random_image(49, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(49, &old, BYTES, 500));
    let limited = options(|o| {
        o.mode = Mode::Delta;
        o.strategy = Some(Strategy::Redo);
        o.log_limit_bytes = Some(4096);
    });

    let error = machine.sync(&source, &limited).unwrap_err();

    assert_eq!(error.kind(), ErrorKind::Target);
    assert!(!error.is_resumable());
    assert_eq!(machine.content().unwrap(), old);
}

fn all_of_it(strategy: Strategy) -> SyncOptions {
    options(|o| {
        o.block_size = block_size(4096);
        o.mode = Mode::Delta;
        o.strategy = Some(strategy);
        o.threads = Some(1);
    })
}

#[test]
fn a_log_that_runs_full_interrupts_the_run() {
    let old = blockferry_testkit::images::random_image(50, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(50, &old, BYTES, 900));
    let clock = Arc::new(blockferry_testkit::VirtualClock::default());
    let staged = Arc::new(AtomicBool::new(false));
    let is_full = Arc::new(AtomicBool::new(false));
    let disk = machine.disk.clone();
    let (some, full) = (Arc::clone(&staged), Arc::clone(&is_full));
    let mut context = Context::new().with_observer(move |event: &Event| match event {
        Event::Progress(progress) if progress.phase == Phase::Scanning => {
            some.store(true, Ordering::SeqCst);
        }
        Event::Checkpoint { .. } => {
            disk.limit_space("state", 0);
            full.store(true, Ordering::SeqCst);
        }
        _ => {}
    });
    context.clock = Arc::clone(&clock) as _;
    source.on_read(move |_| {
        // What is staged becomes durable before the rest is read.
        while staged.load(Ordering::SeqCst) && !is_full.load(Ordering::SeqCst) {
            clock.sleep(Duration::from_millis(100));
            std::thread::sleep(Duration::from_millis(1));
            let too_long = Duration::from_secs(600);
            assert!(clock.now() < too_long, "no group was closed");
        }
        Ok(())
    });

    let error = machine
        .sync_in(&source, &all_of_it(Strategy::Redo), &context)
        .unwrap_err();

    assert_eq!(error.kind(), ErrorKind::Interrupted, "{error}");
    assert!(error.is_resumable());
    assert_eq!(machine.content().unwrap(), old);
    source.heal();
    let again = machine.sync(&source, &all_of_it(Strategy::Redo));
    assert_eq!(again.unwrap_err().kind(), ErrorKind::Interrupted);
    machine.disk.limit_space("state", u64::MAX);
    let receipt = machine.sync(&source, &all_of_it(Strategy::Redo)).unwrap();
    assert!(receipt.resumed_bytes > 0);
    assert_synced(&machine, &source.bytes(), block_size(4096), &receipt);
}

#[test]
fn a_new_file_without_room_is_a_failure_of_the_target_and_never_flushed_again() {
    let old = blockferry_testkit::images::random_image(51, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(51, &old, BYTES, 900));
    let disk = machine.disk.clone();
    let context = Context::new().with_observer(move |event: &Event| {
        if let Event::Decision(_) = event {
            disk.limit_space("home", BYTES + (2 << 20));
        }
    });

    let error = machine
        .sync_in(&source, &all_of_it(Strategy::Shadow), &context)
        .unwrap_err();

    assert_eq!(error.kind(), ErrorKind::Target, "{error}");
    assert_eq!(machine.content().unwrap(), old);
    assert_eq!(machine.disk.misuses(), Vec::<String>::new());
    machine.disk.limit_space("home", u64::MAX);
    let receipt = machine.sync(&source, &all_of_it(Strategy::Shadow)).unwrap();
    assert_synced(&machine, &source.bytes(), block_size(4096), &receipt);
}

#[test]
fn without_undo_nothing_is_kept_and_nothing_can_be_rolled_back() {
    for strategy in [Strategy::Redo, Strategy::Shadow, Strategy::Clone] {
        let old = image(45, BYTES);
        let machine = Machine::new(On::File, true, Some(&old));
        let source = Source::new(edited(45, &old, BYTES, 100));
        let none = options(|o| {
            o.strategy = Some(strategy);
            o.undo = Undo::None;
        });

        let receipt = machine.sync(&source, &none).unwrap();

        assert!(!receipt.rollback_available);
        assert_synced(&machine, &source.bytes(), block_size(65_536), &receipt);
        let held = machine.open().replica().held_bytes().unwrap();
        assert!(held < BYTES / 8, "{strategy}: {held} bytes are still held");
        blockferry_engine::rollback(&mut machine.open(), &Context::default()).unwrap_err();
    }
}

#[test]
fn accepting_frees_what_held_the_old_point() {
    for strategy in [Strategy::Redo, Strategy::Shadow, Strategy::Clone] {
        let old = image(46, BYTES);
        let machine = Machine::new(On::File, true, Some(&old));
        let source = Source::new(edited(46, &old, BYTES, 100));
        let options = options(|o| o.strategy = Some(strategy));
        let receipt = machine.sync(&source, &options).unwrap();
        let held = machine.open().replica().held_bytes().unwrap();

        let outcome = accept(&mut machine.open(), &Context::default()).unwrap();

        assert_eq!(outcome.outcome, "accepted");
        assert!(outcome.freed_bytes > 0);
        assert!(machine.open().replica().held_bytes().unwrap() < held);
        assert_synced(&machine, &source.bytes(), block_size(65_536), &receipt);
    }
}

#[test]
fn in_place_gives_the_old_content_up_and_keeps_no_log() {
    for on in [On::File, On::Device] {
        for mode in [Mode::Delta, Mode::Full, Mode::Auto] {
            let old = image(47, BYTES);
            let machine = Machine::new(on, true, Some(&old));
            let source = Source::new(edited(47, &old, BYTES, 200));
            let in_place = options(|o| {
                o.mode = mode;
                o.in_place = true;
            });

            let receipt = machine.sync(&source, &in_place).unwrap();

            assert_eq!(receipt.strategy, Some(Strategy::Direct));
            assert!(!receipt.rollback_available);
            assert!(
                receipt.log_bytes < BYTES / 16,
                "{} bytes of log",
                receipt.log_bytes
            );
            assert_synced(&machine, &source.bytes(), block_size(65_536), &receipt);
        }
    }
}

#[test]
fn everything_written_is_read_back_whatever_the_strategy() {
    for (strategy, on) in [
        (Some(Strategy::Redo), On::File),
        (Some(Strategy::Shadow), On::File),
        (Some(Strategy::Clone), On::File),
        (None, On::Device),
    ] {
        let old = image(48, BYTES);
        let machine = Machine::new(on, true, Some(&old));
        let source = Source::new(edited(48, &old, BYTES, 200));

        let receipt = machine
            .sync(&source, &options(|o| o.strategy = strategy))
            .unwrap();

        assert!(
            receipt.proven_bytes >= receipt.staged_bytes && receipt.staged_bytes > 0,
            "{strategy:?}: {} of {} bytes",
            receipt.proven_bytes,
            receipt.staged_bytes
        );
    }
}

#[test]
fn a_bandwidth_limit_holds_within_five_percent_from_end_to_end() {
    const RATE: u64 = 3_000_000;
    for (mode, strategy) in [
        (Mode::Delta, Strategy::Redo),
        (Mode::Full, Strategy::Redo),
        (Mode::Full, Strategy::Shadow),
    ] {
        let old = blockferry_testkit::images::random_image(49, BYTES);
        let machine = Machine::file(&old);
        let source = Source::new(blockferry_testkit::images::random_image(50, BYTES));
        let clock = Arc::new(blockferry_testkit::VirtualClock::default());
        let mut context = Context::default();
        context.clock = Arc::clone(&clock) as _;
        let limited = options(|o| {
            o.mode = mode;
            o.strategy = Some(strategy);
            // One worker: waiting workers would each move the virtual clock.
            o.threads = Some(1);
            o.bwlimit_bytes_per_second = Some(RATE);
        });

        let receipt = machine.sync_in(&source, &limited, &context).unwrap();

        let ideal = receipt.sent_bytes as f64 / RATE as f64;
        assert_eq!(receipt.sent_bytes, BYTES);
        assert!(
            (receipt.elapsed_seconds / ideal - 1.0).abs() < 0.05,
            "{mode} {strategy}: {} s instead of {ideal} s",
            receipt.elapsed_seconds
        );
    }
}

#[test]
fn cancelling_ends_the_wait_for_bandwidth() {
    let old = image(51, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(51, &old, BYTES, 500));
    let token = blockferry_device::CancelToken::new();
    let slow = options(|o| {
        o.mode = Mode::Delta;
        o.bwlimit_bytes_per_second = Some(1000);
    });
    let reads = Arc::new(AtomicU64::new(0));
    let (seen, cancel) = (Arc::clone(&reads), token.clone());
    source.on_read(move |_| {
        seen.fetch_add(1, Ordering::SeqCst);
        Ok(())
    });
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while reads.load(Ordering::SeqCst) == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(100));
            cancel.cancel();
        });

        let error = machine
            .sync_in(&source, &slow, &crate::harness::cancelled_by(&token))
            .unwrap_err();

        assert_eq!(error.kind(), ErrorKind::Cancelled);
    });
}

#[test]
fn a_target_that_is_larger_is_cut_only_when_allowed() {
    let old = image(52, BYTES);
    for bytes in [0, 5000, BYTES - 4096, BYTES - 1] {
        let machine = Machine::file(&old);
        let source = Source::new(edited(52, &old, bytes, 10));
        let mut careful = options(|o| o.strategy = Some(Strategy::Redo));
        careful.allow_shrink = false;

        let error = machine.sync(&source, &careful).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Target);
        assert!(error.to_string().contains("--allow-shrink"), "{error}");
        assert_eq!(machine.content().unwrap(), old);

        careful.allow_shrink = true;
        let receipt = machine.sync(&source, &careful).unwrap();
        assert_synced(&machine, &source.bytes(), block_size(65_536), &receipt);
        assert_rolls_back_to(&machine, &old);
    }
}

#[test]
fn a_target_that_is_shorter_but_equal_so_far_gets_the_new_size() {
    let old = image(53, BYTES);
    for more in [1, 511, 4096, 1 << 20] {
        for strategy in [Strategy::Redo, Strategy::Shadow, Strategy::Clone] {
            let mut new = old.clone();
            new.resize(old.len() + more, 0);
            let machine = Machine::new(On::File, true, Some(&old));
            let source = Source::new(new.clone());

            let receipt = machine
                .sync(&source, &options(|o| o.strategy = Some(strategy)))
                .unwrap();

            assert_eq!(receipt.outcome, "applied");
            assert_synced(&machine, &new, block_size(65_536), &receipt);
            assert_rolls_back_to(&machine, &old);
        }
    }
}

#[test]
fn a_device_that_is_too_small_is_refused_with_both_sizes() {
    let old = image(54, 1 << 20);
    let machine = Machine::new(On::Device, false, Some(&old));
    let source = Source::new(image(54, (1 << 20) + 1));

    let error = machine.sync(&source, &options(|_| ())).unwrap_err();

    assert_eq!(error.kind(), ErrorKind::Target);
    assert!(
        error.to_string().contains("1048576") && error.to_string().contains("1048577"),
        "{error}"
    );
}

/// Every look at it takes a millisecond.
#[derive(Debug, Default)]
struct TickingClock(AtomicU64);

impl Clock for TickingClock {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.fetch_add(1, Ordering::SeqCst))
    }

    fn sleep(&self, _: Duration) {}
}

#[test]
fn the_receipt_tells_how_long_each_phase_took() {
    for (strategy, expected) in [
        (
            Strategy::Redo,
            &[
                "applying",
                "committing",
                "preparing",
                "proving",
                "sampling",
                "scanning",
            ][..],
        ),
        (
            Strategy::Shadow,
            &["committing", "preparing", "sampling", "scanning"][..],
        ),
    ] {
        let old = blockferry_testkit::images::random_image(55, BYTES);
        let machine = Machine::file(&old);
        let source = Source::new(edited(55, &old, BYTES, 900));
        let mut context = Context::new();
        context.clock = Arc::new(TickingClock::default());

        let receipt = machine
            .sync_in(&source, &all_of_it(strategy), &context)
            .unwrap();

        let phases: Vec<&str> = receipt.phases.keys().map(String::as_str).collect();
        assert_eq!(phases, expected, "{strategy}");
        assert!(
            receipt.phases.values().all(|seconds| *seconds > 0.0),
            "{:?}",
            receipt.phases
        );
        let sum: f64 = receipt.phases.values().sum();
        assert!(sum <= receipt.elapsed_seconds, "{receipt:?}");
    }
}

#[test]
fn a_file_system_that_exchanges_no_names_gets_a_log_whatever_changed() {
    let old = image(1, 1 << 20);
    for mode in [Mode::Auto, Mode::Full, Mode::Delta] {
        let machine = Machine::without_exchange(&old);
        let source = Source::new(edited(2, &old, 1 << 20, 900));

        let receipt = machine.sync(&source, &options(|o| o.mode = mode)).unwrap();

        assert_eq!(receipt.strategy, Some(Strategy::Redo), "{}", receipt.reason);
        assert!(machine.content() == Some(source.bytes()), "{mode}");
    }
}
