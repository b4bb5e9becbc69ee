//! Scanning and staging, again and again, until everything staged is whole on the medium of the log.

use std::sync::Arc;

use blockferry_core::{Extent, PAGE_BYTES};
use blockferry_delta_sync::Comparison;
use blockferry_device::{AlignedBuffer, BlockSource, BlockTarget, Cancellable, RateLimiter};
use blockferry_full_download::Copying;
use blockferry_pipeline::{PIECE_BYTES, Phase, Stopped, WalkOptions, read_padded, walk};
use blockferry_transfer_log::{Lost, Old, Prepared, StagedView, Stager, Strategy, Undo};

use super::consumer::Consumer;
use super::origin::Origin;
use super::{Counts, Run, internal, writes_blocks};
use crate::error::{Error, ErrorKind, Result};
use crate::handle::{LogHandle, PointFiles};
use crate::job::{Job, JobScratch};
use crate::knowledge::{Doubt, Doubts};
use crate::plan::Choice;
use crate::read_back::ReadBackThreads;
use crate::recorder::{Recorded, Recorder};
use crate::remote::{Peer, Scanned, TargetSide};

/// How often staged pages may turn out not to have survived on the medium: another time would be no better.
const MOST_LOSSES: u32 = 3;
/// How often what was known may turn out wrong: a change map once, a manifest once, and shortened digests once.
const MOST_DOUBTS: u32 = 3;

