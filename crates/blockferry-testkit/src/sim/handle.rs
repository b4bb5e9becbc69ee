//! The production traits on top of the simulated storage.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockferry_core::Extent;
use blockferry_device::{
    BlockSource, BlockTarget, Error, ErrorKind, Evidence, Identity, LockGuard, ReadRequest, Result,
    Status, StorageDir, StorageFile,
};

use super::content::{Content, PAGE, SECTOR};
use super::state::{Inode, Kind, NameChange};
use super::{Bypass, Operation, OperationKind, Share, SimDisk, World};
use crate::random::{count, index};

/// What nobody may take for content.
const LEFT_BY_A_FAILED_READ: u8 = 0xA5;

/// An open file or device.
#[derive(Debug)]
pub(super) struct SimFile {
    disk: SimDisk,
    number: u64,
    label: Arc<str>,
    /// A write or flush through this handle has failed.
    dead: AtomicBool,
}

impl SimFile {
    pub(super) fn new(disk: SimDisk, number: u64, label: &str) -> Self {
        Self {
            disk,
            number,
            label: label.into(),
            dead: AtomicBool::new(false),
        }
    }

    fn inspect<T>(&self, look: impl FnOnce(&Inode) -> T) -> T {
        let world = self.disk.lock();
        look(
            world
                .state
                .inode(self.number)
                .expect("inodes outlive their handles"),
        )
    }

    /// As [`Self::inspect`], where a fault may hit.
    fn query<T>(
        &self,
        kind: OperationKind,
        extent: Option<Extent>,
        look: impl FnOnce(&World, &Inode) -> T,
    ) -> Result<T> {
        let mut world = self.disk.lock();
        world.query(kind, &self.label, extent)?;
        let inode = world
            .state
            .inode(self.number)
            .expect("inodes outlive their handles");
        Ok(look(&world, inode))
    }

    fn bypass(&self) -> Bypass {
        self.disk.lock().state.options.bypass
    }

    /// Runs a numbered operation on this file; remembers failures to report later use of a dead handle.
    fn operate<T: Default>(
        &self,
        kind: OperationKind,
        extent: Option<Extent>,
        act: impl FnOnce(&mut World, u64, Share) -> Result<T>,
    ) -> Result<T> {
        let mut world = self.disk.lock();
        let operation = world.begin(kind, &self.label, extent);
        if self.dead.load(Ordering::Relaxed) && !world.power_lost {
            world.misuses.push(format!(
                "{operation} through a handle that had failed before"
            ));
        }
        let result = world.on_file(self.number, operation, act);
        if result.is_err() {
            self.dead.store(true, Ordering::Relaxed);
        }
        result
    }

    fn change<T>(&self, world: &mut World, change: impl FnOnce(&mut Inode) -> T) -> T {
        change(
            world
                .state
                .inode_mut(self.number)
                .expect("inodes outlive their handles"),
        )
    }

