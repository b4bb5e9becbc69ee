//! One region of a copy, on one worker.

use std::sync::Arc;

use blockferry_core::{Digest, Extent, Geometry, RegionIndex, RegionLeaves, block_digest, is_zero};
use blockferry_device::{AlignedBuffer, BlockSource, RateLimiter};
use blockferry_pipeline::{
    BUFFER_BYTES, BlockRun, DataMap, Failure, block_in, read_padded, runs, runs_of,
};
use blockferry_transfer_log::{Batch, Old, StagedView, Stager};

/// A batch is handed over when it holds this much, so that groups can be closed in time.
const EMIT_BYTES: u64 = 4 * 1024 * 1024;

/// What all workers of a copy share.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Copying {
    /// The new content.
    pub source: Arc<dyn BlockSource>,
    /// The old content, read only where pre-images go to the log.
    pub target: Option<Arc<dyn BlockSource>>,
    /// Size and blocks of the image to come.
    pub geometry: Geometry,
    /// Takes the blocks.
    pub stager: Stager,
    /// What a resumed session has durable already.
    pub staged: Option<Arc<StagedView>>,
    /// The source is provably what it was when that was staged: durable blocks are not even read again.
    pub source_unchanged: bool,
    /// Holds back what is written to a rate.
    pub limiter: Option<RateLimiter>,
    digests_only: bool,
}

/// What one region came to.
#[derive(Debug)]
#[non_exhaustive]
pub struct RegionCopy {
    /// The source's leaves.
    pub leaves: RegionLeaves,
    /// Bytes read from the source.
    pub source_read_bytes: u64,
    /// Bytes read from the target.
    pub target_read_bytes: u64,
}

/// What one worker keeps between regions: its buffers.
#[derive(Debug)]
pub struct Scratch {
    new: AlignedBuffer,
    old: AlignedBuffer,
}

impl Default for Scratch {
    fn default() -> Self {
        let piece = || AlignedBuffer::zeroed(to_usize(BUFFER_BYTES));
        Self {
            new: piece(),
            old: piece(),
        }
    }
}

impl Copying {
    /// A copy of everything.
    #[must_use]
    pub fn new(source: Arc<dyn BlockSource>, geometry: Geometry, stager: Stager) -> Self {
        Self {
            source,
            target: None,
            geometry,
            stager,
            staged: None,
            source_unchanged: false,
            limiter: None,
            digests_only: false,
        }
    }

    /// Takes only the digests: nothing is written or emitted.
    #[must_use]
    pub fn digesting(source: Arc<dyn BlockSource>, geometry: Geometry) -> Self {
        Self {
            digests_only: true,
            ..Self::new(source, geometry, Stager::detached(geometry))
        }
    }

    /// Whether what is written is a file of our own, which reads as zeros where nothing is written.
    #[must_use]
    pub fn is_into_new_file(&self) -> bool {
        self.stager.writes_new_file()
    }

    /// Copies one region and emits what it wrote or wants logged.
    ///
    /// # Errors
    /// A device or the log failed, or the walk ended.
    pub fn region(
        &self,
        region: RegionIndex,
        scratch: &mut Scratch,
        emit: &mut dyn FnMut(Batch) -> Result<(), Failure>,
    ) -> Result<RegionCopy, Failure> {
        let map = DataMap::of(&*self.source, &self.geometry, region).map_err(Failure::source)?;
        let mut work = Region {
            shared: self,
            region,
            batch: self.stager.blocks(),
            emit,
            copy: RegionCopy {
                leaves: RegionLeaves::zero(&self.geometry, region),
                source_read_bytes: 0,
                target_read_bytes: 0,
            },
        };
        let durable = work.take_durable_leaves(&map)?;
        let copied = |b: usize| !map.is_zero_block(b) && !durable[b];
        if !self.digests_only {
            // One allocation for each run of the source's data: writes into it need not take turns.
            let whole = runs_of(&self.geometry, region, u64::MAX, copied).map(|run| run.extent);
            self.stager
                .allocate(&whole.collect::<Vec<_>>())
                .map_err(Failure::log)?;
        }
        for run in runs_of(&self.geometry, region, BUFFER_BYTES, copied) {
            work.data_run(run, &map, scratch)?;
        }
        for run in runs(&self.geometry, region, |b| map.is_zero_block(b)) {
            work.zeros(run.extent, scratch)?;
        }
        work.flush()?;
        Ok(work.copy)
    }
}

struct Region<'a> {
    shared: &'a Copying,
    region: RegionIndex,
    batch: Batch,
    emit: &'a mut dyn FnMut(Batch) -> Result<(), Failure>,
    copy: RegionCopy,
}

