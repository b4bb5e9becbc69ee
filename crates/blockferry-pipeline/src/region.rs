//! A region of a device as the modes read it: which blocks are known to be zero, and runs of the others.

use std::sync::Arc;

use blockferry_core::{BlockIndex, Extent, Geometry, REGION_BLOCKS, RegionIndex};
use blockferry_device::{BlockSource, Result, Status};

/// Most bytes read at once, unless one block is larger: two such buffers and what is made of them stay in a
/// core's cache, and a disk serves requests of this size at its full rate.
pub const PIECE_BYTES: u64 = 512 * 1024;

/// Size of a worker's buffers: a piece, or the largest block there is.
pub const BUFFER_BYTES: u64 = 1024 * 1024;

const _: () = assert!(PIECE_BYTES <= BUFFER_BYTES, "a piece fits a buffer");

/// The blocks of a region that a device guarantees to read as zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZeroBlocks {
    zero: Vec<bool>,
}

impl ZeroBlocks {
    /// Asks the device. What lies beyond its end reads as zeros: the target may have to grow.
    ///
    /// # Errors
    /// The device failed.
    pub fn of(device: &dyn BlockSource, geometry: &Geometry, region: RegionIndex) -> Result<Self> {
        let extent = geometry.region_extent(region);
        let count = to_usize(geometry.region_block_count(region));
        let mut zero = vec![true; count];
        let end = extent.end().min(device.size_bytes());
        let mut offset = extent.start();
        while offset < end {
            let (status, run_end) = device.status_at(offset)?;
            let run_end = run_end.min(end).max(offset + 1);
            if status == Status::Data {
                let block = geometry.block_size().bytes();
                let first = to_usize((offset - extent.start()) / block);
                let last = to_usize((run_end - 1 - extent.start()) / block);
                zero[first..=last].fill(false);
            }
            offset = run_end;
        }
        Ok(Self { zero })
    }

    /// Whether the block reads as zeros for sure.
    #[must_use]
    pub fn contains(&self, block_in_region: usize) -> bool {
        self.zero[block_in_region]
    }

    /// Whether all of them do.
    #[must_use]
    pub fn all(&self) -> bool {
        self.zero.iter().all(|z| *z)
    }
}

/// The regions in which at least one of some devices may hold data, ascending; large holes are passed over
/// without a step for each region.
#[derive(Debug)]
pub struct DataRegions {
    geometry: Geometry,
    /// `None`: every region counts.
    devices: Option<Vec<Arc<dyn BlockSource>>>,
    next: u64,
}

impl DataRegions {
    /// Regions that may hold data on any of `devices`.
    #[must_use]
    pub fn of(geometry: Geometry, devices: Vec<Arc<dyn BlockSource>>) -> Self {
        Self {
            geometry,
            devices: Some(devices),
            next: 0,
        }
    }

    /// Every region.
    #[must_use]
    pub fn every(geometry: Geometry) -> Self {
        Self {
            geometry,
            devices: None,
            next: 0,
        }
    }

    /// Where the zeros that begin at `start` on all devices end.
    fn zeros_end(&self, start: u64) -> u64 {
        let devices = self.devices.iter().flatten();
        devices
            .map(|device| zeros_end(&**device, start))
            .min()
            .unwrap_or(start)
    }
}

impl Iterator for DataRegions {
    type Item = RegionIndex;

    fn next(&mut self) -> Option<RegionIndex> {
        while self.next < self.geometry.region_count() {
            let region = RegionIndex::new(self.next);
            let extent = self.geometry.region_extent(region);
            let zeros_end = self.zeros_end(extent.start());
            if zeros_end < extent.end() {
                self.next += 1;
                return Some(region);
            }
            self.next = zeros_end
                .div_euclid(self.geometry.region_bytes())
                .max(self.next + 1);
        }
        None
    }
}

