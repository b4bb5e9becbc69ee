//! Whole syncs between files on a real disk: identical, little changed, much changed, full. And what durability
//! costs: the flushes of a small run, at most six.

use blockferry::{Mode, Strategy, SyncOptions, Undo};
use blockferry_benches::Place;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

const BYTES: usize = 128 << 20;
/// What the protocol aims for in a small run.
const MOST_FLUSHES: u64 = 6;

fn with(mode: Mode, strategy: Option<Strategy>) -> SyncOptions {
    let mut options = SyncOptions::default();
    options.mode = mode;
    options.strategy = strategy;
    options
}

fn syncs(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sync");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(BYTES as u64));
    for (name, stride, options) in [
        (
            "delta, redo, 1 page in 100",
            100,
            with(Mode::Delta, Some(Strategy::Redo)),
        ),
        (
            "delta, redo, 1 page in 10",
            10,
            with(Mode::Delta, Some(Strategy::Redo)),
        ),
        ("full, shadow", 2, with(Mode::Full, Some(Strategy::Shadow))),
        ("auto, 1 page in 100", 100, with(Mode::Auto, None)),
    ] {
        let place = Place::new("syncing", BYTES, stride);
        group.bench_function(name, |bencher| {
            bencher.iter_batched(
                || place.reset(),
                |()| place.sync(&options),
                BatchSize::PerIteration,
            );
        });
    }
    let place = Place::new("identical", BYTES, usize::MAX);
    let mut rescan = with(Mode::Delta, Some(Strategy::Redo));
    drop(place.sync(&rescan));
    group.bench_function("identical, both sides proven", |bencher| {
        bencher.iter(|| place.sync(&with(Mode::Delta, None)));
    });
    rescan.rescan = true;
    group.bench_function("identical, both sides read", |bencher| {
        bencher.iter(|| place.sync(&rescan));
    });
    group.finish();
}

/// A run that changes little on a target that has a state already.
#[expect(clippy::print_stdout, reason = "a bench reports")]
fn flushes(_criterion: &mut Criterion) {
    let place = Place::new("flushes", 16 << 20, 1000);
    let mut options = with(Mode::Delta, Some(Strategy::Redo));
    drop(place.sync(&options));
    for undo in [Undo::Keep, Undo::None] {
        options.undo = undo;
        place.change_source(42);
        let receipt = place.sync(&options);
        println!(
            "flushes of a small redo run ({undo:?} undo): {} for {} bytes",
            receipt.flushes, receipt.staged_bytes
        );
        assert_eq!(receipt.outcome, "applied");
        assert!(
            receipt.flushes <= MOST_FLUSHES,
            "at most {MOST_FLUSHES} flushes"
        );
    }
}

criterion_group!(benches, flushes, syncs);
criterion_main!(benches);
