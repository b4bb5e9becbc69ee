//! `failover ACTION JOB`: jobs that bring a running machine over.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;

use crate::arguments::{FailoverAction, FailoverArguments, FreezeGuardArguments};
use crate::engine::failover::{
    AtRest, Error, ErrorKind, JobContext, JobSpec, JobStatus, Jobs, OldSource, Pass, State, Told,
    Until,
};
use crate::engine::qemu::freeze;
use crate::engine::{Event, Observer, Progress, format_size};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Output;
use crate::progress::{Display, Look};
use crate::quote::quoted;
use crate::remote::OverShell;
use crate::session::{Session, device_state_root};
use crate::verbs::report::{Facts, age, duration, short};

/// More than any description of a job needs.
const MAX_BYTES: u64 = 1 << 20;

pub(crate) fn run(arguments: &FailoverArguments, session: &Session) -> Result<Exit, Failure> {
    check(arguments)?;
    let mut jobs = jobs(session)?;
    if arguments.action == FailoverAction::Status {
        return status(&jobs, &name(&arguments.job)?, session);
    }
    let (_, display) = session.context(Look::Story);
    let mut context = context(session, &display);
    context.hosts = Some(Arc::new(OverShell::new(&arguments.shell, session)));
    let until = match arguments.until {
        Some(_) => Until::Ready,
        None => Until::Cutover,
    };
    let source = match arguments.release_source {
        true => OldSource::End,
        false => OldSource::Keep,
    };
    let spec = spec(arguments)?;
    let name = match &spec {
        Some(spec) => spec.name.clone(),
        None => name(&arguments.job)?,
    };
    let outcome = match (arguments.action, spec) {
        (FailoverAction::Start, Some(spec)) => jobs.start(&spec, until, &context),
        (FailoverAction::Start, None) => jobs.go_on(&name, until, &context),
        (FailoverAction::Complete, _) if arguments.without_source => {
            jobs.complete_without_source(&name, &context)
        }
        (FailoverAction::Complete, _) => jobs.complete(&name, arguments.at, &context),
        (FailoverAction::Cancel, _) => jobs.cancel(&name, &context),
        (FailoverAction::Rollback, _) => jobs.rollback(&name, &context),
        (FailoverAction::Reverse, spec) => {
            let way = spec.and_then(|spec| spec.reverse);
            jobs.reverse(&name, way, source, until, &context)
        }
        (FailoverAction::Commit, _) if arguments.live => jobs.commit_live(&name, source, &context),
        (FailoverAction::Commit | FailoverAction::Status, _) => {
            jobs.commit(&name, source, &context)
        }
    };
    drop(context);
    drop(display);
    outcome.map_err(|error| failure(&error, session))?;
    // The way back of another host's job is one of this host.
    let name = name.rsplit(':').next().unwrap_or(&name);
    status(&jobs, name, session)
}

/// Freezes an application and its guest for whoever started this process, and does nothing else.
pub(crate) fn guard(arguments: &FreezeGuardArguments) -> Result<Exit, Failure> {
    let deadline = Duration::from_millis(arguments.deadline_ms);
    let (agent, scripts) = (arguments.agent.as_deref(), arguments.scripts.as_deref());
    let mut at_rest = AtRest::new(agent, scripts);
    match freeze::guard(&mut at_rest, deadline, io::stdin(), io::stdout()) {
        Ok(()) => Ok(Exit::Done),
        // Whoever started it heard why, and tells.
        Err(_told) => Ok(Exit::Source),
    }
}

fn check(arguments: &FailoverArguments) -> Result<(), Failure> {
    use FailoverAction as A;
    for (given, option, actions, verbs) in [
        (
            arguments.at.is_some(),
            "--at",
            &[A::Complete][..],
            "complete",
        ),
        (
            arguments.without_source,
            "--without-source",
            &[A::Complete],
            "complete",
        ),
        (
            arguments.until.is_some(),
            "--until",
            &[A::Start, A::Reverse],
            "start and reverse",
        ),
        (arguments.live, "--live", &[A::Commit], "commit"),
        (
            arguments.release_source,
            "--release-source",
            &[A::Commit, A::Reverse],
            "commit and reverse",
        ),
    ] {
        if given && !actions.contains(&arguments.action) {
            let text = format!("{option} goes with failover {verbs} only");
            return Err(Failure::new(Exit::Usage, text));
        }
    }
    Ok(())
}

