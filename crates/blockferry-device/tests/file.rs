//! What files and directories do beyond the conformance suites.
#![expect(clippy::print_stderr, reason = "says which tests were skipped")]

mod common;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use blockferry_core::Extent;
use blockferry_device::{
    Access, BlockSource, BlockTarget, ErrorKind, OsBlockDevice, OsDirectory, OsFile, ReadRequest,
    StorageDir, StorageFile, WriteMode, WriteRequest,
};
use blockferry_testkit::conformance::{storage_conformance, target_conformance};
use common::{LoopDevice, MountedFileSystem, UserFileSystem, disk_directory, noise};
use rustix::io::Errno;

const MIB: u64 = 1 << 20;

/// Asks by fincore(1), because most ways of asking bring in what they ask for.
fn cached_pages(path: &Path) -> Option<u64> {
    let mut fincore = std::process::Command::new("fincore");
    let output = fincore
        .args(["--noheadings", "--output", "PAGES"])
        .arg(path)
        .output()
        .ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}

#[test]
fn reading_leaves_the_page_cache_as_it_was() {
    let directory = disk_directory();
    let path = directory.path().join("disk.raw");
    let expected = noise(1_000_000);
    std::fs::write(&path, &expected).unwrap();
    let file = OsFile::open(&path, Access::ReadWrite, WriteMode::Direct).unwrap();
    file.flush().unwrap();
    file.drop_cache();
    if cached_pages(&path) != Some(0) {
        eprintln!("SKIPPED (needs fincore and a file system on a disk)");
        return;
    }
    let other = File::open(&path).unwrap();
    rustix::fs::fadvise(&other, 0, None, rustix::fs::Advice::Random).unwrap();
    other.read_exact_at(&mut [0; 4096], 409_600).unwrap();
    let before = cached_pages(&path);

    let mut all = vec![0; expected.len()];
    file.read_at(0, &mut all).unwrap();
    let mut pieces = vec![0; 8000];
    let requests = pieces.chunks_mut(1000).zip(0..);
    let mut requests: Vec<_> = requests
        .map(|(buffer, n)| ReadRequest {
            offset: 123 + n * 100_000,
            buffer,
        })
        .collect();
    file.read_batch(&mut requests).unwrap();

    assert!(all == expected);
    assert!(
        before.is_some_and(|pages| (1..100).contains(&pages)),
        "something was cached"
    );
    assert_eq!(cached_pages(&path), before);
}

#[test]
fn direct_batches_leave_nothing_in_the_page_cache() {
    let directory = disk_directory();
    let path = directory.path().join("disk.raw");
    std::fs::write(&path, noise(1 << 20)).unwrap();
    let file = OsFile::open(&path, Access::ReadWrite, WriteMode::Direct).unwrap();
    file.flush().unwrap();
    file.drop_cache();
    if cached_pages(&path) != Some(0) {
        eprintln!("SKIPPED (needs fincore and a file system on a disk)");
        return;
    }

    // Touching, and not aligned in memory.
    let bytes = noise(40_961);
    let bytes = bytes[1..].chunks(4096).zip(0..);
    let requests: Vec<_> = bytes
        .map(|(bytes, n)| WriteRequest {
            offset: 65_536 + n * 4096,
            bytes,
        })
        .collect();
    file.write_batch(&requests).unwrap();

    assert_eq!(cached_pages(&path), Some(0));
}

#[test]
fn the_medium_is_read_even_where_the_cache_knows_better() {
    let directory = disk_directory();
    let image = directory.path().join("disk.raw");
    std::fs::write(&image, vec![1; 1 << 20]).unwrap();
    let Some(device) = LoopDevice::attach(&image, 512) else {
        eprintln!("SKIPPED (needs root)");
        return;
    };
    let target = OsBlockDevice::open(device.path(), Access::ReadWrite).unwrap();
    File::open(device.path())
        .unwrap()
        .read_exact_at(&mut [0; 8192], 0)
        .unwrap();

    // Behind the back of the device's cache, as a lost write would be.
    let behind = OpenOptions::new().write(true).open(&image).unwrap();
    behind.write_all_at(&[2; 8192], 0).unwrap();

    let (mut cached, mut one, mut other) = ([0; 100], [0; 100], [0; 4096]);
    target.read_at(50, &mut cached).unwrap();
    let mut requests = [
        ReadRequest {
            offset: 4096,
            buffer: &mut other,
        },
        ReadRequest {
            offset: 50,
            buffer: &mut one,
        },
    ];
    target.read_medium(&mut requests).unwrap();
    assert_eq!(cached, [1; 100], "the cache still has the old bytes");
    assert_eq!(one, [2; 100]);
    assert_eq!(other, [2; 4096]);
}

