use blockferry_core::{BlockSize, Extent, Geometry, Root};
use blockferry_device::{Evidence, Identity};
use proptest::prelude::*;

use super::*;
use crate::plan::{Strategy as How, Undo};

fn geometry(image_bytes: u64) -> Geometry {
    Geometry::new(image_bytes, BlockSize::new(65536).unwrap())
}

fn stamp(seed: u8) -> SourceStamp {
    let bytes = vec![seed; usize::from(seed % 65)];
    let address = "a/\u{e9}".repeat(usize::from(seed));
    SourceStamp::new(
        &address,
        Identity::from_bytes(&bytes),
        Evidence::from_bytes(&bytes),
    )
}

fn digest(seed: u8) -> Digest {
    Digest::from_bytes([seed; 32])
}

fn segment(seed: u8, number: u64) -> SegmentHeader {
    SegmentHeader {
        session: SessionId::from_bytes([seed; 16]),
        epoch: number,
        strategy: How::from_code(seed % 4 + 1).unwrap(),
        undo: Undo::from_code(seed % 2 + 1).unwrap(),
        mode: seed,
        old_bytes: number / 2,
        geometry: geometry(number),
        base: (seed.is_multiple_of(3)).then(|| SessionId::from_bytes([seed / 3; 16])),
        target_evidence: Evidence::from_bytes(&vec![seed; usize::from(seed % 65)]),
        old_file_id: (seed.is_multiple_of(5)).then_some(number),
        working_file_id: (seed.is_multiple_of(7)).then_some(number),
        source: stamp(seed),
        started_unix: number,
        segment: u32::from(seed),
        kind: if seed.is_multiple_of(2) {
            SegmentKind::Continues
        } else {
            SegmentKind::Compacted
        },
        first_sequence: number,
        previous_chain: digest(seed),
    }
}

fn record(seed: u8, count: u8) -> RecordHeader {
    let extent = |n: u64| Extent::from_range(n * 8192..n * 8192 + 4096);
    let entry = |n: u8| BatchExtent {
        extent: extent(n.into()),
        new: [
            NewContent::None,
            NewContent::Data,
            NewContent::Zero,
            NewContent::Reserve,
        ][usize::from(n % 4)],
        old: [OldContent::None, OldContent::Data, OldContent::Zero][usize::from(n % 3)],
    };
    let extents: Vec<BatchExtent> = (0..count).map(entry).collect();
    let new = extents.iter().filter(|e| e.new == NewContent::Data).count();
    let old = extents.iter().filter(|e| e.old == OldContent::Data).count();
    RecordHeader {
        session: SessionId::from_bytes([seed; 16]),
        sequence: u64::from(seed) + 1,
        previous: digest(seed),
        durable: seed.into(),
        unit: if seed.is_multiple_of(2) {
            Unit::Page
        } else {
            Unit::Block
        },
        fuzzy: seed.is_multiple_of(3),
        compaction_end: seed.is_multiple_of(5),
        pages: match seed % 3 {
            0 => StoredPages::Elsewhere,
            1 => StoredPages::Plain,
            _ => StoredPages::Zstd {
                stored_bytes: 77,
                checksum: digest(3),
            },
        },
        evidence: Evidence::from_bytes(&vec![seed; usize::from(seed % 65)]),
        extents,
        new_digests: vec![digest(1); new],
        old_digests: vec![digest(2); old],
    }
}

fn slot(seed: u8, number: u64) -> Slot {
    let point = |seed: u8| Point {
        id: SessionId::from_bytes([seed; 16]),
        root: Root::from_bytes([seed; 32]),
        geometry: geometry(number),
        source: stamp(seed),
        made_unix: number,
    };
    Slot {
        sequence: number,
        epoch: number,
        identity: Identity::from_bytes(&[seed; 9]),
        evidence: Evidence::from_bytes(&[seed; 64]),
        point: (seed.is_multiple_of(2)).then(|| point(seed)),
        retained: (seed.is_multiple_of(3)).then(|| Retained {
            strategy: How::Redo,
            point: (seed.is_multiple_of(5)).then(|| point(seed / 5)),
            old_bytes: number,
        }),
    }
}

