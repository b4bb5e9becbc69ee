//! The side that has the target. Sans I/O: messages and finished work in, messages and work out.
//!
//! ```text
//! region:  scanned here, told there -> equal, done
//!                                   -> opened -> blocks -> pages wanted -> staged -> done
//! ```
//! Where a change map tells what may differ, this side leads: it opens just those blocks of a region, or none.
//!
//! Many regions are under way at once, so that latency is paid once for each level. Regions are done in ascending order.
//! What the source says is checked: each block by its digest when it is staged, everything by the root in the end.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use blockferry_core::{
    Digest, Geometry, REGION_BLOCKS, RegionIndex, RegionLeaves, Root, TreeHasher,
};
use blockferry_pipeline::block_in;
use blockferry_transport::message::{Begin, NamedBlock, PageRun};
use blockferry_transport::{Message, ShortDigests, Width};

use super::{ProtocolError, ProtocolResult, block_number, unexpected, violates};

/// Most bytes of blocks that are wanted and did not come yet, or wait to be staged.
const MAX_WANTED_BYTES: u64 = 24 * 1024 * 1024;
/// Most bytes of blocks in one request.
const MAX_REQUEST_BYTES: u64 = 4 * 1024 * 1024;

/// What its host does for it. Several at once; each is answered by one call.
#[derive(Debug)]
pub(super) enum TargetJob {
    /// Take the leaves of a region of the target, as staged so far: [`TargetRole::scanned`].
    Scan(RegionIndex),
    /// Take digests of the pages of these blocks: [`TargetRole::paged`].
    Pages {
        region: RegionIndex,
        blocks: Vec<u16>,
        width: Width,
    },
    /// Stage zeros: [`TargetRole::staged`].
    StageZeros {
        region: RegionIndex,
        blocks: Vec<u16>,
    },
    /// Check that pages make of their blocks what they should become, and stage them: [`TargetRole::staged`].
    Stage(Arrived),
}

/// What a change map tells of a region. All other blocks are what they are here.
#[derive(Debug, Default)]
pub(super) struct Mapped {
    /// Blocks that may differ, ascending.
    pub(super) open: Vec<u16>,
    /// Blocks that are zero.
    pub(super) zeros: Vec<u16>,
}

/// Pages that came.
#[derive(Debug)]
pub(super) struct Arrived {
    /// The blocks that are complete with them: region, place in it, the digest to reach.
    pub(super) blocks: Vec<(u64, u16, Digest)>,
    pub(super) runs: Vec<PageRun>,
    pub(super) frame: Vec<u8>,
}

/// The state of the target's side while it scans.
#[derive(Debug)]
pub(super) struct TargetRole {
    begin: Begin,
    /// The target becomes all of the source, whatever it holds: leaves tell only what is staged already, and what
    /// they call zero is not known to be.
    whole: bool,
    geometry: Geometry,
    /// Of what the source told: of all regions, or of the blocks that were opened.
    tree: TreeHasher,
    /// The first region that was not looked at here.
    next: u64,
    /// Regions that are being read here.
    reading: BTreeSet<u64>,
    /// Read here and not compared yet; what is not among them is zero.
    ours: BTreeMap<u64, (RegionLeaves, Mapped)>,
    /// Told and not compared yet; what is not among them is zero.
    theirs: BTreeMap<u64, ShortDigests>,
    told_below: u64,
    compared_below: u64,
    open: BTreeMap<u64, Open>,
    /// Done, while an earlier one is not.
    done: BTreeMap<u64, RegionLeaves>,
    /// Of those, the blocks that were opened; all others are zero.
    opened: BTreeMap<u64, RegionLeaves>,
    /// Done in order, for the host to take.
    finished: Vec<RegionLeaves>,
    /// Regions that the source remembers, and that were done since it was told so.
    unreleased: u32,
    /// With a map: nothing more is opened, and the source knows.
    all_opened: bool,
    /// Bytes of blocks that were asked for and are not staged.
    wanted_bytes: u64,
    jobs: VecDeque<TargetJob>,
    /// Requests that wait until less is wanted.
    requests: VecDeque<Request>,
    root: Option<Root>,
    source_read_bytes: u64,
}

