//! A sample of both sides: how much data there is, how much of it differs, how fast it is read and digested.

use std::time::Duration;

use blockferry_core::{BlockIndex, Geometry, PAGE_BYTES, block_digest, is_zero};
use blockferry_delta_sync::differing_runs;
use blockferry_device::{AlignedBuffer, BlockSource, Clock};
use blockferry_pipeline::read_padded;
use blockferry_transfer_log::Strategy;

use crate::data_blocks::DataBlocks;
use crate::error::{Error, Result};
use crate::options::Context;

/// Blocks that are sampled: the share that changed is then known to within a few percent.
const SAMPLES: u64 = 256;
/// Bytes per second a disk is assumed to write durably; measuring it would write.
const ASSUMED_WRITE_RATE: f64 = 1.2e9;

/// What the sample showed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sample {
    pub(crate) blocks: u64,
    pub(crate) data_blocks: u64,
    /// Pages of blocks that hold data on either side.
    pub(crate) data_pages: u64,
    pub(crate) changed_pages: u64,
    pub(crate) source_seconds: f64,
    pub(crate) target_seconds: f64,
    pub(crate) digest_seconds: f64,
    /// Blocks of the image for each sampled one.
    pub(crate) weight: f64,
    pub(crate) block_bytes: f64,
}

impl Sample {
    /// Reads as many blocks of both sides as say enough, spread evenly over those that may hold data on either.
    pub(crate) fn take(
        source: &dyn BlockSource,
        target: Option<&dyn BlockSource>,
        geometry: &Geometry,
        data: &DataBlocks,
        seed: u64,
        context: &Context,
    ) -> Result<Self> {
        let count = data.count();
        let blocks = count.min(SAMPLES);
        let mut sample = Self {
            blocks,
            weight: count as f64 / blocks.max(1) as f64,
            block_bytes: geometry.block_size().bytes() as f64,
            ..Self::default()
        };
        let length = usize::try_from(geometry.block_size().bytes()).unwrap_or(usize::MAX);
        let mut buffers = (AlignedBuffer::zeroed(length), AlignedBuffer::zeroed(length));
        for n in 0..blocks {
            context.check_cancelled()?;
            // One block of each of equal shares, at a place the seed decides.
            let (from, to) = (n * count / blocks, (n + 1) * count / blocks);
            let number = from + scramble(seed ^ n) % (to - from).max(1);
            let Some(block) = data.nth(number) else {
                continue;
            };
            sample.look(
                source,
                target,
                geometry,
                block,
                &mut buffers,
                &*context.clock,
            )?;
        }
        Ok(sample)
    }

    /// The most there can be, without reading anything: all of it is data, and all of that differs.
    pub(crate) fn at_most(data: &DataBlocks, geometry: &Geometry) -> Self {
        let block_bytes = geometry.block_size().bytes();
        let pages = data.count() * block_bytes / PAGE_BYTES;
        Self {
            data_blocks: data.count(),
            data_pages: pages,
            changed_pages: pages,
            weight: 1.0,
            block_bytes: block_bytes as f64,
            ..Self::default()
        }
    }

    fn look(
        &mut self,
        source: &dyn BlockSource,
        target: Option<&dyn BlockSource>,
        geometry: &Geometry,
        block: BlockIndex,
        (new, old): &mut (AlignedBuffer, AlignedBuffer),
        clock: &dyn Clock,
    ) -> Result<()> {
        let extent = geometry.block_extent(block);
        let length = usize::try_from(extent.length()).unwrap_or(usize::MAX);
        let (new, old) = (&mut new[..length], &mut old[..length]);
        let start = clock.now();
        source
            .read_at(extent.start(), new)
            .map_err(|e| Error::source(format!("sample {}", source.label()), e))?;
        let read = clock.now();
        let zero = is_zero(new);
        std::hint::black_box(block_digest(new));
        let digested = clock.now();
        if let Some(target) = target {
            read_padded(target, extent, old)
                .map_err(|e| Error::target(format!("sample {}", target.label()), e))?;
            let pages = |bytes: u64| bytes.div_ceil(PAGE_BYTES);
            differing_runs(extent, new, old, |run| {
                self.changed_pages += pages(run.extent.length());
            });
            self.target_seconds += seconds(clock.now().saturating_sub(digested));
        }
        let was_zero = target.is_none() || is_zero(old);
        if !(zero && was_zero) {
            self.data_pages += extent.length().div_ceil(PAGE_BYTES);
        }
        self.source_seconds += seconds(read.saturating_sub(start));
        self.digest_seconds += seconds(digested.saturating_sub(read));
        if !zero {
            self.data_blocks += 1;
        }
        Ok(())
    }

    /// Bytes of data in the source, estimated.
    pub(crate) fn data_bytes(&self) -> f64 {
        self.data_blocks as f64 * self.weight * self.block_bytes
    }

    /// Bytes of pages that differ, estimated.
    pub(crate) fn changed_bytes(&self) -> f64 {
        self.changed_pages as f64 * self.weight * PAGE_BYTES as f64
    }

    /// Share of the pages with data on either side that differ.
    pub(crate) fn changed_share(&self) -> f64 {
        self.changed_pages as f64 / self.data_pages.max(1) as f64
    }

    fn scale(&self, seconds: f64, threads: usize) -> f64 {
        seconds * self.weight / threads as f64
    }

    /// Seconds of a delta sync that reads both sides; with a manifest the target is read only where it differs.
    pub(crate) fn delta_seconds(
        &self,
        threads: usize,
        strategy: Strategy,
        target_known: bool,
    ) -> f64 {
        let target = if target_known {
            0.0
        } else {
            self.target_seconds
        };
        let scan = self.scale(self.source_seconds + self.digest_seconds + target, threads);
        let copies = if strategy == Strategy::Redo { 5.0 } else { 2.0 };
        scan + copies * self.changed_bytes() / ASSUMED_WRITE_RATE
    }

    /// Seconds of a full download.
    pub(crate) fn full_seconds(&self, threads: usize) -> f64 {
        let scan = self.scale(self.source_seconds + self.digest_seconds, threads);
        scan.max(2.0 * self.data_bytes() / ASSUMED_WRITE_RATE)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an estimate of bytes: not negative, and far below 2^63"
)]
pub(crate) fn round(bytes: f64) -> u64 {
    bytes.round() as u64
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

/// A cheap, well-mixed function of the seed (splitmix64's finaliser).
pub(crate) fn scramble(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
