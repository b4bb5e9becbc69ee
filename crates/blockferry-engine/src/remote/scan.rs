//! The host of the target's role: reads the target on several threads, stages what arrives, and hands regions that are
//! done to the consumer in order, as a walk over two local devices does.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;

use blockferry_core::{Digest, Extent, Geometry, RegionIndex, RegionLeaves, is_zero, page_digests};
use blockferry_delta_sync::{Claim, Known, differing_runs};
use blockferry_device::{AlignedBuffer, BlockSource, RateLimiter};
use blockferry_pipeline::{BUFFER_BYTES, DataMap, DataRegions, Step, block_in, read_padded, runs};
use blockferry_transfer_log::{Batch, Old, StagedView, Stager};
use blockferry_transport::message::{Begin, Source};
use blockferry_transport::{Connection, Message, ShortDigests};
use crossbeam_channel::{Receiver, Sender, bounded, select};

use super::data::Unpacked;
use super::sampling::take_sample;
use super::source_role::MAX_WINDOW;
use super::target_role::{Arrived, Mapped, TargetJob, TargetRole};
use super::{ProtocolError, block_number, failed_peer, lost, take_leaves, to_usize, violated};
use crate::error::{Error, ErrorKind, Result};
use crate::job::RegionDone;
use crate::knowledge::Knowledge;
use crate::options::Context;
use crate::sample::Sample;

/// Regions that the source may be ahead.
const WINDOW: u32 = 64;
const _: () = assert!(WINDOW <= MAX_WINDOW, "with a map that many are opened");
/// How pages are packed: what two processors pack as fast as a link of 1 Gbit/s carries it, a tenth smaller than by the
/// level below. Where the link is slower, the source packs harder.
pub(super) const LEVEL: i8 = 2;
const TICK: std::time::Duration = std::time::Duration::from_millis(50);

/// A source on the other side of a connection.
#[derive(Debug)]
pub(crate) struct Peer {
    connection: Connection,
}

impl Peer {
    pub(crate) fn new(connection: Connection) -> Self {
        connection.trust();
        Self { connection }
    }

    /// What the source is now. Nothing else may be under way.
    pub(crate) fn examine(&self) -> Result<Source> {
        let connection = &self.connection;
        connection.outbox().send(Message::Examine).map_err(lost)?;
        match connection.receive().map_err(lost)? {
            Message::Source(source) => Ok(source),
            Message::Failed(failed) => Err(failed_peer(connection, &failed)),
            other => Err(violated(super::unexpected("target", &other))),
        }
    }

    /// Ends a scan: what the source still says of it is passed over.
    fn stop(&self) -> Result<()> {
        let connection = &self.connection;
        connection.outbox().send(Message::Stop).map_err(lost)?;
        loop {
            match connection.receive().map_err(lost)? {
                Message::Stopped => return Ok(()),
                Message::Failed(failed) => return Err(failed_peer(connection, &failed)),
                _of_that_scan => {}
            }
        }
    }

    /// Compares a sample of the source with the target. Nothing else may be under way.
    pub(crate) fn sample(
        &self,
        geometry: &Geometry,
        target: Option<&dyn BlockSource>,
        seed: u64,
        context: &Context,
    ) -> Result<Sample> {
        take_sample(&self.connection, geometry, target, seed, context)
    }

    /// Tells the source's side what came of the run, as JSON of at most
    /// [`MAX_JSON_BYTES`](blockferry_transport::message::MAX_JSON_BYTES), and ends the connection.
    pub(crate) fn finish(self, outcome: std::result::Result<Vec<u8>, &Error>) {
        let message = match outcome {
            Ok(json) => Message::Outcome(json),
            Err(error) => super::failure(error),
        };
        let _nobody_listens = self.connection.outbox().send(message);
        self.connection.finish();
    }

    /// Bytes that came from the source's side so far.
    pub(crate) fn received_bytes(&self) -> u64 {
        self.connection.wire_bytes().1
    }
}

