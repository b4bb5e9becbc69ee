//! The blocks in which either side may hold data, found without reading any: outside of them both read zeros, so
//! nothing can differ there.

use blockferry_core::{BlockIndex, Extent, ExtentSet, Geometry};
use blockferry_device::{BlockSource, Status};

use crate::sample::scramble;

/// Runs of data that are told apart on one device. What lies behind counts as data: asking costs a system call or
/// two for each, and a list of them memory.
const MOST_RUNS: usize = 65_536;

/// Blocks that may hold data, numbered without what lies between them.
#[derive(Clone, Debug)]
pub(crate) struct DataBlocks {
    /// Whole runs of blocks, ascending and apart, each with the number of its first one.
    runs: Vec<(u64, Extent)>,
    count: u64,
    block_bytes: u64,
}

impl DataBlocks {
    pub(crate) fn of(devices: &[&dyn BlockSource], geometry: &Geometry) -> Self {
        let block_bytes = geometry.block_size().bytes();
        let mut found = ExtentSet::default();
        for device in devices {
            add_data(&mut found, *device, geometry);
        }
        let mut count = 0;
        let runs = found.iter().map(|run| {
            let first = count;
            count += run.length() / block_bytes;
            (first, run)
        });
        Self {
            runs: runs.collect(),
            count,
            block_bytes,
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The block with this number; nothing behind the last one.
    pub(crate) fn nth(&self, number: u64) -> Option<BlockIndex> {
        let behind = self.runs.partition_point(|(first, _)| *first <= number);
        let (first, run) = self.runs.get(behind.checked_sub(1)?)?;
        let block = run.start() / self.block_bytes + (number - first);
        (number < self.count).then(|| BlockIndex::new(block))
    }

    /// At most so many of them, spread evenly: one of each of equal shares, at a place that the seed decides.
    pub(crate) fn spread(&self, most: u64, seed: u64) -> impl Iterator<Item = BlockIndex> {
        let (count, parts) = (self.count, self.count.min(most));
        (0..parts).filter_map(move |n| {
            let (from, to) = (n * count / parts, (n + 1) * count / parts);
            self.nth(from + scramble(seed ^ n) % (to - from).max(1))
        })
    }
}

/// Adds the whole blocks that the device may hold data in.
fn add_data(found: &mut ExtentSet, device: &dyn BlockSource, geometry: &Geometry) {
    let block = geometry.block_size().bytes();
    let end = device.size_bytes().min(geometry.image_bytes());
    let mut add = |start: u64, end: u64| {
        let blocks = start / block * block..end.next_multiple_of(block);
        found.insert(Extent::from_range(blocks));
    };
    let (mut offset, mut runs) = (0, 0);
    while offset < end {
        // A device that fails here fails again where the failure is reported: when it is read.
        let (status, run_end) = device.status_at(offset).unwrap_or((Status::Data, end));
        let run_end = run_end.clamp(offset + 1, end);
        if status == Status::Data {
            runs += 1;
            if runs > MOST_RUNS {
                return add(offset, end);
            }
            add(offset, run_end);
        }
        offset = run_end;
    }
}

#[cfg(test)]
mod tests {
    use blockferry_core::BlockSize;
    use blockferry_device::Result;

    use super::*;

    /// Data wherever the number of the page can be divided by `every`.
    #[derive(Debug)]
    struct Striped {
        pages: u64,
        every: u64,
    }

    impl BlockSource for Striped {
        fn label(&self) -> &'static str {
            "striped"
        }

        fn size_bytes(&self) -> u64 {
            self.pages * 4096
        }

        fn read_at(&self, _: u64, _: &mut [u8]) -> Result<()> {
            panic!("nothing is read");
        }

        fn status_at(&self, offset: u64) -> Result<(Status, u64)> {
            let page = offset / 4096;
            let next = |pages: u64| ((page + pages) * 4096).min(self.size_bytes());
            Ok(match page % self.every {
                0 => (Status::Data, next(1)),
                behind => (Status::Zero, next(self.every - behind)),
            })
        }
    }

    fn blocks(devices: &[&dyn BlockSource], block_bytes: u64) -> DataBlocks {
        let size = devices[0].size_bytes();
        let block_size = BlockSize::new(block_bytes).expect("a block size");
        DataBlocks::of(devices, &Geometry::new(size, block_size))
    }

    fn numbers(found: &DataBlocks) -> Vec<u64> {
        let all = (0..found.count()).map(|n| found.nth(n).expect("one of them").get());
        all.collect()
    }

    #[test]
    fn only_blocks_that_hold_data_on_either_side_are_numbered() {
        let (one, other) = (
            Striped {
                pages: 13,
                every: 5,
            },
            Striped { pages: 9, every: 4 },
        );

        let found = blocks(&[&one, &other], 4096);

        assert_eq!(numbers(&found), [0, 4, 5, 8, 10]);
        assert_eq!(found.nth(5), None);
    }

    #[test]
    fn a_block_counts_once_however_many_runs_it_has() {
        let found = blocks(
            &[&Striped {
                pages: 70,
                every: 3,
            }],
            65_536,
        );

        assert_eq!(numbers(&found), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn what_lies_behind_too_many_runs_counts_as_data() {
        let most = MOST_RUNS as u64;
        let source = Striped {
            pages: 2 * most + 10,
            every: 2,
        };

        let found = blocks(&[&source], 4096);

        assert_eq!(found.count(), most + 10);
        assert_eq!(found.nth(most - 1).map(BlockIndex::get), Some(2 * most - 2));
    }

    #[test]
    fn two_sides_of_zeros_have_no_block() {
        let nothing = blocks(&[&Striped { pages: 0, every: 1 }], 4096);

        assert_eq!((nothing.count(), nothing.nth(0)), (0, None));
    }
}
