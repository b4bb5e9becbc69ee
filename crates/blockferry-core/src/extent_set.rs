//! [`ExtentSet`]: a set of bytes of an image, kept as sorted, disjoint, merged runs.
//!
//! Memory is one tree entry (about 24 bytes) per run, never per byte. Insertion and removal cost
//! the logarithm of the number of runs, plus the runs they swallow.

use std::collections::BTreeMap;
use std::fmt;

use crate::Extent;

/// A set of bytes, as runs.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ExtentSet {
    // Invariant: start → end; no run is empty, and between two runs there is at least one byte.
    runs: BTreeMap<u64, u64>,
    // Invariant: the sum of the runs' lengths.
    total_bytes: u64,
}

impl ExtentSet {
    /// The empty set.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            runs: BTreeMap::new(),
            total_bytes: 0,
        }
    }

    /// Adds every byte of `extent`.
    pub fn insert(&mut self, extent: Extent) {
        if extent.is_empty() {
            return;
        }
        let (mut start, mut end) = (extent.start(), extent.end());
        if let Some((&before, &before_end)) = self.runs.range(..=start).next_back() {
            if before_end >= end {
                return;
            }
            if before_end >= start {
                start = before;
            }
        }
        while let Some((&next, &next_end)) = self.runs.range(start..=end).next() {
            self.take_run(next, next_end);
            end = end.max(next_end);
        }
        self.put_run(start, end);
    }

    /// Takes every byte of `extent` out.
    pub fn remove(&mut self, extent: Extent) {
        if extent.is_empty() {
            return;
        }
        if let Some((&before, &before_end)) = self.runs.range(..extent.start()).next_back()
            && before_end > extent.start()
        {
            self.take_run(before, before_end);
            self.put_run(before, extent.start());
            self.put_rest(before_end, extent);
        }
        while let Some((&next, &next_end)) = self.runs.range(extent.range()).next() {
            self.take_run(next, next_end);
            self.put_rest(next_end, extent);
        }
    }

    fn take_run(&mut self, start: u64, end: u64) {
        self.runs.remove(&start);
        self.total_bytes -= end - start;
    }

    fn put_run(&mut self, start: u64, end: u64) {
        self.runs.insert(start, end);
        self.total_bytes += end - start;
    }

    /// Puts back what a run ending at `run_end` has behind `removed`.
    fn put_rest(&mut self, run_end: u64, removed: Extent) {
        if run_end > removed.end() {
            self.put_run(removed.end(), run_end);
        }
    }

    /// Whether the byte at `offset` is in the set.
    #[must_use]
    pub fn contains(&self, offset: u64) -> bool {
        self.run_at(offset).is_some()
    }

    /// Whether every byte of `extent` is in the set; true for an empty extent.
    #[must_use]
    pub fn covers(&self, extent: Extent) -> bool {
        // Runs are merged, so one of them holds it all or none does.
        extent.is_empty()
            || self
                .run_at(extent.start())
                .is_some_and(|run| run.covers(&extent))
    }

    /// Whether any byte of `extent` is in the set.
    #[must_use]
    pub fn overlaps(&self, extent: Extent) -> bool {
        self.within(extent).next().is_some()
    }

    /// The run that holds the byte at `offset`.
    #[must_use]
    pub fn run_at(&self, offset: u64) -> Option<Extent> {
        let (&start, &end) = self.runs.range(..=offset).next_back()?;
        (offset < end).then(|| Extent::from_range(start..end))
    }

    /// The bytes in both sets.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        let (few, many) = if self.len() <= other.len() {
            (self, other)
        } else {
            (other, self)
        };
        few.iter().flat_map(|run| many.within(run)).collect()
    }

    /// The bytes in either set.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let (few, many) = if self.len() <= other.len() {
            (self, other)
        } else {
            (other, self)
        };
        let mut union = many.clone();
        union.extend(few.iter());
        union
    }

    /// The bytes of this set that are not in `other`.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        let mut difference = self.clone();
        for run in other.iter() {
            difference.remove(run);
        }
        difference
    }

    /// The runs, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + Clone + '_ {
        self.runs
            .iter()
            .map(|(&start, &end)| Extent::from_range(start..end))
    }

    /// The runs inside `extent`, ascending, clipped to it.
    pub fn within(&self, extent: Extent) -> impl Iterator<Item = Extent> + Clone + '_ {
        let first = self
            .run_at(extent.start())
            .map_or(extent.start(), |run| run.start());
        self.runs
            .range(first..extent.end().max(first))
            .filter_map(move |(&start, &end)| Extent::from_range(start..end).intersection(extent))
    }

    /// The runs of `extent` that are not in the set, ascending.
    pub fn gaps(&self, extent: Extent) -> impl Iterator<Item = Extent> + '_ {
        let mut at = extent.start();
        let ends = self.within(extent).map(Some).chain([None]);
        ends.filter_map(move |run| {
            let (gap_end, next) =
                run.map_or((extent.end(), extent.end()), |r| (r.start(), r.end()));
            let gap = Extent::from_range(at..gap_end);
            at = next;
            (!gap.is_empty()).then_some(gap)
        })
    }

    /// Number of bytes in the set.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Number of runs.
    #[must_use]
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Whether no byte is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Takes every byte out.
    pub fn clear(&mut self) {
        *self = Self::new();
    }

    /// The first and the last byte in the set, as the extent from one to the other; `None` when
    /// empty.
    #[must_use]
    pub fn span(&self) -> Option<Extent> {
        let (&start, _) = self.runs.first_key_value()?;
        let (_, &end) = self.runs.last_key_value()?;
        Some(Extent::from_range(start..end))
    }
}

