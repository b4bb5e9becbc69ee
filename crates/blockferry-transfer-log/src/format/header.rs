//! Segment headers: one page that says whose log this is and what it builds on.

use blockferry_core::{BlockSize, Decoder, Digest, Encoder, Geometry};
use blockferry_device::{Evidence, Identity};

use super::{FORMAT_VERSION, PAGE, SessionId, decode_count, seal, unseal};
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{Strategy, Undo};

const MAGIC: &[u8; 8] = b"BFRYLOG\0";
/// Longest source address that is recorded, in bytes.
pub(crate) const MAX_ADDRESS_BYTES: usize = 1024;

/// What a segment is to the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SegmentKind {
    /// Goes on where the one before ended (or is the first).
    Continues,
    /// Replaces all before it, once its end marker is durable.
    Compacted,
}

/// What is known of the source, so that a resume can find it and see whether it changed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SourceStamp {
    /// How the user named it, at most 1,024 bytes.
    pub address: String,
    /// Which device it is.
    pub identity: Identity,
    /// Its evidence when it was opened.
    pub evidence: Evidence,
}

impl SourceStamp {
    /// A stamp; an address longer than 1,024 bytes is not recorded.
    #[must_use]
    pub fn new(address: &str, identity: Identity, evidence: Evidence) -> Self {
        let address = if address.len() <= MAX_ADDRESS_BYTES {
            address
        } else {
            ""
        };
        Self {
            address: address.to_owned(),
            identity,
            evidence,
        }
    }

    pub(super) fn encode(&self, e: &mut Encoder<'_>) {
        e.bytes_u16(self.address.as_bytes());
        e.bytes_u16(self.identity.as_bytes());
        e.bytes_u16(self.evidence.as_bytes());
    }

    pub(super) fn decode(d: &mut Decoder<'_>) -> blockferry_core::Result<Self> {
        let address = String::from_utf8_lossy(d.bytes_u16(MAX_ADDRESS_BYTES)?).into_owned();
        let identity = decode_identity(d)?;
        Ok(Self {
            address,
            identity,
            evidence: decode_evidence(d)?,
        })
    }
}

pub(super) fn decode_identity(d: &mut Decoder<'_>) -> blockferry_core::Result<Identity> {
    Ok(Identity::from_bytes(
        d.bytes_u16(blockferry_device::MAX_EVIDENCE_BYTES)?,
    ))
}

pub(super) fn decode_evidence(d: &mut Decoder<'_>) -> blockferry_core::Result<Evidence> {
    Ok(Evidence::from_bytes(
        d.bytes_u16(blockferry_device::MAX_EVIDENCE_BYTES)?,
    ))
}

/// The first page of every segment; all of it repeats in every segment of a session except the last four
/// fields.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SegmentHeader {
    /// The session and the point it makes.
    pub session: SessionId,
    /// Greater than the epoch of every session before it on this target.
    pub epoch: u64,
    /// How the target is brought to the new point.
    pub strategy: Strategy,
    /// Whether pre-images or the old file are kept.
    pub undo: Undo,
    /// The mode, as the engine numbers it; the log only keeps it.
    pub mode: u8,
    /// Size of the target before, in bytes.
    pub old_bytes: u64,
    /// The image to come.
    pub geometry: Geometry,
    /// The point this builds on, if one is known.
    pub base: Option<SessionId>,
    /// Evidence of the target when the session began: unwritten means still equal.
    pub target_evidence: Evidence,
    /// File id of the target before (files only).
    pub old_file_id: Option<u64>,
    /// File id of the sibling that is written (clone, shadow, direct to an absent file).
    pub working_file_id: Option<u64>,
    /// The source.
    pub source: SourceStamp,
    /// Seconds since 1970 when the session began; for people.
    pub started_unix: u64,
    /// Number of this segment.
    pub segment: u32,
    /// What it is to the ones before it.
    pub kind: SegmentKind,
    /// Sequence number of its first record.
    pub first_sequence: u64,
    /// Chain hash before that record's segment: of the last record of the segment before, or of nothing.
    pub previous_chain: Digest,
}

