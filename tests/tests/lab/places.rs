//! Loop devices and file systems of any kind and size, where the tests may make them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::FallocateFlags;

use super::run::{tool, with_files};

/// Says that a test could not be done here.
#[expect(clippy::print_stderr, reason = "a skipped test must say so")]
pub(crate) fn skipped(test: &str, needs: &str) {
    eprintln!("SKIPPED: {test} (needs {needs})");
}

/// A loop device, detached when dropped.
#[derive(Debug)]
pub(crate) struct LoopDevice {
    path: String,
}

/// Held while a device is looked for: of two that find the same free one the loser has the winner's open for a moment,
/// and a target that somebody has open is refused.
static FINDING: Mutex<()> = Mutex::new(());

impl LoopDevice {
    /// `None` where loop devices are not to be had: not root, or no losetup.
    pub(crate) fn attach(image: &Path, sector_bytes: u32) -> Option<Self> {
        let sector = sector_bytes.to_string();
        let image = image.to_str().expect("paths of tests are text");
        let _alone = FINDING.lock().unwrap_or_else(PoisonError::into_inner);
        let path = tool(&[
            "losetup",
            "--find",
            "--show",
            "--sector-size",
            &sector,
            image,
        ])?;
        Some(Self {
            path: path.trim().to_owned(),
        })
    }

    pub(crate) fn path(&self) -> &str {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        tool(&["losetup", "--detach", &self.path]);
    }
}

/// A fresh file system on a loop device, unmounted when dropped.
#[derive(Debug)]
pub(crate) struct MountedFileSystem {
    point: PathBuf,
    _device: LoopDevice,
}

impl MountedFileSystem {
    /// `None` where it is not to be had: not root, or no such mkfs.
    pub(crate) fn make(directory: &Path, kind: &str, bytes: u64) -> Option<Self> {
        Self::make_with(directory, kind, &[], bytes)
    }

    /// With options for mkfs.
    pub(crate) fn make_with(
        directory: &Path,
        kind: &str,
        options: &[&str],
        bytes: u64,
    ) -> Option<Self> {
        let image = directory.join(format!("{kind}.raw"));
        with_files(|| File::create(&image)?.set_len(bytes)).ok()?;
        let program = format!("mkfs.{kind}");
        let words = [&[&*program, "-q"], options, &[image.to_str()?]].concat();
        tool(&words)?;
        let device = LoopDevice::attach(&image, 512)?;
        let point = directory.join(kind);
        fs::create_dir(&point).ok()?;
        tool(&["mount", device.path(), point.to_str()?])?;
        Some(Self {
            point,
            _device: device,
        })
    }

    pub(crate) fn point(&self) -> &Path {
        &self.point
    }

    /// Fills it up until only about `left` bytes are free.
    pub(crate) fn fill(&self, left: u64) {
        with_files(|| self.add_ballast(left));
    }

    fn add_ballast(&self, left: u64) {
        let name = self.point.join("ballast");
        let mut options = fs::OpenOptions::new();
        let file = options
            .create(true)
            .append(true)
            .open(name)
            .expect("created");
        // What is kept for root is there for the tests as well: they run as root. The file system itself keeps a
        // little from everybody, so the last of it takes smaller and smaller pieces.
        let free = || {
            let free = rustix::fs::fstatvfs(&file).expect("it is mounted");
            (free.f_bfree * free.f_frsize).saturating_sub(left)
        };
        let (mut end, mut piece) = (0, free());
        while piece.min(free()) >= 4096 {
            let step = piece.min(free());
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), end, step) {
                Ok(()) => end += step,
                Err(_full) => piece = step / 2,
            }
        }
    }

    /// Makes room again.
    pub(crate) fn empty(&self) {
        fs::remove_file(self.point.join("ballast")).expect("it was filled");
    }
}

impl Drop for MountedFileSystem {
    fn drop(&mut self) {
        let point = self.point.to_str().expect("paths of tests are text");
        tool(&["umount", point]);
    }
}
