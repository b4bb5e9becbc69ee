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

use crate::address::Readable;
use crate::engine::device::ErrorKind;
use crate::engine::nbd::{NbdDevice, NbdOptions, open_image};
use crate::engine::{self, BlockSource, SourceOptions, Target, open_source};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::remote::certs_dir;
use crate::session::Session;

/// Opens a disk to be read.
pub(crate) fn open(
    disk: &Readable,
    crash_consistent: bool,
) -> Result<Arc<dyn BlockSource>, Failure> {
    match disk {
        Readable::Path(address) => open_path(address.path(), crash_consistent),
        // Whether it is at rest, only its server knows.
        Readable::Nbd(export) => {
            let mut options = NbdOptions::default();
            options.certificates = Some(certs_dir(None));
            match NbdDevice::open_source(export, &options) {
                Ok(device) => Ok(device),
                Err(error) => Err(Failure::source(&error)),
            }
        }
        Readable::Image(format, address) => {
            match open_image(*format, address.path(), &std::env::temp_dir()) {
                Ok(device) => Ok(device),
                Err(error) => Err(Failure::source(&error)),
            }
        }
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
fn open_known(path: &Path, session: &Session) -> Result<Target, Failure> {
    let options = session.target_options();
    let failure = |error: engine::Error| sync::explain_decision(&error, path, session);
    let status = engine::status(path, &options).map_err(failure)?;
    if status.state == "unknown" && status.held_bytes == 0 {
        let message = format!(
            "{} was never synced here: nothing is recorded about it",
            path.display()
        );
        return Err(Failure::new(Exit::Target, message));
    }
    Target::open(path, &options).map_err(failure)
}
