//! Overlays: what the replica writes while it is on trial, over targets that stay as they are.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, ErrorKind, Result};

const PROGRAM: &str = "qemu-img";

/// The overlay of disk `index` in the directory of a job.
pub(crate) fn path(directory: &Path, index: usize) -> PathBuf {
    directory.join(format!("overlay-{index}.qcow2"))
}

/// Makes an empty overlay over `target`. One that is there stays: a replica may run on it.
pub(crate) fn create(overlay: &Path, target: &Path) -> Result<()> {
    let failed = |why: &str| {
        let text = format!("make the overlay {}: {why}", overlay.display());
        Error::new(ErrorKind::Target, text)
    };
    if overlay.exists() {
        return Ok(());
    }
    // It gets its name when it is whole.
    let unnamed = overlay.with_extension("new");
    let made = Command::new(PROGRAM)
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(target)
        .arg(&unnamed)
        .output();
    let made = made.map_err(|cause| match cause.kind() {
        std::io::ErrorKind::NotFound => failed(&format!("{PROGRAM} is needed and not installed")),
        _ => failed(&cause.to_string()),
    })?;
    if made.status.success() {
        return std::fs::rename(&unnamed, overlay).map_err(|cause| failed(&cause.to_string()));
    }
    let said = String::from_utf8_lossy(&made.stderr);
    Err(failed(said.trim()))
}

/// Where an overlay is once the target has what it holds.
pub(crate) fn merged(overlay: &Path) -> PathBuf {
    overlay.with_extension("merged")
}

/// The target has what the overlay holds: durable when this returns.
pub(crate) fn mark_merged(overlay: &Path) -> Result<()> {
    rename(overlay, &merged(overlay))
}

/// It does not after all.
pub(crate) fn unmark_merged(overlay: &Path) -> Result<()> {
    rename(&merged(overlay), overlay)
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    let renamed = match std::fs::rename(from, to) {
        // It was renamed before.
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    let directory = from.parent().unwrap_or_else(|| Path::new("."));
    let synced = renamed.and_then(|()| std::fs::File::open(directory)?.sync_all());
    synced.map_err(|cause| {
        let text = format!("rename the overlay {}", from.display());
        Error::because(ErrorKind::Target, text, cause)
    })
}

pub(crate) fn remove(overlay: &Path) -> Result<()> {
    match std::fs::remove_file(overlay) {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => {
            let text = format!("remove the overlay {}", overlay.display());
            Err(Error::because(ErrorKind::Target, text, cause))
        }
        _ => Ok(()),
    }
}
