//! Both roles against each other, in one thread, in an order that is drawn. The fuzzer includes it, and draws from its
//! input.

use std::collections::VecDeque;

use blockferry_core::{
    Extent, Geometry, RegionIndex, RegionLeaves, Root, TreeHasher, block_digest, page_digests,
};
use blockferry_pipeline::block_in;
use blockferry_transport::frame::{Frame, FrameDecoder};
use blockferry_transport::message::Begin;
use blockferry_transport::{Message, ShortDigests};

use super::data::{Packer, Unpacked};
use super::protocol::{ProtocolError, ProtocolResult, block_number};
use super::source_role::{SourceJob, SourceRole};
use super::target_role::{Mapped, TargetJob, TargetRole};

/// Two images and the roles between them.
pub(super) struct Pair {
    pub(super) new: Vec<u8>,
    /// Becomes the new one.
    pub(super) old: Vec<u8>,
    geometry: Geometry,
    begin: Begin,
    source: SourceRole,
    target: TargetRole,
    whole: bool,
    to_source: VecDeque<Message>,
    to_target: VecDeque<Message>,
    source_jobs: Vec<SourceJob>,
    target_jobs: Vec<TargetJob>,
    pub(super) finished: Vec<RegionLeaves>,
    /// What a map tells, truthfully: of each block of the image whether it may differ.
    pub(super) may_differ: Vec<bool>,
    /// Blocks that the source's side read for digests.
    pub(super) read_blocks: usize,
    pub(super) sent: Sent,
    /// A number below the one it is given.
    draw: Box<dyn FnMut(usize) -> usize>,
    /// One in so many messages has a byte changed on its way; none if 0.
    pub(super) changed_in: usize,
    /// Only pages are: all else arrives as it was sent.
    pub(super) changes_pages_only: bool,
    /// Pages come twice, which must end the run.
    pub(super) repeats: bool,
}

/// What travelled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) to_source_bytes: usize,
    pub(super) to_target_bytes: usize,
    pub(super) data_messages: usize,
}

fn padded(bytes: &[u8], length: usize) -> Vec<u8> {
    let mut padded = bytes.to_vec();
    padded.resize(length, 0);
    padded
}

impl Pair {
    /// With `whole` nothing of the old image is compared.
    pub(super) fn new(
        old: &[u8],
        new: &[u8],
        begin: Begin,
        whole: bool,
        draw: impl FnMut(usize) -> usize + 'static,
    ) -> Self {
        let size = new.len() as u64;
        let old = padded(old, new.len());
        let geometry = Geometry::new(size, begin.block_size);
        let block_bytes = usize::try_from(begin.block_size.bytes()).unwrap();
        let blocks = old.chunks(block_bytes).zip(new.chunks(block_bytes));
        // Now and then it does not differ.
        let may_differ = (0..)
            .zip(blocks)
            .map(|(n, (old, new))| old != new || n % 99 == 7);
        Self {
            may_differ: may_differ.collect(),
            read_blocks: 0,
            new: new.to_vec(),
            old,
            geometry,
            begin,
            source: SourceRole::new(size),
            target: TargetRole::new(begin, size, whole),
            whole,
            to_source: VecDeque::from([Message::Begin(begin)]),
            to_target: VecDeque::new(),
            source_jobs: Vec::new(),
            target_jobs: Vec::new(),
            finished: Vec::new(),
            sent: Sent::default(),
            draw: Box::new(draw),
            changed_in: 0,
            changes_pages_only: false,
            repeats: false,
        }
    }

    /// Until both sides agree that they are done.
    pub(super) fn run(&mut self) -> ProtocolResult<Root> {
        for _ in 0..200_000 {
            if let Some(root) = self.step()? {
                return Ok(root);
            }
        }
        // A message that means something else now may never be answered: in life the link's deadline ends that.
        assert!(
            self.changed_in > 0,
            "both sides wait: {:?} {:?}",
            self.source,
            self.target
        );
        Err(ProtocolError::Violation("both sides wait".to_owned()))
    }

    /// A frame that the peer of a side did not send comes first there, if it is a message at all.
    pub(super) fn forge(&mut self, to_target: bool, frame: &Frame) {
        let queue = if to_target {
            &mut self.to_target
        } else {
            &mut self.to_source
        };
        if let Ok(message) = Message::decode(frame) {
            queue.push_front(message);
        }
    }

