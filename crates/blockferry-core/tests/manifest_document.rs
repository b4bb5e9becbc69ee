//! `docs/format/manifest.md` and the code agree: the tables are read and held against the bytes.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::ops::Range;

use blockferry_core::{
    BlockSize, Digest, Geometry, MANIFEST_VERSION, ManifestWriter, RegionIndex, RegionLeaves, Root,
    TREE_VERSION, block_digest, checksum,
};

const DOCUMENT: &str = include_str!("../../../docs/format/manifest.md");

/// The cells of the table under a heading, without its head.
fn table(heading: &str) -> Vec<Vec<&'static str>> {
    let (_, section) = DOCUMENT
        .split_once(&format!("# {heading}\n"))
        .expect("the heading is there");
    let rows = section.lines().skip_while(|line| !line.starts_with('|'));
    let rows = rows.take_while(|line| line.starts_with('|')).skip(2);
    rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect())
        .collect()
}

/// Holds the bytes of a part against its table: the fields are as listed, in order and without
/// gaps.
fn check_part(heading: &str, bytes: &[u8], expected: &[(&str, Vec<u8>)]) {
    let rows = table(heading);
    let mut end = 0;
    for (row, (name, value)) in rows.iter().zip(expected) {
        let (offset, length): (usize, usize) = (row[0].parse().unwrap(), row[1].parse().unwrap());
        assert_eq!(row[2], *name, "{heading}");
        assert_eq!(offset, end, "{heading}, {name}");
        assert_eq!(
            bytes[offset..offset + length],
            value[..],
            "{heading}, {name}"
        );
        end = offset + length;
    }
    assert_eq!(rows.len(), expected.len(), "{heading}");
    assert_eq!(bytes.len(), end, "{heading}");
}

fn short_sum(bytes: &[u8]) -> Vec<u8> {
    checksum(bytes).as_bytes()[..8].to_vec()
}

/// An image of three regions of which the middle one has two blocks with data.
struct Sample {
    geometry: Geometry,
    digests: [Digest; 2],
    bytes: Vec<u8>,
    root: Root,
}

const REGION: u64 = 1;
const HEADER: Range<usize> = 0..48;
const ENTRY: Range<usize> = 48..168;
const END: Range<usize> = 168..224;

fn sample() -> Sample {
    let geometry = Geometry::new((3 << 24) - 5, BlockSize::DEFAULT);
    let digests = [block_digest(b"first"), block_digest(b"second")];
    let mut leaves = RegionLeaves::zero(&geometry, RegionIndex::new(REGION));
    leaves.set(9, digests[0]);
    leaves.set(255, digests[1]);
    let mut writer = ManifestWriter::new(geometry, Vec::new()).unwrap();
    writer.push(&leaves).unwrap();
    let (root, bytes) = writer.finish().unwrap();
    assert_eq!(bytes.len(), END.end);
    Sample {
        geometry,
        digests,
        bytes,
        root,
    }
}

#[test]
fn the_header_is_as_documented() {
    let Sample {
        geometry, bytes, ..
    } = sample();
    let header = &bytes[HEADER];

    check_part(
        "Header",
        header,
        &[
            ("magic", b"BFMANIF\n".to_vec()),
            ("version", MANIFEST_VERSION.to_le_bytes().to_vec()),
            ("header_bytes", 48_u32.to_le_bytes().to_vec()),
            ("image_bytes", geometry.image_bytes().to_le_bytes().to_vec()),
            ("block_bytes", 65_536_u64.to_le_bytes().to_vec()),
            ("region_blocks", 256_u32.to_le_bytes().to_vec()),
            ("reserved", vec![0; 4]),
            ("checksum", short_sum(&header[..40])),
        ],
    );
    let magic: Vec<String> = header[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert!(table("Header")[0][3].contains(&magic.join(" ")));
}

#[test]
fn a_region_entry_is_as_documented() {
    let Sample { digests, bytes, .. } = sample();
    let entry = &bytes[ENTRY];
    let mut map = vec![0; 32];
    map[9 / 8] |= 1 << (9 % 8);
    map[255 / 8] |= 1 << (255 % 8);

    check_part(
        "Region entry",
        entry,
        &[
            ("tag", 1_u32.to_le_bytes().to_vec()),
            ("data_blocks", 2_u32.to_le_bytes().to_vec()),
            ("region", REGION.to_le_bytes().to_vec()),
            ("data_map", map),
            (
                "digests",
                [*digests[0].as_bytes(), *digests[1].as_bytes()].concat(),
            ),
            ("checksum", short_sum(&entry[..112])),
        ],
    );
}

#[test]
fn the_end_is_as_documented() {
    let Sample { bytes, root, .. } = sample();
    let end = &bytes[END];

    check_part(
        "End",
        end,
        &[
            ("tag", 2_u32.to_le_bytes().to_vec()),
            ("reserved", vec![0; 4]),
            ("entry_count", 1_u64.to_le_bytes().to_vec()),
            ("root", root.as_bytes().to_vec()),
            ("checksum", short_sum(&end[..48])),
        ],
    );
}

#[test]
fn the_root_input_is_as_documented() {
    // One short region, so that the top digest is a single node that is easily made by hand.
    let image = b"blockferry";
    let node = [&[1], &block_digest(image).as_bytes()[..]].concat();
    let top = blake3::derive_key(&context("NODE"), &node);
    let input = [
        ("tree_version", TREE_VERSION.to_le_bytes().to_vec()),
        ("image_bytes", 10_u64.to_le_bytes().to_vec()),
        ("block_bytes", 4096_u64.to_le_bytes().to_vec()),
        ("levels", vec![1]),
        ("top_digest", top.to_vec()),
    ];
    let bytes: Vec<u8> = input.iter().flat_map(|(_, value)| value.clone()).collect();

    check_part("Root input", &bytes, &input);
    let root = Root::from_bytes(blake3::derive_key(&context("ROOT"), &bytes));
    assert_eq!(root, Root::of_bytes(image, BlockSize::MIN));
}

/// A context string as the document lists it under its name.
fn context(name: &str) -> String {
    let (_, rest) = DOCUMENT
        .split_once(&format!("- {name} = `"))
        .expect("the context is there");
    rest.split('`').next().unwrap().to_owned()
}

#[test]
fn the_test_vectors_hold() {
    let rows = table("Test vectors");
    assert!(rows.len() >= 7);
    for row in rows {
        let mut image = vec![0; row[0].parse().unwrap()];
        let offset: usize = row[2].parse().unwrap();
        image[offset..offset + row[1].len()].copy_from_slice(row[1].as_bytes());

        let root = Root::of_bytes(&image, BlockSize::new(row[3].parse().unwrap()).unwrap());

        assert_eq!(root.to_string(), row[4], "{row:?}");
    }
}

#[test]
fn the_history_ends_with_the_version_of_the_code() {
    let last = table("History").pop().unwrap();

    assert_eq!(last[0], MANIFEST_VERSION.to_string());
}
