//! The command is killed, with nothing it could catch: at random moments, and at chosen system calls. Each time
//! `status` tells the truth, and one more command ends at the new point without staging a durable byte again.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use blockferry_testkit::Random;
use serde_json::{Value, json};

use crate::lab::{
    Answer, EXPORT, Lab, LoopDevice, MIB, NbdServer, output, same, seeded, skipped, tool,
    with_files,
};

/// A sync to be killed: how it is asked for, and the two points it goes between.
struct Case {
    lab: Lab,
    target: String,
    /// Where the bytes of the target are.
    place: PathBuf,
    arguments: &'static str,
    /// `None`: the target is absent at first.
    old: Option<Vec<u8>>,
    new: Vec<u8>,
    device: Option<LoopDevice>,
    server: Option<NbdServer>,
    found: Found,
}

/// Where the kills landed.
#[derive(Debug, Default)]
struct Found {
    kills: u32,
    unknown: u32,
    staging: u32,
    committed: u32,
    finished: u32,
    resumed: u32,
    rolled_back: u32,
}

impl Case {
    fn new(seed: u64, arguments: &'static str) -> Self {
        let lab = Lab::new();
        let old = lab.disk("old", seed, 7 * MIB + 4096 * 3 + 512);
        // Of another size as well, and with pages that become zero and zeros that become data.
        let mut grown = old.clone();
        grown.resize(8 * usize::try_from(MIB).expect("small"), 7);
        let new = lab.edited("new", seed + 1, &grown, 0.25);
        Self {
            place: lab.path("target"),
            lab,
            target: "target".to_owned(),
            arguments,
            old: Some(old),
            new,
            device: None,
            server: None,
            found: Found::default(),
        }
    }

    fn absent(seed: u64, arguments: &'static str) -> Self {
        Self {
            old: None,
            ..Self::new(seed, arguments)
        }
    }

    /// On a loop device, which keeps its size.
    fn on_device(seed: u64, arguments: &'static str, sector_bytes: u32) -> Option<Self> {
        let mut case = Self::of_fixed_size(seed, arguments);
        let device = LoopDevice::attach(&case.lab.path("disk"), sector_bytes)?;
        case.target = device.path().to_owned();
        case.place = device.path().into();
        case.device = Some(device);
        Some(case)
    }

    /// On an NBD export, which keeps its size and does not tell who wrote it.
    fn on_export(seed: u64, arguments: &'static str) -> Option<Self> {
        let mut case = Self::of_fixed_size(seed, arguments);
        case.server = Some(NbdServer::start_writable(&case.lab, "disk")?);
        case.target = EXPORT.to_owned();
        case.place = case.lab.path("disk");
        Some(case)
    }

    /// The old point is in `disk` and as large as the new one.
    fn of_fixed_size(seed: u64, arguments: &'static str) -> Self {
        let mut case = Self::new(seed, arguments);
        let old = case.old.as_mut().expect("made above");
        old.resize(case.new.len(), 9);
        case.lab.write("disk", old);
        case
    }

    fn sync_line(&self) -> String {
        format!("sync new {} {}", self.target, self.arguments)
    }

