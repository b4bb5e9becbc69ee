//! The log's segments: appending records, reading them back, scanning them after a crash.
//!
//! A segment is a file `SESSION.log.NNNN`: a header page, then records. A record is valid only for its
//! session and its predecessor (I7): its header names the chain value of the one before, back to the header
//! of the segment and through that to the segment before.

use std::borrow::Cow;
use std::ops::Deref;
use std::sync::Arc;

use blockferry_core::{Digest, Geometry};
use blockferry_device::{
    AlignedBuffer, Evidence, ReadRequest, StorageDir, StorageFile, WriteRequest,
};

use crate::batch::Batch;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Decision, MAX_DIGESTS, MAX_EXTENTS, MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, NewContent,
    OldContent, PAGE, RecordHeader, SegmentHeader, SegmentKind, SessionId, StoredPages, usize_of,
};
use crate::plan::Strategy;
use crate::spare::{Spare, SpareSlice};
use crate::stats::Stats;

/// Name of a segment.
pub(crate) fn segment_name(session: SessionId, segment: u32) -> String {
    format!("{session}.log.{segment:04}")
}

/// Session and number of a segment's name.
pub(crate) fn parse_segment_name(name: &str) -> Option<(SessionId, u32)> {
    let (session, number) = name.split_once(".log.")?;
    let number = number.parse().ok().filter(|n| *n < u32::MAX)?;
    Some((SessionId::from_hex(session)?, number))
}

/// Where a record is.
#[derive(Clone, Debug)]
pub(crate) struct RecordPlace {
    pub(crate) sequence: u64,
    segment: usize,
    offset: u64,
    header_bytes: u32,
    stored_new_bytes: u32,
    old_bytes: u32,
    /// Copied from a source that was being written.
    pub(crate) fuzzy: bool,
    /// Its payload turned out not to be what was written; nothing refers to it any more.
    pub(crate) dropped: bool,
}

impl RecordPlace {
    fn stored_bytes(&self) -> u64 {
        u64::from(self.header_bytes) + u64::from(self.stored_new_bytes) + u64::from(self.old_bytes)
    }

    /// Bytes of its old pages.
    pub(crate) fn old_bytes(&self) -> u64 {
        u64::from(self.old_bytes)
    }
}

/// A record in memory: its header and its new pages, unpacked and checked.
#[derive(Debug)]
pub(crate) struct LoadedRecord {
    pub(crate) header: RecordHeader,
    pub(crate) new: Pages,
}

/// Pages, in a buffer that is used again where they are stored as they are.
#[derive(Debug)]
pub(crate) enum Pages {
    Stored(SpareSlice),
    Unpacked(Vec<u8>),
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Stored(slice) => slice,
            Self::Unpacked(bytes) => bytes,
        }
    }
}

/// All segments of a session, open for reading.
#[derive(Clone, Debug)]
pub(crate) struct LogFiles {
    session: SessionId,
    geometry: Geometry,
    strategy: Strategy,
    /// Nothing a record names may lie beyond: the larger of the old and the new size.
    limit_bytes: u64,
    files: Vec<Arc<dyn StorageFile>>,
    spare: Spare,
}

impl LogFiles {
    pub(crate) fn new(header: &SegmentHeader) -> Self {
        Self {
            session: header.session,
            geometry: header.geometry,
            strategy: header.strategy,
            limit_bytes: header.old_bytes.max(header.geometry.image_bytes()),
            files: Vec::new(),
            spare: Spare::default(),
        }
    }

    /// Buffers that others may use again, too.
    pub(crate) fn spare(&self) -> Spare {
        self.spare.clone()
    }

    /// Reads and checks the header of a record.
    pub(crate) fn header(&self, place: &RecordPlace) -> Result<RecordHeader> {
        let bytes = self.read(place.segment, place.offset, u64::from(place.header_bytes))?;
        self.decode(place, &bytes)
    }

    fn decode(&self, place: &RecordPlace, bytes: &[u8]) -> Result<RecordHeader> {
        let (header, _) = self.decode_any(bytes).map_err(|e| self.at(place, &e))?;
        if header.session != self.session || header.sequence != place.sequence {
            return Err(Error::corrupt(format!(
                "{}: it is another record",
                self.name_of(place)
            )));
        }
        Ok(header)
    }

