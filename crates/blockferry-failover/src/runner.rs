//! Works on one job: passes, cutover, commit, roll back. Whatever it begins is durable in the job's state before.

use std::iter;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockferry_core::{BlockSize, ExtentSet};
use blockferry_device::{
    CancelToken, Consistency, Error as DeviceError, ErrorKind as DeviceErrorKind, LockGuard,
    OsDirectory,
};
use blockferry_engine::{
    ChangesSince, Context, GroupDirectory, Member, Mode, PointStatus, SyncOptions, Target, Undo,
    accept, drop_anchor, forget, keep_anchor, return_to_anchor, status, sync_group,
};
use blockferry_nbd::open_overlay;
use blockferry_pipeline::Event;
use blockferry_qemu::Layers;

use crate::changes::{changed_extents, with_extents};
use crate::convergence::{Next, Pass, next, predicted_downtime, time_left};
use crate::error::{Error, ErrorKind, Result};
use crate::hooks;
use crate::jobs::{JobContext, Told, Until, refused};
use crate::overlay;
use crate::source::{Cut, CutSource, Live, Sent, Source, SourceMachine};
use crate::spec::{HandOverBy, QuiesceBy};
use crate::state::{Input, Recovery, State};
use crate::store::{JobRecord, Origin, Request, Store, now_ms};

/// How often requests of other processes are looked for.
pub(crate) const TICK: Duration = Duration::from_millis(100);
/// How much longer than the budget a machine on another host waits to be held or let go, before it goes on by itself.
const GOING_ON: Duration = Duration::from_secs(1);
/// For the memory of a guest to travel.
const SENDING: Duration = Duration::from_secs(600);
/// How long sending the rest of it may take while the guest stands still.
const REST: Duration = Duration::from_millis(20);
/// So long before all memory was sent once the disks are copied once more.
const CLOSE: Duration = Duration::from_millis(150);
/// For so long that pass is a fresh one; each further one for twice as long.
const FRESH: Duration = Duration::from_secs(2);
const SHORT_TICK: Duration = Duration::from_millis(2);
/// For a guest to go on in the replica, where the source did not hear that it does.
const ARRIVING: Duration = Duration::from_secs(2);
/// A way to another host is given up when nothing came over it for so long.
const PATIENCE: Duration = Duration::from_secs(600);
/// The same, where a source is to be let go.
const UNDOING: Duration = Duration::from_secs(60);
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
const SCHEME: &str = "failover://";
/// A time at which only requests without one are due.
const CANCELS_ONLY: i64 = 0;

/// A job that this process works on.
#[derive(Debug)]
pub(crate) struct Runner<'s> {
    store: &'s mut Store,
    job: JobRecord,
    path: PathBuf,
    groups: GroupDirectory,
    context: JobContext,
    source: Box<dyn SourceMachine>,
    /// Of a job that leads back: what its targets are, unless somebody wrote them meanwhile.
    origins: Vec<Origin>,
    /// Open while they are worked on; closed by any failure.
    targets: Vec<Target>,
    /// When the last cut was made.
    last_cut: Option<Instant>,
    /// How often what was staged became durable: more of it came over.
    checkpoints: Arc<AtomicU64>,
    _lock: Box<dyn LockGuard>,
}

impl<'s> Runner<'s> {
    pub(crate) fn new(
        store: &'s mut Store,
        job: JobRecord,
        path: PathBuf,
        directory: Arc<OsDirectory>,
        lock: Box<dyn LockGuard>,
        context: JobContext,
    ) -> Result<Self> {
        let source = context.machine_of(&job.spec, &path)?;
        let origins = match job.leads_back() {
            true => store.origins(job.id)?,
            false => Vec::new(),
        };
        Ok(Self {
            store,
            job,
            path,
            groups: GroupDirectory::new(directory),
            context,
            source,
            origins,
            targets: Vec::new(),
            last_cut: None,
            checkpoints: Arc::default(),
            _lock: lock,
        })
    }

    /// Copies passes, and refreshes until the job is cut over or cancelled.
    pub(crate) fn run(mut self, until: Until) -> Result<State> {
        self.recover()?;
        refused(&self.job, Input::PassBegins)?;
        self.source.reach()?;
        self.keep_anchors()?;
        loop {
            self.persist(PATIENCE, Self::live_pass)?;
            match next(&self.passes()?, self.job.spec.downtime_budget) {
                Next::Again => {
                    if self.is_cancelled_by_request()? {
                        return self.cancel_now();
                    }
                    continue;
                }
                Next::Ready => {
                    self.store.note_problem(self.job.id, None)?;
                    self.step(Input::Converged, "the last pass would fit the budget")?;
                }
                Next::Diverging(why) => {
                    self.warn("diverging", why.clone());
                    self.store.note_problem(self.job.id, Some(&why))?;
                    self.step(Input::Converged, "more passes bring nothing")?;
                }
            }
            if until == Until::Ready {
                return Ok(self.job.state);
            }
            if let Some(state) = self.wait_until_refresh()? {
                return Ok(state);
            }
        }
    }

    /// Does what fails because of the way to another host again and again, until `patience` has passed in which nothing
    /// came over it.
    fn persist(
        &mut self,
        patience: Duration,
        mut act: impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let (mut since, mut wait) = (Instant::now(), FIRST_WAIT);
        loop {
            let before = self.checkpoints.load(Ordering::Relaxed);
            let error = match act(self) {
                Err(error) if error.kind() == ErrorKind::Peer => error,
                outcome => return outcome,
            };
            // What else was opened over it is of no use any more.
            self.source.release();
            if self.checkpoints.load(Ordering::Relaxed) != before {
                (since, wait) = (Instant::now(), FIRST_WAIT);
            }
            if since.elapsed() >= patience {
                return Err(error);
            }
            let text = format!("{}; trying again in {} s", error.in_full(), wait.as_secs());
            self.warn("reconnecting", text);
            self.rest(wait);
            wait = (2 * wait).min(LONGEST_WAIT);
        }
    }

