//! A simulated machine's storage behind the production traits: directories, files and block devices with a
//! volatile write cache.
//!
//! Nothing is durable before a successful `flush` of the file or `sync` of the directory. Every mutating
//! operation has a number, and so has every query; faults hit by number or by kind, and a recorded run gives the
//! state after each operation as a [`Snapshot`], from which [`CrashImages`] forms what power loss may leave.
//!
//! Contract: deterministic for one seed and one order of calls. The types are `Send + Sync`, but several
//! threads make the order, and so the numbers, unpredictable. Crash semantics are in `image`, the rules of
//! cache and medium in `state`.

mod content;
mod fault;
mod handle;
mod image;
mod state;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockferry_core::Extent;
use blockferry_device::{BlockTarget, Error, ErrorKind, Result, StorageDir};

pub use fault::{Fault, FaultKind, Operation, OperationKind, Repeat};
pub use image::{CrashImage, CrashImages, ImageLimits};

use crate::Random;
use content::{Content, SECTOR};
use handle::{SimDir, SimFile};
use state::{Kind, NameChange, State};

/// How a simulated machine behaves.
#[derive(Clone, Copy, Debug)]
#[expect(
    clippy::exhaustive_structs,
    reason = "plain options, written out by callers"
)]
pub struct SimOptions {
    /// Whether `clone_from_file` works (as on XFS) or is unsupported (as on ext4).
    pub clones: bool,
    /// Whether `exchange` works.
    pub exchanges: bool,
    /// Whether `punch` gives space back and promises zeros.
    pub punches: bool,
    /// What reads show after a failed write or flush.
    pub after_failure: CacheAfterFailure,
    /// Which ways past the cache there are.
    pub bypass: Bypass,
    /// Decides what is lost when an operation fails.
    pub seed: u64,
}

impl Default for SimOptions {
    fn default() -> Self {
        let after_failure = CacheAfterFailure::Lies;
        Self {
            clones: true,
            exchanges: true,
            punches: true,
            after_failure,
            bypass: Bypass::All,
            seed: 0,
        }
    }
}

/// What a file system's cache shows after a failed write or flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "bytes are shown or not")]
pub enum CacheAfterFailure {
    /// The new bytes, although the medium lost them (measured on ext4). A new size is still to be flushed.
    Lies,
    /// The same, and a new size may be lost for good as well. No reading of the medium can tell, so only a
    /// size that was durable before the writes (preallocation) is safe.
    LiesAboutSize,
    /// What the medium holds (as on Btrfs).
    Reverts,
}

/// Ways of reading past a cache that may lie. Blocking one shows who relies on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "there are two ways")]
pub enum Bypass {
    /// `read_medium` reads the medium, and `drop_cache` drops the cache.
    All,
    /// `read_medium` reads the cache.
    DropsOnly,
    /// `drop_cache` does nothing.
    MediumOnly,
}

/// A simulated machine's storage. Clones are handles of the same machine.
#[derive(Clone)]
pub struct SimDisk {
    world: Arc<Mutex<World>>,
}

struct World {
    state: State,
    locks: BTreeSet<(usize, String)>,
    faults: Vec<Fault>,
    operations: u64,
    queries: u64,
    reads: u64,
    label: Arc<str>,
    power_lost: bool,
    trace: Option<Vec<Boundary>>,
    /// Recorded with `trace`.
    queried: Option<Vec<Operation>>,
    misuses: Vec<String>,
}

/// The moment after an operation of a recorded run.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Boundary {
    /// The operation just done; `None` at the start of the recording.
    pub operation: Option<Operation>,
    /// The operations done so far.
    pub number: u64,
    /// The storage at this moment.
    pub snapshot: Snapshot,
}

/// The whole storage at one moment: what is durable, what is not. Cheap to clone.
#[derive(Clone)]
pub struct Snapshot {
    state: State,
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("files", &self.state.inodes.len())
            .finish_non_exhaustive()
    }
}

