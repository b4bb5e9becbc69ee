//! Reading whole devices without writing: digest, compare.

use std::io::Write;
use std::sync::Arc;

use blockferry_core::{
    BlockSize, Extent, Geometry, ManifestWriter, RegionIndex, RegionLeaves, Root, TreeHasher,
};
use blockferry_delta_sync::{Comparison as RegionComparison, Known, Scratch};
use blockferry_device::BlockSource;
use blockferry_full_download::Copying;
use blockferry_pipeline::{DataRegions, Phase, Step, WalkOptions, block_in, walk};
use blockferry_transfer_log::{Batch, Stager};

use crate::error::{Error, ErrorKind, Result};
use crate::job::RegionDone;
use crate::options::{Context, SyncOptions};
use crate::status::{Comparison, DigestReport};

/// Digests a device, and writes its manifest if asked to.
///
/// # Errors
/// The device or the manifest's sink failed.
pub fn digest(
    source: &Arc<dyn BlockSource>,
    block_size: BlockSize,
    context: &Context,
    manifest: Option<&mut dyn Write>,
) -> Result<DigestReport> {
    let start = context.clock.now();
    let geometry = Geometry::new(source.size_bytes(), block_size);
    let failed = |e| Error::because(ErrorKind::Target, "write the manifest", e);
    let mut writer = manifest
        .map(|m| ManifestWriter::new(geometry, m))
        .transpose()
        .map_err(failed)?;
    let mut data_bytes = 0;
    let root = scan_leaves(source, geometry, context, &mut |leaves| {
        data_bytes += data_bytes_of(&geometry, leaves);
        match &mut writer {
            Some(writer) => writer.push(leaves).map_err(failed),
            None => Ok(()),
        }
    })?;
    if let Some(writer) = writer {
        writer.finish().map_err(failed)?;
    }
    Ok(DigestReport {
        root: root.to_string(),
        image_bytes: geometry.image_bytes(),
        data_bytes,
        zero_bytes: geometry.image_bytes() - data_bytes,
        block_size: block_size.bytes(),
        elapsed_seconds: context.clock.now().saturating_sub(start).as_secs_f64(),
    })
}

/// Bytes of the blocks that are not zero; the last block of an image may be short.
fn data_bytes_of(geometry: &Geometry, leaves: &RegionLeaves) -> u64 {
    let data = (0..leaves.len()).filter(|block| !leaves.is_zero_block(*block));
    data.map(|block| block_in(geometry, leaves.region(), block).length())
        .sum()
}

/// Takes the leaves of every region in order; returns the root.
pub(crate) fn scan_leaves(
    source: &Arc<dyn BlockSource>,
    geometry: Geometry,
    context: &Context,
    take: &mut dyn FnMut(&RegionLeaves) -> Result<()>,
) -> Result<Root> {
    // A copy whose pages go nowhere takes the digests.
    let copying = Copying::digesting(Arc::clone(source), geometry);
    let mut tree = TreeHasher::new(geometry);
    let mut done_bytes = 0;
    walk(
        WalkOptions::new(SyncOptions::default().threads()),
        regions(DataRegions::of(geometry, vec![Arc::clone(source)]), context),
        blockferry_full_download::Scratch::default,
        |scratch, region, _emitter| {
            copying
                .region(region, scratch, &mut |_batch| Ok(()))
                .map_err(Error::from)
        },
        |step: Step<(), blockferry_full_download::RegionCopy>| {
            if let Step::Done(done) = step {
                tree.push(&done.leaves);
                take(&done.leaves)?;
                done_bytes = geometry.region_extent(done.leaves.region()).end();
                context.progress(Phase::Verifying, done_bytes, geometry.image_bytes(), 0);
            }
            Ok(())
        },
    )?;
    Ok(tree.finish())
}

/// Compares two devices; `on_difference` gets the extents that differ, merged, ascending, in 4 KiB steps.
///
/// # Errors
/// A device failed.
pub fn compare(
    a: &Arc<dyn BlockSource>,
    b: &Arc<dyn BlockSource>,
    context: &Context,
    on_difference: &mut dyn FnMut(Extent),
) -> Result<Comparison> {
    let start = context.clock.now();
    let (size_a, size_b) = (a.size_bytes(), b.size_bytes());
    let common = size_a.min(size_b);
    let geometry = Geometry::new(common, BlockSize::DEFAULT);
    let stager = Stager::detached(geometry);
    let mut comparison = RegionComparison::new(Arc::clone(a), Arc::clone(b), geometry, stager);
    comparison.keep_old = false;
    comparison.digests = false;
    let mut merger = Merger {
        open: None,
        different_bytes: 0,
        found: on_difference,
    };
    let mut done_bytes = 0;
    walk(
        WalkOptions::new(SyncOptions::default().threads()),
        regions(
            DataRegions::of(geometry, vec![Arc::clone(a), Arc::clone(b)]),
            context,
        ),
        Scratch::default,
        |scratch, region, _emitter| compare_region(&comparison, region, scratch),
        |step: Step<(), (RegionDone, Vec<Extent>)>| {
            if let Step::Done((done, extents)) = step {
                extents.into_iter().for_each(|e| merger.add(e));
                done_bytes = geometry.region_extent(done.leaves.region()).end();
                context.progress(Phase::Verifying, done_bytes, common, merger.different_bytes);
            }
            Ok(())
        },
    )?;
    let longer = size_a.max(size_b);
    if longer > common {
        merger.add(Extent::from_range(common..longer));
    }
    let different_bytes = merger.finish();
    Ok(Comparison {
        equal: different_bytes == 0,
        different_bytes,
        compared_bytes: common,
        size_a,
        size_b,
        elapsed_seconds: context.clock.now().saturating_sub(start).as_secs_f64(),
    })
}

fn compare_region(
    comparison: &RegionComparison,
    region: RegionIndex,
    scratch: &mut Scratch,
) -> Result<(RegionDone, Vec<Extent>)> {
    let mut extents: Vec<Extent> = Vec::new();
    let known = Known::default();
    let mut collect = |batch: Batch| {
        extents.extend(batch.extents());
        Ok(())
    };
    let delta = comparison.region(region, &known, scratch, &mut collect)?;
    extents.sort_unstable();
    let done = RegionDone {
        leaves: delta.leaves,
        source_read_bytes: delta.source_read_bytes,
        target_read_bytes: delta.target_read_bytes,
        changed_bytes: delta.changed_bytes,
        lies: delta.lies,
    };
    Ok((done, extents))
}

fn regions(
    mut regions: DataRegions,
    context: &Context,
) -> impl FnMut() -> Option<Result<RegionIndex>> + Send {
    let cancel = context.cancel.clone();
    move || {
        if cancel.is_cancelled() {
            return Some(Err(Error::cancelled()));
        }
        regions.next().map(Ok)
    }
}

/// Joins neighbouring extents before they are reported.
struct Merger<'f> {
    open: Option<Extent>,
    different_bytes: u64,
    found: &'f mut dyn FnMut(Extent),
}

impl Merger<'_> {
    fn add(&mut self, extent: Extent) {
        self.different_bytes += extent.length();
        self.open = match self.open {
            Some(open) if open.end() == extent.start() => {
                Some(Extent::from_range(open.start()..extent.end()))
            }
            Some(open) => {
                (self.found)(open);
                Some(extent)
            }
            None => Some(extent),
        };
    }

    fn finish(self) -> u64 {
        if let Some(open) = self.open {
            (self.found)(open);
        }
        self.different_bytes
    }
}
