//! Two real machines without an operating system: a guest is handed over, taken back, and handed over again.

use std::io::{self, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blockferry_qemu::{HandOver, Machine, MachineOptions};
use serde_json::json;

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
    target.receive_memory(&uri, None).unwrap();
    source.send_memory(&uri, PAUSE, None).unwrap();
    wait(&mut source, HandOver::Waiting);
    assert_eq!(source.is_running().unwrap(), Some(false));
    source.take_back().unwrap();
    source.take_back().unwrap();
    source.resume().unwrap();
    assert_eq!(source.is_running().unwrap(), Some(true));
    drop((other, target));

    // Handed over, and asked for again, as after a crash of whoever asked.
    let (other, mut target) = start(place.path(), "target", &waiting).unwrap();
    target.receive_memory(&uri, None).unwrap();
    source.send_memory(&uri, PAUSE, None).unwrap();
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
    source.send_memory(&nobody, PAUSE, None).ok();
    wait(&mut source, HandOver::None);
    let error = source.not_handed_over().to_string();
    assert!(error.contains("nobody"), "{error}");
    source.take_back().unwrap();
    assert_eq!(source.is_running().unwrap(), Some(true));
}

/// A boot sector that says it runs on port 0xE9, and then counts up in each of 128 pages for ever.
const BUSY: [u8; 30] = [
    0xB0, 0x21, 0xE6, 0xE9, // mov al, '!'; out 0xE9, al
    0xB8, 0x00, 0x20, // from 0x20000 on:  mov ax, 0x2000
    0x8E, 0xC0, 0x31, 0xFF, //   mov es, ax; xor di, di
    0x26, 0xFF, 0x05, //           inc word es:[di]
    0x81, 0xC7, 0x00, 0x10, //     add di, 0x1000
    0x73, 0xF7, //               until all pages of the segment were written
    0x05, 0x00, 0x10, //         add ax, 0x1000
    0x3D, 0x00, 0xA0, 0x72, 0xEB, // below 0xA0000
    0xEB, 0xE6, // again
];

#[test]
fn a_guest_whose_memory_is_held_back_goes_on_until_it_is_let_go() {
    let place = tempfile::tempdir().unwrap();
    let mut disk = vec![0; 1 << 20];
    disk[..BUSY.len()].copy_from_slice(&BUSY);
    disk[510..512].copy_from_slice(&[0x55, 0xAA]);
    std::fs::write(place.path().join("disk"), disk).unwrap();
    let told = place.path().join("told");
    let chardev = format!("file,id=told,path={}", told.display());
    let port = "isa-debugcon,iobase=0xe9,chardev=told";
    let busy = ["-chardev", &chardev, "-device", port];
    let Some((_running, mut source)) = start(place.path(), "source", &busy) else {
        writeln!(io::stderr(), "SKIPPED: there is no {PROGRAM}").unwrap();
        return;
    };
    let end = Instant::now() + LONG;
    while std::fs::read(&told).unwrap().is_empty() {
        assert!(Instant::now() < end, "the guest does not boot");
        std::thread::sleep(Duration::from_millis(20));
    }
    let uri = format!("unix:{}", place.path().join("memory").display());
    let waiting: Vec<&str> = busy.into_iter().chain(["-incoming", "defer"]).collect();
    // So little memory may be sent before anybody says that it is to be held back.
    let (_other, _target) = loop {
        let (other, mut target) = start(place.path(), "target", &waiting).unwrap();
        target.receive_memory(&uri, None).unwrap();
        source
            .send_memory(&uri, Duration::from_millis(20), None)
            .unwrap();
        source.hold_memory_back(true).unwrap();
        if source.is_running().unwrap() == Some(true) {
            break (other, target);
        }
        source.take_back().unwrap();
        source.resume().unwrap();
        assert!(Instant::now() < end, "it never was in time");
    };

    std::thread::sleep(Duration::from_secs(1));

    let state = source.hand_over_state().unwrap();
    assert!(matches!(state, HandOver::Travelling { .. }), "{state:?}");
    assert_eq!(source.is_running().unwrap(), Some(true));

    source.hold_memory_back(false).unwrap();

    wait(&mut source, HandOver::Waiting);
    assert_eq!(source.is_running().unwrap(), Some(false));

    // Taken back while it is held back, nothing of that is left.
    source.hold_memory_back(true).unwrap();
    source.take_back().unwrap();
    let limits = source.qmp().execute("query-migrate-parameters", json!({}));
    let bandwidth = limits.unwrap()["max-bandwidth"].as_u64();
    assert!(bandwidth > Some(1 << 30), "{bandwidth:?}");
}

/// The names of what was added to a machine.
fn objects(machine: &mut Machine) -> Vec<String> {
    let found = machine
        .qmp()
        .execute("qom-list", json!({"path": "/objects"}));
    let found = found.expect("it answers");
    let names = found.as_array().into_iter().flatten();
    let names = names.filter_map(|object| object["name"].as_str());
    names.map(ToOwned::to_owned).collect()
}

#[test]
fn memory_travels_by_tls_to_whoever_has_the_key_and_to_nobody_else() {
    let place = tempfile::tempdir().unwrap();
    std::fs::write(place.path().join("disk"), vec![0; 1 << 20]).unwrap();
    for (name, key) in [
        ("key", "00112233445566778899"),
        ("other", "99887766554433221100"),
    ] {
        std::fs::create_dir(place.path().join(name)).unwrap();
        let keys = place.path().join(name).join("keys.psk");
        std::fs::write(keys, format!("qemu:{key}{key}\n")).unwrap();
    }
    let (key, other) = (place.path().join("key"), place.path().join("other"));
    let Some((_running, mut source)) = start(place.path(), "source", &[]) else {
        writeln!(io::stderr(), "SKIPPED: there is no {PROGRAM}").unwrap();
        return;
    };
    let uri = format!("unix:{}", place.path().join("memory").display());
    let waiting = ["-incoming", "defer"];
    let own = objects(&mut source);

    for theirs in [Some(&*other), None] {
        let (_other, mut target) = start(place.path(), "target", &waiting).unwrap();
        target.receive_memory(&uri, Some(&key)).unwrap();
        source.send_memory(&uri, PAUSE, theirs).unwrap();
        wait(&mut source, HandOver::None);
        assert_eq!(source.is_running().unwrap(), Some(true));
        source.take_back().unwrap();
        assert_eq!(objects(&mut source), own);
    }

    let (_other, mut target) = start(place.path(), "target", &waiting).unwrap();
    let theirs = objects(&mut target);
    target.receive_memory(&uri, Some(&key)).unwrap();
    assert_ne!(objects(&mut target), theirs);
    source.send_memory(&uri, PAUSE, Some(&key)).unwrap();
    wait(&mut source, HandOver::Waiting);
    source.hand_over().unwrap();
    target.wait_until_it_runs().unwrap();

    assert_eq!(objects(&mut target), theirs);
    source.leave(&[]).unwrap();
    assert_eq!(objects(&mut source), own);
}
