//! What the two sides say. The table of all messages, field by field, is `docs/format/wire.md`.
//!
//! The side that has the target asks, the side that has the source answers, and streams the digests of its regions
//! on its own as far as it is let. Which message may come when is the roles' business; here a body only meets its
//! limits.

use blockferry_core::{BlockSize, Decoder, Digest, Encoder, ErrorKind, REGION_BLOCKS, Root};
use blockferry_device::{Evidence, Identity, MAX_EVIDENCE_BYTES};

use crate::error::{Error, Result};
use crate::frame::{self, Frame};
use crate::short::ShortDigests;

/// Most bytes of a name, an address or a text.
pub const MAX_TEXT_BYTES: usize = 4096;
/// Most bytes of an outcome, an event or options, which are JSON.
pub const MAX_JSON_BYTES: usize = 12 * 1024;
/// Most regions in one [`Message::Regions`].
pub const MAX_REGIONS: usize = 1024;
/// Most blocks of a region.
const MAX_BLOCKS: usize = 256;
const _: () = assert!(
    MAX_BLOCKS as u64 == REGION_BLOCKS,
    "a list takes all of them"
);
/// Most pages of a block, and of one [`Message::Data`] that are not zero: as many as a record of the transfer log has.
pub const MAX_PAGES: usize = 256;
/// Most runs in one [`Message::Data`]: as many as a record of the transfer log has extents.
pub const MAX_RUNS: usize = 256;
/// Most bytes of what is asked of a machine or answered: the changes of a disk among them.
pub const MAX_ASKED_BYTES: usize = 1024 * 1024;
/// Most bytes of one compressed frame of pages, which unpacks to at most 1 MiB.
pub const MAX_FRAME_BYTES: usize = 1024 * 1024 + 8 * 1024;

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a role decides for each")]
pub enum Message {
    /// The source, as it is now: the answer to [`Message::Examine`].
    Source(Source),
    /// The target begins, or begins anew.
    Begin(Begin),
    /// Digests of regions; those below `below` that are in no such message are zero.
    Regions {
        /// Their numbers, ascending.
        regions: Vec<u64>,
        /// As many digests.
        digests: ShortDigests,
        /// As far as the source has read.
        below: u64,
    },
    /// All regions are read, or all blocks that were opened.
    Scanned {
        /// The root of the source; with a map, of an image that is zero but for the blocks that were opened.
        root: Root,
        /// Bytes that were read to find it out.
        read_bytes: u64,
    },
    /// A region differs: what the target has.
    OpenRegion {
        /// Its number.
        region: u64,
        /// Digests of all its blocks, in order.
        blocks: ShortDigests,
    },
    /// What the source has instead.
    Blocks {
        /// The region's number.
        region: u64,
        /// The blocks that differ.
        differing: Vec<NamedBlock>,
    },
    /// The pages that differ in these blocks are wanted.
    Want {
        /// The region's number.
        region: u64,
        /// The blocks, counted in the region, ascending, with digests of the pages that the target has; empty
        /// where all pages are wanted.
        blocks: Vec<(u16, ShortDigests)>,
    },
    /// Pages. All runs of one block are in one message.
    Data {
        /// Blocks that are answered with it: region and block in it.
        blocks: Vec<(u64, u16)>,
        /// Where the pages belong, ascending.
        runs: Vec<PageRun>,
        /// One zstd frame of all pages that are not zero, in order, each run padded to whole pages.
        frame: Vec<u8>,
    },
    /// The source need not remember regions below this one.
    Release(u64),
    /// Is the source still what it was?
    Examine,
    /// No more of this scan: answered by [`Message::Stopped`] behind the last that is said of it.
    Stop,
    /// Nothing more comes of the scan that was stopped.
    Stopped,
    /// A sign of life, to be answered.
    Ping,
    /// The answer.
    Pong,
    /// The run is over; what came of it: JSON.
    Outcome(Vec<u8>),
    /// The run is over, and failed.
    Failed(Failed),
    /// The one who connected says what is wanted of the one who was connected to.
    Open(Open),
    /// What happened on the target's side, for the one who watches on the other: JSON.
    Event(Vec<u8>),
    /// Some blocks from all over the source are wanted, to look at: answered by [`Message::Data`] of all their pages,
    /// and by [`Message::Sampled`].
    Sample(Sample),
    /// What there is to a sample.
    Sampled(Sampled),
    /// Some blocks of a region may differ: what the target has. Where the scan is [`Begin::mapped`], answered by
    /// [`Message::Blocks`].
    OpenBlocks {
        /// The region's number.
        region: u64,
        /// The blocks that are to be read.
        blocks: Vec<NamedBlock>,
    },
    /// Something is wanted of the machine that the side which was connected to has: JSON.
    Ask(Vec<u8>),
    /// What came of it: JSON.
    Answer(Vec<u8>),
}

