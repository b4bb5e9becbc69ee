//! Numbers and shapes of the protocol: what is written, and what a header that came says. No I/O.

#![expect(
    clippy::big_endian_bytes,
    reason = "the protocol of NBD is in network byte order"
)]

/// Longest name of an export, description or message.
pub(crate) const MAX_TEXT_BYTES: usize = 4096;
/// Longest reply to an option.
pub(crate) const MAX_REPLY_BYTES: u32 = 16 * 1024;

pub(crate) const GREETING: u64 = u64::from_be_bytes(*b"NBDMAGIC");
pub(crate) const OPTION: u64 = u64::from_be_bytes(*b"IHAVEOPT");
pub(crate) const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

/// Flags of the handshake.
pub(crate) const FIXED_NEWSTYLE: u16 = 1;
pub(crate) const NO_ZEROES: u16 = 1 << 1;

pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    #[cfg(any(feature = "tls", fuzzing))]
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
}

pub(crate) mod reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    /// Of every refusal.
    pub(crate) const IS_ERROR: u32 = 1 << 31;
    pub(crate) const UNSUPPORTED: u32 = IS_ERROR + 1;
    pub(crate) const POLICY: u32 = IS_ERROR + 2;
    pub(crate) const INVALID: u32 = IS_ERROR + 3;
    pub(crate) const TLS_REQUIRED: u32 = IS_ERROR + 5;
    pub(crate) const UNKNOWN: u32 = IS_ERROR + 6;
    pub(crate) const TOO_BIG: u32 = IS_ERROR + 9;
}

pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// What an export can do.
pub(crate) mod flag {
    /// Of every export.
    pub(crate) const HAS_FLAGS: u16 = 1;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const FLUSH: u16 = 1 << 2;
    pub(crate) const FUA: u16 = 1 << 3;
    pub(crate) const TRIM: u16 = 1 << 5;
    pub(crate) const WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const MULTI_CONN: u16 = 1 << 8;
}

/// Where a server says which runs read zero.
pub(crate) const ALLOCATION: &str = "base:allocation";

/// Of it.
pub(crate) mod allocation {
    pub(crate) const IS_HOLE: u32 = 1;
    pub(crate) const IS_ZERO: u32 = 1 << 1;
}

/// Types of requests.
pub(crate) mod kind {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISCONNECT: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests.
pub(crate) mod request_flag {
    /// Durable before it is answered.
    pub(crate) const FUA: u16 = 1;
    /// Space is kept.
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    /// One run is enough.
    pub(crate) const ONE: u16 = 1 << 3;
}

/// Errors, numbered as Linux does.
pub(crate) mod errno {
    pub(crate) const DENIED: u32 = 1;
    pub(crate) const IO: u32 = 5;
    pub(crate) const INVALID: u32 = 22;
    pub(crate) const NO_SPACE: u32 = 28;
    pub(crate) const UNSUPPORTED: u32 = 95;
}

/// What is asked of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    /// Space may be given back.
    WriteZeroes,
    /// Space is kept.
    WriteZeroesAllocated,
    BlockStatus,
}

impl Command {
    /// Type and flags.
    const fn code(self) -> (u16, u16) {
        match self {
            Self::Read => (kind::READ, 0),
            Self::Write => (kind::WRITE, 0),
            Self::Disconnect => (kind::DISCONNECT, 0),
            Self::Flush => (kind::FLUSH, 0),
            Self::WriteZeroes => (kind::WRITE_ZEROES, 0),
            Self::WriteZeroesAllocated => (kind::WRITE_ZEROES, request_flag::NO_HOLE),
            Self::BlockStatus => (kind::BLOCK_STATUS, 0),
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Disconnect => "disconnect",
            Self::Flush => "flush",
            Self::WriteZeroes | Self::WriteZeroesAllocated => "write zeroes",
            Self::BlockStatus => "block status",
        }
    }
}

