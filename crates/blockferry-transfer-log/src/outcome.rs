//! Outcomes: carrying a durable COMMIT or ROLLBACK out, for the session that decided and for recovery alike.

use blockferry_core::{Extent, Root};
use blockferry_device::BlockTarget;

use crate::apply::{Destination, Progress, Staged};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{DecisionKind, Point, Retained, SegmentHeader};
use crate::place::Content;
use crate::plan::{Strategy, Undo};
use crate::replica::Replica;

/// Carries a durable COMMIT out: brings the target to the new point, proves it, publishes it. Used by the
/// session that decided and by recovery alike.
pub(crate) fn finish_commit(
    replica: &mut Replica,
    header: &SegmentHeader,
    root: Root,
    staged: Staged<'_>,
    progress: Progress<'_>,
) -> Result<u64> {
    let committed = replica.state.last_decision(header.session).map(|d| d.kind);
    // Invariant I1: the target changes only under a durable COMMIT.
    assert_eq!(
        committed,
        Some(DecisionKind::Commit),
        "apply without a durable COMMIT"
    );
    let carried_out = match header.strategy {
        Strategy::Redo => apply_redo(replica, header, staged, progress),
        Strategy::Clone | Strategy::Shadow | Strategy::Direct => exchange(replica, header),
    };
    let proven_bytes = match carried_out {
        Ok(bytes) => bytes,
        Err(error) => return Err(back_out(replica, header, staged, error, progress)),
    };
    publish_applied(replica, header, root)
        .map_err(|e| Error::pending("the new point is in place but not yet recorded as such", e))?;
    // The outcome is durable; what is left to remove is removed by the next open at the latest.
    replica.remove_leftovers().ok();
    Ok(proven_bytes)
}

fn publish_applied(replica: &mut Replica, header: &SegmentHeader, root: Root) -> Result<()> {
    replica.content = replica.place.open()?;
    let (point, retained) = applied_point(replica, header, root);
    replica.publish(header, DecisionKind::Applied, Some(point), retained)
}

/// The point a session made, and what is kept of the one before.
pub(crate) fn applied_point(
    replica: &Replica,
    header: &SegmentHeader,
    root: Root,
) -> (Point, Option<Retained>) {
    let keeps_old = header.undo == Undo::Keep && header.strategy != Strategy::Direct;
    let retained = keeps_old.then(|| Retained {
        strategy: header.strategy,
        point: replica.point_before(header),
        old_bytes: header.old_bytes,
    });
    let point = Point {
        id: header.session,
        root,
        geometry: header.geometry,
        source: header.source.clone(),
        made_unix: header.started_unix,
    };
    (point, retained)
}

/// How far whole pages may be written: what lies beyond the end of a device's image is not ours; of a file's it
/// is cut off afterwards.
fn room_of(content: &Content, target: &dyn BlockTarget, header: &SegmentHeader) -> u64 {
    match content {
        Content::File(_) => target.size_bytes(),
        Content::Device(_) | Content::Absent => header.geometry.image_bytes(),
    }
}

fn apply_redo(
    replica: &mut Replica,
    header: &SegmentHeader,
    staged: Staged<'_>,
    progress: Progress<'_>,
) -> Result<u64> {
    replica.content = replica.place.open()?;
    let target = replica.content.target().ok_or_else(|| {
        Error::new(
            ErrorKind::Target,
            format!("target {} is gone", replica.place.label()),
        )
    })?;
    let image_bytes = header.geometry.image_bytes();
    if matches!(replica.content, Content::File(_)) && target.size_bytes() < image_bytes {
        target
            .resize(image_bytes)
            .map_err(|e| Error::target("grow the target", e))?;
    }
    let to = Destination {
        target: &*target,
        room_bytes: room_of(&replica.content, &*target, header),
        flush: &|| flush(&*target, replica),
        progress,
    };
    staged.apply(&to, || {
        if matches!(replica.content, Content::File(_)) && target.size_bytes() > image_bytes {
            target
                .resize(image_bytes)
                .map_err(|e| Error::target("shrink the target", e))?;
        }
        Ok(())
    })
}

fn flush(target: &dyn BlockTarget, replica: &Replica) -> Result<()> {
    target
        .flush()
        .map_err(|e| Error::target("flush the target", e))?;
    replica.stats.count_flush();
    Ok(())
}

