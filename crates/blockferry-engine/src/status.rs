//! Status: where a target stands and what can be done next; and the reports of reading verbs.

use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use blockferry_device::{ErrorKind as DeviceErrorKind, MemoryDevice, OsDirectory};
use blockferry_transfer_log::{
    DecisionKind, Inspection, LOCK_NAME, Place, Point, Strategy, inspect,
};
use serde::Serialize;

use crate::address::DiskAddress;
use crate::error::{Error, ErrorKind, Result};
use crate::options::Mode;
use crate::target::TargetOptions;

/// Where a target stands.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Status {
    /// The target.
    pub target: String,
    /// `unknown`, `at`, `staging`, `prepared`, `committed`, `applied`, `rolling_back` or `incomplete`.
    pub state: String,
    /// Another process is working on it.
    pub running: bool,
    /// The point it is at, if a known one.
    pub point: Option<PointStatus>,
    /// The unfinished session.
    pub session: Option<SessionStatus>,
    /// The point it can be returned to.
    pub rollback_point: Option<PointStatus>,
    /// The point that a job keeps, however many syncs follow, until it is decided.
    pub anchored_point: Option<PointStatus>,
    /// Whether an old point is kept, known by name or not.
    pub rollback_available: bool,
    /// Bytes held beside the target.
    pub held_bytes: u64,
    /// Whether the target is as its state says; nothing if that cannot be told.
    pub target_unwritten: Option<bool>,
    /// What can be done next.
    pub next: Vec<NextStep>,
}

/// A point, for people and programs.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct PointStatus {
    /// Its id.
    pub id: String,
    /// Its root.
    pub root: String,
    /// Its size.
    pub bytes: u64,
    /// Seconds since 1970.
    pub created_unix: u64,
    /// Seconds since then, by this host's clock.
    pub age_seconds: u64,
    /// The source it came from.
    pub source: String,
}

/// An unfinished session.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct SessionStatus {
    /// Its id.
    pub id: String,
    /// Its mode.
    pub mode: Mode,
    /// Its strategy.
    #[serde(serialize_with = "strategy_name")]
    pub strategy: Strategy,
    /// Its source.
    pub source: String,
    /// Records that are durable.
    pub durable_records: u64,
    /// Bytes its log holds.
    pub durable_bytes: u64,
    /// Seconds since 1970.
    pub started_unix: u64,
}

fn strategy_name<S: serde::Serializer>(
    strategy: &Strategy,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(strategy)
}

/// Something that can be done next.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct NextStep {
    /// The verb and its arguments.
    pub command: String,
    /// What it does.
    pub effect: String,
}

/// What a comparison of two devices found.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Comparison {
    /// Nothing differs.
    pub equal: bool,
    /// Bytes of pages that differ; what only one of them has counts.
    pub different_bytes: u64,
    /// Bytes that both have.
    pub compared_bytes: u64,
    /// Size of the first.
    pub size_a: u64,
    /// Size of the second.
    pub size_b: u64,
    /// Time taken.
    pub elapsed_seconds: f64,
}

/// The digest of a device.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct DigestReport {
    /// Its root.
    pub root: String,
    /// Its size.
    pub image_bytes: u64,
    /// Bytes of blocks that are not zero.
    pub data_bytes: u64,
    /// The rest.
    pub zero_bytes: u64,
    /// Unit of digests.
    pub block_size: u64,
    /// Time taken.
    pub elapsed_seconds: f64,
}

/// What a check of a target against its recorded point found.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct VerifyReport {
    /// The target.
    pub target: String,
    /// Every byte is as recorded.
    pub matches: bool,
    /// Somebody wrote the target since its last sync: a mismatch is then no corruption of ours.
    pub written_since: bool,
    /// The recorded root.
    pub expected_root: String,
    /// The root of what was read.
    pub found_root: String,
    /// Bytes of blocks that differ, as far as the saved manifest tells.
    pub different_bytes: u64,
    /// Blocks that differ: start and length in bytes.
    pub different_extents: Vec<(u64, u64)>,
    /// Time taken.
    pub elapsed_seconds: f64,
}

/// Looks at a target without locking, recovering or changing anything.
///
/// # Errors
/// The target's directory or its state cannot be read.
pub fn status(address: impl Into<DiskAddress>, options: &TargetOptions) -> Result<Status> {
    let address = address.into();
    let place = place_at(&address)?;
    let state_path = options.state_path(&address);
    let dir = match OsDirectory::open(&state_path) {
        Ok(dir) => dir,
        Err(error) if error.kind() == DeviceErrorKind::NotFound => return Ok(unknown(&address)),
        Err(error) => return Err(Error::target("open the state directory", error)),
    };
    let failed = |e| Error::log(format!("look at the state of {address}"), e);
    let Some(found) = inspect(&place, &dir).map_err(failed)? else {
        return Ok(unknown(&address));
    };
    // The lock is free exactly if no process works on the target.
    let running = dir
        .is_locked(LOCK_NAME)
        .map_err(|e| Error::target("look at the state directory", e))?;
    Ok(describe(&address, &found, running))
}

