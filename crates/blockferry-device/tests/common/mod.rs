//! Files and loop devices for the tests.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use blockferry_testkit::Random;
use tempfile::TempDir;

/// Not in /tmp, which may be a tmpfs: the tests want a file system on a disk.
pub(crate) fn disk_directory() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary directory")
}

pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    Random::new(11).fill(&mut bytes);
    bytes
}

/// Held by a test that starts programs or opens targets: until it runs its program, a new process has every
/// file of this one open, those of other tests as well, and a target that is open elsewhere is refused.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A loop device, detached when dropped.
#[derive(Debug)]
pub(crate) struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// `None` where loop devices are not to be had: not root, or no losetup.
    pub(crate) fn attach(image: &Path, sector_bytes: u32) -> Option<Self> {
        Self::attach_with(image, &["--sector-size", &sector_bytes.to_string()])
    }

    /// The same, with these options of losetup.
    pub(crate) fn attach_with(image: &Path, options: &[&str]) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .args(options)
            .arg(image)
            .output()
            .ok()?;
        let path = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| Self {
            path: PathBuf::from(path.trim()),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _busy = Command::new("losetup")
            .arg("--detach")
            .arg(&self.path)
            .status();
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
        let image = directory.join(format!("{kind}.raw"));
        std::fs::File::create(&image).ok()?.set_len(bytes).ok()?;
        run(Command::new(format!("mkfs.{kind}")).arg("-q").arg(&image))?;
        let device = LoopDevice::attach(&image, 512)?;
        let point = directory.join(kind);
        std::fs::create_dir(&point).ok()?;
        run(Command::new("mount").arg(device.path()).arg(&point))?;
        Some(Self {
            point,
            _device: device,
        })
    }

    pub(crate) fn point(&self) -> &Path {
        &self.point
    }
}

impl Drop for MountedFileSystem {
    fn drop(&mut self) {
        let _busy = run(Command::new("umount").arg(&self.point));
    }
}

/// A file system in user space, which knows nothing of exchanging names; unmounted when dropped.
#[derive(Debug)]
pub(crate) struct UserFileSystem {
    point: PathBuf,
}

impl UserFileSystem {
    /// Shows a directory of `directory` through bindfs. `None` where that is not to be had.
    pub(crate) fn mount(directory: &Path) -> Option<Self> {
        let (under, point) = (directory.join("under"), directory.join("over"));
        std::fs::create_dir(&under).ok()?;
        std::fs::create_dir(&point).ok()?;
        run(Command::new("bindfs").arg(&under).arg(&point))?;
        Some(Self { point })
    }

    pub(crate) fn point(&self) -> &Path {
        &self.point
    }
}

impl Drop for UserFileSystem {
    fn drop(&mut self) {
        let _busy = run(Command::new("umount").arg(&self.point));
    }
}

fn run(command: &mut Command) -> Option<()> {
    let output = command.output().ok()?;
    output.status.success().then_some(())
}
