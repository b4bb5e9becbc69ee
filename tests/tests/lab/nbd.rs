//! Disks that others serve: qemu-nbd with its defaults, so that what clients write is in its cache until they flush, and nbdkit.

use std::fs;
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};

use super::{Lab, command_of, tool, while_starting};

/// What [`NbdServer`] serves, as a command in the lab names it.
pub(crate) const EXPORT: &str = "nbd+unix:///?socket=nbd.socket";

/// An image that qemu-nbd serves. Ended when dropped.
pub(crate) struct NbdServer {
    process: String,
    socket: String,
}

impl NbdServer {
    /// `None` if qemu-nbd is not installed.
    pub(crate) fn start(lab: &Lab, image: &str) -> Option<Self> {
        Self::start_with(lab, image, &["--read-only"])
    }

    /// Whose clients may write.
    pub(crate) fn start_writable(lab: &Lab, image: &str) -> Option<Self> {
        Self::start_with(lab, image, &[])
    }

    fn start_with(lab: &Lab, image: &str, options: &[&str]) -> Option<Self> {
        let [pid, socket, image] =
            ["nbd.pid", "nbd.socket", image].map(|name| lab.path(name).display().to_string());
        fs::remove_file(&socket).ok();
        // It goes to the background once it listens.
        let fixed = [
            "qemu-nbd",
            "--fork",
            "--persistent",
            "--shared=8",
            "--format=raw",
        ];
        let [pid_file, at] = [format!("--pid-file={pid}"), format!("--socket={socket}")];
        tool(&[&fixed, options, &[&pid_file, &at, &image]].concat())?;
        let process = fs::read_to_string(pid).expect("it has written its number");
        Some(Self {
            process: process.trim().to_owned(),
            socket,
        })
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        tool(&["kill", "-KILL", &self.process]);
        // No child of ours: it is gone once nobody listens.
        while UnixStream::connect(&self.socket).is_ok() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

/// nbdkit, with filters that make it fail or wait, or with TLS. Ended when dropped.
pub(crate) struct Nbdkit(Child);

impl Nbdkit {
    /// It is installed. `socket` is a name in the lab.
    pub(crate) fn start(lab: &Lab, socket: &str, words: &[&str]) -> Self {
        fs::remove_file(lab.path(socket)).ok();
        let mut command = command_of(lab.root(), "nbdkit");
        command
            .args(["--foreground", "--unix", socket])
            .args(words)
            .stderr(Stdio::null());
        let started = Self(while_starting(|| command.spawn()).expect("it was there before"));
        while UnixStream::connect(lab.path(socket)).is_err() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        started
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