/// What the workers of a scan share.
#[derive(Debug)]
pub(crate) struct TargetSide {
    /// The old content, if there is any.
    pub(crate) target: Option<Arc<dyn BlockSource>>,
    pub(crate) geometry: Geometry,
    pub(crate) stager: Stager,
    /// Every block is staged, whole, whatever the target holds.
    pub(crate) writes_blocks: bool,
    /// What a resumed session has staged already; it wins over the target.
    pub(crate) staged: Option<Arc<StagedView>>,
    /// Whether what is replaced is kept.
    pub(crate) keep_old: bool,
    /// Holds back what is staged to a rate, and with it what is asked for.
    pub(crate) limiter: Option<RateLimiter>,
}

/// What a scan came to.
pub(crate) enum Scanned {
    /// The target, as staged, is the source, which so many bytes were read of.
    Whole { source_read_bytes: u64 },
    /// A shortened digest was taken for another, or what was known of the target is wrong.
    Again,
}

/// What a worker did.
enum Finished {
    Scanned {
        leaves: RegionLeaves,
        mapped: Mapped,
        /// Claimed to be the same by the map, but staged over: what they have to turn out to be.
        claimed: Vec<(usize, Digest)>,
        read_bytes: u64,
    },
    Paged(RegionIndex, Vec<(u16, ShortDigests)>),
    Staged {
        blocks: Vec<(u64, u16)>,
        wrong: Vec<(u64, u16)>,
        batches: Vec<Batch>,
    },
}

/// What the calling thread of a scan hands to the log and the manifest.
pub(crate) type Consume<'c> = dyn FnMut(Step<Batch, RegionDone>) -> Result<()> + 'c;

impl TargetSide {
    /// Scans once, with a change map where one is known.
    pub(crate) fn scan(
        &self,
        peer: &Peer,
        exact: bool,
        threads: usize,
        context: &Context,
        knowledge: &mut Knowledge<impl Read>,
        consume: &mut Consume<'_>,
    ) -> Result<Scanned> {
        let begin = Begin {
            block_size: self.geometry.block_size(),
            exact,
            level: LEVEL,
            window: WINDOW,
            mapped: knowledge.is_mapped(),
        };
        let outbox = peer.connection.outbox();
        outbox.send(Message::Begin(begin)).map_err(lost)?;
        std::thread::scope(|scope| {
            let (jobs, waiting) = bounded::<(TargetJob, Known)>(2 * threads);
            let (finish, finished) = bounded(2 * threads);
            for _ in 0..threads {
                let (waiting, finish) = (waiting.clone(), finish.clone());
                scope.spawn(move || self.work(begin, &waiting, &finish));
            }
            let mut host = Host {
                role: TargetRole::new(begin, self.geometry.image_bytes(), self.writes_blocks),
                regions: self.regions(begin.mapped),
                claimed: BTreeMap::new(),
                under_way: 0,
                most: 2 * threads,
                read_bytes: 0,
            };
            host.run(
                &peer.connection,
                &jobs,
                &finished,
                context,
                knowledge,
                consume,
            )
        })
        .and_then(|scanned| peer.stop().map(|()| scanned))
    }

    /// Where there is something to look at on this side.
    fn regions(&self, mapped: bool) -> DataRegions {
        let (new_file, target) = (self.stager.writes_new_file(), &self.target);
        match (&self.staged, target) {
            // A new file is zero.
            (None, _) if self.writes_blocks && new_file => DataRegions::none(self.geometry),
            (None, Some(target)) if !self.writes_blocks && !mapped => {
                DataRegions::of(self.geometry, vec![Arc::clone(target)])
            }
            // Something may be staged, or be in the source by the map, where the target is zero, or zeros are to be
            // written whatever is there.
            _ => DataRegions::every(self.geometry),
        }
    }

    fn work(
        &self,
        begin: Begin,
        waiting: &Receiver<(TargetJob, Known)>,
        finish: &Sender<Result<Finished>>,
    ) {
        let piece = || AlignedBuffer::zeroed(usize::try_from(BUFFER_BYTES).unwrap_or(usize::MAX));
        let mut buffers = (piece(), piece());
        for (job, known) in waiting {
            if finish
                .send(self.job(begin, job, &known, &mut buffers))
                .is_err()
            {
                break;
            }
        }
    }