const REQUEST: u32 = 0x2560_9513;
pub(crate) const REQUEST_BYTES: usize = 28;

/// The header of a request.
pub(crate) fn request(
    command: Command,
    cookie: u64,
    offset: u64,
    length: u32,
) -> [u8; REQUEST_BYTES] {
    let (code, flags) = command.code();
    let mut header = [0; REQUEST_BYTES];
    header[0..4].copy_from_slice(&REQUEST.to_be_bytes());
    header[4..6].copy_from_slice(&flags.to_be_bytes());
    header[6..8].copy_from_slice(&code.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header[16..24].copy_from_slice(&offset.to_be_bytes());
    header[24..28].copy_from_slice(&length.to_be_bytes());
    header
}

/// A request, as a server reads it. What of it is sound is for the server to find out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) flags: u16,
    pub(crate) kind: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u32,
}

impl Request {
    /// `None` if the header is of none.
    pub(crate) fn of(header: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let mut fields = Fields(header);
        if fields.u32() != Some(REQUEST) {
            return None;
        }
        Some(Self {
            flags: fields.u16()?,
            kind: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u32()?,
        })
    }

    pub(crate) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// An answer to an option.
pub(crate) fn option_reply(option: u32, kind: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap_or_else(|_| unreachable!("texts have a limit"));
    let mut bytes = OPTION_REPLY.to_be_bytes().to_vec();
    for field in [option, kind, length] {
        bytes.extend(field.to_be_bytes());
    }
    bytes.extend(body);
    bytes
}

/// An answer to a request, which is all of it unless data follows.
pub(crate) fn simple_reply(error: u32, cookie: u64) -> [u8; SIMPLE_BYTES] {
    let mut header = [0; SIMPLE_BYTES];
    header[0..4].copy_from_slice(&SIMPLE.to_be_bytes());
    header[4..8].copy_from_slice(&error.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header
}

/// The header of a chunk of an answer, of so many bytes.
pub(crate) fn chunk_header(done: bool, kind: u16, cookie: u64, length: u32) -> [u8; CHUNK_BYTES] {
    let mut header = [0; CHUNK_BYTES];
    header[0..4].copy_from_slice(&STRUCTURED.to_be_bytes());
    header[4..6].copy_from_slice(&u16::from(done).to_be_bytes());
    header[6..8].copy_from_slice(&kind.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header[16..20].copy_from_slice(&length.to_be_bytes());
    header
}

/// An option of the handshake with what belongs to it.
pub(crate) fn option(number: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap_or_else(|_| unreachable!("texts have a limit"));
    let mut bytes = OPTION.to_be_bytes().to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(body);
    bytes
}

/// A text behind its length.
pub(crate) fn text(text: &str, bytes: &mut Vec<u8>) {
    let length = u32::try_from(text.len()).unwrap_or_else(|_| unreachable!("texts have a limit"));
    bytes.extend(length.to_be_bytes());
    bytes.extend(text.as_bytes());
}

const SIMPLE: u32 = 0x6744_6698;
const STRUCTURED: u32 = 0x668e_33ef;
pub(crate) const SIMPLE_BYTES: usize = 16;
pub(crate) const CHUNK_BYTES: usize = 20;

/// The beginning of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// All of it; what was read follows.
    Simple { error: u32, cookie: u64 },
    /// The first 16 bytes of a chunk; 4 with its length follow.
    Chunk { done: bool, kind: u16, cookie: u64 },
}

/// Reads the first 16 bytes of a reply; `None` if they are of none.
pub(crate) fn reply(header: [u8; SIMPLE_BYTES]) -> Option<Reply> {
    let mut fields = Fields(&header);
    let magic = fields.u32()?;
    match magic {
        SIMPLE => Some(Reply::Simple {
            error: fields.u32()?,
            cookie: fields.u64()?,
        }),
        STRUCTURED => {
            let (flags, kind) = (fields.u16()?, fields.u16()?);
            Some(Reply::Chunk {
                done: flags & 1 != 0,
                kind,
                cookie: fields.u64()?,
            })
        }
        _ => None,
    }
}

/// Kinds of chunks.
pub(crate) mod chunk {
    pub(crate) const NONE: u16 = 0;
    pub(crate) const DATA: u16 = 1;
    pub(crate) const HOLE: u16 = 2;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    /// Of every failure.
    pub(crate) const IS_ERROR: u16 = 1 << 15;
    /// Of one that says no more than its number.
    pub(crate) const ERROR: u16 = IS_ERROR + 1;
}

/// Reads fields one after the other; `None` behind the end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
}

/// What somebody says, for people: short, and nothing that a terminal would obey.
pub(crate) fn shown(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    said.chars().filter(|c| !c.is_control()).take(500).collect()
}

/// What a server's number of an error means.
pub(crate) fn cause(error: u32) -> std::io::Error {
    // Those of Linux, as the protocol has them, which also has no others.
    let known = [1, 5, 12, 22, 28, 75, 95, 108].contains(&error);
    match i32::try_from(error) {
        Ok(number) if known => std::io::Error::from_raw_os_error(number),
        _ => std::io::Error::other(format!("error {error} of the server")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_what_the_protocol_says() {
        let header = request(Command::WriteZeroesAllocated, 0x0102, 0x1000, 0x200);

        assert_eq!(header[..8], [0x25, 0x60, 0x95, 0x13, 0, 2, 0, 6]);
        assert_eq!(header[8..16], [0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(header[16..], [0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 2, 0]);
    }

    #[test]
    fn a_request_is_read_as_it_is_written_and_nothing_else_is_one() {
        let mut header = request(Command::WriteZeroesAllocated, 0x0102, 0x1000, 0x200);

        let expected = Request {
            flags: request_flag::NO_HOLE,
            kind: kind::WRITE_ZEROES,
            cookie: 0x0102,
            offset: 0x1000,
            length: 0x200,
        };
        assert_eq!(Request::of(&header), Some(expected));
        header[0] ^= 1;
        assert_eq!(Request::of(&header), None);
    }

    #[test]
    fn answers_are_read_as_they_are_written() {
        let simple = reply(simple_reply(5, 9));
        let chunk = chunk_header(true, chunk::DATA, 9, 8);

        assert_eq!(
            simple,
            Some(Reply::Simple {
                error: 5,
                cookie: 9
            })
        );
        let read = Reply::Chunk {
            done: true,
            kind: chunk::DATA,
            cookie: 9,
        };
        assert_eq!(reply(chunk[..16].try_into().expect("16 bytes")), Some(read));
        assert_eq!(chunk[16..], [0, 0, 0, 8]);
    }

    #[test]
    fn replies_of_both_kinds_are_told_apart_from_anything_else() {
        let mut header = [0; SIMPLE_BYTES];
        header[..8].copy_from_slice(&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5]);
        header[15] = 9;
        assert_eq!(
            reply(header),
            Some(Reply::Simple {
                error: 5,
                cookie: 9
            })
        );
        header[..8].copy_from_slice(&[0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 1]);
        let chunk = Reply::Chunk {
            done: true,
            kind: 0x8001,
            cookie: 9,
        };
        assert_eq!(reply(header), Some(chunk));
        header[0] = 0;
        assert_eq!(reply(header), None);
    }

    #[test]
    fn fields_end_with_their_bytes() {
        let mut fields = Fields(&[1, 2, 3, 4, 5, 6, 7]);

        assert_eq!(fields.u16(), Some(0x0102));
        assert_eq!(fields.u64(), None);
        assert_eq!(fields.u32(), Some(0x0304_0506));
        assert_eq!(fields.bytes(2), None);
        assert_eq!(fields.bytes(1), Some(&[7][..]));
    }
}
