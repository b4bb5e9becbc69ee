//! What else is done with a target: cancel, roll back, accept, recover, verify.

use std::sync::Arc;
use std::time::Duration;

use blockferry_device::{BlockSource, FromMedium};
use blockferry_pipeline::Phase;
use blockferry_transfer_log::{Recovered, Unwritten};

use crate::compare::scan_leaves;
use crate::error::{Error, ErrorKind, Result};
use crate::fence;
use crate::options::Context;
use crate::receipt::{Outcome, Receipt};
use crate::recorder::Cursor;
use crate::status::VerifyReport;
use crate::sync::random_id;
use crate::target::Target;

/// Drops what is staged; the target was never touched, so it stays at its old point.
///
/// # Errors
/// The state could not be changed; opening the target again finishes.
pub fn cancel(target: &mut Target, context: &Context) -> Result<Outcome> {
    let start = context.clock.now();
    take(target)?;
    let unfinished = target.replica.unfinished().map(|h| h.session);
    let freed = target
        .replica
        .cancel()
        .map_err(|e| Error::log("drop what is staged", e))?;
    let (outcome, message) = match unfinished {
        Some(session) => (
            "cancelled",
            format!("session {session} is dropped; the target is at its old point"),
        ),
        None => ("nothing_to_do", "no session is unfinished".to_owned()),
    };
    Ok(outcome_of(target, context, start, outcome, freed, message))
}

/// Returns the target to the point before its last sync. One that has no evidence that nobody wrote it since, or whose
/// evidence was lost, is read first, and has to be exactly at its point.
///
/// # Errors
/// There is no old point, or the target was written since.
pub fn rollback(target: &mut Target, context: &Context) -> Result<Outcome> {
    let start = context.clock.now();
    take(target)?;
    confirm(target, context)?;
    context.progress(Phase::RollingBack, 0, 1, 0);
    target
        .replica
        .rollback(&|done, total| context.progress(Phase::RollingBack, done, total, 0))
        .map_err(|e| Error::log(format!("roll back {}", target.label()), e))?;
    let message = "the target is at its old point again, read back from its medium".to_owned();
    Ok(outcome_of(
        target,
        context,
        start,
        "rolled_back",
        0,
        message,
    ))
}

/// Reads what evidence does not tell.
fn confirm(target: &mut Target, context: &Context) -> Result<()> {
    let replica = &target.replica;
    let has_way_back = replica.retained().is_some() && replica.unfinished().is_none();
    let point = replica.point().filter(|_| has_way_back);
    let Some(point) = point.map(|point| point.id) else {
        return Ok(());
    };
    if !target.is_unwritten()? && verify_target(target, context)?.matches {
        target.replica.confirm(point);
    }
    Ok(())
}

/// Lets the old point go and frees what held it.
///
/// # Errors
/// The state could not be changed; opening the target again finishes.
pub fn accept(target: &mut Target, context: &Context) -> Result<Outcome> {
    let start = context.clock.now();
    take(target)?;
    context.progress(Phase::Accepting, 0, 1, 0);
    let held = target.replica.retained().is_some();
    let freed = target
        .replica
        .accept()
        .map_err(|e| Error::log(format!("accept the point of {}", target.label()), e))?;
    let (outcome, message) = if held {
        (
            "accepted",
            "the old point is gone; the target keeps its present one".to_owned(),
        )
    } else {
        ("nothing_to_do", "no old point is kept".to_owned())
    };
    Ok(outcome_of(target, context, start, outcome, freed, message))
}

/// Says what opening the target finished: a decision that was durable but not carried out.
///
/// # Errors
/// None today; opening the target did the work.
pub fn recover(target: &mut Target, context: &Context) -> Result<Outcome> {
    let start = context.clock.now();
    let (outcome, message) = match target.recovered() {
        Recovered::Applied(session) => (
            "applied",
            format!("session {session} was committed and is applied now"),
        ),
        Recovered::RolledBack(session) => (
            "rolled_back",
            format!("the roll back of session {session} is finished"),
        ),
        _ => ("nothing_to_do", "no decision was waiting".to_owned()),
    };
    Ok(outcome_of(target, context, start, outcome, 0, message))
}

/// A run that lost its connection does not go on over what is decided here.
fn take(target: &Target) -> Result<()> {
    fence::take(&**target.replica.state_dir(), None, &target.label()).map(|_found| ())
}

fn outcome_of(
    target: &Target,
    context: &Context,
    start: Duration,
    outcome: &'static str,
    freed_bytes: u64,
    message: String,
) -> Outcome {
    Outcome {
        outcome,
        target: target.label(),
        point: target.replica.point().map(|p| p.id.to_string()),
        freed_bytes,
        elapsed_seconds: context.clock.now().saturating_sub(start).as_secs_f64(),
        message,
    }
}

/// Checks a target against its recorded point: every block is read from the medium and compared with the manifest.
///
/// # Errors
/// There is no recorded point, or the target cannot be read. A mismatch is not an error: see the report.
pub fn verify_target(target: &mut Target, context: &Context) -> Result<VerifyReport> {
    let start = context.clock.now();
    let replica = &target.replica;
    let (Some(point), Some(device)) = (replica.point(), replica.target()) else {
        return Err(Error::new(
            ErrorKind::Target,
            format!("{} has no recorded point to verify against", target.label()),
        ));
    };
    let written = replica
        .unwritten()
        .map_err(|e| Error::log("examine the target", e))?
        == Unwritten::Written;
    let manifest = replica.manifest_source(point).open();
    let mut expected = manifest
        .and_then(|m| blockferry_core::ManifestReader::open(m).ok())
        .map(Cursor::new);
    let mut different = Vec::new();
    let geometry = point.geometry;
    let source: Arc<dyn BlockSource> = Arc::new(FromMedium::new(device));
    let root = scan_leaves(&source, geometry, context, &mut |leaves| {
        let Some(known) = expected.as_mut() else {
            return Ok(());
        };
        let known = known
            .leaves(leaves.region())
            .map_err(|e| Error::because(ErrorKind::Corruption, "read the saved manifest", e))?;
        let blocks = leaves.differing(&known);
        different
            .extend(blocks.map(|b| blockferry_pipeline::block_in(&geometry, leaves.region(), b)));
        Ok(())
    })?;
    let larger = source.size_bytes() != geometry.image_bytes() && replica.is_file();
    Ok(VerifyReport {
        target: target.label(),
        matches: root == point.root && !larger,
        written_since: written,
        expected_root: point.root.to_string(),
        found_root: root.to_string(),
        different_bytes: different.iter().map(|e| e.length()).sum(),
        different_extents: different.iter().map(|e| (e.start(), e.length())).collect(),
        elapsed_seconds: context.clock.now().saturating_sub(start).as_secs_f64(),
    })
}

impl Target {
    /// Leaves the receipt of the last sync beside the state. Best effort: the state is what counts.
    pub(crate) fn leave_receipt(&self, receipt: &Receipt) {
        let Some(dir) = self
            .state_path
            .as_ref()
            .filter(|_| receipt.outcome == "applied")
        else {
            return;
        };
        if let Ok(text) = serde_json::to_string_pretty(receipt) {
            let _best_effort = std::fs::write(dir.join("receipt.json"), text + "\n");
        }
    }

    /// An id for a run of the caller's own.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn random_id() -> Result<blockferry_transfer_log::SessionId> {
        random_id()
    }
}
