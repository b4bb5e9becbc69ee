//! The power cut: this very program syncs in a process of its own and is killed without warning.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::exit::Exit;
use crate::failure::Failure;
use crate::session::STATE_ROOT_VARIABLE;

/// After its first checkpoint a run that makes slow progress is killed at the next one after this time.
const PATIENCE: Duration = Duration::from_secs(1);

/// SIGKILL: cannot be caught, so nothing can be tidied up.
const SIGKILL: i32 = 9;

/// What to run.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    pub(crate) source: &'a Path,
    pub(crate) target: &'a Path,
    pub(crate) state_root: &'a Path,
    pub(crate) bytes_per_second: u64,
    /// Log bytes that shall be durable before the kill.
    pub(crate) enough_bytes: u64,
}

/// How the run ended.
#[derive(Debug)]
pub(crate) enum Ending {
    /// In the middle, with this much of the log durable.
    Killed { durable_bytes: u64, after: Duration },
    /// Before it could be killed.
    Finished,
}

/// Kills and reaps a process that nobody waits for any more.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Starts the run and kills it when its JSON stream says that enough is durable.
pub(crate) fn kill_in_the_middle(run: &Run<'_>) -> Result<Ending, Failure> {
    let started = Instant::now();
    let mut child = Reaped(start(run).map_err(|error| failed(&error))?);
    let lines = child.0.stdout.take().expect("standard output is piped");
    let Some(durable_bytes) = durable_when_enough(lines, run.enough_bytes)? else {
        return Ok(Ending::Finished);
    };
    child.0.kill().map_err(|error| failed(&error))?;
    let status = child.0.wait().map_err(|error| failed(&error))?;
    // It may have finished between its last line and the kill.
    let killed = status.signal() == Some(SIGKILL);
    Ok(if killed {
        Ending::Killed {
            durable_bytes,
            after: started.elapsed(),
        }
    } else {
        Ending::Finished
    })
}

fn start(run: &Run<'_>) -> std::io::Result<Child> {
    Command::new(std::env::current_exe()?)
        .args(["--json", "sync", "--mode", "delta", "--bwlimit"])
        .arg(run.bytes_per_second.to_string())
        .args([run.source, run.target])
        .env(STATE_ROOT_VARIABLE, run.state_root)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
}

fn failed(error: &std::io::Error) -> Failure {
    Failure::new(
        Exit::Internal,
        format!("running the sync in a process of its own: {error}"),
    )
}

/// Reads until enough is durable; `None` if the stream ends before.
fn durable_when_enough(lines: ChildStdout, enough_bytes: u64) -> Result<Option<u64>, Failure> {
    let mut first = None;
    for line in BufReader::new(lines).lines() {
        let line = line.map_err(|error| failed(&error))?;
        let line: Value = serde_json::from_str(&line).map_err(|error| {
            Failure::new(Exit::Internal, format!("not a JSON line: {line}: {error}"))
        })?;
        if line["type"] == "error" {
            let message = line["message"].as_str().unwrap_or("no message");
            return Err(Failure::new(
                Exit::Target,
                format!("the sync to be killed failed: {message}"),
            ));
        }
        let Some(durable_bytes) = checkpoint(&line).filter(|&bytes| bytes > 0) else {
            continue;
        };
        let since = *first.get_or_insert_with(Instant::now);
        if durable_bytes >= enough_bytes || since.elapsed() >= PATIENCE {
            return Ok(Some(durable_bytes));
        }
    }
    Ok(None)
}

fn checkpoint(line: &Value) -> Option<u64> {
    if line["event"] == "checkpoint" {
        line["durable_bytes"].as_u64()
    } else {
        None
    }
}
