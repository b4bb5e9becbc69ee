//! The anchor: a point that a target can be returned to across many sessions.
//!
//! A session keeps the pages that it replaces until the next one commits. An anchor keeps, of every page, the
//! content it had at one point, from the first session that replaces it: at most the target once, however many
//! sessions follow. Laid over the target it shows that point.
//!
//! ```text
//! page 0, 1 : slots, written in turn: how many records count, and their chain
//! then      : records: header of two pages, old pages
//! ```
//! Order of durability, before the COMMIT of a session: records, flush, slot, flush. What lies behind the last record
//! that counts was never relied on and is written over.

use std::sync::Arc;

use blockferry_core::{Digest, Extent, ExtentSet, block_digest, is_zero};
use blockferry_device::{AlignedBuffer, BlockSource, ReadRequest, StorageDir, StorageFile};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    ANCHOR_EXTENTS, ANCHOR_HEADER_BYTES, ANCHOR_PAYLOAD_BYTES, AnchorExtent, AnchorRecord,
    AnchorSlot, PAGE, Point, usize_of,
};
use crate::index::{Index, RunContent};
use crate::overlay::{Overlay, RecordPages};
use crate::stats::Stats;

/// Name of the anchor in the state directory.
pub(crate) const ANCHOR_NAME: &str = "anchor";
/// Its name while it is created.
const NEW_ANCHOR_NAME: &str = "anchor.new";
const FIRST_RECORD: u64 = 2 * PAGE as u64;

/// An anchor that is being kept.
#[derive(Debug)]
pub(crate) struct Anchor {
    file: Arc<dyn StorageFile>,
    slot: AnchorSlot,
    /// Which of the two pages holds `slot`.
    slot_page: u64,
    /// Where the next record goes.
    end: u64,
    kept: Kept,
    /// Set while it is written: after a failure nothing more is kept through this handle.
    dead: bool,
}

/// What is kept, and where.
#[derive(Debug, Default)]
struct Kept {
    extents: ExtentSet,
    index: Arc<Index>,
    /// Where each record begins.
    records: Arc<Vec<u64>>,
}

impl Kept {
    fn add(&mut self, offset: u64, extents: &[AnchorExtent]) {
        let records = Arc::make_mut(&mut self.records);
        // More than any memory holds.
        let record = u32::try_from(records.len()).unwrap_or(u32::MAX);
        records.push(offset);
        let index = Arc::make_mut(&mut self.index);
        let mut payload = 0;
        for entry in extents {
            let content = match entry.is_zero {
                true => RunContent::Zero,
                false => RunContent::Data { payload },
            };
            index.insert(entry.extent, record, content);
            self.extents.insert(entry.extent);
            payload += u32::try_from(entry.stored_bytes()).unwrap_or(u32::MAX);
        }
    }
}

impl Anchor {
    /// An anchor at the point where a target of so many bytes is, in a directory that has none.
    pub(crate) fn create(
        dir: &dyn StorageDir,
        point: Point,
        old_bytes: u64,
        stats: &Stats,
    ) -> Result<Self> {
        let failed = |e| Error::log(format!("create {ANCHOR_NAME} in {}", dir.label()), e);
        dir.remove(NEW_ANCHOR_NAME).map_err(failed)?;
        let file = dir.create(NEW_ANCHOR_NAME).map_err(failed)?;
        let slot = AnchorSlot {
            sequence: 1,
            old_bytes,
            records: 0,
            chain: Digest::from_bytes([0; 32]),
            point,
        };
        let mut bytes = slot.encode();
        bytes.resize(2 * PAGE, 0);
        file.write_at(0, &bytes).map_err(failed)?;
        file.flush().map_err(failed)?;
        dir.rename_new(NEW_ANCHOR_NAME, ANCHOR_NAME)
            .map_err(failed)?;
        dir.sync().map_err(failed)?;
        (0..2).for_each(|_| stats.count_flush());
        Ok(Self {
            file,
            slot,
            slot_page: 0,
            end: FIRST_RECORD,
            kept: Kept::default(),
            dead: false,
        })
    }

    /// The anchor that is kept here, if there is one.
    pub(crate) fn open(dir: &dyn StorageDir, stats: &Stats) -> Result<Option<Self>> {
        let attempt = || format!("read {ANCHOR_NAME} in {}", dir.label());
        let failed = |e| Error::log(attempt(), e);
        let Some(file) = dir.open(ANCHOR_NAME).map_err(failed)? else {
            return Ok(None);
        };
        // What the page cache shows may not be on the medium.
        file.flush().map_err(failed)?;
        stats.count_flush();
        let damaged = |what: &str| Error::corrupt(format!("{}: {what}", attempt()));
        let (slot, slot_page) = newest_slot(&*file)
            .map_err(failed)?
            .ok_or_else(|| damaged("neither of its slots can be read"))?;
        let mut kept = Kept::default();
        let (mut end, mut chain) = (FIRST_RECORD, Digest::from_bytes([0; 32]));
        for number in 0..slot.records {
            let record = read_header(&*file, end)
                .map_err(failed)?
                .filter(|(record, _)| {
                    record.previous == chain && record.point == *slot.point.id.as_bytes()
                });
            let (record, sum) =
                record.ok_or_else(|| damaged(&format!("record {number} at offset {end}")))?;
            kept.add(end, &record.extents);
            end += ANCHOR_HEADER_BYTES as u64 + record.payload_bytes();
            chain = sum;
        }
        if chain != slot.chain {
            return Err(damaged("its records are not those that count"));
        }
        Ok(Some(Self {
            file,
            slot,
            slot_page,
            end,
            kept,
            dead: false,
        }))
    }

