//! The contracts every device keeps: [`BlockSource`] is read, [`BlockTarget`] is also written,
//! [`StorageFile`] and [`StorageDir`] are what the transfer log and its state live in.
//!
//! Offsets and lengths are bytes. All methods take `&self`: a device is shared by several workers, and
//! requests that do not overlap may run at the same time. Requests that overlap are the caller's bug; the
//! result is then either of the two.
//!
//! Nothing written is durable before [`BlockTarget::flush`] returned `Ok`. After a failed write or flush the
//! unflushed content of that device is unknown for good (transfer log fault model, F4): callers must treat
//! the handle as dead and never take a later successful flush as proof.

use std::fmt::Debug;
use std::sync::Arc;

use blockferry_core::Extent;

use crate::evidence::{Evidence, Identity};
use crate::{ErrorKind, Result};

/// What is known about the content of an extent without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "callers must decide for every status"
)]
pub enum Status {
    /// May hold anything; read it.
    Data,
    /// Reads as zeros, guaranteed by the device (a hole, an unwritten extent).
    Zero,
}

/// One positioned read of a batch.
#[derive(Debug)]
#[expect(
    clippy::exhaustive_structs,
    reason = "a plain request, built by callers"
)]
pub struct ReadRequest<'a> {
    /// First byte to read.
    pub offset: u64,
    /// Filled completely on success.
    pub buffer: &'a mut [u8],
}

/// One positioned write of a batch.
#[derive(Clone, Copy, Debug)]
#[expect(
    clippy::exhaustive_structs,
    reason = "a plain request, built by callers"
)]
pub struct WriteRequest<'a> {
    /// First byte to write.
    pub offset: u64,
    /// Written completely on success.
    pub bytes: &'a [u8],
}

/// A device that can be read at any offset.
pub trait BlockSource: Debug + Send + Sync {
    /// Name for messages: a path or an address, never a secret.
    fn label(&self) -> &str;

    /// Size in bytes, now.
    fn size_bytes(&self) -> u64;

    /// Fills `buffer` from `offset`. Reading past the end is an error, never a short read.
    ///
    /// # Errors
    /// The device failed, or has become shorter than `offset + buffer.len()`.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// Serves several reads; devices with latency override it to keep `preferred_depth` in flight.
    ///
    /// # Errors
    /// Any request failed; the buffers' content is then undefined.
    fn read_batch(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        requests
            .iter_mut()
            .try_for_each(|r| self.read_at(r.offset, r.buffer))
    }

    /// How many requests this device likes to have in flight.
    fn preferred_depth(&self) -> usize {
        1
    }

    /// Status at `offset` and the end of the run that has it; the end is greater than `offset` and at most
    /// the size. `offset` is less than the size.
    ///
    /// # Errors
    /// The device failed.
    fn status_at(&self, offset: u64) -> Result<(Status, u64)> {
        let _ = offset;
        Ok((Status::Data, self.size_bytes()))
    }

    /// Which device this is, in a form that survives a reboot. Unknown by default.
    ///
    /// # Errors
    /// The device failed.
    fn identity(&self) -> Result<Identity> {
        Ok(Identity::unknown())
    }

    /// Something that changes whenever the content may have changed. Unknown by default.
    ///
    /// # Errors
    /// The device failed.
    fn evidence(&self) -> Result<Evidence> {
        Ok(Evidence::unknown())
    }
}

