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

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use blockferry_core::{Digest, Extent, ExtentSet, Geometry, Root};
use blockferry_device::{BlockTarget, Evidence, StorageDir, StorageFile, WriteRequest};

use crate::apply::{Pool, Progress, Staged};
use crate::batch::{Batch, New, Old};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    BatchExtent, Decision, DecisionKind, MAX_PAYLOAD_BYTES, NewContent, OldContent, PAGE, Point,
    Retained, SegmentHeader, SegmentKind, SessionId, SourceStamp, StoredPages, Unit, usize_of,
};
use crate::index::RunContent;
use crate::ledger::Ledger;
use crate::log::{Appender, LogFiles, RecordPlace, Scan, segment_name};
use crate::place::Content;
use crate::plan::{Plan, Strategy, Undo};
use crate::readback::{ReadBack, ReadBackOutcome, ReadBackTask, not_whole};
use crate::replica::{Replica, manifest_name};
use crate::staged::{Basis, StagedView, Stager};
use crate::working::{Working, holes_of};

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
    /// Live zeros in all.
    pub live_zero_bytes: u64,
}

/// One run of a mode, begun or resumed.
#[derive(Debug)]
pub struct Session<'r> {
    pub(crate) replica: &'r mut Replica,
    pub(crate) header: SegmentHeader,
    log_limit_bytes: u64,
    files: LogFiles,
    appender: Appender,
    ledger: Ledger,
    working: Option<Working>,
    /// What a staged view lies on.
    basis: Basis,
    pool: Pool,
    /// Written to the working file, not yet recorded: recorded after its flush.
    written: Vec<Batch>,
    /// Bytes since the last group was closed.
    group_bytes: u64,
    /// Extents with new data since the last group was closed.
    group_extents: Vec<Extent>,
    /// Records that were not read back in this run.
    pending: BTreeSet<u32>,
    /// Records below this one were handed out to be read back elsewhere.
    handed_out: u32,
    /// Counts compactions: record numbers mean something else after one.
    generation: u32,
    /// Staged, but not whole on the medium.
    lost: ExtentSet,
    /// Set by a `prepare` that found everything complete, until something is staged.
    prepared: bool,
    /// Bytes of the working file that were read back from the medium.
    proven_bytes: u64,
    /// A name was created that the directory has not been synced for.
    names_dirty: bool,
    held_before: u64,
    totals: SessionTotals,
}