impl Snapshot {
    /// What power loss at this moment may leave.
    #[must_use]
    pub fn crash_images(&self, seed: u64, limits: ImageLimits) -> CrashImages {
        CrashImages::new(&self.state, seed, limits)
    }

    /// One of them again.
    pub(crate) fn crash_image(&self, outcomes: &[(usize, u16)], noise: u64) -> CrashImage {
        CrashImage::with_outcomes(&self.state, outcomes, noise)
    }

    /// The machine lives on but the process died: the cache stays, locks and handles are gone.
    #[must_use]
    pub fn after_kill(&self) -> SimDisk {
        SimDisk::from_state(self.state.clone())
    }

    /// Equal for snapshots that have the same crash images.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        self.state.full_fingerprint()
    }
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let world = self.lock();
        f.debug_struct("SimDisk")
            .field("files", &world.state.inodes.len())
            .field("operations", &world.operations)
            .finish_non_exhaustive()
    }
}

impl SimDisk {
    /// A machine with nothing on it.
    #[must_use]
    pub fn new(options: SimOptions) -> Self {
        Self::from_state(State::new(options))
    }

    fn from_state(state: State) -> Self {
        let world = World {
            state,
            locks: BTreeSet::new(),
            faults: Vec::new(),
            operations: 0,
            queries: 0,
            reads: 0,
            label: "".into(),
            power_lost: false,
            trace: None,
            queried: None,
            misuses: Vec::new(),
        };
        Self {
            world: Arc::new(Mutex::new(world)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        // A panicking check must not hide the state from the explorer that caught it.
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The directory of this name; made, durably, when first asked for.
    #[must_use]
    pub fn dir(&self, name: &str) -> Arc<dyn StorageDir> {
        let slot = self.lock().state.directory(name);
        Arc::new(SimDir::new(self.clone(), slot, name))
    }

    /// The block device of this name; made, durably and full of zeros, when first asked for.
    #[must_use]
    pub fn device(&self, name: &str, size_bytes: u64) -> Arc<dyn BlockTarget> {
        let mut world = self.lock();
        let number = world.state.device(name).unwrap_or_else(|| {
            let bytes = vec![0; crate::random::index(size_bytes)];
            world
                .state
                .add_inode(Kind::Device, name, Content::from_bytes(&bytes, false))
        });
        drop(world);
        Arc::new(SimFile::new(self.clone(), number, name))
    }

    /// Puts a file in place, durable and fully allocated, without counting as an operation.
    pub fn install(&self, directory: &str, name: &str, bytes: &[u8]) {
        self.install_content(directory, name, Content::from_bytes(bytes, false));
    }

    /// As [`Self::install`], with holes where pages are zero.
    pub fn install_sparse(&self, directory: &str, name: &str, bytes: &[u8]) {
        self.install_content(directory, name, Content::from_bytes(bytes, true));
    }

    fn install_content(&self, directory: &str, name: &str, content: Content) {
        let world = &mut *self.lock();
        let slot = world.state.directory(directory);
        let label = format!("{directory}/{name}");
        let number = world.state.add_inode(Kind::File, &label, content);
        let directory = world.state.directory_mut(slot);
        Arc::make_mut(&mut directory.names).insert(name.into(), number);
        Arc::make_mut(&mut directory.durable).insert(name.into(), number);
    }

    /// Makes a device, durable with this content, or gives an existing one this content.
    pub fn install_device(&self, name: &str, bytes: &[u8]) {
        let world = &mut *self.lock();
        let content = Content::from_bytes(bytes, false);
        match world
            .state
            .device(name)
            .and_then(|number| world.state.inode_mut(number))
        {
            Some(inode) => *inode = inode.rebooted(content, 0, inode.generation + 1),
            None => {
                world.state.add_inode(Kind::Device, name, content);
            }
        }
    }

    /// Limits what the files of a directory may allocate together. Clones count in full.
    pub fn limit_space(&self, directory: &str, capacity_bytes: u64) {
        let mut world = self.lock();
        let slot = world.state.directory(directory);
        world.state.directory_mut(slot).capacity_bytes = Some(capacity_bytes);
    }

    /// What the running system shows of `directory/name` or of a device; `None` if it is not there.
    #[must_use]
    pub fn content(&self, path: &str) -> Option<Vec<u8>> {
        let world = self.lock();
        let number = world.find(path)?;
        world
            .state
            .inode(number)
            .map(|inode| inode.cache.to_bytes())
    }

    /// Stands for owner, mode and the like of a file; 0 for a new one.
    #[must_use]
    pub fn attributes(&self, path: &str) -> Option<u64> {
        let world = self.lock();
        world
            .find(path)
            .and_then(|number| world.state.inode(number))
            .map(|i| i.attributes)
    }

    /// Sets what [`Self::attributes`] returns, durably. Nothing happens where there is no such file.
    pub fn set_attributes(&self, path: &str, attributes: u64) {
        let mut world = self.lock();
        let Some(number) = world.find(path) else {
            return;
        };
        if let Some(inode) = world.state.inode_mut(number) {
            inode.attributes = attributes;
            inode.durable_attributes = attributes;
        }
    }

    /// Turns one bit of a file or device, on the medium and in the cache (F5). Returns whether there is one.
    pub fn flip_bit(&self, path: &str, offset: u64) -> bool {
        self.change_behind(path, |content| {
            let mut byte = [0];
            content.read(offset, &mut byte);
            content.write(offset, &[byte[0] ^ 1]);
        })
    }

    /// Makes the sector at `offset` unreadable until it is written again. Returns whether there is one.
    pub fn spoil(&self, path: &str, offset: u64) -> bool {
        self.change_behind(path, |content| content.spoil(offset / SECTOR))
    }

    fn change_behind(&self, path: &str, change: impl Fn(&mut Content)) -> bool {
        let mut world = self.lock();
        let Some(number) = world.find(path) else {
            return false;
        };
        world.state.inode_mut(number).is_some_and(|inode| {
            change(&mut inode.cache);
            change(&mut inode.durable);
            true
        })
    }

    /// Names the protocol step that follows, for reports.
    pub fn label(&self, step: &str) {
        self.lock().label = step.into();
    }

    /// Adds a fault.
    pub fn inject(&self, fault: Fault) {
        self.lock().faults.push(fault);
    }

    /// Fails operation `number`, and every later one if it repeats.
    pub fn fail_operation(&self, number: u64, kind: FaultKind, repeat: Repeat) {
        self.inject(Fault::at(number, kind).repeat(repeat));
    }

    /// Forgets all faults.
    pub fn clear_faults(&self) {
        self.lock().faults.clear();
    }

    /// Operation `number` and everything after it fails: the power is lost.
    pub fn crash_at(&self, number: u64) {
        self.inject(Fault::at(number, FaultKind::PowerLoss));
    }

    /// Mutating operations so far, failed ones included.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// Queries so far, failed ones included.
    #[must_use]
    pub fn queries(&self) -> u64 {
        self.lock().queries
    }

    /// Reads so far that no fault hit.
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.lock().reads
    }

    /// Keeps the state after every operation, and every query, from now on.
    pub fn record(&self) {
        let world = &mut *self.lock();
        world.trace = Some(Vec::new());
        world.queried = Some(Vec::new());
        world.note_boundary(None);
    }

    /// What was recorded: first the state at [`Self::record`], then one per operation. Ends the recording.
    #[must_use]
    pub fn take_trace(&self) -> Vec<Boundary> {
        self.lock().trace.take().unwrap_or_default()
    }

    /// The queries since [`Self::record`]. Ends the recording of them.
    #[must_use]
    pub fn take_queries(&self) -> Vec<Operation> {
        self.lock().queried.take().unwrap_or_default()
    }

    /// The state now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.lock().snapshot()
    }

    /// Writes and flushes through handles that had failed before, which is never right (F4).
    #[must_use]
    pub fn misuses(&self) -> Vec<String> {
        self.lock().misuses.clone()
    }
}

/// What becomes of an operation.
enum Verdict {
    Proceed,
    Skip,
    LoseSilently,
    Fail(Error, FaultKind),
}

/// How much of what it was asked for an operation does.
#[derive(Clone, Copy)]
enum Share {
    Whole,
    /// As many of its units as this, taken modulo their number, says.
    Part(u64),
}

impl Share {
    fn of(self, units: u64) -> u64 {
        match self {
            Self::Whole => units,
            Self::Part(draw) => draw.checked_rem(units).unwrap_or(0),
        }
    }
}

impl World {
    fn snapshot(&self) -> Snapshot {
        Snapshot {
            state: self.state.clone(),
        }
    }

