//! All unsafe code of the project: aligned memory, and the few Linux calls that rustix does not wrap.
//!
//! Every function here is safe to call and does one thing; policy (what to lock, when to fall back)
//! belongs to the callers.
#![expect(
    unsafe_code,
    reason = "the one file that may: aligned allocation and raw system calls"
)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ffi::{c_int, c_uint};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::{NonNull, null_mut};
use std::time::{Duration, Instant};
use std::{slice, thread};

use rustix::ioctl::{Getter, NoArg, Opcode, Setter, Updater, ioctl};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Alignment in bytes of [`AlignedMemory`]: enough for O_DIRECT on every device in use.
pub(crate) const MEMORY_ALIGNMENT: usize = 4096;

/// Memory of at least this size is mapped: an allocator that is asked for aligned zeros touches every byte of them.
const MAPPED_FROM: usize = 128 * 1024;

/// Zero-initialised memory aligned to [`MEMORY_ALIGNMENT`].
// Invariant: `start` was mapped, or allocated with `Self::layout(length)`, as `is_mapped` says, and is fully
// initialised.
pub(crate) struct AlignedMemory {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the memory is owned by this value alone and has no thread affinity.
unsafe impl Send for AlignedMemory {}
// SAFETY: shared access only reads; writing needs `&mut self`.
unsafe impl Sync for AlignedMemory {}

impl AlignedMemory {
    /// Allocates `length` zero bytes; large ones cost memory only once touched.
    pub(crate) fn zeroed(length: usize) -> Self {
        let layout = Self::layout(length);
        let start = if Self::is_mapped(length) {
            map_zeros(length)
        } else {
            // SAFETY: the layout has a non-zero size, see `layout`.
            NonNull::new(unsafe { alloc_zeroed(layout) })
        };
        let start = start.unwrap_or_else(|| handle_alloc_error(layout));
        Self { start, length }
    }

    fn is_mapped(length: usize) -> bool {
        length >= MAPPED_FROM
    }

    fn layout(length: usize) -> Layout {
        // An empty buffer owns one byte too, so that the layout is never empty.
        Layout::from_size_align(length.max(1), MEMORY_ALIGNMENT)
            .expect("no slice is longer than isize::MAX")
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: `length` initialised bytes start there, and `&self` keeps writers out.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: `length` initialised bytes start there, and `&mut self` is exclusive.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

/// Fresh zero pages; `None` if the system gives none. Pages are at least [`MEMORY_ALIGNMENT`] on every Linux.
fn map_zeros(length: usize) -> Option<NonNull<u8>> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new private mapping at an address that the kernel chooses takes nothing from anyone.
    let mapped = unsafe { mmap_anonymous(null_mut(), length, access, MapFlags::PRIVATE) };
    NonNull::new(mapped.ok()?.cast())
}

impl Drop for AlignedMemory {
    fn drop(&mut self) {
        let start = self.start.as_ptr();
        if Self::is_mapped(self.length) {
            // SAFETY: mapped in `zeroed` with the same length, and unmapped once.
            let unmapped = unsafe { munmap(start.cast(), self.length) };
            debug_assert!(unmapped.is_ok(), "a whole mapping can be unmapped");
        } else {
            // SAFETY: allocated in `zeroed` with the same layout, and dropped once.
            unsafe { dealloc(start, Self::layout(self.length)) }
        }
    }
}

const BLKFLSBUF: Opcode = 0x1261;
const BLKGETSIZE64: Opcode = rustix::ioctl::opcode::read::<usize>(0x12, 114);
const BLKZEROOUT: Opcode = 0x127f;

/// Size of a block device in bytes.
pub(crate) fn block_device_bytes(device: impl AsFd) -> io::Result<u64> {
    // SAFETY: BLKGETSIZE64 stores one u64, whatever the word size in its opcode says.
    let getter = unsafe { Getter::<BLKGETSIZE64, u64>::new() };
    // SAFETY: the opcode and its operand agree.
    Ok(unsafe { ioctl(device, getter) }?)
}

/// Makes a range of a block device read as zeros without unmapping it. Both must be multiples of the
/// logical block size.
pub(crate) fn block_device_zero_out(device: impl AsFd, start: u64, length: u64) -> io::Result<()> {
    // SAFETY: BLKZEROOUT reads two u64, start and length in bytes.
    let setter = unsafe { Setter::<BLKZEROOUT, [u64; 2]>::new([start, length]) };
    // SAFETY: the opcode and its operand agree.
    Ok(unsafe { ioctl(device, setter) }?)
}

/// Writes dirty pages of a block device and drops its whole page cache. Needs `CAP_SYS_ADMIN`.
pub(crate) fn block_device_drop_cache(device: impl AsFd) -> io::Result<()> {
    // SAFETY: BLKFLSBUF takes no operand.
    let request = unsafe { NoArg::<BLKFLSBUF>::new() };
    // SAFETY: the opcode takes no operand.
    Ok(unsafe { ioctl(device, request) }?)
}

/// The libc crate knows it only for some architectures; where the number is another one (mips, alpha), the
/// kernel has no call of this number and says so.
const SYS_CACHESTAT: libc::c_long = 451;

/// How many pages of the range the page cache holds (cachestat(2), since Linux 6.5).
pub(crate) fn cached_pages(file: impl AsFd, start: u64, length: u64) -> io::Result<u64> {
    let range = [start, length];
    // Cached, dirty, under writeback, evicted, recently evicted.
    let mut found = [0_u64; 5];
    let flags: c_uint = 0;
    // SAFETY: the kernel reads two u64 from the range and writes five to the result.
    let outcome = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_fd().as_raw_fd(),
            range.as_ptr(),
            found.as_mut_ptr(),
            flags,
        )
    };
    if outcome == 0 {
        Ok(found[0])
    } else {
        Err(io::Error::last_os_error())
    }
}

