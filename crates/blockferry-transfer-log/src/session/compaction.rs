//! Compaction: what is live goes to a fresh segment, the ones before go.

use std::sync::Arc;

use super::Session;
use crate::apply::pool::Pool;
use crate::batch::{Batch, New, Old};
use crate::error::{Error, Result};
use crate::format::{NewContent, OldContent, PAGE, SegmentHeader, SegmentKind, Unit, usize_of};
use crate::index::RunContent;
use crate::ledger::Ledger;
use crate::log::{Appender, LoadedRecord, LogFiles, RecordPlace, segment_name};
use crate::plan::Strategy;

/// A log smaller than this is never compacted.
const COMPACT_FLOOR_BYTES: u64 = 64 * 1024 * 1024;

impl Session<'_> {
    pub(super) fn compact_if_due(&mut self) -> Result<()> {
        let live = self.ledger.index.data_bytes() + self.ledger.touched.total_bytes();
        let held = self.checkpoint().log_bytes;
        let due = self.header.strategy == Strategy::Redo
            && held > COMPACT_FLOOR_BYTES.min(self.log_limit_bytes / 2)
            && held > 2 * live + COMPACT_FLOOR_BYTES.min(self.log_limit_bytes / 4);
        if due { self.compact() } else { Ok(()) }
    }

    /// Writes everything live into a fresh segment, makes it durable, then drops the segments before.
    ///
    /// # Errors
    /// The log failed; the segments before still count.
    pub(super) fn compact(&mut self) -> Result<()> {
        let header = SegmentHeader {
            segment: self.header.segment + 1,
            kind: SegmentKind::Compacted,
            first_sequence: self.appender.next_sequence(),
            previous_chain: self.appender.chain(),
            ..self.header.clone()
        };
        let mut files = LogFiles::new(&header);
        let dir = Arc::clone(&self.replica.dir);
        let mut appender = Appender::create(&*dir, &mut files, &header, &self.replica.stats)?;
        let mut ledger = Ledger::default();
        let session = header.session;
        for batch in self.live_batches() {
            let (place, record) = appender.append(session, &batch?, false)?;
            ledger.take_in(place, &record);
        }
        let end = Batch::logged(header.geometry, Unit::Page);
        let (place, record) = appender.append(session, &end, true)?;
        ledger.take_in(place, &record);
        // Every live record must be durable, under a durable name, before the old segments go.
        appender.flush()?;
        self.replica.sync_dir()?;
        for segment in 0..header.segment {
            let name = segment_name(session, segment);
            dir.remove(&name)
                .map_err(|e| Error::log(format!("remove {name}"), e))?;
        }
        self.header = header;
        self.files = files;
        self.appender = appender;
        self.ledger = ledger;
        self.pool = Pool::new();
        self.pending = self.ledger.numbers().collect();
        self.handed_out = 0;
        self.generation += 1;
        self.held_before = 0;
        Ok(())
    }

    /// One batch for each record, with only what is still live in it.
    fn live_batches(&self) -> impl Iterator<Item = Result<Batch>> + '_ {
        self.ledger
            .places
            .iter()
            .zip(0u32..)
            .filter(|(p, _)| !p.dropped)
            .flat_map(
                |(place, number)| match self.live_batches_of(place, number) {
                    Ok(batches) => batches.into_iter().map(Ok).collect::<Vec<_>>(),
                    Err(error) => vec![Err(error)],
                },
            )
    }

    fn live_batches_of(&self, place: &RecordPlace, number: u32) -> Result<Vec<Batch>> {
        let LoadedRecord { header, new } = self.files.load(place)?;
        let old = self.files.old_pages(place, &header)?;
        let fresh = || {
            let mut batch = Batch::logged(self.header.geometry, header.unit);
            batch.fuzzy = header.fuzzy;
            batch
        };
        // Pre-images first, whole; then the new pages that no later record replaced.
        let (mut olds, mut news) = (fresh(), fresh());
        let mut offset = 0usize;
        for entry in &header.extents {
            let length = usize_of(entry.extent.length());
            match entry.old {
                OldContent::None => {}
                OldContent::Zero => olds.push(entry.extent, New::None, Old::Zero),
                OldContent::Data => {
                    olds.push(
                        entry.extent,
                        New::None,
                        Old::Data(&old[offset..offset + length]),
                    );
                    offset += length.next_multiple_of(PAGE);
                }
            }
            if entry.new == NewContent::Reserve {
                news.push(entry.extent, New::Reserve, Old::None);
            }
            for run in self
                .ledger
                .index
                .within(entry.extent)
                .filter(|r| r.record == number)
            {
                match run.content {
                    RunContent::Zero => news.push(run.extent, New::Zero, Old::None),
                    RunContent::Data { payload } => {
                        let start = payload as usize;
                        let bytes = &new[start..start + usize_of(run.extent.length())];
                        news.push(run.extent, New::Data(bytes), Old::None);
                    }
                }
            }
        }
        Ok([olds, news].into_iter().filter(|b| !b.is_empty()).collect())
    }
}
