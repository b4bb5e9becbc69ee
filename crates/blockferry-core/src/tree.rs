//! The tree over a whole image: [`TreeHasher`] takes regions and gives the [`Root`].
//!
//! ```text
//! root             version, geometry, levels, top digest    (context: root)
//! level 2…7        level, up to 256 digests of the level below   (context: node)
//! level 1, region  level, up to 256 block digests                (context: node)
//! block            plain BLAKE3 of the bytes
//! ```
//!
//! Every node is a BLAKE3 key derivation with a fixed context, so a node can never be taken for a
//! block, nor a root for a node. Nodes of zeros are constants per block size and level: a hole
//! costs the logarithm of its length, in time and memory. `docs/format/manifest.md` describes the
//! same for other implementations, and `docs/format/oracle.py` is one.

use std::fmt;
use std::str::FromStr;
use std::sync::{LazyLock, OnceLock};

use blake3::Hasher;
use blake3::hazmat::{ContextKey, HasherExt as _, hash_derive_key_context};

use crate::{
    BlockSize, Digest, Encoder, Error, Geometry, RegionIndex, RegionLeaves, Result,
    zero_block_digest,
};

/// Version of the tree's definition, bound into every root.
pub const TREE_VERSION: u32 = 1;

const FAN_OUT: usize = 256;
/// Levels above the blocks an image of 2^64 bytes in blocks of 4 KiB has.
const MAX_LEVELS: usize = 7;

static NODE_KEY: LazyLock<ContextKey> =
    LazyLock::new(|| hash_derive_key_context("blockferry 2026-11-21 tree node v1"));
static ROOT_KEY: LazyLock<ContextKey> =
    LazyLock::new(|| hash_derive_key_context("blockferry 2026-11-21 tree root v1"));

/// The digest of an inner node: its level (1 for a region) and the digests below it, at most 256.
pub(crate) fn node_digest(level: u8, children: impl Iterator<Item = Digest>) -> Digest {
    // One contiguous update lets BLAKE3 use its vector code; 256 small ones would not.
    let mut input = [0; 1 + FAN_OUT * Digest::BYTES];
    input[0] = level;
    let mut length = 1;
    for child in children {
        input[length..length + Digest::BYTES].copy_from_slice(child.as_bytes());
        length += Digest::BYTES;
    }
    Hasher::new_from_context_key(&NODE_KEY)
        .update(&input[..length])
        .finalize()
        .into()
}

/// The digest of a complete node at `level` over zero blocks; level 0 is the block itself.
pub(crate) fn zero_node_digest(block_size: BlockSize, level: u8) -> Digest {
    type Ladder = [Digest; MAX_LEVELS + 1];
    static MEMO: [OnceLock<Ladder>; BlockSize::COUNT] = [const { OnceLock::new() }; _];
    let ladder = MEMO[block_size.ordinal()].get_or_init(|| {
        let mut ladder = [zero_block_digest(block_size.bytes()); MAX_LEVELS + 1];
        for (level, below) in (1_u8..).zip(0..MAX_LEVELS) {
            ladder[below + 1] = node_digest(level, std::iter::repeat_n(ladder[below], FAN_OUT));
        }
        ladder
    });
    ladder[usize::from(level)]
}

/// The digest of a whole image together with its geometry.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Root(Digest);

impl Root {
    /// A root with these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(Digest::from_bytes(bytes))
    }

    /// Its bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        self.0.as_bytes()
    }

    /// The root as a digest.
    #[must_use]
    pub const fn digest(&self) -> Digest {
        self.0
    }

    /// The root of an image held in memory.
    #[must_use]
    pub fn of_bytes(bytes: &[u8], block_size: BlockSize) -> Self {
        let geometry = Geometry::new(bytes.len() as u64, block_size);
        let mut tree = TreeHasher::new(geometry);
        for (region, bytes) in (0..).zip(bytes.chunks(crate::to_usize(geometry.region_bytes()))) {
            tree.push(&RegionLeaves::of_bytes(
                &geometry,
                RegionIndex::new(region),
                bytes,
            ));
        }
        tree.finish()
    }

    /// The root of an image that reads zero throughout.
    #[must_use]
    pub fn of_zeros(geometry: Geometry) -> Self {
        TreeHasher::new(geometry).finish()
    }
}

