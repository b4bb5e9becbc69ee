//! QEMU and we keep off each other's images: whoever comes second is refused and told why.
#![expect(clippy::print_stderr, reason = "says which tests were skipped")]

mod common;

use std::path::Path;
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use blockferry_device::{Error, ErrorKind, SourceOptions, open_source, open_target};
use common::{LoopDevice, alone, disk_directory, noise};

const MIB: usize = 1 << 20;

/// QEMU's block layer with an image in use, as it has a machine's disk. Killed when dropped.
struct Holder {
    process: Child,
}

impl Holder {
    /// `None` if QEMU is not installed.
    fn start(image: &Path, driver: &str, options: &str, writable: &str) -> Option<Self> {
        let directory = image.parent().expect("an image lies in a directory");
        let (socket, ready) = (directory.join("q.nbd"), directory.join("q.pid"));
        let _none_before = std::fs::remove_file(&ready);
        let image = image.display();
        let process = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!(
                "driver={driver},node-name=file,filename={image},{options}"
            ))
            .args(["--blockdev", "driver=raw,node-name=disk,file=file"])
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={}", socket.display()))
            .arg("--export")
            .arg(format!(
                "type=nbd,id=export,node-name=disk,writable={writable}"
            ))
            .arg("--pidfile")
            .arg(&ready)
            .spawn()
            .ok()?;
        let mut holder = Self { process };
        holder.wait_for(&ready);
        Some(holder)
    }

    /// It writes its process id once the image is open and exported.
    fn wait_for(&mut self, ready: &Path) {
        let started = Instant::now();
        while !ready.exists() {
            let ended = self.process.try_wait().expect("it is our child");
            assert!(ended.is_none(), "QEMU ended: {ended:?}");
            assert!(started.elapsed() < Duration::from_secs(60), "QEMU hangs");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn end(mut self) {
        self.process.kill().expect("it is our child");
        self.process.wait().expect("it is our child");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ended = self.process.kill().and_then(|()| self.process.wait());
    }
}

fn refusal<T: std::fmt::Debug>(outcome: blockferry_device::Result<T>) -> (ErrorKind, String) {
    let error: Error = outcome.expect_err("a refusal");
    (error.kind(), error.to_string())
}

/// QEMU writes, or reads, one sector of the image.
fn qemu_io(image: &Path, access: &[&str]) -> Option<Output> {
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-f", "raw"]).args(access);
    qemu_io.arg(image).output().ok()
}

const WRITE: &[&str] = &["-c", "write -P 7 0 512"];
const READ: &[&str] = &["-r", "-c", "read 0 512"];

#[test]
fn an_image_in_use_by_qemu_is_refused_naming_qemu() {
    let _alone = alone();
    let directory = disk_directory();
    let image = directory.path().join("disk.raw");
    std::fs::write(&image, noise(MIB)).unwrap();
    // Without its locks only the open file shows.
    for (options, locked) in [("locking=on", true), ("locking=off", false)] {
        let Some(machine) = Holder::start(&image, "file", options, "on") else {
            eprintln!("SKIPPED (needs qemu-storage-daemon)");
            return;
        };
        let process = machine.process.id();

        let as_target = refusal(open_target(&image));
        let as_source = refusal(open_source(&image, SourceOptions::default()));
        let accepted = SourceOptions::default().with_crash_consistent(true);
        let fuzzy = open_source(&image, accepted);
        machine.end();

        for (kind, message) in [&as_target, &as_source] {
            assert_eq!(*kind, ErrorKind::Busy, "{message}");
            let expected = format!("open in process {process} (qemu-storage-da");
            assert!(message.contains(&expected), "{message}");
        }
        assert_eq!(
            as_target.1.contains("locked as QEMU"),
            locked,
            "{as_target:?}"
        );
        fuzzy.expect("a running machine's disk can be accepted as crash-consistent");
        open_target(&image).expect("once the machine is gone");
    }
}

#[test]
fn an_image_that_qemu_only_reads_is_a_source_but_no_target() {
    let _alone = alone();
    let directory = disk_directory();
    let image = directory.path().join("disk.raw");
    std::fs::write(&image, noise(MIB)).unwrap();
    let Some(machine) = Holder::start(&image, "file", "read-only=on", "off") else {
        eprintln!("SKIPPED (needs qemu-storage-daemon)");
        return;
    };

    let as_source = open_source(&image, SourceOptions::default()).map(drop);
    let (kind, message) = refusal(open_target(&image));
    machine.end();

    as_source.expect("nobody writes it");
    assert_eq!(kind, ErrorKind::Busy, "{message}");
    assert!(message.contains("QEMU"), "{message}");
}

#[test]
fn qemu_refuses_a_target_while_we_hold_it() {
    let _alone = alone();
    let directory = disk_directory();
    let image = directory.path().join("disk.raw");
    std::fs::write(&image, noise(MIB)).unwrap();
    let Some(before) = qemu_io(&image, WRITE) else {
        eprintln!("SKIPPED (needs qemu-io)");
        return;
    };
    assert!(before.status.success(), "{before:?}");

    let held = open_target(&image).unwrap();
    let while_held = [WRITE, READ].map(|access| qemu_io(&image, access).unwrap());
    drop(held);
    let after = qemu_io(&image, WRITE).unwrap();

    for output in while_held {
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{output:?}");
        assert!(message.contains("lock"), "{message}");
    }
    assert!(after.status.success(), "{after:?}");
}

#[test]
fn a_device_in_use_by_qemu_is_refused_and_qemu_refuses_ours() {
    let _alone = alone();
    let directory = disk_directory();
    let image = directory.path().join("disk.raw");
    std::fs::write(&image, noise(MIB)).unwrap();
    let Some(device) = LoopDevice::attach(&image, 512) else {
        eprintln!("SKIPPED (needs root)");
        return;
    };
    for (options, writable) in [("locking=on", "on"), ("read-only=on", "off")] {
        // The daemon keeps its socket beside the file, not in /dev.
        let node = directory.path().join("node");
        let _none_before = std::fs::remove_file(&node);
        std::os::unix::fs::symlink(device.path(), &node).unwrap();
        let Some(machine) = Holder::start(&node, "host_device", options, writable) else {
            eprintln!("SKIPPED (needs qemu-storage-daemon)");
            return;
        };

        let (kind, message) = refusal(open_target(device.path()));
        machine.end();

        assert_eq!(kind, ErrorKind::Busy, "{message}");
        assert!(message.contains("qemu-storage-da"), "{options}: {message}");
    }

    let held = open_target(device.path()).expect("once the machine is gone");
    let refused = qemu_io(device.path(), WRITE);
    drop(held);
    let Some(refused) = refused else {
        eprintln!("SKIPPED (needs qemu-io)");
        return;
    };
    assert!(!refused.status.success(), "{refused:?}");
}
