//! The jobs of a host: what can be asked of each, whoever works on it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockferry_device::{CancelToken, ErrorKind as DeviceErrorKind, OsDirectory, StorageDir};
use blockferry_engine::{PointStatus, TargetOptions, status};
use blockferry_pipeline::Event;
use serde::Serialize;

use crate::convergence::{Pass, predicted_downtime};
use crate::error::{Error, ErrorKind, Result};
use crate::far::{self, FarSource, Hosts};
use crate::overlay;
use crate::runner::Runner;
use crate::source::{Source, SourceMachine};
use crate::spec::{JobSpec, Reverse};
use crate::state::{Input, State};
use crate::store::{Filter, JobEvent, JobRecord, Origin, Request, Store, now_ms};

const LOCK_NAME: &str = "lock";

/// Something that is told while a job is worked on.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Told {
    /// It went on to another state; for people, why.
    State(State, String),
    /// A pass was copied.
    Pass {
        /// Its figures.
        pass: Pass,
        /// How good the point is.
        consistency: String,
        /// How long writes were held up for the cut, in seconds.
        held_up_seconds: f64,
        /// How long the source would stand still, in seconds, once that can be told.
        predicted_downtime: Option<f64>,
    },
    /// What the sync of a disk tells.
    Disk(usize, Event),
    /// Something that went on, but not as hoped. The code is stable.
    Warning(&'static str, String),
}

/// Hears what happens to a job. Called from the threads that do the work: it must not block.
pub trait JobObserver: Send + Sync {
    /// Takes one thing that is told.
    fn told(&self, told: &Told);
}

impl<F: Fn(&Told) + Send + Sync> JobObserver for F {
    fn told(&self, told: &Told) {
        self(told);
    }
}

/// When a run ends by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "there is no third way")]
pub enum Until {
    /// Once the job is ready.
    Ready,
    /// Never before it was cut over or cancelled: it is refreshed until then.
    #[default]
    Cutover,
}

/// What becomes of the machine that a job came from, once it is committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "there is no third way")]
pub enum OldSource {
    /// It stays as it was stopped.
    #[default]
    Keep,
    /// It is ended, so that its disks are nobody's.
    End,
}

/// How jobs are worked on.
#[derive(Clone)]
#[non_exhaustive]
pub struct JobContext {
    /// Hears what happens.
    pub observer: Arc<dyn JobObserver>,
    /// Ends the work cleanly; the job goes on when it is started again.
    pub cancel: CancelToken,
    /// Where the states of targets are.
    pub targets: TargetOptions,
    /// A program, with its first arguments, that runs [`blockferry_qemu::freeze::guard`] on an [`AtRest`](crate::AtRest) of
    /// what is added to them: `--agent` and its socket, `--scripts` and their file, each if there is one, and the deadline
    /// in milliseconds. Without it nothing is brought to rest, and points are crash-consistent.
    pub freeze_guard: Option<Vec<OsString>>,
    /// The way to other hosts; without it no machine can be on one.
    pub hosts: Option<Arc<dyn Hosts>>,
}

impl std::fmt::Debug for JobContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JobContext").finish_non_exhaustive()
    }
}

impl JobContext {
    /// Silent, never cancelled.
    #[must_use]
    pub fn new(targets: TargetOptions) -> Self {
        Self {
            observer: Arc::new(|_: &Told| {}),
            cancel: CancelToken::new(),
            targets,
            freeze_guard: None,
            hosts: None,
        }
    }

    /// The machine that a job copies.
    pub(crate) fn machine_of(
        &self,
        spec: &JobSpec,
        scratch: &Path,
    ) -> Result<Box<dyn SourceMachine>> {
        let Some(host) = &spec.machine.host else {
            let guard = self.freeze_guard.clone();
            return Ok(Box::new(Source::new(spec, scratch, guard)));
        };
        let hosts = self.hosts(host)?;
        Ok(Box::new(FarSource::new(spec, host, hosts)))
    }

    /// A committed job of another host, and what is known of its disks.
    fn job_of(&self, host: &str, name: &str) -> Result<(JobSpec, Vec<Origin>)> {
        far::job_of(&*self.hosts(host)?, host, name)
    }

    fn hosts(&self, host: &str) -> Result<Arc<dyn Hosts>> {
        self.hosts.clone().ok_or_else(|| {
            let text = format!("there is no way to host {host} here");
            Error::new(ErrorKind::Usage, text)
        })
    }
}