fn decision(seed: u8, number: u64) -> Decision {
    Decision {
        session: SessionId::from_bytes([seed; 16]),
        epoch: number,
        ordinal: u32::from(seed),
        kind: DecisionKind::Commit,
        records: number,
        chain: digest(seed),
        root: digest(seed / 2),
        group: [seed; 16],
        evidence: Evidence::from_bytes(&[seed; 30]),
    }
}

proptest! {
    #[test]
    fn every_structure_reads_back_as_it_was_written(seed: u8, number in 0..1u64 << 40, count in 0..200u8) {
        let (page, chain) = segment(seed, number).encode();
        prop_assert_eq!(SegmentHeader::decode(&page, "test").unwrap(), (segment(seed, number), chain));
        let header = record(seed, count);
        let (bytes, chain) = header.encode();
        prop_assert_eq!(RecordHeader::peek_length(&bytes[..PAGE]), Some(bytes.len()));
        prop_assert_eq!(header.encoded_bytes(), bytes.len());
        let read = RecordHeader::decode(&bytes, &geometry(1 << 40), 1 << 40).unwrap();
        prop_assert_eq!(read, (header, chain));
        prop_assert_eq!(Slot::decode(&slot(seed, number).encode()), Some(slot(seed, number)));
        prop_assert_eq!(Decision::decode(&decision(seed, number).encode()), Some(decision(seed, number)));
    }

    #[test]
    fn every_flipped_bit_is_seen(seed: u8, number in 0..1u64 << 40, count in 0..100u8, at: prop::sample::Index, bit in 0..8u8) {
        let flipped = |mut bytes: Vec<u8>| {
            let byte = at.index(bytes.len());
            bytes[byte] ^= 1 << bit;
            bytes
        };

        prop_assert!(SegmentHeader::decode(&flipped(segment(seed, number).encode().0), "test").is_err());
        let bytes = flipped(record(seed, count).encode().0);
        prop_assert!(RecordHeader::decode(&bytes, &geometry(1 << 40), 1 << 40).is_err());
        prop_assert_eq!(Slot::decode(&flipped(slot(seed, number).encode())), None);
        prop_assert_eq!(Decision::decode(&flipped(decision(seed, number).encode())), None);
    }
}

#[test]
fn the_documents_name_every_magic_and_the_version() {
    let docs = concat!(
        include_str!("../../../../docs/format/transfer-log.md"),
        include_str!("../../../../docs/format/state.md")
    );
    for magic in [
        "BFRYLOG", "BFRYREC", "BFRYSTA", "BFRYSLT", "BFRYDEC", "BFRYGRP",
    ] {
        assert!(docs.contains(magic), "{magic}");
    }
    assert!(docs.contains(&format!("format version {FORMAT_VERSION}")));
}

#[test]
fn an_extent_outside_of_the_image_is_refused() {
    let (bytes, _) = record(1, 9).encode();

    assert!(RecordHeader::decode(&bytes, &geometry(1 << 40), 4096).is_err());
}

#[test]
fn pages_that_start_within_a_page_are_refused() {
    let geometry = geometry(1 << 40);
    for unit in [Unit::Page, Unit::Block] {
        let mut record = RecordHeader {
            unit,
            ..record(4, 2)
        };
        RecordHeader::decode(&record.encode().0, &geometry, 1 << 40).unwrap();

        record.extents[1].extent = Extent::from_range(8192 + 512..8192 + 4096);
        let error = RecordHeader::decode(&record.encode().0, &geometry, 1 << 40).unwrap_err();

        assert!(
            error.to_string().contains("multiples of 4096"),
            "{unit:?}: {error}"
        );
    }
}

