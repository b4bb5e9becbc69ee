//! The handshake: from the first byte of a server to an export that can be used.

#![expect(
    clippy::big_endian_bytes,
    reason = "the protocol of NBD is in network byte order"
)]

use std::fmt;
use std::io::{self, Read, Write};

use blockferry_device::{Error, ErrorKind, Result};

use crate::wire::{
    self, FIXED_NEWSTYLE, Fields, GREETING, MAX_REPLY_BYTES, NO_ZEROES, OPTION, OPTION_REPLY, info,
    reply,
};

/// Most replies to one option.
const MAX_REPLIES: usize = 1000;
/// Where a server says nothing else: any byte can be addressed, and so much is taken at once (`doc/proto.md`).
const USUAL_MAXIMUM: u32 = 32 * 1024 * 1024;

/// What a client wants.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) export: &'a str,
    /// Meta contexts, which the server may have or not.
    pub(crate) contexts: &'a [String],
    /// For messages.
    pub(crate) label: &'a str,
}

/// An export that a connection is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Export {
    pub(crate) size_bytes: u64,
    pub(crate) flags: u16,
    /// What offsets and lengths are multiples of: a power of two.
    pub(crate) unit_bytes: u32,
    /// Most bytes in one request.
    pub(crate) most_bytes: u32,
    /// Meta contexts that it has, and their ids.
    pub(crate) contexts: Vec<(u32, String)>,
}

impl Export {
    pub(crate) fn can(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    fn new(size_bytes: u64, flags: u16) -> Self {
        Self {
            size_bytes,
            flags,
            unit_bytes: 1,
            most_bytes: USUAL_MAXIMUM,
            contexts: Vec::new(),
        }
    }
}

/// A server that is one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Greeted {
    /// It pads what it says of an export, as old ones do.
    pads: bool,
}

/// Exchanges greetings with a server.
///
/// # Errors
/// The server speaks something else, or the connection failed.
pub(crate) fn greet<S: Read + Write>(stream: &mut S, wanted: &Wanted<'_>) -> Result<Greeted> {
    let pads = Handshake { stream, wanted }.greet()?;
    Ok(Greeted { pads })
}

/// Agrees to go on over TLS, which is to be begun when this returns.
///
/// # Errors
/// The server offers none, or the connection failed.
#[cfg(any(feature = "tls", fuzzing))]
pub(crate) fn start_tls<S: Read + Write>(stream: &mut S, wanted: &Wanted<'_>) -> Result<()> {
    Handshake { stream, wanted }.start_tls()
}

/// Comes to an agreement with a server.
///
/// # Errors
/// The server wants what cannot be done, has no such export, or the connection failed.
pub(crate) fn agree<S: Read + Write>(
    stream: &mut S,
    wanted: &Wanted<'_>,
    greeted: Greeted,
) -> Result<Export> {
    Handshake { stream, wanted }.agree(greeted)
}

struct Handshake<'h, S> {
    stream: &'h mut S,
    wanted: &'h Wanted<'h>,
}

/// What a server answered to an option.
struct OptionReply {
    kind: u32,
    body: Vec<u8>,
}

