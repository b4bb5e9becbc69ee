//! Crash images: what power loss may leave of a state (fault model F2 and F3).
//!
//! Each unflushed sector keeps its old bytes, takes any version written since the last flush, or is torn,
//! garbage or unreadable. Sizes, allocations, attributes and names survive or not, each on its own; a
//! rename or exchange is atomic, and changes of one name survive in order. All combinations of old and
//! new are formed while they are few, otherwise seeded samples.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use super::content::{Content, PAGE_BYTES, SECTOR, SECTOR_BYTES};
use super::state::{Change, Inode, Kind, State};
use super::{SimDisk, SimOptions};
use crate::Random;
use crate::random::{count, index};

/// How many images of one state are formed.
#[derive(Clone, Copy, Debug)]
#[expect(
    clippy::exhaustive_structs,
    reason = "plain options, written out by callers"
)]
pub struct ImageLimits {
    /// All combinations of old and new are formed up to this many.
    pub exhaustive: u64,
    /// Samples when there are more combinations.
    pub samples: u64,
    /// Samples with torn, garbage or unreadable sectors on top of all combinations.
    pub damaged: u64,
}

impl Default for ImageLimits {
    fn default() -> Self {
        Self {
            exhaustive: 4096,
            samples: 256,
            damaged: 32,
        }
    }
}

/// Bytes of one sector inside a pending write, or zeros.
#[derive(Clone, Debug)]
enum SectorBytes {
    Zero,
    Written { bytes: Arc<[u8]>, start: usize },
}

impl SectorBytes {
    fn get(&self) -> &[u8] {
        match self {
            Self::Zero => &[0; SECTOR_BYTES],
            Self::Written { bytes, start } => &bytes[*start..*start + SECTOR_BYTES],
        }
    }
}

/// What a unit may become besides staying as it was, with the operation that wanted it.
#[derive(Clone, Debug)]
enum Unit {
    Sector {
        slot: usize,
        sector: u64,
        versions: Vec<(u64, SectorBytes)>,
        /// Whether it may come out torn, as garbage or unreadable.
        damageable: bool,
    },
    Size {
        slot: usize,
        sizes: Vec<(u64, u64)>,
    },
    Allocation {
        slot: usize,
        operation: u64,
        first_page: u64,
        pages: u64,
        allocate: bool,
    },
    Attributes {
        slot: usize,
        values: Vec<(u64, u64)>,
    },
    Name {
        directory: usize,
        number: usize,
        operation: u64,
    },
}

/// Outcomes of a sector beyond its versions.
const TORN: u16 = 0;
const GARBAGE: u16 = 1;
const DAMAGES: u16 = 3;

impl Unit {
    /// Outcomes without damage; 0 is "as it was".
    fn outcomes(&self) -> u16 {
        let alternatives = match self {
            Self::Sector { versions, .. } => versions.len(),
            Self::Size { sizes, .. } => sizes.len(),
            Self::Attributes { values, .. } => values.len(),
            Self::Allocation { .. } | Self::Name { .. } => 1,
        };
        u16::try_from(alternatives + 1).expect("fewer than 65,535 writes of one sector per flush")
    }

    fn operation_of(&self, outcome: u16) -> Option<u64> {
        let number = usize::from(outcome).checked_sub(1)?;
        match self {
            Self::Sector { versions, .. } => versions.get(number).map(|v| v.0),
            Self::Size { sizes, .. } => sizes.get(number).map(|v| v.0),
            Self::Attributes { values, .. } => values.get(number).map(|v| v.0),
            Self::Allocation { operation, .. } | Self::Name { operation, .. } => Some(*operation),
        }
    }

    /// The newest outcome whose operation `survives`.
    fn newest(&self, survives: impl Fn(u64) -> bool) -> u16 {
        let mut outcomes = (0..self.outcomes()).rev();
        outcomes
            .find(|&o| self.operation_of(o).is_none_or(&survives))
            .unwrap_or(0)
    }
}

/// The units of a state that power loss decides about.
#[derive(Debug)]
pub(crate) struct CrashPlan {
    state: State,
    units: Vec<Unit>,
}

impl CrashPlan {
    pub(crate) fn new(state: &State) -> Self {
        let mut units = Vec::new();
        for (slot, inode) in state.inodes.iter().enumerate() {
            if inode.kind == Kind::Device || is_reachable(state, inode.number) {
                inode_units(slot, inode, &mut units);
            }
        }
        for (directory, held) in state.directories.iter().enumerate() {
            let names = held.pending.iter().enumerate();
            units.extend(names.map(|(number, change)| Unit::Name {
                directory,
                number,
                operation: change.operation,
            }));
        }
        Self {
            state: state.clone(),
            units,
        }
    }