    fn read(&self, offset: u64, buffer: &mut [u8], view: fn(&Inode) -> Content) -> Result<()> {
        let length = count(buffer.len());
        let attempt = || {
            format!(
                "read of {length} bytes at offset {offset} from {}",
                self.label
            )
        };
        let mut world = self.disk.lock();
        let extent = Extent::new(offset, length);
        if let Err(error) = world.query(OperationKind::Read, &self.label, extent) {
            // It may have got anywhere.
            buffer.fill(LEFT_BY_A_FAILED_READ);
            return Err(error);
        }
        world.reads += 1;
        let inode = world
            .state
            .inode(self.number)
            .expect("inodes outlive their handles");
        let content = view(inode);
        if offset
            .checked_add(length)
            .is_none_or(|end| end > content.size())
        {
            let text = format!("{}: past the end at {}", attempt(), content.size());
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        if let Some(sector) = content.first_bad(offset, length) {
            buffer.fill(LEFT_BY_A_FAILED_READ);
            let text = format!("{}: sector {sector} is unreadable", attempt());
            return Err(Error::new(ErrorKind::Io, text));
        }
        content.read(offset, buffer);
        Ok(())
    }

    /// Whether a change up to `end` needs space that is not there, or reaches past a fixed size.
    fn check_room(&self, world: &World, offset: u64, length: u64) -> Result<()> {
        let inode = world
            .state
            .inode(self.number)
            .expect("inodes outlive their handles");
        let attempt = || {
            format!(
                "write of {length} bytes at offset {offset} to {}",
                self.label
            )
        };
        let end = offset.checked_add(length);
        if inode.kind == Kind::Device && end.is_none_or(|end| end > inode.cache.size()) {
            let text = format!("{}: past the end at {}", attempt(), inode.cache.size());
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        if let Some(sector) = inode.blocking_sector(offset, length) {
            let text = format!(
                "{}: sector {sector} is unreadable and only partly written",
                attempt()
            );
            return Err(Error::new(ErrorKind::Io, text));
        }
        self.check_space(world, inode.missing_bytes(offset, length), attempt)
    }

    fn check_space(
        &self,
        world: &World,
        needed_bytes: u64,
        attempt: impl Fn() -> String,
    ) -> Result<()> {
        let Some(home) = world.state.home(self.number) else {
            return Ok(());
        };
        let available_bytes = world.state.available_bytes(home);
        if needed_bytes > available_bytes {
            let text = format!(
                "{}: needs {needed_bytes} bytes, {available_bytes} are free",
                attempt()
            );
            return Err(Error::new(ErrorKind::NoSpace, text));
        }
        Ok(())
    }

    fn check_inside(&self, extent: Extent) -> Result<()> {
        let size = self.size_bytes();
        if extent.end() > size {
            let text = format!(
                "change of {extent} in {}: past the end at {size}",
                self.label
            );
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        Ok(())
    }
}

impl BlockSource for SimFile {
    fn label(&self) -> &str {
        &self.label
    }

    fn size_bytes(&self) -> u64 {
        self.inspect(|inode| inode.cache.size())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.read(offset, buffer, |inode| inode.cache.clone())
    }

    fn status_at(&self, offset: u64) -> Result<(Status, u64)> {
        let at = Extent::new(offset, 0);
        self.query(OperationKind::Status, at, |_, inode| {
            let size = inode.cache.size();
            let first = inode.cache.is_allocated(offset / PAGE) || inode.kind == Kind::Device;
            let same = |page: &u64| {
                (inode.cache.is_allocated(*page) || inode.kind == Kind::Device) == first
            };
            let pages = offset / PAGE..size.div_ceil(PAGE);
            let end = pages
                .take_while(same)
                .last()
                .map_or(offset, |page| (page + 1) * PAGE);
            (
                if first { Status::Data } else { Status::Zero },
                end.min(size),
            )
        })
    }

    fn identity(&self) -> Result<Identity> {
        self.query(OperationKind::Examine, None, |_, inode| {
            Identity::from_bytes(format!("simulated {}", inode.number).as_bytes())
        })
    }

    fn evidence(&self) -> Result<Evidence> {
        self.query(OperationKind::Examine, None, |world, inode| {
            // A device's write count says nothing about another boot.
            let boot = if inode.kind == Kind::Device {
                world.state.boot
            } else {
                0
            };
            let parts = [inode.number, inode.generation, inode.cache.size(), boot];
            let bytes: Vec<u8> = parts.iter().flat_map(|part| part.to_le_bytes()).collect();
            Evidence::from_bytes(&bytes)
        })
    }
}

impl BlockTarget for SimFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let length = count(bytes.len());
        self.operate(
            OperationKind::Write,
            Extent::new(offset, length),
            |world, operation, share| {
                self.check_room(world, offset, length)?;
                let bytes = &bytes[..index(sectors_of(share, length))];
                self.change(world, |inode| inode.write(operation, offset, bytes));
                Ok(())
            },
        )
    }

    fn write_zeroes(&self, extent: Extent) -> Result<()> {
        self.check_inside(extent)?;
        self.operate(
            OperationKind::WriteZeroes,
            Some(extent),
            |world, operation, share| {
                let (offset, length) = (extent.start(), extent.length());
                self.check_room(world, offset, length)?;
                let length = sectors_of(share, length);
                self.change(world, |inode| inode.write_zeroes(operation, offset, length));
                Ok(())
            },
        )
    }

    fn punch(&self, extent: Extent) -> Result<bool> {
        self.check_inside(extent)?;
        let punches = self.disk.lock().state.options.punches;
        if !punches || self.inspect(|inode| inode.kind) == Kind::Device {
            return Ok(false);
        }
        self.operate(
            OperationKind::Punch,
            Some(extent),
            |world, operation, share| {
                let (offset, length) = (extent.start(), extent.length());
                let length = length.min(share.of(length.div_ceil(PAGE)) * PAGE);
                self.change(world, |inode| inode.punch(operation, offset, length));
                Ok(())
            },
        )?;
        Ok(true)
    }

    fn flush(&self) -> Result<()> {
        self.operate(OperationKind::Flush, None, |world, _, _| {
            self.change(world, Inode::flush);
            Ok(())
        })
    }

    fn read_medium(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        let view = match self.bypass() {
            Bypass::All | Bypass::MediumOnly => Inode::medium,
            Bypass::DropsOnly => |inode: &Inode| inode.cache.clone(),
        };
        requests
            .iter_mut()
            .try_for_each(|r| self.read(r.offset, r.buffer, view))
    }

    fn drop_cache(&self) {
        if self.bypass() != Bypass::MediumOnly {
            self.change(&mut self.disk.lock(), Inode::drop_cache);
        }
    }

    fn reserve(&self, extents: &[Extent]) -> Result<Vec<Extent>> {
        if self.inspect(|inode| inode.kind) == Kind::Device {
            return Ok(Vec::new());
        }
        let whole = extents.first().copied();
        self.operate(OperationKind::Reserve, whole, |world, operation, share| {
            let mut pages = BTreeSet::new();
            for extent in extents {
                pages.extend(extent.start() / PAGE..extent.end().div_ceil(PAGE));
            }
            let missing = |inode: &Inode| {
                count(
                    pages
                        .iter()
                        .filter(|page| !inode.cache.is_allocated(**page))
                        .count(),
                ) * PAGE
            };
            let needed_bytes = world.state.inode(self.number).map_or(0, missing);
            let attempt = || format!("reservation of space in {}", self.label);
            self.check_space(world, needed_bytes, attempt)?;
            let allocated = self.change(world, |inode| {
                // As a real file's change time does.
                inode.generation += 1;
                let page_run = |&page: &u64| inode.allocate(operation, page, page + 1);
                let first = pages.iter().take(index(share.of(count(pages.len()))));
                first.flat_map(page_run).collect::<Vec<u64>>()
            });
            Ok(page_extents(&allocated))
        })
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        let (kind, size) = self.inspect(|inode| (inode.kind, inode.cache.size()));
        if kind == Kind::Device {
            let text = format!("resize of {} from {size} to {size_bytes} bytes", self.label);
            let refused = || Error::new(ErrorKind::Unsupported, text);
            return if size == size_bytes {
                Ok(())
            } else {
                Err(refused())
            };
        }
        self.operate(
            OperationKind::Resize,
            Extent::new(size_bytes, 0),
            |world, operation, _| {
                self.change(world, |inode| inode.resize(operation, size_bytes));
                Ok(())
            },
        )
    }
}

/// The bytes of the sectors from the start that are done.
fn sectors_of(share: Share, length: u64) -> u64 {
    length.min(share.of(length.div_ceil(SECTOR)) * SECTOR)
}

/// Merges ascending pages into extents.
fn page_extents(pages: &[u64]) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for &page in pages {
        let start = page * PAGE;
        match extents.last_mut() {
            Some(last) if last.end() == start => {
                *last = Extent::from_range(last.start()..start + PAGE);
            }
            _ => extents.push(Extent::from_range(start..start + PAGE)),
        }
    }
    extents
}

