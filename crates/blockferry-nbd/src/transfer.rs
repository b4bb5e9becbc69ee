//! Requests on one connection: many at once, answered in whichever order the server likes.

use std::io::{self, Read, Write};

use blockferry_device::{Error, ErrorKind, ReadRequest, WriteRequest};

use crate::handshake::spoken;
use crate::wire::{self, CHUNK_BYTES, Command, Fields, MAX_TEXT_BYTES, Reply, SIMPLE_BYTES, chunk};

/// Requests that are under way at once.
pub(crate) const DEPTH: usize = 16;
/// Longest request: enough of them together keep a local server as busy as it can be.
const PIECE_BYTES: usize = 256 * 1024;
/// Longest answer to a question for block status: 64 Ki runs.
const MAX_STATUS_BYTES: u32 = 512 * 1024;

/// Why requests were not served.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The server says so; the connection goes on.
    Refused(Error),
    /// The connection is of no use any more.
    Broken(Error),
}

impl Failure {
    pub(crate) fn into_error(self) -> Error {
        match self {
            Self::Refused(error) => error,
            Self::Broken(error) => error.into_lost(),
        }
    }
}

pub(crate) type Outcome<T = ()> = Result<T, Failure>;

/// Both ways of a connection, in the transmission phase.
pub(crate) struct Transfer<'t, S> {
    pub(crate) stream: &'t mut S,
    /// For messages.
    pub(crate) label: &'t str,
    /// The cookie of the next request.
    pub(crate) next_cookie: &'t mut u64,
    /// Most bytes in one request.
    pub(crate) most_bytes: u32,
}

/// One request on the wire.
#[derive(Clone, Copy)]
struct Request<'p> {
    command: Command,
    offset: u64,
    length: u32,
    payload: &'p [u8],
}

/// What an answer brings.
enum Body<'b> {
    /// So many bytes for this offset follow on the stream.
    Data { offset: u64, bytes: usize },
    /// They are zero.
    Hole { offset: u64, bytes: usize },
    /// Of block status.
    Status(&'b [u8]),
}

/// A piece of a read or write: which one, and where in it.
#[derive(Clone, Copy)]
struct Piece {
    request: usize,
    from: usize,
    bytes: usize,
    offset: u64,
}

