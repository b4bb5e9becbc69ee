//! The real command on real file systems, stopped at its system calls. Killed there, it leaves the old image or the new
//! one, `status` tells which before anything is repaired, and the next command finishes without staging a durable
//! byte again. Failed there, it says what failed and where, and the next run ends equal.
//!
//! A few positions of each call are tried, spread over the run from a printed seed; with `BLOCKFERRY_TEST_LONG` all.

use std::fs;
use std::path::PathBuf;

use blockferry_testkit::Random;
use serde_json::Value;

use crate::lab::{
    Lab, LoopDevice, MIB, MountedFileSystem, Position, all_positions, same, seeded, skipped,
    some_positions, thorough, with_files, write_sparse,
};

/// How a target is brought to the new point.
#[derive(Debug)]
struct Way {
    name: &'static str,
    arguments: &'static str,
    /// What the target is at first, and what of it is left.
    begins: Begins,
    places: &'static [&'static str],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begins {
    /// At its old point, which is kept.
    Kept,
    /// At its old point, which is given up.
    GivenUp,
    Absent,
}

const REDO: Way = Way {
    name: "redo",
    arguments: "--mode delta --strategy redo",
    begins: Begins::Kept,
    places: &["ext4", "xfs", "btrfs", "device"],
};
const SHADOW: Way = Way {
    name: "shadow",
    arguments: "--mode full --strategy shadow",
    begins: Begins::Kept,
    places: &["ext4", "xfs", "btrfs"],
};
const CLONE: Way = Way {
    name: "clone",
    arguments: "--mode delta --strategy clone",
    begins: Begins::Kept,
    places: &["xfs", "btrfs"],
};
const IN_PLACE: Way = Way {
    name: "direct, in place",
    arguments: "--mode delta --in-place",
    begins: Begins::GivenUp,
    places: &["ext4", "xfs", "btrfs"],
};
const ABSENT: Way = Way {
    name: "direct, absent",
    arguments: "",
    begins: Begins::Absent,
    places: &["ext4", "xfs", "btrfs"],
};

/// A target in a place, and the two points it is between. Fields are dropped in this order.
struct Trial {
    way: &'static Way,
    place: &'static str,
    _mounted: Option<MountedFileSystem>,
    device: Option<LoopDevice>,
    lab: Lab,
    target: PathBuf,
    old: Vec<u8>,
    new: Vec<u8>,
    new_root: Value,
    /// What is being tried, for messages.
    now: String,
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
    incomplete: u32,
    resumed: u32,
    rolled_back: u32,
    cancelled: u32,
}

impl Trial {
    /// `None` where the place is not to be had.
    fn new(way: &'static Way, place: &'static str, seed: u64) -> Option<Self> {
        let lab = Lab::new();
        let sizes = [("ext4", 64 * MIB), ("xfs", 320 * MIB), ("btrfs", 160 * MIB)];
        let bytes = sizes.iter().find(|(kind, _)| *kind == place);
        let mounted = match bytes {
            Some((kind, bytes)) => Some(MountedFileSystem::make(lab.root(), kind, *bytes)?),
            None => None,
        };
        let (old, new) = images(&lab, place, seed);
        let device = match place {
            "device" => Some(LoopDevice::attach(&lab.path("disk"), 512)?),
            _ => None,
        };
        let target = match (&device, &mounted) {
            (Some(device), _) => device.path().into(),
            (None, Some(mounted)) => mounted.point().join("target"),
            (None, None) => lab.path("target"),
        };
        let new_root = lab.must("digest new").summary()["root"].clone();
        Some(Self {
            way,
            place,
            _mounted: mounted,
            device,
            lab,
            target,
            old,
            new,
            new_root,
            now: String::new(),
            found: Found::default(),
        })
    }

    /// The command with this verb, on the target.
    fn line(&self, verb: &str) -> String {
        format!("{verb} {}", self.target.display())
    }

    fn sync_line(&self) -> String {
        format!(
            "{} {} --threads 1",
            self.line("sync new"),
            self.way.arguments
        )
    }

