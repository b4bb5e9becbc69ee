//! The files of a replica: which sessions there are, what is left over, what is given back.

use std::collections::BTreeMap;
use std::sync::Arc;

use blockferry_core::{Extent, PAGE_BYTES};
use blockferry_device::{StorageDir, StorageFile};

use super::recovery::LoadedSession;
use super::{Recovered, Replica};
use crate::error::{Error, Result};
use crate::format::SessionId;
use crate::log::{Scan, ScanDurability, parse_segment_name, scan, segment_name};
use crate::manifest::manifest_name;
use crate::place::Place;

impl Replica {
    /// Segments of every session in the state directory.
    pub(super) fn sessions(&self) -> Result<BTreeMap<SessionId, Vec<u32>>> {
        sessions_in(&*self.dir)
    }

    /// As [`scan`]: within, why there is none.
    pub(super) fn scan_session(
        &self,
        session: SessionId,
    ) -> Result<std::result::Result<Scan, Option<Error>>> {
        let segments = self.sessions()?.remove(&session).unwrap_or_default();
        scan(
            &*self.dir,
            session,
            &segments,
            ScanDurability::FlushFirst,
            &self.stats,
        )
    }

    /// Whether the target is provably what it was when the session looked at it.
    pub(super) fn is_unwritten_since(&self, found: &Scan) -> Result<bool> {
        Ok(found.is_target_unwritten(&self.place.open()?.evidence()?))
    }

    pub(super) fn give_back(&self, found: &Scan) -> Result<()> {
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

    pub(super) fn punch(&mut self, extents: &[Extent]) -> Result<()> {
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

    /// Removes the segments of the unfinished session that never count again: their bytes would count against the
    /// limit of its log.
    pub(super) fn remove_superseded(&mut self) -> Result<()> {
        // Of a prepared member nothing goes before its group has decided.
        let staging = self.recovered == Recovered::Staging;
        let staged = self.staged.as_mut().filter(|_| staging);
        let Some(scan) = staged.filter(|s| !s.superseded.is_empty()) else {
            return Ok(());
        };
        let session = scan.header.session;
        let superseded = std::mem::take(&mut scan.superseded);
        // The name of what replaces them must be durable before theirs go.
        self.sync_dir()?;
        for segment in superseded {
            let name = segment_name(session, segment);
            self.dir
                .remove(&name)
                .map_err(|e| Error::log(format!("remove {name}"), e))?;
        }
        Ok(())
    }

    pub(super) fn remove_siblings(&self, needed: &[Option<SessionId>]) -> Result<()> {
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

    pub(super) fn remove_session(&mut self, session: SessionId, with_manifest: bool) -> Result<()> {
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

    pub(super) fn sibling_bytes(&self, session: SessionId) -> Result<u64> {
        let Some((dir, _)) = self.place.file() else {
            return Ok(0);
        };
        let name = self.place.sibling(session);
        let sibling = dir
            .open(&name)
            .map_err(|e| Error::target(format!("open {name}"), e))?;
        taken(sibling)
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

/// Bytes that giving a file up frees, as far as it shares none of them.
fn taken(file: Option<Arc<dyn StorageFile>>) -> Result<u64> {
    let taken = file.map(|f| f.allocated_bytes()).transpose();
    Ok(taken
        .map_err(|e| Error::log("ask how much space a file takes", e))?
        .unwrap_or(0))
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
        held += taken(file)?;
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
                held += taken(file)?;
            }
        }
    }
    Ok(held)
}
