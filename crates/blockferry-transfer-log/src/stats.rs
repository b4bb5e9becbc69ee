//! Counts what durability costs, for receipts and benches.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one replica since it was opened.
#[derive(Debug, Default)]
pub struct Stats {
    flushes: AtomicU64,
    log_bytes: AtomicU64,
    records: AtomicU64,
}

impl Stats {
    /// Flushes of files, directories and the target.
    #[must_use]
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    /// Bytes written to logs.
    #[must_use]
    pub fn log_bytes(&self) -> u64 {
        self.log_bytes.load(Ordering::Relaxed)
    }

    /// Records written.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.records.load(Ordering::Relaxed)
    }

    pub(crate) fn count_flush(&self) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_record(&self, bytes: u64) {
        self.records.fetch_add(1, Ordering::Relaxed);
        self.log_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}
