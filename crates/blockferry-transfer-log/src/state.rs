//! The state file: two alternating slots that say where the target stands, and the decisions of its sessions.
//!
//! ```text
//! page  0      file header
//! page  1, 2   slot A, slot B
//! page  3 ...  decisions: 2 lanes x 8 ordinals x 2 copies
//! ```
//! A decision is not in the log, so that a log that may no longer be appended to can still be decided. It is
//! in one file with the slots, so that APPLIED and the slot that publishes the new point cost one flush: if
//! only one of the two survives a power loss, recovery derives the other. Every page is written at most once
//! between two flushes.

use std::sync::Arc;

use blockferry_core::{Encoder, is_zero};
use blockferry_device::{Identity, ReadRequest, StorageDir, StorageFile, WriteRequest};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{Decision, DecisionKind, FORMAT_VERSION, PAGE, SessionId, Slot, seal};
use crate::stats::Stats;

/// Name of the state file in the state directory.
pub(crate) const STATE_NAME: &str = "state";
/// Its name while it is created.
const NEW_STATE_NAME: &str = "state.new";
const MAGIC: &[u8; 8] = b"BFRYSTA\0";
const SLOT_PAGES: [usize; 2] = [1, 2];
const LANES: usize = 2;
const ORDINALS: usize = 8;
const COPIES: usize = 2;
const FIRST_DECISION: usize = 3;
const STRUCK_OUT: u8 = 0xFF;
const PAGES: usize = FIRST_DECISION + LANES * ORDINALS * COPIES;

/// Valid decisions, each with its lane.
type Decisions = Vec<(usize, Decision)>;

/// The open state file of a replica.
#[derive(Debug)]
pub(crate) struct StateFile {
    file: Arc<dyn StorageFile>,
    stats: Arc<Stats>,
    slot: Slot,
    /// Which of the two slot pages holds `slot`.
    slot_page: usize,
    /// Valid decisions with their lane.
    decisions: Decisions,
    /// Set by the first failed write or flush: nothing more is decided through this handle.
    dead: bool,
}

impl StateFile {
    /// Opens the state, or creates it for a target of this identity.
    pub(crate) fn open_or_create(
        dir: &dyn StorageDir,
        identity: &Identity,
        stats: &Arc<Stats>,
    ) -> Result<Self> {
        let attempt = || format!("open {STATE_NAME} in {}", dir.label());
        match dir.open(STATE_NAME).map_err(|e| Error::log(attempt(), e))? {
            Some(file) => Self::load(file, stats, dir),
            None => Self::create(dir, identity, stats),
        }
    }

    /// Creates it under another name first: a state file that has its name is whole.
    fn create(dir: &dyn StorageDir, identity: &Identity, stats: &Arc<Stats>) -> Result<Self> {
        let failed = |e| Error::log(format!("create {STATE_NAME} in {}", dir.label()), e);
        dir.remove(NEW_STATE_NAME).map_err(failed)?;
        let file = dir.create(NEW_STATE_NAME).map_err(failed)?;
        let slot = Slot::unknown(identity.clone());
        let mut bytes = file_header();
        bytes.extend(slot.encode());
        bytes.resize(PAGES * PAGE, 0);
        file.write_at(0, &bytes).map_err(failed)?;
        file.flush().map_err(failed)?;
        stats.count_flush();
        dir.rename_new(NEW_STATE_NAME, STATE_NAME).map_err(failed)?;
        dir.sync().map_err(failed)?;
        stats.count_flush();
        let stats = Arc::clone(stats);
        Ok(Self {
            file,
            stats,
            slot,
            slot_page: 0,
            decisions: Vec::new(),
            dead: false,
        })
    }

    fn load(file: Arc<dyn StorageFile>, stats: &Arc<Stats>, dir: &dyn StorageDir) -> Result<Self> {
        let attempt = format!("read {STATE_NAME} in {}", dir.label());
        // What the page cache shows may not be on the medium (kill, restart, power loss): flush before
        // trusting anything, and stop if that fails.
        file.flush().map_err(|e| Error::log(&attempt, e))?;
        stats.count_flush();
        let read = read_state(&*file, &attempt)?;
        strike_out(&*file, &read.damaged, stats)?;
        let stats = Arc::clone(stats);
        Ok(Self {
            file,
            stats,
            slot: read.slot,
            slot_page: read.slot_page,
            decisions: read.decisions,
            dead: false,
        })
    }

