//! What of a file the page cache holds, without bringing anything into it.
//!
//! Reading with `RWF_NOWAIT` would tell too, but it starts readahead for what it does not find. cachestat(2),
//! since Linux 6.5, only looks.

use std::fs::File;
use std::io;
use std::ops::Range;

use crate::sys;

/// Ranges of at most this many bytes count as cached only if they are so completely.
const GRAIN_BYTES: u64 = 64 << 10;

/// A run of a file that is to be read one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) range: Range<u64>,
    pub(crate) cached: bool,
}

/// Splits `range` into runs that the cache holds and runs that it does not, within the accuracy of the
/// grain. `None` if the kernel does not tell.
pub(crate) fn runs(file: &File, range: Range<u64>) -> Option<Vec<Run>> {
    let page_bytes = rustix::param::page_size() as u64;
    let mut runs = Vec::new();
    let mut ask = |part: &Range<u64>| sys::cached_pages(file, part.start, part.end - part.start);
    split(range, page_bytes, &mut ask, &mut runs).ok()?;
    Some(runs)
}

fn split(
    range: Range<u64>,
    page_bytes: u64,
    cached_pages: &mut impl FnMut(&Range<u64>) -> io::Result<u64>,
    runs: &mut Vec<Run>,
) -> io::Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    let pages = (range.end - 1) / page_bytes - range.start / page_bytes + 1;
    let cached = cached_pages(&range)?;
    if cached == 0 || cached >= pages || range.end - range.start <= GRAIN_BYTES {
        push(runs, range, cached >= pages);
        return Ok(());
    }
    // Halves begin at whole grains, so that what is read past the cache is aligned. A range longer than a
    // grain has such a place inside, at the latest one grain behind its start.
    let middle = range.start.midpoint(range.end) / GRAIN_BYTES * GRAIN_BYTES;
    let middle = middle.max((range.start + 1).next_multiple_of(GRAIN_BYTES));
    split(range.start..middle, page_bytes, cached_pages, runs)?;
    split(middle..range.end, page_bytes, cached_pages, runs)
}

fn push(runs: &mut Vec<Run>, range: Range<u64>, cached: bool) {
    match runs.last_mut() {
        Some(last) if last.cached == cached => last.range.end = range.end,
        _ => runs.push(Run { range, cached }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_cover_the_range_and_are_cached_only_if_every_page_is(
            start in 0u64..300_000,
            length in 1u64..2_000_000,
            changes in prop::collection::btree_set(0u64..600, 0..6),
            first_cached: bool,
        ) {
            let is_cached =
                |page: u64| (changes.range(..=page).count() % 2 == 0) == first_cached;
            let pages_of = |range: &Range<u64>| range.start / 4096..range.end.div_ceil(4096);
            let mut ask = |range: &Range<u64>| {
                Ok(pages_of(range).filter(|&page| is_cached(page)).count() as u64)
            };
            let mut runs = Vec::new();

            split(start..start + length, 4096, &mut ask, &mut runs).unwrap();

            prop_assert_eq!(runs[0].range.start, start);
            prop_assert_eq!(runs[runs.len() - 1].range.end, start + length);
            for pair in runs.windows(2) {
                prop_assert_eq!(pair[0].range.end, pair[1].range.start);
                prop_assert_ne!(pair[0].cached, pair[1].cached);
            }
            for run in runs {
                let mut pages = pages_of(&run.range);
                prop_assert!(!run.cached || pages.all(is_cached));
                // What is cached but read past the cache is near something that is not.
                for page in pages_of(&run.range).filter(|&page| !run.cached && is_cached(page)) {
                    let near = page.saturating_sub(32)..page + 32;
                    prop_assert!(near.clone().any(|page| !is_cached(page)), "{}", page);
                }
            }
        }
    }

    #[test]
    fn a_range_that_is_all_or_nothing_costs_one_question() {
        for cached in [0, 256] {
            let mut questions = 0;
            let mut runs = Vec::new();
            let mut ask = |_: &Range<u64>| {
                questions += 1;
                Ok(cached)
            };

            split(0..1 << 20, 4096, &mut ask, &mut runs).unwrap();

            assert_eq!(questions, 1);
            assert_eq!(
                runs,
                [Run {
                    range: 0..1 << 20,
                    cached: cached > 0
                }]
            );
        }
    }
}