impl<S: Read + Write> Handshake<'_, S> {
    fn agree(&mut self, greeted: Greeted) -> Result<Export> {
        let structured = self.asks_for_structured_replies()?;
        let contexts = if structured && !self.wanted.contexts.is_empty() {
            self.contexts()?
        } else {
            Vec::new()
        };
        let mut export = match self.go()? {
            Some(export) => export,
            None => self.export_by_name(greeted.pads)?,
        };
        export.contexts = contexts;
        Ok(export)
    }

    /// Returns whether the server pads what it says of an export, as old ones do.
    fn greet(&mut self) -> Result<bool> {
        let greeting: [u8; 18] = self.array("the greeting")?;
        let mut fields = Fields(&greeting);
        let (magic, style, flags) = (fields.u64(), fields.u64(), fields.u16().unwrap_or(0));
        if magic != Some(GREETING) {
            return Err(self.refused(format!(
                "it is no NBD server: expected NBDMAGIC, found {:?}",
                String::from_utf8_lossy(&greeting[..8])
            )));
        }
        if style != Some(OPTION) || flags & FIXED_NEWSTYLE == 0 {
            return Err(
                self.refused("it speaks an old handshake of NBD: the fixed newstyle one is needed")
            );
        }
        let ours = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES));
        self.write("the flags", &ours.to_be_bytes())?;
        Ok(flags & NO_ZEROES == 0)
    }

    #[cfg(any(feature = "tls", fuzzing))]
    fn start_tls(&mut self) -> Result<()> {
        self.ask(wire::option::STARTTLS, &[])?;
        let answer = self.answer(wire::option::STARTTLS)?;
        match answer.kind {
            reply::ACK => Ok(()),
            reply::UNSUPPORTED | reply::POLICY => {
                Err(self.refused("the server offers no TLS; nbd:// goes without"))
            }
            _ => Err(self.refusal(&answer)),
        }
    }

    fn asks_for_structured_replies(&mut self) -> Result<bool> {
        self.ask(wire::option::STRUCTURED_REPLY, &[])?;
        let answer = self.answer(wire::option::STRUCTURED_REPLY)?;
        match answer.kind {
            reply::ACK => Ok(true),
            reply::UNSUPPORTED => Ok(false),
            _ => Err(self.refusal(&answer)),
        }
    }

    /// Those of the wanted contexts that there are.
    fn contexts(&mut self) -> Result<Vec<(u32, String)>> {
        let mut body = Vec::new();
        wire::text(self.wanted.export, &mut body);
        let queries = u32::try_from(self.wanted.contexts.len()).unwrap_or(u32::MAX);
        body.extend(queries.to_be_bytes());
        for context in self.wanted.contexts {
            wire::text(context, &mut body);
        }
        self.ask(wire::option::SET_META_CONTEXT, &body)?;
        let mut contexts = Vec::new();
        for _ in 0..MAX_REPLIES {
            let answer = self.answer(wire::option::SET_META_CONTEXT)?;
            match answer.kind {
                reply::ACK => return Ok(contexts),
                reply::UNSUPPORTED | reply::POLICY => return Ok(Vec::new()),
                reply::META_CONTEXT => {
                    let mut fields = Fields(&answer.body);
                    let id = fields.u32();
                    let name = String::from_utf8_lossy(fields.0).into_owned();
                    // What was not asked for is not looked at.
                    if let Some(id) = id.filter(|_| self.wanted.contexts.contains(&name)) {
                        contexts.push((id, name));
                    }
                }
                _ => return Err(self.refusal(&answer)),
            }
        }
        Err(self.refused("it names meta contexts without end"))
    }

    /// `None` where the server does not know how to go.
    fn go(&mut self) -> Result<Option<Export>> {
        let mut body = Vec::new();
        wire::text(self.wanted.export, &mut body);
        body.extend(1_u16.to_be_bytes());
        body.extend(info::BLOCK_SIZE.to_be_bytes());
        self.ask(wire::option::GO, &body)?;
        let (mut export, mut sizes) = (None, None);
        for _ in 0..MAX_REPLIES {
            let answer = self.answer(wire::option::GO)?;
            match answer.kind {
                reply::INFO => {
                    let mut fields = Fields(&answer.body);
                    match fields.u16() {
                        Some(info::EXPORT) => export = fields.u64().zip(fields.u16()),
                        Some(info::BLOCK_SIZE) => {
                            let (least, _preferred) = (fields.u32(), fields.u32());
                            sizes = least.zip(fields.u32());
                        }
                        _ => {}
                    }
                }
                reply::UNSUPPORTED => return Ok(None),
                reply::ACK => {
                    let (size_bytes, flags) = export
                        .ok_or_else(|| self.refused("it does not say how large the export is"))?;
                    let export = Export::new(size_bytes, flags);
                    return self.with_sizes(export, sizes).map(Some);
                }
                _ => return Err(self.refusal(&answer)),
            }
        }
        Err(self.refused("it describes the export without end"))
    }

    fn with_sizes(&self, export: Export, sizes: Option<(u32, u32)>) -> Result<Export> {
        let Some((unit_bytes, most_bytes)) = sizes else {
            return Ok(export);
        };
        let sound = unit_bytes.is_power_of_two() && unit_bytes <= 65_536;
        if !sound || most_bytes < unit_bytes {
            return Err(self.refused(format!(
                "its requests are of {unit_bytes} to {most_bytes} bytes, which is no sound range"
            )));
        }
        // Whole units only; "as much as you like" is 2^32 - 1.
        let most_bytes = most_bytes.min(USUAL_MAXIMUM) / unit_bytes * unit_bytes;
        Ok(Export {
            unit_bytes,
            most_bytes,
            ..export
        })
    }

    /// The way of servers that are older than the option before; one that has no such export hangs up.
    fn export_by_name(&mut self, pads: bool) -> Result<Export> {
        self.ask(wire::option::EXPORT_NAME, self.wanted.export.as_bytes())?;
        let said: [u8; 10] = self.array("the size of the export, if there is one of that name")?;
        if pads {
            let _zeroes: [u8; 124] = self.array("what pads the size")?;
        }
        let mut fields = Fields(&said);
        let (size_bytes, flags) = (fields.u64(), fields.u16());
        Ok(Export::new(
            size_bytes.unwrap_or_default(),
            flags.unwrap_or_default(),
        ))
    }

    fn ask(&mut self, number: u32, body: &[u8]) -> Result<()> {
        self.write("an option", &wire::option(number, body))
    }

    fn answer(&mut self, number: u32) -> Result<OptionReply> {
        let header: [u8; 20] = self.array("the reply to an option")?;
        let mut fields = Fields(&header);
        let (magic, to) = (fields.u64(), fields.u32());
        let (kind, length) = (
            fields.u32().unwrap_or_default(),
            fields.u32().unwrap_or_default(),
        );
        if magic != Some(OPTION_REPLY) || to != Some(number) {
            return Err(self.refused(format!("its answer is no reply to option {number}")));
        }
        if length > MAX_REPLY_BYTES {
            return Err(self.refused(format!(
                "a reply to option {number} of {length} bytes: expected at most {MAX_REPLY_BYTES}"
            )));
        }
        let mut body = vec![0; usize::try_from(length).unwrap_or_default()];
        self.read("the reply to an option", &mut body)?;
        Ok(OptionReply { kind, body })
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(what, &mut bytes)?;
        Ok(bytes)
    }

    fn read(&mut self, what: &str, bytes: &mut [u8]) -> Result<()> {
        self.stream.read_exact(bytes).map_err(|cause| {
            let attempt = format!("read {what} of {}", self.wanted.label);
            Error::from_io(attempt, spoken(cause))
        })
    }

    fn write(&mut self, what: &str, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).map_err(|cause| {
            Error::from_io(format!("write {what} to {}", self.wanted.label), cause)
        })
    }

    fn refused(&self, why: impl fmt::Display) -> Error {
        let text = format!("open {}: {why}", self.wanted.label);
        Error::new(ErrorKind::Unsuitable, text)
    }

    /// What a server says when it does not do what it was asked.
    fn refusal(&self, answer: &OptionReply) -> Error {
        let said = wire::shown(&answer.body);
        let said = match said.is_empty() {
            true => String::new(),
            false => format!(": {said}"),
        };
        let text = |why: &str| format!("open {}: {why}{said}", self.wanted.label);
        match answer.kind {
            reply::UNKNOWN => {
                let why = "the server has no export of that name";
                Error::new(ErrorKind::NotFound, text(why))
            }
            reply::TLS_REQUIRED => {
                let why = "the server wants TLS: nbds:// speaks it";
                Error::new(ErrorKind::Unsuitable, text(why))
            }
            reply::POLICY => Error::new(ErrorKind::Denied, text("the server does not let us in")),
            kind if kind & reply::IS_ERROR != 0 => {
                let why = format!("the server refuses with error {}", kind & !reply::IS_ERROR);
                Error::new(ErrorKind::Unsuitable, text(&why))
            }
            kind => self.refused(format!("a reply of an unexpected kind, {kind}")),
        }
    }
}

/// What became of a server that was waited for.
pub(crate) fn spoken(cause: io::Error) -> io::Error {
    match cause.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::other("the server hung up"),
        io::ErrorKind::WouldBlock => io::Error::other("the server is silent"),
        _ => cause,
    }
}