#[derive(Debug)]
struct Request {
    region: u64,
    blocks: Vec<u16>,
    /// Whether the target has something there that is worth comparing.
    by_pages: bool,
}

/// A region that differs.
#[derive(Debug)]
struct Open {
    ours: RegionLeaves,
    expected: Expected,
    /// What it becomes, once the source said.
    new: Option<RegionLeaves>,
    /// Blocks that are to be staged.
    left: BTreeMap<u16, Left>,
}

/// What the source's answer has to be.
#[derive(Debug)]
enum Expected {
    /// It is not asked.
    Nothing,
    /// Blocks that come to the digest that was told of the region.
    Region(ShortDigests),
    /// Some of the blocks that were opened.
    Opened(Mapped),
}

/// What is missing of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// It was not asked for.
    Unasked,
    /// Its pages that differ were asked for, or all of it.
    Asked { whole: bool },
    /// They came, and are being staged.
    Arrived { whole: bool },
    /// Zeros are being staged.
    Zeroing,
}

impl TargetRole {
    /// `whole` where nothing is compared but what is staged already.
    pub(super) fn new(begin: Begin, size_bytes: u64, whole: bool) -> Self {
        let geometry = Geometry::new(size_bytes, begin.block_size);
        Self {
            begin,
            whole,
            geometry,
            tree: TreeHasher::new(geometry),
            next: 0,
            reading: BTreeSet::new(),
            ours: BTreeMap::new(),
            theirs: BTreeMap::new(),
            // With a map the source tells nothing that was not asked.
            told_below: if begin.mapped {
                geometry.region_count()
            } else {
                0
            },
            compared_below: 0,
            open: BTreeMap::new(),
            done: BTreeMap::new(),
            opened: BTreeMap::new(),
            finished: Vec::new(),
            unreleased: 0,
            all_opened: false,
            wanted_bytes: 0,
            jobs: VecDeque::new(),
            requests: VecDeque::new(),
            root: None,
            source_read_bytes: 0,
        }
    }

    /// Takes a message of the source; appends what is to be sent.
    pub(super) fn message(&mut self, message: Message, out: &mut Vec<Message>) -> ProtocolResult {
        match message {
            Message::Regions {
                regions,
                digests,
                below,
            } if !self.begin.mapped => self.told(&regions, &digests, below, out),
            Message::Scanned { root, read_bytes } => self.scan_ended(root, read_bytes),
            Message::Blocks { region, differing } => self.differ(region, &differing, out),
            Message::Data {
                blocks,
                runs,
                frame,
            } => self.arrived(&blocks, runs, frame),
            other => Err(unexpected("target", &other)),
        }
    }

    /// What to do next; `None` if there is nothing until more messages come or work is done. `next_data` is the
    /// first region from there on in which the target may hold data.
    pub(super) fn next_job(
        &mut self,
        next_data: &mut dyn FnMut(u64) -> Option<u64>,
        out: &mut Vec<Message>,
    ) -> Option<TargetJob> {
        if let Some(job) = self.jobs.pop_front() {
            return Some(job);
        }
        let count = self.geometry.region_count();
        if self.next >= count {
            // Nothing else ends a scan with a map of an image that has no region.
            self.finish(out);
            return None;
        }
        let mut held = self.reading.len() + self.ours.len() + self.open.len() + self.done.len();
        if self.begin.mapped {
            // The source remembers these as well, and refuses more than the window.
            held += usize::try_from(self.unreleased).unwrap_or(usize::MAX);
        }
        if held >= self.window() {
            return None;
        }
        let found = next_data(self.next).filter(|region| *region < count);
        self.next = found.map_or(count, |region| region + 1);
        match found {
            Some(region) => {
                self.reading.insert(region);
                Some(TargetJob::Scan(RegionIndex::new(region)))
            }
            None => {
                self.compare(out);
                None
            }
        }
    }