    /// A header of any record that this log can have, and its chain value.
    fn decode_any(&self, bytes: &[u8]) -> Result<(RecordHeader, Digest)> {
        let (header, chain) = RecordHeader::decode(bytes, &self.geometry, self.limit_bytes)?;
        if header.is_kept_as(self.strategy) {
            return Ok((header, chain));
        }
        Err(Error::corrupt(format!(
            "record header: its new pages are not where {} keeps them",
            self.strategy
        )))
    }

    /// Reads, unpacks and checks a record without its old pages.
    pub(crate) fn load(&self, place: &RecordPlace) -> Result<LoadedRecord> {
        let header_bytes = place.header_bytes as usize;
        let length = u64::from(place.header_bytes) + u64::from(place.stored_new_bytes);
        let mut stored = self.read(place.segment, place.offset, length)?;
        let header = self.decode(place, &stored[..header_bytes])?;
        stored.skip(header_bytes);
        let new = match self.unpack(place, &header, &stored)? {
            Cow::Borrowed([]) => Pages::Unpacked(Vec::new()),
            Cow::Borrowed(_) => Pages::Stored(stored),
            Cow::Owned(plain) => Pages::Unpacked(plain),
        };
        self.check(place, &header, &new, Side::New)?;
        Ok(LoadedRecord { header, new })
    }

    /// Reads and checks the old pages.
    pub(crate) fn old_pages(&self, place: &RecordPlace, header: &RecordHeader) -> Result<Pages> {
        let offset =
            place.offset + u64::from(place.header_bytes) + u64::from(place.stored_new_bytes);
        let old = self.read(place.segment, offset, u64::from(place.old_bytes))?;
        self.check(place, header, &old, Side::Old)?;
        Ok(Pages::Stored(old))
    }

    /// Reads a whole record from the medium and checks all of it.
    pub(crate) fn verify(&self, place: &RecordPlace) -> Result<RecordHeader> {
        let stored = self.read(place.segment, place.offset, place.stored_bytes())?;
        let (head, payload) = stored.split_at(place.header_bytes as usize);
        let header = self.decode(place, head)?;
        let (new, old) = payload.split_at(place.stored_new_bytes as usize);
        let new = self.unpack(place, &header, new)?;
        self.check(place, &header, &new, Side::New)?;
        self.check(place, &header, old, Side::Old)?;
        Ok(header)
    }

