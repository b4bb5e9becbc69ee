//! End-to-end benches of blockferry: what they share.
//!
//! Each file of `benches/` is one subject. Throughput counts the bytes of the image, so the figures can be put
//! beside the hardware's: reading the page cache, comparing memory, hashing. The race against other tools on
//! real images is the script `benches/peers`.

mod place;
mod shaped;

pub use place::Place;
pub use shaped::Wire;

/// One region at the default block size: what a worker holds at a time, larger than a processor's caches
/// close by.
pub const REGION_BYTES: usize = 16 << 20;

/// Bytes without a pattern, the same for the same seed. Digests and comparisons do not depend on content, so
/// nothing better than xorshift is needed.
#[must_use]
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A copy in which every `stride`-th page of 4 KiB differs by one byte.
#[must_use]
pub fn with_changed_pages(bytes: &[u8], stride: usize) -> Vec<u8> {
    let mut changed = bytes.to_vec();
    for page in changed.chunks_mut(4096).step_by(stride) {
        page[0] ^= 1;
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_repeats_for_a_seed_and_differs_between_seeds() {
        assert_eq!(noise(7, 1001), noise(7, 1001));
        assert_ne!(noise(7, 1001), noise(9, 1001));
        assert_eq!(noise(7, 1001).len(), 1001);
    }

    #[test]
    fn every_stride_th_page_differs() {
        let old = noise(1, 10 * 4096);

        let new = with_changed_pages(&old, 5);

        let differing = old
            .chunks(4096)
            .zip(new.chunks(4096))
            .filter(|(a, b)| a != b)
            .count();
        assert_eq!(differing, 2);
    }
}
