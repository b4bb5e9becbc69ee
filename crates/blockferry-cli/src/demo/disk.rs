//! The demo's disk: a real file system with real files on it, and a day of use.

use std::io;
use std::path::Path;

use blockferry_testkit::images::{self, FileSystem};

use crate::engine::core::PAGE_BYTES;
use crate::exit::Exit;
use crate::failure::Failure;

/// The same disk for everybody; another seed would do as well.
pub(crate) const SEED: u64 = 2;

/// How much of the files' content a day of use overwrites.
const CHANGED_FRACTION: f64 = 0.1;

/// Smaller disks hold too few files for a story.
const LEAST_BYTES: u64 = 32 << 20;

/// Makes a disk of this size and says which file system it holds.
pub(crate) fn make(path: &Path, size_bytes: u64) -> Result<FileSystem, Failure> {
    if size_bytes < LEAST_BYTES || !size_bytes.is_multiple_of(PAGE_BYTES) {
        let message = "the demo's disk needs at least 32 MiB, and whole pages of 4 KiB";
        return Err(Failure::new(Exit::Usage, message));
    }
    images::filesystem_image(path, size_bytes, SEED)
        .or_else(|_too_old_or_missing| built_in(path, size_bytes))
        .map_err(|error| failed("making", path, &error))
}

/// An `mke2fs` that is too old for `-d` must not end the demo.
fn built_in(path: &Path, size_bytes: u64) -> io::Result<FileSystem> {
    drop(std::fs::remove_file(path));
    images::filesystem_image_of(FileSystem::Fat16, path, size_bytes, SEED)?;
    Ok(FileSystem::Fat16)
}

/// Overwrites parts of files, as applications do, and returns how many bytes of pages became different.
pub(crate) fn use_it(path: &Path) -> Result<u64, Failure> {
    images::edit_filesystem_image(path, SEED + 1, CHANGED_FRACTION)
        .map(|pages| pages * PAGE_BYTES)
        .map_err(|error| failed("changing", path, &error))
}

fn failed(attempt: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::new(
        Exit::Target,
        format!("{attempt} the disk {}: {error}", path.display()),
    )
}
