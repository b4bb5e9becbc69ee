//! Who else uses a file or block device, in words for the refusal. Asks the kernel, decides nothing.

use std::fs::{File, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags};

use crate::proc::{self, DeviceNumber, Mount};

/// Something on this system that a path leads to, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Object {
    /// A regular file (or anything else that is not a block device).
    File {
        /// File system.
        device: u64,
        /// Number within it.
        inode: u64,
    },
    /// A block device, whichever node leads to it.
    Device(DeviceNumber),
}

impl Object {
    pub(crate) fn of(found: &Metadata) -> Self {
        if found.file_type().is_block_device() {
            Self::Device(DeviceNumber::from_raw(found.rdev()))
        } else {
            Self::File {
                device: found.dev(),
                inode: found.ino(),
            }
        }
    }

    fn at(path: &Path) -> Option<Self> {
        std::fs::metadata(path).ok().map(|found| Self::of(&found))
    }
}

/// Who is to be found by [`mounted`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mounts {
    /// Every mount.
    Any,
    /// Mounts of a file system that may write.
    Writable,
}

/// "mounted at …": a mount of the device, of one of its partitions, or of its disk.
pub(crate) fn mounted(number: DeviceNumber, which: Mounts) -> Option<String> {
    let family = family(number);
    let mount = mounts().into_iter().find(|mount| {
        (which == Mounts::Any || mount.writable)
            && (family.contains(&mount.device) || family.iter().any(|&n| is_source_of(n, mount)))
    })?;
    Some(format!(
        "{} is mounted at {}",
        mount.source.display(),
        mount.point.display()
    ))
}

/// Some file systems (Btrfs) report a device number of their own.
fn is_source_of(number: DeviceNumber, mount: &Mount) -> bool {
    mount.device.major == 0
        && mount.source.is_absolute()
        && Object::at(&mount.source) == Some(Object::Device(number))
}

/// "bound to …": the file is mounted somewhere by itself, or `path` is such a mount.
pub(crate) fn bound(file: &File, path: &Path) -> Option<String> {
    let found = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).ok()?;
    let path = path.canonicalize().ok()?;
    let mounts = mounts();
    let mount = proc::bindings_of(&mounts, found.stx_mnt_id, &path).next()?;
    Some(format!("it is bind-mounted at {}", mount.point.display()))
}

/// "swap …": the object, or a partition of it, is swapped on.
pub(crate) fn swapped_on(object: Object) -> Option<String> {
    let swaps = std::fs::read("/proc/swaps").ok()?;
    let paths = proc::parse_swaps(&swaps);
    let swap = paths
        .iter()
        .find(|path| Object::at(path).is_some_and(|o| touches(object, o)))?;
    Some(format!("{} is in use as swap", swap.display()))
}

/// "backing …": a loop device lies on the object.
pub(crate) fn backing(object: Object) -> Option<String> {
    let loops = std::fs::read_dir("/sys/block").ok()?;
    let names = loops
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    let name = names.filter(|name| name.starts_with("loop")).find(|name| {
        loop_file(&Path::new("/sys/block").join(name))
            .and_then(|path| Object::at(&path))
            .is_some_and(|file| touches(object, file))
    })?;
    Some(format!("it is backing /dev/{name}"))
}

/// "held by …": another block device (LVM, RAID, encryption) lies on it.
pub(crate) fn stacked_on(number: DeviceNumber) -> Option<String> {
    let holder = family(number).into_iter().find_map(|number| {
        std::fs::read_dir(number.sysfs().join("holders"))
            .ok()?
            .flatten()
            .next()
    })?;
    Some(format!(
        "/dev/{} lies on it",
        holder.file_name().to_string_lossy()
    ))
}

/// The file behind a loop device, if it is one.
pub(crate) fn loop_backing(number: DeviceNumber) -> Option<PathBuf> {
    loop_file(&number.sysfs())
}

fn loop_file(sysfs: &Path) -> Option<PathBuf> {
    let text = std::fs::read_to_string(sysfs.join("loop/backing_file")).ok()?;
    Some(PathBuf::from(text.trim_end_matches('\n')))
}

/// The whole disk of a partition, or the device itself.
pub(crate) fn disk_of(number: DeviceNumber) -> DeviceNumber {
    let sysfs = number.sysfs();
    if !sysfs.join("partition").exists() {
        return number;
    }
    let disk = sysfs
        .canonicalize()
        .ok()
        .and_then(|path| device_in(path.parent()?));
    disk.unwrap_or(number)
}

/// The device, its disk, and its partitions.
fn family(number: DeviceNumber) -> Vec<DeviceNumber> {
    let mut family = vec![number];
    let disk = disk_of(number);
    if disk != number {
        family.push(disk);
    }
    let entries = std::fs::read_dir(number.sysfs())
        .into_iter()
        .flatten()
        .flatten();
    let partitions = entries
        .map(|e| e.path())
        .filter(|path| path.join("partition").exists());
    family.extend(partitions.filter_map(|path| device_in(&path)));
    family
}

fn device_in(sysfs: &Path) -> Option<DeviceNumber> {
    DeviceNumber::parse(&std::fs::read_to_string(sysfs.join("dev")).ok()?)
}

/// Whether two objects share bytes as far as partitions go.
pub(crate) fn touches(one: Object, other: Object) -> bool {
    match (one, other) {
        (Object::Device(one), Object::Device(other)) => {
            family(one).contains(&other) || family(other).contains(&one)
        }
        _ => one == other,
    }
}

fn mounts() -> Vec<Mount> {
    proc::parse_mounts(&std::fs::read("/proc/self/mountinfo").unwrap_or_default())
}

/// Which open file descriptions [`open_elsewhere`] looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Openers {
    /// Any.
    Any,
    /// Those that may write.
    Writers,
}

/// "open in process …", as far as this process may look: all processes for root, else the user's own.
/// Descriptors of this process do not count.
pub(crate) fn open_elsewhere(object: Object, which: Openers) -> Option<String> {
    let own = std::process::id().to_string();
    let processes = std::fs::read_dir("/proc").ok()?.flatten().filter(|entry| {
        let name = entry.file_name();
        let name = name.as_encoded_bytes();
        name.iter().all(u8::is_ascii_digit) && name != own.as_bytes()
    });
    let process = processes
        .map(|entry| entry.path())
        .find(|p| has_open(p, object, which))?;
    let number = process
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
    Some(format!("it is open in process {number} ({})", name.trim()))
}

fn has_open(process: &Path, object: Object, which: Openers) -> bool {
    let descriptors = std::fs::read_dir(process.join("fd"))
        .into_iter()
        .flatten()
        .flatten();
    descriptors.map(|entry| entry.file_name()).any(|number| {
        let same = rustix::fs::statat(CWD, process.join("fd").join(&number), AtFlags::empty())
            .is_ok_and(|found| is_object(&found, object));
        same && (which == Openers::Any || {
            let fdinfo = std::fs::read_to_string(process.join("fdinfo").join(&number));
            // When in doubt it is a writer.
            fdinfo.map_or(true, |text| proc::parse_may_write(&text).unwrap_or(true))
        })
    })
}

fn is_object(found: &rustix::fs::Stat, object: Object) -> bool {
    match object {
        Object::File { device, inode } => (found.st_dev, found.st_ino) == (device, inode),
        Object::Device(number) => {
            rustix::fs::FileType::from_raw_mode(found.st_mode).is_block_device()
                && DeviceNumber::from_raw(found.st_rdev) == number
        }
    }
}
