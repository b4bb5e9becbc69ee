//! What the kernel tells in /proc and /sys, as values. All parsers are pure; unknown lines are skipped,
//! because the kernel adds fields and the answers only ever refuse or describe.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Major and minor number of a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct DeviceNumber {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

impl DeviceNumber {
    pub(crate) fn from_raw(device: u64) -> Self {
        Self {
            major: rustix::fs::major(device),
            minor: rustix::fs::minor(device),
        }
    }

    /// `"8:1"`, with or without a line feed.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }

    /// Its directory in sysfs.
    pub(crate) fn sysfs(self) -> PathBuf {
        PathBuf::from(format!("/sys/dev/block/{self}"))
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A line of /proc/self/mountinfo (`proc_pid_mountinfo(5)`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) id: u64,
    pub(crate) device: DeviceNumber,
    /// What of the file system is mounted there.
    pub(crate) root: PathBuf,
    pub(crate) point: PathBuf,
    /// As `ext4`.
    pub(crate) file_system: Vec<u8>,
    pub(crate) source: PathBuf,
    /// Whether the file system itself may write: a read-only mount of it proves nothing.
    pub(crate) writable: bool,
}

pub(crate) fn parse_mounts(mountinfo: &[u8]) -> Vec<Mount> {
    mountinfo
        .split(|&byte| byte == b'\n')
        .filter_map(parse_mount)
        .collect()
}

fn parse_mount(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let id = text(fields.next()?)?.parse().ok()?;
    let _parent = fields.next()?;
    let device = DeviceNumber::parse(text(fields.next()?)?)?;
    let root = unescape(fields.next()?);
    let point = unescape(fields.next()?);
    // Options and any number of optional fields, up to a hyphen.
    fields.by_ref().find(|&field| field == b"-")?;
    let file_system = fields.next()?.to_vec();
    let source = unescape(fields.next()?);
    let writable = fields
        .next()?
        .split(|&byte| byte == b',')
        .any(|option| option == b"rw");
    Some(Mount {
        id,
        device,
        root,
        point,
        file_system,
        source,
        writable,
    })
}

/// Other mounts of the file at `path`, which lies on the mount `id`: where it was bound to by itself.
pub(crate) fn bindings_of<'m>(
    mounts: &'m [Mount],
    id: u64,
    path: &Path,
) -> impl Iterator<Item = &'m Mount> {
    let own = mounts.iter().find(|mount| mount.id == id);
    let within = own.and_then(|own| {
        let rest = path.strip_prefix(&own.point).ok()?;
        // Joining an empty rest would add a slash.
        let inner = if rest.as_os_str().is_empty() {
            own.root.clone()
        } else {
            own.root.join(rest)
        };
        Some((own.device, inner))
    });
    mounts.iter().filter(move |mount| {
        within.as_ref().is_some_and(|(device, inner)| {
            mount.device == *device && mount.root == *inner && inner.as_os_str() != "/"
        })
    })
}

/// Paths in /proc/swaps.
pub(crate) fn parse_swaps(swaps: &[u8]) -> Vec<PathBuf> {
    let lines = swaps.split(|&byte| byte == b'\n').skip(1);
    let paths = lines.filter_map(|line| line.split(|&byte| byte == b' ' || byte == b'\t').next());
    paths
        .filter(|path| path.starts_with(b"/"))
        .map(unescape)
        .collect()
}

/// Whether an open file description may write, from /proc/PID/fdinfo/N; `None` if it does not say.
pub(crate) fn parse_may_write(fdinfo: &str) -> Option<bool> {
    let flags = fdinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))?;
    let flags = i32::from_str_radix(flags.trim(), 8).ok()?;
    Some(flags & libc::O_PATH == 0 && flags & libc::O_ACCMODE != libc::O_RDONLY)
}

/// The boot id of the kernel as 16 bytes.
pub(crate) fn parse_boot_id(boot_id: &str) -> Option<[u8; 16]> {
    let digits: String = boot_id
        .trim()
        .chars()
        .filter(|&digit| digit != '-')
        .collect();
    let value = u128::from_str_radix(&digits, 16)
        .ok()
        .filter(|_| digits.len() == 32)?;
    Some(value.to_le_bytes())
}

