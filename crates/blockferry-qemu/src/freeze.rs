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

use blockferry_device::{Consistency, Error, ErrorKind, Quiesce, Result};

use crate::agent::Agent;

/// For the agent to listen and to freeze.
const FREEZING: Duration = Duration::from_secs(10);
/// For one attempt to thaw. It is tried again: nobody else will.
const THAWING: Duration = Duration::from_secs(5);
const THAW_ATTEMPTS: u32 = 20;
const FROZEN: &str = "frozen";
/// How good a point of what is frozen may be.
const LABELS: [Consistency; 3] = [
    Consistency::Crash,
    Consistency::FileSystem,
    Consistency::Application,
];
const THAWED: &str = "thawed";
const LATE: &str = "late";
const FAILED: &str = "failed";
/// Most of what a guard says that is taken in.
const MAX_SAID_BYTES: u64 = 4096;

/// What is to stand still while a point of it is taken.
pub trait Freezer {
    /// Brings it to rest.
    ///
    /// # Errors
    /// No point is to be taken. [`Self::thaw`] is called all the same: it may have come to rest and not said so.
    fn freeze(&mut self) -> Result<Frozen>;

    /// Lets it go on. Returns what did not go as hoped, for people.
    ///
    /// # Errors
    /// It may stand still yet, or the point is not to count.
    fn thaw(&mut self) -> Result<Option<String>>;

    /// When it began to stand still, as early as that may have been; nothing if it never did.
    fn since(&self) -> Option<Instant>;
}

/// What stands still.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Frozen {
    /// How good a point is that is taken meanwhile.
    pub consistency: Consistency,
    /// What did not go as hoped, for people.
    pub remark: Option<String>,
}

impl Frozen {
    /// As it was hoped.
    #[must_use]
    pub fn new(consistency: Consistency) -> Self {
        Self {
            consistency,
            remark: None,
        }
    }
}

/// What went on again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Thawed {
    /// How long it stood still.
    pub held_up: Duration,
    /// What did not go as hoped, for people.
    pub remark: Option<String>,
}

/// The file systems of a guest.
#[derive(Debug)]
pub struct GuestFreezer {
    agent: Agent,
    since: Option<Instant>,
}

impl GuestFreezer {
    /// Through the socket of its agent.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn connect(agent: &Path) -> Result<Self> {
        let agent = Agent::connect(agent, FREEZING)?;
        Ok(Self { agent, since: None })
    }
}

impl Freezer for GuestFreezer {
    fn since(&self) -> Option<Instant> {
        self.since
    }

    fn freeze(&mut self) -> Result<Frozen> {
        self.since = Some(Instant::now());
        self.agent.freeze(FREEZING)?;
        Ok(Frozen::new(Consistency::FileSystem))
    }

