//! Disks that qemu-nbd serves, with its defaults: what clients write is in its cache until they flush.

use std::fs;
use std::os::unix::net::UnixStream;

use super::{Lab, tool};

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
