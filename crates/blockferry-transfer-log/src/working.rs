//! The working file: what a session of the strategies clone, shadow and direct writes before COMMIT.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockferry_core::Extent;
use blockferry_device::{BlockTarget, Status, StorageDir, StorageFile, WriteRequest};

use crate::error::{Error, Result};
use crate::format::SegmentHeader;
use crate::place::Content;
use crate::plan::{Plan, Strategy};
use crate::replica::Replica;
use crate::stats::Stats;

/// The sibling or target that a session writes before COMMIT.
#[derive(Clone, Debug)]
pub(crate) struct Working {
    pub(crate) target: Arc<dyn BlockTarget>,
    /// The sibling's file; `None` when the target itself is written.
    pub(crate) sibling: Option<Arc<dyn StorageFile>>,
    /// Set by the first failed write or flush, on whatever thread: what was not flushed is unknown then (I8).
    failed: Arc<AtomicBool>,
}

impl Working {
    fn new(target: Arc<dyn BlockTarget>, sibling: Option<Arc<dyn StorageFile>>) -> Self {
        Self {
            target,
            sibling,
            failed: Arc::default(),
        }
    }

    fn of_sibling(file: Arc<dyn StorageFile>) -> Self {
        Self::new(Arc::clone(&file).into_target(), Some(file))
    }

    /// The working file of a new session; `None` if its strategy has none.
    pub(crate) fn create(replica: &Replica, plan: &Plan) -> Result<Option<Self>> {
        match (plan.strategy, &replica.content) {
            (Strategy::Redo, Content::Absent) => Err(Error::refused(
                "redo needs a target that exists; use direct",
            )),
            (Strategy::Redo, _) => Ok(None),
            (Strategy::Direct, content @ (Content::Device(_) | Content::File(_))) => {
                Ok(content.target().map(|target| Self::new(target, None)))
            }
            (Strategy::Clone | Strategy::Shadow | Strategy::Direct, content) => {
                let Some((dir, _)) = replica.place.file() else {
                    return Err(Error::refused(format!(
                        "{} needs a file target",
                        plan.strategy
                    )));
                };
                let name = replica.place.sibling(plan.session);
                create_sibling(&**dir, &name, plan, content)
                    .map(Self::of_sibling)
                    .map(Some)
            }
        }
    }

    /// The working file of a session that goes on.
    pub(crate) fn reopen(replica: &Replica, header: &SegmentHeader) -> Result<Option<Self>> {
        if header.strategy == Strategy::Redo {
            return Ok(None);
        }
        let Some(expected) = header.working_file_id else {
            let target = replica
                .content
                .target()
                .ok_or_else(|| Error::refused("the target is gone"))?;
            flush_and_forget(&*target, &replica.stats)?;
            return Ok(Some(Self::new(target, None)));
        };
        let name = replica.place.sibling(header.session);
        let failed = |e| Error::target(format!("open {name} beside the target"), e);
        let opened = match replica.place.file() {
            Some((dir, _)) => dir.open(&name).map_err(failed)?,
            None => None,
        };
        let Some(file) = opened else {
            return Err(Error::corrupt(format!(
                "{name}, which the session was writing, is gone"
            )));
        };
        if file.file_id().map_err(failed)? != expected {
            return Err(Error::corrupt(format!(
                "{name} is not the file the session was writing"
            )));
        }
        let working = Self::of_sibling(file);
        flush_and_forget(&*working.target, &replica.stats)?;
        let image_bytes = header.geometry.image_bytes();
        if working.target.size_bytes() != image_bytes {
            // Its size was never made durable.
            working.resize(image_bytes)?;
        }
        Ok(Some(working))
    }

    pub(crate) fn write(&self, requests: &[WriteRequest<'_>]) -> Result<()> {
        self.attempt("write to", || self.target.write_batch(requests))
    }

    /// Makes an extent read as zeros; a sibling, which we created, gets a hole.
    pub(crate) fn write_zeros(&self, extent: Extent) -> Result<()> {
        self.attempt("write zeros to", || {
            if self.sibling.is_some() && self.target.punch(extent)? {
                return Ok(());
            }
            self.target.write_zeroes(extent)
        })
    }

    pub(crate) fn resize(&self, size_bytes: u64) -> Result<()> {
        self.attempt("resize", || self.target.resize(size_bytes))
    }

    /// Makes everything written so far durable.
    pub(crate) fn flush(&self, stats: &Stats) -> Result<()> {
        self.attempt("flush", || self.target.flush())?;
        stats.count_flush();
        Ok(())
    }

    /// Whether all of `extent` is a hole, which reads as zeros.
    pub(crate) fn is_hole(&self, extent: Extent) -> Result<bool> {
        let mut holes = blockferry_core::ExtentSet::new();
        holes_of(&*self.target, extent, &mut holes)?;
        Ok(holes.covers(extent))
    }

    fn attempt(
        &self,
        what: &str,
        act: impl FnOnce() -> blockferry_device::Result<()>,
    ) -> Result<()> {
        self.check_alive()?;
        act().map_err(|e| {
            self.failed.store(true, Ordering::Release);
            Error::target(format!("{what} {}", self.target.label()), e)
        })
    }

    /// Nothing is written after a failed write or flush (I8).
    pub(crate) fn check_alive(&self) -> Result<()> {
        if !self.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        let label = self.target.label();
        Err(Error::new(
            crate::ErrorKind::Target,
            format!(
                "{label} had a failed write or flush and is not written again; resume the session"
            ),
        ))
    }
}

/// What the page cache shows may not be on the medium: flush before believing it, then read the medium.
fn flush_and_forget(target: &dyn BlockTarget, stats: &Stats) -> Result<()> {
    target
        .flush()
        .map_err(|e| Error::target(format!("flush {} before reading it", target.label()), e))?;
    stats.count_flush();
    target.drop_cache();
    Ok(())
}

fn create_sibling(
    dir: &dyn StorageDir,
    name: &str,
    plan: &Plan,
    content: &Content,
) -> Result<Arc<dyn StorageFile>> {
    let failed = |e| Error::target(format!("create {name} beside the target"), e);
    let file = dir.create(name).map_err(failed)?;
    let made = match (plan.strategy, content) {
        (Strategy::Clone, Content::File(old)) => file.clone_from_file(&**old),
        _ => Ok(()),
    };
    let sized = made.and_then(|()| file.resize(plan.geometry.image_bytes()));
    if let Err(error) = sized {
        // Nothing refers to it yet.
        dir.remove(name).map_err(failed)?;
        return Err(failed(error));
    }
    Ok(file)
}

/// Adds the holes of `target` in `extent`.
pub(crate) fn holes_of(
    target: &dyn BlockTarget,
    extent: Extent,
    holes: &mut blockferry_core::ExtentSet,
) -> Result<()> {
    let end = extent.end().min(target.size_bytes());
    let mut offset = extent.start();
    while offset < end {
        let (status, run_end) = target
            .status_at(offset)
            .map_err(|e| Error::target("ask the target for its holes", e))?;
        if status == Status::Zero {
            holes.insert(Extent::from_range(offset..run_end.min(end)));
        }
        offset = run_end;
    }
    Ok(())
}
