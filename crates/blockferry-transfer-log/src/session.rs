//! A session: staging groups of records, preparing, committing, applying, publishing.
//!
//! The order of its writes is the proof; each step says what must already be durable.
//!
//! ```text
//! stage ... close_group: log (and working file) flushed, directory synced  -> acknowledged
//! prepare: all read back, nothing changed behind our back, space reserved
//! commit:  COMMIT durable                                                  -> the new point counts
//! apply:   target written or exchanged, flushed, read back
//!          APPLIED and the slot durable                                    -> reported as done
//! ```

use std::io;
use std::sync::Arc;

use blockferry_core::{Digest, Extent, ExtentSet, Geometry, Root};
use blockferry_device::{BlockTarget, Status, StorageDir, StorageFile, WriteRequest};

use crate::apply::{Pool, Progress, Staged};
use crate::batch::{Batch, New, Old};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    BatchExtent, Decision, DecisionKind, MAX_PAYLOAD_BYTES, NewContent, OldContent, PAGE, Point,
    Retained, SegmentHeader, SegmentKind, SessionId, StoredPages, Unit, usize_of,
};
use crate::index::{Index, RunContent};
use crate::log::{Appender, LogFiles, RecordPlace, Scan, segment_name};
use crate::place::Content;
use crate::plan::{Plan, Strategy, Undo};
use crate::readback::{Expected, ReadBack};
use crate::replica::{Replica, manifest_name};
use crate::staged::{StagedView, Stager};

/// Most bytes of one group; the caller also closes a group when its time is up.
pub const GROUP_BYTES: u64 = 64 * 1024 * 1024;
/// Records of written extents are joined up to this many extents or digests.
const JOINED_EXTENTS: usize = 256;
const JOINED_DIGESTS: usize = 768;
/// A log smaller than this is never compacted.
const COMPACT_FLOOR_BYTES: u64 = 64 * 1024 * 1024;

/// Everything up to here is durable and is never sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Checkpoint {
    /// Last durable record; 0 if there is none.
    pub sequence: u64,
    /// Chain value after it.
    pub chain: Digest,
    /// Bytes of the log.
    pub log_bytes: u64,
}

/// What `prepare` found.
#[derive(Debug)]
#[expect(clippy::exhaustive_enums, reason = "callers must handle both")]
pub enum Prepared {
    /// Complete: commit may follow.
    Complete,
    /// These extents were staged but did not survive on the medium: stage them again, then prepare again.
    Missing(ExtentSet),
}

/// What a session has done so far, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SessionTotals {
    /// New data staged in this run (logged or written to the working file).
    pub staged_bytes: u64,
    /// Zeros staged in this run.
    pub zero_bytes: u64,
    /// Data that was durable when this run began.
    pub resumed_bytes: u64,
    /// Data staged in this run although it was durable with the same content. Must be 0.
    pub restaged_bytes: u64,
    /// Live data in all.
    pub live_bytes: u64,
}

/// The sibling or target that a session writes before COMMIT.
#[derive(Clone, Debug)]
pub(crate) struct Working {
    pub(crate) target: Arc<dyn BlockTarget>,
    /// The sibling's file; `None` when the target itself is written.
    pub(crate) sibling: Option<Arc<dyn StorageFile>>,
}

/// One run of a mode, begun or resumed.
#[derive(Debug)]
pub struct Session<'r> {
    pub(crate) replica: &'r mut Replica,
    pub(crate) header: SegmentHeader,
    log_limit_bytes: u64,
    files: LogFiles,
    appender: Appender,
    records: Vec<RecordPlace>,
    index: Index,
    /// What has its pre-image in the log (redo with undo).
    touched: ExtentSet,
    working: Option<Working>,
    pool: Pool,
    /// Written to the working file, not yet recorded: recorded after its flush.
    written: Vec<Batch>,
    /// Bytes since the last group was closed.
    group_bytes: u64,
    /// Extents with new data since the last group was closed.
    group_extents: Vec<Extent>,
    /// First record that was not read back in this run.
    unverified: usize,
    /// Staged, but not whole on the medium.
    lost: ExtentSet,
    /// A name was created that the directory has not been synced for.
    names_dirty: bool,
    held_before: u64,
    totals: SessionTotals,
}

impl<'r> Session<'r> {
    /// Begins a session: creates its log, its manifest and, where the strategy has one, its working file.
    pub(crate) fn begin(replica: &'r mut Replica, plan: &Plan) -> Result<Self> {
        let working = create_working(replica, plan)?;
        let working_file_id = match working.as_ref().and_then(|w| w.sibling.as_ref()) {
            Some(file) => Some(
                file.file_id()
                    .map_err(|e| Error::target("identify the sibling", e))?,
            ),
            None => None,
        };
        let header = SegmentHeader {
            session: plan.session,
            epoch: replica.state.slot().epoch + 1,
            strategy: plan.strategy,
            undo: plan.undo,
            mode: plan.mode,
            old_bytes: replica.content.size_bytes(),
            geometry: plan.geometry,
            base: replica.known_point().map(|p| p.id),
            target_evidence: replica.content.evidence()?,
            old_file_id: replica.content.file_id()?,
            working_file_id,
            source: plan.source.clone(),
            started_unix: plan.started_unix,
            segment: 0,
            kind: SegmentKind::Continues,
            first_sequence: 1,
            previous_chain: Digest::from_bytes([0; 32]),
        };
        let mut files = LogFiles::new(&header);
        let appender = Appender::create(&*replica.dir, &mut files, &header, &replica.stats)?;
        let mut session = Self {
            header,
            log_limit_bytes: plan.log_limit_bytes,
            files,
            appender,
            records: Vec::new(),
            index: Index::default(),
            touched: ExtentSet::new(),
            working,
            pool: Pool::new(),
            written: Vec::new(),
            group_bytes: 0,
            group_extents: Vec::new(),
            unverified: 0,
            lost: ExtentSet::new(),
            names_dirty: true,
            held_before: 0,
            totals: SessionTotals::default(),
            replica,
        };
        session.give_up_if_in_place()?;
        Ok(session)
    }

