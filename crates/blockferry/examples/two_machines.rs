//! A source and a target on two machines, over streams of the caller's own:
//! `cargo run -p blockferry --example two_machines -- [DIRECTORY]`.
//!
//! The two ends here are a pair of sockets in one process. A service puts its own streams in a [`Link`]: what it has
//! authenticated and encrypted, for neither happens in it.
#![expect(clippy::print_stdout, reason = "an example talks")]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs, thread};

use blockferry::{
    Connection, Context, Deadlines, Link, Mode, SourceOptions, SyncOptions, Target, TargetOptions,
    open_source, serve_source, sync_from_peer,
};

type Failure = Box<dyn Error + Send + Sync>;

/// The machine that has the new content: serves until the other side is done.
fn source_machine(disk: &Path, link: Link) -> Result<(), Failure> {
    let source = open_source(disk, SourceOptions::default())?;
    let connection = Connection::open(link, Deadlines::default())?;
    let receipt = serve_source(&source, connection, 2, &Context::default())?;
    println!(
        "source: the other side says {} bytes of receipt",
        receipt.len()
    );
    Ok(())
}

/// The machine that has the old content.
fn target_machine(disk: &Path, states: &Path, link: Link) -> Result<(), Failure> {
    let mut target = Target::open(disk, &TargetOptions::new(states))?;
    let connection = Connection::open(link, Deadlines::default())?;
    let mut options = SyncOptions::default();
    options.mode = Mode::Delta;
    let receipt = sync_from_peer(connection, &mut target, &options, &Context::default())?;
    println!(
        "target: {} of {} bytes differed, {} bytes came over the wire",
        receipt.changed_bytes.unwrap_or_default(),
        receipt.source_bytes,
        receipt.sent_bytes
    );
    Ok(())
}

fn main() -> Result<(), Failure> {
    let place = PathBuf::from(
        env::args()
            .nth(1)
            .unwrap_or_else(|| "two-machines".to_owned()),
    );
    fs::create_dir_all(&place)?;
    let (old, new) = (place.join("old.raw"), place.join("new.raw"));
    let mut image: Vec<u8> = (0..=255).cycle().take(8 << 20).collect();
    fs::write(&old, &image)?;
    image[5 << 20] ^= 0xFF;
    fs::write(&new, &image)?;

    let (here, there) = Link::pair()?;
    let serving = thread::spawn(move || source_machine(&new, there));
    target_machine(&old, &place.join("states"), here)?;
    serving
        .join()
        .map_err(|_panic| "the source's side panicked")??;
    assert!(fs::read(&old)? == image, "the target is what the source is");
    Ok(())
}
