//! Recovery: what opening a replica finishes, decided by the last durable decision of each session.

use std::collections::BTreeMap;

use blockferry_core::{Extent, Root};

use super::{Recovered, Replica};
use crate::apply::pool::Pool;
use crate::apply::{Progress, Staged};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Decision, DecisionKind, Point, Retained, SegmentHeader, SessionId, Slot};
use crate::group::{GroupId, GroupVerdicts, Verdict};
use crate::ledger::Ledger;
use crate::log::{Scan, ScanDurability, scan};
use crate::outcome::{applied_point, finish_commit, restore_redo};
use crate::plan::{Proof, Strategy};

impl Replica {
    pub(super) fn check_identity(&self) -> Result<()> {
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

    pub(super) fn recover(
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
                Ok(mut found) => {
                    self.epoch = self.epoch.max(found.header.epoch);
                    let counted = last.as_ref().filter(|d| d.kind.is_carried_out_from_log());
                    counted.map_or(Ok(()), |d| keep_decided(&mut found, d))?;
                    self.recover_session(found, last.as_ref(), groups, progress)?;
                }
                // It never became durable, or its removal was cut short.
                Err(unread) => self
                    .refuse_lost_log(session, last.as_ref(), groups)
                    .map_err(|e| e.because(unread))?,
            }
        }
        self.remove_superseded()?;
        self.remove_leftovers()
    }

    /// A decision that was not carried out and whose log is gone leaves a target that is neither point.
    pub(super) fn refuse_lost_logs(&self, sessions: &BTreeMap<SessionId, Vec<u32>>) -> Result<()> {
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

    pub(super) fn refuse_lost_log(
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
    pub(super) fn is_settled(&self, session: SessionId, last: Option<DecisionKind>) -> bool {
        last == Some(DecisionKind::Commit) && self.names(session)
    }

    pub(super) fn recover_session(
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

    pub(super) fn publish_derived(
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
    pub(super) fn keep_if_newest(&mut self, found: Scan) {
        let newest = self
            .unfinished()
            .map_or(self.state.slot().epoch, |h| h.epoch);
        if found.header.epoch > newest {
            self.staged = Some(found);
            self.recovered = Recovered::Staging;
        }
    }

    pub(super) fn recover_member(
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
                let unwritten = self.is_unwritten_since(&found)?;
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

    pub(super) fn refuse_while_group_pending(&self) -> Result<()> {
        match self.recovered {
            Recovered::GroupPending(session) => Err(Error::new(
                ErrorKind::DecisionPending,
                format!("session {session} is prepared; its group decides, and cannot be reached"),
            )),
            _ => Ok(()),
        }
    }

    pub(super) fn carry_commit_out(
        &mut self,
        found: &Scan,
        root: Root,
        progress: Progress<'_>,
    ) -> Result<()> {
        let loaded = LoadedSession::of(found);
        finish_commit(self, &found.header, root, loaded.staged(found), progress).map(drop)
    }

    pub(super) fn carry_rollback_out(
        &mut self,
        found: &Scan,
        progress: Progress<'_>,
    ) -> Result<()> {
        match found.header.strategy {
            Strategy::Redo => {
                let loaded = LoadedSession::of(found);
                restore_redo(self, &found.header, loaded.staged(found), progress)
            }
            Strategy::Clone | Strategy::Shadow => self.exchange_back(&found.header),
            Strategy::Direct => Err(Error::refused("direct keeps no old point")),
        }
    }

    pub(super) fn exchange_back(&mut self, header: &SegmentHeader) -> Result<()> {
        let Some((dir, name)) = self.place.file() else {
            return Ok(());
        };
        let sibling = self.place.sibling(header.session);
        let failed = |e| Error::target(format!("put {sibling} back in the place of {name}"), e);
        let found = self.place.open()?.file_id()?;
        if found == header.working_file_id {
            if !self.place.sibling_is(header.session, header.old_file_id)? {
                return Err(Error::corrupt(format!(
                    "{sibling} is not the old file any more"
                )));
            }
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
}

/// A decision says how many records count; fewer, or others, mean that the log lost some after they were read
/// back.
pub(super) fn keep_decided(found: &mut Scan, decision: &Decision) -> Result<()> {
    found.check_epoch(decision)?;
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

pub(super) fn zeroed_extents(found: &Scan) -> Vec<Extent> {
    if found.header.strategy != Strategy::Redo {
        return Vec::new();
    }
    let loaded = LoadedSession::of(found);
    loaded.staged(found).zeroed().collect()
}

/// A scanned session as apply and restore want it.
pub(super) struct LoadedSession {
    pub(super) ledger: Ledger,
    pool: Pool,
}

impl LoadedSession {
    pub(super) fn of(found: &Scan) -> Self {
        Self {
            ledger: Ledger::of(&found.records),
            pool: Pool::new(),
        }
    }

    pub(super) fn staged<'a>(&'a self, found: &'a Scan) -> Staged<'a> {
        Staged {
            geometry: found.header.geometry,
            files: &found.files,
            records: &self.ledger.places,
            index: &self.ledger.index,
            pool: &self.pool,
            reserved: &self.ledger.reserved,
            proof: Proof::ReadBack,
        }
    }
}
