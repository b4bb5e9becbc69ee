//! What must not be read or written is refused, naming who holds it; everything else opens.
#![expect(clippy::print_stderr, reason = "says which tests were skipped")]

mod common;

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use blockferry_device::{
    BlockSource, BlockTarget, Error, ErrorKind, SourceOptions, TargetPlace, open_source,
    open_target, same_object,
};
use common::{LoopDevice, alone, disk_directory, noise};
use tempfile::TempDir;

const MIB: usize = 1 << 20;

fn image(directory: &TempDir, name: &str) -> PathBuf {
    let path = directory.path().join(name);
    std::fs::write(&path, noise(MIB)).expect("an image");
    path
}

fn refusal<T: std::fmt::Debug>(outcome: blockferry_device::Result<T>) -> (ErrorKind, String) {
    let error: Error = outcome.expect_err("a refusal");
    (error.kind(), error.to_string())
}

fn source_refusal(path: &Path) -> (ErrorKind, String) {
    refusal(open_source(path, SourceOptions::default()))
}

#[test]
fn a_file_at_rest_opens_as_source_and_target() {
    let _alone = alone();
    let directory = disk_directory();
    let path = image(&directory, "disk.raw");

    let source = open_source(&path, SourceOptions::default()).unwrap();
    assert_eq!(source.size_bytes(), MIB as u64);
    drop(source);

    let TargetPlace::File { name, existing, .. } = open_target(&path).unwrap() else {
        panic!("a file is a file");
    };
    let existing = existing.expect("the file is there");
    existing.write_at(0, b"written").unwrap();
    assert_eq!(name, "disk.raw");
}

#[test]
fn an_absent_target_is_a_place_and_nothing_is_created() {
    let _alone = alone();
    let directory = disk_directory();
    let path = directory.path().join("new.raw");

    let place = open_target(&path).unwrap();

    assert!(
        matches!(place, TargetPlace::File { existing: None, .. }),
        "{place:?}"
    );
    assert!(!path.exists());
    let nowhere = refusal(open_target(&directory.path().join("absent/new.raw")));
    assert_eq!(nowhere.0, ErrorKind::NotFound);
}

#[test]
fn a_source_open_for_writing_is_refused_unless_accepted() {
    let _alone = alone();
    let directory = disk_directory();
    let path = image(&directory, "disk.raw");
    let writer = OpenOptions::new().write(true).open(&path).unwrap();

    let (kind, message) = source_refusal(&path);
    assert_eq!(kind, ErrorKind::Busy, "{message}");
    assert!(message.contains("open for writing"), "{message}");
    open_source(&path, SourceOptions::default().with_crash_consistent(true)).unwrap();

    drop(writer);
    let _reader = File::open(&path).unwrap();
    open_source(&path, SourceOptions::default()).expect("readers do not disturb");
}

#[test]
fn the_process_that_has_it_open_is_named() {
    let _alone = alone();
    let directory = disk_directory();
    let path = image(&directory, "disk.raw");
    let writer = OpenOptions::new().append(true).open(&path).unwrap();
    let mut child = Command::new("sleep")
        .arg("60")
        .stdout(Stdio::from(writer))
        .spawn()
        .unwrap();

    let as_source = source_refusal(&path);
    let as_target = refusal(open_target(&path));
    child.kill().unwrap();
    child.wait().unwrap();

    for (kind, message) in [as_source, as_target] {
        assert_eq!(kind, ErrorKind::Busy);
        let expected = format!("open in process {} (sleep)", child.id());
        assert!(message.contains(&expected), "{message}");
    }
    open_target(&path).expect("once the process has gone");
}

#[test]
fn a_target_that_is_open_or_locked_is_refused() {
    let _alone = alone();
    let directory = disk_directory();
    let path = image(&directory, "disk.raw");

    let reader = File::open(&path).unwrap();
    let (kind, message) = refusal(open_target(&path));
    assert_eq!(kind, ErrorKind::Busy);
    assert!(message.contains("open elsewhere"), "{message}");
    drop(reader);

    let held = open_target(&path).unwrap();
    let (kind, message) = refusal(open_target(&path));
    assert_eq!(kind, ErrorKind::Busy);
    assert!(message.contains("locked"), "{message}");
    drop(held);
    open_target(&path).expect("the lock goes with the place");
}

