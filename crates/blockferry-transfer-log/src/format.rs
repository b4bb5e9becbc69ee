//! Every byte the transfer log stores: segment headers, records, decisions, state slots.
//!
//! The tables in `docs/format/transfer-log.md` and `docs/format/state.md` say the same in words. All integers
//! are little-endian and of fixed width; each structure ends with a BLAKE3 checksum of itself and sits alone in
//! its 4 KiB pages, so that no sector is ever written twice between two flushes.

mod anchor;
mod decision;
mod header;
mod record;
mod slot;

pub(crate) use anchor::{
    ANCHOR_EXTENTS, ANCHOR_HEADER_BYTES, ANCHOR_PAYLOAD_BYTES, AnchorExtent, AnchorRecord,
    AnchorSlot,
};
pub(crate) use decision::Decision;
pub use decision::DecisionKind;
pub use header::{SegmentHeader, SegmentKind, SourceStamp};
pub use record::{BatchExtent, NewContent, OldContent, Unit};
pub(crate) use record::{MAX_DIGESTS, MAX_EXTENTS, MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, usize_of};
pub(crate) use record::{RecordHeader, StoredPages};
pub(crate) use slot::Slot;
pub use slot::{Point, Retained};

use blockferry_core::{Decoder, Digest, checksum};

/// The only version of all formats of this crate.
pub const FORMAT_VERSION: u32 = 1;

/// Unit of everything stored: structures start at multiples of it.
pub(crate) const PAGE: usize = 4096;

const CHECKSUM_BYTES: usize = 32;

/// Names a session and the point it makes; random.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId([u8; 16]);

impl SessionId {
    /// From 16 random bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The 16 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// From 32 lower-case hexadecimal digits.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        if text.len() != 32 || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        u128::from_str_radix(text, 16).ok().map(|n| {
            let mut bytes = n.to_le_bytes();
            bytes.reverse();
            Self(bytes)
        })
    }
}

impl std::fmt::Display for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl std::fmt::Debug for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SessionId({self})")
    }
}

/// A count that is stored. Nothing ever counts as far as 2^63, so that the next one always fits.
fn decode_count(d: &mut Decoder<'_>) -> blockferry_core::Result<u64> {
    const LIMIT: u64 = 1 << 63;
    let count = d.u64()?;
    if count < LIMIT {
        return Ok(count);
    }
    Err(blockferry_core::Error::new(
        blockferry_core::ErrorKind::LimitExceeded,
        format!("expected a count below 2^63, found {count}"),
    ))
}

/// Pads `bytes` to a multiple of [`PAGE`] with room for the checksum, and puts the checksum at its end.
pub(crate) fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let padded = (bytes.len() + CHECKSUM_BYTES).next_multiple_of(PAGE);
    bytes.resize(padded - CHECKSUM_BYTES, 0);
    let sum = checksum(&bytes);
    bytes.extend_from_slice(sum.as_bytes());
    bytes
}

/// The sealed bytes without padding removed, and the checksum, if it is right.
pub(crate) fn unseal(bytes: &[u8]) -> Option<(&[u8], Digest)> {
    let (body, stored) = bytes.split_at_checked(bytes.len().checked_sub(CHECKSUM_BYTES)?)?;
    let sum = checksum(body);
    (sum.as_bytes() == stored).then_some((body, sum))
}

#[cfg(test)]
mod tests;
