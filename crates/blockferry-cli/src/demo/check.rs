//! The demo's own checks, independent of the engine: bytes compared one by one, and the file system's checker.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::exit::Exit;
use crate::failure::Failure;

const PIECE_BYTES: usize = 1 << 20;

/// A promise of the story that did not hold.
pub(crate) fn broken(claim: &str, found: impl std::fmt::Display) -> Failure {
    Failure::new(
        Exit::Corruption,
        format!("the demo expected that {claim}, but found {found}"),
    )
}

/// Holds the story to what it says.
pub(crate) fn claim(
    holds: bool,
    claim: &str,
    found: impl std::fmt::Display,
) -> Result<(), Failure> {
    if holds {
        Ok(())
    } else {
        Err(broken(claim, found))
    }
}

/// Both files have the same bytes, to the last one.
pub(crate) fn same_bytes(one: &Path, other: &Path, text: &str) -> Result<(), Failure> {
    match first_difference(one, other) {
        Ok(None) => Ok(()),
        Ok(Some(offset)) => Err(broken(
            text,
            format_args!("a difference at offset {offset}"),
        )),
        Err(error) => Err(unreadable(one, other, &error)),
    }
}

fn unreadable(one: &Path, other: &Path, error: &io::Error) -> Failure {
    let message = format!(
        "comparing {} and {}: {error}",
        one.display(),
        other.display()
    );
    Failure::new(Exit::Target, message)
}

/// Offset of the first piece of 1 MiB that differs.
fn first_difference(one: &Path, other: &Path) -> io::Result<Option<u64>> {
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let (mut left, mut right) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
    let mut offset = 0;
    loop {
        let (a, b) = (fill(&mut one, &mut left)?, fill(&mut other, &mut right)?);
        if left[..a] != right[..b] {
            return Ok(Some(offset));
        }
        if a == 0 {
            return Ok(None);
        }
        offset += a as u64;
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

/// Runs `e2fsck -fn`, which reads only; `None` if it is not installed.
pub(crate) fn file_system(disk: &Path) -> Result<Option<()>, Failure> {
    let Some(program) = checker() else {
        return Ok(None);
    };
    let output = Command::new(program)
        .arg("-fn")
        .arg(disk)
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) if output.status.success() => Ok(Some(())),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            Err(broken("e2fsck finds the file system clean", text.trim()))
        }
        Err(error) => Err(Failure::new(
            Exit::Target,
            format!("running e2fsck: {error}"),
        )),
    }
}

fn checker() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/sbin", "/usr/sbin"].map(PathBuf::from))
        .map(|directory| directory.join("e2fsck"))
        .find(|program| program.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn difference(one: &[u8], other: &[u8]) -> Option<u64> {
        let directory = tempfile::tempdir().expect("a directory");
        let (a, b) = (directory.path().join("a"), directory.path().join("b"));
        std::fs::write(&a, one).expect("written");
        std::fs::write(&b, other).expect("written");
        first_difference(&a, &b).expect("readable")
    }

    #[test]
    fn one_flipped_bit_and_one_missing_byte_are_found() {
        let disk = vec![7; 3 * PIECE_BYTES + 5];
        let mut flipped = disk.clone();
        flipped[2 * PIECE_BYTES + 1] ^= 1;

        assert_eq!(difference(&disk, &disk), None);
        assert_eq!(difference(&disk, &flipped), Some(2 * PIECE_BYTES as u64));
        assert_eq!(
            difference(&disk, &disk[..disk.len() - 1]),
            Some(3 * PIECE_BYTES as u64)
        );
        assert_eq!(
            difference(&disk[..PIECE_BYTES], &disk[..2 * PIECE_BYTES]),
            Some(PIECE_BYTES as u64)
        );
    }
}
