//! Every backend passes the public conformance suites.
#![expect(clippy::print_stderr, reason = "says which tests were skipped")]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use blockferry_device::{
    Access, BlockTarget, CopyOnWrite, Identity, MemoryDevice, OsBlockDevice, OsDirectory, OsFile,
    WriteMode,
};
use blockferry_testkit::conformance::{
    source_conformance, storage_conformance, target_conformance,
};

use common::{LoopDevice, disk_directory, noise};

#[test]
fn memory_is_a_target() {
    target_conformance(&|| Arc::new(MemoryDevice::zeroed("memory", (1 << 20) + 700)));
    target_conformance(&|| {
        let device = MemoryDevice::from_bytes("memory", noise(1 << 20));
        Arc::new(device.with_identity(Identity::from_bytes(b"name")))
    });
}

#[test]
fn a_file_is_a_target_in_both_write_modes() {
    let directory = disk_directory();
    for mode in [WriteMode::Buffered, WriteMode::Direct] {
        for length in [2 << 20, (1 << 20) + 12_345] {
            target_conformance(&|| file(directory.path(), mode, &noise(length)));
        }
    }
}

#[test]
fn a_base_with_changes_in_a_sparse_file_is_a_target() {
    let directory = disk_directory();
    for length in [2 << 20, (1 << 20) + 12_345] {
        target_conformance(&|| {
            let scratch = file(directory.path(), WriteMode::Buffered, &[]);
            scratch.resize(length as u64).expect("sized");
            let base = MemoryDevice::from_bytes("base", noise(length));
            Arc::new(CopyOnWrite::new(Arc::new(base), scratch).expect("large enough"))
        });
    }
}

#[test]
fn a_file_in_memory_is_a_target() {
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("SKIPPED (needs /dev/shm)");
        return;
    };
    target_conformance(&|| file(directory.path(), WriteMode::Direct, &noise(1 << 20)));
}

fn file(directory: &Path, mode: WriteMode, content: &[u8]) -> Arc<dyn BlockTarget> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let file = OsFile::create_new(&directory.join(format!("{number}.raw")), mode).expect("create");
    file.write_at(0, content).expect("write");
    Arc::new(file)
}

#[test]
fn a_sparse_file_is_a_source() {
    let directory = disk_directory();
    let path = directory.path().join("sparse.raw");
    let mut expected = vec![0; 6 << 20];
    expected[1 << 20..2 << 20].copy_from_slice(&noise(1 << 20));
    expected[4_000_000..4_000_100].fill(3);
    let file = OsFile::create_new(&path, WriteMode::Direct).unwrap();
    file.resize(expected.len() as u64).unwrap();
    file.write_at(1 << 20, &expected[1 << 20..2 << 20]).unwrap();
    file.write_at(4_000_000, &expected[4_000_000..4_000_100])
        .unwrap();

    let source = OsFile::open(&path, Access::Read, WriteMode::Buffered).unwrap();

    source_conformance(&source, &expected);
}

#[test]
fn a_directory_is_storage_in_both_write_modes() {
    for mode in [WriteMode::Buffered, WriteMode::Direct] {
        let directory = disk_directory();
        let storage = OsDirectory::open(directory.path())
            .unwrap()
            .with_write_mode(mode);

        storage_conformance(&storage);
    }
}

#[test]
fn a_block_device_is_a_target() {
    for (size, sector) in [(2 << 20, 512), ((1 << 20) + 7 * 512, 512), (2 << 20, 4096)] {
        let directory = disk_directory();
        let image = directory.path().join("disk.raw");
        std::fs::write(&image, noise(size)).unwrap();
        let Some(device) = LoopDevice::attach(&image, sector) else {
            eprintln!("SKIPPED (needs root)");
            return;
        };

        target_conformance(&|| {
            let opened = OsBlockDevice::open(device.path(), Access::ReadWrite);
            Arc::new(opened.expect("open"))
        });
    }
}
