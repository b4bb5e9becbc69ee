//! Running the real command: built once, its answers read, its peak memory watched.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child as Process, ChildStdout, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How a run ended and what it said.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The exit code; `None` if a signal ended it.
    pub(crate) code: Option<i32>,
    /// The JSON lines of standard output.
    pub(crate) lines: Vec<Value>,
    #[expect(dead_code, reason = "shown when a test fails")]
    pub(crate) stderr: String,
    /// Highest resident memory that was seen.
    pub(crate) peak_bytes: u64,
    pub(crate) elapsed: Duration,
}

impl Answer {
    /// The last line of this type.
    #[track_caller]
    pub(crate) fn line(&self, r#type: &str) -> &Value {
        let found = self.lines.iter().rev().find(|line| line["type"] == r#type);
        found.unwrap_or_else(|| panic!("no {type} line in {self:#?}"))
    }

    #[track_caller]
    pub(crate) fn summary(&self) -> &Value {
        self.line("summary")
    }

    /// A number of the summary.
    #[track_caller]
    pub(crate) fn count(&self, field: &str) -> u64 {
        let value = &self.summary()[field];
        value
            .as_u64()
            .unwrap_or_else(|| panic!("{field} is {value}"))
    }

    /// The message of the error line and its hints, joined.
    #[track_caller]
    pub(crate) fn complaint(&self) -> String {
        let line = self.line("error");
        let hints = line["hints"].as_array().cloned().unwrap_or_default();
        let texts = std::iter::once(&line["message"]).chain(&hints);
        texts
            .filter_map(Value::as_str)
            .collect::<Vec<_>>()
            .join("\n")
    }

    pub(crate) fn has_warning(&self) -> bool {
        self.lines.iter().any(|line| line["type"] == "warning")
    }
}

/// The command, in this directory, with its state root there.
pub(crate) fn command(directory: &Path) -> Command {
    command_of(directory, binary())
}

/// Another program that runs the command, in the same surroundings.
pub(crate) fn command_of(directory: &Path, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(directory).stdin(Stdio::null());
    command.env("BLOCKFERRY_STATE_ROOT", directory.join("state-root"));
    command
}

/// Held while a program is started, and, shared, while a file is open: for a moment a new process has all files of
/// this one, whichever test opened them, and a target that somebody has open is refused.
static FILES: RwLock<()> = RwLock::new(());

/// Opens files, and closes them again.
pub(crate) fn with_files<T>(work: impl FnOnce() -> T) -> T {
    let _open = FILES.read().unwrap_or_else(PoisonError::into_inner);
    work()
}

/// Starts programs otherwise than through [`Child`].
pub(crate) fn while_starting<T>(start: impl FnOnce() -> T) -> T {
    let _starting = FILES.write().unwrap_or_else(PoisonError::into_inner);
    start()
}

fn spawn(command: &mut Command) -> std::io::Result<Process> {
    let _starting = FILES.write().unwrap_or_else(PoisonError::into_inner);
    command.spawn()
}

/// Runs another program to its end.
pub(crate) fn output(command: &mut Command) -> std::io::Result<Output> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    spawn(command)?.wait_with_output()
}

/// Runs another program; `None` if it is missing or fails.
pub(crate) fn tool(words: &[&str]) -> Option<String> {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).stdin(Stdio::null());
    let output = output(&mut command).ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    output.status.success().then_some(text)
}

/// The binary under test. The tests are another package than the command, so cargo does not hand it over: it is
/// built here, into the same directory and with the same profile, which is nothing to do in a run of everything.
pub(super) fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let test = std::env::current_exe().expect("the test knows its own path");
        let deps = test.parent().expect("it lies in a directory");
        let directory = deps.parent().expect("deps lies in the profile's directory");
        let target = directory
            .parent()
            .expect("the profile lies in the target directory");
        let profile = match directory.file_name().and_then(|name| name.to_str()) {
            Some("debug") | None => "test",
            Some(other) => other,
        };
        let mut cargo = Command::new(env!("CARGO"));
        cargo
            .args([
                "build",
                "--quiet",
                "--locked",
                "--package",
                "blockferry-cli",
            ])
            .args(["--bin", "blockferry", "--profile", profile, "--target-dir"])
            .arg(target)
            .current_dir(blockferry_tests::workspace_root());
        let built = output(&mut cargo).expect("cargo runs: it built this test");
        assert!(
            built.status.success(),
            "cargo could not build the command: {}",
            String::from_utf8_lossy(&built.stderr)
        );
        directory.join("blockferry")
    })
}

/// Runs to the end.
pub(crate) fn answer(command: &mut Command) -> Answer {
    Child::start(command).finish()
}

/// A run under way. Killed when dropped.
pub(crate) struct Child {
    process: Process,
    lines: BufReader<ChildStdout>,
    /// Taken when it has ended.
    stderr: Option<std::thread::JoinHandle<String>>,
    seen: Vec<Value>,
    peak: Arc<AtomicU64>,
    started: Instant,
}

impl Child {
    pub(crate) fn start(command: &mut Command) -> Self {
        let started = Instant::now();
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = spawn(command).expect("the command starts");
        let stdout = process.stdout.take().expect("piped");
        let mut errors = process.stderr.take().expect("piped");
        let stderr = std::thread::spawn(move || {
            let mut text = String::new();
            errors.read_to_string(&mut text).ok();
            text
        });
        let peak = Arc::new(AtomicU64::new(0));
        let (watched, id) = (Arc::downgrade(&peak), process.id());
        std::thread::spawn(move || {
            while let Some(peak) = watched.upgrade() {
                peak.fetch_max(peak_bytes(id), Ordering::Relaxed);
                drop(peak);
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        Self {
            process,
            lines: BufReader::new(stdout),
            stderr: Some(stderr),
            seen: Vec::new(),
            peak,
            started,
        }
    }

    /// Reads on until a line satisfies `wanted`; false if the run ended before.
    pub(crate) fn wait_for(&mut self, mut wanted: impl FnMut(&Value) -> bool) -> bool {
        while let Some(line) = self.next_line() {
            if wanted(&line) {
                return true;
            }
        }
        false
    }

    fn next_line(&mut self) -> Option<Value> {
        let mut text = String::new();
        let length = self.lines.read_line(&mut text).expect("readable");
        // A killed run may leave half a line.
        let line = text
            .ends_with('\n')
            .then(|| serde_json::from_str(&text).expect("JSON"));
        self.seen.extend(line.clone());
        line.filter(|_| length > 0)
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn signal(&self, name: &str) {
        let id = self.id().to_string();
        tool(&["kill", name, &id]).expect("kill runs");
    }

    pub(crate) fn kill(mut self) -> Answer {
        self.process.kill().ok();
        self.finish()
    }

    pub(crate) fn finish(mut self) -> Answer {
        while self.next_line().is_some() {}
        let status = self.process.wait().expect("it ends");
        let elapsed = self.started.elapsed();
        Answer {
            code: status.code(),
            lines: std::mem::take(&mut self.seen),
            stderr: self
                .stderr
                .take()
                .and_then(|s| s.join().ok())
                .unwrap_or_default(),
            peak_bytes: self.peak.load(Ordering::Relaxed),
            elapsed,
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // A test that failed under way must not leave a run that keeps its disks busy.
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// The kernel's own high-water mark of a process; 0 once it is gone.
fn peak_bytes(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line
        .and_then(|text| text.trim().strip_suffix(" kB"))
        .and_then(|n| n.parse().ok());
    kib.unwrap_or(0u64) * 1024
}
