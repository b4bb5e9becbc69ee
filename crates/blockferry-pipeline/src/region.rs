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

/// Holes below this size are read like data: another request costs more.
const MIN_HOLE_BYTES: u64 = 16 * 1024;

/// Where a region of a device may hold data; all else is guaranteed to read as zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataMap {
    zero_blocks: Vec<bool>,
    // Invariant: ascending, at least MIN_HOLE_BYTES apart.
    data: Vec<Extent>,
}

impl DataMap {
    /// Asks the device. What lies beyond its end reads as zeros: the target may have to grow.
    ///
    /// # Errors
    /// The device failed.
    pub fn of(device: &dyn BlockSource, geometry: &Geometry, region: RegionIndex) -> Result<Self> {
        let extent = geometry.region_extent(region);
        let count = to_usize(geometry.region_block_count(region));
        let mut map = Self {
            zero_blocks: vec![true; count],
            data: Vec::new(),
        };
        let end = extent.end().min(device.size_bytes());
        let mut offset = extent.start();
        while offset < end {
            let (status, run_end) = device.status_at(offset)?;
            let run_end = run_end.min(end).max(offset + 1);
            if status == Status::Data {
                let block = geometry.block_size().bytes();
                let first = to_usize((offset - extent.start()) / block);
                let last = to_usize((run_end - 1 - extent.start()) / block);
                map.zero_blocks[first..=last].fill(false);
                map.add(Extent::from_range(offset..run_end));
            }
            offset = run_end;
        }
        Ok(map)
    }

    fn add(&mut self, run: Extent) {
        match self.data.last_mut() {
            Some(last) if run.start() - last.end() < MIN_HOLE_BYTES => {
                *last = Extent::from_range(last.start()..run.end());
            }
            _ => self.data.push(run),
        }
    }

    /// Whether the block reads as zeros for sure.
    #[must_use]
    pub fn is_zero_block(&self, block_in_region: usize) -> bool {
        self.zero_blocks[block_in_region]
    }

    /// Reads `extent` of the region from the device; holes are filled in without asking it. Returns the bytes read.
    ///
    /// # Errors
    /// The device failed.
    pub fn read(&self, device: &dyn BlockSource, extent: Extent, buffer: &mut [u8]) -> Result<u64> {
        let first = self.data.partition_point(|run| run.end() <= extent.start());
        let runs = self.data[first..].iter();
        let inside = runs.map_while(|run| run.intersection(extent));
        let (mut filled, mut read_bytes) = (0, 0);
        for run in inside {
            let start = to_usize(run.start() - extent.start());
            let end = start + to_usize(run.length());
            buffer[filled..start].fill(0);
            device.read_at(run.start(), &mut buffer[start..end])?;
            (filled, read_bytes) = (end, read_bytes + run.length());
        }
        buffer[filled..to_usize(extent.length())].fill(0);
        Ok(read_bytes)
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

    /// No region.
    #[must_use]
    pub fn none(geometry: Geometry) -> Self {
        Self {
            next: geometry.region_count(),
            ..Self::every(geometry)
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

    /// Data where `data` says so, 4 KiB each; the rest is known to be zero.
    #[derive(Debug)]
    struct Sparse {
        bytes: Vec<u8>,
        data: Vec<bool>,
    }

    impl BlockSource for Sparse {
        fn label(&self) -> &str {
            "sparse"
        }

        fn size_bytes(&self) -> u64 {
            self.bytes.len() as u64
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
            let offset = to_usize(offset);
            buffer.copy_from_slice(&self.bytes[offset..offset + buffer.len()]);
            Ok(())
        }

        fn status_at(&self, offset: u64) -> Result<(Status, u64)> {
            let page = to_usize(offset / 4096);
            let status = if self.data[page] {
                Status::Data
            } else {
                Status::Zero
            };
            Ok((status, (page as u64 + 1) * 4096))
        }
    }

    proptest::proptest! {
        #[test]
        fn reading_through_the_map_equals_reading_the_device(
            data in proptest::collection::vec(proptest::bool::weighted(0.3), 16..200),
            from in 0usize..100, pages in 1usize..60,
        ) {
            let fill = |(page, data): (usize, &bool)| {
                vec![if *data { u8::try_from(page % 255).unwrap() + 1 } else { 0 }; 4096]
            };
            let bytes: Vec<u8> = data.iter().enumerate().flat_map(fill).collect();
            let device = Sparse { bytes: bytes.clone(), data: data.clone() };
            let geometry = Geometry::new(device.size_bytes(), BlockSize::DEFAULT);
            let from = from.min(data.len() - 1);
            let to = (from + pages).min(data.len());
            let (start, end) = (from * 4096, to * 4096);
            let map = DataMap::of(&device, &geometry, RegionIndex::new(0)).unwrap();
            let mut buffer = vec![9; end - start];

            let extent = Extent::from_range(start as u64..end as u64);
            let read_bytes = map.read(&device, extent, &mut buffer).unwrap();

            proptest::prop_assert_eq!(&buffer[..], &bytes[start..end]);
            let data_bytes = data[from..to].iter().filter(|d| **d).count() as u64 * 4096;
            // Up to three pages beside data are no hole worth leaving out.
            proptest::prop_assert!(read_bytes >= data_bytes);
            proptest::prop_assert!(read_bytes <= 4 * data_bytes + 6 * 4096);
        }
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
