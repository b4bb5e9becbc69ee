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

/// "mounted at …": a mount of the device, of one of its partitions, of its disk, or of what lies on them.
pub(crate) fn mounted(number: DeviceNumber, which: Mounts) -> Option<String> {
    let tower = Sysfs::kernel().tower(number);
    let mount = mounts().into_iter().find(|mount| {
        (which == Mounts::Any || mount.writable)
            && (tower.contains(&mount.device) || tower.iter().any(|&n| is_source_of(n, mount)))
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
pub(crate) fn backing(object: Object, which: Openers) -> Option<String> {
    let loops = std::fs::read_dir("/sys/block").ok()?;
    let names = loops
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    let name = names.filter(|name| name.starts_with("loop")).find(|name| {
        let sysfs = Path::new("/sys/block").join(name);
        (which == Openers::Any || !is_read_only(&sysfs))
            && loop_file(&sysfs)
                .and_then(|path| Object::at(&path))
                .is_some_and(|file| touches(object, file))
    })?;
    Some(format!("it is backing /dev/{name}"))
}

fn is_read_only(sysfs: &Path) -> bool {
    std::fs::read_to_string(sysfs.join("ro")).is_ok_and(|text| text.trim() == "1")
}

/// "… lies on it": another block device (LVM, RAID, encryption) is made of it, or of a part of it.
pub(crate) fn stacked_on(number: DeviceNumber) -> Option<String> {
    let holder = Sysfs::kernel().holder_of(number)?;
    Some(format!("{holder} lies on it"))
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
    Sysfs::kernel().disk_of(number)
}

/// Whether two objects share bytes as far as partitions go.
pub(crate) fn touches(one: Object, other: Object) -> bool {
    match (one, other) {
        (Object::Device(one), Object::Device(other)) => {
            let sysfs = Sysfs::kernel();
            sysfs.family(one).contains(&other) || sysfs.family(other).contains(&one)
        }
        _ => one == other,
    }
}

/// Whether both are a disk or partitions of it, the same one.
pub(crate) fn are_of_one_disk(one: Object, other: Object) -> bool {
    match (one, other) {
        (Object::Device(one), Object::Device(other)) => disk_of(one) == disk_of(other),
        _ => false,
    }
}

pub(crate) fn mounts() -> Vec<Mount> {
    proc::parse_mounts(&std::fs::read("/proc/self/mountinfo").unwrap_or_default())
}

/// Which open file descriptions [`open_elsewhere`] and [`backing`] look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Openers {
    /// Any.
    Any,
    /// Those that may write.
    Writers,
}

/// "open in process …", as far as this process may look: all processes for root, else the user's own.
/// Descriptors of this process do not count. Whoever has the disk of a partition open, or a partition of a
/// disk, has it open as well.
pub(crate) fn open_elsewhere(object: Object, which: Openers) -> Option<String> {
    let objects = match object {
        Object::Device(number) => {
            let family = Sysfs::kernel().family(number);
            family.into_iter().map(Object::Device).collect()
        }
        Object::File { .. } => vec![object],
    };
    let own = std::process::id().to_string();
    let processes = std::fs::read_dir("/proc").ok()?.flatten().filter(|entry| {
        let name = entry.file_name();
        let name = name.as_encoded_bytes();
        name.iter().all(u8::is_ascii_digit) && name != own.as_bytes()
    });
    let process = processes
        .map(|entry| entry.path())
        .find(|p| has_open(p, &objects, which))?;
    let number = process
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
    Some(format!("it is open in process {number} ({})", name.trim()))
}

fn has_open(process: &Path, objects: &[Object], which: Openers) -> bool {
    let descriptors = std::fs::read_dir(process.join("fd"))
        .into_iter()
        .flatten()
        .flatten();
    descriptors.map(|entry| entry.file_name()).any(|number| {
        let same = rustix::fs::statat(CWD, process.join("fd").join(&number), AtFlags::empty())
            .is_ok_and(|found| objects.iter().any(|&object| is_object(&found, object)));
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

/// The tree of block devices that the kernel shows below /sys, or one that looks like it.
struct Sysfs {
    root: PathBuf,
}

impl Sysfs {
    fn kernel() -> Self {
        Self {
            root: PathBuf::from("/sys"),
        }
    }

    fn directory(&self, number: DeviceNumber) -> PathBuf {
        self.root.join(format!("dev/block/{number}"))
    }

    fn disk_of(&self, number: DeviceNumber) -> DeviceNumber {
        let directory = self.directory(number);
        if !directory.join("partition").exists() {
            return number;
        }
        let disk = directory
            .canonicalize()
            .ok()
            .and_then(|path| device_in(path.parent()?));
        disk.unwrap_or(number)
    }

    /// The device, its disk, and its partitions.
    fn family(&self, number: DeviceNumber) -> Vec<DeviceNumber> {
        let mut family = vec![number];
        let disk = self.disk_of(number);
        if disk != number {
            family.push(disk);
        }
        let entries = entries(&self.directory(number));
        let partitions = entries.filter(|path| path.join("partition").exists());
        family.extend(partitions.filter_map(|path| device_in(&path)));
        family
    }

    /// The family, and every device that is made of one of them, and so on upwards.
    fn tower(&self, number: DeviceNumber) -> Vec<DeviceNumber> {
        let mut tower = self.family(number);
        let mut next = 0;
        while next < tower.len() {
            let above = self
                .holders(tower[next])
                .filter_map(|path| device_in(&path));
            let above: Vec<_> = above.flat_map(|holder| self.parts(holder)).collect();
            for device in above {
                if !tower.contains(&device) {
                    tower.push(device);
                }
            }
            next += 1;
        }
        tower
    }

    /// A device and its partitions.
    fn parts(&self, number: DeviceNumber) -> Vec<DeviceNumber> {
        let disk = self.disk_of(number);
        let mut parts = self.family(number);
        parts.retain(|&part| part == number || part != disk);
        parts
    }

    /// A device that is made of this one, of its disk, or of one of its partitions.
    fn holder_of(&self, number: DeviceNumber) -> Option<String> {
        let mut family = self.family(number).into_iter();
        let holder = family.find_map(|number| self.holders(number).next())?;
        let node = holder.file_name().unwrap_or_default().to_string_lossy();
        let name = std::fs::read_to_string(holder.join("dm/name"));
        Some(match name {
            Ok(name) => format!("/dev/{node} ({})", name.trim()),
            Err(_no_device_mapper) => format!("/dev/{node}"),
        })
    }

    fn holders(&self, number: DeviceNumber) -> impl Iterator<Item = PathBuf> + use<> {
        entries(&self.directory(number).join("holders"))
    }
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path())
}

fn device_in(sysfs: &Path) -> Option<DeviceNumber> {
    DeviceNumber::parse(&std::fs::read_to_string(sysfs.join("dev")).ok()?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    const DISK: DeviceNumber = DeviceNumber { major: 8, minor: 0 };
    const FIRST: DeviceNumber = DeviceNumber { major: 8, minor: 1 };
    const SECOND: DeviceNumber = DeviceNumber { major: 8, minor: 2 };
    const CRYPT: DeviceNumber = DeviceNumber {
        major: 253,
        minor: 0,
    };
    const VOLUME: DeviceNumber = DeviceNumber {
        major: 253,
        minor: 1,
    };

    /// A disk of two partitions; on the second lies an encrypted device, and on that a volume.
    fn stack() -> (tempfile::TempDir, Sysfs) {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().to_owned();
        fs::create_dir_all(root.join("dev/block")).unwrap();
        let add = |number: DeviceNumber, place: &str| {
            let device = root.join("devices").join(place);
            fs::create_dir_all(device.join("holders")).unwrap();
            fs::write(device.join("dev"), format!("{number}\n")).unwrap();
            let link = root.join(format!("dev/block/{number}"));
            symlink(Path::new("../../devices").join(place), link).unwrap();
            device
        };
        add(DISK, "pci/sda");
        let (first, second) = (add(FIRST, "pci/sda/sda1"), add(SECOND, "pci/sda/sda2"));
        fs::write(first.join("partition"), "1\n").unwrap();
        fs::write(second.join("partition"), "2\n").unwrap();
        for (number, node, name, below) in [
            (CRYPT, "dm-0", "secret", &second),
            (
                VOLUME,
                "dm-1",
                "vg-root",
                &root.join("devices/virtual/dm-0"),
            ),
        ] {
            let device = add(number, &format!("virtual/{node}"));
            fs::create_dir(device.join("dm")).unwrap();
            fs::write(device.join("dm/name"), format!("{name}\n")).unwrap();
            symlink(&device, below.join("holders").join(node)).unwrap();
        }
        (directory, Sysfs { root })
    }

    #[test]
    fn a_disk_and_its_partitions_are_one_family_and_siblings_are_not() {
        let (_directory, sysfs) = stack();
        let sorted = |number| {
            let mut family = sysfs.family(number);
            family.sort_by_key(|n| n.minor);
            family
        };

        assert_eq!(sorted(DISK), [DISK, FIRST, SECOND]);
        assert_eq!(sorted(FIRST), [DISK, FIRST]);
        assert_eq!(sorted(VOLUME), [VOLUME]);
        assert_eq!(sysfs.disk_of(SECOND), DISK);
    }

    #[test]
    fn a_volume_holds_what_it_is_made_of_and_the_disk_of_that_but_no_sibling() {
        let (_directory, sysfs) = stack();

        assert_eq!(sysfs.holder_of(SECOND).unwrap(), "/dev/dm-0 (secret)");
        assert_eq!(sysfs.holder_of(DISK).unwrap(), "/dev/dm-0 (secret)");
        assert_eq!(sysfs.holder_of(CRYPT).unwrap(), "/dev/dm-1 (vg-root)");
        assert_eq!(sysfs.holder_of(FIRST), None);
        assert_eq!(sysfs.holder_of(VOLUME), None);
    }

    #[test]
    fn what_is_mounted_above_a_device_counts_as_its_mount() {
        let (_directory, sysfs) = stack();

        for below in [DISK, SECOND, CRYPT] {
            assert!(sysfs.tower(below).contains(&VOLUME), "{below}");
        }
        assert!(!sysfs.tower(FIRST).contains(&VOLUME));
        assert_eq!(sysfs.tower(VOLUME), [VOLUME]);
    }
}