    /// Where the target stands.
    pub(crate) fn slot(&self) -> &Slot {
        &self.slot
    }

    /// The last decision of a session.
    pub(crate) fn last_decision(&self, session: SessionId) -> Option<&Decision> {
        last_of(&self.decisions, session)
    }

    /// The sessions that have a decision.
    pub(crate) fn sessions(&self) -> Vec<SessionId> {
        let mut sessions: Vec<SessionId> = self.decisions.iter().map(|(_, d)| d.session).collect();
        sessions.dedup();
        sessions
    }

    /// Makes a decision durable.
    pub(crate) fn decide(&mut self, decision: &Decision) -> Result<()> {
        self.write(Some(decision), None)
    }

    /// Makes a decision and the slot that follows from it durable with one flush.
    pub(crate) fn decide_and_publish(&mut self, decision: &Decision, slot: Slot) -> Result<()> {
        self.write(Some(decision), Some(slot))
    }

    /// Makes a slot durable.
    pub(crate) fn publish(&mut self, slot: Slot) -> Result<()> {
        self.write(None, Some(slot))
    }

    /// The next decision of a session; the caller fills in what it binds.
    pub(crate) fn next_ordinal(&self, session: SessionId) -> u32 {
        self.last_decision(session).map_or(0, |d| d.ordinal + 1)
    }

    fn write(&mut self, decision: Option<&Decision>, slot: Option<Slot>) -> Result<()> {
        if self.dead {
            return Err(Error::new(
                ErrorKind::Log,
                "the state file failed before; open the target again to decide anything",
            ));
        }
        self.dead = true;
        if let Some(decision) = decision {
            self.write_decision(decision)?;
        }
        let slot_page = 1 - self.slot_page;
        let slot = slot.map(|s| Slot {
            sequence: self.slot.sequence + 1,
            ..s
        });
        if let Some(slot) = &slot {
            let offset = (SLOT_PAGES[slot_page] * PAGE) as u64;
            self.file
                .write_at(offset, &slot.encode())
                .map_err(|e| Error::log("write state slot", e))?;
        }
        self.file
            .flush()
            .map_err(|e| Error::log("flush state", e))?;
        self.stats.count_flush();
        self.dead = false;
        if let Some(slot) = slot {
            self.slot = slot;
            self.slot_page = slot_page;
        }
        Ok(())
    }

    fn write_decision(&mut self, decision: &Decision) -> Result<()> {
        let lane = self.lane_of(decision.session);
        let ordinal = decision.ordinal as usize;
        if ordinal >= ORDINALS {
            return Err(Error::refused(format!(
                "decision {ordinal} of session {}: a session has at most {ORDINALS}",
                decision.session
            )));
        }
        let page = decision.encode();
        let first = (FIRST_DECISION + (lane * ORDINALS + ordinal) * COPIES) * PAGE;
        let copies = [first, first + PAGE].map(|o| WriteRequest {
            offset: o as u64,
            bytes: &page,
        });
        self.file
            .write_batch(&copies)
            .map_err(|e| Error::log("write decision", e))?;
        // Stale decisions of an older session in this lane are overwritten one by one.
        self.decisions
            .retain(|(l, d)| *l != lane || d.session == decision.session);
        self.decisions.push((lane, decision.clone()));
        Ok(())
    }

    /// The lane that holds this session's decisions, or one that the current point does not need.
    fn lane_of(&self, session: SessionId) -> usize {
        let of = |id: SessionId| {
            self.decisions
                .iter()
                .find(|(_, d)| d.session == id)
                .map(|(l, _)| *l)
        };
        let current = self.slot.point.as_ref().map(|p| p.id);
        of(session)
            .or_else(|| current.and_then(of).map(|lane| (lane + 1) % LANES))
            .unwrap_or_default()
    }
}

