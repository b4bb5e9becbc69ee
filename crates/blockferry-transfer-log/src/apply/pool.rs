//! Staged pages that are still in memory, up to a bound; the rest is read from the log again.

use std::collections::HashMap;
use std::sync::Arc;

use crate::format::RecordHeader;
use crate::log::{LoadedRecord, Pages};
use crate::spare::SpareSlice;

/// Records kept for apply.
#[derive(Debug)]
pub(crate) struct Pool {
    records: HashMap<u32, Arc<LoadedRecord>>,
    free_bytes: usize,
}

impl Pool {
    /// Most bytes of staged pages kept.
    const BYTES: usize = 48 * 1024 * 1024;

    pub(crate) fn new() -> Self {
        Self {
            records: HashMap::new(),
            free_bytes: Self::BYTES,
        }
    }

    /// Keeps a record with its plain new pages, where there is room.
    pub(crate) fn keep(&mut self, record: u32, header: RecordHeader, new: SpareSlice) {
        if let Some(free) = self.free_bytes.checked_sub(new.kept_bytes()) {
            self.free_bytes = free;
            let new = Pages::Stored(new);
            self.records
                .insert(record, Arc::new(LoadedRecord { header, new }));
        }
    }

    pub(crate) fn find(&self, record: u32) -> Option<Arc<LoadedRecord>> {
        self.records.get(&record).cloned()
    }

    pub(crate) fn forget(&mut self, record: u32) {
        let forgotten = self.records.remove(&record);
        if let Some(Pages::Stored(new)) = forgotten.as_deref().map(|r| &r.new) {
            self.free_bytes += new.kept_bytes();
        }
    }
}