    pub(crate) fn of_inode(inode: &Inode) -> Self {
        let mut units = Vec::new();
        inode_units(0, inode, &mut units);
        let inodes = vec![Arc::new(inode.clone())];
        Self {
            state: State {
                inodes,
                ..State::new(SimOptions::default())
            },
            units,
        }
    }

    /// One random outcome without damage, for the only inode of the plan.
    pub(crate) fn draw_one(&self, random: &mut Random) -> (Content, u64) {
        let choices: Vec<u16> = self
            .units
            .iter()
            .map(|unit| u16::try_from(random.below(unit.outcomes().into())).unwrap_or(0))
            .collect();
        let inode = &self.inodes_after(&choices, 0)[0];
        (inode.durable.clone(), inode.durable_attributes)
    }

    fn combinations(&self) -> u64 {
        self.units
            .iter()
            .fold(1, |all, unit| all.saturating_mul(unit.outcomes().into()))
    }

    fn operations(&self) -> Vec<u64> {
        let outcomes = |unit: &Unit| {
            (1..unit.outcomes())
                .filter_map(|o| unit.operation_of(o))
                .collect()
        };
        let mut operations: Vec<u64> = self
            .units
            .iter()
            .flat_map::<Vec<u64>, _>(outcomes)
            .collect();
        operations.sort_unstable();
        operations.dedup();
        operations
    }

    /// The state after the reboot. `noise` decides what torn sectors and garbage look like.
    fn state_after(&self, choices: &[u16], noise: u64) -> State {
        let mut state = State {
            inodes: self.inodes_after(choices, noise),
            boot: self.state.boot + 1,
            ..self.state.clone()
        };
        self.settle_names(choices, &mut state);
        state.inodes.retain(|inode| {
            let named = state
                .directories
                .iter()
                .any(|d| d.names.values().any(|&n| n == inode.number));
            named || inode.kind == Kind::Device
        });
        state
    }

    fn settle_names(&self, choices: &[u16], state: &mut State) {
        for (slot, directory) in state.directories.iter_mut().enumerate() {
            if directory.pending.is_empty() && Arc::ptr_eq(&directory.names, &directory.durable) {
                continue;
            }
            let survives = |wanted: usize| {
                self.units.iter().zip(choices).any(|(unit, &choice)| {
                    matches!(unit, Unit::Name { directory, number, .. }
                        if *directory == slot && *number == wanted)
                        && choice > 0
                })
            };
            let names = Arc::new(directory.surviving(survives));
            let directory = Arc::make_mut(directory);
            directory.durable = Arc::clone(&names);
            directory.names = names;
            directory.pending = Arc::default();
        }
    }

    fn inodes_after(&self, choices: &[u16], noise: u64) -> Vec<Arc<Inode>> {
        let mut results: Vec<Outcome> = self.state.inodes.iter().map(|i| Outcome::old(i)).collect();
        for (number, (unit, &choice)) in self.units.iter().zip(choices).enumerate() {
            match unit {
                Unit::Sector {
                    slot,
                    sector,
                    versions,
                    ..
                } => {
                    let noise = Random::part(noise, count(number));
                    results[*slot].set_sector(*sector, versions, choice, noise);
                }
                Unit::Size { slot, sizes } if choice > 0 => {
                    results[*slot].size = sizes[usize::from(choice) - 1].1;
                }
                Unit::Attributes { slot, values } if choice > 0 => {
                    results[*slot].attributes = values[usize::from(choice) - 1].1;
                }
                Unit::Allocation {
                    slot,
                    first_page,
                    pages,
                    allocate,
                    ..
                } if choice > 0 => {
                    results[*slot].allocate(*first_page..*first_page + *pages, *allocate);
                }
                _ => {}
            }
            if let Some(slot) = unit.slot() {
                results[slot].note(choice, unit.outcomes());
            }
        }
        let inodes = self.state.inodes.iter().zip(results);
        inodes
            .map(|(inode, outcome)| outcome.finish(inode))
            .collect()
    }