    fn note_boundary(&mut self, operation: Option<Operation>) {
        if self.trace.is_some() {
            let boundary = Boundary {
                operation,
                number: self.operations,
                snapshot: self.snapshot(),
            };
            self.trace
                .iter_mut()
                .for_each(|trace| trace.push(boundary.clone()));
        }
    }

    fn find(&self, path: &str) -> Option<u64> {
        let file = path.rsplit_once('/').and_then(|(directory, name)| {
            let mut all = self.state.directories.iter();
            let slot = all.position(|d| &*d.label == directory)?;
            self.state.lookup(slot, name)
        });
        file.or_else(|| self.state.device(path))
    }

    fn begin(&mut self, kind: OperationKind, subject: &str, extent: Option<Extent>) -> Operation {
        debug_assert!(!kind.is_query(), "queries have numbers of their own");
        self.operations += 1;
        let label = Arc::clone(&self.label);
        Operation {
            number: self.operations,
            kind,
            subject: subject.into(),
            extent,
            label,
        }
    }

    /// Numbers something that only asks, and lets faults hit it.
    fn query(&mut self, kind: OperationKind, subject: &str, extent: Option<Extent>) -> Result<()> {
        debug_assert!(kind.is_query(), "this one would change something");
        self.queries += 1;
        if self.faults.is_empty() && !self.power_lost && self.queried.is_none() {
            return Ok(());
        }
        let query = Operation {
            number: self.queries,
            kind,
            subject: subject.into(),
            extent,
            label: Arc::clone(&self.label),
        };
        let verdict = self.judge(&query);
        self.queried
            .iter_mut()
            .for_each(|all| all.push(query.clone()));
        match verdict {
            Verdict::Proceed | Verdict::Skip | Verdict::LoseSilently => Ok(()),
            Verdict::Fail(error, _) => Err(error),
        }
    }

