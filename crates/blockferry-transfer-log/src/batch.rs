//! Batches: what one worker hands to the session, at most one record's worth.

use std::borrow::Cow;

use blockferry_core::{Digest, Extent, ExtentSet, Geometry, checksum};
use blockferry_device::Evidence;

use crate::error::Result;
use crate::format::{
    BatchExtent, MAX_PAYLOAD_BYTES, NewContent, OldContent, PAGE, StoredPages, Unit, usize_of,
};
use crate::spare::{Spare, SpareBuffer, SpareSlice};

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
    pub(crate) evidence: Evidence,
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
            evidence: Evidence::unknown(),
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

    /// Marks its pages as copied from a source that was being written: they may be committed only after a later
    /// pass has staged them again.
    pub fn mark_fuzzy(&mut self) {
        self.fuzzy = true;
    }

    /// With payloads in buffers of this stock.
    pub(crate) fn with_spare(mut self, spare: &Spare) -> Self {
        self.new.spare = spare.clone();
        self.old.spare = spare.clone();
        self
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

    /// Where its pages lie.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        self.extents.iter().map(|e| e.extent)
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
                assert!(
                    self.pages == StoredPages::Plain,
                    "bytes are added before a frame, and to batches that carry bytes"
                );
                self.new.push(&bytes[..usize_of(extent.length())]);
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

    /// The bytes of the new pages, unpacked.
    pub(crate) fn plain_pages(&self) -> Result<Cow<'_, [u8]>> {
        let StoredPages::Zstd { stored_bytes, .. } = self.pages else {
            return Ok(Cow::Borrowed(self.new.bytes()));
        };
        let data = self.extents.iter().filter(|e| e.new == NewContent::Data);
        let padded = data.map(|e| e.extent.length().next_multiple_of(PAGE as u64));
        let frame = &self.new.bytes()[..stored_bytes as usize];
        crate::frame::unpack(frame, usize_of(padded.sum())).map(Cow::Owned)
    }

    pub(crate) fn new_payload(&self) -> &[u8] {
        self.new.bytes()
    }

    /// The new pages, where it carries them as they are.
    pub(crate) fn into_plain_pages(self) -> Option<SpareSlice> {
        let buffer = self
            .new
            .buffer
            .filter(|_| self.pages == StoredPages::Plain)?;
        Some(buffer.first(self.new.length))
    }

    pub(crate) fn old_payload(&self) -> &[u8] {
        self.old.bytes()
    }

    /// Parts the batch in pre-images of what is touched for the first time and new content, where some of it
    /// was touched before: the pre-images of that are in earlier records, and the units of the new content
    /// must stay whole. The pre-images come in batches of their own, to be appended first.
    pub(crate) fn keep_first_touch(mut self, touched: &ExtentSet) -> (Vec<Self>, Self) {
        let again = |e: &BatchExtent| e.old != OldContent::None && touched.overlaps(e.extent);
        if !self.extents.iter().any(again) {
            return (Vec::new(), self);
        }
        let mut olds = vec![Self::logged(self.geometry, self.unit)];
        let mut offset = 0usize;
        for entry in &self.extents {
            let start = offset;
            if entry.old == OldContent::Data {
                offset += usize_of(entry.extent.length().next_multiple_of(PAGE as u64));
            }
            let untouched = ExtentSet::from_iter([entry.extent]).difference(touched);
            for piece in untouched.iter() {
                let from = start + usize_of(piece.start() - entry.extent.start());
                let old = match entry.old {
                    OldContent::None => continue,
                    OldContent::Zero => Old::Zero,
                    OldContent::Data => {
                        Old::Data(&self.old.bytes()[from..from + usize_of(piece.length())])
                    }
                };
                if olds.last().is_none_or(|b| b.extents.len() == MAX_EXTENTS) {
                    olds.push(Self::logged(self.geometry, self.unit));
                }
                if let Some(last) = olds.last_mut() {
                    last.push(piece, New::None, old);
                }
            }
        }
        self.extents.retain(|e| e.new != NewContent::None);
        self.extents
            .iter_mut()
            .for_each(|e| e.old = OldContent::None);
        self.old_digests.clear();
        self.old = Payload::default();
        olds.retain(|b| !b.is_empty());
        (olds, self)
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
    buffer: Option<SpareBuffer>,
    spare: Spare,
    length: usize,
}

impl Payload {
    const FIRST: usize = 1024 * 1024;

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
        let mut grown = self.spare.take(need.max(Self::FIRST));
        grown[..self.length].copy_from_slice(self.bytes());
        self.buffer = Some(grown);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockferry_core::{BlockSize, block_digest};

    #[test]
    fn a_batch_of_blocks_written_elsewhere_takes_as_many_as_a_record_has() {
        let geometry = Geometry::new(1 << 30, BlockSize::DEFAULT);
        let block = BlockSize::DEFAULT.bytes();
        let digests = [block_digest(b"block"); 10];
        let mut batch = Batch::written(geometry, Unit::Block);
        let mut count = 0;

        while batch.has_room(10 * block) {
            let extent = Extent::from_range(count * 10 * block..(count + 1) * 10 * block);
            batch.push(extent, New::Written(&digests), Old::None);
            count += 1;
        }

        assert_eq!(count, 25, "256 units at most");
        assert!(batch.has_room(6 * block) && !batch.has_room(7 * block));
    }
}