impl<'r> Session<'r> {
    /// Begins a session: creates its log, its manifest and, where the strategy has one, its working file.
    pub(crate) fn begin(replica: &'r mut Replica, plan: &Plan) -> Result<Self> {
        check_size(replica, plan)?;
        let working = Working::create(replica, plan)?;
        let working_file_id = match working.as_ref().and_then(|w| w.sibling.as_ref()) {
            Some(file) => Some(
                file.file_id()
                    .map_err(|e| Error::target("identify the sibling", e))?,
            ),
            None => None,
        };
        let header = SegmentHeader {
            session: plan.session,
            epoch: replica.next_epoch(),
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
            ledger: Ledger::default(),
            working,
            basis: Basis::Target,
            pool: Pool::new(),
            written: Vec::new(),
            group_bytes: 0,
            group_extents: Vec::new(),
            pending: BTreeSet::new(),
            handed_out: 0,
            generation: 0,
            lost: ExtentSet::new(),
            prepared: false,
            proven_bytes: 0,
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
        source: &SourceStamp,
    ) -> Result<Self> {
        let working = Working::reopen(replica, &scan.header)?;
        let basis = match scan.header.strategy {
            Strategy::Clone => Basis::Working,
            Strategy::Shadow | Strategy::Redo | Strategy::Direct => Basis::Target,
        };
        let header = SegmentHeader {
            // Proven unchanged just now, by evidence or by its pre-images.
            target_evidence: replica.content.evidence()?,
            source: source_of_all(&scan.header.source, source),
            segment: scan.next_segment,
            kind: SegmentKind::Continues,
            first_sequence: scan.next_sequence,
            previous_chain: scan.chain,
            ..scan.header
        };
        let mut files = scan.files;
        let ledger = Ledger::of(&scan.records);
        let pending = ledger.numbers().collect();
        let appender = Appender::create(&*replica.dir, &mut files, &header, &replica.stats)?;
        let totals = SessionTotals {
            resumed_bytes: ledger.index.data_bytes(),
            ..SessionTotals::default()
        };
        let mut session = Self {
            header,
            log_limit_bytes,
            files,
            appender,
            ledger,
            working,
            basis,
            pool: Pool::new(),
            written: Vec::new(),
            group_bytes: 0,
            group_extents: Vec::new(),
            pending,
            handed_out: 0,
            generation: 0,
            lost: ExtentSet::new(),
            prepared: false,
            proven_bytes: 0,
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
        let Some(working) = self.working.clone().filter(|w| w.sibling.is_none()) else {
            return Ok(());
        };
        if self.last_decision().is_none() {
            self.flush_log()?;
            self.decide(DecisionKind::GiveUp, Digest::from_bytes([0; 32]), [0; 16])?;
        }
        let image_bytes = self.header.geometry.image_bytes();
        let is_file = matches!(self.replica.content, Content::File(_));
        if is_file && working.target.size_bytes() != image_bytes {
            working.resize(image_bytes)?;
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

    /// The source as all runs of the session found it; without evidence if it changed between them.
    #[must_use]
    pub fn source(&self) -> &SourceStamp {
        &self.header.source
    }

    /// Whether what is replaced is kept.
    #[must_use]
    pub fn keeps_old(&self) -> bool {
        self.header.undo == Undo::Keep
    }

    /// Whether the target is a file.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.replica.is_file()
    }

    /// Whether all of `extent` has its pre-image in the log.
    #[must_use]
    pub fn has_pre_image(&self, extent: Extent) -> bool {
        self.ledger.touched.covers(extent)
    }

    /// What this session has done so far.
    #[must_use]
    pub fn totals(&self) -> SessionTotals {
        let zeros = self
            .ledger
            .index
            .runs()
            .filter(|r| r.content == RunContent::Zero);
        SessionTotals {
            live_bytes: self.ledger.index.data_bytes(),
            live_zero_bytes: zeros.map(|r| r.extent.length()).sum(),
            ..self.totals
        }
    }

    /// What workers use to hand over pages.
    #[must_use]
    pub fn stager(&self) -> Stager {
        Stager::new(self.header.geometry, self.working.clone())
    }

    /// What is staged now, for workers to compare with: a resumed session does not stage it again.
    #[must_use]
    pub fn staged_view(&self) -> Arc<StagedView> {
        Arc::new(StagedView::new(
            self.header.geometry,
            self.files.clone(),
            self.ledger.clone(),
            self.working.clone(),
            self.basis,
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
        if self.last_decision() == Some(DecisionKind::Prepared) {
            return Err(Error::refused(
                "the session is prepared for its group: nothing can be staged any more",
            ));
        }
        self.check_log_limit(&batch)?;
        self.prepared = false;
        self.count(&batch)?;
        self.group_bytes += batch.data_bytes();
        if self.header.strategy != Strategy::Redo {
            let batch = self.write_through(batch)?;
            self.written.push(batch);
            return Ok(());
        }
        if self.header.undo == Undo::None {
            return self.append(&batch, true);
        }
        let (pre_images, batch) = batch.keep_first_touch(&self.ledger.touched);
        for pre_image in &pre_images {
            self.append(pre_image, false)?;
        }
        if batch.is_empty() {
            return Ok(());
        }
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
                working.flush(&self.replica.stats)?;
            }
            self.record_written()?;
            self.record_reservations()?;
            self.flush_log()?;
            self.group_bytes = 0;
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
        self.prepared = false;
        self.stage_edge()?;
        self.close_group()?;
        // Nothing is trusted that this run did not read back itself (I3).
        self.verify_pending()?;
        let dropped = self.ledger.places.iter().any(|p| p.dropped);
        if self.lost.is_empty() && dropped && self.header.strategy == Strategy::Redo {
            // Recovery reads all records, so a bad one must not be among them.
            self.compact()?;
            self.verify_pending()?;
        }
        let missing = std::mem::take(&mut self.lost);
        if !missing.is_empty() {
            return Ok(Prepared::Missing(missing));
        }
        if self.ledger.is_fuzzy() {
            return Err(Error::refused(
                "pages copied while the source was being written make no consistent point: another pass must \
                 stage them again",
            ));
        }
        self.check_pre_images()?;
        self.check_unwritten()?;
        if self.header.strategy == Strategy::Redo {
            self.reserve()?;
        }
        self.sync_names()?;
        self.prepared = true;
        Ok(Prepared::Complete)
    }

    /// Cutting a file off inside a page writes that page, in apply or on the way back: it must be in the log even
    /// if its content stays, or a torn write of it could not be mended.
    fn stage_edge(&mut self) -> Result<()> {
        let (old_bytes, new_bytes) = (self.header.old_bytes, self.header.geometry.image_bytes());
        let end = old_bytes.min(new_bytes);
        let start = end - end % PAGE as u64;
        let is_cut = self.replica.is_file() && old_bytes != new_bytes && start < end;
        let target = self.replica.content.target();
        let Some(target) = target.filter(|_| is_cut && self.header.strategy == Strategy::Redo)
        else {
            return Ok(());
        };
        let page_end = start + PAGE as u64;
        let old_extent = Extent::from_range(start..page_end.min(old_bytes));
        let new_extent = Extent::from_range(start..page_end.min(new_bytes));
        let staged: u64 = self
            .ledger
            .index
            .within(new_extent)
            .map(|r| r.extent.length())
            .sum();
        let kept = self.header.undo == Undo::None || self.ledger.touched.covers(old_extent);
        if staged == new_extent.length() && kept {
            return Ok(());
        }
        let mut old = vec![0; PAGE];
        target
            .read_at(start, &mut old[..usize_of(old_extent.length())])
            .map_err(|e| Error::target("read the page where the target is cut off", e))?;
        let mut new = old[..usize_of(new_extent.length())].to_vec();
        self.staged_view().patch(new_extent, &mut new)?;
        let mut batch = Batch::logged(self.header.geometry, Unit::Page);
        if !kept {
            batch.push(old_extent, New::None, Old::Data(&old));
        }
        batch.push(new_extent, New::Data(&new), Old::None);
        self.stage(batch)
    }

    /// Where a way back is promised, everything that apply replaces has a pre-image.
    fn check_pre_images(&self) -> Result<()> {
        if self.header.strategy != Strategy::Redo || self.header.undo == Undo::None {
            return Ok(());
        }
        let old_image = Extent::from_range(0..self.header.old_bytes);
        let replaced = self.ledger.index.runs();
        let replaced = replaced.filter_map(|r| r.extent.intersection(old_image));
        let cut_off = self.header.geometry.image_bytes()..self.header.old_bytes;
        let cut_off = self.replica.is_file() && !cut_off.is_empty();
        let cut_off = cut_off
            .then(|| Extent::from_range(self.header.geometry.image_bytes()..self.header.old_bytes));
        for extent in replaced.chain(cut_off) {
            if !self.ledger.touched.covers(extent) {
                return Err(Error::refused(format!(
                    "{extent} would be replaced without a pre-image, but the old point is to be kept"
                )));
            }
        }
        Ok(())
    }

    /// Makes the new point count: after this, recovery produces it without the source's help.
    ///
    /// # Errors
    /// The decision could not be made durable. Whether it counts is known when the target is opened again.
    pub fn commit(mut self, root: Root, progress: Progress<'_>) -> Result<Applied> {
        self.check_prepared()?;
        self.seal_working()?;
        self.decide_to_commit(root, [0; 16])?;
        self.apply(root, progress)
    }

    /// Declares this session complete as a member of a group; only [`Self::commit_in_group`] may follow.
    ///
    /// # Errors
    /// It is not prepared, or the decision could not be made durable.
    pub fn prepare_for_group(&mut self, root: Root, group: GroupId) -> Result<()> {
        self.check_prepared()?;
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
        let last = self.replica.state.last_decision(self.header.session);
        if last.map(|d| (d.kind, d.group)) != Some((DecisionKind::Prepared, committed.group.0)) {
            return Err(Error::refused("the session is not prepared for this group"));
        }
        self.decide_to_commit(root, committed.group.0)?;
        self.apply(root, progress)
    }

    fn check_prepared(&self) -> Result<()> {
        if self.prepared {
            return Ok(());
        }
        // Invariant I3: COMMIT implies that every record was read back and found whole.
        Err(Error::refused(
            "the session is not prepared since it last staged something",
        ))
    }

    /// Once the decision is on its way nobody knows whether it counts, until it is read again.
    fn decide_to_commit(&mut self, root: Root, group: [u8; 16]) -> Result<()> {
        self.decide(DecisionKind::Commit, root.digest(), group)
            .map_err(|e| match e.kind() {
                ErrorKind::Log => Error::pending(
                    "the decision to commit may or may not be durable; opening the target again tells",
                    e,
                ),
                _ => e,
            })
    }

    fn apply(self, root: Root, progress: Progress<'_>) -> Result<Applied> {
        let Self {
            replica,
            header,
            files,
            ledger,
            pool,
            proven_bytes,
            ..
        } = self;
        let staged = Staged {
            geometry: header.geometry,
            files: &files,
            records: &ledger.places,
            index: &ledger.index,
            pool: &pool,
            reserved: &ledger.reserved,
        };
        let applied_bytes = finish_commit(replica, &header, root, staged, progress)?;
        Ok(Applied {
            point: header.session,
            root,
            proven_bytes: proven_bytes + applied_bytes,
        })
    }

    /// Owner, mode and times of the old file, and everything in the sibling, must be durable before COMMIT
    /// lets recovery exchange the two.
    fn seal_working(&mut self) -> Result<()> {
        // The manifest may have been created since the last group.
        self.sync_names()?;
        let Some(working) = self.working.clone() else {
            return Ok(());
        };
        if let (Some(sibling), Content::File(old)) = (&working.sibling, &self.replica.content) {
            sibling
                .copy_metadata(&**old)
                .map_err(|e| Error::target("copy owner, mode and attributes to the new file", e))?;
        }
        working.flush(&self.replica.stats)
    }

    fn decide(&mut self, kind: DecisionKind, root: Digest, group: [u8; 16]) -> Result<()> {
        let decision = Decision {
            session: self.header.session,
            epoch: self.header.epoch,
            ordinal: self.replica.state.next_ordinal(self.header.session),
            kind,
            records: self.appender.durable(),
            chain: self.appender.chain(),
            root,
            group,
            evidence: Evidence::unknown(),
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
        Ok(())
    }

    fn check_log_limit(&self, batch: &Batch) -> Result<()> {
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
        if self.totals.resumed_bytes == 0 || self.ledger.index.within(extent).next().is_none() {
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
        if batch.pages != StoredPages::Elsewhere {
            let pages = batch.plain_pages()?;
            let mut offset = 0usize;
            let mut requests = Vec::new();
            for entry in batch.extents.iter().filter(|e| e.new == NewContent::Data) {
                let length = usize_of(entry.extent.length());
                requests.push(WriteRequest {
                    offset: entry.extent.start(),
                    bytes: &pages[offset..offset + length],
                });
                offset += length.next_multiple_of(PAGE);
            }
            working.write(&requests)?;
            for entry in batch.extents.iter().filter(|e| e.new == NewContent::Zero) {
                working.write_zeros(entry.extent)?;
            }
        }
        batch.extents.retain(|e| e.new != NewContent::None);
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
        let number = self.ledger.take_in(place, &header);
        self.pending.insert(number);
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
        self.sync_names()
    }

    fn sync_names(&mut self) -> Result<()> {
        if !self.names_dirty {
            return Ok(());
        }
        if self.appender.is_unflushed() {
            // A name must not become durable before the header it leads to.
            self.appender.flush()?;
        }
        self.replica.sync_dir()?;
        if self.working.is_some() {
            self.replica.sync_target_dir()?;
        }
        self.names_dirty = false;
        Ok(())
    }

    /// Hands out what is durable and was not read back yet, to be read back on another thread while staging
    /// goes on. What is never given back to [`Self::take_read_back`] is read back by [`Self::prepare`].
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn read_back_task(&mut self) -> Result<Option<ReadBackTask>> {
        let mut records = Vec::new();
        for number in self.pending.range(self.handed_out..).copied() {
            let place = &self.ledger.places[number as usize];
            if place.sequence > self.appender.durable() {
                break;
            }
            let mut checks = Vec::new();
            if self.working.is_some() {
                let header = self.files.header(place)?;
                self.staged().add_live(number, &header, &mut |check| {
                    checks.push(check);
                    Ok(())
                })?;
            }
            records.push((number, place.clone(), checks));
        }
        let Some((last, _, _)) = records.last() else {
            return Ok(None);
        };
        self.handed_out = last + 1;
        Ok(Some(ReadBackTask {
            generation: self.generation,
            geometry: self.header.geometry,
            files: self.files.clone(),
            working: self.working.as_ref().map(|w| Arc::clone(&w.target)),
            records,
        }))
    }

    /// Whether something that was handed out has not been given back.
    #[must_use]
    pub fn is_read_back_under_way(&self) -> bool {
        self.pending.first().is_some_and(|n| *n < self.handed_out)
    }

    /// Takes back what was read back elsewhere.
    ///
    /// # Errors
    /// Reading it back failed.
    pub fn take_read_back(&mut self, outcome: ReadBackOutcome) -> Result<()> {
        if outcome.generation != self.generation {
            return Ok(());
        }
        for (number, whole) in outcome.records {
            let whole = whole?;
            if self.pending.remove(&number) {
                self.settle(number, whole);
            }
        }
        Ok(())
    }

    /// Reads back what was not yet; what did not survive is forgotten, and is missing.
    fn verify_pending(&mut self) -> Result<()> {
        while let Some(number) = self.pending.first().copied() {
            let whole = self.verify_record(number)?;
            self.pending.remove(&number);
            self.settle(number, whole);
        }
        Ok(())
    }

    fn settle(&mut self, number: u32, whole: Option<u64>) {
        match whole {
            Some(bytes) => self.proven_bytes += bytes,
            None => self.drop_record(number as usize),
        }
    }

    /// Bytes of the working file that were read back for a record; `None` if it is not whole.
    fn verify_record(&self, number: u32) -> Result<Option<u64>> {
        let place = &self.ledger.places[number as usize];
        let header = match self.files.verify(place) {
            Ok(header) => header,
            Err(error) => return not_whole(error),
        };
        let Some(working) = &self.working else {
            return Ok(Some(0));
        };
        let mut read_back = ReadBack::new(&*working.target, self.header.geometry);
        let checked = self
            .staged()
            .add_live(number, &header, &mut |check| read_back.add(check))
            .and_then(|bytes| read_back.finish().map(|()| bytes));
        checked.map_or_else(not_whole, |bytes| Ok(Some(bytes)))
    }

    fn staged(&self) -> Staged<'_> {
        Staged {
            geometry: self.header.geometry,
            files: &self.files,
            records: &self.ledger.places,
            index: &self.ledger.index,
            pool: &self.pool,
            reserved: &self.ledger.reserved,
        }
    }

    /// Forgets a record that is not what was written. Its pre-images are gone with it: the target is still at
    /// its old point, so they are taken again when their pages are staged again, whichever record holds these.
    fn drop_record(&mut self, number: usize) {
        self.ledger.places[number].dropped = true;
        let record = u32::try_from(number).unwrap_or(u32::MAX);
        self.pool.forget(record);
        let mut lost = self.ledger.index.remove_record(record);
        let mut kept = ExtentSet::new();
        for place in self.ledger.places.iter().filter(|p| !p.dropped) {
            // One that cannot be read keeps nothing either.
            let Ok(header) = self.files.header(place) else {
                continue;
            };
            let old = header.extents.iter().filter(|e| e.old != OldContent::None);
            kept.extend(old.map(|e| crate::ledger::whole_pages(e.extent)));
        }
        lost.extend(self.ledger.touched.difference(&kept).iter());
        lost.iter().for_each(|e| self.ledger.index.remove(e));
        self.ledger.touched = kept;
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
        let extents: Vec<Extent> = self.ledger.reserved.iter().collect();
        let Some(target) = self
            .replica
            .content
            .target()
            .filter(|_| !extents.is_empty())
        else {
            return Ok(());
        };
        let reserved = target
            .reserve(&extents)
            .map_err(|e| Error::target("reserve space for the new pages in the target", e));
        let noted = self.note_evidence();
        reserved?;
        noted
    }

    /// Allocating may change what counts as evidence, but neither content nor size: without a note of it a
    /// later run could not tell our own doing from somebody else's.
    fn note_evidence(&mut self) -> Result<()> {
        let now = self.replica.place.open()?.evidence()?;
        if now == self.header.target_evidence {
            return Ok(());
        }
        let mut note = Batch::logged(self.header.geometry, Unit::Page);
        note.evidence = now.clone();
        self.append(&note, false)?;
        self.flush_log()?;
        self.header.target_evidence = now;
        self.verify_pending()
    }

    fn compact_if_due(&mut self) -> Result<()> {
        let live = self.ledger.index.data_bytes() + self.ledger.touched.total_bytes();
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
        let mut ledger = Ledger::default();
        let session = header.session;
        for batch in self.live_batches() {
            let (place, record) = appender.append(session, &batch?, false)?;
            ledger.take_in(place, &record);
        }
        let end = Batch::logged(header.geometry, Unit::Page);
        let (place, record) = appender.append(session, &end, true)?;
        ledger.take_in(place, &record);
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
        self.ledger = ledger;
        self.pool = Pool::new();
        self.pending = self.ledger.numbers().collect();
        self.handed_out = 0;
        self.generation += 1;
        self.held_before = 0;
        Ok(())
    }

    /// One batch for each record, with only what is still live in it.
    fn live_batches(&self) -> impl Iterator<Item = Result<Batch>> + '_ {
        self.ledger
            .places
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
                .ledger
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

/// The source as all runs of a session found it. Where it changed between them nothing stands for all of it.
fn source_of_all(before: &SourceStamp, now: &SourceStamp) -> SourceStamp {
    let same =
        before.evidence.proves_same(&now.evidence) && before.identity.proves_same(&now.identity);
    let evidence = if same {
        now.evidence.clone()
    } else {
        Evidence::unknown()
    };
    SourceStamp::new(&now.address, now.identity.clone(), evidence)
}

fn check_size(replica: &Replica, plan: &Plan) -> Result<()> {
    let (image_bytes, room) = (plan.geometry.image_bytes(), replica.content.size_bytes());
    if replica.is_file() || image_bytes <= room {
        return Ok(());
    }
    Err(Error::refused(format!(
        "an image of {image_bytes} bytes does not fit {}, which has {room}",
        replica.place.label()
    )))
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
    publish_applied(replica, header, root)
        .map_err(|e| Error::pending("the new point is in place but not yet recorded as such", e))?;
    // The outcome is durable; what is left to remove is removed by the next open at the latest.
    replica.remove_leftovers().ok();
    Ok(proven_bytes)
}

fn publish_applied(replica: &mut Replica, header: &SegmentHeader, root: Root) -> Result<()> {
    replica.content = replica.place.open()?;
    let (point, retained) = applied_point(replica, header, root);
    replica.publish(header, DecisionKind::Applied, Some(point), retained)
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

/// How far whole pages may be written: what lies beyond the end of a device's image is not ours; of a file's it
/// is cut off afterwards.
fn room_of(content: &Content, target: &dyn BlockTarget, header: &SegmentHeader) -> u64 {
    match content {
        Content::File(_) => target.size_bytes(),
        Content::Device(_) | Content::Absent => header.geometry.image_bytes(),
    }
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
    let room_bytes = room_of(&replica.content, &*target, header);
    staged.write_to(&*target, room_bytes, progress)?;
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
    let room_bytes = room_of(&replica.content, &*target, header);
    staged.restore_to(&*target, room_bytes, progress)?;
    if is_file && target.size_bytes() != header.old_bytes {
        resize(header.old_bytes)?;
    }
    for extent in staged.reserved.iter() {
        if let Some(extent) = extent.intersection(Extent::from_range(0..header.old_bytes)) {
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
    replica.content = replica.place.open()?;
    replica.publish_rolled_back(header)
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
