//! Both roles against each other, in one thread, in an order that a seed decides.

use std::collections::VecDeque;

use blockferry_core::{
    BlockSize, Extent, Geometry, RegionIndex, RegionLeaves, Root, block_digest, page_digests,
};
use blockferry_pipeline::block_in;
use blockferry_transport::frame::FrameDecoder;
use blockferry_transport::message::Begin;
use blockferry_transport::{Message, ShortDigests};

use super::data::{Packer, Unpacked};
use super::source_role::{SourceJob, SourceRole};
use super::target_role::{TargetJob, TargetRole};
use super::{ProtocolError, ProtocolResult};
use crate::sample::scramble;

/// Two images and the roles between them.
struct Pair {
    new: Vec<u8>,
    /// Becomes the new one.
    old: Vec<u8>,
    geometry: Geometry,
    begin: Begin,
    source: SourceRole,
    target: TargetRole,
    to_source: VecDeque<Message>,
    to_target: VecDeque<Message>,
    source_jobs: Vec<SourceJob>,
    target_jobs: Vec<TargetJob>,
    finished: Vec<RegionLeaves>,
    sent: Sent,
    seed: u64,
    /// One in so many messages has a byte changed on its way; none if 0.
    changed_in: usize,
}

/// What travelled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sent {
    to_source_bytes: usize,
    to_target_bytes: usize,
    data_messages: usize,
}

fn begin(exact: bool) -> Begin {
    Begin {
        block_size: BlockSize::new(16 * 1024).unwrap(),
        exact,
        level: 1,
        window: 4,
    }
}

fn padded(bytes: &[u8], length: usize) -> Vec<u8> {
    let mut padded = bytes.to_vec();
    padded.resize(length, 0);
    padded
}

impl Pair {
    fn new(old: &[u8], new: &[u8], begin: Begin, seed: u64) -> Self {
        let size = new.len() as u64;
        let mut pair = Self {
            new: new.to_vec(),
            old: padded(old, new.len()),
            geometry: Geometry::new(size, begin.block_size),
            begin,
            source: SourceRole::new(size),
            target: TargetRole::new(begin, size, false),
            to_source: VecDeque::from([Message::Begin(begin)]),
            to_target: VecDeque::new(),
            source_jobs: Vec::new(),
            target_jobs: Vec::new(),
            finished: Vec::new(),
            sent: Sent::default(),
            seed,
            changed_in: 0,
        };
        pair.seed = scramble(seed);
        pair
    }

    fn draw(&mut self, below: usize) -> usize {
        self.seed = scramble(self.seed);
        usize::try_from(self.seed % below as u64).unwrap()
    }