    fn job(
        &self,
        begin: Begin,
        job: TargetJob,
        known: &Known,
        buffers: &mut (AlignedBuffer, AlignedBuffer),
    ) -> Result<Finished> {
        match job {
            TargetJob::Scan(region) => self.leaves(begin, region, known, &mut buffers.0),
            TargetJob::Pages {
                region,
                blocks,
                width,
            } => {
                let mut taken = Vec::with_capacity(blocks.len());
                for block in blocks {
                    let extent = block_in(&self.geometry, region, usize::from(block));
                    let shown = self.shown(extent, &mut buffers.0)?;
                    let pages = page_digests(begin.block_size, shown);
                    taken.push((block, ShortDigests::of(width, pages)));
                }
                Ok(Finished::Paged(region, taken))
            }
            TargetJob::StageZeros { region, blocks } => self.zeros(region, &blocks, buffers),
            TargetJob::Stage(arrived) => self.stage(arrived, buffers),
        }
    }

    /// The leaves of the target as staged so far. What is known and not staged over is not read.
    fn leaves(
        &self,
        begin: Begin,
        region: RegionIndex,
        known: &Known,
        buffer: &mut AlignedBuffer,
    ) -> Result<Finished> {
        if self.writes_blocks {
            return self.staged_leaves(region);
        }
        let whole = self.geometry.region_extent(region);
        let staged = self.staged.as_ref().filter(|s| s.overlaps(whole));
        let is_staged =
            |block| staged.is_some_and(|s| s.overlaps(block_in(&self.geometry, region, block)));
        let (leaves, read_bytes) = match &known.target {
            Some(leaves) if staged.is_none() => (leaves.clone(), 0),
            _ => self.read_leaves(region, known, &is_staged, buffer)?,
        };
        let (mut mapped, mut claimed) = (Mapped::default(), Vec::new());
        if begin.mapped {
            for block in 0..leaves.len() {
                match (known.claim(block), is_staged(block)) {
                    (Claim::Zero, _) => mapped.zeros.push(block_number(block)),
                    (_, false) if known.is_equal(block) => {}
                    (claim, _) => {
                        mapped.open.push(block_number(block));
                        let same = known.target.as_ref().filter(|_| claim == Claim::Same);
                        claimed.extend(same.map(|leaves| (block, leaves.get(block))));
                    }
                }
            }
        }
        Ok(Finished::Scanned {
            leaves,
            mapped,
            claimed,
            read_bytes,
        })
    }

    /// Reads the blocks that are not known, or staged over.
    fn read_leaves(
        &self,
        region: RegionIndex,
        known: &Known,
        is_staged: &dyn Fn(usize) -> bool,
        buffer: &mut AlignedBuffer,
    ) -> Result<(RegionLeaves, u64)> {
        let target = self.target()?;
        let failed = |e| {
            let whole = self.geometry.region_extent(region);
            Error::target(format!("read {whole} of {}", target.label()), e)
        };
        let map = DataMap::of(target, &self.geometry, region).map_err(failed)?;
        let zero = || RegionLeaves::zero(&self.geometry, region);
        let mut leaves = known.target.clone().unwrap_or_else(zero);
        let mut read_bytes = 0;
        let wanted = |b| is_staged(b) || (known.target.is_none() && !map.is_zero_block(b));
        for run in runs(&self.geometry, region, wanted) {
            let bytes = &mut buffer[..to_usize(run.extent.length())];
            read_bytes += map.read(target, run.extent, bytes).map_err(failed)?;
            self.patch(run.extent, bytes)?;
            take_leaves(&mut leaves, run.first, bytes);
        }
        Ok((leaves, read_bytes))
    }

