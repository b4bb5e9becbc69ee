//! [`CopyOnWrite`]: what is written goes elsewhere.

mod presence;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use blockferry_core::{Extent, PAGE_BYTES};

use self::presence::Presence;
use crate::{BlockSource, BlockTarget, Error, ErrorKind, ReadRequest, Result, Status};

const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_BYTES);

/// A base that is only read, with everything that is written kept in a scratch device. Which pages of 4 KiB are there is
/// known in memory only (512 bytes for every 16 MiB in which something was written), so that the changes end with this.
pub struct CopyOnWrite {
    label: String,
    base: Arc<dyn BlockSource>,
    scratch: Arc<dyn BlockTarget>,
    size_bytes: u64,
    /// Pages whose content is in the scratch device.
    // Invariant: a page is in here only after all of it was written there.
    present: RwLock<Presence>,
    /// Held by who takes a page over from the base to write a part of it.
    taking_over: Mutex<()>,
}

impl CopyOnWrite {
    /// Lays `scratch`, which nobody else uses, over `base`. What it holds does not matter: a page is written before it
    /// is read. A sparse file is what it is made for.
    ///
    /// # Errors
    /// `scratch` is smaller than `base`.
    pub fn new(base: Arc<dyn BlockSource>, scratch: Arc<dyn BlockTarget>) -> Result<Self> {
        let (size_bytes, room_bytes) = (base.size_bytes(), scratch.size_bytes());
        let label = format!("{} with changes in {}", base.label(), scratch.label());
        if room_bytes < size_bytes {
            let text = format!("{label}: expected {size_bytes} bytes, found {room_bytes}");
            return Err(Error::new(ErrorKind::Unsuitable, text));
        }
        Ok(Self {
            label,
            base,
            scratch,
            size_bytes,
            present: RwLock::default(),
            taking_over: Mutex::default(),
        })
    }

    fn present(&self) -> RwLockReadGuard<'_, Presence> {
        self.present.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn present_mut(&self) -> RwLockWriteGuard<'_, Presence> {
        self.present.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether what is at `offset` is in the scratch device, and where the run ends in which it is so.
    fn run_at(&self, offset: u64) -> (bool, u64) {
        let pages = self.size_bytes.div_ceil(PAGE_BYTES);
        let (is_present, end) = self.present().run(offset / PAGE_BYTES, pages);
        (is_present, (end * PAGE_BYTES).min(self.size_bytes))
    }

    fn check_range(&self, attempt: &str, offset: u64, bytes: u64) -> Result<Extent> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.size_bytes => Ok(Extent::from_range(offset..end)),
            _ => Err(Error::new(
                ErrorKind::OutOfRange,
                format!(
                    "{attempt} of {bytes} bytes at offset {offset}: {} has {} bytes",
                    self.label, self.size_bytes
                ),
            )),
        }
    }

    /// Reads run by run, from where the content of each is.
    fn read_runs(
        &self,
        offset: u64,
        buffer: &mut [u8],
        from_scratch: impl Fn(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let extent = self.check_range("read", offset, buffer.len() as u64)?;
        let (mut at, mut rest) = (extent.start(), buffer);
        while !rest.is_empty() {
            let (is_present, end) = self.run_at(at);
            let (part, behind) = rest.split_at_mut(rest.len().min(length(at..end)));
            match is_present {
                true => from_scratch(at, part)?,
                false => self.base.read_at(at, part)?,
            }
            at += part.len() as u64;
            rest = behind;
        }
        Ok(())
    }

    /// Writes a part of one page; the first time with the rest of it.
    fn write_part(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let number = offset / PAGE_BYTES;
        let _alone = self
            .taking_over
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if self.present().run(number, number + 1).0 {
            return self.scratch.write_at(offset, bytes);
        }
        let start = number * PAGE_BYTES;
        let mut page = [0; PAGE];
        let page = &mut page[..length(start..self.size_bytes).min(PAGE)];
        self.base.read_at(start, page)?;
        let within = length(start..offset);
        page[within..within + bytes.len()].copy_from_slice(bytes);
        self.scratch.write_at(start, page)?;
        self.present_mut().insert(number..number + 1);
        Ok(())
    }
}

/// A range as parts of pages and whole pages; the page that the device ends in is whole where it ends.
fn parts(extent: Extent, size_bytes: u64) -> [(Extent, bool); 3] {
    let (start, end) = (extent.start(), extent.end());
    let first_whole = start.next_multiple_of(PAGE_BYTES).min(end);
    let last_whole = match end == size_bytes {
        true => end,
        false => (end / PAGE_BYTES * PAGE_BYTES).max(first_whole),
    };
    [
        (Extent::from_range(start..first_whole), false),
        (Extent::from_range(first_whole..last_whole), true),
        (Extent::from_range(last_whole..end), false),
    ]
}

fn length(range: std::ops::Range<u64>) -> usize {
    // A device larger than memory is read in parts anyway.
    usize::try_from(range.end - range.start).unwrap_or(usize::MAX)
}

fn pages(extent: Extent) -> std::ops::Range<u64> {
    extent.start() / PAGE_BYTES..extent.end().div_ceil(PAGE_BYTES)
}

impl BlockSource for CopyOnWrite {
    fn label(&self) -> &str {
        &self.label
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.read_runs(offset, buffer, |offset, part| {
            self.scratch.read_at(offset, part)
        })
    }

    fn preferred_depth(&self) -> usize {
        self.base.preferred_depth()
    }

    fn status_at(&self, offset: u64) -> Result<(Status, u64)> {
        self.check_range("status", offset, 1)?;
        let (is_present, run_end) = self.run_at(offset);
        let (status, end) = match is_present {
            true => self.scratch.status_at(offset)?,
            false => self.base.status_at(offset)?,
        };
        Ok((status, end.min(run_end)))
    }
}

