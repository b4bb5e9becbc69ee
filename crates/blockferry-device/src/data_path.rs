//! How bytes get from and to an open file or block device, and which of its two descriptors they take.
//!
//! ```text
//!              in the cache?                     aligned or widened
//! read_at  ──> cachestat(2) ── yes ──> buffered;  no ──> O_DIRECT
//! write_at ──> WriteMode::Direct, whole units ─> O_DIRECT        anything else ─> buffered
//! medium   ─────────────────────────────────────> O_DIRECT, spans of neighbours, several in flight
//! ```
//!
//! Reads thereby leave the page cache as it was: what was cached is taken from there, and what was not is
//! not brought in. The kernel keeps both descriptors coherent. Without O_DIRECT everything is buffered.

use std::fs::File;
use std::io;
use std::io::IoSlice;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{Advice, AtFlags, OFlags, StatxFlags};
use rustix::io::Errno;

use crate::residency::{self, Run};
use crate::spans::{JoinRule, Placed, plan_spans};
use crate::workers::{Scratch, run_parts};
use crate::{AlignedBuffer, ReadRequest, WriteRequest};

/// How writes travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "the page cache is used or it is not"
)]
pub enum WriteMode {
    /// Through the page cache; the flush writes it all. For many small writes that cannot be batched.
    Buffered,
    /// Past the page cache wherever alignment allows, several requests of a batch at once. As fast as the
    /// cache when that is warm and twice as fast when it is not, and it pushes nothing out of it.
    #[default]
    Direct,
}

/// Bytes written by one system call at most, and size of a bounce buffer.
const MAX_SPAN_BYTES: u64 = 1 << 20;
/// Bytes read past the cache by one system call at most. A virtual disk serves larger reads no faster, but lets the
/// writes beside them wait: with reads of 1 MiB a third of the bytes were written that reads of 256 KiB left room for.
const MAX_READ_BYTES: u64 = 256 << 10;
/// Reading a gap of this size costs less than another request.
const MAX_READ_GAP_BYTES: u64 = 64 << 10;
/// `IOV_MAX` of Linux.
const MAX_VECTORS: usize = 1024;

const READ_RULE: JoinRule = JoinRule {
    max_gap_bytes: MAX_READ_GAP_BYTES,
    max_span_bytes: MAX_READ_BYTES,
    max_requests: MAX_VECTORS,
};
/// The kernel cuts a gathered write into what the device takes at once and keeps all of that in flight.
const WRITE_RULE: JoinRule = JoinRule {
    max_gap_bytes: 0,
    max_span_bytes: 4 * MAX_SPAN_BYTES,
    ..READ_RULE
};

/// The descriptors of one open file or block device.
#[derive(Debug)]
pub(crate) struct DataPath {
    buffered: File,
    /// Same file, opened with O_DIRECT.
    direct: Option<File>,
    /// O_DIRECT may be answered from the cache, so it has to be emptied first.
    forget_first: bool,
    /// O_DIRECT requests begin and end at multiples of this many bytes; a power of two up to 4096.
    unit: u64,
    write_mode: WriteMode,
}

impl DataPath {
    /// Both descriptors for `buffered`, of which the second is optional. `unit` is 512 or 4096.
    pub(crate) fn new(buffered: File, unit: u64, write_mode: WriteMode) -> Self {
        let direct = reopen_direct(&buffered, unit);
        let forget_first = may_cache_direct_reads(&buffered);
        Self {
            buffered,
            direct,
            forget_first,
            unit,
            write_mode,
        }
    }

    pub(crate) fn file(&self) -> &File {
        &self.buffered
    }

