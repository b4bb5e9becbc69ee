//! Records: which extents change, to what, from what, and the digests that prove it.
//!
//! ```text
//! +--------------------------------------+-----------------+-----------------+
//! | header: extents, digests, checksum   | new pages       | old pages       |
//! +--------------------------------------+-----------------+-----------------+
//!   n x 4 KiB                              n x 4 KiB         n x 4 KiB
//! ```
//! The header's checksum is the chain value: it covers the digests, and they cover the pages.

use blockferry_core::{Decoder, Digest, Encoder, Extent, Geometry, block_digest, page_digest};
use blockferry_device::Evidence;

use super::header::decode_evidence;
use super::{CHECKSUM_BYTES, FORMAT_VERSION, PAGE, SessionId, seal, unseal};
use crate::error::{Error, Result};
use crate::plan::Strategy;

const MAGIC: &[u8; 8] = b"BFRYREC\0";
/// Longest header in bytes; a longer one is refused before it is read.
pub(crate) const MAX_HEADER_BYTES: usize = 64 * 1024;
/// Most new bytes, and most old bytes, of one record.
pub(crate) const MAX_PAYLOAD_BYTES: u64 = 1024 * 1024;
/// Most extents of one record.
pub(crate) const MAX_EXTENTS: usize = 512;
/// Most digests of one side of a record.
pub(crate) const MAX_DIGESTS: usize = 1024;

/// Bytes of a header before its evidence, extents and digests, their counts included.
const FIXED_BYTES: usize = 8 + 4 + 4 + 16 + 8 + 32 + 8 + 1 + 1 + 1 + 4 + 32 + 2 + 4;

/// What an extent holds in the new point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "the format has exactly these")]
pub enum NewContent {
    /// The record says nothing of it: it carries a pre-image only.
    None,
    /// Bytes, in the record or in the working file.
    Data,
    /// Zeros.
    Zero,
    /// Space that apply will fill is allocated here; content unchanged.
    Reserve,
}

/// What an extent held in the old point, where this record touches it first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "the format has exactly these")]
pub enum OldContent {
    /// Not kept here: touched before, or nothing is kept.
    None,
    /// Bytes in this record.
    Data,
    /// Zeros.
    Zero,
}

/// One extent of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "the format has exactly these")]
pub struct BatchExtent {
    /// Where, in bytes; starts at a unit, ends at a unit or at the end of the image.
    pub extent: Extent,
    /// The new content.
    pub new: NewContent,
    /// The old content.
    pub old: OldContent,
}

/// What one digest of a record covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "the format has exactly these")]
pub enum Unit {
    /// A 4 KiB page; its digest is the chaining value inside its block.
    Page,
    /// A whole block; its digest is the manifest's leaf.
    Block,
}

impl Unit {
    /// Bytes of one unit.
    #[must_use]
    pub fn bytes(self, geometry: &Geometry) -> u64 {
        match self {
            Self::Page => blockferry_core::PAGE_BYTES,
            Self::Block => geometry.block_size().bytes(),
        }
    }

    /// Digest of the unit that starts at `offset`.
    #[must_use]
    pub fn digest(self, geometry: &Geometry, offset: u64, bytes: &[u8]) -> Digest {
        match self {
            Self::Page => page_digest(geometry.block_size(), offset, bytes),
            Self::Block => block_digest(bytes),
        }
    }

    /// Digests of all units of `extent`, whose bytes are `bytes` (padding beyond the extent is not looked at).
    pub fn digests<'a>(
        self,
        geometry: &'a Geometry,
        extent: Extent,
        bytes: &'a [u8],
    ) -> impl Iterator<Item = Digest> + 'a {
        let step = self.bytes(geometry);
        let length = usize_of(extent.length());
        bytes[..length]
            .chunks(usize_of(step))
            .zip((extent.start()..).step_by(usize_of(step)))
            .map(move |(unit, offset)| self.digest(geometry, offset, unit))
    }

    fn count(self, geometry: &Geometry, extent: Extent) -> usize {
        usize_of(extent.length().div_ceil(self.bytes(geometry)))
    }
}

/// How the new pages of a record are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StoredPages {
    /// In the working file, not in the log.
    Elsewhere,
    /// As they are.
    Plain,
    /// One zstd frame, as it came over the wire.
    Zstd {
        /// Bytes of the frame.
        stored_bytes: u32,
        /// BLAKE3 of the frame.
        checksum: Digest,
    },
}

