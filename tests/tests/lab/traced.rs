//! The real command under strace: its system calls counted, then one of them killed or made to fail.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use super::run::{Answer, answer, command_of, output, tool, with_files};
use super::{Lab, Random};

/// The `at`-th call of this name that one thread makes: strace counts per thread.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Position {
    pub(crate) call: String,
    pub(crate) at: u32,
}

/// How often one thread of a run makes each call: the most of all threads.
pub(crate) type Calls = BTreeMap<String, u32>;

impl Lab {
    pub(crate) fn has_strace() -> bool {
        tool(&["strace", "-V"]).is_some()
    }

    /// Runs what must succeed and counts these calls, on these paths if there are any.
    pub(crate) fn count_calls(&self, line: &str, calls: &str, paths: &[&str]) -> Calls {
        let log = self.path("strace.log");
        let (log_text, trace) = (log.to_str().expect("text"), format!("trace={calls}"));
        let mut strace = self.traced(line, &["-o", log_text, "-e", &trace], paths);
        let ended = output(&mut strace).expect("strace runs");
        assert!(ended.status.success(), "{line}: {ended:?}");
        counted(&with_files(|| fs::read_to_string(&log)).expect("written by strace"))
    }

    /// Runs `LINE --json` and kills it there. Whether it came that far.
    pub(crate) fn killed_at(&self, line: &str, position: &Position) -> bool {
        let ended = output(&mut self.injected(line, position, "signal=SIGKILL", "", &[]));
        ended.expect("strace runs").status.signal() == Some(9)
    }

    /// Runs `LINE --json` with what strace puts in the place of the call, `repeated` as strace writes it.
    pub(crate) fn run_with_fault(
        &self,
        line: &str,
        position: &Position,
        (fault, repeated): (&str, &str),
        paths: &[&str],
    ) -> Answer {
        answer(&mut self.injected(line, position, fault, repeated, paths))
    }

    fn injected(
        &self,
        line: &str,
        Position { call, at }: &Position,
        fault: &str,
        repeated: &str,
        paths: &[&str],
    ) -> Command {
        let trace = format!("trace={call}");
        let inject = format!("inject={call}:{fault}:when={at}{repeated}");
        let options = ["-o", "/dev/null", "-e", &trace, "-e", &inject];
        self.traced(line, &options, paths)
    }

    fn traced(&self, line: &str, options: &[&str], paths: &[&str]) -> Command {
        let run = self.command(line);
        let mut strace = command_of(self.root(), "strace");
        // Not with --seccomp-bpf, which lets the signal get lost.
        strace.args(["-f", "-qq"]).args(options);
        strace.args(paths.iter().flat_map(|path| ["-P", path]));
        strace.arg(run.get_program()).args(run.get_args());
        strace.arg("--json");
        strace
    }
}

/// Lines are `THREAD CALL(...`; calls that were interrupted by another thread's show twice, once without a bracket.
/// Calls that strace has no name for are shown whatever was asked for, and cannot be chosen.
fn counted(text: &str) -> Calls {
    let mut of_each_thread = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(thread), Some(call)) = (words.next(), words.next()) else {
            continue;
        };
        let name = call.split_once('(').map(|(name, _)| name);
        if let Some(name) = name.filter(|name| !name.starts_with("syscall_")) {
            *of_each_thread.entry((name, thread)).or_insert(0u32) += 1;
        }
    }
    let mut most = Calls::new();
    for ((name, _), count) in of_each_thread {
        let known = most.entry(name.to_owned()).or_insert(0);
        *known = count.max(*known);
    }
    most
}

/// All positions there are.
pub(crate) fn all_positions(calls: &Calls) -> Vec<Position> {
    spread(calls, u32::MAX, &mut Random::new(0))
}

/// About `wanted` positions: all of the rare calls, which decide, and of the frequent ones some from each part of the
/// run.
pub(crate) fn some_positions(calls: &Calls, wanted: u32, random: &mut Random) -> Vec<Position> {
    let chosen = |of_each: u32| calls.values().map(|count| of_each.min(*count)).sum::<u32>();
    let most = calls.values().copied().max().unwrap_or(0);
    let of_each = (0..most).find(|n| chosen(*n) >= wanted).unwrap_or(most);
    spread(calls, of_each, random)
}

fn spread(calls: &Calls, of_each: u32, random: &mut Random) -> Vec<Position> {
    let mut positions = Vec::new();
    for (call, count) in calls {
        let parts = of_each.min(*count);
        for part in 0..parts {
            let border = |n: u32| u64::from(*count) * u64::from(n) / u64::from(parts);
            let at = border(part) + random.below(border(part + 1) - border(part)) + 1;
            let at = u32::try_from(at).expect("at most the count");
            let call = call.clone();
            positions.push(Position { call, at });
        }
    }
    positions
}
