//! A point that the target is not at, shown without changing anything: pages of records, of the log or of the anchor, laid
//! over the target.
//!
//! ```text
//! log      ──pre-images──┐            ┌──staged pages──  log
//!                        v            v
//! target at the new point            target at the old point
//!        = old point                        = new point
//! ```

use std::collections::HashMap;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

use blockferry_core::Extent;
use blockferry_device::{
    BlockSource, Error as DeviceError, ErrorKind as DeviceErrorKind, Evidence, Status,
};

use crate::error::Result;
use crate::format::{RecordHeader, usize_of};
use crate::index::{Index, Run, RunContent};
use crate::log::{LogFiles, Pages, RecordPlace, Scan};

/// Records whose pages are kept in memory, at most 1 MiB each.
const RECENT: usize = 16;

/// Which side of the records is laid over the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Pre-images: over a target at the new point.
    Old,
    /// Staged pages: over a target at the old point.
    New,
}

/// Where the pages of records are.
pub(crate) trait RecordPages: fmt::Debug + Send + Sync {
    /// The pages of one record.
    type Pages: Deref<Target = [u8]> + fmt::Debug + Send + Sync;

    /// The pages of a record, checked against its digest.
    fn load(&self, record: u32) -> Result<Self::Pages>;
}

/// One side of the records of a log.
#[derive(Debug)]
pub(crate) struct LogPages {
    side: Side,
    files: LogFiles,
    places: Vec<RecordPlace>,
}

impl LogPages {
    /// One side of the records of `scan`, and where each page of it is.
    pub(crate) fn of(side: Side, scan: &Scan) -> (Self, Index) {
        let mut index = Index::default();
        for ((_, header), number) in scan.records.iter().zip(0u32..) {
            match side {
                Side::Old => index.insert_pre_images(number, header),
                Side::New => index.insert_record(number, header),
            }
        }
        let places = scan.records.iter().map(|(place, _)| place.clone());
        let pages = Self {
            side,
            files: scan.files.clone(),
            places: places.collect(),
        };
        (pages, index)
    }
}

impl RecordPages for LogPages {
    type Pages = Pages;

    fn load(&self, record: u32) -> Result<Pages> {
        let place = &self.places[record as usize];
        match self.side {
            Side::New => Ok(self.files.load(place)?.new),
            Side::Old => {
                let header: RecordHeader = self.files.header(place)?;
                self.files.old_pages(place, &header)
            }
        }
    }
}

/// A target with pages of records laid over it. Every such page is checked before it is shown. Where evidence says what
/// the pages belong to, nothing is shown once somebody wrote the target: the rest would be of another point.
#[derive(Debug)]
pub(crate) struct Overlay<P: RecordPages> {
    label: String,
    size_bytes: u64,
    base: Arc<dyn BlockSource>,
    /// Of the base: what lies beyond reads as zeros.
    base_bytes: u64,
    /// What proves that the base is still what the pages belong to.
    evidence: Option<Evidence>,
    // Invariant: its runs lie in records that `pages` has.
    index: Arc<Index>,
    pages: P,
    recent: Mutex<HashMap<u32, Arc<P::Pages>>>,
}

impl<P: RecordPages> Overlay<P> {
    /// Lays what `index` names over `base`. `point` says what that shows, for messages.
    pub(crate) fn new(
        point: &str,
        size_bytes: u64,
        base: Arc<dyn BlockSource>,
        evidence: Option<Evidence>,
        index: Arc<Index>,
        pages: P,
    ) -> Self {
        Self {
            label: format!("{point} of {}", base.label()),
            size_bytes,
            base_bytes: base.size_bytes(),
            base,
            evidence,
            index,
            pages,
            recent: Mutex::default(),
        }
    }

