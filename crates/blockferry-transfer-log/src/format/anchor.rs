//! The anchor: pre-images that outlive their sessions, in a file of its own.

use blockferry_core::{Decoder, Digest, Encoder, Extent};

use super::slot::{decode_point, encode_point};
use super::{CHECKSUM_BYTES, FORMAT_VERSION, PAGE, Point, decode_count, seal, unseal};

const SLOT_MAGIC: &[u8; 8] = b"BFRYANC\0";
const RECORD_MAGIC: &[u8; 8] = b"BFRYANR\0";

/// Most bytes of old pages in a record.
pub(crate) const ANCHOR_PAYLOAD_BYTES: usize = 1024 * 1024;
/// Most extents of a record.
pub(crate) const ANCHOR_EXTENTS: usize = 256;
/// Every header of a record has this size.
pub(crate) const ANCHOR_HEADER_BYTES: usize = 2 * PAGE;
const _: () = assert!(
    8 + 4 + 16 + 32 + 32 + 4 + ANCHOR_EXTENTS * 17 + CHECKSUM_BYTES <= ANCHOR_HEADER_BYTES,
    "a header has room for its extents"
);

/// How far an anchor counts: one of two slots that are written in turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AnchorSlot {
    /// The slot with the higher sequence is the current one.
    pub(crate) sequence: u64,
    /// What the pre-images lead back to.
    pub(crate) point: Point,
    /// Size of the target then.
    pub(crate) old_bytes: u64,
    /// Records that count.
    pub(crate) records: u64,
    /// Chain value after the last of them.
    pub(crate) chain: Digest,
}

impl AnchorSlot {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(PAGE);
        let mut e = Encoder::new(&mut bytes);
        e.bytes(SLOT_MAGIC);
        e.u32(FORMAT_VERSION);
        e.u64(self.sequence);
        e.u64(self.old_bytes);
        e.u64(self.records);
        e.bytes(self.chain.as_bytes());
        encode_point(&mut e, &self.point);
        let page = seal(bytes);
        debug_assert_eq!(page.len(), PAGE, "an address of at most 1 KiB fits");
        page
    }

    /// `None` if these bytes are not a whole slot.
    pub(crate) fn decode(page: &[u8]) -> Option<Self> {
        let (body, _) = page.starts_with(SLOT_MAGIC).then(|| unseal(page))??;
        let mut d = Decoder::new(body);
        if d.array::<8>().ok()? != *SLOT_MAGIC || d.u32().ok()? != FORMAT_VERSION {
            return None;
        }
        Self::decode_fields(&mut d).ok()
    }

    fn decode_fields(d: &mut Decoder<'_>) -> blockferry_core::Result<Self> {
        let (sequence, old_bytes, records) = (decode_count(d)?, decode_count(d)?, decode_count(d)?);
        Ok(Self {
            sequence,
            old_bytes,
            records,
            chain: Digest::from_bytes(d.array()?),
            point: decode_point(d)?,
        })
    }
}

/// One extent of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AnchorExtent {
    pub(crate) extent: Extent,
    /// It was zero: nothing of it is in the payload.
    pub(crate) is_zero: bool,
}

impl AnchorExtent {
    /// Room in the payload.
    pub(crate) fn stored_bytes(&self) -> u64 {
        if self.is_zero {
            return 0;
        }
        self.extent.length().next_multiple_of(PAGE as u64)
    }
}

/// Header of a record; the payload follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AnchorRecord {
    /// The point it belongs to.
    pub(crate) point: [u8; 16],
    /// Chain value before it.
    pub(crate) previous: Digest,
    /// Of the payload.
    pub(crate) payload_digest: Digest,
    /// In the order of their payload.
    pub(crate) extents: Vec<AnchorExtent>,
}

impl AnchorRecord {
    pub(crate) fn payload_bytes(&self) -> u64 {
        self.extents.iter().map(AnchorExtent::stored_bytes).sum()
    }

    /// The header, and the chain value after it.
    pub(crate) fn encode(&self) -> (Vec<u8>, Digest) {
        let mut bytes = Vec::with_capacity(ANCHOR_HEADER_BYTES);
        let mut e = Encoder::new(&mut bytes);
        e.bytes(RECORD_MAGIC);
        e.u32(FORMAT_VERSION);
        e.bytes(&self.point);
        e.bytes(self.previous.as_bytes());
        e.bytes(self.payload_digest.as_bytes());
        e.count(self.extents.len());
        for entry in &self.extents {
            e.u64(entry.extent.start());
            e.u64(entry.extent.length());
            e.u8(u8::from(entry.is_zero));
        }
        bytes.resize(ANCHOR_HEADER_BYTES - CHECKSUM_BYTES, 0);
        let sum = blockferry_core::checksum(&bytes);
        bytes.extend_from_slice(sum.as_bytes());
        (bytes, sum)
    }

    /// The header and the chain value after it; `None` if these bytes are not a whole one.
    pub(crate) fn decode(bytes: &[u8]) -> Option<(Self, Digest)> {
        let (body, sum) = bytes.starts_with(RECORD_MAGIC).then(|| unseal(bytes))??;
        let mut d = Decoder::new(body);
        if d.array::<8>().ok()? != *RECORD_MAGIC || d.u32().ok()? != FORMAT_VERSION {
            return None;
        }
        let record = Self::decode_fields(&mut d).ok().flatten()?;
        Some((record, sum))
    }

    fn decode_fields(d: &mut Decoder<'_>) -> blockferry_core::Result<Option<Self>> {
        let (point, previous, payload) = (d.array()?, d.array()?, d.array()?);
        let count = d.count(ANCHOR_EXTENTS)?;
        let mut extents = Vec::with_capacity(count);
        for _ in 0..count {
            let (start, length, is_zero) = (d.u64()?, d.u64()?, d.u8()? != 0);
            let most = if is_zero {
                u64::MAX
            } else {
                ANCHOR_PAYLOAD_BYTES as u64
            };
            let fits = (1..=most).contains(&length);
            let Some(end) = start.checked_add(length).filter(|_| fits) else {
                return Ok(None);
            };
            let extent = Extent::from_range(start..end);
            extents.push(AnchorExtent { extent, is_zero });
        }
        let record = Self {
            point,
            previous: Digest::from_bytes(previous),
            payload_digest: Digest::from_bytes(payload),
            extents,
        };
        let fits = record.payload_bytes() <= ANCHOR_PAYLOAD_BYTES as u64;
        Ok(Some(record).filter(|_| fits))
    }
}
