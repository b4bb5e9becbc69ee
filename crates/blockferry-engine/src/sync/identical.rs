//! Nothing to write: both sides are provably at their common point, or the scan found no difference. The target is
//! not touched; its sync point is recorded.

use blockferry_transfer_log::{SessionTotals, Strategy, Unwritten};

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
        Ok(self.source_is_at_point(target) && self.target_is_proven(target)?)
    }

    pub(super) fn source_is_at_point(&self, target: &Target) -> bool {
        target.replica.point().is_some_and(|p| {
            p.geometry == self.geometry
                && p.source.evidence.proves_same(&self.stamp.evidence)
                && p.source.identity.proves_same(&self.stamp.identity)
        })
    }

    pub(super) fn target_is_proven(&self, target: &Target) -> Result<bool> {
        let unwritten = target
            .replica
            .unwritten()
            .map_err(|e| Error::log("examine the target", e))?;
        Ok(unwritten == Unwritten::Proven)
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
        self,
        target: &mut Target,
        choice: &Choice,
        recorded: Recorded,
    ) -> Result<Receipt> {
        let root = recorded.root;
        let known = target
            .replica
            .point()
            .filter(|p| p.root == root && p.geometry == self.geometry)
            .map(|p| p.id);
        let replica = &mut target.replica;
        let adopted = match known {
            Some(id) => {
                let replaced = if recorded.is_written {
                    replica.replace_manifest(self.id)
                } else {
                    Ok(())
                };
                replaced
                    .and_then(|()| replica.refresh(self.stamp.clone()))
                    .map(|()| id)
            }
            None => {
                let stamp = self.stamp.clone();
                replica
                    .adopt(self.id, root, self.geometry, stamp, unix_seconds())
                    .map(|()| self.id)
            }
        };
        let id = adopted.map_err(|e| Error::log("record the sync point", e))?;
        Ok(self.receipt(target, choice, None, root, id, SessionTotals::default(), 0))
    }
}
