//! Real disks that are full at every step between no room and enough: under the log, under the pre-images in it, and
//! under a target whose holes become data. Each time the target is whole, at its old or its new point, or known to be
//! incomplete where the old one was given up; and once there is room the next run ends equal.

use std::fs;
use std::path::{Path, PathBuf};

use crate::lab::{
    Answer, Lab, MIB, MountedFileSystem, disk_usage, same, skipped, tool, write_sparse,
};

/// Steps between no room and more than enough.
const STEPS: u64 = 54;

/// A file system in memory whose size can be changed while it is mounted; unmounted when dropped.
struct MemoryFileSystem {
    point: PathBuf,
}

impl MemoryFileSystem {
    /// `None` where it is not to be had: not root.
    fn mount(directory: &Path) -> Option<Self> {
        let point = directory.join("memory");
        fs::create_dir(&point).ok()?;
        tool(&["mount", "-t", "tmpfs", "memory", point.to_str()?])?;
        Some(Self { point })
    }

    fn resize(&self, bytes: u64) {
        // A size of zero means no limit.
        let size = format!("remount,size={}", bytes.max(4096));
        let point = self.point.to_str().expect("paths of tests are text");
        tool(&["mount", "-o", &size, point]).expect("nothing is in it that would not fit");
    }
}

impl Drop for MemoryFileSystem {
    fn drop(&mut self) {
        let point = self.point.to_str().expect("paths of tests are text");
        tool(&["umount", point]);
    }
}

/// A file system with as much room as is wanted.
enum Room {
    Memory(MemoryFileSystem),
    Disk(MountedFileSystem),
}

impl Room {
    fn point(&self) -> &Path {
        match self {
            Self::Memory(memory) => &memory.point,
            Self::Disk(disk) => disk.point(),
        }
    }

    fn leave(&self, bytes: u64) {
        match self {
            Self::Memory(memory) => memory.resize(disk_usage(&memory.point) + bytes),
            Self::Disk(disk) => disk.fill(bytes),
        }
    }

    fn empty(&self) {
        match self {
            Self::Memory(memory) => memory.resize(64 * MIB),
            Self::Disk(disk) => disk.empty(),
        }
    }
}

/// How the steps ended.
#[derive(Debug, Default)]
struct Found {
    full: u32,
    done: u32,
}

impl Found {
    #[track_caller]
    fn count(&mut self, answer: &Answer, codes: &[i32]) -> bool {
        let done = answer.code == Some(0);
        if !done {
            let expected = answer.code.is_some_and(|code| codes.contains(&code));
            assert!(expected, "{answer:#?}");
            let complaint = answer.complaint();
            assert!(complaint.contains("No space left"), "{complaint}");
        }
        *if done { &mut self.done } else { &mut self.full } += 1;
        done
    }

    #[track_caller]
    #[expect(
        clippy::print_stderr,
        reason = "how many steps were too small makes the test credible"
    )]
    fn report(&self, name: &str) {
        eprintln!("{name}: {self:?}");
        assert!(self.full > 5 && self.done > 0, "{name}: no step mattered");
    }
}

/// Up to a little more than `enough`.
fn steps(enough: u64) -> impl Iterator<Item = u64> {
    (0..STEPS).map(move |step| enough * step / (STEPS - 3))
}

// --- the log -------------------------------------------------------------------------------------------------------

/// What ext4 keeps of 48 MiB, and a little for what else is written beside the log.
const KEPT_BYTES: u64 = MIB + MIB / 2;

