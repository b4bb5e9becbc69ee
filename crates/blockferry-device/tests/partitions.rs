//! A disk and its partitions share bytes, sibling partitions do not: exactly what shares bytes is refused.
#![expect(clippy::print_stderr, reason = "says which tests were skipped")]

mod common;

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use blockferry_device::{
    Error, ErrorKind, SourceOptions, TargetPlace, open_source, open_target, same_object,
};
use common::{LoopDevice, alone, disk_directory};

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;

/// A disk of two partitions. Taken apart when dropped.
struct Disk {
    device: LoopDevice,
    directory: tempfile::TempDir,
}

impl Disk {
    /// `None` where loop devices or partitions of them are not to be had.
    fn make() -> Option<Self> {
        let directory = disk_directory();
        let image = directory.path().join("disk.raw");
        File::create(&image).ok()?.set_len(16 * MIB).ok()?;
        let device = LoopDevice::attach_with(&image, &["--partscan"])?;
        let disk = Self { device, directory };
        // Told to the kernel directly: not every kernel reads partition tables.
        let add = |number: &str, start: u64, length: u64| {
            let mut command = Command::new("addpart");
            command.arg(disk.whole()).arg(number);
            command.arg((start / SECTOR).to_string());
            run(command.arg((length / SECTOR).to_string()))
        };
        (add("1", MIB, 6 * MIB) && add("2", 8 * MIB, 6 * MIB)).then_some(disk)
    }

    fn whole(&self) -> &Path {
        self.device.path()
    }

    fn partition(&self, number: u32) -> PathBuf {
        PathBuf::from(format!("{}p{number}", self.whole().display()))
    }

    /// Makes a file system on a partition and mounts it.
    fn mount(&self, number: u32) -> Option<Mount> {
        let partition = self.partition(number);
        let point = self.directory.path().join("mounted here");
        std::fs::create_dir_all(&point).ok()?;
        let made = run(Command::new("mke2fs").args(["-q", "-F"]).arg(&partition));
        (made && run(Command::new("mount").arg(partition).arg(&point))).then_some(Mount { point })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        for number in ["1", "2"] {
            run(Command::new("delpart").arg(self.whole()).arg(number));
        }
    }
}

/// Unmounted when dropped.
struct Mount {
    point: PathBuf,
}

impl Drop for Mount {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.point));
    }
}

fn run(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

#[track_caller]
fn refused<T: std::fmt::Debug>(outcome: blockferry_device::Result<T>, words: &str) {
    let error: Error = outcome.expect_err("a refusal");
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(error.to_string().contains(words), "{error}");
}

#[track_caller]
fn opens(path: &Path) -> TargetPlace {
    open_target(path).unwrap_or_else(|e| panic!("{} opens: {e}", path.display()))
}

#[test]
fn a_mounted_partition_and_its_disk_are_refused_and_its_sibling_is_not() {
    let _alone = alone();
    let Some(disk) = Disk::make() else {
        eprintln!("SKIPPED (needs root, losetup and addpart)");
        return;
    };
    let Some(mounted) = disk.mount(1) else {
        eprintln!("SKIPPED (needs mke2fs and mount)");
        return;
    };

    for path in [disk.partition(1), disk.whole().to_owned()] {
        refused(open_target(&path), "mounted here");
        refused(open_source(&path, SourceOptions::default()), "mounted here");
    }
    drop(opens(&disk.partition(2)));
    open_source(&disk.partition(2), SourceOptions::default()).expect("a sibling at rest");
    drop(mounted);
    drop(opens(disk.whole()));
}

#[test]
fn a_partition_of_a_mounted_disk_is_refused() {
    let _alone = alone();
    let Some(disk) = Disk::make() else {
        eprintln!("SKIPPED (needs root, losetup and addpart)");
        return;
    };
    let point = disk.directory.path().join("whole");
    std::fs::create_dir(&point).unwrap();
    // A file system over the whole disk, whatever its partition table still says.
    let made = run(Command::new("mke2fs").args(["-q", "-F"]).arg(disk.whole()))
        && run(Command::new("mount").arg(disk.whole()).arg(&point));
    if !made {
        eprintln!("SKIPPED (needs mke2fs and a kernel that mounts a disk with partitions)");
        return;
    }
    let _mounted = Mount { point };

    refused(open_target(&disk.partition(2)), "is mounted at");
}

#[test]
fn a_disk_and_its_partition_are_never_targets_at_the_same_time() {
    let _alone = alone();
    let Some(disk) = Disk::make() else {
        eprintln!("SKIPPED (needs root, losetup and addpart)");
        return;
    };

    let whole = opens(disk.whole());
    assert!(open_target(&disk.partition(1)).is_err());
    drop(whole);
    let first = opens(&disk.partition(1));
    assert!(open_target(disk.whole()).is_err());
    drop(opens(&disk.partition(2)));
    drop(first);
    drop(opens(disk.whole()));
}

#[test]
fn whoever_writes_a_partition_writes_its_disk() {
    let _alone = alone();
    let Some(disk) = Disk::make() else {
        eprintln!("SKIPPED (needs root, losetup and addpart)");
        return;
    };
    let writer = OpenOptions::new()
        .write(true)
        .open(disk.partition(1))
        .unwrap();
    let mut child = Command::new("sleep")
        .arg("60")
        .stdout(Stdio::from(writer))
        .spawn()
        .unwrap();

    let of_disk = (
        open_target(disk.whole()),
        open_source(disk.whole(), SourceOptions::default()),
    );
    let of_sibling = open_target(&disk.partition(2)).map(drop);
    child.kill().unwrap();
    child.wait().unwrap();

    let expected = format!("open in process {} (sleep)", child.id());
    refused(of_disk.0, &expected);
    refused(of_disk.1, &expected);
    of_sibling.expect("a sibling shares no bytes");
}

#[test]
fn a_device_under_a_loop_device_is_a_source_only_if_that_cannot_write() {
    let _alone = alone();
    let Some(disk) = Disk::make() else {
        eprintln!("SKIPPED (needs root, losetup and addpart)");
        return;
    };
    let source = || open_source(&disk.partition(1), SourceOptions::default());

    let above = LoopDevice::attach(&disk.partition(1), 512).expect("another loop device");
    refused(source(), "backing /dev/loop");
    refused(open_target(&disk.partition(1)), "backing /dev/loop");
    drop(above);
    let above = LoopDevice::attach_with(&disk.partition(1), &["--read-only"]).expect("another");

    source().expect("nobody can write it through a loop device that is read-only");
    refused(open_target(&disk.partition(1)), "backing /dev/loop");
    drop(above);
}

#[test]
fn a_partition_is_part_of_its_disk_and_not_of_its_sibling() {
    let _alone = alone();
    let Some(disk) = Disk::make() else {
        eprintln!("SKIPPED (needs root, losetup and addpart)");
        return;
    };
    let image = disk.directory.path().join("disk.raw");

    assert!(same_object(&disk.partition(1), disk.whole()).unwrap());
    assert!(same_object(&disk.partition(1), &image).unwrap());
    assert!(!same_object(&disk.partition(1), &disk.partition(2)).unwrap());
}