#[test]
fn other_names_of_a_target_file_are_refused() {
    let _alone = alone();
    let directory = disk_directory();
    let path = image(&directory, "disk.raw");
    let link = directory.path().join("link.raw");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let dangling = directory.path().join("dangling.raw");
    std::os::unix::fs::symlink("/nowhere/at/all", &dangling).unwrap();

    for symlink in [&link, &dangling] {
        let (kind, message) = refusal(open_target(symlink));
        assert_eq!(kind, ErrorKind::Unsuitable);
        assert!(message.contains("symbolic link"), "{message}");
    }
    open_source(&link, SourceOptions::default()).expect("a source may be linked to");
    std::fs::hard_link(&path, directory.path().join("second.raw")).unwrap();
    let (kind, message) = refusal(open_target(&path));
    assert_eq!(kind, ErrorKind::Unsuitable);
    assert!(message.contains("2 names"), "{message}");
}

#[test]
fn what_is_no_raw_image_is_refused() {
    let _alone = alone();
    let directory = disk_directory();
    let path = image(&directory, "disk.qcow2");
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"QFI\xfb", 0).unwrap();
    drop(file);

    for (kind, message) in [source_refusal(&path), refusal(open_target(&path))] {
        assert_eq!(kind, ErrorKind::Unsuitable);
        assert!(message.contains("qcow2"), "{message}");
    }
    assert_eq!(source_refusal(directory.path()).0, ErrorKind::Unsuitable);
    assert_eq!(
        refusal(open_target(directory.path())).0,
        ErrorKind::Unsuitable
    );
    assert_eq!(
        source_refusal(Path::new("/dev/null")).0,
        ErrorKind::Unsuitable
    );
    assert_eq!(
        source_refusal(&directory.path().join("absent")).0,
        ErrorKind::NotFound
    );
    let empty = directory.path().join("empty.raw");
    File::create(&empty).unwrap();
    open_source(&empty, SourceOptions::default()).expect("an empty image is an image");
}

#[test]
fn a_loop_device_and_its_file_are_one_object_and_exclude_each_other() {
    let _alone = alone();
    let directory = disk_directory();
    let path = image(&directory, "disk.raw");
    let other = image(&directory, "other.raw");
    let Some(device) = LoopDevice::attach(&path, 512) else {
        eprintln!("SKIPPED (needs root)");
        return;
    };

    assert!(same_object(device.path(), &path).unwrap());
    assert!(!same_object(device.path(), &other).unwrap());
    let (kind, message) = refusal(open_target(&path));
    assert_eq!(kind, ErrorKind::Busy);
    assert!(message.contains("backing /dev/loop"), "{message}");
    assert_eq!(
        source_refusal(&path).0,
        ErrorKind::Busy,
        "the loop device may write it"
    );

    let link = directory.path().join("by-id");
    std::os::unix::fs::symlink(device.path(), &link).unwrap();
    let TargetPlace::Device(target) = open_target(&link).unwrap() else {
        panic!("a link to a device is the device");
    };
    assert_eq!(target.size_bytes(), MIB as u64);
    assert_eq!(
        refusal(open_target(device.path())).0,
        ErrorKind::Busy,
        "it is exclusively ours"
    );
    let evidence = target.evidence().unwrap();
    assert!(evidence.is_known() && target.identity().unwrap().is_known());
    assert!(
        evidence.proves_same(&target.evidence().unwrap()),
        "reading leaves no evidence"
    );
    target.write_at(4096, &[7; 4096]).unwrap();
    target.flush().unwrap();
    assert!(
        !evidence.proves_same(&target.evidence().unwrap()),
        "writing does"
    );
}

