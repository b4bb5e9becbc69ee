//! Nothing to write: both sides are provably at their common point, or the scan found no difference. The target is
//! not touched; its sync point is recorded.

use blockferry_core::Root;
use blockferry_transfer_log::{SessionId, SessionTotals, Strategy};

use super::{Run, internal, unix_seconds};
use crate::error::{Error, Result};
use crate::options::Mode;
use crate::plan::Choice;
use crate::receipt::Receipt;
use crate::recorder::Recorded;
use crate::target::Target;

impl Run<'_> {
    /// Both sides provably unwritten since their last common point.
    pub(super) fn is_proven_identical(&self, target: &Target) -> Result<bool> {
        if self.options.rescan || self.options.mode == Mode::Full {
            return Ok(false);
        }
        Ok(self.source_is_at_point(target) && target.is_unwritten()?)
    }

    pub(super) fn source_is_at_point(&self, target: &Target) -> bool {
        target.replica.point().is_some_and(|p| {
            p.geometry == self.geometry
                && p.source.evidence.proves_same(&self.stamp.evidence)
                && p.source.identity.proves_same(&self.stamp.identity)
        })
    }

    pub(super) fn proven_receipt(mut self, target: &Target) -> Result<Receipt> {
        let point = target
            .replica
            .point()
            .ok_or_else(|| internal("no point after it was proven"))?;
        let choice = Choice {
            mode: Mode::Delta,
            strategy: Strategy::Redo,
            reason: "neither side was written since their last sync point: nothing to read"
                .to_owned(),
            required_bytes: 0,
            available_bytes: 0,
        };
        let (root, id) = (point.root, point.id);
        self.counts.changed = 0;
        Ok(self.receipt(target, &choice, None, root, id, SessionTotals::default(), 0))
    }

    /// Nothing differed: the point is recorded, the target is not touched.
    pub(super) fn identical(
        mut self,
        target: &mut Target,
        choice: &Choice,
        recorded: Recorded,
    ) -> Result<Receipt> {
        let root = recorded.root;
        let id = match self.finding(target, root)? {
            Finding::Known(id) => self.refresh(target, recorded).map(|()| id),
            Finding::OtherBlocks(id) => {
                let stamp = self.stamp.clone();
                let replica = &mut target.replica;
                replica
                    .redigest(self.id, root, self.geometry, stamp)
                    .map(|()| id)
            }
            Finding::New => {
                self.let_go_of_old_point(target)?;
                let stamp = self.stamp.clone();
                let replica = &mut target.replica;
                replica
                    .adopt(self.id, root, self.geometry, stamp, unix_seconds())
                    .map(|()| self.id)
            }
        };
        let id = id.map_err(|e| Error::log("record the sync point", e))?;
        Ok(self.receipt(target, choice, None, root, id, SessionTotals::default(), 0))
    }

    fn finding(&self, target: &Target, root: Root) -> Result<Finding> {
        let Some(point) = target.replica.point() else {
            return Ok(Finding::New);
        };
        let same_geometry = point.geometry == self.geometry;
        if same_geometry && point.root == root {
            return Ok(Finding::Known(point.id));
        }
        let same_size = point.geometry.image_bytes() == self.geometry.image_bytes();
        if !same_geometry && same_size && target.is_unwritten()? {
            return Ok(Finding::OtherBlocks(point.id));
        }
        Ok(Finding::New)
    }

    fn refresh(
        &self,
        target: &mut Target,
        recorded: Recorded,
    ) -> blockferry_transfer_log::Result<()> {
        if recorded.is_written {
            target.replica.replace_manifest(self.id)?;
        }
        target.replica.refresh(self.stamp.clone())
    }

    /// A new point without a session cannot keep what an earlier session holds: nobody knows whether the target
    /// is still what that session made of it, and pre-images would tear anything else.
    fn let_go_of_old_point(&mut self, target: &Target) -> Result<()> {
        if target.replica.retained().is_none() {
            return Ok(());
        }
        self.warn(
            "old_point_dropped",
            "the old point that was kept is let go, there is no way back to it: the target equals the source, but \
             is not provably what its last sync made of it"
                .to_owned(),
        )
    }
}

/// What a target that equals the source is, by its state.
enum Finding {
    /// Its recorded point.
    Known(SessionId),
    /// Its recorded point, in blocks of another size.
    OtherBlocks(SessionId),
    /// A point nothing is recorded of.
    New,
}