    fn read_base(&self, offset: u64, buffer: &mut [u8]) -> blockferry_device::Result<()> {
        let there = self
            .base_bytes
            .saturating_sub(offset)
            .min(buffer.len() as u64);
        let (there, beyond) = buffer.split_at_mut(usize_of(there));
        beyond.fill(0);
        if there.is_empty() {
            return Ok(());
        }
        self.base.read_at(offset, there)
    }

    fn lay_over(&self, run: Run, part: &mut [u8]) -> Result<()> {
        match run.content {
            RunContent::Zero => part.fill(0),
            RunContent::Data { payload } => {
                let pages = self.pages(run.record)?;
                let start = payload as usize;
                part.copy_from_slice(&pages[start..start + part.len()]);
            }
        }
        Ok(())
    }

    fn pages(&self, record: u32) -> Result<Arc<P::Pages>> {
        let locked = || self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pages) = locked().get(&record) {
            return Ok(Arc::clone(pages));
        }
        let pages = Arc::new(self.pages.load(record)?);
        let mut recent = locked();
        if recent.len() >= RECENT {
            recent.clear();
        }
        recent.insert(record, Arc::clone(&pages));
        Ok(pages)
    }

    /// Asked after the base was read: what was read before somebody wrote is good.
    fn check_unwritten(&self) -> blockferry_device::Result<()> {
        let Some(evidence) = &self.evidence else {
            return Ok(());
        };
        if self.base.evidence()?.proves_same(evidence) {
            return Ok(());
        }
        let text = format!(
            "read the {}: somebody wrote the target meanwhile, so that it cannot be told any more",
            self.label
        );
        Err(DeviceError::new(DeviceErrorKind::Io, text))
    }

    fn check_range(&self, attempt: &str, offset: u64, bytes: u64) -> blockferry_device::Result<()> {
        if offset
            .checked_add(bytes)
            .is_some_and(|end| end <= self.size_bytes)
        {
            return Ok(());
        }
        let text = format!(
            "{attempt} of {bytes} bytes at offset {offset}: the {} has {} bytes",
            self.label, self.size_bytes
        );
        Err(DeviceError::new(DeviceErrorKind::OutOfRange, text))
    }
}

impl<P: RecordPages> BlockSource for Overlay<P> {
    fn label(&self) -> &str {
        &self.label
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> blockferry_device::Result<()> {
        self.check_range("read", offset, buffer.len() as u64)?;
        if buffer.is_empty() {
            return Ok(());
        }
        let extent = Extent::from_range(offset..offset + buffer.len() as u64);
        let place = |at: u64| usize_of(at - offset);
        let mut at = offset;
        for run in self.index.within(extent) {
            let (start, end) = (run.extent.start(), run.extent.end());
            self.read_base(at, &mut buffer[place(at)..place(start)])?;
            let part = &mut buffer[place(start)..place(end)];
            self.lay_over(run, part).map_err(|error| {
                let attempt = format!("read {} of the {}", run.extent, self.label);
                DeviceError::from_io(attempt, std::io::Error::other(error))
            })?;
            at = end;
        }
        self.read_base(at, &mut buffer[place(at)..])?;
        self.check_unwritten()
    }

    fn preferred_depth(&self) -> usize {
        self.base.preferred_depth()
    }

    fn status_at(&self, offset: u64) -> blockferry_device::Result<(Status, u64)> {
        self.check_range("status", offset, 1)?;
        let next = self
            .index
            .within(Extent::from_range(offset..self.size_bytes))
            .next();
        let bare_end = match next {
            Some(run) if run.extent.start() == offset => {
                let status = match run.content {
                    RunContent::Zero => Status::Zero,
                    RunContent::Data { .. } => Status::Data,
                };
                return Ok((status, run.extent.end()));
            }
            Some(run) => run.extent.start(),
            None => self.size_bytes,
        };
        if offset >= self.base_bytes {
            return Ok((Status::Zero, bare_end));
        }
        let (status, end) = self.base.status_at(offset)?;
        self.check_unwritten()?;
        Ok((status, end.min(bare_end)))
    }
}