/// 512-byte sectors written or discarded since the disk appeared, from /sys/dev/block/M:m/stat
/// (Documentation/block/stat.rst). Not the number of requests: flushes count among those.
pub(crate) fn parse_written_sectors(stat: &str) -> Option<u64> {
    let fields: Vec<u64> = stat
        .split_ascii_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()
        .ok()?;
    // Kernels before 4.18 do not count discards.
    let discarded = fields.get(13).copied().unwrap_or(0);
    Some(fields.get(6)?.wrapping_add(discarded))
}

fn text(field: &[u8]) -> Option<&str> {
    std::str::from_utf8(field).ok()
}

/// Spaces and the like are written as a backslash and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, later)) = rest.split_first() {
        let octal = rest.get(1..4).filter(|_| first == b'\\').and_then(text);
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(byte);
                rest = &rest[4..];
            }
            None => {
                plain.push(first);
                rest = later;
            }
        }
    }
    PathBuf::from(OsStr::from_bytes(&plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &[u8] = b"\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard\n\
36 27 8:1 / /mnt/with\\040space ro,noatime master:1 shared:7 - xfs /dev/sda1 rw,attr2\n\
40 27 8:2 / /mnt/read ro - ext4 /dev/sda2 ro\n\
a line of some later kernel\n\
41 27 254:0 /images/disk.raw /srv/bound rw - ext4 /dev/vda rw\n";

    #[test]
    fn mounts_are_parsed_with_optional_fields_and_escapes() {
        let mounts = parse_mounts(MOUNTS);

        assert_eq!(mounts.len(), 4);
        assert_eq!(mounts[1].point, Path::new("/mnt/with space"));
        assert_eq!(mounts[1].device, DeviceNumber { major: 8, minor: 1 });
        assert_eq!(mounts[1].source, Path::new("/dev/sda1"));
        assert!(
            mounts[1].writable,
            "the file system writes, whatever this mount may"
        );
        assert!(!mounts[2].writable);
    }

    #[test]
    fn a_bound_file_is_found_from_both_of_its_paths() {
        let mounts = parse_mounts(MOUNTS);
        let bound = |id, path| {
            bindings_of(&mounts, id, Path::new(path))
                .map(|m| m.point.clone())
                .collect::<Vec<_>>()
        };

        assert_eq!(bound(27, "/images/disk.raw"), [Path::new("/srv/bound")]);
        assert_eq!(bound(41, "/srv/bound"), [Path::new("/srv/bound")]);
        assert!(bound(27, "/images/other.raw").is_empty());
        assert!(bound(99, "/images/disk.raw").is_empty());
    }

    #[test]
    fn swaps_are_paths_without_the_heading() {
        let swaps =
            b"Filename\t\t\t\tType\t\tSize\n/dev/sda3   partition\t1\n/swap\\040file\tfile\t2\n";

        assert_eq!(
            parse_swaps(swaps),
            [Path::new("/dev/sda3"), Path::new("/swap file")]
        );
        assert!(parse_swaps(b"Filename\n").is_empty());
    }

    #[test]
    fn only_descriptions_that_can_write_are_writers() {
        assert_eq!(
            parse_may_write("pos:\t0\nflags:\t0100000\nmnt_id:\t24\n"),
            Some(false)
        );
        assert_eq!(parse_may_write("pos:\t0\nflags:\t0100002\n"), Some(true));
        assert_eq!(parse_may_write("flags:\t0100001\n"), Some(true));
        assert_eq!(
            parse_may_write("flags:\t010000002\n"),
            Some(false),
            "O_PATH moves no bytes"
        );
        assert_eq!(parse_may_write("pos:\t0\n"), None);
    }

    #[test]
    fn a_boot_id_has_sixteen_bytes_or_is_none() {
        let id = parse_boot_id("01020304-0506-0708-090a-0b0c0d0e0f10\n");

        assert_eq!(id.map(|bytes| bytes[0]), Some(0x10));
        assert_eq!(parse_boot_id("01020304"), None);
    }

    #[test]
    fn discards_count_as_writes() {
        let stat = "  1 2 3 4 100 6 800 8 0 10 11 20 13 160 15 16 17\n";

        assert_eq!(parse_written_sectors(stat), Some(960));
        assert_eq!(parse_written_sectors("1 2 3"), None);
    }
}
