//! Apply and restore: writing staged pages to the target, and pre-images back. Both are idempotent (I6).
//!
//! ```text
//! load a record ──> write it to the target ──> flush ──> read back from the medium
//! ```
//! Up to one chunk of pages this happens step by step on the calling thread. What is more is worked on side by side:
//! two threads load ahead, one proves the chunk that was flushed last, the caller writes.

pub(crate) mod pool;
mod restore;

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use blockferry_core::{Extent, ExtentSet, Geometry};
use blockferry_device::{BlockTarget, WriteRequest};

use self::pool::Pool;
use crate::error::{Error, Result};
use crate::format::{BatchExtent, NewContent, PAGE, RecordHeader, StoredPages, Unit, usize_of};
use crate::index::{Index, Run, RunContent};
use crate::log::{LoadedRecord, LogFiles, Pages, RecordPlace};
use crate::plan::Proof;
use crate::readback::{Check, Expected, ReadBack};

/// Most bytes and requests handed to the target at once.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
const BATCH_REQUESTS: usize = 1024;
/// What is written, flushed and read back together.
const CHUNK_BYTES: u64 = 32 * 1024 * 1024;
/// Threads that load: one reads while the other checks.
const LOADERS: usize = 2;
/// Records that wait to be written, and chunks that wait to be proven.
const LOADED_AHEAD: usize = 8;
const UNPROVEN_CHUNKS: usize = 2;

/// Told how many bytes are done, of how many.
pub type Progress<'a> = &'a dyn Fn(u64, u64);

/// What apply and restore read from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Staged<'a> {
    pub(crate) geometry: Geometry,
    pub(crate) files: &'a LogFiles,
    pub(crate) records: &'a [RecordPlace],
    pub(crate) index: &'a Index,
    pub(crate) pool: &'a Pool,
    /// Holes of the target that apply fills.
    pub(crate) reserved: &'a ExtentSet,
    pub(crate) proof: Proof,
}

/// Where apply and restore write to, and what they need of their caller.
pub(crate) struct Destination<'a> {
    pub(crate) target: &'a dyn BlockTarget,
    /// A page across the end of the image is written whole up to here, so that no sector is written in part.
    pub(crate) room_bytes: u64,
    pub(crate) flush: &'a dyn Fn() -> Result<()>,
    pub(crate) progress: Progress<'a>,
}

impl Staged<'_> {
    /// Writes every staged page to the target, about in offset order, calls `finish`, flushes, and reads everything
    /// back from the medium. Returns the bytes that were read back.
    pub(crate) fn apply(
        &self,
        to: &Destination<'_>,
        finish: impl FnOnce() -> Result<()>,
    ) -> Result<u64> {
        let (order, room_bytes) = (self.order().into_iter(), to.room_bytes);
        let part_of = |number| self.new_part(number, room_bytes);
        let total = self.index.runs().map(|r| r.extent.length()).sum();
        carry_out(self.geometry, order, part_of, total, to, finish)
    }

    /// The records that hold something live, in the order of where they begin.
    fn order(&self) -> Vec<u32> {
        let mut seen = vec![false; self.records.len()];
        let first_seen = |n: &u32| !std::mem::replace(&mut seen[*n as usize], true);
        self.index
            .runs()
            .map(|r| r.record)
            .filter(first_seen)
            .collect()
    }

    fn new_part(&self, number: u32, room_bytes: u64) -> Result<Part> {
        let record = self.record(number)?;
        let mut part = Part::default();
        for live in self.live(number, &record.header) {
            let extent = live.run.extent;
            part.bytes += extent.length();
            if self.proof == Proof::ReadBack {
                part.checks
                    .extend(live.check(&self.geometry, &record.header, &record.new));
            }
            match live.run.content {
                RunContent::Zero => part.zeros.push(extent),
                RunContent::Data { payload } => {
                    let start = payload as usize;
                    let length = usize_of(whole_pages(extent, room_bytes).length());
                    part.writes.push((extent.start(), start..start + length));
                }
            }
        }
        part.pages = PartPages::New(record);
        Ok(part)
    }

    fn record(&self, number: u32) -> Result<Arc<LoadedRecord>> {
        match self.pool.find(number) {
            Some(record) => Ok(record),
            None => self
                .files
                .load(&self.records[number as usize])
                .map(Arc::new),
        }
    }

    /// Hands to `add` what a record of the working file proves of the new point and no later record replaced; returns
    /// how many bytes that is.
    pub(crate) fn add_live(
        &self,
        number: u32,
        header: &RecordHeader,
        add: &mut dyn FnMut(Check) -> Result<()>,
    ) -> Result<u64> {
        let mut bytes = 0;
        for live in self.live(number, header) {
            if let Some(check) = live.check(&self.geometry, header, &[]) {
                bytes += check.bytes();
                add(check)?;
            }
        }
        Ok(bytes)
    }

    /// What a record says of the new point and no later record replaced.
    fn live<'h>(
        &'h self,
        number: u32,
        header: &'h RecordHeader,
    ) -> impl Iterator<Item = Live<'h>> + 'h {
        let step = header.unit.bytes(&self.geometry);
        let staged = header
            .extents
            .iter()
            .filter(|e| matches!(e.new, NewContent::Data | NewContent::Zero));
        let numbered = staged.scan(0, move |next, entry| {
            let first_digest = *next;
            if entry.new == NewContent::Data {
                *next += usize_of(entry.extent.length().div_ceil(step));
            }
            Some((entry, first_digest))
        });
        numbered.flat_map(move |(entry, first_digest)| {
            let runs = self.index.within(entry.extent);
            let mine = runs.filter(move |r| r.record == number);
            mine.map(move |run| Live {
                run,
                entry,
                first_digest,
            })
        })
    }

    /// The extents that became zero, for giving their space back after `accept`.
    pub(crate) fn zeroed(&self) -> impl Iterator<Item = Extent> + '_ {
        self.index
            .runs()
            .filter(|r| r.content == RunContent::Zero)
            .map(|r| r.extent)
    }
}

