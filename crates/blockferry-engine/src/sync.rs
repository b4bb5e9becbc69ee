//! One sync, from planning to receipt.
//!
//! ```text
//! settle what is unfinished -> proven identical? -> sample, choose -> scan and stage -> prepare -> commit -> receipt
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blockferry_core::{Extent, Geometry, Root};
use blockferry_delta_sync::Comparison;
use blockferry_device::{AlignedBuffer, BlockSource, Cancellable, RateLimiter};
use blockferry_full_download::Copying;
use blockferry_pipeline::{Event, PIECE_BYTES, Phase, Step, WalkOptions, read_padded, walk};
use blockferry_transfer_log::{
    Batch, Old, Plan, Prepared, SessionId, SessionTotals, SourceStamp, StagedView, Stager,
    Strategy, Undo, Unwritten,
};

use crate::error::{Error, ErrorKind, Result};
use crate::handle::{LogHandle, PointFiles};
use crate::job::{Job, JobScratch, RegionDone};
use crate::knowledge::{Doubt, Doubts, ManifestTrust};
use crate::options::{Context, Mode, SyncOptions};
use crate::plan::{Choice, Sample, Situation, check_space, choose};
use crate::read_back::{Collect, ReadBackThread};
use crate::receipt::{RECEIPT_VERSION, Receipt};
use crate::recorder::{Recorded, Recorder};
use crate::target::Target;

/// A group is closed after this long, so that a kill loses little.
const GROUP_TIME: Duration = Duration::from_millis(500);
/// How often a scan may be repeated because staged pages did not survive on the medium ...
const PREPARE_ATTEMPTS: u32 = 3;
/// ... and because what was known turned out wrong: once for a change map, once for a manifest.
const DOUBTS: u32 = 2;

/// Brings `target` to the content of `source`. An unfinished session of the same kind is resumed.
///
/// # Errors
/// See [`ErrorKind`]. Unless it is `DecisionPending`, the target is at its old point; where
/// [`Error::is_resumable`], the same call goes on where this one stopped.
pub fn sync(
    source: Arc<dyn BlockSource>,
    target: &mut Target,
    options: &SyncOptions,
    context: &Context,
) -> Result<Receipt> {
    let mut run = Run::new(source, target, options, context)?;
    run.check_sizes(target)?;
    let resumed = run.settle_unfinished(target)?;
    if resumed.is_none() && run.is_proven_identical(target)? {
        return run.proven_receipt(target);
    }
    let choice = match resumed {
        Some(choice) => choice,
        None => run.choose(target)?,
    };
    run.say(&Event::Decision(format!(
        "{}, {}: {}",
        choice.mode, choice.strategy, choice.reason
    )));
    let receipt = run.execute(target, &choice)?;
    target.leave_receipt(&receipt);
    Ok(receipt)
}

/// The state of one run.
struct Run<'a> {
    source: Arc<dyn BlockSource>,
    target: String,
    options: &'a SyncOptions,
    context: &'a Context,
    geometry: Geometry,
    stamp: SourceStamp,
    id: SessionId,
    started: Duration,
    fallbacks: Vec<String>,
    phases: BTreeMap<String, f64>,
    counts: Counts,
    /// Flushes that opening and recovering the target took: not this run's.
    flushes_before: u64,
}

/// What the workers did.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    source_read: u64,
    target_read: u64,
    changed: u64,
    done: u64,
}

impl<'a> Run<'a> {
    fn new(
        source: Arc<dyn BlockSource>,
        target: &Target,
        options: &'a SyncOptions,
        context: &'a Context,
    ) -> Result<Self> {
        let flushes_before = target.replica.stats().flushes();
        let target = target.label();
        let failed = |e| Error::source(format!("examine source {}", source.label()), e);
        let identity = source.identity().map_err(failed)?;
        let evidence = source.evidence().map_err(failed)?;
        let address = if options.source_address.is_empty() {
            source.label()
        } else {
            &options.source_address
        };
        let stamp = SourceStamp::new(address, identity, evidence);
        let geometry = Geometry::new(source.size_bytes(), options.block_size);
        // No read begins once the run is cancelled, wherever a worker is.
        let source = Arc::new(Cancellable::new(source, context.cancel.clone()));
        Ok(Self {
            source,
            target,
            options,
            context,
            geometry,
            stamp,
            id: random_id()?,
            started: context.clock.now(),
            fallbacks: Vec::new(),
            phases: BTreeMap::new(),
            counts: Counts::default(),
            flushes_before,
        })
    }

