//! A replica: a target with its state directory. Opening it always recovers first.

use std::collections::BTreeMap;
use std::sync::Arc;

use blockferry_core::{Extent, Geometry, PAGE_BYTES, Root};
use blockferry_device::{BlockTarget, Evidence, LockGuard, StorageDir, StorageFile};

use crate::apply::{Pool, Progress, Staged};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Decision, DecisionKind, Point, Retained, SegmentHeader, SessionId, Slot, SourceStamp,
};
use crate::group::GroupId;
use crate::group::{GroupVerdicts, Verdict};
use crate::ledger::Ledger;
use crate::log::{Scan, ScanDurability, parse_segment_name, scan, segment_name};
use crate::manifest::ManifestFile;
use crate::outcome::{applied_point, finish_commit, restore_redo};
use crate::place::{Content, Place};
use crate::plan::{Plan, Strategy, Undo};
use crate::session::Session;
use crate::state::StateFile;
use crate::stats::Stats;

const LOCK_NAME: &str = "lock";

/// Name of the manifest of a point.
pub(crate) fn manifest_name(point: SessionId) -> String {
    format!("{point}.manifest")
}

/// What opening a replica found and did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Recovered {
    /// Nothing was left behind.
    Clean,
    /// An unfinished session waits to be resumed or cancelled.
    Staging,
    /// A committed session was carried out.
    Applied(SessionId),
    /// A roll back was finished.
    RolledBack(SessionId),
    /// A session is prepared and its group's verdict cannot be reached.
    GroupPending(SessionId),
}

/// Whether the target is what its state says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "callers decide for each")]
pub enum Unwritten {
    /// Proven: its evidence is as recorded.
    Proven,
    /// Its evidence differs: someone wrote it.
    Written,
    /// There is no evidence to compare.
    Unknown,
}

/// An open, locked replica.
#[derive(Debug)]
pub struct Replica {
    pub(crate) place: Place,
    pub(crate) dir: Arc<dyn StorageDir>,
    pub(crate) state: StateFile,
    pub(crate) content: Content,
    pub(crate) stats: Arc<Stats>,
    staged: Option<Scan>,
    recovered: Recovered,
    /// Highest epoch of any session seen, durable or not.
    epoch: u64,
    /// A session that could not be taken up again through this handle.
    stranded: Option<SessionId>,
    _lock: Box<dyn LockGuard>,
}

impl Replica {
    /// Locks the state directory, finishes what was decided, and says where the target stands. `groups`
    /// answers for sessions that are members of a group.
    ///
    /// # Errors
    /// Someone else holds it, the state is damaged, or a decision could not be carried out.
    pub fn open(
        place: Place,
        dir: Arc<dyn StorageDir>,
        groups: Option<&dyn GroupVerdicts>,
        progress: Progress<'_>,
    ) -> Result<Self> {
        let lock = dir
            .lock(LOCK_NAME)
            .map_err(|e| Error::log(format!("lock the state of {}", place.label()), e))?;
        let stats = Arc::new(Stats::default());
        let content = place.open()?;
        let state = StateFile::open_or_create(&*dir, &content.identity()?, &stats)?;
        let mut replica = Self {
            place,
            dir,
            state,
            content,
            stats,
            staged: None,
            recovered: Recovered::Clean,
            epoch: 0,
            stranded: None,
            _lock: lock,
        };
        replica.check_identity()?;
        replica.recover(groups, progress)?;
        Ok(replica)
    }

    /// For messages.
    #[must_use]
    pub fn label(&self) -> String {
        self.place.label()
    }

    /// What opening found and did.
    #[must_use]
    pub fn recovered(&self) -> &Recovered {
        &self.recovered
    }

    /// The target as it is now; `None` if it is absent.
    #[must_use]
    pub fn target(&self) -> Option<Arc<dyn BlockTarget>> {
        self.content.target()
    }

    /// Whether the target is a file (which clone and shadow need) and not a device.
    #[must_use]
    pub fn is_file(&self) -> bool {
        matches!(self.place, Place::File { .. })
    }

    /// The directory of a file target.
    #[must_use]
    pub fn target_dir(&self) -> Option<&Arc<dyn StorageDir>> {
        self.place.file().map(|(dir, _)| dir)
    }

    /// The state directory.
    #[must_use]
    pub fn state_dir(&self) -> &Arc<dyn StorageDir> {
        &self.dir
    }

    /// What durability has cost since this replica was opened.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// The point the state names, whether or not the target is still there.
    #[must_use]
    pub fn point(&self) -> Option<&Point> {
        self.state.slot().point.as_ref()
    }

    /// What is kept to return to the point before.
    #[must_use]
    pub fn retained(&self) -> Option<&Retained> {
        self.state.slot().retained.as_ref()
    }

    /// Whether the target is still exactly at [`Self::point`].
    ///
    /// # Errors
    /// The target cannot be examined.
    pub fn unwritten(&self) -> Result<Unwritten> {
        let recorded = &self.state.slot().evidence;
        let now = self.content.evidence()?;
        Ok(if !recorded.is_known() || !now.is_known() {
            Unwritten::Unknown
        } else if now.proves_same(recorded) {
            Unwritten::Proven
        } else {
            Unwritten::Written
        })
    }

