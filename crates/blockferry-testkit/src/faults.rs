//! Decorators that make any device fail the way real ones do, for tests of whatever uses devices.
//!
//! Requests are counted from 1, reads and writes apart; a batch counts each of its requests. The simulated
//! disk has faults of its own ([`crate::Fault`]); these here wrap files and memory as well.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use blockferry_core::Extent;
use blockferry_device::{
    BlockSource, BlockTarget, Error, ErrorKind, Evidence, Identity, ReadRequest, Result, Status,
};

use crate::random::count;

/// Holds requests back until it is opened: a device that answers late, or never.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    is_open: bool,
    waiting: usize,
}

impl Gate {
    /// A closed gate.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Lets everyone through, now and later.
    pub fn open(&self) {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_open = true;
        self.changed.notify_all();
    }

    /// Waits until `requests` of them are held back.
    pub fn wait_for_waiting(&self, requests: usize) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .changed
            .wait_while(state, |state| state.waiting < requests);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn pass(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting += 1;
        self.changed.notify_all();
        let waited = self.changed.wait_while(state, |state| !state.is_open);
        waited.unwrap_or_else(PoisonError::into_inner).waiting -= 1;
    }
}

/// What goes wrong with requests of one direction.
#[derive(Debug, Default)]
struct Rules {
    bad: Vec<Extent>,
    fail_from: Option<(u64, ErrorKind)>,
    delay: Option<Duration>,
    gate: Option<(u64, Arc<Gate>)>,
    requests: AtomicU64,
}

impl Rules {
    /// Numbers a request, holds it back or fails it.
    fn meet(&self, what: &str, label: &str, offset: u64, length: u64) -> Result<u64> {
        let number = self.requests.fetch_add(1, Ordering::SeqCst) + 1;
        if let Some(delay) = self.delay {
            std::thread::sleep(delay);
        }
        if let Some((_, gate)) = self.gate.as_ref().filter(|(from, _)| number >= *from) {
            gate.pass();
        }
        let touches =
            |bad: &Extent| offset < bad.end() && bad.start() < offset.saturating_add(length);
        let failed = |kind| {
            let text = format!("{what} of {length} bytes at offset {offset} of {label}: injected");
            Err(Error::new(kind, text))
        };
        match self.fail_from {
            Some((from, kind)) if number >= from => failed(kind),
            _ if self.bad.iter().any(touches) => failed(ErrorKind::Io),
            _ => Ok(number),
        }
    }
}

/// A source with faults.
pub struct FaultySource {
    inner: Arc<dyn BlockSource>,
    reads: Rules,
    /// From this read on, the device is this short.
    shrinks: Option<(u64, u64)>,
}

impl fmt::Debug for FaultySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultySource")
            .field("reads", &self.reads)
            .finish_non_exhaustive()
    }
}

impl FaultySource {
    /// Without faults so far.
    #[must_use]
    pub fn new(inner: Arc<dyn BlockSource>) -> Self {
        Self {
            inner,
            reads: Rules::default(),
            shrinks: None,
        }
    }

    /// Reads that touch the byte at `offset` fail, each time.
    #[must_use]
    pub fn fail_read_at(mut self, offset: u64) -> Self {
        self.reads.bad.push(Extent::from_range(offset..offset + 1));
        self
    }

    /// Reads that touch the extent fail, each time.
    #[must_use]
    pub fn fail_reads_in(mut self, extent: Extent) -> Self {
        self.reads.bad.push(extent);
        self
    }

    /// Read number `from` and all later ones fail.
    #[must_use]
    pub fn fail_reads_from(mut self, from: u64) -> Self {
        self.reads.fail_from = Some((from, ErrorKind::Io));
        self
    }

    /// After `reads` reads the device is only `size_bytes` long.
    #[must_use]
    pub fn shrinks_after(mut self, reads: u64, size_bytes: u64) -> Self {
        self.shrinks = Some((reads, size_bytes));
        self
    }

    /// Each read takes so much longer.
    #[must_use]
    pub fn slow(mut self, delay: Duration) -> Self {
        self.reads.delay = Some(delay);
        self
    }

    /// Read number `from` and later ones wait until the gate is opened.
    #[must_use]
    pub fn hold_reads_from(mut self, from: u64, gate: Arc<Gate>) -> Self {
        self.reads.gate = Some((from, gate));
        self
    }

    /// Reads asked for so far, failed ones included.
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.reads.requests.load(Ordering::SeqCst)
    }

    fn meet(&self, offset: u64, length: u64) -> Result<()> {
        self.reads
            .meet("read", self.inner.label(), offset, length)?;
        let size = self.size_bytes();
        if offset.saturating_add(length) > size {
            let text = format!(
                "read of {length} bytes at offset {offset} of {}: past the end at {size}",
                self.inner.label()
            );
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        Ok(())
    }
}

impl BlockSource for FaultySource {
    fn label(&self) -> &str {
        self.inner.label()
    }

