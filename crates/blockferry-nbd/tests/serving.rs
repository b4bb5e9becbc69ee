//! Our server with clients of every make: our own, libnbd's, QEMU's, and ones that speak as old clients do.
#![expect(
    clippy::big_endian_bytes,
    reason = "the protocol is in network byte order"
)]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use blockferry_core::Extent;
use blockferry_device::{
    BlockSource, BlockTarget, CopyOnWrite, Error, ErrorKind, MemoryDevice, Result, Status,
};
use blockferry_nbd::{
    NbdAddress, NbdDevice, NbdExport, NbdListener, NbdOptions, NbdServer, NbdServerOptions,
    ServerEvent,
};
use blockferry_testkit::Random;
use blockferry_testkit::conformance::{source_conformance, target_conformance};

const MIB: usize = 1 << 20;

/// A server of ours at a socket in a directory of its own.
struct Serving {
    _server: NbdServer,
    place: tempfile::TempDir,
}

impl Serving {
    fn start(export: Result<NbdExport>, options: NbdServerOptions) -> Self {
        let place = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(place.path().join("socket")).expect("bound");
        let export = export.expect("it can be served");
        let server = NbdServer::start(export, vec![listener.into()], options).expect("started");
        Self {
            _server: server,
            place,
        }
    }

    fn of(content: &[u8]) -> Self {
        let disk = Arc::new(MemoryDevice::from_bytes("memory", content.to_vec()));
        Self::start(
            NbdExport::read_only("disk", disk),
            NbdServerOptions::default(),
        )
    }

    /// Of a disk that keeps what it has, and the device that is written.
    fn copy_on_write(content: &[u8]) -> (Self, Arc<MemoryDevice>) {
        let base = Arc::new(MemoryDevice::from_bytes("memory", content.to_vec()));
        let scratch = Arc::new(MemoryDevice::zeroed("scratch", content.len()));
        let target = CopyOnWrite::new(Arc::clone(&base) as _, scratch).expect("large enough");
        let export = NbdExport::writable("disk", Arc::new(target));
        (Self::start(export, NbdServerOptions::default()), base)
    }

    fn socket(&self) -> PathBuf {
        self.place.path().join("socket")
    }

    fn address(&self) -> NbdAddress {
        NbdAddress::unix(self.socket(), "disk").expect("an address")
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.socket()).expect("connected")
    }

    fn source(&self) -> Arc<NbdDevice> {
        NbdDevice::open_source(&self.address(), &NbdOptions::default()).expect("a source")
    }

    fn target(&self) -> Arc<NbdDevice> {
        NbdDevice::open_target(&self.address(), &NbdOptions::default()).expect("a target")
    }
}

