//! [`RegionLeaves`]: the block digests of one region, zero blocks implicit.
//!
//! A region that reads zero costs no heap memory; any other costs 32 bytes per block with data.
//! That is what lets a region be the unit in which digests are streamed, saved and compared.

use crate::tree::{node_digest, zero_node_digest};
use crate::{
    BlockIndex, Digest, Geometry, RegionIndex, block_digest, is_zero, to_usize, zero_block_digest,
};

/// Digests of the blocks of one region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionLeaves {
    geometry: Geometry,
    region: RegionIndex,
    /// Blocks of the region: 1 to 256.
    block_count: usize,
    /// The digest of the image's last block when that is in this region, short, and reads zero.
    short_zero: Option<Digest>,
    data_map: DataMap,
    // Invariant: one digest per bit of `data_map`, in block order; none is a zero block's.
    data: Vec<Digest>,
}

impl RegionLeaves {
    /// The leaves of `region` when all of it reads zero.
    ///
    /// # Panics
    /// When the image has no such region.
    #[must_use]
    pub fn zero(geometry: &Geometry, region: RegionIndex) -> Self {
        let is_last = region.get() + 1 == geometry.region_count();
        let short_bytes = geometry.short_block_bytes().filter(|_| is_last);
        Self {
            geometry: *geometry,
            region,
            block_count: to_usize(geometry.region_block_count(region)),
            short_zero: short_bytes.map(zero_block_digest),
            data_map: DataMap::default(),
            data: Vec::new(),
        }
    }

    /// The leaves of `region` from all its bytes.
    ///
    /// # Panics
    /// When the image has no such region, or `bytes` are not as many as the region has.
    #[must_use]
    pub fn of_bytes(geometry: &Geometry, region: RegionIndex, bytes: &[u8]) -> Self {
        assert_eq!(
            bytes.len() as u64,
            geometry.region_extent(region).length(),
            "a whole region"
        );
        let mut leaves = Self::zero(geometry, region);
        for (index, block) in bytes
            .chunks(to_usize(geometry.block_size().bytes()))
            .enumerate()
        {
            if !is_zero(block) {
                leaves.set(index, block_digest(block));
            }
        }
        leaves
    }

    /// Which region this is.
    #[must_use]
    pub fn region(&self) -> RegionIndex {
        self.region
    }

