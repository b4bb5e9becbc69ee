//! Disk images from one seed: noise, sparse images, edits, and real file systems with files in them.
//!
//! The same seed and size give the same bytes, except for what `mke2fs` puts into its metadata.

mod content;
mod fat;
mod filesystem;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

pub use filesystem::{FileSystem, edit_filesystem_image, filesystem_image, filesystem_image_of};

use crate::Random;
use crate::random::{count, index};

const PAGE_BYTES: u64 = 4096;

/// `bytes` of noise.
#[must_use]
pub fn random_image(seed: u64, bytes: u64) -> Vec<u8> {
    let mut image = vec![0; index(bytes)];
    Random::new(seed).fill(&mut image);
    image
}

/// An image of zeros with runs of 4 to 64 KiB of noise that make up about `data_fraction` of it.
#[must_use]
pub fn sparse_image(seed: u64, bytes: u64, data_fraction: f64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut image = vec![0; index(bytes)];
    let mut rest = image.as_mut_slice();
    while !rest.is_empty() {
        let run = index((1 + random.below(16)) * PAGE_BYTES).min(rest.len());
        let (piece, after) = rest.split_at_mut(run);
        if chance(&mut random, data_fraction) {
            random.fill(piece);
        }
        rest = after;
    }
    image
}

/// Changes about `fraction` of the 4 KiB pages, each in some bytes or all, and returns their numbers.
pub fn edit_image(seed: u64, image: &mut [u8], fraction: f64) -> Vec<u64> {
    let mut random = Random::new(seed);
    let mut edited = Vec::new();
    for (number, page) in image.chunks_mut(index(PAGE_BYTES)).enumerate() {
        if !chance(&mut random, fraction) {
            continue;
        }
        let start = index(random.below(count(page.len())));
        let whole = random.chance(1, 2);
        random.fill(if whole {
            &mut *page
        } else {
            &mut page[start..=start]
        });
        // Noise may repeat what was there, so one byte changes for certain.
        page[start] = page[start].wrapping_add(1 + u8::from(page[start] == u8::MAX));
        edited.push(count(number));
    }
    edited
}

/// True with this probability, in steps of a millionth.
fn chance(random: &mut Random, probability: f64) -> bool {
    #[expect(
        clippy::cast_precision_loss,
        reason = "below a million every integer is exact"
    )]
    let drawn = random.below(1_000_000) as f64;
    drawn < probability * 1e6
}

/// Bytes of one run of data in a sparse file.
const RUN_BYTES: u64 = 256 * 1024;

/// Writes a sparse file of `size` bytes with about `data_bytes` of noise, spread over it in runs of 256 KiB.
///
/// # Errors
/// The file cannot be made or written.
pub fn write_sparse_file(path: &Path, seed: u64, size: u64, data_bytes: u64) -> io::Result<()> {
    let file = File::create(path)?;
    file.set_len(size)?;
    let runs = data_bytes.min(size).div_ceil(RUN_BYTES);
    let mut random = Random::new(seed);
    let mut noise = vec![0; index(RUN_BYTES)];
    for run in 0..runs {
        // One run in each of equal stretches, so that runs never meet in memory-hungry lists.
        let stretch = size / runs / PAGE_BYTES;
        let slack = stretch.saturating_sub(RUN_BYTES / PAGE_BYTES);
        let offset = (run * stretch + random.below(slack + 1)) * PAGE_BYTES;
        let length = RUN_BYTES
            .min(data_bytes - run * RUN_BYTES)
            .min(size - offset);
        let piece = &mut noise[..index(length)];
        random.fill(piece);
        file.write_all_at(piece, offset)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_sparse_image_has_about_the_data_it_was_asked_for() {
        let image = sparse_image(3, 4 << 20, 0.25);

        let zero_pages = image
            .chunks(4096)
            .filter(|page| page.iter().all(|b| *b == 0))
            .count();
        assert!(
            (600..940).contains(&zero_pages),
            "{zero_pages} of 1024 pages are zero"
        );
    }

    #[test]
    fn an_edit_changes_exactly_the_pages_it_names() {
        for seed in 0..20 {
            let old = sparse_image(seed, 1_000_001, 0.5);
            let mut new = old.clone();

            let edited = edit_image(seed, &mut new, 0.1);

            let differing: Vec<u64> = (0..count(old.len()).div_ceil(PAGE_BYTES))
                .filter(|page| {
                    let start = index(page * PAGE_BYTES);
                    let end = (start + 4096).min(old.len());
                    old[start..end] != new[start..end]
                })
                .collect();
            assert_eq!(edited, differing, "seed {seed}");
            assert!((5..60).contains(&edited.len()), "seed {seed}");
        }
    }

    #[test]
    fn a_sparse_file_costs_what_its_data_costs() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sparse");

        write_sparse_file(&path, 5, 1 << 40, 3_000_000).unwrap();

        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), 1 << 40);
        assert!((2_900_000..4_000_000).contains(&(metadata.blocks() * 512)));
    }
}
