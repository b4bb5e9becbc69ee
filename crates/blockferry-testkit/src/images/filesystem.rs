//! Images with a real file system: ext4 by `mke2fs` where it is installed, else the FAT16 writer beside this
//! file. Neither needs root or a mount.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{chance, content, fat};
use crate::Random;
use crate::random::{count, index};

/// The kind of a generated file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileSystem {
    /// Made by `mke2fs -d`.
    Ext4,
    /// Made by the built-in writer; uses at most the first 2 GiB.
    Fat16,
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ext4 => "ext4 (mke2fs)",
            Self::Fat16 => "FAT16 (built-in generator)",
        })
    }
}

/// Makes a new image of `bytes` (at least 8 MiB) with a file system about 60 % full of generated files, and
/// says which kind it became.
///
/// # Errors
/// The image exists, cannot be written, or is too small for the files.
pub fn filesystem_image(path: &Path, bytes: u64, seed: u64) -> io::Result<FileSystem> {
    let kind = if find_mke2fs().is_some() {
        FileSystem::Ext4
    } else {
        FileSystem::Fat16
    };
    filesystem_image_of(kind, path, bytes, seed)?;
    Ok(kind)
}

/// As [`filesystem_image`], of this kind or not at all.
///
/// # Errors
/// As [`filesystem_image`], or `mke2fs` is not installed or refused.
pub fn filesystem_image_of(kind: FileSystem, path: &Path, bytes: u64, seed: u64) -> io::Result<()> {
    let file = File::create_new(path)?;
    file.set_len(bytes)?;
    match kind {
        FileSystem::Ext4 => make_ext4(path, bytes, seed),
        FileSystem::Fat16 => fat::write_volume(&file, bytes, seed),
    }
}

/// Often outside an ordinary user's `PATH`.
fn find_mke2fs() -> Option<PathBuf> {
    let listed = std::env::var_os("PATH").unwrap_or_default();
    let fixed = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let mut directories = std::env::split_paths(&listed).chain(fixed);
    directories.find_map(|directory| Some(directory.join("mke2fs")).filter(|path| path.is_file()))
}

fn make_ext4(path: &Path, bytes: u64, seed: u64) -> io::Result<()> {
    let Some(mke2fs) = find_mke2fs() else {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "mke2fs is not installed",
        ));
    };
    // The journal of a small file system takes 4 MiB.
    let files = FilesBeside::create(path, bytes.saturating_sub(5 << 20) / 5 * 3, seed)?;
    let outcome = Command::new(mke2fs)
        .args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-b",
            "4096",
            "-m",
            "0",
            "-U",
            &uuid(seed),
            "-d",
        ])
        .arg(&files.directory)
        .arg(path)
        .output()?;
    if outcome.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&outcome.stderr);
    let text = format!(
        "mke2fs of {bytes} bytes for {}: {}",
        path.display(),
        complaint.trim()
    );
    Err(io::Error::other(text))
}

fn uuid(seed: u64) -> String {
    let mut random = Random::part(seed, 2);
    let (a, b) = (random.next_u64(), random.next_u64());
    let part = |value: u64, shift: u32| (value >> shift) & 0xFFFF;
    format!(
        "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
        a >> 32,
        part(a, 16),
        part(a, 0) & 0xFFF,
        part(b, 48) & 0xFFF,
        b & 0xFFFF_FFFF_FFFF
    )
}

/// The files to put into an image, beside it until they are in it.
struct FilesBeside {
    directory: PathBuf,
}

impl FilesBeside {
    fn create(image: &Path, capacity: u64, seed: u64) -> io::Result<Self> {
        let mut name = image.file_name().unwrap_or_default().to_owned();
        name.push(".files");
        let files = Self {
            directory: image.with_file_name(name),
        };
        fs::create_dir(&files.directory)?;
        for (number, size) in (0..).zip(content::file_sizes(seed, capacity, 2000)) {
            files.add(seed, number, size)?;
        }
        Ok(files)
    }