    /// The target as it was at first, nothing known of it.
    fn reset(&self) {
        fs::remove_dir_all(self.lab.path("state-root")).ok();
        if self.device.is_some() {
            return with_files(|| fs::write(&self.target, &self.old)).expect("written");
        }
        let directory = self.target.parent().expect("it lies in a directory");
        fs::remove_dir_all(directory.join(".target.blockferry")).ok();
        for entry in fs::read_dir(directory).expect("listed").flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name == "target" || name.starts_with(".target.") {
                fs::remove_file(entry.path()).expect("removed");
            }
        }
        if self.way.begins != Begins::Absent {
            write_sparse(&self.target, &self.old);
        }
    }

    fn is_old(&self) -> bool {
        match self.way.begins {
            Begins::Absent => !self.target.exists(),
            _ => same(&self.target, &self.old),
        }
    }

    fn is_new(&self) -> bool {
        same(&self.target, &self.new)
    }

    fn begin(&mut self, what: &str) {
        self.reset();
        self.now = format!("{} on {}: {what}", self.way.name, self.place);
    }

    /// What status says, checked against the bytes themselves before anything is recovered.
    fn judge(&self) -> Value {
        let status = self.lab.must(&self.line("status")).summary().clone();
        let at_new = status["point"]["root"] == self.new_root;
        let now = &self.now;
        let (right, verbs): (bool, &[&str]) = match status["state"].as_str().expect("a state") {
            "unknown" => (self.is_old() && !at_new, &["sync"]),
            "staging" | "prepared" => (self.is_old() && !at_new, &["resume", "cancel"]),
            "committed" => (true, &["resume"]),
            "applied" => (self.is_new() && at_new, &["rollback", "accept"]),
            "at" => (self.is_new() && at_new, &["sync"]),
            "incomplete" => (self.way.begins == Begins::GivenUp, &["resume"]),
            "rolling_back" => (self.way.begins == Begins::Kept, &["rollback"]),
            other => panic!("{now}: {other} after a sync: {status:#}"),
        };
        assert!(right, "{now}: not what is in the target: {status:#}");
        assert_eq!(status["running"], false, "{now}: nobody works on it");
        for verb in verbs {
            assert!(
                advised(&status, verb).is_some(),
                "{now}: no {verb} advised: {status:#}"
            );
        }
        status
    }

    fn count(&mut self, state: &Value) {
        self.found.kills += 1;
        *match state.as_str() {
            Some("unknown") => &mut self.found.unknown,
            Some("committed") => &mut self.found.committed,
            Some("applied" | "at") => &mut self.found.finished,
            Some("incomplete") => &mut self.found.incomplete,
            _ => &mut self.found.staging,
        } += 1;
    }

    /// Goes on as status advises, to the new point.
    fn finish(&mut self, status: &Value) {
        let line = match status["state"].as_str() {
            Some("unknown") => self.sync_line(),
            // Full mode would do everything once more, and the old point would be the new one.
            Some("applied" | "at") => self.line("sync new"),
            _ => advised(status, "resume").expect("judged before"),
        };
        let answer = self.lab.must(&line);

        let (now, summary) = (&self.now, answer.summary());
        assert_eq!(answer.count("restaged_bytes"), 0, "{now}: {summary:#}");
        assert!(
            self.is_new(),
            "{now}: {line} did not end equal: {summary:#}"
        );
        self.found.resumed += u32::from(answer.count("resumed_bytes") > 0);
    }

    fn roll_back(&mut self) {
        if self.way.begins == Begins::Kept {
            self.lab.must(&self.line("rollback"));
            assert!(self.is_old(), "{}: rolled back to something else", self.now);
            self.found.rolled_back += 1;
        }
    }

    fn cancel(&mut self) {
        self.lab.must(&self.line("cancel"));
        assert!(
            self.is_old(),
            "{}: cancelled, and not the old point",
            self.now
        );
        self.found.cancelled += 1;
    }

    /// Kills at a position and recovers in one of several ways. Whether the run came so far.
    fn kill(&mut self, number: usize, position: &Position) -> bool {
        self.begin(&format!("killed at {position:?}"));
        if !self.lab.killed_at(&self.sync_line(), position) {
            return false;
        }
        let status = self.judge();
        self.count(&status["state"]);
        match (status["state"].as_str(), number % 4) {
            (Some("staging"), 3) if self.way.begins != Begins::GivenUp => self.cancel(),
            // With nothing in between: what was committed is applied first.
            (Some("committed"), 1) if self.way.begins == Begins::Kept => self.roll_back(),
            (_, 2) => {
                self.finish(&status);
                self.roll_back();
            }
            _ => self.finish(&status),
        }
        true
    }

    #[expect(
        clippy::print_stderr,
        reason = "how many kills and where makes the test credible"
    )]
    fn report(&self) {
        let (way, place, found) = (self.way.name, self.place, &self.found);
        eprintln!("{way} on {place}: {} kills, 0 torn; {found:?}", found.kills);
    }
}

/// The command that status advises and that begins with this verb.
fn advised(status: &Value, verb: &str) -> Option<String> {
    let next = status["next"].as_array()?.iter();
    next.filter_map(|step| step["command"].as_str()?.strip_prefix("blockferry "))
        .find(|line| line.split(' ').next() == Some(verb))
        .map(str::to_owned)
}

