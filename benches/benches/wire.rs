//! Syncs from the other side of a pair of sockets, beside the same between two local files, and what they cost on the
//! wire.

use blockferry::{Mode, Strategy, SyncOptions, format_size};
use blockferry_benches::{Place, REGION_BYTES};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

const BYTES: usize = 256 << 20;
/// What two identical disks of 4 GiB may cost.
const MOST_OF_4_GIB: u64 = 32 * 1024;

fn with(mode: Mode, strategy: Strategy) -> SyncOptions {
    let mut options = SyncOptions::default();
    options.mode = mode;
    options.strategy = Some(strategy);
    options
}

fn syncs(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("wire");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(BYTES as u64));
    for (name, stride, options) in [
        (
            "delta, 1 page in 100",
            100,
            with(Mode::Delta, Strategy::Redo),
        ),
        ("full", 2, with(Mode::Full, Strategy::Shadow)),
    ] {
        let place = Place::new("wire", BYTES, stride);
        for over_sockets in [false, true] {
            let way = if over_sockets {
                "over sockets"
            } else {
                "local"
            };
            group.bench_function(format!("{name}, {way}"), |bencher| {
                bencher.iter_batched(
                    || place.reset(),
                    |()| match over_sockets {
                        true => place.sync_over_sockets(&options),
                        false => place.sync(&options),
                    },
                    BatchSize::PerIteration,
                );
            });
        }
    }
    group.finish();
}

/// Bytes on the wire, of noise, which does not become smaller by packing.
#[expect(clippy::print_stdout, reason = "a bench reports")]
fn bytes(_criterion: &mut Criterion) {
    let mut options = with(Mode::Delta, Strategy::Redo);
    options.rescan = true;
    for (name, stride) in [
        ("nothing", usize::MAX),
        ("1 page in 100", 100),
        ("1 page in 10", 10),
    ] {
        let place = Place::new("wire-bytes", BYTES, stride);
        let receipt = place.sync_over_sockets(&options);
        let changed = receipt.changed_bytes.unwrap_or_default();
        println!(
            "wire: {name} differs: {} to the target for {} of pages that differ ({:.3})",
            format_size(receipt.sent_bytes),
            format_size(changed),
            receipt.sent_bytes as f64 / changed.max(1) as f64,
        );
        if stride == usize::MAX {
            // The first page differs in any case: it is not what an identical disk costs.
            let overhead = receipt.sent_bytes.saturating_sub(changed);
            let regions = (BYTES / REGION_BYTES) as u64;
            let of_4_gib = overhead * 256 / regions;
            println!(
                "wire: 4 GiB that are identical cost about {}",
                format_size(of_4_gib)
            );
            assert!(of_4_gib <= MOST_OF_4_GIB, "at most {MOST_OF_4_GIB}");
        }
    }
}

criterion_group!(benches, bytes, syncs);
criterion_main!(benches);
