//! Every kind of target: block devices with both sector sizes, file systems that share blocks and such that do not,
//! and everything that is refused.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;

use serde_json::Value;

use crate::lab::{Lab, LoopDevice, MIB, MountedFileSystem, same, skipped, tool, write_sparse};

#[test]
fn block_devices_with_either_sector_size_are_brought_up_to_date_and_back() {
    for sector_bytes in [512, 4096] {
        let lab = Lab::new();
        let old = lab.disk("disk", 41, 8 * MIB);
        let new = lab.edited("source", 42, &old, 0.3);
        let Some(device) = LoopDevice::attach(&lab.path("disk"), sector_bytes) else {
            return skipped("block_devices_with_either_sector_size", "root and losetup");
        };
        let target = device.path();

        let applied = lab.must(&format!("sync source {target}"));

        assert_eq!(applied.summary()["strategy"], "redo");
        assert!(same(Path::new(target), &new), "{sector_bytes}");
        let again = lab.must(&format!("sync source {target}"));
        assert_eq!(again.summary()["outcome"], "identical");
        assert_eq!(again.count("staged_bytes"), 0);
        lab.must(&format!("rollback {target}"));
        assert!(
            same(Path::new(target), &old),
            "{sector_bytes}: not the old point"
        );
        lab.must(&format!("sync source {target}"));
        lab.must(&format!("accept {target}"));
        lab.must(&format!("verify {target}"));
        assert!(same(Path::new(target), &new), "{sector_bytes}");
    }
}

#[test]
fn a_device_larger_than_the_source_keeps_what_lies_behind() {
    let lab = Lab::new();
    let old = lab.disk("disk", 43, 8 * MIB);
    let new = lab.disk("source", 44, 5 * MIB + 512);
    let Some(device) = LoopDevice::attach(&lab.path("disk"), 512) else {
        return skipped(
            "a_device_larger_than_the_source_keeps_what_lies_behind",
            "root and losetup",
        );
    };

    lab.must(&format!("sync source {}", device.path()));

    let mut expected = new.clone();
    expected.extend_from_slice(&old[new.len()..]);
    assert!(same(Path::new(device.path()), &expected));
    lab.must(&format!("rollback {}", device.path()));
    assert!(same(Path::new(device.path()), &old));
}

#[test]
fn a_device_target_written_by_somebody_else_is_noticed() {
    let lab = Lab::new();
    let old = lab.disk("disk", 45, 6 * MIB);
    let new = lab.edited("source", 46, &old, 0.3);
    let Some(device) = LoopDevice::attach(&lab.path("disk"), 512) else {
        return skipped(
            "a_device_target_written_by_somebody_else_is_noticed",
            "root and losetup",
        );
    };
    let target = device.path();
    lab.must(&format!("sync source {target}"));

    lab.patch(target, 4_000_000, b"somebody else");

    assert_eq!(lab.run(&format!("rollback {target}")).code, Some(4));
    let again = lab.must(&format!("sync source {target}"));
    assert!(again.has_warning(), "{again:#?}");
    assert!(same(Path::new(target), &new));
}

#[test]
fn a_file_system_that_shares_blocks_gets_a_clone_and_readers_keep_the_old_point() {
    for (kind, bytes) in [("xfs", 320 * MIB), ("btrfs", 160 * MIB)] {
        let lab = Lab::new();
        let Some(mounted) = MountedFileSystem::make(lab.root(), kind, bytes) else {
            skipped(
                "a_file_system_that_shares_blocks_gets_a_clone",
                &format!("root and mkfs.{kind}"),
            );
            continue;
        };
        let target = mounted.point().join("target");
        let old = lab.disk("old", 47, 16 * MIB);
        write_sparse(&target, &old);
        let new = lab.edited("source", 48, &old, 0.3);
        let old_inode = fs::metadata(&target).unwrap().ino();

        let mut run = lab.start(&format!("sync source {} --bwlimit 4M", target.display()));
        assert!(
            run.wait_for(|line: &Value| line["event"] == "checkpoint"),
            "{kind}"
        );
        // Somebody who opened the disk before the exchange.
        let reader = File::open(&target).unwrap();
        let applied = run.finish();

        assert_eq!(applied.code, Some(0), "{applied:#?}");
        assert_eq!(applied.summary()["strategy"], "clone", "{kind}");
        assert!(same(&target, &new), "{kind}");
        assert_ne!(
            fs::metadata(&target).unwrap().ino(),
            old_inode,
            "{kind}: exchanged"
        );
        let mut held = vec![0; old.len()];
        reader.read_exact_at(&mut held, 0).unwrap();
        assert_eq!(reader.metadata().unwrap().ino(), old_inode, "{kind}");
        assert!(held == old, "{kind}: the old file changed under its reader");
    }
}

