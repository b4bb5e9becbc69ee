//! The transfer log: what makes a sync end in the old point or the new one, and never in between.
//!
//! A [`Replica`] is a target with its state directory; opening it recovers first. [`Replica::begin`] starts a
//! [`Session`] that stages batches in durable groups, prepares, commits and applies; [`Replica::resume`] goes on
//! with one that was cut off. Before COMMIT the content of the target is the old point; after APPLIED it is the
//! new one; in between one durable decision says which of the two recovery produces.
//!
//! All I/O goes through the storage traits of `blockferry-device`, so a simulated disk can stand in for every
//! file, directory and device touched here. The log has no clock and draws no random numbers: ids and times are
//! passed in.

mod anchor;
mod apply;
mod batch;
mod error;
mod format;
pub mod frame;
mod group;
mod index;
mod inspect;
mod ledger;
mod log;
mod manifest;
mod outcome;
mod overlay;
mod place;
mod plan;
mod readback;
mod replica;
mod session;
mod spare;
mod staged;
mod state;
mod stats;
mod working;

pub use apply::Progress;
pub use batch::{Batch, Old};
pub use error::{Error, ErrorKind, Result};
pub use format::{
    BatchExtent, DecisionKind, FORMAT_VERSION, NewContent, OldContent, Point, Retained,
    SegmentHeader, SegmentKind, SessionId, SourceStamp, Unit,
};
pub use group::{GroupCommitted, GroupDirectory, GroupId, GroupVerdicts, Verdict};
pub use inspect::{Inspection, UnfinishedSession, inspect};
pub use manifest::{ManifestFile, ManifestSource};
pub use place::Place;
pub use plan::{Plan, Proof, Strategy, Undo};
pub use readback::{ReadBackOutcome, ReadBackTask};
pub use replica::{AnchoredPoint, LOCK_NAME, Recovered, Replica, Unwritten};
pub use session::{Applied, Checkpoint, GROUP_BYTES, Lost, Prepared, Session, SessionTotals};
pub use staged::{StagedView, Stager};
pub use stats::Stats;
