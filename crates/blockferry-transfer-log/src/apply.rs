//! Apply and restore: writing staged pages to the target, and pre-images back. Both are idempotent (I6).

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use blockferry_core::{Extent, ExtentSet, Geometry};
use blockferry_device::{BlockTarget, WriteRequest};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    BatchExtent, NewContent, OldContent, PAGE, RecordHeader, StoredPages, Unit, usize_of,
};
use crate::index::{Index, RunContent};
use crate::log::{LogFiles, RecordPlace};
use crate::readback::{Check, Expected, ReadBack};

/// Most bytes and requests handed to the target at once.
const BATCH_BYTES: usize = 8 * 1024 * 1024;
const BATCH_REQUESTS: usize = 1024;

/// Told how many bytes are done, of how many.
pub type Progress<'a> = &'a dyn Fn(u64, u64);

/// Staged pages that are still in memory, up to a bound; the rest is read from the log again.
#[derive(Debug)]
pub(crate) struct Pool {
    pages: HashMap<u32, Arc<Vec<u8>>>,
    free_bytes: usize,
}

impl Pool {
    /// Most bytes of staged pages kept for apply.
    pub(crate) const BYTES: usize = 48 * 1024 * 1024;

    pub(crate) fn new() -> Self {
        Self {
            pages: HashMap::new(),
            free_bytes: Self::BYTES,
        }
    }

    pub(crate) fn keep(&mut self, record: u32, pages: &[u8]) {
        if let Some(free) = self.free_bytes.checked_sub(pages.len()) {
            self.free_bytes = free;
            self.pages.insert(record, Arc::new(pages.to_vec()));
        }
    }

    pub(crate) fn forget(&mut self, record: u32) {
        if let Some(pages) = self.pages.remove(&record) {
            self.free_bytes += pages.len();
        }
    }
}

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
}