/// What a lease probe asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lease {
    /// Nobody else has the file open for writing.
    NoWriters,
    /// Nobody else has the file open at all.
    Alone,
}

/// Signal for a lease broken during the probe: its default action is to be ignored, while that of the
/// usual SIGIO is to kill the process.
const HARMLESS_SIGNAL: c_int = libc::SIGURG;
/// `fcntl` command missing from the libc crate for glibc; the same on every Linux architecture.
const F_SETSIG: c_int = 10;
/// For those who only look.
const IN_THE_WAY: Duration = Duration::from_millis(100);

/// Does again what is in somebody's way for a moment: who looks at a target has it open, and who takes it asks for a lease.
pub(crate) fn patiently<T>(act: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let end = Instant::now() + IN_THE_WAY;
    loop {
        match act() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                thread::sleep(IN_THE_WAY / 20);
            }
            done => return done,
        }
    }
}

/// Takes and returns a lease on `file` (opened read-only for [`Lease::NoWriters`]). `WouldBlock` means
/// that somebody else has it open; other errors mean that leases are not to be had here.
pub(crate) fn probe_lease(file: impl AsFd, lease: Lease) -> io::Result<()> {
    let file = file.as_fd();
    let kind = match lease {
        Lease::NoWriters => libc::F_RDLCK,
        Lease::Alone => libc::F_WRLCK,
    };
    fcntl_integer(file, F_SETSIG, HARMLESS_SIGNAL)?;
    fcntl_integer(file, libc::F_SETLEASE, kind)?;
    fcntl_integer(file, libc::F_SETLEASE, libc::F_UNLCK)
}

fn fcntl_integer(file: BorrowedFd<'_>, command: c_int, argument: c_int) -> io::Result<()> {
    // SAFETY: F_SETSIG and F_SETLEASE take an integer and touch no memory of ours.
    let outcome = unsafe { libc::fcntl(file.as_raw_fd(), command, argument) };
    if outcome < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Locks the whole file exclusively for the lifetime of its open file description (an OFD lock).
/// `WouldBlock` means that somebody else holds a conflicting lock on some byte of it.
pub(crate) fn try_ofd_lock(file: impl AsFd) -> io::Result<()> {
    let lock = lock_of_whole_file();
    // SAFETY: F_OFD_SETLK reads one `struct flock`.
    let outcome =
        unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if outcome == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EACCES) => Err(io::ErrorKind::WouldBlock.into()),
        _ => Err(error),
    }
}

/// A lock of somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ForeignLock {
    /// The process, unless the lock belongs to an open file description.
    pub(crate) process: Option<u32>,
    /// First locked byte.
    pub(crate) start: i64,
}