    /// What to do yet when no more messages come: what has arrived is staged, so that it need not come again.
    pub(super) fn next_arrived(&mut self) -> Option<TargetJob> {
        let is_staging =
            |job: &TargetJob| matches!(job, TargetJob::Stage(_) | TargetJob::StageZeros { .. });
        std::iter::from_fn(|| self.jobs.pop_front()).find(is_staging)
    }

    /// A region of the target was read, as far as it is not known. `mapped` counts in a scan with a map.
    pub(super) fn scanned(&mut self, leaves: RegionLeaves, mapped: Mapped, out: &mut Vec<Message>) {
        let region = leaves.region().get();
        let is_equal = mapped.open.is_empty() && leaves.is_zero();
        if self.reading.remove(&region) && (self.whole || !is_equal) {
            self.ours.insert(region, (leaves, mapped));
        }
        self.compare(out);
    }

    /// Digests of the pages of blocks were taken: they are asked for.
    pub(super) fn paged(
        &mut self,
        region: RegionIndex,
        blocks: Vec<(u16, ShortDigests)>,
        out: &mut Vec<Message>,
    ) {
        let region = region.get();
        out.push(Message::Want { region, blocks });
    }

    /// Blocks were staged, except those that did not become what they should.
    pub(super) fn staged(
        &mut self,
        blocks: &[(u64, u16)],
        wrong: &[(u64, u16)],
        out: &mut Vec<Message>,
    ) -> ProtocolResult {
        for &(region, block) in blocks {
            let length = self.block_bytes(region, block);
            let Some(open) = self.open.get_mut(&region) else {
                continue;
            };
            let left = open.left.get(&block).copied();
            if !matches!(left, Some(Left::Zeroing)) {
                self.wanted_bytes -= length;
            }
            if !wrong.contains(&(region, block)) {
                open.left.remove(&block);
            } else if left == (Some(Left::Arrived { whole: true })) {
                return Err(violates(format!(
                    "block {block} of region {region}: what was sent does not have the digest that was told of it"
                )));
            } else {
                open.left.insert(block, Left::Unasked);
                self.requests.push_front(Request {
                    region,
                    blocks: vec![block],
                    by_pages: false,
                });
            }
            self.close_if_complete(region);
        }
        self.pump(out);
        self.finish(out);
        Ok(())
    }

    /// Regions that are done since the last call, ascending; those left out are zero on both sides.
    pub(super) fn take_finished(&mut self) -> Vec<RegionLeaves> {
        std::mem::take(&mut self.finished)
    }

    /// The root that the source told, once the target is all that the source is.
    ///
    /// # Errors
    /// A shortened digest was taken for another, or the source told lies.
    pub(super) fn outcome(&self) -> ProtocolResult<Option<Root>> {
        let count = self.geometry.region_count();
        let waits = self.compared_below < count || !self.open.is_empty();
        let Some(root) = self.root.filter(|_| !waits) else {
            return Ok(None);
        };
        let found = self.tree.clone().finish();
        if found == root {
            return Ok(Some(root));
        }
        Err(self.mistaken(format!(
            "the source says that its root is {root}, what it told comes to {found}"
        )))
    }

    /// Bytes that the source's side says it has read for its digests.
    pub(super) fn source_read_bytes(&self) -> u64 {
        self.source_read_bytes
    }

    fn window(&self) -> usize {
        usize::try_from(self.begin.window).unwrap_or(usize::MAX)
    }

    fn told(
        &mut self,
        regions: &[u64],
        digests: &ShortDigests,
        below: u64,
        out: &mut Vec<Message>,
    ) -> ProtocolResult {
        let (from, count) = (self.told_below, self.geometry.region_count());
        let inside = regions.iter().all(|r| (from..below).contains(r));
        if below < from || below > count || !inside || digests.width() != self.width(Width::Sixteen)
        {
            return Err(violates(format!(
                "regions below {below}: expected numbers from {from} to {count} and digests as agreed"
            )));
        }
        let held = self.theirs.len() + self.open.len() + self.done.len();
        if held + regions.len() > 2 * self.window() {
            return Err(violates("more regions were told than may be read ahead"));
        }
        for (number, region) in regions.iter().enumerate() {
            self.theirs.insert(*region, digests.one(number));
        }
        self.told_below = below;
        self.compare(out);
        Ok(())
    }

