//! Apply and restore: writing staged pages to the target, and pre-images back. Both are idempotent (I6).

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use blockferry_core::{Extent, Geometry};
use blockferry_device::{BlockTarget, WriteRequest};

use crate::error::{Error, Result};
use crate::format::{NewContent, OldContent, PAGE, RecordHeader, usize_of};
use crate::index::{Index, RunContent};
use crate::log::{LogFiles, RecordPlace};
use crate::readback::{Expected, ReadBack};

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
}

impl Staged<'_> {
    /// Writes every staged page to `target`, in offset order. Not flushed.
    pub(crate) fn write_to(&self, target: &dyn BlockTarget, progress: Progress<'_>) -> Result<()> {
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
            batch.push(
                run.extent.start(),
                pages,
                start..start + usize_of(run.extent.length()),
            );
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
        let mut read_back: Option<ReadBack<'_>> = None;
        for (number, place) in self.records.iter().enumerate() {
            if place.dropped {
                continue;
            }
            let header = self.files.header(place)?;
            let read_back =
                read_back.get_or_insert_with(|| ReadBack::new(target, self.geometry, header.unit));
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            checked += self.prove_record(number, &header, read_back)?;
            progress(checked, total);
        }
        read_back.map_or(Ok(0), ReadBack::finish)
    }

    fn prove_record(
        &self,
        number: u32,
        header: &RecordHeader,
        read_back: &mut ReadBack<'_>,
    ) -> Result<u64> {
        let step = header.unit.bytes(&self.geometry);
        let mut bytes = 0;
        let mut digests = 0usize;
        for entry in &header.extents {
            let first = digests;
            if entry.new == NewContent::Data {
                digests += usize_of(entry.extent.length().div_ceil(step));
            }
            // Only what no later record replaced.
            for run in self
                .index
                .within(entry.extent)
                .filter(|r| r.record == number)
            {
                bytes += run.extent.length();
                let skip = usize_of((run.extent.start() - entry.extent.start()) / step);
                let count = usize_of(run.extent.length().div_ceil(step));
                match run.content {
                    RunContent::Zero => read_back.add(run.extent, Expected::Zero)?,
                    RunContent::Data { .. } => {
                        let all = &header.new_digests[first + skip..first + skip + count];
                        read_back.add(run.extent, Expected::Digests(all))?;
                    }
                }
            }
        }
        Ok(bytes)
    }

    /// Writes every pre-image back to `target`. Not flushed.
    pub(crate) fn restore_to(
        &self,
        target: &dyn BlockTarget,
        progress: Progress<'_>,
    ) -> Result<()> {
        let total = self.records.len() as u64;
        for (place, done) in self.records.iter().zip(1..) {
            let header = self.files.header(place)?;
            if header.extents.iter().any(|e| e.old == OldContent::Data) {
                let pages = Arc::new(self.files.old_pages(place, &header)?);
                let mut batch = Writes::default();
                for (extent, range) in old_ranges(&header) {
                    batch.push(extent.start(), Arc::clone(&pages), range);
                }
                batch.write(target)?;
            }
            for entry in header.extents.iter().filter(|e| e.old == OldContent::Zero) {
                target.write_zeroes(entry.extent).map_err(|e| {
                    Error::target(
                        format!("restore zeros at {} of the target", entry.extent),
                        e,
                    )
                })?;
            }
            progress(done, total);
        }
        Ok(())
    }

    /// Reads every restored extent back from the medium.
    pub(crate) fn prove_restored(&self, target: &dyn BlockTarget, old_bytes: u64) -> Result<()> {
        for place in self.records {
            let header = self.files.header(place)?;
            let mut read_back = ReadBack::new(target, self.geometry, header.unit);
            let step = header.unit.bytes(&self.geometry);
            let mut digests = 0usize;
            for entry in &header.extents {
                let count = usize_of(entry.extent.length().div_ceil(step));
                // What lies beyond the old end is cut off by now; a unit that straddles it cannot be checked
                // by its digest, which covers the padding too.
                let inside = entry.extent.end() <= old_bytes;
                match entry.old {
                    OldContent::Data => {
                        let expected = &header.old_digests[digests..digests + count];
                        digests += count;
                        if inside {
                            read_back.add(entry.extent, Expected::Digests(expected))?;
                        }
                    }
                    OldContent::Zero if inside => read_back.add(entry.extent, Expected::Zero)?,
                    OldContent::Zero | OldContent::None => {}
                }
            }
            read_back.finish()?;
        }
        Ok(())
    }

    /// What the records say was allocated for apply.
    pub(crate) fn reserved(&self) -> Result<Vec<Extent>> {
        let mut reserved = Vec::new();
        for place in self.records {
            let header = self.files.header(place)?;
            let extents = header
                .extents
                .iter()
                .filter(|e| e.new == NewContent::Reserve);
            reserved.extend(extents.map(|e| e.extent));
        }
        Ok(reserved)
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

fn old_ranges(header: &RecordHeader) -> impl Iterator<Item = (Extent, Range<usize>)> + '_ {
    let old = header.extents.iter().filter(|e| e.old == OldContent::Data);
    old.scan(0usize, |offset, entry| {
        let start = *offset;
        let length = usize_of(entry.extent.length());
        *offset += length.next_multiple_of(PAGE);
        Some((entry.extent, start..start + length))
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
