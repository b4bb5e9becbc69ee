//! The engine: plans a sync, runs it through the transfer log, and says what it proved.
//!
//! [`sync`] brings a [`Target`] to the content of a source; [`SyncOptions`] say how, [`Context`] carries observer,
//! cancel token and clock, the [`Receipt`] is the proof. [`rollback`], [`accept`] and [`cancel`] decide what
//! becomes of the points; [`status`] looks, [`export`] gives a point to read; [`digest`], [`compare`] and [`verify_target`] only read.

mod address;
mod anchor;
mod clone_probe;
mod compare;
mod data_blocks;
mod error;
mod export;
mod fence;
mod group;
mod handle;
mod job;
mod knowledge;
mod options;
mod plan;
mod points;
mod predict;
mod read_back;
mod receipt;
mod recorder;
mod remote;
mod sample;
mod status;
mod sync;
mod target;
mod verbs;

pub use address::DiskAddress;
pub use anchor::{anchored_point, drop_anchor, keep_anchor, return_to_anchor};
pub use blockferry_transfer_log::{
    GroupDirectory, GroupVerdicts, Place, Proof, Recovered, SessionId, Strategy, Undo,
};
pub use compare::{compare, digest};
pub use error::{Error, ErrorKind, Result};
pub use export::{ExportPoint, Exported, export};
pub use fence::Attempt;
pub use group::{Member, sync_group};
pub use options::{ChangesSince, Context, Mode, SourceCheck, SyncOptions};
pub use points::sync_from;
pub use predict::{predict, predict_from_peer};
pub use receipt::{Outcome, Prediction, RECEIPT_VERSION, Receipt};
pub use remote::{PeerObserver, refuse_peer, serve_source};
pub use status::{
    Comparison, DigestReport, NextStep, PointStatus, SessionStatus, Status, VerifyReport,
    resume_source, status,
};
pub use sync::{sync, sync_from_peer};
pub use target::{Target, TargetOptions, forget, list_targets};
pub use verbs::{accept, cancel, recover, rollback, verify_target};
