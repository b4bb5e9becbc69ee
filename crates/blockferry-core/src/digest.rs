//! Digests of blocks and pages (decision D1), and the test for zeros.
//!
//! A block's digest is the plain BLAKE3 hash of its bytes, wherever it lies. A page's digest is the
//! chaining value of its 4 KiB subtree inside the block, so the pages of a block merge into the
//! block's digest: one hash serves comparison, drill-down and proof. How digests form the tree is
//! [`crate::TreeHasher`]'s matter.
//!
//! The tree of BLAKE3 and its chaining values: section 2.1 of the BLAKE3 paper (O'Connor, Aumasson,
//! Neves, Wilcox-O'Hearn: *BLAKE3, one function, fast everywhere*).

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use blake3::hazmat::{
    ChainingValue, HasherExt as _, Mode, left_subtree_len, merge_subtrees_non_root,
    merge_subtrees_root,
};

use crate::{BlockSize, Error, ErrorKind, PAGE_BYTES, Result, to_usize};

/// A strong hash that names content: 32 bytes of BLAKE3.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Bytes of a digest.
    pub const BYTES: usize = 32;

    /// A digest with these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Digest {
    /// 64 lower-case hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = Error;

    /// 64 hexadecimal digits, of either case.
    fn from_str(text: &str) -> Result<Self> {
        blake3::Hash::from_hex(text)
            .map(Self::from)
            .map_err(|_error| {
                // The cause says no more than this text does.
                let message = format!("digest: expected 64 hexadecimal digits, found {text:?}");
                Error::new(ErrorKind::Invalid, message)
            })
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

/// The digest of a block: plain BLAKE3 of its bytes, as many as it has.
#[must_use]
pub fn block_digest(bytes: &[u8]) -> Digest {
    blake3::hash(bytes).into()
}

/// The digest of a block of `length` zero bytes. Block sizes are remembered; a short block is
/// computed.
#[must_use]
pub fn zero_block_digest(length: u64) -> Digest {
    static MEMO: [OnceLock<Digest>; BlockSize::COUNT] = [const { OnceLock::new() }; _];
    match BlockSize::new(length) {
        Ok(size) => *MEMO[size.ordinal()].get_or_init(|| hash_zeros(length)),
        Err(_) => hash_zeros(length),
    }
}

fn hash_zeros(length: u64) -> Digest {
    static ZEROS: [u8; 65_536] = [0; 65_536];
    let mut hasher = blake3::Hasher::new();
    let mut left = length;
    while left > 0 {
        let piece = left.min(ZEROS.len() as u64);
        hasher.update(&ZEROS[..to_usize(piece)]);
        left -= piece;
    }
    hasher.finalize().into()
}

/// The digest of a page: the chaining value of its subtree inside its block.
///
/// `offset` is the page's byte offset in the image; `bytes` are the page, 1 to 4096 bytes (fewer
/// than 4096 only at the end of the image). A block of a single page has no chaining value that
/// leads to its digest; its page digest is still the non-root chaining value, so that all page
/// digests are made alike.
///
/// # Panics
/// When `offset` is not a multiple of 4096, or `bytes` is empty or longer than a page.
#[must_use]
pub fn page_digest(block_size: BlockSize, offset: u64, bytes: &[u8]) -> Digest {
    assert!(
        offset.is_multiple_of(PAGE_BYTES),
        "pages start at multiples of 4096"
    );
    assert!(
        (1..=PAGE_BYTES).contains(&(bytes.len() as u64)),
        "a page has 1 to 4096 bytes"
    );
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(offset % block_size.bytes());
    hasher.update(bytes);
    Digest(hasher.finalize_non_root())
}

/// The digests of all pages of a block, in order; see [`page_digest`].
pub fn page_digests(block_size: BlockSize, block: &[u8]) -> impl Iterator<Item = Digest> + '_ {
    let offsets = (0..).step_by(to_usize(PAGE_BYTES));
    offsets
        .zip(block.chunks(to_usize(PAGE_BYTES)))
        .map(move |(offset, page)| page_digest(block_size, offset, page))
}

/// The digest of a block of `block_bytes` from the digests of all its pages.
///
/// `None` when it cannot be told: the block has a single page, or `pages` are not as many as the
/// block has.
#[must_use]
pub fn block_digest_from_pages(pages: &[Digest], block_bytes: u64) -> Option<Digest> {
    if pages.len() < 2 || pages.len() as u64 != block_bytes.div_ceil(PAGE_BYTES) {
        return None;
    }
    let (left, right) = merge_halves(pages, block_bytes);
    Some(merge_subtrees_root(&left, &right, Mode::Hash).into())
}

