//! Which pages were written: a bit for each, kept for regions in which there is one.

use std::collections::BTreeMap;
use std::ops::Range;

const WORDS: usize = 64;
/// 16 MiB.
const REGION_PAGES: u64 = 64 * WORDS as u64;

/// A set of page numbers.
#[derive(Debug, Default)]
pub(super) struct Presence {
    // Invariant: every region has a bit set.
    regions: BTreeMap<u64, Box<[u64; WORDS]>>,
}

impl Presence {
    pub(super) fn insert(&mut self, pages: Range<u64>) {
        let mut page = pages.start;
        while page < pages.end {
            let region = page / REGION_PAGES;
            let end = pages.end.min((region + 1) * REGION_PAGES);
            let words = self
                .regions
                .entry(region)
                .or_insert_with(|| Box::new([0; WORDS]));
            for page in page..end {
                words[word_of(page)] |= 1 << (page % 64);
            }
            page = end;
        }
    }

    /// Whether `page` is in the set, and the first page from there on of which the contrary holds; at most `end`.
    pub(super) fn run(&self, page: u64, end: u64) -> (bool, u64) {
        let is_in = self.word(page) >> (page % 64) & 1 == 1;
        let mut at = page;
        while at < end {
            let other = match is_in {
                true => !self.word(at),
                false => self.word(at),
            };
            let ahead = other >> (at % 64);
            if ahead != 0 {
                return (is_in, end.min(at + u64::from(ahead.trailing_zeros())));
            }
            at = self.next_word(at, is_in);
        }
        (is_in, end)
    }

    fn word(&self, page: u64) -> u64 {
        let region = self.regions.get(&(page / REGION_PAGES));
        region.map_or(0, |words| words[word_of(page)])
    }

    /// The first page of the next word; where the set is looked for, regions without any of it are passed over.
    fn next_word(&self, page: u64, is_in: bool) -> u64 {
        let region = page / REGION_PAGES;
        if is_in || self.regions.contains_key(&region) {
            return (page / 64 + 1) * 64;
        }
        let next = self.regions.range(region..).next();
        next.map_or(u64::MAX, |(region, _)| region * REGION_PAGES)
    }
}

fn word_of(page: u64) -> usize {
    usize::try_from(page % REGION_PAGES / 64).unwrap_or_else(|_| unreachable!("below {WORDS}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(page: u64) -> usize {
        usize::try_from(page).expect("a small number")
    }

    #[test]
    fn runs_are_those_of_a_set_of_numbers() {
        let mut presence = Presence::default();
        let end = 10 * REGION_PAGES + 7;
        let far = 8 * REGION_PAGES;
        let mut oracle = vec![false; index(end)];
        for (start, pages) in [
            (0, 1),
            (5, 3),
            (62, 4),
            (REGION_PAGES - 1, 2),
            (3 * REGION_PAGES, REGION_PAGES),
            (far, 130),
            (end - 1, 1),
        ] {
            presence.insert(start..start + pages);
            oracle[index(start)..index(start + pages)].fill(true);
        }

        let near = (0..200).chain(REGION_PAGES - 70..REGION_PAGES + 70);
        let rest = (REGION_PAGES..end).step_by(61);
        for page in near.chain(rest).chain(far - 5..far + 200) {
            let is_in = oracle[index(page)];
            let run = oracle[index(page)..]
                .iter()
                .take_while(|&&other| other == is_in);
            let expected = page + run.count() as u64;
            assert_eq!(presence.run(page, end), (is_in, expected), "page {page}");
        }
        assert_eq!(presence.run(end - 1, end), (true, end));
    }
}
