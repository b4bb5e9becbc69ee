//! What changed of a disk, as it is remembered and as it travels: bounded, so made coarser where it is many small runs.

use std::sync::Arc;

use blockferry_core::{ChangeMap, Content, Extent, ExtentSet, Provenance, Trust};
use serde::{Deserialize, Serialize};

/// Runs that are remembered.
const MOST_RUNS: usize = 1 << 16;
/// Unit of a bitmap, and of what travels.
const UNIT_BYTES: u64 = 1 << 16;

/// What a map says to have changed, in at most [`MOST_RUNS`] runs.
pub(crate) fn changed_extents(map: &ChangeMap) -> ExtentSet {
    let whole = Extent::from_range(0..map.image_bytes());
    let mut unit_bytes = 1;
    loop {
        let mut changed = ExtentSet::new();
        for (extent, _) in map.runs(whole).filter(|(_, c)| *c != Content::Same) {
            changed.insert(extent.widened(unit_bytes));
        }
        if changed.len() <= MOST_RUNS {
            return changed;
        }
        unit_bytes = (unit_bytes * 2).max(UNIT_BYTES);
    }
}

pub(crate) fn with_extents(mut map: Arc<ChangeMap>, changed: &ExtentSet) -> Arc<ChangeMap> {
    let added = Arc::make_mut(&mut map);
    changed.iter().for_each(|e| added.set(e, Content::Data));
    map
}

/// The changes of a disk on their way to another host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Travelling {
    size_bytes: u64,
    runs: Runs,
}

impl Travelling {
    pub(crate) fn of(map: &ChangeMap) -> Self {
        Self {
            size_bytes: map.image_bytes(),
            runs: Runs::of(&changed_extents(map)),
        }
    }

    /// Nothing if it cannot be: runs outside of the disk.
    pub(crate) fn map(&self) -> Option<ChangeMap> {
        let whole = Extent::from_range(0..self.size_bytes);
        let mut map = ChangeMap::new(Provenance::QemuDirtyBitmap, Trust::Trusted, self.size_bytes);
        map.set(whole, Content::Same);
        for extent in self.runs.extents()?.iter() {
            map.set(extent.intersection(whole)?, Content::Data);
        }
        Some(map)
    }
}

/// Extents on their way, in units of 64 KiB from the start of the disk: how many are left out, how many are in, and so on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Runs(Vec<u64>);

impl Runs {
    /// Widened to whole units.
    pub(crate) fn of(extents: &ExtentSet) -> Self {
        let (mut runs, mut at) = (Vec::new(), 0);
        let mut widened = ExtentSet::new();
        for extent in extents.iter() {
            widened.insert(extent.widened(UNIT_BYTES));
        }
        for extent in widened.iter() {
            let (start, end) = (extent.start() / UNIT_BYTES, extent.end() / UNIT_BYTES);
            runs.extend([start - at, end - start]);
            at = end;
        }
        Self(runs)
    }

    /// Nothing if they cannot be.
    pub(crate) fn extents(&self) -> Option<ExtentSet> {
        let (runs, rest) = self.0.as_chunks::<2>();
        if !rest.is_empty() {
            return None;
        }
        let (mut extents, mut at) = (ExtentSet::new(), 0_u64);
        for [out, inside] in runs {
            let start = at.checked_add(*out)?;
            at = start.checked_add(*inside)?;
            let start = start.checked_mul(UNIT_BYTES)?;
            extents.insert(Extent::new(
                start,
                at.checked_mul(UNIT_BYTES)?.checked_sub(start)?,
            )?);
        }
        Some(extents)
    }
}

#[cfg(test)]
mod tests {
    use blockferry_testkit::Random;

    use super::*;

    #[test]
    fn what_changed_arrives_and_nothing_else() {
        for seed in 0..200 {
            let mut random = Random::new(seed);
            let size_bytes = 1 + random.below(1 << 24);
            let mut map = ChangeMap::new(Provenance::QemuDirtyBitmap, Trust::Trusted, size_bytes);
            map.set(Extent::from_range(0..size_bytes), Content::Same);
            for _ in 0..random.below(20) {
                let start = random.below(size_bytes.div_ceil(UNIT_BYTES)) * UNIT_BYTES;
                let end = (start + (1 + random.below(9)) * UNIT_BYTES).min(size_bytes);
                map.set(Extent::from_range(start..end), Content::Data);
            }
            let told = serde_json::to_string(&Travelling::of(&map)).unwrap();

            let found: Travelling = serde_json::from_str(&told).unwrap();

            assert_eq!(found.map(), Some(map), "seed {seed}: {told}");
        }
    }

    #[test]
    fn more_runs_than_are_told_one_by_one_become_coarser_and_none_is_left_out() {
        let size_bytes = 1 << 40;
        let mut map = ChangeMap::new(Provenance::QemuDirtyBitmap, Trust::Trusted, size_bytes);
        map.set(Extent::from_range(0..size_bytes), Content::Same);
        for unit in (0..4 * MOST_RUNS as u64).step_by(2) {
            let start = unit * UNIT_BYTES;
            map.set(Extent::from_range(start..start + UNIT_BYTES), Content::Data);
        }

        let told = Travelling::of(&map);

        let text = serde_json::to_string(&told).unwrap();
        assert!(text.len() < 1 << 20, "{}", text.len());
        let found = told.map().unwrap();
        let whole = Extent::from_range(0..size_bytes);
        for (extent, _) in map.runs(whole).filter(|(_, c)| *c == Content::Data) {
            assert!(
                found.runs(extent).all(|(_, c)| c == Content::Data),
                "{extent}"
            );
        }
        assert!(found.total_bytes(Content::Same) > size_bytes / 2);
    }

    #[test]
    fn numbers_that_cannot_be_are_refused() {
        for runs in [vec![1], vec![3, 1], vec![u64::MAX, 1], vec![0, u64::MAX]] {
            let told = Travelling {
                size_bytes: 3 * UNIT_BYTES - 1,
                runs: Runs(runs),
            };
            assert_eq!(told.map(), None, "{told:?}");
        }
    }
}
