//! Reading back what a session staged, on its own thread or another.

use std::sync::Arc;

use blockferry_core::ExtentSet;

use super::Session;
use crate::error::Result;
use crate::format::OldContent;
use crate::readback::{Found, ReadBack, ReadBackOutcome, ReadBackTask};

impl Session<'_> {
    /// Hands out what is durable and was not read back yet, to be read back on another thread while staging
    /// goes on. What is never given back to [`Self::take_read_back`] is read back by [`Self::prepare`].
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn read_back_task(&mut self) -> Result<Option<ReadBackTask>> {
        let mut records = Vec::new();
        for number in self.pending.range(self.handed_out..).copied() {
            let place = &self.ledger.places[number as usize];
            if place.sequence > self.appender.durable() {
                break;
            }
            let mut checks = Vec::new();
            if self.working_to_prove().is_some() {
                let header = self.files.header(place)?;
                self.staged().add_live(number, &header, &mut |check| {
                    checks.push(check);
                    Ok(())
                })?;
            }
            records.push((number, place.clone(), checks));
        }
        let Some((last, _, _)) = records.last() else {
            return Ok(None);
        };
        self.handed_out = last + 1;
        Ok(Some(ReadBackTask {
            generation: self.generation,
            geometry: self.header.geometry,
            files: self.files.clone(),
            working: self.working_to_prove().map(|w| Arc::clone(&w.target)),
            records,
        }))
    }

    /// Whether something that was handed out has not been given back.
    #[must_use]
    pub fn is_read_back_under_way(&self) -> bool {
        self.pending.first().is_some_and(|n| *n < self.handed_out)
    }

    /// Takes back what was read back elsewhere.
    ///
    /// # Errors
    /// Reading it back failed.
    pub fn take_read_back(&mut self, outcome: ReadBackOutcome) -> Result<()> {
        if outcome.generation != self.generation {
            return Ok(());
        }
        for (number, found) in outcome.records {
            let found = found?;
            if self.pending.remove(&number) {
                self.settle(number, found);
            }
        }
        Ok(())
    }

    /// Reads back what was not yet; what did not survive is forgotten, and is missing.
    pub(super) fn verify_pending(&mut self) -> Result<()> {
        while let Some(number) = self.pending.first().copied() {
            let found = Found::of(self.verify_record(number))?;
            self.pending.remove(&number);
            self.settle(number, found);
        }
        Ok(())
    }

    fn settle(&mut self, number: u32, found: Found) {
        match found {
            Found::Whole(bytes) => self.proven_bytes += bytes,
            Found::Lost(cause) => {
                self.drop_record(number as usize);
                self.loss = Some(cause);
            }
        }
    }

    /// Reads a record back, and the bytes of the working file that belong to it: how many these are.
    fn verify_record(&self, number: u32) -> Result<u64> {
        let place = &self.ledger.places[number as usize];
        let header = self.files.verify(place)?;
        let Some(working) = self.working_to_prove() else {
            return Ok(0);
        };
        let mut read_back = ReadBack::new(&*working.target, self.header.geometry);
        let bytes = self
            .staged()
            .add_live(number, &header, &mut |check| read_back.add(check))?;
        read_back.finish()?;
        Ok(bytes)
    }

    /// Forgets a record that is not what was written. Its pre-images are gone with it: the target is still at
    /// its old point, so they are taken again when their pages are staged again, whichever record holds these.
    fn drop_record(&mut self, number: usize) {
        self.ledger.places[number].dropped = true;
        let record = u32::try_from(number).unwrap_or(u32::MAX);
        self.pool.forget(record);
        let mut lost = self.ledger.index.remove_record(record);
        let mut kept = ExtentSet::new();
        for place in self.ledger.places.iter().filter(|p| !p.dropped) {
            // One that cannot be read keeps nothing either.
            let Ok(header) = self.files.header(place) else {
                continue;
            };
            let old = header.extents.iter().filter(|e| e.old != OldContent::None);
            kept.extend(old.map(|e| crate::ledger::whole_pages(e.extent)));
        }
        lost.extend(self.ledger.touched.difference(&kept).iter());
        lost.iter().for_each(|e| self.ledger.index.remove(e));
        self.ledger.touched = kept;
        self.lost.extend(lost.iter());
    }
}
