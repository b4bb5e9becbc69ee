//! The host of the source's role: reads the source on several threads and answers the target's side until the run is
//! over.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blockferry_core::{Geometry, RegionIndex, RegionLeaves};
use blockferry_device::{AlignedBuffer, BlockSource, Cancellable};
use blockferry_full_download::{Copying, Scratch};
use blockferry_pipeline::{
    BUFFER_BYTES, DataMap, DataRegions, Observer, block_in, read_padded, runs,
};
use blockferry_transport::message::{Begin, Source};
use blockferry_transport::{Connection, Message, Outbox, ShortDigests};
use crossbeam_channel::{Receiver, Sender, bounded, select};

use super::data::Packer;
use super::sampling::send_sample;
use super::source_role::{SourceJob, SourceRole};
use super::{block_number, events, failed_peer, lost, take_leaves, to_usize, violated};
use crate::error::{Error, ErrorKind, Result};
use crate::options::Context;

/// How often the caller's wish to end is looked at.
const TICK: Duration = Duration::from_millis(100);
/// How long a peer that was told to stop may take to say what is durable.
const STOPPING: Duration = Duration::from_secs(10);
/// How much harder pages are packed while the link is behind: that takes twice the time, and a twelfth off the bytes.
const HARDER: i32 = 3;

/// Lets the peer of `connection` sync from `source`, until it says what came of it, which is returned as it said it:
/// the JSON of its [`Receipt`](crate::Receipt). What happens on the peer's side goes to the observer, if the peer
/// tells.
///
/// # Errors
/// The source failed, the peer or its run failed, or the caller cancelled.
pub fn serve_source(
    source: &Arc<dyn BlockSource>,
    connection: Connection,
    threads: usize,
    context: &Context,
) -> Result<Vec<u8>> {
    connection.trust();
    let cancellable = Cancellable::new(Arc::clone(source), context.cancel.clone());
    let reading = Reading {
        source: Arc::new(cancellable),
        outbox: connection.outbox().clone(),
    };
    let threads = threads.clamp(1, 64);
    std::thread::scope(|scope| {
        let (jobs, waiting) = bounded::<(SourceJob, Option<Begin>)>(2 * threads);
        let (finish, finished) = bounded(2 * threads);
        for _ in 0..threads {
            let (waiting, finish) = (waiting.clone(), finish.clone());
            let reading = &reading;
            scope.spawn(move || reading.work(&waiting, &finish));
        }
        let mut host = Host {
            role: SourceRole::new(reading.source.size_bytes()),
            source: Arc::clone(&reading.source),
            begin: None,
            regions: None,
            under_way: 0,
            most: 2 * threads,
            stopping: false,
        };
        let mut outcome = host.run(&connection, &jobs, &finished, context);
        if let Err(error) = &outcome {
            say_failed(connection.outbox(), error);
            if error.kind() == ErrorKind::Cancelled
                && let Some(there) = outcome_there(&connection)
            {
                outcome = there;
            }
        }
        // Threads that wait to send find the link closed.
        connection.finish();
        outcome
    })
}

/// Tells the peer why this side ends, if it still listens.
fn say_failed(outbox: &Outbox, error: &Error) {
    if error.kind() != ErrorKind::Peer {
        // What was read already is worth having.
        let _nobody_listens = outbox.send_last(super::failure(error));
    }
}

/// What the run of a peer that was told to stop came to, if it says so in time: what is durable there, or that it was
/// decided before.
fn outcome_there(connection: &Connection) -> Option<Result<Vec<u8>>> {
    let end = Instant::now() + STOPPING;
    loop {
        match connection.receiver().recv_deadline(end).ok()?.ok()? {
            Message::Outcome(json) => return Some(Ok(json)),
            Message::Failed(failed) => return Some(Err(failed_peer(connection, &failed))),
            _of_the_run => {}
        }
    }
}

struct Host {
    role: SourceRole,
    source: Arc<dyn BlockSource>,
    begin: Option<Begin>,
    regions: Option<DataRegions>,
    under_way: usize,
    most: usize,
    /// To be answered when no work is under way.
    stopping: bool,
}

/// What a worker did.
enum Finished {
    Scanned(RegionLeaves, u64),
    Digested(RegionLeaves, u64),
    Answered(Option<Message>),
    Failed(Error),
}

