//! A server that says whatever it likes: every lie ends in an error, and none in a wait, a panic or a lot of memory.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

use blockferry_core::Extent;
use blockferry_device::{BlockSource, BlockTarget, ErrorKind, Result};
use blockferry_nbd::{NbdAddress, NbdDevice, NbdOptions};

const SIZE: u64 = 1 << 20;

#[expect(
    clippy::big_endian_bytes,
    reason = "the protocol is in network byte order"
)]
fn be(number: u64, bytes: usize) -> Vec<u8> {
    number.to_be_bytes()[8 - bytes..].to_vec()
}

fn greeting() -> Vec<u8> {
    [&b"NBDMAGICIHAVEOPT"[..], &[0, 3]].concat()
}

fn reply(option: u64, kind: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = be(0x0003_e889_0455_65a9, 8);
    bytes.extend(be(option, 4));
    bytes.extend(be(kind, 4));
    bytes.extend(be(body.len() as u64, 4));
    bytes.extend(body);
    bytes
}

const ACK: u64 = 1;
const UNSUPPORTED: u64 = (1 << 31) + 1;

fn export(size: u64, flags: u64) -> Vec<u8> {
    [be(0, 2), be(size, 8), be(flags, 2)].concat()
}

fn sizes(least: u64, most: u64) -> Vec<u8> {
    [be(3, 2), be(least, 4), be(4096, 4), be(most, 4)].concat()
}

/// All that a sound server says until requests may come, whatever it is asked.
fn sound() -> Vec<u8> {
    let context = [be(9, 4), b"base:allocation".to_vec()].concat();
    [
        greeting(),
        reply(8, ACK, &[]),
        reply(10, 4, &context),
        reply(10, ACK, &[]),
        // Has flags, flush, write zeroes.
        reply(7, 3, &export(SIZE, 0b100_0101)),
        reply(7, ACK, &[]),
    ]
    .concat()
}

/// What a server says of the request with this cookie.
fn chunk(flags: u64, kind: u64, cookie: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = be(0x668e_33ef, 4);
    bytes.extend(be(flags, 2));
    bytes.extend(be(kind, 2));
    bytes.extend(be(cookie, 8));
    bytes.extend(be(body.len() as u64, 4));
    bytes.extend(body);
    bytes
}

/// Does something with an export of a server that says `words` to everyone who comes.
fn with_server<T>(words: &[u8], work: impl FnOnce(&NbdAddress) -> T) -> T {
    let place = tempfile::tempdir().expect("a directory");
    let socket = place.path().join("socket");
    let listener = UnixListener::bind(&socket).expect("bound");
    let words = words.to_vec();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (Ok(mut stream), words) = (stream, words.clone()) else {
                return;
            };
            thread::spawn(move || {
                let deaf = stream.try_clone().and_then(|mut ear: UnixStream| {
                    thread::spawn(move || while ear.read(&mut [0; 65_536]).is_ok_and(|n| n > 0) {});
                    stream.write_all(&words)
                });
                // A silent server, not one that hangs up.
                thread::sleep(Duration::from_secs(60));
                deaf.ok();
            });
        }
    });
    work(&NbdAddress::unix(&socket, "").expect("an address"))
}

fn options() -> NbdOptions {
    let mut options = NbdOptions::default();
    options.silence = Duration::from_millis(200);
    options
}

fn opened(words: &[u8]) -> Result<std::sync::Arc<NbdDevice>> {
    with_server(words, |address| NbdDevice::open_target(address, &options()))
}

#[test]
fn what_is_no_sound_handshake_is_refused_and_says_why() {
    let until_go = [greeting(), reply(8, UNSUPPORTED, &[])].concat();
    let gone = |infos: &[Vec<u8>]| {
        let infos = infos.iter().map(|info| reply(7, 3, info));
        let infos: Vec<u8> = infos.flatten().collect();
        [until_go.clone(), infos, reply(7, ACK, &[])].concat()
    };
    let refused = |kind: u64, text: &[u8]| [until_go.clone(), reply(7, kind, text)].concat();
    let mut long = [until_go.clone(), reply(7, 3, &[])].concat();
    let length = long.len();
    long[length - 4..].copy_from_slice(&[0xff; 4]);
    for (words, told) in [
        (
            b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(),
            "expected NBDMAGIC, found \"SSH-2.0-\"",
        ),
        (
            [&b"NBDMAGIC"[..], &be(0x0000_4202_8186_1253, 8), &[0; 160]].concat(),
            "old handshake",
        ),
        (
            [&b"NBDMAGICIHAVEOPT"[..], &[0, 0]].concat(),
            "old handshake",
        ),
        ([greeting(), vec![0; 20]].concat(), "no reply to option 8"),
        (
            [greeting(), reply(7, ACK, &[])].concat(),
            "no reply to option 8",
        ),
        (long, "of 4294967295 bytes: expected at most"),
        (gone(&[]), "how large"),
        (gone(&[sizes(1, 1 << 25)]), "how large"),
        (
            gone(&[export(SIZE, 5), sizes(3, 1 << 25)]),
            "no sound range",
        ),
        (
            gone(&[export(SIZE, 5), sizes(0, 1 << 25)]),
            "no sound range",
        ),
        (gone(&[export(SIZE, 5), sizes(4096, 512)]), "no sound range"),
        (gone(&[export(u64::MAX, 5)]), "18446744073709551615 bytes"),
        (gone(&[export(SIZE, 1)]), "no flush"),
        (gone(&[export(SIZE, 7)]), "read-only"),
        (refused((1 << 31) + 5, b""), "TLS"),
        (
            refused((1 << 31) + 6, b"a\x1b[2Jb"),
            "no export of that name: a[2Jb",
        ),
        (refused((1 << 31) + 2, b""), "let us in"),
        (refused((1 << 31) + 77, b""), "error 77"),
        (refused(99, b""), "unexpected kind, 99"),
        (
            [until_go.clone(), reply(7, 3, &export(SIZE, 5)).repeat(1001)].concat(),
            "without end",
        ),
    ] {
        let error = opened(&words).expect_err(told);

        assert!(error.to_string().contains(told), "{told}: {error}");
    }
    opened(&gone(&[
        export(SIZE, 5),
        sizes(512, u64::from(u32::MAX)),
        be(77, 2),
    ]))
    .expect("sound");
}

