//! Whether a file system shares blocks between files, found without writing anything.

use blockferry_device::StorageFile;
use rustix::io::Errno;

/// Asks to clone the file onto itself. A file system that cannot clone says so first; one that can refuses ranges
/// that overlap, so nothing is changed (`generic_remap_checks` of Linux; an empty file is cloned, which changes
/// nothing either).
pub(crate) fn shares_blocks(file: &dyn StorageFile) -> bool {
    let Some(handle) = file.as_fd() else {
        return false;
    };
    matches!(
        rustix::fs::ioctl_ficlone(handle, handle),
        Ok(()) | Err(Errno::INVAL)
    )
}
