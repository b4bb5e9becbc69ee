//! A remote shell that runs `blockferry serve --stdio` on another host.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::address::Remote;
use crate::arguments::RemoteShell;
use crate::engine::transport;
use crate::engine::{Connection, Deadlines, Link};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Output;
use crate::quote::quoted;
use crate::session::Session;

/// The remote shell, where no option names it.
const RSH_VARIABLE: &str = "BLOCKFERRY_RSH";
/// Logging in may need a password or a touch of a key.
const GREETING: Duration = Duration::from_secs(120);
/// How long a shell whose connection has ended may take to end itself.
const ENDING: Duration = Duration::from_secs(5);
const TICK: Duration = Duration::from_millis(20);
/// Most bytes of a line of the other host that are shown.
const MAX_LINE_BYTES: u64 = 4096;

/// The command that starts something on another host.
#[derive(Clone, Debug)]
pub(super) struct Shell<'a> {
    remote: &'a Remote,
    words: Vec<String>,
    remote_path: &'a str,
}

impl<'a> Shell<'a> {
    /// Finds out how the host is reached.
    pub(super) fn new(remote: &'a Remote, shell: &'a RemoteShell) -> Result<Self, Failure> {
        let variable = || {
            std::env::var(RSH_VARIABLE)
                .ok()
                .filter(|rsh| !rsh.trim().is_empty())
        };
        let rsh = shell
            .rsh
            .clone()
            .or_else(variable)
            .unwrap_or_else(|| "ssh".to_owned());
        let words = shlex::split(&rsh)
            .filter(|words| !words.is_empty())
            .ok_or_else(|| {
                let message = format!(
                    "remote shell {rsh:?}: expected a command, with quotes that are closed"
                );
                Failure::new(Exit::Usage, message)
            })?;
        Ok(Self {
            remote,
            words,
            remote_path: &shell.remote_path,
        })
    }

    /// What is asked for there.
    pub(super) fn disk(&self) -> &[u8] {
        self.remote.path().as_os_str().as_bytes()
    }

    /// Program and arguments up to the host.
    fn words(&self) -> impl Iterator<Item = String> {
        let port = self
            .remote
            .port()
            .map(|port| ["-p".to_owned(), port.to_string()]);
        let host = self.remote.host().to_owned();
        self.words
            .clone()
            .into_iter()
            .chain(port.into_iter().flatten())
            .chain([host])
    }

    /// The command that logs in, to be pasted here.
    fn login(&self) -> String {
        let words: Vec<String> = self.words().map(|word| quoted(&word)).collect();
        words.join(" ")
    }

    /// The command for `verb` on the disk of the other host, to be pasted here.
    pub(super) fn command(&self, verb: &str, state: Option<&str>) -> String {
        let state = state.map(|dir| format!(" --state {}", quoted(dir)));
        let path = quoted(&self.remote.word());
        let there = format!(
            "{} {verb} {path}{}",
            self.remote_path,
            state.unwrap_or_default()
        );
        format!("{} {}", self.login(), quoted(&there))
    }
}

/// Starts blockferry on the other host and greets it. The shell ends once the connection has; dropped, it is waited for.
pub(super) fn connect(
    shell: &Shell<'_>,
    session: &Session,
) -> Result<(Running, Connection), Failure> {
    let host = shell.remote.host().to_owned();
    let mut running = Running::start(shell, &session.output)?;
    let link = running.link(&host)?;
    let greeted = AtomicBool::new(false);
    let opened = thread::scope(|scope| {
        // Greeting waits for people who type passwords; a signal ends it all the same.
        scope.spawn(|| {
            while !greeted.load(Ordering::Relaxed) {
                if session.is_cancelled() {
                    running.kill();
                    break;
                }
                thread::sleep(TICK);
            }
        });
        let deadlines = Deadlines {
            greeting: GREETING,
            ..Deadlines::default()
        };
        let opened = Connection::open(link, deadlines);
        greeted.store(true, Ordering::Relaxed);
        opened
    });
    match opened {
        Ok(connection) => Ok((running, connection)),
        Err(_) if session.is_cancelled() => Err(super::stopped(&host, session)),
        Err(error) => Err(explain(&error, shell, running.end())),
    }
}

/// A remote shell under way. Dropped, it is given some time to end, and then ended.
#[derive(Debug)]
pub(super) struct Running {
    child: Mutex<Child>,
    errors: Option<JoinHandle<()>>,
}