    /// The target at its old point, nothing known of it.
    fn reset(&self) {
        fs::remove_dir_all(self.lab.path("state-root")).ok();
        fs::remove_dir_all(self.lab.path(".target.blockferry")).ok();
        for entry in fs::read_dir(self.lab.root()).expect("listed").flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name == "target" || name.starts_with(".target.") {
                fs::remove_file(entry.path()).expect("removed");
            }
        }
        match (&self.old, self.device.is_some() || self.server.is_some()) {
            // Not truncated: others have it open.
            (Some(old), true) => self.lab.patch(&self.place.to_string_lossy(), 0, old),
            (Some(old), false) => self.lab.write("target", old),
            (None, _) => {}
        }
    }

    fn is_old(&self) -> bool {
        match &self.old {
            Some(old) => same(&self.place, old),
            None => !self.place.exists(),
        }
    }

    fn is_new(&self) -> bool {
        same(&self.place, &self.new)
    }

    /// After a kill: status against the bytes themselves. Returns the state.
    fn judge(&mut self) -> String {
        let status = self.lab.must(&format!("status {}", self.target));
        let status = status.summary();
        let state = status["state"].as_str().expect("a state").to_owned();
        assert_eq!(status["running"], false, "nobody works on it: {status:#}");
        match state.as_str() {
            "unknown" | "staging" => assert!(self.is_old(), "not at its old point: {status:#}"),
            "applied" | "at" => assert!(self.is_new(), "not at its new point: {status:#}"),
            "committed" => {}
            // Only where the old content was given up by name.
            "incomplete" => assert!(self.arguments.contains("--in-place"), "{status:#}"),
            other => panic!("{other} after a kill of sync: {status:#}"),
        }
        self.found.kills += 1;
        *match state.as_str() {
            "unknown" => &mut self.found.unknown,
            "committed" => &mut self.found.committed,
            "applied" | "at" => &mut self.found.finished,
            _ => &mut self.found.staging,
        } += 1;
        state
    }

    /// The command that status advises; a sync where there is nothing to resume.
    fn next_line(&self, state: &str) -> String {
        match state {
            "staging" | "committed" | "incomplete" => format!("resume {}", self.target),
            // Full mode would do everything once more, and the old point would be the new one.
            "applied" | "at" => format!("sync new {}", self.target),
            _ => self.sync_line(),
        }
    }

    fn finish(&mut self, state: &str) {
        let answer = self.lab.must(&self.next_line(state));

        assert_eq!(answer.count("restaged_bytes"), 0, "{:#}", answer.summary());
        assert!(
            self.is_new(),
            "not at its new point after {state}: {:#}",
            answer.summary()
        );
        self.found.resumed += u32::from(answer.count("resumed_bytes") > 0);
        let after = self.lab.must(&format!("status {}", self.target));
        let after = after.summary()["state"].clone();
        let keeps_old = self.old.is_some() && !self.arguments.contains("--in-place");
        assert_eq!(after, if keeps_old { "applied" } else { "at" });
        let again = self.lab.must(&format!("sync new {}", self.target));
        assert_eq!(again.summary()["outcome"], "identical");
    }

    fn roll_back(&mut self) {
        if self.old.is_none() || self.arguments.contains("--in-place") {
            return;
        }
        self.lab.must(&format!("rollback {}", self.target));
        assert!(
            self.is_old(),
            "rolled back to something else than the old point"
        );
        self.found.rolled_back += 1;
    }

    /// How long a run takes that nobody kills, and that the machine does not hold up.
    fn undisturbed(&self) -> Duration {
        let runs = (0..3).map(|_| {
            self.reset();
            let start = Instant::now();
            self.lab.must(&self.sync_line());
            assert!(self.is_new());
            start.elapsed()
        });
        runs.min().expect("three runs")
    }

    fn run_killed_after(&self, line: &str, moment: Duration) -> Answer {
        let run = self.lab.start(line);
        std::thread::sleep(moment);
        run.kill()
    }

    /// Kills at `kills` moments, in part the resume as well.
    fn kill_at_random_moments(&mut self, random: &mut Random, kills: u32) {
        let whole = self.undisturbed();
        while self.found.kills < kills {
            self.reset();
            self.run_killed_after(&self.sync_line(), part_of(random, whole));
            let mut state = self.judge();
            while random.chance(1, 3) {
                self.run_killed_after(&self.next_line(&state), part_of(random, whole));
                state = self.judge();
            }
            self.finish(&state);
            if random.chance(1, 3) {
                self.roll_back();
            }
        }
        self.report();
    }

    #[expect(
        clippy::print_stderr,
        reason = "where the kills landed is what makes the test credible"
    )]
    fn report(&self) {
        eprintln!("{}: {:?}", self.sync_line(), self.found);
    }
}

/// A moment of a run, a little beyond its end included.
fn part_of(random: &mut Random, whole: Duration) -> Duration {
    let permille = u32::try_from(random.below(1050)).expect("below 1050");
    whole * permille / 1000
}

#[test]
fn redo_survives_fifty_kills_at_random_moments() {
    let mut random = seeded("redo_survives_fifty_kills_at_random_moments");
    let mut case = Case::new(1, "--mode delta --strategy redo");

    case.kill_at_random_moments(&mut random, 50);

    assert!(
        case.found.staging > 0 && case.found.resumed > 0,
        "{:?}",
        case.found
    );
}

#[test]
fn shadow_survives_kills_at_random_moments() {
    let mut random = seeded("shadow_survives_kills_at_random_moments");
    let mut case = Case::new(2, "--mode full --strategy shadow");

    case.kill_at_random_moments(&mut random, 16);

    assert!(case.found.staging > 0, "{:?}", case.found);
}

#[test]
fn an_absent_target_survives_kills_at_random_moments() {
    let mut random = seeded("an_absent_target_survives_kills_at_random_moments");
    let mut case = Case::absent(3, "");

    case.kill_at_random_moments(&mut random, 16);
}

#[test]
fn an_in_place_run_survives_kills_at_random_moments() {
    let mut random = seeded("an_in_place_run_survives_kills_at_random_moments");
    let mut case = Case::new(4, "--mode delta --in-place");

    case.kill_at_random_moments(&mut random, 12);
}

