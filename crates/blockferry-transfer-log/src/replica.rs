//! A replica: a target with its state directory. Opening it always recovers first.

use std::collections::BTreeMap;
use std::sync::Arc;

use blockferry_core::{Extent, Geometry, ManifestReader, Root};
use blockferry_device::{BlockTarget, Evidence, LockGuard, StorageDir, StorageFile};

use crate::apply::{Pool, Progress, Staged};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Decision, DecisionKind, Point, Retained, SegmentHeader, SessionId, Slot, SourceStamp,
};
use crate::group::{GroupVerdicts, Verdict};
use crate::index::Index;
use crate::log::{Scan, ScanDurability, parse_segment_name, scan, segment_name};
use crate::place::{Content, Place};
use crate::plan::{Plan, Strategy};
use crate::session::{GroupId, ManifestFile, Session, applied_point, finish_commit, restore_redo};
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
        let absent = header.old_file_id.is_none() && self.content.target().is_none();
        Ok(absent || self.content.evidence()?.proves_same(before))
    }

    /// A reader over the manifest of `point`, if it is there and belongs to it. Its content is checked while
    /// it is read.
    ///
    /// # Errors
    /// The state directory failed.
    pub fn manifest(
        &self,
        point: &Point,
    ) -> Result<Option<ManifestReader<impl std::io::Read + Send + use<>>>> {
        let name = manifest_name(point.id);
        let opened = self
            .dir
            .open(&name)
            .map_err(|e| Error::log(format!("open {name}"), e))?;
        let Some(file) = opened else { return Ok(None) };
        Ok(ManifestReader::open(SequentialReader { file, offset: 0 })
            .ok()
            .filter(|reader| reader.geometry() == point.geometry))
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
        Session::begin(self, plan)
    }

    /// Goes on with the unfinished session.
    ///
    /// # Errors
    /// There is none, or its log or working file failed.
    pub fn resume(&mut self, log_limit_bytes: u64) -> Result<Session<'_>> {
        self.refuse_while_group_pending()?;
        let Some(scan) = self.staged.take() else {
            return Err(Error::refused("there is no unfinished session to resume"));
        };
        Session::resume(self, scan, log_limit_bytes)
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
        if header.strategy == Strategy::Redo && self.can_resume_header(&header)? {
            self.give_back(&scan)?;
        }
        let held = scan.held_bytes + self.sibling_bytes(header.session)?;
        self.remove_session(header.session, true)?;
        self.sync_dir()?;
        self.sync_target_dir()?;
        Ok(held)
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
        self.decide_for(&scan.header, DecisionKind::Rollback)?;
        self.carry_rollback_out(&scan, progress)?;
        Ok(retained.point)
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
        let mut leftovers = false;
        for (session, segments) in self.sessions()? {
            let last = self.state.last_decision(session).cloned();
            let Some(found) = scan(
                &*self.dir,
                session,
                &segments,
                ScanDurability::FlushFirst,
                &self.stats,
            )?
            else {
                leftovers = true;
                continue;
            };
            self.refuse_lost_records(&found, last.as_ref())?;
            leftovers |= self.recover_session(found, last.as_ref(), groups, progress)?;
        }
        if leftovers || self.staged.is_none() {
            self.remove_leftovers()?;
        }
        Ok(())
    }

    /// A decision says how many records count; fewer means that the log lost some after they were read back.
    fn refuse_lost_records(&self, found: &Scan, last: Option<&Decision>) -> Result<()> {
        let needs_log = found.header.strategy == Strategy::Redo;
        let Some(decision) = last.filter(|d| {
            needs_log && matches!(d.kind, DecisionKind::Commit | DecisionKind::Rollback)
        }) else {
            return Ok(());
        };
        if found.next_sequence > decision.records {
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "session {} of {} is decided with {} records, but its log has only {}: the log is damaged",
            decision.session,
            self.label(),
            decision.records,
            found.next_sequence.saturating_sub(1)
        )))
    }

    /// Returns whether something is left to remove.
    fn recover_session(
        &mut self,
        found: Scan,
        last: Option<&Decision>,
        groups: Option<&dyn GroupVerdicts>,
        progress: Progress<'_>,
    ) -> Result<bool> {
        let session = found.header.session;
        let epoch = self.state.slot().epoch;
        match last.map(|d| (d.kind, d)) {
            None | Some((DecisionKind::GiveUp, _)) if found.header.epoch <= epoch => Ok(true),
            None | Some((DecisionKind::GiveUp, _)) => Ok(self.keep_newest(found)),
            Some((DecisionKind::Prepared, decision)) => {
                self.recover_member(found, decision, groups, progress)
            }
            Some((DecisionKind::Commit, decision)) => {
                let root = Root::from_bytes(*decision.root.as_bytes());
                self.carry_commit_out(&found, root, progress)?;
                self.recovered = Recovered::Applied(session);
                Ok(true)
            }
            Some((DecisionKind::Rollback, _)) => {
                self.carry_rollback_out(&found, progress)?;
                self.recovered = Recovered::RolledBack(session);
                Ok(true)
            }
            // The slot that follows from APPLIED was lost: derive it again from the same decision.
            Some((DecisionKind::Applied, decision)) if found.header.epoch > epoch => {
                let root = Root::from_bytes(*decision.root.as_bytes());
                let (point, retained) = applied_point(self, &found.header, root);
                let epoch = found.header.epoch;
                // Whether anyone wrote the target since is not known any more: no evidence is claimed.
                let evidence = Evidence::unknown();
                let slot = self.state.slot().clone();
                self.state.publish(Slot {
                    epoch,
                    evidence,
                    point: Some(point),
                    retained,
                    ..slot
                })?;
                self.recovered = Recovered::Applied(session);
                Ok(true)
            }
            Some((DecisionKind::RolledBack, _)) if self.names(session) => {
                let point = self.point_before(&found.header);
                let evidence = Evidence::unknown();
                let slot = self.state.slot().clone();
                self.state.publish(Slot {
                    point,
                    retained: None,
                    evidence,
                    ..slot
                })?;
                Ok(true)
            }
            Some((DecisionKind::Retired, _))
                if self.names(session) && self.retained().is_some() =>
            {
                let slot = Slot {
                    retained: None,
                    ..self.state.slot().clone()
                };
                self.state.publish(slot)?;
                Ok(true)
            }
            Some((DecisionKind::Applied, _)) => {
                Ok(!self.names(session) || self.retained().is_none())
            }
            Some((DecisionKind::RolledBack | DecisionKind::Retired, _)) => Ok(true),
        }
    }

    fn keep_newest(&mut self, found: Scan) -> bool {
        let newer = self
            .staged
            .as_ref()
            .is_none_or(|s| s.header.epoch <= found.header.epoch);
        let replaces = self.staged.is_some();
        if newer {
            self.staged = Some(found);
            self.recovered = Recovered::Staging;
        }
        replaces
    }

    fn recover_member(
        &mut self,
        found: Scan,
        decision: &Decision,
        groups: Option<&dyn GroupVerdicts>,
        progress: Progress<'_>,
    ) -> Result<bool> {
        let group = GroupId(decision.group);
        let verdict = groups.map_or(Ok(Verdict::Unknown), |g| g.verdict(group))?;
        match verdict {
            Verdict::Unknown => {
                self.recovered = Recovered::GroupPending(found.header.session);
                self.staged = Some(found);
                Ok(false)
            }
            Verdict::Aborted => Ok(true),
            Verdict::Committed => {
                self.decide_for(&found.header, DecisionKind::Commit)?;
                let root = Root::from_bytes(*decision.root.as_bytes());
                self.carry_commit_out(&found, root, progress)?;
                self.recovered = Recovered::Applied(found.header.session);
                Ok(true)
            }
        }
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
        let point = self.point_before(header);
        self.publish(header, DecisionKind::RolledBack, point, None)?;
        self.remove_leftovers()
    }

    // ---- publishing ----

    /// Makes a decision of this session durable; it binds what the decision before bound.
    pub(crate) fn decide_for(&mut self, header: &SegmentHeader, kind: DecisionKind) -> Result<()> {
        let decision = self.next_decision(header, kind);
        self.state.decide(&decision)
    }

    /// Makes an outcome and the slot that follows from it durable with one flush.
    pub(crate) fn publish(
        &mut self,
        header: &SegmentHeader,
        kind: DecisionKind,
        point: Option<Point>,
        retained: Option<Retained>,
    ) -> Result<()> {
        let decision = self.next_decision(header, kind);
        let slot = Slot {
            epoch: header.epoch,
            evidence: self.content.evidence()?,
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
            ordinal: self.state.next_ordinal(header.session),
            kind,
            records: last.map_or(0, |d| d.records),
            chain: last.map_or(zero, |d| d.chain),
            root: last.map_or(zero, |d| d.root),
            group: last.map_or([0; 16], |d| d.group),
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

    fn can_resume_header(&self, header: &SegmentHeader) -> Result<bool> {
        Ok(header.target_evidence.is_known()
            && self
                .content
                .evidence()?
                .proves_same(&header.target_evidence))
    }

    fn give_back(&self, found: &Scan) -> Result<()> {
        let Some(target) = self.content.target() else {
            return Ok(());
        };
        let loaded = LoadedSession::of(found);
        for extent in loaded.staged(found).reserved()? {
            target
                .punch(extent)
                .map_err(|e| Error::target("give reserved space back", e))?;
        }
        Ok(())
    }

    fn punch(&mut self, extents: &[Extent]) -> Result<()> {
        let Some(target) = self.content.target().filter(|_| !extents.is_empty()) else {
            return Ok(());
        };
        for extent in extents {
            target
                .punch(*extent)
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

    fn sync_target_dir(&self) -> Result<()> {
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

/// A scanned session as apply and restore want it.
struct LoadedSession {
    records: Vec<crate::log::RecordPlace>,
    index: Index,
    pool: Pool,
}

impl LoadedSession {
    fn of(found: &Scan) -> Self {
        let mut index = Index::default();
        for ((_, header), number) in found.records.iter().zip(0u32..) {
            index.insert_record(number, header);
        }
        let records = found
            .records
            .iter()
            .map(|(place, _)| place.clone())
            .collect();
        Self {
            records,
            index,
            pool: Pool::new(),
        }
    }

    fn staged<'a>(&'a self, found: &'a Scan) -> Staged<'a> {
        Staged {
            geometry: found.header.geometry,
            files: &found.files,
            records: &self.records,
            index: &self.index,
            pool: &self.pool,
        }
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
