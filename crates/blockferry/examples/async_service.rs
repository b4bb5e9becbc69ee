//! A service that stays responsive while it syncs: `cargo run -p blockferry --example async_service`.
//!
//! blockferry blocks inside, on threads of its own. An async service gives it a blocking worker
//! (`tokio::task::spawn_blocking`, `smol::unblock`; here a plain thread) and keeps two things: the cancel token, and
//! the receiving end of a channel that the observer fills without ever waiting.
#![expect(clippy::print_stdout, reason = "an example talks")]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;
use std::{env, fs, thread};

use blockferry::{
    CancelToken, Context, Event, Receipt, SourceOptions, SyncOptions, Target, TargetOptions,
    open_source, sync,
};

/// A sync that runs elsewhere.
struct Job {
    events: Receiver<Event>,
    cancel: CancelToken,
    worker: JoinHandle<blockferry::Result<Receipt>>,
}

impl Job {
    fn start(source: PathBuf, target: PathBuf, states: PathBuf) -> Self {
        let (sender, events) = sync_channel(64);
        let cancel = CancelToken::new();
        let context = context(sender, &cancel);
        let worker = thread::spawn(move || {
            let mut target = Target::open(&target, &TargetOptions::new(states))?;
            let failed = |e: blockferry::device::Error| {
                blockferry::Error::new(blockferry::ErrorKind::Source, e.to_string())
            };
            let source = open_source(&source, SourceOptions::default()).map_err(failed)?;
            sync(source, &mut target, &SyncOptions::default(), &context)
        });
        Self {
            events,
            cancel,
            worker,
        }
    }
}

fn context(sender: SyncSender<Event>, cancel: &CancelToken) -> Context {
    let mut context = Context::new().with_observer(move |event: &Event| {
        // A full channel loses an event rather than hold the sync up.
        sender.try_send(event.clone()).ok();
    });
    context.cancel = cancel.clone();
    context
}

fn main() -> Result<(), Box<dyn Error>> {
    let place = PathBuf::from(
        env::args()
            .nth(1)
            .unwrap_or_else(|| "target/service".into()),
    );
    make_images(&place)?;
    let job = Job::start(place.join("new.raw"), place.join("old.raw"), place.clone());
    loop {
        // Here the service does its other work; a request to stop would call this.
        let _stop = || job.cancel.cancel();
        match job.events.recv_timeout(Duration::from_millis(100)) {
            Ok(Event::Progress(p)) => println!("{} {}/{}", p.phase, p.done_bytes, p.total_bytes),
            Ok(other) => println!("{other:?}"),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    let receipt = job
        .worker
        .join()
        .map_err(|_panic| "the worker panicked")??;
    println!(
        "{}: {:?} bytes changed",
        receipt.outcome, receipt.changed_bytes
    );
    Ok(())
}

fn make_images(place: &Path) -> std::io::Result<()> {
    fs::create_dir_all(place)?;
    let old: Vec<u8> = (0..32u32 << 20).map(|n| (n / 4096 % 251) as u8).collect();
    let mut new = old.clone();
    new[1 << 20..][..10_000].fill(0xee);
    fs::write(place.join("old.raw"), old)?;
    fs::write(place.join("new.raw"), new)
}
