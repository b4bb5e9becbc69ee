//! Requests and their answers. Several workers share a connection: one reads a request, the others carry out theirs, and
//! answers go out as they are ready, so that a client may have many under way. Each worker has one buffer, which is all
//! the memory that a client can make us use.

#![expect(
    clippy::big_endian_bytes,
    reason = "the protocol of NBD is in network byte order"
)]

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use blockferry_core::Extent;
use blockferry_device::{Error, Result};

use super::MOST_REQUEST_BYTES;
use super::disk::{MOST_RUNS, NbdExport, Space, number_of};
use super::welcome::{ALLOCATION_ID, Agreed, unsound};
use crate::wire::{
    self, CHUNK_BYTES, REQUEST_BYTES, Request, SIMPLE_BYTES, chunk, errno, kind, request_flag,
};

/// What is read, written and sent at once: longer requests are carried out in pieces.
pub(crate) const PIECE_BYTES: usize = 1024 * 1024;
/// Room before a piece for the longest header, so that both are sent at once; whole pages stay aligned behind it.
const HEAD_BYTES: usize = 64;
/// In front of the data of a chunk: its offset.
const DATA_HEAD_BYTES: usize = CHUNK_BYTES + 8;

/// A connection whose client may ask for something.
pub(crate) struct Requests<'r, R, W> {
    reader: Mutex<R>,
    writer: Mutex<W>,
    export: &'r NbdExport,
    agreed: Agreed,
    /// The client took leave, or cannot be understood any more.
    is_over: AtomicBool,
    /// Told of what the disk could not do.
    failed: &'r (dyn Fn(&Error) + Sync),
}

/// What there is to do about a request once its bytes are taken.
enum Task {
    /// All of it is still to do; of a write the bytes are in the buffer.
    CarryOut,
    /// It was done piece by piece, or refused.
    Answer(Outcome),
}

/// The number of an error, 0 for none.
type Outcome = u32;

impl<'r, R: Read, W: Write> Requests<'r, R, W> {
    pub(crate) fn new(
        (reader, writer): (R, W),
        export: &'r NbdExport,
        agreed: Agreed,
        failed: &'r (dyn Fn(&Error) + Sync),
    ) -> Self {
        Self {
            reader: Mutex::new(reader),
            writer: Mutex::new(writer),
            export,
            agreed,
            is_over: AtomicBool::new(false),
            failed,
        }
    }