/// A block, counted in its region, and its digest, `None` if it is zero; ascending in a message.
pub type NamedBlock = (u16, Option<Digest>);

/// Which blocks make a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "a plain value")]
pub struct Sample {
    /// How large they are.
    pub block_size: BlockSize,
    /// Level of zstd.
    pub level: i8,
    /// How many at most.
    pub most: u16,
    /// Which ones.
    pub seed: u64,
}

/// What there is to a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "a plain value")]
pub struct Sampled {
    /// Blocks of the source that may hold data.
    pub data_blocks: u64,
    /// How many of them are sent.
    pub blocks: u16,
    /// Nanoseconds that reading them took.
    pub reading_ns: u64,
    /// Nanoseconds that their digests took.
    pub digesting_ns: u64,
}

/// Why a run is over.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "a plain value")]
pub struct Failed {
    /// As the roles number their kinds of errors.
    pub kind: u8,
    /// What is durable is kept: the same run goes on from there.
    pub resumable: bool,
    /// What was attempted, expected and found.
    pub text: String,
}

/// What is wanted of the side that was connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "a plain value")]
pub struct Open {
    /// The part it is to take.
    pub role: Role,
    /// The disk, named as its system names files: any bytes.
    pub path: Vec<u8>,
    /// How, as JSON.
    pub options: Vec<u8>,
}

/// What a side has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a side decides for each")]
pub enum Role {
    /// The source of a sync.
    Source,
    /// Its target.
    Target,
    /// A machine whose disks are copied by a job.
    Machine,
}

/// The source as it is at some moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "a plain value")]
pub struct Source {
    /// For messages.
    pub label: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Which device it is.
    pub identity: Identity,
    /// Whether it changed.
    pub evidence: Evidence,
}

/// How the source is to be read and what it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "a plain value")]
pub struct Begin {
    /// Unit of digests.
    pub block_size: BlockSize,
    /// Digests travel whole: a shortened one has been mistaken for another.
    pub exact: bool,
    /// Level of zstd.
    pub level: i8,
    /// So many regions may be read ahead of the last released one.
    pub window: u32,
    /// The target's side has a change map: nothing is read but the blocks that it opens.
    pub mapped: bool,
}

/// A run of neighbouring pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "a plain value")]
pub struct PageRun {
    /// The first one, counted in the image.
    pub first: u64,
    /// How many.
    pub count: u16,
    /// They are zero, and not in the frame.
    pub zero: bool,
}

type Decoded<T> = blockferry_core::Result<T>;

/// Numbers on the wire; they are never given to anything else.
mod kind {
    pub(super) const BEGIN: u8 = 1;
    pub(super) const SOURCE: u8 = 2;
    pub(super) const REGIONS: u8 = 3;
    pub(super) const SCANNED: u8 = 4;
    pub(super) const OPEN_REGION: u8 = 5;
    pub(super) const BLOCKS: u8 = 6;
    pub(super) const WANT: u8 = 7;
    pub(super) const DATA: u8 = 8;
    pub(super) const RELEASE: u8 = 9;
    pub(super) const EXAMINE: u8 = 10;
    pub(super) const STOP: u8 = 11;
    pub(super) const STOPPED: u8 = 12;
    pub(super) const PING: u8 = 13;
    pub(super) const PONG: u8 = 14;
    pub(super) const OUTCOME: u8 = 15;
    pub(super) const FAILED: u8 = 16;
    pub(super) const OPEN: u8 = 17;
    pub(super) const EVENT: u8 = 18;
    pub(super) const SAMPLE: u8 = 19;
    pub(super) const SAMPLED: u8 = 20;
    pub(super) const OPEN_BLOCKS: u8 = 21;
    pub(super) const ASK: u8 = 22;
    pub(super) const ANSWER: u8 = 23;
}