impl<S: Read + Write> Transfer<'_, S> {
    pub(crate) fn read(&mut self, requests: &mut [ReadRequest<'_>]) -> Outcome {
        let sizes = requests.iter().map(|r| (r.offset, r.buffer.len()));
        let pieces = self.pieces(sizes);
        let asked = |number: usize| Request {
            command: Command::Read,
            offset: pieces[number].offset,
            length: length_of(pieces[number]),
            payload: &[],
        };
        self.exchange(pieces.len(), &asked, &mut |stream, number, body| {
            let piece = pieces[number];
            let place = |offset: u64, bytes: usize| {
                let from =
                    piece.from + usize::try_from(offset - piece.offset).unwrap_or(usize::MAX);
                from..from + bytes
            };
            let buffer = &mut *requests[piece.request].buffer;
            match body {
                Body::Data { offset, bytes } => {
                    stream.read_exact(&mut buffer[place(offset, bytes)])?;
                }
                Body::Hole { offset, bytes } => buffer[place(offset, bytes)].fill(0),
                Body::Status(_) => {}
            }
            Ok(())
        })
    }

    pub(crate) fn write(&mut self, requests: &[WriteRequest<'_>]) -> Outcome {
        let sizes = requests.iter().map(|r| (r.offset, r.bytes.len()));
        let pieces = self.pieces(sizes);
        let asked = |number: usize| {
            let piece = pieces[number];
            let bytes = requests[piece.request].bytes;
            Request {
                command: Command::Write,
                offset: piece.offset,
                length: length_of(piece),
                payload: &bytes[piece.from..piece.from + piece.bytes],
            }
        };
        self.exchange(pieces.len(), &asked, &mut |_, _, _| Ok(()))
    }

    /// A command that carries nothing and brings nothing.
    pub(crate) fn command(&mut self, command: Command, offset: u64, length: u32) -> Outcome {
        let asked = |_| Request {
            command,
            offset,
            length,
            payload: &[],
        };
        self.exchange(1, &asked, &mut |_, _, _| Ok(()))
    }

    /// Runs of one meta context from `offset` on, as (bytes, flags); at least one, and perhaps not all of `length`.
    pub(crate) fn block_status(
        &mut self,
        context: u32,
        offset: u64,
        length: u32,
    ) -> Outcome<Vec<(u32, u32)>> {
        let asked = |_| Request {
            command: Command::BlockStatus,
            offset,
            length,
            payload: &[],
        };
        let mut runs = Vec::new();
        self.exchange(1, &asked, &mut |_, _, body| {
            if let Body::Status(bytes) = body {
                let mut fields = Fields(bytes);
                if fields.u32() == Some(context) {
                    while let Some(run) = fields.u32().zip(fields.u32()) {
                        runs.push(run);
                    }
                }
            }
            Ok(())
        })?;
        // A run of nothing would never end; where all is well there is none.
        if runs.is_empty() || runs.iter().any(|(bytes, _)| *bytes == 0) {
            let what = "block status without a run, or with an empty one";
            return Err(self.broken(what));
        }
        Ok(runs)
    }

    fn pieces(&self, requests: impl Iterator<Item = (u64, usize)>) -> Vec<Piece> {
        let most = usize::try_from(self.most_bytes).unwrap_or(usize::MAX);
        let most = PIECE_BYTES.min(most);
        let mut pieces = Vec::new();
        for (request, (offset, length)) in requests.enumerate() {
            for from in (0..length).step_by(most) {
                pieces.push(Piece {
                    request,
                    from,
                    bytes: most.min(length - from),
                    offset: offset + from as u64,
                });
            }
        }
        pieces
    }

    /// Sends requests, as many at once as may be, and takes their answers. One that is refused ends the sending; what
    /// is under way is still waited for, so that the connection can be used again.
    fn exchange<'p>(
        &mut self,
        count: usize,
        asked: &dyn Fn(usize) -> Request<'p>,
        take: &mut dyn FnMut(&mut S, usize, Body<'_>) -> io::Result<()>,
    ) -> Outcome {
        let base = *self.next_cookie;
        *self.next_cookie = base.wrapping_add(count as u64);
        // Of each request that is under way: bytes that came. `None` once it is answered.
        let mut came: Vec<Option<u64>> = Vec::with_capacity(count);
        let (mut answered, mut refused) = (0, None);
        // Parts of answers that bring nothing; a server may send a few.
        let mut idle_left = 16 + 4 * count;
        loop {
            while refused.is_none() && came.len() < count && came.len() - answered < DEPTH {
                let number = came.len();
                self.send(base.wrapping_add(number as u64), &asked(number))?;
                came.push(Some(0));
            }
            if answered == came.len() {
                return refused.map_or(Ok(()), |error| Err(Failure::Refused(error)));
            }
            let (cookie, answer) = self.answer()?;
            let number = usize::try_from(cookie.wrapping_sub(base)).unwrap_or(usize::MAX);
            let Some(bytes) = came.get(number).copied().flatten() else {
                return Err(self.broken("an answer to what was not asked"));
            };
            let request = asked(number);
            let taken = self.take(&request, answer, &mut |stream, body| {
                take(stream, number, body)
            })?;
            if taken.bytes == 0 {
                idle_left = idle_left
                    .checked_sub(1)
                    .ok_or_else(|| self.broken("parts of answers without end"))?;
            }
            let bytes = bytes + taken.bytes;
            if bytes > u64::from(request.length) {
                return Err(self.broken("more than was asked for"));
            }
            came[number] = Some(bytes);
            if let Some(cause) = taken.error {
                refused = refused.or_else(|| Some(self.failed(&request, cause)));
            } else if taken.done
                && request.command == Command::Read
                && bytes != u64::from(request.length)
                && refused.is_none()
            {
                return Err(self.broken("less than was asked for"));
            }
            if taken.done {
                came[number] = None;
                answered += 1;
            }
        }
    }

    fn send(&mut self, cookie: u64, request: &Request<'_>) -> Outcome {
        let header = wire::request(request.command, cookie, request.offset, request.length);
        let sent = self
            .stream
            .write_all(&header)
            .and_then(|()| self.stream.write_all(request.payload));
        sent.map_err(|cause| Failure::Broken(self.failed(request, cause)))
    }

    /// The next answer that begins: to which request, and its first fields.
    fn answer(&mut self) -> Outcome<(u64, Reply)> {
        let header: [u8; SIMPLE_BYTES] = self.array()?;
        match wire::reply(header) {
            Some(reply @ (Reply::Simple { cookie, .. } | Reply::Chunk { cookie, .. })) => {
                Ok((cookie, reply))
            }
            None => Err(self.broken("an answer of no known kind")),
        }
    }

    /// Takes the rest of an answer.
    fn take(
        &mut self,
        request: &Request<'_>,
        answer: Reply,
        take: &mut dyn FnMut(&mut S, Body<'_>) -> io::Result<()>,
    ) -> Outcome<Taken> {
        let (done, kind) = match answer {
            Reply::Simple { error, .. } => {
                let mut taken = Taken {
                    done: true,
                    ..Taken::default()
                };
                if error != 0 {
                    taken.error = Some(wire::cause(error));
                } else if request.command == Command::Read {
                    taken.bytes = u64::from(request.length);
                    let bytes = usize::try_from(request.length).unwrap_or(usize::MAX);
                    let body = Body::Data {
                        offset: request.offset,
                        bytes,
                    };
                    take(self.stream, body).map_err(|cause| self.lost(cause))?;
                }
                return Ok(taken);
            }
            Reply::Chunk { done, kind, .. } => (done, kind),
        };
        let length: [u8; CHUNK_BYTES - SIMPLE_BYTES] = self.array()?;
        let length = Fields(&length).u32().unwrap_or_default();
        let mut taken = Taken {
            done,
            ..Taken::default()
        };
        match (kind, request.command) {
            (chunk::NONE, _) if length == 0 => {}
            (chunk::DATA, Command::Read) if length > 8 => {
                let offset: [u8; 8] = self.array()?;
                let (offset, bytes) = (Fields(&offset).u64().unwrap_or_default(), length - 8);
                let body = |bytes| Body::Data { offset, bytes };
                taken.bytes = self.place(request, offset, bytes, body, take)?;
            }
            (chunk::HOLE, Command::Read) if length == 12 => {
                let hole: [u8; 12] = self.array()?;
                let mut fields = Fields(&hole);
                let offset = fields.u64().unwrap_or_default();
                let body = |bytes| Body::Hole { offset, bytes };
                let bytes = fields.u32().unwrap_or_default();
                taken.bytes = self.place(request, offset, bytes, body, take)?;
            }
            (chunk::BLOCK_STATUS, Command::BlockStatus) if length <= MAX_STATUS_BYTES => {
                let body = self.bytes(length)?;
                take(self.stream, Body::Status(&body)).map_err(|cause| self.lost(cause))?;
            }
            (kind, _) if kind & chunk::IS_ERROR != 0 && is_error_length(length) => {
                let body = self.bytes(length)?;
                taken.error = Some(error_of(&body));
            }
            _ => return Err(self.broken("a part of an answer that does not belong to it")),
        }
        Ok(taken)
    }

    /// Takes what belongs to a part of a read, which must lie inside of it.
    fn place<'b>(
        &mut self,
        request: &Request<'_>,
        offset: u64,
        bytes: u32,
        body: impl FnOnce(usize) -> Body<'b>,
        take: &mut dyn FnMut(&mut S, Body<'_>) -> io::Result<()>,
    ) -> Outcome<u64> {
        let end = offset.checked_add(u64::from(bytes));
        let last = request.offset + u64::from(request.length);
        if offset < request.offset || end.is_none_or(|end| end > last) {
            return Err(self.broken("bytes that were not asked for"));
        }
        let body = body(usize::try_from(bytes).unwrap_or(usize::MAX));
        take(self.stream, body).map_err(|cause| self.lost(cause))?;
        Ok(u64::from(bytes))
    }

    fn array<const N: usize>(&mut self) -> Outcome<[u8; N]> {
        let mut bytes = [0; N];
        self.stream
            .read_exact(&mut bytes)
            .map_err(|cause| self.lost(cause))?;
        Ok(bytes)
    }

    /// As many as met their limit already.
    fn bytes(&mut self, length: u32) -> Outcome<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
        self.stream
            .read_exact(&mut bytes)
            .map_err(|cause| self.lost(cause))?;
        Ok(bytes)
    }

    fn failed(&self, request: &Request<'_>, cause: io::Error) -> Error {
        let (name, length, offset) = (request.command.name(), request.length, request.offset);
        let text = match length {
            0 => format!("{name} of {}", self.label),
            _ => format!(
                "{name} of {length} bytes at offset {offset} of {}",
                self.label
            ),
        };
        Error::from_io(text, cause)
    }

    fn lost(&self, cause: io::Error) -> Failure {
        Failure::Broken(Error::from_io(
            format!("wait for an answer of {}", self.label),
            spoken(cause),
        ))
    }

    fn broken(&self, what: &str) -> Failure {
        let text = format!("{} does not keep to the protocol: {what}", self.label);
        Failure::Broken(Error::new(ErrorKind::Io, text))
    }
}

/// What was taken of an answer.
#[derive(Default)]
struct Taken {
    done: bool,
    /// Of a read.
    bytes: u64,
    error: Option<io::Error>,
}

fn length_of(piece: Piece) -> u32 {
    u32::try_from(piece.bytes).unwrap_or_else(|_| unreachable!("a piece is at most 256 KiB"))
}

/// A number, a text behind its length, and perhaps an offset.
fn is_error_length(length: u32) -> bool {
    (6..=6 + 8 + MAX_TEXT_BYTES as u64).contains(&u64::from(length))
}

/// What a server says of a failure.
fn error_of(body: &[u8]) -> io::Error {
    let mut fields = Fields(body);
    let number = fields.u32().unwrap_or_default();
    let length = usize::from(fields.u16().unwrap_or_default());
    let cause = wire::cause(number);
    match fields.bytes(length) {
        Some(said) if !said.is_empty() => {
            let said = wire::shown(said);
            io::Error::new(cause.kind(), format!("{cause} ({said})"))
        }
        _ => cause,
    }
}
