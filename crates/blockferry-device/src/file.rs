//! [`OsFile`]: a regular file as source, target and file of the transfer log.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blockferry_core::Extent;
use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use crate::data_path::{DataPath, WriteMode};
use crate::{
    BlockSource, BlockTarget, Error, ErrorKind, Evidence, Identity, ReadRequest, Result, Status,
    StorageFile, WriteRequest, allocation, metadata, stamps,
};

/// Requests that one file likes in flight when it is read or written past the cache.
const PREFERRED_DEPTH: usize = 4;
/// What O_DIRECT wants of offset, length and memory at most.
const DIRECT_UNIT: u64 = 4096;
/// Zeros over a shorter extent are written as bytes: cheaper than changing the extent tree for it.
const MIN_ZERO_RANGE_BYTES: u64 = 256 << 10;

/// What an [`OsFile`] is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "there is nothing else to do with a file"
)]
pub enum Access {
    /// Reading only.
    Read,
    /// Reading and writing.
    ReadWrite,
}

impl Access {
    fn flags(self) -> OFlags {
        match self {
            Self::Read => OFlags::RDONLY,
            Self::ReadWrite => OFlags::RDWR,
        }
    }
}

/// A regular file. It grows when written past its end; reads leave the page cache as it was.
#[derive(Debug)]
pub struct OsFile {
    label: String,
    path: DataPath,
    /// The size when it was last asked for: the answer if the kernel gives none.
    last_size: AtomicU64,
    /// Size, owner or times changed since the last flush; fdatasync need not cover them.
    metadata_changed: AtomicBool,
}

impl OsFile {
    /// Opens an existing regular file. Follows symlinks; those who must not, open through
    /// [`crate::OsDirectory`] or [`crate::open_target`].
    ///
    /// # Errors
    /// It cannot be opened, or is not a regular file (`ErrorKind::Unsuitable`).
    pub fn open(path: &Path, access: Access, write_mode: WriteMode) -> Result<Self> {
        let label = path.display().to_string();
        // O_NONBLOCK: opening a FIFO must not wait for its other end.
        let flags = access.flags() | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let opened = rustix::fs::open(path, flags, Mode::empty());
        let file = opened.map_err(|e| Error::from_io(format!("open of {label}"), e.into()))?;
        Self::from_file(label, file.into(), write_mode)
    }

    /// Creates a regular file that must not exist yet, with mode 0600.
    ///
    /// # Errors
    /// `ErrorKind::AlreadyExists`, or the file system failed.
    pub fn create_new(path: &Path, write_mode: WriteMode) -> Result<Self> {
        let label = path.display().to_string();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let opened = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR);
        let file = opened.map_err(|e| Error::from_io(format!("creation of {label}"), e.into()))?;
        Self::from_file(label, file.into(), write_mode)
    }

    /// Wraps an open file; its open file description stays the one that reads and writes through the
    /// cache, so locks taken on it stay held.
    ///
    /// # Errors
    /// It is not a regular file, or the file system failed.
    pub fn from_file(label: String, file: File, write_mode: WriteMode) -> Result<Self> {
        let found = file.metadata();
        let found = found.map_err(|e| Error::from_io(format!("status of {label}"), e))?;
        if !found.is_file() {
            return Err(Error::new(
                ErrorKind::Unsuitable,
                format!("open of {label}: expected a regular file, found something else"),
            ));
        }
        Ok(Self {
            label,
            path: DataPath::new(file, DIRECT_UNIT, write_mode),
            last_size: AtomicU64::new(found.len()),
            metadata_changed: AtomicBool::new(false),
        })
    }

    pub(crate) fn file(&self) -> &File {
        self.path.file()
    }

    fn stat(&self) -> Result<std::fs::Metadata> {
        self.file().metadata().map_err(|e| self.failed("status", e))
    }

    fn failed(&self, attempt: &str, cause: impl Into<io::Error>) -> Error {
        Error::from_io(format!("{attempt} of {}", self.label), cause.into())
    }

    fn failed_extent(&self, attempt: &str, extent: Extent, cause: Errno) -> Error {
        Error::from_io(
            format!("{attempt} {extent} of {}", self.label),
            cause.into(),
        )
    }

    fn allocate(&self, extent: Extent, flags: FallocateFlags) -> rustix::io::Result<()> {
        rustix::io::retry_on_intr(|| {
            rustix::fs::fallocate(self.file(), flags, extent.start(), extent.length())
        })
    }

    /// Gives back what is allocated behind the end of the file: punching does not reach there everywhere.
    fn trim_behind_end(&self) -> Result<()> {
        rustix::fs::ftruncate(self.file(), self.size_bytes())
            .map_err(|e| self.failed("trimming", e))
    }

    fn reserve_into(&self, extents: &[Extent], newly: &mut Vec<Extent>) -> Result<()> {
        for &extent in extents {
            let unallocated = allocation::unallocated_runs(self.file(), extent)
                .map_err(|e| self.failed("allocation map", e))?;
            for run in unallocated {
                // Recorded first: a failed call may have allocated a part of it.
                newly.push(run);
                self.allocate(run, FallocateFlags::KEEP_SIZE)
                    .map_err(|e| self.failed_extent("reservation of", run, e))?;
            }
        }
        Ok(())
    }
}

