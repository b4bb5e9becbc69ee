//! What a plain reader makes of the files: no recovery, no caching, only checksums and the fields that bind one
//! structure to another. It says less than the transfer log, but nothing that the log may contradict.

use blockferry::core::{Decoder, Digest, Result, checksum};
use blockferry::transfer_log::{DecisionKind, Inspection, SessionId, UnfinishedSession};

use crate::pages::{Files, PAGE, SLOT_PAGES, STATE};

const CHECKSUM_BYTES: usize = 32;
const MAX_HEADER_PAGES: usize = 16;

/// A structure whose checksum is right, as far as others name it.
#[derive(Debug)]
enum Sealed {
    Segment {
        session: SessionId,
        first_sequence: u64,
        seal: Digest,
    },
    Record {
        session: SessionId,
        sequence: u64,
        previous: Digest,
        seal: Digest,
        /// Its pages are in the file, and its extents inside of the larger size that the file's first page tells.
        stands: bool,
    },
    Decision {
        session: SessionId,
        code: u8,
        records: u64,
        chain: Digest,
    },
}

/// All structures of an input.
#[derive(Debug)]
pub struct Oracle {
    all: Vec<Sealed>,
    has_slot: bool,
}

impl Oracle {
    /// Reads the files.
    pub fn of(files: &Files) -> Self {
        let mut all = Vec::new();
        let mut has_slot = false;
        for (number, file) in files.iter().enumerate() {
            let Some(file) = file else { continue };
            let image_bytes = image_bytes_of(file).ok().flatten().unwrap_or(0);
            for start in (0..file.len()).step_by(PAGE) {
                let page = start / PAGE;
                let Some((body, seal)) = sealed_at(&file[start..]) else {
                    continue;
                };
                has_slot |=
                    number == STATE && SLOT_PAGES.contains(&page) && body.starts_with(b"BFRYSLT\0");
                let room = file.len() - start - body.len() - CHECKSUM_BYTES;
                all.extend(read(body, seal, image_bytes, room as u64).ok().flatten());
            }
        }
        Self { all, has_slot }
    }

    /// What a look shows must be on the disk.
    pub fn check(&self, looked: &Inspection) {
        assert!(self.has_slot, "a point out of nothing: {looked:?}");
        if let Some(unfinished) = &looked.unfinished {
            assert!(self.ends_at_a_right_record(unfinished), "{unfinished:?}");
            assert!(self.was_decided(unfinished), "{unfinished:?}");
        }
    }

    /// Whether the last record that counts is one of this session that follows something of this session, and stands.
    fn ends_at_a_right_record(&self, unfinished: &UnfinishedSession) -> bool {
        let mine = unfinished.header.session;
        self.all.iter().any(|sealed| match sealed {
            Sealed::Segment {
                session,
                first_sequence,
                ..
            } => *session == mine && first_sequence.checked_sub(1) == Some(unfinished.records),
            Sealed::Record {
                session,
                sequence,
                previous,
                stands,
                ..
            } => {
                *stands
                    && *session == mine
                    && *sequence == unfinished.records
                    && self.seals_of(mine).any(|seal| seal == *previous)
            }
            Sealed::Decision { .. } => false,
        })
    }

    fn was_decided(&self, unfinished: &UnfinishedSession) -> bool {
        let Some(kind) = unfinished.decision else {
            return true;
        };
        self.all.iter().any(|sealed| {
            matches!(sealed, Sealed::Decision { session, code, .. }
                if *session == unfinished.header.session && *code == code_of(kind))
        })
    }

    /// Whether there is a decision that may move the target, and the log that it was made on.
    pub fn may_move(&self) -> bool {
        let moving = [
            DecisionKind::Prepared,
            DecisionKind::Commit,
            DecisionKind::Rollback,
        ]
        .map(code_of);
        self.all.iter().any(|sealed| match sealed {
            Sealed::Decision {
                session,
                code,
                records,
                chain,
            } => moving.contains(code) && self.binds(*session, *records, *chain),
            _ => false,
        })
    }

    fn binds(&self, mine: SessionId, records: u64, chain: Digest) -> bool {
        let binds_nothing = chain == Digest::from_bytes([0; 32]);
        binds_nothing
            || self.all.iter().any(|sealed| match sealed {
                Sealed::Segment {
                    session,
                    first_sequence,
                    seal,
                } => *session == mine && *seal == chain && *first_sequence == records + 1,
                Sealed::Record {
                    session,
                    sequence,
                    seal,
                    ..
                } => *session == mine && *seal == chain && *sequence == records,
                Sealed::Decision { .. } => false,
            })
    }