    fn scan_ended(&mut self, root: Root, read_bytes: u64) -> ProtocolResult {
        let waits = self.told_below < self.geometry.region_count();
        if waits || self.all_opened != self.begin.mapped || self.root.is_some() {
            return Err(violates("the root before the last region, or again"));
        }
        self.root = Some(root);
        self.source_read_bytes = read_bytes;
        Ok(())
    }

    /// Compares what is known of both sides.
    fn compare(&mut self, out: &mut Vec<Message>) {
        let ours_below = self.reading.first().copied().unwrap_or(self.next);
        let limit = ours_below.min(self.told_below);
        while let Some(region) = first_of(&self.ours, &self.theirs).filter(|r| *r < limit) {
            let index = RegionIndex::new(region);
            let ours = self.ours.remove(&region);
            let (ours, mapped) = ours.unwrap_or_else(|| {
                let zero = RegionLeaves::zero(&self.geometry, index);
                (zero, Mapped::default())
            });
            if self.begin.mapped {
                self.open_blocks(ours, mapped, out);
                continue;
            }
            match self.theirs.remove(&region) {
                Some(told) if told.matches(0, &ours.digest()) => {
                    let new = ours.clone();
                    self.open_region(ours, Expected::Nothing);
                    self.becomes(region, new);
                }
                Some(told) => {
                    let blocks = ShortDigests::of(self.width(Width::Eight), ours.iter());
                    out.push(Message::OpenRegion { region, blocks });
                    self.open_region(ours, Expected::Region(told));
                }
                None => {
                    self.open_region(ours, Expected::Nothing);
                    let zero = RegionLeaves::zero(&self.geometry, index);
                    self.becomes(region, zero);
                }
            }
        }
        self.compared_below = self.compared_below.max(limit);
        self.pump(out);
        self.finish(out);
    }

    /// Asks for the blocks that may differ, if there are any.
    fn open_blocks(&mut self, ours: RegionLeaves, mapped: Mapped, out: &mut Vec<Message>) {
        let region = ours.region().get();
        if mapped.open.is_empty() {
            let new = with_zeros(&ours, &mapped);
            self.open_region(ours, Expected::Nothing);
            self.becomes(region, new);
            return;
        }
        let held = |block: &u16| {
            let number = usize::from(*block);
            let digest = Some(ours.get(number)).filter(|_| !ours.is_zero_block(number));
            (*block, digest)
        };
        let blocks: Vec<NamedBlock> = mapped.open.iter().map(held).collect();
        out.push(Message::OpenBlocks { region, blocks });
        self.open_region(ours, Expected::Opened(mapped));
    }

    fn open_region(&mut self, ours: RegionLeaves, expected: Expected) {
        let open = Open {
            expected,
            new: None,
            left: BTreeMap::new(),
            ours,
        };
        self.open.insert(open.ours.region().get(), open);
    }

    /// The source said in which blocks a region differs.
    fn differ(
        &mut self,
        region: u64,
        differing: &[NamedBlock],
        out: &mut Vec<Message>,
    ) -> ProtocolResult {
        let open = self.open.get(&region).filter(|open| open.new.is_none());
        let (mut new, told, opened) = match open.map(|open| (&open.ours, &open.expected)) {
            Some((ours, Expected::Region(told))) => (ours.clone(), Some(told), None),
            Some((ours, Expected::Opened(mapped))) => {
                (with_zeros(ours, mapped), None, Some(&mapped.open))
            }
            Some((_, Expected::Nothing)) | None => {
                return Err(violates(format!(
                    "blocks of region {region}, which is not open"
                )));
            }
        };
        for (number, digest) in differing {
            let block = usize::from(*number);
            let is_open = opened.is_none_or(|opened| opened.binary_search(number).is_ok());
            if block >= new.len() || !is_open {
                return Err(violates(format!(
                    "block {block} of region {region}, which is not open"
                )));
            }
            match digest {
                Some(digest) => new.set(block, *digest),
                None => new.set_zero(block),
            }
        }
        if let Some(opened) = opened {
            let opened = only(&new, opened);
            self.opened.insert(region, opened);
        }
        if told.is_some_and(|told| !told.matches(0, &new.digest())) {
            return Err(self.mistaken(format!(
                "the blocks that differ in region {region} do not come to its digest"
            )));
        }
        self.becomes(region, new);
        self.pump(out);
        self.finish(out);
        Ok(())
    }

