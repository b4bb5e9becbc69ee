//! Extent sets against a plain array of flags, at both ends of what 64 bits can name.
#![no_main]

use arbitrary::Arbitrary;
use blockferry::core::{Extent, ExtentSet};
use libfuzzer_sys::fuzz_target;

/// Cells of the oracle.
const CELLS: usize = 64;

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Cells {
    start: u8,
    length: u8,
}

#[derive(Arbitrary, Debug)]
enum Change {
    Insert(Cells),
    Remove(Cells),
    Clear,
    /// Goes on with the union, the intersection or the difference with the other set.
    Union,
    Intersection,
    Difference,
    /// The other set is changed from here on.
    Swap,
}

#[derive(Arbitrary, Debug)]
struct Input {
    /// Bytes of a cell, as a power of two.
    shift: u8,
    /// Whether the cells lie at the end of what can be named.
    at_the_end: bool,
    changes: Vec<Change>,
    window: Cells,
}

/// Where the cells lie.
struct Scale {
    cell_bytes: u64,
    base: u64,
}

impl Scale {
    fn range(&self, cells: Cells) -> (usize, usize) {
        let start = usize::from(cells.start) % CELLS;
        let end = start + usize::from(cells.length) % (CELLS - start + 1);
        let _ = self;
        (start, end)
    }

    fn extent(&self, (start, end): (usize, usize)) -> Extent {
        let at = |cell: usize| self.base + cell as u64 * self.cell_bytes;
        Extent::from_range(at(start)..at(end))
    }
}

fuzz_target!(|input: Input| {
    let cell_bytes = 1_u64 << (input.shift % 57);
    let base = if input.at_the_end {
        u64::MAX - CELLS as u64 * cell_bytes
    } else {
        0
    };
    let scale = Scale { cell_bytes, base };
    let (mut set, mut other) = (ExtentSet::new(), ExtentSet::new());
    let (mut cells, mut others) = ([false; CELLS], [false; CELLS]);
    for change in &input.changes {
        match change {
            Change::Insert(range) => {
                let (start, end) = scale.range(*range);
                set.insert(scale.extent((start, end)));
                cells[start..end].fill(true);
            }
            Change::Remove(range) => {
                let (start, end) = scale.range(*range);
                set.remove(scale.extent((start, end)));
                cells[start..end].fill(false);
            }
            Change::Clear => {
                set.clear();
                cells.fill(false);
            }
            Change::Union => {
                set = set.union(&other);
                merge(&mut cells, &others, |a, b| a || b);
            }
            Change::Intersection => {
                set = set.intersection(&other);
                merge(&mut cells, &others, |a, b| a && b);
            }
            Change::Difference => {
                set = set.difference(&other);
                merge(&mut cells, &others, |a, b| a && !b);
            }
            Change::Swap => {
                std::mem::swap(&mut set, &mut other);
                std::mem::swap(&mut cells, &mut others);
            }
        }
        check(&set, &cells, &scale, scale.range(input.window));
    }
});

fn merge(cells: &mut [bool; CELLS], others: &[bool; CELLS], rule: fn(bool, bool) -> bool) {
    for (cell, other) in cells.iter_mut().zip(others) {
        *cell = rule(*cell, *other);
    }
}

fn check(set: &ExtentSet, cells: &[bool; CELLS], scale: &Scale, window: (usize, usize)) {
    let runs = runs_of(cells, (0, CELLS), true);
    let as_extents = |runs: Vec<(usize, usize)>| -> Vec<Extent> {
        runs.into_iter().map(|r| scale.extent(r)).collect()
    };
    let expected = as_extents(runs);
    assert_eq!(set.iter().collect::<Vec<_>>(), expected);
    assert_eq!(
        (set.len(), set.is_empty()),
        (expected.len(), expected.is_empty())
    );
    let total: u64 = expected.iter().map(Extent::length).sum();
    assert_eq!(set.total_bytes(), total);
    let span = expected.first().zip(expected.last());
    assert_eq!(
        set.span(),
        span.map(|(first, last)| Extent::from_range(first.start()..last.end()))
    );
    assert_eq!(expected.iter().copied().collect::<ExtentSet>(), *set);
    let ranges: Vec<_> = expected.iter().map(Extent::range).collect();
    assert_eq!(
        format!("{set:?}"),
        format!("{ranges:?}").replace('[', "{").replace(']', "}")
    );

    let extent = scale.extent(window);
    let inside = &cells[window.0..window.1];
    assert_eq!(set.covers(extent), inside.iter().all(|c| *c));
    assert_eq!(set.overlaps(extent), inside.iter().any(|c| *c));
    assert_eq!(
        set.within(extent).collect::<Vec<_>>(),
        as_extents(runs_of(cells, window, true))
    );
    assert_eq!(
        set.gaps(extent).collect::<Vec<_>>(),
        as_extents(runs_of(cells, window, false))
    );
    for (cell, expected) in cells.iter().enumerate() {
        let one = scale.extent((cell, cell + 1));
        assert_eq!(set.contains(one.start()), *expected);
        assert_eq!(set.contains(one.end() - 1), *expected);
    }
}

/// Runs of cells with this value in a window.
fn runs_of(cells: &[bool], (start, end): (usize, usize), value: bool) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for cell in (start..end).filter(|cell| cells[*cell] == value) {
        match runs.last_mut() {
            Some((_, run_end)) if *run_end == cell => *run_end = cell + 1,
            _ => runs.push((cell, cell + 1)),
        }
    }
    runs
}