/// The chaining values of the two halves of a subtree of at least two pages.
fn merge_halves(pages: &[Digest], bytes: u64) -> (ChainingValue, ChainingValue) {
    // The left half is a power of two of at least one page, so the cut falls between pages.
    let left_bytes = left_subtree_len(bytes);
    let (left, right) = pages.split_at(to_usize(left_bytes / PAGE_BYTES));
    (
        merge_pages(left, left_bytes),
        merge_pages(right, bytes - left_bytes),
    )
}

fn merge_pages(pages: &[Digest], bytes: u64) -> ChainingValue {
    if let [page] = pages {
        return page.0;
    }
    let (left, right) = merge_halves(pages, bytes);
    merge_subtrees_non_root(&left, &right, Mode::Hash)
}

/// Whether every byte is zero; true for no bytes. Stops within 1 KiB behind the first other byte.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // A fold without an early exit inside the piece is what the compiler turns into vector
    // instructions.
    const PIECE_BYTES: usize = 1024;
    let (pieces, rest) = bytes.as_chunks::<PIECE_BYTES>();
    let all_zero = |bytes: &[u8]| bytes.iter().fold(0, |seen, byte| seen | byte) == 0;
    pieces.iter().all(|piece| all_zero(piece)) && all_zero(rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// Bytes that differ from place to place, made from a seed.
    fn noise(seed: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        blake3::Hasher::new()
            .update(&seed.to_le_bytes())
            .finalize_xof()
            .fill(&mut bytes);
        bytes
    }

    #[test]
    fn zero_blocks_of_any_length_have_the_digest_of_their_bytes() {
        for length in [0, 1, 4095, 4096, 4097, 65_536, 65_537, 131_072, 1 << 20] {
            assert_eq!(
                zero_block_digest(length as u64),
                block_digest(&vec![0; length]),
                "{length}"
            );
        }
    }

    #[test]
    fn hex_roundtrips_and_anything_else_is_refused() {
        let digest = block_digest(b"blockferry");

        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert_eq!(
            digest.to_string().to_uppercase().parse::<Digest>().unwrap(),
            digest
        );
        assert_eq!(format!("{digest:?}"), format!("{digest}"));
        for text in ["", "00", &"g".repeat(64), &"0".repeat(63), &"0".repeat(65)] {
            assert_eq!(
                text.parse::<Digest>().unwrap_err().kind(),
                ErrorKind::Invalid
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn page_digests_merge_to_the_block_digest(
            seed: u64, size in 0_usize..BlockSize::COUNT, cut: u64, block in 0_u64..5,
        ) {
            let size = BlockSize::all().nth(size).unwrap();
            let length = if cut % 3 == 0 { size.bytes() } else { cut % size.bytes() + 1 };
            let bytes = noise(seed, length as usize);
            let start = block * size.bytes();

            let pages: Vec<Digest> = bytes
                .chunks(4096)
                .enumerate()
                .map(|(i, page)| page_digest(size, start + i as u64 * 4096, page))
                .collect();

            let expected = (pages.len() > 1).then(|| block_digest(&bytes));
            prop_assert!(page_digests(size, &bytes).eq(pages.iter().copied()));
            prop_assert_eq!(block_digest_from_pages(&pages, length), expected);
            prop_assert_eq!(block_digest_from_pages(&pages[1..], length), None);
        }

        #[test]
        fn zero_means_no_byte_is_set(
            length in 0_usize..5000, set in vec((0_usize..5000, 1_u8..), 0..3),
        ) {
            let mut bytes = vec![0; length];
            for (at, value) in set {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }

            prop_assert_eq!(is_zero(&bytes), bytes.iter().all(|&b| b == 0));
        }
    }

    #[test]
    fn a_single_set_bit_anywhere_is_seen() {
        let mut bytes = vec![0; 2051];
        for at in 0..bytes.len() {
            bytes[at] = 1 << (at % 8);
            assert!(!is_zero(&bytes), "{at}");
            assert!(is_zero(&bytes[at + 1..]) && is_zero(&bytes[..at]));
            bytes[at] = 0;
        }
    }
}