    /// Goes on with what a scan found, in a fresh segment that names the chain so far.
    pub(crate) fn resume(
        replica: &'r mut Replica,
        scan: Scan,
        log_limit_bytes: u64,
    ) -> Result<Self> {
        let working = reopen_working(replica, &scan.header)?;
        let header = SegmentHeader {
            segment: scan.next_segment,
            kind: SegmentKind::Continues,
            first_sequence: scan.next_sequence,
            previous_chain: scan.chain,
            ..scan.header
        };
        let mut files = scan.files;
        let mut records = Vec::with_capacity(scan.records.len());
        let mut index = Index::default();
        let mut touched = ExtentSet::new();
        for (place, record) in scan.records {
            take_in(&mut records, &mut index, &mut touched, place, &record);
        }
        let appender = Appender::create(&*replica.dir, &mut files, &header, &replica.stats)?;
        let totals = SessionTotals {
            resumed_bytes: index.data_bytes(),
            ..SessionTotals::default()
        };
        let mut session = Self {
            header,
            log_limit_bytes,
            files,
            appender,
            records,
            index,
            touched,
            working,
            pool: Pool::new(),
            written: Vec::new(),
            group_bytes: 0,
            group_extents: Vec::new(),
            unverified: 0,
            lost: ExtentSet::new(),
            names_dirty: true,
            held_before: scan.held_bytes,
            totals,
            replica,
        };
        session.give_up_if_in_place()?;
        Ok(session)
    }

    /// In place: that the old content is given up must be durable before the first of it is overwritten.
    fn give_up_if_in_place(&mut self) -> Result<()> {
        let in_place = self.working.as_ref().is_some_and(|w| w.sibling.is_none());
        if !in_place || self.last_decision().is_some() {
            return Ok(());
        }
        self.flush_log()?;
        self.decide(DecisionKind::GiveUp, Digest::from_bytes([0; 32]), [0; 16])?;
        let image_bytes = self.header.geometry.image_bytes();
        let file = matches!(self.replica.content, Content::File(_));
        if let Some(working) = self
            .working
            .as_ref()
            .filter(|w| file && w.target.size_bytes() != image_bytes)
        {
            working
                .target
                .resize(image_bytes)
                .map_err(|e| Error::target("resize the target", e))?;
        }
        Ok(())
    }

    /// The session's id, which is also the id of the point it makes.
    #[must_use]
    pub fn id(&self) -> SessionId {
        self.header.session
    }

    /// How the target is brought to the new point.
    #[must_use]
    pub fn strategy(&self) -> Strategy {
        self.header.strategy
    }

    /// The image to come.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    /// What this session has done so far.
    #[must_use]
    pub fn totals(&self) -> SessionTotals {
        SessionTotals {
            live_bytes: self.index.data_bytes(),
            ..self.totals
        }
    }

    /// What workers use to hand over pages.
    #[must_use]
    pub fn stager(&self) -> Stager {
        Stager::new(
            self.header.geometry,
            self.header.strategy,
            self.working.clone(),
        )
    }

    /// What is staged now, for workers to compare with: a resumed session does not stage it again.
    #[must_use]
    pub fn staged_view(&self) -> Arc<StagedView> {
        Arc::new(StagedView::new(
            self.header.geometry,
            self.files.clone(),
            self.records.clone(),
            self.index.clone(),
            self.working.as_ref().map(|w| Arc::clone(&w.target)),
        ))
    }

    /// A sink for the manifest of the new point; [`ManifestFile::finish`] makes it durable.
    ///
    /// # Errors
    /// The state directory failed.
    pub fn create_manifest(&mut self) -> Result<ManifestFile> {
        self.names_dirty = true;
        ManifestFile::create(&self.replica.dir, self.header.session, &self.replica.stats)
    }