    fn size_bytes(&self) -> u64 {
        let size = self.inner.size_bytes();
        match self.shrinks {
            Some((after, short)) if self.reads() >= after => short.min(size),
            _ => size,
        }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.meet(offset, count(buffer.len()))?;
        self.inner.read_at(offset, buffer)
    }

    fn preferred_depth(&self) -> usize {
        self.inner.preferred_depth()
    }

    fn status_at(&self, offset: u64) -> Result<(Status, u64)> {
        let (status, end) = self.inner.status_at(offset)?;
        Ok((status, end.min(self.size_bytes()).max(offset + 1)))
    }

    fn identity(&self) -> Result<Identity> {
        self.inner.identity()
    }

    fn evidence(&self) -> Result<Evidence> {
        self.inner.evidence()
    }
}

/// A target with faults in reads, writes and flushes.
pub struct FaultyTarget {
    inner: Arc<dyn BlockTarget>,
    reads: FaultySource,
    writes: Rules,
    flushes: Rules,
    /// Writes that touch these bytes claim success and store something else.
    lies: Vec<u64>,
    room_bytes: Option<AtomicU64>,
}

impl fmt::Debug for FaultyTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyTarget")
            .field("writes", &self.writes)
            .finish_non_exhaustive()
    }
}

impl FaultyTarget {
    /// Without faults so far.
    #[must_use]
    pub fn new(inner: Arc<dyn BlockTarget>) -> Self {
        let source: Arc<dyn BlockSource> = Arc::<dyn BlockTarget>::clone(&inner);
        Self {
            inner,
            reads: FaultySource::new(source),
            writes: Rules::default(),
            flushes: Rules::default(),
            lies: Vec::new(),
            room_bytes: None,
        }
    }

    /// Sets the faults of reads, from the medium as well.
    #[must_use]
    pub fn with_reads(mut self, change: impl FnOnce(FaultySource) -> FaultySource) -> Self {
        self.reads = change(self.reads);
        self
    }

    /// Writes that touch the byte at `offset` fail, each time.
    #[must_use]
    pub fn fail_write_at(mut self, offset: u64) -> Self {
        self.writes.bad.push(Extent::from_range(offset..offset + 1));
        self
    }

    /// Write number `from` and all later ones fail in this way.
    #[must_use]
    pub fn fail_writes_from(mut self, from: u64, kind: ErrorKind) -> Self {
        self.writes.fail_from = Some((from, kind));
        self
    }

    /// After so many written bytes there is no space left.
    #[must_use]
    pub fn no_space_after(mut self, bytes: u64) -> Self {
        self.room_bytes = Some(AtomicU64::new(bytes));
        self
    }

    /// Flush number `from` and all later ones fail.
    #[must_use]
    pub fn fail_flushes_from(mut self, from: u64) -> Self {
        self.flushes.fail_from = Some((from, ErrorKind::Io));
        self
    }

    /// Writes that touch the byte at `offset` claim success but store another byte there (F10).
    #[must_use]
    pub fn lies_at(mut self, offset: u64) -> Self {
        self.lies.push(offset);
        self
    }

    /// Write number `from` and later ones wait until the gate is opened.
    #[must_use]
    pub fn hold_writes_from(mut self, from: u64, gate: Arc<Gate>) -> Self {
        self.writes.gate = Some((from, gate));
        self
    }

    /// Writes, zeroing writes included, asked for so far.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.writes.requests.load(Ordering::SeqCst)
    }

    /// Flushes asked for so far.
    #[must_use]
    pub fn flushes(&self) -> u64 {
        self.flushes.requests.load(Ordering::SeqCst)
    }

    fn meet_write(&self, offset: u64, length: u64) -> Result<()> {
        self.writes
            .meet("write", self.inner.label(), offset, length)?;
        let Some(room) = &self.room_bytes else {
            return Ok(());
        };
        let take = |room: u64| room.checked_sub(length);
        room.try_update(Ordering::SeqCst, Ordering::SeqCst, take)
            .map(drop)
            .map_err(|left| {
                let text = format!(
                    "write of {length} bytes at offset {offset} of {}: {left} bytes of space left",
                    self.inner.label()
                );
                Error::new(ErrorKind::NoSpace, text)
            })
    }
}

impl BlockSource for FaultyTarget {
    fn label(&self) -> &str {
        self.inner.label()
    }

    fn size_bytes(&self) -> u64 {
        self.reads.size_bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.reads.read_at(offset, buffer)
    }

    fn preferred_depth(&self) -> usize {
        self.inner.preferred_depth()
    }

    fn status_at(&self, offset: u64) -> Result<(Status, u64)> {
        self.reads.status_at(offset)
    }

    fn identity(&self) -> Result<Identity> {
        self.inner.identity()
    }

    fn evidence(&self) -> Result<Evidence> {
        self.inner.evidence()
    }
}