impl Running {
    fn start(shell: &Shell<'_>, output: &Arc<Output>) -> Result<Self, Failure> {
        let program = shell.words.first().map_or("ssh", String::as_str);
        if !is_program(program) {
            let message = format!(
                "cannot reach {}: there is no command {program} here",
                shell.remote.host()
            );
            return Err(Failure::new(Exit::Peer, message)
                .with_hint("install it (package openssh-client), or name another with -e"));
        }
        // Ctrl-C reaches every process of the terminal: the shell lives on, so that the run can end in order.
        let mut child = Command::new("sh")
            .args(["-c", "trap '' INT; exec \"$@\"", "sh"])
            .args(shell.words())
            .arg(format!("{} serve --stdio", shell.remote_path))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| {
                Failure::new(Exit::Peer, format!("cannot start {program}: {error}"))
            })?;
        let errors = child.stderr.take().map(|stream| {
            let (output, host) = (Arc::clone(output), shell.remote.host().to_owned());
            thread::spawn(move || show(stream, &host, &output))
        });
        Ok(Self {
            child: Mutex::new(child),
            errors,
        })
    }

    fn link(&mut self, host: &str) -> Result<Link, Failure> {
        let mut child = self.child();
        match (child.stdout.take(), child.stdin.take()) {
            // The shell ends when its input does, and with it what is read from it.
            (Some(reader), Some(writer)) => Ok(Link::new(reader, writer, || {}, host)),
            _ => Err(Failure::new(
                Exit::Internal,
                "a remote shell without streams",
            )),
        }
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kill(&self) {
        // What has ended need not be ended.
        self.child().kill().ok();
    }

    /// How it ended, once all that it wrote was shown.
    fn end(mut self) -> Option<ExitStatus> {
        self.wait()
    }

    fn wait(&mut self) -> Option<ExitStatus> {
        let end = Instant::now() + ENDING;
        while Instant::now() < end {
            let ended = self.child().try_wait();
            if let Ok(Some(status)) = ended {
                if let Some(errors) = self.errors.take().filter(|thread| wait_for(thread, end)) {
                    errors.join().ok();
                }
                return Some(status);
            }
            thread::sleep(TICK);
        }
        self.kill();
        self.child().wait().ok()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.wait();
    }
}

/// A process that the shell left behind may hold its standard error open.
fn wait_for(thread: &JoinHandle<()>, end: Instant) -> bool {
    while !thread.is_finished() && Instant::now() < end {
        thread::sleep(TICK);
    }
    thread.is_finished()
}

/// Shows what the other host writes, line by line.
fn show(stream: ChildStderr, host: &str, output: &Output) {
    let mut lines = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        match lines
            .by_ref()
            .take(MAX_LINE_BYTES)
            .read_until(b'\n', &mut line)
        {
            Ok(1..) => output.remote(host, String::from_utf8_lossy(&line).trim_end()),
            Ok(0) | Err(_) => break,
        }
    }
}

fn is_program(name: &str) -> bool {
    if name.contains('/') {
        return std::path::Path::new(name).is_file();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
}

/// Why there is no connection, and what can be done.
fn explain(error: &transport::Error, shell: &Shell<'_>, ended: Option<ExitStatus>) -> Failure {
    let (host, command) = (shell.remote.host(), shell.remote_path);
    let failure = |text: String| {
        Failure::new(
            Exit::Peer,
            format!("cannot reach blockferry on {host}: {text}"),
        )
    };
    let told = Failure::from_error(Exit::Peer, error).message().to_owned();
    if error.kind() == transport::ErrorKind::UnknownVersion {
        return failure(told);
    }
    match ended.and_then(|status| status.code()) {
        Some(255) => failure(format!("{} could not log in", shell.login())),
        Some(127) => failure(format!("its shell finds no command {command}")).with_hint(format!(
            "install blockferry on {host}, or say where it is with --remote-path"
        )),
        Some(126) => failure(format!("its shell may not run {command}"))
            .with_hint("make it executable there, or name another with --remote-path"),
        Some(2) => {
            failure(format!("{command} there does not know how to serve")).with_hint(format!(
                "it is too old: bring blockferry on {host} to version {}",
                env!("CARGO_PKG_VERSION")
            ))
        }
        Some(code) if error.kind() == transport::ErrorKind::Lost => {
            failure(format!("it ended with status {code}"))
        }
        _ => failure(told).with_hint(format!(
            "a shell that prints something when one logs in does that: {} true must print nothing",
            shell.login()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_looked_for_as_a_shell_does() {
        assert!(is_program("sh") && is_program("/bin/sh"));
        assert!(!is_program("no-such-command") && !is_program("/no/such/command"));
    }
}
