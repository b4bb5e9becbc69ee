//! Manifests as streams: what is written is read back, and no damage goes unnoticed.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::io::{self, Cursor, Read, Write};

use blockferry_core::{
    BlockSize, Digest, Error, ErrorKind, Geometry, ManifestReader, ManifestWriter, RegionIndex,
    RegionLeaves, Root, block_digest, checksum, zero_block_digest,
};
use proptest::collection::btree_map;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

fn write(geometry: Geometry, regions: &[RegionLeaves]) -> (Root, Vec<u8>) {
    let mut writer = ManifestWriter::new(geometry, Vec::new()).unwrap();
    regions
        .iter()
        .for_each(|leaves| writer.push(leaves).unwrap());
    writer.finish().unwrap()
}

type Content = (Geometry, Vec<RegionLeaves>, Root);

fn read(bytes: &[u8]) -> Result<Content, Error> {
    let mut reader = ManifestReader::open(bytes)?;
    let mut regions = Vec::new();
    while let Some(leaves) = reader.next_region()? {
        assert!(
            reader.root().is_none(),
            "the root is not known before the end"
        );
        regions.push(leaves);
    }
    assert!(reader.next_region()?.is_none(), "the end stays the end");
    Ok((
        reader.geometry(),
        regions,
        reader.root().expect("known at the end"),
    ))
}

fn refused(bytes: &[u8]) -> Error {
    read(bytes).expect_err("damaged bytes are refused")
}

/// Regions with digests made from `data`: block → value.
fn regions(geometry: &Geometry, data: &BTreeMap<u64, u8>) -> Vec<RegionLeaves> {
    let mut regions: BTreeMap<u64, RegionLeaves> = BTreeMap::new();
    for (&block, &value) in data {
        let region = RegionIndex::new(block / 256);
        let leaves = regions.entry(region.get());
        let leaves = leaves.or_insert_with(|| RegionLeaves::zero(geometry, region));
        leaves.set(
            usize::try_from(block % 256).unwrap(),
            block_digest(&[value]),
        );
    }
    regions.into_values().collect()
}

/// Two regions with data out of three, the last one short: 500 blocks, the last of 100 bytes.
fn small() -> (Geometry, Vec<RegionLeaves>) {
    let geometry = Geometry::new(599 * 4096 + 100, BlockSize::MIN);
    let data = BTreeMap::from([(3, 1), (200, 2), (512, 3), (599, 4)]);
    (geometry, regions(&geometry, &data))
}

/// The default looks for a `lib.rs` beside the test, in vain.
fn config() -> ProptestConfig {
    let failures = FileFailurePersistence::Direct("proptest-regressions/manifest_stream.txt");
    ProptestConfig {
        failure_persistence: Some(Box::new(failures)),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn what_is_written_is_read_back(
        blocks in 0_u64..3000,
        short in prop_oneof![Just(0_u64), 1_u64..4096],
        data in btree_map(any::<u64>(), 0_u8..5, 0..40),
    ) {
        let geometry = Geometry::new((blocks * 4096).saturating_sub(short), BlockSize::MIN);
        let data = data.into_iter().filter(|_| blocks > 0).map(|(b, v)| (b % blocks, v)).collect();
        let regions = regions(&geometry, &data);

        let (root, bytes) = write(geometry, &regions);

        prop_assert_eq!(read(&bytes).unwrap(), (geometry, regions, root));
    }

    #[test]
    fn arbitrary_bytes_behind_a_right_header_never_panic(
        rest in proptest::collection::vec(any::<u8>(), 0..300), tag in 0_u8..4,
    ) {
        let (geometry, regions) = small();
        let (_, mut bytes) = write(geometry, &regions);
        bytes.truncate(48);
        bytes.extend([tag, 0, 0, 0]);
        bytes.extend(rest);

        refused(&bytes);
    }
}

#[test]
fn regions_of_zeros_leave_no_trace() {
    let (geometry, mut some) = small();
    let (root, bytes) = write(geometry, &some);
    some.insert(1, RegionLeaves::zero(&geometry, RegionIndex::new(1)));

    assert_eq!(write(geometry, &some), (root, bytes));
}

#[test]
fn a_manifest_costs_what_the_data_costs() {
    let geometry = Geometry::new(16 << 40, BlockSize::DEFAULT);
    let data = (0..1000).map(|i| (i * 250_000, 1)).collect();

    let (root, bytes) = write(geometry, &regions(&geometry, &data));

    assert_eq!(bytes.len(), 48 + 1000 * 88 + 56);
    assert_eq!(read(&bytes).unwrap().2, root);
    assert_eq!(write(geometry, &[]).1.len(), 48 + 56);
}

#[test]
fn every_flipped_bit_is_an_error() {
    let (geometry, regions) = small();
    let (_, bytes) = write(geometry, &regions);
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);

        refused(&damaged);
    }
}

