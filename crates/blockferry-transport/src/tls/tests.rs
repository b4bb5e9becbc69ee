use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::{Authority, Identity, Peer, file};
use crate::error::{Error, ErrorKind};
use crate::{Connection, Deadlines, Message};

const SOON: Duration = Duration::from_secs(20);

/// An authority in a directory of its own, and hosts with certificates of it.
struct Site {
    dir: tempfile::TempDir,
    authority: Authority,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open(dir.path()).unwrap();
        Self { dir, authority }
    }

    fn host_dir(&self, names: &[&str], days: u32) -> PathBuf {
        let dir = self.dir.path().join(names[0]);
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let issued = self.authority.issue(&names, days).unwrap();
        issued.write(&dir, &self.authority).unwrap();
        dir
    }

    fn host(&self, names: &[&str]) -> Identity {
        Identity::from_dir(&self.host_dir(names, 30)).unwrap()
    }
}

type Accepted = Result<(Connection, Peer), Error>;

/// Answers one connection, as a server does.
fn answer(identity: Identity, time: Duration) -> (u16, JoinHandle<Accepted>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let answered = thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        let (link, peer) = identity.accept(socket, "a client", time)?;
        Ok((Connection::open(link, Deadlines::default())?, peer))
    });
    (port, answered)
}

fn call(identity: &Identity, port: u16, name: &str) -> Result<Connection, Error> {
    let socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
    Connection::open(identity.connect(socket, name, SOON)?, Deadlines::default())
}

/// What came of it on the side that calls, and on the side that answers.
fn meet(client: &Identity, server: &Identity, name: &str) -> (Result<Connection, Error>, Accepted) {
    let (port, answered) = answer(server.clone(), SOON);
    let called = call(client, port, name);
    (called, answered.join().unwrap())
}

fn data(bytes: usize) -> Message {
    Message::Data {
        blocks: Vec::new(),
        runs: Vec::new(),
        frame: vec![7; bytes],
    }
}

#[test]
fn hosts_of_one_authority_know_each_other_by_name_and_talk() {
    let site = Site::new();
    let (near, far) = (
        site.host(&["near.example"]),
        site.host(&["far.example", "127.0.0.1"]),
    );

    for name in ["far.example", "127.0.0.1"] {
        let (called, answered) = meet(&near, &far, name);
        let (called, (answered, peer)) = (called.unwrap(), answered.unwrap());

        assert!(
            peer.is("near.example")
                && !peer.is("far.example")
                && !peer.is("example")
                && !peer.is("no name")
        );
        assert_eq!(peer.name().as_deref(), Some("near.example"));
        assert_eq!((called.label(), answered.label()), (name, "a client"));
        called.trust();
        answered.trust();
        let sending = thread::spawn(move || {
            for _ in 0..64 {
                answered.outbox().send_data(data(1_000_000)).unwrap();
            }
            let heard = answered.receive().unwrap();
            answered.finish();
            heard
        });
        called.outbox().send(Message::Examine).unwrap();
        for _ in 0..64 {
            assert_eq!(called.receive().unwrap(), data(1_000_000));
        }
        assert_eq!(called.receive().unwrap_err().kind(), ErrorKind::Lost);
        assert_eq!(sending.join().unwrap(), Message::Examine);
    }
}

#[test]
fn a_host_of_another_authority_is_refused_by_both_sides() {
    let (site, other) = (Site::new(), Site::new());
    let (near, far, stranger) = (
        site.host(&["near"]),
        site.host(&["far"]),
        other.host(&["near"]),
    );

    let (called, answered) = meet(&stranger, &far, "far");
    assert_eq!(called.unwrap_err().kind(), ErrorKind::Credentials);
    assert!(answered.is_err());

    let trusting = Identity::new(
        site.authority.certificate().as_bytes(),
        &fs::read(other.dir.path().join("near").join(file::CERTIFICATE)).unwrap(),
        &fs::read(other.dir.path().join("near").join(file::KEY)).unwrap(),
    );
    let (called, answered) = meet(&trusting.unwrap(), &far, "far");
    let called = called.unwrap_err();
    assert_eq!(called.kind(), ErrorKind::Credentials, "{called}");
    assert!(
        called.to_string().contains("refuses our certificate"),
        "{called}"
    );
    assert_eq!(answered.unwrap_err().kind(), ErrorKind::Credentials);

    let (called, _answered) = meet(&near, &stranger, "near");
    assert_eq!(called.unwrap_err().kind(), ErrorKind::Credentials);
}

