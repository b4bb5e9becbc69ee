//! Batches: what one worker hands to the session, at most one record's worth.

use blockferry_core::{Digest, Extent, Geometry, checksum};
use blockferry_device::AlignedBuffer;

use crate::format::{
    BatchExtent, MAX_PAYLOAD_BYTES, NewContent, OldContent, PAGE, StoredPages, Unit, usize_of,
};

/// Most extents of one batch.
const MAX_EXTENTS: usize = 256;
/// Most units with new data of one batch, and most with old data.
const MAX_UNITS: usize = 256;

/// The old content of an extent, where the caller knows it.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::exhaustive_enums, reason = "callers build it")]
pub enum Old<'a> {
    /// Not kept.
    None,
    /// Reads as zeros.
    Zero,
    /// These bytes, as long as the extent.
    Data(&'a [u8]),
}

/// Pages on their way to the log: extents, digests, and bytes in aligned buffers, so that they are written
/// without another copy.
#[derive(Debug)]
pub struct Batch {
    pub(crate) geometry: Geometry,
    pub(crate) unit: Unit,
    pub(crate) fuzzy: bool,
    pub(crate) pages: StoredPages,
    pub(crate) extents: Vec<BatchExtent>,
    pub(crate) new_digests: Vec<Digest>,
    pub(crate) old_digests: Vec<Digest>,
    new: Payload,
    old: Payload,
}

impl Batch {
    /// An empty batch whose bytes go to the log.
    pub(crate) fn logged(geometry: Geometry, unit: Unit) -> Self {
        Self::with_pages(geometry, unit, StoredPages::Plain)
    }

    /// An empty batch whose bytes are in the working file already.
    pub(crate) fn written(geometry: Geometry, unit: Unit) -> Self {
        Self::with_pages(geometry, unit, StoredPages::Elsewhere)
    }

    fn with_pages(geometry: Geometry, unit: Unit, pages: StoredPages) -> Self {
        Self {
            geometry,
            unit,
            fuzzy: false,
            pages,
            extents: Vec::new(),
            new_digests: Vec::new(),
            old_digests: Vec::new(),
            new: Payload::default(),
            old: Payload::default(),
        }
    }

    /// Stores the new pages, added already, as the zstd frame in which they came over the wire; the receiver
    /// has checked that it unpacks to exactly these pages.
    pub fn store_frame(&mut self, frame: &[u8]) {
        let stored_bytes = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        self.pages = StoredPages::Zstd {
            stored_bytes,
            checksum: checksum(frame),
        };
        self.new = Payload::default();
        self.new.push(frame);
    }

    /// Nothing in it yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Whether another extent of this length surely fits.
    #[must_use]
    pub fn has_room(&self, length: u64) -> bool {
        let units = usize_of(length.div_ceil(self.unit.bytes(&self.geometry)));
        let bytes = length.next_multiple_of(PAGE as u64);
        self.extents.len() < MAX_EXTENTS
            && self.new_digests.len() + units <= MAX_UNITS
            && self.old_digests.len() + units <= MAX_UNITS
            && self.new.len() + bytes <= MAX_PAYLOAD_BYTES
            && self.old.len() + bytes <= MAX_PAYLOAD_BYTES
    }

