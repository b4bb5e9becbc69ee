//! The side that has the source. Sans I/O: messages and finished work in, messages and work out.
//!
//! It reads ahead of the target as far as it is let and tells the digests of its regions; what differs the target
//! asks for. Where the target's side has a change map it leads, and only blocks that it opens are read. Its host,
//! [`serve_source`](super::serve_source), reads the source.

use std::collections::{BTreeMap, VecDeque};

use blockferry_core::{Digest, Geometry, PAGE_BYTES, RegionIndex, RegionLeaves, TreeHasher};
use blockferry_pipeline::block_in;
use blockferry_transport::message::{Begin, MAX_REGIONS, NamedBlock, Sample};
use blockferry_transport::{Message, ShortDigests, Width};

use super::{ProtocolResult, block_number, unexpected, violates};

/// Most regions that may be read ahead of the last released one, whatever the target asks for.
pub(super) const MAX_WINDOW: u32 = 256;
/// How often a block may be asked for: once by its pages, and once whole.
const MAX_REQUESTS: u8 = 2;
/// Most requests for pages that wait.
const MAX_WAITING: usize = 1024;

/// What its host does for it. Several at once; each is answered by one call.
#[derive(Debug)]
pub(super) enum SourceJob {
    /// Read a region and take its leaves: [`SourceRole::scanned`].
    Scan(RegionIndex),
    /// Read these blocks of a region and take their leaves: [`SourceRole::digested`].
    Digest {
        region: RegionIndex,
        blocks: Vec<u16>,
    },
    /// Read these blocks and send their pages that differ: nothing else is said of it.
    Pages {
        region: RegionIndex,
        blocks: Vec<(u16, ShortDigests)>,
    },
    /// Look at the source and send what it is.
    Examine,
    /// Send a sample: nothing else is said of it.
    Sample(Sample),
}

/// The state of the source's side.
#[derive(Debug)]
pub(super) struct SourceRole {
    size_bytes: u64,
    run: Option<Run>,
    sampled: bool,
    jobs: VecDeque<SourceJob>,
}

/// A scan under way.
#[derive(Debug)]
struct Run {
    begin: Begin,
    geometry: Geometry,
    tree: TreeHasher,
    /// The first region that was not looked at.
    next: u64,
    /// Regions that are being read or wait for an earlier one; with their leaves once they are read.
    reading: BTreeMap<u64, Option<RegionLeaves>>,
    /// Told and not released: what the target may ask for.
    told: BTreeMap<u64, Told>,
    /// As far as the target was told.
    told_below: u64,
    read_bytes: u64,
    finished: bool,
}

#[derive(Debug)]
struct Told {
    /// Where the target leads, zero but for the blocks that it opened and that are read.
    leaves: RegionLeaves,
    opened: bool,
    /// Blocks that the target opened, and what it has there, until they are read.
    unread: Option<Vec<NamedBlock>>,
    requests: Vec<u8>,
}