/// The source address that the unfinished session recorded.
///
/// # Errors
/// There is no unfinished session.
pub fn resume_source(address: impl Into<DiskAddress>, options: &TargetOptions) -> Result<String> {
    let address = address.into();
    let place = place_at(&address)?;
    let none = || {
        Error::new(
            ErrorKind::Usage,
            format!("{address}: no session is unfinished"),
        )
    };
    let Ok(dir) = OsDirectory::open(&options.state_path(&address)) else {
        return Err(none());
    };
    let found = inspect(&place, &dir).map_err(|e| Error::log("look at the state", e))?;
    let session = found.and_then(|f| f.unfinished).ok_or_else(none)?;
    Ok(session.header.source.address)
}

/// The place, opened without locks: for looking only.
fn place_at(address: &DiskAddress) -> Result<Place> {
    use std::os::unix::fs::FileTypeExt;
    let DiskAddress::Path(path) = address else {
        // It would say nothing of who wrote it: only the state is looked at, also while nobody serves it.
        let nothing = MemoryDevice::zeroed(address.to_string(), 0);
        return Ok(Place::Device(Arc::new(nothing)));
    };
    if std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device()) {
        let device = blockferry_device::OsBlockDevice::open(path, blockferry_device::Access::Read)
            .map_err(|e| Error::target(format!("look at {}", path.display()), e))?;
        return Ok(Place::Device(Arc::new(device)));
    }
    let parent = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let dir = OsDirectory::open(parent)
        .map_err(|e| Error::target(format!("open {}", parent.display()), e))?;
    let name = path.file_name().unwrap_or_default().to_str();
    let name = name.ok_or_else(|| {
        let reason = "expected a path that ends in a file name in UTF-8";
        Error::new(
            ErrorKind::Target,
            format!("target {}: {reason}", path.display()),
        )
    })?;
    Ok(Place::File {
        dir: Arc::new(dir),
        name: name.to_owned(),
    })
}

fn unknown(address: &DiskAddress) -> Status {
    Status {
        target: address.to_string(),
        state: "unknown".to_owned(),
        running: false,
        point: None,
        session: None,
        rollback_point: None,
        anchored_point: None,
        rollback_available: false,
        held_bytes: 0,
        target_unwritten: None,
        next: vec![step(
            format!("sync SOURCE {address}"),
            "bring it up to date",
        )],
    }
}

fn describe(address: &DiskAddress, found: &Inspection, running: bool) -> Status {
    let decision = found.unfinished.as_ref().map(|s| s.decision);
    let state = match decision {
        Some(None) => "staging",
        Some(Some(DecisionKind::GiveUp)) => "incomplete",
        Some(Some(DecisionKind::Prepared)) => "prepared",
        Some(Some(DecisionKind::Rollback | DecisionKind::RolledBack)) => "rolling_back",
        Some(Some(_)) => "committed",
        None if found.retained.is_some() => "applied",
        None if found.point.is_some() => "at",
        None => "unknown",
    };
    let known = found.recorded_evidence.is_known() && found.evidence.is_known();
    let unwritten = known.then(|| found.evidence.proves_same(&found.recorded_evidence));
    let target = address.to_string();
    Status {
        state: state.to_owned(),
        running,
        point: found.point.as_ref().map(point_status),
        session: found.unfinished.as_ref().map(|s| SessionStatus {
            id: s.header.session.to_string(),
            mode: Mode::from_code(s.header.mode),
            strategy: s.header.strategy,
            source: s.header.source.address.clone(),
            durable_records: s.records,
            durable_bytes: s.log_bytes,
            started_unix: s.header.started_unix,
        }),
        rollback_point: found
            .retained
            .as_ref()
            .and_then(|r| r.point.as_ref())
            .map(point_status),
        anchored_point: found.anchored.as_ref().map(point_status),
        rollback_available: found.retained.is_some(),
        held_bytes: found.held_bytes,
        target_unwritten: unwritten.filter(|_| found.point.is_some()),
        next: next_steps(state, &target, running, unwritten),
        target,
    }
}

pub(crate) fn point_status(point: &Point) -> PointStatus {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    PointStatus {
        id: point.id.to_string(),
        root: point.root.to_string(),
        bytes: point.geometry.image_bytes(),
        created_unix: point.made_unix,
        age_seconds: now.saturating_sub(point.made_unix),
        source: point.source.address.clone(),
    }
}

fn next_steps(state: &str, target: &str, running: bool, unwritten: Option<bool>) -> Vec<NextStep> {
    if running {
        return Vec::new();
    }
    let resume = |effect| step(format!("resume {target}"), effect);
    match state {
        "staging" => vec![
            resume("go on; nothing durable is staged again"),
            step(
                format!("cancel {target}"),
                "drop what is staged; the target is at its old point",
            ),
        ],
        "incomplete" => vec![resume("go on; the old content was given up")],
        "prepared" => vec![resume("carry out what the group decided")],
        "committed" => vec![resume(
            "finish: the new point is committed, not yet applied",
        )],
        "rolling_back" => vec![step(
            format!("rollback {target}"),
            "finish returning to the old point",
        )],
        "applied" if unwritten == Some(false) => {
            vec![step(
                format!("accept {target}"),
                "let go of the old point; the target was written since",
            )]
        }
        "applied" => vec![
            step(format!("rollback {target}"), "return to the old point"),
            step(
                format!("accept {target}"),
                "let go of the old point and free its space",
            ),
        ],
        _ => vec![step(format!("sync SOURCE {target}"), "bring it up to date")],
    }
}

fn step(command: String, effect: &str) -> NextStep {
    NextStep {
        command,
        effect: effect.to_owned(),
    }
}