#[test]
fn a_record_beyond_a_limit_is_refused_and_one_at_it_is_read() {
    let geometry = geometry(1 << 40);
    let plain = |entries: Vec<(u64, NewContent, OldContent)>, pages| {
        let mut start = 0;
        let place = |(length, new, old): (u64, NewContent, OldContent)| {
            let extent = Extent::from_range(start..start + length * 4096);
            start = extent.end() + 4096;
            BatchExtent { extent, new, old }
        };
        let extents: Vec<BatchExtent> = entries.into_iter().map(place).collect();
        let units = |side: &dyn Fn(&BatchExtent) -> bool| -> usize {
            let lengths = extents
                .iter()
                .filter(|e| side(e))
                .map(|e| e.extent.length());
            usize::try_from(lengths.sum::<u64>() / 4096).unwrap()
        };
        let new_digests = vec![digest(1); units(&|e| e.new == NewContent::Data)];
        let old_digests = vec![digest(2); units(&|e| e.old == OldContent::Data)];
        RecordHeader {
            unit: Unit::Page,
            pages,
            evidence: Evidence::unknown(),
            extents,
            new_digests,
            old_digests,
            ..record(4, 1)
        }
    };
    let is_read = |record: &RecordHeader| {
        RecordHeader::decode(&record.encode().0, &geometry, 1 << 40).is_ok()
    };
    let (data, zero) = (NewContent::Data, NewContent::Zero);
    let new = |pages: u64, stored| plain(vec![(pages, data, OldContent::None)], stored);
    let old = |pages: u64| plain(vec![(pages, zero, OldContent::Data)], StoredPages::Plain);
    let zstd = |stored_bytes| StoredPages::Zstd {
        stored_bytes,
        checksum: digest(3),
    };
    for (at, beyond, what) in [
        (
            new(256, StoredPages::Plain),
            new(257, StoredPages::Plain),
            "new pages",
        ),
        (new(256, zstd(1)), new(257, zstd(1)), "new pages in a frame"),
        (old(256), old(257), "old pages"),
        (new(1, zstd(2 << 20)), new(1, zstd((2 << 20) + 1)), "frame"),
        (
            new(1024, StoredPages::Elsewhere),
            new(1025, StoredPages::Elsewhere),
            "digests",
        ),
    ] {
        assert!(is_read(&at), "{what} at the limit");
        assert!(!is_read(&beyond), "{what} beyond the limit");
    }
    // Old pages begin at a page whatever becomes of them.
    let mut within = old(1);
    within.extents[0].extent = Extent::from_range(512..4096);
    assert!(!is_read(&within));
    // What has no pages need not.
    let mut zeros = plain(vec![(1, zero, OldContent::Zero)], StoredPages::Plain);
    zeros.extents[0].extent = Extent::from_range(512..4096);
    assert!(is_read(&zeros));
}

#[test]
fn a_header_that_claims_an_impossible_length_is_none() {
    let (whole, _) = record(4, 1).encode();
    assert_eq!(RecordHeader::peek_length(&whole), Some(whole.len()));
    for length in [0, 4096 - 8, 4096 + 8, 0xFFFF_F000u32, u32::MAX] {
        let mut claims = whole.clone();
        claims[12..16].copy_from_slice(&length.to_le_bytes());
        assert_eq!(RecordHeader::peek_length(&claims), None, "{length}");
    }
}

#[test]
fn an_id_is_32_lower_case_digits_and_nothing_else() {
    let id = SessionId::from_bytes([0xab; 16]);
    let text = id.to_string();
    assert_eq!(SessionId::from_hex(&text), Some(id));
    let (short, long) = (&text[1..], format!("{text}a"));
    let (signed, upper) = (format!("+{short}"), text.to_uppercase());
    for wrong in ["", short, &long, &signed, &upper] {
        assert_eq!(SessionId::from_hex(wrong), None, "{wrong}");
    }
}

#[test]
fn a_count_that_has_no_next_one_is_refused() {
    let (slot, decision, segment) = (slot(1, 1), decision(1, 1), segment(1, 1));
    for count in [1 << 63, u64::MAX] {
        has_no_next(count, &slot, &decision, &segment);
    }
    let largest = Slot {
        sequence: (1 << 63) - 1,
        ..slot
    };
    assert_eq!(Slot::decode(&largest.encode()), Some(largest));
}

fn has_no_next(count: u64, slot: &Slot, decision: &Decision, segment: &SegmentHeader) {
    for slot in [
        Slot {
            sequence: count,
            ..slot.clone()
        },
        Slot {
            epoch: count,
            ..slot.clone()
        },
    ] {
        assert_eq!(Slot::decode(&slot.encode()), None);
    }
    for decision in [
        Decision {
            epoch: count,
            ..decision.clone()
        },
        Decision {
            records: count,
            ..decision.clone()
        },
        Decision {
            ordinal: u32::MAX,
            ..decision.clone()
        },
    ] {
        assert_eq!(Decision::decode(&decision.encode()), None);
    }
    let segment = SegmentHeader {
        epoch: count,
        ..segment.clone()
    };
    assert!(SegmentHeader::decode(&segment.encode().0, "test").is_err());
}
