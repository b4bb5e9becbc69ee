//! [`Cancellable`]: begins nothing once its token is cancelled.

use std::sync::Arc;

use blockferry_core::Extent;

use super::forward::{forward_source_facts, forward_target_facts};
use crate::{BlockSource, BlockTarget, CancelToken, ReadRequest, Result, Status, WriteRequest};

/// A device that fails with `ErrorKind::Cancelled` instead of moving bytes. A request that has begun is
/// finished, and flushing stays possible: what was written may still be made durable.
#[derive(Debug)]
pub struct Cancellable<D: ?Sized> {
    token: CancelToken,
    inner: Arc<D>,
}

impl<D: BlockSource + ?Sized> Cancellable<D> {
    /// Wraps `inner`.
    pub fn new(inner: Arc<D>, token: CancelToken) -> Self {
        Self { token, inner }
    }

    fn check(&self, attempt: &str) -> Result<()> {
        self.token
            .check(&format!("{attempt} of {}", self.inner.label()))
    }
}

impl<D: BlockSource + ?Sized> BlockSource for Cancellable<D> {
    forward_source_facts!();

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.check("a read")?;
        self.inner.read_at(offset, buffer)
    }

    fn read_batch(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        self.check("reads")?;
        self.inner.read_batch(requests)
    }

    fn status_at(&self, offset: u64) -> Result<(Status, u64)> {
        self.check("the status")?;
        self.inner.status_at(offset)
    }
}

impl<D: BlockTarget + ?Sized> BlockTarget for Cancellable<D> {
    forward_target_facts!();

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check("a write")?;
        self.inner.write_at(offset, bytes)
    }

    fn write_batch(&self, requests: &[WriteRequest<'_>]) -> Result<()> {
        self.check("writes")?;
        self.inner.write_batch(requests)
    }

    fn write_zeroes(&self, extent: Extent) -> Result<()> {
        self.check("zeroing")?;
        self.inner.write_zeroes(extent)
    }

    fn punch(&self, extent: Extent) -> Result<bool> {
        self.check("punching")?;
        self.inner.punch(extent)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn read_medium(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        self.check("reads from the medium")?;
        self.inner.read_medium(requests)
    }

    fn reserve(&self, extents: &[Extent]) -> Result<Vec<Extent>> {
        self.check("a reservation")?;
        self.inner.reserve(extents)
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.check("a resize")?;
        self.inner.resize(size_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ErrorKind, MemoryDevice};

    #[test]
    fn no_request_begins_after_cancelling_but_a_flush_does() {
        let (token, memory) = (
            CancelToken::new(),
            Arc::new(MemoryDevice::zeroed("memory", 4096)),
        );
        let device = Cancellable::new(memory, token.clone());
        device.write_at(0, &[1]).unwrap();

        token.cancel();

        let refused = device.write_at(0, &[2]).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Cancelled);
        assert_eq!(
            device.read_at(0, &mut [0]).unwrap_err().kind(),
            ErrorKind::Cancelled
        );
        device.flush().unwrap();
    }
}