    /// Stages one batch. It is durable, and never staged again, once a later [`Self::close_group`] returned.
    ///
    /// # Errors
    /// The log or the working file failed or is full; what was acknowledged is safe.
    pub fn stage(&mut self, batch: Batch) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        self.count(&batch)?;
        self.group_bytes += batch.data_bytes();
        if self.header.strategy != Strategy::Redo {
            let batch = self.write_through(batch)?;
            self.written.push(batch);
            return Ok(());
        }
        let batch = if self.header.undo == Undo::Keep {
            batch.keep_first_touch(&self.touched)
        } else {
            batch
        };
        self.append(&batch, true)
    }

    /// Whether the group has reached its size and should be closed.
    #[must_use]
    pub fn group_is_full(&self) -> bool {
        self.group_bytes >= GROUP_BYTES
    }

    /// Whether anything was staged since the last group was closed.
    #[must_use]
    pub fn group_is_empty(&self) -> bool {
        self.group_bytes == 0
            && self.written.is_empty()
            && self.appender.next_sequence() == self.appender.durable() + 1
    }

    /// Makes everything staged so far durable, then reads it back, and returns the acknowledgement.
    ///
    /// # Errors
    /// A flush failed: the session is dead and resumes from the last acknowledgement when opened again.
    ///
    /// # Panics
    /// Never, unless this crate has a bug: an acknowledgement above what was flushed (I2).
    pub fn close_group(&mut self) -> Result<Checkpoint> {
        if !self.group_is_empty() {
            // The records say the working file holds these bytes: it must hold them durably first.
            if let Some(working) = self.working.clone().filter(|_| !self.written.is_empty()) {
                working
                    .target
                    .flush()
                    .map_err(|e| Error::target("flush the working file", e))?;
                self.replica.stats.count_flush();
            }
            self.record_written()?;
            self.record_reservations()?;
            self.flush_log()?;
            self.group_bytes = 0;
            self.verify_new_records()?;
            self.compact_if_due()?;
        }
        // Invariant I2: nothing above what was flushed is acknowledged.
        assert_eq!(
            self.appender.durable() + 1,
            self.appender.next_sequence(),
            "flushed above"
        );
        Ok(self.checkpoint())
    }

    /// The last acknowledgement.
    #[must_use]
    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint {
            sequence: self.appender.durable(),
            chain: self.appender.chain(),
            log_bytes: self.held_before + self.appender.position(),
        }
    }

    /// Checks that everything staged is whole on the medium and that nobody wrote the target meanwhile, and
    /// reserves the space apply needs.
    ///
    /// # Errors
    /// The target was changed behind our back, or has no room; it is at its old point.
    pub fn prepare(&mut self) -> Result<Prepared> {
        self.close_group()?;
        let missing = std::mem::take(&mut self.lost);
        if !missing.is_empty() {
            return Ok(Prepared::Missing(missing));
        }
        self.check_unwritten()?;
        if self.header.strategy == Strategy::Redo {
            self.reserve()?;
        }
        Ok(Prepared::Complete)
    }

    /// Makes the new point count: after this, recovery produces it without the source's help.
    ///
    /// # Errors
    /// The decision could not be made durable. Whether it counts is known when the target is opened again.
    pub fn commit(mut self, root: Root, progress: Progress<'_>) -> Result<Applied> {
        self.seal_working()?;
        self.decide(DecisionKind::Commit, root.digest(), [0; 16])?;
        self.apply(root, progress)
    }

    /// Declares this session complete as a member of a group; only [`Self::commit_in_group`] may follow.
    ///
    /// # Errors
    /// The decision could not be made durable.
    pub fn prepare_for_group(&mut self, root: Root, group: GroupId) -> Result<()> {
        self.seal_working()?;
        self.decide(DecisionKind::Prepared, root.digest(), group.0)
    }

    /// Commits as the group's record says.
    ///
    /// # Errors
    /// As [`Self::commit`]; the group's record already decides, so recovery finishes.
    pub fn commit_in_group(
        mut self,
        root: Root,
        committed: &GroupCommitted,
        progress: Progress<'_>,
    ) -> Result<Applied> {
        self.decide(DecisionKind::Commit, root.digest(), committed.group.0)?;
        self.apply(root, progress)
    }

    fn apply(self, root: Root, progress: Progress<'_>) -> Result<Applied> {
        let Self {
            replica,
            header,
            files,
            records,
            index,
            pool,
            ..
        } = self;
        let staged = Staged {
            geometry: header.geometry,
            files: &files,
            records: &records,
            index: &index,
            pool: &pool,
        };
        let proven_bytes = finish_commit(replica, &header, root, staged, progress)?;
        Ok(Applied {
            point: header.session,
            root,
            proven_bytes,
        })
    }

    /// Owner, mode and times of the old file, and everything in the sibling, must be durable before COMMIT
    /// lets recovery exchange the two.
    fn seal_working(&mut self) -> Result<()> {
        let Some(sibling) = self.working.as_ref().and_then(|w| w.sibling.clone()) else {
            return Ok(());
        };
        if let Content::File(old) = &self.replica.content {
            sibling
                .copy_metadata(&**old)
                .map_err(|e| Error::target("copy owner, mode and attributes to the new file", e))?;
        }
        sibling
            .flush()
            .map_err(|e| Error::target("flush the new file", e))?;
        self.replica.stats.count_flush();
        if let Some((dir, _)) = self.replica.place.file() {
            dir.sync()
                .map_err(|e| Error::target("sync the target's directory", e))?;
            self.replica.stats.count_flush();
        }
        Ok(())
    }

    fn decide(&mut self, kind: DecisionKind, root: Digest, group: [u8; 16]) -> Result<()> {
        let decision = Decision {
            session: self.header.session,
            ordinal: self.replica.state.next_ordinal(self.header.session),
            kind,
            records: self.appender.durable(),
            chain: self.appender.chain(),
            root,
            group,
        };
        self.replica.state.decide(&decision)
    }

    fn last_decision(&self) -> Option<DecisionKind> {
        self.replica
            .state
            .last_decision(self.header.session)
            .map(|d| d.kind)
    }

    fn count(&mut self, batch: &Batch) -> Result<()> {
        let mut digests = batch.new_digests.iter();
        let step = batch.unit.bytes(&batch.geometry);
        for entry in &batch.extents {
            match entry.new {
                NewContent::Data => {
                    self.group_extents.push(entry.extent);
                    self.totals.staged_bytes += entry.extent.length();
                    let units = usize_of(entry.extent.length().div_ceil(step));
                    let new: Vec<Digest> = digests.by_ref().take(units).copied().collect();
                    self.totals.restaged_bytes += self.already_durable(entry.extent, step, &new)?;
                }
                NewContent::Zero => self.totals.zero_bytes += entry.extent.length(),
                NewContent::None | NewContent::Reserve => {}
            }
        }
        let limit = self.log_limit_bytes;
        let next = self.checkpoint().log_bytes
            + (batch.new_payload().len() + batch.old_payload().len()) as u64;
        if next > limit {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!(
                    "the transfer log would need more than its limit of {limit} bytes; raise the limit, or \
                     use a strategy that needs no log of this size"
                ),
            ));
        }
        Ok(())
    }

    /// Bytes of `extent` that are staged with exactly these digests already.
    fn already_durable(&self, extent: Extent, step: u64, new: &[Digest]) -> Result<u64> {
        if self.totals.resumed_bytes == 0 || self.index.within(extent).next().is_none() {
            return Ok(0);
        }
        let view = self.staged_view();
        let mut bytes = 0;
        for (unit, digest) in (extent.start()..extent.end())
            .step_by(usize_of(step))
            .zip(new)
        {
            let end = (unit + step).min(extent.end());
            let staged = view.digest_of(Extent::from_range(unit..end))?;
            bytes += if staged == Some(*digest) {
                end - unit
            } else {
                0
            };
        }
        Ok(bytes)
    }

    /// Writes a batch's pages to the working file, unless a worker did.
    fn write_through(&mut self, mut batch: Batch) -> Result<Batch> {
        let Some(working) = &self.working else {
            return Err(Error::refused("this strategy has no working file"));
        };
        if batch.pages == StoredPages::Plain {
            let mut offset = 0usize;
            let mut requests = Vec::new();
            for entry in batch.extents.iter().filter(|e| e.new == NewContent::Data) {
                let length = usize_of(entry.extent.length());
                let bytes = &batch.new_payload()[offset..offset + length];
                requests.push(WriteRequest {
                    offset: entry.extent.start(),
                    bytes,
                });
                offset += length.next_multiple_of(PAGE);
            }
            let attempt = || format!("write to {}", working.target.label());
            working
                .target
                .write_batch(&requests)
                .map_err(|e| Error::target(attempt(), e))?;
            for entry in batch.extents.iter().filter(|e| e.new == NewContent::Zero) {
                write_zeros(working, entry.extent)?;
            }
        }
        let mut written = Batch::written(batch.geometry, batch.unit);
        written.fuzzy = batch.fuzzy;
        written.extents = std::mem::take(&mut batch.extents)
            .into_iter()
            .map(|e| BatchExtent {
                old: OldContent::None,
                ..e
            })
            .collect();
        written.new_digests = std::mem::take(&mut batch.new_digests);
        Ok(written)
    }

    /// Joins what was written into few records and appends them.
    fn record_written(&mut self) -> Result<()> {
        let mut joined: Option<Batch> = None;
        for batch in std::mem::take(&mut self.written) {
            let fits = joined.as_ref().is_some_and(|j| {
                j.extents.len() + batch.extents.len() <= JOINED_EXTENTS
                    && j.new_digests.len() + batch.new_digests.len() <= JOINED_DIGESTS
                    && j.fuzzy == batch.fuzzy
            });
            match &mut joined {
                Some(joined) if fits => {
                    joined.extents.extend(batch.extents);
                    joined.new_digests.extend(batch.new_digests);
                }
                _ => {
                    if let Some(full) = joined.replace(batch) {
                        self.append(&full, false)?;
                    }
                }
            }
        }
        joined.map_or(Ok(()), |last| self.append(&last, false))
    }

    fn append(&mut self, batch: &Batch, keep_pages: bool) -> Result<()> {
        let (place, header) = self.appender.append(self.header.session, batch, false)?;
        let number = take_in(
            &mut self.records,
            &mut self.index,
            &mut self.touched,
            place,
            &header,
        );
        if keep_pages && batch.pages == StoredPages::Plain {
            self.pool.keep(number, batch.new_payload());
        }
        Ok(())
    }

    /// Records which holes of the target apply will fill, before anything is allocated there: cancel gives
    /// the space back.
    fn record_reservations(&mut self) -> Result<()> {
        let extents = std::mem::take(&mut self.group_extents);
        let (Strategy::Redo, Some(target)) = (self.header.strategy, self.replica.content.target())
        else {
            return Ok(());
        };
        let mut holes = ExtentSet::new();
        extents
            .into_iter()
            .try_for_each(|extent| holes_of(&*target, extent, &mut holes))?;
        let holes: Vec<Extent> = holes.iter().collect();
        for some in holes.chunks(JOINED_EXTENTS) {
            let mut batch = Batch::logged(self.header.geometry, Unit::Page);
            some.iter()
                .for_each(|hole| batch.push(*hole, New::Reserve, Old::None));
            self.append(&batch, false)?;
        }
        Ok(())
    }

    /// The log's records, and the first time its name, must be durable before they are acknowledged.
    fn flush_log(&mut self) -> Result<()> {
        self.appender.flush()?;
        if self.names_dirty {
            self.replica.sync_dir()?;
            if let Some((dir, _)) = self.replica.place.file().filter(|_| self.working.is_some()) {
                dir.sync()
                    .map_err(|e| Error::target("sync the target's directory", e))?;
                self.replica.stats.count_flush();
            }
            self.names_dirty = false;
        }
        Ok(())
    }

    /// Reads back what was flushed since the last time; what did not survive is forgotten, and is missing.
    fn verify_new_records(&mut self) -> Result<()> {
        let from = std::mem::replace(&mut self.unverified, self.records.len());
        for number in from..self.records.len() {
            if !self.verify_record(number)? {
                self.drop_record(number);
            }
        }
        Ok(())
    }

    fn verify_record(&self, number: usize) -> Result<bool> {
        let place = &self.records[number];
        let header = match self.files.verify(place) {
            Ok(header) => header,
            Err(error) if error.kind() == ErrorKind::Corrupt => return Ok(false),
            Err(error) => return Err(error),
        };
        let Some(working) = self
            .working
            .as_ref()
            .filter(|_| header.pages == StoredPages::Elsewhere)
        else {
            return Ok(true);
        };
        let mut read_back = ReadBack::new(&*working.target, self.header.geometry, header.unit);
        let step = header.unit.bytes(&self.header.geometry);
        let mut digests = 0usize;
        for entry in &header.extents {
            match entry.new {
                NewContent::Data => {
                    let count = usize_of(entry.extent.length().div_ceil(step));
                    let expected = &header.new_digests[digests..digests + count];
                    digests += count;
                    read_back.add(entry.extent, Expected::Digests(expected))?;
                }
                NewContent::Zero => read_back.add(entry.extent, Expected::Zero)?,
                NewContent::None | NewContent::Reserve => {}
            }
        }
        match read_back.finish() {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Corrupt => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Forgets a record whose payload is not what was written. Its pre-images are gone with it: the target is
    /// still at its old point, so they are read again when the pages are staged again.
    fn drop_record(&mut self, number: usize) {
        self.records[number].dropped = true;
        let record = u32::try_from(number).unwrap_or(u32::MAX);
        self.pool.forget(record);
        let lost = self.index.remove_record(record);
        lost.iter().for_each(|e| self.touched.remove(e));
        self.lost.extend(lost.iter());
    }

    fn check_unwritten(&self) -> Result<()> {
        let in_place = self.working.as_ref().is_some_and(|w| w.sibling.is_none());
        let before = &self.header.target_evidence;
        if in_place || !before.is_known() {
            return Ok(());
        }
        if self.replica.place.open()?.evidence()?.proves_same(before) {
            return Ok(());
        }
        Err(Error::refused(format!(
            "{} was written by someone else since this session began; nothing of it was changed. Cancel the \
             session and sync again",
            self.replica.place.label()
        )))
    }

    fn reserve(&mut self) -> Result<()> {
        let Some(target) = self.replica.content.target() else {
            return Ok(());
        };
        let mut extents = Vec::new();
        for place in self.records.iter().filter(|p| p.payload_bytes() == 0) {
            let header = self.files.header(place)?;
            let reserved = header
                .extents
                .iter()
                .filter(|e| e.new == NewContent::Reserve);
            extents.extend(reserved.map(|e| e.extent));
        }
        if extents.is_empty() {
            return Ok(());
        }
        target
            .reserve(&extents)
            .map_err(|e| Error::target("reserve space for the new pages in the target", e))?;
        // Allocating may change what counts as evidence; content and size are unchanged.
        self.header.target_evidence = self.replica.place.open()?.evidence()?;
        Ok(())
    }

    fn compact_if_due(&mut self) -> Result<()> {
        let live = self.index.data_bytes() + self.touched.total_bytes();
        let held = self.checkpoint().log_bytes;
        let due = self.header.strategy == Strategy::Redo
            && held > COMPACT_FLOOR_BYTES.min(self.log_limit_bytes / 2)
            && held > 2 * live + COMPACT_FLOOR_BYTES.min(self.log_limit_bytes / 4);
        if due { self.compact() } else { Ok(()) }
    }

    /// Writes everything live into a fresh segment, makes it durable, then drops the segments before.
    ///
    /// # Errors
    /// The log failed; the segments before still count.
    pub(crate) fn compact(&mut self) -> Result<()> {
        let header = SegmentHeader {
            segment: self.header.segment + 1,
            kind: SegmentKind::Compacted,
            first_sequence: self.appender.next_sequence(),
            previous_chain: self.appender.chain(),
            ..self.header.clone()
        };
        let mut files = LogFiles::new(&header);
        let dir = Arc::clone(&self.replica.dir);
        let mut appender = Appender::create(&*dir, &mut files, &header, &self.replica.stats)?;
        let mut records = Vec::new();
        let mut index = Index::default();
        let mut touched = ExtentSet::new();
        let session = header.session;
        for batch in self.live_batches() {
            let (place, record) = appender.append(session, &batch?, false)?;
            take_in(&mut records, &mut index, &mut touched, place, &record);
        }
        let end = Batch::logged(header.geometry, Unit::Page);
        let (place, record) = appender.append(session, &end, true)?;
        take_in(&mut records, &mut index, &mut touched, place, &record);
        // Every live record must be durable, under a durable name, before the old segments go.
        appender.flush()?;
        self.replica.sync_dir()?;
        for segment in 0..header.segment {
            let name = segment_name(session, segment);
            dir.remove(&name)
                .map_err(|e| Error::log(format!("remove {name}"), e))?;
        }
        self.header = header;
        self.files = files;
        self.appender = appender;
        self.records = records;
        self.index = index;
        self.touched = touched;
        self.pool = Pool::new();
        self.unverified = 0;
        self.held_before = 0;
        self.verify_new_records()
    }

    /// One batch for each record, with only what is still live in it.
    fn live_batches(&self) -> impl Iterator<Item = Result<Batch>> + '_ {
        self.records
            .iter()
            .zip(0u32..)
            .filter(|(p, _)| !p.dropped)
            .flat_map(
                |(place, number)| match self.live_batches_of(place, number) {
                    Ok(batches) => batches.into_iter().map(Ok).collect::<Vec<_>>(),
                    Err(error) => vec![Err(error)],
                },
            )
    }

    fn live_batches_of(&self, place: &RecordPlace, number: u32) -> Result<Vec<Batch>> {
        let header = self.files.header(place)?;
        let new = self.files.new_pages(place, &header)?;
        let old = self.files.old_pages(place, &header)?;
        let fresh = || {
            let mut batch = Batch::logged(self.header.geometry, header.unit);
            batch.fuzzy = header.fuzzy;
            batch
        };
        // Pre-images first, whole; then the new pages that no later record replaced.
        let (mut olds, mut news) = (fresh(), fresh());
        let mut offset = 0usize;
        for entry in &header.extents {
            let length = usize_of(entry.extent.length());
            match entry.old {
                OldContent::None => {}
                OldContent::Zero => olds.push(entry.extent, New::None, Old::Zero),
                OldContent::Data => {
                    olds.push(
                        entry.extent,
                        New::None,
                        Old::Data(&old[offset..offset + length]),
                    );
                    offset += length.next_multiple_of(PAGE);
                }
            }
            if entry.new == NewContent::Reserve {
                news.push(entry.extent, New::Reserve, Old::None);
            }
            for run in self
                .index
                .within(entry.extent)
                .filter(|r| r.record == number)
            {
                match run.content {
                    RunContent::Zero => news.push(run.extent, New::Zero, Old::None),
                    RunContent::Data { payload } => {
                        let start = payload as usize;
                        let bytes = &new[start..start + usize_of(run.extent.length())];
                        news.push(run.extent, New::Data(bytes), Old::None);
                    }
                }
            }
        }
        Ok([olds, news].into_iter().filter(|b| !b.is_empty()).collect())
    }
}

