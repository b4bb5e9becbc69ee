//! Content of generated files. Each 4 KiB block begins with a header that names it as file data, so that an
//! edit finds file data in a finished image without understanding the file system.

use crate::Random;
use crate::random::{count, index};

pub(super) const BLOCK_BYTES: usize = 4096;
pub(super) const HEADER_BYTES: usize = 32;
const MAGIC: &[u8; 16] = b"generated data \n";

/// Sizes of the files that fill `capacity` bytes, at most `max_files`, from 1 KiB to a sixteenth of it.
pub(super) fn file_sizes(seed: u64, capacity: u64, max_files: usize) -> Vec<u64> {
    let mut random = Random::part(seed, 1);
    let mut sizes = Vec::new();
    let mut left = capacity;
    let doublings = (capacity / 16 / 1024).max(2).ilog2();
    while left > 4096 && sizes.len() < max_files {
        let base = 1024 << random.below(doublings.into());
        let size = (base + random.below(base)).min(left);
        sizes.push(size);
        left = left.saturating_sub(size.next_multiple_of(count(BLOCK_BYTES)));
    }
    sizes
}

/// The bytes of one block of file `file`: `length` up to 4,096, the last block of a file may be short.
pub(super) fn block(seed: u64, file: u64, number: u64, length: usize) -> Vec<u8> {
    let mut random = Random::part(seed ^ (file << 32), number);
    let mut block = vec![0; length];
    if file.is_multiple_of(2) {
        random.fill(&mut block);
    } else {
        fill_with_words(&mut random, &mut block);
    }
    if length >= HEADER_BYTES {
        block[..16].copy_from_slice(MAGIC);
        block[16..24].copy_from_slice(&count(length).to_le_bytes());
        block[24..32].copy_from_slice(&file.to_le_bytes());
    }
    block
}

fn fill_with_words(random: &mut Random, bytes: &mut [u8]) {
    const WORDS: [&[u8]; 8] = [
        b"source ",
        b"target ",
        b"replica ",
        b"page ",
        b"extent ",
        b"root ",
        b"pass ",
        b"point\n",
    ];
    let mut at = 0;
    while at < bytes.len() {
        let word = WORDS[index(random.below(8))];
        let length = word.len().min(bytes.len() - at);
        bytes[at..at + length].copy_from_slice(&word[..length]);
        at += length;
    }
}

/// How many bytes of file data a 4 KiB block of an image holds, header included; `None` if it is none of ours.
pub(super) fn data_bytes(block: &[u8]) -> Option<usize> {
    let rest = block.strip_prefix(MAGIC)?;
    let length = u64::from_le_bytes(*rest.first_chunk()?);
    usize::try_from(length)
        .ok()
        .filter(|length| (HEADER_BYTES..=block.len()).contains(length))
}
