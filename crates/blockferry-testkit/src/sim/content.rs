//! The bytes of one simulated file or device: copy-on-write pages, so that a crash image costs what it
//! changes and not what it holds.
//!
//! Invariant: bytes past `size` are zero, so growing exposes zeros.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use crate::random::{count, index, mix};

/// Unit of loss at a power failure, in bytes.
pub(crate) const SECTOR_BYTES: usize = 512;
pub(crate) const SECTOR: u64 = 512;
/// Unit of allocation and sharing, in bytes.
pub(crate) const PAGE_BYTES: usize = 4096;
pub(crate) const PAGE: u64 = 4096;

static ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

#[derive(Debug)]
struct Page {
    bytes: [u8; PAGE_BYTES],
    hash: OnceLock<u64>,
}

impl Clone for Page {
    fn clone(&self) -> Self {
        Self {
            bytes: self.bytes,
            hash: OnceLock::new(),
        }
    }
}

impl Page {
    fn hash(&self) -> u64 {
        *self.hash.get_or_init(|| hash_bytes(&self.bytes))
    }
}

fn zero_page() -> Arc<Page> {
    static PAGE: OnceLock<Arc<Page>> = OnceLock::new();
    Arc::clone(PAGE.get_or_init(|| {
        Arc::new(Page {
            bytes: ZEROS,
            hash: OnceLock::new(),
        })
    }))
}

/// A fast 64-bit hash for telling images apart; not for hostile input.
pub(crate) fn hash_bytes(bytes: &[u8]) -> u64 {
    const FACTOR: u64 = 0x9FB2_1C65_1E98_DF25;
    let mut lanes = [1_u64, 2, 3, 4];
    let (pieces, rest) = bytes.as_chunks::<32>();
    for piece in pieces {
        for (lane, word) in lanes.iter_mut().zip(piece.as_chunks::<8>().0) {
            *lane = (*lane ^ u64::from_le_bytes(*word))
                .wrapping_mul(FACTOR)
                .rotate_left(29);
        }
    }
    let tail = rest
        .iter()
        .fold(count(bytes.len()), |h, byte| mix(h ^ u64::from(*byte)));
    lanes
        .into_iter()
        .fold(tail, |hash, lane| mix(hash.wrapping_add(lane)))
}

#[derive(Clone, Debug)]
pub(crate) struct Content {
    size: u64,
    /// `None` is a hole. May reach past the size (space reserved beyond the end).
    pages: Arc<Vec<Option<Arc<Page>>>>,
    /// Sectors that cannot be read until they are written again.
    bad: Arc<BTreeSet<u64>>,
}

impl Content {
    pub(crate) fn holes(size: u64) -> Self {
        let pages = vec![None; index(size.div_ceil(PAGE))];
        Self {
            size,
            pages: Arc::new(pages),
            bad: Arc::default(),
        }
    }