/// Where a job stands.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct JobStatus {
    /// As it is recorded.
    #[serde(flatten)]
    pub job: JobRecord,
    /// A process works on it.
    pub running: bool,
    /// The last passes, the oldest first.
    pub passes: Vec<Pass>,
    /// How long the source would stand still if it were cut over now, in seconds.
    pub predicted_downtime_seconds: Option<f64>,
    /// The budget, in seconds.
    pub downtime_budget_seconds: f64,
    /// Its disks.
    pub disks: Vec<DiskStatus>,
    /// What happened to it.
    pub events: Vec<JobEvent>,
    /// Verbs that lead on, or back, each with what it does.
    pub next: Vec<(&'static str, &'static str)>,
}

/// Where a disk of a job stands.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct DiskStatus {
    /// The node of the machine.
    pub node: String,
    /// The replica.
    pub target: PathBuf,
    /// What the replica on trial writes to.
    pub overlay: Option<PathBuf>,
    /// The point the target is at.
    pub point: Option<String>,
    /// The point before the job, as long as it is kept.
    pub point_before: Option<String>,
    /// Bytes held beside the target.
    pub held_bytes: u64,
}

/// The jobs of a host.
#[derive(Debug)]
pub struct Jobs {
    directory: PathBuf,
    store: Store,
}

impl Jobs {
    /// The jobs that are kept in `directory`, which is created if need be.
    ///
    /// # Errors
    /// The database of jobs cannot be opened.
    pub fn open(directory: &Path) -> Result<Self> {
        Ok(Self {
            directory: directory.to_owned(),
            store: Store::open(directory)?,
        })
    }

    /// Jobs, the newest first.
    ///
    /// # Errors
    /// The database failed.
    pub fn list(&self, filter: &Filter) -> Result<Vec<JobRecord>> {
        self.store.list(filter)
    }

    /// Where a job stands. Takes no lock and changes nothing.
    ///
    /// # Errors
    /// There is no such job, or the database failed.
    pub fn status(&self, name: &str, targets: &TargetOptions) -> Result<JobStatus> {
        let job = self.find(name)?;
        let recorded = self.store.passes(job.id)?;
        let idle = recorded
            .last()
            .map_or(0, |(_, ended_ms, _)| now_ms() - ended_ms);
        let passes: Vec<Pass> = recorded.into_iter().map(|(pass, ..)| pass).collect();
        #[expect(clippy::cast_precision_loss, reason = "seconds for people")]
        let idle_seconds = idle.max(0) as f64 / 1000.0;
        let predicted = predicted_downtime(&passes, idle_seconds);
        let directory = self.job_directory(name);
        let id = |point: &Option<PointStatus>| point.as_ref().map(|point| point.id.clone());
        let disk = |(index, disk): (usize, &crate::spec::DiskSpec)| {
            let found = status(&disk.target, targets).ok();
            let overlay = overlay::path(&directory, index);
            DiskStatus {
                node: disk.node.clone(),
                target: disk.target.clone(),
                overlay: overlay.exists().then_some(overlay),
                held_bytes: found.as_ref().map_or(0, |status| status.held_bytes),
                point_before: found.as_ref().and_then(|status| id(&status.anchored_point)),
                point: found.and_then(|status| id(&status.point)),
            }
        };
        Ok(JobStatus {
            running: self.is_running(name),
            predicted_downtime_seconds: predicted.filter(|_| job.state.is_live()),
            downtime_budget_seconds: job.spec.downtime_budget.as_secs_f64(),
            disks: job.spec.disk.iter().enumerate().map(disk).collect(),
            events: self.store.events(job.id)?,
            next: self.next_steps(&job)?,
            passes,
            job,
        })
    }

    /// A way back is shown where there is one.
    fn next_steps(&self, job: &JobRecord) -> Result<Vec<(&'static str, &'static str)>> {
        let leads_back =
            || Ok(job.spec.reverse.is_some() && !self.store.origins(job.id)?.is_empty());
        Ok(match job.state {
            State::Committed if !leads_back()? => Vec::new(),
            state => state.next_steps(),
        })
    }

    /// Copies passes until the job is ready, and refreshes it until it is cut over or cancelled: begins a job of this
    /// specification, or goes on with the one that it describes. Returns its state at the end.
    ///
    /// # Errors
    /// Another process works on it, its state does not allow it, or a pass failed: the job goes on when it is started again.
    pub fn start(&mut self, spec: &JobSpec, until: Until, context: &JobContext) -> Result<State> {
        let unfinished = self.store.find(&spec.name)?;
        let job = match unfinished.filter(|job| !job.state.is_final()) {
            Some(job) if job.spec == *spec => job,
            Some(job) => {
                let text = format!(
                    "job {} exists, is {}, and was described otherwise: finish it first",
                    spec.name, job.state
                );
                return Err(Error::new(ErrorKind::Refused, text));
            }
            None => self.store.create(spec)?,
        };
        self.runner(&job, context)?.run(until)
    }