#[test]
fn only_space_that_is_missing_is_reserved() {
    let directory = disk_directory();
    let file = OsFile::create_new(&directory.path().join("disk.raw"), WriteMode::Direct).unwrap();
    file.resize(8 * MIB).unwrap();
    file.write_at(MIB, &noise(1 << 20)).unwrap();
    // Allocated but never written: SEEK_HOLE alone would call it a hole.
    file.write_zeroes(Extent::from_range(4 * MIB..5 * MIB))
        .unwrap();
    file.flush().unwrap();
    let blocks = || {
        file.as_fd()
            .map(|fd| rustix::fs::fstat(fd).unwrap().st_blocks)
    };
    let before = blocks();

    let newly = file.reserve(&[Extent::from_range(0..6 * MIB)]).unwrap();

    let expected = [0..MIB, 2 * MIB..4 * MIB, 5 * MIB..6 * MIB].map(Extent::from_range);
    assert_eq!(newly, expected);
    assert!(blocks() > before);
    for extent in newly {
        assert!(file.punch(extent).unwrap());
    }
    // The extent tree may keep a block of its own.
    let kept_bytes = 512 * (blocks().unwrap() - before.unwrap());
    assert!(
        (0..16_384).contains(&kept_bytes),
        "all of it was given back, and no more: {kept_bytes}"
    );
}

#[test]
fn a_reservation_behind_the_end_can_be_given_back() {
    let directory = disk_directory();
    let file = OsFile::create_new(&directory.path().join("disk.raw"), WriteMode::Direct).unwrap();
    file.write_at(0, &noise(8192)).unwrap();
    file.flush().unwrap();
    let blocks = || {
        file.as_fd()
            .map(|fd| rustix::fs::fstat(fd).unwrap().st_blocks)
    };
    let before = blocks();

    let newly = file.reserve(&[Extent::from_range(0..MIB)]).unwrap();
    assert_eq!(newly, [Extent::from_range(8192..MIB)]);
    assert_eq!(file.size_bytes(), 8192);
    assert!(file.punch(newly[0]).unwrap());

    assert_eq!(blocks(), before);
    assert_eq!(file.size_bytes(), 8192);
}

#[test]
fn a_reservation_without_space_leaves_none_behind() {
    let directory = disk_directory();
    let Some(mounted) = MountedFileSystem::make(directory.path(), "ext4", 32 * MIB) else {
        eprintln!("SKIPPED (needs root)");
        return;
    };
    let path = mounted.point().join("disk.raw");
    let file = OsFile::create_new(&path, WriteMode::Direct).unwrap();
    file.resize(64 * MIB).unwrap();
    let storage = OsDirectory::open(mounted.point()).unwrap();
    let before = storage.available_bytes().unwrap();

    let extents = [0..4 * MIB, 8 * MIB..64 * MIB].map(Extent::from_range);
    let refused = file.reserve(&extents).unwrap_err();

    assert_eq!(refused.kind(), ErrorKind::NoSpace, "{refused}");
    file.flush().unwrap();
    let after = storage.available_bytes().unwrap();
    assert!(
        before - after < MIB,
        "{before} bytes were free, now {after}"
    );
}

#[test]
fn evidence_sees_a_write_within_the_same_tick_and_nothing_else() {
    let directory = disk_directory();
    let path = directory.path().join("disk.raw");
    std::fs::write(&path, noise(8192)).unwrap();
    let file = OsFile::open(&path, Access::ReadWrite, WriteMode::Direct).unwrap();
    for _ in 0..20 {
        file.write_at(0, &noise(4096)).unwrap();
        let before = file.evidence().unwrap();
        file.read_at(0, &mut [0; 8192]).unwrap();
        assert!(
            before.proves_same(&file.evidence().unwrap()),
            "reading leaves no evidence"
        );

        file.write_at(4096, &noise(4096)).unwrap();

        assert!(
            !before.proves_same(&file.evidence().unwrap()),
            "writing does"
        );
    }
}

#[test]
fn metadata_is_copied_whole() {
    let directory = disk_directory();
    let storage = OsDirectory::open(directory.path()).unwrap();
    let (origin, copy) = (
        storage.create("origin").unwrap(),
        storage.create("copy").unwrap(),
    );
    let path = |name: &str| directory.path().join(name);
    std::fs::set_permissions(path("origin"), PermissionsExt::from_mode(0o640)).unwrap();
    let file = File::options().write(true).open(path("origin")).unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::fsetxattr(&file, "user.role", b"disk", flags).unwrap();
    rustix::fs::fsetxattr(copy.as_fd().unwrap(), "user.stale", b"x", flags).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_nanos(1_234_567_891_234))
        .unwrap();
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(path("origin"), Some(12), Some(34)).unwrap();
    }

    copy.copy_metadata(&*origin).unwrap();

    let facts = |name| {
        let found = std::fs::metadata(path(name)).unwrap();
        let times = (
            found.mtime(),
            found.mtime_nsec(),
            found.atime(),
            found.atime_nsec(),
        );
        (found.mode(), found.uid(), found.gid(), times)
    };
    assert_eq!(facts("copy"), facts("origin"));
    let mut role = [0; 8];
    let length = rustix::fs::getxattr(path("copy"), "user.role", &mut role).unwrap();
    assert_eq!(&role[..length], b"disk");
    let stale = rustix::fs::getxattr(path("copy"), "user.stale", &mut role);
    assert_eq!(
        stale,
        Err(Errno::NODATA),
        "what the origin has not, the copy loses"
    );
}