impl BlockTarget for FaultyTarget {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.meet_write(offset, count(bytes.len()))?;
        let hit = |place: &&u64| (offset..offset + count(bytes.len())).contains(*place);
        let Some(place) = self.lies.iter().find(hit) else {
            return self.inner.write_at(offset, bytes);
        };
        let mut other = bytes.to_vec();
        other[crate::random::index(place - offset)] ^= 1;
        self.inner.write_at(offset, &other)
    }

    fn write_zeroes(&self, extent: Extent) -> Result<()> {
        self.meet_write(extent.start(), extent.length())?;
        self.inner.write_zeroes(extent)
    }

    fn punch(&self, extent: Extent) -> Result<bool> {
        self.inner.punch(extent)
    }

    fn flush(&self) -> Result<()> {
        self.flushes.meet("flush", self.inner.label(), 0, 0)?;
        self.inner.flush()
    }

    fn read_medium(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        for request in requests.iter() {
            self.reads
                .meet(request.offset, count(request.buffer.len()))?;
        }
        self.inner.read_medium(requests)
    }

    fn drop_cache(&self) {
        self.inner.drop_cache();
    }

    fn reserve(&self, extents: &[Extent]) -> Result<Vec<Extent>> {
        self.inner.reserve(extents)
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.inner.resize(size_bytes)
    }

    fn logical_block_bytes(&self) -> u32 {
        self.inner.logical_block_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{SimDisk, SimOptions};

    fn device() -> Arc<dyn BlockTarget> {
        SimDisk::new(SimOptions::default()).device("v", 16_384)
    }

    fn read(source: &dyn BlockSource, offset: u64) -> Option<ErrorKind> {
        source
            .read_at(offset, &mut [0; 1024])
            .err()
            .map(|error| error.kind())
    }

    fn write(target: &dyn BlockTarget, offset: u64) -> Option<ErrorKind> {
        target
            .write_at(offset, &[1; 1024])
            .err()
            .map(|error| error.kind())
    }

    #[test]
    fn a_bad_place_fails_only_the_reads_that_touch_it() {
        let source = FaultySource::new(device()).fail_read_at(2048);

        assert_eq!(read(&source, 1024), None);
        assert_eq!(read(&source, 1025), Some(ErrorKind::Io));
        assert_eq!(read(&source, 2048), Some(ErrorKind::Io));
        assert_eq!(read(&source, 2049), None);
        assert_eq!(source.reads(), 4);
    }

    #[test]
    fn a_shrinking_source_ends_early_from_then_on() {
        let source = FaultySource::new(device()).shrinks_after(1, 4096);

        assert_eq!(source.size_bytes(), 16_384);
        assert_eq!(read(&source, 0), None);
        assert_eq!(source.size_bytes(), 4096);
        assert_eq!(read(&source, 4096), Some(ErrorKind::OutOfRange));
        assert_eq!(read(&source, 0), None);
    }

    #[test]
    fn writes_fail_by_number_place_and_space() {
        let by_number = FaultyTarget::new(device()).fail_writes_from(2, ErrorKind::Denied);
        let by_place = FaultyTarget::new(device()).fail_write_at(0);
        let by_space = FaultyTarget::new(device()).no_space_after(2047);

        assert_eq!(
            [write(&by_number, 0), write(&by_number, 0)],
            [None, Some(ErrorKind::Denied)]
        );
        assert_eq!(
            [write(&by_place, 0), write(&by_place, 1)],
            [Some(ErrorKind::Io), None]
        );
        assert_eq!(
            [write(&by_space, 0), write(&by_space, 0)],
            [None, Some(ErrorKind::NoSpace)]
        );
    }

    #[test]
    fn flushes_fail_from_a_number_on() {
        let target = FaultyTarget::new(device()).fail_flushes_from(2);

        assert!(target.flush().is_ok());
        assert!(target.flush().is_err());
        assert!(target.flush().is_err());
        assert_eq!(target.flushes(), 3);
    }

    #[test]
    fn a_lying_write_claims_success_and_stores_something_else() {
        let target = FaultyTarget::new(device()).lies_at(1000);

        target.write_at(0, &[7; 2048]).unwrap();

        let mut found = [0; 2048];
        target
            .read_medium(&mut [ReadRequest {
                offset: 0,
                buffer: &mut found,
            }])
            .unwrap();
        let mut expected = [7; 2048];
        expected[1000] = 6;
        assert_eq!(found, expected);
    }

    #[test]
    fn a_held_read_waits_for_its_gate() {
        let gate = Gate::new();
        let source = FaultySource::new(device()).hold_reads_from(2, Arc::clone(&gate));

        std::thread::scope(|scope| {
            assert_eq!(read(&source, 0), None);
            let held = scope.spawn(|| read(&source, 0));
            gate.wait_for_waiting(1);
            assert!(!held.is_finished());
            gate.open();
            assert_eq!(held.join().unwrap(), None);
        });
    }

    #[test]
    fn decorators_without_faults_keep_the_contracts() {
        let wrapped = || {
            let device = SimDisk::new(SimOptions::default()).device("v", 1 << 20);
            Arc::new(FaultyTarget::new(device)) as Arc<dyn BlockTarget>
        };

        crate::conformance::target_conformance(&wrapped);
    }
}