impl Host {
    fn run(
        &mut self,
        connection: &Connection,
        jobs: &Sender<(SourceJob, Option<Begin>)>,
        finished: &Receiver<Finished>,
        context: &Context,
    ) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        loop {
            self.hand_out(jobs, &mut out);
            for message in out.drain(..) {
                connection.outbox().send(message).map_err(lost)?;
            }
            if self.stopping && self.under_way == 0 {
                self.stopping = false;
                connection
                    .outbox()
                    .send_data(Message::Stopped)
                    .map_err(lost)?;
            }
            context.check_cancelled()?;
            select! {
                recv(connection.receiver()) -> message => {
                    let message = message.unwrap_or_else(|_ended| connection.receive());
                    if let Some(outcome) = self.take(message.map_err(lost)?, connection, &mut out, &*context.observer)? {
                        return Ok(outcome);
                    }
                }
                recv(finished) -> done => {
                    self.under_way -= 1;
                    match done {
                        Ok(Finished::Scanned(leaves, read_bytes)) => {
                            self.role.scanned(leaves, read_bytes, &mut out);
                        }
                        Ok(Finished::Digested(leaves, read_bytes)) => {
                            self.role.digested(leaves, read_bytes, &mut out);
                        }
                        Ok(Finished::Answered(message)) => out.extend(message),
                        Ok(Finished::Failed(error)) => return Err(error),
                        Err(_ended) => return Err(super::internal("the workers ended")),
                    }
                }
                default(TICK) => connection.check_alive().map_err(lost)?,
            }
        }
    }

    /// Takes a message; what the run came to ends it.
    fn take(
        &mut self,
        message: Message,
        connection: &Connection,
        out: &mut Vec<Message>,
        observer: &dyn Observer,
    ) -> Result<Option<Vec<u8>>> {
        match message {
            Message::Outcome(json) => return Ok(Some(json)),
            Message::Failed(failed) => return Err(failed_peer(connection, &failed)),
            Message::Event(json) => {
                events::pass_on(&json, observer);
                Ok(())
            }
            Message::Stop => {
                self.role.stop();
                self.stopping = true;
                Ok(())
            }
            Message::Begin(begin) => {
                let geometry = Geometry::new(self.source.size_bytes(), begin.block_size);
                let source = vec![Arc::clone(&self.source)];
                self.regions = Some(DataRegions::of(geometry, source));
                self.begin = Some(begin);
                self.role.message(Message::Begin(begin), out)
            }
            message => self.role.message(message, out),
        }
        .map_err(violated)?;
        Ok(None)
    }

    fn hand_out(&mut self, jobs: &Sender<(SourceJob, Option<Begin>)>, out: &mut Vec<Message>) {
        while self.under_way < self.most {
            let regions = &mut self.regions;
            let mut next_data = |from: u64| {
                let regions = regions.as_mut()?;
                regions.map(RegionIndex::get).find(|region| *region >= from)
            };
            let Some(job) = self.role.next_job(&mut next_data) else {
                self.role.tell_end(out);
                break;
            };
            self.under_way += 1;
            if jobs.send((job, self.begin)).is_err() {
                break;
            }
        }
    }
}

/// What the workers share.
struct Reading {
    source: Arc<dyn BlockSource>,
    outbox: Outbox,
}

impl Reading {
    fn work(&self, waiting: &Receiver<(SourceJob, Option<Begin>)>, finish: &Sender<Finished>) {
        let mut scratch = Scratch::default();
        for (job, begin) in waiting {
            let done = self
                .job(job, begin, &mut scratch)
                .unwrap_or_else(Finished::Failed);
            if finish.send(done).is_err() {
                break;
            }
        }
    }