    /// Geometry of the image the region belongs to.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Number of blocks of the region: 1 to 256. A region is never empty, so there is no
    /// `is_empty`.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a region has at least one block"
    )]
    #[must_use]
    pub fn len(&self) -> usize {
        self.block_count
    }

    /// Records the digest of a block, by its place in the region. The digest of a zero block makes
    /// it zero.
    ///
    /// # Panics
    /// When the region has no such block.
    pub fn set(&mut self, block_in_region: usize, digest: Digest) {
        let rank = self.rank(block_in_region);
        let had_data = self.data_map.contains(block_in_region);
        if digest == self.zero_leaf(block_in_region) {
            if had_data {
                self.data.remove(rank);
                self.data_map.remove(block_in_region);
            }
        } else if had_data {
            self.data[rank] = digest;
        } else {
            self.data.insert(rank, digest);
            self.data_map.insert(block_in_region);
        }
    }

    /// Records that a block reads zero.
    ///
    /// # Panics
    /// When the region has no such block.
    pub fn set_zero(&mut self, block_in_region: usize) {
        self.set(block_in_region, self.zero_leaf(block_in_region));
    }

    /// The digest of a block, by its place in the region.
    ///
    /// # Panics
    /// When the region has no such block.
    #[must_use]
    pub fn get(&self, block_in_region: usize) -> Digest {
        let rank = self.rank(block_in_region);
        match self.data_map.contains(block_in_region) {
            true => self.data[rank],
            false => self.zero_leaf(block_in_region),
        }
    }

    /// Whether a block reads zero.
    ///
    /// # Panics
    /// When the region has no such block.
    #[must_use]
    pub fn is_zero_block(&self, block_in_region: usize) -> bool {
        self.check_place(block_in_region);
        !self.data_map.contains(block_in_region)
    }

    /// Whether the whole region reads zero.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.data.is_empty()
    }

    /// Number of blocks that do not read zero.
    #[must_use]
    pub fn data_blocks(&self) -> usize {
        self.data.len()
    }

    /// The digests of all blocks in order, zero blocks included.
    pub fn iter(&self) -> impl Iterator<Item = Digest> + '_ {
        let mut rank = 0;
        (0..self.block_count).map(move |index| {
            if !self.data_map.contains(index) {
                return self.zero_leaf(index);
            }
            rank += 1;
            self.data[rank - 1]
        })
    }

    /// The blocks that do not read zero with their digests, in order.
    pub fn iter_data(&self) -> impl Iterator<Item = (BlockIndex, Digest)> + '_ {
        let first = self.region.first_block().get();
        let places = (0..self.block_count).filter(|&index| self.data_map.contains(index));
        places
            .zip(&self.data)
            .map(move |(index, &d)| (BlockIndex::new(first + index as u64), d))
    }

    /// The places in the region where the two differ, ascending.
    ///
    /// # Panics
    /// When the two are not the same region of the same geometry.
    pub fn differing<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = usize> + 'a {
        assert!(
            self.region == other.region && self.geometry == other.geometry,
            "the same region"
        );
        self.iter()
            .zip(other.iter())
            .enumerate()
            .filter(|(_, (a, b))| a != b)
            .map(|(index, _)| index)
    }

    /// The digest of the region: the tree's first inner level.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let is_whole =
            self.geometry.region_extent(self.region).length() == self.geometry.region_bytes();
        if self.is_zero() && is_whole {
            return zero_node_digest(self.geometry.block_size(), 1);
        }
        node_digest(1, self.iter())
    }

    /// Which blocks hold data: bit `i % 8` of byte `i / 8` stands for block `i` of the region.
    pub(crate) fn data_map_bytes(&self) -> [u8; 32] {
        self.data_map.to_bytes()
    }

    /// The digests of the blocks that hold data, in order.
    pub(crate) fn data(&self) -> &[Digest] {
        &self.data
    }

    /// The digest this block has when it reads zero.
    fn zero_leaf(&self, block_in_region: usize) -> Digest {
        let is_last = block_in_region + 1 == self.block_count;
        match self.short_zero {
            Some(digest) if is_last => digest,
            _ => zero_block_digest(self.geometry.block_size().bytes()),
        }
    }

    /// How many blocks before this one hold data.
    fn rank(&self, block_in_region: usize) -> usize {
        self.check_place(block_in_region);
        self.data_map.rank(block_in_region)
    }

    fn check_place(&self, block_in_region: usize) {
        let count = self.block_count;
        assert!(
            block_in_region < count,
            "region of {count} blocks has no block {block_in_region}"
        );
    }
}

/// 256 bits, one per block of a region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DataMap([u64; 4]);

impl DataMap {
    pub(crate) fn from_bytes(bytes: [u8; 32]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        Self(std::array::from_fn(|i| u64::from_le_bytes(words[i])))
    }

    fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (target, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(self.0) {
            *target = word.to_le_bytes();
        }
        bytes
    }

    pub(crate) fn contains(self, index: usize) -> bool {
        self.0[index / 64] & (1 << (index % 64)) != 0
    }

    fn insert(&mut self, index: usize) {
        self.0[index / 64] |= 1 << (index % 64);
    }

    fn remove(&mut self, index: usize) {
        self.0[index / 64] &= !(1 << (index % 64));
    }

    /// Number of bits set before `index`, which may be 256.
    pub(crate) fn rank(self, index: usize) -> usize {
        let whole: u32 = self.0[..index / 64]
            .iter()
            .map(|word| word.count_ones())
            .sum();
        let part = match index % 64 {
            0 => 0,
            bits => (self.0[index / 64] & ((1 << bits) - 1)).count_ones(),
        };
        (whole + part) as usize
    }