    fn describe(&self, choices: &[u16]) -> Vec<String> {
        let mut lines: BTreeMap<(String, String), Vec<u64>> = BTreeMap::new();
        for (unit, &choice) in self.units.iter().zip(choices) {
            if choice > 0 {
                let (what, how, number) = self.words(unit, choice);
                lines.entry((what, how)).or_default().push(number);
            }
        }
        let line = |((what, how), numbers): ((String, String), Vec<u64>)| {
            format!("{what} {}: {how}", ranges(&numbers))
        };
        lines.into_iter().map(line).collect()
    }

    fn words(&self, unit: &Unit, choice: u16) -> (String, String, u64) {
        let label = |slot: usize| &self.state.inodes[slot].label;
        let how = match unit.operation_of(choice) {
            Some(operation) => format!("as operation {operation} made it"),
            None => match choice - unit.outcomes() {
                TORN => "torn".to_owned(),
                GARBAGE => "garbage".to_owned(),
                _ => "unreadable".to_owned(),
            },
        };
        match unit {
            Unit::Sector { slot, sector, .. } => (format!("{} sector", label(*slot)), how, *sector),
            Unit::Size { slot, sizes } => (
                format!("{} size", label(*slot)),
                how,
                sizes[usize::from(choice) - 1].1,
            ),
            Unit::Attributes { slot, .. } => (format!("{} attributes", label(*slot)), how, 0),
            Unit::Allocation {
                slot, first_page, ..
            } => (
                format!("{} allocation from page", label(*slot)),
                how,
                *first_page,
            ),
            Unit::Name {
                directory, number, ..
            } => {
                let directory = &self.state.directories[*directory];
                let names: Vec<&str> = directory.pending[*number]
                    .names
                    .iter()
                    .map(|(name, _)| &**name)
                    .collect();
                (
                    format!("{}/{} change", directory.label, names.join("+")),
                    how,
                    count(*number),
                )
            }
        }
    }
}

fn is_reachable(state: &State, number: u64) -> bool {
    state.directories.iter().any(|directory| {
        let pending = directory.pending.iter().flat_map(|change| &change.names);
        directory.durable.values().any(|&n| n == number)
            || pending.into_iter().any(|(_, n)| *n == Some(number))
    })
}

impl Unit {
    fn slot(&self) -> Option<usize> {
        match self {
            Self::Sector { slot, .. }
            | Self::Size { slot, .. }
            | Self::Allocation { slot, .. }
            | Self::Attributes { slot, .. } => Some(*slot),
            Self::Name { .. } => None,
        }
    }
}

/// What becomes of one inode.
struct Outcome {
    content: Content,
    size: u64,
    attributes: u64,
    all_old: bool,
    all_new: bool,
}

impl Outcome {
    fn old(inode: &Inode) -> Self {
        let mut content = inode.durable.clone();
        let durable_size = content.size();
        // Room for every size that may survive; `finish` cuts it back.
        let sizes = inode.pending.iter().map(|p| match p.change {
            Change::Size(size) => size,
            _ => 0,
        });
        let room = sizes.max().unwrap_or(0);
        if room > durable_size {
            content.set_size(room);
        }
        let attributes = inode.durable_attributes;
        let all_new = inode.stale.is_empty();
        Self {
            content,
            size: durable_size,
            attributes,
            all_old: true,
            all_new,
        }
    }

    fn note(&mut self, choice: u16, outcomes: u16) {
        self.all_old &= choice == 0;
        self.all_new &= choice + 1 == outcomes;
    }

    fn set_sector(
        &mut self,
        sector: u64,
        versions: &[(u64, SectorBytes)],
        choice: u16,
        mut noise: Random,
    ) {
        let Some(number) = usize::from(choice).checked_sub(1) else {
            return;
        };
        if let Some((_, version)) = versions.get(number) {
            match version {
                SectorBytes::Zero => self.content.zero(sector * SECTOR, SECTOR),
                SectorBytes::Written { .. } => self.content.set_sector(sector, version.get()),
            }
            return;
        }
        match u16::try_from(number - versions.len()).unwrap_or(DAMAGES) {
            TORN => self.tear(sector, versions, &mut noise),
            GARBAGE => {
                let mut bytes = [0; SECTOR_BYTES];
                noise.fill(&mut bytes);
                self.content.set_sector(sector, &bytes);
            }
            _ => self.content.spoil(sector),
        }
    }