#[test]
fn a_clone_killed_before_its_exchange_leaves_the_old_file_in_place() {
    for (kind, bytes) in [("xfs", 320 * MIB), ("btrfs", 160 * MIB)] {
        let lab = Lab::new();
        let Some(mounted) = MountedFileSystem::make(lab.root(), kind, bytes) else {
            skipped(
                "a_clone_killed_before_its_exchange",
                &format!("root and mkfs.{kind}"),
            );
            continue;
        };
        let target = mounted.point().join("target");
        let old = lab.disk("old", 49, 16 * MIB);
        write_sparse(&target, &old);
        let new = lab.edited("source", 50, &old, 0.5);
        let old_inode = fs::metadata(&target).unwrap().ino();
        let mut run = lab.start(&format!("sync source {} --bwlimit 6M", target.display()));
        assert!(
            run.wait_for(|line: &Value| line["event"] == "checkpoint"),
            "{kind}"
        );

        run.kill();

        assert_eq!(fs::metadata(&target).unwrap().ino(), old_inode, "{kind}");
        assert!(same(&target, &old), "{kind}");
        let resumed = lab.must(&format!("resume {}", target.display()));
        assert_eq!(resumed.count("restaged_bytes"), 0, "{kind}");
        assert!(resumed.count("resumed_bytes") > 0, "{kind}");
        assert!(same(&target, &new), "{kind}");
        lab.must(&format!("rollback {}", target.display()));
        assert!(same(&target, &old), "{kind}");
    }
}

#[test]
fn without_shared_blocks_a_large_change_gets_a_new_file_and_says_why() {
    let name = "without_shared_blocks_a_large_change_gets_a_new_file_and_says_why";
    let lab = Lab::new();
    let Some(mounted) = MountedFileSystem::make(lab.root(), "ext4", 128 * MIB) else {
        return skipped(name, "root and mkfs.ext4");
    };
    let target = mounted.point().join("target");
    let old = lab.disk("old", 51, 16 * MIB);
    write_sparse(&target, &old);
    let new = lab.edited("source", 52, &old, 0.6);

    let large = lab.must(&format!("sync source {}", target.display()));

    assert_eq!(large.summary()["strategy"], "shadow");
    let reason = large.summary()["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains('%') && reason.contains("third"), "{reason}");
    assert!(same(&target, &new));

    lab.edited("source", 53, &new, 0.01);
    let small = lab.must(&format!("sync source {}", target.display()));
    assert_eq!(small.summary()["strategy"], "redo", "{:#}", small.summary());
}

/// A directory of the lab through a file system in user space, which cannot exchange names; unmounted when dropped.
struct UserFileSystem<'l> {
    lab: &'l Lab,
}

impl<'l> UserFileSystem<'l> {
    /// `None` where bindfs is not to be had.
    fn mount(lab: &'l Lab) -> Option<Self> {
        fs::create_dir(lab.path("under")).ok()?;
        fs::create_dir(lab.path("over")).ok()?;
        let [under, over] = ["under", "over"].map(|name| lab.path(name));
        tool(&["bindfs", under.to_str()?, over.to_str()?])?;
        Some(Self { lab })
    }
}

impl Drop for UserFileSystem<'_> {
    fn drop(&mut self) {
        let over = self.lab.path("over");
        tool(&["umount", over.to_str().expect("paths of tests are text")]);
    }
}

