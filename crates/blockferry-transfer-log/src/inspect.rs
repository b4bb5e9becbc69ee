//! A look at a replica that takes no lock, recovers nothing and changes nothing: for `status`.

use blockferry_device::{Evidence, StorageDir};

use crate::anchor;
use crate::error::Result;
use crate::format::{DecisionKind, Point, Retained, SegmentHeader};
use crate::log::{ScanDurability, scan};
use crate::place::Place;
use crate::replica::{held_bytes, sessions_in};
use crate::state::StateView;
use crate::stats::Stats;

/// An unfinished session, as its log shows it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct UnfinishedSession {
    /// Its header.
    pub header: SegmentHeader,
    /// The last decision made about it.
    pub decision: Option<DecisionKind>,
    /// Records up to the last chained one.
    pub records: u64,
    /// Bytes its log holds.
    pub log_bytes: u64,
}

/// What the state directory says.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Inspection {
    /// The point the target is at, if a known one.
    pub point: Option<Point>,
    /// What is kept of the point before.
    pub retained: Option<Retained>,
    /// The point that an anchor keeps, through however many syncs.
    pub anchored: Option<Point>,
    /// The unfinished session.
    pub unfinished: Option<UnfinishedSession>,
    /// The target's evidence when the state was written, and now.
    pub recorded_evidence: Evidence,
    /// The target's evidence now.
    pub evidence: Evidence,
    /// Whether the target is there.
    pub target_present: bool,
    /// Bytes held beside the target.
    pub held_bytes: u64,
}

/// Looks at a replica. `None` if there is no state.
///
/// # Errors
/// The state is damaged or cannot be read.
pub fn inspect(place: &Place, dir: &dyn StorageDir) -> Result<Option<Inspection>> {
    let Some(view) = StateView::read(dir)? else {
        return Ok(None);
    };
    let content = place.open()?;
    let mut unfinished = None;
    let mut retained = view.slot.retained.clone();
    for (session, segments) in sessions_in(dir)? {
        let decision = view.last_kind(session);
        let names = view.slot.point.as_ref().is_some_and(|p| p.id == session);
        if decision == Some(DecisionKind::Retired) {
            // Decided, although the slot may not have followed yet.
            retained = retained.filter(|_| !names);
            continue;
        }
        // At rest: not worth reading its log.
        if decision == Some(DecisionKind::Applied) && names {
            continue;
        }
        let found = scan(
            dir,
            session,
            &segments,
            ScanDurability::LookOnly,
            &Stats::default(),
        )?;
        // An outcome whose slot was not written any more is carried out, but the next open has to record it.
        let live = found.ok().filter(|f| match decision {
            Some(DecisionKind::Rollback) => true,
            Some(DecisionKind::RolledBack) => names || f.header.epoch > view.slot.epoch,
            _ => f.header.epoch > view.slot.epoch,
        });
        if let Some(found) = live {
            unfinished = Some(UnfinishedSession {
                decision,
                records: found.next_sequence.saturating_sub(1),
                log_bytes: found.held_bytes,
                header: found.header,
            });
        }
    }
    Ok(Some(Inspection {
        anchored: anchor::look(dir)?,
        unfinished,
        recorded_evidence: view.slot.evidence,
        evidence: content.evidence()?,
        target_present: content.target().is_some(),
        held_bytes: held_bytes(dir, place)?,
        point: view.slot.point,
        retained,
    }))
}