    fn tear(&mut self, sector: u64, versions: &[(u64, SectorBytes)], noise: &mut Random) {
        let Some((_, newest)) = versions.last() else {
            return;
        };
        let cut = index(8 * (1 + noise.below(63)));
        let mut bytes: Vec<u8> = self.content.sector(sector).to_vec();
        if noise.chance(1, 2) {
            bytes[..cut].copy_from_slice(&newest.get()[..cut]);
        } else {
            bytes[cut..].copy_from_slice(&newest.get()[cut..]);
        }
        self.content.set_sector(sector, &bytes);
    }

    fn allocate(&mut self, pages: std::ops::Range<u64>, allocate: bool) {
        for page in pages {
            if allocate {
                self.content.allocate(page);
            } else {
                self.content.deallocate_if_zero(page);
            }
        }
    }

    fn finish(mut self, inode: &Arc<Inode>) -> Arc<Inode> {
        if inode.pending.is_empty() && inode.stale.is_empty() {
            let unchanged = inode.generation == inode.durable_generation;
            if unchanged && inode.attributes == inode.durable_attributes {
                return Arc::clone(inode);
            }
        }
        if self.size != self.content.size() {
            self.content.set_size(self.size);
        }
        let generation = if self.all_old {
            inode.durable_generation
        } else if self.all_new {
            inode.generation
        } else {
            inode.generation + 1
        };
        Arc::new(inode.rebooted(self.content, self.attributes, generation))
    }
}

fn inode_units(slot: usize, inode: &Inode, units: &mut Vec<Unit>) {
    let mut sectors: BTreeMap<u64, Vec<(u64, SectorBytes)>> = BTreeMap::new();
    let (mut sizes, mut values) = (Vec::new(), Vec::new());
    let mut allocations = Vec::new();
    for pending in inode.pending.iter() {
        let operation = pending.operation;
        match &pending.change {
            Change::Write {
                first_sector,
                bytes,
            } => {
                for (sector, start) in (*first_sector..).zip((0..bytes.len()).step_by(SECTOR_BYTES))
                {
                    let version = SectorBytes::Written {
                        bytes: Arc::clone(bytes),
                        start,
                    };
                    sectors
                        .entry(sector)
                        .or_default()
                        .push((operation, version));
                }
            }
            Change::Zero {
                first_sector,
                sectors: length,
            } => {
                for sector in *first_sector..*first_sector + *length {
                    sectors
                        .entry(sector)
                        .or_default()
                        .push((operation, SectorBytes::Zero));
                }
            }
            Change::Size(size) => sizes.push((operation, *size)),
            Change::Attributes(value) => values.push((operation, *value)),
            &Change::Allocate { first_page, pages } => {
                allocations.push(Unit::Allocation {
                    slot,
                    operation,
                    first_page,
                    pages,
                    allocate: true,
                });
            }
            &Change::Deallocate { first_page, pages } => {
                allocations.push(Unit::Allocation {
                    slot,
                    operation,
                    first_page,
                    pages,
                    allocate: false,
                });
            }
        }
    }
    let sector_unit = |(sector, versions)| sector_unit(slot, inode, sector, versions);
    units.extend(sectors.into_iter().map(sector_unit));
    units.extend(allocations);
    sizes.retain(|(_, size)| *size != inode.durable.size());
    if !sizes.is_empty() {
        units.push(Unit::Size { slot, sizes });
    }
    if !values.is_empty() {
        units.push(Unit::Attributes { slot, values });
    }
}

/// Leaves out versions that look like the one before: they make no other image.
fn sector_unit(slot: usize, inode: &Inode, sector: u64, all: Vec<(u64, SectorBytes)>) -> Unit {
    // Zeroing whole sectors of a file, or giving them back, changes its map and writes no sector.
    let is_written = |(_, version): &(u64, SectorBytes)| !matches!(version, SectorBytes::Zero);
    let damageable = inode.kind == Kind::Device || all.iter().any(is_written);
    let mut versions: Vec<(u64, SectorBytes)> = Vec::new();
    let old_is_readable = inode.durable.first_bad(sector * SECTOR, 1).is_none();
    for (operation, version) in all {
        let before = match versions.last() {
            Some((_, before)) => before.get(),
            None => inode.durable.sector(sector),
        };
        let healed = versions.is_empty() && !old_is_readable;
        if healed || before != version.get() {
            versions.push((operation, version));
        }
    }
    Unit::Sector {
        slot,
        sector,
        versions,
        damageable,
    }
}

/// "3-7, 9" for 3,4,5,6,7,9.
fn ranges(numbers: &[u64]) -> String {
    let mut parts: Vec<(u64, u64)> = Vec::new();
    for &number in numbers {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => parts.push((number, number)),
        }
    }
    let part = |(first, last): &(u64, u64)| {
        if first == last {
            first.to_string()
        } else {
            format!("{first}-{last}")
        }
    };
    parts.iter().map(part).collect::<Vec<_>>().join(", ")
}

