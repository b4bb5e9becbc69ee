//! One region of a comparison, on one worker.

use std::sync::Arc;

use blockferry_core::{Digest, Extent, Geometry, RegionIndex, RegionLeaves, block_digest, is_zero};
use blockferry_device::{AlignedBuffer, BlockSource, RateLimiter};
use blockferry_pipeline::{BUFFER_BYTES, BlockRun, DataMap, Failure, runs};
use blockferry_transfer_log::{Batch, Old, StagedView, Stager};

use crate::known::{Claim, Known};
use crate::pages::{PageRun, differing_runs};

/// What all workers of a comparison share.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Comparison {
    /// The new content.
    pub source: Arc<dyn BlockSource>,
    /// The old content.
    pub target: Arc<dyn BlockSource>,
    /// Size and blocks of the image to come.
    pub geometry: Geometry,
    /// Takes the pages.
    pub stager: Stager,
    /// What a resumed session has staged already; it wins over the target.
    pub staged: Option<Arc<StagedView>>,
    /// Whether what is replaced is kept.
    pub keep_old: bool,
    /// Whether the source's leaves are wanted; without them only the pages that differ are found.
    pub digests: bool,
    /// Holds back what is staged to a rate.
    pub limiter: Option<RateLimiter>,
}

/// What one region came to.
#[derive(Debug)]
#[non_exhaustive]
pub struct RegionDelta {
    /// The source's leaves: after the sync also the target's.
    pub leaves: RegionLeaves,
    /// Bytes read from the source.
    pub source_read_bytes: u64,
    /// Bytes read from the target.
    pub target_read_bytes: u64,
    /// Bytes of pages that differ from the target as it was (staged ones included, if this run staged them).
    pub changed_bytes: u64,
    /// Blocks that a change map claims to be the same, and that are not.
    pub lies: u64,
}

/// What one worker keeps between regions: its buffers.
#[derive(Debug)]
pub struct Scratch {
    new: AlignedBuffer,
    old: AlignedBuffer,
    view: AlignedBuffer,
}

impl Default for Scratch {
    fn default() -> Self {
        let piece = || AlignedBuffer::zeroed(to_usize(BUFFER_BYTES));
        Self {
            new: piece(),
            old: piece(),
            view: piece(),
        }
    }
}

impl Comparison {
    /// A comparison that keeps what is replaced.
    #[must_use]
    pub fn new(
        source: Arc<dyn BlockSource>,
        target: Arc<dyn BlockSource>,
        geometry: Geometry,
        stager: Stager,
    ) -> Self {
        Self {
            source,
            target,
            geometry,
            stager,
            staged: None,
            keep_old: true,
            digests: true,
            limiter: None,
        }
    }

    /// Compares one region and emits the pages that differ.
    ///
    /// # Errors
    /// A device or the log failed, or the walk ended.
    pub fn region(
        &self,
        region: RegionIndex,
        known: &Known,
        scratch: &mut Scratch,
        emit: &mut dyn FnMut(Batch) -> Result<(), Failure>,
    ) -> Result<RegionDelta, Failure> {
        let source_map =
            DataMap::of(&*self.source, &self.geometry, region).map_err(Failure::source)?;
        let reads_zero =
            |block| source_map.is_zero_block(block) || known.claim(block) == Claim::Zero;
        let target_map =
            DataMap::of(&*self.target, &self.geometry, region).map_err(Failure::target)?;
        let mut work = Region {
            shared: self,
            region,
            known,
            target_map,
            batch: self.stager.pages(),
            emit,
            delta: RegionDelta {
                leaves: RegionLeaves::zero(&self.geometry, region),
                source_read_bytes: 0,
                target_read_bytes: 0,
                changed_bytes: 0,
                lies: 0,
            },
        };
        let skipped: Vec<bool> = (0..work.delta.leaves.len())
            .map(|b| work.is_proven_equal(b))
            .collect();
        for run in runs(&self.geometry, region, |b| !reads_zero(b) && !skipped[b]) {
            work.data_run(run, &source_map, scratch)?;
        }
        work.take_known_leaves(&skipped, &reads_zero);
        work.count_lies();
        for run in runs(&self.geometry, region, reads_zero) {
            work.zero_run(run, scratch)?;
        }
        work.flush()?;
        Ok(work.delta)
    }
}

struct Region<'a> {
    shared: &'a Comparison,
    region: RegionIndex,
    known: &'a Known,
    target_map: DataMap,
    batch: Batch,
    emit: &'a mut dyn FnMut(Batch) -> Result<(), Failure>,
    delta: RegionDelta,
}

