//! Publishing: decisions of a replica, and the slots that follow from them.

use blockferry_core::{Geometry, Root};
use blockferry_device::Evidence;

use super::{Replica, Unwritten};
use crate::error::{Error, Result};
use crate::format::{
    Decision, DecisionKind, Point, Retained, SegmentHeader, SessionId, Slot, SourceStamp,
};

impl Replica {
    /// Records other digests of the current point, from a manifest that was created for `written_as`: blocks of
    /// another size, the same content. The point keeps its id, and with it the way back to the one before.
    ///
    /// # Errors
    /// The target is not provably at its point, or the image has another size; or the state could not be written.
    pub fn redigest(
        &mut self,
        written_as: SessionId,
        root: Root,
        geometry: Geometry,
        source: SourceStamp,
    ) -> Result<()> {
        // Pre-images restore only what nobody wrote since: a new proof must not stand in for one that is lost.
        let unwritten = self.unwritten()? == Unwritten::Proven;
        let same_size = |p: &Point| p.geometry.image_bytes() == geometry.image_bytes();
        let Some(point) = self.point().filter(|p| unwritten && same_size(p)).cloned() else {
            return Err(Error::refused(format!(
                "{} is not provably at its point: that cannot be digested anew",
                self.label()
            )));
        };
        // The manifest first: one of another geometry than its point's is never believed, and compared anew.
        self.replace_manifest(written_as)?;
        let slot = self.state.slot().clone();
        self.state.publish(Slot {
            point: Some(Point {
                root,
                geometry,
                source,
                ..point
            }),
            ..slot
        })
    }

    /// Makes a decision of this session durable; it binds what the decision before bound.
    pub(crate) fn decide_for(&mut self, header: &SegmentHeader, kind: DecisionKind) -> Result<()> {
        self.decide_outcome(header, kind, Evidence::unknown())
    }

    pub(super) fn decide_outcome(
        &mut self,
        header: &SegmentHeader,
        kind: DecisionKind,
        evidence: Evidence,
    ) -> Result<()> {
        let decision = Decision {
            evidence,
            ..self.next_decision(header, kind)
        };
        self.state.decide(&decision)
    }

    /// Publishes that the target is back at its old point.
    pub(crate) fn publish_rolled_back(&mut self, header: &SegmentHeader) -> Result<()> {
        let (point, retained) = self.rolled_back_point(header);
        self.publish(header, DecisionKind::RolledBack, point, retained)?;
        // The outcome is durable; what is left to remove is removed by the next open at the latest.
        self.remove_leftovers().ok();
        Ok(())
    }

    /// The point a rolled back session leaves the target at, and what is still kept: if it was never published,
    /// the old point with the way back it had.
    pub(super) fn rolled_back_point(
        &self,
        header: &SegmentHeader,
    ) -> (Option<Point>, Option<Retained>) {
        let slot = self.state.slot();
        let never_left = header.base.is_some() && slot.point.as_ref().map(|p| p.id) == header.base;
        if never_left {
            return (slot.point.clone(), slot.retained.clone());
        }
        (self.point_before(header), None)
    }

    /// Makes an outcome of what we just wrote to the target, and the slot that follows from it, durable with one flush.
    pub(crate) fn publish(
        &mut self,
        header: &SegmentHeader,
        kind: DecisionKind,
        point: Option<Point>,
        retained: Option<Retained>,
    ) -> Result<()> {
        let evidence = self.content.evidence()?;
        self.publish_with(header, kind, point, retained, evidence)
    }

    pub(super) fn publish_with(
        &mut self,
        header: &SegmentHeader,
        kind: DecisionKind,
        point: Option<Point>,
        retained: Option<Retained>,
        evidence: Evidence,
    ) -> Result<()> {
        let decision = Decision {
            evidence: evidence.clone(),
            ..self.next_decision(header, kind)
        };
        let slot = Slot {
            epoch: header.epoch,
            evidence,
            point,
            retained,
            ..self.state.slot().clone()
        };
        self.state.decide_and_publish(&decision, slot)
    }

    /// Publishes a slot after something that we did to a target which nobody else had written.
    pub(crate) fn publish_slot(&mut self, slot: Slot) -> Result<()> {
        let evidence = self.content.evidence()?;
        self.state.publish(Slot { evidence, ..slot })
    }

    pub(super) fn next_decision(&self, header: &SegmentHeader, kind: DecisionKind) -> Decision {
        let zero = blockferry_core::Digest::from_bytes([0; 32]);
        let last = self.state.last_decision(header.session);
        Decision {
            session: header.session,
            epoch: header.epoch,
            ordinal: self.state.next_ordinal(header.session),
            kind,
            records: last.map_or(0, |d| d.records),
            chain: last.map_or(zero, |d| d.chain),
            root: last.map_or(zero, |d| d.root),
            group: last.map_or([0; 16], |d| d.group),
            evidence: Evidence::unknown(),
        }
    }

    /// The point a session builds on, if it was a known one.
    pub(crate) fn point_before(&self, header: &SegmentHeader) -> Option<Point> {
        let slot = self.state.slot();
        let current = slot.point.as_ref().filter(|p| Some(p.id) == header.base);
        let retained = slot.retained.as_ref().and_then(|r| r.point.as_ref());
        current
            .or(retained.filter(|p| Some(p.id) == header.base))
            .cloned()
    }

    pub(super) fn names(&self, session: SessionId) -> bool {
        self.point().is_some_and(|p| p.id == session)
    }
}
