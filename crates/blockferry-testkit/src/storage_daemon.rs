//! A real qemu-storage-daemon with disks of its own: a machine without a guest.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const PROGRAM: &str = "qemu-storage-daemon";
const STARTING: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(5);

/// A daemon whose disks `disk0`, `disk1`, … are files in its directory. Each can be written through the NBD export
/// `w-disk0`, … of the socket `nbd`; it is commanded through the socket `qmp`. Dropped, it is killed.
#[derive(Debug)]
pub struct StorageDaemon {
    child: Child,
    directory: PathBuf,
    format: &'static str,
    disks: usize,
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl StorageDaemon {
    /// Whether there is one to start.
    #[must_use]
    pub fn is_installed() -> bool {
        let asked = Command::new(PROGRAM)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        asked.is_ok_and(|status| status.success())
    }

    /// Starts one in `directory`, whose path has to be short, with the images that are there: `disk0` to `disk9` at most,
    /// in this format of QEMU's.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(directory: &Path, format: &'static str) -> io::Result<Self> {
        let disks = (0..10).take_while(|n| directory.join(format!("disk{n}")).exists());
        let disks = disks.count();
        Ok(Self {
            child: spawn(directory, format, disks)?,
            directory: directory.to_owned(),
            format,
            disks,
        })
    }

    /// It ends as if its host lost power, and is started again with the same disks.
    ///
    /// # Errors
    /// It does not start again.
    pub fn kill_and_restart(&mut self) -> io::Result<()> {
        self.kill()?;
        self.child = spawn(&self.directory, self.format, self.disks)?;
        Ok(())
    }

    /// It ends as if its host lost power.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        for socket in ["qmp", "nbd"] {
            std::fs::remove_file(self.path(socket)).ok();
        }
        Ok(())
    }

    /// The path of `qmp`, `nbd` or `disk0`.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The names of its disks.
    #[must_use]
    pub fn disks(&self) -> Vec<String> {
        (0..self.disks).map(|n| format!("disk{n}")).collect()
    }
}

fn spawn(directory: &Path, format: &str, disks: usize) -> io::Result<Child> {
    let mut command = Command::new(PROGRAM);
    command
        .current_dir(directory)
        .args(["--chardev", "socket,path=qmp,server=on,wait=off,id=m"])
        .args(["--monitor", "chardev=m"])
        .args([
            "--nbd-server",
            "addr.type=unix,addr.path=nbd,max-connections=64",
        ]);
    for disk in (0..disks).map(|n| format!("disk{n}")) {
        let node = format!(
            "driver={format},node-name={disk},discard=unmap,file.driver=file,file.filename={disk},\
             file.discard=unmap"
        );
        let export = format!("type=nbd,id=w-{disk},node-name={disk},name=w-{disk},writable=on");
        command.args(["--blockdev", &node, "--export", &export]);
    }
    // It complains of every writer that goes away.
    let mut child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let end = Instant::now() + STARTING;
    for socket in ["qmp", "nbd"] {
        while UnixStream::connect(directory.join(socket)).is_err() {
            let has_ended = child.try_wait()?.is_some();
            if has_ended || Instant::now() >= end {
                child.kill().ok();
                child.wait().ok();
                let text = format!("{PROGRAM} does not listen at {socket}");
                return Err(io::Error::other(text));
            }
            thread::sleep(TICK);
        }
    }
    Ok(child)
}
