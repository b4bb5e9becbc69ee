//! The fixed parts of a manifest, field by field; the table is in `docs/format/manifest.md`.
//!
//! Each part ends with a checksum: the first 8 bytes of BLAKE3 of the part's bytes before it. The
//! end of the manifest carries the root, so eight bytes need only tell chance damage early, not an
//! attacker.

use crate::leaves::DataMap;
use crate::{
    BlockSize, Decoder, Digest, Encoder, Error, ErrorKind, Geometry, REGION_BLOCKS, RegionIndex,
    RegionLeaves, Result, Root, checksum, to_usize,
};

/// Version of the manifest format this build writes and reads.
pub const MANIFEST_VERSION: u32 = 1;

pub(super) const MAGIC: [u8; 8] = *b"BFMANIF\n";
const CHECKSUM_BYTES: usize = 8;

const TAG_REGION: u32 = 1;
const TAG_END: u32 = 2;

/// Magic and version, which are read before anything else is believed.
pub(super) const PREFIX_BYTES: usize = 8 + 4;
pub(super) const HEADER_BYTES: usize = PREFIX_BYTES + 4 + 8 + 8 + 4 + 4 + CHECKSUM_BYTES;
/// What a region entry and the end have in common: enough to tell which it is and how long.
pub(super) const ENTRY_HEAD_BYTES: usize = 4 + 4 + 8;
const MAP_BYTES: usize = 32;
pub(super) const END_BYTES: usize = ENTRY_HEAD_BYTES + Digest::BYTES + CHECKSUM_BYTES;
pub(super) const MAX_ENTRY_BYTES: usize = entry_bytes(256);

const _: () = assert!(HEADER_BYTES == 48);
const _: () = assert!(END_BYTES == 56);
const _: () = assert!(MAX_ENTRY_BYTES == 48 + 256 * 32 + 8);
const _: () = assert!(MAP_BYTES as u64 * 8 == REGION_BLOCKS);

/// Bytes of a region entry with this many digests.
pub(super) const fn entry_bytes(data_blocks: usize) -> usize {
    ENTRY_HEAD_BYTES + MAP_BYTES + data_blocks * Digest::BYTES + CHECKSUM_BYTES
}

pub(super) fn encode_header(bytes: &mut Vec<u8>, geometry: &Geometry) {
    let start = bytes.len();
    Encoder::new(bytes)
        .bytes(&MAGIC)
        .u32(MANIFEST_VERSION)
        .count(HEADER_BYTES)
        .u64(geometry.image_bytes())
        .u64(geometry.block_size().bytes())
        .count(to_usize(REGION_BLOCKS))
        .u32(0);
    append_checksum(bytes, start);
    debug_assert_eq!(bytes.len() - start, HEADER_BYTES);
}

pub(super) fn encode_region(bytes: &mut Vec<u8>, leaves: &RegionLeaves) {
    let start = bytes.len();
    let mut encoder = Encoder::new(bytes);
    encoder
        .u32(TAG_REGION)
        .count(leaves.data_blocks())
        .u64(leaves.region().get());
    encoder.bytes(&leaves.data_map_bytes());
    for digest in leaves.data() {
        encoder.digest(digest);
    }
    append_checksum(bytes, start);
    debug_assert_eq!(bytes.len() - start, entry_bytes(leaves.data_blocks()));
}

pub(super) fn encode_end(bytes: &mut Vec<u8>, entry_count: u64, root: &Root) {
    let start = bytes.len();
    Encoder::new(bytes)
        .u32(TAG_END)
        .u32(0)
        .u64(entry_count)
        .digest(&root.digest());
    append_checksum(bytes, start);
    debug_assert_eq!(bytes.len() - start, END_BYTES);
}

/// Checks magic and version: what must be right before the length of the header is believed.
pub(super) fn decode_prefix(bytes: &[u8; PREFIX_BYTES]) -> Result<()> {
    let mut decoder = Decoder::new(bytes);
    let magic: [u8; 8] = decoder.array()?;
    if magic != MAGIC {
        return Err(corrupt(format!(
            "magic: expected {MAGIC:02x?}, found {magic:02x?}"
        )));
    }
    let version = decoder.u32()?;
    if version != MANIFEST_VERSION {
        let message = format!("version: expected {MANIFEST_VERSION}, found {version}");
        return Err(Error::new(ErrorKind::UnknownVersion, message));
    }
    Ok(())
}