    fn check_sizes(&self, target: &Target) -> Result<()> {
        let Some(device) = target.replica.target() else {
            return Ok(());
        };
        let (old, new) = (device.size_bytes(), self.geometry.image_bytes());
        if !target.replica.is_file() && old < new {
            return Err(Error::new(
                ErrorKind::Target,
                format!(
                    "target {} has {old} bytes, the source has {new}: it is too small",
                    self.target
                ),
            ));
        }
        if target.replica.is_file() && old > new && !self.options.allow_shrink {
            return Err(Error::new(
                ErrorKind::Target,
                format!(
                    "target {} has {old} bytes, the source only {new}: pass --allow-shrink to cut it",
                    self.target
                ),
            ));
        }
        Ok(())
    }

    /// What to do with an unfinished session: go on with it if it fits, else drop it, said aloud.
    fn settle_unfinished(&mut self, target: &mut Target) -> Result<Option<Choice>> {
        let Some(header) = target.replica.unfinished().cloned() else {
            return Ok(None);
        };
        let mode = Mode::from_code(header.mode);
        let same_mode = matches!(self.options.mode, Mode::Auto) || self.options.mode == mode;
        let same_strategy = self.options.strategy.is_none_or(|s| s == header.strategy);
        let same_undo = header.undo == self.options.undo || header.strategy == Strategy::Direct;
        let fits = header.geometry == self.geometry && same_mode && same_strategy && same_undo;
        let can = target
            .replica
            .can_resume()
            .map_err(|e| Error::log("look at the session", e))?;
        if fits && can {
            self.id = header.session;
            return Ok(Some(Choice {
                mode,
                strategy: header.strategy,
                reason: format!("resuming session {}", header.session),
                required_bytes: 0,
                available_bytes: u64::MAX,
            }));
        }
        let why = if fits {
            "the target was written since"
        } else {
            "it was begun for another sync"
        };
        self.warn(
            "session_dropped",
            format!("unfinished session {} is dropped: {why}", header.session),
        )?;
        target
            .replica
            .cancel()
            .map_err(|e| Error::log("drop the unfinished session", e))?;
        Ok(None)
    }

    /// Both sides provably unwritten since their last common point.
    fn is_proven_identical(&self, target: &Target) -> Result<bool> {
        if self.options.rescan || self.options.mode == Mode::Full {
            return Ok(false);
        }
        Ok(self.source_is_at_point(target) && self.target_is_proven(target)?)
    }

    fn source_is_at_point(&self, target: &Target) -> bool {
        target.replica.point().is_some_and(|p| {
            p.geometry == self.geometry
                && p.source.evidence.proves_same(&self.stamp.evidence)
                && p.source.identity.proves_same(&self.stamp.identity)
        })
    }

    fn target_is_proven(&self, target: &Target) -> Result<bool> {
        let unwritten = target
            .replica
            .unwritten()
            .map_err(|e| Error::log("examine the target", e))?;
        Ok(unwritten == Unwritten::Proven)
    }

    fn proven_receipt(mut self, target: &Target) -> Result<Receipt> {
        let point = target
            .replica
            .point()
            .ok_or_else(|| internal("no point after it was proven"))?;
        let choice = Choice {
            mode: Mode::Delta,
            strategy: Strategy::Redo,
            reason: "neither side was written since their last sync point: nothing to read"
                .to_owned(),
            required_bytes: 0,
            available_bytes: 0,
        };
        let (root, id) = (point.root, point.id);
        self.counts.changed = 0;
        Ok(self.receipt(target, &choice, None, root, id, SessionTotals::default(), 0))
    }

    fn choose(&mut self, target: &mut Target) -> Result<Choice> {
        let start = self.context.clock.now();
        let present = target.replica.target();
        let target_source = present.clone().map(|t| t as Arc<dyn BlockSource>);
        let seed = self.seed();
        self.context
            .progress(Phase::Sampling, 0, self.geometry.image_bytes(), 0);
        let sample = Sample::take(
            &*self.source,
            target_source.as_deref(),
            &self.geometry,
            seed,
            self.context,
        )?;
        let choice = choose(self.options, self.situation(target)?, &sample);
        self.time("sampling", start);
        check_space(&choice)?;
        Ok(choice)
    }