    /// Number of bits set.
    pub(crate) fn count(self) -> usize {
        self.rank(256)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockSize;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn digest(value: u8) -> Digest {
        block_digest(&[value])
    }

    proptest! {
        #[test]
        fn leaves_hold_what_a_plain_list_holds(
            image_blocks in 1_u64..600,
            short in prop_oneof![Just(0_u64), 1_u64..4096],
            steps in vec((0_usize..256, 0_u8..4), 0..60),
        ) {
            let geometry = Geometry::new(image_blocks * 4096 - short, BlockSize::MIN);
            let region = RegionIndex::new(geometry.region_count() - 1);
            let mut leaves = RegionLeaves::zero(&geometry, region);
            let zeros = |index: usize| {
                let block = BlockIndex::new(region.first_block().get() + index as u64);
                block_digest(&vec![0; geometry.block_extent(block).length() as usize])
            };
            let mut oracle: Vec<Digest> = (0..leaves.len()).map(zeros).collect();
            prop_assert!(leaves.is_zero());

            for (index, value) in steps {
                let index = index % leaves.len();
                let new = if value == 0 { zeros(index) } else { digest(value) };
                leaves.set(index, new);
                oracle[index] = new;
            }

            prop_assert_eq!(leaves.iter().collect::<Vec<_>>(), oracle.clone());
            let is_data = |&i: &usize| oracle[i] != zeros(i);
            let data: Vec<usize> = (0..oracle.len()).filter(is_data).collect();
            prop_assert_eq!(leaves.data_blocks(), data.len());
            prop_assert_eq!(leaves.is_zero(), data.is_empty());
            let places = leaves.iter_data().map(|(block, _)| block.in_region());
            let listed: Vec<usize> = places.collect();
            prop_assert_eq!(listed, data);
            for (index, &expected) in oracle.iter().enumerate() {
                prop_assert_eq!(leaves.get(index), expected);
                prop_assert_eq!(leaves.is_zero_block(index), expected == zeros(index));
            }
            prop_assert_eq!(leaves.digest(), node_digest(1, oracle.into_iter()));
            let map = DataMap::from_bytes(leaves.data_map_bytes());
            prop_assert_eq!((map, map.count()), (leaves.data_map, leaves.data_blocks()));
        }
    }

    #[test]
    fn a_zero_region_costs_no_heap_and_its_digest_is_remembered() {
        for size in BlockSize::all() {
            let leaves = RegionLeaves::zero(&Geometry::new(u64::MAX, size), RegionIndex::new(5));

            assert_eq!(leaves.data.capacity(), 0);
            assert_eq!(leaves.digest(), node_digest(1, leaves.iter()));
        }
    }

    #[test]
    fn leaves_of_bytes_are_the_digests_of_the_blocks() {
        let geometry = Geometry::new(3 * 4096 + 7, BlockSize::MIN);
        let mut bytes = vec![0; 3 * 4096 + 7];
        bytes[4096] = 1;
        bytes[3 * 4096 + 6] = 2;

        let leaves = RegionLeaves::of_bytes(&geometry, RegionIndex::new(0), &bytes);

        let expected: Vec<Digest> = bytes.chunks(4096).map(block_digest).collect();
        assert_eq!(leaves.iter().collect::<Vec<_>>(), expected);
        assert_eq!(leaves.data_blocks(), 2);
    }

    #[test]
    fn differing_names_the_places_that_differ() {
        let geometry = Geometry::new(10 * 4096, BlockSize::MIN);
        let mut old = RegionLeaves::zero(&geometry, RegionIndex::new(0));
        old.set(2, digest(1));
        old.set(3, digest(1));
        let mut new = old.clone();
        new.set(3, digest(2));
        new.set_zero(2);
        new.set(9, digest(3));

        assert_eq!(old.differing(&new).collect::<Vec<_>>(), [2, 3, 9]);
        assert_eq!(old.differing(&old).count(), 0);
    }

    #[test]
    #[should_panic(expected = "region of 10 blocks has no block 10")]
    fn a_block_behind_the_region_is_the_callers_bug() {
        let geometry = Geometry::new(10 * 4096, BlockSize::MIN);
        RegionLeaves::zero(&geometry, RegionIndex::new(0)).set(10, digest(1));
    }
}