    /// Goes on with a job by its name, as [`Self::start`].
    ///
    /// # Errors
    /// As [`Self::start`]; or there is no such job.
    pub fn go_on(&mut self, name: &str, until: Until, context: &JobContext) -> Result<State> {
        let job = self.find(name)?;
        self.runner(&job, context)?.run(until)
    }

    /// Cuts over: at once, or at `at_ms` (milliseconds since 1970). Where another process works on the job it is asked to,
    /// and waited for; else it is done here. Returns the state that came of it.
    ///
    /// # Errors
    /// The last pass would not fit the budget: nothing was stopped. Or a step failed: then the source runs, unless the
    /// message says otherwise.
    pub fn complete(
        &mut self,
        name: &str,
        at_ms: Option<i64>,
        context: &JobContext,
    ) -> Result<State> {
        let job = self.find(name)?;
        let at_ms = at_ms.unwrap_or_else(now_ms);
        if self.is_running(name) && job.state.is_live() {
            self.store.ask(job.id, Request::Complete(at_ms))?;
            return self.wait_for(job.id, name, context, |state| state == State::CommitPending);
        }
        self.runner(&job, context)?.complete(at_ms)
    }

    /// Cuts over to the last pass of a source that is gone: what it wrote since is lost. The `fence-source` hook has to see to
    /// it that it does not come back; where there is none that is told.
    ///
    /// # Errors
    /// The source answers, no pass was copied whole yet, the state does not allow it, or a step failed.
    pub fn complete_without_source(&mut self, name: &str, context: &JobContext) -> Result<State> {
        let job = self.find(name)?;
        self.runner(&job, context)?.do_without_source()
    }

    /// Copies no more; the targets stay at their last pass.
    ///
    /// # Errors
    /// The state does not allow it, or the machine cannot be tidied up.
    pub fn cancel(&mut self, name: &str, context: &JobContext) -> Result<State> {
        let job = self.find(name)?;
        if self.is_running(name) && job.state.is_live() {
            self.store.ask(job.id, Request::Cancel)?;
            return self.wait_for(job.id, name, context, |state| state == State::Cancelled);
        }
        self.runner(&job, context)?.cancel()
    }

    /// Returns the targets to the point before the job, and lets the source run.
    ///
    /// # Errors
    /// The state does not allow it, or a step failed: to be called again.
    pub fn rollback(&mut self, name: &str, context: &JobContext) -> Result<State> {
        let job = self.find(name)?;
        self.runner(&job, context)?.rollback()
    }

    /// Merges what the replica wrote into the targets, and lets the old points go. The source stays as it was stopped, or
    /// its machine is ended if it is to be let go.
    ///
    /// # Errors
    /// The state does not allow it, the replica still runs, or a step failed: to be called again.
    pub fn commit(&mut self, name: &str, source: OldSource, context: &JobContext) -> Result<State> {
        let job = self.find(name)?;
        self.runner(&job, context)?.commit(source == OldSource::End)
    }

    /// As [`Self::commit`], but the replica goes on: the machine that the job's way back names merges its overlays, each
    /// named to it by its absolute path. The states of the targets are let go with it. What it merges is recorded by it, so
    /// that a way back knows what changed.
    ///
    /// # Errors
    /// The state does not allow it, the job says nothing of that machine, or it does not run on the overlays; or a merge
    /// failed: to be called again, or [`Self::commit`] once the replica is stopped.
    pub fn commit_live(
        &mut self,
        name: &str,
        source: OldSource,
        context: &JobContext,
    ) -> Result<State> {
        let job = self.find(name)?;
        self.runner(&job, context)?
            .commit_live(source == OldSource::End)
    }

