//! The live index: for every staged byte, the latest record that holds it.

use std::collections::BTreeMap;
use std::ops::Range;

use blockferry_core::{Extent, ExtentSet};

use crate::format::{BatchExtent, NewContent, OldContent, PAGE, RecordHeader, usize_of};

/// A run of staged bytes that lie together in one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) extent: Extent,
    /// Index of the record in the session's list.
    pub(crate) record: u32,
    pub(crate) content: RunContent,
}

/// What a run holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RunContent {
    /// Bytes, from this offset of the record's plain new payload.
    Data {
        payload: u32,
    },
    Zero,
}

/// How one side of a record holds an extent.
enum Held {
    /// In its payload.
    Pages,
    Zero,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    end: u64,
    record: u32,
    content: RunContent,
}

/// Later runs win over earlier ones. Memory: about 50 bytes for each run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Index {
    // Invariant: entries are disjoint; the key is the start.
    entries: BTreeMap<u64, Entry>,
}

impl Index {
    /// Takes a record in; what it holds replaces what was there.
    pub(crate) fn insert_record(&mut self, record: u32, header: &RecordHeader) {
        self.insert_side(record, header, |entry| match entry.new {
            NewContent::Data => Some(Held::Pages),
            NewContent::Zero => Some(Held::Zero),
            NewContent::None | NewContent::Reserve => None,
        });
    }

    /// Takes in what a record holds of the old point instead.
    pub(crate) fn insert_pre_images(&mut self, record: u32, header: &RecordHeader) {
        self.insert_side(record, header, |entry| match entry.old {
            OldContent::Data => Some(Held::Pages),
            OldContent::Zero => Some(Held::Zero),
            OldContent::None => None,
        });
    }

    fn insert_side(
        &mut self,
        record: u32,
        header: &RecordHeader,
        held: impl Fn(&BatchExtent) -> Option<Held>,
    ) {
        let mut payload = 0u64;
        for entry in &header.extents {
            match held(entry) {
                Some(Held::Pages) => {
                    let content = RunContent::Data {
                        payload: narrow(payload),
                    };
                    self.insert(entry.extent, record, content);
                    payload += entry.extent.length().next_multiple_of(PAGE as u64);
                }
                Some(Held::Zero) => self.insert(entry.extent, record, RunContent::Zero),
                None => {}
            }
        }
    }

    pub(crate) fn insert(&mut self, extent: Extent, record: u32, content: RunContent) {
        self.remove(extent);
        self.entries.insert(
            extent.start(),
            Entry {
                end: extent.end(),
                record,
                content,
            },
        );
    }

    /// Forgets what is staged in `extent`.
    pub(crate) fn remove(&mut self, extent: Extent) {
        let overlapping: Vec<(u64, Entry)> = self.overlapping(extent).collect();
        for (start, entry) in overlapping {
            self.entries.remove(&start);
            if start < extent.start() {
                self.entries.insert(
                    start,
                    Entry {
                        end: extent.start(),
                        ..entry
                    },
                );
            }
            if entry.end > extent.end() {
                let content = advance(entry.content, extent.end() - start);
                self.entries
                    .insert(extent.end(), Entry { content, ..entry });
            }
        }
    }

    /// Forgets everything that lies in one record, and says what that was.
    pub(crate) fn remove_record(&mut self, record: u32) -> ExtentSet {
        let lost: ExtentSet = self
            .runs()
            .filter(|r| r.record == record)
            .map(|r| r.extent)
            .collect();
        self.entries.retain(|_, e| e.record != record);
        lost
    }

    /// All runs, ascending.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.entries.iter().map(|(start, e)| run(*start, e))
    }

    /// The runs that overlap `extent`, cut to it, ascending.
    pub(crate) fn within(&self, extent: Extent) -> impl Iterator<Item = Run> + '_ {
        self.overlapping(extent).map(move |(start, entry)| {
            let from = start.max(extent.start());
            let content = advance(entry.content, from - start);
            let extent = Extent::from_range(from..entry.end.min(extent.end()));
            Run {
                extent,
                record: entry.record,
                content,
            }
        })
    }

    /// Bytes of staged data (zeros not counted).
    pub(crate) fn data_bytes(&self) -> u64 {
        self.runs()
            .filter(|r| matches!(r.content, RunContent::Data { .. }))
            .map(|r| r.extent.length())
            .sum()
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    fn overlapping(&self, extent: Extent) -> impl Iterator<Item = (u64, Entry)> + '_ {
        let before = self.entries.range(..extent.start()).next_back();
        let first = before.filter(|(_, e)| e.end > extent.start());
        let rest: Range<u64> = extent.range();
        first
            .into_iter()
            .chain(self.entries.range(rest))
            .map(|(s, e)| (*s, *e))
    }
}