    /// Of everything this run draws.
    fn seed(&self) -> u64 {
        u64::from_le_bytes(self.id.as_bytes()[..8].try_into().unwrap_or_default())
    }

    fn situation(&self, target: &mut Target) -> Result<Situation> {
        let replica = &target.replica;
        let free = |dir: &dyn blockferry_device::StorageDir| {
            dir.available_bytes()
                .map_err(|e| Error::target("ask for free space", e))
        };
        let may_clone = replica.target_dir().is_some_and(|d| d.may_clone());
        let wants_clone = self.options.strategy.is_none() && !self.options.in_place;
        let present = replica.target().is_some();
        let can_clone = may_clone && wants_clone && present && replica.supports_clone(self.id);
        Ok(Situation {
            target_present: present,
            is_file: replica.is_file(),
            can_clone,
            target_known: !self.options.rescan && self.target_is_proven(target)?,
            state_free_bytes: free(&**replica.state_dir())?,
            target_free_bytes: match replica.target_dir() {
                Some(dir) => free(&**dir)?,
                None => 0,
            },
        })
    }

    /// Scans, stages, prepares, commits.
    fn execute(mut self, target: &mut Target, choice: &Choice) -> Result<Receipt> {
        let files = self.point_files(target, choice)?;
        let device = target.replica.target();
        let resuming = target.replica.unfinished().is_some();
        let plan = self.plan(choice);
        let limit = plan.log_limit_bytes;
        let point_before = target.replica.point().map(|p| p.id);
        let mut handle = if resuming {
            LogHandle::Open(Box::new(
                target
                    .replica
                    .resume_from(limit, &self.stamp)
                    .map_err(|e| Error::log("resume the session", e))?,
            ))
        } else {
            LogHandle::Idle(&mut target.replica, plan)
        };
        let target_size = device.as_ref().map(|d| d.size_bytes());
        let writes_blocks = writes_blocks(choice);
        if writes_blocks || (files.is_file && target_size != Some(self.geometry.image_bytes())) {
            handle.session()?;
        }
        let outcome = self.scan_until_prepared(&mut handle, choice, files, device);
        let (recorded, prepared) = match outcome {
            Ok(done) => done,
            Err(error) => return Err(self.stop(handle, error)),
        };
        if !prepared {
            drop(handle);
            return self.identical(target, choice, recorded);
        }
        let root = recorded.root;
        let session = handle.into_session()?;
        let totals = session.totals();
        let strategy = session.strategy();
        let start = self.context.clock.now();
        let context = self.context;
        context.progress(Phase::Applying, 0, totals.live_bytes, totals.live_bytes);
        let applied = session
            .commit(root, &|done, total| {
                context.progress(Phase::Applying, done, total, total);
            })
            .map_err(|e| Error::log("commit and apply", e))?;
        self.time("applying", start);
        let choice = Choice {
            strategy,
            ..choice.clone()
        };
        let mut receipt = self.receipt(
            target,
            &choice,
            Some(strategy),
            root,
            applied.point,
            totals,
            applied.proven_bytes,
        );
        receipt.previous_point = point_before.map(|p| p.to_string());
        Ok(receipt)
    }

    /// Closes the group under way, so that what was staged is durable, and says whether it resumes.
    fn stop(&self, handle: LogHandle<'_>, error: Error) -> Error {
        let LogHandle::Open(mut session) = handle else {
            return error;
        };
        // The group is closed whatever ended the run; if the log itself failed, its last acknowledgement counts.
        let durable = session
            .close_group()
            .unwrap_or_else(|_dead| session.checkpoint());
        error.resumable(durable.sequence > 0)
    }