#[test]
fn a_block_device_survives_kills_at_random_moments() {
    let name = "a_block_device_survives_kills_at_random_moments";
    let mut random = seeded(name);
    let Some(mut case) = Case::on_device(5, "--mode delta", 512) else {
        return skipped(name, "root and losetup");
    };

    case.kill_at_random_moments(&mut random, 16);
}

#[test]
fn an_nbd_export_survives_kills_at_random_moments() {
    let name = "an_nbd_export_survives_kills_at_random_moments";
    let mut random = seeded(name);
    let Some(mut case) = Case::on_export(9, "--mode delta") else {
        return skipped(name, "qemu-nbd");
    };

    case.kill_at_random_moments(&mut random, 16);

    assert!(
        case.found.staging + case.found.committed > 0,
        "{:?}",
        case.found
    );
}

// --- chosen system calls -------------------------------------------------------------------------------------------

/// The calls that change something on the medium or make it durable.
const CALLS: &str = "pwrite64,pwritev,pwritev2,fdatasync,fsync,ftruncate,fallocate,renameat2,renameat,unlinkat,openat,ioctl";

/// How often one thread of an undisturbed run makes each call: the most of all threads.
fn calls_of(case: &Case) -> Vec<(String, u32)> {
    case.reset();
    let log = case.lab.path("strace.log");
    let mut strace = traced(
        case,
        &case.sync_line(),
        &[
            "-o",
            log.to_str().expect("text"),
            "-e",
            &format!("trace={CALLS}"),
        ],
    );
    assert!(output(&mut strace).expect("strace runs").status.success());
    let text = with_files(|| fs::read_to_string(&log)).expect("written by strace");
    let mut counts = std::collections::BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(thread), Some(call)) = (words.next(), words.next()) else {
            continue;
        };
        if let Some((name, _)) = call.split_once('(') {
            *counts
                .entry((name.to_owned(), thread.to_owned()))
                .or_insert(0u32) += 1;
        }
    }
    let mut most = std::collections::BTreeMap::new();
    for ((name, _), count) in counts {
        let entry = most.entry(name).or_insert(0);
        *entry = count.max(*entry);
    }
    most.into_iter().collect()
}

fn traced(case: &Case, line: &str, options: &[&str]) -> Command {
    let run = case.lab.command(line);
    let mut strace = Command::new("strace");
    // Not with --seccomp-bpf, which lets the signal get lost.
    strace
        .args(["-f", "-qq"])
        .args(options)
        .arg(run.get_program())
        .args(run.get_args());
    strace
        .current_dir(case.lab.root())
        .env("BLOCKFERRY_STATE_ROOT", case.lab.path("state-root"));
    strace
}

/// All positions of rare calls, some of frequent ones, and the last few of each: commit, apply and publish are there.
fn positions(calls: &[(String, u32)], of_each: u32) -> Vec<(String, u32)> {
    let mut chosen = Vec::new();
    for (call, count) in calls {
        let step = count.div_ceil(of_each).max(1);
        let some = (1..=*count).filter(|at| (count - at).is_multiple_of(step) || at + 3 > *count);
        chosen.extend(some.map(|at| (call.clone(), at)));
    }
    chosen
}

fn kill_at_system_calls(case: &mut Case, name: &str, of_each: u32) {
    if tool(&["strace", "-V"]).is_none() {
        return skipped(name, "strace");
    }
    for (number, (call, at)) in positions(&calls_of(case), of_each).into_iter().enumerate() {
        run_killed_at(case, &call, at, &[]);
        let state = case.judge();
        case.finish(&state);
        if number % 3 == 0 {
            case.roll_back();
        }
    }
    case.report();
}

/// Kills the command when one of its threads makes this call for the so-manieth time. Whether it was killed.
fn killed_at(case: &Case, line: &str, call: &str, at: u32, which: &[&str]) -> bool {
    let (trace, inject) = (
        format!("trace={call}"),
        format!("inject={call}:signal=SIGKILL:when={at}"),
    );
    let options = ["-o", "/dev/null", "-e", &trace, "-e", &inject];
    let mut strace = traced(case, line, &[&options, which].concat());
    let ended = output(&mut strace).expect("strace runs");
    !ended.status.success()
}

fn run_killed_at(case: &Case, call: &str, at: u32, which: &[&str]) -> bool {
    case.reset();
    killed_at(case, &case.sync_line(), call, at, which)
}

/// Decisions and what follows from them are written one after the other: a kill in between must show in the status.
fn kill_at_each_write_of_the_state(case: &mut Case, name: &str) {
    if tool(&["strace", "-V"]).is_none() {
        return skipped(name, "strace");
    }
    let state = case.lab.path(".target.blockferry/state");
    let only_it = ["-P", state.to_str().expect("paths of tests are text")];
    for call in ["pwrite64", "pwritev", "fdatasync", "fsync"] {
        let mut at = 1;
        while run_killed_at(case, call, at, &only_it) {
            let state = case.judge();
            case.finish(&state);
            case.roll_back();
            at += 1;
        }
    }
    case.report();
    assert!(case.found.kills >= 4, "{:?}", case.found);
}

