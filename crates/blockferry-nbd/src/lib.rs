//! Disks that others serve over NBD, and disks of ours that are served to others.
//!
//! Principal types: [`NbdDevice`], an export as a [`BlockSource`](blockferry_device::BlockSource) and
//! [`BlockTarget`](blockferry_device::BlockTarget), of which [`NbdAddress`] says where it is; and [`NbdServer`], which
//! serves an [`NbdExport`].
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

//!
//! ```no_run
//! use std::os::unix::net::UnixListener;
//! use std::sync::Arc;
//!
//! use blockferry_device::MemoryDevice;
//! use blockferry_nbd::{NbdExport, NbdServer, NbdServerOptions};
//!
//! let disk = Arc::new(MemoryDevice::zeroed("example", 1 << 20));
//! let export = NbdExport::read_only("disk", disk)?;
//! let listener = UnixListener::bind("/run/vm/nbd.sock")?;
//! let server = NbdServer::start(export, vec![listener.into()], NbdServerOptions::default())?;
//! // … until nobody needs it any more:
//! let served = server.shutdown();
//! # let _ = served;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod address;
mod connection;
mod device;
mod handshake;
mod image;
mod server;
mod stream;
#[cfg(feature = "tls")]
mod tls;
mod transfer;
mod wire;

pub use address::{NbdAddress, PORT};
pub use device::{NbdDevice, NbdOptions};
pub use image::{open_image, open_image_target, open_overlay};
pub use server::{
    MOST_CLIENTS, NbdExport, NbdListener, NbdServer, NbdServerOptions, Served, ServerEvent,
};
