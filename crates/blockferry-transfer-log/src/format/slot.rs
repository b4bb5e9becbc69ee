//! State slots: where the target stands, in one page that replaces itself alternately with its twin.

use blockferry_core::{BlockSize, Decoder, Encoder, Geometry, Root};
use blockferry_device::{Evidence, Identity};

use super::header::{decode_evidence, decode_identity, decode_option, encode_option};
use super::{FORMAT_VERSION, PAGE, SessionId, SourceStamp, decode_count, seal, unseal};
use crate::plan::Strategy;

const MAGIC: &[u8; 8] = b"BFRYSLT\0";

/// A point the target is, or was, at.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Point {
    /// Its id: that of the session that made it.
    pub id: SessionId,
    /// Root of its content.
    pub root: Root,
    /// Its size and block size.
    pub geometry: Geometry,
    /// The source it came from, as it was then.
    pub source: SourceStamp,
    /// Seconds since 1970.
    pub made_unix: u64,
}

/// What is kept to return to the point before.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Retained {
    /// How the current point was made, hence what holds the old one.
    pub strategy: Strategy,
    /// The old point, if it was a known one.
    pub point: Option<Point>,
    /// Its size in bytes.
    pub old_bytes: u64,
}

/// One slot of the state file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub(crate) struct Slot {
    /// The slot with the higher sequence is the current one.
    pub sequence: u64,
    /// Epoch of the last session that was published.
    pub epoch: u64,
    /// The target this state belongs to.
    pub identity: Identity,
    /// The target's evidence when the slot was written.
    pub evidence: Evidence,
    /// The point the target is at, if a known one.
    pub point: Option<Point>,
    /// What is kept of the point before.
    pub retained: Option<Retained>,
}

impl Slot {
    /// The state of a target nothing is known of.
    pub(crate) fn unknown(identity: Identity) -> Self {
        Self {
            sequence: 1,
            epoch: 0,
            identity,
            evidence: Evidence::unknown(),
            point: None,
            retained: None,
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(PAGE);
        let mut e = Encoder::new(&mut bytes);
        e.bytes(MAGIC);
        e.u32(FORMAT_VERSION);
        e.u64(self.sequence);
        e.u64(self.epoch);
        e.bytes_u16(self.identity.as_bytes());
        e.bytes_u16(self.evidence.as_bytes());
        encode_option(&mut e, self.point.as_ref(), encode_point);
        encode_option(&mut e, self.retained.as_ref(), |e, retained| {
            e.u8(retained.strategy.code());
            encode_option(e, retained.point.as_ref(), encode_point);
            e.u64(retained.old_bytes);
        });
        let page = seal(bytes);
        debug_assert_eq!(page.len(), PAGE, "two addresses of at most 1 KiB fit");
        page
    }

    /// `None` if these bytes are not a whole slot.
    pub(crate) fn decode(page: &[u8]) -> Option<Self> {
        let (body, _) = page.starts_with(MAGIC).then(|| unseal(page))??;
        let mut d = Decoder::new(body);
        if d.array::<8>().ok()? != *MAGIC || d.u32().ok()? != FORMAT_VERSION {
            return None;
        }
        Self::decode_fields(&mut d).ok()
    }

    fn decode_fields(d: &mut Decoder<'_>) -> blockferry_core::Result<Self> {
        Ok(Self {
            sequence: decode_count(d)?,
            epoch: decode_count(d)?,
            identity: decode_identity(d)?,
            evidence: decode_evidence(d)?,
            point: decode_option(d, decode_point)?,
            retained: decode_option(d, decode_retained)?,
        })
    }
}

pub(super) fn encode_point(e: &mut Encoder<'_>, point: &Point) {
    e.bytes(point.id.as_bytes());
    e.bytes(point.root.as_bytes());
    e.u64(point.geometry.image_bytes());
    e.u64(point.geometry.block_size().bytes());
    point.source.encode(e);
    e.u64(point.made_unix);
}

pub(super) fn decode_point(d: &mut Decoder<'_>) -> blockferry_core::Result<Point> {
    let id = SessionId::from_bytes(d.array()?);
    let root = Root::from_bytes(d.array()?);
    let image_bytes = d.u64()?;
    let geometry = Geometry::new(image_bytes, BlockSize::new(d.u64()?)?);
    Ok(Point {
        id,
        root,
        geometry,
        source: SourceStamp::decode(d)?,
        made_unix: d.u64()?,
    })
}

fn decode_retained(d: &mut Decoder<'_>) -> blockferry_core::Result<Retained> {
    let strategy = Strategy::from_code(d.u8()?).ok_or_else(|| {
        blockferry_core::Error::new(blockferry_core::ErrorKind::Invalid, "unknown strategy")
    })?;
    Ok(Retained {
        strategy,
        point: decode_option(d, decode_point)?,
        old_bytes: d.u64()?,
    })
}
