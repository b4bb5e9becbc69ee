//! [`ManifestWriter`]: regions in, bytes out, sequentially.

use std::fmt;
use std::io::Write;

use super::format;
use crate::{Error, ErrorKind, Geometry, RegionLeaves, Result, Root, TreeHasher};

/// Bytes gathered before they are handed on.
const BUFFER_BYTES: usize = 64 << 10;

/// Writes a manifest to a sequential writer.
///
/// Holds at most 64 KiB of output and the open nodes of the tree. It does not flush the writer
/// beyond [`Write::flush`]; durability is the caller's matter. A manifest that was not finished is
/// truncated, and its reader says so.
pub struct ManifestWriter<W> {
    output: W,
    buffer: Vec<u8>,
    tree: TreeHasher,
    entry_count: u64,
    written_bytes: u64,
    /// A write failed: what the output holds is unknown for good.
    failed: bool,
}

impl<W: Write> ManifestWriter<W> {
    /// Starts a manifest of an image of this geometry.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the output fails.
    pub fn new(geometry: Geometry, output: W) -> Result<Self> {
        let mut buffer = Vec::with_capacity(BUFFER_BYTES);
        format::encode_header(&mut buffer, &geometry);
        let tree = TreeHasher::new(geometry);
        Ok(Self {
            output,
            buffer,
            tree,
            entry_count: 0,
            written_bytes: 0,
            failed: false,
        })
    }

    /// Adds a region. Regions come in ascending order; those left out read zero, as does one
    /// without data.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the output fails; the manifest is lost then, and every later call
    /// fails.
    ///
    /// # Panics
    /// When the region is of another geometry, or not behind the last one pushed.
    pub fn push(&mut self, leaves: &RegionLeaves) -> Result<()> {
        self.tree.push(leaves);
        if leaves.is_zero() {
            return Ok(());
        }
        self.make_room(format::MAX_ENTRY_BYTES)?;
        format::encode_region(&mut self.buffer, leaves);
        self.entry_count += 1;
        Ok(())
    }

    /// Ends the manifest and gives the root of the image and the output back.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the output fails.
    pub fn finish(mut self) -> Result<(Root, W)> {
        let root = self.tree.clone().finish();
        self.make_room(format::END_BYTES)?;
        format::encode_end(&mut self.buffer, self.entry_count, &root);
        self.write_buffer()?;
        self.output
            .flush()
            .map_err(|cause| Error::from_io("flush of the manifest", cause))?;
        Ok((root, self.output))
    }

    fn make_room(&mut self, bytes: usize) -> Result<()> {
        if self.buffer.len() + bytes > BUFFER_BYTES {
            self.write_buffer()?;
        }
        Ok(())
    }

    fn write_buffer(&mut self) -> Result<()> {
        let at = self.written_bytes;
        if self.failed {
            let message = format!("write of the manifest at byte {at}: an earlier write failed");
            return Err(Error::new(ErrorKind::Io, message));
        }
        let length = self.buffer.len();
        self.output.write_all(&self.buffer).map_err(|cause| {
            self.failed = true;
            Error::from_io(
                format!("write of {length} bytes of manifest at byte {at}"),
                cause,
            )
        })?;
        self.written_bytes += length as u64;
        self.buffer.clear();
        Ok(())
    }
}

impl<W> fmt::Debug for ManifestWriter<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ManifestWriter")
            .field("entry_count", &self.entry_count)
            .field("written_bytes", &self.written_bytes)
            .finish_non_exhaustive()
    }
}