    /// Until both sides agree that they are done.
    fn run(&mut self) -> ProtocolResult<Root> {
        for _ in 0..200_000 {
            self.finished.extend(self.target.take_finished());
            if let Some(root) = self.target.outcome()? {
                return Ok(root);
            }
            self.fill_jobs();
            match self.draw(4) {
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
                        let mut out = Vec::new();
                        self.target.message(message, &mut out)?;
                        self.send_to_source(out);
                    }
                }
                2 if !self.source_jobs.is_empty() => {
                    let number = self.draw(self.source_jobs.len());
                    let job = self.source_jobs.swap_remove(number);
                    self.do_source(job);
                }
                3 if !self.target_jobs.is_empty() => {
                    let number = self.draw(self.target_jobs.len());
                    let job = self.target_jobs.swap_remove(number);
                    self.do_target(job)?;
                }
                _ => {}
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

    /// What arrives of a message; an error if it is none any more.
    fn on_its_way(&mut self, message: Message) -> ProtocolResult<Message> {
        if self.changed_in == 0 || self.draw(self.changed_in) > 0 {
            return Ok(message);
        }
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let at = blockferry_transport::frame::HEADER_BYTES - 1;
        let at = at + self.draw(bytes.len() - at);
        bytes[at] ^= 1 << self.draw(8);
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
            let old = &self.old;
            let mut out = Vec::new();
            let job = self
                .target
                .next_job(&mut |from| data(old, &geometry, from), &mut out);
            self.target_jobs.extend(job);
            self.send_to_source(out);
        }
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
                let mut out = Vec::new();
                self.source.scanned(leaves, 1, &mut out);
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
            SourceJob::Examine => unreachable!("not asked for here"),
        }
    }

    fn do_target(&mut self, job: TargetJob) -> ProtocolResult {
        let mut out = Vec::new();
        match job {
            TargetJob::Scan(region) => {
                let extent = self.geometry.region_extent(region);
                let leaves =
                    RegionLeaves::of_bytes(&self.geometry, region, &self.old[range(extent)]);
                self.target.scanned(leaves, &mut out);
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

/// An image of regions of 4 MiB; each byte of `regions` says how a region is filled, 0 leaves it empty.
fn image(regions: &[u8], bytes: usize) -> Vec<u8> {
    let mut image = vec![0; bytes];
    for (region, fill) in image.chunks_mut(4 << 20).zip(regions) {
        if *fill == 0 {
            continue;
        }
        for (number, page) in region.chunks_mut(4096).enumerate() {
            let word = scramble(u64::from(*fill) << 32 | number as u64);
            page.iter_mut()
                .zip(word.to_le_bytes().iter().cycle())
                .for_each(|(byte, with)| *byte = *with);
        }
    }
    image
}

#[test]
fn the_target_becomes_the_source_in_any_order_of_events() {
    let size = (5 << 20) * 4 + 12_345;
    let old = image(&[1, 0, 3, 4, 5, 6], size);
    let mut new = image(&[1, 2, 0, 4, 5, 6], size);
    // A page here and there, the end, a zero page, a zero block.
    for at in [12 << 20, (12 << 20) + 5000, (16 << 20) + 3, size - 1] {
        new[at] ^= 0xFF;
    }
    new[(17 << 20)..(17 << 20) + 4096].fill(0);
    new[(18 << 20)..(18 << 20) + 16384].fill(0);
    let root = Root::of_bytes(&new, begin(false).block_size);
    for seed in 0..20 {
        for exact in [false, true] {
            let mut pair = Pair::new(&old, &new, begin(exact), seed);

            assert_eq!(pair.run(), Ok(root), "seed {seed}");

            assert!(pair.old == new, "seed {seed}");
            let regions: Vec<u64> = pair.finished.iter().map(|l| l.region().get()).collect();
            assert!(regions.is_sorted(), "seed {seed}: {regions:?}");
        }
    }
    assert_ne!(block_digest(&old), block_digest(&new));
}

#[test]
fn identical_images_cost_a_digest_for_each_region() {
    let size = 20 << 20;
    let old = image(&[1, 0, 3, 4, 5], size);
    let mut pair = Pair::new(&old, &old, begin(false), 1);

    pair.run().unwrap();

    let Sent {
        to_source_bytes,
        to_target_bytes,
        data_messages,
    } = pair.sent;
    assert_eq!(data_messages, 0);
    assert!(to_target_bytes <= 4 * 60 + 60, "{to_target_bytes}");
    assert!(to_source_bytes <= 120, "{to_source_bytes}");
}

#[test]
fn whatever_is_changed_on_its_way_never_makes_another_image() {
    let size = (3 << 20) * 4;
    let old = image(&[1, 0, 3], size);
    let mut new = image(&[1, 2, 3], size);
    for at in (0..size).step_by(700_001) {
        new[at] ^= 0xFF;
    }
    let (mut whole, mut refused) = (0, 0);
    for seed in 0..300 {
        let mut pair = Pair::new(&old, &new, begin(seed % 2 == 0), seed);
        pair.changed_in = 12;
        match pair.run() {
            Ok(_) => {
                assert!(pair.old == new, "seed {seed}");
                whole += 1;
            }
            Err(_) => refused += 1,
        }
    }
    assert!(
        whole > 5 && refused > 50,
        "{whole} whole, {refused} refused"
    );
}
