//! Everything the simulated machine stores: what the system shows, what the medium certainly holds, and
//! the changes in between. Pure transitions; faults, numbering and locks are the parent's.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use super::content::{Content, PAGE, SECTOR};
use super::image::CrashPlan;
use super::{CacheAfterFailure, SimOptions};
use crate::Random;
use crate::random::{count, index, mix};

/// One change since the last barrier, with the number of the operation that made it.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    pub(crate) operation: u64,
    pub(crate) change: Change,
    /// Of the change, for [`State::full_fingerprint`].
    hash: u64,
}

impl Pending {
    fn sectors(&self) -> Range<u64> {
        match &self.change {
            Change::Write {
                first_sector,
                bytes,
            } => *first_sector..*first_sector + count(bytes.len()) / SECTOR,
            Change::Zero {
                first_sector,
                sectors,
            } => *first_sector..*first_sector + *sectors,
            _ => 0..0,
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// Whole sectors.
    Write {
        first_sector: u64,
        bytes: Arc<[u8]>,
    },
    /// Whole sectors that become zero.
    Zero {
        first_sector: u64,
        sectors: u64,
    },
    Size(u64),
    Allocate {
        first_page: u64,
        pages: u64,
    },
    Deallocate {
        first_page: u64,
        pages: u64,
    },
    Attributes(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Device,
}

#[derive(Clone, Debug)]
pub(crate) struct Inode {
    pub(crate) number: u64,
    pub(crate) kind: Kind,
    /// For reports: the name it was made with.
    pub(crate) label: Arc<str>,
    /// What the running system reads.
    pub(crate) cache: Content,
    /// What the last successful flush left on the medium.
    pub(crate) durable: Content,
    pub(crate) pending: Arc<Vec<Pending>>,
    /// Sectors where the cache shows bytes that the medium lost, and that no flush will write again.
    pub(crate) stale: Arc<BTreeSet<u64>>,
    size_lost: bool,
    /// Counts every change of content or size.
    pub(crate) generation: u64,
    pub(crate) durable_generation: u64,
    /// Stands for owner, mode, ACL, extended attributes and times.
    pub(crate) attributes: u64,
    pub(crate) durable_attributes: u64,
}

impl Inode {
    pub(crate) fn new(number: u64, kind: Kind, label: Arc<str>, content: Content) -> Self {
        Self {
            number,
            kind,
            label,
            cache: content.clone(),
            durable: content,
            pending: Arc::default(),
            stale: Arc::default(),
            size_lost: false,
            generation: 1,
            durable_generation: 1,
            attributes: 0,
            durable_attributes: 0,
        }
    }

    /// The same file or device after a reboot that left `content` and `attributes` on the medium.
    pub(crate) fn rebooted(&self, content: Content, attributes: u64, generation: u64) -> Self {
        Self {
            generation,
            durable_generation: generation,
            attributes,
            durable_attributes: attributes,
            ..Self::new(self.number, self.kind, Arc::clone(&self.label), content)
        }
    }

    fn push(&mut self, operation: u64, change: Change) {
        let hash = change_hash(&change);
        Arc::make_mut(&mut self.pending).push(Pending {
            operation,
            change,
            hash,
        });
    }

    /// Bytes of new pages that a write of this range needs.
    pub(crate) fn missing_bytes(&self, offset: u64, length: u64) -> u64 {
        let pages = offset / PAGE..(offset + length).div_ceil(PAGE);
        count(pages.filter(|page| !self.cache.is_allocated(*page)).count()) * PAGE
    }

    /// The unreadable sector that stops a write because it covers it only in part.
    pub(crate) fn blocking_sector(&self, offset: u64, length: u64) -> Option<u64> {
        let end = offset + length;
        let partial = |sector: u64| {
            let sector_end = ((sector + 1) * SECTOR).min(self.cache.size());
            offset > sector * SECTOR || end < sector_end
        };
        [offset / SECTOR, end.saturating_sub(1) / SECTOR]
            .into_iter()
            .find(|&sector| {
                length > 0 && partial(sector) && self.cache.first_bad(sector * SECTOR, 1).is_some()
            })
    }

    pub(crate) fn write(&mut self, operation: u64, offset: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let end = offset + count(bytes.len());
        if end > self.cache.size() {
            self.push(operation, Change::Size(end));
            self.size_lost = false;
        }
        self.cache.write(offset, bytes);
        let first_sector = offset / SECTOR;
        let sectors = end.div_ceil(SECTOR) - first_sector;
        let mut whole = vec![0; index(sectors * SECTOR)];
        self.cache.read(first_sector * SECTOR, &mut whole);
        self.push(
            operation,
            Change::Write {
                first_sector,
                bytes: whole.into(),
            },
        );
        self.forget_stale(first_sector, first_sector + sectors);
        self.generation += 1;
    }

    pub(crate) fn write_zeroes(&mut self, operation: u64, offset: u64, length: u64) {
        let end = (offset + length).min(self.cache.size());
        if offset < end {
            let pages = offset / PAGE..end.div_ceil(PAGE);
            self.allocate(operation, pages.start, pages.end);
            self.zero(operation, offset, end);
        }
    }

    pub(crate) fn punch(&mut self, operation: u64, offset: u64, length: u64) {
        let end = (offset + length).min(self.cache.size());
        if offset < end {
            self.zero(operation, offset, end);
            let whole_end = if end == self.cache.size() {
                end.div_ceil(PAGE)
            } else {
                end / PAGE
            };
            self.deallocate(operation, offset.div_ceil(PAGE), whole_end);
        }
    }

    fn zero(&mut self, operation: u64, offset: u64, end: u64) {
        self.cache.zero(offset, end - offset);
        // The edges keep other bytes of their sectors, so they travel as writes.
        let (inner_first, inner_end) = (offset.div_ceil(SECTOR), end / SECTOR);
        let mut edges = BTreeSet::new();
        if !offset.is_multiple_of(SECTOR) {
            edges.insert(offset / SECTOR);
        }
        if !end.is_multiple_of(SECTOR) {
            edges.insert(end / SECTOR);
        }
        for sector in edges {
            let bytes = Arc::from(self.cache.sector(sector));
            self.push(
                operation,
                Change::Write {
                    first_sector: sector,
                    bytes,
                },
            );
        }
        if inner_first < inner_end {
            let sectors = inner_end - inner_first;
            self.push(
                operation,
                Change::Zero {
                    first_sector: inner_first,
                    sectors,
                },
            );
        }
        self.forget_stale(offset / SECTOR, end.div_ceil(SECTOR));
        self.generation += 1;
    }

    fn deallocate(&mut self, operation: u64, first_page: u64, end_page: u64) {
        if first_page < end_page {
            (first_page..end_page).for_each(|page| self.cache.deallocate_if_zero(page));
            self.push(
                operation,
                Change::Deallocate {
                    first_page,
                    pages: end_page - first_page,
                },
            );
        }
    }

    /// Allocates the holes among the pages and returns them.
    pub(crate) fn allocate(&mut self, operation: u64, first_page: u64, end_page: u64) -> Vec<u64> {
        let holes: Vec<u64> = (first_page..end_page)
            .filter(|page| !self.cache.is_allocated(*page))
            .collect();
        if !holes.is_empty() {
            holes.iter().for_each(|page| self.cache.allocate(*page));
            let pages = end_page - first_page;
            self.push(operation, Change::Allocate { first_page, pages });
        }
        holes
    }

    pub(crate) fn resize(&mut self, operation: u64, size: u64) {
        let old = self.cache.size();
        if size == old {
            return;
        }
        if size < old {
            self.zero(operation, size, old);
        }
        self.cache.set_size(size);
        self.push(operation, Change::Size(size));
        self.size_lost = false;
        self.generation += 1;
    }

    pub(crate) fn set_attributes(&mut self, operation: u64, attributes: u64) {
        self.attributes = attributes;
        self.push(operation, Change::Attributes(attributes));
    }

    /// Becomes a clone of `origin` as the system shows it.
    pub(crate) fn clone_from(&mut self, operation: u64, origin: &Content) {
        self.resize(operation, 0);
        self.resize(operation, origin.size());
        for page in 0..origin.page_count() {
            if origin.is_allocated(page) {
                let start = page * PAGE;
                let length = PAGE.min(origin.size().saturating_sub(start));
                let mut bytes = vec![0; index(length)];
                origin.read(start, &mut bytes);
                self.write(operation, start, &bytes);
            }
        }
    }

    fn forget_stale(&mut self, first: u64, end: u64) {
        if self.stale.range(first..end).next().is_some() {
            Arc::make_mut(&mut self.stale).retain(|sector| !(first..end).contains(sector));
        }
    }

    /// What a read of the medium shows: the cache, except where it lies.
    pub(crate) fn medium(&self) -> Content {
        let mut content = self.cache.clone();
        for &sector in self.stale.iter() {
            if sector * SECTOR < content.size() {
                copy_sector(&self.durable, &mut content, sector);
            }
        }
        content
    }

    /// All that is pending reaches the medium; what was lost before stays lost.
    pub(crate) fn flush(&mut self) {
        let mut durable = self.medium();
        if self.size_lost && durable.size() > self.durable.size() {
            durable.set_size(self.durable.size());
        }
        self.durable = durable;
        self.durable_generation = self.generation;
        self.durable_attributes = self.attributes;
        self.pending = Arc::default();
    }

    /// Some of what is pending reaches the medium, the rest is lost and counts as clean (F4).
    pub(crate) fn lose_pending(
        &mut self,
        operation: u64,
        random: &mut Random,
        cache: CacheAfterFailure,
    ) {
        let (content, attributes) = CrashPlan::of_inode(self).draw_one(random);
        let lost_size = content.size() != self.cache.size();
        let mut stale = BTreeSet::clone(&self.stale);
        let differs = |s: &u64| content.sector(*s) != self.cache.sector(*s);
        stale.extend(
            self.pending
                .iter()
                .flat_map(Pending::sectors)
                .filter(differs),
        );
        self.durable = content;
        self.durable_attributes = attributes;
        self.pending = Arc::default();
        self.generation += 1;
        match cache {
            CacheAfterFailure::Reverts => return self.drop_pending(),
            CacheAfterFailure::Lies if lost_size => {
                self.push(operation, Change::Size(self.cache.size()));
            }
            CacheAfterFailure::Lies => {}
            CacheAfterFailure::LiesAboutSize => self.size_lost |= lost_size,
        }
        self.stale = Arc::new(stale);
    }

    fn drop_pending(&mut self) {
        self.cache = self.durable.clone();
        self.attributes = self.durable_attributes;
        self.stale = Arc::default();
        self.size_lost = false;
    }

    pub(crate) fn drop_cache(&mut self) {
        self.cache = self.medium();
        self.stale = Arc::default();
    }
}

fn copy_sector(from: &Content, to: &mut Content, sector: u64) {
    let readable = from.first_bad(sector * SECTOR, 1).is_none();
    to.set_sector(sector, from.sector(sector));
    if !readable {
        to.spoil(sector);
    }
}

/// One atomic change of a directory: what each touched name means afterwards.
#[derive(Clone, Debug)]
pub(crate) struct NameChange {
    pub(crate) operation: u64,
    pub(crate) names: Vec<(Arc<str>, Option<u64>)>,
}

impl NameChange {
    pub(crate) fn touches_same_name(&self, other: &Self) -> bool {
        self.names
            .iter()
            .any(|(name, _)| other.names.iter().any(|(with, _)| name == with))
    }

    pub(crate) fn apply(&self, names: &mut Names) {
        for (name, inode) in &self.names {
            match inode {
                Some(inode) => names.insert(Arc::clone(name), *inode),
                None => names.remove(name),
            };
        }
    }
}

pub(crate) type Names = BTreeMap<Arc<str>, u64>;

#[derive(Clone, Debug)]
pub(crate) struct Directory {
    pub(crate) label: Arc<str>,
    pub(crate) names: Arc<Names>,
    pub(crate) durable: Arc<Names>,
    pub(crate) pending: Arc<Vec<NameChange>>,
    pub(crate) capacity_bytes: Option<u64>,
}

impl Directory {
    pub(crate) fn change(&mut self, change: NameChange) {
        change.apply(Arc::make_mut(&mut self.names));
        Arc::make_mut(&mut self.pending).push(change);
    }

    pub(crate) fn sync(&mut self) {
        if !self.pending.is_empty() {
            let durable = Arc::make_mut(&mut self.durable);
            self.pending.iter().for_each(|change| change.apply(durable));
            self.pending = Arc::default();
        }
    }

    /// Keeps the changes that `survives` accepts, in order; one that follows a lost change of the same name
    /// is lost with it.
    pub(crate) fn surviving(&self, mut survives: impl FnMut(usize) -> bool) -> Names {
        let mut names = Names::clone(&self.durable);
        let mut lost: Vec<&NameChange> = Vec::new();
        for (number, change) in self.pending.iter().enumerate() {
            if survives(number) && !lost.iter().any(|other| other.touches_same_name(change)) {
                change.apply(&mut names);
            } else {
                lost.push(change);
            }
        }
        names
    }

    pub(crate) fn lose_pending(&mut self, random: &mut Random) {
        self.durable = Arc::new(self.surviving(|_| random.chance(1, 2)));
        self.pending = Arc::default();
    }
}

/// Files, devices and directories. Cloning costs a few reference counts per file.
#[derive(Clone, Debug)]
pub(crate) struct State {
    pub(crate) options: SimOptions,
    /// Ascending by number; numbers are never used twice.
    pub(crate) inodes: Vec<Arc<Inode>>,
    pub(crate) directories: Vec<Arc<Directory>>,
    pub(crate) next_inode: u64,
    /// Counts reboots.
    pub(crate) boot: u64,
}

impl State {
    pub(crate) fn new(options: SimOptions) -> Self {
        Self {
            options,
            inodes: Vec::new(),
            directories: Vec::new(),
            next_inode: 0,
            boot: 0,
        }
    }

    fn slot(&self, number: u64) -> Option<usize> {
        self.inodes
            .binary_search_by_key(&number, |inode| inode.number)
            .ok()
    }

    pub(crate) fn inode(&self, number: u64) -> Option<&Inode> {
        self.slot(number).map(|slot| &*self.inodes[slot])
    }

    pub(crate) fn inode_mut(&mut self, number: u64) -> Option<&mut Inode> {
        self.slot(number)
            .map(|slot| Arc::make_mut(&mut self.inodes[slot]))
    }

    pub(crate) fn directory(&mut self, label: &str) -> usize {
        let found = self
            .directories
            .iter()
            .position(|directory| &*directory.label == label);
        found.unwrap_or_else(|| {
            self.directories.push(Arc::new(Directory {
                label: label.into(),
                names: Arc::default(),
                durable: Arc::default(),
                pending: Arc::default(),
                capacity_bytes: None,
            }));
            self.directories.len() - 1
        })
    }

    pub(crate) fn directory_mut(&mut self, slot: usize) -> &mut Directory {
        Arc::make_mut(&mut self.directories[slot])
    }

    pub(crate) fn lookup(&self, directory: usize, name: &str) -> Option<u64> {
        self.directories[directory].names.get(name).copied()
    }

    pub(crate) fn add_inode(&mut self, kind: Kind, label: &str, content: Content) -> u64 {
        self.next_inode += 1;
        let inode = Inode::new(self.next_inode, kind, label.into(), content);
        self.inodes.push(Arc::new(inode));
        self.next_inode
    }

    pub(crate) fn device(&self, label: &str) -> Option<u64> {
        let mut devices = self
            .inodes
            .iter()
            .filter(|inode| inode.kind == Kind::Device);
        devices
            .find(|inode| &*inode.label == label)
            .map(|inode| inode.number)
    }

    /// The directory that shows this file, if one does.
    pub(crate) fn home(&self, number: u64) -> Option<usize> {
        let holds = |directory: &Arc<Directory>| directory.names.values().any(|&n| n == number);
        self.directories.iter().position(holds)
    }

    pub(crate) fn available_bytes(&self, directory: usize) -> u64 {
        let directory = &self.directories[directory];
        let Some(capacity) = directory.capacity_bytes else {
            return u64::MAX / 2;
        };
        let files = directory
            .names
            .values()
            .filter_map(|&number| self.inode(number));
        capacity.saturating_sub(files.map(|inode| inode.cache.allocated_bytes()).sum())
    }

    /// Equal for states that no recovery after a power loss could tell apart.
    pub(crate) fn fingerprint(&self) -> u64 {
        let names = self
            .directories
            .iter()
            .enumerate()
            .flat_map(|(slot, directory)| {
                directory.names.iter().map(move |(name, &number)| {
                    mix(super::content::hash_bytes(name.as_bytes()) ^ mix(number) ^ count(slot))
                })
            });
        let files = self.inodes.iter().map(|inode| {
            let content = inode.cache.fingerprint();
            let seen = mix(inode.number) ^ mix(!inode.attributes) ^ mix(mix(inode.generation));
            mix(content ^ seen)
        });
        names.chain(files).fold(0, u64::wrapping_add)
    }

    /// As [`Self::fingerprint`], but also of what is not durable: equal states have equal crash images.
    pub(crate) fn full_fingerprint(&self) -> u64 {
        let files = self.inodes.iter().map(|inode| {
            let durable = inode.durable.fingerprint().rotate_left(1);
            let pending = inode.pending.iter().fold(0, |hash, p| mix(hash ^ p.hash));
            let stale = inode.stale.iter().fold(0, |hash, s| mix(hash ^ s));
            let lost = mix(inode.durable_generation) ^ u64::from(inode.size_lost);
            mix(durable ^ mix(pending) ^ mix(!stale) ^ mix(inode.number) ^ mix(lost))
        });
        let names = self.directories.iter().map(|directory| {
            let pending = directory.pending.iter().flat_map(|change| &change.names);
            let all = pending.map(|(name, number)| (name, *number));
            all.chain(
                directory
                    .durable
                    .iter()
                    .map(|(name, number)| (name, Some(*number))),
            )
            .fold(count(directory.pending.len()), |hash, (name, number)| {
                mix(hash ^ super::content::hash_bytes(name.as_bytes()) ^ mix(number.unwrap_or(0)))
            })
        });
        files
            .chain(names)
            .fold(mix(self.fingerprint()), |hash, part| mix(hash ^ part))
    }
}

fn change_hash(change: &Change) -> u64 {
    match change {
        Change::Write {
            first_sector,
            bytes,
        } => super::content::hash_bytes(bytes) ^ mix(*first_sector),
        Change::Zero {
            first_sector,
            sectors,
        } => mix(first_sector ^ mix(*sectors) ^ 1),
        Change::Size(size) => mix(size ^ mix(2)),
        Change::Allocate { first_page, pages } => mix(first_page ^ mix(*pages) ^ mix(3)),
        Change::Deallocate { first_page, pages } => mix(first_page ^ mix(*pages) ^ mix(4)),
        Change::Attributes(attributes) => mix(attributes ^ mix(5)),
    }
}
