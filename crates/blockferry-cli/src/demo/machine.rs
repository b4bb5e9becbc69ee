//! A machine that runs: somebody keeps writing its disk, and every acknowledged write is accounted for, over there and
//! back again. A qemu-storage-daemon is the machine, at both sites.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use blockferry_testkit::{StorageDaemon, Writer};
use serde::Serialize;

use super::check::{self, claim};
use super::disk;
use super::story::Story;
use crate::engine::failover::{
    Error, JobContext, JobSpec, JobStatus, Jobs, OldSource, Pass, Told, Until,
};
use crate::engine::nbd::{NbdAddress, NbdDevice, NbdOptions};
use crate::engine::{BlockTarget, TargetOptions, format_size};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::session::Session;
use crate::verbs::failover::failure;
use crate::verbs::report::duration;

/// The writer knows every byte: the disk is held in memory a few times.
const MOST_BYTES: u64 = 64 << 20;
/// Between two pages that are written.
const PAUSE: Duration = Duration::from_millis(5);
/// How long the replica is used before something is done with it.
const IN_USE: Duration = Duration::from_millis(500);
/// The path of a Unix socket has room for little more.
const MOST_PATH_BYTES: usize = 90;
const JOB: &str = "demo";
const EXPORT: &str = "w-disk0";

/// Runs the replica: on trial on its overlay, with an export to write; later on the target, and there stopped, so that
/// it can be watched from its first write on.
const SCRIPT: &str = r#"#!/bin/sh
cd "$(dirname "$0")" || exit 1
if [ -e pid ]; then
    pid=$(cat pid)
    kill "$pid"
    while kill -0 "$pid" 2>/dev/null; do sleep 0.02; done
    rm -f pid qmp nbd
fi
[ "$1" = start ] || exit 0
if [ -n "$BLOCKFERRY_DISK_0_OVERLAY" ]; then
    set -- --blockdev "driver=qcow2,node-name=disk0,file.driver=file,file.filename=$BLOCKFERRY_DISK_0_OVERLAY" \
        --export type=nbd,id=w-disk0,node-name=disk0,name=w-disk0,writable=on
else
    set -- --blockdev "driver=raw,node-name=disk0,file.driver=file,file.filename=$BLOCKFERRY_DISK_0_TARGET"
fi
exec qemu-storage-daemon --daemonize --pidfile pid --chardev socket,path=qmp,server=on,wait=off,id=m --monitor chardev=m \
    --nbd-server addr.type=unix,addr.path=nbd,max-connections=16 "$@" 2>log
"#;

/// What was measured of the machine that ran.
#[derive(Debug, Serialize)]
pub(crate) struct MachineReceipt {
    disk_bytes: u64,
    passes: Vec<Pass>,
    pauses_seconds: Vec<f64>,
    passes_back: Vec<Pass>,
    pause_back_seconds: f64,
}

struct Sites<'a> {
    session: &'a Session,
    home: PathBuf,
    away: PathBuf,
    jobs: Jobs,
    context: JobContext,
    bytes: u64,
    /// What did not go as hoped.
    warnings: Arc<Mutex<Vec<String>>>,
    /// Writers that there were: each writes something else.
    writers: u64,
}

impl Drop for Sites<'_> {
    fn drop(&mut self) {
        // The replica's machine was started by a hook, so that nothing else ends it.
        let script = self.away.join("replica.sh");
        Command::new("sh").arg(script).arg("stop").status().ok();
    }
}

/// Shows it where QEMU's programs are installed and says so otherwise.
pub(crate) fn play(
    directory: &Path,
    options: &TargetOptions,
    size_bytes: u64,
    session: &Session,
    story: &mut Story<'_>,
) -> Result<Option<MachineReceipt>, Failure> {
    story.chapter("A machine that runs");
    let is_missing = |program: &&str| Command::new(program).arg("--version").output().is_err();
    let needed = ["qemu-storage-daemon", "qemu-img", "qemu-nbd"];
    if let Some(program) = needed.iter().find(|program| is_missing(program)) {
        story.tell(format_args!(
            "{program} is not installed (Debian: qemu-utils): so far the demo wrote the disk itself, between the runs, and \
             that is all that is shown"
        ));
        return Ok(None);
    }
    let directory =
        std::path::absolute(directory).map_err(|error| failed("the demo's directory", &error))?;
    if directory.as_os_str().len() > MOST_PATH_BYTES {
        story.tell("not shown: the path of the demo's directory is too long for sockets");
        return Ok(None);
    }
    let sites = Sites::make(&directory, options, size_bytes.min(MOST_BYTES), session)?;
    sites.play(story).map(Some)
}