/// Adds a record to the list, the index and the touched set; returns its number.
fn take_in(
    records: &mut Vec<RecordPlace>,
    index: &mut Index,
    touched: &mut ExtentSet,
    place: RecordPlace,
    header: &crate::format::RecordHeader,
) -> u32 {
    let number = u32::try_from(records.len()).unwrap_or(u32::MAX);
    index.insert_record(number, header);
    let old = header.extents.iter().filter(|e| e.old != OldContent::None);
    touched.extend(old.map(|e| e.extent));
    records.push(place);
    number
}

fn holes_of(target: &dyn BlockTarget, extent: Extent, holes: &mut ExtentSet) -> Result<()> {
    let end = extent.end().min(target.size_bytes());
    let mut offset = extent.start();
    while offset < end {
        let (status, run_end) = target
            .status_at(offset)
            .map_err(|e| Error::target("ask the target for its holes", e))?;
        if status == Status::Zero {
            holes.insert(Extent::from_range(offset..run_end.min(end)));
        }
        offset = run_end;
    }
    Ok(())
}

pub(crate) fn write_zeros(working: &Working, extent: Extent) -> Result<()> {
    let attempt = || format!("zero {extent} of {}", working.target.label());
    let failed = |e| Error::target(attempt(), e);
    // A sibling is a file we created: its zeros become holes.
    let punched = working.sibling.is_some() && working.target.punch(extent).map_err(failed)?;
    if punched {
        Ok(())
    } else {
        working.target.write_zeroes(extent).map_err(failed)
    }
}