/// The storage as power loss left it.
#[derive(Clone, Debug)]
pub struct CrashImage {
    plan: Arc<CrashPlan>,
    choices: Vec<u16>,
    noise: u64,
    state: State,
    fingerprint: u64,
}

impl CrashImage {
    fn new(plan: &Arc<CrashPlan>, choices: Vec<u16>, noise: u64) -> Self {
        let state = plan.state_after(&choices, noise);
        let fingerprint = state.fingerprint();
        Self {
            plan: Arc::clone(plan),
            choices,
            noise,
            state,
            fingerprint,
        }
    }

    /// A machine started on this storage: its cache is empty, nobody holds a lock, no fault is set.
    #[must_use]
    pub fn disk(&self) -> SimDisk {
        SimDisk::from_state(self.state.clone())
    }

    /// Equal for equal storage content.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// What survived of the unflushed changes, in words.
    #[must_use]
    pub fn survivors(&self) -> Vec<String> {
        self.plan.describe(&self.choices)
    }

    /// What survived, by number of the unflushed change and of what became of it: with [`Self::noise`] enough to
    /// form this image again.
    pub(crate) fn outcomes(&self) -> Vec<(usize, u16)> {
        let survived = self.choices.iter().copied().enumerate();
        survived.filter(|(_, outcome)| *outcome > 0).collect()
    }

    /// Decides what garbage looks like.
    pub(crate) fn noise(&self) -> u64 {
        self.noise
    }

    /// The image of `state` in which exactly this survived; changes that the state does not have are left out.
    pub(crate) fn with_outcomes(state: &State, outcomes: &[(usize, u16)], noise: u64) -> Self {
        let plan = Arc::new(CrashPlan::new(state));
        let mut choices = vec![0; plan.units.len()];
        for (number, outcome) in outcomes {
            if let Some(unit) = plan.units.get(*number) {
                let damages = if matches!(unit, Unit::Sector { .. }) {
                    DAMAGES
                } else {
                    0
                };
                choices[*number] = (*outcome).min(unit.outcomes() + damages - 1);
            }
        }
        Self::new(&plan, choices, noise)
    }

    /// How many unflushed sectors, sizes, allocations and names were lost.
    #[must_use]
    pub fn lost(&self) -> usize {
        self.choices.iter().filter(|choice| **choice == 0).count()
    }

    /// Drops surviving changes one after the other while `still_fails` holds for what is left.
    #[must_use]
    pub fn minimised(&self, mut still_fails: impl FnMut(&Self) -> bool) -> Self {
        const MAX_ATTEMPTS: usize = 400;
        let mut best = self.clone();
        let survivors: Vec<usize> = (0..self.choices.len())
            .filter(|&unit| self.choices[unit] > 0)
            .collect();
        let mut size = survivors.len().div_ceil(2);
        let mut attempts = 0;
        while size > 0 && attempts < MAX_ATTEMPTS {
            for group in survivors.chunks(size) {
                let mut choices = best.choices.clone();
                group.iter().for_each(|&unit| choices[unit] = 0);
                attempts += 1;
                if choices != best.choices && attempts <= MAX_ATTEMPTS {
                    let smaller = Self::new(&self.plan, choices, self.noise);
                    if still_fails(&smaller) {
                        best = smaller;
                    }
                }
            }
            size /= 2;
        }
        best
    }
}

/// The distinct crash images of one state.
#[derive(Debug)]
pub struct CrashImages {
    plan: Arc<CrashPlan>,
    limits: ImageLimits,
    seed: u64,
    /// Operations whose changes are pending, ascending.
    operations: Vec<u64>,
    exhaustive: bool,
    drawn: u64,
    seen: HashSet<u64>,
}

impl CrashImages {
    pub(crate) fn new(state: &State, seed: u64, limits: ImageLimits) -> Self {
        let plan = CrashPlan::new(state);
        Self {
            limits,
            seed,
            operations: plan.operations(),
            exhaustive: plan.combinations() <= limits.exhaustive,
            plan: Arc::new(plan),
            drawn: 0,
            seen: HashSet::new(),
        }
    }

    /// Whether all combinations of old and new are formed.
    #[must_use]
    pub fn is_exhaustive(&self) -> bool {
        self.exhaustive
    }