#[test]
fn a_server_must_have_the_name_that_was_asked_for_and_time_left() {
    let site = Site::new();
    let (near, far) = (site.host(&["near"]), site.host(&["far"]));

    let (called, _answered) = meet(&near, &far, "elsewhere");
    assert_eq!(called.unwrap_err().kind(), ErrorKind::Credentials);

    let expired = Identity::from_dir(&site.host_dir(&["late"], 0)).unwrap();
    thread::sleep(Duration::from_millis(1100));
    let (called, answered) = meet(&near, &expired, "late");
    assert_eq!(called.unwrap_err().kind(), ErrorKind::Credentials);
    assert!(answered.is_err());
    let (called, answered) = meet(&expired, &far, "far");
    assert_eq!(answered.unwrap_err().kind(), ErrorKind::Credentials);
    assert_eq!(called.unwrap_err().kind(), ErrorKind::Credentials);
}

#[test]
fn who_is_no_tls_client_or_says_nothing_is_sent_away_in_time() {
    let site = Site::new();
    let far = site.host(&["far"]);

    let (port, answered) = answer(far.clone(), SOON);
    let mut plain = TcpStream::connect(("127.0.0.1", port)).unwrap();
    plain.write_all(&crate::Preamble::OURS.encode()).unwrap();
    assert_eq!(
        answered.join().unwrap().unwrap_err().kind(),
        ErrorKind::Protocol
    );

    for trickles in [false, true] {
        let begun = Instant::now();
        let (port, answered) = answer(far.clone(), Duration::from_millis(500));
        let mut slow = TcpStream::connect(("127.0.0.1", port)).unwrap();
        while trickles && !answered.is_finished() && begun.elapsed() < SOON {
            // The head of a record whose body never comes to its end.
            let next = if begun.elapsed() < Duration::from_millis(50) {
                &[22, 3, 1, 64, 0][..]
            } else {
                &[0]
            };
            thread::sleep(Duration::from_millis(60));
            if slow.write_all(next).is_err() {
                break;
            }
        }
        let error = answered.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        assert!(begun.elapsed() < SOON);
    }
}

/// A socket that is closed with bytes in it that nobody took resets the connection, and what is still on its way is
/// lost.
#[test]
fn the_last_word_arrives_although_the_peer_never_stops_to_talk() {
    const MESSAGES: usize = 24;
    let site = Site::new();
    let (near, far) = (site.host(&["near"]), site.host(&["far"]));
    let (called, answered) = meet(&near, &far, "far");
    let (called, (answered, _)) = (called.unwrap(), answered.unwrap());
    answered.trust();
    called.trust();
    let outbox = called.outbox().clone();
    let talking = thread::spawn(move || while outbox.send_data(data(200_000)).is_ok() {});
    let finishing = thread::spawn(move || {
        for _ in 0..MESSAGES {
            answered.outbox().send_data(data(1_000_000)).unwrap();
        }
        answered.finish();
    });

    let mut received = 0;
    while let Ok(message) = called.receive() {
        assert_eq!(message, data(1_000_000));
        received += 1;
        // So that the end finds the way full.
        thread::sleep(Duration::from_millis(20));
    }

    assert_eq!(received, MESSAGES);
    drop(called);
    talking.join().unwrap();
    finishing.join().unwrap();
}