    /// Scans until everything staged is whole on the medium. Returns the root and whether there is anything to
    /// commit.
    fn scan_until_prepared(
        &mut self,
        handle: &mut LogHandle<'_>,
        choice: &Choice,
        mut files: PointFiles,
        device: Option<Arc<dyn blockferry_device::BlockTarget>>,
    ) -> Result<(Recorded, bool)> {
        let device = device.map(|d| {
            let cancel = self.context.cancel.clone();
            Arc::new(Cancellable::new(d as Arc<dyn BlockSource>, cancel)) as Arc<dyn BlockSource>
        });
        for _ in 0..PREPARE_ATTEMPTS + DOUBTS {
            let start = self.context.clock.now();
            if let Some(device) = &device {
                self.stage_cut_off(handle, &**device)?;
            }
            let job = self.job(handle, choice, device.clone())?;
            let mut recorder = Recorder::new(self.geometry, files.open_target());
            let doubt = self.scan(handle, &job, &files, &mut recorder)?;
            self.time("scanning", start);
            self.check_source_unchanged()?;
            if let Some(doubt) = doubt {
                self.report_doubt(&doubt)?;
                files.distrust(&doubt);
                continue;
            }
            let start = self.context.clock.now();
            let recorded = recorder.finish(handle.is_open(), &files.reopener(), &mut || {
                handle.create_manifest(self.id)
            })?;
            let LogHandle::Open(session) = handle else {
                return Ok((recorded, false));
            };
            self.context
                .progress(Phase::Preparing, 0, session.totals().live_bytes, 0);
            let prepared = session.prepare().map_err(|e| Error::log("prepare", e))?;
            self.time("preparing", start);
            match prepared {
                Prepared::Complete => return Ok((recorded, true)),
                Prepared::Missing(extents) => self.warn(
                    "staged_pages_lost",
                    format!(
                        "{} staged bytes did not survive and are staged again",
                        extents.total_bytes()
                    ),
                )?,
            }
        }
        Err(Error::new(
            ErrorKind::Corruption,
            "what is staged does not survive on the medium of the log; nothing of the target was changed",
        ))
    }

    fn job(
        &self,
        handle: &LogHandle<'_>,
        choice: &Choice,
        device: Option<Arc<dyn BlockSource>>,
    ) -> Result<Job> {
        let staged: Option<Arc<StagedView>> = handle.staged_view();
        if writes_blocks(choice) {
            let stager = handle
                .stager()
                .ok_or_else(|| internal("no session to write blocks to"))?;
            let mut copying = Copying::new(Arc::clone(&self.source), self.geometry, stager);
            copying.source_unchanged = handle.source_stamp().is_some_and(|s| {
                s.evidence.proves_same(&self.stamp.evidence)
                    && s.identity.proves_same(&self.stamp.identity)
            });
            copying.staged = staged;
            copying.target = device;
            copying.limiter = self.limiter();
            return Ok(Job::Full(copying));
        }
        let device = device.ok_or_else(|| internal("a delta needs a target"))?;
        let stager = Stager::detached(self.geometry);
        let mut comparison =
            Comparison::new(Arc::clone(&self.source), device, self.geometry, stager);
        comparison.staged = staged;
        comparison.keep_old = self.options.undo == Undo::Keep && choice.strategy == Strategy::Redo;
        comparison.limiter = self.limiter();
        Ok(Job::Delta(comparison))
    }

    /// Holds all workers together to the rate asked for.
    fn limiter(&self) -> Option<RateLimiter> {
        let rate = self.options.bwlimit_bytes_per_second.filter(|r| *r > 0)?;
        let clock = Arc::clone(&self.context.clock);
        Some(RateLimiter::new(rate, clock, self.context.cancel.clone()))
    }

    /// Walks all regions once; ends early, and says why, when what was known turns out to be wrong.
    fn scan(
        &mut self,
        handle: &mut LogHandle<'_>,
        job: &Job,
        files: &PointFiles,
        recorder: &mut Recorder,
    ) -> Result<Option<Doubt>> {
        self.counts = Counts::default();
        let mut regions = job.regions(self.geometry);
        let doubts = Doubts::default();
        let mut knowledge = files.knowledge(self.geometry, self.seed(), doubts.clone());
        let cancel = self.context.cancel.clone();
        let next = move || {
            if cancel.is_cancelled() {
                return Some(Err(Error::cancelled()));
            }
            let Some(index) = regions.next() else {
                knowledge.check_whole();
                return None;
            };
            knowledge.of(index).map(|known| Ok((index, known)))
        };
        let cancel = self.context.cancel.clone();
        let walking = WalkOptions::new(job.threads(self.options));
        std::thread::scope(|scope| {
            let read_back = ReadBackThread::start(scope);
            let mut consumer = Consumer::new(self, handle, files, recorder, read_back);
            consumer.doubts = doubts.clone();
            walk(
                walking,
                next,
                JobScratch::default,
                |scratch, (region, known), emitter| {
                    job.region(region, &known, scratch, &mut |batch| {
                        if cancel.is_cancelled() {
                            return Err(blockferry_pipeline::Stopped.into());
                        }
                        emitter.emit(batch).map_err(Into::into)
                    })
                    .map_err(Error::from)
                },
                |step| consumer.take(step),
            )?;
            consumer.finish()
        })?;
        Ok(doubts.first())
    }