#[test]
fn where_names_cannot_be_exchanged_shadow_is_refused_before_it_begins_and_redo_works() {
    let name = "where_names_cannot_be_exchanged_shadow_is_refused";
    let lab = Lab::new();
    let Some(_mounted) = UserFileSystem::mount(&lab) else {
        return skipped(name, "bindfs");
    };
    let old = lab.disk("over/target", 63, 4 * MIB);
    let new = lab.edited("source", 64, &old, 0.8);
    let before = fs::metadata(lab.path("under/target")).unwrap().ino();

    refused(
        &lab,
        "sync source over/target --strategy shadow",
        4,
        &["redo"],
    );

    lab.assert_holds("over/target", &old);
    lab.must("sync source over/target --strategy redo");
    lab.assert_holds("over/target", &new);
    let after = fs::metadata(lab.path("under/target")).unwrap().ino();
    assert_eq!(after, before, "the file itself was written");
    lab.must("rollback over/target");
    lab.assert_holds("over/target", &old);
}

// --- refusals ------------------------------------------------------------------------------------------------------

/// It is refused with this code and a message that says so, and nothing is left behind.
#[track_caller]
fn refused(lab: &Lab, line: &str, code: i32, words: &[&str]) {
    let answer = lab.run(line);
    assert_eq!(answer.code, Some(code), "{line}: {answer:#?}");
    let complaint = answer.complaint();
    for word in words {
        assert!(
            complaint.contains(word),
            "{line}: {word:?} is missing in: {complaint}"
        );
    }
}

#[test]
fn targets_that_must_not_be_written_are_refused_with_the_reason() {
    let lab = Lab::new();
    let old = lab.disk("target", 54, 2 * MIB);
    lab.disk("source", 55, 2 * MIB);
    symlink("target", lab.path("symlink")).unwrap();
    lab.write("linked", &old);
    fs::hard_link(lab.path("linked"), lab.path("other-name")).unwrap();
    let mut qcow2 = old.clone();
    qcow2[..4].copy_from_slice(b"QFI\xfb");
    lab.write("image.qcow2", &qcow2);
    fs::create_dir(lab.path("directory")).unwrap();
    lab.disk("larger", 56, 3 * MIB);

    refused(&lab, "sync source symlink", 4, &["symbolic link"]);
    refused(&lab, "sync source linked", 4, &["name"]);
    refused(&lab, "sync source image.qcow2", 4, &["qcow2"]);
    refused(&lab, "sync image.qcow2 target", 3, &["qcow2"]);
    refused(&lab, "sync source directory", 4, &["directory"]);
    refused(&lab, "sync source larger", 4, &["--allow-shrink"]);
    refused(&lab, "sync missing target", 3, &["missing"]);
    let same_file = lab.run("sync target target");
    assert!(matches!(same_file.code, Some(2 | 4)), "{same_file:#?}");

    let holder = OpenOptions::new()
        .write(true)
        .open(lab.path("target"))
        .unwrap();
    refused(&lab, "sync source target", 4, &["open"]);
    drop(holder);

    lab.assert_holds("target", &old);
    lab.must("sync source target");
}

#[test]
fn devices_that_must_not_be_written_are_refused_with_the_reason() {
    let name = "devices_that_must_not_be_written_are_refused_with_the_reason";
    let lab = Lab::new();
    lab.disk("source", 57, 3 * MIB);
    let small = lab.disk("small", 58, 2 * MIB);
    let Some(device) = LoopDevice::attach(&lab.path("small"), 512) else {
        return skipped(name, "root and losetup");
    };

    refused(
        &lab,
        &format!("sync source {}", device.path()),
        4,
        &["too small"],
    );
    // The file behind a device, and the device as a copy of its own file.
    refused(&lab, "sync source small", 4, &[]);
    let alias = lab.run(&format!("sync small {}", device.path()));
    assert!(alias.code != Some(0), "{alias:#?}");
    symlink(device.path(), lab.path("alias")).unwrap();
    let same_device = lab.run(&format!("sync {} alias", device.path()));
    assert!(same_device.code != Some(0), "{same_device:#?}");
    assert!(same(Path::new(device.path()), &small));

    let Some(mounted) = MountedFileSystem::make(lab.root(), "ext4", 16 * MIB) else {
        return skipped(name, "mkfs.ext4");
    };
    let source_of = tool(&[
        "findmnt",
        "-n",
        "-o",
        "SOURCE",
        mounted.point().to_str().unwrap(),
    ]);
    let device = source_of.expect("findmnt knows it").trim().to_owned();
    refused(&lab, &format!("sync source {device}"), 4, &["mounted"]);
    refused(&lab, &format!("sync {device} fresh"), 3, &["mounted"]);
    lab.must(&format!("sync {device} fresh --crash-consistent"));
}

