//! What a sync would do, from a sample. Nothing at all is written.

use std::path::Path;
use std::sync::Arc;

use blockferry_core::Geometry;
use blockferry_device::{BlockSource, OsDirectory, StorageDir, StorageFile};
use blockferry_transfer_log::{Place, inspect};
use blockferry_transport::Connection;

use crate::address::DiskAddress;
use crate::clone_probe::shares_blocks;
use crate::data_blocks::DataBlocks;
use crate::error::{Error, Result};
use crate::options::{Context, Mode, SyncOptions};
use crate::plan::{Choice, Situation, check_strategy, choose, choose_remote};
use crate::receipt::Prediction;
use crate::remote::Peer;
use crate::sample::{Sample, round};
use crate::target::{TargetOptions, open_place};

/// What a sync would do, from a sample; writes nothing at all.
///
/// # Errors
/// Either side is refused or cannot be read.
pub fn predict(
    source: &Arc<dyn BlockSource>,
    address: impl Into<DiskAddress>,
    target_options: &TargetOptions,
    options: &SyncOptions,
    context: &Context,
) -> Result<Prediction> {
    let target = Prospect::of(&address.into(), target_options, options)?;
    let geometry = Geometry::new(source.size_bytes(), options.block_size);
    let device = target.device.as_deref();
    let sides: Vec<&dyn BlockSource> = device.into_iter().chain([&**source]).collect();
    let data = DataBlocks::of(&sides, &geometry);
    let sample = Sample::take(&**source, device, &geometry, &data, 0, context)?;
    let choice = choose(options, target.found, &sample);
    Ok(prediction(&geometry, options, &target, &sample, choice))
}

/// As [`predict`], of a source on the other side of `connection`, where [`serve_source`](crate::serve_source) runs. Which is
/// told what came of it, as JSON. Data that only the target holds is not in the sample.
///
/// # Errors
/// Either side is refused or cannot be read, or the connection failed.
pub fn predict_from_peer(
    connection: Connection,
    address: impl Into<DiskAddress>,
    target_options: &TargetOptions,
    options: &SyncOptions,
    context: &Context,
) -> Result<Prediction> {
    let peer = Peer::new(connection);
    let outcome = of_peer(&peer, &address.into(), target_options, options, context);
    peer.finish(outcome.as_ref().map(Prediction::to_json));
    outcome
}

fn of_peer(
    peer: &Peer,
    address: &DiskAddress,
    target_options: &TargetOptions,
    options: &SyncOptions,
    context: &Context,
) -> Result<Prediction> {
    let target = Prospect::of(address, target_options, options)?;
    let geometry = Geometry::new(peer.examine()?.size_bytes, options.block_size);
    let sample = peer.sample(&geometry, target.device.as_deref(), 0, context)?;
    let choice = choose_remote(options, target.found, Some(&sample));
    Ok(prediction(&geometry, options, &target, &sample, choice))
}

/// A target, looked at without touching it.
struct Prospect {
    device: Option<Arc<dyn BlockSource>>,
    found: Situation,
}

impl Prospect {
    fn of(
        address: &DiskAddress,
        target_options: &TargetOptions,
        options: &SyncOptions,
    ) -> Result<Self> {
        let (place, _locks) = open_place(address, target_options)?;
        let state_path = target_options.state_path(address);
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
        check_strategy(options, found)?;
        Ok(Self { device, found })
    }
}

fn prediction(
    geometry: &Geometry,
    options: &SyncOptions,
    target: &Prospect,
    sample: &Sample,
    choice: Choice,
) -> Prediction {
    let target_known = target.found.target_known;
    let delta_seconds = sample.delta_seconds(options.threads(), choice.strategy, target_known);
    let full_seconds = sample.full_seconds(options.threads());
    let predicted_seconds = if choice.mode == Mode::Full {
        full_seconds
    } else {
        delta_seconds
    };
    Prediction {
        mode: choice.mode,
        strategy: Some(choice.strategy),
        source_bytes: geometry.image_bytes(),
        data_bytes: round(sample.data_bytes()),
        predicted_changed_bytes: round(sample.changed_bytes()),
        predicted_wire_bytes: sample.wire_bytes(choice.mode).map(round),
        delta_seconds,
        full_seconds,
        predicted_seconds,
        required_bytes: choice.required_bytes,
        available_bytes: choice.available_bytes,
        fits: choice.fits(),
        sampled_blocks: sample.blocks,
        reason: choice.reason,
    }
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
