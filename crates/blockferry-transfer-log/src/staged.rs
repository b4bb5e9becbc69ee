//! What workers see of a session: [`Stager`] takes pages, [`StagedView`] shows what is staged already.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use blockferry_core::{Digest, Extent, Geometry};
use blockferry_device::WriteRequest;

use crate::batch::{Batch, New, Old};
use crate::error::{Error, Result};
use crate::format::{NewContent, PAGE, StoredPages, Unit, usize_of};
use crate::index::{Index, RunContent};
use crate::ledger::Ledger;
use crate::log::{LoadedRecord, LogFiles, RecordPlace};
use crate::spare::Spare;
use crate::working::Working;

/// Fills batches; shared by all workers. In `shadow` and `direct` runs of whole blocks it writes the bytes to
/// the working file at once, on the worker's thread, while they are in its cache.
#[derive(Clone, Debug)]
pub struct Stager {
    geometry: Geometry,
    working: Option<Working>,
    /// What batches are made of.
    spare: Spare,
}

impl Stager {
    pub(crate) fn new(geometry: Geometry, working: Option<Working>) -> Self {
        Self {
            geometry,
            working,
            spare: Spare::default(),
        }
    }

    /// A stager for batches whose bytes the session writes: what delta sync uses before its session begins.
    #[must_use]
    pub fn detached(geometry: Geometry) -> Self {
        Self::new(geometry, None)
    }

    /// An empty batch for 4 KiB pages.
    #[must_use]
    pub fn pages(&self) -> Batch {
        Batch::logged(self.geometry, Unit::Page).with_spare(&self.spare)
    }

    /// An empty batch for whole blocks.
    #[must_use]
    pub fn blocks(&self) -> Batch {
        match self.working {
            Some(_) => Batch::written(self.geometry, Unit::Block),
            None => Batch::logged(self.geometry, Unit::Block).with_spare(&self.spare),
        }
    }

    /// Adds new pages with what they replace.
    pub fn add(&self, batch: &mut Batch, extent: Extent, new: &[u8], old: Old<'_>) {
        batch.push(extent, New::Data(new), old);
    }

    /// Adds zeros with what they replace.
    pub fn add_zero(&self, batch: &mut Batch, extent: Extent, old: Old<'_>) {
        batch.push(extent, New::Zero, old);
    }

    /// Adds a pre-image of what the new image cuts off.
    pub fn add_cut_off(&self, batch: &mut Batch, extent: Extent, old: Old<'_>) {
        batch.push(extent, New::None, old);
    }

    /// Writes whole blocks to the working file and adds them; `digests` are the blocks' digests in order.
    /// Without a working file their bytes go to the log, with what they replace.
    ///
    /// # Errors
    /// The working file failed.
    pub fn write_blocks(
        &self,
        batch: &mut Batch,
        extent: Extent,
        bytes: &[u8],
        digests: &[Digest],
        old: Old<'_>,
    ) -> Result<()> {
        let Some(working) = &self.working else {
            batch.push(extent, New::Data(bytes), old);
            return Ok(());
        };
        working.write(&[WriteRequest {
            offset: extent.start(),
            bytes: &bytes[..usize_of(extent.length())],
        }])?;
        batch.push(extent, New::Written(digests), Old::None);
        Ok(())
    }

    /// Makes an extent read as zeros. Nothing to do where the working file has a hole, unless something was
    /// `staged` there.
    ///
    /// # Errors
    /// The working file failed.
    pub fn write_zeros(
        &self,
        batch: &mut Batch,
        extent: Extent,
        staged: bool,
        old: Old<'_>,
    ) -> Result<()> {
        let Some(working) = &self.working else {
            batch.push(extent, New::Zero, old);
            return Ok(());
        };
        // What a crash left in a file we created is anybody's guess: only a hole is known to read zero.
        if !staged && working.is_hole(extent)? {
            return Ok(());
        }
        working.write_zeros(extent)?;
        batch.push(extent, New::Zero, Old::None);
        Ok(())
    }

    /// Whether blocks go to a file that was created empty for this session.
    #[must_use]
    pub fn writes_new_file(&self) -> bool {
        self.working.as_ref().is_some_and(|w| w.sibling.is_some())
    }

    /// Allocates what is about to be written to a new file: writes into allocated space run side by side with each
    /// other and with reads, those into holes do not.
    ///
    /// # Errors
    /// No space, or the working file failed.
    pub fn allocate(&self, extents: &[Extent]) -> Result<()> {
        let Some(working) = self.working.as_ref().filter(|w| w.sibling.is_some()) else {
            return Ok(());
        };
        working
            .target
            .reserve(extents)
            .map(drop)
            .map_err(|e| Error::target(format!("allocate space in {}", working.target.label()), e))
    }

    /// Makes a hole again of what [`Self::allocate`] allocated and nothing was written to.
    ///
    /// # Errors
    /// The working file failed.
    pub fn give_back(&self, extent: Extent) -> Result<()> {
        let Some(working) = self.working.as_ref().filter(|w| w.sibling.is_some()) else {
            return Ok(());
        };
        working
            .target
            .punch(extent)
            .map(drop)
            .map_err(|e| Error::target(format!("punch {extent} of {}", working.target.label()), e))
    }