    /// All pages allocated, or only those that hold something but zeros.
    pub(crate) fn from_bytes(bytes: &[u8], sparse: bool) -> Self {
        let mut content = Self::holes(count(bytes.len()));
        for (number, piece) in bytes.chunks(PAGE_BYTES).enumerate() {
            if piece == &ZEROS[..piece.len()] {
                if !sparse {
                    content.allocate(count(number));
                }
            } else {
                content.write(count(number) * PAGE, piece);
            }
        }
        content
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn allocated_bytes(&self) -> u64 {
        count(self.pages.iter().flatten().count()) * PAGE
    }

    pub(crate) fn is_allocated(&self, page: u64) -> bool {
        self.pages.get(index(page)).is_some_and(Option::is_some)
    }

    pub(crate) fn page_count(&self) -> u64 {
        count(self.pages.len())
    }

    /// The first unreadable sector that `length` bytes at `offset` touch.
    pub(crate) fn first_bad(&self, offset: u64, length: u64) -> Option<u64> {
        if self.bad.is_empty() || length == 0 {
            return None;
        }
        self.bad
            .range(offset / SECTOR..(offset + length).div_ceil(SECTOR))
            .next()
            .copied()
    }

    /// Ignores unreadable sectors: the caller asks [`Self::first_bad`] where they matter.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) {
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let start = index(at % PAGE);
            let (piece, after) = rest.split_at_mut(rest.len().min(PAGE_BYTES - start));
            let page = self.page_bytes(at / PAGE);
            piece.copy_from_slice(&page[start..start + piece.len()]);
            at += count(piece.len());
            rest = after;
        }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; index(self.size)];
        self.read(0, &mut bytes);
        bytes
    }

    pub(crate) fn sector(&self, sector: u64) -> &[u8] {
        let start = index(sector * SECTOR % PAGE);
        &self.page_bytes(sector * SECTOR / PAGE)[start..start + SECTOR_BYTES]
    }

    fn page_bytes(&self, page: u64) -> &[u8; PAGE_BYTES] {
        match self.pages.get(index(page)) {
            Some(Some(page)) => &page.bytes,
            _ => &ZEROS,
        }
    }

    /// Writes and grows; touched pages become allocated, touched sectors readable.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + count(bytes.len());
        self.size = self.size.max(end);
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let start = index(at % PAGE);
            let (piece, after) = rest.split_at(rest.len().min(PAGE_BYTES - start));
            self.page_mut(at / PAGE)[start..start + piece.len()].copy_from_slice(piece);
            at += count(piece.len());
            rest = after;
        }
        self.heal(offset / SECTOR, end.div_ceil(SECTOR));
    }

    /// Replaces one whole sector without growing; what lies past the size stays zero.
    pub(crate) fn set_sector(&mut self, sector: u64, bytes: &[u8]) {
        let offset = sector * SECTOR;
        let length = SECTOR.min(self.size.saturating_sub(offset));
        if length > 0 {
            self.write(offset, &bytes[..index(length)]);
        }
    }

    /// Zeros, without allocating holes.
    pub(crate) fn zero(&mut self, offset: u64, length: u64) {
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let page_end = (at / PAGE + 1) * PAGE;
            let piece_end = page_end.min(end);
            if self.is_allocated(at / PAGE) {
                let start = index(at % PAGE);
                let stop = start + index(piece_end - at);
                self.page_mut(at / PAGE)[start..stop].fill(0);
            }
            at = piece_end;
        }
        self.heal(offset.div_ceil(SECTOR), end / SECTOR);
    }

    pub(crate) fn allocate(&mut self, page: u64) {
        self.extend_pages(page);
        let slot = &mut Arc::make_mut(&mut self.pages)[index(page)];
        slot.get_or_insert_with(zero_page);
    }

    /// Gives a page back if nothing but zeros is in it.
    pub(crate) fn deallocate_if_zero(&mut self, page: u64) {
        if self.is_allocated(page) && self.page_bytes(page) == &ZEROS {
            Arc::make_mut(&mut self.pages)[index(page)] = None;
        }
    }

    pub(crate) fn set_size(&mut self, size: u64) {
        if size < self.size {
            self.zero(size, self.size - size);
            Arc::make_mut(&mut self.pages).truncate(index(size.div_ceil(PAGE)));
            self.heal(size.div_ceil(SECTOR), u64::MAX);
        }
        self.size = size;
        if let Some(last) = size.div_ceil(PAGE).checked_sub(1) {
            self.extend_pages(last);
        }
    }

    pub(crate) fn spoil(&mut self, sector: u64) {
        if sector * SECTOR < self.size {
            Arc::make_mut(&mut self.bad).insert(sector);
        }
    }

    fn heal(&mut self, first_sector: u64, end_sector: u64) {
        if first_sector < end_sector && self.bad.range(first_sector..end_sector).next().is_some() {
            let bad = Arc::make_mut(&mut self.bad);
            bad.retain(|sector| !(first_sector..end_sector).contains(sector));
        }
    }

    fn extend_pages(&mut self, page: u64) {
        if self.page_count() <= page {
            Arc::make_mut(&mut self.pages).resize(index(page) + 1, None);
        }
    }

    fn page_mut(&mut self, page: u64) -> &mut [u8; PAGE_BYTES] {
        self.extend_pages(page);
        let slot = &mut Arc::make_mut(&mut self.pages)[index(page)];
        let page = Arc::make_mut(slot.get_or_insert_with(zero_page));
        page.hash = OnceLock::new();
        &mut page.bytes
    }

    /// Equal for equal size, bytes, allocation and unreadable sectors.
    pub(crate) fn fingerprint(&self) -> u64 {
        let pages = self.pages.iter().enumerate().filter_map(|(number, page)| {
            page.as_ref()
                .map(|page| mix(page.hash() ^ mix(count(number) + 1)))
        });
        let bad = self.bad.iter().map(|sector| mix(!sector));
        pages.chain(bad).fold(mix(self.size), u64::wrapping_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Random;

    #[test]
    fn content_equals_a_plain_vector_under_random_changes() {
        for seed in 0..200 {
            let mut random = Random::new(seed);
            let mut content = Content::holes(0);
            let mut oracle: Vec<u8> = Vec::new();
            for _ in 0..30 {
                change_both(&mut random, &mut content, &mut oracle);

                assert_eq!(content.to_bytes(), oracle, "seed {seed}");
            }
            let rebuilt = Content::from_bytes(&oracle, true);
            assert_eq!(rebuilt.to_bytes(), oracle, "seed {seed}");
        }
    }

    fn change_both(random: &mut Random, content: &mut Content, oracle: &mut Vec<u8>) {
        let offset = random.below(20_000);
        let length = random.below(6_000);
        let end = index(offset + length);
        match random.below(3) {
            0 => {
                let mut bytes = vec![0; index(length)];
                random.fill(&mut bytes);
                content.write(offset, &bytes);
                oracle.resize(oracle.len().max(end), 0);
                oracle[index(offset)..end].copy_from_slice(&bytes);
            }
            1 => {
                let end = end.min(oracle.len());
                let start = index(offset).min(end);
                content.zero(count(start), count(end - start));
                oracle[start..end].fill(0);
            }
            _ => {
                content.set_size(offset);
                oracle.resize(index(offset), 0);
            }
        }
    }

    #[test]
    fn an_unreadable_sector_heals_only_by_writing_it() {
        let mut content = Content::from_bytes(&[7; 4096], false);
        content.spoil(3);

        assert_eq!(content.first_bad(0, 4096), Some(3));
        assert_eq!(content.first_bad(0, 1536), None);
        content.write(1536, &[1; 512]);
        assert_eq!(content.first_bad(0, 4096), None);
    }

    #[test]
    fn fingerprints_tell_bytes_size_holes_and_damage_apart() {
        let base = Content::from_bytes(&[7; 8192], false);
        let mut variants = vec![base; 5];
        variants[1].write(5000, &[8]);
        variants[2].set_size(8000);
        variants[3].spoil(2);
        variants[4].set_size(12_288);
        variants[4].allocate(2);
        let mut twin = variants[1].clone();
        twin.write(0, &[7; 100]);

        let distinct: BTreeSet<u64> = variants.iter().map(Content::fingerprint).collect();

        assert_eq!(distinct.len(), variants.len());
        assert_eq!(twin.fingerprint(), variants[1].fingerprint());
    }
}