fn create_working(replica: &Replica, plan: &Plan) -> Result<Option<Working>> {
    match (plan.strategy, &replica.content) {
        (Strategy::Redo, Content::Absent) => Err(Error::refused(
            "redo needs a target that exists; use direct",
        )),
        (Strategy::Redo, _) => Ok(None),
        (Strategy::Direct, content @ (Content::Device(_) | Content::File(_))) => {
            Ok(content.target().map(|target| Working {
                target,
                sibling: None,
            }))
        }
        (Strategy::Clone | Strategy::Shadow | Strategy::Direct, content) => {
            let Some((dir, _)) = replica.place.file() else {
                return Err(Error::refused(format!(
                    "{} needs a file target",
                    plan.strategy
                )));
            };
            let name = replica.place.sibling(plan.session);
            let file = create_sibling(&**dir, &name, plan, content)?;
            Ok(Some(Working {
                target: Arc::clone(&file).into_target(),
                sibling: Some(file),
            }))
        }
    }
}

fn create_sibling(
    dir: &dyn StorageDir,
    name: &str,
    plan: &Plan,
    content: &Content,
) -> Result<Arc<dyn StorageFile>> {
    let failed = |e| Error::target(format!("create {name} beside the target"), e);
    let file = dir.create(name).map_err(failed)?;
    let made = match (plan.strategy, content) {
        (Strategy::Clone, Content::File(old)) => file.clone_from_file(&**old),
        _ => Ok(()),
    };
    let sized = made.and_then(|()| file.resize(plan.geometry.image_bytes()));
    if let Err(error) = sized {
        // Nothing refers to it yet.
        dir.remove(name).map_err(failed)?;
        return Err(failed(error));
    }
    Ok(file)
}

