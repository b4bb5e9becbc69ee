//! Manifests with right checksums.

use blockferry::core::{ManifestReader, TreeHasher, checksum};

const HEADER_BYTES: usize = 48;
const HEAD_BYTES: usize = 16;
const END_BYTES: usize = 56;
const REGION_TAG: u8 = 1;

/// Puts the checksum of every part right, as far as the bytes have the shape of a manifest.
pub fn resealed(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut start = 0;
    while let Some(end) = end_of_part(&bytes, start) {
        seal(&mut bytes[start..end]);
        start = end;
    }
    bytes
}

/// Puts count and root right as well, as far as the regions before the end are read: otherwise no change of one is
/// ever looked at as part of a whole image.
pub fn with_its_root(sealed: &[u8]) -> Vec<u8> {
    let mut bytes = sealed.to_vec();
    let Ok(mut reader) = ManifestReader::open(sealed) else {
        return bytes;
    };
    let mut tree = TreeHasher::new(reader.geometry());
    let (mut start, mut count) = (HEADER_BYTES, 0_u64);
    while let Ok(Some(leaves)) = reader.next_region() {
        tree.push(&leaves);
        count += 1;
        start = end_of_part(sealed, start).expect("it was read");
    }
    if let Some(end) = end_of_part(sealed, start).filter(|end| end - start == END_BYTES) {
        let part = &mut bytes[start..end];
        part[8..16].copy_from_slice(&count.to_le_bytes());
        part[16..48].copy_from_slice(tree.finish().as_bytes());
        seal(part);
    }
    bytes
}

/// Where the part that starts here ends, if it is all there.
fn end_of_part(bytes: &[u8], start: usize) -> Option<usize> {
    let length = if start == 0 {
        HEADER_BYTES
    } else {
        let head = bytes[start..].first_chunk::<HEAD_BYTES>()?;
        let digests = u16::from_le_bytes([head[4], head[5]]);
        if head[0] == REGION_TAG {
            HEAD_BYTES + 32 + 32 * usize::from(digests) + 8
        } else {
            END_BYTES
        }
    };
    (start + length <= bytes.len()).then_some(start + length)
}

fn seal(part: &mut [u8]) {
    let (body, sum) = part.split_at_mut(part.len() - 8);
    sum.copy_from_slice(&checksum(body).as_bytes()[..8]);
}