/// What is to be started or reversed, where that is a file.
fn spec(arguments: &FailoverArguments) -> Result<Option<JobSpec>, Failure> {
    let path = Path::new(&arguments.job);
    let is_file = path.components().count() > 1 || path.extension() == Some(OsStr::new("toml"));
    let describes = matches!(
        arguments.action,
        FailoverAction::Start | FailoverAction::Reverse
    );
    if !describes || !is_file {
        return Ok(None);
    }
    let wrong = |why: &str| {
        let message = format!("job {}: {why}", path.display());
        Failure::new(Exit::Usage, message)
    };
    let size = std::fs::metadata(path).map_err(|error| wrong(&error.to_string()))?;
    if size.len() > MAX_BYTES {
        return Err(wrong(&format!("expected at most {MAX_BYTES} bytes")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| wrong(&error.to_string()))?;
    JobSpec::from_toml(&text)
        .map(Some)
        .map_err(|error| wrong(&error.to_string()))
}

fn name(job: &OsStr) -> Result<String, Failure> {
    job.to_str().map(ToOwned::to_owned).ok_or_else(|| {
        let message = "the name of a job: expected UTF-8".to_owned();
        Failure::new(Exit::Usage, message)
    })
}

pub(crate) fn jobs(session: &Session) -> Result<Jobs, Failure> {
    Jobs::open(&jobs_directory()).map_err(|error| failure(&error, session))
}

fn context(session: &Session, display: &Display) -> JobContext {
    let mut context = JobContext::new(session.target_options());
    context.cancel = session.cancel_token();
    context.freeze_guard = freeze_guard();
    let teller = Teller {
        output: Arc::clone(&session.output),
        progress: display.observer(),
        disks: Mutex::default(),
    };
    context.observer = Arc::new(move |told: &Told| teller.tell(told));
    context
}

/// This program, to guard freezes.
pub(crate) fn freeze_guard() -> Option<Vec<OsString>> {
    let program = std::env::current_exe().ok()?;
    Some(vec![program.into(), "freeze-guard".into()])
}

/// Where the jobs of this host are, and the overlays of machines whose jobs are on others.
pub(crate) fn jobs_directory() -> PathBuf {
    device_state_root().join("jobs")
}

pub(crate) fn failure(error: &Error, session: &Session) -> Failure {
    let exit = match error.kind() {
        ErrorKind::Usage => Exit::Usage,
        ErrorKind::Source => Exit::Source,
        ErrorKind::Peer => Exit::Peer,
        ErrorKind::Hook => Exit::Hook,
        ErrorKind::DecisionPending => Exit::DecisionPending,
        ErrorKind::Corruption => Exit::Corruption,
        ErrorKind::Cancelled => session.signal().map_or(Exit::Interrupted, Exit::Signal),
        ErrorKind::Internal => Exit::Internal,
        // The job, its state here, or its target.
        _ => Exit::Target,
    };
    let resumable = error.kind() == ErrorKind::Cancelled;
    Failure::from_error(exit, error).resumable(resumable)
}

/// Shows what happens to a job.
struct Teller {
    output: Arc<Output>,
    progress: Arc<dyn Observer>,
    /// How far each disk is; they are shown as one.
    disks: Mutex<Vec<Option<Progress>>>,
}

#[derive(Serialize)]
struct StateLine<'a> {
    event: &'static str,
    state: State,
    text: &'a str,
}

#[derive(Serialize)]
struct PassLine<'a> {
    event: &'static str,
    #[serde(flatten)]
    pass: &'a Pass,
    consistency: &'a str,
    held_up_seconds: f64,
    predicted_downtime_seconds: Option<f64>,
}

#[derive(Serialize)]
struct WarningLine<'a> {
    code: &'a str,
    message: &'a str,
}

