//! Exports of real servers: nbdkit and qemu-nbd, whole, failing, choosy, gone and come back.

use std::cell::RefCell;
use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockferry_core::{Content, Extent};
use blockferry_device::{
    BlockSource, BlockTarget, ErrorKind, ReadRequest, Result, Status, WriteRequest,
};
use blockferry_nbd::{NbdAddress, NbdDevice, NbdOptions};
use blockferry_testkit::Random;
use blockferry_testkit::conformance::{source_conformance, target_conformance};

const MIB: usize = 1 << 20;

/// A server, and the directory that its socket and its disk are in. Dropped, it is killed.
struct Server {
    child: Child,
    place: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn is_missing(tool: &str) -> bool {
    let missing = Command::new(tool)
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_err();
    #[expect(clippy::print_stderr, reason = "what is skipped is said")]
    if missing {
        eprintln!("SKIPPED: {tool} is not installed");
    }
    missing
}

impl Server {
    /// Starts a server whose words are made of `{socket}` and `{disk}`.
    fn start(words: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().expect("a directory"), words)
    }

    fn start_in(place: tempfile::TempDir, words: &[&str]) -> Self {
        let path = |name: &str| place.path().join(name).display().to_string();
        let words = words.iter().map(|word| {
            word.replace("{socket}", &path("socket"))
                .replace("{disk}", &path("disk"))
        });
        let mut words = words.collect::<Vec<_>>().into_iter();
        std::fs::remove_file(place.path().join("socket")).ok();
        let child = Command::new(words.next().expect("a program"))
            .args(words)
            .stdin(Stdio::null())
            // It complains of whoever only looks whether it listens.
            .stderr(Stdio::null())
            .spawn()
            .expect("starts");
        let server = Self { child, place };
        let end = Instant::now() + Duration::from_secs(30);
        while std::os::unix::net::UnixStream::connect(server.path("socket")).is_err() {
            assert!(Instant::now() < end, "the server does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    /// nbdkit with these words behind its own.
    fn nbdkit(words: &[&str]) -> Self {
        let all: Vec<&str> = ["nbdkit", "-f", "-U", "{socket}"]
            .iter()
            .chain(words)
            .copied()
            .collect();
        Self::start(&all)
    }

    /// qemu-nbd with these words behind its own, of a disk with this content.
    fn qemu_nbd(content: &[u8], words: &[&str]) -> Self {
        let place = tempfile::tempdir().expect("a directory");
        std::fs::write(place.path().join("disk"), content).expect("written");
        let all: Vec<&str> = ["qemu-nbd", "-t", "-k", "{socket}", "-e", "8"]
            .iter()
            .chain(words)
            .copied()
            .collect();
        Self::start_in(place, &all)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn address(&self) -> NbdAddress {
        NbdAddress::unix(self.path("socket"), "").expect("an address")
    }

    fn source(&self) -> Result<Arc<NbdDevice>> {
        NbdDevice::open_source(&self.address(), &NbdOptions::default())
    }

    fn target(&self) -> Result<Arc<NbdDevice>> {
        NbdDevice::open_target(&self.address(), &NbdOptions::default())
    }
}

fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut noise = vec![0; bytes];
    Random::new(seed).fill(&mut noise);
    noise
}

fn drawn(random: &mut Random, below: usize) -> usize {
    usize::try_from(random.below(below as u64)).expect("below a size")
}

/// Noise with holes in it.
fn sparse(bytes: usize, seed: u64) -> Vec<u8> {
    let mut content = noise(bytes, seed);
    for hole in content.chunks_mut(256 * 1024).skip(1).step_by(3) {
        hole.fill(0);
    }
    content
}

fn whole(device: &dyn BlockSource) -> Vec<u8> {
    let mut content = vec![0; usize::try_from(device.size_bytes()).expect("small")];
    device.read_at(0, &mut content).expect("readable");
    content
}

#[test]
fn exports_of_nbdkit_are_targets() {
    if is_missing("nbdkit") {
        return;
    }
    let kept = RefCell::new(Vec::new());
    for more in [
        &["memory", "size=2M"][..],
        &["--filter=noextents", "--filter=nozero", "memory", "size=2M"],
        // Not a whole number of units of the server would be refused by it.
        &[
            "--filter=blocksize-policy",
            "memory",
            "size=2M",
            "blocksize-minimum=4096",
            "blocksize-preferred=4096",
            "blocksize-maximum=65536",
            "blocksize-error-policy=error",
        ],
    ] {
        target_conformance(&|| {
            let server = Server::nbdkit(more);
            let target = server.target().expect("a target");
            kept.borrow_mut().push(server);
            target
        });
    }
}

#[test]
fn exports_of_qemu_are_targets_and_sources() {
    if is_missing("qemu-nbd") {
        return;
    }
    let kept = RefCell::new(Vec::new());
    target_conformance(&|| {
        let server = Server::qemu_nbd(&noise(2 * MIB, 1), &["-f", "raw", "{disk}"]);
        let target = server.target().expect("a target");
        kept.borrow_mut().push(server);
        target
    });
    let content = sparse(4 * MIB + 512, 2);
    let server = Server::qemu_nbd(&content, &["-r", "-f", "raw", "{disk}"]);

    source_conformance(&*server.source().expect("a source"), &content);

    let error = server.target().expect_err("read-only");
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
}

#[test]
fn many_requests_and_threads_at_once_get_each_its_own() {
    if is_missing("qemu-nbd") {
        return;
    }
    let content = sparse(16 * MIB, 3);
    let server = Server::qemu_nbd(&content, &["-r", "-f", "raw", "{disk}"]);
    let source = server.source().expect("a source");

    std::thread::scope(|scope| {
        for thread in 0..6 {
            let (source, content) = (&source, &content);
            scope.spawn(move || {
                let mut random = Random::new(thread);
                for _ in 0..20 {
                    let mut buffers: Vec<(usize, Vec<u8>)> = (0..random.below(40))
                        .map(|_| {
                            let bytes = 1 + drawn(&mut random, 700_000);
                            let offset = drawn(&mut random, content.len() - bytes);
                            (offset, vec![0; bytes])
                        })
                        .collect();
                    let mut requests: Vec<ReadRequest<'_>> = buffers
                        .iter_mut()
                        .map(|(offset, buffer)| ReadRequest {
                            offset: *offset as u64,
                            buffer,
                        })
                        .collect();
                    source.read_batch(&mut requests).expect("readable");
                    for (offset, buffer) in buffers {
                        assert!(buffer == content[offset..offset + buffer.len()]);
                    }
                }
            });
        }
    });

    // All connections that it has are lost at once.
    let again = [
        "qemu-nbd", "-t", "-k", "{socket}", "-e", "8", "-r", "-f", "raw", "{disk}",
    ];
    let _server = start_again(server, &again);
    assert!(whole(&*source) == content, "reading goes on");
}

#[test]
fn a_hole_is_told_without_reading_it_and_a_write_is_seen() {
    if is_missing("nbdkit") {
        return;
    }
    let server = Server::nbdkit(&["memory", "size=64M"]);
    let target = server.target().expect("a target");
    assert_eq!(target.status_at(5).expect("told"), (Status::Zero, 64 << 20));

    target.write_at(1 << 20, &[1; 4096]).expect("written");

    let (status, end) = target.status_at(0).expect("told");
    assert_eq!(status, Status::Zero);
    assert!(end <= 1 << 20, "{end}");
    let found = target.status_at(1 << 20).expect("told");
    assert_eq!(found.0, Status::Data);
    target
        .write_zeroes(Extent::from_range(0..64 << 20))
        .expect("zero");
    assert!(whole(&*target).iter().all(|byte| *byte == 0));
    assert!(
        target
            .punch(Extent::from_range(0..64 << 20))
            .expect("given back")
    );
    assert_eq!(target.status_at(0).expect("told"), (Status::Zero, 64 << 20));
}

#[test]
fn an_error_of_the_server_names_the_place_and_the_connection_goes_on() {
    if is_missing("nbdkit") {
        return;
    }
    let place = tempfile::tempdir().expect("a directory");
    let trigger = place.path().join("fail");
    let file = format!("error-file={}", trigger.display());
    let words = [
        "--filter=error",
        "memory",
        "size=2M",
        "error=EIO",
        "error-rate=100%",
        &file,
    ];
    let server = Server::nbdkit(&words);
    let target = server.target().expect("a target");
    target.write_at(0, &noise(2 * MIB, 4)).expect("written");
    target.flush().expect("flushed");
    std::fs::write(&trigger, "").expect("written");

    let mut buffer = vec![0; MIB];
    let reads = target.read_at(4096, &mut buffer).expect_err("EIO");
    let writes = target.write_at(4096, &buffer).expect_err("EIO");

    for (error, what) in [
        (reads, "read of 262144 bytes at offset "),
        (writes, "write of 262144 bytes at offset "),
    ] {
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().starts_with(what), "{error}");
    }
    std::fs::remove_file(&trigger).expect("removed");
    assert!(whole(&*target) == noise(2 * MIB, 4));
    target.flush().expect("it goes on");
}

#[test]
fn a_slow_server_is_waited_for_and_one_that_is_silent_for_too_long_is_given_up() {
    if is_missing("nbdkit") {
        return;
    }
    let slow = [
        "--filter=delay",
        "memory",
        "size=2M",
        "rdelay=50ms",
        "wdelay=50ms",
    ];
    let server = Server::nbdkit(&slow);
    let target = server.target().expect("a target");
    target.write_at(0, &noise(2 * MIB, 6)).expect("written");
    assert!(whole(&*target) == noise(2 * MIB, 6));

    let silent = ["--filter=delay", "memory", "size=2M", "rdelay=30"];
    let server = Server::nbdkit(&silent);
    let mut options = NbdOptions::default();
    options.silence = Duration::from_millis(200);
    let source = NbdDevice::open_source(&server.address(), &options).expect("a source");
    let began = Instant::now();

    let error = source.read_at(4096, &mut [0; 4096]).expect_err("silent");

    let cause = error.source().expect("a cause").to_string();
    assert!(cause.contains("silent"), "{error}: {cause}");
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn a_full_server_says_so() {
    if is_missing("nbdkit") {
        return;
    }
    let server = Server::nbdkit(&[
        "--filter=error",
        "memory",
        "size=2M",
        "error-pwrite=ENOSPC",
        "error-pwrite-rate=100%",
    ]);
    let target = server.target().expect("a target");

    let error = target.write_at(0, &[1; 4096]).expect_err("full");

    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
}

fn start_again(server: Server, words: &[&str]) -> Server {
    let mut server = std::mem::ManuallyDrop::new(server);
    server.child.kill().expect("killed");
    server.child.wait().expect("ends");
    // The directory stays, with the disk in it.
    let place = std::mem::replace(&mut server.place, tempfile::tempdir().expect("a directory"));
    Server::start_in(place, words)
}

#[test]
fn a_server_that_comes_back_is_read_on_and_what_was_not_flushed_is_never_called_durable() {
    if is_missing("qemu-nbd") {
        return;
    }
    let words = ["-f", "raw", "{disk}"];
    let again: Vec<&str> = ["qemu-nbd", "-t", "-k", "{socket}", "-e", "8"]
        .iter()
        .chain(&words)
        .copied()
        .collect();
    let content = noise(2 * MIB, 5);
    let server = Server::qemu_nbd(&content, &words);
    let target = server.target().expect("a target");
    assert!(whole(&*target) == content);

    let server = start_again(server, &again);

    assert!(whole(&*target) == content, "reading goes on");
    target.write_at(0, &[7; 4096]).expect("written");
    target.flush().expect("flushed");
    target.write_at(4096, &[8; 4096]).expect("written");
    let _server = start_again(server, &again);
    let mut buffer = [0; 4096];
    target.read_at(0, &mut buffer).expect("reading goes on");
    assert_eq!(buffer, [7; 4096]);
    for _ in 0..2 {
        let error = target.flush().expect_err("a write may be lost");
        assert!(error.to_string().contains("lost before a flush"), "{error}");
    }
    target
        .write_at(0, &[9; 512])
        .expect_err("the handle is dead");
}

#[test]
fn a_server_that_is_gone_is_an_error_and_not_a_wait_for_ever() {
    if is_missing("nbdkit") {
        return;
    }
    let server = Server::nbdkit(&["memory", "size=2M"]);
    let source = server.source().expect("a source");
    drop(server);

    let error = source.read_at(0, &mut [0; 512]).expect_err("gone");

    assert!(error.to_string().contains("connect to nbd+unix"), "{error}");
}

#[test]
fn a_dirty_bitmap_tells_what_was_written() {
    if is_missing("qemu-nbd") || is_missing("qemu-img") || is_missing("qemu-io") {
        return;
    }
    let place = tempfile::tempdir().expect("a directory");
    let disk = place.path().join("disk");
    let run = |program: &str, words: &[&str]| {
        let status = Command::new(program)
            .args(words)
            .arg(Path::new(&disk))
            .args(if program == "qemu-img" && words[0] == "create" {
                &["64M"][..]
            } else if program == "qemu-img" {
                &["b0"][..]
            } else {
                &[]
            })
            .stdout(Stdio::null())
            .status();
        assert!(status.expect("runs").success(), "{program} {words:?}");
    };
    run("qemu-img", &["create", "-q", "-f", "qcow2"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write 0 8M"]);
    run("qemu-img", &["bitmap", "--add", "-g", "64k"]);
    run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write 1M 64k", "-c", "write 8M 128k"],
    );
    let server = Server::start_in(
        place,
        &[
            "qemu-nbd", "-t", "-r", "-e", "8", "-k", "{socket}", "-f", "qcow2", "-B", "b0",
            "{disk}",
        ],
    );
    let mut options = NbdOptions::default();
    options.bitmap = Some("b0".to_owned());
    let source = NbdDevice::open_source(&server.address(), &options).expect("a source");

    let map = source.changes().expect("told").expect("a bitmap");

    let data: Vec<Extent> = map
        .runs(Extent::from_range(0..64 << 20))
        .filter(|(_, content)| *content == Content::Data)
        .map(|(extent, _)| extent)
        .collect();
    let expected = [1 << 20..(1 << 20) + 65_536, 8 << 20..(8 << 20) + 131_072];
    assert_eq!(data, expected.map(Extent::from_range));
    assert_eq!(map.total_bytes(Content::Same), (64 << 20) - 3 * 65_536);
    options.bitmap = Some("b1".to_owned());
    let other = NbdDevice::open_source(&server.address(), &options).expect("a source");
    assert!(other.changes().expect("told").is_none());
    let error = NbdDevice::open_source(
        &NbdAddress::unix(server.path("socket"), "nowhere").expect("an address"),
        &options,
    );
    assert_eq!(error.expect_err("no export").kind(), ErrorKind::NotFound);
}

#[test]
fn batches_of_writes_arrive_where_they_belong() {
    if is_missing("nbdkit") {
        return;
    }
    let server = Server::nbdkit(&["memory", "size=8M"]);
    let target = server.target().expect("a target");
    let mut model = vec![0; 8 * MIB];
    let mut random = Random::new(6);
    for round in 0..20 {
        let pieces: Vec<(usize, Vec<u8>)> = model
            .chunks(1 << 19)
            .enumerate()
            .map(|(number, _)| {
                let from = drawn(&mut random, 100_000);
                let bytes = 1 + drawn(&mut random, 400_000);
                (
                    (number << 19) + from,
                    noise(bytes, round * 100 + number as u64),
                )
            })
            .collect();
        let requests: Vec<WriteRequest<'_>> = pieces
            .iter()
            .map(|(offset, bytes)| WriteRequest {
                offset: *offset as u64,
                bytes,
            })
            .collect();
        target.write_batch(&requests).expect("written");
        for (offset, bytes) in &pieces {
            model[*offset..offset + bytes.len()].copy_from_slice(bytes);
        }
    }

    assert!(whole(&*target) == model);
}
