//! Blocks, digests, manifests, change maps and codec of blockferry.
//!
//! The bottom of the workspace: pure computation, without devices, clocks, threads or randomness. A
//! [`Geometry`] cuts an image into blocks of a [`BlockSize`]; a [`Digest`] names the content of a
//! block; [`RegionLeaves`] hold the digests of 256 blocks; a [`TreeHasher`] turns regions into the
//! [`Root`] that names the whole image. A manifest ([`ManifestWriter`], [`ManifestReader`]) carries
//! the same regions from one run to the next. [`ExtentSet`], [`ChangeMap`] and [`Delta`] say which
//! bytes are meant, and the [`Encoder`] and [`Decoder`] are how every format of the workspace is
//! written and read.
//!
//! ```
//! use blockferry_core::{BlockSize, Geometry, RegionIndex, RegionLeaves, TreeHasher, block_digest};
//!
//! let image = vec![7_u8; 100_000];
//! let geometry = Geometry::new(image.len() as u64, BlockSize::DEFAULT);
//! let mut leaves = RegionLeaves::zero(&geometry, RegionIndex::new(0));
//! for (index, block) in image.chunks(65_536).enumerate() {
//!     leaves.set(index, block_digest(block));
//! }
//! let mut tree = TreeHasher::new(geometry);
//! tree.push(&leaves);
//! println!("{}", tree.finish());
//! ```

#![cfg_attr(
    test,
    expect(
        clippy::cast_possible_truncation,
        reason = "numbers in tests are small by construction"
    )
)]

mod change_map;
mod codec;
mod delta;
mod digest;
mod error;
mod extent;
mod extent_set;
mod geometry;
mod leaves;
mod manifest;
mod tree;
mod units;

pub use change_map::{ChangeMap, Content, Provenance, Trust};
pub use codec::{Decoder, Encoder, checksum};
pub use delta::Delta;
pub use digest::{
    Digest, block_digest, block_digest_from_pages, is_zero, page_digest, page_digests,
    zero_block_digest,
};
pub use error::{Error, ErrorKind, Result};
pub use extent::Extent;
pub use extent_set::ExtentSet;
pub use geometry::Geometry;
pub use leaves::RegionLeaves;
pub use manifest::{MANIFEST_VERSION, ManifestReader, ManifestWriter};
pub use tree::{Root, TREE_VERSION, TreeHasher};
pub use units::{
    BlockIndex, BlockSize, PAGE_BYTES, PageIndex, REGION_BLOCKS, RegionIndex, format_size,
    parse_size,
};

/// A length that is known to fit memory, as an index.
///
/// # Panics
/// When it does not fit, which is a bug of the caller: counts from outside meet a limit first.
pub(crate) fn to_usize(count: u64) -> usize {
    usize::try_from(count).expect("callers bound the count far below the address space")
}