    /// What one worker does: takes requests and answers them until the client leaves.
    ///
    /// # Errors
    /// The client cannot be understood, is silent in the middle of a request, does not take its answers, or the
    /// connection failed.
    pub(crate) fn work(&self) -> io::Result<()> {
        let mut buffer = Buffer::default();
        loop {
            let taken = self.take(&mut buffer);
            let answered = match taken {
                Ok(Some((request, Task::CarryOut))) => self.carry_out(&request, &mut buffer),
                Ok(Some((request, Task::Answer(outcome)))) => self.answer(&request, outcome),
                Ok(None) => return Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = answered {
                // Where we failed first, the others only find that it is over.
                let known = self.is_over.swap(true, Ordering::SeqCst);
                return if known { Ok(()) } else { Err(error) };
            }
        }
    }

    /// The next request with the bytes that belong to it; `None` if there is none any more.
    fn take(&self, buffer: &mut Buffer) -> io::Result<Option<(Request, Task)>> {
        let mut reader = lock(&self.reader);
        let Some(header) = self.header(&mut *reader)? else {
            self.is_over.store(true, Ordering::SeqCst);
            return Ok(None);
        };
        let request = Request::of(&header).ok_or_else(|| unsound("it sends no request of NBD"))?;
        let task = match request.kind {
            kind::DISCONNECT => {
                self.is_over.store(true, Ordering::SeqCst);
                return Ok(None);
            }
            kind::WRITE => self.take_bytes(&mut *reader, &request, buffer)?,
            _ => self.refusal(&request).map_or(Task::CarryOut, Task::Answer),
        };
        Ok(Some((request, task)))
    }

    /// A client may take its time between requests, and not in them.
    fn header(&self, reader: &mut R) -> io::Result<Option<[u8; REQUEST_BYTES]>> {
        let mut header = [0; REQUEST_BYTES];
        let begun = loop {
            if self.is_over.load(Ordering::SeqCst) {
                return Ok(None);
            }
            match reader.read(&mut header) {
                Ok(0) => return Ok(None),
                Ok(bytes) => break bytes,
                Err(error) if is_silence(&error) => {}
                Err(error) => return Err(error),
            }
        };
        reader.read_exact(&mut header[begun..])?;
        Ok(Some(header))
    }

    /// Takes what is to be written. What is longer than a piece is written meanwhile.
    fn take_bytes(
        &self,
        reader: &mut R,
        request: &Request,
        buffer: &mut Buffer,
    ) -> io::Result<Task> {
        if request.length > MOST_REQUEST_BYTES {
            // So much will not be read only to forget it.
            return Err(unsound("it sends a request that is too long"));
        }
        let length = usize::try_from(request.length).unwrap_or(usize::MAX);
        let refusal = self.refusal(request);
        if refusal.is_none() && length <= PIECE_BYTES {
            reader.read_exact(buffer.piece(length))?;
            return Ok(Task::CarryOut);
        }
        let mut outcome = refusal.unwrap_or(0);
        for (offset, bytes) in pieces(request) {
            let piece = buffer.piece(bytes);
            reader.read_exact(piece)?;
            if outcome == 0 {
                outcome = self.told(self.export.write(offset, piece));
            }
        }
        if outcome == 0 {
            outcome = self.told(self.settle(request));
        }
        Ok(Task::Answer(outcome))
    }

    /// Why a request is not carried out at all, if so.
    fn refusal(&self, request: &Request) -> Option<Outcome> {
        let writes = matches!(request.kind, kind::WRITE | kind::TRIM | kind::WRITE_ZEROES);
        if self.export.is_read_only() && writes {
            return Some(errno::DENIED);
        }
        let may_have = match request.kind {
            kind::WRITE_ZEROES => request_flag::FUA | request_flag::NO_HOLE,
            kind::BLOCK_STATUS => request_flag::FUA | request_flag::ONE,
            _ => request_flag::FUA,
        };
        let is_known = match request.kind {
            kind::READ => request.length <= MOST_REQUEST_BYTES,
            kind::WRITE | kind::TRIM | kind::WRITE_ZEROES => true,
            kind::FLUSH => !self.export.is_read_only(),
            kind::BLOCK_STATUS => self.agreed.allocation && request.length > 0,
            _ => false,
        };
        if !is_known || request.flags & !may_have != 0 {
            return Some(errno::INVALID);
        }
        let inside =
            request.kind == kind::FLUSH || self.export.holds(request.offset, request.length);
        match request.kind {
            _ if inside => None,
            kind::WRITE | kind::WRITE_ZEROES => Some(errno::NO_SPACE),
            _ => Some(errno::INVALID),
        }
    }

    fn carry_out(&self, request: &Request, buffer: &mut Buffer) -> io::Result<()> {
        let range = request.offset..request.offset.saturating_add(u64::from(request.length));
        let extent = || Extent::from_range(range);
        let done = match request.kind {
            kind::READ if self.agreed.structured => return self.read_in_chunks(request, buffer),
            kind::READ => return self.read_at_once(request, buffer),
            kind::BLOCK_STATUS => return self.block_status(request, extent()),
            kind::WRITE => {
                let bytes = buffer.piece(usize::try_from(request.length).unwrap_or_default());
                self.export.write(request.offset, bytes)
            }
            kind::TRIM => self.export.trim(extent()),
            kind::WRITE_ZEROES => {
                let space = match request.has(request_flag::NO_HOLE) {
                    true => Space::Kept,
                    false => Space::GivenBack,
                };
                self.export.zero(extent(), space)
            }
            _ => self.export.flush(),
        };
        let outcome = self.told(done.and_then(|()| self.settle(request)));
        self.answer(request, outcome)
    }

    /// Makes durable what was written, where that is asked for with it.
    fn settle(&self, request: &Request) -> Result<()> {
        let asked = request.has(request_flag::FUA) && request.kind != kind::FLUSH;
        if asked { self.export.flush() } else { Ok(()) }
    }

    /// Chunks of other answers may come between these.
    fn read_in_chunks(&self, request: &Request, buffer: &mut Buffer) -> io::Result<()> {
        let end = request.offset + u64::from(request.length);
        if request.length == 0 {
            return self.send(&wire::chunk_header(true, chunk::NONE, request.cookie, 0));
        }
        for (offset, bytes) in pieces(request) {
            let piece = buffer.piece(bytes);
            if let Err(error) = self.export.read(offset, piece) {
                return self.answer(request, self.told(Err(error)));
            }
            let done = offset + bytes as u64 == end;
            let length = u32::try_from(bytes + 8).unwrap_or(u32::MAX);
            let mut head = [0; DATA_HEAD_BYTES];
            let header = wire::chunk_header(done, chunk::DATA, request.cookie, length);
            head[..CHUNK_BYTES].copy_from_slice(&header);
            head[CHUNK_BYTES..].copy_from_slice(&offset.to_be_bytes());
            self.send(buffer.behind(&head, bytes))?;
        }
        Ok(())
    }

    /// All of the data comes behind one header, which says that it is good.
    fn read_at_once(&self, request: &Request, buffer: &mut Buffer) -> io::Result<()> {
        let mut pieces = pieces(request);
        let (offset, bytes) = pieces.next().unwrap_or((request.offset, 0));
        if let Err(error) = self.export.read(offset, buffer.piece(bytes)) {
            return self.answer(request, self.told(Err(error)));
        }
        let mut writer = lock(&self.writer);
        let head: [u8; SIMPLE_BYTES] = wire::simple_reply(0, request.cookie);
        writer.write_all(buffer.behind(&head, bytes))?;
        for (offset, bytes) in pieces {
            let piece = buffer.piece(bytes);
            // Said to be good already: all that is left is to hang up.
            self.export.read(offset, piece).map_err(|error| {
                (self.failed)(&error);
                io::Error::other(error)
            })?;
            writer.write_all(piece)?;
        }
        Ok(())
    }

    fn block_status(&self, request: &Request, extent: Extent) -> io::Result<()> {
        let most = if request.has(request_flag::ONE) {
            1
        } else {
            MOST_RUNS
        };
        let runs = match self.export.runs(extent, most) {
            Ok(runs) => runs,
            Err(error) => return self.answer(request, self.told(Err(error))),
        };
        let length = u32::try_from(4 + 8 * runs.len()).unwrap_or(u32::MAX);
        let header = wire::chunk_header(true, chunk::BLOCK_STATUS, request.cookie, length);
        let mut bytes = header.to_vec();
        bytes.extend(ALLOCATION_ID.to_be_bytes());
        for (length, told) in runs {
            bytes.extend(length.to_be_bytes());
            bytes.extend(told.to_be_bytes());
        }
        self.send(&bytes)
    }

    /// The whole answer to a request that has no data, or the end of one that failed.
    fn answer(&self, request: &Request, outcome: Outcome) -> io::Result<()> {
        let has_chunks = matches!(request.kind, kind::READ | kind::BLOCK_STATUS);
        if !(self.agreed.structured && has_chunks) {
            return self.send(&wire::simple_reply(outcome, request.cookie));
        }
        let mut bytes = wire::chunk_header(true, chunk::ERROR, request.cookie, 6).to_vec();
        bytes.extend(outcome.to_be_bytes());
        // In words there is nothing to say to strangers.
        bytes.extend(0_u16.to_be_bytes());
        self.send(&bytes)
    }

    fn told(&self, done: Result<()>) -> Outcome {
        done.map_or_else(
            |error| {
                (self.failed)(&error);
                number_of(&error)
            },
            |()| 0,
        )
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        lock(&self.writer).write_all(bytes)
    }
}

/// A panic elsewhere leaves the stream in the middle of something, which its client finds unsound.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_silence(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(error.kind(), K::WouldBlock | K::TimedOut | K::Interrupted)
}

/// Offsets and lengths of the pieces of a request; none if it is empty.
fn pieces(request: &Request) -> impl Iterator<Item = (u64, usize)> + use<> {
    let start = request.offset;
    let length = usize::try_from(request.length).unwrap_or(usize::MAX);
    (0..length).step_by(PIECE_BYTES).map(move |from| {
        let bytes = PIECE_BYTES.min(length - from);
        (start + from as u64, bytes)
    })
}

/// A piece and room for a header before it. As long as the longest piece that was needed.
#[derive(Default)]
struct Buffer(Vec<u8>);

impl Buffer {
    fn piece(&mut self, bytes: usize) -> &mut [u8] {
        assert!(bytes <= PIECE_BYTES, "a piece of {bytes} bytes");
        if self.0.len() < HEAD_BYTES + bytes {
            self.0.resize(HEAD_BYTES + bytes, 0);
        }
        &mut self.0[HEAD_BYTES..HEAD_BYTES + bytes]
    }

    /// The piece with this head before it.
    fn behind(&mut self, head: &[u8], bytes: usize) -> &[u8] {
        let start = HEAD_BYTES - head.len();
        self.0[start..HEAD_BYTES].copy_from_slice(head);
        &self.0[start..HEAD_BYTES + bytes]
    }
}