impl BlockSource for OsFile {
    fn label(&self) -> &str {
        &self.label
    }

    fn size_bytes(&self) -> u64 {
        match self.file().metadata() {
            Ok(found) => {
                self.last_size.store(found.len(), Ordering::Relaxed);
                found.len()
            }
            Err(_unreachable_file_system) => self.last_size.load(Ordering::Relaxed),
        }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let read = self.path.read(offset, buffer);
        read.map_err(|e| Error::of_request("read", offset, buffer.len(), &self.label, e))
    }

    fn read_batch(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        let count = requests.len();
        self.path
            .read_batch(requests)
            .map_err(|e| Error::of_batch("read", count, &self.label, e))
    }

    fn preferred_depth(&self) -> usize {
        PREFERRED_DEPTH
    }

    fn status_at(&self, offset: u64) -> Result<(Status, u64)> {
        let size = self.size_bytes();
        let known = allocation::status_at(self.file(), offset, size);
        known.map_err(|e| Error::of_request("status", offset, 1, &self.label, e))
    }

    fn identity(&self) -> Result<Identity> {
        Ok(identity_of(self.file()))
    }

    /// Inode, size, ctime and mtime.
    fn evidence(&self) -> Result<Evidence> {
        let mut found = self.stat()?;
        let unseen = stamps::remain_the_same(self.file(), &found);
        if !unseen.is_zero() {
            // Another write meanwhile would leave no trace, a later one does.
            std::thread::sleep(unseen);
            found = self.stat()?;
        }
        let words = [found.ino(), found.size()];
        let times = [
            found.ctime(),
            found.ctime_nsec(),
            found.mtime(),
            found.mtime_nsec(),
        ];
        let words = words.into_iter().flat_map(u64::to_le_bytes);
        let times = times.into_iter().flat_map(i64::to_le_bytes);
        Ok(Evidence::from_bytes(
            &words.chain(times).collect::<Vec<u8>>(),
        ))
    }
}

/// Inode and birth time; unknown where the file system keeps no birth time.
pub(crate) fn identity_of(file: &File) -> Identity {
    let wanted = StatxFlags::INO | StatxFlags::BTIME;
    match rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, wanted) {
        Ok(found) if found.stx_mask & StatxFlags::BTIME.bits() != 0 => {
            let mut bytes = found.stx_ino.to_le_bytes().to_vec();
            bytes.extend(found.stx_btime.tv_sec.to_le_bytes());
            bytes.extend(found.stx_btime.tv_nsec.to_le_bytes());
            Identity::from_bytes(&bytes)
        }
        _ => Identity::unknown(),
    }
}

