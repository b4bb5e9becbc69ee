//! A replica: a target with its state directory. Opening it always recovers first.

mod anchoring;
mod files;
mod publishing;
mod recovery;
mod views;

use anchoring::Anchored;
pub use anchoring::AnchoredPoint;
pub(crate) use files::{held_bytes, sessions_in};
use recovery::{LoadedSession, zeroed_extents};

use std::sync::{Arc, OnceLock};

use blockferry_core::{Geometry, Root};
use blockferry_device::{BlockTarget, Evidence, LockGuard, StorageDir};

use crate::apply::Progress;
use crate::error::{Error, Result};
use crate::format::{DecisionKind, Point, Retained, SegmentHeader, SessionId, Slot, SourceStamp};
use crate::group::GroupVerdicts;
use crate::log::Scan;
use crate::manifest::{ManifestFile, ManifestSource, manifest_name};
use crate::place::{Content, Place};
use crate::plan::{Plan, Strategy, Undo};
use crate::session::Session;
use crate::state::StateFile;
use crate::stats::Stats;

/// In the state directory, held by the one who has it open.
pub const LOCK_NAME: &str = "lock";

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
    /// Whether the target's directory exchanges names, once that was tried.
    exchanges: OnceLock<bool>,
    anchored: Anchored,
    /// The point that the caller has read and found in the target.
    confirmed: Option<SessionId>,
    /// The target's evidence when the caller began to read it.
    read_since: Option<Evidence>,
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
        let anchored = Anchored::look(&*dir)?;
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
            exchanges: OnceLock::new(),
            anchored,
            confirmed: None,
            read_since: None,
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
        let Some(scan) = &self.staged else {
            return Ok(false);
        };
        let header = &scan.header;
        let in_place = header.strategy == Strategy::Direct && header.working_file_id.is_none();
        if in_place {
            return Ok(self.content.target().is_some());
        }
        let sibling = header.working_file_id.filter(|_| self.is_file());
        if sibling.is_some() && !self.place.sibling_is(header.session, sibling)? {
            return Ok(false);
        }
        let absent = !matches!(self.place, Place::Device(_)) && header.old_file_id.is_none();
        if absent {
            return Ok(self.content.target().is_none());
        }
        if scan.is_target_unwritten(&self.content.evidence()?) {
            return Ok(true);
        }
        self.may_compare_afresh(scan)
    }

    /// Whether the target is provably as the unfinished session last saw it. Else what is staged may count all the same
    /// ([`Self::can_resume`]), and the rest of the target is compared afresh.
    ///
    /// # Errors
    /// The target cannot be examined.
    pub fn is_unwritten_since_session(&self) -> Result<bool> {
        self.staged
            .as_ref()
            .map_or(Ok(false), |scan| self.is_unwritten_since(scan))
    }

    /// Whether what is staged counts although the target may have been written since: the rest of it is compared
    /// afresh, and its old point is not vouched for. A device's evidence ends with the boot, and a file's is changed by
    /// a reservation that a kill left without a note.
    fn may_compare_afresh(&self, scan: &Scan) -> Result<bool> {
        let header = &scan.header;
        let Some(target) = self.content.target() else {
            return Ok(false);
        };
        if header.strategy != Strategy::Redo || target.size_bytes() != header.old_bytes {
            return Ok(false);
        }
        match header.undo {
            Undo::None => Ok(true),
            // Where every pre-image is still in place nobody wrote what is staged.
            Undo::Keep => LoadedSession::of(scan)
                .staged(scan)
                .holds_pre_images(&*target, header.old_bytes),
        }
    }

    /// Where the manifest of `point` is. Its content is checked while it is read.
    #[must_use]
    pub fn manifest_source(&self, point: &Point) -> ManifestSource {
        ManifestSource::of(Arc::clone(&self.dir), point.id)
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

    /// Tries whether a sibling can be put in the target's place, on two siblings named after `probe`; once for
    /// this handle. Where it cannot, only redo and direct are possible.
    ///
    /// # Errors
    /// The directory failed while it was tried.
    pub fn supports_exchange(&self, probe: SessionId) -> Result<bool> {
        let Some((dir, _)) = self.place.file() else {
            return Ok(false);
        };
        if let Some(known) = self.exchanges.get() {
            return Ok(*known);
        }
        // Named as siblings are: what a crash leaves of them is removed by the next open.
        let other = probe.as_bytes().map(|byte| !byte);
        let scratch = [probe, SessionId::from_bytes(other)].map(|id| self.place.sibling(id));
        let tried = dir
            .supports_exchange([&scratch[0], &scratch[1]])
            .map_err(|e| {
                Error::target("try whether names can be exchanged beside the target", e)
            })?;
        Ok(*self.exchanges.get_or_init(|| tried))
    }

    /// An exchange that fails after COMMIT would leave a decision that cannot be carried out.
    fn refuse_without_exchange(&self, plan: &Plan) -> Result<()> {
        let exchanges = matches!(plan.strategy, Strategy::Clone | Strategy::Shadow)
            && matches!(self.content, Content::File(_));
        if !exchanges || self.supports_exchange(plan.session)? {
            return Ok(());
        }
        Err(Error::refused(format!(
            "{} lies on a file system that cannot exchange two files, which {} needs: use redo",
            self.label(),
            plan.strategy
        )))
    }

    /// Begins a session.
    ///
    /// # Errors
    /// An unfinished session is there, the file system cannot do what the strategy needs, or the log or target
    /// failed.
    pub fn begin(&mut self, plan: &Plan) -> Result<Session<'_>> {
        if let Some(header) = self.unfinished() {
            return Err(Error::refused(format!(
                "session {} is unfinished: resume or cancel it first",
                header.session
            )));
        }
        self.refuse_while_group_pending()?;
        self.refuse_while_stranded()?;
        self.refuse_against_anchor(plan)?;
        self.refuse_without_exchange(plan)?;
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

    /// The caller begins to read the target: what [`Self::begin`], [`Self::adopt`] or [`Self::refresh`] records next is of the
    /// target as it is now, and they refuse one that was written meanwhile.
    ///
    /// # Errors
    /// The target cannot be examined.
    pub fn begin_reading(&mut self) -> Result<()> {
        self.read_since = Some(self.content.evidence()?);
        Ok(())
    }

    /// The evidence of what was read.
    pub(crate) fn evidence_as_read(&mut self) -> Result<Evidence> {
        let now = self.content.evidence()?;
        let Some(before) = self.read_since.take() else {
            return Ok(now);
        };
        if before.is_known() && !now.proves_same(&before) {
            return Err(Error::refused(format!(
                "{} was written by someone else while it was read: sync again",
                self.label()
            )));
        }
        Ok(before)
    }

    /// Records that the target, as it was read, holds `point`: an identical pair needs no session.
    ///
    /// # Errors
    /// The target was written since [`Self::begin_reading`], or the state could not be written.
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
            evidence: self.evidence_as_read()?,
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

    /// Refreshes what is known of the source and the target of the current point without a new one: the target was read, and
    /// is there.
    ///
    /// # Errors
    /// The target was written since [`Self::begin_reading`], or the state could not be written.
    pub fn refresh(&mut self, source: SourceStamp) -> Result<()> {
        let evidence = self.evidence_as_read()?;
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
        let unwritten = self.is_unwritten_since(&scan)?;
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

    /// The caller has read all of the target from its medium and found exactly this point: for the next [`Self::rollback`]
    /// as good as evidence that nobody wrote it.
    pub fn confirm(&mut self, point: SessionId) {
        self.confirmed = Some(point);
    }

    /// Returns the target to the point before.
    ///
    /// # Errors
    /// There is none, nothing says that nobody wrote the target since, or it failed.
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
        let is_confirmed = self.confirmed.take() == Some(current.id);
        if !is_confirmed && self.unwritten()? != Unwritten::Proven {
            return Err(Error::refused(format!(
                "{} is not provably unwritten since its point was applied: pre-images would tear it. Outside \
                 of what changed both points are equal: sync again from a source that is at the old point",
                self.label()
            )));
        }
        let mut scan = self.scan_session(current.id)?.map_err(|unread| {
            Error::corrupt(format!(
                "the log of session {}, which holds the old point, is gone or cannot be read",
                current.id
            ))
            .because(unread)
        })?;
        self.keep_applied(&mut scan)?;
        // A session whose removal was cut short must not come back beside the old point.
        self.sync_dir()?;
        // A decision that cannot be carried out would leave neither point: everything it needs is checked first.
        self.check_way_back(&scan)?;
        self.keep_what_goes_back(&scan)?;
        self.decide_for(&scan.header, DecisionKind::Rollback)
            .and_then(|()| self.carry_rollback_out(&scan, progress))
            .map_err(|e| Error::pending("the way back is decided but not finished", e))?;
        Ok(retained.point)
    }

    /// A log that lost records still is a log: only what was applied says how many pre-images there must be.
    fn keep_applied(&self, scan: &mut Scan) -> Result<()> {
        let session = scan.header.session;
        let last = self.state.last_decision(session).cloned();
        if let Some(decision) = &last {
            scan.check_epoch(decision)?;
        }
        match last {
            _ if scan.header.strategy != Strategy::Redo => Ok(()),
            Some(decision) => scan.keep_decided(&decision),
            None => Err(Error::corrupt(format!(
                "the decisions of session {session} are gone: nothing says whether its log still has every \
                 pre-image"
            ))),
        }
    }

    fn check_way_back(&self, scan: &Scan) -> Result<()> {
        let header = &scan.header;
        match (header.strategy, self.place.file()) {
            (Strategy::Redo, _) => LoadedSession::of(scan).staged(scan).check_pre_images(),
            (Strategy::Clone | Strategy::Shadow, Some(_)) => {
                if self.place.sibling_is(header.session, header.old_file_id)? {
                    return Ok(());
                }
                let name = self.place.sibling(header.session);
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
        let Ok(scan) = self.scan_session(current.id)? else {
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
        // RETIRED first: from here on the old point is gone by decision, and removal only follows. Whoever wrote the target
        // since its point was recorded did so.
        let evidence = self.state.slot().evidence.clone();
        self.publish_with(
            &scan.header,
            DecisionKind::Retired,
            Some(current.clone()),
            None,
            evidence,
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

    /// The target's evidence now.
    ///
    /// # Errors
    /// The target cannot be examined.
    pub fn evidence(&self) -> Result<Evidence> {
        self.content.evidence()
    }
}
