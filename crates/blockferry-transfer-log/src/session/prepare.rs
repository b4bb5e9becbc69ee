//! From staged to decided: everything is read back, nobody wrote the target, its space is reserved; then one
//! decision.

use blockferry_core::{Extent, ExtentSet, Root};

use super::Session;
use crate::apply::{Progress, Staged};
use crate::batch::{Batch, New, Old};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{DecisionKind, PAGE, SessionId, Unit, usize_of};
use crate::group::{GroupCommitted, GroupId};
use crate::outcome::finish_commit;
use crate::place::Content;
use crate::plan::{Strategy, Undo};

/// What `prepare` found.
#[derive(Debug)]
#[expect(clippy::exhaustive_enums, reason = "callers must handle both")]
pub enum Prepared {
    /// Complete: commit may follow.
    Complete,
    /// Something was staged but did not survive on the medium: stage it again, then prepare again.
    Missing(Lost),
}

/// What was staged and did not survive on the medium.
#[derive(Debug)]
#[non_exhaustive]
pub struct Lost {
    /// Where.
    pub extents: ExtentSet,
    /// What reading it back met; of several things the last.
    pub cause: Error,
}

impl Session<'_> {
    /// Checks that everything staged is whole on the medium and that nobody wrote the target meanwhile, and
    /// reserves the space apply needs.
    ///
    /// # Errors
    /// The target was changed behind our back, or has no room; it is at its old point.
    pub fn prepare(&mut self) -> Result<Prepared> {
        self.prepared = false;
        // What failed to be staged is missing, whether or not its caller took note.
        self.appender.check_alive()?;
        if let Some(working) = &self.working {
            working.check_alive()?;
        }
        self.stage_edge()?;
        self.close_group()?;
        // Nothing is trusted that this run did not read back itself (I3).
        self.verify_pending()?;
        let dropped = self.ledger.places.iter().any(|p| p.dropped);
        if self.lost.is_empty() && dropped && self.header.strategy == Strategy::Redo {
            // Recovery reads all records, so a bad one must not be among them.
            self.compact()?;
            self.verify_pending()?;
        }
        let (extents, loss) = (std::mem::take(&mut self.lost), self.loss.take());
        if let Some(cause) = loss.filter(|_| !extents.is_empty()) {
            return Ok(Prepared::Missing(Lost { extents, cause }));
        }
        if self.ledger.is_fuzzy() {
            return Err(Error::refused(
                "pages copied while the source was being written make no consistent point: another pass must \
                 stage them again",
            ));
        }
        self.check_pre_images()?;
        self.check_unwritten()?;
        if self.header.strategy == Strategy::Redo {
            self.reserve()?;
        }
        self.sync_names()?;
        self.prepared = true;
        Ok(Prepared::Complete)
    }

    /// Cutting a file off inside a page writes that page, in apply or on the way back: it must be in the log even
    /// if its content stays, or a torn write of it could not be mended.
    fn stage_edge(&mut self) -> Result<()> {
        let (old_bytes, new_bytes) = (self.header.old_bytes, self.header.geometry.image_bytes());
        let end = old_bytes.min(new_bytes);
        let start = end - end % PAGE as u64;
        let is_cut = self.replica.is_file() && old_bytes != new_bytes && start < end;
        let target = self.replica.content.target();
        let Some(target) = target.filter(|_| is_cut && self.header.strategy == Strategy::Redo)
        else {
            return Ok(());
        };
        let page_end = start + PAGE as u64;
        let old_extent = Extent::from_range(start..page_end.min(old_bytes));
        let new_extent = Extent::from_range(start..page_end.min(new_bytes));
        let staged: u64 = self
            .ledger
            .index
            .within(new_extent)
            .map(|r| r.extent.length())
            .sum();
        let kept = self.header.undo == Undo::None || self.ledger.touched.covers(old_extent);
        if staged == new_extent.length() && kept {
            return Ok(());
        }
        let mut old = vec![0; PAGE];
        target
            .read_at(start, &mut old[..usize_of(old_extent.length())])
            .map_err(|e| Error::target("read the page where the target is cut off", e))?;
        let mut new = old[..usize_of(new_extent.length())].to_vec();
        self.staged_view().patch(new_extent, &mut new)?;
        let mut batch = Batch::logged(self.header.geometry, Unit::Page);
        if !kept {
            batch.push(old_extent, New::None, Old::Data(&old));
        }
        batch.push(new_extent, New::Data(&new), Old::None);
        self.stage(batch)
    }

    /// Where a way back is promised, everything that apply replaces has a pre-image.
    fn check_pre_images(&self) -> Result<()> {
        if self.header.strategy != Strategy::Redo || self.header.undo == Undo::None {
            return Ok(());
        }
        for extent in self.replaced() {
            if !self.ledger.touched.covers(extent) {
                return Err(Error::refused(format!(
                    "{extent} would be replaced without a pre-image, but the old point is to be kept"
                )));
            }
        }
        Ok(())
    }

    /// What apply replaces of the old image.
    fn replaced(&self) -> impl Iterator<Item = Extent> + '_ {
        let old_image = Extent::from_range(0..self.header.old_bytes);
        let written = self.ledger.index.runs();
        let written = written.filter_map(move |r| r.extent.intersection(old_image));
        let cut_off = self.header.geometry.image_bytes()..self.header.old_bytes;
        let is_cut = self.replica.is_file() && !cut_off.is_empty();
        written.chain(is_cut.then(|| Extent::from_range(cut_off)))
    }

    /// The old content of what apply replaces is durable, where the replica's anchor wants it, before anything decides
    /// that it is replaced.
    fn keep_for_anchor(&mut self) -> Result<()> {
        if !self.replica.is_anchored() {
            return Ok(());
        }
        let replaced: ExtentSet = self.replaced().collect();
        self.replica.keep_for_anchor(&replaced)
    }

    /// Makes the new point count: after this, recovery produces it without the source's help.
    ///
    /// # Errors
    /// The decision could not be made durable. Whether it counts is known when the target is opened again.
    pub fn commit(mut self, root: Root, progress: Progress<'_>) -> Result<Applied> {
        self.check_prepared()?;
        self.keep_for_anchor()?;
        self.seal_working()?;
        self.decide_to_commit(root, [0; 16])?;
        self.apply(root, progress)
    }

    /// Declares this session complete as a member of a group; only [`Self::commit_in_group`] may follow.
    ///
    /// # Errors
    /// It is not prepared, or the decision could not be made durable.
    pub fn prepare_for_group(&mut self, root: Root, group: GroupId) -> Result<()> {
        self.check_prepared()?;
        self.keep_for_anchor()?;
        self.seal_working()?;
        self.decide(DecisionKind::Prepared, root.digest(), group.0)
    }

    /// Commits as the group's record says.
    ///
    /// # Errors
    /// As [`Self::commit`]; the group's record already decides, so recovery finishes.
    pub fn commit_in_group(
        mut self,
        root: Root,
        committed: &GroupCommitted,
        progress: Progress<'_>,
    ) -> Result<Applied> {
        let last = self.replica.state.last_decision(self.header.session);
        if last.map(|d| (d.kind, d.group)) != Some((DecisionKind::Prepared, committed.group.0)) {
            return Err(Error::refused("the session is not prepared for this group"));
        }
        self.decide_to_commit(root, committed.group.0)?;
        self.apply(root, progress)
    }

    fn check_prepared(&self) -> Result<()> {
        if self.prepared {
            return Ok(());
        }
        // Invariant I3: COMMIT implies that every record was read back and found whole.
        Err(Error::refused(
            "the session is not prepared since it last staged something",
        ))
    }

    /// Once the decision is on its way nobody knows whether it counts, until it is read again.
    fn decide_to_commit(&mut self, root: Root, group: [u8; 16]) -> Result<()> {
        self.decide(DecisionKind::Commit, root.digest(), group)
            .map_err(|e| match e.kind() {
                ErrorKind::Log => Error::pending(
                    "the decision to commit may or may not be durable; opening the target again tells",
                    e,
                ),
                _ => e,
            })
    }

    fn apply(self, root: Root, progress: Progress<'_>) -> Result<Applied> {
        let Self {
            replica,
            header,
            files,
            ledger,
            pool,
            proven_bytes,
            proof,
            ..
        } = self;
        let staged = Staged {
            geometry: header.geometry,
            files: &files,
            records: &ledger.places,
            index: &ledger.index,
            pool: &pool,
            reserved: &ledger.reserved,
            proof,
        };
        let applied_bytes = finish_commit(replica, &header, root, staged, progress)?;
        Ok(Applied {
            point: header.session,
            root,
            proven_bytes: proven_bytes + applied_bytes,
        })
    }

    /// Owner, mode and times of the old file, and everything in the sibling, must be durable before COMMIT
    /// lets recovery exchange the two.
    fn seal_working(&mut self) -> Result<()> {
        // The manifest may have been created since the last group.
        self.sync_names()?;
        let Some(working) = self.working.clone() else {
            return Ok(());
        };
        if let (Some(sibling), Content::File(old)) = (&working.sibling, &self.replica.content) {
            sibling
                .copy_metadata(&**old)
                .map_err(|e| Error::target("copy owner, mode and attributes to the new file", e))?;
        }
        working.flush(&self.replica.stats)
    }

    fn check_unwritten(&self) -> Result<()> {
        let in_place = self.working.as_ref().is_some_and(|w| w.sibling.is_none());
        let before = &self.header.target_evidence;
        if in_place || !before.is_known() {
            return Ok(());
        }
        let now = self.replica.place.open()?;
        if now.evidence()?.proves_same(before) {
            return Ok(());
        }
        if now.target().is_none() {
            return Err(Error::refused(format!(
                "{} was removed since this session began; the next sync makes it anew",
                self.replica.place.label()
            )));
        }
        Err(Error::refused(format!(
            "{} was written by someone else since this session began; nothing of it was changed. Cancel the \
             session and sync again",
            self.replica.place.label()
        )))
    }

    fn reserve(&mut self) -> Result<()> {
        let extents: Vec<Extent> = self.ledger.reserved.iter().collect();
        if extents.is_empty() {
            return Ok(());
        }
        // A fresh handle: one on which an earlier attempt failed is dead (I8).
        let Some(target) = self.replica.place.open()?.target() else {
            return Ok(());
        };
        let reserved = target
            .reserve(&extents)
            .map_err(|e| Error::target("reserve space for the new pages in the target", e));
        let noted = self.note_evidence();
        reserved?;
        noted
    }

    /// Allocating may change what counts as evidence, but neither content nor size: without a note of it a
    /// later run could not tell our own doing from somebody else's.
    fn note_evidence(&mut self) -> Result<()> {
        let now = self.replica.place.open()?.evidence()?;
        if now == self.header.target_evidence {
            return Ok(());
        }
        let mut note = Batch::logged(self.header.geometry, Unit::Page);
        note.evidence = now.clone();
        self.append(note)?;
        self.flush_log()?;
        self.header.target_evidence = now;
        self.verify_pending()
    }
}

/// A session that was applied.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Applied {
    /// The point the target is at now.
    pub point: SessionId,
    /// Its root.
    pub root: Root,
    /// Bytes that were read back from the target's medium after its flush.
    pub proven_bytes: u64,
}
