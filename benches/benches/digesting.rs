//! Digesting: block digests at several block sizes, the same by pages, zero detection, a region up to its digest.

use std::hint::black_box;

use blockferry_benches::{REGION_BYTES, noise};
use blockferry_core::{
    BlockSize, Geometry, RegionIndex, RegionLeaves, block_digest, block_digest_from_pages, is_zero,
    page_digests,
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const BLOCK_BYTES: [usize; 4] = [4 << 10, 16 << 10, 64 << 10, 1 << 20];

fn blocks(criterion: &mut Criterion) {
    let region = noise(1, REGION_BYTES);
    let mut group = criterion.benchmark_group("block_digest");
    group.throughput(Throughput::Bytes(REGION_BYTES as u64));
    for block_bytes in BLOCK_BYTES {
        group.bench_function(BenchmarkId::from_parameter(block_bytes), |bencher| {
            bencher.iter(|| {
                for block in region.chunks(block_bytes) {
                    black_box(block_digest(block));
                }
            });
        });
    }
    group.finish();
}

/// Page digests and the block digest that follows from them: what comparing a block page by page costs more than
/// digesting it at once.
fn pages(criterion: &mut Criterion) {
    let region = noise(2, REGION_BYTES);
    let block_size = BlockSize::DEFAULT;
    let mut group = criterion.benchmark_group("page_digests");
    group.throughput(Throughput::Bytes(REGION_BYTES as u64));
    group.bench_function("and the block digests from them", |bencher| {
        bencher.iter(|| {
            for block in region.chunks(64 << 10) {
                let pages: Vec<_> = page_digests(block_size, block).collect();
                black_box(block_digest_from_pages(&pages, block_size.bytes()));
            }
        });
    });
    group.finish();
}

fn zeros(criterion: &mut Criterion) {
    let zeros = vec![0; REGION_BYTES];
    let data = noise(3, REGION_BYTES);
    let mut group = criterion.benchmark_group("is_zero");
    group.throughput(Throughput::Bytes(REGION_BYTES as u64));
    for (name, bytes) in [("zeros", &zeros), ("data", &data)] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                bytes
                    .chunks(4096)
                    .filter(|page| is_zero(black_box(page)))
                    .count()
            });
        });
    }
    group.finish();
}

fn regions(criterion: &mut Criterion) {
    let region = noise(4, REGION_BYTES);
    let geometry = Geometry::new(REGION_BYTES as u64, BlockSize::DEFAULT);
    let mut group = criterion.benchmark_group("region");
    group.throughput(Throughput::Bytes(REGION_BYTES as u64));
    group.bench_function("leaves and digest", |bencher| {
        bencher.iter(|| {
            let mut leaves = RegionLeaves::zero(&geometry, RegionIndex::new(0));
            for (index, block) in region.chunks(64 << 10).enumerate() {
                leaves.set(index, block_digest(block));
            }
            black_box(leaves.digest())
        });
    });
    group.finish();
}

criterion_group!(benches, blocks, pages, zeros, regions);
criterion_main!(benches);
