//! [`FromMedium`]: what is stored, not what the page cache shows.

use std::sync::Arc;

use super::forward::forward_source_facts;
use crate::{BlockSource, BlockTarget, ReadRequest, Result, Status};

/// A source whose reads come from the medium of a target.
#[derive(Debug)]
pub struct FromMedium<D: ?Sized> {
    inner: Arc<D>,
}

impl<D: BlockTarget + ?Sized> FromMedium<D> {
    /// Wraps `inner`.
    pub fn new(inner: Arc<D>) -> Self {
        Self { inner }
    }
}

impl<D: BlockTarget + ?Sized> BlockSource for FromMedium<D> {
    forward_source_facts!();

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.inner
            .read_medium(&mut [ReadRequest { offset, buffer }])
    }

    fn read_batch(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        self.inner.read_medium(requests)
    }

    fn status_at(&self, offset: u64) -> Result<(Status, u64)> {
        self.inner.status_at(offset)
    }
}