impl fmt::Display for Root {
    /// 64 lower-case hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Root {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        text.parse()
            .map(Self)
            .map_err(|error: Error| error.at("root"))
    }
}

/// Computes the [`Root`] from regions pushed in ascending order; regions left out read zero.
///
/// Holds at most 256 digests per level, 56 KiB for the largest image. A gap costs the logarithm of
/// its length.
#[derive(Clone, Debug)]
pub struct TreeHasher {
    geometry: Geometry,
    /// The first region that is not in the tree yet.
    next_region: u64,
    // Invariant: `open[i]` holds the finished digests of level i + 1 that no parent covers yet; all
    // but the top level's are fewer than 256.
    open: Vec<Vec<Digest>>,
}

impl TreeHasher {
    /// A tree over an image of this geometry, with nothing pushed yet.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        let open = vec![Vec::new(); usize::from(geometry.tree_levels())];
        Self {
            geometry,
            next_region: 0,
            open,
        }
    }

    /// Adds a region. Those between the last one pushed and this one read zero.
    ///
    /// # Panics
    /// When the region is of another geometry, or not behind the last one pushed.
    pub fn push(&mut self, leaves: &RegionLeaves) {
        assert_eq!(
            *leaves.geometry(),
            self.geometry,
            "leaves of another geometry"
        );
        self.push_digest(leaves.region(), leaves.digest());
    }

    /// Adds a region of which only the digest is known; otherwise like [`TreeHasher::push`].
    ///
    /// # Panics
    /// When the image has no such region, or it is not behind the last one pushed.
    pub fn push_digest(&mut self, region: RegionIndex, digest: Digest) {
        let (region, next, count) = (region.get(), self.next_region, self.geometry.region_count());
        assert!(
            (next..count).contains(&region),
            "region {region} is not in {next}..{count}"
        );
        self.push_zeros(region - next);
        self.push_node(1, digest);
        self.next_region += 1;
    }

    /// The root; regions behind the last one pushed read zero.
    #[must_use]
    pub fn finish(mut self) -> Root {
        self.push_zeros_to_the_end();
        let levels = self.geometry.tree_levels();
        for level in 1..levels {
            self.close_node(level);
        }
        let top = match self.open[usize::from(levels - 1)][..] {
            [top] => top,
            [] => node_digest(1, std::iter::empty()), // an empty image: a region without blocks
            _ => unreachable!("the top level has one node by the definition of the levels"),
        };
        root_of(&self.geometry, levels, top)
    }

    fn push_zeros_to_the_end(&mut self) {
        let whole_regions = self.geometry.image_bytes() / self.geometry.region_bytes();
        self.push_zeros(whole_regions.saturating_sub(self.next_region));
        if self.next_region < self.geometry.region_count() {
            let last = RegionIndex::new(self.next_region);
            self.push(&RegionLeaves::zero(&self.geometry, last));
        }
    }

    /// Adds whole regions of zeros.
    fn push_zeros(&mut self, count: u64) {
        self.push_zero_nodes(1, count);
        self.next_region += count;
    }

    /// Adds `count` complete nodes of zeros at `level`: singly until the parent is full, then whole
    /// parents, then the rest singly. So at most 511 per level, however long the gap is.
    fn push_zero_nodes(&mut self, level: u8, count: u64) {
        if count == 0 {
            return;
        }
        let zero = zero_node_digest(self.geometry.block_size(), level);
        let fan_out = FAN_OUT as u64;
        let open = self.open[usize::from(level - 1)].len() as u64;
        let head = if open > 0 {
            count.min(fan_out - open)
        } else {
            0
        };
        (0..head).for_each(|_| self.push_node(level, zero));
        let has_parents = level < self.geometry.tree_levels();
        let parents = if has_parents {
            (count - head) / fan_out
        } else {
            0
        };
        self.push_zero_nodes(level + 1, parents);
        (0..count - head - parents * fan_out).for_each(|_| self.push_node(level, zero));
    }

    fn push_node(&mut self, level: u8, digest: Digest) {
        let siblings = &mut self.open[usize::from(level - 1)];
        siblings.push(digest);
        if siblings.len() == FAN_OUT {
            self.close_node(level);
        }
    }

    /// Turns the open digests of `level` into one of the level above.
    fn close_node(&mut self, level: u8) {
        let children = &mut self.open[usize::from(level - 1)];
        if children.is_empty() {
            return;
        }
        let digest = node_digest(level + 1, children.drain(..));
        self.push_node(level + 1, digest);
    }
}

