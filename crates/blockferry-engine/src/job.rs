//! The two modes behind one face: what a worker does with a region.

use blockferry_core::{Geometry, RegionIndex, RegionLeaves};
use blockferry_delta_sync::{Comparison, Known};
use blockferry_full_download::Copying;
use blockferry_pipeline::{DataRegions, Failure};
use blockferry_transfer_log::Batch;

use crate::options::SyncOptions;

/// What is done with every region.
#[derive(Debug)]
pub(crate) enum Job {
    Delta(Comparison),
    Full(Copying),
}

/// Buffers of one worker, made when first needed.
#[derive(Debug, Default)]
pub(crate) struct JobScratch {
    delta: Option<blockferry_delta_sync::Scratch>,
    full: Option<blockferry_full_download::Scratch>,
}

/// What a region came to.
#[derive(Debug)]
pub(crate) struct RegionDone {
    pub(crate) leaves: RegionLeaves,
    pub(crate) source_read_bytes: u64,
    pub(crate) target_read_bytes: u64,
    pub(crate) changed_bytes: u64,
    /// Blocks that a change map claims to be the same, and that are not.
    pub(crate) lies: u64,
}

impl Job {
    /// How many workers: one more than processors where they also wait for their own writes.
    pub(crate) fn threads(&self, options: &SyncOptions) -> usize {
        let waits = matches!(self, Self::Full(c) if c.is_into_new_file());
        options.threads() + usize::from(waits && options.threads.is_none())
    }

    /// The regions that have to be looked at.
    pub(crate) fn regions(&self, geometry: Geometry) -> DataRegions {
        let (source, staged, target) = match self {
            Self::Delta(c) => (&c.source, &c.staged, Some(&c.target)),
            // Zeros need no writing in a new file.
            Self::Full(c) => (
                &c.source,
                &c.staged,
                c.target.as_ref().filter(|_| !c.is_into_new_file()),
            ),
        };
        // Something may be staged where both sides are zero now.
        if staged.is_some() {
            return DataRegions::every(geometry);
        }
        let devices = std::iter::once(source).chain(target);
        DataRegions::of(geometry, devices.cloned().collect())
    }

    pub(crate) fn region(
        &self,
        region: RegionIndex,
        known: &Known,
        scratch: &mut JobScratch,
        emit: &mut dyn FnMut(Batch) -> Result<(), Failure>,
    ) -> Result<RegionDone, Failure> {
        match self {
            Self::Delta(comparison) => {
                let scratch = scratch.delta.get_or_insert_with(Default::default);
                let delta = comparison.region(region, known, scratch, emit)?;
                Ok(RegionDone {
                    leaves: delta.leaves,
                    source_read_bytes: delta.source_read_bytes,
                    target_read_bytes: delta.target_read_bytes,
                    changed_bytes: delta.changed_bytes,
                    lies: delta.lies,
                })
            }
            Self::Full(copying) => {
                let scratch = scratch.full.get_or_insert_with(Default::default);
                let copy = copying.region(region, scratch, emit)?;
                Ok(RegionDone {
                    leaves: copy.leaves,
                    source_read_bytes: copy.source_read_bytes,
                    target_read_bytes: copy.target_read_bytes,
                    changed_bytes: 0,
                    lies: 0,
                })
            }
        }
    }
}
