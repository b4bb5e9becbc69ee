//! The handshake: from our first byte to a client that may ask for something. What a client says has a limit in bytes and in
//! options; the time is limited by who gives the stream.

#![expect(
    clippy::big_endian_bytes,
    reason = "the protocol of NBD is in network byte order"
)]

use std::io::{self, Read, Write};

use super::MOST_REQUEST_BYTES;
use super::disk::NbdExport;
use crate::wire::{
    self, ALLOCATION, FIXED_NEWSTYLE, Fields, GREETING, MAX_REPLY_BYTES, NO_ZEROES, OPTION, info,
    option, reply,
};

/// Longest that comes with an option.
const MOST_OPTION_BYTES: u32 = MAX_REPLY_BYTES;
/// Options until a client has to decide.
const MOST_OPTIONS: usize = 256;
/// What [`ALLOCATION`] is called on this connection.
pub(crate) const ALLOCATION_ID: u32 = 1;
/// What requests are best multiples of.
const PREFERRED_BYTES: u32 = 4096;

/// What was agreed on with a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Agreed {
    /// Reads are answered in chunks.
    pub(crate) structured: bool,
    /// Block status may be asked for.
    pub(crate) allocation: bool,
}

/// Comes to an agreement with a client; `None` if it takes leave.
///
/// # Errors
/// It speaks something else, or without end, or the connection failed.
pub(crate) fn welcome<S: Read + Write>(
    stream: &mut S,
    export: &NbdExport,
) -> io::Result<Option<Agreed>> {
    let mut welcome = Welcome {
        stream,
        export,
        agreed: Agreed::default(),
    };
    welcome.run()
}

struct Welcome<'w, S> {
    stream: &'w mut S,
    export: &'w NbdExport,
    agreed: Agreed,
}

/// Where an option leads.
enum Next {
    Option,
    Requests,
    End,
}