/// A live run of a record.
struct Live<'h> {
    run: Run,
    /// What it is part of, and the number of that extent's first digest.
    entry: &'h BatchExtent,
    first_digest: usize,
}

impl Live<'_> {
    /// What the medium must hold there. `None` if a later record replaced part of a unit of which only the digest is
    /// known.
    fn check(&self, geometry: &Geometry, header: &RecordHeader, pages: &[u8]) -> Option<Check> {
        let extent = self.run.extent;
        let RunContent::Data { payload } = self.run.content else {
            return Some(Check::new(extent, header.unit, Expected::Zero));
        };
        let step = header.unit.bytes(geometry);
        let skip = extent.start() - self.entry.extent.start();
        let whole_units = skip.is_multiple_of(step)
            && (extent.end() == self.entry.extent.end() || extent.length().is_multiple_of(step));
        let (unit, digests) = if whole_units {
            let from = self.first_digest + usize_of(skip / step);
            let count = usize_of(extent.length().div_ceil(step));
            (header.unit, header.new_digests[from..from + count].to_vec())
        } else if header.pages != StoredPages::Elsewhere {
            let left = &pages[payload as usize..];
            let digests = Unit::Page.digests(geometry, extent, left);
            (Unit::Page, digests.collect())
        } else {
            return None;
        };
        Some(Check::new(extent, unit, Expected::Digests(digests)))
    }
}

/// The extent up to the end of its last page, where there is room; payloads are padded with zeros.
fn whole_pages(extent: Extent, room_bytes: u64) -> Extent {
    let end = extent.end().next_multiple_of(PAGE as u64).min(room_bytes);
    Extent::from_range(extent.start()..end.max(extent.end()))
}

/// What one record has to write, and what the medium must hold afterwards.
#[derive(Default)]
struct Part {
    bytes: u64,
    /// Offset in the target, and where in the pages.
    writes: Vec<(u64, Range<usize>)>,
    pages: PartPages,
    zeros: Vec<Extent>,
    checks: Vec<Check>,
}

/// The pages of a part; clones share them.
#[derive(Clone, Default)]
enum PartPages {
    #[default]
    None,
    New(Arc<LoadedRecord>),
    Old(Arc<Pages>),
}

impl PartPages {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::None => &[],
            Self::New(record) => &record.new,
            Self::Old(pages) => pages,
        }
    }
}

/// Makes a part of every record, writes it, calls `finish`, flushes, proves. Returns the bytes that were read back.
fn carry_out(
    geometry: Geometry,
    mut records: impl Iterator<Item = u32> + Send,
    part_of: impl Fn(u32) -> Result<Part> + Sync,
    total_bytes: u64,
    to: &Destination<'_>,
    finish: impl FnOnce() -> Result<()>,
) -> Result<u64> {
    if total_bytes <= CHUNK_BYTES {
        let last = write_chunks(records.map(part_of), total_bytes, to, |_| true)?;
        return finish_and_prove(geometry, last, to, finish);
    }
    let next = Mutex::new(move || records.next());
    let (next, part_of) = (&next, &part_of);
    std::thread::scope(|scope| {
        let (loaded, waiting) = sync_channel(LOADED_AHEAD);
        let (flushed, unproven) = sync_channel(UNPROVEN_CHUNKS);
        let target = to.target;
        for _ in 0..LOADERS {
            let loaded = loaded.clone();
            scope.spawn(move || load(next, part_of, &loaded));
        }
        drop(loaded);
        let prover = scope.spawn(move || prove_all(geometry, target, &unproven));
        // A prover that is gone has found something, and says what when it is asked below.
        let last = write_chunks(waiting.into_iter(), total_bytes, to, |chunk| {
            flushed.send(chunk).is_ok()
        });
        drop(flushed);
        let proven = prover
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let (last, proven) = (last?, proven?);
        Ok(proven + finish_and_prove(geometry, last, to, finish)?)
    })
}