    /// The point the target is provably at.
    pub(crate) fn known_point(&self) -> Option<&Point> {
        let proven = matches!(self.unwritten(), Ok(Unwritten::Proven));
        self.point().filter(|_| proven)
    }

    /// An epoch above that of every session before.
    pub(crate) fn next_epoch(&mut self) -> u64 {
        self.epoch = self.epoch.max(self.state.slot().epoch) + 1;
        self.epoch
    }

    /// The unfinished session, if there is one.
    #[must_use]
    pub fn unfinished(&self) -> Option<&SegmentHeader> {
        self.staged.as_ref().map(|s| &s.header)
    }

    /// Whether the unfinished session can go on: the target is still what it was compared with.
    ///
    /// # Errors
    /// The target cannot be examined.
    pub fn can_resume(&self) -> Result<bool> {
        let Some(header) = self.unfinished() else {
            return Ok(false);
        };
        let in_place = header.strategy == Strategy::Direct && header.working_file_id.is_none();
        if in_place {
            return Ok(self.content.target().is_some());
        }
        if let (Some(working), Some((dir, _))) = (header.working_file_id, self.place.file()) {
            let sibling = dir
                .open(&self.place.sibling(header.session))
                .map_err(|e| Error::target("look for the sibling", e))?;
            let id = sibling.map(|s| s.file_id()).transpose();
            if id.map_err(|e| Error::target("identify the sibling", e))? != Some(working) {
                return Ok(false);
            }
        }
        let before = &header.target_evidence;
        let absent = !matches!(self.place, Place::Device(_)) && header.old_file_id.is_none();
        if absent {
            return Ok(self.content.target().is_none());
        }
        if self.content.evidence()?.proves_same(before) {
            return Ok(true);
        }
        self.still_holds_pre_images()
    }

    /// A device's evidence ends with the boot. Where every pre-image is still in place nobody wrote what is
    /// staged; the rest of the target is compared afresh.
    fn still_holds_pre_images(&self) -> Result<bool> {
        let (Some(scan), Content::Device(device)) = (&self.staged, &self.content) else {
            return Ok(false);
        };
        let header = &scan.header;
        if header.strategy != Strategy::Redo || header.undo != Undo::Keep {
            return Ok(false);
        }
        let loaded = LoadedSession::of(scan);
        loaded
            .staged(scan)
            .holds_pre_images(&**device, header.old_bytes)
    }

    /// Where the manifest of `point` is. Its content is checked while it is read.
    #[must_use]
    pub fn manifest_source(&self, point: &Point) -> ManifestSource {
        ManifestSource {
            dir: Arc::clone(&self.dir),
            name: manifest_name(point.id),
        }
    }

    /// Tries whether the target's file system shares blocks between files, on a sibling named after `probe`.
    #[must_use]
    pub fn supports_clone(&self, probe: SessionId) -> bool {
        let (Some((dir, _)), Content::File(old)) = (self.place.file(), &self.content) else {
            return false;
        };
        let name = self.place.sibling(probe);
        let cloned = dir
            .create(&name)
            .and_then(|file| file.clone_from_file(&**old));
        dir.remove(&name).is_ok() && cloned.is_ok()
    }

