//! Freezing a guest's file systems with a deadline that holds even if we die.
//!
//! The socket of an agent serves one client, so whoever is to thaw in time must be the one who freezes. That is a small
//! process of its own, which runs [`guard`]: it freezes, waits until it is told to thaw, until its input ends because we
//! died, or until the deadline, and thaws. [`Guarded`] starts it and speaks to it.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use blockferry_device::{Error, ErrorKind, Quiesce, Result};

use crate::agent::Agent;

/// For the agent to listen and to freeze.
const FREEZING: Duration = Duration::from_secs(10);
/// For one attempt to thaw. It is tried again: nobody else will.
const THAWING: Duration = Duration::from_secs(5);
const THAW_ATTEMPTS: u32 = 20;
const FROZEN: &str = "frozen";
const THAWED: &str = "thawed";
const LATE: &str = "late";
/// Most of what a guard says that is taken in.
const MAX_SAID_BYTES: u64 = 4096;

/// Freezes the guest behind `agent`, says `frozen` on `output`, waits until `input` says something or ends, but not longer
/// than `deadline`, thaws, and says `thawed`, or `late` if the deadline passed. To be the only thing its process does.
///
/// # Errors
/// The guest could not be frozen: then it is thawed as far as that is possible. Or it could not be thawed.
pub fn guard(
    agent: &Path,
    deadline: Duration,
    input: impl Read + Send + 'static,
    mut output: impl Write,
) -> Result<()> {
    let mut agent = Agent::connect(agent, FREEZING)?;
    let frozen = agent.freeze(FREEZING);
    // It may have frozen and not said so.
    let end = Instant::now() + deadline;
    let told = frozen.and_then(|_count| say(&mut output, FROZEN));
    if let Err(error) = told {
        thaw(&mut agent).ok();
        return Err(error);
    }
    let in_time = is_released(input, end);
    thaw(&mut agent)?;
    let in_time = in_time && Instant::now() <= end;
    // Whoever would hear it may have died.
    say(&mut output, if in_time { THAWED } else { LATE }).ok();
    Ok(())
}

/// Whether the input said something, or ended, before `end`.
fn is_released(mut input: impl Read + Send + 'static, end: Instant) -> bool {
    let (sender, receiver) = mpsc::channel();
    // It ends with its process: nothing else can end a read.
    let waiting = thread::Builder::new().spawn(move || {
        // One byte or the end of it: either lets go.
        input.read_exact(&mut [0]).ok();
        sender.send(()).ok();
    });
    let left = end.saturating_duration_since(Instant::now());
    waiting.is_ok() && receiver.recv_timeout(left).is_ok()
}

fn thaw(agent: &mut Agent) -> Result<()> {
    let mut attempt = 1;
    loop {
        match agent.thaw(THAWING) {
            Ok(_) => return Ok(()),
            Err(error) if attempt == THAW_ATTEMPTS => return Err(error),
            Err(_) => {
                attempt += 1;
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn say(output: &mut impl Write, word: &str) -> Result<()> {
    let failed = |cause| Error::from_io(format!("say that the guest is {word}"), cause);
    writeln!(output, "{word}").map_err(failed)?;
    output.flush().map_err(failed)
}

/// Freezes through a guard in a process of its own.
#[derive(Debug)]
pub struct Guarded {
    /// What runs [`guard`]; the deadline in milliseconds is its last argument.
    command: Vec<OsString>,
    running: Mutex<Option<Guard>>,
}

#[derive(Debug)]
struct Guard {
    child: Child,
    input: ChildStdin,
    output: BufReader<io::Take<ChildStdout>>,
}

impl Guarded {
    /// Through a process that runs `command`, whose last argument will be the deadline in milliseconds, and which does no
    /// more than to call [`guard`] with its standard input and output.
    #[must_use]
    pub fn new(command: Vec<OsString>) -> Self {
        Self {
            command,
            running: Mutex::new(None),
        }
    }

    /// Ends the guard of a guest whose processors were stopped since, so that it could not thaw it: whoever lets the guest
    /// go on thaws it.
    pub fn leave_frozen(self) {
        let running = self.running.into_inner();
        if let Some(mut guard) = running.unwrap_or_else(PoisonError::into_inner) {
            guard.child.kill().ok();
            guard.child.wait().ok();
        }
    }

    fn start(&self, deadline: Duration) -> Result<Guard> {
        let failed = |cause| Error::from_io("start the guard of a freeze", cause);
        let program = self.command.first().ok_or_else(|| {
            Error::new(
                ErrorKind::Unsuitable,
                "the guard of a freeze: no program is named",
            )
        })?;
        let mut child = Command::new(program)
            .args(&self.command[1..])
            .arg(deadline.as_millis().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Who interrupts us at a terminal does not interrupt it.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(input), Some(output)) => Ok(Guard {
                child,
                input,
                output: BufReader::new(output.take(MAX_SAID_BYTES)),
            }),
            _ => Err(failed(io::Error::other(
                "it has no standard input or output",
            ))),
        }
    }
}

impl Guard {
    fn hear(&mut self) -> Result<String> {
        let mut line = String::new();
        let heard = self.output.read_line(&mut line);
        heard.map_err(|cause| Error::from_io("hear the guard of a freeze", cause))?;
        Ok(line.trim().to_owned())
    }

    /// Its input ends, so it thaws if it froze anything.
    fn end(mut self) -> Result<String> {
        drop(self.input);
        let mut line = String::new();
        let heard = self.output.read_line(&mut line);
        let ended = self.child.wait();
        heard
            .and(ended)
            .map_err(|cause| Error::from_io("hear the guard of a freeze", cause))?;
        Ok(line.trim().to_owned())
    }
}

impl Quiesce for Guarded {
    fn freeze(&self, deadline: Duration) -> Result<()> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if running.is_some() {
            return Err(Error::new(
                ErrorKind::Busy,
                "freeze a guest that is frozen already",
            ));
        }
        let mut guard = self.start(deadline)?;
        if guard.hear()? != FROZEN {
            guard.end()?;
            let text = "freeze the guest: its guard gave up, and said why on standard error";
            return Err(Error::new(ErrorKind::Io, text));
        }
        *running = Some(guard);
        Ok(())
    }

    fn thaw(&self) -> Result<()> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(guard) = running.take() else {
            return Ok(());
        };
        match guard.end()?.as_str() {
            THAWED => Ok(()),
            LATE => Err(Error::new(
                ErrorKind::Io,
                "thaw the guest: the deadline of the freeze had passed, it was thawed before",
            )),
            said => {
                let said = crate::lines::shown(said);
                let text = format!("thaw the guest: expected its guard to say so, found {said:?}");
                Err(Error::new(ErrorKind::Io, text))
            }
        }
    }
}
