//! A sample of a source on the other side: blocks from all over it, as they would travel, to compare and to time.

use std::time::{Duration, Instant};

use blockferry_core::{Extent, Geometry, block_digest};
use blockferry_device::{AlignedBuffer, BlockSource};
use blockferry_pipeline::{BUFFER_BYTES, block_in, read_padded};
use blockferry_transfer_log::frame;
use blockferry_transport::message::{Sample as Asked, Sampled};
use blockferry_transport::{Connection, Message, Outbox, ShortDigests, Width};
use crossbeam_channel::RecvTimeoutError;

use super::data::{Packer, Unpacked};
use super::scan::LEVEL;
use super::serve::{packing, send_packed};
use super::target_role::Arrived;
use super::{block_number, failed_peer, lost, to_usize, unexpected, violated, violates};
use crate::data_blocks::DataBlocks;
use crate::error::{Error, ErrorKind, Result};
use crate::options::Context;
use crate::sample::{Crossing, SAMPLES, Sample};

/// What a sample may weigh, unpacked: enough to time a link by, and no burden to one.
const SAMPLE_BYTES: u64 = 16 << 20;
const TICK: Duration = Duration::from_millis(50);

/// Reads a sample and sends it. The answer goes behind the pages, or overtakes them.
pub(super) fn send_sample(
    source: &dyn BlockSource,
    outbox: &Outbox,
    asked: Asked,
    buffer: &mut AlignedBuffer,
) -> Result<Message> {
    let geometry = Geometry::new(source.size_bytes(), asked.block_size);
    let data = DataBlocks::of(&[source], &geometry);
    let mut packer = Packer::new(geometry, asked.level);
    let mut sampled = Sampled {
        data_blocks: data.count(),
        blocks: 0,
        reading_ns: 0,
        digesting_ns: 0,
    };
    for block in data.spread(u64::from(asked.most).min(SAMPLES), asked.seed) {
        let extent = geometry.block_extent(block);
        let bytes = &mut buffer[..to_usize(extent.length())];
        let start = Instant::now();
        read_padded(source, extent, bytes)
            .map_err(|e| Error::source(format!("sample {}", source.label()), e))?;
        let read = Instant::now();
        std::hint::black_box(block_digest(bytes));
        sampled.reading_ns += nanoseconds(read - start);
        sampled.digesting_ns += nanoseconds(read.elapsed());
        sampled.blocks += 1;
        let place = block_number(block.in_region());
        let whole = ShortDigests::new(Width::Whole);
        send_packed(outbox, packer.add(block.region(), place, bytes, &whole))?;
    }
    send_packed(outbox, packer.take())?;
    Ok(Message::Sampled(sampled))
}

/// Has the source's side send a sample, and compares it with the target.
pub(super) fn take_sample(
    connection: &Connection,
    geometry: &Geometry,
    target: Option<&dyn BlockSource>,
    seed: u64,
    context: &Context,
) -> Result<Sample> {
    let block_bytes = geometry.block_size().bytes();
    let most = (SAMPLE_BYTES / block_bytes).clamp(1, SAMPLES);
    let asked = Asked {
        block_size: geometry.block_size(),
        level: LEVEL,
        most: u16::try_from(most).unwrap_or(u16::MAX),
        seed,
    };
    let start = context.clock.now();
    let before = connection.wire_bytes().1;
    let outbox = connection.outbox();
    outbox.send(Message::Sample(asked)).map_err(lost)?;
    let (sampled, arrived) = receive(connection, most, context)?;
    let took = context.clock.now().saturating_sub(start);
    let crossed = connection.wire_bytes().1 - before;

    let mut sample = Sample::of_peer(geometry, &sampled);
    let mut buffers = (
        vec![0; to_usize(block_bytes)],
        AlignedBuffer::zeroed(to_usize(block_bytes)),
    );
    let mut packed = Packed::default();
    for (blocks, pages) in arrived {
        let extents = blocks_of(geometry, &blocks)?;
        let pages = Unpacked::of(pages)
            .map_err(|e| Error::because(ErrorKind::Peer, "unpack a sample of the peer", e))?;
        for extent in extents {
            context.check_cancelled()?;
            let new = &mut buffers.0[..to_usize(extent.length())];
            new.fill(0);
            pages.put(extent, new);
            let mut show = |bytes: &[u8]| packed.waiting.extend_from_slice(bytes);
            let clock = &*context.clock;
            sample.compare(extent, new, target, &mut buffers.1, clock, &mut show)?;
            if packed.waiting.len() as u64 >= BUFFER_BYTES {
                packed.pack()?;
            }
        }
    }
    packed.pack()?;
    let data_bytes = sample.data_blocks as f64 * sample.block_bytes;
    let data_ratio = crossed as f64 / data_bytes.max(1.0);
    sample.crossing = Some(Crossing {
        data_ratio,
        changed_ratio: packed.ratio().unwrap_or(data_ratio),
        seconds_per_byte: took.as_secs_f64() / crossed.max(1) as f64,
    });
    Ok(sample)
}