    /// The leaves of the blocks that a resumed session has staged; nothing is read.
    fn staged_leaves(&self, region: RegionIndex) -> Result<Finished> {
        let mut leaves = RegionLeaves::zero(&self.geometry, region);
        if let Some(staged) = &self.staged {
            for block in 0..leaves.len() {
                let recorded = staged
                    .digest_of(block_in(&self.geometry, region, block))
                    .map_err(|e| Error::log("look up what is staged", e))?;
                if let Some(digest) = recorded {
                    leaves.set(block, digest);
                }
            }
        }
        Ok(Finished::Scanned {
            leaves,
            mapped: Mapped::default(),
            claimed: Vec::new(),
            read_bytes: 0,
        })
    }

    fn target(&self) -> Result<&dyn BlockSource> {
        let target = self.target.as_deref();
        target.ok_or_else(|| super::internal("a comparison needs a target"))
    }

    /// Reads what the target holds.
    fn old<'b>(&self, extent: Extent, buffer: &'b mut AlignedBuffer) -> Result<&'b mut [u8]> {
        let (target, bytes) = (self.target()?, &mut buffer[..to_usize(extent.length())]);
        read_padded(target, extent, bytes)
            .map_err(|e| Error::target(format!("read {extent} of {}", target.label()), e))?;
        Ok(bytes)
    }

    /// What the target holds, as it is kept, where that is wanted of whole blocks.
    fn kept<'b>(&self, extent: Extent, buffer: &'b mut AlignedBuffer) -> Result<Old<'b>> {
        if !self.keep_old || !self.stager.wants_old() {
            return Ok(Old::None);
        }
        let old = self.old(extent, buffer)?;
        Ok(self.replaced(old))
    }

    /// What is replaced, as it is kept.
    fn replaced<'o>(&self, old: &'o [u8]) -> Old<'o> {
        match (self.keep_old, is_zero(old)) {
            (false, _) => Old::None,
            (true, true) => Old::Zero,
            (true, false) => Old::Data(old),
        }
    }

    /// Reads what the target holds as staged so far.
    fn shown<'b>(&self, extent: Extent, buffer: &'b mut AlignedBuffer) -> Result<&'b mut [u8]> {
        let bytes = self.old(extent, buffer)?;
        self.patch(extent, bytes)?;
        Ok(bytes)
    }

    fn patch(&self, extent: Extent, bytes: &mut [u8]) -> Result<()> {
        match self.staged.as_ref().filter(|s| s.overlaps(extent)) {
            Some(staged) => staged
                .patch(extent, bytes)
                .map_err(|e| Error::log("read what is staged", e)),
            None => Ok(()),
        }
    }

    fn zeros(
        &self,
        region: RegionIndex,
        blocks: &[u16],
        (old, view): &mut (AlignedBuffer, AlignedBuffer),
    ) -> Result<Finished> {
        let mut staging = Staging::new(self);
        let answered = blocks.iter().map(|b| (region.get(), *b)).collect();
        if self.writes_blocks {
            for run in runs(&self.geometry, region, |b| {
                blocks.contains(&block_number(b))
            }) {
                staging.zero_blocks(run.extent, self.kept(run.extent, old)?)?;
            }
            return Ok(staging.finished(answered, Vec::new()));
        }
        for block in blocks {
            let extent = block_in(&self.geometry, region, usize::from(*block));
            let old = self.old(extent, old)?;
            let view = &mut view[..old.len()];
            view.copy_from_slice(old);
            self.patch(extent, view)?;
            let zeros = vec![0; view.len()];
            differing_runs(extent, &zeros, view, |run| {
                staging.zero(run.extent, part(old, extent, run.extent));
            });
        }
        Ok(staging.finished(answered, Vec::new()))
    }

    /// Stages what arrived, packed as it came, unless some of it is not what it should be.
    fn stage(
        &self,
        arrived: Arrived,
        (old, view): &mut (AlignedBuffer, AlignedBuffer),
    ) -> Result<Finished> {
        let arrived = Unpacked::of(arrived)
            .map_err(|e| Error::because(ErrorKind::Peer, "unpack pages of the peer", e))?;
        let mut staging = Staging::new(self);
        let wrong = if self.writes_blocks {
            self.stage_blocks(&arrived, &mut staging, old, view)?
        } else {
            self.stage_pages(&arrived, &mut staging, old, view)?
        };
        if let Some(limiter) = &self.limiter {
            limiter
                .take(staging.data_bytes())
                .map_err(|e| Error::target("hold back what is staged", e))?;
        }
        let blocks = arrived
            .blocks()
            .iter()
            .map(|(region, block, _)| (*region, *block));
        Ok(staging.finished(blocks.collect(), wrong))
    }

    /// Stages the pages that came, in the frame that they came in if all are right. Returns the blocks that they do not
    /// make what they should.
    fn stage_pages(
        &self,
        arrived: &Unpacked,
        staging: &mut Staging<'_>,
        old: &mut AlignedBuffer,
        view: &mut AlignedBuffer,
    ) -> Result<Vec<(u64, u16)>> {
        let mut wrong = Vec::new();
        for (region, block, expected) in arrived.blocks() {
            let extent = self.block(*region, *block);
            let old = self.old(extent, old)?;
            let view = &mut view[..old.len()];
            view.copy_from_slice(old);
            self.patch(extent, view)?;
            if !arrived.patch(extent, view, expected) {
                wrong.push((*region, *block));
                continue;
            }
            for (run, bytes) in arrived.runs_in(extent) {
                let old = part(old, extent, run);
                if bytes.is_empty() {
                    staging.zero(run, old);
                } else {
                    staging.data(run, bytes, old);
                }
            }
        }
        if wrong.is_empty() {
            staging.keep_frame(arrived.frame());
        }
        Ok(wrong)
    }

    /// Writes the blocks that came, all of whose pages did, neighbours together. Returns those that are not what they
    /// should be.
    fn stage_blocks(
        &self,
        arrived: &Unpacked,
        staging: &mut Staging<'_>,
        old: &mut AlignedBuffer,
        new: &mut AlignedBuffer,
    ) -> Result<Vec<(u64, u16)>> {
        let mut rest = arrived.blocks();
        while let Some((region, block, _)) = rest.first() {
            let mut whole = self.block(*region, *block);
            let mut digests = Vec::new();
            for (region, block, digest) in rest {
                let extent = self.block(*region, *block);
                let joined = Extent::from_range(whole.start()..extent.end());
                let follows = digests.is_empty() || extent.start() == whole.end();
                if !follows || joined.length() > BUFFER_BYTES {
                    break;
                }
                whole = joined;
                let bytes = &mut new[to_usize(extent.start() - whole.start())..]
                    [..to_usize(extent.length())];
                bytes.fill(0);
                if !arrived.patch(extent, bytes, digest) {
                    return Ok(vec![(*region, *block)]);
                }
                digests.push(*digest);
            }
            rest = &rest[digests.len()..];
            let new = &new[..to_usize(whole.length())];
            staging.blocks(whole, new, &digests, self.kept(whole, old)?)?;
        }
        Ok(Vec::new())
    }

    fn block(&self, region: u64, block: u16) -> Extent {
        block_in(&self.geometry, RegionIndex::new(region), usize::from(block))
    }
}