/// What a read of two pages from offset 4096 on comes to when these are the answers.
fn read(answers: &[u8]) -> Result<Vec<u8>> {
    with_server(&[&sound(), answers].concat(), |address| {
        let source = NbdDevice::open_source(address, &options())?;
        let mut buffer = vec![9; 8192];
        source.read_at(4096, &mut buffer).map(|()| buffer)
    })
}

fn data(flags: u64, offset: u64, bytes: &[u8]) -> Vec<u8> {
    chunk(flags, 1, 1, &[be(offset, 8), bytes.to_vec()].concat())
}

fn hole(flags: u64, offset: u64, bytes: u64) -> Vec<u8> {
    chunk(flags, 2, 1, &[be(offset, 8), be(bytes, 4)].concat())
}

#[test]
fn answers_in_parts_are_put_together() {
    let parts = [
        data(0, 8192, &[1; 4096]),
        chunk(0, 0, 1, &[]),
        hole(0, 4096, 1024),
        data(1, 5120, &[2; 3072]),
    ];

    let read = read(&parts.concat()).expect("sound");

    assert_eq!(read, [vec![0; 1024], vec![2; 3072], vec![1; 4096]].concat());
}

#[test]
fn answers_that_were_not_asked_for_end_the_connection() {
    let simple =
        |error: u64, cookie: u64| [be(0x6744_6698, 4), be(error, 4), be(cookie, 8)].concat();
    let error_chunk = |length: u64| {
        let mut bytes = chunk(1, 1 << 15, 1, &[]);
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&be(length, 4));
        bytes
    };
    for (answers, told) in [
        (vec![0; 16], "no known kind"),
        (simple(0, 2), "what was not asked"),
        (simple(0, 0), "what was not asked"),
        (
            [data(1, 4096, &[1; 8192]), data(1, 4096, &[1; 8192])].concat(),
            "",
        ),
        (data(1, 4095, &[1; 8192]), "not asked for"),
        (data(1, 4097, &[1; 8192]), "not asked for"),
        (data(1, u64::MAX, &[1; 8192]), "not asked for"),
        (hole(1, 4096, 8193), "not asked for"),
        (hole(1, 0, 4096), "not asked for"),
        (
            [hole(0, 4096, 8192), hole(1, 4096, 1)].concat(),
            "more than was asked",
        ),
        (data(1, 4096, &[1; 4096]), "less than was asked"),
        (chunk(1, 0, 1, &[]), "less than was asked"),
        (chunk(0, 0, 1, &[]).repeat(100), "without end"),
        (hole(0, 4096, 0).repeat(100), "without end"),
        (chunk(1, 0, 1, &[0]), "does not belong"),
        (chunk(1, 1, 1, &[0; 8]), "does not belong"),
        (chunk(1, 5, 1, &[0; 12]), "does not belong"),
        (chunk(1, 77, 1, &[]), "does not belong"),
        (error_chunk(5), "does not belong"),
        (error_chunk(1 << 31), "does not belong"),
        (Vec::new(), "silent"),
        (data(1, 4096, &[1; 8192])[..500].to_vec(), "silent"),
    ] {
        let outcome = read(&answers);

        if told.is_empty() {
            outcome.expect("what comes behind it is another matter");
            continue;
        }
        let error = outcome.expect_err(told);
        assert_eq!(error.kind(), ErrorKind::Lost);
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        let said = format!("{error} {cause:?}");
        assert!(said.contains(told), "{told}: {said}");
    }
}

#[test]
fn an_error_in_words_is_told_without_what_a_terminal_would_obey() {
    let words = b"no\x1b[2Jdisk";
    let body = [be(5, 4), be(words.len() as u64, 2), words.to_vec()].concat();

    let error = read(&chunk(1, (1 << 15) + 1, 1, &body)).expect_err("EIO");

    let cause = std::error::Error::source(&error)
        .expect("a cause")
        .to_string();
    assert!(cause.contains("(no[2Jdisk)"), "{cause}");
}

#[test]
fn block_status_that_says_nothing_is_an_error_and_no_endless_question() {
    for body in [
        be(9, 4),
        [be(9, 4), be(0, 4), be(0, 4)].concat(),
        [be(8, 4), be(4096, 4), be(0, 4)].concat(),
    ] {
        let words = [sound(), chunk(1, 5, 1, &body)].concat();
        with_server(&words, |address| {
            let target = NbdDevice::open_target(address, &options()).expect("sound");

            target.status_at(0).expect_err("nothing is told");

            target
                .punch(Extent::from_range(0..4096))
                .expect_err("nobody answers");
        });
    }
}