    /// Begins the way back of a committed job: a job of the same name from the machine of the replica, as `way` or else
    /// the job itself says, to the disks that it came from, which then goes on as [`Self::start`]. Of a disk that is as
    /// it was at the last cut no more travels than what the replica changed since; one that was written is compared.
    ///
    /// A job of another host that came from a machine on this one is named `HOST:NAME`: its way back is a job of this host.
    ///
    /// # Errors
    /// The job is not committed, was not cut over, or says nothing of a way back; its first machine still has the disks
    /// and is not to be ended; or as [`Self::start`].
    pub fn reverse(
        &mut self,
        name: &str,
        way: Option<Reverse>,
        source: OldSource,
        until: Until,
        context: &JobContext,
    ) -> Result<State> {
        let (host, (mut first, origins)) = match name.rsplit_once(':') {
            Some((host, there)) => {
                let found = context.job_of(host, there)?;
                (Some(host.to_owned()), found)
            }
            None => (None, self.to_reverse(name)?),
        };
        let not_now = |why: &str| Err(not_reversed(name, why));
        let elsewhere = first.machine.host.take();
        if let (None, Some(elsewhere)) = (&host, elsewhere) {
            return not_now(&format!(
                "its way back is a job of {elsewhere}: there, failover reverse THIS-HOST:{name}"
            ));
        }
        first.reverse = way.or(first.reverse);
        let Some(mut spec) = first.reversed() else {
            return not_now(
                "it says nothing of the machine of the replica: expected [reverse] in its file",
            );
        };
        spec.machine.host = host;
        let directory = self.job_directory(&spec.name);
        let mut machine = Source::new(&first, &directory, None);
        if machine.reach().is_ok() {
            if source == OldSource::Keep {
                return not_now(
                    "the machine that it came from has its disks still: end it, or let it be ended (--release-source)",
                );
            }
            machine.end()?;
        }
        let job = self.store.create_way_back(&spec, &origins)?;
        self.runner(&job, context)?.run(until)
    }

    /// A committed job, and what is known of its disks on the way back.
    pub(crate) fn to_reverse(&self, name: &str) -> Result<(JobSpec, Vec<Origin>)> {
        let job = self.find(name)?;
        refused(&job, Input::Reverse)?;
        let origins = self.store.origins(job.id)?;
        if origins.is_empty() {
            let why =
                "its source was never stopped for it; a job of another name can copy the other way";
            return Err(not_reversed(name, why));
        }
        Ok((job.spec, origins))
    }

    fn find(&self, name: &str) -> Result<JobRecord> {
        self.store.find(name)?.ok_or_else(|| {
            let text = format!("there is no job {name:?}");
            Error::new(ErrorKind::Usage, text)
        })
    }

    fn job_directory(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn runner(&mut self, job: &JobRecord, context: &JobContext) -> Result<Runner<'_>> {
        let path = self.job_directory(&job.name);
        let failed = |cause: blockferry_device::Error| {
            let kind = match cause.kind() {
                DeviceErrorKind::Busy => ErrorKind::Busy,
                _ => ErrorKind::Store,
            };
            Error::because(kind, format!("take up job {}", job.name), cause)
        };
        let directory = OsDirectory::open_or_create(&path).map_err(failed)?;
        let lock = directory.lock(LOCK_NAME).map_err(failed)?;
        // What it was before the lock was taken may have been another process's state.
        let job = self.store.load(job.id)?;
        Runner::new(
            &mut self.store,
            job,
            path,
            Arc::new(directory),
            lock,
            context.clone(),
        )
    }

    fn is_running(&self, name: &str) -> bool {
        let directory = OsDirectory::open(&self.job_directory(name));
        directory
            .and_then(|directory| directory.is_locked(LOCK_NAME))
            .unwrap_or(false)
    }

    /// Waits until the process that works on a job reached `wanted`, or left a problem behind, or is gone.
    fn wait_for(
        &self,
        id: i64,
        name: &str,
        context: &JobContext,
        wanted: impl Fn(State) -> bool,
    ) -> Result<State> {
        let mut shown = self.store.load(id)?.state;
        loop {
            std::thread::sleep(crate::runner::TICK);
            let job = self.store.load(id)?;
            if job.state != shown {
                shown = job.state;
                let told = Told::State(shown, "as the process that works on it says".to_owned());
                context.observer.told(&told);
            }
            if wanted(job.state) {
                return Ok(job.state);
            }
            let answered = job.state.is_live() && !self.store.has_request(id)?;
            if let Some(problem) = job.problem.filter(|_| answered) {
                return Err(Error::new(ErrorKind::Refused, problem));
            }
            if !self.is_running(name) {
                let text = format!(
                    "the process that worked on job {name} ended; the job is {}",
                    job.state
                );
                return Err(Error::new(ErrorKind::Busy, text));
            }
            if context.cancel.is_cancelled() {
                return Err(Error::new(ErrorKind::Cancelled, "no longer waited for"));
            }
        }
    }
}

fn not_reversed(name: &str, why: &str) -> Error {
    let text = format!("job {name}: it cannot be reversed: {why}");
    Error::new(ErrorKind::Refused, text)
}

/// Why a job cannot do this now.
pub(crate) fn refused(job: &JobRecord, input: Input) -> Result<State> {
    job.state.after(input).map_err(|refusal| {
        let text = format!("job {}: {refusal}", job.name);
        Error::new(ErrorKind::Refused, text)
    })
}