fn load(
    next: &Mutex<impl FnMut() -> Option<u32>>,
    part_of: impl Fn(u32) -> Result<Part>,
    loaded: &SyncSender<Result<Part>>,
) {
    let take = || next.lock().unwrap_or_else(PoisonError::into_inner)();
    while let Some(number) = take() {
        let part = part_of(number);
        let failed = part.is_err();
        if loaded.send(part).is_err() || failed {
            break;
        }
    }
}

/// Writes everything and returns the checks of the last chunk, which is not flushed. Every other one is flushed and
/// handed to `prove`, until that says no.
fn write_chunks(
    parts: impl Iterator<Item = Result<Part>>,
    total_bytes: u64,
    to: &Destination<'_>,
    mut prove: impl FnMut(Vec<Check>) -> bool,
) -> Result<Vec<Check>> {
    let (mut done, mut chunk_start) = (0, 0);
    let mut checks = Vec::new();
    let mut writes = Writes::default();
    for part in parts {
        let part = part?;
        for extent in &part.zeros {
            to.target
                .write_zeroes(*extent)
                .map_err(|e| Error::target(format!("zero {extent} of the target"), e))?;
        }
        for (offset, range) in part.writes {
            writes.push(offset, part.pages.clone(), range);
            if writes.is_full() {
                writes.write(to.target)?;
            }
        }
        checks.extend(part.checks);
        done += part.bytes;
        (to.progress)(done, total_bytes);
        if done - chunk_start >= CHUNK_BYTES && done < total_bytes {
            chunk_start = done;
            writes.write(to.target)?;
            (to.flush)()?;
            if !prove(std::mem::take(&mut checks)) {
                break;
            }
        }
    }
    writes.write(to.target)?;
    Ok(checks)
}

fn finish_and_prove(
    geometry: Geometry,
    checks: Vec<Check>,
    to: &Destination<'_>,
    finish: impl FnOnce() -> Result<()>,
) -> Result<u64> {
    finish()?;
    // I4: an outcome follows only on a flush that succeeded and a read-back from the medium.
    (to.flush)()?;
    prove(geometry, to.target, checks)
}

fn prove_all(
    geometry: Geometry,
    target: &dyn BlockTarget,
    unproven: &Receiver<Vec<Check>>,
) -> Result<u64> {
    unproven
        .iter()
        .map(|checks| prove(geometry, target, checks))
        .sum()
}

/// Reads back from the medium what was flushed.
fn prove(geometry: Geometry, target: &dyn BlockTarget, checks: Vec<Check>) -> Result<u64> {
    let bytes = checks.iter().map(Check::bytes).sum();
    let mut read_back = ReadBack::new(target, geometry);
    checks.into_iter().try_for_each(|c| read_back.add(c))?;
    read_back.finish()?;
    Ok(bytes)
}

/// Writes that go to the target together.
#[derive(Default)]
struct Writes {
    requests: Vec<(u64, PartPages, Range<usize>)>,
    bytes: usize,
}

impl Writes {
    fn push(&mut self, offset: u64, pages: PartPages, range: Range<usize>) {
        self.bytes += range.len();
        self.requests.push((offset, pages, range));
    }

    fn is_full(&self) -> bool {
        self.bytes >= BATCH_BYTES || self.requests.len() >= BATCH_REQUESTS
    }

    fn write(&mut self, target: &dyn BlockTarget) -> Result<()> {
        let requests: Vec<WriteRequest<'_>> = self
            .requests
            .iter()
            .map(|(offset, pages, range)| WriteRequest {
                offset: *offset,
                bytes: &pages.bytes()[range.clone()],
            })
            .collect();
        target
            .write_batch(&requests)
            .map_err(|e| Error::target(format!("write to {}", target.label()), e))?;
        self.requests.clear();
        self.bytes = 0;
        Ok(())
    }
}