/// Runs up to a limit of the log, so that the space was checked while there was enough, then with less and less.
fn log_at_every_step(name: &str, undo: &str) {
    let lab = Lab::new();
    let Some(disk) = MountedFileSystem::make(lab.root(), "ext4", 48 * MIB) else {
        return skipped(name, "root and mkfs.ext4");
    };
    let old = lab.disk("target", 71, 8 * MIB);
    let new = lab.edited("new", 72, &old, 0.8);
    let state = disk.point().join("state");
    let place = format!("target --state {}", state.display());
    let line = format!("sync new {place} --mode delta --strategy redo --undo {undo} --threads 1");
    let begin = || {
        fs::remove_dir_all(&state).ok();
        lab.write("target", &old);
        let stopped = lab.run(&format!("{line} --log-limit 2M"));
        assert!(matches!(stopped.code, Some(4 | 5)), "{stopped:#?}");
        lab.assert_holds("target", &old);
    };
    begin();
    let staged = lab.must(&format!("resume {place}"));
    let copies = if undo == "keep" { 2 } else { 1 };
    // The file system keeps a fiftieth of itself, at most 4,096 blocks, even from those who may have everything.
    let enough = staged.count("changed_bytes") * copies + KEPT_BYTES;
    let mut found = Found::default();

    for left in steps(enough) {
        begin();
        disk.fill(left);
        let stopped = lab.run(&format!("resume {place}"));
        let done = found.count(&stopped, &[4, 5]);
        lab.assert_holds("target", if done { &new } else { &old });
        disk.empty();
        if !done {
            let resumed = lab.must(&line);
            assert_eq!(resumed.count("restaged_bytes"), 0, "{left}: {resumed:#?}");
            lab.assert_holds("target", &new);
        }
        if undo == "keep" {
            lab.must(&format!("rollback {place}"));
            lab.assert_holds("target", &old);
        }
    }

    found.report(name);
}

#[test]
fn a_log_without_room_at_any_step_leaves_the_old_point_and_resumes() {
    let name = "a_log_without_room_at_any_step_leaves_the_old_point_and_resumes";
    log_at_every_step(name, "none");
}

#[test]
fn pre_images_without_room_at_any_step_leave_the_old_point_and_resume() {
    let name = "pre_images_without_room_at_any_step_leave_the_old_point_and_resume";
    log_at_every_step(name, "keep");
}

// --- the target ----------------------------------------------------------------------------------------------------

/// A target that is one hole at first.
fn sparse_at_every_step(name: &str, make: impl Fn(&Path) -> Option<Room>, in_place: bool) {
    let lab = Lab::new();
    let Some(room) = make(lab.root()) else {
        return skipped(name, "root, losetup, mkfs.ext4 and tmpfs");
    };
    let new = lab.disk("new", 73, 4 * MIB);
    let old = vec![0; new.len()];
    let target = room.point().join("target");
    let place = format!(
        "{} --state {}",
        target.display(),
        lab.path("state").display()
    );
    let how = if in_place {
        "--in-place"
    } else {
        "--strategy redo"
    };
    let line = format!("sync new {place} --mode delta {how} --threads 1");
    let mut found = Found::default();

    for left in steps(4 * MIB) {
        fs::remove_dir_all(lab.path("state")).ok();
        fs::remove_file(&target).ok();
        write_sparse(&target, &old);
        let before = disk_usage(room.point());
        room.leave(left);
        let stopped = lab.run(&line);
        let done = found.count(&stopped, &[4, 5]);
        room.empty();
        let status = lab.must(&format!("status {place}"));
        let state = status.summary()["state"].as_str().expect("a state");
        match (done, in_place) {
            (true, _) => assert!(same(&target, &new), "{left}: {stopped:#?}"),
            (false, true) => assert_eq!(state, "incomplete", "{left}: {stopped:#?}"),
            (false, false) => {
                assert!(same(&target, &old), "{left}: {stopped:#?}");
                let after = disk_usage(room.point());
                assert!(after <= before, "{left}: reserved space was not given back");
            }
        }
        lab.must(&line);
        assert!(
            same(&target, &new),
            "{left}: the next run did not end equal"
        );
        if !in_place {
            lab.must(&format!("rollback {place}"));
            assert!(same(&target, &old), "{left}: not the old point");
        }
    }

    found.report(name);
}

fn in_memory(directory: &Path) -> Option<Room> {
    MemoryFileSystem::mount(directory).map(Room::Memory)
}

fn on_disk(directory: &Path) -> Option<Room> {
    MountedFileSystem::make(directory, "ext4", 32 * MIB).map(Room::Disk)
}

#[test]
fn a_sparse_target_without_room_at_any_step_keeps_its_old_point() {
    let name = "a_sparse_target_without_room_at_any_step_keeps_its_old_point";
    sparse_at_every_step(name, in_memory, false);
    sparse_at_every_step(name, on_disk, false);
}

#[test]
fn a_sparse_target_written_in_place_without_room_is_incomplete_and_goes_on() {
    let name = "a_sparse_target_written_in_place_without_room_is_incomplete_and_goes_on";
    sparse_at_every_step(name, in_memory, true);
    sparse_at_every_step(name, on_disk, true);
}