    /// Begins a session.
    ///
    /// # Errors
    /// An unfinished session is there, or the log or target failed.
    pub fn begin(&mut self, plan: &Plan) -> Result<Session<'_>> {
        if let Some(header) = self.unfinished() {
            return Err(Error::refused(format!(
                "session {} is unfinished: resume or cancel it first",
                header.session
            )));
        }
        self.refuse_while_group_pending()?;
        self.refuse_while_stranded()?;
        Session::begin(self, plan)
    }

    /// Goes on with the unfinished session, from the source it was begun with.
    ///
    /// # Errors
    /// There is none, or its log or working file failed.
    pub fn resume(&mut self, log_limit_bytes: u64) -> Result<Session<'_>> {
        match self.unfinished().map(|h| h.source.clone()) {
            Some(source) => self.resume_from(log_limit_bytes, &source),
            None => Err(Error::refused("there is no unfinished session to resume")),
        }
    }

    /// Goes on with the unfinished session, from a source that may have changed since it was begun.
    ///
    /// # Errors
    /// As [`Self::resume`].
    pub fn resume_from(
        &mut self,
        log_limit_bytes: u64,
        source: &SourceStamp,
    ) -> Result<Session<'_>> {
        self.refuse_while_group_pending()?;
        self.refuse_while_stranded()?;
        if self.staged.is_some() && !self.can_resume()? {
            return Err(Error::refused(format!(
                "{} is not what the unfinished session was compared with: cancel the session and sync again",
                self.label()
            )));
        }
        let Some(scan) = self.staged.take() else {
            return Err(Error::refused("there is no unfinished session to resume"));
        };
        let session = scan.header.session;
        // Until it is taken up, its log must not be mistaken for a leftover.
        self.stranded = Some(session);
        let resumed = Session::resume(self, scan, log_limit_bytes, source)?;
        resumed.replica.stranded = None;
        Ok(resumed)
    }

    fn refuse_while_stranded(&self) -> Result<()> {
        self.stranded.map_or(Ok(()), |session| {
            Err(Error::refused(format!(
                "session {session} could not be taken up: open the target again"
            )))
        })
    }

    /// Records that the target, as it is, holds `point`: an identical pair needs no session.
    ///
    /// # Errors
    /// The state could not be written.
    pub fn adopt(
        &mut self,
        id: SessionId,
        root: Root,
        geometry: Geometry,
        source: SourceStamp,
        made_unix: u64,
    ) -> Result<()> {
        let slot = Slot {
            epoch: self.state.slot().epoch + 1,
            evidence: self.content.evidence()?,
            point: Some(Point {
                id,
                root,
                geometry,
                source,
                made_unix,
            }),
            retained: None,
            ..self.state.slot().clone()
        };
        self.sync_dir()?;
        self.state.publish(slot)?;
        self.remove_leftovers()
    }

    /// Refreshes what is known of the source and the target of the current point without a new one.
    ///
    /// # Errors
    /// The state could not be written.
    pub fn refresh(&mut self, source: SourceStamp) -> Result<()> {
        let evidence = self.content.evidence()?;
        let slot = self.state.slot().clone();
        let Some(point) = slot.point.clone() else {
            return Ok(());
        };
        if slot.evidence == evidence && point.source == source {
            return Ok(());
        }
        let point = Some(Point { source, ..point });
        self.state.publish(Slot {
            evidence,
            point,
            ..slot
        })
    }

    /// A manifest file for a point that no session makes ([`Self::adopt`]).
    ///
    /// # Errors
    /// The state directory failed.
    pub fn create_manifest(&mut self, point: SessionId) -> Result<ManifestFile> {
        ManifestFile::create(&self.dir, point, &self.stats)
    }

    /// Puts a manifest that was created for `written_as` in the place of that of the current point. A crash in
    /// between leaves the point without one.
    ///
    /// # Errors
    /// The state directory failed.
    pub fn replace_manifest(&mut self, written_as: SessionId) -> Result<()> {
        let Some(point) = self.point().map(|p| p.id) else {
            return Ok(());
        };
        let (from, to) = (manifest_name(written_as), manifest_name(point));
        let failed = |e| Error::log(format!("put {from} in the place of {to}"), e);
        self.dir.remove(&to).map_err(failed)?;
        self.dir.rename_new(&from, &to).map_err(failed)?;
        self.sync_dir()
    }

    /// Drops what is staged and gives back what was reserved; returns the bytes freed.
    ///
    /// # Errors
    /// The directory failed; the next open finishes.
    pub fn cancel(&mut self) -> Result<u64> {
        self.refuse_while_group_pending()?;
        let Some(scan) = self.staged.take() else {
            return Ok(0);
        };
        let header = scan.header.clone();
        let unwritten = self.is_as_recorded(&header)?;
        if header.strategy == Strategy::Redo && unwritten {
            self.give_back(&scan)?;
        }
        let held = scan.held_bytes + self.sibling_bytes(header.session)?;
        self.remove_session(header.session, true)?;
        self.sync_dir()?;
        self.sync_target_dir()?;
        self.keep_point_proven(&header, unwritten)?;
        Ok(held)
    }

    /// Reserving and giving back is our own doing: the target was proven to be at its point when the session
    /// began and still is.
    fn keep_point_proven(&mut self, header: &SegmentHeader, unwritten: bool) -> Result<()> {
        let at_point = header.base.is_some() && self.point().map(|p| p.id) == header.base;
        if !unwritten || !at_point || self.unwritten()? == Unwritten::Proven {
            return Ok(());
        }
        let slot = self.state.slot().clone();
        self.publish_slot(slot)
    }

    /// Returns the target to the point before.
    ///
    /// # Errors
    /// There is none, the target was written since, or it failed.
    pub fn rollback(&mut self, progress: Progress<'_>) -> Result<Option<Point>> {
        let (Some(retained), Some(current)) = (self.retained().cloned(), self.point().cloned())
        else {
            return Err(Error::refused("there is no old point to roll back to"));
        };
        if self.unfinished().is_some() {
            return Err(Error::refused(
                "a session is unfinished: cancel it before rolling back",
            ));
        }
        if self.unwritten()? != Unwritten::Proven {
            return Err(Error::refused(format!(
                "{} is not provably unwritten since its point was applied: pre-images would tear it. Outside \
                 of what changed both points are equal: sync again from a source that is at the old point",
                self.label()
            )));
        }
        let scan = self.scan_session(current.id)?.ok_or_else(|| {
            Error::corrupt(format!(
                "the log of session {}, which holds the old point, is gone",
                current.id
            ))
        })?;
        // A session whose removal was cut short must not come back beside the old point.
        self.sync_dir()?;
        // A decision that cannot be carried out would leave neither point: everything it needs is checked first.
        self.check_way_back(&scan)?;
        self.decide_for(&scan.header, DecisionKind::Rollback)
            .and_then(|()| self.carry_rollback_out(&scan, progress))
            .map_err(|e| Error::pending("the way back is decided but not finished", e))?;
        Ok(retained.point)
    }

    fn check_way_back(&self, scan: &Scan) -> Result<()> {
        let header = &scan.header;
        match (header.strategy, self.place.file()) {
            (Strategy::Redo, _) => LoadedSession::of(scan).staged(scan).check_pre_images(),
            (Strategy::Clone | Strategy::Shadow, Some((dir, _))) => {
                let name = self.place.sibling(header.session);
                let failed = |e| Error::target(format!("open {name}, the old file"), e);
                let old = dir.open(&name).map_err(failed)?;
                let id = old.map(|f| f.file_id()).transpose().map_err(failed)?;
                if id.is_some() && id == header.old_file_id {
                    return Ok(());
                }
                Err(Error::corrupt(format!(
                    "{name} is not the old file any more"
                )))
            }
            _ => Err(Error::refused("direct keeps no old point")),
        }
    }

    /// Lets the old point go and frees what held it; returns the bytes freed.
    ///
    /// # Errors
    /// There is nothing to accept, or the directory failed (the next open finishes).
    pub fn accept(&mut self) -> Result<u64> {
        let (Some(_), Some(current)) = (self.retained(), self.point().cloned()) else {
            return Ok(0);
        };
        let Some(scan) = self.scan_session(current.id)? else {
            let slot = Slot {
                retained: None,
                ..self.state.slot().clone()
            };
            self.state.publish(slot)?;
            return Ok(0);
        };
        let unwritten = self.unwritten()? == Unwritten::Proven;
        let zeroed = if unwritten && self.is_file() {
            zeroed_extents(&scan)
        } else {
            Vec::new()
        };
        let held = scan.held_bytes + self.sibling_bytes(current.id)?;
        // RETIRED first: from here on the old point is gone by decision, and removal only follows.
        self.publish(
            &scan.header,
            DecisionKind::Retired,
            Some(current.clone()),
            None,
        )?;
        self.remove_session(current.id, false)?;
        self.sync_dir()?;
        self.sync_target_dir()?;
        self.punch(&zeroed)?;
        Ok(held)
    }

    /// Bytes that logs, siblings and manifests of this replica hold.
    ///
    /// # Errors
    /// The state directory failed.
    pub fn held_bytes(&self) -> Result<u64> {
        held_bytes(&*self.dir, &self.place)
    }

    // ---- recovery ----

    fn check_identity(&self) -> Result<()> {
        let recorded = &self.state.slot().identity;
        let now = self.content.identity()?;
        if recorded.is_known() && now.is_known() && *recorded != now {
            return Err(Error::refused(format!(
                "the state in {} belongs to another device than {}",
                self.dir.label(),
                self.label()
            )));
        }
        Ok(())
    }

    fn recover(
        &mut self,
        groups: Option<&dyn GroupVerdicts>,
        progress: Progress<'_>,
    ) -> Result<()> {
        let sessions = self.sessions()?;
        self.refuse_lost_logs(&sessions)?;
        for (session, segments) in sessions {
            let last = self.state.last_decision(session).cloned();
            if last
                .as_ref()
                .is_some_and(|d| d.kind == DecisionKind::Applied)
                && self.names(session)
            {
                // At rest: its log only holds the old point, until somebody asks for it.
                continue;
            }
            let found = scan(
                &*self.dir,
                session,
                &segments,
                ScanDurability::FlushFirst,
                &self.stats,
            )?;
            match found {
                Some(mut found) => {
                    self.epoch = self.epoch.max(found.header.epoch);
                    let counted = last.as_ref().filter(|d| d.kind.is_carried_out_from_log());
                    counted.map_or(Ok(()), |d| keep_decided(&mut found, d))?;
                    self.recover_session(found, last.as_ref(), groups, progress)?;
                }
                // It never became durable, or its removal was cut short.
                None => self.refuse_lost_log(session, last.as_ref(), groups)?,
            }
        }
        self.remove_leftovers()
    }

    /// A decision that was not carried out and whose log is gone leaves a target that is neither point.
    fn refuse_lost_logs(&self, sessions: &BTreeMap<SessionId, Vec<u32>>) -> Result<()> {
        for session in self.state.sessions() {
            let last = self.state.last_decision(session).map(|d| d.kind);
            let undone = matches!(last, Some(DecisionKind::Commit | DecisionKind::Rollback));
            let settled = self.is_settled(session, last);
            if undone && !settled && !sessions.contains_key(&session) {
                return Err(lost_log(session, &self.label()));
            }
        }
        Ok(())
    }

    fn refuse_lost_log(
        &self,
        session: SessionId,
        last: Option<&Decision>,
        groups: Option<&dyn GroupVerdicts>,
    ) -> Result<()> {
        let lost = match last.map(|d| (d.kind, d)) {
            Some((DecisionKind::Commit | DecisionKind::Rollback, _)) => true,
            Some((DecisionKind::Prepared, decision)) => {
                verdict(groups, decision)? != Verdict::Aborted
            }
            _ => false,
        };
        if lost {
            return Err(lost_log(session, &self.label()));
        }
        Ok(())
    }

    /// Whether the slot says that a decision was carried out, although the decision that says so is not
    /// readable any more: both were made durable together.
    fn is_settled(&self, session: SessionId, last: Option<DecisionKind>) -> bool {
        last == Some(DecisionKind::Commit) && self.names(session)
    }

    fn recover_session(
        &mut self,
        found: Scan,
        last: Option<&Decision>,
        groups: Option<&dyn GroupVerdicts>,
        progress: Progress<'_>,
    ) -> Result<()> {
        let session = found.header.session;
        let epoch = self.state.slot().epoch;
        let Some(decision) = last else {
            self.keep_if_newest(found);
            return Ok(());
        };
        match decision.kind {
            DecisionKind::GiveUp => self.keep_if_newest(found),
            DecisionKind::Prepared => self.recover_member(found, decision, groups, progress)?,
            DecisionKind::Commit if self.is_settled(session, Some(DecisionKind::Commit)) => {
                let evidence = self.state.slot().evidence.clone();
                self.decide_outcome(&found.header, DecisionKind::Applied, evidence)?;
                self.recovered = Recovered::Applied(session);
            }
            DecisionKind::Commit => {
                let root = Root::from_bytes(*decision.root.as_bytes());
                self.carry_commit_out(&found, root, progress)?;
                self.recovered = Recovered::Applied(session);
            }
            DecisionKind::Rollback => {
                self.carry_rollback_out(&found, progress)?;
                self.recovered = Recovered::RolledBack(session);
            }
            // The slot that follows from the outcome was lost: derive it again from the same decision.
            DecisionKind::Applied if found.header.epoch > epoch => {
                let root = Root::from_bytes(*decision.root.as_bytes());
                let (point, retained) = applied_point(self, &found.header, root);
                self.publish_derived(&found.header, decision, Some(point), retained)?;
                self.recovered = Recovered::Applied(session);
            }
            DecisionKind::RolledBack if self.names(session) || found.header.epoch > epoch => {
                let (point, retained) = self.rolled_back_point(&found.header);
                self.publish_derived(&found.header, decision, point, retained)?;
                self.recovered = Recovered::RolledBack(session);
            }
            DecisionKind::Retired if self.names(session) && self.retained().is_some() => {
                let slot = Slot {
                    retained: None,
                    ..self.state.slot().clone()
                };
                self.state.publish(slot)?;
            }
            DecisionKind::Applied | DecisionKind::RolledBack | DecisionKind::Retired => {}
        }
        Ok(())
    }

    fn publish_derived(
        &mut self,
        header: &SegmentHeader,
        decision: &Decision,
        point: Option<Point>,
        retained: Option<Retained>,
    ) -> Result<()> {
        self.state.publish(Slot {
            epoch: header.epoch,
            // As it was when the outcome was reached: who wrote the target since is found out.
            evidence: decision.evidence.clone(),
            point,
            retained,
            ..self.state.slot().clone()
        })
    }

    /// Keeps the newest session that is not older than what was published last; the others are leftovers.
    fn keep_if_newest(&mut self, found: Scan) {
        let newest = self
            .unfinished()
            .map_or(self.state.slot().epoch, |h| h.epoch);
        if found.header.epoch > newest {
            self.staged = Some(found);
            self.recovered = Recovered::Staging;
        }
    }

    fn recover_member(
        &mut self,
        mut found: Scan,
        decision: &Decision,
        groups: Option<&dyn GroupVerdicts>,
        progress: Progress<'_>,
    ) -> Result<()> {
        match verdict(groups, decision)? {
            Verdict::Unknown => {
                self.recovered = Recovered::GroupPending(found.header.session);
                self.staged = Some(found);
            }
            Verdict::Aborted => {
                let header = found.header.clone();
                let unwritten = self.is_as_recorded(&header)?;
                if header.strategy == Strategy::Redo && unwritten {
                    self.give_back(&found)?;
                    self.keep_point_proven(&header, unwritten)?;
                }
            }
            Verdict::Committed => {
                keep_decided(&mut found, decision)?;
                self.decide_for(&found.header, DecisionKind::Commit)?;
                let root = Root::from_bytes(*decision.root.as_bytes());
                self.carry_commit_out(&found, root, progress)?;
                self.recovered = Recovered::Applied(found.header.session);
            }
        }
        Ok(())
    }

    fn refuse_while_group_pending(&self) -> Result<()> {
        match self.recovered {
            Recovered::GroupPending(session) => Err(Error::new(
                ErrorKind::DecisionPending,
                format!("session {session} is prepared; its group decides, and cannot be reached"),
            )),
            _ => Ok(()),
        }
    }

    fn carry_commit_out(&mut self, found: &Scan, root: Root, progress: Progress<'_>) -> Result<()> {
        let loaded = LoadedSession::of(found);
        finish_commit(self, &found.header, root, loaded.staged(found), progress).map(drop)
    }

    fn carry_rollback_out(&mut self, found: &Scan, progress: Progress<'_>) -> Result<()> {
        match found.header.strategy {
            Strategy::Redo => {
                let loaded = LoadedSession::of(found);
                restore_redo(self, &found.header, loaded.staged(found), progress)
            }
            Strategy::Clone | Strategy::Shadow => self.exchange_back(&found.header),
            Strategy::Direct => Err(Error::refused("direct keeps no old point")),
        }
    }

    fn exchange_back(&mut self, header: &SegmentHeader) -> Result<()> {
        let Some((dir, name)) = self.place.file() else {
            return Ok(());
        };
        let sibling = self.place.sibling(header.session);
        let failed = |e| Error::target(format!("put {sibling} back in the place of {name}"), e);
        let found = self.place.open()?.file_id()?;
        if found == header.working_file_id {
            dir.exchange(&sibling, name).map_err(failed)?;
        } else if found != header.old_file_id {
            return Err(Error::refused(format!(
                "{} is neither the new file nor the old one: someone replaced it; the old one is {sibling}",
                self.label()
            )));
        }
        dir.sync()
            .map_err(|e| Error::target("sync the target's directory", e))?;
        self.stats.count_flush();
        self.content = self.place.open()?;
        self.publish_rolled_back(header)
    }

    // ---- publishing ----

    /// Makes a decision of this session durable; it binds what the decision before bound.
    pub(crate) fn decide_for(&mut self, header: &SegmentHeader, kind: DecisionKind) -> Result<()> {
        self.decide_outcome(header, kind, Evidence::unknown())
    }

    fn decide_outcome(
        &mut self,
        header: &SegmentHeader,
        kind: DecisionKind,
        evidence: Evidence,
    ) -> Result<()> {
        let decision = Decision {
            evidence,
            ..self.next_decision(header, kind)
        };
        self.state.decide(&decision)
    }

    /// Publishes that the target is back at its old point.
    pub(crate) fn publish_rolled_back(&mut self, header: &SegmentHeader) -> Result<()> {
        let (point, retained) = self.rolled_back_point(header);
        self.publish(header, DecisionKind::RolledBack, point, retained)?;
        // The outcome is durable; what is left to remove is removed by the next open at the latest.
        self.remove_leftovers().ok();
        Ok(())
    }

    /// The point a rolled back session leaves the target at, and what is still kept: if it was never published,
    /// the old point with the way back it had.
    fn rolled_back_point(&self, header: &SegmentHeader) -> (Option<Point>, Option<Retained>) {
        let slot = self.state.slot();
        let never_left = header.base.is_some() && slot.point.as_ref().map(|p| p.id) == header.base;
        if never_left {
            return (slot.point.clone(), slot.retained.clone());
        }
        (self.point_before(header), None)
    }

    /// Makes an outcome and the slot that follows from it durable with one flush.
    pub(crate) fn publish(
        &mut self,
        header: &SegmentHeader,
        kind: DecisionKind,
        point: Option<Point>,
        retained: Option<Retained>,
    ) -> Result<()> {
        let evidence = self.content.evidence()?;
        let decision = Decision {
            evidence: evidence.clone(),
            ..self.next_decision(header, kind)
        };
        let slot = Slot {
            epoch: header.epoch,
            evidence,
            point,
            retained,
            ..self.state.slot().clone()
        };
        self.state.decide_and_publish(&decision, slot)
    }

    /// Publishes a slot whose decision is durable already.
    pub(crate) fn publish_slot(&mut self, slot: Slot) -> Result<()> {
        let evidence = self.content.evidence()?;
        self.state.publish(Slot { evidence, ..slot })
    }

    fn next_decision(&self, header: &SegmentHeader, kind: DecisionKind) -> Decision {
        let zero = blockferry_core::Digest::from_bytes([0; 32]);
        let last = self.state.last_decision(header.session);
        Decision {
            session: header.session,
            epoch: header.epoch,
            ordinal: self.state.next_ordinal(header.session),
            kind,
            records: last.map_or(0, |d| d.records),
            chain: last.map_or(zero, |d| d.chain),
            root: last.map_or(zero, |d| d.root),
            group: last.map_or([0; 16], |d| d.group),
            evidence: Evidence::unknown(),
        }
    }

    /// The point a session builds on, if it was a known one.
    pub(crate) fn point_before(&self, header: &SegmentHeader) -> Option<Point> {
        let slot = self.state.slot();
        let current = slot.point.as_ref().filter(|p| Some(p.id) == header.base);
        let retained = slot.retained.as_ref().and_then(|r| r.point.as_ref());
        current
            .or(retained.filter(|p| Some(p.id) == header.base))
            .cloned()
    }

    fn names(&self, session: SessionId) -> bool {
        self.point().is_some_and(|p| p.id == session)
    }

    // ---- files ----

    /// Segments of every session in the state directory.
    fn sessions(&self) -> Result<BTreeMap<SessionId, Vec<u32>>> {
        sessions_in(&*self.dir)
    }

    fn scan_session(&self, session: SessionId) -> Result<Option<Scan>> {
        let segments = self.sessions()?.remove(&session).unwrap_or_default();
        scan(
            &*self.dir,
            session,
            &segments,
            ScanDurability::FlushFirst,
            &self.stats,
        )
    }

    /// Whether the target is provably what it was when the session last looked at it.
    fn is_as_recorded(&self, header: &SegmentHeader) -> Result<bool> {
        let now = self.place.open()?.evidence()?;
        Ok(now.proves_same(&header.target_evidence))
    }

    fn give_back(&self, found: &Scan) -> Result<()> {
        let Some(target) = self.content.target() else {
            return Ok(());
        };
        let loaded = LoadedSession::of(found);
        let extents: Vec<Extent> = loaded.ledger.reserved.iter().collect();
        if extents.is_empty() {
            return Ok(());
        }
        for extent in extents {
            target
                .punch(extent)
                .map_err(|e| Error::target("give reserved space back", e))?;
        }
        target
            .flush()
            .map_err(|e| Error::target("flush the target", e))?;
        self.stats.count_flush();
        Ok(())
    }

    fn punch(&mut self, extents: &[Extent]) -> Result<()> {
        let Some(target) = self.content.target().filter(|_| !extents.is_empty()) else {
            return Ok(());
        };
        for extent in extents {
            // Whole pages only: the rest of a page would be written, not given back.
            let (start, end) = (extent.start(), extent.end());
            let pages = start.next_multiple_of(PAGE_BYTES)..end / PAGE_BYTES * PAGE_BYTES;
            if pages.is_empty() {
                continue;
            }
            target
                .punch(Extent::from_range(pages))
                .map_err(|e| Error::target(format!("punch {extent}"), e))?;
        }
        target
            .flush()
            .map_err(|e| Error::target("flush the target", e))?;
        self.stats.count_flush();
        // Our own punching is not somebody else's write.
        let slot = self.state.slot().clone();
        self.publish_slot(slot)
    }

    /// Removes what no point, no retained point and no unfinished session needs. A removal that power loss
    /// undoes is done again by the next open, so nothing is synced.
    pub(crate) fn remove_leftovers(&mut self) -> Result<()> {
        let current = self.point().map(|p| p.id);
        let retained = current.filter(|_| self.retained().is_some());
        let old_point = self.retained().and_then(|r| r.point.as_ref()).map(|p| p.id);
        let staged = self.unfinished().map(|h| h.session);
        for name in self
            .dir
            .names()
            .map_err(|e| Error::log("list the state directory", e))?
        {
            let log = parse_segment_name(&name).map(|(session, _)| session);
            let manifest = name.strip_suffix(".manifest").and_then(SessionId::from_hex);
            let needed = match (log, manifest) {
                (Some(id), _) => Some(id) == retained || Some(id) == staged,
                (None, Some(id)) => [current, old_point, staged].contains(&Some(id)),
                (None, None) => true,
            };
            if !needed {
                self.dir
                    .remove(&name)
                    .map_err(|e| Error::log(format!("remove {name}"), e))?;
            }
        }
        self.remove_siblings(&[retained, staged])
    }

    fn remove_siblings(&self, needed: &[Option<SessionId>]) -> Result<()> {
        let Some((dir, name)) = self.place.file() else {
            return Ok(());
        };
        let listing = dir
            .names()
            .map_err(|e| Error::target("list the target's directory", e))?;
        for sibling in listing {
            let session = sibling_session(&sibling, name);
            if session.is_some() && !needed.contains(&session) {
                dir.remove(&sibling)
                    .map_err(|e| Error::target(format!("remove {sibling}"), e))?;
            }
        }
        Ok(())
    }

    fn remove_session(&mut self, session: SessionId, with_manifest: bool) -> Result<()> {
        let segments = self.sessions()?.remove(&session).unwrap_or_default();
        // The first segment last: the rest means nothing without it, so a removal cut short is seen.
        for segment in segments.into_iter().rev() {
            let name = segment_name(session, segment);
            self.dir
                .remove(&name)
                .map_err(|e| Error::log(format!("remove {name}"), e))?;
        }
        if with_manifest {
            let name = manifest_name(session);
            self.dir
                .remove(&name)
                .map_err(|e| Error::log(format!("remove {name}"), e))?;
        }
        if let Some((dir, _)) = self.place.file() {
            let name = self.place.sibling(session);
            dir.remove(&name)
                .map_err(|e| Error::target(format!("remove {name}"), e))?;
        }
        Ok(())
    }

    fn sibling_bytes(&self, session: SessionId) -> Result<u64> {
        let Some((dir, _)) = self.place.file() else {
            return Ok(0);
        };
        let name = self.place.sibling(session);
        let sibling = dir
            .open(&name)
            .map_err(|e| Error::target(format!("open {name}"), e))?;
        Ok(sibling.map_or(0, |s| s.size_bytes()))
    }

    pub(crate) fn sync_dir(&self) -> Result<()> {
        self.dir
            .sync()
            .map_err(|e| Error::log("sync the state directory", e))?;
        self.stats.count_flush();
        Ok(())
    }

    pub(crate) fn sync_target_dir(&self) -> Result<()> {
        if let Some((dir, _)) = self.place.file() {
            dir.sync()
                .map_err(|e| Error::target("sync the target's directory", e))?;
            self.stats.count_flush();
        }
        Ok(())
    }

    /// The target's evidence now.
    ///
    /// # Errors
    /// The target cannot be examined.
    pub fn evidence(&self) -> Result<Evidence> {
        self.content.evidence()
    }
}

