//! Disks that others serve over NBD.
//!
//! Principal type: [`NbdDevice`], an export as a [`BlockSource`](blockferry_device::BlockSource) and
//! [`BlockTarget`](blockferry_device::BlockTarget). [`NbdAddress`] says where it is.
//!
//! ```no_run
//! use blockferry_device::BlockSource;
//! use blockferry_nbd::{NbdAddress, NbdDevice, NbdOptions};
//!
//! let address: NbdAddress = "nbd+unix:///disk?socket=/run/vm/nbd.sock".parse()?;
//! let disk = NbdDevice::open_source(&address, &NbdOptions::default())?;
//! let mut first = [0; 4096];
//! disk.read_at(0, &mut first)?;
//! # Ok::<(), blockferry_device::Error>(())
//! ```
//!
//! Spoken is the fixed newstyle handshake with structured replies and block status where the server has them, many requests
//! at once on each connection, and several connections where the server allows it. The protocol is described in `doc/proto.md`
//! of the NBD project; every length of a server meets a limit before memory is set aside for it.
//!
//! A flush of the server is as good as the server: whether its `flush` reaches the medium, nobody here can tell, and reading back
//! may be served by its cache.

mod address;
mod connection;
mod device;
mod handshake;
mod image;
mod server;
mod stream;
mod transfer;
mod wire;

pub use address::NbdAddress;
pub use device::{NbdDevice, NbdOptions};
pub use image::open_image;
pub use server::{
    MOST_CLIENTS, NbdExport, NbdListener, NbdServer, NbdServerOptions, Served, ServerEvent,
};
