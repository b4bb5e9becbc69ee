//! The anchor of a replica: a point to return to, kept through every session until it is let go.

use std::sync::Arc;

use blockferry_core::{Extent, ExtentSet};
use blockferry_device::BlockSource;

use super::Replica;
use super::recovery::LoadedSession;
use crate::anchor::{self, ANCHOR_NAME, Anchor};
use crate::error::{Error, Result};
use crate::format::Point;
use crate::log::Scan;
use crate::plan::{Plan, Strategy};

/// What is known of the anchor. It is read when it is first needed.
#[derive(Debug)]
pub(super) enum Anchored {
    No,
    Unread,
    Kept(Box<Anchor>),
}

impl Anchored {
    pub(super) fn look(dir: &dyn blockferry_device::StorageDir) -> Result<Self> {
        let found = dir
            .open(ANCHOR_NAME)
            .map_err(|e| Error::log(format!("look for {ANCHOR_NAME} in {}", dir.label()), e))?;
        Ok(found.map_or(Self::No, |_file| Self::Unread))
    }
}

/// The point of an anchor, to be read.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AnchoredPoint {
    /// Which.
    pub point: Point,
    /// Its content: what was kept, over the target.
    pub source: Arc<dyn BlockSource>,
    /// Where the target may differ from it; elsewhere it does not.
    pub replaced: ExtentSet,
}

impl Replica {
    /// Whether a point is kept through sessions.
    #[must_use]
    pub fn is_anchored(&self) -> bool {
        !matches!(self.anchored, Anchored::No)
    }

    /// From now on the present point is kept, whatever sessions follow: each of them makes the old content of what it
    /// replaces first durable before it commits. Only redo is possible meanwhile. Nothing happens where one is kept.
    ///
    /// # Errors
    /// The target is not provably at a point, a session is unfinished, or the state directory failed.
    pub fn keep_anchor(&mut self) -> Result<()> {
        if self.is_anchored() {
            return Ok(());
        }
        if let Some(header) = self.unfinished() {
            return Err(Error::refused(format!(
                "session {} is unfinished: resume or cancel it before its target's point is kept",
                header.session
            )));
        }
        self.refuse_while_group_pending()?;
        let Some(point) = self.known_point().cloned() else {
            return Err(Error::refused(format!(
                "{} is not provably at a point that could be kept",
                self.label()
            )));
        };
        let old_bytes = self.content.size_bytes();
        let made = Anchor::create(&*self.dir, point, old_bytes, &self.stats)?;
        self.anchored = Anchored::Kept(Box::new(made));
        Ok(())
    }

    /// The point that is kept.
    ///
    /// # Errors
    /// What is kept of it is damaged or cannot be read.
    pub fn anchored_point(&mut self) -> Result<Option<AnchoredPoint>> {
        let Some(target) = self.content.target() else {
            return Ok(None);
        };
        Ok(self.read_anchor()?.map(|anchor| AnchoredPoint {
            point: anchor.point().clone(),
            source: anchor.view(target),
            replaced: anchor.extents().clone(),
        }))
    }

    /// Lets the kept point go.
    ///
    /// # Errors
    /// The state directory failed.
    pub fn drop_anchor(&mut self) -> Result<()> {
        anchor::remove(&*self.dir, &self.stats)?;
        self.anchored = Anchored::No;
        Ok(())
    }

    /// Makes the old content of `replaced` durable where the anchor wants it.
    pub(crate) fn keep_for_anchor(&mut self, replaced: &ExtentSet) -> Result<()> {
        let (stats, target) = (Arc::clone(&self.stats), self.content.target());
        match (self.read_anchor()?, target) {
            (Some(anchor), Some(target)) => anchor.keep(&*target, replaced.iter(), &stats),
            _ => Ok(()),
        }
    }

    /// The way back of a session replaces pages as its commit did: where the anchor wants them they are kept before it
    /// is decided.
    pub(super) fn keep_what_goes_back(&mut self, scan: &Scan) -> Result<()> {
        if !self.is_anchored() {
            return Ok(());
        }
        if scan.header.strategy != Strategy::Redo {
            return Err(Error::refused(format!(
                "the way back of session {} exchanges the whole file, but a point of {} is kept since",
                scan.header.session,
                self.label()
            )));
        }
        let mut replaced = LoadedSession::of(scan).ledger.touched;
        let cut_off = scan.header.old_bytes..self.content.size_bytes();
        if !cut_off.is_empty() {
            replaced.insert(Extent::from_range(cut_off));
        }
        self.keep_for_anchor(&replaced)
    }

    pub(super) fn refuse_against_anchor(&self, plan: &Plan) -> Result<()> {
        if !self.is_anchored() || plan.strategy == Strategy::Redo {
            return Ok(());
        }
        Err(Error::refused(format!(
            "a point of {} is kept through all its sessions: expected redo, found {}",
            self.label(),
            plan.strategy
        )))
    }

    fn read_anchor(&mut self) -> Result<Option<&mut Anchor>> {
        if matches!(self.anchored, Anchored::Unread) {
            self.anchored = match Anchor::open(&*self.dir, &self.stats)? {
                Some(anchor) => Anchored::Kept(Box::new(anchor)),
                None => Anchored::No,
            };
        }
        Ok(match &mut self.anchored {
            Anchored::Kept(anchor) => Some(anchor),
            Anchored::No | Anchored::Unread => None,
        })
    }
}