    fn thaw(&mut self) -> Result<Option<String>> {
        let mut attempt = 1;
        loop {
            match self.agent.thaw(THAWING) {
                Ok(_) => return Ok(None),
                Err(error) if attempt == THAW_ATTEMPTS => return Err(error),
                Err(_) => {
                    attempt += 1;
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }
}

/// Freezes, says `frozen` on `output`, waits until `input` says something or ends, but not longer than `deadline`, thaws,
/// and says `thawed` and the milliseconds in between, or `late` if the deadline passed. To be the only thing its process
/// does.
///
/// # Errors
/// It could not be frozen: then it is thawed as far as that is possible. Or it could not be thawed.
pub fn guard(
    freezer: &mut impl Freezer,
    deadline: Duration,
    input: impl Read + Send + 'static,
    mut output: impl Write,
) -> Result<()> {
    let frozen = freezer.freeze();
    // It may have frozen and not said so.
    let end = Instant::now() + deadline;
    let told = frozen.and_then(|frozen| {
        let word = format!("{FROZEN} {}", frozen.consistency);
        say(&mut output, &word, frozen.remark)
    });
    if let Err(error) = told {
        freezer.thaw().ok();
        return Err(tell(&mut output, error));
    }
    let in_time = is_released(input, end);
    let remark = freezer.thaw().map_err(|error| tell(&mut output, error))?;
    let in_time = in_time && Instant::now() <= end;
    let held_up = freezer
        .since()
        .map_or(Duration::ZERO, |since| since.elapsed());
    let word = match in_time {
        true => format!("{THAWED} {}", held_up.as_millis()),
        false => LATE.to_owned(),
    };
    // Whoever would hear it may have died.
    say(&mut output, &word, remark).ok();
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

fn tell(output: &mut impl Write, error: Error) -> Error {
    say(output, FAILED, Some(error.to_string())).ok();
    error
}

/// A line: a word, and behind a colon what else is to be known.
fn say(output: &mut impl Write, word: &str, remark: Option<String>) -> Result<()> {
    let failed = |cause| Error::from_io(format!("say that the guest is {word}"), cause);
    let remark = remark.map(|remark| remark.replace('\n', " "));
    let line = remark.map_or_else(|| word.to_owned(), |remark| format!("{word}: {remark}"));
    writeln!(output, "{line}").map_err(failed)?;
    output.flush().map_err(failed)
}

fn heard(line: &str) -> (&str, Option<String>) {
    match line.split_once(": ") {
        Some((word, remark)) => (word, Some(crate::lines::shown(remark))),
        None => (line, None),
    }
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
            // It may outlive us, and whoever reads what we complain of waits for its end.
            .stderr(Stdio::null())
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
    /// Its first line, and itself. Left alone it thaws as soon as it has frozen.
    fn hear(self, patience: Duration) -> Result<(Self, String)> {
        let Self {
            mut child,
            input,
            mut output,
        } = self;
        let (sender, receiver) = mpsc::channel();
        let hearing = move || {
            let mut line = String::new();
            let heard = output.read_line(&mut line).map(|_bytes| line);
            sender.send((output, heard)).ok();
        };
        let failed = |cause| Error::from_io("hear the guard of a freeze", cause);
        thread::Builder::new().spawn(hearing).map_err(failed)?;
        let Ok((output, heard)) = receiver.recv_timeout(patience) else {
            drop(input);
            thread::spawn(move || child.wait());
            let text = format!(
                "freeze the guest: it did not come to rest within {} ms, and is let go as soon as it has",
                patience.as_millis()
            );
            return Err(Error::new(ErrorKind::Busy, text));
        };
        let guard = Self {
            child,
            input,
            output,
        };
        Ok((guard, heard.map_err(failed)?.trim().to_owned()))
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

impl Guarded {
    /// As [`Quiesce::freeze`], and tells how good a point is meanwhile. What does not come to rest within `patience` is let
    /// go.
    ///
    /// # Errors
    /// Its guard did not start, or gave up; [`ErrorKind::Busy`] if it took too long.
    pub fn freeze_telling(&self, deadline: Duration, patience: Duration) -> Result<Frozen> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if running.is_some() {
            return Err(Error::new(
                ErrorKind::Busy,
                "freeze a guest that is frozen already",
            ));
        }
        let (guard, line) = self.start(deadline)?.hear(patience)?;
        let (word, remark) = heard(&line);
        let found = LABELS
            .into_iter()
            .find(|label| word == format!("{FROZEN} {label}"));
        let Some(consistency) = found else {
            guard.end()?;
            let why = remark.unwrap_or_else(|| format!("its guard gave up, and said {word:?}"));
            return Err(Error::new(
                ErrorKind::Io,
                format!("freeze the guest: {why}"),
            ));
        };
        *running = Some(guard);
        Ok(Frozen {
            consistency,
            remark,
        })
    }

    /// As [`Quiesce::thaw`], and tells what did not go as hoped.
    ///
    /// # Errors
    /// The deadline had passed, or it is not known to be thawed.
    pub fn thaw_telling(&self) -> Result<Thawed> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(guard) = running.take() else {
            return Ok(Thawed::default());
        };
        let line = guard.end()?;
        let (said, remark) = heard(&line);
        let held_up = said
            .strip_prefix(THAWED)
            .and_then(|ms| ms.trim().parse().ok());
        match (said, held_up) {
            (_, Some(ms)) => Ok(Thawed {
                held_up: Duration::from_millis(ms),
                remark,
            }),
            (LATE, _) => Err(Error::new(
                ErrorKind::Io,
                "thaw the guest: the deadline of the freeze had passed, it was thawed before",
            )),
            _ => {
                let why = remark.unwrap_or_else(|| {
                    let said = crate::lines::shown(said);
                    format!("expected its guard to say so, found {said:?}")
                });
                Err(Error::new(ErrorKind::Io, format!("thaw the guest: {why}")))
            }
        }
    }
}

impl Quiesce for Guarded {
    fn freeze(&self, deadline: Duration) -> Result<()> {
        self.freeze_telling(deadline, Duration::MAX).map(drop)
    }

    fn thaw(&self) -> Result<()> {
        self.thaw_telling().map(drop)
    }
}
