//! [`Counting`]: counts the work a device is given, so that tests and reports can state it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockferry_core::Extent;

use super::forward::{forward_source_facts, forward_target_facts};
use crate::{BlockSource, BlockTarget, ReadRequest, Result, Status, WriteRequest};

/// What a [`Counting`] device was asked for so far, failed requests included.
#[derive(Debug, Default)]
pub struct Counts {
    read_requests: AtomicU64,
    read_bytes: AtomicU64,
    medium_bytes: AtomicU64,
    write_requests: AtomicU64,
    written_bytes: AtomicU64,
    zeroed_bytes: AtomicU64,
    punched_bytes: AtomicU64,
    flushes: AtomicU64,
}

impl Counts {
    /// Reads, each request of a batch by itself; without those from the medium.
    #[must_use]
    pub fn read_requests(&self) -> u64 {
        self.read_requests.load(Ordering::Relaxed)
    }

    /// Bytes of these reads.
    #[must_use]
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }

    /// Bytes read back from the medium.
    #[must_use]
    pub fn medium_bytes(&self) -> u64 {
        self.medium_bytes.load(Ordering::Relaxed)
    }

    /// Writes of bytes, each request of a batch by itself.
    #[must_use]
    pub fn write_requests(&self) -> u64 {
        self.write_requests.load(Ordering::Relaxed)
    }

    /// Bytes of these writes.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of extents written as zeros.
    #[must_use]
    pub fn zeroed_bytes(&self) -> u64 {
        self.zeroed_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of extents whose space was to be given back.
    #[must_use]
    pub fn punched_bytes(&self) -> u64 {
        self.punched_bytes.load(Ordering::Relaxed)
    }

    /// Flushes.
    #[must_use]
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }
}

fn add(count: &AtomicU64, amount: u64) {
    count.fetch_add(amount, Ordering::Relaxed);
}

/// A device that counts requests and bytes.
#[derive(Debug)]
pub struct Counting<D: ?Sized> {
    counts: Arc<Counts>,
    inner: Arc<D>,
}

impl<D: BlockSource + ?Sized> Counting<D> {
    /// Wraps `inner`, beginning at zero.
    pub fn new(inner: Arc<D>) -> Self {
        Self {
            counts: Arc::default(),
            inner,
        }
    }

    /// The counts, which go on counting.
    #[must_use]
    pub fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }
}

impl<D: BlockSource + ?Sized> BlockSource for Counting<D> {
    forward_source_facts!();

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        add(&self.counts.read_requests, 1);
        add(&self.counts.read_bytes, buffer.len() as u64);
        self.inner.read_at(offset, buffer)
    }

    fn read_batch(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        add(&self.counts.read_requests, requests.len() as u64);
        add(
            &self.counts.read_bytes,
            requests.iter().map(|r| r.buffer.len() as u64).sum(),
        );
        self.inner.read_batch(requests)
    }

    fn status_at(&self, offset: u64) -> Result<(Status, u64)> {
        self.inner.status_at(offset)
    }
}

impl<D: BlockTarget + ?Sized> BlockTarget for Counting<D> {
    forward_target_facts!();

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        add(&self.counts.write_requests, 1);
        add(&self.counts.written_bytes, bytes.len() as u64);
        self.inner.write_at(offset, bytes)
    }

    fn write_batch(&self, requests: &[WriteRequest<'_>]) -> Result<()> {
        add(&self.counts.write_requests, requests.len() as u64);
        add(
            &self.counts.written_bytes,
            requests.iter().map(|r| r.bytes.len() as u64).sum(),
        );
        self.inner.write_batch(requests)
    }

    fn write_zeroes(&self, extent: Extent) -> Result<()> {
        add(&self.counts.zeroed_bytes, extent.length());
        self.inner.write_zeroes(extent)
    }

    fn punch(&self, extent: Extent) -> Result<bool> {
        add(&self.counts.punched_bytes, extent.length());
        self.inner.punch(extent)
    }

    fn flush(&self) -> Result<()> {
        add(&self.counts.flushes, 1);
        self.inner.flush()
    }

    fn read_medium(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        add(
            &self.counts.medium_bytes,
            requests.iter().map(|r| r.buffer.len() as u64).sum(),
        );
        self.inner.read_medium(requests)
    }

    fn reserve(&self, extents: &[Extent]) -> Result<Vec<Extent>> {
        self.inner.reserve(extents)
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.inner.resize(size_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryDevice;

    #[test]
    fn a_batch_counts_as_its_requests() {
        let device = Counting::new(Arc::new(MemoryDevice::zeroed("memory", 65536)));
        let counts = device.counts();
        let bytes = [1; 100];

        device.write_at(0, &bytes).unwrap();
        device
            .write_batch(&[0, 200].map(|offset| WriteRequest {
                offset,
                bytes: &bytes,
            }))
            .unwrap();
        device.write_zeroes(Extent::from_range(0..4096)).unwrap();
        device.flush().unwrap();
        device.read_at(7, &mut [0; 5]).unwrap();
        device
            .read_medium(&mut [ReadRequest {
                offset: 0,
                buffer: &mut [0; 9],
            }])
            .unwrap();

        assert_eq!((counts.write_requests(), counts.written_bytes()), (3, 300));
        assert_eq!((counts.read_requests(), counts.read_bytes()), (1, 5));
        assert_eq!(
            (
                counts.zeroed_bytes(),
                counts.flushes(),
                counts.medium_bytes()
            ),
            (4096, 1, 9)
        );
    }
}
