//! Block sources and targets of blockferry: traits, files, block devices, decorators.

mod error;
mod evidence;
mod traits;

pub use error::{Error, ErrorKind, Result};
pub use evidence::{Evidence, Identity, MAX_EVIDENCE_BYTES};
pub use traits::{
    BlockSource, BlockTarget, LockGuard, ReadRequest, Status, StorageDir, StorageFile, WriteRequest,
};
