//! Files with secrets: nobody but their owner may read them.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};

/// More than any certificate or key has.
const MAX_PEM_BYTES: u64 = 1024 * 1024;

pub(super) fn refused(
    attempt: String,
    cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> Error {
    Error::with_cause(ErrorKind::Credentials, attempt, cause)
}

/// The text of a certificate.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    read_all(&File::open(path).map_err(unread(path))?, path)
}

/// The text of a key; refused if others than its owner may read it.
pub(super) fn read_secret(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(unread(path))?;
    let metadata = file.metadata().map_err(unread(path))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(Error::new(
            ErrorKind::Credentials,
            format!(
                "key {}: expected a file that only its owner may read, found mode {mode:03o}; chmod 600 it, and make \
                 a new one if others may have read it",
                path.display()
            ),
        ));
    }
    read_all(&file, path)
}

fn read_all(file: &File, path: &Path) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    let mut bounded = file.take(MAX_PEM_BYTES + 1);
    bounded.read_to_end(&mut text).map_err(unread(path))?;
    if text.len() as u64 > MAX_PEM_BYTES {
        let found = "expected a certificate or a key, found more than 1 MiB";
        return Err(unread(path)(found));
    }
    Ok(text)
}

fn unread<E: Into<Box<dyn std::error::Error + Send + Sync>>>(path: &Path) -> impl Fn(E) -> Error {
    move |error| refused(format!("read {}", path.display()), error)
}

/// Writes a file that was not there before, for its owner alone where it is secret.
pub(super) fn create(path: &Path, text: &str, is_secret: bool) -> Result<()> {
    let mode = if is_secret { 0o600 } else { 0o644 };
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|error| refused(format!("create {}", path.display()), error))
}
