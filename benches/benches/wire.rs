//! Syncs from the other side of a pair of sockets, beside the same between two local files, what they cost on the wire,
//! and how well they fill one that is slow or long.

use std::time::{Duration, Instant};

use blockferry::{Mode, Strategy, SyncOptions, format_size};
use blockferry_benches::{Place, REGION_BYTES, Wire};
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

/// Over a wire that is the limit: how much of its rate the bytes that crossed took up, and what latency costs.
#[expect(clippy::print_stdout, reason = "a bench reports")]
fn shaped(_criterion: &mut Criterion) {
    let is_smoke = std::env::args().any(|word| word == "--test");
    let (bytes, rate) = if is_smoke {
        (16 << 20, 64e6)
    } else {
        (BYTES, 32e6)
    };
    for latency_ms in [0, 10, 50] {
        let wire = Wire {
            bytes_per_second: rate,
            latency: Duration::from_millis(latency_ms),
        };
        for (name, stride, options) in [
            ("full", 2, with(Mode::Full, Strategy::Shadow)),
            ("delta, 1 page in 2", 2, with(Mode::Delta, Strategy::Redo)),
            (
                "delta, 1 page in 100",
                100,
                with(Mode::Delta, Strategy::Redo),
            ),
        ] {
            let place = Place::new("wire-shaped", bytes, stride);
            let begun = Instant::now();
            let receipt = place.sync_over(wire.pair(), &options);
            let elapsed = begun.elapsed().as_secs_f64();
            let phase = |name: &str| receipt.phases.get(name).copied().unwrap_or_default();
            let of_the_wire = receipt.sent_bytes as f64 / rate;
            println!(
                "wire: {name}, {} MB/s, {latency_ms} ms each way: {:.1} % of its rate while it scans and sends \
                 ({:.2} s for {}), {elapsed:.2} s in all",
                rate / 1e6,
                100.0 * of_the_wire / phase("scanning"),
                phase("scanning"),
                format_size(receipt.sent_bytes),
            );
        }
    }
}

criterion_group!(benches, bytes, shaped, syncs);
criterion_main!(benches);
