//! A small engine over the transfer log: what delta sync and full download do, in the plainest way.

use std::sync::Arc;

use blockferry_core::{BlockSize, Extent, Geometry, Root, block_digest, is_zero};
use blockferry_device::{BlockTarget, Evidence, Identity};
use blockferry_testkit::{SimDisk, SimOptions};
use blockferry_transfer_log::{
    Applied, Batch, Checkpoint, Error, ErrorKind, GroupVerdicts, Old, Place, Plan, Prepared,
    Replica, Result, Session, SessionId, SourceStamp, Strategy, Undo, frame,
};

pub(crate) const PAGE: usize = 4096;
pub(crate) const TARGET: &str = "disk.raw";
/// How often what was staged may not have survived, as in the engine.
const MOST_LOSSES: u32 = 3;

/// What is synced where and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) strategy: Strategy,
    pub(crate) undo: Undo,
    pub(crate) device: bool,
    pub(crate) block_bytes: u64,
    /// Pages (or blocks) per batch, and batches per group.
    pub(crate) batch_pages: usize,
    pub(crate) group_batches: usize,
    /// Whether pages come compressed, as over a wire.
    pub(crate) frames: bool,
    pub(crate) log_limit_bytes: u64,
}

impl Setup {
    pub(crate) fn file(strategy: Strategy) -> Self {
        Self {
            strategy,
            undo: Undo::Keep,
            device: false,
            block_bytes: 8192,
            batch_pages: 2,
            group_batches: 1,
            frames: false,
            log_limit_bytes: u64::MAX,
        }
    }

    pub(crate) fn device(strategy: Strategy) -> Self {
        Self {
            device: true,
            ..Self::file(strategy)
        }
    }

    /// Every strategy, on the targets and with the ways back it has.
    pub(crate) fn of_every_kind() -> [Self; 6] {
        [
            Self::file(Strategy::Redo),
            Self::device(Strategy::Redo),
            Self::file(Strategy::Redo).without_undo(),
            Self::file(Strategy::Clone),
            Self::file(Strategy::Shadow),
            Self::file(Strategy::Direct).without_undo(),
        ]
    }

    pub(crate) fn without_undo(self) -> Self {
        Self {
            undo: Undo::None,
            ..self
        }
    }

    pub(crate) fn is_without_undo(&self) -> bool {
        self.undo == Undo::None
    }

    /// One batch in one group.
    pub(crate) fn at_once(self) -> Self {
        Self {
            batch_pages: 64,
            group_batches: 64,
            ..self
        }
    }

    pub(crate) fn machine(&self, old: Option<&[u8]>) -> SimDisk {
        let disk = SimDisk::new(SimOptions::default());
        self.install(&disk, old);
        disk
    }

    pub(crate) fn install(&self, disk: &SimDisk, old: Option<&[u8]>) {
        match old {
            Some(old) if self.device => disk.install_device(TARGET, old),
            Some(old) => disk.install_sparse("images", TARGET, old),
            None => {}
        }
        drop(disk.dir("state"));
    }

    pub(crate) fn place(&self, disk: &SimDisk) -> Place {
        if self.device {
            Place::Device(disk.device(TARGET, 0))
        } else {
            Place::File {
                dir: disk.dir("images"),
                name: TARGET.to_owned(),
            }
        }
    }

    pub(crate) fn open(&self, disk: &SimDisk) -> Result<Replica> {
        self.open_in_group(disk, None)
    }

    pub(crate) fn open_in_group(
        &self,
        disk: &SimDisk,
        groups: Option<&dyn GroupVerdicts>,
    ) -> Result<Replica> {
        Replica::open(self.place(disk), disk.dir("state"), groups, &quiet)
    }

    pub(crate) fn content(&self, disk: &SimDisk) -> Option<Vec<u8>> {
        if self.device {
            disk.content(TARGET)
        } else {
            disk.content(&format!("images/{TARGET}"))
        }
    }

    pub(crate) fn geometry(&self, new: &[u8]) -> Geometry {
        Geometry::new(new.len() as u64, BlockSize::new(self.block_bytes).unwrap())
    }

    pub(crate) fn plan(&self, session: u8, new: &[u8]) -> Plan {
        let stamp = SourceStamp::new("source.raw", Identity::unknown(), Evidence::unknown());
        let mut plan = Plan::new(id(session), self.strategy, self.geometry(new), stamp);
        plan.undo = self.undo;
        plan.log_limit_bytes = self.log_limit_bytes;
        plan
    }

    /// Everything from `begin` to the outcome.
    pub(crate) fn sync(&self, replica: &mut Replica, session: u8, new: &[u8]) -> Result<Applied> {
        let target = replica.target();
        let mut session = replica.begin(&self.plan(session, new))?;
        self.finish(&mut session, target.as_ref(), new)?;
        session.commit(root(new), &quiet)
    }

    /// Stages what is missing until `prepare` is content, or is not for the third time.
    pub(crate) fn finish(
        &self,
        session: &mut Session<'_>,
        target: Option<&Arc<dyn BlockTarget>>,
        new: &[u8],
    ) -> Result<()> {
        self.stage(session, target, new, usize::MAX, &mut |_| {})?;
        let mut losses = 0;
        while let Prepared::Missing(lost) = session.prepare()? {
            losses += 1;
            if losses == MOST_LOSSES {
                return Err(lost.cause);
            }
            self.stage(session, target, new, usize::MAX, &mut |_| {})?;
        }
        Ok(())
    }