#[test]
fn status_tells_the_truth_after_a_kill_between_any_two_writes_of_the_state() {
    let name = "status_tells_the_truth_after_a_kill_between_any_two_writes_of_the_state";
    for arguments in [
        "--mode delta --strategy redo",
        "--mode full --strategy shadow",
    ] {
        kill_at_each_write_of_the_state(&mut Case::new(8, arguments), name);
    }
}

#[test]
fn redo_survives_a_kill_at_each_kind_of_system_call() {
    let name = "redo_survives_a_kill_at_each_kind_of_system_call";
    let mut case = Case::new(6, "--mode delta --strategy redo");

    kill_at_system_calls(&mut case, name, 6);

    let found = &case.found;
    let all = found.unknown > 0 && found.staging > 0 && found.committed > 0 && found.finished > 0;
    assert!(all || found.kills == 0, "{found:?}");
}

#[test]
fn shadow_survives_a_kill_at_each_kind_of_system_call() {
    let name = "shadow_survives_a_kill_at_each_kind_of_system_call";
    let mut case = Case::new(7, "--mode full --strategy shadow");

    kill_at_system_calls(&mut case, name, 3);
}

/// Calls of `rollback` and `accept` that write, remove or make durable.
const DECIDING: [&str; 6] = [
    "pwrite64",
    "pwritev",
    "fdatasync",
    "fsync",
    "unlinkat",
    "renameat2",
];

/// Kills `verb` at its calls in turn, at each of those on the state file and at ever fewer of the others, and hands
/// status and target to `judge`.
fn kill_while_deciding(arguments: &'static str, verb: &str, judge: impl Fn(&Case, &Value)) {
    let case = Case::new(9, arguments);
    let state = case.lab.path(".target.blockferry/state");
    let only_it = ["-P", state.to_str().expect("paths of tests are text")];
    let line = format!("{verb} target");
    let kill = |call: &str, at: u32, which: &[&str]| {
        case.reset();
        case.lab.must(&case.sync_line());
        let killed = killed_at(&case, &line, call, at, which);
        if killed {
            judge(&case, case.lab.must("status target").summary());
        }
        killed
    };
    for call in DECIDING {
        (1..).find(|at| !kill(call, *at, &only_it));
        let mut at = 1;
        while kill(call, at, &[]) {
            at += 1 + at / 2;
        }
    }
}

#[test]
fn a_killed_rollback_is_where_status_says_and_is_finished_by_the_next_one() {
    let name = "a_killed_rollback_is_where_status_says_and_is_finished_by_the_next_one";
    if tool(&["strace", "-V"]).is_none() {
        return skipped(name, "strace");
    }
    for arguments in ["--strategy redo --mode delta", "--strategy shadow"] {
        kill_while_deciding(arguments, "rollback", |case, status| {
            let state = status["state"].as_str().expect("a state");
            match state {
                "applied" => assert!(case.is_new(), "{status:#}"),
                "rolling_back" => {}
                "unknown" | "at" => assert!(case.is_old(), "{status:#}"),
                other => panic!("{other} after a kill of rollback: {status:#}"),
            }
            let again = case.lab.run("rollback target");
            // One that was finished before has nothing left to return to, and says so.
            let finished = matches!(state, "unknown" | "at");
            let expected = if finished { 4 } else { 0 };
            assert_eq!(again.code, Some(expected), "{state}: {again:#?}");
            assert!(case.is_old(), "{state}: not the old point: {again:#?}");
        });
    }
}

#[test]
fn a_killed_accept_keeps_the_new_point_and_the_next_one_frees_the_rest() {
    let name = "a_killed_accept_keeps_the_new_point_and_the_next_one_frees_the_rest";
    if tool(&["strace", "-V"]).is_none() {
        return skipped(name, "strace");
    }
    for arguments in ["--strategy redo --mode delta", "--strategy shadow"] {
        kill_while_deciding(arguments, "accept", |case, status| {
            assert!(case.is_new(), "{status:#}");
            case.lab.must("accept target");
            assert!(case.is_new());
            let after = case.lab.must("status target");
            let after = after.summary();
            assert_eq!(
                (&after["state"], &after["rollback_available"]),
                (&json!("at"), &json!(false))
            );
            assert!(
                after["held_bytes"].as_u64().expect("a number") < MIB / 2,
                "{after:#}"
            );
            let again = case.lab.must("sync new target");
            assert_eq!(
                again.summary()["outcome"],
                "identical",
                "{:#}",
                again.summary()
            );
        });
    }
}
