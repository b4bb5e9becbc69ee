//! Every write of a real ext4 under a sync is recorded on its way to the disk. The disk as it was at each flush, which is
//! what a power loss there leaves at least, is mounted again: the target is at its old or its new point, status says
//! which, and the next run ends equal.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::lab::{Lab, LoopDevice, MIB, same, skipped, thorough, tool, with_files};

const SECTOR: usize = 512;
/// Flushes that are replayed where nothing else is asked for.
const FLUSHES: usize = 6;

/// A mount, undone when dropped.
struct Mount {
    point: PathBuf,
}

impl Mount {
    fn device(device: &LoopDevice, point: PathBuf) -> Option<Self> {
        fs::create_dir_all(&point).ok()?;
        tool(&["mount", device.path(), point.to_str()?])?;
        Some(Self { point })
    }

    fn target(&self) -> PathBuf {
        self.point.join("target")
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let point = self.point.to_str().expect("paths of tests are text");
        // The kernel lets go of what lies under a loop device a moment after it was detached.
        for _ in 0..100 {
            if tool(&["umount", point]).is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The server that records; ended when dropped.
struct Server {
    process: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        tool(&["kill", &self.process]);
        // No child of ours: it is gone once its directory is.
        while Path::new("/proc").join(&self.process).exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// An ext4 on a loop device whose writes go to the file `log` as well. Fields are dropped in this order.
struct Recorded {
    ext4: Mount,
    _device: LoopDevice,
    _fuse: Mount,
    _server: Server,
}

impl Recorded {
    /// `None` where it is not to be had: not root, no qemu-nbd, no nbdfuse.
    fn make(lab: &Lab) -> Option<Self> {
        with_files(|| File::create(lab.path("disk"))?.set_len(48 * MIB)).ok()?;
        with_files(|| File::create(lab.path("log"))).ok()?;
        fs::create_dir(lab.path("fuse")).ok()?;
        tool(&["nbdfuse", "--version"])?;
        let path = |name: &str| lab.path(name).display().to_string();
        let (pid, socket) = (path("pid"), path("socket"));
        let image = format!(
            "driver=blklogwrites,file.driver=file,file.filename={},log.driver=file,log.filename={}",
            path("disk"),
            path("log")
        );
        let serve = [
            "qemu-nbd",
            "--fork",
            "-t",
            "--pid-file",
            &pid,
            "-k",
            &socket,
        ];
        tool(&[&serve[..], &["--image-opts", &image]].concat())?;
        let process = fs::read_to_string(&pid).expect("it has written its number");
        let server = Server {
            process: process.trim().to_owned(),
        };
        let line = format!("nbdfuse {} 'nbd+unix:///?socket={socket}'", path("fuse"));
        // In the background, with nothing of ours open: it ends when it is unmounted.
        tool(&["sh", "-c", &format!("{line} >/dev/null 2>&1 </dev/null &")])?;
        let fuse = Mount {
            point: lab.path("fuse"),
        };
        let file = lab.path("fuse/nbd");
        for _ in 0..100 {
            if file.exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let device = LoopDevice::attach(&file, 512)?;
        tool(&["mkfs.ext4", "-q", device.path()])?;
        let ext4 = Mount::device(&device, lab.path("ext4"))?;
        Some(Self {
            ext4,
            _device: device,
            _fuse: fuse,
            _server: server,
        })
    }
}

/// One entry of the log, in the format of the kernel's dm-log-writes: a sector that says what and where, then the data.
struct Entry {
    offset: u64,
    flags: u64,
    data: std::ops::Range<usize>,
}

const FLUSH: u64 = 1;
const DISCARD: u64 = 4;

fn entries(log: &[u8]) -> Vec<Entry> {
    let number = |at: usize| u64::from_le_bytes(log[at..at + 8].try_into().expect("eight bytes"));
    assert_eq!(
        number(0),
        0x006A_7366_7773_6872,
        "the log is another format"
    );
    let (mut found, mut at) = (Vec::new(), SECTOR);
    while at + SECTOR <= log.len() {
        let (sector, count, flags) = (number(at), number(at + 8), number(at + 16));
        let length = if flags & DISCARD == 0 { count } else { 0 };
        let start = at + SECTOR;
        at = start + usize::try_from(length).expect("in memory") * SECTOR;
        found.push(Entry {
            offset: sector * SECTOR as u64,
            flags,
            data: start..at,
        });
    }
    found
}

#[test]
fn a_recorded_file_system_holds_the_old_or_the_new_point_at_every_flush_of_a_sync() {
    let name = "a_recorded_file_system_holds_the_old_or_the_new_point_at_every_flush_of_a_sync";
    for arguments in [
        "--strategy redo --mode delta",
        "--strategy shadow --mode full",
    ] {
        let lab = Lab::new();
        let old = lab.disk("old", 91, 3 * MIB);
        let new = lab.edited("new", 92, &old, 0.3);
        let Some(recorded) = Recorded::make(&lab) else {
            return skipped(name, "root, losetup, mkfs.ext4, qemu-nbd and nbdfuse");
        };
        crate::lab::write_sparse(&recorded.ext4.target(), &old);
        tool(&["sync", "-f", recorded.ext4.point.to_str().expect("text")]).expect("durable");
        let begun = fs::metadata(lab.path("log")).expect("the log").len();
        let line = format!("sync new ext4/target {arguments} --threads 1");
        lab.must(&line);
        drop(recorded);

        let log = with_files(|| fs::read(lab.path("log"))).expect("the log");
        let begun = usize::try_from(begun).expect("in memory");
        let (tried, olds) = replay(&lab, &log, begun, &line, (&old, &new));

        report(arguments, tried, olds);
        assert!(
            tried > 3 && olds > 0 && olds < tried,
            "{olds} of {tried} at the old point"
        );
    }
}

/// How many flushes were replayed, and after how many of them the target was at its old point.
fn replay(
    lab: &Lab,
    log: &[u8],
    begun: usize,
    line: &str,
    (old, new): (&[u8], &[u8]),
) -> (usize, usize) {
    let entries = entries(log);
    let is_flush = |e: &&Entry| e.flags & FLUSH != 0 && e.data.start > begun;
    let flushes = entries.iter().filter(is_flush).count();
    let step = if thorough() {
        1
    } else {
        flushes.div_ceil(FLUSHES)
    };
    let mut disk = vec![0; 48 * usize::try_from(MIB).expect("small")];
    let (mut seen, mut tried, mut olds) = (0, 0, 0);
    for entry in &entries {
        if is_flush(&entry) {
            seen += 1;
            if seen == 1 || (flushes - seen).is_multiple_of(step) {
                tried += 1;
                olds += usize::from(is_old_after_power_loss(lab, &disk, line, (old, new)));
            }
        }
        let start = usize::try_from(entry.offset).expect("on the disk");
        disk[start..start + entry.data.len()].copy_from_slice(&log[entry.data.clone()]);
    }
    (tried, olds)
}

fn is_old_after_power_loss(lab: &Lab, disk: &[u8], line: &str, (old, new): (&[u8], &[u8])) -> bool {
    with_files(|| {
        let file = File::create(lab.path("replayed"))?;
        file.write_all_at(disk, 0)
    })
    .expect("written");
    let device = LoopDevice::attach(&lab.path("replayed"), 512).expect("there was one before");
    let mount = Mount::device(&device, lab.path("ext4")).expect("ext4 recovers by itself");
    let status = lab.must("status ext4/target");
    let state = status.summary()["state"].as_str().expect("a state");
    let is_old = same(&mount.target(), old);
    let right = match state {
        "unknown" | "staging" | "prepared" => is_old,
        "applied" => same(&mount.target(), new),
        "committed" => true,
        other => panic!("{other} after a power loss"),
    };
    assert!(right, "not what is in the target: {status:#?}");
    lab.must(match state {
        // Full mode would do everything once more, and the old point would be the new one.
        "applied" => "verify ext4/target",
        "unknown" => line,
        _ => "resume ext4/target",
    });
    assert!(
        same(&mount.target(), new),
        "the next run did not end equal: {status:#?}"
    );
    lab.must("rollback ext4/target");
    assert!(same(&mount.target(), old), "not the old point: {status:#?}");
    is_old
}

#[expect(
    clippy::print_stderr,
    reason = "how many flushes there were makes the test credible"
)]
fn report(arguments: &str, tried: usize, olds: usize) {
    eprintln!("{arguments}: {tried} flushes replayed, {olds} at the old point, 0 torn");
}