    fn unpack<'a>(
        &self,
        place: &RecordPlace,
        header: &RecordHeader,
        stored: &'a [u8],
    ) -> Result<Cow<'a, [u8]>> {
        match header.pages {
            StoredPages::Elsewhere => Ok(Cow::Borrowed(&[])),
            StoredPages::Plain => Ok(Cow::Borrowed(stored)),
            StoredPages::Zstd {
                stored_bytes,
                checksum,
            } => {
                let frame = &stored[..stored_bytes as usize];
                if blockferry_core::checksum(frame) != checksum {
                    let name = self.name_of(place);
                    return Err(Error::corrupt(format!("{name}: checksum mismatch")));
                }
                crate::frame::unpack(frame, usize_of(header.new_bytes()))
                    .map(Cow::Owned)
                    .map_err(|e| self.at(place, &e))
            }
        }
    }

    fn check(
        &self,
        place: &RecordPlace,
        header: &RecordHeader,
        payload: &[u8],
        side: Side,
    ) -> Result<()> {
        if side == Side::New && header.pages == StoredPages::Elsewhere {
            return Ok(());
        }
        let digests = match side {
            Side::New => &header.new_digests,
            Side::Old => &header.old_digests,
        };
        let found = side.extents(header).scan(0usize, |offset, entry| {
            let start = *offset;
            *offset += usize_of(entry.extent.length().next_multiple_of(PAGE as u64));
            Some((entry.extent, start..*offset))
        });
        let mut expected = digests.iter();
        for (extent, range) in found {
            let bytes = payload.get(range).unwrap_or_default();
            if (bytes.len() as u64) < extent.length() {
                return Err(Error::corrupt(format!(
                    "{}: pages missing",
                    self.name_of(place)
                )));
            }
            for digest in header.unit.digests(&self.geometry, extent, bytes) {
                if expected.next() != Some(&digest) {
                    let name = self.name_of(place);
                    return Err(Error::corrupt(format!(
                        "{name}: digest mismatch in {extent}"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Reads from the medium into whole aligned pages.
    fn read(&self, segment: usize, offset: u64, length: u64) -> Result<SpareSlice> {
        let length = usize_of(length);
        let mut buffer = self.spare.take(length);
        if length > 0 {
            let file = &self.files[segment];
            read_twice(&**file, offset, &mut buffer[..length])
                .map_err(|e| Error::log(format!("read {} at {offset}", file.label()), e))?;
        }
        Ok(buffer.first(length))
    }

    fn name_of(&self, place: &RecordPlace) -> String {
        let file = self.files[place.segment].label();
        format!(
            "transfer log record {} at offset {} of {file}",
            place.sequence, place.offset
        )
    }

    fn at(&self, place: &RecordPlace, error: &Error) -> Error {
        Error::new(error.kind(), format!("{}: {error}", self.name_of(place)))
    }
}

/// Reads from the medium. What cannot be read counts as lost: a scan forgets it for good, and a session stages it
/// again. An error that goes away by itself was not the medium's, so it is tried once more.
fn read_twice(
    file: &dyn StorageFile,
    offset: u64,
    buffer: &mut [u8],
) -> blockferry_device::Result<()> {
    let mut read = || {
        let buffer = &mut *buffer;
        file.read_medium(&mut [ReadRequest { offset, buffer }])
    };
    match read() {
        Err(error) if error.kind() != blockferry_device::ErrorKind::Cancelled => read(),
        outcome => outcome,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    New,
    Old,
}

impl Side {
    fn extents(self, header: &RecordHeader) -> impl Iterator<Item = &crate::format::BatchExtent> {
        header.extents.iter().filter(move |e| match self {
            Self::New => e.new == NewContent::Data,
            Self::Old => e.old == OldContent::Data,
        })
    }
}

/// What a reader would refuse must never be written: everything after it would be lost with it.
fn check_limits(header: &RecordHeader) -> Result<()> {
    let frame_fits = match header.pages {
        StoredPages::Zstd { stored_bytes, .. } => u64::from(stored_bytes) <= 2 * MAX_PAYLOAD_BYTES,
        StoredPages::Plain | StoredPages::Elsewhere => true,
    };
    let pages_fit =
        header.pages == StoredPages::Elsewhere || header.new_bytes() <= MAX_PAYLOAD_BYTES;
    let fits = header.extents.len() <= MAX_EXTENTS
        && header.new_digests.len() <= MAX_DIGESTS
        && header.old_digests.len() <= MAX_DIGESTS
        && header.old_bytes() <= MAX_PAYLOAD_BYTES
        && frame_fits
        && pages_fit
        && header.encoded_bytes() <= MAX_HEADER_BYTES;
    if fits {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::LimitExceeded,
        format!(
            "record {}: {} extents with {} new and {} old bytes are more than a record may have",
            header.sequence,
            header.extents.len(),
            header.new_bytes(),
            header.old_bytes()
        ),
    ))
}

/// The end of a log that is being written.
#[derive(Debug)]
pub(crate) struct Appender {
    file: Arc<dyn StorageFile>,
    stats: Arc<Stats>,
    segment: usize,
    strategy: Strategy,
    position: u64,
    /// Position at the last flush.
    flushed: u64,
    next_sequence: u64,
    chain: Digest,
    durable: u64,
    /// Set by the first failed write or flush (I8).
    dead: bool,
}

impl Appender {
    /// Creates a segment; its name is durable after the directory is synced.
    pub(crate) fn create(
        dir: &dyn StorageDir,
        files: &mut LogFiles,
        header: &SegmentHeader,
        stats: &Arc<Stats>,
    ) -> Result<Self> {
        let name = segment_name(header.session, header.segment);
        let attempt = || format!("create {name} in {}", dir.label());
        let file = dir.create(&name).map_err(|e| Error::log(attempt(), e))?;
        let (page, chain) = header.encode();
        file.write_at(0, &page)
            .map_err(|e| Error::log(attempt(), e))?;
        files.files.push(Arc::clone(&file));
        Ok(Self {
            file,
            stats: Arc::clone(stats),
            segment: files.files.len() - 1,
            strategy: header.strategy,
            position: PAGE as u64,
            flushed: 0,
            next_sequence: header.first_sequence,
            chain,
            durable: header.first_sequence - 1,
            dead: false,
        })
    }

    /// Writes one record. It counts after the next [`Self::flush`].
    pub(crate) fn append(
        &mut self,
        session: SessionId,
        batch: &Batch,
        compaction_end: bool,
    ) -> Result<(RecordPlace, RecordHeader)> {
        let header = RecordHeader {
            session,
            sequence: self.next_sequence,
            previous: self.chain,
            durable: self.durable,
            unit: batch.unit,
            fuzzy: batch.fuzzy,
            compaction_end,
            pages: batch.pages,
            evidence: batch.evidence.clone(),
            extents: batch.extents.clone(),
            new_digests: batch.new_digests.clone(),
            old_digests: batch.old_digests.clone(),
        };
        check_limits(&header)?;
        if !header.is_kept_as(self.strategy) {
            return Err(Error::refused(format!(
                "the batch was made for another session: {} does not keep new pages that way",
                self.strategy
            )));
        }
        let (head, chain) = header.encode();
        let mut head_buffer = AlignedBuffer::zeroed(head.len());
        head_buffer.copy_from_slice(&head);
        let place = RecordPlace {
            sequence: header.sequence,
            segment: self.segment,
            offset: self.position,
            header_bytes: bounded_u32(head.len()),
            stored_new_bytes: bounded_u32(batch.new_payload().len()),
            old_bytes: bounded_u32(batch.old_payload().len()),
            fuzzy: header.fuzzy,
            dropped: false,
        };
        self.write(&[&head_buffer, batch.new_payload(), batch.old_payload()])?;
        self.stats.count_record(place.stored_bytes());
        self.next_sequence += 1;
        self.chain = chain;
        Ok((place, header))
    }

    fn write(&mut self, parts: &[&[u8]]) -> Result<()> {
        self.check_alive()?;
        let mut requests = Vec::with_capacity(parts.len());
        let mut offset = self.position;
        for part in parts.iter().filter(|p| !p.is_empty()) {
            requests.push(WriteRequest {
                offset,
                bytes: part,
            });
            offset += part.len() as u64;
        }
        self.dead = true;
        self.file
            .write_batch(&requests)
            .map_err(|e| Error::log(format!("append to {}", self.file.label()), e))?;
        self.dead = false;
        self.position = offset;
        Ok(())
    }

    /// Makes every appended record durable.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.check_alive()?;
        self.dead = true;
        self.file
            .flush()
            .map_err(|e| Error::log(format!("flush {}", self.file.label()), e))?;
        self.stats.count_flush();
        self.dead = false;
        self.durable = self.next_sequence - 1;
        self.flushed = self.position;
        Ok(())
    }

    /// Nothing is appended after a failed write or flush (I8).
    pub(crate) fn check_alive(&self) -> Result<()> {
        if self.dead {
            let message = format!(
                "{} had a failed write or flush and is never appended to again; the session resumes in \
                 a fresh segment",
                self.file.label()
            );
            return Err(Error::new(ErrorKind::Log, message));
        }
        Ok(())
    }

    /// Whether anything was written since the last flush, the segment's header included.
    pub(crate) fn is_unflushed(&self) -> bool {
        self.position != self.flushed
    }

    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    pub(crate) fn chain(&self) -> Digest {
        self.chain
    }

    /// Sequence of the last record that is durable; 0 if none is.
    pub(crate) fn durable(&self) -> u64 {
        self.durable
    }

    pub(crate) fn next_sequence(&self) -> u64 {
        self.next_sequence
    }
}

/// What a scan found: everything up to the last chained record.
#[derive(Debug)]
pub(crate) struct Scan {
    /// Header of the first segment that counts.
    pub(crate) header: SegmentHeader,
    pub(crate) files: LogFiles,
    pub(crate) records: Vec<(RecordPlace, RecordHeader)>,
    /// Number of the next segment to create.
    pub(crate) next_segment: u32,
    pub(crate) next_sequence: u64,
    pub(crate) chain: Digest,
    /// Bytes of all segments that count.
    pub(crate) held_bytes: u64,
    /// What the target's evidence was each time the session looked. Space that is reserved changes it, and a power
    /// loss may take that back: any of them proves that nobody else wrote.
    evidences: Vec<Evidence>,
    /// Segments that never count again: compacted into a later one, or compactions that were cut short.
    pub(crate) superseded: Vec<u32>,
    /// The first thing that could not be read, which ended a segment or made one not count.
    unread: Option<Error>,
}

impl Scan {
    /// Whether a target with this evidence is provably unwritten since the session looked at it.
    pub(crate) fn is_target_unwritten(&self, now: &Evidence) -> bool {
        self.evidences.iter().any(|seen| now.proves_same(seen))
    }

    /// Refuses a decision that has another epoch than the log it is carried out from: no later decision of this
    /// session would count beside it, so it would be carried out for ever.
    pub(crate) fn check_epoch(&self, decision: &Decision) -> Result<()> {
        let (expected, found) = (self.header.epoch, decision.epoch);
        if found == expected {
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "decision {} of session {}: expected epoch {expected} as its log has, found {found}",
            decision.ordinal, decision.session
        )))
    }

    /// Keeps exactly the records a decision counts.
    ///
    /// # Errors
    /// They are not all there, or they are not those the decision was made on.
    pub(crate) fn keep_decided(&mut self, decision: &Decision) -> Result<()> {
        if decision.chain == Digest::from_bytes([0; 32]) {
            // It binds nothing: the decision before it was not readable.
            return Ok(());
        }
        let after = decision.records + 1;
        if chain_before(self, after) != Some(decision.chain) {
            return Err(Error::corrupt(format!(
                "session {} is decided with {} records, but its log of {} does not have these: the log is \
                 damaged",
                decision.session,
                decision.records,
                self.next_sequence.saturating_sub(1)
            ))
            .because(self.unread.take()));
        }
        self.records.retain(|(p, _)| p.sequence < after);
        Ok(())
    }
}

/// Scans the segments of a session, in order of their numbers. `Err` within if no segment has a valid header: the
/// session never became durable, or what is there cannot be read, and then that is the error.
pub(crate) fn scan(
    dir: &dyn StorageDir,
    session: SessionId,
    segments: &[u32],
    durability: ScanDurability,
    stats: &Stats,
) -> Result<std::result::Result<Scan, Option<Error>>> {
    let mut found: Option<Scan> = None;
    let mut unread: Option<Error> = None;
    let mut held: Vec<(u32, u64)> = Vec::new();
    let mut superseded = Vec::new();
    for number in segments {
        let name = segment_name(session, *number);
        let open = dir
            .open(&name)
            .map_err(|e| Error::log(format!("open {name}"), e))?;
        let Some(file) = open else { continue };
        if durability == ScanDurability::FlushFirst {
            // Kill, restart, acknowledge what the page cache showed, power loss: without this flush the
            // acknowledged records would be gone.
            file.flush()
                .map_err(|e| Error::log(format!("flush {name} before reading it"), e))?;
            stats.count_flush();
            file.drop_cache();
        }
        let segment = match scan_segment(Arc::clone(&file), session, &name, &mut unread) {
            Ok(Some(segment)) => segment,
            Ok(None) => continue,
            Err(error) if error.kind() == ErrorKind::UnknownVersion => return Err(error),
            Err(error) => {
                unread.get_or_insert(error);
                continue;
            }
        };
        match segment.compaction() {
            Some(Compaction::Complete) => superseded.extend(held.drain(..).map(|(n, _)| n)),
            // Where nothing counts before it, it may be what is left of a complete one: that is evidence.
            Some(Compaction::CutShort) if found.is_some() => superseded.push(*number),
            Some(Compaction::CutShort) | None => {}
        }
        found = join(found, segment, *number);
        let last = found.as_ref().and_then(|scan| scan.files.files.last());
        if last.is_some_and(|last| Arc::ptr_eq(last, &file)) {
            held.push((*number, file.size_bytes()));
        }
    }
    // A segment that does not count still has its name.
    let next_segment = segments.iter().max().map_or(0, |last| last + 1);
    let Some(scan) = found else {
        return Ok(Err(unread));
    };
    Ok(Ok(Scan {
        held_bytes: held.iter().map(|(_, bytes)| bytes).sum(),
        superseded,
        next_segment,
        unread,
        ..scan
    }))
}

/// Whether a scan may trust what it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScanDurability {
    /// Flush every file first: what is read is then durable.
    FlushFirst,
    /// Only look (another process may be writing).
    LookOnly,
}

struct SegmentScan {
    header: SegmentHeader,
    file: Arc<dyn StorageFile>,
    records: Vec<(RecordPlace, RecordHeader)>,
    /// Chain values: before the first record, then after each.
    chains: Vec<Digest>,
}

/// How far a segment got that was begun to replace those before it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Compaction {
    Complete,
    /// The segments before still count, this one never does.
    CutShort,
}

impl SegmentScan {
    fn compaction(&self) -> Option<Compaction> {
        let complete = || self.records.iter().any(|(_, h)| h.compaction_end);
        match self.header.kind {
            SegmentKind::Compacted if complete() => Some(Compaction::Complete),
            SegmentKind::Compacted => Some(Compaction::CutShort),
            SegmentKind::Continues => None,
        }
    }
}

/// Appends a segment to what was found before it, if it builds on it.
fn join(before: Option<Scan>, mut segment: SegmentScan, number: u32) -> Option<Scan> {
    let compaction = segment.compaction();
    let starts_over = compaction.is_some();
    if compaction == Some(Compaction::CutShort) {
        return before;
    }
    let mut scan = match before {
        Some(mut scan) if !starts_over => {
            let keep = segment.header.first_sequence;
            let goes_on = segment.header.is_about_the_same(&scan.header)
                && keep <= scan.next_sequence
                && chain_before(&scan, keep) == Some(segment.header.previous_chain);
            if !goes_on {
                return Some(scan);
            }
            scan.records.retain(|(p, _)| p.sequence < keep);
            scan
        }
        _ => {
            if !starts_over && number != 0 {
                // What it builds on is not there.
                return before;
            }
            Scan {
                files: LogFiles::new(&segment.header),
                header: segment.header.clone(),
                records: Vec::new(),
                next_segment: 0,
                next_sequence: 0,
                chain: segment.chains[0],
                held_bytes: 0,
                evidences: Vec::new(),
                superseded: Vec::new(),
                unread: None,
            }
        }
    };
    let index = scan.files.files.len();
    scan.files.files.push(segment.file);
    for (place, _) in &mut segment.records {
        place.segment = index;
    }
    // The later segment knows better what the target looked like; a record may know still better.
    let noted = segment.records.iter().rev().map(|(_, h)| &h.evidence);
    let mut known = noted
        .chain([&segment.header.target_evidence])
        .filter(|e| e.is_known())
        .peekable();
    scan.header.target_evidence = known
        .peek()
        .map_or(&segment.header.target_evidence, |latest| *latest)
        .clone();
    scan.evidences.extend(known.cloned());
    // A later run may have found the source changed, or the target.
    scan.header.source = segment.header.source.clone();
    scan.header.base = segment.header.base;
    scan.next_sequence = segment.header.first_sequence + segment.records.len() as u64;
    scan.records.append(&mut segment.records);
    scan.chain = segment.chains.pop().unwrap_or(scan.chain);
    Some(scan)
}

/// Chain value after the record before `sequence`, as the next segment's header must name it.
fn chain_before(scan: &Scan, sequence: u64) -> Option<Digest> {
    if sequence == scan.next_sequence {
        return Some(scan.chain);
    }
    scan.records
        .iter()
        .find(|(p, _)| p.sequence == sequence)
        .map(|(_, h)| h.previous)
}

fn scan_segment(
    file: Arc<dyn StorageFile>,
    session: SessionId,
    name: &str,
    unread: &mut Option<Error>,
) -> Result<Option<SegmentScan>> {
    let size = file.size_bytes();
    if size < PAGE as u64 {
        return Ok(None);
    }
    let mut page = AlignedBuffer::zeroed(PAGE);
    read_twice(&*file, 0, &mut page)
        .map_err(|e| Error::log(format!("read header of {name}"), e))?;
    let (header, mut chain) = SegmentHeader::decode(&page, name)?;
    let starts = 1..=u64::from(u32::MAX) * u64::from(u32::MAX);
    if header.session != session || !starts.contains(&header.first_sequence) {
        return Err(Error::corrupt(format!(
            "header of {name}: it is another session's"
        )));
    }
    let mut files = LogFiles::new(&header);
    files.files.push(Arc::clone(&file));
    let mut records: Vec<(RecordPlace, RecordHeader)> = Vec::new();
    let mut chains = vec![chain];
    let mut offset = PAGE as u64;
    while let Some((place, record, next)) = read_record(
        &files,
        offset,
        size,
        header.first_sequence + records.len() as u64,
        chain,
        unread,
    ) {
        offset += place.stored_bytes();
        chain = next;
        chains.push(chain);
        records.push((place, record));
    }
    drop_torn_tail(&files, &mut records, &mut chains, unread);
    Ok(Some(SegmentScan {
        header,
        file,
        records,
        chains,
    }))
}

/// The record at `offset`, if it is whole, of this session, and follows the chain.
fn read_record(
    files: &LogFiles,
    offset: u64,
    size: u64,
    sequence: u64,
    previous: Digest,
    unread: &mut Option<Error>,
) -> Option<(RecordPlace, RecordHeader, Digest)> {
    if offset + PAGE as u64 > size {
        return None;
    }
    let mut read = |length: usize| {
        let read = files.read(0, offset, length as u64);
        read.map_err(|e| unread.get_or_insert(e)).ok()
    };
    let first = read(PAGE)?;
    let length = RecordHeader::peek_length(&first)?;
    let whole;
    let bytes: &[u8] = if length == PAGE {
        &first
    } else {
        debug_assert!(length <= MAX_HEADER_BYTES, "peek_length bounds it");
        if offset + length as u64 > size {
            return None;
        }
        whole = read(length)?;
        &whole
    };
    let (header, chain) = files.decode_any(bytes).ok()?;
    let follows = header.session == files.session
        && header.sequence == sequence
        && header.previous == previous;
    let place = RecordPlace {
        sequence,
        segment: 0,
        offset,
        header_bytes: bounded_u32(length),
        stored_new_bytes: bounded_u32(usize_of(header.stored_new_bytes())),
        old_bytes: bounded_u32(usize_of(header.old_bytes())),
        fuzzy: header.fuzzy,
        dropped: false,
    };
    (follows && offset + place.stored_bytes() <= size).then_some((place, header, chain))
}

/// Cuts the records off that no later record says were durable and whose pages are not whole: the group under
/// way when power failed.
fn drop_torn_tail(
    files: &LogFiles,
    records: &mut Vec<(RecordPlace, RecordHeader)>,
    chains: &mut Vec<Digest>,
    unread: &mut Option<Error>,
) {
    let durable = records.iter().map(|(_, h)| h.durable).max().unwrap_or(0);
    let mut is_torn = |place: &RecordPlace| {
        let verified = files.verify(place);
        verified.map_err(|e| unread.get_or_insert(e)).is_err()
    };
    let torn = records
        .iter()
        .position(|(place, _)| place.sequence > durable && is_torn(place));
    if let Some(torn) = torn {
        records.truncate(torn);
        chains.truncate(torn + 1);
    }
}

fn bounded_u32(length: usize) -> u32 {
    u32::try_from(length).unwrap_or_else(|_| unreachable!("bounded by the limits of a record"))
}
