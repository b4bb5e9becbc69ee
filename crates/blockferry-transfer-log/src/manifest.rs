//! The manifest of a point, while it is written.

use std::io;
use std::sync::Arc;

use blockferry_device::{StorageDir, StorageFile};

use crate::error::{Error, Result};
use crate::format::SessionId;
use crate::replica::manifest_name;

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