impl BlockTarget for CopyOnWrite {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let extent = self.check_range("write", offset, bytes.len() as u64)?;
        for (part, is_whole) in parts(extent, self.size_bytes) {
            let bytes = &bytes[length(offset..part.start())..length(offset..part.end())];
            match is_whole {
                _ if part.is_empty() => {}
                false => self.write_part(part.start(), bytes)?,
                true => {
                    self.scratch.write_at(part.start(), bytes)?;
                    self.present_mut().insert(pages(part));
                }
            }
        }
        Ok(())
    }

    fn write_zeroes(&self, extent: Extent) -> Result<()> {
        let extent = self.check_range("zeroing", extent.start(), extent.length())?;
        for (part, is_whole) in parts(extent, self.size_bytes) {
            match is_whole {
                _ if part.is_empty() => {}
                false => self.write_part(part.start(), &[0; PAGE][..length(part.range())])?,
                true => {
                    // No space is promised to anybody, so none is kept.
                    if !self.scratch.punch(part)? {
                        self.scratch.write_zeroes(part)?;
                    }
                    self.present_mut().insert(pages(part));
                }
            }
        }
        Ok(())
    }

    fn punch(&self, extent: Extent) -> Result<bool> {
        self.write_zeroes(extent).map(|()| true)
    }

    /// Shows whether the scratch device took everything; the changes end with this all the same.
    fn flush(&self) -> Result<()> {
        self.scratch.flush()
    }

    fn read_medium(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        for request in requests {
            self.read_runs(request.offset, request.buffer, |offset, buffer| {
                self.scratch
                    .read_medium(&mut [ReadRequest { offset, buffer }])
            })?;
        }
        Ok(())
    }

    fn drop_cache(&self) {
        self.scratch.drop_cache();
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        if size_bytes == self.size_bytes {
            return Ok(());
        }
        let text = format!(
            "resize of {} to {size_bytes} bytes: its size is fixed",
            self.label
        );
        Err(Error::new(ErrorKind::Unsupported, text))
    }

    fn logical_block_bytes(&self) -> u32 {
        self.scratch.logical_block_bytes()
    }
}

impl fmt::Debug for CopyOnWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CopyOnWrite({})", self.label)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryDevice;

    fn over(base: Vec<u8>) -> (Arc<MemoryDevice>, Arc<MemoryDevice>, CopyOnWrite) {
        // What is there from before must never show.
        let scratch = Arc::new(MemoryDevice::from_bytes("scratch", vec![0xee; base.len()]));
        let base = Arc::new(MemoryDevice::from_bytes("base", base));
        let device = CopyOnWrite::new(Arc::clone(&base) as _, Arc::clone(&scratch) as _);
        (base, scratch, device.expect("large enough"))
    }

    fn content(device: &CopyOnWrite) -> Vec<u8> {
        let mut bytes = vec![0; length(0..device.size_bytes())];
        device.read_at(0, &mut bytes).expect("readable");
        bytes
    }

    #[test]
    fn what_is_written_shows_and_the_base_keeps_what_it_had() {
        let (base, _scratch, device) = over(vec![5; 3 * PAGE + 100]);
        let mut expected = vec![5; 3 * PAGE + 100];

        for (offset, bytes) in [
            (10, vec![1; 20]),
            (4000, vec![2; 5000]),
            (12_300, vec![3; 88]),
        ] {
            device.write_at(offset as u64, &bytes).expect("written");
            expected[offset..offset + bytes.len()].copy_from_slice(&bytes);
        }
        device.punch(Extent::from_range(50..4050)).expect("zero");
        expected[50..4050].fill(0);

        assert!(content(&device) == expected);
        assert_eq!(base.to_vec(), vec![5; 3 * PAGE + 100]);
    }

    #[test]
    fn parts_of_one_page_written_at_once_are_all_there() {
        let (_base, _scratch, device) = over(vec![5; 16 * PAGE]);

        std::thread::scope(|scope| {
            for part in 0..8u8 {
                let device = &device;
                scope.spawn(move || {
                    for page in 0..16 {
                        let offset = page * PAGE_BYTES + u64::from(part) * 512;
                        device.write_at(offset, &[part; 512]).expect("written");
                    }
                });
            }
        });

        let page: Vec<u8> = (0..8u8).flat_map(|part| [part; 512]).collect();
        assert!(content(&device).chunks(PAGE).all(|found| found == page));
    }

    #[test]
    fn whole_pages_are_written_without_reading_the_base() {
        let base = Arc::new(MemoryDevice::zeroed("base", 8 * PAGE));
        let counted = Arc::new(crate::Counting::new(base as Arc<dyn BlockSource>));
        let scratch = Arc::new(MemoryDevice::zeroed("scratch", 8 * PAGE));
        let device = CopyOnWrite::new(Arc::clone(&counted) as _, scratch).expect("large enough");

        device
            .write_at(PAGE_BYTES, &[1; 7 * PAGE])
            .expect("written");

        assert_eq!(counted.counts().read_bytes(), 0);
        device.write_at(5, &[1; 7]).expect("written");
        assert_eq!(counted.counts().read_bytes(), PAGE_BYTES);
    }

    #[test]
    fn a_scratch_device_that_is_too_small_is_refused() {
        let base = Arc::new(MemoryDevice::zeroed("base", 2 * PAGE));
        let scratch = Arc::new(MemoryDevice::zeroed("scratch", PAGE));

        let error = CopyOnWrite::new(base, scratch).expect_err("too small");

        assert_eq!(error.kind(), ErrorKind::Unsuitable);
        assert!(
            error
                .to_string()
                .ends_with("expected 8192 bytes, found 4096")
        );
    }
}