impl Message {
    fn kind(&self) -> (u8, &'static str) {
        match self {
            Self::Begin(_) => (kind::BEGIN, "begin"),
            Self::Source(_) => (kind::SOURCE, "source"),
            Self::Regions { .. } => (kind::REGIONS, "regions"),
            Self::Scanned { .. } => (kind::SCANNED, "scanned"),
            Self::OpenRegion { .. } => (kind::OPEN_REGION, "open region"),
            Self::Blocks { .. } => (kind::BLOCKS, "blocks"),
            Self::Want { .. } => (kind::WANT, "want"),
            Self::Data { .. } => (kind::DATA, "data"),
            Self::Release(_) => (kind::RELEASE, "release"),
            Self::Examine => (kind::EXAMINE, "examine"),
            Self::Ping => (kind::PING, "ping"),
            Self::Pong => (kind::PONG, "pong"),
            Self::Outcome(_) => (kind::OUTCOME, "outcome"),
            Self::Failed(_) => (kind::FAILED, "failed"),
            Self::Stop => (kind::STOP, "stop"),
            Self::Stopped => (kind::STOPPED, "stopped"),
            Self::Open(_) => (kind::OPEN, "open"),
            Self::Event(_) => (kind::EVENT, "event"),
            Self::Sample(_) => (kind::SAMPLE, "sample"),
            Self::Sampled(_) => (kind::SAMPLED, "sampled"),
            Self::OpenBlocks { .. } => (kind::OPEN_BLOCKS, "open blocks"),
            Self::Ask(_) => (kind::ASK, "ask"),
            Self::Answer(_) => (kind::ANSWER, "answer"),
        }
    }

    /// Its name, for messages about messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.kind().1
    }

    /// Appends it to `out`, as a frame.
    ///
    /// # Panics
    /// When it is beyond the limits of this module, which is a bug of the caller.
    pub fn encode(&self, out: &mut Vec<u8>) {
        frame::encode(self.kind().0, out, |body| {
            self.encode_body(&mut Encoder::new(body));
        });
    }

    fn encode_body(&self, e: &mut Encoder<'_>) {
        match self {
            Self::Examine | Self::Stop | Self::Stopped | Self::Ping | Self::Pong => {}
            Self::Begin(begin) => begin.encode(e),
            Self::Source(source) => source.encode(e),
            Self::Regions {
                regions,
                digests,
                below,
            } => {
                e.u64(*below).count(regions.len());
                for region in regions {
                    e.u64(*region);
                }
                digests.encode(e);
            }
            Self::Scanned { root, read_bytes } => {
                e.bytes(root.as_bytes()).u64(*read_bytes);
            }
            Self::OpenRegion { region, blocks } => {
                e.u64(*region);
                blocks.encode(e);
            }
            Self::Blocks { region, differing } => encode_named(e, *region, differing),
            Self::OpenBlocks { region, blocks } => encode_named(e, *region, blocks),
            Self::Want { region, blocks } => {
                e.u64(*region).count(blocks.len());
                for (block, pages) in blocks {
                    e.u16(*block);
                    pages.encode(e);
                }
            }
            Self::Data {
                blocks,
                runs,
                frame,
            } => encode_data(e, blocks, runs, frame),
            Self::Release(below) => {
                e.u64(*below);
            }
            Self::Outcome(json) | Self::Event(json) => {
                e.bytes_u16(json);
            }
            Self::Ask(json) | Self::Answer(json) => {
                e.bytes_u32(json);
            }
            Self::Open(open) => open.encode(e),
            Self::Sample(sample) => sample.encode(e),
            Self::Sampled(sampled) => sampled.encode(e),
            Self::Failed(failed) => {
                e.u8(failed.kind)
                    .u8(u8::from(failed.resumable))
                    .bytes_u16(failed.text.as_bytes());
            }
        }
    }

    /// Reads a frame.
    ///
    /// # Errors
    /// Its kind is not known, or its body is not what its kind says.
    pub fn decode(frame: &Frame) -> Result<Self> {
        let mut d = Decoder::new(&frame.body);
        let read =
            Self::decode_body(frame.kind, &mut d).and_then(|message| d.finish().map(|()| message));
        read.map_err(|cause| Error::undecodable(&format!("of kind {}", frame.kind), cause))
    }

    fn decode_body(kind: u8, d: &mut Decoder<'_>) -> Decoded<Self> {
        Ok(match kind {
            kind::BEGIN => Self::Begin(Begin::decode(d)?),
            kind::SOURCE => Self::Source(Source::decode(d)?),
            kind::REGIONS => decode_regions(d)?,
            kind::SCANNED => Self::Scanned {
                root: Root::from_bytes(d.array()?),
                read_bytes: d.u64()?,
            },
            kind::OPEN_REGION => Self::OpenRegion {
                region: d.u64()?,
                blocks: ShortDigests::decode(d, MAX_BLOCKS)?,
            },
            kind::BLOCKS => Self::Blocks {
                region: d.u64()?,
                differing: decode_named(d)?,
            },
            kind::WANT => Self::Want {
                region: d.u64()?,
                blocks: ascending(
                    list(d, MAX_BLOCKS, |d| {
                        Ok((d.u16()?, ShortDigests::decode(d, MAX_PAGES)?))
                    })?,
                    |(block, _)| u64::from(*block),
                )?,
            },
            kind::DATA => decode_data(d)?,
            kind::RELEASE => Self::Release(d.u64()?),
            kind::EXAMINE => Self::Examine,
            kind::STOP => Self::Stop,
            kind::STOPPED => Self::Stopped,
            kind::PING => Self::Ping,
            kind::PONG => Self::Pong,
            kind::OUTCOME => Self::Outcome(d.bytes_u16(MAX_JSON_BYTES)?.to_vec()),
            kind::FAILED => Self::Failed(Failed {
                kind: d.u8()?,
                resumable: flag(d)?,
                text: text(d)?,
            }),
            kind::OPEN => Self::Open(Open::decode(d)?),
            kind::EVENT => Self::Event(d.bytes_u16(MAX_JSON_BYTES)?.to_vec()),
            kind::SAMPLE => Self::Sample(Sample::decode(d)?),
            kind::SAMPLED => Self::Sampled(Sampled::decode(d)?),
            kind::OPEN_BLOCKS => Self::OpenBlocks {
                region: d.u64()?,
                blocks: decode_named(d)?,
            },
            kind::ASK => Self::Ask(d.bytes_u32(MAX_ASKED_BYTES)?.to_vec()),
            kind::ANSWER => Self::Answer(d.bytes_u32(MAX_ASKED_BYTES)?.to_vec()),
            _ => return Err(invalid("no message has this kind".to_owned())),
        })
    }
}