/// How well the pages of a sample pack that differ, which may be better or worse than all of it.
#[derive(Debug, Default)]
struct Packed {
    waiting: Vec<u8>,
    plain_bytes: usize,
    packed_bytes: usize,
}

impl Packed {
    fn pack(&mut self) -> Result<()> {
        let frame = frame::pack(&self.waiting, i32::from(LEVEL)).map_err(packing)?;
        self.plain_bytes += self.waiting.len();
        self.packed_bytes += frame.len();
        self.waiting.clear();
        Ok(())
    }

    fn ratio(&self) -> Option<f64> {
        (self.plain_bytes > 0).then(|| self.packed_bytes as f64 / self.plain_bytes as f64)
    }
}

/// Pages of blocks, which are told by their region and place.
type Part = (Vec<(u64, u16)>, Arrived);

/// All that the source's side says of a sample, in whichever order.
fn receive(connection: &Connection, most: u64, context: &Context) -> Result<(Sampled, Vec<Part>)> {
    let (mut sampled, mut parts) = (None::<Sampled>, Vec::new());
    let (mut blocks_left, mut bytes_left) = (most, 2 * SAMPLE_BYTES);
    loop {
        if let Some(sampled) = sampled
            && u64::from(sampled.blocks) == most - blocks_left
        {
            return Ok((sampled, parts));
        }
        context.check_cancelled()?;
        let message = match connection.receiver().recv_timeout(TICK) {
            Ok(message) => message.map_err(lost)?,
            Err(RecvTimeoutError::Timeout) => {
                connection.check_alive().map_err(lost)?;
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => connection.receive().map_err(lost)?,
        };
        match message {
            Message::Data {
                blocks,
                runs,
                frame,
            } => {
                let more = |left: u64, found: usize| left.checked_sub(found as u64);
                let (Some(blocks_after), Some(bytes_after)) = (
                    more(blocks_left, blocks.len()).filter(|_| !blocks.is_empty()),
                    more(bytes_left, frame.len()),
                ) else {
                    return Err(violated(violates(
                        "a sample has other blocks than were asked for",
                    )));
                };
                (blocks_left, bytes_left) = (blocks_after, bytes_after);
                let arrived = Arrived {
                    blocks: Vec::new(),
                    runs,
                    frame,
                };
                parts.push((blocks, arrived));
            }
            Message::Sampled(said) if sampled.is_none() && u64::from(said.blocks) <= most => {
                sampled = Some(said);
            }
            Message::Failed(failed) => return Err(failed_peer(connection, &failed)),
            other => return Err(violated(unexpected("target", &other))),
        }
    }
}

/// Where blocks are that a peer told of.
fn blocks_of(geometry: &Geometry, blocks: &[(u64, u16)]) -> Result<Vec<Extent>> {
    let place = |(region, block): &(u64, u16)| {
        let region = Some(*region).filter(|region| *region < geometry.region_count())?;
        let region = blockferry_core::RegionIndex::new(region);
        let is_there = u64::from(*block) < geometry.region_block_count(region);
        is_there.then(|| block_in(geometry, region, usize::from(*block)))
    };
    let placed: Option<Vec<Extent>> = blocks.iter().map(place).collect();
    placed.ok_or_else(|| violated(violates("a sample has a block that the source has not")))
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