    /// Does one thing that can be done; the root once all is done.
    pub(super) fn step(&mut self) -> ProtocolResult<Option<Root>> {
        self.finished.extend(self.target.take_finished());
        if let Some(root) = self.target.outcome()? {
            return Ok(Some(root));
        }
        self.fill_jobs();
        match (self.draw)(4) {
            0 => {
                if let Some(message) = self.to_source.pop_front() {
                    let message = self.on_its_way(message)?;
                    let mut out = Vec::new();
                    self.source.message(message, &mut out)?;
                    self.send_to_target(out);
                }
            }
            1 => {
                if let Some(message) = self.to_target.pop_front() {
                    let message = self.on_its_way(message)?;
                    let again =
                        matches!(&message, Message::Data { blocks, .. } if !blocks.is_empty())
                            .then(|| message.clone());
                    let mut out = Vec::new();
                    self.target.message(message, &mut out)?;
                    if let Some(again) = again.filter(|_| self.repeats) {
                        self.target.message(again, &mut out)?;
                        panic!("the same pages came twice, and nobody minded");
                    }
                    self.send_to_source(out);
                }
            }
            2 if !self.source_jobs.is_empty() => {
                let number = (self.draw)(self.source_jobs.len());
                let job = self.source_jobs.swap_remove(number);
                self.do_source(job);
            }
            3 if !self.target_jobs.is_empty() => {
                let number = (self.draw)(self.target_jobs.len());
                let job = self.target_jobs.swap_remove(number);
                self.do_target(job)?;
            }
            _ => {}
        }
        Ok(None)
    }

    /// What arrives of a message; an error if it is none any more.
    fn on_its_way(&mut self, mut message: Message) -> ProtocolResult<Message> {
        if self.changed_in == 0 || (self.draw)(self.changed_in) > 0 {
            return Ok(message);
        }
        if self.changes_pages_only {
            if let Message::Data { frame, .. } = &mut message
                && !frame.is_empty()
            {
                let at = (self.draw)(frame.len());
                frame[at] ^= 1 << (self.draw)(8);
            }
            return Ok(message);
        }
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let at = blockferry_transport::frame::HEADER_BYTES - 1;
        let at = at + (self.draw)(bytes.len() - at);
        bytes[at] ^= 1 << (self.draw)(8);
        let mut decoder = FrameDecoder::new();
        decoder.trust();
        decoder.push(&bytes);
        let frame = decoder
            .next_frame()
            .ok()
            .flatten()
            .expect("its length is as it was");
        Message::decode(&frame).map_err(|e| ProtocolError::Violation(e.to_string()))
    }

    fn fill_jobs(&mut self) {
        let data = |image: &[u8], geometry: &Geometry, from: u64| {
            (from..geometry.region_count()).find(|region| {
                let extent = geometry.region_extent(RegionIndex::new(*region));
                image[range(extent)].iter().any(|b| *b != 0)
            })
        };
        let geometry = self.geometry;
        if self.source_jobs.len() < 3 {
            let new = &self.new;
            let job = self.source.next_job(&mut |from| data(new, &geometry, from));
            if job.is_none() {
                let mut out = Vec::new();
                self.source.tell_end(&mut out);
                self.send_to_target(out);
            }
            self.source_jobs.extend(job);
        }
        if self.target_jobs.len() < 3 {
            let (old, every) = (&self.old, self.whole || self.begin.mapped);
            let mut out = Vec::new();
            let mut next = |from| {
                if every {
                    Some(from)
                } else {
                    data(old, &geometry, from)
                }
            };
            let job = self.target.next_job(&mut next, &mut out);
            self.target_jobs.extend(job);
            self.send_to_source(out);
        }
    }

    /// The root that a source tells which has what the target has become.
    pub(super) fn root(&self) -> Root {
        let mut tree = TreeHasher::new(self.geometry);
        for region in (0..self.geometry.region_count()).map(RegionIndex::new) {
            let extent = self.geometry.region_extent(region);
            let leaves = RegionLeaves::of_bytes(&self.geometry, region, &self.old[range(extent)]);
            if !self.begin.mapped {
                tree.push(&leaves);
                continue;
            }
            let mut opened = RegionLeaves::zero(&self.geometry, region);
            for block in self.mapped(&leaves).open.into_iter().map(usize::from) {
                opened.set(block, leaves.get(block));
            }
            tree.push(&opened);
        }
        tree.finish()
    }

    /// What the map tells of a region; of every other block that is zero that it is.
    fn mapped(&self, leaves: &RegionLeaves) -> Mapped {
        let mut mapped = Mapped::default();
        if !self.begin.mapped {
            return mapped;
        }
        for block in 0..leaves.len() {
            let extent = block_in(&self.geometry, leaves.region(), block);
            let number = extent.start() / self.begin.block_size.bytes();
            if !self.may_differ[usize::try_from(number).unwrap()] {
                continue;
            }
            if block % 2 == 0 && self.new[range(extent)].iter().all(|b| *b == 0) {
                mapped.zeros.push(block_number(block));
            } else {
                mapped.open.push(block_number(block));
            }
        }
        mapped
    }