impl StorageFile for SimFile {
    fn file_id(&self) -> Result<u64> {
        self.query(OperationKind::Examine, None, |_, inode| inode.number)
    }

    fn clone_from_file(&self, origin: &dyn StorageFile) -> Result<()> {
        let unsupported = |why: &str| {
            let text = format!("clone of {} into {}: {why}", origin.label(), self.label);
            Error::new(ErrorKind::Unsupported, text)
        };
        if !self.disk.lock().state.options.clones {
            return Err(unsupported("this file system cannot"));
        }
        let origin_number = origin.file_id()?;
        self.operate(OperationKind::Clone, None, |world, operation, _| {
            let from = world
                .state
                .inode(origin_number)
                .map(|inode| inode.cache.clone());
            let from = from.ok_or_else(|| unsupported("not a file of this machine"))?;
            let needed = from.allocated_bytes();
            let has = self.change(world, |inode| inode.cache.allocated_bytes());
            let attempt = || format!("clone of {} into {}", origin.label(), self.label);
            self.check_space(world, needed.saturating_sub(has), attempt)?;
            self.change(world, |inode| inode.clone_from(operation, &from));
            Ok(())
        })
    }

    fn copy_metadata(&self, origin: &dyn StorageFile) -> Result<()> {
        let origin_number = origin.file_id()?;
        self.operate(OperationKind::CopyMetadata, None, |world, operation, _| {
            let attributes = world
                .state
                .inode(origin_number)
                .map_or(0, |inode| inode.attributes);
            self.change(world, |inode| inode.set_attributes(operation, attributes));
            Ok(())
        })
    }