#[test]
fn a_mounted_device_is_refused() {
    let _alone = alone();
    let directory = disk_directory();
    let path = directory.path().join("fs.raw");
    File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let made = Command::new("mke2fs")
        .args(["-q", "-F"])
        .arg(&path)
        .status();
    let Some(device) = LoopDevice::attach(&path, 512).filter(|_| made.is_ok_and(|m| m.success()))
    else {
        eprintln!("SKIPPED (needs root and mke2fs)");
        return;
    };
    let point = directory.path().join("mounted here");
    std::fs::create_dir(&point).unwrap();
    let mount = |options: &str| {
        let mut mount = Command::new("mount");
        let mounted = mount
            .args(["-o", options])
            .arg(device.path())
            .arg(&point)
            .status();
        mounted.is_ok_and(|status| status.success())
    };
    let unmount = || {
        let status = Command::new("umount").arg(&point).status().unwrap();
        assert!(status.success(), "unmounting {}", point.display());
    };
    if !mount("rw") {
        eprintln!("SKIPPED (needs to mount)");
        return;
    }

    let (as_source, as_target) = (
        source_refusal(device.path()),
        refusal(open_target(device.path())),
    );
    let fuzzy = open_source(
        device.path(),
        SourceOptions::default().with_crash_consistent(true),
    )
    .is_ok();
    unmount();
    let read_only = mount("ro") && {
        let opened = open_source(device.path(), SourceOptions::default()).is_ok();
        let refused = refusal(open_target(device.path())).0 == ErrorKind::Busy;
        unmount();
        opened && refused
    };

    for (kind, message) in [as_source, as_target] {
        assert_eq!(kind, ErrorKind::Busy);
        assert!(message.contains("mounted here"), "{message}");
    }
    assert!(
        fuzzy,
        "a mounted source can be accepted as crash-consistent"
    );
    assert!(
        read_only,
        "mounted read-only it is a source at rest, but no target"
    );
    open_target(device.path()).expect("once it is unmounted");
}

#[test]
fn a_bind_mounted_file_is_refused() {
    let _alone = alone();
    let directory = disk_directory();
    let path = image(&directory, "disk.raw");
    let point = image(&directory, "point.raw");
    let bound = Command::new("mount")
        .arg("--bind")
        .args([&path, &point])
        .output();
    if !bound.is_ok_and(|b| b.status.success()) {
        eprintln!("SKIPPED (needs root)");
        return;
    }

    let refusals = [&path, &point].map(|path| refusal(open_target(path)));
    let same = same_object(&path, &point).unwrap();
    assert!(
        Command::new("umount")
            .arg(&point)
            .status()
            .unwrap()
            .success()
    );

    for (kind, message) in refusals {
        assert_eq!(kind, ErrorKind::Busy);
        assert!(message.contains("bind-mounted"), "{message}");
    }
    assert!(same, "both paths lead to one file");
}

#[test]
fn a_swap_file_is_refused() {
    let _alone = alone();
    let directory = disk_directory();
    let path = image(&directory, "swap.raw");
    let run = |program: &str| {
        Command::new(program)
            .arg(&path)
            .output()
            .is_ok_and(|output| output.status.success())
    };
    if !(run("mkswap") && run("swapon")) {
        eprintln!("SKIPPED (needs root)");
        return;
    }

    let refusals = [source_refusal(&path), refusal(open_target(&path))];
    assert!(run("swapoff"));

    for (kind, message) in refusals {
        assert_eq!(kind, ErrorKind::Busy, "{message}");
    }
}

#[test]
fn the_same_file_is_the_same_by_any_path() {
    let _alone = alone();
    let directory = disk_directory();
    let path = image(&directory, "disk.raw");
    let (link, hard) = (directory.path().join("link"), directory.path().join("hard"));
    std::os::unix::fs::symlink(&path, &link).unwrap();
    std::fs::hard_link(&path, &hard).unwrap();
    let other = image(&directory, "other.raw");

    assert!(same_object(&path, &link).unwrap());
    assert!(same_object(&hard, &link).unwrap());
    assert!(!same_object(&path, &other).unwrap());
    assert!(!same_object(&path, &directory.path().join("absent")).unwrap());
}
