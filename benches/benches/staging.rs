//! Staging: pages with their pre-images into the transfer log, in groups that are flushed and read back.

use std::time::{Duration, Instant};

use blockferry::Extent;
use blockferry::transfer_log::{Old, Session};
use blockferry_benches::{Place, noise};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const BYTES: usize = 64 << 20;
/// Bytes of neighbouring pages that are staged together.
const RUNS: [usize; 2] = [4096, 256 << 10];

fn stage(criterion: &mut Criterion) {
    let place = Place::new("staging", BYTES, usize::MAX);
    let new = noise(2, BYTES);
    let old = noise(1, BYTES);
    let mut group = criterion.benchmark_group("stage");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(BYTES as u64));
    for run in RUNS {
        group.bench_function(BenchmarkId::new("runs of bytes", run), |bencher| {
            bencher.iter_custom(|rounds| {
                (0..rounds)
                    .map(|_| stage_once(&place, run, &new, &old))
                    .sum()
            });
        });
    }
    group.finish();
}

/// Everything from the first batch to the acknowledgement of the last; beginning and dropping are not counted.
fn stage_once(place: &Place, run: usize, new: &[u8], old: &[u8]) -> Duration {
    let mut target = place.open();
    let mut session = place.begin(&mut target);
    let start = Instant::now();
    stage_all(&mut session, run, new, old);
    session.close_group().expect("the log can be flushed");
    let elapsed = start.elapsed();
    drop(session);
    drop(target);
    place
        .open()
        .replica()
        .cancel()
        .expect("what is staged can be dropped");
    elapsed
}

fn stage_all(session: &mut Session<'_>, run: usize, new: &[u8], old: &[u8]) {
    let stager = session.stager();
    let mut batch = stager.pages();
    for (offset, (new, old)) in (0..).step_by(run).zip(new.chunks(run).zip(old.chunks(run))) {
        if !batch.has_room(run as u64) {
            let full = std::mem::replace(&mut batch, stager.pages());
            session.stage(full).expect("the log can be written");
            if session.group_is_full() {
                session.close_group().expect("the log can be flushed");
            }
        }
        let extent = Extent::from_range(offset..offset + run as u64);
        stager.add(&mut batch, extent, new, Old::Data(old));
    }
    session.stage(batch).expect("the log can be written");
}

criterion_group!(benches, stage);
criterion_main!(benches);
