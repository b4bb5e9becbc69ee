//! Applying: from COMMIT to APPLIED, target written, flushed and read back; and the way back.

use std::time::{Duration, Instant};

use blockferry::{Context, Mode, Strategy, SyncOptions, rollback};
use blockferry_benches::Place;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const BYTES: usize = 64 << 20;
/// One changed page in so many.
const STRIDES: [usize; 2] = [10, 100];

fn options() -> SyncOptions {
    let mut options = SyncOptions::default();
    options.mode = Mode::Delta;
    options.strategy = Some(Strategy::Redo);
    options
}

fn apply(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("apply");
    group.sample_size(10);
    for stride in STRIDES {
        let place = Place::new("applying", BYTES, stride);
        group.throughput(Throughput::Bytes((BYTES / stride) as u64));
        group.bench_function(BenchmarkId::new("1 page in", stride), |bencher| {
            bencher.iter_custom(|rounds| (0..rounds).map(|_| round(&place).0).sum());
        });
        group.bench_function(
            BenchmarkId::new("rollback of 1 page in", stride),
            |bencher| {
                bencher.iter_custom(|rounds| (0..rounds).map(|_| round(&place).1).sum());
            },
        );
    }
    group.finish();
}

/// The time from the decision of a sync to its outcome, and of the rollback that follows.
fn round(place: &Place) -> (Duration, Duration) {
    let receipt = place.sync(&options());
    let phases = ["committing", "applying", "proving"];
    let applying = phases.iter().filter_map(|phase| receipt.phases.get(*phase));
    let applying = Duration::from_secs_f64(applying.sum());
    let mut target = place.open();
    let start = Instant::now();
    rollback(&mut target, &Context::default()).expect("nobody wrote the target");
    (applying, start.elapsed())
}

criterion_group!(benches, apply);
criterion_main!(benches);
