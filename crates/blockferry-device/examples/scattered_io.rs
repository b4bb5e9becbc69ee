//! Measures the hot path of applying a delta: thousands of short scattered runs written, flushed and read
//! back from the medium, buffered and past the cache.
//!
//! `cargo run --release -p blockferry-device --example scattered_io -- DIRECTORY [GIB]`
#![expect(clippy::print_stdout, reason = "prints its table")]

use std::path::Path;
use std::time::{Duration, Instant};

use blockferry_device::{
    Access, AlignedBuffer, BlockSource, BlockTarget, OsFile, ReadRequest, Result, WriteMode,
    WriteRequest,
};

const RUNS: u64 = 7000;
const PAGE: usize = 4096;
const ROUNDS: usize = 5;

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let directory = arguments.get(1).map_or(".", String::as_str);
    let gibibytes: u64 = arguments.get(2).map_or(Ok(2), |text| text.parse())?;
    let path = Path::new(directory).join("scattered-io.raw");
    fill(&path, gibibytes << 30)?;
    println!("mode      write    flush    medium   (milliseconds)");
    for _ in 0..ROUNDS {
        for mode in [WriteMode::Buffered, WriteMode::Direct] {
            let [write, flush, medium] = measure(&path, mode, gibibytes << 30)?;
            println!("{mode:<9?} {write:<8.1?} {flush:<8.1?} {medium:<8.1?}");
        }
    }
    Ok(std::fs::remove_file(path)?)
}

/// Real data everywhere, as a disk in use has it: no holes, no unwritten extents.
fn fill(path: &Path, size: u64) -> Result<()> {
    let _absent = std::fs::remove_file(path);
    let file = OsFile::create_new(path, WriteMode::Direct)?;
    let mut buffer = AlignedBuffer::zeroed(4 << 20);
    buffer.fill(0xA5);
    let started = Instant::now();
    for offset in (0..size).step_by(buffer.len()) {
        file.write_at(offset, &buffer)?;
    }
    file.flush()?;
    println!("filled in {:.2?}", started.elapsed());
    let started = Instant::now();
    for offset in (0..size).step_by(1 << 20) {
        file.read_at(offset, &mut buffer[..1 << 20])?;
    }
    println!(
        "read uncached, 1 MiB each, one at a time, in {:.2?}",
        started.elapsed()
    );
    Ok(())
}

fn measure(path: &Path, mode: WriteMode, size: u64) -> Result<[Duration; 3]> {
    let file = OsFile::open(path, Access::ReadWrite, mode)?;
    let runs = runs(size);
    let total: usize = runs.iter().map(|&(_, length)| length).sum();
    let mut content = AlignedBuffer::zeroed(total);
    let mut value = 0u8;
    content.fill_with(|| {
        value = value.wrapping_add(1);
        value
    });

    let mut rest = &content[..];
    let mut writes = Vec::new();
    for &(offset, length) in &runs {
        let (bytes, later) = rest.split_at(length);
        writes.push(WriteRequest { offset, bytes });
        rest = later;
    }
    let started = Instant::now();
    file.write_batch(&writes)?;
    let written = started.elapsed();
    file.flush()?;
    let flushed = started.elapsed();

    let mut back = AlignedBuffer::zeroed(total);
    let mut rest = &mut back[..];
    let mut reads = Vec::new();
    for &(offset, length) in &runs {
        let (buffer, later) = rest.split_at_mut(length);
        reads.push(ReadRequest { offset, buffer });
        rest = later;
    }
    let started = Instant::now();
    file.read_medium(&mut reads)?;
    let medium = started.elapsed();
    assert!(back[..] == content[..], "what was written is read back");
    file.drop_cache();
    Ok([written, flushed - written, medium])
}

/// Runs of 4 to 36 KiB, most of them short, spread evenly with some noise: about 65 MiB.
fn runs(size: u64) -> Vec<(u64, usize)> {
    let stride = size / RUNS / 4096 * 4096;
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut runs = Vec::new();
    for run in 0..RUNS {
        let pages = [1, 1, 1, 1, 2, 2, 3, 9][usize::try_from(random() % 8).unwrap_or(0)];
        let noise = random() % (stride / 4096 - 9).max(1) * 4096;
        runs.push((run * stride + noise, pages * PAGE));
    }
    runs
}
