#![doc = include_str!("../../../README.md")]
//!
//! # This crate
//! Only re-exports: [`sync`] and what it needs at the top, the layers below as modules.

pub use blockferry_core::{BlockSize, Extent, format_size, parse_size};
pub use blockferry_device::{
    BlockSource, BlockTarget, CancelToken, Clock, Consistency, PointProvider, PointRequest,
    Quiesce, Quiesced, SourceOptions, SourcePoint, Status as ExtentStatus, StorageDir, StorageFile,
    SystemClock, WholeSource, open_source, same_object,
};
pub use blockferry_engine::*;
pub use blockferry_pipeline::{Event, Observer, Phase, Progress, Silent};
pub use blockferry_transport::{Connection, Deadlines, Link};

/// Blocks, digests, manifests, change maps.
pub use blockferry_core as core;
/// Devices: traits, files, block devices, decorators.
pub use blockferry_device as device;
/// Jobs: live passes of running machines, cutover, commit, roll back.
#[cfg(feature = "failover")]
pub use blockferry_failover as failover;
/// Exports of NBD servers.
pub use blockferry_nbd as nbd;
/// Points of running QEMU machines.
#[cfg(feature = "failover")]
pub use blockferry_qemu as qemu;
/// Sessions and decisions, for those who drive them themselves.
pub use blockferry_transfer_log as transfer_log;
/// Links, connections and messages between two machines.
pub use blockferry_transport as transport;