    /// What is to be staged of a region that becomes `new`.
    fn becomes(&mut self, region: u64, new: RegionLeaves) {
        let Some(open) = self.open.get_mut(&region) else {
            return;
        };
        let (mut zeros, mut whole, mut pages) = (Vec::new(), Vec::new(), Vec::new());
        for block in open.ours.differing(&new) {
            let kind = match (new.is_zero_block(block), open.ours.is_zero_block(block)) {
                (true, _) => &mut zeros,
                (false, true) => &mut whole,
                (false, false) if self.whole => &mut whole,
                (false, false) => &mut pages,
            };
            kind.push(block_number(block));
        }
        if self.whole {
            let all = 0..new.len();
            zeros = all
                .filter(|b| new.is_zero_block(*b))
                .map(block_number)
                .collect();
        }
        for (blocks, left) in [
            (&zeros, Left::Zeroing),
            (&whole, Left::Unasked),
            (&pages, Left::Unasked),
        ] {
            open.left.extend(blocks.iter().map(|block| (*block, left)));
        }
        open.new = Some(new);
        if !zeros.is_empty() {
            let region = RegionIndex::new(region);
            let blocks = zeros;
            self.jobs
                .push_back(TargetJob::StageZeros { region, blocks });
        }
        for (blocks, by_pages) in [(whole, false), (pages, true)] {
            let most = MAX_REQUEST_BYTES / self.begin.block_size.bytes();
            for blocks in blocks.chunks(usize::try_from(most).unwrap_or(1).max(1)) {
                let blocks = blocks.to_vec();
                self.requests.push_back(Request {
                    region,
                    blocks,
                    by_pages,
                });
            }
        }
        self.close_if_complete(region);
    }

    /// Asks for more, as far as there is room.
    fn pump(&mut self, out: &mut Vec<Message>) {
        while let Some(request) = self.requests.front() {
            let lengths = request.blocks.iter();
            let bytes: u64 = lengths.map(|b| self.block_bytes(request.region, *b)).sum();
            if self.wanted_bytes > 0 && self.wanted_bytes + bytes > MAX_WANTED_BYTES {
                break;
            }
            let Some(request) = self.requests.pop_front() else {
                break;
            };
            self.wanted_bytes += bytes;
            self.ask(request, out);
        }
    }

    fn ask(&mut self, request: Request, out: &mut Vec<Message>) {
        let Request {
            region,
            blocks,
            by_pages,
        } = request;
        let width = self.width(Width::Four);
        if let Some(open) = self.open.get_mut(&region) {
            let asked = Left::Asked { whole: !by_pages };
            open.left.extend(blocks.iter().map(|block| (*block, asked)));
        }
        if by_pages {
            let region = RegionIndex::new(region);
            self.jobs.push_back(TargetJob::Pages {
                region,
                blocks,
                width,
            });
        } else {
            let whole = |block| (block, ShortDigests::new(width));
            let blocks = blocks.into_iter().map(whole).collect();
            out.push(Message::Want { region, blocks });
        }
    }

