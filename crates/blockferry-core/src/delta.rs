//! [`Delta`]: which bytes of an image differ from the basis, as extents.
//!
//! A delta names places, not content: the bytes stay where they are until they are staged or sent.
//! Extents that became zero are kept apart, because they travel without payload.

use crate::{Extent, ExtentSet, is_zero, to_usize};

/// What turns the basis into the new image, as two disjoint sets of bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    // Invariant: no byte is in both.
    data: ExtentSet,
    zero: ExtentSet,
}

impl Delta {
    /// A delta without changes.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            data: ExtentSet::new(),
            zero: ExtentSet::new(),
        }
    }

    /// What differs between two images held in memory, by pages of `page_bytes`.
    ///
    /// The result is for an image as long as `new`. Pages that reach beyond `basis` differ: nothing
    /// is known about what the target holds there.
    ///
    /// # Panics
    /// When `page_bytes` is 0.
    #[must_use]
    pub fn between(basis: &[u8], new: &[u8], page_bytes: u64) -> Self {
        let mut delta = Self::new();
        for extent in Extent::from_range(0..new.len() as u64).pieces(page_bytes) {
            let range = to_usize(extent.start())..to_usize(extent.end());
            let page = &new[range.clone()];
            if basis.get(range) != Some(page) {
                if is_zero(page) {
                    delta.add_zero(extent);
                } else {
                    delta.add_data(extent);
                }
            }
        }
        delta
    }

    /// Says that `extent` holds new data. The latest word about a byte counts.
    pub fn add_data(&mut self, extent: Extent) {
        self.zero.remove(extent);
        self.data.insert(extent);
    }

    /// Says that `extent` became zero. The latest word about a byte counts.
    pub fn add_zero(&mut self, extent: Extent) {
        self.data.remove(extent);
        self.zero.insert(extent);
    }

    /// The bytes with new data.
    #[must_use]
    pub fn data(&self) -> &ExtentSet {
        &self.data
    }

    /// The bytes that became zero.
    #[must_use]
    pub fn zero(&self) -> &ExtentSet {
        &self.zero
    }

    /// All bytes that differ.
    #[must_use]
    pub fn changed(&self) -> ExtentSet {
        self.data.union(&self.zero)
    }

    /// Number of bytes that differ.
    #[must_use]
    pub fn changed_bytes(&self) -> u64 {
        self.data.total_bytes() + self.zero.total_bytes()
    }

    /// Whether nothing differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.data.is_empty() && self.zero.is_empty()
    }

    /// Adds a later delta, so that this one leads from its basis to the later one's result.
    pub fn merge(&mut self, later: &Self) {
        later.data.iter().for_each(|extent| self.add_data(extent));
        later.zero.iter().for_each(|extent| self.add_zero(extent));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// Carries out a delta: takes the data from `new`, as a receiver would from the wire.
    fn apply(basis: &[u8], delta: &Delta, new: &[u8]) -> Vec<u8> {
        let mut image = basis.to_vec();
        image.resize(new.len(), 0xee);
        for run in delta.data().iter() {
            let range = run.start() as usize..run.end() as usize;
            image[range.clone()].copy_from_slice(&new[range]);
        }
        for run in delta.zero().iter() {
            image[run.start() as usize..run.end() as usize].fill(0);
        }
        image
    }

    fn images() -> impl Strategy<Value = Vec<u8>> {
        vec(0_u8..2, 0..60)
    }

    proptest! {
        #[test]
        fn a_delta_turns_the_basis_into_the_new_image(
            basis in images(), new in images(), page in 1_u64..9,
        ) {
            let delta = Delta::between(&basis, &new, page);

            prop_assert_eq!(apply(&basis, &delta, &new), new);
            prop_assert!(delta.data().intersection(delta.zero()).is_empty());
            prop_assert_eq!(delta.changed().total_bytes(), delta.changed_bytes());
            prop_assert_eq!(delta.is_empty(), delta.changed_bytes() == 0);
        }

        #[test]
        fn only_pages_that_differ_are_in_it(basis in images(), new in images(), page in 1_u64..9) {
            let changed = Delta::between(&basis, &new, page).changed();

            for (index, bytes) in new.chunks(page as usize).enumerate() {
                let start = index * page as usize;
                let extent = Extent::new(start as u64, bytes.len() as u64).unwrap();
                let is_same = basis.get(start..start + bytes.len()) == Some(bytes);
                prop_assert_eq!(changed.covers(extent), !is_same);
                prop_assert_eq!(changed.overlaps(extent), !is_same);
            }
        }

        #[test]
        fn merged_deltas_lead_from_the_first_basis_to_the_last_image(
            a in vec(0_u8..2, 32), b in vec(0_u8..2, 32), c in vec(0_u8..2, 32),
        ) {
            let mut delta = Delta::between(&a, &b, 4);
            delta.merge(&Delta::between(&b, &c, 4));

            prop_assert_eq!(apply(&a, &delta, &c), c);
            prop_assert!(delta.data().intersection(delta.zero()).is_empty());
        }
    }

    #[test]
    fn an_identical_image_has_an_empty_delta() {
        let image = vec![3; 10_000];

        assert!(Delta::between(&image, &image, 4096).is_empty());
    }
}