/// Noise with holes in it.
fn sparse(bytes: usize, seed: u64) -> Vec<u8> {
    let mut content = vec![0; bytes];
    Random::new(seed).fill(&mut content);
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

/// Runs a client; `None`, and said so, if it is not installed.
fn tool(words: &[&str]) -> Option<Output> {
    let ran = Command::new(words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .output();
    #[expect(clippy::print_stderr, reason = "what is skipped is said")]
    let Ok(output) = ran else {
        eprintln!("SKIPPED: {} is not installed", words[0]);
        return None;
    };
    assert!(output.status.success(), "{words:?}: {output:#?}");
    Some(output)
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn what_we_serve_is_a_source_for_our_own_client() {
    for bytes in [4 * MIB, 2 * MIB + 12_345] {
        let content = sparse(bytes, 1);
        let serving = Serving::of(&content);

        source_conformance(&*serving.source(), &content);

        let refused = NbdDevice::open_target(&serving.address(), &NbdOptions::default());
        assert_eq!(refused.expect_err("read-only").kind(), ErrorKind::Denied);
    }
}

#[test]
fn what_is_written_to_a_copy_is_a_target_for_our_own_client_and_the_base_stays() {
    let kept = Mutex::new(Vec::new());

    target_conformance(&|| {
        let content = sparse(2 * MIB + 512, 2);
        let (serving, base) = Serving::copy_on_write(&content);
        let target = serving.target();
        kept.lock()
            .expect("no panic")
            .push((serving, base, content));
        target
    });

    for (_serving, base, content) in kept.lock().expect("no panic").iter() {
        assert!(base.to_vec() == *content);
    }
}

#[test]
fn a_server_listens_at_several_places_of_both_families() {
    let content = sparse(MIB, 3);
    let place = tempfile::tempdir().expect("a directory");
    let socket = place.path().join("socket");
    let tcp = TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = tcp.local_addr().expect("bound").port();
    let listeners: Vec<NbdListener> = vec![
        tcp.into(),
        UnixListener::bind(&socket).expect("bound").into(),
    ];
    let disk = Arc::new(MemoryDevice::from_bytes("memory", content.clone()));
    let export = NbdExport::read_only("", Arc::clone(&disk) as _).expect("it can be served");
    let server = NbdServer::start(export, listeners, NbdServerOptions::default());

    let addresses = [
        format!("nbd://127.0.0.1:{port}/")
            .parse()
            .expect("an address"),
        NbdAddress::unix(&socket, "").expect("an address"),
    ];
    for address in addresses {
        let source = NbdDevice::open_source(&address, &NbdOptions::default()).expect("a source");
        assert!(whole(&*source) == content);
    }

    let served = server.expect("started").shutdown();
    assert_eq!(served.read_bytes, 2 * MIB as u64);
    assert!(served.clients >= 2, "{served:?}");
    assert_eq!(Arc::strong_count(&disk), 1, "nobody uses the disk any more");
}

#[test]
fn clients_of_libnbd_see_size_flags_holes_and_content() {
    let content = sparse(8 * MIB, 4);
    let serving = Serving::of(&content);
    let address = serving.address().to_string();
    let Some(info) = tool(&["nbdinfo", &address]) else {
        return;
    };
    let info = text(&info);
    for fact in [
        "export-size: 8388608",
        "is_read_only: true",
        "can_multi_conn: true",
        "base:allocation",
        "using structured packets",
        "block_size_maximum: 33554432",
    ] {
        assert!(info.contains(fact), "{fact}: {info}");
    }
    let list = text(&tool(&["nbdinfo", "--list", &address]).expect("installed"));
    assert!(list.contains("export=\"disk\""), "{list}");

    let map = text(&tool(&["nbdinfo", "--map", &address]).expect("installed"));

    let runs: Vec<&str> = map.lines().take(2).collect();
    let [first, second] = runs[..] else {
        panic!("{map}")
    };
    assert!(first.starts_with("         0      262144    0"), "{map}");
    assert!(second.starts_with("    262144      262144    3"), "{map}");
    let copy = serving.place.path().join("copy");
    tool(&["nbdcopy", &address, copy.to_str().expect("text")]).expect("installed");
    assert!(std::fs::read(&copy).expect("copied") == content);
}

#[test]
fn clients_of_qemu_convert_compare_and_write() {
    let content = sparse(8 * MIB, 5);
    let (serving, base) = Serving::copy_on_write(&content);
    let address = serving.address().to_string();
    let path = |name: &str| serving.place.path().join(name).display().to_string();
    std::fs::write(path("original"), &content).expect("written");
    let is_equal = |other: &str| {
        let other = path(other);
        tool(&[
            "qemu-img", "compare", "-f", "raw", "-F", "raw", &address, &other,
        ])
    };
    if is_equal("original").is_none() {
        return;
    }
    tool(&["qemu-img", "convert", "-O", "raw", &address, &path("copy")]).expect("installed");
    assert!(std::fs::read(path("copy")).expect("converted") == content);

    let mut commands = vec!["qemu-io", "-f", "raw"];
    for command in [
        "write -P 0x77 1000 3000000",
        "write -f -P 0x78 4M 64k",
        "write -z 6M 100k",
        "write -z -u 7M 4k",
        "discard 7340032 65536",
        "flush",
        "read -P 0x77 1000 3000000",
        "read -P 0 6M 100k",
    ] {
        commands.extend(["-c", command]);
    }
    commands.push(&address);
    let said = text(&tool(&commands).expect("installed"));
    assert!(!said.contains("failed"), "{said}");

    let mut expected = content.clone();
    expected[1000..3_001_000].fill(0x77);
    expected[4 * MIB..4 * MIB + 65_536].fill(0x78);
    expected[6 * MIB..6 * MIB + 102_400].fill(0);
    expected[7 * MIB..7 * MIB + 65_536].fill(0);
    std::fs::write(path("changed"), &expected).expect("written");
    is_equal("changed").expect("installed");
    assert!(base.to_vec() == content, "the base stays");
    drop(serving);
}

/// A client that knows the oldest way only.
fn old_client(serving: &Serving) -> (UnixStream, u64) {
    let mut stream = serving.connect();
    // Less than the server's patience: who is to be cut off is cut off at once.
    let patience = Some(std::time::Duration::from_secs(20));
    stream.set_read_timeout(patience).expect("set");
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).expect("greeted");
    let asks = [
        &1_u32.to_be_bytes()[..],
        b"IHAVEOPT",
        &[0, 0, 0, 1, 0, 0, 0, 4],
        b"disk",
    ];
    stream.write_all(&asks.concat()).expect("asked");
    let mut said = [0; 10 + 124];
    stream.read_exact(&mut said).expect("told");
    let size = u64::from_be_bytes(said[..8].try_into().expect("8 bytes"));
    (stream, size)
}

fn request(flags: u16, kind: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// The error and the cookie of a simple answer.
fn simple(stream: &mut UnixStream) -> (u32, u64) {
    let mut header = [0; 16];
    stream.read_exact(&mut header).expect("answered");
    assert_eq!(header[..4], [0x67, 0x44, 0x66, 0x98]);
    let error = u32::from_be_bytes(header[4..8].try_into().expect("4 bytes"));
    (
        error,
        u64::from_be_bytes(header[8..].try_into().expect("8 bytes")),
    )
}

#[test]
fn an_old_client_gets_answers_in_one_piece() {
    let content = sparse(5 * MIB, 6);
    let serving = Serving::of(&content);
    let (mut stream, size) = old_client(&serving);
    assert_eq!(size, 5 * MIB as u64);

    stream
        .write_all(&request(0, 0, 7, 100, 4_000_000))
        .expect("asked");

    assert_eq!(simple(&mut stream), (0, 7));
    let mut read = vec![0; 4_000_000];
    stream.read_exact(&mut read).expect("read");
    assert!(read == content[100..4_000_100]);
}

#[test]
fn requests_that_cannot_be_are_told_so_and_the_connection_goes_on() {
    let content = sparse(MIB, 7);
    let writable = Serving::copy_on_write(&content).0;
    let read_only = Serving::of(&content);
    let too_long = 32 * 1024 * 1024 + 1;
    const READ_ONLY: u32 = 1;
    const INVALID: u32 = 22;
    const NO_SPACE: u32 = 28;
    let size = MIB as u64;
    for (serving, flags, kind, offset, length, expected) in [
        (&read_only, 0, 0, size, 1, INVALID),
        (&read_only, 0, 0, size - 1, 2, INVALID),
        (&read_only, 0, 0, u64::MAX, 4096, INVALID),
        (&read_only, 0, 0, 0, too_long, INVALID),
        (&read_only, 0, 0, 0, u32::MAX, INVALID),
        (&read_only, 1 << 2, 0, 0, 512, INVALID),
        (&read_only, 0, 1, 0, 512, READ_ONLY),
        (&read_only, 0, 1, 0, 3_000_000, READ_ONLY),
        (&read_only, 0, 3, 0, 0, INVALID),
        (&read_only, 0, 4, 0, 512, READ_ONLY),
        (&read_only, 0, 6, 0, 512, READ_ONLY),
        // Not agreed on.
        (&read_only, 0, 7, 0, 512, INVALID),
        (&read_only, 0, 5, 0, 512, INVALID),
        (&read_only, 0, 99, 0, 512, INVALID),
        (&writable, 0, 1, size - 1, 2, NO_SPACE),
        (&writable, 0, 1, size - 1, 3_000_000, NO_SPACE),
        (&writable, 0, 6, 0, u32::MAX, NO_SPACE),
        (&writable, 0, 4, 1, u32::MAX, INVALID),
        (&writable, 1 << 4, 6, 0, 512, INVALID),
        (&writable, 1, 1, 0, 512, 0),
        (&writable, 0, 1, 0, 0, 0),
        (&writable, 0, 3, 0, 0, 0),
    ] {
        let (mut stream, _size) = old_client(serving);
        let what = format!("kind {kind}, flags {flags}, {length} bytes at {offset}");

        stream
            .write_all(&request(flags, kind, 3, offset, length))
            .expect("asked");
        if kind == 1 {
            stream.write_all(&vec![1; length as usize]).expect("sent");
        }

        assert_eq!(simple(&mut stream), (expected, 3), "{what}");
        stream
            .write_all(&request(0, 0, 4, 4096, 512))
            .expect("asked");
        assert_eq!(simple(&mut stream), (0, 4), "{what}");
        let mut read = [0; 512];
        stream.read_exact(&mut read).expect("read");
        assert!(read == content[4096..4608], "{what}");
    }
}

#[test]
fn many_requests_under_way_each_get_their_own_answer() {
    let content = sparse(4 * MIB, 8);
    let serving = Serving::of(&content);
    let (mut stream, _size) = old_client(&serving);
    let mut random = Random::new(9);
    let mut asked: HashMap<u64, (usize, usize)> = HashMap::new();
    let mut all = Vec::new();
    for cookie in 1..=200 {
        let bytes = 1 + usize::try_from(random.below(60_000)).expect("small");
        let offset = usize::try_from(random.below((4 * MIB - bytes) as u64)).expect("small");
        asked.insert(cookie, (offset, bytes));
        let length = u32::try_from(bytes).expect("small");
        all.extend(request(0, 0, cookie, offset as u64, length));
    }
    let mut asking = stream.try_clone().expect("a second handle");
    let sender = std::thread::spawn(move || asking.write_all(&all).expect("asked"));

    while !asked.is_empty() {
        let (error, cookie) = simple(&mut stream);
        let (offset, bytes) = asked.remove(&cookie).expect("asked for, and once");
        let mut read = vec![0; bytes];
        stream.read_exact(&mut read).expect("read");

        assert_eq!(error, 0);
        assert!(read == content[offset..offset + bytes]);
    }

    sender.join().expect("sent");
}

/// A disk whose second half cannot be read, and whose flush fails once.
#[derive(Debug)]
struct Failing {
    disk: MemoryDevice,
    flushes: Mutex<u32>,
}

impl BlockSource for Failing {
    fn label(&self) -> &str {
        "failing"
    }

    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        if offset + buffer.len() as u64 > self.size_bytes() / 2 {
            return Err(Error::new(ErrorKind::Io, "a bad spot"));
        }
        self.disk.read_at(offset, buffer)
    }

    fn status_at(&self, _offset: u64) -> Result<(Status, u64)> {
        Err(Error::new(ErrorKind::Io, "nothing is known"))
    }
}

impl BlockTarget for Failing {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.disk.write_at(offset, bytes)
    }

    fn write_zeroes(&self, extent: Extent) -> Result<()> {
        self.disk.write_zeroes(extent)
    }

    fn flush(&self) -> Result<()> {
        let mut flushes = self.flushes.lock().expect("no panic");
        *flushes += 1;
        match *flushes {
            1 => Err(Error::new(ErrorKind::NoSpace, "full")),
            _ => Ok(()),
        }
    }

    fn read_medium(&self, requests: &mut [blockferry_device::ReadRequest<'_>]) -> Result<()> {
        self.read_batch(requests)
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.disk.resize(size_bytes)
    }
}

#[test]
fn a_failure_of_the_disk_is_told_to_who_runs_the_server_and_a_failed_flush_is_final() {
    let disk = Failing {
        disk: MemoryDevice::zeroed("memory", 8 * MIB),
        flushes: Mutex::default(),
    };
    let told = Arc::new(Mutex::new(Vec::new()));
    let mut options = NbdServerOptions::default();
    let telling = Arc::clone(&told);
    options.observer = Arc::new(move |event| {
        if let ServerEvent::Failed { error, .. } = event {
            telling.lock().expect("no panic").push(error.to_string());
        }
    });
    let serving = Serving::start(NbdExport::writable("disk", Arc::new(disk)), options);
    let target = serving.target();

    let mut buffer = vec![0; 4 * MIB];
    target
        .read_at(0, &mut buffer)
        .expect("the first half is sound");
    let bad = target
        .read_at(MIB as u64, &mut buffer)
        .expect_err("a bad spot");

    assert_eq!(bad.kind(), ErrorKind::Io);
    assert!(
        told.lock()
            .expect("no panic")
            .contains(&"a bad spot".to_owned())
    );
    let (mut stream, _size) = old_client(&serving);
    stream.write_all(&request(0, 3, 1, 0, 0)).expect("asked");
    assert_eq!(simple(&mut stream), (28, 1));
    for kind in [3, 4] {
        stream.write_all(&request(0, kind, 2, 0, 0)).expect("asked");
        assert_eq!(simple(&mut stream), (5, 2), "a later one proves nothing");
    }
    // What was said to be good already ends with the connection where it is not.
    stream
        .write_all(&request(0, 0, 3, 3 * MIB as u64, 2 << 20))
        .expect("asked");
    assert_eq!(simple(&mut stream), (0, 3));
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).expect("hung up");
    assert_eq!(rest.len(), MIB);
}