impl Open {
    fn encode(&self, e: &mut Encoder<'_>) {
        e.u8(match self.role {
            Role::Source => 0,
            Role::Target => 1,
            Role::Machine => 2,
        })
        .bytes_u16(&self.path)
        .bytes_u16(&self.options);
    }

    fn decode(d: &mut Decoder<'_>) -> Decoded<Self> {
        Ok(Self {
            role: match d.u8()? {
                0 => Role::Source,
                1 => Role::Target,
                2 => Role::Machine,
                other => return Err(invalid(format!("expected role 0, 1 or 2, found {other}"))),
            },
            path: d.bytes_u16(MAX_TEXT_BYTES)?.to_vec(),
            options: d.bytes_u16(MAX_JSON_BYTES)?.to_vec(),
        })
    }
}

impl Sample {
    fn encode(&self, e: &mut Encoder<'_>) {
        e.u64(self.block_size.bytes())
            .bytes(&self.level.to_le_bytes())
            .u16(self.most)
            .u64(self.seed);
    }

    fn decode(d: &mut Decoder<'_>) -> Decoded<Self> {
        Ok(Self {
            block_size: BlockSize::new(d.u64()?)?,
            level: i8::from_le_bytes(d.array()?),
            most: d.u16()?,
            seed: d.u64()?,
        })
    }
}

impl Sampled {
    fn encode(&self, e: &mut Encoder<'_>) {
        e.u64(self.data_blocks)
            .u16(self.blocks)
            .u64(self.reading_ns)
            .u64(self.digesting_ns);
    }

    fn decode(d: &mut Decoder<'_>) -> Decoded<Self> {
        Ok(Self {
            data_blocks: d.u64()?,
            blocks: d.u16()?,
            reading_ns: d.u64()?,
            digesting_ns: d.u64()?,
        })
    }
}