    fn add(&self, seed: u64, number: u64, size: u64) -> io::Result<()> {
        let directory = self.directory.join(format!("directory-{}", number % 7));
        fs::create_dir_all(&directory)?;
        let mut file = BufWriter::new(File::create_new(directory.join(format!("file-{number}")))?);
        let block_bytes = count(content::BLOCK_BYTES);
        for block in 0..size.div_ceil(block_bytes) {
            let length = index(block_bytes.min(size - block * block_bytes));
            file.write_all(&content::block(seed, number, block, length))?;
        }
        file.flush()
    }
}

impl Drop for FilesBeside {
    fn drop(&mut self) {
        // Best effort: the image is what counts, and a leftover names itself.
        fs::remove_dir_all(&self.directory).ok();
    }
}

/// Overwrites about `fraction` of the file data in an image made by [`filesystem_image`], in runs of up to
/// 16 KiB as applications do, and returns how many 4 KiB pages it changed. Metadata stays as it is, so the
/// file system stays consistent.
///
/// # Errors
/// The image cannot be read or written.
pub fn edit_filesystem_image(path: &Path, seed: u64, fraction: f64) -> io::Result<u64> {
    const RUN_BYTES: u64 = 16 * 1024;
    let file = File::options().read(true).write(true).open(path)?;
    let size = file.metadata()?.len();
    let mut buffer = vec![0; index(RUN_BYTES)];
    let mut changed_pages = 0;
    for run in 0..size.div_ceil(RUN_BYTES) {
        let start = run * RUN_BYTES;
        let mut random = Random::part(seed, run);
        if chance(&mut random, fraction) {
            let piece = &mut buffer[..index(RUN_BYTES.min(size - start))];
            file.read_exact_at(piece, start)?;
            changed_pages += edit_run(piece, &mut random);
            file.write_all_at(piece, start)?;
        }
    }
    Ok(changed_pages)
}

fn edit_run(run: &mut [u8], random: &mut Random) -> u64 {
    let mut changed_pages = 0;
    for block in run.chunks_mut(content::BLOCK_BYTES) {
        let Some(length) = content::data_bytes(block).filter(|&n| n > content::HEADER_BYTES) else {
            continue;
        };
        let payload = &mut block[content::HEADER_BYTES..length];
        let first = payload[0];
        random.fill(payload);
        payload[0] = first.wrapping_add(1);
        changed_pages += 1;
    }
    changed_pages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_clean(path: &Path) -> bool {
        let tool = find_mke2fs()
            .expect("asked for ext4 only")
            .with_file_name("e2fsck");
        Command::new(tool)
            .arg("-fn")
            .arg(path)
            .output()
            .unwrap()
            .status
            .success()
    }

    #[test]
    fn edits_change_the_pages_they_count_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        for kind in [FileSystem::Ext4, FileSystem::Fat16] {
            if kind == FileSystem::Ext4 && find_mke2fs().is_none() {
                continue;
            }
            let path = directory.path().join(format!("{kind:?}"));
            filesystem_image_of(kind, &path, 24 << 20, 3).unwrap();
            let old = fs::read(&path).unwrap();

            let changed = edit_filesystem_image(&path, 4, 0.1).unwrap();

            let new = fs::read(&path).unwrap();
            let pages = old.chunks(4096).zip(new.chunks(4096));
            let differing = count(pages.clone().filter(|(old, new)| old != new).count());
            assert_eq!(changed, differing, "{kind}");
            assert!(
                (150..700).contains(&changed),
                "{kind}: {changed} of about 3,600 pages"
            );
            for (old, new) in pages.filter(|(old, new)| old != new) {
                assert!(content::data_bytes(old).is_some());
                assert_eq!(old[..content::HEADER_BYTES], new[..content::HEADER_BYTES]);
            }
            if kind == FileSystem::Ext4 {
                assert!(is_clean(&path));
            }
        }
        assert!(
            fs::read_dir(directory.path()).unwrap().count() <= 2,
            "nothing is left over"
        );
    }

    #[test]
    fn the_kind_that_was_made_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");

        let kind = filesystem_image(&path, 8 << 20, 1).unwrap();

        assert_eq!(kind == FileSystem::Ext4, find_mke2fs().is_some());
        assert_eq!(fs::metadata(&path).unwrap().len(), 8 << 20);
        assert!(
            filesystem_image(&path, 8 << 20, 1).is_err(),
            "an existing file stays"
        );
    }
}