#[test]
fn an_end_that_is_dropped_is_noticed_at_once() {
    let site = Site::new();
    let (called, answered) = meet(&site.host(&["near"]), &site.host(&["far"]), "far");
    let (called, (answered, _)) = (called.unwrap(), answered.unwrap());
    let begun = Instant::now();

    drop(answered);

    assert_eq!(called.receive().unwrap_err().kind(), ErrorKind::Lost);
    assert!(
        begun.elapsed() < Duration::from_secs(9),
        "sooner than any deadline"
    );
}

#[test]
fn an_authority_that_is_opened_again_is_the_same_and_its_half_is_refused() {
    let site = Site::new();
    let early = site.host(&["early"]);
    let again = Authority::open(site.dir.path()).unwrap();
    assert_eq!(again.certificate(), site.authority.certificate());
    let issued = again.issue(&["late".to_owned()], 30).unwrap();
    issued.write(&site.dir.path().join("late"), &again).unwrap();
    let late = Identity::from_dir(&site.dir.path().join("late")).unwrap();

    let (called, answered) = meet(&early, &late, "late");
    assert!(called.is_ok() && answered.is_ok());

    assert!(
        issued.write(&site.dir.path().join("late"), &again).is_err(),
        "nothing is overwritten"
    );
    assert_eq!(
        again.issue(&[], 1).unwrap_err().kind(),
        ErrorKind::Credentials
    );
    fs::remove_file(site.dir.path().join("ca.pem")).unwrap();
    let error = Authority::open(site.dir.path()).unwrap_err();
    assert!(error.to_string().contains("without"), "{error}");
}

fn chain(error: &Error) -> String {
    let mut text = format!("{error} {error:?}");
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(&format!(" {error} {error:?}"));
        cause = error.source();
    }
    text
}

fn change_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn keys_are_for_their_owner_alone_and_are_never_told() {
    let site = Site::new();
    let dir = site.host_dir(&["near"], 30);
    let key_file = dir.join(file::KEY);
    let mut key = String::new();
    fs::File::open(&key_file)
        .unwrap()
        .read_to_string(&mut key)
        .unwrap();
    let canary = key.lines().nth(1).unwrap().to_owned();
    let mut told = format!(
        "{:?} {:?}",
        Identity::from_dir(&dir).unwrap(),
        site.authority
    );
    told.push_str(&format!(
        "{:?}",
        site.authority.issue(&["x".to_owned()], 1).unwrap()
    ));
    assert_eq!(
        fs::metadata(&key_file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert_eq!(
        fs::metadata(&dir).unwrap().permissions().mode() & 0o777,
        0o700
    );

    for mode in [0o640, 0o604, 0o622] {
        change_mode(&key_file, mode);
        let error = Identity::from_dir(&dir).unwrap_err();
        assert!(error.to_string().contains("mode"), "{error}");
        told.push_str(&chain(&error));
    }
    change_mode(&key_file, 0o600);
    for damaged in [
        key.replace("-----END", "-----FIN"),
        key.replace("PRIVATE KEY", "SECRET"),
        key.replacen(&canary[..4], "!!!!", 1),
        canary.clone(),
    ] {
        fs::write(&key_file, damaged).unwrap();
        told.push_str(&chain(&Identity::from_dir(&dir).unwrap_err()));
    }
    let authority_key = site.dir.path().join("ca.key");
    change_mode(&authority_key, 0o644);
    told.push_str(&chain(&Authority::open(site.dir.path()).unwrap_err()));
    change_mode(&authority_key, 0o600);
    for other in [&canary, &key] {
        fs::write(&authority_key, other).unwrap();
        told.push_str(&chain(&Authority::open(site.dir.path()).unwrap_err()));
    }

    assert!(canary.len() > 40);
    for begin in (0..canary.len() - 12).step_by(4) {
        assert!(
            !told.contains(&canary[begin..begin + 12]),
            "a key was told: {told}"
        );
    }
}