    fn into_target(self: Arc<Self>) -> Arc<dyn BlockTarget> {
        self
    }
}

/// An open directory.
#[derive(Debug)]
pub(super) struct SimDir {
    disk: SimDisk,
    slot: usize,
    label: String,
}

impl SimDir {
    pub(super) fn new(disk: SimDisk, slot: usize, label: &str) -> Self {
        Self {
            disk,
            slot,
            label: label.to_owned(),
        }
    }

    /// A name is one path component.
    fn check_name(&self, name: &str) -> Result<()> {
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
            let text = format!("{name:?} is not a file name in {}", self.label);
            return Err(Error::new(ErrorKind::Unsuitable, text));
        }
        Ok(())
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.label)
    }

    fn operation(&self, world: &mut World, kind: OperationKind, name: &str) -> Operation {
        world.begin(kind, &self.path(name), None)
    }

    fn taken(&self, name: &str) -> Error {
        Error::new(
            ErrorKind::AlreadyExists,
            format!("{}: the name is taken", self.path(name)),
        )
    }

    fn missing(&self, name: &str) -> Error {
        Error::new(
            ErrorKind::NotFound,
            format!("{}: there is no such file", self.path(name)),
        )
    }

    fn require(&self, world: &World, name: &str) -> Result<u64> {
        world
            .state
            .lookup(self.slot, name)
            .ok_or_else(|| self.missing(name))
    }

    fn change(&self, world: &mut World, operation: u64, names: Vec<(&str, Option<u64>)>) {
        let names = names
            .into_iter()
            .map(|(name, number)| (Arc::from(name), number))
            .collect();
        world.change_names(self.slot, NameChange { operation, names });
    }

    fn create_in(&self, world: &mut World, name: &str) -> Result<u64> {
        let operation = self.operation(world, OperationKind::Create, name);
        world.on_directory(self.slot, operation, |world, number| {
            if world.state.lookup(self.slot, name).is_some() {
                return Err(self.taken(name));
            }
            let path = self.path(name);
            let inode = world.state.add_inode(Kind::File, &path, Content::holes(0));
            self.change(world, number, vec![(name, Some(inode))]);
            Ok(inode)
        })
    }

    fn handle(&self, number: u64, name: &str) -> Arc<dyn StorageFile> {
        Arc::new(SimFile::new(self.disk.clone(), number, &self.path(name)))
    }
}

impl StorageDir for SimDir {
    fn label(&self) -> &str {
        &self.label
    }