impl FromIterator<Extent> for ExtentSet {
    fn from_iter<I: IntoIterator<Item = Extent>>(extents: I) -> Self {
        let mut set = Self::new();
        set.extend(extents);
        set
    }
}

impl Extend<Extent> for ExtentSet {
    fn extend<I: IntoIterator<Item = Extent>>(&mut self, extents: I) {
        for extent in extents {
            self.insert(extent);
        }
    }
}

impl fmt::Debug for ExtentSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set()
            .entries(self.iter().map(|run| run.range()))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const SPACE: u64 = 48;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(Extent),
        Remove(Extent),
    }

    fn extent() -> impl Strategy<Value = Extent> {
        (0..SPACE, 0_u64..12).prop_map(|(start, length)| Extent::new(start, length).unwrap())
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        vec(
            prop_oneof![
                extent().prop_map(Step::Insert),
                extent().prop_map(Step::Remove)
            ],
            0..20,
        )
    }

    fn build(steps: &[Step]) -> (ExtentSet, BTreeSet<u64>) {
        let (mut set, mut oracle) = (ExtentSet::new(), BTreeSet::new());
        for step in steps {
            match step {
                Step::Insert(extent) => {
                    set.insert(*extent);
                    oracle.extend(extent.range());
                }
                Step::Remove(extent) => {
                    set.remove(*extent);
                    oracle.retain(|&x| !extent.contains(x));
                }
            }
            check_invariants(&set);
        }
        (set, oracle)
    }

    fn check_invariants(set: &ExtentSet) {
        let runs: Vec<Extent> = set.iter().collect();
        assert!(runs.iter().all(|run| !run.is_empty()));
        assert!(
            runs.windows(2).all(|pair| pair[0].end() < pair[1].start()),
            "{set:?}"
        );
        assert_eq!(
            set.total_bytes(),
            runs.iter().map(Extent::length).sum::<u64>()
        );
        assert_eq!(set.len(), runs.len());
        assert_eq!(set.is_empty(), runs.is_empty());
    }

    fn bytes(set: &ExtentSet) -> BTreeSet<u64> {
        set.iter().flat_map(|run| run.range()).collect()
    }

    proptest! {
        #[test]
        fn a_set_holds_the_bytes_a_plain_set_holds(steps in steps(), probe in extent()) {
            let (set, oracle) = build(&steps);

            prop_assert_eq!(&bytes(&set), &oracle);
            for offset in 0..SPACE + 12 {
                prop_assert_eq!(set.contains(offset), oracle.contains(&offset));
            }
            prop_assert_eq!(set.covers(probe), probe.range().all(|x| oracle.contains(&x)));
            prop_assert_eq!(set.overlaps(probe), probe.range().any(|x| oracle.contains(&x)));
            let inside: Vec<u64> = set.within(probe).flat_map(|run| run.range()).collect();
            let outside: Vec<u64> = set.gaps(probe).flat_map(|run| run.range()).collect();
            let expected: (Vec<u64>, Vec<u64>) = probe.range().partition(|x| oracle.contains(x));
            prop_assert_eq!((inside, outside), expected);
            let span = set.span().map(|s| (s.start(), s.end() - 1));
            prop_assert_eq!(span, oracle.first().copied().zip(oracle.last().copied()));
        }

        #[test]
        fn set_algebra_agrees_with_plain_sets(left in steps(), right in steps()) {
            let ((a, oracle_a), (b, oracle_b)) = (build(&left), build(&right));

            for (set, oracle) in [
                (a.union(&b), &oracle_a | &oracle_b),
                (a.intersection(&b), &oracle_a & &oracle_b),
                (a.difference(&b), &oracle_a - &oracle_b),
            ] {
                check_invariants(&set);
                prop_assert_eq!(bytes(&set), oracle);
            }
        }
    }

    #[test]
    fn the_last_representable_byte_is_a_byte_like_any_other() {
        let mut set = ExtentSet::new();
        set.insert(Extent::from_range(u64::MAX - 2..u64::MAX));
        set.insert(Extent::from_range(0..1));

        set.remove(Extent::from_range(u64::MAX - 1..u64::MAX));

        assert_eq!(
            format!("{set:?}"),
            format!("{{0..1, {}..{}}}", u64::MAX - 2, u64::MAX - 1)
        );
        assert_eq!(set.total_bytes(), 2);
        set.clear();
        assert!(set.is_empty() && set.total_bytes() == 0);
    }
}
