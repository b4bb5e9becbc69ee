//! Decisions: the few records that change what a session means.

use blockferry_core::{Decoder, Digest, Encoder};
use blockferry_device::Evidence;

use super::header::decode_evidence;
use super::{FORMAT_VERSION, PAGE, SessionId, decode_count, seal, unseal};

const MAGIC: &[u8; 8] = b"BFRYDEC\0";

/// What was decided. Each is durable before anything that relies on it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DecisionKind {
    /// The old content is given up: the target is written in place from here on (`direct` only).
    GiveUp,
    /// Complete and checked; a group record decides.
    Prepared,
    /// The staged records count. The only commit point.
    Commit,
    /// Return to the old point.
    Rollback,
    /// The target is the new point, flushed and read back.
    Applied,
    /// The target is the old point again, flushed and read back.
    RolledBack,
    /// The old point is let go of; what held it is removed.
    Retired,
}

impl DecisionKind {
    const ALL: [Self; 7] = [
        Self::GiveUp,
        Self::Prepared,
        Self::Commit,
        Self::Rollback,
        Self::Applied,
        Self::RolledBack,
        Self::Retired,
    ];

    /// Whether recovery reads the session's records to carry it out.
    pub(crate) fn is_carried_out_from_log(self) -> bool {
        matches!(self, Self::Commit | Self::Rollback)
    }

    fn code(self) -> u8 {
        match self {
            Self::GiveUp => 1,
            Self::Prepared => 2,
            Self::Commit => 3,
            Self::Rollback => 4,
            Self::Applied => 5,
            Self::RolledBack => 6,
            Self::Retired => 7,
        }
    }
}

/// One self-checked decision, [`PAGE`] bytes when stored.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub(crate) struct Decision {
    /// Whose decision.
    pub session: SessionId,
    /// Of its session: what a lane holds of sessions with a lower one is stale.
    pub epoch: u64,
    /// Its place in the order of this session's decisions, from 0.
    pub ordinal: u32,
    /// What was decided.
    pub kind: DecisionKind,
    /// Records that count.
    pub records: u64,
    /// Chain hash after the last of them: binds plan, content and coverage.
    pub chain: Digest,
    /// Root of the new point.
    pub root: Digest,
    /// The group that decides, zero bytes if none.
    pub group: [u8; 16],
    /// For an outcome: the target's evidence when it was reached, from which a lost slot is derived again.
    pub evidence: Evidence,
}

impl Decision {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(PAGE);
        let mut e = Encoder::new(&mut bytes);
        e.bytes(MAGIC);
        e.u32(FORMAT_VERSION);
        e.bytes(self.session.as_bytes());
        e.u64(self.epoch);
        e.u32(self.ordinal);
        e.u8(self.kind.code());
        e.u64(self.records);
        e.bytes(self.chain.as_bytes());
        e.bytes(self.root.as_bytes());
        e.bytes(&self.group);
        e.bytes_u16(self.evidence.as_bytes());
        seal(bytes)
    }

    /// `None` if these bytes are not a whole decision: never written, torn, or rotten.
    pub(crate) fn decode(page: &[u8]) -> Option<Self> {
        // Most places were never written: do not checksum their zeros.
        let (body, _) = page.starts_with(MAGIC).then(|| unseal(page))??;
        let mut d = Decoder::new(body);
        if d.array::<8>().ok()? != *MAGIC || d.u32().ok()? != FORMAT_VERSION {
            return None;
        }
        let session = SessionId::from_bytes(d.array().ok()?);
        let epoch = decode_count(&mut d).ok()?;
        let ordinal = d.u32().ok().filter(|o| *o < u32::MAX)?;
        let code = d.u8().ok()?;
        Some(Self {
            session,
            epoch,
            ordinal,
            kind: DecisionKind::ALL.into_iter().find(|k| k.code() == code)?,
            records: decode_count(&mut d).ok()?,
            chain: Digest::from_bytes(d.array().ok()?),
            root: Digest::from_bytes(d.array().ok()?),
            group: d.array().ok()?,
            evidence: decode_evidence(&mut d).ok()?,
        })
    }
}
