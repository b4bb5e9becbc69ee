//! What is served: a disk that is read, or one that is written as well.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blockferry_core::Extent;
use blockferry_device::{BlockSource, BlockTarget, Error, ErrorKind, Result, Status};

use crate::wire::{allocation, errno, flag};

/// Runs in one answer to a question for block status.
pub(crate) const MOST_RUNS: usize = 4096;

/// A disk under a name.
#[derive(Debug)]
pub struct NbdExport {
    name: String,
    source: Arc<dyn BlockSource>,
    target: Option<Arc<dyn BlockTarget>>,
    size_bytes: u64,
    /// What was not flushed when a flush failed is unknown for good: nothing is written any more.
    is_dead: AtomicBool,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
}

impl NbdExport {
    /// A disk that clients may only read. It has this name, and answers to the empty one as well.
    ///
    /// # Errors
    /// The name is longer than the protocol allows, or the disk larger.
    pub fn read_only(name: &str, source: Arc<dyn BlockSource>) -> Result<Self> {
        Self::new(name, source, None)
    }

    /// A disk that clients may also write, as one of [`CopyOnWrite`](blockferry_device::CopyOnWrite).
    ///
    /// # Errors
    /// As [`Self::read_only`].
    pub fn writable(name: &str, target: Arc<dyn BlockTarget>) -> Result<Self> {
        let source: Arc<dyn BlockSource> = Arc::clone(&target) as _;
        Self::new(name, source, Some(target))
    }

    fn new(
        name: &str,
        source: Arc<dyn BlockSource>,
        target: Option<Arc<dyn BlockTarget>>,
    ) -> Result<Self> {
        let size_bytes = source.size_bytes();
        let refused = |text| Err(Error::new(ErrorKind::Unsuitable, text));
        if name.len() > crate::wire::MAX_TEXT_BYTES {
            return refused(format!(
                "serve {}: a name of {} bytes, expected at most {}",
                source.label(),
                name.len(),
                crate::wire::MAX_TEXT_BYTES
            ));
        }
        if size_bytes > i64::MAX as u64 {
            let label = source.label();
            return refused(format!("serve {label}: a disk of {size_bytes} bytes"));
        }
        Ok(Self {
            name: name.to_owned(),
            source,
            target,
            size_bytes,
            is_dead: AtomicBool::new(false),
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.target.is_none()
    }

    pub(crate) fn flags(&self) -> u16 {
        // All connections use one device: a flush on any of them is one of what was answered on all.
        let all = flag::HAS_FLAGS | flag::MULTI_CONN;
        match self.target {
            None => all | flag::READ_ONLY,
            Some(_) => all | flag::FLUSH | flag::FUA | flag::TRIM | flag::WRITE_ZEROES,
        }
    }

    /// Whether the range is within the disk.
    pub(crate) fn holds(&self, offset: u64, bytes: u32) -> bool {
        offset
            .checked_add(u64::from(bytes))
            .is_some_and(|end| end <= self.size_bytes)
    }

    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.source.read_at(offset, buffer)?;
        self.read_bytes
            .fetch_add(buffer.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.living()?.write_at(offset, bytes)?;
        self.written_bytes
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn zero(&self, extent: Extent, space: Space) -> Result<()> {
        let target = self.living()?;
        if space == Space::GivenBack && target.punch(extent)? {
            return Ok(());
        }
        target.write_zeroes(extent)
    }

    /// Tells the disk to forget the extent: what it then reads as is left to it.
    pub(crate) fn trim(&self, extent: Extent) -> Result<()> {
        self.living()?.punch(extent).map(|_is_zero| ())
    }

    pub(crate) fn flush(&self) -> Result<()> {
        let flushed = self.living()?.flush();
        if flushed.is_err() {
            self.is_dead.store(true, Ordering::SeqCst);
        }
        flushed
    }

    /// Runs from the start of the extent on: lengths and what `base:allocation` says of them.
    pub(crate) fn runs(&self, extent: Extent, most: usize) -> Result<Vec<(u32, u32)>> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        let mut at = extent.start();
        while at < extent.end() {
            let (status, end) = self.source.status_at(at)?;
            let end = end.clamp(at + 1, extent.end());
            let told = match status {
                Status::Data => 0,
                Status::Zero => allocation::IS_HOLE | allocation::IS_ZERO,
            };
            // The extent is no longer than a request can be.
            let bytes = u32::try_from(end - at).unwrap_or(u32::MAX);
            let is_full = runs.len() == most;
            match runs.last_mut() {
                Some((so_far, last)) if *last == told => *so_far = so_far.saturating_add(bytes),
                _ if is_full => break,
                _ => runs.push((bytes, told)),
            }
            at = end;
        }
        Ok(runs)
    }

    pub(crate) fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn written_bytes(&self) -> u64 {
        self.written_bytes.load(Ordering::Relaxed)
    }

    fn living(&self) -> Result<&dyn BlockTarget> {
        let refused = |kind, why| Err(Error::new(kind, format!("{}: {why}", self.source.label())));
        match &self.target {
            None => refused(ErrorKind::Denied, "it is served read-only"),
            Some(_) if self.is_dead.load(Ordering::SeqCst) => refused(
                ErrorKind::Io,
                "a flush failed: nothing is written to it any more",
            ),
            Some(target) => Ok(&**target),
        }
    }
}

/// What becomes of the space of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Kept,
    GivenBack,
}

/// The number that a client is told.
pub(crate) fn number_of(error: &Error) -> u32 {
    match error.kind() {
        ErrorKind::NoSpace => errno::NO_SPACE,
        ErrorKind::Denied => errno::DENIED,
        ErrorKind::OutOfRange => errno::INVALID,
        ErrorKind::Unsupported => errno::UNSUPPORTED,
        _ => errno::IO,
    }
}
