//! Clients that say whatever they like, or nothing, or too much: the server sends them away, serves the others, and ends
//! when it is told to.
#![expect(
    clippy::big_endian_bytes,
    reason = "the protocol is in network byte order"
)]

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blockferry_device::{BlockSource, BlockTarget, CopyOnWrite, MemoryDevice};
use blockferry_nbd::{
    NbdAddress, NbdDevice, NbdExport, NbdOptions, NbdServer, NbdServerOptions, ServerEvent,
};
use blockferry_testkit::Random;

const SIZE: usize = 1 << 20;
/// Longer than anything here takes that is not waited for on purpose.
const LONG: Duration = Duration::from_secs(20);
const UNSUPPORTED: u32 = (1 << 31) + 1;
const INVALID: u32 = (1 << 31) + 3;
const UNKNOWN: u32 = (1 << 31) + 6;
const TOO_BIG: u32 = (1 << 31) + 9;

/// A server whose clients may change a copy, and what it told of them.
struct Serving {
    server: NbdServer,
    place: tempfile::TempDir,
    told: Arc<Mutex<Vec<String>>>,
}

impl Serving {
    fn start(set: impl FnOnce(&mut NbdServerOptions)) -> Self {
        let place = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(place.path().join("socket")).expect("bound");
        let base = Arc::new(MemoryDevice::zeroed("memory", SIZE));
        let scratch = Arc::new(MemoryDevice::zeroed("scratch", SIZE));
        let target: Arc<dyn BlockTarget> =
            Arc::new(CopyOnWrite::new(base, scratch).expect("large enough"));
        let export = NbdExport::writable("disk", target).expect("it can be served");
        let told = Arc::new(Mutex::new(Vec::new()));
        let telling = Arc::clone(&told);
        let mut options = NbdServerOptions::default();
        options.observer = Arc::new(move |event| {
            let line = match event {
                ServerEvent::Left {
                    error: Some(error), ..
                } => error.to_string(),
                ServerEvent::SentAway => "sent away".to_owned(),
                _ => return,
            };
            telling.lock().expect("no panic").push(line);
        });
        set(&mut options);
        let server = NbdServer::start(export, vec![listener.into()], options).expect("started");
        Self {
            server,
            place,
            told,
        }
    }