    fn seals_of(&self, mine: SessionId) -> impl Iterator<Item = Digest> {
        self.all.iter().filter_map(move |sealed| match sealed {
            Sealed::Segment { session, seal, .. } | Sealed::Record { session, seal, .. } => {
                (*session == mine).then_some(*seal)
            }
            Sealed::Decision { .. } => None,
        })
    }
}

/// The structure at the start of these bytes, without its checksum.
fn sealed_at(bytes: &[u8]) -> Option<(&[u8], Digest)> {
    let pages = if bytes.starts_with(b"BFRYREC\0") {
        let length = u32::from_le_bytes(*bytes.get(12..)?.first_chunk()?);
        (length as usize / PAGE).clamp(1, MAX_HEADER_PAGES)
    } else {
        1
    };
    let (body, sum) = bytes
        .get(..pages * PAGE)?
        .split_at(pages * PAGE - CHECKSUM_BYTES);
    let seal = checksum(body);
    (seal.as_bytes() == sum).then_some((body, seal))
}

/// What a segment says of the larger of its two images.
fn image_bytes_of(segment: &[u8]) -> Result<Option<u64>> {
    let mut d = Decoder::new(segment);
    if d.array()? != *b"BFRYLOG\0" {
        return Ok(None);
    }
    d.bytes(4 + 16 + 8 + 3)?;
    Ok(Some(d.u64()?.max(d.u64()?)))
}

/// Reads what lies in a file with `room` bytes behind it, and is about images of up to `image_bytes`.
fn read(body: &[u8], seal: Digest, image_bytes: u64, room: u64) -> Result<Option<Sealed>> {
    let mut d = Decoder::new(body);
    let magic: [u8; 8] = d.array()?;
    d.u32()?;
    Ok(match &magic {
        b"BFRYLOG\0" => {
            let session = SessionId::from_bytes(d.array()?);
            d.bytes(8 + 3 + 3 * 8)?;
            skip_option(&mut d, 16)?;
            d.bytes_u16(PAGE)?;
            skip_option(&mut d, 8)?;
            skip_option(&mut d, 8)?;
            for _ in 0..3 {
                d.bytes_u16(PAGE)?;
            }
            d.bytes(8 + 4 + 1)?;
            let first_sequence = d.u64()?;
            Some(Sealed::Segment {
                session,
                first_sequence,
                seal,
            })
        }
        b"BFRYREC\0" => {
            d.u32()?;
            let session = SessionId::from_bytes(d.array()?);
            let (sequence, previous) = (d.u64()?, d.digest()?);
            let stands = stands(&mut d, image_bytes, room)?;
            Some(Sealed::Record {
                session,
                sequence,
                previous,
                seal,
                stands,
            })
        }
        b"BFRYDEC\0" => {
            let session = SessionId::from_bytes(d.array()?);
            d.bytes(8 + 4)?;
            Some(Sealed::Decision {
                session,
                code: d.u8()?,
                records: d.u64()?,
                chain: d.digest()?,
            })
        }
        _ => None,
    })
}

/// Reads on from the end of `previous`.
fn stands(d: &mut Decoder<'_>, image_bytes: u64, room: u64) -> Result<bool> {
    let pages_of = |bytes: u64| bytes.div_ceil(PAGE as u64).saturating_mul(PAGE as u64);
    d.bytes(8 + 1 + 1)?;
    let (kind, frame_bytes) = (d.u8()?, u64::from(d.u32()?));
    d.digest()?;
    d.bytes_u16(PAGE)?;
    let (mut is_inside, mut new, mut old) = (true, 0_u64, 0_u64);
    for _ in 0..d.u32()? {
        let (start, length) = (d.u64()?, d.u64()?);
        is_inside &= start
            .checked_add(length)
            .is_some_and(|end| end <= image_bytes);
        for bytes in [&mut new, &mut old] {
            let stored = if d.u8()? == 1 { pages_of(length) } else { 0 };
            *bytes = bytes.saturating_add(stored);
        }
    }
    let new = [0, new, pages_of(frame_bytes)]
        .get(usize::from(kind))
        .copied();
    Ok(is_inside && new.is_some_and(|new| new.saturating_add(old) <= room))
}

fn skip_option(d: &mut Decoder<'_>, bytes: usize) -> Result<()> {
    if d.u8()? != 0 {
        d.bytes(bytes)?;
    }
    Ok(())
}

/// As `docs/format/state.md` numbers them.
fn code_of(kind: DecisionKind) -> u8 {
    match kind {
        DecisionKind::GiveUp => 1,
        DecisionKind::Prepared => 2,
        DecisionKind::Commit => 3,
        DecisionKind::Rollback => 4,
        DecisionKind::Applied => 5,
        DecisionKind::RolledBack => 6,
        DecisionKind::Retired => 7,
        other => panic!("{other:?} is new"),
    }
}