fn reopen_working(replica: &Replica, header: &SegmentHeader) -> Result<Option<Working>> {
    if header.strategy == Strategy::Redo {
        return Ok(None);
    }
    let Some(expected) = header.working_file_id else {
        let target = replica
            .content
            .target()
            .ok_or_else(|| Error::refused("the target is gone"))?;
        target.drop_cache();
        return Ok(Some(Working {
            target,
            sibling: None,
        }));
    };
    let name = replica.place.sibling(header.session);
    let failed = |e| Error::target(format!("open {name} beside the target"), e);
    let opened = match replica.place.file() {
        Some((dir, _)) => dir.open(&name).map_err(failed)?,
        None => None,
    };
    let Some(file) = opened else {
        return Err(Error::corrupt(format!(
            "{name}, which the session was writing, is gone"
        )));
    };
    if file.file_id().map_err(failed)? != expected {
        return Err(Error::corrupt(format!(
            "{name} is not the file the session was writing"
        )));
    }
    file.flush().map_err(failed)?;
    replica.stats.count_flush();
    file.drop_cache();
    Ok(Some(Working {
        target: Arc::clone(&file).into_target(),
        sibling: Some(file),
    }))
}

/// Carries a durable COMMIT out: brings the target to the new point, proves it, publishes it. Used by the
/// session that decided and by recovery alike.
pub(crate) fn finish_commit(
    replica: &mut Replica,
    header: &SegmentHeader,
    root: Root,
    staged: Staged<'_>,
    progress: Progress<'_>,
) -> Result<u64> {
    let committed = replica.state.last_decision(header.session).map(|d| d.kind);
    // Invariant I1: the target changes only under a durable COMMIT.
    assert_eq!(
        committed,
        Some(DecisionKind::Commit),
        "apply without a durable COMMIT"
    );
    let carried_out = match header.strategy {
        Strategy::Redo => apply_redo(replica, header, staged, progress),
        Strategy::Clone | Strategy::Shadow | Strategy::Direct => exchange(replica, header),
    };
    let proven_bytes = match carried_out {
        Ok(bytes) => bytes,
        Err(error) => return Err(back_out(replica, header, staged, error, progress)),
    };
    replica.content = replica.place.open()?;
    let (point, retained) = applied_point(replica, header, root);
    replica.publish(header, DecisionKind::Applied, Some(point), retained)?;
    replica.remove_leftovers()?;
    Ok(proven_bytes)
}