/// The bytes of `inside` among those of `extent`.
fn part(bytes: &[u8], extent: Extent, inside: Extent) -> &[u8] {
    let from = to_usize(inside.start() - extent.start());
    &bytes[from..from + to_usize(inside.length())]
}

/// Batches in the making.
struct Staging<'s> {
    side: &'s TargetSide,
    /// Pages of data, which may keep the frame that they came in.
    data: Batch,
    /// Zeros and whole blocks.
    more: Vec<Batch>,
}

impl<'s> Staging<'s> {
    fn new(side: &'s TargetSide) -> Self {
        Self {
            side,
            data: side.stager.pages(),
            more: Vec::new(),
        }
    }

    /// All data of one message fits one batch: they have the same limits.
    fn data(&mut self, extent: Extent, new: &[u8], old: &[u8]) {
        let old = self.side.replaced(old);
        self.side.stager.add(&mut self.data, extent, new, old);
    }

    fn zero(&mut self, extent: Extent, old: &[u8]) {
        let (stager, old) = (&self.side.stager, self.side.replaced(old));
        let batch = with_room(&mut self.more, extent, || stager.pages());
        stager.add_zero(batch, extent, old);
    }

    /// Whole blocks.
    fn blocks(
        &mut self,
        extent: Extent,
        new: &[u8],
        digests: &[Digest],
        old: Old<'_>,
    ) -> Result<()> {
        let stager = &self.side.stager;
        let batch = with_room(&mut self.more, extent, || stager.blocks());
        stager
            .allocate(&[extent])
            .and_then(|()| stager.write_blocks(batch, extent, new, digests, old))
            .map_err(|e| Error::log("write what came", e))
    }

