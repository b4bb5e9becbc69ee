//! When the times of a file tell its last change from the next one.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, StatxFlags};

use crate::{holders, proc};

/// Longest tick of Linux (HZ=100), and a little: most kernels stamp with the time of the last one.
const TICK: Duration = Duration::from_millis(12);
/// Some file systems keep whole seconds, FAT even ones.
const TWO_SECONDS: Duration = Duration::from_secs(2);
/// Their changes get times of their own if the time before was looked at, since this Linux
/// (`Documentation/filesystems/multigrain-ts.rst`).
const FINE_FILE_SYSTEMS: [&[u8]; 4] = [b"btrfs", b"ext4", b"tmpfs", b"xfs"];
const FINE_SINCE: (u32, u32) = (6, 13);

/// How long a change after `found` was looked at may leave the same times.
pub(crate) fn remain_the_same(file: &File, found: &Metadata) -> Duration {
    let has_seconds_only = found.ctime_nsec() == 0 && found.mtime_nsec() == 0;
    let unit = match has_seconds_only {
        true => TWO_SECONDS + TICK,
        false => TICK,
    };
    let left = unit.saturating_sub(age(found));
    if left.is_zero() || (!has_seconds_only && is_fine(file)) {
        return Duration::ZERO;
    }
    left
}

/// Since the last change. One in the future is as suspicious as one of this moment.
fn age(found: &Metadata) -> Duration {
    let seconds = u64::try_from(found.ctime()).ok();
    let nanoseconds = u32::try_from(found.ctime_nsec()).ok();
    let changed = seconds
        .zip(nanoseconds)
        .map(|(seconds, nanoseconds)| SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds));
    let age = changed.and_then(|changed| changed.elapsed().ok());
    age.unwrap_or_default()
}

fn is_fine(file: &File) -> bool {
    let kernel = rustix::system::uname();
    let version = kernel.release().to_str().ok().and_then(version);
    let found = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID);
    let mount = found
        .ok()
        .filter(|found| found.stx_mask & StatxFlags::MNT_ID.bits() != 0)
        .map(|found| found.stx_mnt_id);
    version.is_some_and(|version| version >= FINE_SINCE)
        && mount.is_some_and(|id| on_fine_file_system(&holders::mounts(), id))
}

fn on_fine_file_system(mounts: &[proc::Mount], id: u64) -> bool {
    let mount = mounts.iter().find(|mount| mount.id == id);
    mount.is_some_and(|mount| FINE_FILE_SYSTEMS.contains(&mount.file_system.as_slice()))
}

/// The first two numbers of a release, as `6.1.0-13-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|character: char| !character.is_ascii_digit());
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_as_new_as_its_first_two_numbers() {
        let is_fine = |release| version(release).is_some_and(|version| version >= FINE_SINCE);
        for (release, expected) in [
            ("6.1.0-13-amd64", false),
            ("6.12.99", false),
            ("6.13.0", true),
            ("6.18.44-fc-v669", true),
            ("7.0-rc1", true),
            ("10.2", true),
            ("6", false),
            ("", false),
            ("mainline", false),
        ] {
            assert_eq!(is_fine(release), expected, "{release}");
        }
    }

    #[test]
    fn ext3_stamps_coarsely_on_the_driver_of_ext4() {
        let table = b"21 1 8:1 / / rw - ext4 /dev/sda1 rw\n22 21 8:2 / /old rw shared:1 - ext3 /dev/sda2 rw\n";
        let mounts = proc::parse_mounts(table);

        assert!(on_fine_file_system(&mounts, 21));
        assert!(!on_fine_file_system(&mounts, 22));
        assert!(!on_fine_file_system(&mounts, 23));
    }
}
