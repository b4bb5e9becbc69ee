//! Block sources and targets of blockferry: traits, files, block devices, decorators.
//!
//! The principal contracts are [`BlockSource`] and [`BlockTarget`]; [`StorageDir`] and [`StorageFile`] are
//! what the transfer log lives in. [`OsFile`], [`OsDirectory`] and [`MemoryDevice`] keep them; embedders
//! implement them for devices of their own.
//!
//! ```
//! use blockferry_device::{BlockSource, BlockTarget, MemoryDevice};
//!
//! let device = MemoryDevice::zeroed("example", 8192);
//! device.write_at(4096, b"ferry")?;
//! let mut word = [0; 5];
//! device.read_at(4096, &mut word)?;
//! assert_eq!(&word, b"ferry");
//! # Ok::<(), blockferry_device::Error>(())
//! ```

mod allocation;
mod block_device;
mod buffer;
mod cancel;
mod clock;
mod data_path;
mod decorators;
mod directory;
mod error;
mod evidence;
mod file;
mod holders;
mod image_format;
mod memory;
mod metadata;
mod open;
mod point;
mod proc;
mod residency;
mod spans;
mod stamps;
mod sys;
mod traits;
mod workers;

pub use block_device::OsBlockDevice;
pub use buffer::{AlignedBuffer, BufferPool, PooledBuffer};
pub use cancel::CancelToken;
pub use clock::{Clock, SystemClock};
pub use data_path::WriteMode;
pub use decorators::{
    Cancellable, CopyOnWrite, Counting, Counts, FromMedium, RateLimited, RateLimiter, ReadOnly,
};
pub use directory::OsDirectory;
pub use error::{Error, ErrorKind, Result};
pub use evidence::{Evidence, Identity, MAX_EVIDENCE_BYTES};
pub use file::{Access, OsFile};
pub use image_format::ImageFormat;
pub use memory::MemoryDevice;
pub use open::{
    SourceOptions, TargetPlace, open_source, open_target, refuse_other_formats, same_object,
};
pub use point::{
    Consistency, PointProvider, PointRequest, Quiesce, Quiesced, SourcePoint, WholeSource,
};
pub use traits::{
    BlockSource, BlockTarget, LockGuard, ReadRequest, Status, StorageDir, StorageFile, WriteRequest,
};