    /// Whole blocks that become zero.
    fn zero_blocks(&mut self, extent: Extent, old: Old<'_>) -> Result<()> {
        let stager = &self.side.stager;
        let staged = self.side.staged.as_ref();
        let is_staged = staged.is_some_and(|s| s.overlaps(extent));
        let batch = with_room(&mut self.more, extent, || stager.blocks());
        stager
            .write_zeros(batch, extent, is_staged, old)
            .map_err(|e| Error::log("write zeros", e))
    }

    fn data_bytes(&self) -> u64 {
        self.data.data_bytes() + self.more.iter().map(Batch::data_bytes).sum::<u64>()
    }

    fn keep_frame(&mut self, frame: &[u8]) {
        if !self.data.is_empty() && (frame.len() as u64) < self.data.data_bytes() {
            self.data.store_frame(frame);
        }
    }

    /// What these blocks came to, but for the wrong ones.
    fn finished(self, blocks: Vec<(u64, u16)>, wrong: Vec<(u64, u16)>) -> Finished {
        let batches = std::iter::once(self.data).chain(self.more);
        Finished::Staged {
            blocks,
            wrong,
            batches: batches.filter(|batch| !batch.is_empty()).collect(),
        }
    }
}

/// The last of `batches`, or a new one where it has no room.
fn with_room(batches: &mut Vec<Batch>, extent: Extent, new: impl Fn() -> Batch) -> &mut Batch {
    match batches.last() {
        Some(last) if last.has_room(extent.length()) => {}
        _ => batches.push(new()),
    }
    let last = batches.len() - 1;
    &mut batches[last]
}

struct Host {
    role: TargetRole,
    regions: DataRegions,
    /// Of each region that is not done, blocks that the map claims to be the same and that were asked for.
    claimed: BTreeMap<u64, Vec<(usize, Digest)>>,
    under_way: usize,
    most: usize,
    read_bytes: u64,
}

impl Host {
    fn run(
        &mut self,
        connection: &Connection,
        jobs: &Sender<(TargetJob, Known)>,
        finished: &Receiver<Result<Finished>>,
        context: &Context,
        knowledge: &mut Knowledge<impl Read>,
        consume: &mut Consume<'_>,
    ) -> Result<Scanned> {
        let mut out = Vec::new();
        loop {
            if !self.hand_out(jobs, knowledge, &mut out) {
                return Ok(Scanned::Again);
            }
            let mut messages = out.drain(..);
            let sent = messages.try_for_each(|message| connection.outbox().send(message));
            drop(messages);
            if let Err(error) = sent {
                return Err(self.stage_arrived(lost(error), jobs, finished, consume));
            }
            self.take_finished(consume)?;
            match self.role.outcome() {
                Ok(Some(_root)) => {
                    let source_read_bytes = self.role.source_read_bytes();
                    return Ok(Scanned::Whole { source_read_bytes });
                }
                Ok(None) => {}
                Err(error) => return again(error),
            }
            context.check_cancelled()?;
            let taken = select! {
                recv(connection.receiver()) -> message => {
                    let message = message.unwrap_or_else(|_ended| connection.receive());
                    let ended = match message {
                        Ok(Message::Failed(failed)) => {
                            failed_peer(connection, &failed)
                        }
                        Err(error) => lost(error),
                        Ok(message) => {
                            if let Err(error) = self.role.message(message, &mut out) {
                                return again(error);
                            }
                            continue;
                        }
                    };
                    return Err(self.stage_arrived(ended, jobs, finished, consume));
                }
                recv(finished) -> done => {
                    self.under_way -= 1;
                    let done = done.map_err(|_ended| super::internal("the workers ended"))?;
                    self.done(done?, &mut out, consume)?
                }
                default(TICK) => {
                    if let Err(error) = connection.check_alive() {
                        return Err(self.stage_arrived(lost(error), jobs, finished, consume));
                    }
                    consume(Step::Tick)?;
                    Ok(())
                }
            };
            if let Err(error) = taken {
                return again(error);
            }
        }
    }