impl Region<'_> {
    /// Blocks the source may hold data in: read, digest, compare.
    fn data_run(
        &mut self,
        run: BlockRun,
        map: &DataMap,
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        let length = to_usize(run.extent.length());
        let Scratch { new, old, view } = scratch;
        self.delta.source_read_bytes += map
            .read(&*self.shared.source, run.extent, new)
            .map_err(Failure::source)?;
        let block = to_usize(self.shared.geometry.block_size().bytes());
        for (bytes, n) in new[..length].chunks(block).zip(run.first..) {
            if self.shared.digests && !is_zero(bytes) {
                self.delta.leaves.set(n, block_digest(bytes));
            }
        }
        // What the manifest proves equal is not read on the target's side; the rest is, in whole runs.
        let geometry = self.shared.geometry;
        let candidates: Vec<bool> = (run.first..run.first + run.count)
            .map(|n| self.may_differ(n))
            .collect();
        let wanted =
            |n: usize| n >= run.first && n < run.first + run.count && candidates[n - run.first];
        for part in runs(&geometry, self.region, wanted) {
            let from = to_usize(part.extent.start() - run.extent.start());
            let new = &new[from..from + to_usize(part.extent.length())];
            self.compare(part, Some(new), old, view)?;
        }
        Ok(())
    }

    /// Blocks the source is known to read as zeros: only a target that does not is of interest.
    fn zero_run(&mut self, run: BlockRun, scratch: &mut Scratch) -> Result<(), Failure> {
        let geometry = self.shared.geometry;
        let candidates: Vec<bool> = (run.first..run.first + run.count)
            .map(|n| self.may_differ(n) && (!self.target_map.is_zero_block(n) || self.is_staged(n)))
            .collect();
        let wanted =
            |n: usize| n >= run.first && n < run.first + run.count && candidates[n - run.first];
        for part in runs(&geometry, self.region, wanted) {
            self.compare(part, None, &mut scratch.old, &mut scratch.view)?;
        }
        Ok(())
    }

    /// Both sides are known to be equal and nothing is staged over it: nothing to read.
    fn is_proven_equal(&self, block: usize) -> bool {
        self.known.is_equal(block) && !self.is_staged(block)
    }

    /// Whether a block must be compared: unless the target's leaf is known, equal, and nothing is staged over it.
    fn may_differ(&self, block: usize) -> bool {
        let known: Option<Digest> = self.known.target.as_ref().map(|leaves| leaves.get(block));
        known != Some(self.delta.leaves.get(block)) || self.is_staged(block)
    }

    fn is_staged(&self, block: usize) -> bool {
        let extent = blockferry_pipeline::block_in(&self.shared.geometry, self.region, block);
        self.shared
            .staged
            .as_ref()
            .is_some_and(|s| s.overlaps(extent))
    }

    /// Compares a run with the target as staged so far; `new` is `None` for zeros.
    fn compare(
        &mut self,
        run: BlockRun,
        new: Option<&[u8]>,
        old: &mut AlignedBuffer,
        view: &mut AlignedBuffer,
    ) -> Result<(), Failure> {
        let length = to_usize(run.extent.length());
        let old = &mut old[..length];
        self.delta.target_read_bytes += self
            .target_map
            .read(&*self.shared.target, run.extent, old)
            .map_err(Failure::target)?;
        let staged = self
            .shared
            .staged
            .as_ref()
            .filter(|s| s.overlaps(run.extent));
        let basis: &[u8] = if let Some(staged) = staged {
            let view = &mut view[..length];
            view.copy_from_slice(old);
            staged.patch(run.extent, view).map_err(Failure::log)?;
            view
        } else {
            old
        };
        let block = to_usize(self.shared.geometry.block_size().bytes());
        let mut offset = 0;
        while offset < length {
            let end = (offset + block).min(length);
            let extent = Extent::from_range(
                run.extent.start() + offset as u64..run.extent.start() + end as u64,
            );
            let (basis, old) = (&basis[offset..end], &old[offset..end]);
            match new {
                Some(new) if new[offset..end] == *basis => {}
                Some(new) => self.stage_block(extent, &new[offset..end], basis, old)?,
                None if is_zero(basis) => {}
                None => self.stage_block(extent, &ZEROS[..end - offset], basis, old)?,
            }
            offset = end;
        }
        Ok(())
    }

    fn stage_block(
        &mut self,
        block: Extent,
        new: &[u8],
        basis: &[u8],
        old: &[u8],
    ) -> Result<(), Failure> {
        let mut found = Vec::new();
        differing_runs(block, new, basis, |run| found.push(run));
        for run in found {
            let range = to_usize(run.extent.start() - block.start())
                ..to_usize(run.extent.end() - block.start());
            self.stage_run(run, &new[range.clone()], &old[range])?;
        }
        Ok(())
    }

    fn stage_run(&mut self, run: PageRun, new: &[u8], old: &[u8]) -> Result<(), Failure> {
        if !self.batch.has_room(run.extent.length()) {
            self.flush()?;
        }
        let old = match (self.shared.keep_old, is_zero(old)) {
            (false, _) => Old::None,
            (true, true) => Old::Zero,
            (true, false) => Old::Data(old),
        };
        self.delta.changed_bytes += run.extent.length();
        if run.to_zero {
            self.shared
                .stager
                .add_zero(&mut self.batch, run.extent, old);
        } else {
            self.shared
                .stager
                .add(&mut self.batch, run.extent, new, old);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Failure> {
        if self.batch.is_empty() {
            return Ok(());
        }
        if let Some(limiter) = &self.shared.limiter {
            limiter
                .take(self.batch.data_bytes())
                .map_err(Failure::target)?;
        }
        let full = std::mem::replace(&mut self.batch, self.shared.stager.pages());
        (self.emit)(full)
    }

    /// Leaves of the blocks that were not read because both sides are known to be equal.
    fn take_known_leaves(&mut self, skipped: &[bool], reads_zero: &dyn Fn(usize) -> bool) {
        let Some(target) = &self.known.target else {
            return;
        };
        for (block, _) in skipped.iter().enumerate().filter(|(_, skipped)| **skipped) {
            if !reads_zero(block) {
                self.delta.leaves.set(block, target.get(block));
            }
        }
    }

    /// Blocks that were read although they are claimed to be the same tell whether the claims hold.
    fn count_lies(&mut self) {
        let Some(target) = &self.known.target else {
            return;
        };
        let claimed =
            |block: &usize| matches!(self.known.claim(*block), Claim::Same | Claim::SameToCheck);
        let lies = (0..self.delta.leaves.len())
            .filter(claimed)
            .filter(|block| self.delta.leaves.get(*block) != target.get(*block));
        self.delta.lies = lies.count() as u64;
    }
}

/// A block of zeros, the largest there is.
static ZEROS: [u8; 1024 * 1024] = [0; 1024 * 1024];

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