/// Puts the finished sibling in the target's place; done already if recovery finds it there.
fn exchange(replica: &Replica, header: &SegmentHeader) -> Result<u64> {
    let Some((dir, name)) = replica.place.file() else {
        return Ok(0);
    };
    let Some(working) = header.working_file_id else {
        return Ok(0);
    };
    let sibling = replica.place.sibling(header.session);
    let found = replica.place.open()?.file_id()?;
    let failed = |e| Error::target(format!("put {sibling} in the place of {name}"), e);
    let in_place = found == Some(working);
    // An exchange takes whatever has the name: only the file that was read back may become the target.
    if !in_place && !replica.place.sibling_is(header.session, Some(working))? {
        return Err(Error::refused(format!(
            "{sibling} is not the file that the session wrote: someone replaced or removed it"
        )));
    }
    match found {
        Some(_) if in_place => {}
        Some(id) if Some(id) == header.old_file_id => {
            dir.exchange(&sibling, name).map_err(failed)?;
        }
        None if header.old_file_id.is_none() => dir.rename_new(&sibling, name).map_err(failed)?,
        _ => {
            return Err(Error::refused(format!(
                "{} is neither the old file nor the new one: someone replaced it; the new one is {sibling}",
                replica.place.label()
            )));
        }
    }
    dir.sync()
        .map_err(|e| Error::target("sync the target's directory", e))?;
    replica.stats.count_flush();
    Ok(0)
}

/// After a failure between COMMIT and APPLIED: back to the old point where pre-images allow, else the decision
/// stays and the next open carries it out. A device that is gone goes nowhere: it is as after a power loss.
fn back_out(
    replica: &mut Replica,
    header: &SegmentHeader,
    staged: Staged<'_>,
    error: Error,
    progress: Progress<'_>,
) -> Error {
    let has_way_back = header.strategy == Strategy::Redo && header.undo == Undo::Keep;
    if !has_way_back || error.is_of_lost_device() {
        return Error::pending("the new point is committed but not yet in place", error);
    }
    let restored = replica
        .decide_for(header, DecisionKind::Rollback)
        .and_then(|()| restore_redo(replica, header, staged, progress));
    match restored {
        Ok(()) => Error::new(
            ErrorKind::Target,
            format!(
                "the target failed while the new point was applied, and was returned to its old point: {}",
                chain_text(&error)
            ),
        ),
        Err(second) => Error::pending(
            format!("the target failed while it was returned to its old point ({second})"),
            error,
        ),
    }
}

fn chain_text(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}

/// Carries a durable ROLLBACK of a redo session out.
pub(crate) fn restore_redo(
    replica: &mut Replica,
    header: &SegmentHeader,
    staged: Staged<'_>,
    progress: Progress<'_>,
) -> Result<()> {
    let decided = replica.state.last_decision(header.session).map(|d| d.kind);
    assert_eq!(
        decided,
        Some(DecisionKind::Rollback),
        "restore without a durable ROLLBACK"
    );
    // A handle that failed is dead (I8): restore through a fresh one.
    replica.content = replica.place.open()?;
    let target = replica.content.target().ok_or_else(|| {
        Error::new(
            ErrorKind::Target,
            format!("target {} is gone", replica.place.label()),
        )
    })?;
    let is_file = matches!(replica.content, Content::File(_));
    let resize = |bytes: u64| {
        target
            .resize(bytes)
            .map_err(|e| Error::target("return the target to its old size", e))
    };
    if is_file && target.size_bytes() < header.old_bytes {
        resize(header.old_bytes)?;
    }
    let to = Destination {
        target: &*target,
        room_bytes: room_of(&replica.content, &*target, header),
        flush: &|| flush(&*target, replica),
        progress,
    };
    staged.restore(&to, header.old_bytes, || {
        if is_file && target.size_bytes() != header.old_bytes {
            resize(header.old_bytes)?;
        }
        for extent in staged.reserved.iter() {
            if let Some(extent) = extent.intersection(Extent::from_range(0..header.old_bytes)) {
                target
                    .punch(extent)
                    .map_err(|e| Error::target("give reserved space back", e))?;
            }
        }
        Ok(())
    })?;
    replica.content = replica.place.open()?;
    replica.publish_rolled_back(header)
}