    /// Where it leads back to.
    pub(crate) fn point(&self) -> &Point {
        &self.slot.point
    }

    /// Which pages are kept.
    pub(crate) fn extents(&self) -> &ExtentSet {
        &self.kept.extents
    }

    /// Makes the old content of `extents` durable, as far as it is not kept yet and the old point reaches.
    /// `target` still holds it.
    pub(crate) fn keep(
        &mut self,
        target: &dyn BlockSource,
        extents: impl Iterator<Item = Extent>,
        stats: &Stats,
    ) -> Result<()> {
        if self.dead {
            return Err(Error::new(
                ErrorKind::Log,
                "the anchor failed before; open the target again to commit anything",
            ));
        }
        let missing = self.missing(extents);
        if missing.is_empty() {
            return Ok(());
        }
        self.dead = true;
        let mut writer = Writer::new(self);
        let pieces = missing
            .iter()
            .flat_map(|run| run.pieces(ANCHOR_PAYLOAD_BYTES as u64));
        for piece in pieces {
            writer.add(target, piece)?;
        }
        let written = writer.finish()?;
        self.count(&written, stats)?;
        self.dead = false;
        Ok(())
    }

    fn missing(&self, extents: impl Iterator<Item = Extent>) -> ExtentSet {
        let old_image = Extent::from_range(0..self.slot.old_bytes);
        let pages = |extent: Extent| {
            let page = PAGE as u64;
            let start = extent.start() / page * page;
            Extent::from_range(start..extent.end().next_multiple_of(page))
        };
        let wanted: ExtentSet = extents
            .filter_map(|extent| pages(extent).intersection(old_image))
            .collect();
        wanted.difference(&self.kept.extents)
    }

    /// What was written counts from here on: its flush comes before that of the slot that says so.
    fn count(&mut self, written: &Written, stats: &Stats) -> Result<()> {
        let failed = |e| Error::log("flush the anchor", e);
        self.file.flush().map_err(failed)?;
        let slot = AnchorSlot {
            sequence: self.slot.sequence + 1,
            records: self.slot.records + written.records,
            chain: written.chain,
            ..self.slot.clone()
        };
        let slot_page = 1 - self.slot_page;
        self.file
            .write_at(slot_page * PAGE as u64, &slot.encode())
            .map_err(failed)?;
        self.file.flush().map_err(failed)?;
        (0..2).for_each(|_| stats.count_flush());
        (self.slot, self.slot_page, self.end) = (slot, slot_page, written.end);
        for (offset, extents) in &written.extents {
            self.kept.add(*offset, extents);
        }
        Ok(())
    }

    /// The point, as a source: what is kept, over the target. Whether somebody wrote the target meanwhile is not asked:
    /// whoever relies on this point knows its root.
    pub(crate) fn view(&self, target: Arc<dyn BlockSource>) -> Arc<dyn BlockSource> {
        let pages = AnchorPages {
            file: Arc::clone(&self.file),
            records: Arc::clone(&self.kept.records),
        };
        let (bytes, index) = (self.slot.old_bytes, Arc::clone(&self.kept.index));
        Arc::new(Overlay::new("anchor", bytes, target, None, index, pages))
    }
}

/// Where the anchor that is kept here leads back to, if there is one. Only looks: what it finds may not be durable.
pub(crate) fn look(dir: &dyn StorageDir) -> Result<Option<Point>> {
    let failed = |e| Error::log(format!("look at {ANCHOR_NAME} in {}", dir.label()), e);
    let Some(file) = dir.open(ANCHOR_NAME).map_err(failed)? else {
        return Ok(None);
    };
    let newest = newest_slot(&*file).map_err(failed)?;
    Ok(newest.map(|(slot, _)| slot.point))
}

/// Removes the anchor, if there is one.
pub(crate) fn remove(dir: &dyn StorageDir, stats: &Stats) -> Result<()> {
    let failed = |e| Error::log(format!("remove {ANCHOR_NAME} from {}", dir.label()), e);
    for name in [ANCHOR_NAME, NEW_ANCHOR_NAME] {
        dir.remove(name).map_err(failed)?;
    }
    dir.sync().map_err(failed)?;
    stats.count_flush();
    Ok(())
}

/// Records on their way to the file, behind those that count.
struct Writer<'a> {
    file: &'a dyn StorageFile,
    record: AnchorRecord,
    /// Header and payload of the record under way.
    buffer: AlignedBuffer,
    used: usize,
    written: Written,
}

