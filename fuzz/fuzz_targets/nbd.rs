//! A server of NBD that says what the input says: no panic, no wait, no memory beyond the limits; and what is read is
//! what came.
#![no_main]

// The client's protocol is private to its crate, so it is included.
#[allow(dead_code)]
#[path = "../../crates/blockferry-nbd/src/handshake.rs"]
mod handshake;
#[allow(dead_code)]
#[path = "../../crates/blockferry-nbd/src/transfer.rs"]
mod transfer;
#[allow(dead_code)]
#[path = "../../crates/blockferry-nbd/src/wire.rs"]
mod wire;

use std::io::{self, Read, Write};

use blockferry_device::{ReadRequest, WriteRequest};
use handshake::{Wanted, agree, greet, start_tls};
use libfuzzer_sys::fuzz_target;
use transfer::Transfer;
use wire::Command;

/// What the server says; what it hears is let go.
struct Script<'s> {
    left: &'s [u8],
    heard: usize,
}

impl Read for Script<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.left.read(buffer)
    }
}

impl Write for Script<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.heard += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// The first byte says what is asked for once the server has let us in.
fuzz_target!(|input: &[u8]| {
    let Some((how, said)) = input.split_first() else {
        return;
    };
    let mut stream = Script {
        left: said,
        heard: 0,
    };
    let contexts = [
        "base:allocation".to_owned(),
        "qemu:dirty-bitmap:b".to_owned(),
    ];
    let wanted = Wanted {
        export: "disk",
        contexts: &contexts[..usize::from(how & 3).min(2)],
        label: "the server",
    };
    let Ok(greeted) = greet(&mut stream, &wanted) else {
        return;
    };
    if how >> 5 == 7 && start_tls(&mut stream, &wanted).is_err() {
        return;
    }
    let Ok(export) = agree(&mut stream, &wanted, greeted) else {
        return;
    };
    assert!(export.unit_bytes.is_power_of_two() && export.most_bytes >= export.unit_bytes);
    assert!(export.most_bytes.is_multiple_of(export.unit_bytes));
    assert!(export.contexts.len() <= 1000);
    let (heard, mut next_cookie) = (stream.heard, 1);
    let mut transfer = Transfer {
        stream: &mut stream,
        label: "the server",
        next_cookie: &mut next_cookie,
        most_bytes: export.most_bytes,
    };
    let mut one = vec![0; 4096];
    let mut other = vec![0; 700];
    match how >> 2 & 7 {
        0..3 => {
            let mut requests = [(8192, &mut one), (100, &mut other)]
                .map(|(offset, buffer)| ReadRequest { offset, buffer });
            drop(transfer.read(&mut requests));
        }
        3 => {
            let requests =
                [(8192, &one), (100, &other)].map(|(offset, bytes)| WriteRequest { offset, bytes });
            if transfer.write(&requests).is_ok() {
                assert!(stream.heard - heard >= 4096 + 700);
            }
        }
        4 => drop(transfer.command(Command::Flush, 0, 0)),
        5 => drop(transfer.command(Command::WriteZeroes, 0, 4096)),
        _ => {
            for _ in 0..3 {
                if let Ok(runs) = transfer.block_status(9, 0, 1 << 20) {
                    assert!(!runs.is_empty() && runs.iter().all(|(bytes, _)| *bytes > 0));
                }
            }
        }
    }
});
