//! [`Geometry`]: how an image is cut into blocks, pages and regions.
//!
//! Arithmetic only. The last block, page and region may be short; an empty image has none of them.

use std::fmt;

use crate::{BlockIndex, BlockSize, Extent, PAGE_BYTES, PageIndex, REGION_BLOCKS, RegionIndex};

/// Size of an image and of its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    image_bytes: u64,
    block_size: BlockSize,
}

impl Geometry {
    /// An image of `image_bytes`, cut into blocks of `block_size`.
    #[must_use]
    pub const fn new(image_bytes: u64, block_size: BlockSize) -> Self {
        Self {
            image_bytes,
            block_size,
        }
    }

    /// Bytes of the image.
    #[must_use]
    pub const fn image_bytes(&self) -> u64 {
        self.image_bytes
    }

    /// Size of its blocks.
    #[must_use]
    pub const fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Number of blocks, the short last one included.
    #[must_use]
    pub const fn block_count(&self) -> u64 {
        self.image_bytes.div_ceil(self.block_size.bytes())
    }

    /// Number of pages, the short last one included.
    #[must_use]
    pub const fn page_count(&self) -> u64 {
        self.image_bytes.div_ceil(PAGE_BYTES)
    }

    /// Number of regions, the short last one included.
    #[must_use]
    pub const fn region_count(&self) -> u64 {
        self.image_bytes.div_ceil(self.region_bytes())
    }

    /// Bytes of a whole region: 256 blocks.
    #[must_use]
    pub const fn region_bytes(&self) -> u64 {
        REGION_BLOCKS * self.block_size.bytes()
    }

    /// The whole image.
    #[must_use]
    pub const fn image_extent(&self) -> Extent {
        Extent::from_range(0..self.image_bytes)
    }

    /// The bytes of a block; the last one may be short.
    ///
    /// # Panics
    /// When the image has no such block.
    #[must_use]
    pub fn block_extent(&self, block: BlockIndex) -> Extent {
        self.unit_extent(block.get(), self.block_size.bytes())
    }

    /// The bytes of a page; the last one may be short.
    ///
    /// # Panics
    /// When the image has no such page.
    #[must_use]
    pub fn page_extent(&self, page: PageIndex) -> Extent {
        self.unit_extent(page.get(), PAGE_BYTES)
    }

    /// The bytes of a region; the last one may be short.
    ///
    /// # Panics
    /// When the image has no such region.
    #[must_use]
    pub fn region_extent(&self, region: RegionIndex) -> Extent {
        self.unit_extent(region.get(), self.region_bytes())
    }

    fn unit_extent(&self, index: u64, unit_bytes: u64) -> Extent {
        let start = index
            .checked_mul(unit_bytes)
            .filter(|&start| start < self.image_bytes);
        let start = start.expect("callers ask for blocks, pages and regions the image has");
        Extent::from_range(start..start + unit_bytes.min(self.image_bytes - start))
    }

    /// Number of blocks of a region: 256, or fewer for the last one.
    ///
    /// # Panics
    /// When the image has no such region.
    #[must_use]
    pub fn region_block_count(&self, region: RegionIndex) -> u64 {
        self.region_extent(region)
            .length()
            .div_ceil(self.block_size.bytes())
    }

    /// Length of the last block when it is shorter than the others.
    #[must_use]
    pub fn short_block_bytes(&self) -> Option<u64> {
        let rest = self.image_bytes % self.block_size.bytes();
        (rest > 0).then_some(rest)
    }

    /// Levels of the tree above the blocks: 1 to 7. Every tree has a region level, even of an empty
    /// image.
    #[must_use]
    pub fn tree_levels(&self) -> u8 {
        let mut nodes = self.region_count();
        let mut levels = 1;
        while nodes > 1 {
            nodes = nodes.div_ceil(REGION_BLOCKS);
            levels += 1;
        }
        levels
    }
}

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} bytes in blocks of {}",
            self.image_bytes, self.block_size
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn geometries() -> impl Strategy<Value = Geometry> {
        let image_bytes = prop_oneof![
            0_u64..40 << 20,
            any::<u64>(),
            (0_u64..5000).prop_map(|n| n << 12)
        ];
        (image_bytes, 0_usize..BlockSize::COUNT)
            .prop_map(|(bytes, size)| Geometry::new(bytes, BlockSize::all().nth(size).unwrap()))
    }

    fn check_units(geometry: &Geometry, count: u64, unit: u64, extent: impl Fn(u64) -> Extent) {
        let image_bytes = geometry.image_bytes();
        assert_eq!(
            u128::from(count),
            u128::from(image_bytes).div_ceil(u128::from(unit))
        );
        for index in [0, 1, count / 2, count.saturating_sub(1)]
            .into_iter()
            .filter(|&i| i < count)
        {
            let extent = extent(index);
            assert_eq!(extent.start(), index * unit);
            assert_eq!(extent.length(), unit.min(image_bytes - extent.start()));
        }
    }

    proptest! {
        #[test]
        fn blocks_pages_and_regions_tile_the_image(geometry in geometries()) {
            let block_bytes = geometry.block_size().bytes();

            let block = |i| geometry.block_extent(BlockIndex::new(i));
            let page = |i| geometry.page_extent(PageIndex::new(i));
            let region = |i| geometry.region_extent(RegionIndex::new(i));

            check_units(&geometry, geometry.block_count(), block_bytes, block);
            check_units(&geometry, geometry.page_count(), PAGE_BYTES, page);
            check_units(&geometry, geometry.region_count(), 256 * block_bytes, region);
        }

        #[test]
        fn the_regions_have_all_the_blocks(geometry in geometries()) {
            if let Some(last) = geometry.region_count().checked_sub(1) {
                let in_last = geometry.region_block_count(RegionIndex::new(last));

                prop_assert!((1..=256).contains(&in_last));
                prop_assert_eq!(last * 256 + in_last, geometry.block_count());
                if last > 0 {
                    prop_assert_eq!(geometry.region_block_count(RegionIndex::new(last - 1)), 256);
                }
            }
        }

        #[test]
        fn the_levels_are_just_enough(geometry in geometries()) {
            let levels = u32::from(geometry.tree_levels());

            prop_assert!((1..=7).contains(&levels));
            prop_assert!(geometry.block_count() <= 256_u64.pow(levels));
            prop_assert!(levels == 1 || geometry.block_count() > 256_u64.pow(levels - 1));
        }
    }

    #[test]
    fn an_empty_image_has_no_blocks_and_one_level() {
        let geometry = Geometry::new(0, BlockSize::DEFAULT);

        assert_eq!(
            (
                geometry.block_count(),
                geometry.page_count(),
                geometry.region_count()
            ),
            (0, 0, 0)
        );
        assert_eq!(geometry.tree_levels(), 1);
        assert!(geometry.image_extent().is_empty());
    }

    #[test]
    #[should_panic(expected = "the image has")]
    fn a_block_behind_the_end_is_the_callers_bug() {
        let _ = Geometry::new(65_536, BlockSize::DEFAULT).block_extent(BlockIndex::new(1));
    }

    #[test]
    fn a_geometry_is_told_by_its_bytes_and_its_blocks() {
        let geometry = Geometry::new(10_000, BlockSize::DEFAULT);

        assert_eq!(geometry.to_string(), "10000 bytes in blocks of 64 KiB");
    }
}
