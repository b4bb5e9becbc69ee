//! Pages on their way: what the source packs of its blocks, and what the target makes of them.

use blockferry_core::{
    Digest, Extent, Geometry, PAGE_BYTES, RegionIndex, block_digest, is_zero, page_digests,
};
use blockferry_pipeline::block_in;
use blockferry_transfer_log::frame;
use blockferry_transport::message::{MAX_PAGES, MAX_RUNS, PageRun};
use blockferry_transport::{Message, ShortDigests};

use super::target_role::Arrived;

const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_BYTES, "one size of pages");

/// Gathers the pages of blocks that differ into messages.
#[derive(Debug)]
pub(super) struct Packer {
    geometry: Geometry,
    level: i32,
    blocks: Vec<(u64, u16)>,
    runs: Vec<PageRun>,
    pages: Vec<u8>,
}

impl Packer {
    pub(super) fn new(geometry: Geometry, level: i8) -> Self {
        Self {
            geometry,
            level: i32::from(level),
            blocks: Vec::new(),
            runs: Vec::new(),
            pages: Vec::new(),
        }
    }

    /// How hard what is gathered is packed.
    pub(super) fn set_level(&mut self, level: i32) {
        self.level = level;
    }

    /// Adds the pages of a block in which it differs from `theirs`, all if they are empty. Returns a message if one
    /// became full before.
    ///
    /// # Errors
    /// Packing failed.
    pub(super) fn add(
        &mut self,
        region: RegionIndex,
        block: u16,
        bytes: &[u8],
        theirs: &ShortDigests,
    ) -> blockferry_transfer_log::Result<Option<Message>> {
        let count = bytes.len().div_ceil(PAGE);
        let full = self.pages.len() / PAGE + count > MAX_PAGES
            || self.runs.len() + count > MAX_RUNS
            || self.blocks.len() == MAX_RUNS;
        let message = if full { self.take()? } else { None };
        self.blocks.push((region.get(), block));
        let extent = block_in(&self.geometry, region, usize::from(block));
        let first = extent.start() / PAGE_BYTES;
        let mut digests = page_digests(self.geometry.block_size(), bytes);
        let mut open: Option<PageRun> = None;
        for (number, page) in bytes.chunks(PAGE).enumerate() {
            let zero = is_zero(page);
            let digest = if theirs.is_empty() {
                None
            } else {
                digests.next()
            };
            if digest.is_some_and(|digest| theirs.matches(number, &digest)) {
                self.runs.extend(open.take());
                continue;
            }
            if !zero {
                self.pages.extend_from_slice(page);
                self.pages
                    .resize(self.pages.len().next_multiple_of(PAGE), 0);
            }
            match &mut open {
                Some(run) if run.zero == zero => run.count += 1,
                _ => {
                    let first = first + number as u64;
                    self.runs.extend(open.replace(PageRun {
                        first,
                        count: 1,
                        zero,
                    }));
                }
            }
        }
        self.runs.extend(open);
        Ok(message)
    }

    /// The last message, if anything is left.
    ///
    /// # Errors
    /// Packing failed.
    pub(super) fn take(&mut self) -> blockferry_transfer_log::Result<Option<Message>> {
        if self.blocks.is_empty() {
            return Ok(None);
        }
        let frame = frame::pack(&self.pages, self.level)?;
        self.pages.clear();
        Ok(Some(Message::Data {
            blocks: std::mem::take(&mut self.blocks),
            runs: std::mem::take(&mut self.runs),
            frame,
        }))
    }
}

/// Pages that came, unpacked.
#[derive(Debug)]
pub(super) struct Unpacked {
    arrived: Arrived,
    pages: Vec<u8>,
}

impl Unpacked {
    /// # Errors
    /// The frame holds more or less than its pages.
    pub(super) fn of(arrived: Arrived) -> blockferry_transfer_log::Result<Self> {
        let packed = arrived.runs.iter().filter(|run| !run.zero);
        let count: usize = packed.map(|run| usize::from(run.count)).sum();
        let pages = frame::unpack(&arrived.frame, count * PAGE)?;
        Ok(Self { arrived, pages })
    }

    /// The blocks that are complete with it, each with the digest that it should reach.
    pub(super) fn blocks(&self) -> &[(u64, u16, Digest)] {
        &self.arrived.blocks
    }

    /// The frame as it came.
    pub(super) fn frame(&self) -> &[u8] {
        &self.arrived.frame
    }

    /// The runs inside of `extent`, each with its bytes, which are empty where it is zero. The last page of an image
    /// may be short.
    pub(super) fn runs_in(&self, extent: Extent) -> impl Iterator<Item = (Extent, &[u8])> {
        let mut next = 0;
        let placed = self.arrived.runs.iter().map(move |run| {
            let start = next;
            if !run.zero {
                next += usize::from(run.count) * PAGE;
            }
            (run, start)
        });
        placed.filter_map(move |(run, start)| {
            let first = run.first * PAGE_BYTES;
            let whole = Extent::from_range(first..first + u64::from(run.count) * PAGE_BYTES);
            let inside = whole.intersection(extent)?;
            if run.zero {
                return Some((inside, &[][..]));
            }
            let from = start + to_usize(inside.start() - first);
            Some((inside, &self.pages[from..from + to_usize(inside.length())]))
        })
    }

    /// Puts the pages of `extent`, one of its blocks, over the old content in `block`.
    pub(super) fn put(&self, extent: Extent, block: &mut [u8]) {
        for (run, bytes) in self.runs_in(extent) {
            let from = to_usize(run.start() - extent.start());
            let into = &mut block[from..from + to_usize(run.length())];
            if bytes.is_empty() {
                into.fill(0);
            } else {
                into.copy_from_slice(bytes);
            }
        }
    }

    /// As [`Self::put`], and tells whether the block became what it should.
    pub(super) fn patch(&self, extent: Extent, block: &mut [u8], expected: &Digest) -> bool {
        self.put(extent, block);
        block_digest(block) == *expected
    }
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or_else(|_| unreachable!("bounded by a message"))
}
