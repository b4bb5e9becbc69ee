//! A sample of both sides: how much data there is, how much of it differs, how fast it is read and digested.

use std::time::Duration;

use blockferry_core::{Extent, Geometry, PAGE_BYTES, block_digest, is_zero};
use blockferry_delta_sync::differing_runs;
use blockferry_device::{AlignedBuffer, BlockSource, Clock};
use blockferry_pipeline::read_padded;
use blockferry_transfer_log::Strategy;
use blockferry_transport::message::Sampled;

use crate::data_blocks::DataBlocks;
use crate::error::{Error, Result};
use crate::options::{Context, Mode};

/// Blocks that are sampled: the share that changed is then known to within a few percent.
pub(crate) const SAMPLES: u64 = 256;
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
    /// What it costs to cross the wire, where there is one.
    pub(crate) crossing: Option<Crossing>,
}

/// What it costs to cross a wire.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Crossing {
    /// What a byte of data becomes, packed.
    pub(crate) data_ratio: f64,
    /// What a byte of pages that differ becomes.
    pub(crate) changed_ratio: f64,
    /// Of each byte that crosses.
    pub(crate) seconds_per_byte: f64,
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
        let mut sample = Self {
            block_bytes: geometry.block_size().bytes() as f64,
            ..Self::default()
        };
        let length = usize::try_from(geometry.block_size().bytes()).unwrap_or(usize::MAX);
        let mut buffers = (AlignedBuffer::zeroed(length), AlignedBuffer::zeroed(length));
        for block in data.spread(SAMPLES, seed) {
            context.check_cancelled()?;
            let extent = geometry.block_extent(block);
            sample.look(source, target, extent, &mut buffers, &*context.clock)?;
        }
        sample.weight = weight(data.count(), sample.blocks);
        Ok(sample)
    }

    /// What the other side found out of its source; what it sent of it is to be compared.
    pub(crate) fn of_peer(geometry: &Geometry, found: &Sampled) -> Self {
        let seconds = |nanoseconds| Duration::from_nanos(nanoseconds).as_secs_f64();
        Self {
            weight: weight(found.data_blocks, u64::from(found.blocks)),
            block_bytes: geometry.block_size().bytes() as f64,
            source_seconds: seconds(found.reading_ns),
            digest_seconds: seconds(found.digesting_ns),
            ..Self::default()
        }
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
        extent: Extent,
        (new, old): &mut (AlignedBuffer, AlignedBuffer),
        clock: &dyn Clock,
    ) -> Result<()> {
        let length = usize::try_from(extent.length()).unwrap_or(usize::MAX);
        let new = &mut new[..length];
        let start = clock.now();
        source
            .read_at(extent.start(), new)
            .map_err(|e| Error::source(format!("sample {}", source.label()), e))?;
        let read = clock.now();
        std::hint::black_box(block_digest(new));
        let digested = clock.now();
        self.source_seconds += seconds(read.saturating_sub(start));
        self.digest_seconds += seconds(digested.saturating_sub(read));
        self.compare(extent, new, target, old, clock, &mut |_| ())
    }

    /// Counts a block of the source, and what differs of it from the target, which it shows.
    pub(crate) fn compare(
        &mut self,
        extent: Extent,
        new: &[u8],
        target: Option<&dyn BlockSource>,
        old: &mut AlignedBuffer,
        clock: &dyn Clock,
        show: &mut dyn FnMut(&[u8]),
    ) -> Result<()> {
        let old = &mut old[..new.len()];
        let start = clock.now();
        if let Some(target) = target {
            read_padded(target, extent, old)
                .map_err(|e| Error::target(format!("sample {}", target.label()), e))?;
            let pages = |bytes: u64| bytes.div_ceil(PAGE_BYTES);
            differing_runs(extent, new, old, |run| {
                self.changed_pages += pages(run.extent.length());
                if !run.to_zero {
                    let from = usize::try_from(run.extent.start() - extent.start()).unwrap_or(0);
                    let bytes = usize::try_from(run.extent.length()).unwrap_or(0);
                    show(&new[from..from + bytes]);
                }
            });
            self.target_seconds += seconds(clock.now().saturating_sub(start));
        }
        let zero = is_zero(new);
        let was_zero = target.is_none() || is_zero(old);
        if !(zero && was_zero) {
            self.data_pages += extent.length().div_ceil(PAGE_BYTES);
        }
        self.blocks += 1;
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

    /// Bytes that cross the wire in this mode, if there is one.
    pub(crate) fn wire_bytes(&self, mode: Mode) -> Option<f64> {
        self.crossing.map(|crossing| match mode {
            Mode::Full => crossing.data_ratio * self.data_bytes(),
            _ => crossing.changed_ratio * self.changed_bytes(),
        })
    }

    fn wire_seconds(&self, mode: Mode) -> f64 {
        let bytes = self.wire_bytes(mode).unwrap_or(0.0);
        bytes * self.crossing.unwrap_or_default().seconds_per_byte
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
        let wire = self.wire_seconds(Mode::Delta);
        let copies = if strategy == Strategy::Redo { 5.0 } else { 2.0 };
        scan.max(wire) + copies * self.changed_bytes() / ASSUMED_WRITE_RATE
    }

    /// Seconds of a full download.
    pub(crate) fn full_seconds(&self, threads: usize) -> f64 {
        let scan = self.scale(self.source_seconds + self.digest_seconds, threads);
        let wire = self.wire_seconds(Mode::Full);
        scan.max(2.0 * self.data_bytes() / ASSUMED_WRITE_RATE)
            .max(wire)
    }
}

/// Blocks of the image for each sampled one.
fn weight(all: u64, sampled: u64) -> f64 {
    all as f64 / sampled.max(1) as f64
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