/// The session of a sibling's name.
fn sibling_session(sibling: &str, target: &str) -> Option<SessionId> {
    let rest = sibling
        .strip_prefix('.')?
        .strip_prefix(target)?
        .strip_prefix('.')?;
    SessionId::from_hex(rest.strip_suffix(".blockferry")?)
}

pub(crate) fn sessions_in(dir: &dyn StorageDir) -> Result<BTreeMap<SessionId, Vec<u32>>> {
    let mut sessions: BTreeMap<SessionId, Vec<u32>> = BTreeMap::new();
    for name in dir
        .names()
        .map_err(|e| Error::log("list the state directory", e))?
    {
        if let Some((session, segment)) = parse_segment_name(&name) {
            sessions.entry(session).or_default().push(segment);
        }
    }
    sessions
        .values_mut()
        .for_each(|segments| segments.sort_unstable());
    Ok(sessions)
}

pub(crate) fn held_bytes(dir: &dyn StorageDir, place: &Place) -> Result<u64> {
    let mut held = 0;
    for name in dir
        .names()
        .map_err(|e| Error::log("list the state directory", e))?
    {
        let file = dir
            .open(&name)
            .map_err(|e| Error::log(format!("open {name}"), e))?;
        held += file.map_or(0, |f| f.size_bytes());
    }
    if let Some((dir, target)) = place.file() {
        for name in dir
            .names()
            .map_err(|e| Error::target("list the target's directory", e))?
        {
            if sibling_session(&name, target).is_some() {
                let file = dir
                    .open(&name)
                    .map_err(|e| Error::target(format!("open {name}"), e))?;
                held += file.map_or(0, |f| f.size_bytes());
            }
        }
    }
    Ok(held)
}

