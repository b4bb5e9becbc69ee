//! What else is done with a target: cancel, roll back, accept, recover, predict, verify.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blockferry_core::Geometry;
use blockferry_device::{BlockSource, FromMedium, OsDirectory, StorageDir, StorageFile};
use blockferry_pipeline::Phase;
use blockferry_transfer_log::{Place, Recovered, Unwritten, inspect};

use crate::clone_probe::shares_blocks;
use crate::compare::scan_leaves;
use crate::data_blocks::DataBlocks;
use crate::error::{Error, ErrorKind, Result};
use crate::options::{Context, Mode, SyncOptions};
use crate::plan::{Situation, choose};
use crate::receipt::{Outcome, Prediction, Receipt};
use crate::recorder::Cursor;
use crate::sample::{Sample, round};
use crate::status::VerifyReport;
use crate::sync::random_id;
use crate::target::{Target, TargetOptions, open_place, place_of};

/// Drops what is staged; the target was never touched, so it stays at its old point.
///
/// # Errors
/// The state could not be changed; opening the target again finishes.
pub fn cancel(target: &mut Target, context: &Context) -> Result<Outcome> {
    let start = context.clock.now();
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

/// Returns the target to the point before its last sync.
///
/// # Errors
/// There is no old point, or the target was written since.
pub fn rollback(target: &mut Target, context: &Context) -> Result<Outcome> {
    let start = context.clock.now();
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

/// Lets the old point go and frees what held it.
///
/// # Errors
/// The state could not be changed; opening the target again finishes.
pub fn accept(target: &mut Target, context: &Context) -> Result<Outcome> {
    let start = context.clock.now();
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

/// What a sync would do, from a sample; writes nothing at all.
///
/// # Errors
/// Either side is refused or cannot be read.
pub fn predict(
    source: &Arc<dyn BlockSource>,
    path: &Path,
    target_options: &TargetOptions,
    options: &SyncOptions,
    context: &Context,
) -> Result<Prediction> {
    let opened = open_place(path)?;
    let place = place_of(&opened)?;
    let geometry = Geometry::new(source.size_bytes(), options.block_size);
    let state_path = target_options.state_path(path);
    let state_dir = existing_parent(&state_path)?;
    let inspection = match OsDirectory::open(&state_path) {
        Ok(dir) => inspect(&place, &dir).map_err(|e| Error::log("look at the state", e))?,
        Err(_absent) => None,
    };
    let file = file_of(&place)?;
    let device: Option<Arc<dyn BlockSource>> = match &place {
        Place::Device(device) => Some(Arc::clone(device) as _),
        _ => file.clone().map(|f| f.into_target() as _),
    };
    let sides: Vec<&dyn BlockSource> = device.as_deref().into_iter().chain([&**source]).collect();
    let data = DataBlocks::of(&sides, &geometry);
    let sample = Sample::take(&**source, device.as_deref(), &geometry, &data, 0, context)?;
    let free = |dir: &dyn StorageDir| {
        dir.available_bytes()
            .map_err(|e| Error::target("ask for free space", e))
    };
    let target_dir = match &place {
        Place::File { dir, .. } => Some(dir),
        _ => None,
    };
    let found = Situation {
        target_present: device.is_some(),
        // Trying it would write: a file system that exchanges no names is found by the run itself.
        can_replace: target_dir.is_some(),
        can_clone: options.strategy.is_none()
            && !options.in_place
            && target_dir.is_some_and(|d| d.may_clone())
            && file.as_ref().is_some_and(|f| shares_blocks(&**f)),
        target_known: inspection.is_some_and(|i| i.evidence.proves_same(&i.recorded_evidence)),
        state_free_bytes: free(&state_dir)?,
        target_free_bytes: match target_dir {
            Some(dir) => free(&**dir)?,
            None => 0,
        },
    };
    let choice = choose(options, found, &sample);
    let delta_seconds =
        sample.delta_seconds(options.threads(), choice.strategy, found.target_known);
    let full_seconds = sample.full_seconds(options.threads());
    Ok(Prediction {
        mode: choice.mode,
        strategy: Some(choice.strategy),
        reason: choice.reason.clone(),
        source_bytes: geometry.image_bytes(),
        data_bytes: round(sample.data_bytes()),
        predicted_changed_bytes: round(sample.changed_bytes()),
        delta_seconds,
        full_seconds,
        predicted_seconds: if choice.mode == Mode::Full {
            full_seconds
        } else {
            delta_seconds
        },
        required_bytes: choice.required_bytes,
        available_bytes: choice.available_bytes,
        fits: choice.fits(),
        sampled_blocks: sample.blocks,
    })
}

fn existing_parent(path: &Path) -> Result<OsDirectory> {
    let existing = path
        .ancestors()
        .find(|p| p.is_dir())
        .unwrap_or(Path::new("."));
    OsDirectory::open(existing)
        .map_err(|e| Error::target(format!("open {}", existing.display()), e))
}

fn file_of(place: &Place) -> Result<Option<Arc<dyn StorageFile>>> {
    let Place::File { dir, name } = place else {
        return Ok(None);
    };
    dir.open(name)
        .map_err(|e| Error::target("open the target", e))
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