    fn report_doubt(&mut self, doubt: &Doubt) -> Result<()> {
        match doubt {
            Doubt::Manifest(why) => self.fall_back(
                ErrorKind::Target,
                "manifest_damaged",
                format!("the saved manifest is not used, the target is compared in full: {why}"),
            ),
            Doubt::Map { region } => self.fall_back(
                ErrorKind::Source,
                "change_map_lied",
                format!(
                    "the change map claims that a block in {region} did not change, but it did: the map is not \
                     used, both sides are compared in full"
                ),
            ),
        }
    }

    /// The tail that a smaller image cuts off: its pre-image, before anything else touches its pages.
    fn stage_cut_off(&self, handle: &mut LogHandle<'_>, device: &dyn BlockSource) -> Result<()> {
        let LogHandle::Open(session) = handle else {
            return Ok(());
        };
        let new_end = self.geometry.image_bytes();
        let cuts = session.strategy() == Strategy::Redo && session.keeps_old() && session.is_file();
        let first = new_end - new_end % blockferry_core::PAGE_BYTES;
        let old_end = device.size_bytes();
        if !cuts || old_end <= new_end || session.has_pre_image(Extent::from_range(first..old_end))
        {
            return Ok(());
        }
        let stager = session.stager();
        let mut buffer = AlignedBuffer::zeroed(usize::try_from(PIECE_BYTES).unwrap_or(usize::MAX));
        for piece in Extent::from_range(first..old_end).pieces(PIECE_BYTES) {
            let bytes = &mut buffer[..usize::try_from(piece.length()).unwrap_or(usize::MAX)];
            read_padded(device, piece, bytes)
                .map_err(|e| Error::target("read what the new size cuts off", e))?;
            let mut batch = stager.pages();
            stager.add_cut_off(&mut batch, piece, Old::Data(bytes));
            session
                .stage(batch)
                .map_err(|e| Error::log("stage what the new size cuts off", e))?;
        }
        Ok(())
    }

