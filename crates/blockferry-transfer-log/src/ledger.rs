//! What the records of a session say, taken in one after the other.

use blockferry_core::{Extent, ExtentSet, PAGE_BYTES};

use crate::format::{NewContent, OldContent, RecordHeader};
use crate::index::Index;
use crate::log::RecordPlace;

/// A pre-image covers the page it ends in: what lies behind the old end is no content.
pub(crate) fn whole_pages(extent: Extent) -> Extent {
    Extent::from_range(extent.start()..extent.end().next_multiple_of(PAGE_BYTES))
}

/// The records of a session and what they add up to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ledger {
    pub(crate) places: Vec<RecordPlace>,
    pub(crate) index: Index,
    /// What has its pre-image in the log.
    pub(crate) touched: ExtentSet,
    /// Holes of the target that apply fills.
    pub(crate) reserved: ExtentSet,
}

impl Ledger {
    /// Takes in the records a scan found.
    pub(crate) fn of<'a>(
        records: impl IntoIterator<Item = &'a (RecordPlace, RecordHeader)>,
    ) -> Self {
        let mut ledger = Self::default();
        for (place, header) in records {
            ledger.take_in(place.clone(), header);
        }
        ledger
    }

    /// Adds a record and returns its number.
    pub(crate) fn take_in(&mut self, place: RecordPlace, header: &RecordHeader) -> u32 {
        let number = u32::try_from(self.places.len())
            .unwrap_or_else(|_| unreachable!("2^32 records of 4 KiB and more"));
        self.index.insert_record(number, header);
        for entry in &header.extents {
            if entry.old != OldContent::None {
                self.touched.insert(whole_pages(entry.extent));
            }
            if entry.new == NewContent::Reserve {
                self.reserved.insert(entry.extent);
            }
        }
        self.places.push(place);
        number
    }

    /// The numbers of all records.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = u32> + use<> {
        0..u32::try_from(self.places.len()).unwrap_or(u32::MAX)
    }

    /// Whether anything that counts was copied from a source that was being written.
    pub(crate) fn is_fuzzy(&self) -> bool {
        let fuzzy = |record: u32| self.places[record as usize].fuzzy;
        self.index.runs().any(|run| fuzzy(run.record))
    }
}