struct Written {
    end: u64,
    chain: Digest,
    records: u64,
    extents: Vec<(u64, Vec<AnchorExtent>)>,
}

impl<'a> Writer<'a> {
    fn new(anchor: &'a Anchor) -> Self {
        Self {
            file: &*anchor.file,
            record: AnchorRecord {
                point: *anchor.slot.point.id.as_bytes(),
                previous: anchor.slot.chain,
                payload_digest: Digest::from_bytes([0; 32]),
                extents: Vec::new(),
            },
            buffer: AlignedBuffer::zeroed(ANCHOR_HEADER_BYTES + ANCHOR_PAYLOAD_BYTES),
            used: ANCHOR_HEADER_BYTES,
            written: Written {
                end: anchor.end,
                chain: anchor.slot.chain,
                records: 0,
                extents: Vec::new(),
            },
        }
    }

    fn add(&mut self, target: &dyn BlockSource, extent: Extent) -> Result<()> {
        let length = usize_of(extent.length());
        let stored = length.next_multiple_of(PAGE);
        if self.used + stored > self.buffer.len() || self.record.extents.len() == ANCHOR_EXTENTS {
            self.write()?;
        }
        let place = &mut self.buffer[self.used..self.used + stored];
        place[length..].fill(0);
        target
            .read_at(extent.start(), &mut place[..length])
            .map_err(|e| Error::target("read what the anchor keeps", e))?;
        let is_zero = is_zero(place);
        self.record.extents.push(AnchorExtent { extent, is_zero });
        if !is_zero {
            self.used += stored;
        }
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        if self.record.extents.is_empty() {
            return Ok(());
        }
        self.record.previous = self.written.chain;
        self.record.payload_digest = block_digest(&self.buffer[ANCHOR_HEADER_BYTES..self.used]);
        let (header, chain) = self.record.encode();
        self.buffer[..ANCHOR_HEADER_BYTES].copy_from_slice(&header);
        self.file
            .write_at(self.written.end, &self.buffer[..self.used])
            .map_err(|e| Error::log("write the anchor", e))?;
        let extents = std::mem::take(&mut self.record.extents);
        self.written.extents.push((self.written.end, extents));
        self.written.end += self.used as u64;
        self.written.chain = chain;
        self.written.records += 1;
        self.used = ANCHOR_HEADER_BYTES;
        Ok(())
    }

    fn finish(mut self) -> Result<Written> {
        self.write()?;
        Ok(self.written)
    }
}

fn newest_slot(file: &dyn StorageFile) -> blockferry_device::Result<Option<(AnchorSlot, u64)>> {
    let mut newest: Option<(AnchorSlot, u64)> = None;
    for number in 0..2 {
        let Some(page) = read_if_whole(file, number * PAGE as u64, PAGE)? else {
            continue;
        };
        if let Some(slot) = AnchorSlot::decode(&page) {
            let is_newer = newest.as_ref().is_none_or(|n| slot.sequence > n.0.sequence);
            newest = if is_newer {
                Some((slot, number))
            } else {
                newest
            };
        }
    }
    Ok(newest)
}

fn read_header(
    file: &dyn StorageFile,
    offset: u64,
) -> blockferry_device::Result<Option<(AnchorRecord, Digest)>> {
    let bytes = read_if_whole(file, offset, ANCHOR_HEADER_BYTES)?;
    Ok(bytes.and_then(|bytes| AnchorRecord::decode(&bytes)))
}

/// From the medium; nothing where that is damaged or ends before.
fn read_if_whole(
    file: &dyn StorageFile,
    offset: u64,
    length: usize,
) -> blockferry_device::Result<Option<AlignedBuffer>> {
    let mut buffer = AlignedBuffer::zeroed(length);
    let mut request = [ReadRequest {
        offset,
        buffer: &mut buffer,
    }];
    match file.read_medium(&mut request) {
        Ok(()) => Ok(Some(buffer)),
        Err(cause) if cause.kind() == blockferry_device::ErrorKind::Cancelled => Err(cause),
        Err(_) => Ok(None),
    }
}

/// The payloads of an anchor's records.
#[derive(Debug)]
struct AnchorPages {
    file: Arc<dyn StorageFile>,
    records: Arc<Vec<u64>>,
}

impl RecordPages for AnchorPages {
    type Pages = AlignedBuffer;

    fn load(&self, record: u32) -> Result<AlignedBuffer> {
        let offset = self.records[record as usize];
        let damaged = || Error::corrupt(format!("{ANCHOR_NAME} record at offset {offset}"));
        let failed = |e| Error::log(format!("read {ANCHOR_NAME}"), e);
        let header = read_header(&*self.file, offset).map_err(failed)?;
        let (header, _) = header.ok_or_else(damaged)?;
        let (at, length) = (offset + ANCHOR_HEADER_BYTES as u64, header.payload_bytes());
        let payload = read_if_whole(&*self.file, at, usize_of(length)).map_err(failed)?;
        payload
            .filter(|payload| block_digest(payload) == header.payload_digest)
            .ok_or_else(damaged)
    }
}