    /// Ends early when the work is cancelled meanwhile.
    fn rest(&self, time: Duration) {
        let cancel = &self.context.cancel;
        let (end, was_cancelled) = (Instant::now() + time, cancel.is_cancelled());
        while Instant::now() < end && cancel.is_cancelled() == was_cancelled {
            std::thread::sleep(TICK);
        }
    }

    /// What is to be cut over waits until the job is ready.
    fn is_cancelled_by_request(&mut self) -> Result<bool> {
        let taken = self.store.take_request(self.job.id, CANCELS_ONLY)?;
        Ok(taken == Some(Request::Cancel))
    }

    /// Waits for the time of the next pass; a request may come first, after which the job may be at an end.
    fn wait_until_refresh(&mut self) -> Result<Option<State>> {
        self.source.release();
        let end = Instant::now() + self.job.spec.refresh;
        while Instant::now() < end {
            self.check_cancelled()?;
            match self.store.take_request(self.job.id, now_ms())? {
                Some(Request::Cancel) => return self.cancel_now().map(Some),
                Some(Request::Complete(_)) => match self.cut_over() {
                    Ok(state) => return Ok(Some(state)),
                    Err(error) => self.outlive(&error)?,
                },
                None => std::thread::sleep(TICK),
            }
        }
        Ok(None)
    }

    /// A cutover that failed leaves the job live: whoever asked for it reads why, and passes go on.
    fn outlive(&mut self, error: &Error) -> Result<()> {
        let why = error.in_full();
        self.warn("cutover_failed", why.clone());
        self.store.note_problem(self.job.id, Some(&why))?;
        match self.job.state {
            state if state.is_live() => Ok(()),
            state => Err(Error::new(
                error.kind(),
                format!("the cutover stopped at {state}: {why}"),
            )),
        }
    }

    /// Cuts over, here.
    pub(crate) fn complete(mut self, at_ms: i64) -> Result<State> {
        self.recover()?;
        if self.job.state == State::CommitPending {
            return Ok(self.job.state);
        }
        refused(&self.job, Input::CutoverBegins)?;
        while at_ms > now_ms() {
            self.check_cancelled()?;
            std::thread::sleep(TICK);
        }
        self.cut_over()
    }

    /// The source is gone: its replica starts from the last pass. Whoever says so while it answers is not believed.
    pub(crate) fn do_without_source(mut self) -> Result<State> {
        if self.job.state == State::CommitPending {
            return Ok(self.job.state);
        }
        if self.source.reach().is_ok() {
            let text = format!(
                "job {}: its source answers: cut it over, so that nothing is missing",
                self.job.name
            );
            return Err(Error::new(ErrorKind::Refused, text));
        }
        // Where it was being stopped, a last pass may be on the targets or not: they are at one moment in any case.
        if !matches!(self.job.state, State::Fencing | State::Starting) {
            if self.job.state.after_a_crash() == Recovery::ResumeSource {
                self.step_until_syncing()?;
            }
            refused(&self.job, Input::SourceLost)?;
            if self.open_targets()?.iter().any(Option::is_none) {
                let text = format!("job {}: no pass was copied whole yet", self.job.name);
                return Err(Error::new(ErrorKind::Refused, text));
            }
            self.step(
                Input::SourceLost,
                "the source is gone: what it wrote since the last pass is lost",
            )?;
        }
        if self.job.spec.hooks.fence_source.is_empty() {
            let text = "nothing keeps the source from coming back: there is no fence-source hook";
            self.warn("not_fenced", text.to_owned());
        }
        // Its memory is gone with it.
        self.fence_and_start(None)?;
        Ok(self.job.state)
    }

    /// Out of a cutover that was cut short, of a source that nobody can let go any more.
    fn step_until_syncing(&mut self) -> Result<()> {
        if self.job.state != State::Aborting {
            self.step(Input::StepFailed, "the cutover was cut short")?;
        }
        self.step(Input::StepDone, "there is no source to let go")
    }

    /// After a fresh pass, which keeps the last one small and tells how long the source would stand still.
    fn cut_over(&mut self) -> Result<State> {
        refused(&self.job, Input::CutoverBegins)?;
        self.live_pass()?;
        self.step(Input::Converged, "a fresh pass was copied")?;
        self.check_budget()?;
        self.source.make_ready()?;
        self.step(Input::CutoverBegins, "the source is being stopped")?;
        let began = match self.stop_and_copy() {
            Ok(began) => began,
            Err(error) => return Err(self.abort(error)),
        };
        self.go_forward(Some(began))?;
        let downtime = began.elapsed().as_secs_f64();
        self.store.note_downtime(self.job.id, downtime)?;
        Ok(self.job.state)
    }

