//! Runs a program of the user's with a deadline.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use blockferry_device::CancelToken;
use rustix::process::{Pid, Signal, kill_process_group};

use crate::error::{Error, ErrorKind, Result};

const TICK: Duration = Duration::from_millis(10);
/// Most of what it complains of that an error shows.
const MAX_SAID_BYTES: usize = 2000;

/// Runs `command` in a process group of its own, with these pairs added to the environment, and waits until it ends. What
/// it writes to standard output is dropped. At the deadline, or when it is cancelled, the whole group is killed.
///
/// # Errors
/// It could not be started, did not end in time, was cancelled, or failed: with the end of what it wrote to standard error.
pub(crate) fn run(
    step: &str,
    command: &[String],
    environment: &[(String, String)],
    timeout: Duration,
    cancel: &CancelToken,
) -> Result<()> {
    let Some((program, arguments)) = command.split_first() else {
        return Ok(());
    };
    let failed =
        |why: String| Error::new(ErrorKind::Hook, format!("hook {step} ({program}): {why}"));
    let mut child = Command::new(program)
        .args(arguments)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|cause| failed(cause.to_string()))?;
    let said = listen(&mut child);
    let ended = wait(&mut child, timeout, cancel);
    let status = ended.map_err(|cause| failed(cause.to_string()))?;
    let Some(status) = status else {
        if cancel.is_cancelled() {
            let text = format!("hook {step} ({program}) was killed");
            return Err(Error::new(ErrorKind::Cancelled, text));
        }
        return Err(failed(format!(
            "it did not end within {} ms and was killed",
            timeout.as_millis()
        )));
    };
    if status.success() {
        return Ok(());
    }
    // Somebody it left behind may still hold its standard error.
    let said = said
        .recv_timeout(Duration::from_millis(500))
        .unwrap_or_default();
    let said = if said.is_empty() {
        said
    } else {
        format!(": {said}")
    };
    Err(failed(format!("{status}{said}")))
}

/// The end of what it writes to standard error, once it closes that.
fn listen(child: &mut Child) -> std::sync::mpsc::Receiver<String> {
    let (sender, receiver) = std::sync::mpsc::channel();
    if let Some(mut stderr) = child.stderr.take() {
        let listening = move || {
            let mut tail = Vec::new();
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stderr.read(&mut buffer) {
                tail.extend_from_slice(&buffer[..count]);
                let excess = tail.len().saturating_sub(MAX_SAID_BYTES);
                tail.drain(..excess);
            }
            let text = String::from_utf8_lossy(&tail);
            let plain = |c: char| {
                if c.is_control() && c != '\n' {
                    '\u{FFFD}'
                } else {
                    c
                }
            };
            sender.send(text.trim().chars().map(plain).collect()).ok();
        };
        thread::spawn(listening);
    }
    receiver
}

/// Nothing if it was killed.
fn wait(
    child: &mut Child,
    timeout: Duration,
    cancel: &CancelToken,
) -> std::io::Result<Option<ExitStatus>> {
    let end = Instant::now() + timeout;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= end || cancel.is_cancelled() {
            let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            if let Some(group) = group {
                kill_process_group(group, Signal::KILL).ok();
            }
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(TICK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, timeout: Duration) -> Result<()> {
        let command = ["sh", "-c", script].map(ToOwned::to_owned);
        let environment = [("BLOCKFERRY_JOB".to_owned(), "web1".to_owned())];
        let cancel = CancelToken::new();
        run("start-target", &command, &environment, timeout, &cancel)
    }

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn a_hook_is_told_its_job_and_its_failure_is_told_with_its_words() {
        shell("test \"$BLOCKFERRY_JOB\" = web1", LONG).unwrap();

        let error = shell("echo no such machine >&2; exit 3", LONG).unwrap_err();

        assert_eq!(error.kind(), ErrorKind::Hook);
        let text = error.to_string();
        for said in ["start-target", "no such machine", "3"] {
            assert!(text.contains(said), "{text}");
        }
    }

    #[test]
    fn a_hook_that_does_not_end_is_killed_with_all_it_started() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("alive");
        let script = format!("(sleep 1; touch {}) & sleep 100", file.display());

        let error = shell(&script, Duration::from_millis(100)).unwrap_err();

        assert!(error.to_string().contains("within 100 ms"), "{error}");
        thread::sleep(Duration::from_millis(1300));
        assert!(!file.exists(), "a child of it lived on");
    }

    #[test]
    fn what_a_hook_says_does_not_fill_the_memory_and_no_hook_is_no_failure() {
        let error = shell("yes | head -c 3000000 >&2; exit 1", LONG).unwrap_err();

        assert!(error.to_string().len() < 3000);
        let cancel = CancelToken::new();
        run("stop-target", &[], &[], LONG, &cancel).unwrap();
        let missing = ["/no/such/program".to_owned()];
        assert!(run("stop-target", &missing, &[], LONG, &cancel).is_err());
    }

    #[test]
    fn a_hook_that_is_cancelled_is_killed() {
        let cancel = CancelToken::new();
        let token = cancel.clone();
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            token.cancel();
        });
        let command = ["sleep", "100"].map(ToOwned::to_owned);
        let began = Instant::now();

        let error = run("start-target", &command, &[], LONG, &cancel).unwrap_err();

        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
        assert!(began.elapsed() < LONG);
    }
}
