//! Comparing two regions: bytes of blocks, then pages where a block differs, for several densities of change; and
//! the digests of two regions.

use std::hint::black_box;

use blockferry_benches::{REGION_BYTES, noise, with_changed_pages};
use blockferry_core::{
    BlockSize, Delta, Geometry, PAGE_BYTES, RegionIndex, RegionLeaves, block_digest,
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// One changed page in so many; the last is a single page in the region.
const STRIDES: [usize; 4] = [1, 10, 100, usize::MAX];

fn bytes(criterion: &mut Criterion) {
    let old = noise(1, REGION_BYTES);
    let mut group = criterion.benchmark_group("compare_bytes");
    group.throughput(Throughput::Bytes(REGION_BYTES as u64));
    for stride in STRIDES {
        let new = with_changed_pages(&old, stride);
        group.bench_function(BenchmarkId::from_parameter(name_of(stride)), |bencher| {
            bencher.iter(|| black_box(differing_pages(&old, &new)));
        });
    }
    group.finish();
}

/// How the delta mode narrows: 64 KiB at once, then the pages of what differs.
fn differing_pages(old: &[u8], new: &[u8]) -> usize {
    let blocks = old.chunks(64 << 10).zip(new.chunks(64 << 10));
    blocks
        .filter(|(old, new)| old != new)
        .map(|(old, new)| {
            old.chunks(4096)
                .zip(new.chunks(4096))
                .filter(|(a, b)| a != b)
                .count()
        })
        .sum()
}

fn deltas(criterion: &mut Criterion) {
    let old = noise(2, REGION_BYTES);
    let mut group = criterion.benchmark_group("delta_between");
    group.throughput(Throughput::Bytes(REGION_BYTES as u64));
    for stride in STRIDES {
        let new = with_changed_pages(&old, stride);
        group.bench_function(BenchmarkId::from_parameter(name_of(stride)), |bencher| {
            bencher.iter(|| black_box(Delta::between(&old, &new, PAGE_BYTES)));
        });
    }
    group.finish();
}

fn digests(criterion: &mut Criterion) {
    let old = leaves_of(&noise(3, REGION_BYTES));
    let new = leaves_of(&with_changed_pages(&noise(3, REGION_BYTES), 1000));
    let mut group = criterion.benchmark_group("compare_digests");
    group.throughput(Throughput::Bytes(REGION_BYTES as u64));
    group.bench_function("leaves of a region", |bencher| {
        bencher.iter(|| {
            (0..256)
                .filter(|&block| black_box(&old).get(block) != black_box(&new).get(block))
                .count()
        });
    });
    group.finish();
}

fn leaves_of(bytes: &[u8]) -> RegionLeaves {
    let geometry = Geometry::new(bytes.len() as u64, BlockSize::DEFAULT);
    let mut leaves = RegionLeaves::zero(&geometry, RegionIndex::new(0));
    for (index, block) in bytes.chunks(64 << 10).enumerate() {
        leaves.set(index, block_digest(block));
    }
    leaves
}

fn name_of(stride: usize) -> String {
    if stride == usize::MAX {
        "one page changed".to_owned()
    } else {
        format!("1 page in {stride} changed")
    }
}

criterion_group!(benches, bytes, deltas, digests);
criterion_main!(benches);
