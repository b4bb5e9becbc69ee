//! A client of NBD that says what the input says: no panic, no wait, no memory beyond the limits; and every answer is sound and
//! is what a plain array of bytes says.
#![no_main]

// The server's protocol is private to its crate, so it is included.
#[allow(dead_code)]
#[path = "../../crates/blockferry-nbd/src/server"]
mod server {
    pub(crate) const MOST_REQUEST_BYTES: u32 = 32 * 1024 * 1024;

    pub(crate) mod disk;
    pub(crate) mod requests;
    pub(crate) mod welcome;
}
#[allow(dead_code)]
#[path = "../../crates/blockferry-nbd/src/wire.rs"]
mod wire;

use std::io::{self, Read, Write};
use std::sync::Arc;

use blockferry_device::{CopyOnWrite, MemoryDevice};
use libfuzzer_sys::fuzz_target;
use server::disk::NbdExport;
use server::requests::Requests;
use server::welcome::{Agreed, welcome};
use wire::{Fields, REQUEST_BYTES, Reply, Request, SIMPLE_BYTES, allocation, chunk, kind};

/// Not a whole number of pages.
const DISK_BYTES: usize = 3 * 4096 + 700;

/// What the client says, and what it hears.
struct Script<'s> {
    left: &'s [u8],
    heard: Vec<u8>,
}

impl Read for Script<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.left.read(buffer)
    }
}

impl Write for Script<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.heard.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// The first byte says whether the client may write.
fuzz_target!(|input: &[u8]| {
    let Some((how, said)) = input.split_first() else {
        return;
    };
    let mut model: Vec<u8> = (0..DISK_BYTES).map(|at| (at / 1000) as u8).collect();
    let disk = Arc::new(MemoryDevice::from_bytes("disk", model.clone()));
    let export = match how & 1 {
        0 => NbdExport::read_only("disk", disk),
        _ => {
            let scratch = MemoryDevice::from_bytes("scratch", vec![0xee; DISK_BYTES]);
            let target = CopyOnWrite::new(disk, Arc::new(scratch)).expect("large enough");
            NbdExport::writable("disk", Arc::new(target))
        }
    };
    let export = export.expect("it can be served");
    let mut script = Script {
        left: said,
        heard: Vec::new(),
    };
    let Ok(Some(agreed)) = welcome(&mut script, &export) else {
        return;
    };
    let requests = script.left;
    let mut answers = Vec::new();
    let failed = |error: &blockferry_device::Error| panic!("the disk fails: {error}");
    // One worker answers in the order of the requests.
    drop(Requests::new((requests, &mut answers), &export, agreed, &failed).work());
    check(requests, &answers, agreed, &mut model);
});

/// Reads requests and answers side by side.
fn check(said: &[u8], heard: &[u8], agreed: Agreed, model: &mut [u8]) {
    let (mut said, mut heard) = (Fields(said), Fields(heard));
    while let Some(header) = said.bytes(REQUEST_BYTES) {
        let Some(request) = Request::of(header.try_into().expect("28 bytes")) else {
            break;
        };
        if request.kind == kind::DISCONNECT {
            break;
        }
        let mut payload: &[u8] = &[];
        if request.kind == kind::WRITE {
            let whole = request.length <= server::MOST_REQUEST_BYTES;
            match said.bytes(request.length as usize) {
                Some(bytes) if whole => payload = bytes,
                _ => break,
            }
        }
        let start = usize::try_from(request.offset).unwrap_or(usize::MAX);
        let range = start..start.saturating_add(request.length as usize);
        let done = answer(&mut heard, &request, agreed, model.get(range.clone()));
        if let (true, Some(held)) = (done, model.get_mut(range)) {
            match request.kind {
                kind::WRITE => held.copy_from_slice(payload),
                kind::TRIM | kind::WRITE_ZEROES => held.fill(0),
                _ => {}
            }
        }
    }
    assert!(
        heard.0.is_empty(),
        "{} bytes that nobody asked for",
        heard.0.len()
    );
}

/// Reads one answer; whether it says that all is well. `held` is what the disk holds there, if it is within.
fn answer(heard: &mut Fields<'_>, request: &Request, agreed: Agreed, held: Option<&[u8]>) -> bool {
    let mut read = 0;
    loop {
        let header = heard.bytes(SIMPLE_BYTES).expect("an answer");
        let done = match wire::reply(header.try_into().expect("16 bytes")).expect("an answer") {
            Reply::Simple { error, cookie } => {
                assert_eq!(cookie, request.cookie);
                assert!(!agreed.structured || request.kind != kind::READ);
                if request.kind == kind::READ && error == 0 {
                    let bytes = heard.bytes(request.length as usize).expect("data");
                    assert!(Some(bytes) == held);
                }
                return error == 0;
            }
            Reply::Chunk { done, kind, cookie } => {
                assert!(agreed.structured && cookie == request.cookie);
                let length = heard.u32().expect("a length");
                let mut body = Fields(heard.bytes(length as usize).expect("a whole chunk"));
                match kind {
                    chunk::NONE => assert!(done && length == 0),
                    chunk::DATA => {
                        let offset = body.u64().expect("an offset");
                        assert_eq!(offset, request.offset + read);
                        let from = usize::try_from(read).expect("small");
                        let held = held.expect("within the disk");
                        assert!(body.0 == &held[from..from + body.0.len()]);
                        read += body.0.len() as u64;
                    }
                    chunk::BLOCK_STATUS => told_runs(body, request, held.expect("within")),
                    _ => {
                        assert!(done && kind == chunk::ERROR && length == 6);
                        return false;
                    }
                }
                done
            }
        };
        if done {
            assert!(request.kind != kind::READ || read == u64::from(request.length));
            return true;
        }
    }
}

fn told_runs(mut body: Fields<'_>, request: &Request, held: &[u8]) {
    assert_eq!(body.u32(), Some(server::welcome::ALLOCATION_ID));
    assert!(!body.0.is_empty());
    let mut at = 0;
    while let Some(length) = body.u32() {
        let told = body.u32().expect("flags");
        let run = &held[at..at + length as usize];
        assert!(!run.is_empty() && at < request.length as usize);
        assert!(told & allocation::IS_ZERO == 0 || run.iter().all(|byte| *byte == 0));
        at += run.len();
    }
}