    fn check_budget(&mut self) -> Result<()> {
        let budget = self.job.spec.downtime_budget.as_secs_f64();
        let passes = self.passes()?;
        match predicted_downtime(&passes, 0.0) {
            Some(predicted) if predicted > budget => Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "job {}: the source would stand still for about {predicted:.2} s, and the budget is {budget:.2} s; \
                     nothing was stopped",
                    self.job.name
                ),
            )),
            _ => Ok(()),
        }
    }

    /// From the running source to targets that hold its last cut; within the budget, or not at all. Returns when the
    /// source came to stand still: a guest that shuts down serves until it has.
    fn stop_and_copy(&mut self) -> Result<Instant> {
        let budget = self.job.spec.downtime_budget;
        let mut began = Instant::now();
        let (consistency, warnings) = if self.is_warm() {
            began = self.send_memory()?;
            (Consistency::Crash, Vec::new())
        } else {
            let stopped = self.source.quiesce(budget + GOING_ON)?;
            if self.job.spec.machine.quiesce == QuiesceBy::PowerDown {
                began = Instant::now();
            }
            stopped
        };
        for warning in warnings {
            self.warn("not_quiesced", warning);
        }
        self.step(Input::StepDone, "the source is stopped")?;
        let alarm = Alarm::set(began + budget, self.context.cancel.clone());
        let done = self.pass(&alarm.token, |source, number| {
            source.cut_at_rest(number, consistency)
        });
        match done {
            Err(error) if error.kind() == ErrorKind::Cancelled && alarm.rang() => {
                Err(self.over_budget("the last pass took too long"))
            }
            Err(error) => Err(error),
            Ok(()) => {
                // Before it is recorded that the replica may start: one of both stands still at any time.
                self.source.hold()?;
                self.step(Input::StepDone, "the targets hold the last cut")?;
                Ok(began)
            }
        }
    }

    fn is_warm(&self) -> bool {
        self.job.spec.hand_over == HandOverBy::Warm
    }

    /// The replica's machine waits for the memory of the guest, which travels while it runs. Returns once it stands still
    /// and only the rest of it is missing: when it was last known to run.
    fn send_memory(&mut self) -> Result<Instant> {
        let mut replica = self.replica()?;
        let way = self.job.spec.reverse.as_ref();
        let named = way.and_then(|way| way.machine.memory.clone());
        let uri = named.unwrap_or_else(|| format!("unix:{}", self.path.join("memory").display()));
        self.make_overlays()?;
        let hook = self.job.spec.hooks.start_target.clone();
        let waiting = [("BLOCKFERRY_HAND_OVER".to_owned(), "warm".to_owned())];
        self.run_hook("start-target", &hook, &waiting, &self.context.cancel)?;
        replica.receive_memory(&uri)?;
        let budget = self.job.spec.downtime_budget;
        self.source
            .send_memory(&uri, REST.min(budget / 2), budget + GOING_ON)?;
        let began = Instant::now();
        let (mut running, mut all) = (began, 0);
        // Disks lack more and more while memory takes its time.
        let (mut next_pass, mut fresh_for) = (None, FRESH);
        loop {
            let asked = Instant::now();
            let Sent::Running(remaining) = self.source.sent()? else {
                return Ok(running);
            };
            running = asked;
            all = all.max(remaining.unwrap_or(0));
            let is_due = match (next_pass, remaining) {
                (Some(next), _) => asked >= next,
                (None, Some(remaining)) => time_left(all, remaining, began.elapsed()) <= CLOSE,
                (None, None) => false,
            };
            if is_due {
                running = self.pass_beside_memory()?.unwrap_or(running);
                next_pass = Some(Instant::now() + fresh_for);
                fresh_for *= 2;
            }
            self.check_cancelled()?;
            if began.elapsed() >= SENDING {
                let text = format!(
                    "job {}: the guest changes its memory faster than it travels: it was sent for {} s",
                    self.job.name,
                    SENDING.as_secs()
                );
                return Err(Error::new(ErrorKind::Refused, text));
            }
            std::thread::sleep(SHORT_TICK);
        }
    }

    /// So that the disks lack little when the guest comes to stand still. Returns when it was known to run after that, if it
    /// was.
    fn pass_beside_memory(&mut self) -> Result<Option<Instant>> {
        self.source.hold_memory_back(true)?;
        let token = self.context.cancel.clone();
        self.pass(&token, |source, number| source.cut(number, Live::AsItIs))?;
        self.source.make_ready()?;
        let asked = Instant::now();
        let runs = self.source.sent()? != Sent::Standing;
        self.source.hold_memory_back(false)?;
        Ok(runs.then_some(asked))
    }

    /// The machine of the replica.
    fn replica(&self) -> Result<Source> {
        let way = self.job.spec.reversed().ok_or_else(|| {
            let text = format!(
                "job {}: it says nothing of the machine of the replica: expected [reverse] in its file",
                self.job.name
            );
            Error::new(ErrorKind::Refused, text)
        })?;
        Ok(Source::new(&way, &self.path, None))
    }

    fn replica_has_the_guest(&self) -> bool {
        let replica = self.replica().ok().filter(|_| self.is_warm());
        replica.is_some_and(|mut replica| replica.runs().is_ok_and(|runs| runs))
    }

    /// The guest goes on in the machine of the replica, unless it does already, as it may if it was not stopped just now. From
    /// there on nothing leads back by itself: it may have acknowledged something.
    fn hand_over(&mut self, stopped_now: bool) -> Result<()> {
        if self.job.state == State::Fencing {
            self.step(Input::StepDone, "the guest is being handed over")?;
        }
        self.targets.clear();
        if (stopped_now || !self.replica_has_the_guest())
            && let Err(error) = self.source.hand_over()
        {
            // It may have gone over all the same.
            self.rest(ARRIVING);
            match (self.replica_has_the_guest(), error.kind()) {
                (true, _) => {}
                (false, ErrorKind::Peer) => {
                    let text = "which machine has the guest is not known: started again, the job finds out";
                    return Err(Error::because(ErrorKind::Peer, text, error));
                }
                (false, _) => return Err(self.abort(error)),
            }
        }
        let mut replica = self.replica()?;
        let hook = self.job.spec.hooks.fence_source.clone();
        let finished = replica
            .wait_until_it_runs()
            .and_then(|()| self.hook("fence-source", &hook));
        finished.map_err(|error| {
            let text = "the guest was handed over; started again, the job goes on from here";
            Error::because(error.kind(), text, error)
        })?;
        self.step(
            Input::StepDone,
            "the guest goes on in the replica: commit it, or roll back",
        )
    }

    /// On to the replica. Does again what a crash may have cut short.
    fn go_forward(&mut self, since: Option<Instant>) -> Result<()> {
        match self.is_warm() {
            true => self.hand_over(since.is_some()),
            false => self.fence_and_start(since),
        }
    }

    /// Of a source that stands still `since` then, if anybody waits for it: its fence is not to take longer than what the budget
    /// left.
    fn fence_and_start(&mut self, since: Option<Instant>) -> Result<()> {
        if self.job.state == State::Fencing {
            let hook = self.job.spec.hooks.fence_source.clone();
            let end = since.map(|since| since + self.job.spec.downtime_budget);
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if let Err(error) = self.hook_within("fence-source", &hook, left) {
                return Err(self.abort(error));
            }
            self.step(Input::StepDone, "the source is fenced")?;
        }
        if let Err(error) = self.start_replica() {
            return Err(self.abort(error));
        }
        self.step(
            Input::StepDone,
            "the replica may be used: commit it, or roll back",
        )
    }

    fn start_replica(&mut self) -> Result<()> {
        self.targets.clear();
        self.make_overlays()?;
        let hook = self.job.spec.hooks.start_target.clone();
        self.hook("start-target", &hook)
    }

    fn make_overlays(&self) -> Result<()> {
        let mut disks = self.job.spec.disk.iter().enumerate();
        disks.try_for_each(|(index, disk)| {
            overlay::create(&overlay::path(&self.path, index), &disk.target)
        })
    }

    /// Lets the source go on; the targets are at a consistent point, the last cut or the one before.
    fn abort(&mut self, error: Error) -> Error {
        let state = self.job.state;
        let undone = self
            .step(
                Input::StepFailed,
                "the cutover failed: the source is let go",
            )
            .and_then(|()| self.back_to_the_source());
        match undone {
            Ok(()) => Error::because(
                error.kind(),
                format!("the cutover failed at {state}, the source goes on"),
                error,
            ),
            Err(stuck) => Error::because(
                stuck.kind(),
                format!(
                    "the cutover failed at {state} ({}), and the source could not be let go: {}",
                    error.in_full(),
                    stuck.in_full()
                ),
                stuck,
            ),
        }
    }

    /// From a state in which nothing but this may follow: the source runs before that is recorded.
    fn back_to_the_source(&mut self) -> Result<()> {
        self.targets.clear();
        let hooks = self.job.spec.hooks.clone();
        if overlay::path(&self.path, 0).exists() {
            self.undo_hook("stop-target", &hooks.stop_target)?;
            self.remove_overlays()?;
        }
        self.undo_hook("unfence-source", &hooks.unfence_source)?;
        self.persist(UNDOING, |runner| runner.source.resume())?;
        self.step(Input::StepDone, "the source goes on")
    }

    /// What a crash left is finished or undone.
    fn recover(&mut self) -> Result<()> {
        match (self.job.state.after_a_crash(), self.job.state) {
            (Recovery::ResumeSource, state) => {
                if state != State::Aborting {
                    self.step(Input::StepFailed, "the cutover was cut short")?;
                }
                self.back_to_the_source()
            }
            (Recovery::GoForward, State::Fencing | State::Starting)
                if self.replica_has_the_guest() =>
            {
                self.go_forward(None)
            }
            (Recovery::GoForward, State::Fencing | State::Starting) => {
                let reached = self.source.reach();
                // A fence may have ended the machine: then it cannot have gone on.
                if reached.is_err() && self.job.spec.hooks.fence_source.is_empty() {
                    return reached;
                }
                if reached.is_ok()
                    && let Err(error) = self.stood_still()
                {
                    return Err(self.abort(error));
                }
                self.go_forward(None)
            }
            // Those are finished by their own verbs.
            _ => Ok(()),
        }
    }

    /// Nobody let the source go on, and nothing wrote its disks, since the cut that the targets hold.
    fn stood_still(&mut self) -> Result<()> {
        let mut held = None;
        for (index, disk) in self.job.spec.disk.iter().enumerate() {
            let point = point_of(&disk.target, &self.context)?;
            held = held.max(self.number_of(index, &point.source, &point.root));
        }
        let Some(number) = held else {
            let text = format!("job {}: its targets hold none of its cuts", self.job.name);
            return Err(Error::new(ErrorKind::Target, text));
        };
        self.source.stood_still(number)
    }

    pub(crate) fn cancel(mut self) -> Result<State> {
        self.recover()?;
        self.cancel_now()
    }

    fn cancel_now(&mut self) -> Result<State> {
        refused(&self.job, Input::Cancel)?;
        self.targets.clear();
        if self.reaches_source("it has to be tidied up by hand") {
            self.source.leave()?;
        }
        self.store.drop_requests(self.job.id)?;
        self.step(
            Input::Cancel,
            "no more passes; the targets stay at their last one",
        )?;
        Ok(self.job.state)
    }

    pub(crate) fn rollback(mut self) -> Result<State> {
        self.recover()?;
        if self.job.state != State::RollingBack {
            self.step(
                Input::RollbackBegins,
                "the targets return to the point before the job",
            )?;
        }
        let hooks = self.job.spec.hooks.clone();
        self.hook("stop-target", &hooks.stop_target)?;
        self.remove_overlays()?;
        self.open_targets()?;
        for index in 0..self.targets.len() {
            let context = self.engine_context(index, &self.context.cancel);
            let target = &mut self.targets[index];
            if target.replica().is_anchored() {
                return_to_anchor(target, &context)
                    .map_err(|e| Error::engine("return a target to the point before the job", e))?;
                accept(target, &context).map_err(|e| Error::engine("let the last pass go", e))?;
            }
        }
        self.targets.clear();
        self.hook("unfence-source", &hooks.unfence_source)?;
        if self.reaches_source("start it by hand") {
            self.source.resume()?;
            self.source.leave()?;
        }
        self.step(
            Input::StepDone,
            "the targets are at the point before the job",
        )?;
        Ok(self.job.state)
    }

    /// With `release` the source's machine is ended: it is kept as it was stopped otherwise.
    pub(crate) fn commit(mut self, release: bool) -> Result<State> {
        self.recover()?;
        if self.job.state != State::Committing {
            self.step(Input::CommitBegins, "the targets become what counts")?;
        }
        let hooks = self.job.spec.hooks.clone();
        let unmerged = self.unmerged();
        let is_merged = |index| overlay::merged(&overlay::path(&self.path, index)).exists();
        let is_unmerged = unmerged.iter().any(Option::is_some);
        let on_trial = is_unmerged || (0..unmerged.len()).any(is_merged);
        if is_unmerged {
            self.hook("stop-target", &hooks.stop_target)?;
        }
        self.open_targets()?;
        if is_unmerged {
            self.merge(&unmerged)?;
        }
        for index in 0..self.targets.len() {
            let context = self.engine_context(index, &self.context.cancel);
            let target = &mut self.targets[index];
            drop_anchor(target)
                .and_then(|()| accept(target, &context))
                .map_err(|e| Error::engine("let the old point of a target go", e))?;
        }
        self.targets.clear();
        if on_trial {
            self.hook("start-target", &hooks.start_target)?;
            self.watch_replica()?;
        }
        self.finish_commit(release)
    }

    fn finish_commit(mut self, release: bool) -> Result<State> {
        self.remove_overlays()?;
        if self.reaches_source("there is nothing of ours to take away") {
            self.source.leave()?;
            let was_stopped = !self.store.origins(self.job.id)?.is_empty();
            match (release, was_stopped) {
                (true, true) => self.source.end()?,
                (true, false) => {
                    let text = "the source was not stopped for this job, so it is not ended";
                    self.warn("source_kept", text.to_owned());
                }
                (false, _) => {}
            }
        }
        self.step(Input::StepDone, "the targets are what counts")?;
        Ok(self.job.state)
    }

    /// As [`Self::commit`], by the machine that runs the replica, which goes on meanwhile.
    pub(crate) fn commit_live(mut self, release: bool) -> Result<State> {
        self.recover()?;
        let mut replica = self.replica()?;
        let layers = self.unmerged();
        if self.job.state != State::Committing {
            refused(&self.job, Input::CommitBegins)?;
            replica.reach()?;
            if layers.iter().any(Option::is_none) {
                let text = format!("job {}: no replica is on trial", self.job.name);
                return Err(Error::new(ErrorKind::Refused, text));
            }
            self.step(Input::CommitBegins, "the replica becomes what counts")?;
        }
        let written = vec![ExtentSet::new(); layers.len()];
        let number = note_origins(self.store, &self.job, &self.context, written)?;
        let directory = self.path.clone();
        let mut counts = |index, target_counts| {
            let overlay = overlay::path(&directory, index);
            let renamed = match target_counts {
                true => overlay::mark_merged(&overlay),
                false => overlay::unmark_merged(&overlay),
            };
            renamed.map_err(|error| DeviceError::new(DeviceErrorKind::Io, error.in_full()))
        };
        replica.merge(number, &layers, &self.context.cancel, &mut counts)?;
        let merged = self.layers();
        if let Some(why) = replica.let_overlays_go(&merged)? {
            let text =
                format!("the machine of the replica keeps what was merged until it ends: {why}");
            self.warn("overlay_kept", text);
        }
        // They are the machine's own now, and none of their points is left.
        for layers in &merged {
            forget(&layers.below, &self.context.targets)
                .map_err(|e| Error::engine("let the old point of a target go", e))?;
        }
        if let Some(why) = replica.watch(number)? {
            self.warn_unwatched(&why);
        }
        self.finish_commit(release)
    }

    /// What the replica runs on while it is on trial.
    fn layers(&self) -> Vec<Layers> {
        let disks = self.job.spec.disk.iter().enumerate();
        let layers =
            disks.map(|(index, disk)| Layers::new(overlay::path(&self.path, index), &disk.target));
        layers.collect()
    }

    /// The overlays that are to be merged yet.
    fn unmerged(&self) -> Vec<Option<Layers>> {
        let layers = self.layers().into_iter();
        let layers = layers.map(|layers| layers.overlay.exists().then_some(layers));
        layers.collect()
    }

    /// What the replica wrote goes to the targets, as any sync does. An overlay that was put aside is merged: its target may
    /// have been written since.
    fn merge(&mut self, unmerged: &[Option<Layers>]) -> Result<()> {
        let mut written = vec![ExtentSet::new(); unmerged.len()];
        let mut is_known = true;
        let mut members = Vec::new();
        let disks = self.targets.iter_mut().zip(unmerged).enumerate();
        for (index, (target, layers)) in disks {
            let Some(layers) = layers else {
                continue;
            };
            // The target is locked already, by us.
            let opened = open_overlay(&layers.overlay, &layers.below, &std::env::temp_dir());
            let asked = opened.and_then(|source| source.changes().map(|map| (source, map)));
            let (source, changes) = asked.map_err(|cause| {
                let text = format!(
                    "read what the replica wrote to {}",
                    layers.overlay.display()
                );
                Error::because(ErrorKind::Target, text, cause)
            })?;
            match &changes {
                Some(map) => written[index] = changed_extents(map),
                None => is_known = false,
            }
            let since = target.replica().point().map(|point| point.id.to_string());
            let mut options = SyncOptions::default();
            options.mode = Mode::Delta;
            options.changes = since
                .zip(changes)
                .map(|(since, map)| ChangesSince::new(since, Arc::new(map)));
            let context = disk_context(&self.context, index, &self.context.cancel);
            members.push(Member::new(source, target, options, context));
        }
        // Where that is not known the way back compares.
        if is_known {
            note_origins(self.store, &self.job, &self.context, written)?;
        }
        sync_group(members, &self.groups).map_err(|e| {
            self.targets.clear();
            Error::engine("merge what the replica wrote", e)
        })?;
        let merged = unmerged.iter().flatten();
        merged
            .map(|layers| &layers.overlay)
            .try_for_each(|overlay| overlay::mark_merged(overlay))
    }

    /// From its first write on, the machine of the replica is to record what changes: no more than that travels back. What
    /// keeps it from that is said; the way back compares then.
    fn watch_replica(&mut self) -> Result<()> {
        let origins = self.store.origins(self.job.id)?;
        let (Ok(mut replica), Some(origin)) = (self.replica(), origins.first()) else {
            return Ok(());
        };
        match replica.watch(origin.number) {
            Ok(None) => {}
            Ok(Some(why)) => self.warn_unwatched(&why),
            Err(error) => self.warn_unwatched(&error.in_full()),
        }
        Ok(())
    }

    fn warn_unwatched(&self, why: &str) {
        let text = format!(
            "a way back will compare whole disks: the replica was not watched from its start: {why}"
        );
        self.warn("not_watched", text);
    }

    /// A source that is gone for good keeps nobody from deciding about the targets: it is said.
    fn reaches_source(&mut self, otherwise: &str) -> bool {
        let reached = self.source.reach();
        if let Err(error) = &reached {
            let why = error.in_full();
            self.warn("source_not_reached", format!("{why}: {otherwise}"));
        }
        reached.is_ok()
    }

    fn remove_overlays(&self) -> Result<()> {
        (0..self.job.spec.disk.len()).try_for_each(|index| {
            let overlay = overlay::path(&self.path, index);
            overlay::remove(&overlay)?;
            overlay::remove(&overlay::merged(&overlay))
        })
    }

    /// The points before the job can be returned to, however many passes follow.
    fn keep_anchors(&mut self) -> Result<()> {
        if self.job.state != State::Created {
            return Ok(());
        }
        self.open_targets()?;
        for index in 0..self.targets.len() {
            let context = self.engine_context(index, &self.context.cancel);
            keep_anchor(&mut self.targets[index], BlockSize::DEFAULT, &context)
                .map_err(|e| Error::engine("keep the point before the job", e))?;
        }
        for (index, origin) in self.origins.iter().enumerate() {
            let point = self.targets[index].replica().point();
            let why = match point.map(|point| point.root.to_string()) {
                Some(root) if root == origin.root => continue,
                Some(_) => "was written since its machine was stopped, so it is compared in full",
                None => "is gone, so it is copied in full",
            };
            let disk = self.job.spec.disk[index].target.display();
            self.warn("diverged", format!("{disk} {why}"));
        }
        Ok(())
    }

    fn live_pass(&mut self) -> Result<()> {
        self.check_cancelled()?;
        self.step(Input::PassBegins, "a pass begins")?;
        let token = self.context.cancel.clone();
        self.pass(&token, |source, number| source.cut(number, Live::Frozen))
    }

    /// Cuts, copies, and lets the cut go.
    fn pass(
        &mut self,
        cancel: &CancelToken,
        take: impl FnOnce(&mut dyn SourceMachine, u64) -> Result<Cut>,
    ) -> Result<()> {
        let held = self.open_targets()?;
        if self.job.state != State::LastPass {
            self.settle(&held)?;
        }
        let highest = held.iter().flatten().max().copied().unwrap_or(0);
        let number = self.store.take_number(self.job.id, highest + 1)?;
        self.source.make_ready()?;
        let began = Instant::now();
        let cut = take(&mut *self.source, number)?;
        let since = self.since_last_cut(began)?;
        for warning in &cut.warnings {
            self.warn("not_frozen", warning.clone());
        }
        let (consistency, held_up) = (cut.consistency, cut.held_up);
        let changed = self.copy(cut, &held, number, cancel)?;
        let seconds = began.elapsed().as_secs_f64();
        let pass = Pass::new(number, changed, seconds, since);
        self.record(&pass, consistency, held_up)?;
        // An export of ours would be in the way of the machine that takes the guest over.
        if self.job.state != State::LastPass || self.is_warm() {
            self.settle(&vec![Some(number); self.targets.len()])?;
        }
        Ok(())
    }

    /// Seconds since the cut before this one, also if another process made it.
    fn since_last_cut(&mut self, now: Instant) -> Result<Option<f64>> {
        if let Some(last) = self.last_cut.replace(now) {
            return Ok(Some((now - last).as_secs_f64()));
        }
        let passes = self.store.passes(self.job.id)?;
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let since = passes
            .last()
            .map(|(pass, ended_ms, _)| (now_ms() - ended_ms).max(0) as f64 / 1000.0 + pass.seconds);
        Ok(since)
    }

    /// Brings all targets to a cut; returns the bytes that differed.
    fn copy(
        &mut self,
        cut: Cut,
        held: &[Option<u64>],
        number: u64,
        cancel: &CancelToken,
    ) -> Result<u64> {
        let addresses: Vec<String> = (0..cut.disks.len())
            .map(|index| self.address(index, number))
            .collect();
        let contexts: Vec<Context> = (0..cut.disks.len())
            .map(|index| self.engine_context(index, cancel))
            .collect();
        let mode = self.job.spec.mode;
        let (mut members, mut carriers) = (Vec::new(), Vec::new());
        let origins = self.origins.iter().map(Some).chain(iter::repeat(None));
        let disks = cut.disks.into_iter().zip(&mut self.targets).zip(held);
        let disks = disks.zip(origins).zip(addresses).zip(contexts);
        for (((((disk, target), held), origin), address), context) in disks {
            let since = target.replica().point().map(|point| point.id.to_string());
            let mut options = SyncOptions::default();
            options.check = Some(cut.check.clone());
            // Only the first pass has something to choose.
            options.mode = if held.is_some() { Mode::Delta } else { mode };
            options.source_address = address;
            if self.job.state == State::LastPass {
                // The source stands still. The anchor keeps what the targets were, and nobody wants the pass before.
                options.undo = Undo::None;
            }
            let mut changes = disk.changes;
            if let Some(origin) = origin.filter(|origin| *held == Some(origin.number)) {
                // The replica wrote before its machine recorded.
                changes = changes.map(|map| with_extents(map, &origin.changed));
            }
            options.changes = since
                .zip(changes)
                .map(|(since, map)| ChangesSince::new(since, map));
            members.push(match disk.source {
                CutSource::Here(source) => Member::new(source, target, options, context),
                CutSource::There(far) => {
                    carriers.push(far.carrier);
                    Member::from_peer(far.connection, target, options, context)
                }
            });
        }
        let synced = sync_group(members, &self.groups);
        drop(carriers);
        match synced {
            Ok(receipts) => Ok(receipts
                .iter()
                .map(|receipt| receipt.changed_bytes.unwrap_or(receipt.staged_bytes))
                .sum()),
            Err(error) => {
                self.targets.clear();
                Err(Error::engine(format!("copy pass {number}"), error))
            }
        }
    }

    fn record(&mut self, pass: &Pass, consistency: Consistency, held_up: Duration) -> Result<()> {
        let text = consistency.to_string();
        self.store.add_pass(self.job.id, pass, &text)?;
        let predicted = predicted_downtime(&self.passes()?, 0.0);
        self.tell(&Told::Pass {
            pass: *pass,
            consistency: text,
            held_up_seconds: held_up.as_secs_f64(),
            predicted_downtime: predicted.filter(|_| self.job.state != State::LastPass),
        });
        Ok(())
    }

    fn passes(&self) -> Result<Vec<Pass>> {
        let passes = self.store.passes(self.job.id)?;
        Ok(passes.into_iter().map(|(pass, ..)| pass).collect())
    }

    /// Opens the targets that are not open, and says which cuts they hold.
    fn open_targets(&mut self) -> Result<Vec<Option<u64>>> {
        if self.targets.is_empty() {
            let mut opened = Vec::new();
            for disk in &self.job.spec.disk {
                let target =
                    Target::open_in_group(&disk.target, &self.context.targets, Some(&self.groups));
                opened.push(target.map_err(|e| Error::engine("open a target", e))?);
            }
            self.targets = opened;
            // All members have reached the outcome of every group.
            self.groups.clear().map_err(|cause| {
                Error::because(ErrorKind::Store, "remove records of groups", cause)
            })?;
        }
        let mut held = Vec::new();
        for index in 0..self.targets.len() {
            let point = self.targets[index].replica().point();
            let point = point.map(|point| (point.source.address.clone(), point.root.to_string()));
            held.push(point.and_then(|(address, root)| self.number_of(index, &address, &root)));
        }
        Ok(held)
    }

    /// The cut that a target holds whose point came from `address` and has this root.
    fn number_of(&self, index: usize, address: &str, root: &str) -> Option<u64> {
        let origin = self.origins.get(index);
        let origin = origin.filter(|origin| origin.root == root);
        self.number_in(index, address)
            .or_else(|| origin.map(|origin| origin.number))
    }

    /// What a target records of where its point came from.
    fn address(&self, index: usize, number: u64) -> String {
        format!("{}#{number}", self.address_of_disk(index))
    }

    fn address_of_disk(&self, index: usize) -> String {
        let JobRecord { name, id, spec, .. } = &self.job;
        format!("{SCHEME}{name}.{id}/{}", spec.disk[index].node)
    }

    fn number_in(&self, index: usize, address: &str) -> Option<u64> {
        let number = address.strip_prefix(&self.address_of_disk(index))?;
        number.strip_prefix('#')?.parse().ok()
    }

    fn settle(&mut self, held: &[Option<u64>]) -> Result<()> {
        let lost = self.source.settle(held)?;
        for lost in lost {
            let index = self
                .job
                .spec
                .disk
                .iter()
                .position(|disk| disk.node == lost.disk);
            // At first nothing is known, and nothing is missed.
            if index.is_some_and(|index| held.get(index).copied().flatten().is_some()) {
                self.warn(
                    "bitmap_lost",
                    format!("disk {} is compared in full: {}", lost.disk, lost.why),
                );
            }
        }
        Ok(())
    }

    /// One that leads on, and is killed when the work is cancelled.
    fn hook(&self, step: &str, command: &[String]) -> Result<()> {
        self.run_hook(step, command, &[], &self.context.cancel)
    }

    /// One for which not more than so much of the budget is left.
    fn hook_within(&self, step: &str, command: &[String], left: Option<Duration>) -> Result<()> {
        let alarm = left.map(|left| Alarm::set(Instant::now() + left, self.context.cancel.clone()));
        let cancel = alarm
            .as_ref()
            .map_or(&self.context.cancel, |alarm| &alarm.token);
        let done = self.run_hook(step, command, &[], cancel);
        match done {
            Err(error) if alarm.is_some_and(|alarm| alarm.rang()) => {
                Err(self.over_budget(&error.to_string()))
            }
            done => done,
        }
    }

    fn over_budget(&self, what: &str) -> Error {
        let text = format!(
            "job {}: {what}: the budget is {:.2} s",
            self.job.name,
            self.job.spec.downtime_budget.as_secs_f64()
        );
        Error::new(ErrorKind::Refused, text)
    }

    /// One that undoes, which is wanted most when the work was cancelled.
    fn undo_hook(&self, step: &str, command: &[String]) -> Result<()> {
        self.run_hook(step, command, &[], &CancelToken::new())
    }

    fn run_hook(
        &self,
        step: &str,
        command: &[String],
        more: &[(String, String)],
        cancel: &CancelToken,
    ) -> Result<()> {
        let mut environment = vec![
            ("BLOCKFERRY_JOB".to_owned(), self.job.name.clone()),
            ("BLOCKFERRY_STEP".to_owned(), step.to_owned()),
        ];
        environment.extend_from_slice(more);
        for (index, disk) in self.job.spec.disk.iter().enumerate() {
            let mut add = |what: &str, path: &Path| {
                let name = format!("BLOCKFERRY_DISK_{index}_{what}");
                environment.push((name, path.display().to_string()));
            };
            add("TARGET", &disk.target);
            let overlay = overlay::path(&self.path, index);
            if overlay.exists() {
                add("OVERLAY", &overlay);
            }
        }
        let timeout = self.job.spec.hooks.timeout.0;
        hooks::run(step, command, &environment, timeout, cancel)
    }

    fn step(&mut self, input: Input, text: &str) -> Result<()> {
        let state = refused(&self.job, input)?;
        self.store.move_to(self.job.id, state, text)?;
        self.job.state = state;
        self.tell(&Told::State(state, text.to_owned()));
        Ok(())
    }

    fn warn(&self, code: &'static str, text: String) {
        self.tell(&Told::Warning(code, text));
    }

    fn tell(&self, told: &Told) {
        self.context.observer.told(told);
    }

    fn engine_context(&self, index: usize, cancel: &CancelToken) -> Context {
        let mut context = disk_context(&self.context, index, cancel);
        let (observer, checkpoints) = (context.observer, Arc::clone(&self.checkpoints));
        context.observer = Arc::new(move |event: &Event| {
            if let Event::Checkpoint { .. } = event {
                checkpoints.fetch_add(1, Ordering::Relaxed);
            }
            observer.event(event);
        });
        context
    }

    fn check_cancelled(&self) -> Result<()> {
        if self.context.cancel.is_cancelled() {
            let text = format!(
                "job {} is left as it is; starting it again goes on",
                self.job.name
            );
            return Err(Error::new(ErrorKind::Cancelled, text));
        }
        Ok(())
    }
}

