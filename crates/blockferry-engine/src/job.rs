//! The two modes behind one face: what a worker does with a region.

use blockferry_core::{RegionIndex, RegionLeaves};
use blockferry_delta_sync::{Comparison, Known};
use blockferry_full_download::Copying;
use blockferry_pipeline::Failure;
use blockferry_transfer_log::Batch;

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
}

impl Job {
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
                })
            }
        }
    }
}