/// A device that can also be written.
pub trait BlockTarget: BlockSource {
    /// Writes all of `bytes` at `offset`. Writing past the end is an error, except on a [`StorageFile`],
    /// which grows.
    ///
    /// # Errors
    /// The device failed; what the range then holds is unknown.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Serves several writes that do not overlap, in any order, possibly at the same time.
    ///
    /// # Errors
    /// Any request failed.
    fn write_batch(&self, requests: &[WriteRequest<'_>]) -> Result<()> {
        requests
            .iter()
            .try_for_each(|r| self.write_at(r.offset, r.bytes))
    }

    /// Makes the extent read as zeros and keeps it allocated where the device knows allocation.
    ///
    /// # Errors
    /// The device failed.
    fn write_zeroes(&self, extent: Extent) -> Result<()>;

    /// Gives the space of the extent back; it reads as zeros afterwards. A device that cannot (or whose
    /// discard does not guarantee zeros) does nothing and returns `false`.
    ///
    /// # Errors
    /// The device failed.
    fn punch(&self, extent: Extent) -> Result<bool> {
        let _ = extent;
        Ok(false)
    }

    /// Makes everything written so far durable (fdatasync or a device flush). For files also the size.
    ///
    /// # Errors
    /// Something written so far may be lost; the handle is dead.
    fn flush(&self) -> Result<()>;

    /// Reads from the medium, not from a cache that may hide a lost write. Called after [`Self::flush`].
    ///
    /// # Errors
    /// As [`BlockSource::read_batch`].
    fn read_medium(&self, requests: &mut [ReadRequest<'_>]) -> Result<()>;

    /// Forgets cached pages of the whole device, so that the next reads come from the medium. Advisory.
    fn drop_cache(&self) {}

    /// Allocates what is not allocated in the extents without changing content or size, and returns what it
    /// newly allocated, so that [`Self::punch`] can give it back. Devices without allocation return nothing.
    ///
    /// # Errors
    /// Not enough space (`ErrorKind::NoSpace`), or the device failed.
    fn reserve(&self, extents: &[Extent]) -> Result<Vec<Extent>> {
        let _ = extents;
        Ok(Vec::new())
    }

    /// Changes the size. Fixed-size devices accept only their own size.
    ///
    /// # Errors
    /// The size cannot be changed, or the device failed.
    fn resize(&self, size_bytes: u64) -> Result<()>;

    /// Alignment in bytes for requests that bypass the cache, and the unit of atomicity: 512 or 4096.
    fn logical_block_bytes(&self) -> u32 {
        512
    }
}

/// A file of a [`StorageDir`]: a target that grows when written past its end.
pub trait StorageFile: BlockTarget {
    /// Identity of the file itself (not of its name), equal for two handles of one file, stable while the
    /// file exists. Recovery after a rename-exchange tells old from new by it.
    ///
    /// # Errors
    /// The file system failed.
    fn file_id(&self) -> Result<u64>;

    /// Makes this file share all blocks of `origin`, a file of the same kind of directory (FICLONE).
    ///
    /// # Errors
    /// `ErrorKind::Unsupported` where the file system cannot.
    fn clone_from_file(&self, origin: &dyn StorageFile) -> Result<()>;

    /// Copies owner, mode, ACL, extended attributes and times from `origin`.
    ///
    /// # Errors
    /// The file system failed or refused.
    fn copy_metadata(&self, origin: &dyn StorageFile) -> Result<()>;

    /// Bytes it takes on its disk: less than its size where it has holes.
    ///
    /// # Errors
    /// The file system failed.
    fn allocated_bytes(&self) -> Result<u64> {
        Ok(self.size_bytes())
    }

    /// The operating system's handle, where there is one: what lets two files of one backend work together.
    fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }

    /// The trait object as a target, for callers that only write blocks.
    fn into_target(self: Arc<Self>) -> Arc<dyn BlockTarget>;
}

/// Held while a directory or target is ours; dropping it releases the lock.
pub trait LockGuard: Debug + Send + Sync {}

/// A directory that holds files of one job. Names are single path components.
pub trait StorageDir: Debug + Send + Sync {
    /// Name for messages.
    fn label(&self) -> &str;

    /// Creates a file that must not exist yet (O_EXCL, mode 0600). Its name is durable after [`Self::sync`].
    ///
    /// # Errors
    /// `ErrorKind::AlreadyExists`, no space, or the file system failed.
    fn create(&self, name: &str) -> Result<Arc<dyn StorageFile>>;

    /// Opens an existing file for reading and writing; `None` if there is none. Never follows a symlink.
    ///
    /// # Errors
    /// The file system failed or refused.
    fn open(&self, name: &str) -> Result<Option<Arc<dyn StorageFile>>>;

    /// Removes a file. A name that is not there is not an error: recovery may finish an earlier removal.
    ///
    /// # Errors
    /// The file system failed.
    fn remove(&self, name: &str) -> Result<()>;

    /// Renames `from` to `to`, which must not exist (`RENAME_NOREPLACE`).
    ///
    /// # Errors
    /// `ErrorKind::AlreadyExists`, or the file system failed.
    fn rename_new(&self, from: &str, to: &str) -> Result<()>;

    /// Swaps two names atomically (`RENAME_EXCHANGE`).
    ///
    /// # Errors
    /// `ErrorKind::Unsupported` where the file system cannot, or it failed.
    fn exchange(&self, one: &str, other: &str) -> Result<()>;

    /// All file names, sorted.
    ///
    /// # Errors
    /// The file system failed.
    fn names(&self) -> Result<Vec<String>>;

    /// Makes creates, removes, renames and exchanges durable (fsync of the directory).
    ///
    /// # Errors
    /// Some of them may be lost.
    fn sync(&self) -> Result<()>;

    /// Free bytes that this process may use.
    ///
    /// # Errors
    /// The file system failed.
    fn available_bytes(&self) -> Result<u64>;

    /// Whether files here may share blocks ([`StorageFile::clone_from_file`]); trying tells for sure.
    fn may_clone(&self) -> bool {
        false
    }

    /// Whether names here can be exchanged: tried on two new files of these names, which are gone afterwards.
    /// To be asked before anything relies on [`Self::exchange`].
    ///
    /// # Errors
    /// A name is taken, or the file system failed at something else than the exchange.
    fn supports_exchange(&self, scratch: [&str; 2]) -> Result<bool> {
        let [one, other] = scratch;
        let first = self.create(one)?.file_id();
        let tried = self.create(other).and_then(|second| {
            let id = second.file_id();
            // Closed before it is removed: a file system in user space hides a file that is still open.
            drop(second);
            let tried = first.and_then(|first| try_exchange(self, scratch, [first, id?]));
            self.remove(other).and(tried)
        });
        self.remove(one).and(tried)
    }

    /// Takes the lock named `name` (created if needed) or fails with `ErrorKind::Busy` naming it.
    ///
    /// # Errors
    /// Another process holds it, or the file system failed.
    fn lock(&self, name: &str) -> Result<Box<dyn LockGuard>>;
}

/// A file system in user space that ignores the flag renames one over the other and calls it done.
fn try_exchange<D: StorageDir + ?Sized>(dir: &D, names: [&str; 2], ids: [u64; 2]) -> Result<bool> {
    match dir.exchange(names[0], names[1]) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(false),
        Err(error) => return Err(error),
    }
    for (name, expected) in names.into_iter().rev().zip(ids) {
        let found = dir.open(name)?.map(|found| found.file_id()).transpose()?;
        if found != Some(expected) {
            return Ok(false);
        }
    }
    Ok(true)
}