    fn judge(&mut self, operation: &Operation) -> Verdict {
        let mut faults = self.faults.iter_mut();
        let fault = faults.find_map(|fault| fault.hits(operation).then_some(fault.kind));
        if fault == Some(FaultKind::PowerLoss) {
            self.power_lost = true;
        }
        if self.power_lost {
            return Verdict::Fail(power_lost(&operation.to_string()), FaultKind::PowerLoss);
        }
        let failed = |kind, what| Error::new(kind, format!("{operation}: {what}"));
        match fault {
            None => Verdict::Proceed,
            Some(FaultKind::Skipped) => Verdict::Skip,
            Some(FaultKind::SilentLoss) => Verdict::LoseSilently,
            Some(kind @ FaultKind::NoSpace) => {
                Verdict::Fail(failed(ErrorKind::NoSpace, "injected lack of space"), kind)
            }
            // As devices report it: what they cannot read to its end has become shorter.
            Some(kind @ FaultKind::Short) if operation.kind == OperationKind::Read => {
                Verdict::Fail(failed(ErrorKind::OutOfRange, "injected short count"), kind)
            }
            Some(kind @ FaultKind::Short) => {
                Verdict::Fail(failed(ErrorKind::Io, "injected short count"), kind)
            }
            Some(kind @ FaultKind::Interrupted) => {
                Verdict::Fail(failed(ErrorKind::Io, "injected interruption"), kind)
            }
            Some(kind @ FaultKind::Gone) => {
                Verdict::Fail(failed(ErrorKind::Lost, "injected loss of the device"), kind)
            }
            Some(kind) => Verdict::Fail(failed(ErrorKind::Io, "injected input/output error"), kind),
        }
    }

