//! Anchors: one point of a target is kept through many syncs, and can be returned to.

use std::sync::Arc;

use blockferry_core::{BlockSize, ChangeMap, Content, Extent, Provenance, Trust};
use blockferry_device::BlockSource;
use blockferry_transfer_log::Strategy;

use crate::error::{Error, ErrorKind, Result};
use crate::options::{ChangesSince, Context, Mode, SyncOptions};
use crate::receipt::Receipt;
use crate::sync::sync;
use crate::target::Target;

/// Keeps the point that `target` is at now, whatever syncs follow, until it is returned to or let go. A target that is
/// not provably at a known point is read for its digest first, in blocks of `block_size`, which the syncs that follow
/// should use as well. Meanwhile only redo is possible. Returns the id of the point; nothing for a target that is absent.
///
/// # Errors
/// A session is unfinished, or target or state failed.
pub fn keep_anchor(
    target: &mut Target,
    block_size: BlockSize,
    context: &Context,
) -> Result<Option<String>> {
    let Some(device) = target.replica.target() else {
        return Ok(None);
    };
    if !target.replica.is_anchored() {
        if target.replica.point().is_none() || !target.is_unwritten()? {
            learn_point(device, target, block_size, context)?;
        }
        let kept = target.replica.keep_anchor();
        kept.map_err(|e| Error::log(format!("keep the point of {}", target.label()), e))?;
    }
    anchored_point(target)
}

/// The id of the point that is kept, if one is.
///
/// # Errors
/// What is kept of it is damaged or cannot be read.
pub fn anchored_point(target: &mut Target) -> Result<Option<String>> {
    let label = target.label();
    let found = target.replica.anchored_point();
    let found = found.map_err(|e| Error::log(format!("look at the anchor of {label}"), e))?;
    Ok(found.map(|anchor| anchor.point.id.to_string()))
}

/// Returns `target` to the point that is kept, by a sync from what was kept of it: at every moment the target is at one
/// of the two. The anchor is let go afterwards.
///
/// # Errors
/// As [`sync`]; or nothing is kept, or what is kept is not that point any more: then nothing is changed.
pub fn return_to_anchor(target: &mut Target, context: &Context) -> Result<Receipt> {
    let label = target.label();
    let found = target.replica.anchored_point();
    let found = found.map_err(|e| Error::log(format!("read the anchor of {label}"), e))?;
    let Some(anchor) = found else {
        let text = format!("{label}: no point is kept that could be returned to");
        return Err(Error::new(ErrorKind::Target, text));
    };
    let now_at = target.replica.point().map(|point| point.id.to_string());
    let mut map = ChangeMap::new(
        Provenance::Anchor,
        Trust::Trusted,
        anchor.source.size_bytes(),
    );
    map.set(
        Extent::from_range(0..anchor.source.size_bytes()),
        Content::Same,
    );
    for extent in anchor.replaced.iter() {
        map.set(extent, Content::Data);
    }
    let same_size = anchor.source.size_bytes()
        == target
            .replica
            .target()
            .map_or(0, |device| device.size_bytes());
    let options = SyncOptions {
        mode: Mode::Delta,
        strategy: Some(Strategy::Redo),
        block_size: anchor.point.geometry.block_size(),
        allow_shrink: true,
        source_address: anchor.source.label().to_owned(),
        changes: now_at
            .filter(|_| same_size)
            .map(|point| ChangesSince::new(point, Arc::new(map))),
        expected_root: Some(anchor.point.root),
        ..SyncOptions::default()
    };
    let receipt = sync(anchor.source, target, &options, context)?;
    drop_anchor(target)?;
    Ok(receipt)
}

/// Lets the kept point go; nothing happens where none is kept.
///
/// # Errors
/// The state failed.
pub fn drop_anchor(target: &mut Target) -> Result<()> {
    if !target.replica.is_anchored() {
        return Ok(());
    }
    let label = target.label();
    let dropped = target.replica.drop_anchor();
    dropped.map_err(|e| Error::log(format!("let go of the anchor of {label}"), e))
}

/// A target that is compared with itself is found identical, and its point is recorded.
fn learn_point(
    device: Arc<dyn blockferry_device::BlockTarget>,
    target: &mut Target,
    block_size: BlockSize,
    context: &Context,
) -> Result<()> {
    let options = SyncOptions {
        block_size,
        mode: Mode::Delta,
        strategy: Some(Strategy::Redo),
        source_address: target.label(),
        ..SyncOptions::default()
    };
    let source: Arc<dyn BlockSource> = device;
    sync(source, target, &options, context).map(drop)
}
