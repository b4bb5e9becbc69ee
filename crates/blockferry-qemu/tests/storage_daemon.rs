//! Cuts through the disks of a real qemu-storage-daemon while somebody writes them.

use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use blockferry_core::Content;
use blockferry_device::{BlockSource, BlockTarget};
use blockferry_nbd::{NbdAddress, NbdDevice, NbdOptions};
use blockferry_qemu::{Held, Machine, MachineOptions, PointExport, Qmp};
use blockferry_testkit::{Random, StorageDaemon, Writer};
use serde_json::{Value, json};

const BYTES: usize = 8 << 20;
const PAGE: usize = 4096;

/// A daemon with two disks in a directory of its own.
struct Daemon {
    daemon: StorageDaemon,
    place: tempfile::TempDir,
}

fn is_missing() -> bool {
    let missing = !StorageDaemon::is_installed();
    #[expect(clippy::print_stderr, reason = "what is skipped is said")]
    if missing {
        eprintln!("SKIPPED: qemu-storage-daemon is not installed");
    }
    missing
}

impl Daemon {
    fn start(format: &'static str) -> Self {
        let place = tempfile::tempdir().expect("a directory");
        for disk in ["disk0", "disk1"] {
            let made = Command::new("qemu-img")
                .args(["create", "-q", "-f", format])
                .arg(place.path().join(disk))
                .arg(BYTES.to_string())
                .status();
            assert!(made.expect("qemu-img").success());
        }
        let daemon = StorageDaemon::start(place.path(), format).expect("a daemon");
        Self { daemon, place }
    }

    fn machine(&self) -> Machine {
        let qmp = self.daemon.path("qmp");
        let mut options = MachineOptions::new(qmp, "job-1", self.place.path());
        options.nbd = Some(self.daemon.path("nbd"));
        Machine::open(&options).expect("a machine")
    }

    fn target(&self, disk: &str) -> Arc<dyn BlockTarget> {
        let socket = self.daemon.path("nbd");
        let address = NbdAddress::unix(socket, &format!("w-{disk}")).expect("fits");
        NbdDevice::open_target(&address, &NbdOptions::default()).expect("an export")
    }

    /// Writes both disks.
    fn writer(&self, seed: u64) -> Writer {
        let devices = disks().iter().map(|disk| self.target(disk)).collect();
        let content = vec![vec![0; BYTES]; 2];
        Writer::start(devices, content, Duration::from_micros(200), seed)
    }

    /// Everything there is, by name: nodes, bitmaps, jobs, exports and overlay files.
    fn everything(&self) -> Vec<String> {
        let mut qmp = Qmp::connect(&self.daemon.path("qmp")).expect("QMP");
        let mut names = Vec::new();
        let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}));
        for node in nodes.expect("nodes").as_array().expect("a list") {
            names.push(format!("node {}", node["node-name"]));
            for bitmap in node["dirty-bitmaps"].as_array().into_iter().flatten() {
                names.push(format!("bitmap {} {}", node["node-name"], bitmap["name"]));
            }
        }
        for (command, what) in [("query-jobs", "job"), ("query-block-exports", "export")] {
            let found = qmp.execute(command, json!({})).expect("a list");
            let found = found.as_array().cloned().unwrap_or_default();
            names.extend(found.iter().map(|one| format!("{what} {}", one["id"])));
        }
        for entry in std::fs::read_dir(self.place.path()).expect("a directory") {
            let name = entry.expect("an entry").file_name();
            names.push(format!("file {}", name.to_string_lossy()));
        }
        names.retain(|name| !name.contains("#block"));
        names.sort();
        names
    }
}

/// Some pages are written.
fn pause() {
    thread::sleep(Duration::from_millis(60));
}

fn disks() -> Vec<String> {
    vec!["disk0".to_owned(), "disk1".to_owned()]
}

fn held(number: u64) -> Vec<Held> {
    disks()
        .into_iter()
        .map(|disk| Held::cut(disk, number))
        .collect()
}

fn nothing_held() -> Vec<Held> {
    disks().into_iter().map(Held::unknown).collect()
}

fn source(point: &PointExport) -> Arc<NbdDevice> {
    let address = NbdAddress::unix(&point.socket, &point.export).expect("fits");
    let mut options = NbdOptions::default();
    options.bitmap = point.bitmap.clone();
    NbdDevice::open_source(&address, &options).expect("the export of a point")
}

fn read(source: &NbdDevice) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    source.read_at(0, &mut bytes).expect("read");
    bytes
}

/// Brings a replica to a point, reading only what the bitmap calls changed.
fn apply(point: &PointExport, replica: &mut [u8]) -> usize {
    let source = source(point);
    let map = source.changes().expect("a map");
    let all = blockferry_core::Extent::from_range(0..BYTES as u64);
    let mut copied = 0;
    let Some(map) = map else {
        replica.copy_from_slice(&read(&source));
        return BYTES;
    };
    for (extent, content) in map.runs(all) {
        if content == Content::Same {
            continue;
        }
        let at = usize::try_from(extent.start()).expect("fits");
        let length = usize::try_from(extent.length()).expect("fits");
        let part = &mut replica[at..at + length];
        source.read_at(extent.start(), part).expect("read");
        copied += length;
    }
    copied
}