fn root_of(geometry: &Geometry, levels: u8, top: Digest) -> Root {
    let mut input = Vec::with_capacity(53);
    Encoder::new(&mut input)
        .u32(TREE_VERSION)
        .u64(geometry.image_bytes())
        .u64(geometry.block_size().bytes())
        .u8(levels)
        .digest(&top);
    Root(
        Hasher::new_from_context_key(&ROOT_KEY)
            .update(&input)
            .finalize()
            .into(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block_digest;
    use proptest::collection::btree_map;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const NODE: &str = "blockferry 2026-11-21 tree node v1";
    const ROOT: &str = "blockferry 2026-11-21 tree root v1";

    /// The definition, word for word: all leaves in a list, levels until one digest is left.
    fn naive_root(leaves: &[Digest], geometry: &Geometry) -> Root {
        naive_root_above(1, naive_level(1, leaves), geometry)
    }

    fn naive_root_above(mut level: u8, mut digests: Vec<Digest>, geometry: &Geometry) -> Root {
        while digests.len() > 1 {
            level += 1;
            digests = naive_level(level, &digests);
        }
        let mut input = Vec::new();
        input.extend(1_u32.to_le_bytes());
        input.extend(geometry.image_bytes().to_le_bytes());
        input.extend(geometry.block_size().bytes().to_le_bytes());
        input.push(level);
        input.extend(digests[0].as_bytes());
        Root::from_bytes(blake3::derive_key(ROOT, &input))
    }

    fn naive_level(level: u8, below: &[Digest]) -> Vec<Digest> {
        let empty: [&[Digest]; 1] = [&[]];
        let groups = below
            .chunks(256)
            .chain(empty)
            .take(below.len().div_ceil(256).max(1));
        let node = |group: &[Digest]| {
            let mut input = vec![level];
            group.iter().for_each(|d| input.extend(d.as_bytes()));
            Digest::from_bytes(blake3::derive_key(NODE, &input))
        };
        groups.map(node).collect()
    }

    fn naive_leaves(geometry: &Geometry, data: &BTreeMap<u64, u8>) -> Vec<Digest> {
        let zero = block_digest(&vec![0; geometry.block_size().bytes() as usize]);
        let mut leaves = vec![zero; geometry.block_count() as usize];
        if let (Some(last), Some(bytes)) = (leaves.last_mut(), geometry.short_block_bytes()) {
            *last = block_digest(&vec![0; bytes as usize]);
        }
        for (&block, &value) in data {
            leaves[block as usize] = block_digest(&[value]);
        }
        leaves
    }

    fn check(geometry: Geometry, data: &BTreeMap<u64, u8>, push_zero_regions: bool) {
        let mut regions: BTreeMap<u64, RegionLeaves> = BTreeMap::new();
        if push_zero_regions {
            for region in (0..geometry.region_count()).step_by(3) {
                regions.insert(
                    region,
                    RegionLeaves::zero(&geometry, RegionIndex::new(region)),
                );
            }
        }
        for (&block, &value) in data {
            let region = RegionIndex::new(block / 256);
            let leaves = regions.entry(block / 256);
            let leaves = leaves.or_insert_with(|| RegionLeaves::zero(&geometry, region));
            leaves.set(block as usize % 256, block_digest(&[value]));
        }

        let mut tree = TreeHasher::new(geometry);
        regions.values().for_each(|leaves| tree.push(leaves));

        assert_eq!(
            tree.finish(),
            naive_root(&naive_leaves(&geometry, data), &geometry)
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn the_root_is_the_naive_recursion_over_all_leaves(
            blocks in prop_oneof![1_u64..1000, 65_000_u64..66_200, 130_000_u64..132_000],
            short in prop_oneof![Just(0_u64), 1_u64..4096],
            data in btree_map(any::<u64>(), 1_u8.., 0..12),
            push_zero_regions: bool,
        ) {
            let geometry = Geometry::new(blocks * 4096 - short, BlockSize::MIN);
            let data = data.into_iter().map(|(block, value)| (block % blocks, value)).collect();

            check(geometry, &data, push_zero_regions);
        }
    }

    #[test]
    fn level_boundaries_are_exact() {
        for blocks in [
            0, 1, 255, 256, 257, 511, 512, 65_535, 65_536, 65_537, 131_072,
        ] {
            let geometry = Geometry::new(blocks * 4096, BlockSize::MIN);
            check(geometry, &BTreeMap::new(), false);
            if let Some(last) = blocks.checked_sub(1) {
                check(geometry, &BTreeMap::from([(0, 1), (last, 2)]), false);
                check(geometry, &BTreeMap::from([(last, 2)]), true);
            }
        }
    }

    #[test]
    fn four_level_trees_agree_with_the_naive_recursion_over_regions() {
        // More than 2^24 blocks: a list of all leaves would be half a gibibyte, one of the regions
        // is 2 MiB.
        let geometry = Geometry::new(((1 << 24) + 300) * 4096, BlockSize::MIN);
        assert_eq!(
            (geometry.tree_levels(), geometry.region_count()),
            (4, (1 << 16) + 2)
        );
        let mut regions =
            vec![RegionLeaves::zero(&geometry, RegionIndex::new(0)).digest(); 1 << 16];
        regions.push(regions[0]);
        regions.push(RegionLeaves::zero(&geometry, RegionIndex::new((1 << 16) + 1)).digest());
        let mut tree = TreeHasher::new(geometry);
        for region in [273_u64, 274, 60_000, 65_535] {
            let digest = block_digest(&region.to_le_bytes());
            regions[region as usize] = digest;
            tree.push_digest(RegionIndex::new(region), digest);
        }

        assert_eq!(tree.finish(), naive_root_above(1, regions, &geometry));
    }

    #[test]
    fn the_root_binds_the_geometry() {
        let sizes = [0_u64, 1, 4096, 65_536, 65_537, 1 << 24, (1 << 24) + 1];
        let mut roots = std::collections::HashSet::new();

        for bytes in sizes {
            for block_size in BlockSize::all() {
                roots.insert(Root::of_zeros(Geometry::new(bytes, block_size)));
            }
        }

        assert_eq!(roots.len(), sizes.len() * BlockSize::COUNT);
    }

    #[test]
    fn the_largest_empty_images_cost_a_bounded_number_of_nodes() {
        // Would not finish if a gap cost its length: 2^44 regions.
        for bytes in [1 << 44, (1 << 44) + 1, u64::MAX] {
            let geometry = Geometry::new(bytes, BlockSize::MIN);
            let mut tree = TreeHasher::new(geometry);
            let last = RegionIndex::new(geometry.region_count() - 1);
            tree.push(&RegionLeaves::zero(&geometry, last));
            assert!(tree.open.iter().all(|open| open.len() < FAN_OUT));

            assert_eq!(tree.finish(), Root::of_zeros(geometry));
        }
    }

    #[test]
    fn pushing_digests_is_pushing_leaves() {
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| (i / 5000) as u8).collect();
        let geometry = Geometry::new(bytes.len() as u64, BlockSize::MIN);
        let mut tree = TreeHasher::new(geometry);
        for (region, bytes) in (0..).zip(bytes.chunks(1 << 20)) {
            let leaves = RegionLeaves::of_bytes(&geometry, RegionIndex::new(region), bytes);
            tree.push_digest(leaves.region(), leaves.digest());
        }

        assert_eq!(tree.finish(), Root::of_bytes(&bytes, BlockSize::MIN));
    }

    #[test]
    #[should_panic(expected = "region 0 is not in 1..2")]
    fn a_region_pushed_twice_is_the_callers_bug() {
        let geometry = Geometry::new(300 * 4096, BlockSize::MIN);
        let mut tree = TreeHasher::new(geometry);
        tree.push(&RegionLeaves::zero(&geometry, RegionIndex::new(0)));
        tree.push(&RegionLeaves::zero(&geometry, RegionIndex::new(0)));
    }
}