/// The point a session made, and what is kept of the one before.
pub(crate) fn applied_point(
    replica: &Replica,
    header: &SegmentHeader,
    root: Root,
) -> (Point, Option<Retained>) {
    let keeps_old = header.undo == Undo::Keep && header.strategy != Strategy::Direct;
    let retained = keeps_old.then(|| Retained {
        strategy: header.strategy,
        point: replica.point_before(header),
        old_bytes: header.old_bytes,
    });
    let point = Point {
        id: header.session,
        root,
        geometry: header.geometry,
        source: header.source.clone(),
        made_unix: header.started_unix,
    };
    (point, retained)
}

fn apply_redo(
    replica: &mut Replica,
    header: &SegmentHeader,
    staged: Staged<'_>,
    progress: Progress<'_>,
) -> Result<u64> {
    replica.content = replica.place.open()?;
    let target = replica.content.target().ok_or_else(|| {
        Error::new(
            ErrorKind::Target,
            format!("target {} is gone", replica.place.label()),
        )
    })?;
    let image_bytes = header.geometry.image_bytes();
    if matches!(replica.content, Content::File(_)) && target.size_bytes() < image_bytes {
        target
            .resize(image_bytes)
            .map_err(|e| Error::target("grow the target", e))?;
    }
    staged.write_to(&*target, progress)?;
    if matches!(replica.content, Content::File(_)) && target.size_bytes() > image_bytes {
        target
            .resize(image_bytes)
            .map_err(|e| Error::target("shrink the target", e))?;
    }
    // I4: APPLIED follows only on a flush that succeeded and a read-back from the medium.
    target
        .flush()
        .map_err(|e| Error::target("flush the target", e))?;
    replica.stats.count_flush();
    staged.prove(&*target, progress)
}

