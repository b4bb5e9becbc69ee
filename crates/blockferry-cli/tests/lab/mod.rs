//! Disks, a state root of its own, and the real command.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses some of it"
)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

pub const MIB: usize = 1 << 20;

/// A directory with disks and a state root of its own, on a real file system.
pub struct Lab {
    directory: tempfile::TempDir,
}

impl Lab {
    pub fn new() -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        Self { directory }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A disk without zeros, different for each seed.
    pub fn disk(&self, name: &str, bytes: usize, seed: u64) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content(bytes, seed)).expect("written");
        path
    }

    pub fn command<'a>(&self, words: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blockferry"));
        command
            .args(words)
            .current_dir(self.directory.path())
            .stdin(Stdio::null());
        command.env("BLOCKFERRY_STATE_ROOT", self.path("state-root"));
        command
    }

    pub fn run(&self, line: &str) -> Output {
        self.command(line.split_whitespace())
            .output()
            .expect("the binary runs")
    }

    /// Runs with `--json` and returns the exit code and every line, parsed.
    pub fn json(&self, line: &str) -> (i32, Vec<Value>) {
        let output = self
            .command(line.split_whitespace().chain(["--json"]))
            .output()
            .expect("runs");
        assert_eq!(
            text(&output.stderr),
            "",
            "{line}: JSON mode is silent on standard error"
        );
        let lines = text(&output.stdout);
        let parsed = lines
            .lines()
            .map(|line| serde_json::from_str(line).expect(line))
            .collect();
        (code(&output), parsed)
    }

    /// Runs something that must succeed.
    pub fn must(&self, line: &str) {
        let output = self.run(line);
        assert_eq!(code(&output), 0, "{line}: {}", text(&output.stderr));
    }

    /// Two equal disks after a completed delta, so that there is something to roll back to.
    pub fn applied(&self) {
        self.disk("old", 4 * MIB, 1);
        fs::copy(self.path("old"), self.path("target")).expect("copied");
        fs::copy(self.path("old"), self.path("source")).expect("copied");
        patch(&self.path("source"), 70_000, b"changed");
        self.must("sync source target --mode delta");
    }

    /// A sync slowed down so much that it lasts until it is stopped.
    pub fn slow_sync(&self, more: &str) -> Child {
        self.disk("source", 24 * MIB, 2);
        self.disk("target", 24 * MIB, 3);
        let line = format!("sync source target --mode delta --strategy redo --bwlimit 4M {more}");
        let mut command = self.command(line.split_whitespace());
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("runs")
    }
}

/// xorshift64*: bytes without pattern, the same for the same seed.
pub fn content(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    };
    (0..bytes / 8)
        .flat_map(|_| (next() | 1).to_le_bytes())
        .collect()
}

pub fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    let file = fs::OpenOptions::new()
        .write(true)
        .open(path)
        .expect("opened");
    file.write_all_at(bytes, offset).expect("written");
}

pub fn same(one: &Path, other: &Path) -> bool {
    fs::read(one).expect("readable") == fs::read(other).expect("readable")
}

pub fn code(output: &Output) -> i32 {
    output.status.code().expect("ended by itself")
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// A run in JSON that lasts, once something of it is durable; and what it still says.
pub fn begun(command: &mut Command) -> (Child, impl Iterator<Item = Value> + use<>) {
    let mut child = command.stdout(Stdio::piped()).spawn().expect("runs");
    let mut lines = BufReader::new(child.stdout.take().expect("piped"))
        .lines()
        .map(|line| serde_json::from_str::<Value>(&line.expect("readable")).expect("JSON"));
    lines
        .find(|line| line["event"] == "checkpoint")
        .expect("something is durable before the end");
    (child, lines)
}

/// The lines of a run whose connection was cut twice: it went on by itself and sent nothing durable again; a pull had
/// something to resume.
pub fn assert_went_on((code, lines): &(i32, Vec<Value>), push: bool) {
    assert_eq!(*code, 0, "{lines:?}");
    let again = |line: &&Value| line["code"] == "reconnecting";
    assert_eq!(lines.iter().filter(again).count(), 2, "{lines:?}");
    let receipt = lines.last().expect("a line");
    assert_eq!(receipt["restaged_bytes"], 0, "{receipt}");
    assert!(
        push || receipt["resumed_bytes"].as_u64() > Some(0),
        "{receipt}"
    );
}

pub fn signal(child: &Child, name: &str) {
    let status = Command::new("kill")
        .args([name, &child.id().to_string()])
        .status();
    assert!(status.expect("kill runs").success());
}