impl<'a> Sites<'a> {
    fn make(
        directory: &Path,
        options: &TargetOptions,
        bytes: u64,
        session: &'a Session,
    ) -> Result<Self, Failure> {
        let [home, away] = ["home", "away"].map(|name| directory.join(name));
        for (path, what) in [(&home, "home"), (&away, "away")] {
            fs::create_dir_all(path).map_err(|error| failed(what, &error))?;
        }
        fs::write(away.join("replica.sh"), SCRIPT).map_err(|error| failed("a hook", &error))?;
        // Over there is what the disk was some time ago.
        let (source, target) = (home.join("disk0"), away.join("disk.raw"));
        disk::make(&source, bytes)?;
        fs::copy(&source, &target).map_err(|error| failed("copying the disk", &error))?;
        disk::use_it(&source)?;
        let jobs = directory.join("jobs");
        let jobs = Jobs::open(&jobs).map_err(|error| failure(&error, session))?;
        let mut context = JobContext::new(options.clone());
        context.cancel = session.cancel_token();
        let warnings = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&warnings);
        context.observer = Arc::new(move |told: &Told| {
            if let Told::Warning(_, text) = told {
                let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
                heard.push(text.clone());
            }
        });
        Ok(Self {
            session,
            home,
            away,
            jobs,
            context,
            bytes,
            warnings,
            writers: 0,
        })
    }

    fn play(mut self, story: &mut Story<'_>) -> Result<MachineReceipt, Failure> {
        let source = StorageDaemon::start(&self.home, "raw")
            .map_err(|error| failed("starting qemu-storage-daemon", &error))?;
        story.tell(format_args!(
            "qemu-storage-daemon serves a disk of {}, and somebody writes a page of it every {} ms",
            format_size(self.bytes),
            PAUSE.as_millis()
        ));
        let old = self.content(&self.target())?;
        let writer = self.write_home()?;

        story.chapter("Live passes, while it is written");
        let passes = self.ready(story)?;

        story.chapter("Cutover, and second thoughts");
        let first = self.cut_over(writer, story)?;
        let rolled_back = self.jobs.rollback(JOB, &self.context);
        self.went(rolled_back)?;
        claim(
            self.content(&self.target())? == old,
            "the target is at the point before the job again",
            "something else",
        )?;
        let writer = self.write_home()?;
        thread::sleep(IN_USE);
        story.tell(
            "rolled back: the target is what it was, bit for bit, and the source is written again",
        );

        story.chapter("Cutover, on trial, commit");
        self.ready(story)?;
        let second = self.cut_over(writer, story)?;
        let writer = self.write_away()?;
        thread::sleep(IN_USE);
        let written = writer.stop();
        let committed = self.jobs.commit(JOB, OldSource::End, &self.context);
        self.went(committed)?;
        claim(
            written.is_on(&[self.content(&self.target())?]),
            "what was written on trial is kept by the commit",
            "that some of it is not",
        )?;
        drop(source);
        story.tell("what was written on trial is kept; the machine at home has ended");

        story.chapter("The way back");
        let writer = self.write_away()?;
        thread::sleep(IN_USE);
        let ready = self
            .jobs
            .reverse(JOB, None, OldSource::Keep, Until::Ready, &self.context);
        self.went(ready)?;
        let passes_back = self.status()?.passes;
        tell_passes(&passes_back, story);
        let moved: u64 = passes_back.iter().map(|pass| pass.changed_bytes).sum();
        let warnings = self
            .warnings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .join("; ");
        claim(
            warnings.is_empty(),
            "only what changed is read on the way back",
            warnings,
        )?;
        let back = self.jobs.complete(JOB, None, &self.context);
        self.went(back)?;
        let written = writer.stop();
        claim(
            written.is_on(&[self.content(&self.disk())?]),
            "every acknowledged write is at home",
            "that some are missing",
        )?;
        let pause = self.pause()?;
        story.tell(format_args!(
            "home again after a pause of {}, with {} of {}; every acknowledged write is there",
            duration(pause),
            format_size(moved),
            format_size(self.bytes)
        ));
        let committed = self.jobs.commit(JOB, OldSource::Keep, &self.context);
        self.went(committed)?;
        Ok(MachineReceipt {
            disk_bytes: self.bytes,
            passes,
            pauses_seconds: vec![first, second],
            passes_back,
            pause_back_seconds: pause,
        })
    }

    fn disk(&self) -> PathBuf {
        self.home.join("disk0")
    }

    fn target(&self) -> PathBuf {
        self.away.join("disk.raw")
    }

    fn spec(&self) -> Result<JobSpec, Failure> {
        let script = self.away.join("replica.sh");
        let text = format!(
            "name = {JOB:?}\nrefresh = \"200ms\"\n\
             [machine]\nqmp = {:?}\nnbd = {:?}\n\
             [[disk]]\nnode = \"disk0\"\ntarget = {:?}\nwriters = [{EXPORT:?}]\n\
             [hooks]\nstart-target = [\"sh\", {script:?}, \"start\"]\nstop-target = [\"sh\", {script:?}, \"stop\"]\n\
             [reverse.machine]\nqmp = {:?}\nnbd = {:?}\n\
             [[reverse.disk]]\nnode = \"disk0\"\ntarget = {:?}\nwriters = [{EXPORT:?}]\n",
            self.home.join("qmp"),
            self.home.join("nbd"),
            self.target(),
            self.away.join("qmp"),
            self.away.join("nbd"),
            self.disk(),
        );
        JobSpec::from_toml(&text).map_err(|error| failure(&error, self.session))
    }

    fn ready(&mut self, story: &Story<'_>) -> Result<Vec<Pass>, Failure> {
        let spec = self.spec()?;
        let ready = self.jobs.start(&spec, Until::Ready, &self.context);
        self.went(ready)?;
        let status = self.status()?;
        tell_passes(&status.passes, story);
        if let Some(seconds) = status.predicted_downtime_seconds {
            let (predicted, budget) = (duration(seconds), duration(status.downtime_budget_seconds));
            story.tell(format_args!(
                "ready: a pause of {predicted} is predicted, the budget is {budget}"
            ));
        }
        Ok(status.passes)
    }

    fn cut_over(&mut self, writer: Writer, story: &Story<'_>) -> Result<f64, Failure> {
        let over = self.jobs.complete(JOB, None, &self.context);
        self.went(over)?;
        let written = writer.stop();
        claim(
            written.is_on(&[self.content(&self.target())?]),
            "every acknowledged write is on the target",
            "that some are missing",
        )?;
        let pause = self.pause()?;
        story.tell(format_args!(
            "the writer was stopped, the last changes were copied and proven, the replica started: a pause of {}; every \
             acknowledged write is there",
            duration(pause)
        ));
        Ok(pause)
    }

    fn pause(&self) -> Result<f64, Failure> {
        let pause = self.status()?.job.downtime_seconds;
        pause.ok_or_else(|| check::broken("the pause was measured", "nothing"))
    }

    fn status(&self) -> Result<JobStatus, Failure> {
        let status = self.jobs.status(JOB, &self.context.targets);
        self.went(status)
    }

    fn went<T>(&self, outcome: Result<T, Error>) -> Result<T, Failure> {
        outcome.map_err(|error| failure(&error, self.session))
    }

    fn content(&self, path: &Path) -> Result<Vec<u8>, Failure> {
        fs::read(path).map_err(|error| failed("reading a disk", &error))
    }

    fn write_home(&mut self) -> Result<Writer, Failure> {
        self.writer(&self.home.join("nbd"), &self.disk())
    }

    fn write_away(&mut self) -> Result<Writer, Failure> {
        self.writer(&self.away.join("nbd"), &self.target())
    }

    /// Writes a machine through its server; `disk` is what it has.
    fn writer(&mut self, nbd: &Path, disk: &Path) -> Result<Writer, Failure> {
        self.writers += 1;
        let opened = NbdAddress::unix(nbd, EXPORT)
            .and_then(|address| NbdDevice::open_target(&address, &NbdOptions::default()));
        let device = opened.map_err(|error| Failure::from_error(Exit::Source, &error))?;
        let content = vec![self.content(disk)?];
        let devices: Vec<Arc<dyn BlockTarget>> = vec![device];
        let seed = disk::SEED + self.writers;
        Ok(Writer::start(devices, content, PAUSE, seed))
    }
}

fn tell_passes(passes: &[Pass], story: &Story<'_>) {
    for pass in passes {
        story.tell(format_args!(
            "pass {}: {} changed, copied in {}",
            pass.number,
            format_size(pass.changed_bytes),
            duration(pass.seconds)
        ));
    }
}

fn failed(what: &str, error: &std::io::Error) -> Failure {
    Failure::new(Exit::Target, format!("{what}: {error}"))
}