    /// Fills `buffer`: what is cached from the cache, the rest past it.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let Some((direct, runs)) = self.plan_read(offset, buffer.len()) else {
            return self.buffered.read_exact_at(buffer, offset);
        };
        let mut scratch = Scratch::default();
        split_at_runs(ReadRequest { offset, buffer }, &runs, |part, cached| {
            if cached {
                self.buffered.read_exact_at(part.buffer, part.offset)
            } else {
                self.read_direct(direct, &mut scratch, part.offset, part.buffer)
            }
        })
    }

    /// Which parts of a read are cached; `None`: read it all through the cache.
    fn plan_read(&self, offset: u64, length: usize) -> Option<(&File, Vec<Run>)> {
        let direct = self.direct.as_ref()?;
        let range = offset..offset.checked_add(length as u64)?;
        Some((direct, residency::runs(&self.buffered, range)?))
    }

    /// Fills `buffer` past the page cache, through a bounce buffer where it is not aligned.
    fn read_direct(
        &self,
        direct: &File,
        scratch: &mut Scratch,
        offset: u64,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        let whole = self.aligned_prefix(offset, buffer);
        let (aligned, rest) = buffer.split_at_mut(whole);
        let outcome = read_whole_units(direct, offset, aligned)
            .and_then(|()| self.read_bounced(direct, scratch, offset + whole as u64, rest));
        match outcome {
            Err(error) if refuses_direct(&error) => {
                self.forget(offset, buffer.len() as u64);
                self.buffered.read_exact_at(buffer, offset)
            }
            outcome => outcome,
        }
    }

    fn aligned_prefix(&self, offset: u64, buffer: &[u8]) -> usize {
        if offset.is_multiple_of(self.unit) && self.is_aligned_memory(buffer) {
            buffer.len() - buffer.len() % to_usize(self.unit)
        } else {
            0
        }
    }

    fn is_aligned_memory(&self, bytes: &[u8]) -> bool {
        bytes.as_ptr().addr().is_multiple_of(to_usize(self.unit))
    }

    fn read_bounced(
        &self,
        direct: &File,
        scratch: &mut Scratch,
        mut offset: u64,
        mut buffer: &mut [u8],
    ) -> io::Result<()> {
        while !buffer.is_empty() {
            let start = offset - offset % self.unit;
            let skip = to_usize(offset - start);
            let count = buffer.len().min(to_usize(MAX_SPAN_BYTES) - skip);
            let bounce = self.read_widened(direct, scratch, start, skip + count)?;
            let (now, later) = buffer.split_at_mut(count);
            now.copy_from_slice(&bounce[skip..]);
            (offset, buffer) = (offset + count as u64, later);
        }
        Ok(())
    }

    /// `length` bytes from the aligned offset `start`; reads whole units, of which the last may lie partly
    /// behind the end of the file.
    fn read_widened<'s>(
        &self,
        direct: &File,
        scratch: &'s mut Scratch,
        start: u64,
        length: usize,
    ) -> io::Result<&'s [u8]> {
        let bounce = scratch.bounce(length.next_multiple_of(to_usize(self.unit)));
        let mut done = 0;
        while done < length {
            match direct.read_at(&mut bounce[done..], start + done as u64) {
                // A count that is not whole units means that the file ends there.
                Ok(count) if count == 0 || (done + count < length && !self.is_whole(count)) => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(&bounce[..length])
    }

    fn is_whole(&self, count: usize) -> bool {
        (count as u64).is_multiple_of(self.unit)
    }

    /// Serves a batch of reads: what is cached from there, the rest in spans.
    pub(crate) fn read_batch(&self, requests: &mut [ReadRequest<'_>]) -> io::Result<()> {
        let mut past_cache = Vec::new();
        for request in requests {
            let (offset, length) = (request.offset, request.buffer.len());
            let whole = ReadRequest {
                offset,
                buffer: &mut *request.buffer,
            };
            match self.plan_read(offset, length) {
                None => self.buffered.read_exact_at(whole.buffer, offset)?,
                Some((_, runs)) => split_at_runs(whole, &runs, |part, cached| {
                    if cached {
                        return self.buffered.read_exact_at(part.buffer, part.offset);
                    }
                    past_cache.push(part);
                    Ok(())
                })?,
            }
        }
        match &self.direct {
            Some(direct) => self.read_batch_direct(direct, &mut past_cache),
            None => Ok(()),
        }
    }

    fn read_all_buffered(&self, requests: &mut [ReadRequest<'_>]) -> io::Result<()> {
        run_parts(requests.iter_mut().collect(), |_, request| {
            self.buffered.read_exact_at(request.buffer, request.offset)
        })
    }

    /// Serves a batch of reads from the medium.
    pub(crate) fn read_medium(&self, requests: &mut [ReadRequest<'_>]) -> io::Result<()> {
        if self.direct.is_none() || self.forget_first {
            for request in requests.iter() {
                self.forget(request.offset, request.buffer.len() as u64);
            }
        }
        match &self.direct {
            Some(direct) => self.read_batch_direct(direct, requests),
            None => self.read_all_buffered(requests),
        }
    }

    fn read_batch_direct(&self, direct: &File, requests: &mut [ReadRequest<'_>]) -> io::Result<()> {
        let mut parts: Vec<_> = requests.iter_mut().flat_map(read_parts).collect();
        parts.sort_unstable_by_key(|part| part.offset);
        let spans = plan_spans(&parts, READ_RULE);
        run_parts(split_at_spans(&mut parts, &spans), |scratch, span| {
            self.read_span(direct, scratch, span)
        })
    }

    /// Reads neighbouring requests with one system call.
    fn read_span(
        &self,
        direct: &File,
        scratch: &mut Scratch,
        span: &mut [ReadRequest<'_>],
    ) -> io::Result<()> {
        if let [request] = span {
            return self.read_direct(direct, scratch, request.offset, request.buffer);
        }
        let start = span[0].offset - span[0].offset % self.unit;
        let end = span[span.len() - 1].end();
        match self.read_widened(direct, scratch, start, to_usize(end - start)) {
            Ok(bounce) => {
                for request in span {
                    let at = to_usize(request.offset - start);
                    request
                        .buffer
                        .copy_from_slice(&bounce[at..at + request.buffer.len()]);
                }
                Ok(())
            }
            Err(error) if refuses_direct(&error) => span.iter_mut().try_for_each(|request| {
                self.read_direct(direct, scratch, request.offset, request.buffer)
            }),
            Err(error) => Err(error),
        }
    }

    /// Writes all of `bytes`.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_with(&mut Scratch::default(), offset, bytes)
    }

    fn write_with(&self, scratch: &mut Scratch, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let Some(direct) = self.direct_for_writes(offset) else {
            return self.buffered.write_all_at(bytes, offset);
        };
        let (whole, tail) = bytes.split_at(bytes.len() - bytes.len() % to_usize(self.unit));
        match self.write_direct(direct, scratch, offset, whole) {
            Err(error) if refuses_direct(&error) => self.buffered.write_all_at(bytes, offset),
            Ok(()) => self
                .buffered
                .write_all_at(tail, offset + whole.len() as u64),
            Err(error) => Err(error),
        }
    }

    fn direct_for_writes(&self, offset: u64) -> Option<&File> {
        self.direct
            .as_ref()
            .filter(|_| self.write_mode == WriteMode::Direct && offset.is_multiple_of(self.unit))
    }

    /// Writes whole units, copying them to aligned memory first where they are not.
    fn write_direct(
        &self,
        direct: &File,
        scratch: &mut Scratch,
        offset: u64,
        bytes: &[u8],
    ) -> io::Result<()> {
        if self.is_aligned_memory(bytes) {
            return direct.write_all_at(bytes, offset);
        }
        let mut at = offset;
        for piece in bytes.chunks(to_usize(MAX_SPAN_BYTES)) {
            let bounce = scratch.bounce(piece.len());
            bounce.copy_from_slice(piece);
            direct.write_all_at(bounce, at)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Serves a batch of writes; requests that touch become one system call.
    pub(crate) fn write_batch(&self, requests: &[WriteRequest<'_>]) -> io::Result<()> {
        let mut sorted = requests.to_vec();
        sorted.sort_unstable_by_key(|request| request.offset);
        let spans = plan_spans(&sorted, WRITE_RULE);
        if self.write_mode == WriteMode::Buffered || self.direct.is_none() {
            // The page cache takes one writer per file at a time.
            let mut scratch = Scratch::default();
            return spans
                .into_iter()
                .try_for_each(|span| self.write_span(&mut scratch, &sorted[span]));
        }
        let parts = spans.into_iter().map(|span| &sorted[span]).collect();
        run_parts(parts, |scratch, span| self.write_span(scratch, span))
    }

    fn write_span(&self, scratch: &mut Scratch, span: &[WriteRequest<'_>]) -> io::Result<()> {
        if let [request] = span {
            return self.write_with(scratch, request.offset, request.bytes);
        }
        let file = match self.direct_for_writes(span[0].offset) {
            Some(direct) if span.iter().all(|r| self.is_aligned_request(r)) => direct,
            Some(_) => return self.write_gathered(scratch, span),
            None => &self.buffered,
        };
        let vectors: Vec<_> = span
            .iter()
            .map(|request| IoSlice::new(request.bytes))
            .collect();
        let wanted: u64 = span.iter().map(Placed::length).sum();
        match rustix::io::pwritev(file, &vectors, span[0].offset) {
            Ok(count) if count as u64 == wanted => Ok(()),
            // Short or refused: one by one says exactly what is the matter. Writing some bytes a second
            // time changes nothing.
            Ok(_) | Err(Errno::INTR | Errno::INVAL) => self.write_each(scratch, span),
            Err(error) => Err(error.into()),
        }
    }

    fn is_aligned_request(&self, request: &WriteRequest<'_>) -> bool {
        self.is_aligned_memory(request.bytes) && self.is_whole(request.bytes.len())
    }

    /// Copies a span that is not aligned in memory together and writes it as one request.
    fn write_gathered(&self, scratch: &mut Scratch, span: &[WriteRequest<'_>]) -> io::Result<()> {
        let length: u64 = span.iter().map(Placed::length).sum();
        let mut gathered = std::mem::take(scratch);
        let bounce = gathered.bounce(to_usize(length));
        let mut free = &mut *bounce;
        for request in span {
            let (now, later) = free.split_at_mut(request.bytes.len());
            now.copy_from_slice(request.bytes);
            free = later;
        }
        let outcome = self.write_with(scratch, span[0].offset, bounce);
        *scratch = gathered;
        outcome
    }

    fn write_each(&self, scratch: &mut Scratch, span: &[WriteRequest<'_>]) -> io::Result<()> {
        span.iter()
            .try_for_each(|request| self.write_with(scratch, request.offset, request.bytes))
    }

    /// Writes zeros the slow way.
    pub(crate) fn write_zero_bytes(&self, range: Range<u64>) -> io::Result<()> {
        let piece_bytes = MAX_SPAN_BYTES.min(range.end - range.start);
        let zeros = AlignedBuffer::zeroed(to_usize(piece_bytes.next_multiple_of(4096)));
        let mut at = range.start;
        while at < range.end {
            let count = (range.end - at).min(MAX_SPAN_BYTES);
            self.write(at, &zeros[..to_usize(count)])?;
            at += count;
        }
        Ok(())
    }

    /// Makes data, and what is needed to find it again, durable. Covers both descriptors.
    pub(crate) fn flush_data(&self) -> io::Result<()> {
        // No retry on EINTR or after a failure: a second success would prove nothing.
        Ok(rustix::fs::fdatasync(&self.buffered)?)
    }

    /// Drops clean cached pages of the range.
    pub(crate) fn forget(&self, offset: u64, length: u64) {
        // Advisory: what stays cached is only slower to tell from the medium, and O_DIRECT does not care.
        let _advisory = rustix::fs::fadvise(
            &self.buffered,
            offset,
            NonZeroU64::new(length),
            Advice::DontNeed,
        );
    }
}

/// Opens the same file again with O_DIRECT, where it can be had.
fn reopen_direct(file: &File, unit: u64) -> Option<File> {
    if !honours_direct(file, unit) {
        return None;
    }
    let access = rustix::fs::fcntl_getfl(file).ok()? & OFlags::RWMODE;
    // Through /proc it is the same inode, whatever happens to its name meanwhile.
    let path = format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&file.as_fd())
    );
    let flags = access | OFlags::DIRECT | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, rustix::fs::Mode::empty())
        .ok()
        .map(File::from)
}

/// Some file systems accept O_DIRECT and use the cache all the same; those that say so are believed.
fn honours_direct(file: &File, unit: u64) -> bool {
    let flags = StatxFlags::DIOALIGN;
    match rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, flags) {
        Ok(found) if found.stx_mask & flags.bits() != 0 => {
            (1..=unit).contains(&u64::from(found.stx_dio_offset_align))
        }
        _ => true,
    }
}

/// Btrfs reads compressed extents through the cache even with O_DIRECT.
fn may_cache_direct_reads(file: &File) -> bool {
    const BTRFS_SUPER_MAGIC: i64 = 0x9123_683E;
    rustix::fs::fstatfs(file).is_ok_and(|found| found.f_type == BTRFS_SUPER_MAGIC)
}

/// Whether the file system turned O_DIRECT down for this request, rather than failing it.
fn refuses_direct(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

fn read_whole_units(direct: &File, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    read_parts(&mut ReadRequest { offset, buffer })
        .try_for_each(|part| direct.read_exact_at(part.buffer, part.offset))
}

/// Cuts a request into parts that are read by one system call each.
fn read_parts<'p>(request: &'p mut ReadRequest<'_>) -> impl Iterator<Item = ReadRequest<'p>> {
    let offsets = (request.offset..).step_by(to_usize(MAX_READ_BYTES));
    let buffers = request.buffer.chunks_mut(to_usize(MAX_READ_BYTES));
    offsets
        .zip(buffers)
        .map(|(offset, buffer)| ReadRequest { offset, buffer })
}

/// Hands out the parts of a request that `runs`, which cover it, make of it.
fn split_at_runs<'b>(
    request: ReadRequest<'b>,
    runs: &[Run],
    mut part: impl FnMut(ReadRequest<'b>, bool) -> io::Result<()>,
) -> io::Result<()> {
    let mut rest = request.buffer;
    for run in runs {
        let (buffer, later) = rest.split_at_mut(to_usize(run.range.end - run.range.start));
        part(
            ReadRequest {
                offset: run.range.start,
                buffer,
            },
            run.cached,
        )?;
        rest = later;
    }
    Ok(())
}

/// Gives every span its part of the sorted requests.
fn split_at_spans<'s, T>(mut sorted: &'s mut [T], spans: &[Range<usize>]) -> Vec<&'s mut [T]> {
    let mut parts = Vec::with_capacity(spans.len());
    for span in spans {
        let (part, rest) = sorted.split_at_mut(span.len());
        parts.push(part);
        sorted = rest;
    }
    parts
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("lengths of slices and spans fit the address space")
}
