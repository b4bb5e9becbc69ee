//! Manifests with right checksums.

use blockferry::core::checksum;

const HEADER_BYTES: usize = 48;
const HEAD_BYTES: usize = 16;
const END_BYTES: usize = 56;
const REGION_TAG: u8 = 1;

/// Puts the checksum of every part right, as far as the bytes have the shape of a manifest.
pub fn resealed(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut start = 0;
    let mut end = HEADER_BYTES;
    while end <= bytes.len() {
        let sum = checksum(&bytes[start..end - 8]);
        bytes[end - 8..end].copy_from_slice(&sum.as_bytes()[..8]);
        start = end;
        let Some(head) = bytes[start..].first_chunk::<HEAD_BYTES>() else {
            break;
        };
        let digests = u16::from_le_bytes([head[4], head[5]]);
        let is_region = head[0] == REGION_TAG;
        end += if is_region {
            HEAD_BYTES + 32 + 32 * usize::from(digests) + 8
        } else {
            END_BYTES
        };
    }
    bytes
}