/// The first lock that would conflict with locking the whole file.
pub(crate) fn find_ofd_conflict(file: impl AsFd) -> io::Result<Option<ForeignLock>> {
    let mut lock = lock_of_whole_file();
    // SAFETY: F_OFD_GETLK reads and writes one `struct flock`.
    let outcome =
        unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    if c_int::from(lock.l_type) == libc::F_UNLCK {
        return Ok(None);
    }
    let process = u32::try_from(lock.l_pid).ok().filter(|&pid| pid != 0);
    Ok(Some(ForeignLock {
        process,
        start: lock.l_start,
    }))
}

fn lock_of_whole_file() -> libc::flock {
    // SAFETY: all-zero bytes are a valid `struct flock`: from byte 0 to the end of the file.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = as_lock_field(libc::F_WRLCK);
    lock.l_whence = as_lock_field(libc::SEEK_SET);
    lock
}

fn as_lock_field(value: c_int) -> i16 {
    i16::try_from(value).expect("lock types and whence are small constants")
}

/// `struct fiemap` with room for [`FIEMAP_EXTENTS`] entries.
#[repr(C)]
struct FileMap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [FileMapExtent; FIEMAP_EXTENTS],
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FileMapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

const FIEMAP_EXTENTS: usize = 64;
/// `_IOWR('f', 11, struct fiemap)`: the header's 32 bytes; the entries follow it.
const FS_IOC_FIEMAP: Opcode = rustix::ioctl::opcode::read_write::<[u64; 4]>(b'f', 11);
const FIEMAP_EXTENT_LAST: c_uint = 1;

/// Allocated runs (start, length) of a file that overlap the range, ascending, as far as one call reports
/// them; the flag says that there is none after them.
pub(crate) fn allocated_runs(
    file: impl AsFd,
    start: u64,
    length: u64,
) -> io::Result<(Vec<(u64, u64)>, bool)> {
    let mut map = FileMap {
        start,
        length,
        flags: 0,
        mapped_extents: 0,
        extent_count: c_uint::try_from(FIEMAP_EXTENTS).expect("a small constant"),
        reserved: 0,
        extents: [FileMapExtent::default(); FIEMAP_EXTENTS],
    };
    // SAFETY: FS_IOC_FIEMAP reads the header and writes at most `extent_count` entries behind it.
    let request = unsafe { Updater::<FS_IOC_FIEMAP, FileMap>::new(&mut map) };
    // SAFETY: the opcode and its operand agree.
    unsafe { ioctl(file, request) }?;
    let mapped = (map.mapped_extents as usize).min(FIEMAP_EXTENTS);
    let extents = &map.extents[..mapped];
    let complete = mapped < FIEMAP_EXTENTS
        || extents
            .last()
            .is_some_and(|e| e.flags & FIEMAP_EXTENT_LAST != 0);
    Ok((
        extents.iter().map(|e| (e.logical, e.length)).collect(),
        complete,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_zeroed_and_may_be_empty() {
        for length in [0, 4096, 1 << 20] {
            let memory = AlignedMemory::zeroed(length);

            assert_eq!(memory.as_slice().len(), length);
            assert_eq!(memory.as_slice().as_ptr() as usize % MEMORY_ALIGNMENT, 0);
            assert!(memory.as_slice().iter().all(|&b| b == 0));
        }
    }

    #[test]
    fn a_second_description_sees_the_exclusive_lock() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let other = file.reopen().unwrap();

        try_ofd_lock(file.as_file()).unwrap();

        let refused = try_ofd_lock(&other).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        let conflict = find_ofd_conflict(&other).unwrap();
        assert_eq!(
            conflict,
            Some(ForeignLock {
                process: None,
                start: 0
            })
        );
    }

    #[test]
    fn a_lease_is_refused_exactly_while_somebody_has_it_open() {
        let file = tempfile::NamedTempFile::new_in(".").unwrap();
        let path = file.path().to_owned();
        let reader = std::fs::File::open(&path).unwrap();

        let while_open = probe_lease(&reader, Lease::NoWriters).unwrap_err();
        let (file, path) = file.into_parts();
        drop(file);

        assert_eq!(while_open.kind(), io::ErrorKind::WouldBlock);
        probe_lease(&reader, Lease::NoWriters).unwrap();
        probe_lease(&reader, Lease::Alone).unwrap();
        drop(path);
    }
}