    /// Whether the old content of what is staged is wanted: only a log keeps it.
    #[must_use]
    pub fn wants_old(&self) -> bool {
        self.working.is_none()
    }
}

/// A snapshot of what a session had staged when it was taken, readable by many threads.
#[derive(Debug)]
pub struct StagedView {
    geometry: Geometry,
    files: LogFiles,
    records: Vec<RecordPlace>,
    index: Index,
    working: Option<Working>,
    basis: Basis,
    /// Records read lately; bounded.
    recent: Mutex<HashMap<u32, Arc<LoadedRecord>>>,
}

/// What lies under the staged extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Basis {
    /// The target as it is.
    Target,
    /// The working file of a resumed clone: what a crash left in it without a record is anybody's guess, so
    /// all of it has to be compared.
    Working,
}

impl StagedView {
    /// Most records kept in memory: 8 MiB of pages.
    const RECENT: usize = 8;

    pub(crate) fn new(
        geometry: Geometry,
        files: LogFiles,
        ledger: Ledger,
        working: Option<Working>,
        basis: Basis,
    ) -> Self {
        Self {
            geometry,
            files,
            records: ledger.places,
            index: ledger.index,
            working,
            basis,
            recent: Mutex::default(),
        }
    }

    /// The target as it is shows everything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.basis == Basis::Target && self.index.len() == 0
    }

    /// Whether the content of `extent` may differ from the target's.
    #[must_use]
    pub fn overlaps(&self, extent: Extent) -> bool {
        self.basis == Basis::Working || self.index.within(extent).next().is_some()
    }

    /// Replaces what is staged in `bytes`, which hold the target's content of `extent`.
    ///
    /// # Errors
    /// The log or the working file failed.
    pub fn patch(&self, extent: Extent, bytes: &mut [u8]) -> Result<()> {
        if let (Basis::Working, Some(working)) = (self.basis, &self.working) {
            return read_or_mend(working, extent, bytes);
        }
        for run in self.index.within(extent) {
            let start = usize_of(run.extent.start() - extent.start());
            let part = &mut bytes[start..start + usize_of(run.extent.length())];
            let RunContent::Data { payload } = run.content else {
                part.fill(0);
                continue;
            };
            let loaded = self.load(run.record)?;
            match (&self.working, loaded.header.pages) {
                (Some(working), StoredPages::Elsewhere) => working
                    .target
                    .read_at(run.extent.start(), part)
                    .map_err(|e| Error::target(format!("read {}", working.target.label()), e))?,
                _ => {
                    let from = payload as usize;
                    part.copy_from_slice(&loaded.new[from..from + part.len()]);
                }
            }
        }
        Ok(())
    }

    /// The recorded digest of one unit, if exactly this unit is staged as data.
    ///
    /// # Errors
    /// The log failed.
    pub fn digest_of(&self, unit: Extent) -> Result<Option<Digest>> {
        let Some(run) = self.index.within(unit).next() else {
            return Ok(None);
        };
        if run.extent != unit || run.content == RunContent::Zero {
            return Ok(None);
        }
        let loaded = self.load(run.record)?;
        let step = loaded.header.unit.bytes(&self.geometry);
        let mut digests = 0usize;
        for entry in loaded
            .header
            .extents
            .iter()
            .filter(|e| e.new == NewContent::Data)
        {
            let offset = unit.start().wrapping_sub(entry.extent.start());
            if entry.extent.contains(unit.start()) && offset.is_multiple_of(step) {
                return Ok(loaded
                    .header
                    .new_digests
                    .get(digests + usize_of(offset / step))
                    .copied());
            }
            digests += usize_of(entry.extent.length().div_ceil(step));
        }
        Ok(None)
    }

    fn load(&self, record: u32) -> Result<Arc<LoadedRecord>> {
        let locked = || self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = locked().get(&record) {
            return Ok(Arc::clone(loaded));
        }
        let place = &self.records[record as usize];
        let loaded = Arc::new(self.files.load(place)?);
        let mut recent = locked();
        if recent.len() >= Self::RECENT {
            recent.clear();
        }
        recent.insert(record, Arc::clone(&loaded));
        Ok(loaded)
    }
}

/// Reads the working file of a clone over `bytes`, which hold the target's content. Pages that a crash left
/// unreadable get back what they were cloned from.
fn read_or_mend(working: &Working, extent: Extent, bytes: &mut [u8]) -> Result<()> {
    let end = extent.end().min(working.target.size_bytes());
    let (inside, beyond) = bytes.split_at_mut(usize_of(end.saturating_sub(extent.start())));
    beyond.fill(0);
    let mut read = vec![0; inside.len()];
    if working.target.read_at(extent.start(), &mut read).is_ok() {
        inside.copy_from_slice(&read);
        return Ok(());
    }
    let pages = inside
        .chunks_mut(PAGE)
        .zip((extent.start()..).step_by(PAGE));
    for (page, offset) in pages {
        let read = &mut read[..page.len()];
        if working.target.read_at(offset, read).is_ok() {
            page.copy_from_slice(read);
        } else {
            working.write(&[WriteRequest {
                offset,
                bytes: page,
            }])?;
        }
    }
    Ok(())
}