impl Teller {
    fn tell(&self, told: &Told) {
        match told {
            Told::State(state, text) => {
                let event = "state";
                let state = *state;
                self.output.line("event", &StateLine { event, state, text });
                // That a pass begins says nothing that its end does not say better.
                if state == State::Syncing {
                    self.output.detail(format_args!("{state}: {text}"));
                } else {
                    self.output.say(format_args!("{state}: {text}"));
                }
            }
            Told::Pass {
                pass,
                consistency,
                held_up_seconds,
                predicted_downtime,
            } => {
                self.output.line(
                    "event",
                    &PassLine {
                        event: "pass",
                        pass,
                        consistency,
                        held_up_seconds: *held_up_seconds,
                        predicted_downtime_seconds: *predicted_downtime,
                    },
                );
                self.output.say(pass_line(
                    pass,
                    consistency,
                    *held_up_seconds,
                    *predicted_downtime,
                ));
            }
            Told::Disk(index, event) => self.disk(*index, event),
            Told::Warning(code, message) => {
                self.output.line("warning", &WarningLine { code, message });
                self.output.warn(message);
            }
            _ => {}
        }
    }

    fn disk(&self, index: usize, event: &Event) {
        let Event::Progress(progress) = event else {
            // A decision of each disk in each pass is more than anybody reads.
            if let Event::Warning { .. } = event {
                self.progress.event(event);
            }
            return;
        };
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        if disks.len() <= index {
            disks.resize(index + 1, None);
        }
        disks[index] = Some(*progress);
        let same = disks.iter().flatten().filter(|p| p.phase == progress.phase);
        let sum = same.fold(Progress::new(progress.phase, 0, 0, 0), |sum, one| {
            Progress::new(
                sum.phase,
                sum.done_bytes + one.done_bytes,
                sum.total_bytes + one.total_bytes,
                sum.changed_bytes + one.changed_bytes,
            )
        });
        drop(disks);
        self.progress.event(&Event::Progress(sum));
    }
}

fn pass_line(pass: &Pass, consistency: &str, held_up: f64, predicted: Option<f64>) -> String {
    let mut line = format!(
        "pass {}: {} changed, copied in {}, {consistency}",
        pass.number,
        format_size(pass.changed_bytes),
        duration(pass.seconds)
    );
    if held_up > 0.0 {
        line.push_str(&format!(", writes held up for {:.0} ms", held_up * 1000.0));
    }
    if let Some(seconds) = predicted {
        line.push_str(&format!(
            "; cut over now, the source would stand still for about {}",
            duration(seconds)
        ));
    }
    line
}

fn status(jobs: &Jobs, name: &str, session: &Session) -> Result<Exit, Failure> {
    let status = jobs
        .status(name, &session.target_options())
        .map_err(|error| failure(&error, session))?;
    session.output.summary("failover", &status);
    describe(&status, &session.output);
    Ok(Exit::Done)
}

fn describe(status: &JobStatus, output: &Output) {
    let job = &status.job;
    let running = if status.running {
        " (a process works on it)"
    } else {
        ""
    };
    let back = if job.operation == "reverse" {
        ", the way back"
    } else {
        ""
    };
    output.answer(format_args!(
        "job {}{back}: {}{running}",
        job.name, job.state
    ));
    let mut facts = Facts::default();
    facts.add_some("machine on", job.spec.machine.host.clone());
    facts.add("last change", age(job.age_seconds()));
    if let Some(pass) = status.passes.last() {
        facts.add(
            "last pass",
            format!(
                "number {}, {} in {}",
                pass.number,
                format_size(pass.changed_bytes),
                duration(pass.seconds)
            ),
        );
    }
    if let Some(seconds) = status.predicted_downtime_seconds {
        let budget = duration(status.downtime_budget_seconds);
        let predicted = duration(seconds);
        facts.add(
            "predicted pause",
            format!("{predicted}, the budget is {budget}"),
        );
    }
    facts.add_some("pause", job.downtime_seconds.map(duration));
    facts.add_some("problem", job.problem.clone());
    for disk in &status.disks {
        let mut text = format!("{} to {}", disk.node, disk.target.display());
        for (when, point) in [("at", &disk.point), ("before the job", &disk.point_before)] {
            if let Some(point) = point {
                text.push_str(&format!(", {when} {}", short(point)));
            }
        }
        if disk.held_bytes > 0 {
            text.push_str(&format!(
                ", {} held beside it",
                format_size(disk.held_bytes)
            ));
        }
        if let Some(overlay) = &disk.overlay {
            text.push_str(&format!("; on trial: {}", overlay.display()));
        }
        facts.add("disk", text);
    }
    facts.answer(output);
    for (verb, effect) in status
        .next
        .iter()
        .filter(|_| !status.running || job.state.is_live())
    {
        let command = format!("blockferry failover {verb} {}", quoted(&job.name));
        output.answer(format_args!("  {command}   {effect}"));
    }
}