    fn address(&self) -> NbdAddress {
        NbdAddress::unix(self.place.path().join("socket"), "disk").expect("an address")
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.place.path().join("socket")).expect("connected");
        stream.set_read_timeout(Some(LONG)).expect("set");
        stream
    }

    /// A client that was greeted and has said its flags.
    fn greeted(&self) -> UnixStream {
        let mut stream = self.connect();
        stream.read_exact(&mut [0; 18]).expect("greeted");
        stream.write_all(&[0, 0, 0, 3]).expect("said");
        stream
    }

    /// A client that may ask for something.
    fn let_in(&self) -> UnixStream {
        let mut stream = self.greeted();
        stream.write_all(&option(1, b"disk")).expect("asked");
        stream.read_exact(&mut [0; 10]).expect("told");
        stream
    }

    /// Whether somebody who behaves is served.
    #[track_caller]
    fn assert_serves(&self) {
        let source = NbdDevice::open_source(&self.address(), &NbdOptions::default());
        let source = source.expect("it serves others");
        source.read_at(0, &mut [0; 4096]).expect("it serves others");
    }

    /// Waits until the server has told this of a client.
    #[track_caller]
    fn assert_told(&self, text: &str) {
        let end = Instant::now() + LONG;
        let told = || self.told.lock().expect("no panic").clone();
        while !told().iter().any(|line| line.contains(text)) {
            assert!(Instant::now() < end, "{text}: {:?}", told());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn option(number: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).expect("short");
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(body);
    bytes
}

fn request(kind: u16, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend([0, 0]);
    bytes.extend(kind.to_be_bytes());
    bytes.extend(7_u64.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// The kind of the next answer to an option.
fn answer(stream: &mut UnixStream) -> u32 {
    let mut header = [0; 20];
    stream.read_exact(&mut header).expect("answered");
    let field = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("4 bytes"));
    let mut body = vec![0; field(16) as usize];
    stream.read_exact(&mut body).expect("answered");
    field(12)
}

/// What the server says until it hangs up. A connection that is reset is one that ended.
fn until_end(stream: &mut UnixStream) -> Vec<u8> {
    let mut said = Vec::new();
    match stream.read_to_end(&mut said) {
        Ok(_) => said,
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => said,
        Err(error) => panic!("the server does not hang up: {error}"),
    }
}

#[test]
fn what_is_no_handshake_is_hung_up_on() {
    let serving = Serving::start(|_| {});
    let too_long = [&b"IHAVEOPT"[..], &[0, 0, 0, 3, 0xff, 0xff, 0xff, 0xff]].concat();
    for (said, told) in [
        (
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
            "fixed newstyle",
        ),
        (vec![0; 4], "fixed newstyle"),
        (vec![0xff; 4], "fixed newstyle"),
        ([&[0, 0, 0, 3][..], &[7; 16]].concat(), "no option"),
        ([vec![0, 0, 0, 3], too_long].concat(), "too long"),
        (
            [vec![0, 0, 0, 3], option(1, b"other")].concat(),
            "there is not",
        ),
        (
            [vec![0, 0, 0, 3], option(3, &[]).repeat(300)].concat(),
            "without end",
        ),
        (
            [vec![0, 0, 0, 3], option(77, &[0; 9000]).repeat(300)].concat(),
            "without end",
        ),
    ] {
        let mut stream = serving.connect();
        let mut talking = stream.try_clone().expect("a second handle");
        let talk = std::thread::spawn(move || talking.write_all(&said));

        until_end(&mut stream);

        // It may hang up before it heard all of it.
        talk.join().expect("no panic").ok();
        serving.assert_told(told);
        serving.told.lock().expect("no panic").clear();
    }
    serving.assert_serves();
}

#[test]
fn options_that_make_no_sense_are_refused_and_the_next_one_counts() {
    let serving = Serving::start(|_| {});
    let mut stream = serving.greeted();
    let name = |name: &[u8]| {
        let length = u32::try_from(name.len()).expect("short");
        [&length.to_be_bytes()[..], name].concat()
    };
    for (number, body, expected) in [
        (3, vec![1], INVALID),
        (8, vec![1], INVALID),
        (5, vec![], UNSUPPORTED),
        (11, vec![], UNSUPPORTED),
        (0, vec![], UNSUPPORTED),
        (u32::MAX, vec![0; 16_384], UNSUPPORTED),
        (7, vec![], INVALID),
        (7, vec![0xff; 8], INVALID),
        (7, [name(b"disk"), vec![0xff, 0xff]].concat(), INVALID),
        (7, [name(b"disk"), vec![0, 0, 1]].concat(), INVALID),
        (7, [name(b"other"), vec![0, 0]].concat(), UNKNOWN),
        (6, [name(&[0xff; 5000]), vec![0, 0]].concat(), UNKNOWN),
        // Without structured answers there are none of these.
        (10, [name(b"disk"), vec![0; 4]].concat(), INVALID),
        (8, vec![], 1),
        (10, [name(b"disk"), vec![0xff; 4]].concat(), INVALID),
        (
            10,
            [name(b"disk"), vec![0, 0, 0, 1], vec![0xff; 4]].concat(),
            INVALID,
        ),
        (10, [name(b"other"), vec![0; 4]].concat(), UNKNOWN),
        (
            10,
            [name(b"disk"), vec![0, 0, 0, 1], name(b"qemu:x")].concat(),
            1,
        ),
        (10, vec![0; 3], INVALID),
    ] {
        stream.write_all(&option(number, &body)).expect("asked");

        assert_eq!(
            answer(&mut stream),
            expected,
            "option {number} with {body:?}"
        );
    }
    let beyond = [&b"IHAVEOPT"[..], &[0, 0, 0, 3, 0, 0, 0x40, 1]].concat();
    stream.write_all(&beyond).expect("asked");
    assert_eq!(answer(&mut stream), TOO_BIG);
    until_end(&mut stream);
    serving.assert_serves();
}

#[test]
fn a_client_that_takes_leave_is_answered() {
    let serving = Serving::start(|_| {});
    let mut stream = serving.greeted();

    stream.write_all(&option(2, &[])).expect("asked");

    assert_eq!(answer(&mut stream), 1);
    assert_eq!(until_end(&mut stream), [0; 0]);
    let mut stream = serving.let_in();
    stream.write_all(&request(2, 0, 0)).expect("asked");
    assert_eq!(until_end(&mut stream), [0; 0]);
    assert_eq!(serving.told.lock().expect("no panic")[..], [""; 0]);
}

#[test]
fn noise_never_stops_the_server() {
    let serving = Serving::start(|options| options.silence = Duration::from_millis(50));
    let mut random = Random::new(1);
    for round in 0..60 {
        let mut stream = match round % 2 {
            0 => serving.greeted(),
            _ => serving.let_in(),
        };
        let mut noise = vec![0; 1 + usize::try_from(random.below(4000)).expect("small")];
        random.fill(&mut noise);
        // Some of it begins as it should.
        let start = match (round % 2, round % 3) {
            (0, 0) => b"IHAVEOPT\0\0\0\x07\0\0\0\x20".to_vec(),
            (_, 0) => request(u16::try_from(round % 9).expect("small"), 0, 4096),
            _ => Vec::new(),
        };
        stream.write_all(&[start, noise].concat()).ok();
        stream.shutdown(std::net::Shutdown::Write).ok();

        until_end(&mut stream);
    }
    serving.assert_serves();
}

#[test]
fn requests_that_cannot_be_understood_end_the_connection() {
    let serving = Serving::start(|_| {});
    for (said, told) in [
        (vec![0; 28], "no request"),
        (request(1, 0, u32::MAX), "too long"),
        (request(1, 0, (32 << 20) + 1), "too long"),
    ] {
        let mut stream = serving.let_in();
        stream.write_all(&said).expect("said");

        assert_eq!(until_end(&mut stream), [0; 0]);

        serving.assert_told(told);
    }
    serving.assert_serves();
}

#[test]
fn who_stops_in_the_middle_is_cut_off_and_who_waits_between_requests_is_not() {
    let serving = Serving::start(|options| options.silence = Duration::from_millis(100));
    let mut patient = serving.let_in();
    for said in [
        request(0, 0, 512)[..20].to_vec(),
        request(1, 0, 4096),
        [request(1, 0, 4096), vec![1; 4095]].concat(),
        [request(1, 0, 3 << 20), vec![1; 2 << 20]].concat(),
    ] {
        let mut stream = serving.let_in();
        stream.write_all(&said).expect("said");

        assert_eq!(until_end(&mut stream), [0; 0]);
    }
    // Answers that are not taken fill the socket.
    let mut deaf = serving.let_in();
    for _ in 0..8 {
        deaf.write_all(&request(0, 0, 1 << 20)).expect("asked");
    }
    std::thread::sleep(Duration::from_millis(400));
    assert!(until_end(&mut deaf).len() < 8 << 20);

    patient.write_all(&request(0, 4096, 512)).expect("asked");
    let mut read = [1; 16 + 512];
    patient.read_exact(&mut read).expect("read");

    // A write of which not all came has not happened, as long as it was one piece.
    assert_eq!(read[4..8], [0; 4]);
    assert_eq!(read[16..], [0; 512]);
}

#[test]
fn a_handshake_has_a_deadline_however_slowly_it_goes_on() {
    let serving = Serving::start(|options| options.handshake = Duration::from_millis(300));
    let mut silent = serving.connect();
    let mut slow = serving.greeted();
    let begun = Instant::now();
    for byte in option(3, &[]).repeat(30) {
        if slow.write_all(&[byte]).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }

    until_end(&mut slow);
    until_end(&mut silent);

    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
    serving.assert_told("takes too long");
    serving.assert_serves();
}

#[test]
fn a_flood_is_sent_away_and_does_not_disturb_who_is_there() {
    let serving = Serving::start(|options| options.most_clients = 4);
    let mut inside: Vec<UnixStream> = (0..4).map(|_| serving.let_in()).collect();

    for _ in 0..200 {
        assert_eq!(until_end(&mut serving.connect()), [0; 0]);
    }

    for stream in &mut inside {
        stream.write_all(&request(0, 0, 512)).expect("asked");
        stream.read_exact(&mut [0; 16 + 512]).expect("served");
    }
    serving.assert_told("sent away");
    drop(inside);
    let end = Instant::now() + LONG;
    while NbdDevice::open_source(&serving.address(), &NbdOptions::default()).is_err() {
        assert!(Instant::now() < end, "places are free again");
    }
}

#[test]
fn the_server_ends_at_once_whatever_its_clients_do() {
    let serving = Serving::start(|_| {});
    let _silent = serving.connect();
    let _greeted = serving.greeted();
    let _idle = serving.let_in();
    let mut writing = serving.let_in();
    writing
        .write_all(&[request(1, 0, 4096), vec![1; 100]].concat())
        .expect("said");
    let mut deaf = serving.let_in();
    for _ in 0..8 {
        deaf.write_all(&request(0, 0, 1 << 20)).expect("asked");
    }
    std::thread::sleep(Duration::from_millis(50));
    let begun = Instant::now();

    let served = serving.server.shutdown();

    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(served.clients, 5);
    assert_eq!(serving.told.lock().expect("no panic")[..], [""; 0]);
    UnixStream::connect(serving.place.path().join("socket")).expect_err("nobody listens");
}