    /// D10: the source is what it was when the run began, or nothing is committed.
    fn check_source_unchanged(&self) -> Result<()> {
        let failed = |e| Error::source(format!("examine source {}", self.source.label()), e);
        let now = self.source.evidence().map_err(failed)?;
        let size = self.source.size_bytes();
        let moved = self.stamp.evidence.is_known() && !now.proves_same(&self.stamp.evidence);
        if !moved && size == self.geometry.image_bytes() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Source,
            format!(
                "source {} was written while it was read: what was staged is kept and compared again by the \
                 next run; nothing was committed",
                self.source.label()
            ),
        )
        .resumable(true))
    }

    /// Nothing differed: the point is recorded, the target is not touched.
    fn identical(
        self,
        target: &mut Target,
        choice: &Choice,
        recorded: Recorded,
    ) -> Result<Receipt> {
        let root = recorded.root;
        let known = target
            .replica
            .point()
            .filter(|p| p.root == root && p.geometry == self.geometry)
            .map(|p| p.id);
        let replica = &mut target.replica;
        let adopted = match known {
            Some(id) => {
                let replaced = if recorded.is_written {
                    replica.replace_manifest(self.id)
                } else {
                    Ok(())
                };
                replaced
                    .and_then(|()| replica.refresh(self.stamp.clone()))
                    .map(|()| id)
            }
            None => {
                let stamp = self.stamp.clone();
                replica
                    .adopt(self.id, root, self.geometry, stamp, unix_seconds())
                    .map(|()| self.id)
            }
        };
        let id = adopted.map_err(|e| Error::log("record the sync point", e))?;
        Ok(self.receipt(target, choice, None, root, id, SessionTotals::default(), 0))
    }

    /// What an earlier run left to know, and why it left less than hoped for.
    fn point_files(&mut self, target: &Target, choice: &Choice) -> Result<PointFiles> {
        let mut files = PointFiles {
            manifest: None,
            trust: None,
            changes: None,
            is_file: target.replica.is_file(),
        };
        let Some(point) = target.replica.point().cloned() else {
            return self.without_map(files, "the target has no sync point");
        };
        let compares = !writes_blocks(choice) && target.replica.target().is_some();
        let fits = point.geometry == self.geometry;
        files.manifest = Some(target.replica.manifest_source(&point))
            .filter(|manifest| fits && manifest.open().is_some());
        if self.options.rescan || !compares {
            return self.without_map(files, "both sides are to be read");
        }
        let is_there = files.manifest.is_some();
        let trust = ManifestTrust {
            source: self.source_is_at_point(target),
            target: self.target_is_proven(target)?,
            root: point.root,
        };
        let full = |what: &str| format!("{what}: the target is compared in full");
        if !trust.target {
            let what = "the target is not provably unwritten since its last sync point";
            self.warn("target_written", full(what))?;
        } else if !fits {
            self.warn(
                "manifest_unusable",
                full("the saved manifest has another geometry"),
            )?;
        } else if !is_there {
            self.warn("manifest_missing", full("the saved manifest is gone"))?;
        }
        files.trust = Some(trust).filter(|_| is_there);
        if !(trust.target && is_there) {
            return self.without_map(files, "the target's content is not known");
        }
        match &self.options.changes {
            Some(changes) if changes.point != point.id.to_string() => {
                self.without_map(files, "it is relative to another sync point")
            }
            Some(changes) if changes.map.image_bytes() != self.geometry.image_bytes() => {
                self.without_map(files, "it is of an image of another size")
            }
            changes => {
                files.changes = changes.as_ref().map(|c| Arc::clone(&c.map));
                Ok(files)
            }
        }
    }

    /// Losing a change map falls back to comparing, said aloud.
    fn without_map(&mut self, files: PointFiles, why: &str) -> Result<PointFiles> {
        if self.options.changes.is_some() {
            let message = format!("the change map is not used: {why}");
            self.fall_back(ErrorKind::Source, "change_map_unusable", message)?;
        }
        Ok(files)
    }

    fn plan(&self, choice: &Choice) -> Plan {
        let mut plan = Plan::new(self.id, choice.strategy, self.geometry, self.stamp.clone());
        plan.mode = choice.mode.code();
        plan.undo = if self.options.in_place {
            Undo::None
        } else {
            self.options.undo
        };
        plan.started_unix = unix_seconds();
        plan.log_limit_bytes = self.options.log_limit_bytes.unwrap_or(u64::MAX);
        plan
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "a receipt has many parts and one maker"
    )]
    fn receipt(
        &self,
        target: &Target,
        choice: &Choice,
        strategy: Option<Strategy>,
        root: Root,
        point: SessionId,
        totals: SessionTotals,
        proven_bytes: u64,
    ) -> Receipt {
        let stats = target.replica.stats();
        let compared = !writes_blocks(choice);
        Receipt {
            version: RECEIPT_VERSION,
            outcome: if strategy.is_some() {
                "applied"
            } else {
                "identical"
            },
            mode: choice.mode,
            requested_mode: self.options.mode,
            strategy,
            reason: choice.reason.clone(),
            source: self.stamp.address.clone(),
            target: self.target.clone(),
            consistency: None,
            source_bytes: self.geometry.image_bytes(),
            scanned_bytes: self.counts.source_read,
            target_read_bytes: self.counts.target_read,
            changed_bytes: compared.then_some(totals.live_bytes + totals.live_zero_bytes),
            sent_bytes: totals.staged_bytes,
            staged_bytes: totals.staged_bytes,
            resumed_bytes: totals.resumed_bytes,
            restaged_bytes: totals.restaged_bytes,
            log_bytes: stats.log_bytes(),
            zero_bytes: totals.zero_bytes,
            proven_bytes,
            source_root: root.to_string(),
            target_root: root.to_string(),
            sync_point: point.to_string(),
            previous_point: None,
            rollback_available: target.replica.retained().is_some(),
            flushes: stats.flushes() - self.flushes_before,
            records: stats.records(),
            fallbacks: self.fallbacks.clone(),
            elapsed_seconds: self.elapsed(self.started),
            downtime_seconds: None,
            phases: self.phases.clone(),
        }
    }

    fn warn(&mut self, code: &'static str, message: String) -> Result<()> {
        self.fall_back(ErrorKind::Target, code, message)
    }

    /// Something that goes on, but not as hoped; an error of this kind where fallbacks are.
    fn fall_back(&mut self, kind: ErrorKind, code: &'static str, message: String) -> Result<()> {
        if self.options.strict {
            return Err(Error::new(
                kind,
                format!("{message} (an error with --strict)"),
            ));
        }
        self.fallbacks.push(message.clone());
        self.say(&Event::Warning { code, message });
        Ok(())
    }

    fn say(&self, event: &Event) {
        self.context.observer.event(event);
    }

    fn time(&mut self, phase: &str, start: Duration) {
        *self.phases.entry(phase.to_owned()).or_default() += self.elapsed(start);
    }

    fn elapsed(&self, start: Duration) -> f64 {
        self.context.clock.now().saturating_sub(start).as_secs_f64()
    }
}