    /// Runs one operation on a file: numbers it, lets faults hit it, records the boundary.
    fn on_file<T: Default>(
        &mut self,
        number: u64,
        operation: Operation,
        act: impl FnOnce(&mut Self, u64, Share) -> Result<T>,
    ) -> Result<T> {
        let result = match self.judge(&operation) {
            Verdict::Proceed => act(self, operation.number, Share::Whole),
            Verdict::Skip => Ok(T::default()),
            Verdict::LoseSilently => {
                let result = act_unless_flush(self, &operation, act);
                self.lose_pending(number, &operation, CacheAfterFailure::Lies);
                result
            }
            Verdict::Fail(error, FaultKind::PowerLoss | FaultKind::Interrupted) => Err(error),
            Verdict::Fail(error, FaultKind::Short) => {
                if operation.kind.can_fall_short() {
                    let mut random = Random::part(self.state.options.seed, operation.number);
                    let share = Share::Part(random.next_u64());
                    let _partly: Result<T> = act(self, operation.number, share);
                }
                Err(error)
            }
            Verdict::Fail(error, _) => {
                // A failed write may have got anywhere.
                let _partly: Result<T> = act_unless_flush(self, &operation, act);
                self.lose_pending(number, &operation, self.state.options.after_failure);
                Err(error)
            }
        };
        self.note_boundary(Some(operation));
        result
    }

    fn lose_pending(&mut self, number: u64, operation: &Operation, cache: CacheAfterFailure) {
        let mut random = Random::part(self.state.options.seed, operation.number);
        if let Some(inode) = self.state.inode_mut(number) {
            inode.lose_pending(operation.number, &mut random, cache);
        }
    }

    /// Runs one operation on a directory, as [`Self::on_file`] does on files. A failed one changed nothing,
    /// and after a failed sync the changes are still to be synced: names live in the file system's journal,
    /// and a file system that loses its journal stops.
    fn on_directory<T: Default>(
        &mut self,
        slot: usize,
        operation: Operation,
        act: impl FnOnce(&mut Self, u64) -> Result<T>,
    ) -> Result<T> {
        let is_sync = operation.kind == OperationKind::SyncDirectory;
        let result = match self.judge(&operation) {
            Verdict::LoseSilently if is_sync => {
                let mut random = Random::part(self.state.options.seed, operation.number);
                self.state.directory_mut(slot).lose_pending(&mut random);
                Ok(T::default())
            }
            Verdict::Proceed | Verdict::LoseSilently => act(self, operation.number),
            Verdict::Skip => Ok(T::default()),
            Verdict::Fail(error, _) => Err(error),
        };
        self.note_boundary(Some(operation));
        result
    }

    fn change_names(&mut self, slot: usize, change: NameChange) {
        self.state.directory_mut(slot).change(change);
    }

    fn check_power(&self, attempt: impl FnOnce() -> String) -> Result<()> {
        if self.power_lost {
            Err(power_lost(&attempt()))
        } else {
            Ok(())
        }
    }
}

fn act_unless_flush<T: Default>(
    world: &mut World,
    operation: &Operation,
    act: impl FnOnce(&mut World, u64, Share) -> Result<T>,
) -> Result<T> {
    if operation.kind == OperationKind::Flush {
        Ok(T::default())
    } else {
        act(world, operation.number, Share::Whole)
    }
}

fn power_lost(attempt: &str) -> Error {
    Error::new(
        ErrorKind::Io,
        format!("{attempt}: the simulated machine has lost power"),
    )
}