/// The point that a target is at, by its state alone: the replica may have it open.
fn point_of(target: &Path, context: &JobContext) -> Result<PointStatus> {
    let found =
        status(target, &context.targets).map_err(|e| Error::engine("look at a target", e))?;
    found.point.ok_or_else(|| {
        let text = format!("{}: it is at no known point", target.display());
        Error::new(ErrorKind::Target, text)
    })
}

/// What the targets hold before what the replica wrote is merged: the last cut, as the source's disks do, and what was
/// written since that no bitmap will know. Added to what was noted before: of a merge that was begun in another way, too.
/// Returns the number of the bitmaps that will know the rest.
fn note_origins(
    store: &mut Store,
    job: &JobRecord,
    context: &JobContext,
    written: Vec<ExtentSet>,
) -> Result<u64> {
    let mut origins = store.origins(job.id)?;
    if origins.is_empty() {
        let number = store.take_number(job.id, 0)?;
        for disk in &job.spec.disk {
            origins.push(Origin {
                number,
                root: point_of(&disk.target, context)?.root,
                changed: ExtentSet::new(),
            });
        }
    }
    for (origin, written) in origins.iter_mut().zip(written) {
        origin.changed = origin.changed.union(&written);
    }
    store.note_origins(job.id, &origins)?;
    Ok(origins.first().map_or(0, |origin| origin.number))
}

