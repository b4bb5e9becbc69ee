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
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
}

pub(crate) mod reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    /// Of every refusal.
    pub(crate) const IS_ERROR: u32 = 1 << 31;
    pub(crate) const UNSUPPORTED: u32 = IS_ERROR + 1;
    pub(crate) const POLICY: u32 = IS_ERROR + 2;
    pub(crate) const TLS_REQUIRED: u32 = IS_ERROR + 5;
    pub(crate) const UNKNOWN: u32 = IS_ERROR + 6;
}

pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// What an export can do.
pub(crate) mod flag {
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const FLUSH: u16 = 1 << 2;
    pub(crate) const WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const MULTI_CONN: u16 = 1 << 8;
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
            Self::Read => (0, 0),
            Self::Write => (1, 0),
            Self::Disconnect => (2, 0),
            Self::Flush => (3, 0),
            Self::WriteZeroes => (6, 0),
            Self::WriteZeroesAllocated => (6, 1 << 1),
            Self::BlockStatus => (7, 0),
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
    header[0..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
    header[4..6].copy_from_slice(&flags.to_be_bytes());
    header[6..8].copy_from_slice(&code.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header[16..24].copy_from_slice(&offset.to_be_bytes());
    header[24..28].copy_from_slice(&length.to_be_bytes());
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
    const SIMPLE: u32 = 0x6744_6698;
    const STRUCTURED: u32 = 0x668e_33ef;
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
