//! Stand-in for the library while it is being written.
#![expect(dead_code, reason = "stand-in")]
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockSize(u64);
impl Default for BlockSize {
    fn default() -> Self {
        Self(65536)
    }
}
impl BlockSize {
    pub(crate) const DEFAULT: Self = Self(65536);
    pub(crate) fn bytes(self) -> u64 {
        self.0
    }
}
impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
impl std::str::FromStr for BlockSize {
    type Err = CoreError;
    fn from_str(text: &str) -> Result<Self, CoreError> {
        let bytes = parse_size(text)?;
        if bytes.is_power_of_two() && (4096..=1 << 20).contains(&bytes) {
            Ok(Self(bytes))
        } else {
            Err(CoreError("not a power of two from 4 KiB to 1 MiB".into()))
        }
    }
}
#[derive(Debug)]
pub(crate) struct CoreError(String);
impl fmt::Display for CoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for CoreError {}
pub(crate) fn parse_size(text: &str) -> Result<u64, CoreError> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let n: u64 = digits.parse().map_err(|_| CoreError("not a size".into()))?;
    let f = match &text[digits.len()..] {
        "" => 1,
        "K" | "KiB" => 1024,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        _ => return Err(CoreError("unit".into())),
    };
    Ok(n * f)
}
pub(crate) fn format_size(bytes: u64) -> String {
    format!("{bytes} B")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    start: u64,
    length: u64,
}
impl Extent {
    pub(crate) fn start(&self) -> u64 {
        self.start
    }
    pub(crate) fn length(&self) -> u64 {
        self.length
    }
}

pub(crate) trait BlockSource: fmt::Debug + Send + Sync {
    fn label(&self) -> &str;
    fn size_bytes(&self) -> u64;
}
#[derive(Debug)]
struct File;
impl BlockSource for File {
    fn label(&self) -> &str {
        "x"
    }
    fn size_bytes(&self) -> u64 {
        0
    }
}
#[derive(Clone, Debug, Default)]
pub(crate) struct SourceOptions {
    pub(crate) crash_consistent: bool,
}
pub(crate) fn open_source(
    _path: &Path,
    _options: SourceOptions,
) -> Result<Arc<dyn BlockSource>, DeviceError> {
    Ok(Arc::new(File))
}
#[derive(Debug)]
pub(crate) struct DeviceError(String);
impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for DeviceError {}