impl SourceRole {
    /// For a source of this size.
    pub(super) fn new(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            run: None,
            sampled: false,
            jobs: VecDeque::new(),
        }
    }

    /// Ends the scan under way. Work that was handed out may still be answered, and comes to nothing.
    pub(super) fn stop(&mut self) {
        self.run = None;
        self.jobs.clear();
    }

    /// Takes a message of the target; appends what is to be sent.
    pub(super) fn message(&mut self, message: Message, out: &mut Vec<Message>) -> ProtocolResult {
        match message {
            Message::Begin(begin) => self.begin(begin),
            Message::Examine => self.queue(SourceJob::Examine),
            Message::Sample(sample) => self.sample(sample),
            Message::OpenRegion { region, blocks } => {
                let reply = self.run()?.open(region, &blocks)?;
                out.push(reply);
                Ok(())
            }
            Message::OpenBlocks { region, blocks } => {
                let job = self.run()?.open_blocks(region, blocks)?;
                self.queue(job)
            }
            Message::Want { region, blocks } => {
                self.run()?.want(region, &blocks)?;
                let region = RegionIndex::new(region);
                self.queue(SourceJob::Pages { region, blocks })
            }
            Message::Release(below) => self.run()?.release(below, out),
            other => Err(unexpected("source", &other)),
        }
    }

    /// What to do next; `None` if there is nothing until more messages come or work is done. `next_data` is the
    /// first region from there on that may hold data.
    pub(super) fn next_job(
        &mut self,
        next_data: &mut dyn FnMut(u64) -> Option<u64>,
    ) -> Option<SourceJob> {
        if let Some(job) = self.jobs.pop_front() {
            return Some(job);
        }
        let run = self.run.as_mut()?;
        run.next_region(next_data).map(SourceJob::Scan)
    }

    /// A region was read, which took so many bytes. Tells the target of it once all before it are read as well.
    pub(super) fn scanned(
        &mut self,
        leaves: RegionLeaves,
        read_bytes: u64,
        out: &mut Vec<Message>,
    ) {
        if let Some(run) = self.run_of(&leaves, read_bytes) {
            run.scanned(leaves);
            run.tell(out);
        }
    }

    /// The blocks of a region that the target opened were read, which took so many bytes; all others are zero in
    /// `leaves`.
    pub(super) fn digested(
        &mut self,
        leaves: RegionLeaves,
        read_bytes: u64,
        out: &mut Vec<Message>,
    ) {
        if let Some(run) = self.run_of(&leaves, read_bytes) {
            out.extend(run.digested(leaves));
        }
    }

    /// The scan that these leaves were read for, which took so many bytes; none if it was stopped meanwhile.
    fn run_of(&mut self, leaves: &RegionLeaves, read_bytes: u64) -> Option<&mut Run> {
        let run = self.run.as_mut()?;
        if run.geometry != *leaves.geometry() {
            return None;
        }
        run.read_bytes += read_bytes;
        Some(run)
    }

    /// To be called when [`Self::next_job`] has no region any more: tells the root when all are read.
    pub(super) fn tell_end(&mut self, out: &mut Vec<Message>) {
        if let Some(run) = &mut self.run {
            run.tell(out);
        }
    }

    fn begin(&mut self, begin: Begin) -> ProtocolResult {
        if self.run.is_some() {
            return Err(violates("begin before the scan under way was stopped"));
        }
        let begin = Begin {
            window: begin.window.clamp(1, MAX_WINDOW),
            ..begin
        };
        let geometry = Geometry::new(self.size_bytes, begin.block_size);
        self.run = Some(Run {
            begin,
            geometry,
            tree: TreeHasher::new(geometry),
            next: 0,
            reading: BTreeMap::new(),
            told: BTreeMap::new(),
            told_below: 0,
            read_bytes: 0,
            finished: false,
        });
        Ok(())
    }

    /// One of each source is enough, and its pages are not those of a scan.
    fn sample(&mut self, sample: Sample) -> ProtocolResult {
        if self.run.is_some() || std::mem::replace(&mut self.sampled, true) {
            return Err(violates("a second sample, or one in the middle of a scan"));
        }
        self.queue(SourceJob::Sample(sample))
    }

    fn run(&mut self) -> ProtocolResult<&mut Run> {
        self.run
            .as_mut()
            .ok_or_else(|| violates("expected begin before anything else"))
    }

    fn queue(&mut self, job: SourceJob) -> ProtocolResult {
        if self.jobs.len() >= MAX_WAITING {
            return Err(violates("more requests wait than a target may have"));
        }
        self.jobs.push_back(job);
        Ok(())
    }
}

impl Run {
    fn next_region(
        &mut self,
        next_data: &mut dyn FnMut(u64) -> Option<u64>,
    ) -> Option<RegionIndex> {
        let count = self.geometry.region_count();
        if self.begin.mapped || self.next >= count || self.is_full() {
            return None;
        }
        let found = next_data(self.next).filter(|region| *region < count);
        self.next = found.map_or(count, |region| region + 1);
        let region = found?;
        self.reading.insert(region, None);
        Some(RegionIndex::new(region))
    }