impl SegmentHeader {
    /// The stored page and the chain value its first record builds on.
    pub(crate) fn encode(&self) -> (Vec<u8>, Digest) {
        let mut bytes = Vec::with_capacity(PAGE);
        let mut e = Encoder::new(&mut bytes);
        e.bytes(MAGIC);
        e.u32(FORMAT_VERSION);
        e.bytes(self.session.as_bytes());
        e.u64(self.epoch);
        e.u8(self.strategy.code());
        e.u8(self.undo.code());
        e.u8(self.mode);
        e.u64(self.old_bytes);
        e.u64(self.geometry.image_bytes());
        e.u64(self.geometry.block_size().bytes());
        encode_option(&mut e, self.base.as_ref(), |e, id| {
            e.bytes(id.as_bytes());
        });
        e.bytes_u16(self.target_evidence.as_bytes());
        encode_option(&mut e, self.old_file_id.as_ref(), |e, id| {
            e.u64(*id);
        });
        encode_option(&mut e, self.working_file_id.as_ref(), |e, id| {
            e.u64(*id);
        });
        self.source.encode(&mut e);
        e.u64(self.started_unix);
        e.u32(self.segment);
        e.u8(u8::from(self.kind == SegmentKind::Compacted));
        e.u64(self.first_sequence);
        e.bytes(self.previous_chain.as_bytes());
        let page = seal(bytes);
        debug_assert_eq!(page.len(), PAGE, "all variable fields are bounded");
        let chain = unseal(&page).map_or_else(|| unreachable!("sealed above"), |(_, chain)| chain);
        (page, chain)
    }

    /// Reads a header page; `name` is for the message.
    pub(crate) fn decode(page: &[u8], name: &str) -> Result<(Self, Digest)> {
        let (body, chain) = unseal(page)
            .ok_or_else(|| Error::corrupt(format!("header of {name}: checksum mismatch")))?;
        let bad =
            |cause: blockferry_core::Error| Error::corrupt(format!("header of {name}: {cause}"));
        let mut d = Decoder::new(body);
        if d.array::<8>().map_err(bad)? != *MAGIC {
            return Err(Error::corrupt(format!(
                "header of {name}: expected a transfer log segment"
            )));
        }
        let version = d.u32().map_err(bad)?;
        if version != FORMAT_VERSION {
            return Err(Error::new(
                ErrorKind::UnknownVersion,
                format!(
                    "header of {name}: format version {version}, this build reads {FORMAT_VERSION}"
                ),
            ));
        }
        Ok((Self::decode_fields(&mut d).map_err(bad)?, chain))
    }

    /// Whether both are about one session at one target: every run of it writes the same here.
    pub(crate) fn is_about_the_same(&self, other: &Self) -> bool {
        let told = |header: &Self| {
            (
                (header.session, header.epoch, header.strategy, header.undo),
                (header.old_bytes, header.geometry),
                (header.old_file_id, header.working_file_id),
            )
        };
        told(self) == told(other)
    }

    fn decode_fields(d: &mut Decoder<'_>) -> blockferry_core::Result<Self> {
        let invalid =
            |what: &str| blockferry_core::Error::new(blockferry_core::ErrorKind::Invalid, what);
        let session = SessionId::from_bytes(d.array()?);
        let epoch = decode_count(d)?;
        let strategy = Strategy::from_code(d.u8()?).ok_or_else(|| invalid("unknown strategy"))?;
        let undo = Undo::from_code(d.u8()?).ok_or_else(|| invalid("unknown undo"))?;
        let mode = d.u8()?;
        let old_bytes = d.u64()?;
        let image_bytes = d.u64()?;
        let geometry = Geometry::new(image_bytes, BlockSize::new(d.u64()?)?);
        Ok(Self {
            session,
            epoch,
            strategy,
            undo,
            mode,
            old_bytes,
            geometry,
            base: decode_option(d, |d| d.array().map(SessionId::from_bytes))?,
            target_evidence: decode_evidence(d)?,
            old_file_id: decode_option(d, Decoder::u64)?,
            working_file_id: decode_option(d, Decoder::u64)?,
            source: SourceStamp::decode(d)?,
            started_unix: d.u64()?,
            segment: d.u32()?,
            kind: if d.u8()? == 0 {
                SegmentKind::Continues
            } else {
                SegmentKind::Compacted
            },
            first_sequence: d.u64()?,
            previous_chain: Digest::from_bytes(d.array()?),
        })
    }
}

pub(super) fn encode_option<T>(
    e: &mut Encoder<'_>,
    value: Option<&T>,
    encode: impl FnOnce(&mut Encoder<'_>, &T),
) {
    e.u8(u8::from(value.is_some()));
    if let Some(value) = value {
        encode(e, value);
    }
}

pub(super) fn decode_option<'a, T>(
    d: &mut Decoder<'a>,
    decode: impl FnOnce(&mut Decoder<'a>) -> blockferry_core::Result<T>,
) -> blockferry_core::Result<Option<T>> {
    if d.u8()? == 0 {
        Ok(None)
    } else {
        decode(d).map(Some)
    }
}