/// The header of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub(crate) struct RecordHeader {
    /// Whose record.
    pub session: SessionId,
    /// Its place in the session, from 1.
    pub sequence: u64,
    /// Chain value of the record before, or of the segment's header.
    pub previous: Digest,
    /// Highest sequence that was durable when this was written; payloads up to it need no check on recovery.
    pub durable: u64,
    /// What one digest covers.
    pub unit: Unit,
    /// Copied from a live source without a snapshot: counts only together with a later pass.
    pub fuzzy: bool,
    /// The last record of a compaction: from here on the segments before are not needed.
    pub compaction_end: bool,
    /// How the new pages are stored.
    pub pages: StoredPages,
    /// The target's evidence after space was reserved in it, which may count as a change; empty if this
    /// record says nothing of it.
    pub evidence: Evidence,
    /// What changes, ascending where the writer could.
    pub extents: Vec<BatchExtent>,
    /// One digest for each unit of the extents with new data, in their order.
    pub new_digests: Vec<Digest>,
    /// One digest for each unit of the extents with old data, in their order.
    pub old_digests: Vec<Digest>,
}

impl RecordHeader {
    /// Bytes of the new pages, unpacked and padded.
    pub(crate) fn new_bytes(&self) -> u64 {
        padded(self.extents.iter().filter(|e| e.new == NewContent::Data))
    }

    /// Bytes of the old pages, padded.
    pub(crate) fn old_bytes(&self) -> u64 {
        padded(self.extents.iter().filter(|e| e.old == OldContent::Data))
    }

    /// Whether the new pages, if there are any, are where this strategy keeps them.
    pub(crate) fn is_kept_as(&self, strategy: Strategy) -> bool {
        let is_logged = self.pages != StoredPages::Elsewhere;
        self.new_bytes() == 0 || is_logged == (strategy == Strategy::Redo)
    }

    /// Bytes of the new pages as stored, padded.
    pub(crate) fn stored_new_bytes(&self) -> u64 {
        match self.pages {
            StoredPages::Elsewhere => 0,
            StoredPages::Plain => self.new_bytes(),
            StoredPages::Zstd { stored_bytes, .. } => {
                u64::from(stored_bytes).next_multiple_of(PAGE as u64)
            }
        }
    }

    /// Bytes of the stored header.
    pub(crate) fn encoded_bytes(&self) -> usize {
        let digests = self.new_digests.len() + self.old_digests.len();
        let variable = self.evidence.as_bytes().len() + self.extents.len() * 18 + digests * 32;
        (FIXED_BYTES + variable + CHECKSUM_BYTES).next_multiple_of(PAGE)
    }

    /// The stored header and its chain value.
    pub(crate) fn encode(&self) -> (Vec<u8>, Digest) {
        let mut bytes = Vec::with_capacity(PAGE);
        let mut e = Encoder::new(&mut bytes);
        e.bytes(MAGIC);
        e.u32(FORMAT_VERSION);
        e.u32(0);
        e.bytes(self.session.as_bytes());
        e.u64(self.sequence);
        e.bytes(self.previous.as_bytes());
        e.u64(self.durable);
        e.u8(u8::from(self.unit == Unit::Block));
        e.u8(u8::from(self.fuzzy) | u8::from(self.compaction_end) << 1);
        let (code, stored_bytes, checksum) = match self.pages {
            StoredPages::Elsewhere => (0, 0, Digest::from_bytes([0; 32])),
            StoredPages::Plain => (1, 0, Digest::from_bytes([0; 32])),
            StoredPages::Zstd {
                stored_bytes,
                checksum,
            } => (2, stored_bytes, checksum),
        };
        e.u8(code);
        e.u32(stored_bytes);
        e.bytes(checksum.as_bytes());
        e.bytes_u16(self.evidence.as_bytes());
        e.u32(count_u32(self.extents.len()));
        for entry in &self.extents {
            e.u64(entry.extent.start());
            e.u64(entry.extent.length());
            e.u8(new_code(entry.new));
            e.u8(old_code(entry.old));
        }
        for digest in self.new_digests.iter().chain(&self.old_digests) {
            e.bytes(digest.as_bytes());
        }
        let total = count_u32(self.encoded_bytes());
        bytes[12..16].copy_from_slice(&total.to_le_bytes());
        let bytes = seal(bytes);
        let chain = unseal(&bytes).map_or_else(|| unreachable!("sealed above"), |(_, c)| c);
        (bytes, chain)
    }

    /// Length of the whole header in bytes, if the first page looks like a record of this session at all.
    pub(crate) fn peek_length(page: &[u8]) -> Option<usize> {
        let mut d = Decoder::new(page);
        if d.array::<8>().ok()? != *MAGIC || d.u32().ok()? != FORMAT_VERSION {
            return None;
        }
        let length = usize_of(u64::from(d.u32().ok()?));
        ((PAGE..=MAX_HEADER_BYTES).contains(&length) && length.is_multiple_of(PAGE))
            .then_some(length)
    }

    /// Reads a complete header. `geometry` bounds what it may name: nothing beyond `limit_bytes`.
    pub(crate) fn decode(
        bytes: &[u8],
        geometry: &Geometry,
        limit_bytes: u64,
    ) -> Result<(Self, Digest)> {
        let (body, chain) =
            unseal(bytes).ok_or_else(|| Error::corrupt("record header: checksum mismatch"))?;
        let header = Self::decode_fields(&mut Decoder::new(body), geometry, limit_bytes)
            .map_err(|cause| Error::corrupt(format!("record header: {cause}")))?;
        Ok((header, chain))
    }

