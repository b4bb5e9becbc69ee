//! Simulated disk, crash explorer, conformance suites and generators for blockferry devices.
//!
//! Principal type: [`SimDisk`], a machine's storage behind the production traits whose power can be cut
//! after every operation.
//!
//! ```
//! use blockferry_testkit::{ImageLimits, SimDisk, SimOptions};
//!
//! let disk = SimDisk::new(SimOptions::default());
//! let device = disk.device("target", 8192);
//! device.write_at(0, &[1; 1024])?;
//!
//! // Two unflushed sectors: each old or new, and samples with damage.
//! let images = disk.snapshot().crash_images(7, ImageLimits::default());
//! assert!(images.count() >= 4);
//! # Ok::<(), blockferry_device::Error>(())
//! ```
//!
//! For a device or a protocol of your own: [`conformance`] checks what every device must do, [`FaultySource`] and
//! [`FaultyTarget`] make it fail, and [`explore`] crashes a [`Scenario`] at every operation and checks what it promised.
//! `examples/own_device.rs` does it for a mirror of two disks, and catches one with a mistake in it. A violation is
//! printed with a test to paste, which [`reproduce`] takes straight there; [`sensitivity`] shows whether each barrier of
//! a protocol is missed when it is gone.

mod clock;
pub mod conformance;
mod explore;
mod faults;
pub mod images;
mod random;
mod sim;
mod storage_daemon;
mod writer;

pub use clock::VirtualClock;
pub use explore::{
    Crash, Events, ExploreOptions, Report, Scenario, StepCounts, Violation, explore,
    explore_faults, explore_with, reproduce, sensitivity,
};
pub use faults::{FaultySource, FaultyTarget, Gate};
pub use random::Random;
pub use sim::{
    Boundary, Bypass, CacheAfterFailure, CrashImage, CrashImages, Fault, FaultKind, ImageLimits,
    Operation, OperationKind, Repeat, SimDisk, SimOptions, Snapshot,
};
pub use storage_daemon::StorageDaemon;
pub use writer::{Writer, Written};