/// A cut, and what both disks held at it.
fn cut(machine: &mut Machine, number: u64, writer: &Writer) -> (Vec<Vec<u8>>, Vec<PointExport>) {
    machine.prepare(number, &disks()).expect("prepared");
    let (content, ()) = writer.at(|| machine.cut(number, &disks()).expect("cut"));
    (
        content,
        machine.publish(number, &disks()).expect("published"),
    )
}

#[test]
fn each_cut_shows_both_disks_at_one_moment_and_its_bitmap_what_changed_since_the_one_before() {
    for format in ["raw", "qcow2"] {
        if is_missing() {
            return;
        }
        let daemon = Daemon::start(format);
        let writer = daemon.writer(1);
        let mut machine = daemon.machine();
        let lost = machine.settle(&nothing_held()).expect("settled");
        assert_eq!(lost.len(), 2, "nothing is known at first: {lost:?}");
        let mut replicas = [vec![0xEE; BYTES], vec![0xEE; BYTES]];

        for number in 1..=4 {
            pause();
            let (content, points) = cut(&mut machine, number, &writer);
            // It is written on while the point is read.
            pause();
            for ((point, replica), content) in points.iter().zip(&mut replicas).zip(&content) {
                apply(point, replica);
                assert!(
                    replica == content,
                    "{format}: cut {number} of {}",
                    point.disk
                );
                assert_eq!(point.bitmap.is_some(), number > 1);
            }
            let lost = machine.settle(&held(number)).expect("settled");
            assert_eq!(lost, [], "cut {number}");
        }
    }
}

#[test]
fn a_cut_that_the_target_did_not_get_loses_no_change() {
    if is_missing() {
        return;
    }
    for seed in 0..4 {
        let daemon = Daemon::start("raw");
        let writer = daemon.writer(seed);
        let mut random = Random::new(seed);
        let mut machine = daemon.machine();
        machine.settle(&nothing_held()).expect("settled");
        let mut replicas = [vec![0; BYTES], vec![0; BYTES]];
        let (_, points) = cut(&mut machine, 1, &writer);
        for (point, replica) in points.iter().zip(&mut replicas) {
            apply(point, replica);
        }
        let mut holds = 1;

        for number in 2..=7 {
            // Sometimes we die: somebody new finds what is left.
            if random.chance(1, 3) {
                drop(machine);
                machine = daemon.machine();
            }
            let lost = machine.settle(&held(holds)).expect("settled");
            assert_eq!(lost, [], "seed {seed}, cut {number}");
            pause();
            let (content, points) = cut(&mut machine, number, &writer);
            if random.chance(1, 2) {
                continue;
            }
            for ((point, replica), content) in points.iter().zip(&mut replicas).zip(&content) {
                assert!(point.bitmap.is_some(), "seed {seed}: compared in full");
                apply(point, replica);
                assert!(replica == content, "seed {seed}: cut {number}");
            }
            holds = number;
        }
    }
}

#[test]
fn nothing_of_ours_is_left_and_nothing_of_others_is_taken() {
    if is_missing() {
        return;
    }
    let daemon = Daemon::start("raw");
    let mut qmp = Qmp::connect(&daemon.daemon.path("qmp")).expect("QMP");
    for (disk, name) in [("disk0", "bf-job-1x-b3"), ("disk1", "backup")] {
        let arguments = json!({"node": disk, "name": name});
        qmp.execute("block-dirty-bitmap-add", arguments)
            .expect("added");
    }
    drop(qmp);
    let before = daemon.everything();
    let writer = daemon.writer(3);

    // We die after each of the steps.
    for steps in 0..4 {
        let mut machine = daemon.machine();
        machine.settle(&nothing_held()).expect("settled");
        if steps > 0 {
            machine.prepare(1, &disks()).expect("prepared");
        }
        if steps > 1 {
            writer.at(|| machine.cut(1, &disks())).1.expect("cut");
        }
        if steps > 2 {
            let points = machine.publish(1, &disks()).expect("published");
            drop(source(&points[0]));
        }
        drop(machine);

        daemon.machine().leave(&disks()).expect("left");

        assert_eq!(daemon.everything(), before, "after {steps} steps");
    }
}