    /// Whether as many regions as may be are remembered, or will be.
    fn is_full(&self) -> bool {
        let window = usize::try_from(self.begin.window).unwrap_or(usize::MAX);
        self.reading.len() + self.told.len() >= window
    }

    fn scanned(&mut self, leaves: RegionLeaves) {
        if let Some(waiting) = self.reading.get_mut(&leaves.region().get()) {
            *waiting = Some(leaves);
        }
    }

    /// Tells of all regions that are read and wait for no earlier one, and of the root after the last.
    fn tell(&mut self, out: &mut Vec<Message>) {
        if self.begin.mapped {
            return;
        }
        let mut regions = Vec::new();
        let mut digests = ShortDigests::new(self.width(Width::Sixteen));
        while let Some(entry) = self.reading.first_entry()
            && entry.get().is_some()
            && let (region, Some(leaves)) = entry.remove_entry()
        {
            self.tree.push(&leaves);
            // What is not told is zero.
            if leaves.is_zero() {
                continue;
            }
            regions.push(region);
            digests.push(&leaves.digest());
            self.told.insert(region, Told::new(leaves));
        }
        let below = self.reading.keys().next().copied().unwrap_or(self.next);
        if below > self.told_below || !regions.is_empty() {
            debug_assert!(regions.len() <= MAX_REGIONS, "no more than the window");
            self.told_below = below;
            out.push(Message::Regions {
                regions,
                digests,
                below,
            });
        }
        self.tell_root(below, out);
    }

    /// Once all that is below the end is in the tree.
    fn tell_root(&mut self, below: u64, out: &mut Vec<Message>) {
        if below == self.geometry.region_count() && !self.finished {
            self.finished = true;
            out.push(Message::Scanned {
                root: self.tree.clone().finish(),
                read_bytes: self.read_bytes,
            });
        }
    }

    /// Remembers what the target has in these blocks until they are read. Regions are opened in order, so that none is
    /// opened again.
    fn open_blocks(&mut self, region: u64, blocks: Vec<NamedBlock>) -> ProtocolResult<SourceJob> {
        let count = self.geometry.region_count();
        if !self.begin.mapped || !(self.next..count).contains(&region) {
            return Err(violates(format!(
                "open blocks of region {region}: expected regions from {} to {count} in order, of a scan with a map",
                self.next
            )));
        }
        if self.is_full() {
            return Err(violates("more regions are open than may be"));
        }
        let index = RegionIndex::new(region);
        let leaves = RegionLeaves::zero(&self.geometry, index);
        let numbers: Vec<u16> = blocks.iter().map(|(block, _)| *block).collect();
        let last = numbers.last().copied();
        if last.is_none_or(|block| usize::from(block) >= leaves.len()) {
            return Err(violates(format!(
                "open blocks of region {region}: expected some of its {}, found as the last {last:?}",
                leaves.len()
            )));
        }
        self.next = region + 1;
        let mut told = Told::new(leaves);
        told.unread = Some(blocks);
        self.told.insert(region, told);
        Ok(SourceJob::Digest {
            region: index,
            blocks: numbers,
        })
    }

    /// What is said of blocks that were opened; nothing if that was of a scan before.
    fn digested(&mut self, leaves: RegionLeaves) -> Option<Message> {
        let region = leaves.region().get();
        let told = self.told.get_mut(&region)?;
        let theirs = told.unread.take()?;
        told.leaves = leaves;
        let said = theirs.into_iter().map(|(block, theirs)| {
            let number = usize::from(block);
            let ours = told.leaves.get(number);
            let ours = Some(ours).filter(|_| !told.leaves.is_zero_block(number));
            (block, ours, theirs)
        });
        let differing = said.filter(|(_, ours, theirs)| ours != theirs);
        Some(Message::Blocks {
            region,
            differing: differing.map(|(block, ours, _)| (block, ours)).collect(),
        })
    }

