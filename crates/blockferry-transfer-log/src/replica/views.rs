//! Looking at the points of a target: the one it is at, the one before, and one that is decided by others.

use std::sync::Arc;

use blockferry_device::{BlockSource, BlockTarget, Evidence};

use super::recovery::keep_decided;
use super::{Recovered, Replica, Unwritten};
use crate::error::{Error, Result};
use crate::format::{DecisionKind, SegmentHeader, SessionId};
use crate::log::Scan;
use crate::overlay::{LogPages, Overlay, Side};
use crate::plan::Strategy;

impl Replica {
    /// The target as it is. It changes while somebody writes it; this replica does not, as long as nothing else is asked
    /// of it.
    ///
    /// # Errors
    /// The target is absent, or its content was given up and the new one is not complete.
    pub fn current_view(&self) -> Result<Arc<dyn BlockSource>> {
        if let Some(session) = self.unfinished().map(|h| h.session)
            && self.last_kind(session) == Some(DecisionKind::GiveUp)
        {
            return Err(Error::refused(format!(
                "{} is not complete: session {session} gave its old content up and has not written all of the new \
                 one. Resume it",
                self.label()
            )));
        }
        let target: Arc<dyn BlockSource> = self.existing_target()?;
        Ok(target)
    }

    /// The point before the present one, for as long as this replica is open and nothing else is asked of it: the old
    /// file, or the target with the pre-images laid over it. Nothing is changed.
    ///
    /// # Errors
    /// No old point is kept, or what it needs is not provably there: the log, the old file, and for pre-images a target
    /// that nobody wrote since. Reads fail once somebody does.
    pub fn old_view(&self) -> Result<Arc<dyn BlockSource>> {
        let (Some(retained), Some(current)) = (self.retained(), self.point()) else {
            return Err(Error::refused(format!(
                "{} keeps no old point to look at",
                self.label()
            )));
        };
        let scan = self.scan_of(current.id)?;
        let header = &scan.header;
        if header.strategy != Strategy::Redo {
            return self.sibling_view(header, header.old_file_id, retained.old_bytes);
        }
        let evidence = self.content.evidence()?;
        if self.unwritten()? != Unwritten::Proven {
            return Err(Error::refused(format!(
                "{} is not provably unwritten since its point was applied: its old point cannot be told any more",
                self.label()
            )));
        }
        let mut scan = scan;
        self.keep_applied(&mut scan)?;
        self.overlay(Side::Old, &scan, retained.old_bytes, evidence)
    }

    /// The point that a prepared session will bring, while its group has not decided: the finished sibling, or the
    /// target with what is staged laid over it. Nothing is changed. Once a session is committed there is no such point:
    /// opening the target applies it.
    ///
    /// # Errors
    /// No session is prepared: one that is only staged is no point, because nothing says that it is complete. Or what
    /// it needs is not provably there. Reads fail once somebody writes the target.
    pub fn new_view(&self) -> Result<Arc<dyn BlockSource>> {
        let session = match (&self.recovered, self.unfinished()) {
            (Recovered::GroupPending(session), _) => *session,
            (_, Some(header)) => {
                return Err(Error::refused(format!(
                    "session {} of {} is not complete: what is staged so far is no point. Resume it",
                    header.session,
                    self.label()
                )));
            }
            (_, None) => {
                return Err(Error::refused(format!(
                    "no newer point of {} waits to be applied: the current one is the newest",
                    self.label()
                )));
            }
        };
        let mut scan = self.scan_of(session)?;
        if let Some(decision) = self.state.last_decision(session) {
            keep_decided(&mut scan, decision)?;
        }
        let header = &scan.header;
        let image_bytes = header.geometry.image_bytes();
        if header.strategy != Strategy::Redo {
            return match header.working_file_id {
                None => self.current_view(),
                working => self.sibling_view(header, working, image_bytes),
            };
        }
        let evidence = self.content.evidence()?;
        if !scan.is_target_unwritten(&evidence) {
            return Err(Error::refused(format!(
                "{} is not provably what session {session} was compared with: the new point cannot be told",
                self.label()
            )));
        }
        self.overlay(Side::New, &scan, image_bytes, evidence)
    }

    fn overlay(
        &self,
        side: Side,
        scan: &Scan,
        size_bytes: u64,
        evidence: Evidence,
    ) -> Result<Arc<dyn BlockSource>> {
        let target: Arc<dyn BlockSource> = self.existing_target()?;
        let (pages, index) = LogPages::of(side, scan);
        let point = match side {
            Side::Old => "old point",
            Side::New => "new point",
        };
        let evidence = Some(evidence);
        Ok(Arc::new(Overlay::new(
            point,
            size_bytes,
            target,
            evidence,
            Arc::new(index),
            pages,
        )))
    }

    fn existing_target(&self) -> Result<Arc<dyn BlockTarget>> {
        let absent = || Error::refused(format!("{} is not there", self.label()));
        self.target().ok_or_else(absent)
    }

    /// The log of a session whose decisions say that it is there.
    fn scan_of(&self, session: SessionId) -> Result<Scan> {
        self.scan_session(session)?.map_err(|unread| {
            Error::corrupt(format!(
                "the log of session {session} of {} is gone or cannot be read",
                self.label()
            ))
            .because(unread)
        })
    }

    /// The sibling of a session, if it is the file of this number and as long as it must be.
    fn sibling_view(
        &self,
        header: &SegmentHeader,
        number: Option<u64>,
        size_bytes: u64,
    ) -> Result<Arc<dyn BlockSource>> {
        let name = self.place.sibling(header.session);
        let opened = match self.place.file() {
            Some((dir, _)) if self.place.sibling_is(header.session, number)? => dir
                .open(&name)
                .map_err(|e| Error::target(format!("open {name} beside the target"), e))?,
            _ => None,
        };
        let Some(file) = opened else {
            return Err(Error::corrupt(format!(
                "{name}, which holds the point, is gone or another file"
            )));
        };
        let found = file.size_bytes();
        if found != size_bytes {
            return Err(Error::corrupt(format!(
                "{name}, which holds the point: expected {size_bytes} bytes, found {found}"
            )));
        }
        let file: Arc<dyn BlockSource> = file.into_target();
        Ok(file)
    }

    fn last_kind(&self, session: SessionId) -> Option<DecisionKind> {
        self.state.last_decision(session).map(|d| d.kind)
    }
}