/// Full downloads, and deltas into a shadow, write whole blocks without comparing.
fn writes_blocks(choice: &Choice) -> bool {
    choice.mode == Mode::Full || choice.strategy == Strategy::Shadow
}

/// The calling thread of a walk: stages batches, closes groups, records leaves, reports progress.
struct Consumer<'c, 'r, 'a> {
    run: &'c mut Run<'a>,
    handle: &'c mut LogHandle<'r>,
    files: &'c PointFiles,
    recorder: &'c mut Recorder,
    group_since: Option<Duration>,
    read_back: ReadBackThread,
    doubts: Doubts,
}

impl<'c, 'r, 'a> Consumer<'c, 'r, 'a> {
    fn new(
        run: &'c mut Run<'a>,
        handle: &'c mut LogHandle<'r>,
        files: &'c PointFiles,
        recorder: &'c mut Recorder,
        read_back: ReadBackThread,
    ) -> Self {
        Self {
            run,
            handle,
            files,
            recorder,
            group_since: None,
            read_back,
            doubts: Doubts::default(),
        }
    }

    fn take(&mut self, step: Step<Batch, RegionDone>) -> Result<()> {
        match step {
            Step::Part(batch) => self.stage(batch)?,
            Step::Done(done) => self.record(&done)?,
            Step::Tick => {}
        }
        self.close_group_if_due()
    }

    fn stage(&mut self, batch: Batch) -> Result<()> {
        let session = self.handle.session()?;
        session.stage(batch).map_err(|e| Error::log("stage", e))?;
        self.group_since.get_or_insert(self.run.context.clock.now());
        Ok(())
    }

    fn record(&mut self, done: &RegionDone) -> Result<()> {
        let counts = &mut self.run.counts;
        counts.source_read += done.source_read_bytes;
        counts.target_read += done.target_read_bytes;
        counts.changed += done.changed_bytes;
        let region = self.run.geometry.region_extent(done.leaves.region());
        // Regions come in order; those passed over were zero on both sides.
        counts.done = region.end();
        if done.lies > 0 {
            self.doubts.raise(Doubt::Map { region });
        }
        let (done_bytes, changed) = (counts.done, counts.changed);
        let total = self.run.geometry.image_bytes();
        self.run
            .context
            .progress(Phase::Scanning, done_bytes, total, changed);
        let id = self.run.id;
        let handle = &mut *self.handle;
        self.recorder
            .push(&done.leaves, &self.files.reopener(), &mut || {
                handle.create_manifest(id)
            })
    }

    /// Takes the verdict on every group that was handed out.
    fn finish(self) -> Result<()> {
        match &mut *self.handle {
            LogHandle::Open(session) => self.read_back.collect(session, Collect::All),
            LogHandle::Idle(..) | LogHandle::Failed => Ok(()),
        }
    }

    fn close_group_if_due(&mut self) -> Result<()> {
        let LogHandle::Open(session) = &mut *self.handle else {
            return Ok(());
        };
        let Some(since) = self.group_since else {
            return Ok(());
        };
        let waited = self.run.context.clock.now().saturating_sub(since);
        if !session.group_is_full() && waited < GROUP_TIME {
            return Ok(());
        }
        self.group_since = None;
        let checkpoint = session
            .close_group()
            .map_err(|e| Error::log("close a group", e))?;
        if let Some(task) = session
            .read_back_task()
            .map_err(|e| Error::log("read back", e))?
        {
            self.read_back.run(task);
        }
        self.read_back.collect(session, Collect::Finished)?;
        self.run.say(&Event::Checkpoint {
            sequence: checkpoint.sequence,
            durable_bytes: checkpoint.log_bytes,
        });
        Ok(())
    }
}

/// A new id for a session and its point.
pub(crate) fn random_id() -> Result<SessionId> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|e| Error::new(ErrorKind::Internal, format!("draw a session id: {e}")))?;
    Ok(SessionId::from_bytes(bytes))
}

fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

fn internal(message: &str) -> Error {
    Error::new(ErrorKind::Internal, message)
}