/// Puts the finished sibling in the target's place; done already if recovery finds it there.
fn exchange(replica: &Replica, header: &SegmentHeader) -> Result<u64> {
    let Some((dir, name)) = replica.place.file() else {
        return Ok(0);
    };
    let Some(working) = header.working_file_id else {
        return Ok(0);
    };
    let sibling = replica.place.sibling(header.session);
    let found = replica.place.open()?.file_id()?;
    let failed = |e| Error::target(format!("put {sibling} in the place of {name}"), e);
    match found {
        Some(id) if id == working => {}
        Some(id) if Some(id) == header.old_file_id => {
            dir.exchange(&sibling, name).map_err(failed)?;
        }
        None if header.old_file_id.is_none() => dir.rename_new(&sibling, name).map_err(failed)?,
        _ => {
            return Err(Error::refused(format!(
                "{} is neither the old file nor the new one: someone replaced it; the new one is {sibling}",
                replica.place.label()
            )));
        }
    }
    dir.sync()
        .map_err(|e| Error::target("sync the target's directory", e))?;
    replica.stats.count_flush();
    Ok(0)
}

/// After a failure between COMMIT and APPLIED: back to the old point where pre-images allow, else the decision
/// stays and the next open carries it out.
fn back_out(
    replica: &mut Replica,
    header: &SegmentHeader,
    staged: Staged<'_>,
    error: Error,
    progress: Progress<'_>,
) -> Error {
    if header.strategy != Strategy::Redo || header.undo != Undo::Keep {
        return Error::pending("the new point is committed but not yet in place", error);
    }
    let restored = replica
        .decide_for(header, DecisionKind::Rollback)
        .and_then(|()| restore_redo(replica, header, staged, progress));
    match restored {
        Ok(()) => Error::new(
            ErrorKind::Target,
            format!(
                "the target failed while the new point was applied, and was returned to its old point: {}",
                chain_text(&error)
            ),
        ),
        Err(second) => Error::pending(
            format!("the target failed while it was returned to its old point ({second})"),
            error,
        ),
    }
}

fn chain_text(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}

/// Carries a durable ROLLBACK of a redo session out.
pub(crate) fn restore_redo(
    replica: &mut Replica,
    header: &SegmentHeader,
    staged: Staged<'_>,
    progress: Progress<'_>,
) -> Result<()> {
    let decided = replica.state.last_decision(header.session).map(|d| d.kind);
    assert_eq!(
        decided,
        Some(DecisionKind::Rollback),
        "restore without a durable ROLLBACK"
    );
    // A handle that failed is dead (I8): restore through a fresh one.
    replica.content = replica.place.open()?;
    let target = replica.content.target().ok_or_else(|| {
        Error::new(
            ErrorKind::Target,
            format!("target {} is gone", replica.place.label()),
        )
    })?;
    let is_file = matches!(replica.content, Content::File(_));
    let resize = |bytes: u64| {
        target
            .resize(bytes)
            .map_err(|e| Error::target("return the target to its old size", e))
    };
    if is_file && target.size_bytes() < header.old_bytes {
        resize(header.old_bytes)?;
    }
    staged.restore_to(&*target, progress)?;
    if is_file && target.size_bytes() != header.old_bytes {
        resize(header.old_bytes)?;
    }
    for extent in staged.reserved()? {
        if extent.end() <= header.old_bytes {
            target
                .punch(extent)
                .map_err(|e| Error::target("give reserved space back", e))?;
        }
    }
    target
        .flush()
        .map_err(|e| Error::target("flush the target", e))?;
    replica.stats.count_flush();
    staged.prove_restored(&*target, header.old_bytes)?;
    let point = replica.point_before(header);
    replica.content = replica.place.open()?;
    replica.publish(header, DecisionKind::RolledBack, point, None)?;
    replica.remove_leftovers()
}

/// A session that was applied.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Applied {
    /// The point the target is at now.
    pub point: SessionId,
    /// Its root.
    pub root: Root,
    /// Bytes that were read back from the target's medium after its flush.
    pub proven_bytes: u64,
}

/// Names a group of disks that share one cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GroupId(pub(crate) [u8; 16]);

impl GroupId {
    /// From 16 random bytes, not all zero.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The 16 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

/// Proof that a group's record is durable.
#[derive(Debug)]
pub struct GroupCommitted {
    pub(crate) group: GroupId,
}

/// The manifest of a point, while it is written.
#[derive(Debug)]
pub struct ManifestFile {
    file: Arc<dyn StorageFile>,
    stats: Arc<crate::stats::Stats>,
    offset: u64,
}

impl ManifestFile {
    pub(crate) fn create(
        dir: &Arc<dyn StorageDir>,
        session: SessionId,
        stats: &Arc<crate::stats::Stats>,
    ) -> Result<Self> {
        let name = manifest_name(session);
        let failed = |e| Error::log(format!("create {name}"), e);
        dir.remove(&name).map_err(failed)?;
        let file = dir.create(&name).map_err(failed)?;
        Ok(Self {
            file,
            stats: Arc::clone(stats),
            offset: 0,
        })
    }

    /// Makes it durable.
    ///
    /// # Errors
    /// The flush failed.
    pub fn finish(self) -> Result<()> {
        self.file
            .flush()
            .map_err(|e| Error::log("flush the manifest", e))?;
        self.stats.count_flush();
        Ok(())
    }
}

impl io::Write for ManifestFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file
            .write_at(self.offset, bytes)
            .map_err(io::Error::other)?;
        self.offset += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const _: () = assert!(MAX_PAYLOAD_BYTES <= GROUP_BYTES, "a record fits a group");