impl Staged<'_> {
    /// Writes every staged page to `target`, in offset order; a page across the end of the image is written whole
    /// up to `room_bytes`, so that no sector is written in part. Not flushed.
    pub(crate) fn write_to(
        &self,
        target: &dyn BlockTarget,
        room_bytes: u64,
        progress: Progress<'_>,
    ) -> Result<()> {
        let total: u64 = self.index.runs().map(|r| r.extent.length()).sum();
        let mut done = 0;
        let mut batch = Writes::default();
        let mut last: Option<(u32, Arc<Vec<u8>>)> = None;
        for run in self.index.runs() {
            done += run.extent.length();
            let RunContent::Data { payload } = run.content else {
                target
                    .write_zeroes(run.extent)
                    .map_err(|e| Error::target(format!("zero {} of the target", run.extent), e))?;
                continue;
            };
            let pages = match &last {
                Some((record, pages)) if *record == run.record => Arc::clone(pages),
                _ => self.pages_of(run.record)?,
            };
            last = Some((run.record, Arc::clone(&pages)));
            let start = payload as usize;
            let length = usize_of(whole_pages(run.extent, room_bytes).length());
            batch.push(run.extent.start(), pages, start..start + length);
            if batch.is_full() {
                batch.write(target)?;
                progress(done, total);
            }
        }
        batch.write(target)?;
        progress(total, total);
        Ok(())
    }

    /// Reads every staged extent back from the medium and returns the bytes that were checked.
    pub(crate) fn prove(&self, target: &dyn BlockTarget, progress: Progress<'_>) -> Result<u64> {
        let mut checked = 0;
        let total: u64 = self.index.runs().map(|r| r.extent.length()).sum();
        let mut read_back = ReadBack::new(target, self.geometry);
        for (place, number) in self.records.iter().zip(0u32..).filter(|(p, _)| !p.dropped) {
            let header = self.files.header(place)?;
            checked += self.add_live(number, &header, &mut |check| read_back.add(check))?;
            progress(checked, total);
        }
        read_back.finish()?;
        Ok(checked)
    }

    /// Hands to `add` what a record says of the new point and no later record replaced; returns how many bytes
    /// that is.
    pub(crate) fn add_live(
        &self,
        number: u32,
        header: &RecordHeader,
        add: &mut dyn FnMut(Check) -> Result<()>,
    ) -> Result<u64> {
        let step = header.unit.bytes(&self.geometry);
        let mut bytes = 0;
        let mut first = 0usize;
        for entry in header
            .extents
            .iter()
            .filter(|e| matches!(e.new, NewContent::Data | NewContent::Zero))
        {
            let units = usize_of(entry.extent.length().div_ceil(step));
            let runs = self.index.within(entry.extent);
            for run in runs.filter(|r| r.record == number) {
                bytes += run.extent.length();
                let RunContent::Data { payload } = run.content else {
                    add(Check::new(run.extent, header.unit, Expected::Zero))?;
                    continue;
                };
                let skip = run.extent.start() - entry.extent.start();
                let whole_units = skip.is_multiple_of(step)
                    && (run.extent.end() == entry.extent.end()
                        || run.extent.length().is_multiple_of(step));
                if whole_units {
                    let from = first + usize_of(skip / step);
                    let count = usize_of(run.extent.length().div_ceil(step));
                    let expected = header.new_digests[from..from + count].to_vec();
                    add(Check::new(
                        run.extent,
                        header.unit,
                        Expected::Digests(expected),
                    ))?;
                } else if header.pages != StoredPages::Elsewhere {
                    // A later record replaced part of a unit: what is left is checked page by page.
                    let pages = self.pages_of(number)?;
                    let left = &pages[payload as usize..];
                    let expected = Unit::Page.digests(&self.geometry, run.extent, left);
                    let expected = Expected::Digests(expected.collect());
                    add(Check::new(run.extent, Unit::Page, expected))?;
                }
            }
            if entry.new == NewContent::Data {
                first += units;
            }
        }
        Ok(bytes)
    }

    /// Checks every pre-image, before anything is decided that relies on them.
    pub(crate) fn check_pre_images(&self) -> Result<()> {
        for place in self.records {
            let header = self.files.header(place)?;
            if header.extents.iter().any(|e| e.old == OldContent::Data) {
                self.files.old_pages(place, &header)?;
            }
        }
        Ok(())
    }

    /// Whether `target` still holds every pre-image: nobody wrote there since they were taken.
    pub(crate) fn holds_pre_images(
        &self,
        target: &dyn BlockTarget,
        old_bytes: u64,
    ) -> Result<bool> {
        match self.prove_restored(target, old_bytes) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Corrupt => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes every pre-image back to `target`, as far as it reaches: what lies beyond the old end is cut off
    /// afterwards. Not flushed.
    pub(crate) fn restore_to(
        &self,
        target: &dyn BlockTarget,
        room_bytes: u64,
        progress: Progress<'_>,
    ) -> Result<()> {
        let total = self.records.len() as u64;
        for (place, done) in self.records.iter().zip(1..) {
            let header = self.files.header(place)?;
            let has_pages = header.extents.iter().any(|e| e.old == OldContent::Data);
            let pages = if has_pages {
                self.files.old_pages(place, &header)?
            } else {
                Vec::new()
            };
            let pages = Arc::new(pages);
            let mut batch = Writes::default();
            for (entry, payload) in old_entries(&header) {
                let room = Extent::from_range(0..room_bytes);
                let Some(inside) = whole_pages(entry.extent, room_bytes).intersection(room) else {
                    continue;
                };
                if entry.old == OldContent::Zero {
                    target.write_zeroes(inside).map_err(|e| {
                        Error::target(format!("restore zeros at {inside} of the target"), e)
                    })?;
                } else {
                    let range = payload.start..payload.start + usize_of(inside.length());
                    batch.push(inside.start(), Arc::clone(&pages), range);
                }
            }
            batch.write(target)?;
            progress(done, total);
        }
        Ok(())
    }

    /// Reads every restored extent back from the medium.
    pub(crate) fn prove_restored(&self, target: &dyn BlockTarget, old_bytes: u64) -> Result<()> {
        let mut read_back = ReadBack::new(target, self.geometry);
        for place in self.records {
            let header = self.files.header(place)?;
            let step = header.unit.bytes(&self.geometry);
            let mut digests = 0usize;
            for (entry, payload) in old_entries(&header) {
                let count = usize_of(entry.extent.length().div_ceil(step));
                let expected = header.old_digests.get(digests..digests + count);
                digests += if entry.old == OldContent::Data {
                    count
                } else {
                    0
                };
                // What lies beyond the old end is cut off by now.
                let Some(inside) = entry.extent.intersection(Extent::from_range(0..old_bytes))
                else {
                    continue;
                };
                match (entry.old, expected) {
                    (OldContent::Data, Some(expected)) if inside == entry.extent => {
                        let expected = Expected::Digests(expected.to_vec());
                        read_back.add(Check::new(inside, header.unit, expected))?;
                    }
                    (OldContent::Data, _) => {
                        // Its digests cover the padding too: take new ones of what is inside.
                        let pages = self.files.old_pages(place, &header)?;
                        let pages = &pages[payload.start..];
                        let expected = Unit::Page.digests(&self.geometry, inside, pages);
                        let expected = Expected::Digests(expected.collect());
                        read_back.add(Check::new(inside, Unit::Page, expected))?;
                    }
                    _ => read_back.add(Check::new(inside, header.unit, Expected::Zero))?,
                }
            }
        }
        read_back.finish()
    }

    /// The extents that became zero, for giving their space back after `accept`.
    pub(crate) fn zeroed(&self) -> impl Iterator<Item = Extent> + '_ {
        self.index
            .runs()
            .filter(|r| r.content == RunContent::Zero)
            .map(|r| r.extent)
    }

    fn pages_of(&self, record: u32) -> Result<Arc<Vec<u8>>> {
        if let Some(pages) = self.pool.pages.get(&record) {
            return Ok(Arc::clone(pages));
        }
        let place = &self.records[record as usize];
        let header = self.files.header(place)?;
        self.files.new_pages(place, &header).map(Arc::new)
    }
}

/// The extent up to the end of its last page, where there is room; payloads are padded with zeros.
fn whole_pages(extent: Extent, room_bytes: u64) -> Extent {
    let end = extent.end().next_multiple_of(PAGE as u64).min(room_bytes);
    Extent::from_range(extent.start()..end.max(extent.end()))
}

/// The extents with a pre-image, each with its range in the old payload (empty for zeros).
fn old_entries(header: &RecordHeader) -> impl Iterator<Item = (&BatchExtent, Range<usize>)> + '_ {
    let old = header.extents.iter().filter(|e| e.old != OldContent::None);
    old.scan(0usize, |offset, entry| {
        let start = *offset;
        if entry.old == OldContent::Zero {
            return Some((entry, start..start));
        }
        let length = usize_of(entry.extent.length());
        *offset += length.next_multiple_of(PAGE);
        Some((entry, start..start + length))
    })
}

/// Writes that go to the target together.
#[derive(Default)]
struct Writes {
    requests: Vec<(u64, Arc<Vec<u8>>, Range<usize>)>,
    bytes: usize,
}

impl Writes {
    fn push(&mut self, offset: u64, pages: Arc<Vec<u8>>, range: Range<usize>) {
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
                bytes: &pages[range.clone()],
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
