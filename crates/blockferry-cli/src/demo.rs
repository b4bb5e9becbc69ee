//! `demo`: the main job on a disk made for it. Full download, changes, a kill in the middle of a delta sync, the old
//! point intact, the resume, equal roots, the way back, the delta again, acceptance. Then the same with a machine that
//! runs, over and back, where a qemu-storage-daemon is installed.
//!
//! Nothing is hard-coded: every number comes from what happened, and a promise that does not hold ends the demo with
//! the exit code for corruption.

mod check;
mod child;
mod disk;
mod machine;
mod place;
mod story;

use std::path::{Path, PathBuf};
use std::time::Instant;

use blockferry_testkit::images::FileSystem;
use serde::Serialize;

use crate::address::recorded;
use crate::arguments::{DemoArguments, Pace};
use crate::engine::{
    self, Mode, Outcome, Receipt, Status, SyncOptions, Target, TargetOptions, format_size,
};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::progress::Look;
use crate::session::Session;
use crate::verbs::report::{duration, rate, short};
use crate::verbs::{self, sync};
use check::claim;
use child::{Ending, Run};
use machine::MachineReceipt;
use place::Place;
use story::Story;

/// How long the run that is killed would take if nobody killed it.
const KILLED_RUN_SECONDS: u64 = 4;

/// The run is slowed until the kill lands in its middle; each attempt is four times slower.
const ATTEMPTS: u32 = 4;

/// What the demo leaves: the receipts of its runs and what was checked between them.
#[derive(Debug, Serialize)]
struct DemoReceipt {
    file_system: String,
    full: Receipt,
    changed_bytes: u64,
    kill: Kill,
    status_after_kill: Status,
    resumed: Receipt,
    rolled_back: Outcome,
    delta_again: Receipt,
    accepted: Outcome,
    file_system_checked: bool,
    machine: Option<MachineReceipt>,
    elapsed_seconds: f64,
}

#[derive(Debug, Serialize)]
struct Kill {
    after_seconds: f64,
    durable_log_bytes: u64,
    bytes_per_second: u64,
}

#[derive(Serialize)]
struct Summary<'a> {
    receipt: &'a Path,
    #[serde(flatten)]
    demo: &'a DemoReceipt,
}

/// Files and tools of one demo.
struct Demo<'a> {
    session: &'a Session,
    story: Story<'a>,
    source: PathBuf,
    target: PathBuf,
    old: PathBuf,
    sites: PathBuf,
    options: TargetOptions,
}

pub(crate) fn run(arguments: &DemoArguments, session: &Session) -> Result<Exit, Failure> {
    let place = Place::make(arguments.dir.as_deref(), arguments.keep)?;
    let mut demo = Demo::new(&place, session);
    let receipt = demo.play(arguments.size)?;
    let path = place.receipt();
    store(&path, &receipt)?;
    session.output.say(format_args!(
        "\nAll of it held, in {}. The receipt: {}",
        duration(receipt.elapsed_seconds),
        path.display()
    ));
    session.output.summary(
        "demo",
        &Summary {
            receipt: &path,
            demo: &receipt,
        },
    );
    Ok(Exit::Done)
}

fn store(path: &Path, receipt: &DemoReceipt) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(receipt).expect("receipts have string keys");
    std::fs::write(path, text + "\n").map_err(|error| {
        Failure::new(
            Exit::Target,
            format!("writing the receipt {}: {error}", path.display()),
        )
    })
}

impl<'a> Demo<'a> {
    fn new(place: &Place, session: &'a Session) -> Self {
        let mut options = TargetOptions::new(place.file("state"));
        options.state_dir = None;
        Self {
            session,
            story: Story::new(&session.output),
            source: place.file("source.raw"),
            target: place.file("target.raw"),
            old: place.file("old-point.raw"),
            sites: place.file("m"),
            options,
        }
    }

    /// The whole story; each chapter checks what it claims.
    fn play(&mut self, size_bytes: u64) -> Result<DemoReceipt, Failure> {
        let started = Instant::now();
        let kind = self.make_disk(size_bytes)?;
        let full = self.full_download()?;
        let changed_bytes = self.change_source()?;
        let (kill, status_after_kill) = self.pull_the_plug(changed_bytes)?;
        let resumed = self.resume()?;
        let rolled_back = self.roll_back()?;
        let delta_again = self.delta_again()?;
        let accepted = self.accept()?;
        let file_system_checked = self.check_file_system(kind)?;
        let machine = machine::play(
            &self.sites,
            &self.options,
            size_bytes,
            self.session,
            &mut self.story,
        )?;
        let elapsed_seconds = started.elapsed().as_secs_f64();
        Ok(DemoReceipt {
            file_system: kind.to_string(),
            full,
            changed_bytes,
            kill,
            status_after_kill,
            resumed,
            rolled_back,
            delta_again,
            accepted,
            file_system_checked,
            machine,
            elapsed_seconds,
        })
    }