impl Run<'_> {
    /// Scans until everything staged is whole on the medium. Returns the root and whether there is anything to
    /// commit.
    pub(super) fn scan_until_prepared(
        &mut self,
        handle: &mut LogHandle<'_>,
        choice: &Choice,
        mut files: PointFiles,
        device: Option<Arc<dyn BlockTarget>>,
    ) -> Result<(Recorded, bool)> {
        let device = device.map(|d| {
            let cancel = self.context.cancel.clone();
            Arc::new(Cancellable::new(d as Arc<dyn BlockSource>, cancel)) as Arc<dyn BlockSource>
        });
        let (mut losses, mut doubts) = (0, 0);
        loop {
            let start = self.context.clock.now();
            if let Some(device) = &device {
                self.stage_cut_off(handle, &**device)?;
            }
            let mut recorder = Recorder::new(self.geometry, files.open_target());
            let doubt = match self.origin.clone() {
                Origin::Device(source) => {
                    let job = self.job(source, handle, choice, device.clone())?;
                    self.scan(handle, &job, &files, &mut recorder)?
                }
                Origin::Peer(peer) => {
                    let side = self.target_side(handle, choice, device.clone())?;
                    self.scan_with(&peer, &side, handle, &files, &mut recorder)?
                }
            };
            self.time("scanning", start);
            self.check_source_unchanged()?;
            self.ask_check()?;
            if let Some(doubt) = doubt {
                doubts += 1;
                if doubts > MOST_DOUBTS {
                    return Err(internal("what is not relied on any more was doubted again"));
                }
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
                Prepared::Missing(lost) => {
                    losses += 1;
                    if losses == MOST_LOSSES {
                        return Err(does_not_survive(lost));
                    }
                    self.warn(
                        "staged_pages_lost",
                        format!(
                            "{} staged bytes did not survive and are staged again",
                            lost.extents.total_bytes()
                        ),
                    )?;
                }
            }
        }
    }

    fn job(
        &self,
        source: Arc<dyn BlockSource>,
        handle: &LogHandle<'_>,
        choice: &Choice,
        device: Option<Arc<dyn BlockSource>>,
    ) -> Result<Job> {
        let staged: Option<Arc<StagedView>> = handle.staged_view();
        let stager = self.stager(handle, choice)?;
        if writes_blocks(choice) {
            let mut copying = Copying::new(source, self.geometry, stager);
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
        let mut comparison = Comparison::new(source, device, self.geometry, stager);
        comparison.staged = staged;
        comparison.keep_old = self.keeps_old(choice);
        comparison.limiter = self.limiter();
        Ok(Job::Delta(comparison))
    }

    /// What takes the pages or blocks. A delta begins its session only with the first page that differs.
    fn stager(&self, handle: &LogHandle<'_>, choice: &Choice) -> Result<Stager> {
        if !writes_blocks(choice) {
            return Ok(Stager::detached(self.geometry));
        }
        let stager = handle.stager();
        stager.ok_or_else(|| internal("no session to write blocks to"))
    }

    /// What brings the target to a source on another machine.
    fn target_side(
        &self,
        handle: &LogHandle<'_>,
        choice: &Choice,
        device: Option<Arc<dyn BlockSource>>,
    ) -> Result<TargetSide> {
        Ok(TargetSide {
            target: device,
            geometry: self.geometry,
            stager: self.stager(handle, choice)?,
            writes_blocks: writes_blocks(choice),
            staged: handle.staged_view(),
            keep_old: self.keeps_old(choice),
            limiter: self.limiter(),
        })
    }

    /// Whether the pages that are replaced go to the log.
    fn keeps_old(&self, choice: &Choice) -> bool {
        self.options.undo == Undo::Keep && choice.strategy == Strategy::Redo
    }

    /// Scans once with the source's side; ends early, and says why, when what was known turns out to be wrong.
    fn scan_with(
        &mut self,
        peer: &Peer,
        side: &TargetSide,
        handle: &mut LogHandle<'_>,
        files: &PointFiles,
        recorder: &mut Recorder,
    ) -> Result<Option<Doubt>> {
        self.counts = Counts::default();
        let doubts = Doubts::default();
        let mut knowledge = files.knowledge(self.geometry, self.seed(), doubts.clone());
        let (threads, context) = (self.options.threads(), self.context);
        let scanned = std::thread::scope(|scope| {
            let read_back = ReadBackThreads::start(scope);
            let mut consumer =
                Consumer::new(self, handle, files, recorder, read_back, doubts.clone());
            let scanned = side.scan(
                peer,
                files.exact,
                threads,
                context,
                &mut knowledge,
                &mut |step| consumer.take(step),
            )?;
            knowledge.check_whole();
            consumer.finish()?;
            Ok::<_, Error>(scanned)
        })?;
        let mistaken = match scanned {
            Scanned::Whole { source_read_bytes } => {
                self.counts.source_read = source_read_bytes;
                None
            }
            Scanned::Again => Some(Doubt::Digests),
        };
        Ok(doubts.first().or(mistaken))
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
            let read_back = ReadBackThreads::start(scope);
            let mut consumer =
                Consumer::new(self, handle, files, recorder, read_back, doubts.clone());
            walk(
                walking,
                next,
                JobScratch::default,
                |scratch, (region, known), emitter| {
                    job.region(region, &known, scratch, &mut |batch| {
                        if cancel.is_cancelled() {
                            return Err(Stopped.into());
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
            Doubt::Digests => self.fall_back(
                ErrorKind::Peer,
                "digests_mistaken",
                "a shortened digest of the other side was taken for another: both sides are compared again with \
                 whole ones"
                    .to_owned(),
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
        let first = new_end - new_end % PAGE_BYTES;
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
        let now = self.origin.look()?;
        let size = now.size_bytes;
        let known = self.stamp.evidence.is_known();
        let moved = known && !now.evidence.proves_same(&self.stamp.evidence);
        if !moved && size == self.geometry.image_bytes() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Source,
            format!(
                "source {} was written while it was read: what was staged is kept and compared again by the \
                 next run; nothing was committed",
                now.label
            ),
        )
        .resumable(true))
    }

    /// What only the caller can know of the source, which is not read any more.
    pub(super) fn ask_check(&self) -> Result<()> {
        let Some(check) = &self.options.check else {
            return Ok(());
        };
        check.ask().map_err(|cause| {
            let address = &self.stamp.address;
            let text = format!(
                "source {address}: what was read is no point any more; nothing was committed"
            );
            Error::source(text, cause).resumable(true)
        })
    }
}

fn does_not_survive(lost: Lost) -> Error {
    let bytes = lost.extents.total_bytes();
    Error::because(
        ErrorKind::Corruption,
        format!(
            "read back what was staged: {bytes} bytes did not survive on their medium in {MOST_LOSSES} attempts; \
             nothing of the target was changed"
        ),
        lost.cause,
    )
}
