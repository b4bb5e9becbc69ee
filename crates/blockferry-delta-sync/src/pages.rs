//! Inside a block that differs: runs of pages that differ, by what they become and what they were.

use blockferry_core::{Extent, PAGE_BYTES, is_zero};

/// A run of neighbouring pages that differ in the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageRun {
    /// Where, in bytes of the image.
    pub extent: Extent,
    /// All of it becomes zeros.
    pub to_zero: bool,
    /// All of it was zeros.
    pub from_zero: bool,
}

/// The runs of pages of `extent` in which `new` differs from `old`, ascending. `extent` starts at a page; its
/// last page may be short.
pub fn differing_runs(extent: Extent, new: &[u8], old: &[u8], mut found: impl FnMut(PageRun)) {
    let page = page_bytes();
    let pages = new
        .chunks(page)
        .zip(old.chunks(page))
        .zip((extent.start()..).step_by(page));
    let mut open: Option<PageRun> = None;
    for ((new, old), start) in pages {
        if new == old {
            open.take().into_iter().for_each(&mut found);
            continue;
        }
        let here = PageRun {
            extent: Extent::from_range(start..start + new.len() as u64),
            to_zero: is_zero(new),
            from_zero: is_zero(old),
        };
        open = match open {
            Some(run) if run.to_zero == here.to_zero && run.from_zero == here.from_zero => {
                let extent = Extent::from_range(run.extent.start()..here.extent.end());
                Some(PageRun { extent, ..run })
            }
            other => {
                other.into_iter().for_each(&mut found);
                Some(here)
            }
        };
    }
    open.into_iter().for_each(&mut found);
}

fn page_bytes() -> usize {
    usize::try_from(PAGE_BYTES).unwrap_or_else(|_| unreachable!("4096 fits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_pages_that_change_in_the_same_way_only() {
        let mut old = vec![1u8; 8 * 4096 - 100];
        let mut new = old.clone();
        new[4096] = 2;
        new[2 * 4096] = 2;
        new[3 * 4096..4 * 4096].fill(0);
        old[5 * 4096..6 * 4096].fill(0);
        new[8 * 4096 - 101] = 9;
        let extent = Extent::from_range(65_536..65_536 + new.len() as u64);

        let mut runs = Vec::new();
        differing_runs(extent, &new, &old, |r| {
            runs.push((
                (r.extent.start() - 65_536) / 4096,
                r.extent.length(),
                r.to_zero,
                r.from_zero,
            ));
        });

        let expected = vec![
            (1, 8192, false, false),
            (3, 4096, true, false),
            (5, 4096, false, true),
            (7, 4096 - 100, false, false),
        ];
        assert_eq!(runs, expected);
    }
}