    fn make_disk(&mut self, size_bytes: u64) -> Result<FileSystem, Failure> {
        self.story.chapter("A disk");
        let started = Instant::now();
        let kind = disk::make(&self.source, size_bytes)?;
        self.story.tell(format_args!(
            "{} of {kind} with files on it, made in {}: {}",
            format_size(size_bytes),
            duration(started.elapsed().as_secs_f64()),
            self.source.display()
        ));
        Ok(kind)
    }

    fn full_download(&mut self) -> Result<Receipt, Failure> {
        self.story
            .chapter("Full download to a place where nothing is yet");
        let receipt = self.sync(Mode::Full)?;
        self.story.tell(&receipt.reason);
        self.story.tell(format_args!(
            "{} of {} sent in {}{}; holes and zeros cost nothing",
            format_size(receipt.sent_bytes),
            format_size(receipt.source_bytes),
            duration(receipt.elapsed_seconds),
            speed(receipt.sent_bytes, receipt.elapsed_seconds)
        ));
        self.proven_equal(&receipt)?;
        std::fs::copy(&self.target, &self.old).map_err(|error| {
            Failure::new(
                Exit::Target,
                format!("keeping a copy of the old point: {error}"),
            )
        })?;
        Ok(receipt)
    }

    fn change_source(&mut self) -> Result<u64, Failure> {
        self.story.chapter("The source is used");
        let changed_bytes = disk::use_it(&self.source)?;
        let found_bytes = self.different_bytes()?;
        claim(
            found_bytes == changed_bytes,
            "comparing finds exactly the pages that were changed",
            format_args!("{found_bytes} bytes instead of {changed_bytes}"),
        )?;
        self.story.tell(format_args!(
            "files were written: {} differ now, in pages of 4 KiB; the target is older",
            format_size(changed_bytes)
        ));
        Ok(changed_bytes)
    }

    fn pull_the_plug(&mut self, changed_bytes: u64) -> Result<(Kill, Status), Failure> {
        self.story
            .chapter("A delta sync, and the plug is pulled in its middle");
        let kill = self.kill(changed_bytes)?;
        self.story.tell(format_args!(
            "killed (SIGKILL) after {}, with {} of its log durable (new and old pages)",
            duration(kill.after_seconds),
            format_size(kill.durable_log_bytes)
        ));
        check::same_bytes(
            &self.target,
            &self.old,
            "the target is at its old point after the kill",
        )?;
        self.story
            .tell("the target is still its old point, bit for bit");
        let status = verbs::status::look(&(&self.target).into(), &self.options, self.session)
            .map_err(|e| self.failure(&e))?;
        let durable_bytes = status
            .session
            .as_ref()
            .map_or(0, |session| session.durable_bytes);
        claim(durable_bytes > 0, "status knows what is durable", "nothing")?;
        self.story.tell(format_args!(
            "status: {}, {} durable, next: {}",
            status.state,
            format_size(durable_bytes),
            status
                .next
                .first()
                .map_or("-", |step| step.command.as_str())
        ));
        Ok((kill, status))
    }

    fn resume(&mut self) -> Result<Receipt, Failure> {
        self.story.chapter("Resume");
        let recorded =
            engine::resume_source(&self.target, &self.options).map_err(|e| self.failure(&e))?;
        claim(
            Path::new(&recorded) == self.source,
            "the recorded source is the source",
            &recorded,
        )?;
        let receipt = self.sync(Mode::Delta)?;
        claim(
            receipt.resumed_bytes > 0,
            "the resumed run uses what was durable",
            "that it used nothing",
        )?;
        claim(
            receipt.restaged_bytes == 0,
            "nothing durable is sent again",
            receipt.restaged_bytes,
        )?;
        self.story.tell(format_args!(
            "{} were durable already, {} were staged now",
            format_size(receipt.resumed_bytes),
            format_size(receipt.staged_bytes)
        ));
        self.story.tell(format_args!(
            "durable bytes sent again: {}",
            receipt.restaged_bytes
        ));
        self.proven_equal(&receipt)?;
        Ok(receipt)
    }

    fn roll_back(&mut self) -> Result<Outcome, Failure> {
        self.story.chapter("Second thoughts: roll back");
        let outcome = self.decide(engine::rollback)?;
        claim(
            outcome.outcome == "rolled_back",
            "the target is rolled back",
            outcome.outcome,
        )?;
        check::same_bytes(
            &self.target,
            &self.old,
            "the rolled back target is its old point",
        )?;
        self.story.tell(format_args!(
            "in {} the target is its old point again, bit for bit",
            duration(outcome.elapsed_seconds)
        ));
        Ok(outcome)
    }

