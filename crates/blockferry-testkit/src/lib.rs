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

pub mod conformance;
mod explore;
mod faults;
pub mod images;
mod random;
mod sim;

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
