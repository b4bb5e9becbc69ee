//! A directory for the demo: on a real file system, because neither logs nor disks belong on tmpfs.

use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::exit::Exit;
use crate::failure::Failure;

/// Where the demo works. The disks go away when it is dropped; the receipt stays.
#[derive(Debug)]
pub(crate) struct Place {
    directory: PathBuf,
    disks: Option<TempDir>,
}

impl Place {
    /// Makes the directory: in `wanted`, else in the first temporary place that is not in memory.
    pub(crate) fn make(wanted: Option<&Path>, keep: bool) -> Result<Self, Failure> {
        let parent = match wanted {
            Some(directory) => checked(directory)?,
            None => suitable()?,
        };
        let failed = |error: io::Error| {
            Failure::new(
                Exit::Target,
                format!("making a directory in {}: {error}", parent.display()),
            )
        };
        let directory = tempfile::Builder::new()
            .prefix("blockferry-demo-")
            .tempdir_in(&parent)
            .map_err(failed)?
            .keep();
        let disks = tempfile::Builder::new()
            .prefix("disks-")
            .tempdir_in(&directory)
            .map_err(failed)?;
        let mut place = Self {
            directory,
            disks: Some(disks),
        };
        if keep {
            let kept = place.disks.take().map(TempDir::keep);
            place.directory = kept.unwrap_or(place.directory.clone());
        }
        Ok(place)
    }

    /// A disk or other file that goes away at the end.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.disks
            .as_ref()
            .map_or(self.directory.as_path(), TempDir::path)
            .join(name)
    }

    /// The file that stays.
    pub(crate) fn receipt(&self) -> PathBuf {
        self.directory.join("receipt.json")
    }
}

impl Drop for Place {
    /// Leaves nothing empty behind when the demo failed before it had a receipt.
    fn drop(&mut self) {
        drop(self.disks.take());
        drop(std::fs::remove_dir(&self.directory));
    }
}

fn checked(directory: &Path) -> Result<PathBuf, Failure> {
    std::fs::create_dir_all(directory).map_err(|error| {
        Failure::new(
            Exit::Target,
            format!("making {}: {error}", directory.display()),
        )
    })?;
    if is_in_memory(directory) {
        return Err(Failure::new(
            Exit::Usage,
            format!(
                "{} is kept in memory (tmpfs); disks and logs need a real file system",
                directory.display()
            ),
        )
        .with_hint("without --dir a suitable place is chosen"));
    }
    Ok(directory.to_owned())
}

fn suitable() -> Result<PathBuf, Failure> {
    let current = std::env::current_dir().unwrap_or_default();
    [std::env::temp_dir(), PathBuf::from("/var/tmp"), current]
        .into_iter()
        .find(|directory| directory.is_dir() && !is_in_memory(directory) && is_writable(directory))
        .ok_or_else(|| {
            Failure::new(
                Exit::Usage,
                "the temporary directories are kept in memory (tmpfs) or cannot be written",
            )
            .with_hint("name a place on a disk: blockferry demo --dir DIR")
        })
}

fn is_writable(directory: &Path) -> bool {
    tempfile::tempfile_in(directory).is_ok()
}

fn is_in_memory(directory: &Path) -> bool {
    let Ok(directory) = directory.canonicalize() else {
        return false;
    };
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    matches!(file_system(&table, &directory), Some("tmpfs" | "ramfs"))
}

/// Type of the file system that holds `path`: the last of the longest mount points above it.
fn file_system<'a>(mountinfo: &'a str, path: &Path) -> Option<&'a str> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let (mount, source) = line.split_once(" - ")?;
            let point = PathBuf::from(unescaped(mount.split(' ').nth(4)?));
            let depth = path
                .starts_with(&point)
                .then(|| point.components().count())?;
            Some((depth, source.split(' ').next()?))
        })
        .max_by_key(|&(depth, _)| depth)
        .map(|(_, kind)| kind)
}

/// Mount points write blanks as `\040`, and so on.
fn unescaped(text: &str) -> String {
    [
        (r"\040", " "),
        (r"\011", "\t"),
        (r"\012", "\n"),
        (r"\134", r"\"),
    ]
    .into_iter()
    .fold(text.to_owned(), |text, (escape, plain)| {
        text.replace(escape, plain)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:25 / /tmp rw,nosuid - tmpfs tmpfs rw
31 30 254:1 / /tmp/on\\040disk rw - xfs /dev/vdb rw
40 22 0:31 / /var/tmp rw shared:3 - tmpfs tmpfs rw
41 22 254:2 / /var/tmp rw shared:4 - btrfs /dev/vdc rw
";

    fn parent() -> TempDir {
        let directory = suitable().expect("a directory on a disk");
        tempfile::tempdir_in(directory).expect("a directory")
    }

    #[test]
    fn the_deepest_mount_decides_and_the_later_one_covers_the_earlier() {
        for (path, kind) in [
            ("/home", "ext4"),
            ("/tmp", "tmpfs"),
            ("/tmp/x/y", "tmpfs"),
            ("/tmpfile", "ext4"),
            ("/tmp/on disk/x", "xfs"),
            ("/var/tmp/x", "btrfs"),
        ] {
            assert_eq!(file_system(TABLE, Path::new(path)), Some(kind), "{path}");
        }
    }

    #[test]
    fn shared_memory_is_recognised_as_memory() {
        if Path::new("/dev/shm").is_dir() {
            assert!(is_in_memory(Path::new("/dev/shm")));
        }
    }

    #[test]
    fn disks_go_away_and_the_receipt_stays() {
        let parent = parent();
        let place = Place::make(Some(parent.path()), false).expect("a place");
        let (disk, receipt) = (place.file("a.raw"), place.receipt());
        std::fs::write(&disk, "disk").expect("written");
        std::fs::write(&receipt, "receipt").expect("written");

        drop(place);

        assert!(!disk.exists() && receipt.exists());
    }

    #[test]
    fn kept_disks_stay() {
        let parent = parent();
        let place = Place::make(Some(parent.path()), true).expect("a place");
        let disk = place.file("a.raw");
        std::fs::write(&disk, "disk").expect("written");

        drop(place);

        assert!(disk.exists());
    }
}
