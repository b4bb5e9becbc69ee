//! [`MemoryDevice`]: a device in memory, for tests and for embedders that have the bytes at hand.

use std::fmt;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use blockferry_core::{Extent, PAGE_BYTES};

use crate::{
    BlockSource, BlockTarget, Error, ErrorKind, Evidence, Identity, ReadRequest, Result, Status,
};

/// A resizable device whose content is one vector. Nothing of it survives the process.
pub struct MemoryDevice {
    label: String,
    identity: Identity,
    content: RwLock<Vec<u8>>,
}

impl MemoryDevice {
    /// A device of `size_bytes` zeros.
    #[must_use]
    pub fn zeroed(label: impl Into<String>, size_bytes: usize) -> Self {
        Self::from_bytes(label, vec![0; size_bytes])
    }

    /// A device that holds `content`.
    #[must_use]
    pub fn from_bytes(label: impl Into<String>, content: Vec<u8>) -> Self {
        let (identity, content) = (Identity::unknown(), RwLock::new(content));
        Self {
            label: label.into(),
            identity,
            content,
        }
    }

    /// Gives the device a name of its own. With it the device also gives evidence: the checksum of its
    /// whole content, so it costs a pass over it.
    #[must_use]
    pub fn with_identity(mut self, identity: Identity) -> Self {
        self.identity = identity;
        self
    }

    /// A copy of the whole content.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes().clone()
    }

    fn bytes(&self) -> RwLockReadGuard<'_, Vec<u8>> {
        // Every change is one slice operation, so a panic elsewhere leaves no half-made state.
        self.content.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn bytes_mut(&self) -> RwLockWriteGuard<'_, Vec<u8>> {
        self.content.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn range(
        &self,
        attempt: &str,
        offset: u64,
        length: usize,
        size: usize,
    ) -> Result<std::ops::Range<usize>> {
        let start = usize::try_from(offset).ok().filter(|&start| start <= size);
        let end = start
            .and_then(|start| start.checked_add(length))
            .filter(|&end| end <= size);
        match (start, end) {
            (Some(start), Some(end)) => Ok(start..end),
            _ => Err(Error::new(
                ErrorKind::OutOfRange,
                format!(
                    "{attempt} of {length} bytes at offset {offset}: {} has {size} bytes",
                    self.label
                ),
            )),
        }
    }
}

impl fmt::Debug for MemoryDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "MemoryDevice({}, {} bytes)",
            self.label,
            self.bytes().len()
        )
    }
}

impl BlockSource for MemoryDevice {
    fn label(&self) -> &str {
        &self.label
    }

    fn size_bytes(&self) -> u64 {
        self.bytes().len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let bytes = self.bytes();
        let range = self.range("read", offset, buffer.len(), bytes.len())?;
        buffer.copy_from_slice(&bytes[range]);
        Ok(())
    }

    /// Looks at the pages themselves: whole zero pages are a `Zero` run.
    fn status_at(&self, offset: u64) -> Result<(Status, u64)> {
        let bytes = self.bytes();
        let range = self.range("status", offset, 1, bytes.len())?;
        let page_bytes = usize::try_from(PAGE_BYTES).expect("4096 fits");
        let mut pages = bytes[range.start / page_bytes * page_bytes..].chunks(page_bytes);
        let is_zero = |page: &[u8]| page.iter().all(|&b| b == 0);
        let first = pages.next().is_some_and(is_zero);
        let same = pages.take_while(|page| is_zero(page) == first).count();
        let end = (offset / PAGE_BYTES + 1 + same as u64) * PAGE_BYTES;
        let status = if first { Status::Zero } else { Status::Data };
        Ok((status, end.min(bytes.len() as u64)))
    }

    fn identity(&self) -> Result<Identity> {
        Ok(self.identity.clone())
    }

    fn evidence(&self) -> Result<Evidence> {
        if !self.identity.is_known() {
            return Ok(Evidence::unknown());
        }
        Ok(Evidence::from_bytes(
            blockferry_core::checksum(&self.bytes()).as_bytes(),
        ))
    }
}

impl BlockTarget for MemoryDevice {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut content = self.bytes_mut();
        let range = self.range("write", offset, bytes.len(), content.len())?;
        content[range].copy_from_slice(bytes);
        Ok(())
    }

    fn write_zeroes(&self, extent: Extent) -> Result<()> {
        let length = usize::try_from(extent.length()).unwrap_or(usize::MAX);
        let mut content = self.bytes_mut();
        let range = self.range("write of zeros", extent.start(), length, content.len())?;
        content[range].fill(0);
        Ok(())
    }

    fn punch(&self, extent: Extent) -> Result<bool> {
        self.write_zeroes(extent)?;
        Ok(true)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn read_medium(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        self.read_batch(requests)
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        let size = usize::try_from(size_bytes).map_err(|_too_large| {
            Error::new(
                ErrorKind::NoSpace,
                format!(
                    "resize of {} to {size_bytes} bytes: not addressable",
                    self.label
                ),
            )
        })?;
        self.bytes_mut().resize(size, 0);
        Ok(())
    }

    fn logical_block_bytes(&self) -> u32 {
        4096
    }
}
