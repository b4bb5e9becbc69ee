//! Points of running QEMU machines.
//!
//! Principal type: [`Machine`], a QEMU process or a qemu-storage-daemon whose disks are copied while it writes them.
//! [`Qmp`] speaks to it, [`Agent`] to the agent inside its guest, [`freeze`] holds the guest's writes and lets them go in
//! time whatever becomes of us.
//!
//! A *cut* is one moment for several disks. At a cut one transaction begins a dirty bitmap on each of them, ends the one
//! of the cut before, and starts to keep what is overwritten from then on (fleecing), so that the content of that moment
//! can be read, over NBD, for as long as it takes. Everything that is added to a machine has a name that begins with
//! `bf-` and the tag of its job, and [`Machine::settle`] takes it away again, also after a crash of ours.
//!
//! ```no_run
//! use blockferry_qemu::{Held, Machine, MachineOptions};
//!
//! let options = MachineOptions::new("/run/vm/qmp.sock", "web1", "/var/tmp");
//! let mut machine = Machine::open(&options)?;
//! let disks = ["disk0".to_owned()];
//! machine.settle(&[Held::unknown("disk0")])?;
//! machine.prepare(1, &disks)?;
//! machine.cut(1, &disks)?;
//! for disk in machine.publish(1, &disks)? {
//!     println!("{} in {}", disk.export, disk.socket.display());
//! }
//! # Ok::<(), blockferry_device::Error>(())
//! ```
//!
//! QMP and its commands are described in QEMU's own documentation (`docs/interop`).

mod agent;
pub mod freeze;
mod lines;
mod machine;
mod memory;
mod merge;
mod names;
mod nodes;
mod qmp;

pub use agent::Agent;
pub use machine::{DiskNode, Held, Lost, Machine, MachineOptions, PointExport};
pub use memory::HandOver;
pub use merge::Layers;
pub use names::Tag;
pub use qmp::{Event, Qmp};