    fn job(&self, job: SourceJob, begin: Option<Begin>, scratch: &mut Scratch) -> Result<Finished> {
        let begun = || {
            let begin = begin.ok_or_else(|| super::internal("work before it began"))?;
            let geometry = Geometry::new(self.source.size_bytes(), begin.block_size);
            Ok::<_, Error>((begin, geometry))
        };
        match job {
            SourceJob::Examine => {
                let source = examine(&*self.source)?;
                Ok(Finished::Answered(Some(Message::Source(source))))
            }
            SourceJob::Sample(asked) => {
                let sampled = send_sample(&*self.source, &self.outbox, asked, &mut buffer())?;
                Ok(Finished::Answered(Some(sampled)))
            }
            SourceJob::Scan(region) => {
                let (_begin, geometry) = begun()?;
                let copying = Copying::digesting(Arc::clone(&self.source), geometry);
                let scanned = copying.region(region, scratch, &mut |_| Ok(()))?;
                Ok(Finished::Scanned(scanned.leaves, scanned.source_read_bytes))
            }
            SourceJob::Digest { region, blocks } => {
                let (_begin, geometry) = begun()?;
                self.digest(&geometry, region, &blocks)
            }
            SourceJob::Pages { region, blocks } => {
                let (begin, geometry) = begun()?;
                self.send_pages(&geometry, begin, region, &blocks)?;
                Ok(Finished::Answered(None))
            }
        }
    }

    /// Reads these blocks of a region; what is known to be zero is not read.
    fn digest(&self, geometry: &Geometry, region: RegionIndex, blocks: &[u16]) -> Result<Finished> {
        let source = &*self.source;
        let failed = |e| {
            let extent = geometry.region_extent(region);
            Error::source(format!("read {extent} of {}", source.label()), e)
        };
        let map = DataMap::of(source, geometry, region).map_err(failed)?;
        let mut leaves = RegionLeaves::zero(geometry, region);
        let (mut buffer, mut read_bytes) = (buffer(), 0);
        let wanted = |b| !map.is_zero_block(b) && blocks.binary_search(&block_number(b)).is_ok();
        for run in runs(geometry, region, wanted) {
            let bytes = &mut buffer[..to_usize(run.extent.length())];
            read_bytes += map.read(source, run.extent, bytes).map_err(failed)?;
            take_leaves(&mut leaves, run.first, bytes);
        }
        Ok(Finished::Digested(leaves, read_bytes))
    }

    fn send_pages(
        &self,
        geometry: &Geometry,
        begin: Begin,
        region: RegionIndex,
        blocks: &[(u16, ShortDigests)],
    ) -> Result<()> {
        let mut packer = Packer::new(*geometry, begin.level);
        let mut buffer = buffer();
        for (block, theirs) in blocks {
            let extent = block_in(geometry, region, usize::from(*block));
            let bytes = self.read(extent, &mut buffer)?;
            packer.set_level(self.level(begin));
            send_packed(&self.outbox, packer.add(region, *block, bytes, theirs))?;
        }
        send_packed(&self.outbox, packer.take())
    }

    fn level(&self, begin: Begin) -> i32 {
        let harder = if self.outbox.is_behind() { HARDER } else { 0 };
        i32::from(begin.level) + harder
    }

    fn read<'b>(
        &self,
        extent: blockferry_core::Extent,
        buffer: &'b mut AlignedBuffer,
    ) -> Result<&'b [u8]> {
        let bytes = &mut buffer[..to_usize(extent.length())];
        read_padded(&*self.source, extent, bytes)
            .map_err(|e| Error::source(format!("read {extent} of {}", self.source.label()), e))?;
        Ok(bytes)
    }
}

/// What a source is now.
pub(crate) fn examine(source: &dyn BlockSource) -> Result<Source> {
    let failed = |e| Error::source(format!("examine source {}", source.label()), e);
    Ok(Source {
        label: source.label().to_owned(),
        size_bytes: source.size_bytes(),
        identity: source.identity().map_err(failed)?,
        evidence: source.evidence().map_err(failed)?,
    })
}

fn buffer() -> AlignedBuffer {
    AlignedBuffer::zeroed(to_usize(BUFFER_BYTES))
}

/// Sends what a packer gave, if it gave anything.
pub(super) fn send_packed(
    outbox: &Outbox,
    packed: blockferry_transfer_log::Result<Option<Message>>,
) -> Result<()> {
    match packed.map_err(packing)? {
        Some(message) => outbox.send_data(message).map_err(lost),
        None => Ok(()),
    }
}

pub(super) fn packing(cause: blockferry_transfer_log::Error) -> Error {
    Error::because(ErrorKind::Internal, "pack pages", cause)
}