impl Region<'_> {
    /// Leaves of blocks that are durable, when the source cannot have changed since.
    fn take_durable_leaves(&mut self, map: &DataMap) -> Result<Vec<bool>, Failure> {
        let mut durable = vec![false; self.copy.leaves.len()];
        if !self.shared.source_unchanged {
            return Ok(durable);
        }
        for (block, durable) in durable
            .iter_mut()
            .enumerate()
            .filter(|(b, _)| !map.is_zero_block(*b))
        {
            if let Some(digest) = self.recorded(block)? {
                self.copy.leaves.set(block, digest);
                *durable = true;
            }
        }
        Ok(durable)
    }

    fn recorded(&self, block: usize) -> Result<Option<Digest>, Failure> {
        let extent = block_in(&self.shared.geometry, self.region, block);
        match &self.shared.staged {
            Some(staged) => staged.digest_of(extent).map_err(Failure::log),
            None => Ok(None),
        }
    }

    fn data_run(
        &mut self,
        run: BlockRun,
        map: &DataMap,
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        let length = to_usize(run.extent.length());
        let Scratch { new, old } = scratch;
        self.copy.source_read_bytes += map
            .read(&*self.shared.source, run.extent, new)
            .map_err(Failure::source)?;
        let block = to_usize(self.shared.geometry.block_size().bytes());
        let mut digests: Vec<Option<Digest>> = Vec::with_capacity(run.count);
        for (bytes, n) in new[..length].chunks(block).zip(run.first..) {
            digests.push(self.digest_of(bytes, n)?);
        }
        let geometry = self.shared.geometry;
        for part in runs_of(&geometry, self.region, BUFFER_BYTES, |n| {
            at(&digests, run, n).is_some()
        }) {
            let from = to_usize(part.extent.start() - run.extent.start());
            let bytes = &new[from..from + to_usize(part.extent.length())];
            let digests: Vec<Digest> = (part.first..part.first + part.count)
                .filter_map(|n| at(&digests, run, n))
                .collect();
            self.write(part, bytes, &digests, old)?;
        }
        let unwritten_zero = |n: usize| {
            run.first <= n && n < run.first + run.count && at(&digests, run, n).is_none()
        };
        let zeros: Vec<BlockRun> = runs(&geometry, self.region, unwritten_zero)
            .filter(|part| self.copy.leaves.is_zero_block(part.first))
            .collect();
        for part in zeros {
            self.shared
                .stager
                .give_back(part.extent)
                .map_err(Failure::log)?;
            self.zero_extent(part.extent, old)?;
        }
        Ok(())
    }

    /// Digest of a block that has to be written; `None` for zeros and for what is durable with this content.
    fn digest_of(&mut self, bytes: &[u8], block: usize) -> Result<Option<Digest>, Failure> {
        if is_zero(bytes) {
            return Ok(None);
        }
        let digest = block_digest(bytes);
        self.copy.leaves.set(block, digest);
        if self.shared.digests_only {
            return Ok(None);
        }
        Ok((self.recorded(block)? != Some(digest)).then_some(digest))
    }

    fn write(
        &mut self,
        run: BlockRun,
        bytes: &[u8],
        digests: &[Digest],
        old: &mut AlignedBuffer,
    ) -> Result<(), Failure> {
        if !self.batch.has_room(run.extent.length()) || self.batch.data_bytes() >= EMIT_BYTES {
            self.flush()?;
        }
        if let Some(limiter) = &self.shared.limiter {
            limiter.take(run.extent.length()).map_err(Failure::target)?;
        }
        let was = self.old_content(run.extent, old)?;
        self.shared
            .stager
            .write_blocks(&mut self.batch, run.extent, bytes, digests, was)
            .map_err(Failure::log)
    }

    fn zeros(&mut self, extent: Extent, scratch: &mut Scratch) -> Result<(), Failure> {
        self.zero_extent(extent, &mut scratch.old)
    }

    fn zero_extent(&mut self, extent: Extent, old: &mut AlignedBuffer) -> Result<(), Failure> {
        if self.shared.digests_only {
            return Ok(());
        }
        if !self.batch.has_room(extent.length()) {
            self.flush()?;
        }
        let staged = self
            .shared
            .staged
            .as_ref()
            .is_some_and(|s| s.overlaps(extent));
        let was = self.old_content(extent, old)?;
        self.shared
            .stager
            .write_zeros(&mut self.batch, extent, staged, was)
            .map_err(Failure::log)
    }

    /// What the target holds there, where a pre-image is wanted.
    fn old_content<'o>(
        &mut self,
        extent: Extent,
        buffer: &'o mut AlignedBuffer,
    ) -> Result<Old<'o>, Failure> {
        let Some(target) = self
            .shared
            .target
            .as_ref()
            .filter(|_| self.shared.stager.wants_old())
        else {
            return Ok(Old::None);
        };
        let bytes = &mut buffer[..to_usize(extent.length())];
        read_padded(&**target, extent, bytes).map_err(Failure::target)?;
        self.copy.target_read_bytes += extent.length();
        Ok(if is_zero(bytes) {
            Old::Zero
        } else {
            Old::Data(bytes)
        })
    }

    fn flush(&mut self) -> Result<(), Failure> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let full = std::mem::replace(&mut self.batch, self.shared.stager.blocks());
        (self.emit)(full)
    }
}

/// The digest of block `n` of the region, if it lies in `run` and is to be written.
fn at(digests: &[Option<Digest>], run: BlockRun, n: usize) -> Option<Digest> {
    n.checked_sub(run.first)
        .and_then(|i| digests.get(i).copied().flatten())
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