impl Source {
    fn encode(&self, e: &mut Encoder<'_>) {
        e.bytes_u16(self.label.as_bytes())
            .u64(self.size_bytes)
            .bytes_u16(self.identity.as_bytes())
            .bytes_u16(self.evidence.as_bytes());
    }

    fn decode(d: &mut Decoder<'_>) -> Decoded<Self> {
        Ok(Self {
            label: text(d)?,
            size_bytes: d.u64()?,
            identity: Identity::from_bytes(d.bytes_u16(MAX_EVIDENCE_BYTES)?),
            evidence: Evidence::from_bytes(d.bytes_u16(MAX_EVIDENCE_BYTES)?),
        })
    }
}

impl Begin {
    fn encode(&self, e: &mut Encoder<'_>) {
        e.u64(self.block_size.bytes())
            .u8(u8::from(self.exact))
            .bytes(&self.level.to_le_bytes())
            .u32(self.window)
            .u8(u8::from(self.mapped));
    }

    fn decode(d: &mut Decoder<'_>) -> Decoded<Self> {
        Ok(Self {
            block_size: BlockSize::new(d.u64()?)?,
            exact: flag(d)?,
            level: i8::from_le_bytes(d.array()?),
            window: d.u32()?,
            mapped: flag(d)?,
        })
    }
}

fn decode_regions(d: &mut Decoder<'_>) -> Decoded<Message> {
    let below = d.u64()?;
    let regions = ascending(list(d, MAX_REGIONS, Decoder::u64)?, |region| *region)?;
    let digests = ShortDigests::decode(d, MAX_REGIONS)?;
    if digests.len() != regions.len() {
        let (regions, digests) = (regions.len(), digests.len());
        return Err(invalid(format!("{regions} regions with {digests} digests")));
    }
    Ok(Message::Regions {
        regions,
        digests,
        below,
    })
}

fn encode_named(e: &mut Encoder<'_>, region: u64, blocks: &[NamedBlock]) {
    e.u64(region).count(blocks.len());
    for (block, digest) in blocks {
        e.u16(*block).u8(u8::from(digest.is_some()));
        if let Some(digest) = digest {
            e.digest(digest);
        }
    }
}

fn decode_named(d: &mut Decoder<'_>) -> Decoded<Vec<NamedBlock>> {
    let blocks = list(d, MAX_BLOCKS, |d| Ok((d.u16()?, optional_digest(d)?)))?;
    ascending(blocks, |(block, _)| u64::from(*block))
}

fn encode_data(e: &mut Encoder<'_>, blocks: &[(u64, u16)], runs: &[PageRun], frame: &[u8]) {
    e.count(blocks.len());
    for (region, block) in blocks {
        e.u64(*region).u16(*block);
    }
    e.count(runs.len());
    for run in runs {
        e.u64(run.first).u16(run.count).u8(u8::from(run.zero));
    }
    e.bytes_u32(frame);
}

fn decode_data(d: &mut Decoder<'_>) -> Decoded<Message> {
    let blocks = list(d, MAX_BLOCKS, |d| Ok((d.u64()?, d.u16()?)))?;
    let runs = list(d, MAX_RUNS, |d| {
        Ok(PageRun {
            first: d.u64()?,
            count: d.u16()?,
            zero: flag(d)?,
        })
    })?;
    let apart = |pair: &[PageRun]| {
        let end = pair[0].first.checked_add(u64::from(pair[0].count));
        end.is_some_and(|end| end <= pair[1].first)
    };
    if !runs.windows(2).all(apart) || runs.iter().any(|run| run.count == 0) {
        return Err(invalid(
            "runs of pages: expected them apart and ascending".to_owned(),
        ));
    }
    let packed = runs.iter().filter(|run| !run.zero);
    let pages: usize = packed.map(|run| usize::from(run.count)).sum();
    if pages > MAX_PAGES {
        return Err(invalid(format!(
            "pages in a frame: expected at most {MAX_PAGES}, found {pages}"
        )));
    }
    Ok(Message::Data {
        blocks,
        runs,
        frame: d.bytes_u32(MAX_FRAME_BYTES)?.to_vec(),
    })
}

/// A count, and as many items.
fn list<'a, T>(
    d: &mut Decoder<'a>,
    most: usize,
    mut item: impl FnMut(&mut Decoder<'a>) -> Decoded<T>,
) -> Decoded<Vec<T>> {
    let count = d.count(most)?;
    (0..count).map(|_| item(d)).collect()
}