    /// Pages came. Each block must have been asked for, and the pages must be theirs.
    fn arrived(
        &mut self,
        blocks: &[(u64, u16)],
        runs: Vec<PageRun>,
        frame: Vec<u8>,
    ) -> ProtocolResult {
        let pages_per_block = self.begin.block_size.pages();
        let mut named = BTreeSet::new();
        let mut expected = Vec::with_capacity(blocks.len());
        for &(region, block) in blocks {
            let open = self.open.get_mut(&region);
            let found =
                open.and_then(|open| Some((open.left.get_mut(&block)?, open.new.as_ref()?)));
            let Some((left @ Left::Asked { .. }, new)) = found else {
                return Err(violates(format!(
                    "pages of block {block} of region {region}, which nobody asked for"
                )));
            };
            if let Left::Asked { whole } = *left {
                *left = Left::Arrived { whole };
            }
            expected.push((region, block, new.get(usize::from(block))));
            named.insert(region * REGION_BLOCKS + u64::from(block));
        }
        let belongs = |run: &PageRun| {
            let last = run.first.checked_add(u64::from(run.count) - 1);
            last.is_some_and(|last| {
                (run.first / pages_per_block..=last / pages_per_block).all(|b| named.contains(&b))
            })
        };
        if !runs.iter().all(belongs) {
            return Err(violates(
                "pages outside of the blocks that they are sent for",
            ));
        }
        self.jobs.push_back(TargetJob::Stage(Arrived {
            blocks: expected,
            runs,
            frame,
        }));
        Ok(())
    }

    fn close_if_complete(&mut self, region: u64) {
        let complete = |open: &Open| open.new.is_some() && open.left.is_empty();
        if self.open.get(&region).is_some_and(complete)
            && let Some(new) = self.open.remove(&region).and_then(|open| open.new)
        {
            self.done.insert(region, new);
        }
    }

    /// Hands out what is done in order, and lets the source forget it.
    fn finish(&mut self, out: &mut Vec<Message>) {
        let limit = self.open.keys().next().copied().unwrap_or(u64::MAX);
        let limit = limit.min(self.compared_below);
        while let Some(entry) = self.done.first_entry()
            && *entry.key() < limit
        {
            let (region, leaves) = entry.remove_entry();
            // With a map the source knows only of regions that were opened.
            let opened = self.opened.remove(&region);
            let told = if self.begin.mapped {
                opened.as_ref()
            } else {
                Some(&leaves)
            };
            if let Some(told) = told {
                self.tree.push(told);
                self.unreleased += 1;
            }
            self.finished.push(leaves);
        }
        let count = self.geometry.region_count();
        if self.begin.mapped && self.open.is_empty() && self.compared_below == count {
            if !std::mem::replace(&mut self.all_opened, true) {
                out.push(Message::Release(count));
            }
        } else if self.unreleased > self.begin.window / 4 {
            self.unreleased = 0;
            out.push(Message::Release(limit));
        }
    }

    fn block_bytes(&self, region: u64, block: u16) -> u64 {
        block_in(&self.geometry, RegionIndex::new(region), usize::from(block)).length()
    }

    /// How much of a digest travels.
    fn width(&self, short: Width) -> Width {
        if self.begin.exact {
            Width::Whole
        } else {
            short
        }
    }

    /// With whole digests, as all are of a scan with a map, it is a lie, else it may be chance.
    fn mistaken(&self, what: String) -> ProtocolError {
        if self.begin.exact || self.begin.mapped {
            violates(what)
        } else {
            ProtocolError::Mistaken(what)
        }
    }
}

/// What a region becomes where nothing else of it differs.
fn with_zeros(ours: &RegionLeaves, mapped: &Mapped) -> RegionLeaves {
    let mut new = ours.clone();
    for block in &mapped.zeros {
        new.set_zero(usize::from(*block));
    }
    new
}

/// These blocks of a region alone.
fn only(leaves: &RegionLeaves, blocks: &[u16]) -> RegionLeaves {
    let mut found = RegionLeaves::zero(leaves.geometry(), leaves.region());
    for block in blocks.iter().copied().map(usize::from) {
        found.set(block, leaves.get(block));
    }
    found
}

fn first_of<A, B>(one: &BTreeMap<u64, A>, other: &BTreeMap<u64, B>) -> Option<u64> {
    let firsts = [one.keys().next(), other.keys().next()];
    firsts.into_iter().flatten().min().copied()
}