#[test]
fn every_truncation_is_told_as_one() {
    let (geometry, regions) = small();
    let (_, bytes) = write(geometry, &regions);
    for length in 0..bytes.len() {
        assert_eq!(
            refused(&bytes[..length]).kind(),
            ErrorKind::Truncated,
            "{length} bytes"
        );
    }
}

#[test]
fn entries_lost_exchanged_or_taken_from_another_manifest_are_errors() {
    let (geometry, both) = small();
    let (_, bytes) = write(geometry, &both);
    let (_, other) = write(
        geometry,
        &regions(
            &geometry,
            &BTreeMap::from([(3, 9), (200, 2), (512, 3), (599, 4)]),
        ),
    );
    let (header, first, second, end) = (
        &bytes[..48],
        &bytes[48..168],
        &bytes[168..288],
        &bytes[288..],
    );

    assert!(read(&[header, first, second, end].concat()).is_ok());
    for parts in [
        [header, second, end].concat(),
        [header, first, end].concat(),
        [header, second, first, end].concat(),
        [header, first, first, second, end].concat(),
        [header, &other[48..168], second, end].concat(),
    ] {
        assert_eq!(refused(&parts).kind(), ErrorKind::Corrupt);
    }
}

/// Changes bytes of a part and mends the checksum, as a wrong writer would.
fn forge(range: std::ops::Range<usize>, change: impl FnOnce(&mut Vec<u8>)) -> Error {
    let (geometry, regions) = small();
    let (_, bytes) = write(geometry, &regions);
    let mut part = bytes[range.start..range.end - 8].to_vec();
    change(&mut part);
    let sum = checksum(&part);
    part.extend(&sum.as_bytes()[..8]);
    refused(&[&bytes[..range.start], &part, &bytes[range.end..]].concat())
}

fn put(offset: usize, bytes: &[u8]) -> impl FnOnce(&mut Vec<u8>) + use<'_> {
    move |part| part[offset..offset + bytes.len()].copy_from_slice(bytes)
}

#[test]
fn an_unknown_version_is_refused_naming_both() {
    let error = forge(0..48, put(8, &7_u32.to_le_bytes()));

    assert_eq!(error.kind(), ErrorKind::UnknownVersion);
    assert_eq!(
        error.to_string(),
        "manifest header: version: expected 1, found 7"
    );
}