    fn total(&self) -> u64 {
        if self.plan.units.is_empty() {
            1
        } else if self.exhaustive {
            self.plan.combinations() + self.limits.damaged
        } else {
            self.limits.samples
        }
    }

    fn choices(&self, number: u64) -> Vec<u16> {
        let combinations = self.plan.combinations();
        if self.exhaustive && number < combinations {
            return self.combination(number);
        }
        let mut random = Random::part(self.seed, number);
        if self.exhaustive {
            return self.damaged(&mut random);
        }
        let operations = count(self.operations.len());
        let prefixes = (operations + 1).min(self.limits.samples / 4);
        if number < prefixes {
            // Spread over all prefixes, both ends included.
            let kept = index(number * operations / (prefixes - 1).max(1));
            return self.newest(|operation| self.operations[..kept].contains(&operation));
        }
        match number % 4 {
            0 => self.by_operation(&mut random),
            1 => self.by_unit(&mut random),
            2 => self.nearly_by_operation(&mut random),
            _ => self.damaged(&mut random),
        }
    }

    fn combination(&self, number: u64) -> Vec<u16> {
        let mut rest = number;
        let mut digit = |unit: &Unit| {
            let radix = u64::from(unit.outcomes());
            let choice = rest % radix;
            rest /= radix;
            u16::try_from(choice).expect("less than a u16 radix")
        };
        self.plan.units.iter().map(&mut digit).collect()
    }

    fn newest(&self, survives: impl Fn(u64) -> bool) -> Vec<u16> {
        self.plan
            .units
            .iter()
            .map(|unit| unit.newest(&survives))
            .collect()
    }

    /// Whole operations survive or not, as disks that reorder requests do it; metadata on its own.
    fn by_operation(&self, random: &mut Random) -> Vec<u16> {
        let keep = 1 + random.below(7);
        let kept: HashSet<u64> = self
            .operations
            .iter()
            .copied()
            .filter(|_| random.chance(keep, 8))
            .collect();
        let mut choices = self.newest(|operation| kept.contains(&operation));
        for (unit, choice) in self.plan.units.iter().zip(&mut choices) {
            if !matches!(unit, Unit::Sector { .. }) {
                *choice = any_outcome(unit, random);
            }
        }
        choices
    }

    fn by_unit(&self, random: &mut Random) -> Vec<u16> {
        let keep = 1 + random.below(7);
        let mut choose = |unit: &Unit| {
            if random.chance(keep, 8) {
                any_outcome(unit, random)
            } else {
                0
            }
        };
        self.plan.units.iter().map(&mut choose).collect()
    }

    fn nearly_by_operation(&self, random: &mut Random) -> Vec<u16> {
        let mut choices = self.by_operation(random);
        for _ in 0..1 + random.below(3) {
            let at = index(random.below(count(choices.len())));
            choices[at] = any_outcome(&self.plan.units[at], random);
        }
        choices
    }

    fn damaged(&self, random: &mut Random) -> Vec<u16> {
        let mut choices = if random.chance(1, 2) {
            self.by_operation(random)
        } else {
            self.newest(|_| true)
        };
        let sectors: Vec<usize> = (0..choices.len())
            .filter(|&unit| {
                matches!(
                    self.plan.units[unit],
                    Unit::Sector {
                        damageable: true,
                        ..
                    }
                )
            })
            .collect();
        if sectors.is_empty() {
            return choices;
        }
        let few = if random.chance(1, 4) {
            count(sectors.len()) / 2
        } else {
            random.below(3)
        };
        for _ in 0..=few {
            let at = sectors[index(random.below(count(sectors.len())))];
            let damage = u16::try_from(random.below(DAMAGES.into())).unwrap_or(0);
            choices[at] = self.plan.units[at].outcomes() + damage;
        }
        choices
    }
}

fn any_outcome(unit: &Unit, random: &mut Random) -> u16 {
    u16::try_from(random.below(unit.outcomes().into())).unwrap_or(0)
}

impl Iterator for CrashImages {
    type Item = CrashImage;

    fn next(&mut self) -> Option<CrashImage> {
        while self.drawn < self.total() {
            let number = self.drawn;
            self.drawn += 1;
            let image = CrashImage::new(&self.plan, self.choices(number), self.seed ^ number);
            if self.seen.insert(image.fingerprint) {
                return Some(image);
            }
        }
        None
    }
}

const _: () = assert!(PAGE_BYTES.is_multiple_of(SECTOR_BYTES));
