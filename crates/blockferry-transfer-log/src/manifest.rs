//! Manifests of points: written while a session stages, opened by those that compare with one.

use std::io;
use std::sync::Arc;

use blockferry_device::{StorageDir, StorageFile};

use crate::error::{Error, Result};
use crate::format::SessionId;

/// Name of the manifest of a point.
pub(crate) fn manifest_name(point: SessionId) -> String {
    format!("{point}.manifest")
}

/// The manifest of a point, while it is written.
#[derive(Debug)]
pub struct ManifestFile {
    file: Arc<dyn StorageFile>,
    stats: Arc<crate::stats::Stats>,
    offset: u64,
}

impl ManifestFile {
    pub(crate) fn create(
        dir: &Arc<dyn StorageDir>,
        session: SessionId,
        stats: &Arc<crate::stats::Stats>,
    ) -> Result<Self> {
        let name = manifest_name(session);
        let failed = |e| Error::log(format!("create {name}"), e);
        dir.remove(&name).map_err(failed)?;
        let file = dir.create(&name).map_err(failed)?;
        Ok(Self {
            file,
            stats: Arc::clone(stats),
            offset: 0,
        })
    }

    /// Makes it durable.
    ///
    /// # Errors
    /// The flush failed.
    pub fn finish(self) -> Result<()> {
        self.file
            .flush()
            .map_err(|e| Error::log("flush the manifest", e))?;
        self.stats.count_flush();
        Ok(())
    }
}

impl io::Write for ManifestFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file
            .write_at(self.offset, bytes)
            .map_err(io::Error::other)?;
        self.offset += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where a manifest is; it can be opened more than once.
#[derive(Clone, Debug)]
pub struct ManifestSource {
    dir: Arc<dyn StorageDir>,
    name: String,
}

impl ManifestSource {
    pub(crate) fn of(dir: Arc<dyn StorageDir>, point: SessionId) -> Self {
        Self {
            dir,
            name: manifest_name(point),
        }
    }

    /// A reader over its bytes; `None` if it is not there.
    #[must_use]
    pub fn open(&self) -> Option<Box<dyn io::Read + Send>> {
        let file = self.dir.open(&self.name).ok().flatten()?;
        let reader = SequentialReader { file, offset: 0 };
        Some(Box::new(io::BufReader::with_capacity(64 * 1024, reader)))
    }
}

/// Reads a stored file from its start.
#[derive(Debug)]
struct SequentialReader {
    file: Arc<dyn StorageFile>,
    offset: u64,
}

impl io::Read for SequentialReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.file.size_bytes().saturating_sub(self.offset);
        let count = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        self.file
            .read_at(self.offset, &mut buffer[..count])
            .map_err(io::Error::other)?;
        self.offset += count as u64;
        Ok(count)
    }
}