    fn delta_again(&mut self) -> Result<Receipt, Failure> {
        self.story.chapter("The delta again, undisturbed");
        let receipt = self.sync(Mode::Delta)?;
        self.story.tell(&receipt.reason);
        self.story.tell(format_args!(
            "{} of {} sent in {} ({})",
            format_size(receipt.sent_bytes),
            format_size(receipt.source_bytes),
            duration(receipt.elapsed_seconds),
            receipt.strategy.map_or_else(
                || "nothing written".to_owned(),
                |strategy| strategy.to_string()
            )
        ));
        self.proven_equal(&receipt)?;
        Ok(receipt)
    }

    fn accept(&mut self) -> Result<Outcome, Failure> {
        self.story.chapter("Accept: the old point may go");
        let outcome = self.decide(engine::accept)?;
        claim(
            outcome.outcome == "accepted",
            "the new point is accepted",
            outcome.outcome,
        )?;
        self.story
            .tell(format_args!("{} freed", format_size(outcome.freed_bytes)));
        Ok(outcome)
    }

    fn check_file_system(&mut self, kind: FileSystem) -> Result<bool, Failure> {
        self.story.chapter("The file system on the target");
        if kind != FileSystem::Ext4 {
            self.story
                .tell(format_args!("{kind}: e2fsck cannot check it"));
            return Ok(false);
        }
        let checked = check::file_system(&self.target)?.is_some();
        let outcome = if checked {
            "e2fsck -fn: clean"
        } else {
            "e2fsck is not installed: not checked"
        };
        self.story.tell(outcome);
        Ok(checked)
    }

    /// Kills a run of the delta in its middle, slowing it down until that succeeds.
    fn kill(&self, changed_bytes: u64) -> Result<Kill, Failure> {
        let mut bytes_per_second = (changed_bytes / KILLED_RUN_SECONDS).max(64 << 10);
        for _ in 0..ATTEMPTS {
            let run = Run {
                source: &self.source,
                target: &self.target,
                state_root: &self.options.device_state_root,
                bytes_per_second,
                enough_bytes: changed_bytes / 2,
            };
            match child::kill_in_the_middle(&run)? {
                Ending::Killed {
                    durable_bytes,
                    after,
                } => {
                    let after_seconds = after.as_secs_f64();
                    return Ok(Kill {
                        after_seconds,
                        durable_log_bytes: durable_bytes,
                        bytes_per_second,
                    });
                }
                Ending::Finished => {
                    self.story
                        .tell("it finished before it could be killed; once more, slower");
                    self.decide(engine::rollback)?;
                    bytes_per_second = (bytes_per_second / 4).max(1);
                }
            }
        }
        Err(Failure::new(
            Exit::Internal,
            "the sync finished each time before it could be killed",
        ))
    }

    fn different_bytes(&self) -> Result<u64, Failure> {
        let source = verbs::open_path(&self.source, false)?;
        let target = verbs::open_path(&self.target, true)?;
        let (context, display) = self.session.context(Look::Story);
        let outcome = engine::compare(&source, &target, &context, &mut |_| {});
        drop(display);
        outcome
            .map(|comparison| comparison.different_bytes)
            .map_err(|e| self.failure(&e))
    }

    fn sync(&self, mode: Mode) -> Result<Receipt, Failure> {
        let disk = verbs::open_path(&self.source, false)?;
        let mut target = Target::open(&self.target, &self.options).map_err(|e| self.failure(&e))?;
        let options = self.sync_options(mode)?;
        let (context, display) = self.session.context(Look::Story);
        let outcome = engine::sync(disk, &mut target, &options, &context);
        drop(display);
        outcome.map_err(|e| self.failure(&e))
    }

    fn sync_options(&self, mode: Mode) -> Result<SyncOptions, Failure> {
        let source = recorded(&(&self.source).into());
        let mut options = sync::paced(source, &Pace::default());
        options.mode = mode;
        Ok(options)
    }

    fn decide(
        &self,
        decision: fn(&mut Target, &engine::Context) -> Result<Outcome, engine::Error>,
    ) -> Result<Outcome, Failure> {
        let mut target = Target::open(&self.target, &self.options).map_err(|e| self.failure(&e))?;
        let (context, display) = self.session.context(Look::Story);
        let outcome = decision(&mut target, &context);
        drop(display);
        outcome.map_err(|e| self.failure(&e))
    }

    /// The roots agree, and so does every byte.
    fn proven_equal(&self, receipt: &Receipt) -> Result<(), Failure> {
        let (source, target) = (&receipt.source_root, &receipt.target_root);
        claim(
            source == target,
            "the roots are equal",
            format_args!("{source} and {target}"),
        )?;
        check::same_bytes(&self.source, &self.target, "source and target are equal")?;
        self.story.tell(format_args!(
            "roots equal ({}), and so is every byte",
            short(target)
        ));
        Ok(())
    }

    fn failure(&self, error: &engine::Error) -> Failure {
        self.session.failure(error)
    }
}

fn speed(bytes: u64, seconds: f64) -> String {
    rate(bytes, seconds).map_or_else(String::new, |rate| format!(", {}/s", format_size(rate)))
}