/// An image in use by QEMU's block layer, as a machine's disk is. Ended when dropped.
struct Machine {
    process: String,
}

impl Machine {
    /// `None` if QEMU is not installed.
    fn start(lab: &Lab, image: &str) -> Option<Self> {
        let (pid, socket) = (lab.path("qemu.pid"), lab.path("qemu.nbd"));
        let file = lab.path(image);
        // It goes to the background once the image is open.
        tool(&[
            "qemu-storage-daemon",
            "--daemonize",
            "--pidfile",
            pid.to_str()?,
            "--blockdev",
            &format!("driver=file,node-name=file,filename={}", file.display()),
            "--blockdev",
            "driver=raw,node-name=disk,file=file",
            "--nbd-server",
            &format!("addr.type=unix,addr.path={}", socket.display()),
            "--export",
            "type=nbd,id=export,node-name=disk,writable=on",
        ])?;
        let process = fs::read_to_string(pid).expect("it has written its number");
        Some(Self {
            process: process.trim().to_owned(),
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        tool(&["kill", "-KILL", &self.process]);
        // No child of ours: it is gone once its directory is.
        while Path::new("/proc").join(&self.process).exists() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

#[test]
fn the_disk_of_a_running_machine_is_refused_and_no_machine_starts_on_a_disk_under_way() {
    let name = "the_disk_of_a_running_machine_is_refused";
    let lab = Lab::new();
    let old = lab.disk("target", 61, 8 * MIB);
    let new = lab.edited("source", 62, &old, 0.8);
    let Some(machine) = Machine::start(&lab, "target") else {
        return skipped(name, "qemu-storage-daemon");
    };
    refused(&lab, "sync source target", 4, &["QEMU", &machine.process]);
    refused(&lab, "sync target fresh", 3, &[&machine.process]);
    drop(machine);

    let mut run = lab.start("sync source target --strategy redo --bwlimit 4M");
    let begun = run.wait_for(|line: &Value| line["event"] == "checkpoint");
    let write = ["qemu-io", "-f", "raw", "-c", "write 0 512"];
    let target = lab.path("target");
    let written = tool(&[&write[..], &[target.to_str().unwrap()]].concat());
    let finished = run.finish();

    assert!(begun, "{finished:#?}");
    assert_eq!(written, None, "QEMU wrote a disk that a sync was holding");
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    lab.assert_holds("target", &new);
}

#[test]
fn two_runs_at_one_target_never_meet() {
    let lab = Lab::new();
    let old = lab.disk("target", 59, 8 * MIB);
    let new = lab.edited("source", 60, &old, 0.8);
    let mut first = lab.start("sync source target --mode delta --strategy redo --bwlimit 4M");
    assert!(
        first.wait_for(|line: &Value| line["event"] == "checkpoint"),
        "{:#?}",
        first.finish()
    );

    let status = lab.must("status target");
    assert_eq!(status.summary()["running"], true, "{:#}", status.summary());
    refused(&lab, "sync source target", 4, &[]);
    refused(&lab, "sync source target --state elsewhere", 4, &[]);
    refused(&lab, "cancel target", 4, &[]);

    assert_eq!(first.finish().code, Some(0));
    lab.assert_holds("target", &new);
}