impl<S: Read + Write> Welcome<'_, S> {
    fn run(&mut self) -> io::Result<Option<Agreed>> {
        let pads = self.greet()?;
        for _ in 0..MOST_OPTIONS {
            let header: [u8; 16] = self.array()?;
            let mut fields = Fields(&header);
            let (magic, number) = (fields.u64(), fields.u32().unwrap_or_default());
            let length = fields.u32().unwrap_or_default();
            if magic != Some(OPTION) {
                return Err(unsound("it sends no option of NBD"));
            }
            if length > MOST_OPTION_BYTES {
                self.say(number, reply::TOO_BIG, &[])?;
                return Err(unsound("it sends an option that is too long"));
            }
            let mut body = vec![0; usize::try_from(length).unwrap_or_default()];
            self.stream.read_exact(&mut body)?;
            match self.take(number, &body, pads)? {
                Next::Option => {}
                Next::Requests => return Ok(Some(self.agreed)),
                Next::End => return Ok(None),
            }
        }
        Err(unsound("it sends options without end"))
    }

    /// Returns whether what is said of an export by the old way is padded.
    fn greet(&mut self) -> io::Result<bool> {
        let mut greeting = GREETING.to_be_bytes().to_vec();
        greeting.extend(OPTION.to_be_bytes());
        greeting.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        self.stream.write_all(&greeting)?;
        let flags = u32::from_be_bytes(self.array()?);
        let known = u32::from(FIXED_NEWSTYLE | NO_ZEROES);
        if flags & !known != 0 || flags & u32::from(FIXED_NEWSTYLE) == 0 {
            return Err(unsound("it does not speak the fixed newstyle handshake"));
        }
        Ok(flags & u32::from(NO_ZEROES) == 0)
    }

    fn take(&mut self, number: u32, body: &[u8], pads: bool) -> io::Result<Next> {
        match number {
            option::EXPORT_NAME => return self.by_name(body, pads),
            option::ABORT => {
                // Whether it still listens is its own affair.
                self.say(number, reply::ACK, &[]).ok();
                return Ok(Next::End);
            }
            option::GO | option::INFO => return self.describe(number, body),
            option::LIST if body.is_empty() => {
                let mut named = Vec::new();
                wire::text(self.export.name(), &mut named);
                self.say(number, reply::SERVER, &named)?;
                self.say(number, reply::ACK, &[])?;
            }
            option::STRUCTURED_REPLY if body.is_empty() => {
                self.agreed.structured = true;
                self.say(number, reply::ACK, &[])?;
            }
            option::LIST | option::STRUCTURED_REPLY => self.say(number, reply::INVALID, &[])?,
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(number, body)?,
            _ => self.say(number, reply::UNSUPPORTED, &[])?,
        }
        Ok(Next::Option)
    }

    /// The old way, which has no word for no.
    fn by_name(&mut self, name: &[u8], pads: bool) -> io::Result<Next> {
        if !self.is_ours(name) {
            return Err(unsound("it asks for an export that there is not"));
        }
        let mut said = self.export.size_bytes().to_be_bytes().to_vec();
        said.extend(self.export.flags().to_be_bytes());
        said.resize(said.len() + if pads { 124 } else { 0 }, 0);
        self.stream.write_all(&said)?;
        Ok(Next::Requests)
    }

    fn describe(&mut self, number: u32, body: &[u8]) -> io::Result<Next> {
        let Some((name, asked)) = asked_infos(body) else {
            self.say(number, reply::INVALID, &[])?;
            return Ok(Next::Option);
        };
        if !self.is_ours(name) {
            self.say(number, reply::UNKNOWN, &[])?;
            return Ok(Next::Option);
        }
        let mut export = info::EXPORT.to_be_bytes().to_vec();
        export.extend(self.export.size_bytes().to_be_bytes());
        export.extend(self.export.flags().to_be_bytes());
        self.say(number, reply::INFO, &export)?;
        if asked.contains(&info::NAME) {
            let text = self.export.name().as_bytes();
            let name = [&info::NAME.to_be_bytes()[..], text].concat();
            self.say(number, reply::INFO, &name)?;
        }
        let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for bytes in [1, PREFERRED_BYTES, MOST_REQUEST_BYTES] {
            sizes.extend(bytes.to_be_bytes());
        }
        self.say(number, reply::INFO, &sizes)?;
        self.say(number, reply::ACK, &[])?;
        Ok(match number {
            option::GO => Next::Requests,
            _ => Next::Option,
        })
    }

    fn contexts(&mut self, number: u32, body: &[u8]) -> io::Result<()> {
        let sets = number == option::SET_META_CONTEXT;
        if sets {
            self.agreed.allocation = false;
        }
        let Some((name, queries)) = asked_contexts(body).filter(|_| self.agreed.structured) else {
            return self.say(number, reply::INVALID, &[]);
        };
        if !self.is_ours(name) {
            return self.say(number, reply::UNKNOWN, &[]);
        }
        let lists = |query: &[u8]| !sets && query == b"base:";
        let asked = |query: &&[u8]| *query == ALLOCATION.as_bytes() || lists(query);
        let lists_all = !sets && queries.is_empty();
        if lists_all || queries.iter().any(asked) {
            let id = if sets { ALLOCATION_ID } else { 0 };
            let context = [&id.to_be_bytes()[..], ALLOCATION.as_bytes()].concat();
            self.say(number, reply::META_CONTEXT, &context)?;
            self.agreed.allocation |= sets;
        }
        self.say(number, reply::ACK, &[])
    }

    /// The empty name is the usual export's, and there is no other.
    fn is_ours(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.export.name().as_bytes()
    }

    fn say(&mut self, number: u32, kind: u32, body: &[u8]) -> io::Result<()> {
        self.stream
            .write_all(&wire::option_reply(number, kind, body))
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// A name, and what is asked of its export. `None` if it is not that, or more than that.
fn asked_infos(body: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut fields = Fields(body);
    let name = text(&mut fields)?;
    let count = fields.u16()?;
    let infos = (0..count).map(|_| fields.u16()).collect::<Option<_>>()?;
    fields.0.is_empty().then_some((name, infos))
}

/// A name, and meta contexts. The number of these is at most that of the bytes.
fn asked_contexts(body: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut fields = Fields(body);
    let name = text(&mut fields)?;
    let count = fields.u32()?;
    let queries = (0..count)
        .map(|_| text(&mut fields))
        .collect::<Option<_>>()?;
    fields.0.is_empty().then_some((name, queries))
}

fn text<'a>(fields: &mut Fields<'a>) -> Option<&'a [u8]> {
    let length = usize::try_from(fields.u32()?).ok()?;
    fields.bytes(length)
}

pub(crate) fn unsound(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