impl BlockTarget for OsFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let written = self.path.write(offset, bytes);
        written.map_err(|e| Error::of_request("write", offset, bytes.len(), &self.label, e))
    }

    fn write_batch(&self, requests: &[WriteRequest<'_>]) -> Result<()> {
        let written = self.path.write_batch(requests);
        written.map_err(|e| Error::of_batch("write", requests.len(), &self.label, e))
    }

    fn write_zeroes(&self, extent: Extent) -> Result<()> {
        if extent.length() >= MIN_ZERO_RANGE_BYTES {
            match self.allocate(extent, FallocateFlags::ZERO_RANGE) {
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                outcome => {
                    return outcome.map_err(|e| self.failed_extent("zeroing of", extent, e));
                }
            }
        }
        let written = self.path.write_zero_bytes(extent.range());
        written.map_err(|e| Error::from_io(format!("zeroing of {extent} of {}", self.label), e))
    }

    fn punch(&self, extent: Extent) -> Result<bool> {
        if extent.is_empty() {
            return Ok(true);
        }
        match self.allocate(
            extent,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        ) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(false),
            Err(error) => return Err(self.failed_extent("punching of", extent, error)),
        }
        if extent.end() > self.size_bytes() {
            self.trim_behind_end()?;
        }
        Ok(true)
    }

    fn flush(&self) -> Result<()> {
        // Taken before the call: what changes during it belongs to the next flush.
        let everything = self.metadata_changed.swap(false, Ordering::AcqRel);
        let flushed = if everything {
            rustix::fs::fsync(self.file()).map_err(io::Error::from)
        } else {
            self.path.flush_data()
        };
        flushed.map_err(|e| self.failed("flush", e))
    }

    fn read_medium(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        let count = requests.len();
        let read = self.path.read_medium(requests);
        read.map_err(|e| Error::of_batch("read from the medium", count, &self.label, e))
    }

    fn drop_cache(&self) {
        self.path.forget(0, u64::MAX >> 1);
    }

    fn reserve(&self, extents: &[Extent]) -> Result<Vec<Extent>> {
        let mut newly = Vec::new();
        match self.reserve_into(extents, &mut newly) {
            Ok(()) => Ok(newly),
            Err(error) => {
                for extent in newly {
                    // The reservation's own failure is what the caller must hear of.
                    let _also_failed = self.punch(extent);
                }
                Err(error)
            }
        }
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.metadata_changed.store(true, Ordering::Release);
        rustix::fs::ftruncate(self.file(), size_bytes)
            .map_err(|e| self.failed(&format!("resize to {size_bytes} bytes"), e))
    }

    fn logical_block_bytes(&self) -> u32 {
        4096
    }
}

impl StorageFile for OsFile {
    fn file_id(&self) -> Result<u64> {
        Ok(self.stat()?.ino())
    }

    fn allocated_bytes(&self) -> Result<u64> {
        // In units of 512 bytes, whatever the file system's block size.
        Ok(self.stat()?.blocks() * 512)
    }

    fn clone_from_file(&self, origin: &dyn StorageFile) -> Result<()> {
        let attempt = || format!("clone of {} into {}", origin.label(), self.label);
        let Some(from) = origin.as_fd() else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{}: the origin is no file of this system", attempt()),
            ));
        };
        self.metadata_changed.store(true, Ordering::Release);
        match rustix::fs::ioctl_ficlone(self.file(), from) {
            Ok(()) => self.resize(origin.size_bytes()),
            Err(e @ (Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY)) => Err(
                Error::new(ErrorKind::Unsupported, format!("{}: {e}", attempt())),
            ),
            Err(e) => Err(Error::from_io(attempt(), e.into())),
        }
    }

    fn copy_metadata(&self, origin: &dyn StorageFile) -> Result<()> {
        let attempt = || format!("copying metadata of {} to {}", origin.label(), self.label);
        let Some(from) = origin.as_fd() else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{}: the origin is no file of this system", attempt()),
            ));
        };
        self.metadata_changed.store(true, Ordering::Release);
        metadata::copy(from, self.file().as_fd()).map_err(|e| Error::from_io(attempt(), e))
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file().as_fd())
    }

    fn into_target(self: Arc<Self>) -> Arc<dyn BlockTarget> {
        self
    }
}
