//! One module per verb: call the library, show the outcome, choose the exit.

pub(crate) mod decide;
pub(crate) mod diff;
pub(crate) mod digest;
pub(crate) mod generate;
pub(crate) mod report;
pub(crate) mod resume;
pub(crate) mod status;
pub(crate) mod sync;
pub(crate) mod verify;

use std::path::Path;
use std::sync::Arc;

use crate::engine::{BlockSource, SourceOptions, open_source};
use crate::failure::Failure;

/// Opens a disk to be read.
pub(crate) fn open(path: &Path, crash_consistent: bool) -> Result<Arc<dyn BlockSource>, Failure> {
    let mut options = SourceOptions::default();
    options.crash_consistent = crash_consistent;
    open_source(path, options).map_err(|error| Failure::source(&error))
}