#[test]
fn a_directory_lists_only_its_files_and_follows_no_link() {
    let directory = disk_directory();
    let storage = OsDirectory::open(directory.path()).unwrap();
    drop(storage.create("file").unwrap());
    std::fs::create_dir(directory.path().join("directory")).unwrap();
    std::os::unix::fs::symlink("file", directory.path().join("link")).unwrap();

    assert_eq!(storage.names().unwrap(), ["file"]);
    assert_eq!(
        storage.open("link").unwrap_err().kind(),
        ErrorKind::Unsuitable
    );
    assert_eq!(
        storage.open("directory").unwrap_err().kind(),
        ErrorKind::Unsuitable
    );
    let mode = std::fs::metadata(directory.path().join("file"))
        .unwrap()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn directories_are_created_with_their_parents_for_the_owner_only() {
    let directory = disk_directory();
    let path = directory.path().join("state/of/one");

    drop(OsDirectory::open_or_create(&path).unwrap());
    drop(OsDirectory::open_or_create(&path).unwrap());

    let mode = std::fs::metadata(&path).unwrap().mode();
    assert_eq!(mode & 0o777, 0o700);
    assert_eq!(
        OsDirectory::create(&path).unwrap_err().kind(),
        ErrorKind::AlreadyExists
    );
}

#[test]
fn the_holder_of_a_lock_is_named() {
    let directory = disk_directory();
    let storage = OsDirectory::open(directory.path()).unwrap();
    let _held = storage.lock("state.lock").unwrap();

    let refused = OsDirectory::open(directory.path())
        .unwrap()
        .lock("state.lock")
        .unwrap_err();

    let message = refused.to_string();
    assert!(message.contains("state.lock"), "{message}");
    assert!(
        message.contains(&format!("process {}", std::process::id())),
        "{message}"
    );
}

#[test]
fn other_file_systems_keep_the_contracts_too() {
    for kind in ["ext4", "xfs", "btrfs"] {
        let directory = disk_directory();
        let Some(mounted) = MountedFileSystem::make(directory.path(), kind, 320 * MIB) else {
            eprintln!("SKIPPED {kind} (needs root and mkfs.{kind})");
            continue;
        };
        let place = mounted.point().join("storage");
        storage_conformance(&OsDirectory::create(&place).unwrap());
        for mode in [WriteMode::Buffered, WriteMode::Direct] {
            target_conformance(&|| new_file(mounted.point(), mode));
        }
        let directory = OsDirectory::open(&place).unwrap();
        assert!(
            directory.supports_exchange(["one", "other"]).unwrap(),
            "{kind}"
        );
        let may_clone = directory.may_clone();
        assert_eq!(may_clone, kind != "ext4", "{kind}");
        if may_clone {
            let (one, two) = (
                new_file(mounted.point(), WriteMode::Direct),
                place.join("clone"),
            );
            let clone = OsFile::create_new(&two, WriteMode::Direct).unwrap();
            clone
                .clone_from_file(&*one)
                .unwrap_or_else(|e| panic!("{kind} clones: {e}"));
            assert_eq!(clone.size_bytes(), one.size_bytes());
        }
    }
}

#[test]
fn a_file_system_that_cannot_exchange_names_says_so_and_is_a_target() {
    let directory = disk_directory();
    let Some(mounted) = UserFileSystem::mount(directory.path()) else {
        eprintln!("SKIPPED (needs bindfs)");
        return;
    };
    let place = mounted.point().join("storage");
    let storage = OsDirectory::create(&place).unwrap();

    assert!(!storage.supports_exchange(["one", "other"]).unwrap());
    assert!(!storage.may_clone());
    assert_eq!(storage.names().unwrap(), [""; 0]);
    for mode in [WriteMode::Buffered, WriteMode::Direct] {
        target_conformance(&|| new_file(mounted.point(), mode));
    }
}

fn new_file(directory: &Path, mode: WriteMode) -> Arc<OsFile> {
    let path = directory.join("target.raw");
    // The old one lives on in its handles.
    let _absent = std::fs::remove_file(&path);
    let file = OsFile::create_new(&path, mode).expect("create");
    file.write_at(0, &noise((1 << 20) + 777)).expect("write");
    Arc::new(file)
}
