//! Two real machines without an operating system: a guest is handed over, taken back, and handed over again.

use std::io::{self, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blockferry_qemu::{HandOver, Machine, MachineOptions};

const PROGRAM: &str = "qemu-system-x86_64";
const LONG: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(300);

/// A machine with a disk; dropped, it is killed.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// `None` if there is no such program.
fn start(place: &Path, name: &str, more: &[&str]) -> Option<(Running, Machine)> {
    let socket = place.join(name);
    std::fs::remove_file(&socket).ok();
    let child = Command::new(PROGRAM)
        .args([
            "-accel",
            "tcg",
            "-machine",
            "q35",
            "-m",
            "64",
            "-nodefaults",
        ])
        .args(["-display", "none", "-blockdev"])
        .arg(format!(
            "driver=raw,node-name=disk0,file.driver=file,file.filename={}",
            place.join("disk").display()
        ))
        .args(["-device", "virtio-blk-pci,drive=disk0", "-qmp"])
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .args(more)
        .stdin(Stdio::null())
        .spawn();
    let running = match child {
        Ok(child) => Running(child),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return None,
        Err(cause) => panic!("{PROGRAM}: {cause}"),
    };
    let end = Instant::now() + LONG;
    let options = MachineOptions::new(&socket, "job", place);
    loop {
        match Machine::open(&options) {
            Ok(machine) => return Some((running, machine)),
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn wait(machine: &mut Machine, state: HandOver) {
    let end = Instant::now() + LONG;
    while machine.hand_over_state().expect("it answers") != state {
        assert!(Instant::now() < end, "it is not {state:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_guest_is_handed_over_and_until_the_last_step_taken_back() {
    let place = tempfile::tempdir().unwrap();
    std::fs::write(place.path().join("disk"), vec![0; 1 << 20]).unwrap();
    let Some((_running, mut source)) = start(place.path(), "source", &[]) else {
        writeln!(io::stderr(), "SKIPPED: there is no {PROGRAM}").unwrap();
        return;
    };
    let uri = format!("unix:{}", place.path().join("memory").display());
    let waiting = ["-incoming", "defer"];

    // Taken back, and the other machine ends by itself.
    let (other, mut target) = start(place.path(), "target", &waiting).unwrap();
    target.receive_memory(&uri).unwrap();
    source.send_memory(&uri, PAUSE).unwrap();
    wait(&mut source, HandOver::Waiting);
    assert_eq!(source.is_running().unwrap(), Some(false));
    source.take_back().unwrap();
    source.take_back().unwrap();
    source.resume().unwrap();
    assert_eq!(source.is_running().unwrap(), Some(true));
    drop((other, target));

    // Handed over, and asked for again, as after a crash of whoever asked.
    let (other, mut target) = start(place.path(), "target", &waiting).unwrap();
    target.receive_memory(&uri).unwrap();
    source.send_memory(&uri, PAUSE).unwrap();
    wait(&mut source, HandOver::Waiting);
    source.hand_over().unwrap();
    source.hand_over().unwrap();
    target.wait_until_it_runs().unwrap();
    assert_eq!(source.hand_over_state().unwrap(), HandOver::Done);
    assert_eq!(source.is_running().unwrap(), Some(false));

    // The first machine still has what it had.
    drop((other, target));
    source.take_back().unwrap();
    source.resume().unwrap();
    assert_eq!(source.is_running().unwrap(), Some(true));
    let nobody = format!("unix:{}", place.path().join("nobody").display());
    source.send_memory(&nobody, PAUSE).ok();
    wait(&mut source, HandOver::None);
    let error = source.not_handed_over().to_string();
    assert!(error.contains("nobody"), "{error}");
    source.take_back().unwrap();
    assert_eq!(source.is_running().unwrap(), Some(true));
}