fn file_header() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(PAGE);
    let mut e = Encoder::new(&mut bytes);
    e.bytes(MAGIC);
    e.u32(FORMAT_VERSION);
    seal(bytes)
}

/// Makes pages that were torn unreadable for good. A later write of the same place that power loss cuts short
/// could otherwise put just those sectors right that an earlier attempt lacked, and a decision would come back
/// that was taken not to exist. Zeros would do the same where the attempt had zeros.
fn strike_out(file: &dyn StorageFile, damaged: &[usize], stats: &Stats) -> Result<()> {
    if damaged.is_empty() {
        return Ok(());
    }
    let struck = [STRUCK_OUT; PAGE];
    let requests: Vec<WriteRequest<'_>> = damaged
        .iter()
        .map(|page| WriteRequest {
            offset: (page * PAGE) as u64,
            bytes: &struck,
        })
        .collect();
    let failed = |e| Error::log("strike out torn pages of the state", e);
    file.write_batch(&requests).map_err(failed)?;
    file.flush().map_err(failed)?;
    stats.count_flush();
    Ok(())
}

#[derive(Debug)]
struct StateRead {
    slot_page: usize,
    slot: Slot,
    decisions: Decisions,
    /// Pages of slots and decisions that hold neither one nor nothing.
    damaged: Vec<usize>,
}

/// Reads slots and decisions without changing anything: for `open` after its flush, and for looking only.
fn read_state(file: &dyn StorageFile, attempt: &str) -> Result<StateRead> {
    // It was whole before it had its name: decisions that are cut off must not pass for none.
    let expected_bytes = (PAGES * PAGE) as u64;
    if file.size_bytes() < expected_bytes {
        return Err(Error::corrupt(format!(
            "{attempt}: expected {expected_bytes} bytes, found {}",
            file.size_bytes()
        )));
    }
    let mut bytes = vec![0; PAGES * PAGE];
    let mut whole = [ReadRequest {
        offset: 0,
        buffer: &mut bytes,
    }];
    // An unreadable page must not hide the others: they are read one by one then.
    let mut damaged = Vec::new();
    let mut unread = None;
    if file.read_medium(&mut whole).is_err() {
        for (page, buffer) in bytes.chunks_mut(PAGE).enumerate() {
            let mut one = [ReadRequest {
                offset: (page * PAGE) as u64,
                buffer,
            }];
            if let Err(error) = file.read_medium(&mut one) {
                damaged.push(page);
                unread.get_or_insert(error);
            }
        }
        for page in &damaged {
            bytes[page * PAGE..(page + 1) * PAGE].fill(0);
        }
    }
    let page = |n: usize| &bytes[n * PAGE..(n + 1) * PAGE];
    let version = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
    let another = bytes[..8] == *MAGIC && version != FORMAT_VERSION;
    if another && crate::format::unseal(page(0)).is_some() {
        return Err(Error::new(
            ErrorKind::UnknownVersion,
            format!("{attempt}: format version {version}, this build reads {FORMAT_VERSION}"),
        ));
    }
    let mut slots = Vec::new();
    for (slot_page, number) in SLOT_PAGES.into_iter().enumerate() {
        match Slot::decode(page(number)) {
            Some(slot) => slots.push((slot_page, slot)),
            None if is_blank(page(number)) => {}
            None => damaged.push(number),
        }
    }
    let (slot_page, slot) = slots
        .into_iter()
        .max_by_key(|(_, s)| s.sequence)
        .ok_or_else(|| match unread {
            Some(cause) => Error::log(attempt, cause),
            None => Error::corrupt(format!("{attempt}: both state slots are damaged")),
        })?;
    let mut decisions: Decisions = Vec::new();
    // The page that the last decision was found in.
    let mut found = None;
    for number in FIRST_DECISION..PAGES {
        // What the first copy says, the second need not say again.
        if found == Some(number - 1) && page(number) == page(number - 1) {
            continue;
        }
        let lane = (number - FIRST_DECISION) / (ORDINALS * COPIES);
        match Decision::decode(page(number)) {
            // The two copies differ where power loss kept one of an older session's: both count.
            Some(decision) => {
                decisions.push((lane, decision));
                found = Some(number);
            }
            None if is_blank(page(number)) => {}
            None => damaged.push(number),
        }
    }
    for lane in 0..LANES {
        let of_lane = decisions.iter().filter(|(l, _)| *l == lane);
        let newest = of_lane.map(|(_, d)| d.epoch).max().unwrap_or(0);
        decisions.retain(|(l, d)| *l != lane || d.epoch == newest);
    }
    damaged.retain(|page| *page != 0);
    Ok(StateRead {
        slot_page,
        slot,
        decisions,
        damaged,
    })
}