#[test]
fn headers_with_right_checksum_and_wrong_fields_are_corrupt() {
    let cases: [(usize, &[u8], &str); 5] = [
        (0, b"QFI\xfb", "magic: expected"),
        (12, &[49], "header length: expected 48, found 49"),
        (24, &[1], "block size: expected a power of two"),
        (32, &[1], "blocks per region: expected 256, found 257"),
        (36, &[1], "reserved field: expected 0, found 1"),
    ];
    for (offset, bytes, text) in cases {
        let error = forge(0..48, put(offset, bytes));
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn entries_with_right_checksum_and_wrong_fields_are_corrupt() {
    let zero = zero_block_digest(4096);
    let short_zero = zero_block_digest(100);
    let cases: [(std::ops::Range<usize>, usize, &[u8], &str); 8] = [
        (
            48..168,
            0,
            &[3],
            "entry 0 at byte 48: tag: expected 1 or 2, found 3",
        ),
        (48..168, 4, &[1], "checksum"),
        (48..168, 8, &[3], "region: expected one of 0..3, found 3"),
        (
            168..288,
            8,
            &[0],
            "entry 1 at byte 168: region: expected one of 1..3, found 0",
        ),
        (48..168, 17, &[1], "bits of the map: expected 2, found 3"),
        (
            168..288,
            16,
            &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            "bits inside the region: expected 2, found 1",
        ),
        (
            48..168,
            48,
            zero.as_bytes(),
            "block 3: expected data, found the digest of a zero block",
        ),
        (
            168..288,
            80,
            short_zero.as_bytes(),
            "block 87: expected data",
        ),
    ];
    for (range, offset, bytes, text) in cases {
        let error = forge(range, put(offset, bytes));
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn an_entry_without_data_is_corrupt() {
    let error = forge(48..168, |part| {
        part.truncate(48);
        part[4] = 0;
        part[16..48].fill(0);
    });

    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(
        error.to_string().contains("expected a region with data"),
        "{error}"
    );
}

#[test]
fn a_count_above_256_is_refused_before_anything_is_allocated() {
    let error = forge(48..168, put(4, &u32::MAX.to_le_bytes()));

    assert_eq!(error.kind(), ErrorKind::LimitExceeded);
}

#[test]
fn an_end_with_right_checksum_and_wrong_fields_is_corrupt() {
    let cases: [(usize, &[u8], &str); 3] = [
        (4, &[1], "reserved field"),
        (8, &[3], "entry count: expected 2, found 3"),
        (16, &[0; 32], "root: expected 000"),
    ];
    for (offset, bytes, text) in cases {
        let error = forge(288..344, put(offset, bytes));
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn nothing_behind_the_end_is_read() {
    let (geometry, regions) = small();
    let (root, mut bytes) = write(geometry, &regions);
    bytes.extend(b"something else");

    let mut reader = ManifestReader::open(Cursor::new(&bytes)).unwrap();

    assert_eq!(reader.read_to_end().unwrap(), root);
    let mut rest = String::new();
    reader.into_inner().read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "something else");
}

#[test]
fn after_an_error_the_reader_stays_in_error() {
    let (geometry, regions) = small();
    let (_, mut bytes) = write(geometry, &regions);
    bytes[100] ^= 1;
    let mut reader = ManifestReader::open(&bytes[..]).unwrap();

    assert!(reader.next_region().is_err());
    assert!(reader.next_region().is_err());
    assert!(reader.read_to_end().is_err());
    assert_eq!(reader.root(), None);
}

/// Gives one byte at a time, with interruptions; fails at the end.
struct Trickle<'a> {
    bytes: &'a [u8],
    interrupt: bool,
}

impl Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.interrupt = !self.interrupt;
        if self.interrupt {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let (Some((first, rest)), Some(target)) = (self.bytes.split_first(), buffer.first_mut())
        else {
            return Err(io::Error::other("cable pulled"));
        };
        *target = *first;
        self.bytes = rest;
        Ok(1)
    }
}

#[test]
fn short_and_interrupted_reads_change_nothing() {
    let (geometry, regions) = small();
    let (root, bytes) = write(geometry, &regions);
    let input = Trickle {
        bytes: &bytes,
        interrupt: false,
    };

    assert_eq!(
        ManifestReader::open(input).unwrap().read_to_end().unwrap(),
        root
    );

    let input = Trickle {
        bytes: &bytes[..60],
        interrupt: false,
    };
    let error = ManifestReader::open(input)
        .unwrap()
        .read_to_end()
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert_eq!(
        std::error::Error::source(&error).unwrap().to_string(),
        "cable pulled"
    );
}

/// Takes so many bytes, then fails once, then takes more: as a full disk does that is given room.
#[derive(Debug)]
struct FailsOnce {
    room: usize,
    failed: bool,
    largest_write: usize,
}

impl Write for FailsOnce {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.largest_write = self.largest_write.max(bytes.len());
        if self.room < bytes.len() && !self.failed {
            self.failed = true;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.room = self.room.saturating_sub(bytes.len());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn full_region(geometry: &Geometry, region: u64) -> RegionLeaves {
    let mut leaves = RegionLeaves::zero(geometry, RegionIndex::new(region));
    (0..256).for_each(|block| leaves.set(block, Digest::from_bytes([7; 32])));
    leaves
}

#[test]
fn after_a_failed_write_the_writer_never_reports_success() {
    let geometry = Geometry::new(1 << 40, BlockSize::DEFAULT);
    let output = FailsOnce {
        room: 100_000,
        failed: false,
        largest_write: 0,
    };
    let mut writer = ManifestWriter::new(geometry, output).unwrap();

    let results: Vec<_> = (0..40)
        .map(|i| writer.push(&full_region(&geometry, i)))
        .collect();

    let first_error = results
        .iter()
        .position(Result::is_err)
        .expect("the room ran out");
    assert!(results[first_error..].iter().all(Result::is_err));
    let told = results[first_error].as_ref().unwrap_err().to_string();
    assert!(
        told.contains("at byte ") && !told.contains("at byte 0"),
        "behind what was written: {told}"
    );
    assert_eq!(writer.finish().unwrap_err().kind(), ErrorKind::Io);
}

#[test]
fn output_comes_in_pieces_of_at_most_64_kib() {
    let geometry = Geometry::new(1 << 40, BlockSize::DEFAULT);
    let output = FailsOnce {
        room: usize::MAX,
        failed: false,
        largest_write: 0,
    };
    let mut writer = ManifestWriter::new(geometry, output).unwrap();
    (0..40).for_each(|i| writer.push(&full_region(&geometry, i)).unwrap());

    let (_, output) = writer.finish().unwrap();

    assert!(
        (32 << 10..=64 << 10).contains(&output.largest_write),
        "{}",
        output.largest_write
    );
}
