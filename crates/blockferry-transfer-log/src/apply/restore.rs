//! The way back: pre-images over what apply wrote.

use std::sync::Arc;

use blockferry_core::{Digest, Extent};
use blockferry_device::BlockTarget;

use super::{Destination, Part, PartPages, Staged, carry_out, whole_pages};
use crate::error::{ErrorKind, Result};
use crate::format::{BatchExtent, OldContent, PAGE, RecordHeader, Unit, usize_of};
use crate::log::{Pages, RecordPlace};
use crate::readback::{Check, Expected, ReadBack};

impl Staged<'_> {
    /// Checks every pre-image, before anything is decided that relies on them.
    pub(crate) fn check_pre_images(&self) -> Result<()> {
        for place in self.records {
            let header = self.files.header(place)?;
            self.old_pages(place, &header)?;
        }
        Ok(())
    }

    /// Whether `target` still holds every pre-image: nobody wrote there since they were taken.
    pub(crate) fn holds_pre_images(
        &self,
        target: &dyn BlockTarget,
        old_bytes: u64,
    ) -> Result<bool> {
        let mut read_back = ReadBack::new(target, self.geometry);
        let mut compare = || {
            for place in self.records {
                let header = self.files.header(place)?;
                for old in old_entries(&header, self) {
                    let load = || self.old_pages(place, &header);
                    old.check(self, &header, old_bytes, load)?
                        .map_or(Ok(()), |check| read_back.add(check))?;
                }
            }
            Ok(())
        };
        match compare().and_then(|()| read_back.finish()) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Corrupt => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes every pre-image back, as far as the target reaches, calls `finish`, which cuts off what lies beyond the
    /// old end, flushes, and reads everything back from the medium.
    pub(crate) fn restore(
        &self,
        to: &Destination<'_>,
        old_bytes: u64,
        finish: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let (count, room_bytes) = (self.records.len(), to.room_bytes);
        let numbers = 0..u32::try_from(count).unwrap_or(u32::MAX);
        let part_of = |number| self.old_part(&self.records[number as usize], room_bytes, old_bytes);
        let total = self.records.iter().map(RecordPlace::old_bytes).sum();
        carry_out(self.geometry, numbers, part_of, total, to, finish).map(drop)
    }

    fn old_part(&self, place: &RecordPlace, room_bytes: u64, old_bytes: u64) -> Result<Part> {
        let header = self.files.header(place)?;
        let pages = Arc::new(self.old_pages(place, &header)?);
        let mut part = Part {
            bytes: place.old_bytes(),
            ..Part::default()
        };
        let room = Extent::from_range(0..room_bytes);
        for old in old_entries(&header, self) {
            let load = || Ok(&pages[..]);
            part.checks
                .extend(old.check(self, &header, old_bytes, load)?);
            let whole = whole_pages(old.entry.extent, room_bytes);
            let Some(inside) = whole.intersection(room) else {
                continue;
            };
            if old.entry.old == OldContent::Zero {
                part.zeros.push(inside);
            } else {
                let range = old.payload..old.payload + usize_of(inside.length());
                part.writes.push((inside.start(), range));
            }
        }
        part.pages = PartPages::Old(pages);
        Ok(part)
    }

    fn old_pages(&self, place: &RecordPlace, header: &RecordHeader) -> Result<Pages> {
        if place.old_bytes() == 0 {
            return Ok(Pages::Unpacked(Vec::new()));
        }
        self.files.old_pages(place, header)
    }
}

/// An extent with a pre-image.
struct OldEntry<'h> {
    entry: &'h BatchExtent,
    /// Where its bytes begin in the old payload.
    payload: usize,
    digests: &'h [Digest],
}

impl OldEntry<'_> {
    /// What the medium holds at the old point; nothing is said of what lies beyond its end. `load` gives the old pages.
    fn check<P: std::ops::Deref<Target = [u8]>>(
        &self,
        staged: &Staged<'_>,
        header: &RecordHeader,
        old_bytes: u64,
        load: impl FnOnce() -> Result<P>,
    ) -> Result<Option<Check>> {
        let old = Extent::from_range(0..old_bytes);
        let Some(inside) = self.entry.extent.intersection(old) else {
            return Ok(None);
        };
        let (unit, expected) = if self.entry.old == OldContent::Zero {
            (header.unit, Expected::Zero)
        } else if inside == self.entry.extent {
            (header.unit, Expected::Digests(self.digests.to_vec()))
        } else {
            // Its digests cover the padding too: take new ones of what is inside.
            let pages = load()?;
            let digests = Unit::Page.digests(&staged.geometry, inside, &pages[self.payload..]);
            (Unit::Page, Expected::Digests(digests.collect()))
        };
        Ok(Some(Check::new(inside, unit, expected)))
    }
}

/// The extents with a pre-image, with their bytes and digests.
fn old_entries<'h>(
    header: &'h RecordHeader,
    staged: &Staged<'_>,
) -> impl Iterator<Item = OldEntry<'h>> + 'h {
    let step = header.unit.bytes(&staged.geometry);
    let old = header.extents.iter().filter(|e| e.old != OldContent::None);
    old.scan(
        (0usize, &header.old_digests[..]),
        move |(next, digests), entry| {
            let payload = *next;
            let count = if entry.old == OldContent::Data {
                *next += usize_of(entry.extent.length().next_multiple_of(PAGE as u64));
                usize_of(entry.extent.length().div_ceil(step))
            } else {
                0
            };
            let (mine, rest) = digests.split_at(count);
            *digests = rest;
            Some(OldEntry {
                entry,
                payload,
                digests: mine,
            })
        },
    )
}