/// Where the zeros that begin at `start` end; `start` itself if there are none, or the device cannot tell.
fn zeros_end(device: &dyn BlockSource, start: u64) -> u64 {
    let size = device.size_bytes();
    if start >= size {
        return u64::MAX;
    }
    match device.status_at(start) {
        Ok((Status::Zero, end)) if end >= size => u64::MAX,
        Ok((Status::Zero, end)) => end,
        // A device that fails here fails again where the failure is reported: when it is read.
        Ok((Status::Data, _)) | Err(_) => start,
    }
}

/// A run of blocks of one region that are read together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockRun {
    /// First block, counted in the region.
    pub first: usize,
    /// Number of blocks.
    pub count: usize,
    /// The bytes.
    pub extent: Extent,
}

/// Groups the blocks of a region that `wanted` selects into runs of at most [`PIECE_BYTES`].
pub fn runs<'a>(
    geometry: &'a Geometry,
    region: RegionIndex,
    wanted: impl Fn(usize) -> bool + 'a,
) -> impl Iterator<Item = BlockRun> + 'a {
    runs_of(geometry, region, PIECE_BYTES, wanted)
}

/// As [`runs`], of at most `most_bytes`, but always at least one block.
pub fn runs_of<'a>(
    geometry: &'a Geometry,
    region: RegionIndex,
    most_bytes: u64,
    wanted: impl Fn(usize) -> bool + 'a,
) -> impl Iterator<Item = BlockRun> + 'a {
    let blocks = to_usize(geometry.region_block_count(region));
    let most = to_usize((most_bytes / geometry.block_size().bytes()).max(1));
    let mut next = 0;
    std::iter::from_fn(move || {
        let first = (next..blocks).find(|b| wanted(*b))?;
        let count = (first..blocks.min(first + most))
            .take_while(|b| wanted(*b))
            .count();
        next = first + count;
        let extent = Extent::from_range(
            block_in(geometry, region, first).start()
                ..block_in(geometry, region, first + count - 1).end(),
        );
        Some(BlockRun {
            first,
            count,
            extent,
        })
    })
}

/// The bytes of a block, counted in its region.
#[must_use]
pub fn block_in(geometry: &Geometry, region: RegionIndex, block: usize) -> Extent {
    geometry.block_extent(BlockIndex::new(region.get() * REGION_BLOCKS + block as u64))
}

/// Reads `extent`; what lies beyond the end of the device reads as zeros.
///
/// # Errors
/// The device failed.
pub fn read_padded(device: &dyn BlockSource, extent: Extent, buffer: &mut [u8]) -> Result<()> {
    let inside = extent
        .end()
        .min(device.size_bytes())
        .saturating_sub(extent.start());
    let (head, tail) = buffer[..to_usize(extent.length())].split_at_mut(to_usize(inside));
    if !head.is_empty() {
        device.read_at(extent.start(), head)?;
    }
    tail.fill(0);
    Ok(())
}

/// Lengths here are bounded by a region.
fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockferry_core::BlockSize;
    use blockferry_device::MemoryDevice;

    #[test]
    fn runs_cover_exactly_the_wanted_blocks() {
        let geometry = Geometry::new(200 * 65_536 + 5, BlockSize::DEFAULT);
        let wanted = |b: usize| b % 40 < 33 || b == 200;

        let found: Vec<BlockRun> = runs(&geometry, RegionIndex::new(0), wanted).collect();

        let blocks: Vec<usize> = found
            .iter()
            .flat_map(|r| r.first..r.first + r.count)
            .collect();
        assert_eq!(blocks, (0..=200).filter(|b| wanted(*b)).collect::<Vec<_>>());
        assert!(found.iter().all(|r| r.extent.length() <= PIECE_BYTES));
        assert_eq!(found.last().map(|r| r.extent.end()), Some(200 * 65_536 + 5));
    }

    #[test]
    fn what_lies_beyond_a_short_device_reads_as_zeros() {
        let device = MemoryDevice::from_bytes("short", vec![7; 5000]);
        let mut buffer = vec![1; 8192];

        read_padded(&device, Extent::from_range(4096..12_288), &mut buffer).unwrap();

        assert!(buffer[..904].iter().all(|b| *b == 7));
        assert!(buffer[904..].iter().all(|b| *b == 0));
    }
}