    fn decode_fields(
        d: &mut Decoder<'_>,
        geometry: &Geometry,
        limit_bytes: u64,
    ) -> blockferry_core::Result<Self> {
        let invalid =
            |what: &str| blockferry_core::Error::new(blockferry_core::ErrorKind::Invalid, what);
        d.array::<8>()?;
        d.u32()?;
        d.u32()?;
        let session = SessionId::from_bytes(d.array()?);
        let sequence = d.u64()?;
        let previous = Digest::from_bytes(d.array()?);
        let durable = d.u64()?;
        let unit = if d.u8()? == 0 {
            Unit::Page
        } else {
            Unit::Block
        };
        let flags = d.u8()?;
        let code = d.u8()?;
        let stored_bytes = d.u32()?;
        let checksum = Digest::from_bytes(d.array()?);
        let evidence = decode_evidence(d)?;
        let pages = match code {
            0 => StoredPages::Elsewhere,
            1 => StoredPages::Plain,
            2 if u64::from(stored_bytes) <= MAX_PAYLOAD_BYTES * 2 => StoredPages::Zstd {
                stored_bytes,
                checksum,
            },
            _ => return Err(invalid("unknown encoding of the pages")),
        };
        let count = d.count(MAX_EXTENTS)?;
        let mut extents = Vec::with_capacity(count);
        let (mut new_count, mut old_count) = (0usize, 0usize);
        for _ in 0..count {
            let (start, length) = (d.u64()?, d.u64()?);
            let extent = Extent::new(start, length)
                .filter(|e| !e.is_empty() && e.end() <= limit_bytes)
                .ok_or_else(|| invalid("an extent is empty or lies outside of the image"))?;
            let new = new_of(d.u8()?).ok_or_else(|| invalid("unknown new content"))?;
            let old = old_of(d.u8()?).ok_or_else(|| invalid("unknown old content"))?;
            let has_bytes = new == NewContent::Data || old == OldContent::Data;
            if has_bytes && !start.is_multiple_of(PAGE as u64) {
                return Err(invalid("pages start at multiples of 4096"));
            }
            let units = unit.count(geometry, extent);
            new_count = new_count.saturating_add(if new == NewContent::Data { units } else { 0 });
            old_count = old_count.saturating_add(if old == OldContent::Data { units } else { 0 });
            extents.push(BatchExtent { extent, new, old });
        }
        if new_count > MAX_DIGESTS || old_count > MAX_DIGESTS {
            return Err(invalid("more digests than a record may have"));
        }
        let mut digests = |n: usize| -> blockferry_core::Result<Vec<Digest>> {
            (0..n).map(|_| d.array().map(Digest::from_bytes)).collect()
        };
        let new_digests = digests(new_count)?;
        let old_digests = digests(old_count)?;
        let header = Self {
            session,
            sequence,
            previous,
            durable,
            unit,
            fuzzy: flags & 1 != 0,
            compaction_end: flags & 2 != 0,
            pages,
            evidence,
            extents,
            new_digests,
            old_digests,
        };
        let too_long = header.pages != StoredPages::Elsewhere
            && header.new_bytes() > MAX_PAYLOAD_BYTES
            || header.old_bytes() > MAX_PAYLOAD_BYTES;
        if too_long {
            Err(invalid("more pages than a record may have"))
        } else {
            Ok(header)
        }
    }
}

fn padded<'a>(extents: impl Iterator<Item = &'a BatchExtent>) -> u64 {
    extents
        .map(|e| e.extent.length().next_multiple_of(PAGE as u64))
        .sum()
}

fn new_code(content: NewContent) -> u8 {
    match content {
        NewContent::None => 0,
        NewContent::Data => 1,
        NewContent::Zero => 2,
        NewContent::Reserve => 3,
    }
}

fn new_of(code: u8) -> Option<NewContent> {
    [
        NewContent::None,
        NewContent::Data,
        NewContent::Zero,
        NewContent::Reserve,
    ]
    .into_iter()
    .find(|c| new_code(*c) == code)
}

fn old_code(content: OldContent) -> u8 {
    match content {
        OldContent::None => 0,
        OldContent::Data => 1,
        OldContent::Zero => 2,
    }
}

fn old_of(code: u8) -> Option<OldContent> {
    [OldContent::None, OldContent::Data, OldContent::Zero]
        .into_iter()
        .find(|c| old_code(*c) == code)
}

fn count_u32(count: usize) -> u32 {
    u32::try_from(count).unwrap_or_else(|_| unreachable!("bounded by the batch's limits"))
}

/// Lengths that are bounded by a record always fit.
pub(crate) fn usize_of(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