fn ascending<T>(items: Vec<T>, number: impl Fn(&T) -> u64) -> Decoded<Vec<T>> {
    if items.is_sorted_by(|a, b| number(a) < number(b)) {
        Ok(items)
    } else {
        Err(invalid("expected ascending numbers".to_owned()))
    }
}

fn flag(d: &mut Decoder<'_>) -> Decoded<bool> {
    match d.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(invalid(format!("flag: expected 0 or 1, found {other}"))),
    }
}

fn optional_digest(d: &mut Decoder<'_>) -> Decoded<Option<Digest>> {
    flag(d)?.then(|| d.digest()).transpose()
}

fn text(d: &mut Decoder<'_>) -> Decoded<String> {
    let bytes = d.bytes_u16(MAX_TEXT_BYTES)?;
    let text = std::str::from_utf8(bytes).map_err(|e| invalid(format!("text: {e}")))?;
    Ok(text.to_owned())
}

fn invalid(message: String) -> blockferry_core::Error {
    blockferry_core::Error::new(ErrorKind::Invalid, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{FrameDecoder, MAX_BODY};
    use crate::short::Width;
    use blockferry_core::block_digest;

    fn digest(n: u8) -> Digest {
        block_digest(&[n])
    }

    fn short(width: Width, count: u8) -> ShortDigests {
        ShortDigests::of(width, (0..count).map(digest))
    }

    /// One of each kind, with something in every field.
    fn one_of_each() -> Vec<Message> {
        let begin = Begin {
            block_size: BlockSize::DEFAULT,
            exact: true,
            level: -7,
            window: 64,
            mapped: true,
        };
        let run = |first, count, zero| PageRun { first, count, zero };
        vec![
            Message::Begin(begin),
            Message::Source(Source {
                label: "disk.raw".to_owned(),
                size_bytes: u64::MAX,
                identity: Identity::from_bytes(b"inode"),
                evidence: Evidence::unknown(),
            }),
            Message::Regions {
                regions: vec![1, 5, u64::MAX],
                digests: short(Width::Sixteen, 3),
                below: 6,
            },
            Message::Scanned {
                root: Root::from_bytes([3; 32]),
                read_bytes: 77,
            },
            Message::OpenRegion {
                region: 5,
                blocks: short(Width::Eight, 255),
            },
            Message::Blocks {
                region: 5,
                differing: vec![(0, None), (255, Some(digest(1)))],
            },
            Message::Want {
                region: 5,
                blocks: vec![(3, short(Width::Four, 16)), (255, short(Width::Whole, 0))],
            },
            Message::Data {
                blocks: vec![(5, 3), (6, 0)],
                runs: vec![run(1, 2, false), run(3, 1, true), run(1 << 50, 254, false)],
                frame: vec![1, 2, 3],
            },
            Message::Release(12),
            Message::Examine,
            Message::Stop,
            Message::Stopped,
            Message::Ping,
            Message::Pong,
            Message::Outcome(b"{\"a\":1}".to_vec()),
            Message::Failed(Failed {
                kind: 3,
                resumable: true,
                text: "no such disk".to_owned(),
            }),
            Message::Open(Open {
                role: Role::Target,
                path: b"/disks/\xff".to_vec(),
                options: b"{}".to_vec(),
            }),
            Message::Event(b"{\"decision\":\"delta\"}".to_vec()),
            Message::Sample(Sample {
                block_size: BlockSize::DEFAULT,
                level: 1,
                most: 256,
                seed: 77,
            }),
            Message::Sampled(Sampled {
                data_blocks: 1 << 40,
                blocks: 255,
                reading_ns: 1,
                digesting_ns: u64::MAX,
            }),
            Message::OpenBlocks {
                region: 5,
                blocks: vec![(0, Some(digest(1))), (255, None)],
            },
            Message::Ask(b"{\"cut\":7}".to_vec()),
            Message::Answer(b"\"done\"".to_vec()),
        ]
    }

    fn encoded(message: &Message) -> Frame {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let mut decoder = FrameDecoder::new();
        decoder.push(&bytes);
        decoder.next_frame().unwrap().unwrap()
    }

    #[test]
    fn every_message_comes_back_and_no_part_of_it_passes_for_a_whole() {
        let mut kinds = std::collections::BTreeSet::new();
        for message in one_of_each() {
            let frame = encoded(&message);
            kinds.insert(frame.kind);

            assert_eq!(Message::decode(&frame).unwrap(), message);
            for end in 0..frame.body.len() {
                let body = frame.body[..end].to_vec();
                let cut = Frame { body, ..frame };
                assert!(
                    Message::decode(&cut).is_err(),
                    "{} cut at {end}",
                    message.name()
                );
            }
            let mut longer = frame;
            longer.body.push(0);
            assert!(Message::decode(&longer).is_err(), "{}", message.name());
        }
        assert_eq!(kinds, (kind::BEGIN..=kind::ANSWER).collect(), "one of each");
        for kind in [0, kind::ANSWER + 1, 255] {
            let body = Vec::new();
            assert!(Message::decode(&Frame { kind, body }).is_err());
        }
    }

    #[test]
    fn the_document_names_every_message_by_its_number() {
        let document = include_str!("../../../docs/format/wire.md");
        let rows = document.lines().filter_map(|line| {
            let mut cells = line.split('|').map(str::trim).skip(1);
            Some((cells.next()?, cells.nth(1)?))
        });
        let named: std::collections::BTreeSet<(String, &str)> = rows
            .flat_map(|(kinds, names)| kinds.split(", ").zip(names.split(", ")))
            .map(|(kind, name)| (kind.to_owned(), name))
            .collect();
        for message in one_of_each() {
            let (kind, name) = message.kind();
            assert!(named.contains(&(kind.to_string(), name)), "{kind} {name}");
        }
    }

    #[test]
    fn numbers_out_of_order_and_runs_that_overlap_are_refused() {
        let run = |first, count| PageRun {
            first,
            count,
            zero: false,
        };
        let data = |runs| Message::Data {
            blocks: Vec::new(),
            runs,
            frame: Vec::new(),
        };
        let regions = |regions: Vec<u64>, digests| Message::Regions {
            regions,
            digests: short(Width::Eight, digests),
            below: 9,
        };
        let blocks = |numbers: [u16; 2]| Message::Blocks {
            region: 1,
            differing: numbers.map(|n| (n, None)).to_vec(),
        };
        let opened = |numbers: [u16; 2]| Message::OpenBlocks {
            region: 1,
            blocks: numbers.map(|n| (n, None)).to_vec(),
        };
        for wrong in [
            data(vec![run(5, 1), run(4, 1)]),
            data(vec![run(5, 2), run(6, 1)]),
            data(vec![run(5, 0)]),
            data(vec![run(u64::MAX, 2), run(6, 1)]),
            regions(vec![2, 2], 2),
            regions(vec![2, 1], 2),
            regions(vec![1, 2], 3),
            blocks([4, 4]),
            blocks([4, 3]),
            opened([4, 4]),
            opened([4, 3]),
        ] {
            assert!(Message::decode(&encoded(&wrong)).is_err(), "{wrong:?}");
        }
        assert!(Message::decode(&encoded(&data(vec![run(5, 1), run(6, 1)]))).is_ok());
        // As many pages as a frame unpacks to; zeros are not in it.
        let zeros = PageRun {
            zero: true,
            ..run(900, 300)
        };
        let at = data(vec![run(5, 200), run(300, 56), zeros]);
        assert!(Message::decode(&encoded(&at)).is_ok());
        let beyond = data(vec![run(5, 200), run(300, 57)]);
        assert!(Message::decode(&encoded(&beyond)).is_err());
    }

    #[test]
    fn the_largest_message_fits_a_frame() {
        let runs = (0..256).map(|n| PageRun {
            first: n * 2,
            count: 1,
            zero: false,
        });
        let data = Message::Data {
            blocks: vec![(1, 1); MAX_BLOCKS],
            runs: runs.collect(),
            frame: vec![0; MAX_FRAME_BYTES],
        };
        let mut bytes = Vec::new();

        data.encode(&mut bytes);

        assert!(bytes.len() <= MAX_BODY);
    }

    proptest::proptest! {
        #[test]
        fn what_is_accepted_is_written_again_byte_for_byte(
            kind in 0u8..23, body in proptest::collection::vec(0u8..4, 0..80),
        ) {
            let frame = Frame { kind, body };
            if let Ok(message) = Message::decode(&frame) {
                proptest::prop_assert_eq!(encoded(&message), frame);
            }
        }
    }
}