    /// The blocks in which the target's region differs from the source's.
    fn open(&mut self, region: u64, theirs: &ShortDigests) -> ProtocolResult<Message> {
        let width = self.width(Width::Eight);
        if self.begin.mapped {
            return Err(violates("a whole region is opened in a scan with a map"));
        }
        let told = self.told(region)?;
        if std::mem::replace(&mut told.opened, true) {
            return Err(violates(format!("region {region} is opened again")));
        }
        let leaves = &told.leaves;
        if theirs.len() != leaves.len() || theirs.width() != width {
            return Err(violates(format!(
                "open region {region}: expected {} digests of {} bytes, found {} of {}",
                leaves.len(),
                width.bytes(),
                theirs.len(),
                theirs.width().bytes()
            )));
        }
        let differing = leaves.iter().enumerate();
        let differing = differing.filter(|(block, digest)| !theirs.matches(*block, digest));
        let said = |(block, digest): (usize, Digest)| {
            let digest = Some(digest).filter(|_| !leaves.is_zero_block(block));
            (block_number(block), digest)
        };
        Ok(Message::Blocks {
            region,
            differing: differing.map(said).collect(),
        })
    }

    fn want(&mut self, region: u64, blocks: &[(u16, ShortDigests)]) -> ProtocolResult {
        let geometry = self.geometry;
        let width = self.width(Width::Four);
        let told = self.told(region)?;
        for (block, pages) in blocks {
            let number = usize::from(*block);
            let requests = told
                .requests
                .get_mut(number)
                .filter(|_| !told.leaves.is_zero_block(number))
                .ok_or_else(|| {
                    violates(format!("region {region} has no block {block} with data"))
                })?;
            *requests += 1;
            if *requests > MAX_REQUESTS {
                return Err(violates(format!(
                    "block {block} of region {region} is wanted again and again"
                )));
            }
            let block = block_in(&geometry, RegionIndex::new(region), number);
            let expected =
                usize::try_from(block.length().div_ceil(PAGE_BYTES)).unwrap_or(usize::MAX);
            let fits = pages.len() == expected && pages.width() == width;
            if !pages.is_empty() && !fits {
                return Err(violates(format!(
                    "want of {block}: expected {expected} digests of {} bytes or none, found {}",
                    width.bytes(),
                    pages.len()
                )));
            }
        }
        Ok(())
    }

    fn release(&mut self, below: u64, out: &mut Vec<Message>) -> ProtocolResult {
        if self.begin.mapped {
            return self.release_opened(below, out);
        }
        if below > self.told_below {
            return Err(violates(format!(
                "release of regions below {below}: told were only those below {}",
                self.told_below
            )));
        }
        self.told = self.told.split_off(&below);
        Ok(())
    }

    /// Regions that nothing was asked of are released as well; with the last one the target has asked all it wants to.
    fn release_opened(&mut self, below: u64, out: &mut Vec<Message>) -> ProtocolResult {
        let rest = self.told.split_off(&below);
        let released = std::mem::replace(&mut self.told, rest);
        let unread = released.iter().find(|(_, told)| told.unread.is_some());
        let count = self.geometry.region_count();
        if below > count || unread.is_some() {
            return Err(violates(format!(
                "release of regions below {below} of {count}: expected all of them to be answered"
            )));
        }
        for told in released.into_values() {
            self.tree.push(&told.leaves);
        }
        self.next = self.next.max(below);
        self.tell_root(below, out);
        Ok(())
    }

    fn told(&mut self, region: u64) -> ProtocolResult<&mut Told> {
        self.told
            .get_mut(&region)
            .ok_or_else(|| violates(format!("region {region} was not told of, or is released")))
    }

    /// How much of a digest travels.
    fn width(&self, short: Width) -> Width {
        if self.begin.exact {
            Width::Whole
        } else {
            short
        }
    }
}

impl Told {
    fn new(leaves: RegionLeaves) -> Self {
        Self {
            opened: false,
            unread: None,
            requests: vec![0; leaves.len()],
            leaves,
        }
    }
}