    /// Nothing more comes, because of `why`: what has arrived is staged, so that it need not come again. What fails here
    /// is the error then.
    fn stage_arrived(
        &mut self,
        why: Error,
        jobs: &Sender<(TargetJob, Known)>,
        finished: &Receiver<Result<Finished>>,
        consume: &mut Consume<'_>,
    ) -> Error {
        let mut nobody_hears = Vec::new();
        loop {
            while self.under_way < self.most
                && let Some(job) = self.role.next_arrived()
                && jobs.send((job, Known::default())).is_ok()
            {
                self.under_way += 1;
            }
            if self.under_way == 0 {
                return why;
            }
            let Ok(done) = finished.recv() else {
                return why;
            };
            self.under_way -= 1;
            match done.and_then(|done| self.done(done, &mut nobody_hears, consume)) {
                Ok(Ok(())) => {}
                Ok(Err(_lie)) => return why,
                Err(error) => return error,
            }
        }
    }

    fn done(
        &mut self,
        done: Finished,
        out: &mut Vec<Message>,
        consume: &mut Consume<'_>,
    ) -> Result<super::ProtocolResult> {
        match done {
            Finished::Scanned {
                leaves,
                mapped,
                claimed,
                read_bytes,
            } => {
                self.read_bytes += read_bytes;
                if !claimed.is_empty() {
                    self.claimed.insert(leaves.region().get(), claimed);
                }
                self.role.scanned(leaves, mapped, out);
            }
            Finished::Paged(region, blocks) => self.role.paged(region, blocks, out),
            Finished::Staged {
                blocks,
                wrong,
                batches,
            } => {
                for batch in batches {
                    consume(Step::Part(batch))?;
                }
                return Ok(self.role.staged(&blocks, &wrong, out));
            }
        }
        Ok(Ok(()))
    }

    fn take_finished(&mut self, consume: &mut Consume<'_>) -> Result<()> {
        for leaves in self.role.take_finished() {
            let claimed = self.claimed.remove(&leaves.region().get());
            let claimed = claimed.into_iter().flatten();
            let lies = claimed.filter(|(block, digest)| leaves.get(*block) != *digest);
            let lies = lies.count() as u64;
            consume(Step::Done(RegionDone {
                leaves,
                source_read_bytes: 0,
                target_read_bytes: std::mem::take(&mut self.read_bytes),
                changed_bytes: 0,
                lies,
            }))?;
        }
        Ok(())
    }

    /// `false` if what was known is doubted.
    fn hand_out(
        &mut self,
        jobs: &Sender<(TargetJob, Known)>,
        knowledge: &mut Knowledge<impl Read>,
        out: &mut Vec<Message>,
    ) -> bool {
        while self.under_way < self.most {
            let regions = &mut self.regions;
            let mut next_data =
                |from: u64| regions.map(RegionIndex::get).find(|region| *region >= from);
            let Some(job) = self.role.next_job(&mut next_data, out) else {
                break;
            };
            let of_region = match &job {
                TargetJob::Scan(region) => knowledge.of(*region),
                _ => Some(Known::default()),
            };
            let Some(of_region) = of_region else {
                return false;
            };
            self.under_way += 1;
            if jobs.send((job, of_region)).is_err() {
                break;
            }
        }
        true
    }
}

fn again(error: ProtocolError) -> Result<Scanned> {
    match error {
        ProtocolError::Mistaken(_) => Ok(Scanned::Again),
        violation => Err(violated(violation)),
    }
}