#[test]
fn a_machine_that_was_killed_has_lost_its_bitmaps_and_says_so() {
    if is_missing() {
        return;
    }
    for (format, why) in [("raw", "gone"), ("qcow2", "in use when the machine died")] {
        let mut daemon = Daemon::start(format);
        let mut machine = daemon.machine();
        machine.settle(&nothing_held()).expect("settled");
        let writer = daemon.target("disk0");
        writer.write_at(0, &[7; PAGE]).expect("written");
        drop(writer);
        machine.prepare(1, &disks()).expect("prepared");
        machine.cut(1, &disks()).expect("cut");
        assert_eq!(machine.settle(&held(1)).expect("settled"), []);
        drop(machine);
        daemon.daemon.kill_and_restart().expect("restarted");

        let mut machine = daemon.machine();
        let lost = machine.settle(&held(1)).expect("settled");

        assert_eq!(lost.len(), 2, "{format}: {lost:?}");
        // A bitmap of qcow2 that never reached the file is gone as well.
        let said = |said: &str| said.contains(why) || said.contains("gone");
        assert!(
            lost.iter().all(|lost| said(&lost.why)),
            "{format}: {lost:?}"
        );
        machine.prepare(2, &disks()).expect("prepared");
        machine.cut(2, &disks()).expect("cut");
        let points = machine.publish(2, &disks()).expect("published");
        assert!(points.iter().all(|point| point.bitmap.is_none()));
    }
}

#[test]
fn disks_that_nobody_writes_are_cut_without_an_overlay() {
    if is_missing() {
        return;
    }
    let daemon = Daemon::start("raw");
    let mut machine = daemon.machine();
    machine.settle(&nothing_held()).expect("settled");
    let writer = daemon.writer(9);
    pause();
    let mut replicas = writer.stop().content;
    machine.prepare(1, &disks()).expect("prepared");
    machine.cut(1, &disks()).expect("cut");
    machine.settle(&held(1)).expect("settled");
    let writer = daemon.target("disk0");
    for page in [3, 40 * 16, 40 * 16 + 1] {
        let at = page * PAGE;
        replicas[0][at..at + PAGE].fill(9);
        writer.write_at(at as u64, &[9; PAGE]).expect("written");
    }
    drop(writer);
    let mut exports = machine.writable_exports(&disks()).expect("exports");
    exports.sort();
    assert_eq!(exports, ["w-disk0", "w-disk1"]);
    for export in &exports {
        machine.remove_export(export).expect("fenced");
    }

    machine.cut_at_rest(2, &disks()).expect("cut");
    let points = machine.publish_at_rest(2, &disks()).expect("published");

    let mut copied = Vec::new();
    for (point, expected) in points.iter().zip(&replicas) {
        let mut replica = expected.clone();
        copied.push(apply(point, &mut replica));
        assert!(replica == *expected, "{}", point.disk);
    }
    assert_eq!(
        copied,
        [2 * (64 << 10), 0],
        "what changed, in units of 64 KiB"
    );
    assert_eq!(machine.settle(&held(2)).expect("settled"), []);
}

#[test]
fn a_point_that_somebody_spoiled_is_noticed_before_it_counts() {
    if is_missing() {
        return;
    }
    let daemon = Daemon::start("raw");
    let mut machine = daemon.machine();
    machine.settle(&nothing_held()).expect("settled");
    machine.prepare(1, &disks()).expect("prepared");
    machine.cut(1, &disks()).expect("cut");
    machine.publish(1, &disks()).expect("published");
    let writer = daemon.target("disk0");
    writer.write_at(0, &[7; PAGE]).expect("written");
    machine
        .check(1, &disks())
        .expect("what is overwritten is kept");
    let job = json!({"id": "bf-job-1-j1-1"});
    machine.qmp().execute("job-cancel", job).expect("cancelled");

    let error = machine.check(1, &disks()).expect_err("a mixture");

    let text = error.to_string();
    assert!(text.contains("disk1") && text.contains("mixture"), "{text}");
    machine.settle(&held(1)).expect("settled");
    machine.cut_at_rest(2, &disks()).expect("cut");
    machine.check(2, &disks()).expect("nobody wrote");
    writer.write_at(0, &[8; PAGE]).expect("written");
    let error = machine.check(2, &disks()).expect_err("written");
    assert!(error.to_string().contains("written since"), "{error}");
    assert_eq!(machine.written_since(2, &disks()).expect("told"), ["disk0"]);
}

#[test]
fn what_is_not_there_is_named_with_what_is() {
    if is_missing() {
        return;
    }
    let daemon = Daemon::start("raw");
    let mut machine = daemon.machine();
    let names: Vec<String> = machine
        .disks()
        .expect("disks")
        .into_iter()
        .map(|d| d.name)
        .collect();
    assert!(names.contains(&"disk0".to_owned()), "{names:?}");

    let refused = machine
        .prepare(1, &["disk7".to_owned()])
        .expect_err("no such disk");

    let text = refused.to_string();
    assert!(text.contains("disk7") && text.contains("disk0"), "{text}");
    assert_eq!(
        machine.is_running().expect("asked"),
        None,
        "it has no guest"
    );
    let unknown = machine.qmp().execute("no-such-command", Value::Null.take());
    assert!(
        unknown
            .expect_err("refused")
            .to_string()
            .contains("no-such-command")
    );
}