/// `old`, as it is to be in the target, and `new`, which also is a file: with holes, another size where the place can
/// take it, pages that become zero and zeros that become data.
fn images(lab: &Lab, place: &str, seed: u64) -> (Vec<u8>, Vec<u8>) {
    let new_bytes = usize::try_from(4 * MIB).expect("small");
    let old_bytes = match place {
        "device" => 4 * MIB,
        _ => 4 * MIB - 4096 * 19 - 512,
    };
    let old = lab.disk("disk", seed, old_bytes);
    let mut grown = old.clone();
    grown.resize(new_bytes, 7);
    let new = lab.edited("new", seed + 1, &grown, 0.25);
    (old, new)
}

// --- killed --------------------------------------------------------------------------------------------------------

/// Everything that touches a file, its name, or what is known of it.
const CALLS: &str = "?pwrite64,?pwritev,?pwritev2,?pread64,?preadv,?preadv2,?fdatasync,?fsync,?sync_file_range,\
    ?ftruncate,?fallocate,?copy_file_range,?renameat2,?renameat,?rename,?unlinkat,?unlink,?openat,?mkdirat,?mkdir,\
    ?ioctl,?lseek,?statx,?fcntl,?flock,?getdents64,?fadvise64,?fstatfs,?close,?flistxattr,?fchmod,?fchown,?utimensat";

/// Kills in each strategy where nothing else is asked for.
const KILLS: u32 = 200;

fn survives_kills(name: &str, ways: &[&'static Way]) {
    let mut random = seeded(name);
    if !Lab::has_strace() {
        return skipped(name, "strace");
    }
    let places: usize = ways.iter().map(|way| way.places.len()).sum();
    let share = KILLS.div_ceil(u32::try_from(places).expect("a handful"));
    let (mut kills, mut complete) = (0, true);
    for way in ways {
        for place in way.places {
            match Trial::new(way, place, random.next_u64()) {
                Some(mut trial) => kills += kill_many(&mut trial, share, &mut random),
                None => {
                    skipped(name, &format!("root, losetup and mkfs for {place}"));
                    complete = false;
                }
            }
        }
    }
    assert!(kills >= KILLS || !complete, "only {kills} kills");
}

fn kill_many(trial: &mut Trial, wanted: u32, random: &mut Random) -> u32 {
    trial.begin("counted");
    let calls = trial.lab.count_calls(&trial.sync_line(), CALLS, &[]);
    assert!(trial.is_new());
    let all = all_positions(&calls);
    let positions = if thorough() {
        all.clone()
    } else {
        some_positions(&calls, wanted, random)
    };
    for (number, position) in positions.iter().enumerate() {
        trial.kill(number, position);
    }
    // How calls fall to threads is not the same in each run, so that some positions may not have come.
    let mut spare = all.len();
    while trial.found.kills < wanted && spare > 0 {
        let any = random.below(all.len() as u64);
        trial.kill(spare, &all[usize::try_from(any).expect("small")]);
        spare -= 1;
    }
    trial.report();
    trial.found.kills
}

#[test]
fn redo_survives_kills_at_two_hundred_system_calls() {
    survives_kills("redo_survives_kills_at_two_hundred_system_calls", &[&REDO]);
}

#[test]
fn shadow_survives_kills_at_two_hundred_system_calls() {
    survives_kills(
        "shadow_survives_kills_at_two_hundred_system_calls",
        &[&SHADOW],
    );
}

#[test]
fn clone_survives_kills_at_two_hundred_system_calls() {
    survives_kills(
        "clone_survives_kills_at_two_hundred_system_calls",
        &[&CLONE],
    );
}

#[test]
fn direct_survives_kills_at_two_hundred_system_calls() {
    let name = "direct_survives_kills_at_two_hundred_system_calls";
    survives_kills(name, &[&IN_PLACE, &ABSENT]);
}

// --- failing -------------------------------------------------------------------------------------------------------

/// What a call gives instead, what the message must say of it, and the calls it is possible for.
struct Fault {
    inject: &'static str,
    says: &'static str,
    calls: &'static [&'static str],
}

/// Calls whose failure decides what becomes of the disk.
const FAILING: &[&str] = &[
    "pwrite64",
    "pwritev",
    "pwritev2",
    "pread64",
    "fdatasync",
    "fsync",
    "fallocate",
    "renameat2",
    "unlinkat",
    "ftruncate",
    "ioctl",
    "copy_file_range",
    "openat",
];

const FAULTS: [Fault; 4] = [
    Fault {
        inject: "error=EIO",
        says: "Input/output error",
        calls: FAILING,
    },
    Fault {
        inject: "error=ENOSPC",
        says: "No space left",
        calls: FAILING,
    },
    Fault {
        inject: "error=EINTR",
        says: "Interrupted",
        calls: FAILING,
    },
    // Short by everything: strace can leave a call out, but not carry out half of it. A flush left out would be a lie.
    Fault {
        inject: "retval=0",
        says: "",
        calls: &[
            "pwrite64",
            "pwritev",
            "pwritev2",
            "pread64",
            "copy_file_range",
        ],
    },
];

