//! One module per verb: call the library, show the outcome, choose the exit.

pub(crate) mod certs;
pub(crate) mod decide;
pub(crate) mod diff;
pub(crate) mod digest;
pub(crate) mod dry_run;
pub(crate) mod export;
pub(crate) mod failover;
pub(crate) mod generate;
pub(crate) mod jobs;
pub(crate) mod report;
pub(crate) mod resume;
pub(crate) mod serve;
pub(crate) mod status;
pub(crate) mod sync;
pub(crate) mod verify;

use std::path::Path;
use std::sync::Arc;

use crate::engine::device::ErrorKind;
use crate::engine::nbd::{NbdDevice, open_image};
use crate::engine::{self, BlockSource, DiskAddress, SourceOptions, Target, open_source};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::session::{Session, nbd_options};

/// Opens a disk to be read.
pub(crate) fn open(
    disk: &DiskAddress,
    crash_consistent: bool,
) -> Result<Arc<dyn BlockSource>, Failure> {
    let served = match disk {
        DiskAddress::Path(path) => return open_path(path, crash_consistent),
        // Whether it is at rest, only its server knows.
        DiskAddress::Nbd(export) => NbdDevice::open_source(export, &nbd_options()),
        DiskAddress::Image(format, path) => open_image(*format, path, &std::env::temp_dir()),
    };
    match served {
        Ok(device) => Ok(device),
        Err(error) => Err(Failure::source(&error)),
    }
}

/// Opens a file or block device to be read.
pub(crate) fn open_path(
    path: &Path,
    crash_consistent: bool,
) -> Result<Arc<dyn BlockSource>, Failure> {
    let mut options = SourceOptions::default();
    options.crash_consistent = crash_consistent;
    open_source(path, options).map_err(|error| {
        let failure = Failure::source(&error);
        if error.kind() == ErrorKind::Busy {
            failure.with_hint("--crash-consistent accepts a source that is being written")
        } else {
            failure
        }
    })
}

/// Opens a target that has a history here. Opening any other would leave an empty state beside it.
fn open_known(address: &DiskAddress, session: &Session) -> Result<Target, Failure> {
    let options = session.target_options();
    let failure = |error: engine::Error| sync::explain_decision(&error, address, session);
    let status = engine::status(address, &options).map_err(failure)?;
    if status.state == "unknown" && status.held_bytes == 0 {
        let message = format!("{address} was never synced here: nothing is recorded about it");
        return Err(Failure::new(Exit::Target, message));
    }
    Target::open(address, &options).map_err(failure)
}