#[derive(Clone, Debug, Default)]
pub(crate) struct CancelToken(Arc<AtomicBool>);
impl CancelToken {
    pub(crate) fn new() -> Self {
        Self::default()
    }
    pub(crate) fn cancel(&self) {
        self.0.store(true, Ordering::SeqCst)
    }
    pub(crate) fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Phase {
    Recovering,
    Scanning,
}
impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("scanning")
    }
}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub(crate) struct Progress {
    pub(crate) phase: Phase,
    pub(crate) done_bytes: u64,
    pub(crate) total_bytes: u64,
    pub(crate) changed_bytes: u64,
}
impl Progress {
    pub(crate) fn new(phase: Phase, done_bytes: u64, total_bytes: u64, changed_bytes: u64) -> Self {
        Self {
            phase,
            done_bytes,
            total_bytes,
            changed_bytes,
        }
    }
}
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub(crate) enum Event {
    Progress(Progress),
    Decision(String),
    Warning { code: &'static str, message: String },
    Checkpoint { sequence: u64, durable_bytes: u64 },
}
pub(crate) trait Observer: Send + Sync {
    fn event(&self, event: &Event);
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mode {
    #[default]
    Auto,
    Delta,
    Full,
}
impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("auto")
    }
}
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Strategy {
    Clone,
    Shadow,
    Redo,
    Direct,
}
impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("redo")
    }
}
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Undo {
    #[default]
    Keep,
    None,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct SyncOptions {
    pub(crate) mode: Mode,
    pub(crate) block_size: BlockSize,
    pub(crate) undo: Undo,
    pub(crate) threads: Option<usize>,
    pub(crate) bwlimit_bytes_per_second: Option<u64>,
    pub(crate) log_limit_bytes: Option<u64>,
    pub(crate) allow_shrink: bool,
    pub(crate) in_place: bool,
    pub(crate) strict: bool,
    pub(crate) rescan: bool,
    pub(crate) strategy: Option<Strategy>,
    pub(crate) source_address: String,
}
pub(crate) struct Context {
    pub(crate) observer: Arc<dyn Observer>,
    pub(crate) cancel: CancelToken,
}
struct Silent;
impl Observer for Silent {
    fn event(&self, _: &Event) {}
}
impl Default for Context {
    fn default() -> Self {
        Self {
            observer: Arc::new(Silent),
            cancel: CancelToken::new(),
        }
    }
}
#[derive(Debug)]
pub(crate) struct Target;
#[derive(Clone, Debug)]
pub(crate) struct TargetOptions {
    pub(crate) state_dir: Option<PathBuf>,
    pub(crate) device_state_root: PathBuf,
}
impl TargetOptions {
    pub(crate) fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            state_dir: None,
            device_state_root: root.into(),
        }
    }
}
impl Target {
    pub(crate) fn open(_path: &Path, _options: &TargetOptions) -> Result<Self, Error> {
        Ok(Self)
    }
}
fn none<T>() -> Result<T, Error> {
    Err(Error)
}
pub(crate) fn sync(
    _s: Arc<dyn BlockSource>,
    _t: &mut Target,
    _o: &SyncOptions,
    _c: &Context,
) -> Result<Receipt, Error> {
    none()
}
pub(crate) fn predict(
    _s: Arc<dyn BlockSource>,
    _p: &Path,
    _t: &TargetOptions,
    _o: &SyncOptions,
    _c: &Context,
) -> Result<Prediction, Error> {
    none()
}
pub(crate) fn resume_source(_p: &Path, _t: &TargetOptions) -> Result<String, Error> {
    none()
}
pub(crate) fn cancel(_t: &mut Target, _c: &Context) -> Result<Outcome, Error> {
    none()
}
pub(crate) fn rollback(_t: &mut Target, _c: &Context) -> Result<Outcome, Error> {
    none()
}
pub(crate) fn accept(_t: &mut Target, _c: &Context) -> Result<Outcome, Error> {
    none()
}
pub(crate) fn status(_p: &Path, _t: &TargetOptions) -> Result<Status, Error> {
    none()
}
pub(crate) fn list_targets(_root: &Path) -> Vec<PathBuf> {
    Vec::new()
}
pub(crate) fn compare(
    _a: &dyn BlockSource,
    _b: &dyn BlockSource,
    _c: &Context,
    _f: &mut dyn FnMut(Extent),
) -> Result<Comparison, Error> {
    none()
}
pub(crate) fn digest(
    _s: &dyn BlockSource,
    _b: BlockSize,
    _c: &Context,
    _m: Option<&mut dyn std::io::Write>,
) -> Result<DigestReport, Error> {
    none()
}
pub(crate) fn verify_target(_t: &mut Target, _c: &Context) -> Result<VerifyReport, Error> {
    none()
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Receipt {
    pub(crate) version: u32,
    pub(crate) outcome: &'static str,
    pub(crate) mode: Mode,
    pub(crate) requested_mode: Mode,
    pub(crate) strategy: Option<Strategy>,
    pub(crate) reason: String,
    pub(crate) source: String,
    pub(crate) target: String,
    pub(crate) source_bytes: u64,
    pub(crate) scanned_bytes: u64,
    pub(crate) target_read_bytes: u64,
    pub(crate) changed_bytes: Option<u64>,
    pub(crate) sent_bytes: u64,
    pub(crate) staged_bytes: u64,
    pub(crate) resumed_bytes: u64,
    pub(crate) restaged_bytes: u64,
    pub(crate) log_bytes: u64,
    pub(crate) zero_bytes: u64,
    pub(crate) source_root: String,
    pub(crate) target_root: String,
    pub(crate) sync_point: String,
    pub(crate) previous_point: Option<String>,
    pub(crate) flushes: u64,
    pub(crate) records: u64,
    pub(crate) elapsed_seconds: f64,
    pub(crate) downtime_seconds: Option<f64>,
    pub(crate) fallbacks: Vec<String>,
    pub(crate) rollback_available: bool,
    pub(crate) phases: BTreeMap<String, f64>,
}
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Outcome {
    pub(crate) outcome: &'static str,
    pub(crate) target: String,
    pub(crate) point: Option<String>,
    pub(crate) freed_bytes: u64,
    pub(crate) elapsed_seconds: f64,
    pub(crate) message: String,
}
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Prediction {
    pub(crate) mode: Mode,
    pub(crate) strategy: Option<Strategy>,
    pub(crate) reason: String,
    pub(crate) predicted_changed_bytes: u64,
    pub(crate) predicted_log_bytes: u64,
    pub(crate) predicted_seconds: f64,
    pub(crate) required_bytes: u64,
    pub(crate) available_bytes: u64,
    pub(crate) fits: bool,
    pub(crate) sampled_blocks: u64,
}
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PointStatus {
    pub(crate) id: String,
    pub(crate) root: String,
    pub(crate) bytes: u64,
    pub(crate) created_unix: u64,
    pub(crate) age_seconds: u64,
}
#[derive(Clone, Debug, Serialize)]
pub(crate) struct SessionStatus {
    pub(crate) id: String,
    pub(crate) mode: Mode,
    pub(crate) strategy: Strategy,
    pub(crate) source: String,
    pub(crate) durable_records: u64,
    pub(crate) durable_bytes: u64,
    pub(crate) started_unix: u64,
}
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Step {
    pub(crate) command: String,
    pub(crate) effect: String,
}
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Status {
    pub(crate) target: String,
    pub(crate) state: String,
    pub(crate) running: bool,
    pub(crate) point: Option<PointStatus>,
    pub(crate) session: Option<SessionStatus>,
    pub(crate) rollback_point: Option<PointStatus>,
    pub(crate) held_bytes: u64,
    pub(crate) target_unwritten: Option<bool>,
    pub(crate) next: Vec<Step>,
}
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Comparison {
    pub(crate) equal: bool,
    pub(crate) different_bytes: u64,
    pub(crate) compared_bytes: u64,
    pub(crate) size_a: u64,
    pub(crate) size_b: u64,
    pub(crate) elapsed_seconds: f64,
}
#[derive(Clone, Debug, Serialize)]
pub(crate) struct DigestReport {
    pub(crate) root: String,
    pub(crate) image_bytes: u64,
    pub(crate) data_bytes: u64,
    pub(crate) zero_bytes: u64,
    pub(crate) block_size: u64,
    pub(crate) elapsed_seconds: f64,
}
#[derive(Clone, Debug, Serialize)]
pub(crate) struct VerifyReport {
    pub(crate) matches: bool,
    pub(crate) expected_root: String,
    pub(crate) found_root: String,
    pub(crate) different_regions: Vec<(u64, u64)>,
    pub(crate) elapsed_seconds: f64,
}
#[derive(Debug)]
pub(crate) struct Error;
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the engine is missing")
    }
}
impl std::error::Error for Error {}
impl Error {
    pub(crate) fn kind(&self) -> ErrorKind {
        ErrorKind::Internal
    }
    pub(crate) fn is_resumable(&self) -> bool {
        false
    }
}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub(crate) enum ErrorKind {
    Usage,
    Source,
    Target,
    Interrupted,
    DecisionPending,
    Corruption,
    Peer,
    Hook,
    Cancelled,
    Internal,
}