    /// Stages up to `groups` groups of what differs from `new` in the view of the session.
    pub(crate) fn stage(
        &self,
        session: &mut Session<'_>,
        target: Option<&Arc<dyn BlockTarget>>,
        new: &[u8],
        groups: usize,
        acknowledged: &mut dyn FnMut(&Checkpoint),
    ) -> Result<()> {
        let mut batches = self.batches(session, target, new)?.into_iter();
        for _ in 0..groups {
            let group: Vec<Batch> = batches.by_ref().take(self.group_batches).collect();
            if group.is_empty() {
                break;
            }
            for batch in group {
                session.stage(batch)?;
            }
            acknowledged(&session.close_group()?);
        }
        Ok(())
    }

    /// What differs from `new` in the view of the session.
    pub(crate) fn batches(
        &self,
        session: &Session<'_>,
        target: Option<&Arc<dyn BlockTarget>>,
        new: &[u8],
    ) -> Result<Vec<Batch>> {
        match self.strategy {
            Strategy::Redo | Strategy::Clone => {
                let size = target.map_or(0, |t| t.size_bytes());
                let mut old = vec![0; usize::try_from(size).unwrap()];
                if let Some(target) = target {
                    let failed =
                        |e| Error::new(ErrorKind::Target, format!("read of the target: {e}"));
                    target.read_at(0, &mut old).map_err(failed)?;
                }
                self.differing(session, &old, new)
            }
            Strategy::Shadow | Strategy::Direct => self.everything(session, new),
        }
    }

    fn differing(&self, session: &Session<'_>, old: &[u8], new: &[u8]) -> Result<Vec<Batch>> {
        let (stager, view) = (session.stager(), session.staged_view());
        let keep = session.keeps_old() && stager.wants_old();
        let mut batches = vec![stager.pages()];
        // The new pages of each batch, one after the other.
        let mut pages = vec![Vec::new()];
        let mut used = 0;
        let cuts = !self.device && new.len() < old.len() && keep;
        if cuts {
            let first = new.len() / PAGE * PAGE;
            let extent = Extent::from_range(first as u64..old.len() as u64);
            if !session.has_pre_image(extent) {
                stager.add_cut_off(
                    batches.last_mut().unwrap(),
                    extent,
                    Old::Data(&old[first..]),
                );
            }
        }
        for start in (0..new.len()).step_by(PAGE) {
            let end = new.len().min(start + PAGE);
            let extent = Extent::from_range(start as u64..end as u64);
            let mut was = vec![0; end - start];
            let there = &old[start.min(old.len())..end.min(old.len())];
            was[..there.len()].copy_from_slice(there);
            let mut shown = was.clone();
            if view.overlaps(extent) {
                view.patch(extent, &mut shown)?;
            }
            if shown == new[start..end] {
                continue;
            }
            // The page across the new end has its pre-image with what is cut off.
            let straddles = cuts && end - start < PAGE;
            let old = match keep && !straddles {
                false => Old::None,
                true if is_zero(&was) => Old::Zero,
                true => Old::Data(&was),
            };
            if used == self.batch_pages {
                batches.push(stager.pages());
                pages.push(Vec::new());
                used = 0;
            }
            used += 1;
            let batch = batches.last_mut().unwrap();
            if is_zero(&new[start..end]) {
                stager.add_zero(batch, extent, old);
            } else {
                stager.add(batch, extent, &new[start..end], old);
                let pages = pages.last_mut().unwrap();
                pages.extend_from_slice(&new[start..end]);
                pages.resize(pages.len().next_multiple_of(PAGE), 0);
            }
        }
        if self.frames {
            store_frames(&mut batches, &pages);
        }
        batches.retain(|b| !b.is_empty());
        Ok(batches)
    }

    fn everything(&self, session: &Session<'_>, new: &[u8]) -> Result<Vec<Batch>> {
        let (stager, view) = (session.stager(), session.staged_view());
        let mut batches = vec![stager.blocks()];
        let mut used = 0;
        let step = usize::try_from(self.block_bytes).unwrap();
        for (bytes, start) in new.chunks(step).zip((0u64..).step_by(step)) {
            let extent = Extent::from_range(start..start + bytes.len() as u64);
            if used == self.batch_pages {
                batches.push(stager.blocks());
                used = 0;
            }
            let batch = batches.last_mut().unwrap();
            if is_zero(bytes) {
                stager.write_zeros(batch, extent, view.overlaps(extent), Old::None)?;
            } else if view.digest_of(extent)? != Some(block_digest(bytes)) {
                stager.write_blocks(batch, extent, bytes, &[block_digest(bytes)], Old::None)?;
                used += 1;
            }
        }
        batches.retain(|b| !b.is_empty());
        Ok(batches)
    }
}

/// Stores the new pages of each batch as they come over a wire.
fn store_frames(batches: &mut [Batch], pages: &[Vec<u8>]) {
    for (batch, pages) in batches.iter_mut().zip(pages) {
        if !pages.is_empty() {
            batch.store_frame(&frame::pack(pages, 1).expect("there is memory"));
        }
    }
}

pub(crate) fn quiet(_: u64, _: u64) {}

pub(crate) fn id(session: u8) -> SessionId {
    SessionId::from_bytes([session; 16])
}

pub(crate) fn root(content: &[u8]) -> Root {
    Root::from_bytes(*block_digest(content).as_bytes())
}

/// An image whose pages are each filled with a byte of their own; 0 makes a zero page. Cut to `bytes`.
pub(crate) fn image(pages: &[u8], bytes: usize) -> Vec<u8> {
    let page = |fill: &u8| {
        let mut page = vec![*fill; PAGE];
        if *fill != 0 {
            // No two pages are alike, and no half of one is like the other.
            page.iter_mut()
                .zip(0u8..=255)
                .for_each(|(b, n)| *b = b.wrapping_add(n) | 1);
        }
        page
    };
    let mut image: Vec<u8> = pages.iter().flat_map(page).collect();
    image.truncate(bytes);
    image
}