    fn create(&self, name: &str) -> Result<Arc<dyn StorageFile>> {
        self.check_name(name)?;
        let number = self.create_in(&mut self.disk.lock(), name)?;
        Ok(self.handle(number, name))
    }

    fn open(&self, name: &str) -> Result<Option<Arc<dyn StorageFile>>> {
        self.check_name(name)?;
        let mut world = self.disk.lock();
        world.query(OperationKind::Open, &self.path(name), None)?;
        Ok(world
            .state
            .lookup(self.slot, name)
            .map(|number| self.handle(number, name)))
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.check_name(name)?;
        let mut world = self.disk.lock();
        if world.state.lookup(self.slot, name).is_none() {
            return world.check_power(|| format!("removal of {}", self.path(name)));
        }
        let operation = self.operation(&mut world, OperationKind::Remove, name);
        world.on_directory(self.slot, operation, |world, number| {
            self.change(world, number, vec![(name, None)]);
            Ok(())
        })
    }

    fn rename_new(&self, from: &str, to: &str) -> Result<()> {
        [from, to]
            .into_iter()
            .try_for_each(|name| self.check_name(name))?;
        let mut world = self.disk.lock();
        let operation = self.operation(&mut world, OperationKind::Rename, from);
        world.on_directory(self.slot, operation, |world, number| {
            let inode = self.require(world, from)?;
            if world.state.lookup(self.slot, to).is_some() {
                return Err(self.taken(to));
            }
            self.change(world, number, vec![(from, None), (to, Some(inode))]);
            Ok(())
        })
    }

    fn exchange(&self, one: &str, other: &str) -> Result<()> {
        [one, other]
            .into_iter()
            .try_for_each(|name| self.check_name(name))?;
        let mut world = self.disk.lock();
        if !world.state.options.exchanges {
            let text = format!("exchange of {} and {other}: unsupported", self.path(one));
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let operation = self.operation(&mut world, OperationKind::Exchange, one);
        world.on_directory(self.slot, operation, |world, number| {
            let (first, second) = (self.require(world, one)?, self.require(world, other)?);
            self.change(
                world,
                number,
                vec![(one, Some(second)), (other, Some(first))],
            );
            Ok(())
        })
    }

    fn names(&self) -> Result<Vec<String>> {
        let mut world = self.disk.lock();
        world.query(OperationKind::List, &self.label, None)?;
        Ok(world.state.directories[self.slot]
            .names
            .keys()
            .map(|name| (**name).to_owned())
            .collect())
    }

    fn sync(&self) -> Result<()> {
        let mut world = self.disk.lock();
        let operation = world.begin(OperationKind::SyncDirectory, &self.label, None);
        world.on_directory(self.slot, operation, |world, _| {
            world.state.directory_mut(self.slot).sync();
            Ok(())
        })
    }

    fn available_bytes(&self) -> Result<u64> {
        let mut world = self.disk.lock();
        world.query(OperationKind::AvailableBytes, &self.label, None)?;
        Ok(world.state.available_bytes(self.slot))
    }

    fn may_clone(&self) -> bool {
        self.disk.lock().state.options.clones
    }

    fn lock(&self, name: &str) -> Result<Box<dyn LockGuard>> {
        self.check_name(name)?;
        let mut world = self.disk.lock();
        world.query(OperationKind::Lock, &self.path(name), None)?;
        let key = (self.slot, name.to_owned());
        if world.locks.contains(&key) {
            let text = format!("{}: locked by another process", self.path(name));
            return Err(Error::new(ErrorKind::Busy, text));
        }
        if world.state.lookup(self.slot, name).is_none() {
            self.create_in(&mut world, name)?;
        }
        world.locks.insert(key.clone());
        Ok(Box::new(SimLock {
            disk: self.disk.clone(),
            key,
        }))
    }
}

/// A held lock.
struct SimLock {
    disk: SimDisk,
    key: (usize, String),
}

impl fmt::Debug for SimLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SimLock").field(&self.key.1).finish()
    }
}

impl LockGuard for SimLock {}

impl Drop for SimLock {
    fn drop(&mut self) {
        self.disk.lock().locks.remove(&self.key);
    }
}