fn run(start: u64, entry: &Entry) -> Run {
    let extent = Extent::from_range(start..entry.end);
    Run {
        extent,
        record: entry.record,
        content: entry.content,
    }
}

fn advance(content: RunContent, by: u64) -> RunContent {
    match content {
        RunContent::Data { payload } => RunContent::Data {
            payload: payload + narrow(by),
        },
        RunContent::Zero => RunContent::Zero,
    }
}

fn narrow(bytes: u64) -> u32 {
    u32::try_from(bytes)
        .unwrap_or_else(|_| unreachable!("{} bytes: a record is smaller", usize_of(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 24;

    #[derive(Clone, Debug)]
    enum Change {
        Data(u64, u64),
        Zero(u64, u64),
        Remove(u64, u64),
        RemoveRecord(u32),
    }

    fn change() -> impl Strategy<Value = Change> {
        let extent = || (0..PAGES, 1..6u64);
        prop_oneof![
            4 => extent().prop_map(|(s, l)| Change::Data(s, l)),
            2 => extent().prop_map(|(s, l)| Change::Zero(s, l)),
            1 => extent().prop_map(|(s, l)| Change::Remove(s, l)),
            1 => (0..12u32).prop_map(Change::RemoveRecord),
        ]
    }

    fn extent(start: u64, pages: u64) -> Extent {
        Extent::from_range(start * 4096..(start + pages) * 4096)
    }

    proptest! {
        #[test]
        fn the_index_equals_one_entry_for_each_page(
            changes in prop::collection::vec(change(), 0..12),
            from in 0..PAGES, pages in 1..8u64,
        ) {
            let mut index = Index::default();
            // For each page the record, and the offset of its payload where it has one.
            let mut oracle: BTreeMap<u64, (u32, Option<u32>)> = BTreeMap::new();
            for (change, record) in changes.into_iter().zip(0u32..) {
                match change {
                    Change::Data(s, l) => {
                        index.insert(extent(s, l), record, RunContent::Data { payload: 0 });
                        oracle.extend((s..s + l).zip((0u32..).step_by(PAGE)).map(|(p, o)| (p, (record, Some(o)))));
                    }
                    Change::Zero(s, l) => {
                        index.insert(extent(s, l), record, RunContent::Zero);
                        oracle.extend((s..s + l).map(|p| (p, (record, None))));
                    }
                    Change::Remove(s, l) => {
                        index.remove(extent(s, l));
                        oracle.retain(|p, _| !(s..s + l).contains(p));
                    }
                    Change::RemoveRecord(record) => {
                        index.remove_record(record);
                        oracle.retain(|_, (r, _)| *r != record);
                    }
                }
            }

            let by_page = |runs: Vec<Run>| -> BTreeMap<u64, (u32, Option<u32>)> {
                runs.iter().flat_map(|run| {
                    let first = run.extent.start() / 4096;
                    (first..run.extent.end() / 4096).map(|page| {
                        let content = advance(run.content, (page - first) * 4096);
                        let payload = match content {
                            RunContent::Data { payload } => Some(payload),
                            RunContent::Zero => None,
                        };
                        (page, (run.record, payload))
                    }).collect::<Vec<_>>()
                }).collect()
            };
            prop_assert!(index.runs().all(|run| !run.extent.is_empty()), "no empty runs");
            prop_assert_eq!(by_page(index.runs().collect()), oracle.clone());
            let window = extent(from, pages);
            oracle.retain(|p, _| window.contains(p * 4096));
            prop_assert_eq!(by_page(index.within(window).collect()), oracle);
        }
    }
}