fn zeroed_extents(found: &Scan) -> Vec<Extent> {
    if found.header.strategy != Strategy::Redo {
        return Vec::new();
    }
    let loaded = LoadedSession::of(found);
    loaded.staged(found).zeroed().collect()
}

/// A decision says how many records count; fewer, or others, mean that the log lost some after they were read
/// back.
fn keep_decided(found: &mut Scan, decision: &Decision) -> Result<()> {
    if found.header.strategy == Strategy::Redo {
        found.keep_decided(decision)
    } else {
        // The new content is in the sibling, whatever the records say.
        Ok(())
    }
}

fn verdict(groups: Option<&dyn GroupVerdicts>, decision: &Decision) -> Result<Verdict> {
    groups.map_or(Ok(Verdict::Unknown), |g| g.verdict(GroupId(decision.group)))
}

fn lost_log(session: SessionId, target: &str) -> Error {
    Error::corrupt(format!(
        "session {session} of {target} is decided but its log is gone or cannot be read: the target may be \
         neither the old point nor the new one"
    ))
}

/// A scanned session as apply and restore want it.
struct LoadedSession {
    ledger: Ledger,
    pool: Pool,
}

impl LoadedSession {
    fn of(found: &Scan) -> Self {
        Self {
            ledger: Ledger::of(&found.records),
            pool: Pool::new(),
        }
    }

