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

mod compaction;
mod prepare;
mod read_back;

pub use prepare::{Applied, Lost, Prepared};

use std::collections::BTreeSet;
use std::sync::Arc;

use blockferry_core::{Digest, Extent, ExtentSet, Geometry};
use blockferry_device::{Evidence, WriteRequest};

use crate::apply::Staged;
use crate::apply::pool::Pool;
use crate::batch::{Batch, New, Old};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    BatchExtent, Decision, DecisionKind, MAX_PAYLOAD_BYTES, NewContent, OldContent, PAGE,
    SegmentHeader, SegmentKind, SessionId, SourceStamp, StoredPages, Unit, usize_of,
};
use crate::index::RunContent;
use crate::ledger::Ledger;
use crate::log::{Appender, LogFiles, Scan};
use crate::manifest::ManifestFile;
use crate::place::Content;
use crate::plan::{Plan, Proof, Strategy, Undo};
use crate::replica::Replica;
use crate::staged::{Basis, StagedView, Stager};
use crate::working::{Working, holes_of};

/// Most bytes of one group; the caller also closes a group when its time is up.
pub const GROUP_BYTES: u64 = 64 * 1024 * 1024;
/// Records of written extents are joined up to this many extents or digests.
const JOINED_EXTENTS: usize = 256;
const JOINED_DIGESTS: usize = 768;

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
    proof: Proof,
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
    /// Why the last of it is not.
    loss: Option<Error>,
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
        let as_read = replica.evidence_as_read()?;
        let working = Working::create(replica, plan)?;
        // Sharing its blocks may leave a trace in the target.
        let target_evidence = match working {
            Some(_) => replica.content.evidence()?,
            None => as_read,
        };
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
            target_evidence,
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
            proof: plan.proof,
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
            loss: None,
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
        let target_evidence = replica.content.evidence()?;
        let unwritten = scan.is_target_unwritten(&target_evidence);
        let header = SegmentHeader {
            // Else somebody may have written it where nothing is staged: it is not at that point any more.
            base: scan.header.base.filter(|_| unwritten),
            target_evidence,
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
            proof: Proof::ReadBack,
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
            loss: None,
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

    /// How far this run proves what it writes, where not as planned: a resumed session reads back unless told otherwise.
    pub fn prove_by(&mut self, proof: Proof) {
        self.proof = proof;
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
            return self.append(batch);
        }
        let (pre_images, batch) = batch.keep_first_touch(&self.ledger.touched);
        for pre_image in pre_images {
            self.append(pre_image)?;
        }
        if batch.is_empty() {
            return Ok(());
        }
        self.append(batch)
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
        let mut places = ExtentSet::new();
        for batch in std::mem::take(&mut self.written) {
            // What was written twice is in two records: only the later one says what is there.
            let again = batch.extents().any(|extent| places.overlaps(extent));
            let fits = joined.as_ref().is_some_and(|j| {
                !again
                    && j.extents.len() + batch.extents.len() <= JOINED_EXTENTS
                    && j.new_digests.len() + batch.new_digests.len() <= JOINED_DIGESTS
                    && j.fuzzy == batch.fuzzy
            });
            if !fits {
                places = ExtentSet::new();
            }
            places.extend(batch.extents());
            match &mut joined {
                Some(joined) if fits => {
                    joined.extents.extend(batch.extents);
                    joined.new_digests.extend(batch.new_digests);
                }
                _ => {
                    if let Some(full) = joined.replace(batch) {
                        self.append(full)?;
                    }
                }
            }
        }
        joined.map_or(Ok(()), |last| self.append(last))
    }

    fn append(&mut self, batch: Batch) -> Result<()> {
        let (place, header) = self.appender.append(self.header.session, &batch, false)?;
        let number = self.ledger.take_in(place, &header);
        self.pending.insert(number);
        if let Some(pages) = batch.into_plain_pages() {
            self.pool.keep(number, header, pages);
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
            self.append(batch)?;
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

    fn staged(&self) -> Staged<'_> {
        Staged {
            geometry: self.header.geometry,
            files: &self.files,
            records: &self.ledger.places,
            index: &self.ledger.index,
            pool: &self.pool,
            reserved: &self.ledger.reserved,
            proof: self.proof,
        }
    }

    /// The working file, where what was written to it is to be read back.
    fn working_to_prove(&self) -> Option<&Working> {
        self.working
            .as_ref()
            .filter(|_| self.proof == Proof::ReadBack)
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

const _: () = assert!(MAX_PAYLOAD_BYTES <= GROUP_BYTES, "a record fits a group");