    /// Bytes of new data in it.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.extents
            .iter()
            .filter(|e| e.new == NewContent::Data)
            .map(|e| e.extent.length())
            .sum()
    }

    pub(crate) fn push(&mut self, extent: Extent, new: New<'_>, old: Old<'_>) {
        let kind = self.push_old(extent, old);
        let new = match new {
            New::None => NewContent::None,
            New::Zero => NewContent::Zero,
            New::Reserve => NewContent::Reserve,
            New::Data(bytes) => {
                self.new_digests
                    .extend(self.unit.digests(&self.geometry, extent, bytes));
                if self.pages == StoredPages::Plain {
                    self.new.push(&bytes[..usize_of(extent.length())]);
                }
                NewContent::Data
            }
            New::Written(digests) => {
                self.new_digests.extend_from_slice(digests);
                NewContent::Data
            }
        };
        self.extents.push(BatchExtent {
            extent,
            new,
            old: kind,
        });
    }

    fn push_old(&mut self, extent: Extent, old: Old<'_>) -> OldContent {
        match old {
            Old::None => OldContent::None,
            Old::Zero => OldContent::Zero,
            Old::Data(bytes) => {
                self.old_digests
                    .extend(self.unit.digests(&self.geometry, extent, bytes));
                self.old.push(&bytes[..usize_of(extent.length())]);
                OldContent::Data
            }
        }
    }

    pub(crate) fn new_payload(&self) -> &[u8] {
        self.new.bytes()
    }

    pub(crate) fn old_payload(&self) -> &[u8] {
        self.old.bytes()
    }

    /// Forgets the pre-images of what `touched` says was touched before; they are in an earlier record.
    pub(crate) fn keep_first_touch(self, touched: &blockferry_core::ExtentSet) -> Self {
        if !self.extents.iter().any(|e| touched.overlaps(e.extent)) {
            return self;
        }
        let mut kept = Self::with_pages(self.geometry, self.unit, self.pages);
        kept.fuzzy = self.fuzzy;
        kept.new = self.new;
        kept.new_digests = self.new_digests;
        let step = self.unit.bytes(&self.geometry);
        let (mut offset, mut digest) = (0usize, 0usize);
        for entry in self.extents {
            // Split into units so that every piece is either kept or not.
            let mut start = entry.extent.start();
            while start < entry.extent.end() {
                let end = (start + step).min(entry.extent.end());
                let piece = Extent::from_range(start..end);
                let length = usize_of(piece.length());
                let first = !touched.overlaps(piece);
                let mut old = OldContent::None;
                if entry.old == OldContent::Data {
                    if first {
                        kept.old.push(&self.old.bytes()[offset..offset + length]);
                        kept.old_digests.push(self.old_digests[digest]);
                        old = OldContent::Data;
                    }
                    offset += length.next_multiple_of(PAGE);
                    digest += 1;
                } else if first {
                    old = entry.old;
                }
                kept.extents.push(BatchExtent {
                    extent: piece,
                    new: entry.new,
                    old,
                });
                start = end;
            }
        }
        kept.merge_adjacent(step);
        kept
    }

    /// Joins neighbours of one kind again after a split.
    fn merge_adjacent(&mut self, step: u64) {
        self.extents.dedup_by(|next, previous| {
            let joins = previous.extent.end() == next.extent.start()
                && previous.extent.length().is_multiple_of(step)
                && previous.new == next.new
                && previous.old == next.old;
            if joins {
                previous.extent = Extent::from_range(previous.extent.start()..next.extent.end());
            }
            joins
        });
    }
}

/// The new content handed to [`Batch::push`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum New<'a> {
    None,
    Zero,
    Reserve,
    Data(&'a [u8]),
    /// Written to the working file; these are the digests of its units.
    Written(&'a [Digest]),
}

/// Bytes of whole pages in a growing aligned buffer.
#[derive(Debug, Default)]
struct Payload {
    buffer: Option<AlignedBuffer>,
    length: usize,
}

impl Payload {
    const FIRST: usize = 256 * 1024;

    fn len(&self) -> u64 {
        self.length as u64
    }

    fn bytes(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], |b| &b[..self.length])
    }

    /// Appends, padded with zeros to a whole page.
    fn push(&mut self, bytes: &[u8]) {
        let padded = bytes.len().next_multiple_of(PAGE);
        self.make_room(padded);
        let Some(buffer) = &mut self.buffer else {
            return;
        };
        let (start, end) = (self.length, self.length + bytes.len());
        buffer[start..end].copy_from_slice(bytes);
        buffer[end..start + padded].fill(0);
        self.length += padded;
    }

    fn make_room(&mut self, more: usize) {
        let need = self.length + more;
        if self.buffer.as_ref().is_some_and(|b| b.len() >= need) {
            return;
        }
        let mut grown = AlignedBuffer::zeroed(need.next_power_of_two().max(Self::FIRST));
        grown[..self.length].copy_from_slice(self.bytes());
        self.buffer = Some(grown);
    }
}