    fn send_to_target(&mut self, messages: Vec<Message>) {
        for message in messages {
            let mut bytes = Vec::new();
            message.encode(&mut bytes);
            self.sent.to_target_bytes += bytes.len();
            self.sent.data_messages += usize::from(matches!(message, Message::Data { .. }));
            self.to_target.push_back(message);
        }
    }

    fn send_to_source(&mut self, messages: Vec<Message>) {
        for message in messages {
            let mut bytes = Vec::new();
            message.encode(&mut bytes);
            self.sent.to_source_bytes += bytes.len();
            self.to_source.push_back(message);
        }
    }

    fn do_source(&mut self, job: SourceJob) {
        match job {
            SourceJob::Scan(region) => {
                let extent = self.geometry.region_extent(region);
                let leaves =
                    RegionLeaves::of_bytes(&self.geometry, region, &self.new[range(extent)]);
                self.read_blocks += leaves.len();
                let mut out = Vec::new();
                self.source.scanned(leaves, 1, &mut out);
                self.send_to_target(out);
            }
            SourceJob::Digest { region, blocks } => {
                let mut leaves = RegionLeaves::zero(&self.geometry, region);
                self.read_blocks += blocks.len();
                for block in blocks.into_iter().map(usize::from) {
                    let extent = block_in(&self.geometry, region, block);
                    leaves.set(block, block_digest(&self.new[range(extent)]));
                }
                let mut out = Vec::new();
                self.source.digested(leaves, 1, &mut out);
                self.send_to_target(out);
            }
            SourceJob::Pages { region, blocks } => {
                let mut packer = Packer::new(self.geometry, self.begin.level);
                let mut out = Vec::new();
                for (block, theirs) in blocks {
                    let extent = block_in(&self.geometry, region, usize::from(block));
                    let bytes = &self.new[range(extent)];
                    out.extend(packer.add(region, block, bytes, &theirs).unwrap());
                }
                out.extend(packer.take().unwrap());
                self.send_to_target(out);
            }
            // Asked for by a forged message only; nobody waits for an answer.
            SourceJob::Examine | SourceJob::Sample(_) => {}
        }
    }

    fn do_target(&mut self, job: TargetJob) -> ProtocolResult {
        let mut out = Vec::new();
        match job {
            TargetJob::Scan(region) => {
                let extent = self.geometry.region_extent(region);
                let leaves = if self.whole {
                    RegionLeaves::zero(&self.geometry, region)
                } else {
                    RegionLeaves::of_bytes(&self.geometry, region, &self.old[range(extent)])
                };
                let mapped = self.mapped(&leaves);
                self.target.scanned(leaves, mapped, &mut out);
            }
            TargetJob::Pages {
                region,
                blocks,
                width,
            } => {
                let taken = blocks.into_iter().map(|block| {
                    let extent = block_in(&self.geometry, region, usize::from(block));
                    let pages = page_digests(self.begin.block_size, &self.old[range(extent)]);
                    (block, ShortDigests::of(width, pages))
                });
                self.target.paged(region, taken.collect(), &mut out);
            }
            TargetJob::StageZeros { region, blocks } => {
                for block in &blocks {
                    let extent = block_in(&self.geometry, region, usize::from(*block));
                    self.old[range(extent)].fill(0);
                }
                let blocks: Vec<_> = blocks.into_iter().map(|b| (region.get(), b)).collect();
                self.target.staged(&blocks, &[], &mut out)?;
            }
            TargetJob::Stage(arrived) => {
                let arrived =
                    Unpacked::of(arrived).map_err(|e| ProtocolError::Violation(e.to_string()))?;
                let (mut blocks, mut wrong) = (Vec::new(), Vec::new());
                for (region, block, expected) in arrived.blocks() {
                    let extent = block_in(
                        &self.geometry,
                        RegionIndex::new(*region),
                        usize::from(*block),
                    );
                    let mut content = self.old[range(extent)].to_vec();
                    blocks.push((*region, *block));
                    if arrived.patch(extent, &mut content, expected) {
                        self.old[range(extent)].copy_from_slice(&content);
                    } else {
                        wrong.push((*region, *block));
                    }
                }
                self.target.staged(&blocks, &wrong, &mut out)?;
            }
        }
        self.send_to_source(out);
        Ok(())
    }
}

fn range(extent: Extent) -> std::ops::Range<usize> {
    usize::try_from(extent.start()).unwrap()..usize::try_from(extent.end()).unwrap()
}