    fn staged<'a>(&'a self, found: &'a Scan) -> Staged<'a> {
        Staged {
            geometry: found.header.geometry,
            files: &found.files,
            records: &self.ledger.places,
            index: &self.ledger.index,
            pool: &self.pool,
            reserved: &self.ledger.reserved,
        }
    }
}

/// Where a manifest is; it can be opened more than once.
#[derive(Clone, Debug)]
pub struct ManifestSource {
    dir: Arc<dyn StorageDir>,
    name: String,
}

impl ManifestSource {
    /// A reader over its bytes; `None` if it is not there.
    #[must_use]
    pub fn open(&self) -> Option<Box<dyn std::io::Read + Send>> {
        let file = self.dir.open(&self.name).ok().flatten()?;
        let reader = SequentialReader { file, offset: 0 };
        Some(Box::new(std::io::BufReader::with_capacity(
            64 * 1024,
            reader,
        )))
    }
}

/// Reads a stored file from its start.
#[derive(Debug)]
struct SequentialReader {
    file: Arc<dyn StorageFile>,
    offset: u64,
}

impl std::io::Read for SequentialReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let left = self.file.size_bytes().saturating_sub(self.offset);
        let count = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        self.file
            .read_at(self.offset, &mut buffer[..count])
            .map_err(std::io::Error::other)?;
        self.offset += count as u64;
        Ok(count)
    }
}
