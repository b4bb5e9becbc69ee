//! The calling thread of a walk: stages batches, closes groups, records leaves, reports progress.

use std::time::Duration;

use blockferry_pipeline::{Event, Phase, Step};
use blockferry_transfer_log::Batch;

use super::Run;
use crate::error::{Error, Result};
use crate::handle::{LogHandle, PointFiles};
use crate::job::RegionDone;
use crate::knowledge::{Doubt, Doubts};
use crate::read_back::{Collect, ReadBackThreads};
use crate::recorder::Recorder;

/// A group is closed after this long, so that a kill loses little.
const GROUP_TIME: Duration = Duration::from_millis(500);

/// The calling thread of a walk: stages batches, closes groups, records leaves, reports progress.
pub(super) struct Consumer<'c, 'r, 'a> {
    run: &'c mut Run<'a>,
    handle: &'c mut LogHandle<'r>,
    files: &'c PointFiles,
    recorder: &'c mut Recorder,
    group_since: Option<Duration>,
    read_back: ReadBackThreads,
    doubts: Doubts,
}

impl<'c, 'r, 'a> Consumer<'c, 'r, 'a> {
    pub(super) fn new(
        run: &'c mut Run<'a>,
        handle: &'c mut LogHandle<'r>,
        files: &'c PointFiles,
        recorder: &'c mut Recorder,
        read_back: ReadBackThreads,
        doubts: Doubts,
    ) -> Self {
        Self {
            run,
            handle,
            files,
            recorder,
            group_since: None,
            read_back,
            doubts,
        }
    }

    pub(super) fn take(&mut self, step: Step<Batch, RegionDone>) -> Result<()> {
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
    pub(super) fn finish(self) -> Result<()> {
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