/// What the sync of a disk tells is told of it.
fn disk_context(context: &JobContext, index: usize, cancel: &CancelToken) -> Context {
    let observer = Arc::clone(&context.observer);
    let mut context = Context::new()
        .with_observer(move |event: &Event| observer.told(&Told::Disk(index, event.clone())));
    context.cancel = cancel.clone();
    context
}

/// Cancels a token at a moment, or when another one is cancelled, unless it is dropped before.
struct Alarm {
    token: CancelToken,
    rang: Arc<AtomicBool>,
    off: Arc<AtomicBool>,
}

impl Alarm {
    fn set(at: Instant, other: CancelToken) -> Self {
        let alarm = Self {
            token: CancelToken::new(),
            rang: Arc::default(),
            off: Arc::default(),
        };
        let (token, rang) = (alarm.token.clone(), Arc::clone(&alarm.rang));
        let off = Arc::clone(&alarm.off);
        std::thread::spawn(move || {
            while !off.load(Ordering::SeqCst) {
                if Instant::now() >= at {
                    rang.store(true, Ordering::SeqCst);
                    token.cancel();
                    return;
                }
                if other.is_cancelled() {
                    token.cancel();
                    return;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        alarm
    }

    fn rang(&self) -> bool {
        self.rang.load(Ordering::SeqCst)
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.off.store(true, Ordering::SeqCst);
    }
}