/// Once, and from there on; an interruption that never ends is none, so that fifty in a row must do.
fn repeats(fault: &Fault, at: u32) -> [String; 2] {
    let for_ever = match fault.inject {
        "error=EINTR" => format!("..{}", at + 49),
        _ => "+".to_owned(),
    };
    [String::new(), for_ever]
}

/// Positions of each call with each fault where nothing else is asked for.
const OF_EACH_CALL: u32 = 2;

impl Trial {
    /// Paths on which a call is counted and fails: opening fails for the state only, lest no library be found.
    fn paths_of(&self, call: &str) -> Vec<String> {
        let directory = self.target.parent().expect("it lies in a directory");
        let state = directory.join(".target.blockferry");
        match call {
            "openat" => ["", "state", "lock"]
                .map(|name| state.join(name).display().to_string())
                .to_vec(),
            _ => Vec::new(),
        }
    }

    /// Whether the run failed.
    fn fail(&mut self, position: &Position, fault: &Fault, repeated: &str, paths: &[&str]) -> bool {
        self.begin(&format!("{position:?}{repeated} with {}", fault.inject));
        let line = self.sync_line();
        let fault_there = (fault.inject, repeated);
        let answer = self.lab.run_with_fault(&line, position, fault_there, paths);
        let now = &self.now;
        match answer.code {
            Some(0) => assert!(self.is_new(), "{now}: reported as done: {answer:#?}"),
            Some(2..=7) => {
                let text = answer.complaint();
                let here = self.lab.root().display().to_string();
                let says_what = text.contains(fault.says);
                let says_where = text.contains(&here) || text.contains(" new:");
                assert!(
                    says_what && says_where,
                    "{now}: not what failed and where: {text}"
                );
            }
            // The library that loads libraries failed, before there was a command.
            Some(127) => return false,
            _ => panic!("{now}: {answer:#?}"),
        }
        self.judge();
        let next = self.lab.must(&self.sync_line());
        assert!(self.is_new(), "{}: the next run: {next:#?}", self.now);
        answer.code != Some(0)
    }

    fn fail_at_each_call(&mut self, random: &mut Random) {
        let (mut runs, mut failed) = (0, 0);
        for call in FAILING {
            let paths = self.paths_of(call);
            let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
            self.begin("counted");
            let calls = self.lab.count_calls(&self.sync_line(), call, &paths);
            for fault in FAULTS.iter().filter(|fault| fault.calls.contains(call)) {
                let positions = if thorough() {
                    all_positions(&calls)
                } else {
                    some_positions(&calls, OF_EACH_CALL, random)
                };
                for position in positions {
                    for repeated in repeats(fault, position.at) {
                        failed += u32::from(self.fail(&position, fault, &repeated, &paths));
                        runs += 1;
                    }
                }
            }
        }
        self.report_faults(runs, failed);
        assert!(failed > 0, "no fault was felt");
    }

    #[expect(
        clippy::print_stderr,
        reason = "how many faults were felt makes the test credible"
    )]
    fn report_faults(&self, runs: u32, failed: u32) {
        let (way, place) = (self.way.name, self.place);
        eprintln!("{way} on {place}: {runs} faults, {failed} runs failed, 0 torn");
    }
}

fn survives_faults(name: &str, way: &'static Way, place: &'static str) {
    let mut random = seeded(name);
    if !Lab::has_strace() {
        return skipped(name, "strace");
    }
    match Trial::new(way, place, random.next_u64()) {
        Some(mut trial) => trial.fail_at_each_call(&mut random),
        None => skipped(name, &format!("root, losetup and mkfs for {place}")),
    }
}

#[test]
fn redo_ends_old_or_new_whatever_call_fails_and_the_next_run_ends_equal() {
    let name = "redo_ends_old_or_new_whatever_call_fails_and_the_next_run_ends_equal";
    survives_faults(name, &REDO, "ext4");
}

#[test]
fn shadow_ends_old_or_new_whatever_call_fails_and_the_next_run_ends_equal() {
    let name = "shadow_ends_old_or_new_whatever_call_fails_and_the_next_run_ends_equal";
    survives_faults(name, &SHADOW, "ext4");
}

#[test]
fn clone_ends_old_or_new_whatever_call_fails_and_the_next_run_ends_equal() {
    let name = "clone_ends_old_or_new_whatever_call_fails_and_the_next_run_ends_equal";
    survives_faults(name, &CLONE, "xfs");
}

#[test]
fn direct_is_known_incomplete_whatever_call_fails_and_the_next_run_ends_equal() {
    let name = "direct_is_known_incomplete_whatever_call_fails_and_the_next_run_ends_equal";
    survives_faults(name, &IN_PLACE, "ext4");
    survives_faults(name, &ABSENT, "ext4");
}