pub(super) fn decode_header(bytes: &[u8; HEADER_BYTES]) -> Result<Geometry> {
    let mut decoder = Decoder::new(check_checksum(bytes)?);
    decoder.bytes(PREFIX_BYTES)?;
    expect(
        "header length",
        HEADER_BYTES as u64,
        u64::from(decoder.u32()?),
    )?;
    let image_bytes = decoder.u64()?;
    let block_size = BlockSize::new(decoder.u64()?)
        .map_err(|error| Error::new(ErrorKind::Corrupt, error.to_string()))?;
    expect(
        "blocks per region",
        REGION_BLOCKS,
        u64::from(decoder.u32()?),
    )?;
    expect("reserved field", 0, u64::from(decoder.u32()?))?;
    decoder.finish()?;
    Ok(Geometry::new(image_bytes, block_size))
}

/// What follows the common head of an entry.
pub(super) enum EntryHead {
    /// A region with this many digests.
    Region { data_blocks: usize },
    /// The end of the manifest.
    End,
}

/// Tells a region from the end, and bounds the length before the rest is read.
pub(super) fn decode_entry_head(bytes: &[u8; ENTRY_HEAD_BYTES]) -> Result<EntryHead> {
    let mut decoder = Decoder::new(bytes);
    match decoder.u32()? {
        TAG_REGION => {
            let data_blocks = decoder.count(to_usize(REGION_BLOCKS))?;
            Ok(EntryHead::Region { data_blocks })
        }
        TAG_END => Ok(EntryHead::End),
        tag => Err(corrupt(format!(
            "tag: expected {TAG_REGION} or {TAG_END}, found {tag}"
        ))),
    }
}

/// A whole region entry. Regions below `next_region` were there before.
pub(super) fn decode_region(
    bytes: &[u8],
    geometry: &Geometry,
    next_region: u64,
) -> Result<RegionLeaves> {
    let mut decoder = Decoder::new(check_checksum(bytes)?);
    decoder.u32()?;
    let data_blocks = decoder.count(to_usize(REGION_BLOCKS))?;
    let region = decoder.u64()?;
    let regions = next_region..geometry.region_count();
    if !regions.contains(&region) {
        return Err(corrupt(format!(
            "region: expected one of {regions:?}, found {region}"
        )));
    }
    let mut leaves = RegionLeaves::zero(geometry, RegionIndex::new(region));
    let map = DataMap::from_bytes(decoder.array()?);
    check_map(map, data_blocks, leaves.len())?;
    for block in (0..leaves.len()).filter(|&block| map.contains(block)) {
        leaves.set(block, decoder.digest()?);
        if leaves.is_zero_block(block) {
            let message = format!("block {block}: expected data, found the digest of a zero block");
            return Err(corrupt(message));
        }
    }
    decoder.finish()?;
    Ok(leaves)
}

/// The map must name exactly as many blocks as there are digests, all of them inside the region.
fn check_map(map: DataMap, data_blocks: usize, block_count: usize) -> Result<()> {
    if data_blocks == 0 {
        return Err(corrupt(
            "expected a region with data, found none".to_owned(),
        ));
    }
    expect("bits of the map", data_blocks as u64, map.count() as u64)?;
    expect(
        "bits inside the region",
        data_blocks as u64,
        map.rank(block_count) as u64,
    )
}

/// The end of the manifest: its entry count and root.
pub(super) fn decode_end(bytes: &[u8; END_BYTES]) -> Result<(u64, Root)> {
    let mut decoder = Decoder::new(check_checksum(bytes)?);
    expect("tag", u64::from(TAG_END), u64::from(decoder.u32()?))?;
    expect("reserved field", 0, u64::from(decoder.u32()?))?;
    let entry_count = decoder.u64()?;
    let root = Root::from_bytes(decoder.array()?);
    decoder.finish()?;
    Ok((entry_count, root))
}

fn append_checksum(bytes: &mut Vec<u8>, start: usize) {
    let sum = short_checksum(&bytes[start..]);
    bytes.extend_from_slice(&sum);
}

/// The bytes before the checksum, when it is right.
fn check_checksum(bytes: &[u8]) -> Result<&[u8]> {
    let (body, found) = bytes
        .split_last_chunk()
        .expect("callers read whole parts, which end with a checksum");
    let expected = short_checksum(body);
    if expected != *found {
        return Err(corrupt(format!(
            "checksum: expected {expected:02x?}, found {found:02x?}"
        )));
    }
    Ok(body)
}

fn short_checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    *checksum(bytes)
        .as_bytes()
        .first_chunk()
        .expect("a digest is longer than its first bytes")
}

/// An error unless the two are equal.
pub(super) fn expect(what: &str, expected: u64, found: u64) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(corrupt(format!(
        "{what}: expected {expected}, found {found}"
    )))
}

pub(super) fn corrupt(message: String) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}