/// Never written, or struck out.
fn is_blank(page: &[u8]) -> bool {
    is_zero(page) || page.iter().all(|b| *b == STRUCK_OUT)
}

fn last_of(decisions: &[(usize, Decision)], session: SessionId) -> Option<&Decision> {
    decisions
        .iter()
        .map(|(_, d)| d)
        .filter(|d| d.session == session)
        .max_by_key(|d| d.ordinal)
}

/// What the state file says, for a look that takes no lock and changes nothing.
#[derive(Debug)]
pub(crate) struct StateView {
    pub(crate) slot: Slot,
    decisions: Decisions,
}

impl StateView {
    /// `None` if there is no state.
    pub(crate) fn read(dir: &dyn StorageDir) -> Result<Option<Self>> {
        let attempt = format!("read {STATE_NAME} in {}", dir.label());
        let Some(file) = dir.open(STATE_NAME).map_err(|e| Error::log(&attempt, e))? else {
            return Ok(None);
        };
        let read = read_state(&*file, &attempt)?;
        Ok(Some(Self {
            slot: read.slot,
            decisions: read.decisions,
        }))
    }

    pub(crate) fn last_kind(&self, session: SessionId) -> Option<DecisionKind> {
        last_of(&self.decisions, session).map(|d| d.kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockferry_core::{BlockSize, Digest, Geometry, Root};
    use blockferry_device::Evidence;
    use blockferry_testkit::{SimDisk, SimOptions};

    use crate::format::{Point, SourceStamp};

    fn decision(session: u8, ordinal: usize) -> Decision {
        Decision {
            session: SessionId::from_bytes([session; 16]),
            epoch: u64::from(session),
            ordinal: u32::try_from(ordinal).unwrap(),
            kind: DecisionKind::Rollback,
            records: 1,
            chain: Digest::from_bytes([1; 32]),
            root: Digest::from_bytes([2; 32]),
            group: [0; 16],
            evidence: Evidence::unknown(),
        }
    }

    #[test]
    fn a_session_has_a_lane_of_its_own_for_all_its_decisions() {
        let disk = SimDisk::new(SimOptions::default());
        let (dir, stats) = (disk.dir("state"), Arc::new(Stats::default()));
        let open = || StateFile::open_or_create(&*dir, &Identity::unknown(), &stats).unwrap();
        let mut state = open();
        for ordinal in 0..ORDINALS {
            state.decide(&decision(1, ordinal)).unwrap();
        }
        // The point that session 1 made keeps its lane; session 2 has the other one.
        let point = Point {
            id: SessionId::from_bytes([1; 16]),
            root: Root::from_bytes([2; 32]),
            geometry: Geometry::new(4096, BlockSize::MIN),
            source: SourceStamp::new("", Identity::unknown(), Evidence::unknown()),
            made_unix: 0,
        };
        let slot = state.slot().clone();
        state
            .publish(Slot {
                point: Some(point),
                ..slot
            })
            .unwrap();
        for ordinal in 0..ORDINALS {
            state.decide(&decision(2, ordinal)).unwrap();
        }
        assert!(
            state.decide(&decision(2, ORDINALS)).is_err(),
            "one too many"
        );

        let state = open();

        let last = decision(0, ORDINALS - 1).ordinal;
        for session in [1, 2] {
            let id = SessionId::from_bytes([session; 16]);
            assert_eq!(state.last_decision(id).map(|d| d.ordinal), Some(last));
        }
        assert_eq!(state.decisions.len(), LANES * ORDINALS, "each is read once");
    }
}
