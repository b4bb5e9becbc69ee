//! [`ReadOnly`]: proves that nothing is written.

use std::sync::Arc;

use blockferry_core::Extent;

use super::forward::{forward_source_facts, forward_target_facts};
use crate::{BlockSource, BlockTarget, Error, ErrorKind, ReadRequest, Result, Status};

/// A target that refuses every change with `ErrorKind::Denied`. Flushing nothing succeeds.
#[derive(Debug)]
pub struct ReadOnly<D: ?Sized> {
    inner: Arc<D>,
}

impl<D: BlockSource + ?Sized> ReadOnly<D> {
    /// Wraps `inner`.
    pub fn new(inner: Arc<D>) -> Self {
        Self { inner }
    }

    fn refuse<T>(&self, attempt: &str) -> Result<T> {
        let label = self.inner.label();
        Err(Error::new(
            ErrorKind::Denied,
            format!("{attempt} of {label}: opened read-only"),
        ))
    }
}

impl<D: BlockSource + ?Sized> BlockSource for ReadOnly<D> {
    forward_source_facts!();

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.inner.read_at(offset, buffer)
    }

    fn read_batch(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        self.inner.read_batch(requests)
    }

    fn status_at(&self, offset: u64) -> Result<(Status, u64)> {
        self.inner.status_at(offset)
    }
}

impl<D: BlockTarget + ?Sized> BlockTarget for ReadOnly<D> {
    forward_target_facts!();

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.refuse(&format!(
            "write of {} bytes at offset {offset}",
            bytes.len()
        ))
    }

    fn write_zeroes(&self, extent: Extent) -> Result<()> {
        self.refuse(&format!("zeroing of {extent}"))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn read_medium(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        self.inner.read_medium(requests)
    }

    fn reserve(&self, extents: &[Extent]) -> Result<Vec<Extent>> {
        self.refuse(&format!("reservation of {} extents", extents.len()))
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        if size_bytes == self.inner.size_bytes() {
            return Ok(());
        }
        self.refuse(&format!("resize to {size_bytes} bytes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryDevice;

    #[test]
    fn every_change_is_refused_and_nothing_changes() {
        let device = Arc::new(MemoryDevice::from_bytes("memory", vec![5; 8192]));
        let guarded = ReadOnly::new(Arc::clone(&device) as Arc<dyn BlockTarget>);
        let extent = Extent::from_range(0..4096);

        let outcomes = [
            guarded.write_at(0, &[1]),
            guarded.write_batch(&[crate::WriteRequest {
                offset: 0,
                bytes: &[1],
            }]),
            guarded.write_zeroes(extent),
            guarded.reserve(&[extent]).map(drop),
            guarded.resize(4096),
        ];

        for outcome in outcomes {
            assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Denied);
        }
        assert!(!guarded.punch(extent).unwrap());
        assert_eq!(device.to_vec(), vec![5; 8192]);
    }
}
