//! State files and log segments, packed so that a fuzzer spends its bytes on fields and not on padding.
//!
//! ```text
//! piece: kind 1 | page 1 | length 2 | bytes
//! kind:  bits 0-1 the file, bit 2 sealed, bit 3 chained, bit 4 damaged after all, bit 5 repeated
//! ```
//! A piece lies at its page of its file, padded with zeros; a sealed one to whole pages with a checksum at the end. A
//! chained one gets the chain value it must name: a record that of what lies before it in its segment, a decision
//! that of the end of the log. Of a page that repeats itself only the repeated bytes are stored.

use blockferry::core::{Digest, checksum};

/// Unit of everything stored.
pub const PAGE: usize = 4096;
/// Pages of a whole state file.
const STATE_PAGES: usize = 35;
/// No file of an input is longer.
const MAX_PAGES: usize = 64;
const CHECKSUM_BYTES: usize = 32;
const SEALED: u8 = 4;
/// Of a piece's kind: it gets the chain value it must name.
pub const CHAINED: u8 = 8;
const DAMAGED: u8 = 16;
const REPEATED: u8 = 32;
/// Pages that repeat more bytes than these are stored as they are.
const MAX_PERIOD: usize = 16;

/// Where a record names its predecessor, and a decision the end of the log.
const PREVIOUS_OF_RECORD: usize = 40;
const CHAIN_OF_DECISION: usize = 49;
/// Sizes in the header of a segment: a target of any size would only exhaust memory.
const SIZES_OF_SEGMENT: [usize; 2] = [39, 47];
/// Sizes are less than this when they are carried out.
const MAX_IMAGE_BYTES: u64 = 1 << 20;

/// Files of an input: the state, two segments of a log, a group record; named as the golden ones are.
pub const FILES: [&str; 4] = [
    "state",
    "51515151515151515151515151515151.log.0000",
    "51515151515151515151515151515151.log.0001",
    "67676767676767676767676767676767.group",
];
/// Which of them is the state.
pub const STATE: usize = 0;
/// Pages of the state that hold a slot.
pub const SLOT_PAGES: [usize; 2] = [1, 2];

/// The files of an input; `None` for those it does not mention.
pub type Files = [Option<Vec<u8>>; FILES.len()];

/// How far sizes are believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sizes {
    /// As they are: only for looking.
    Any,
    /// Small enough to be carried out.
    Bounded,
}

/// The files that `input` describes.
pub fn unpack(input: &[u8], sizes: Sizes) -> Files {
    let mut files = Files::default();
    let mut chains = [Digest::from_bytes([0; 32]); FILES.len()];
    let mut rest = input;
    // Decisions come last: they bind the log.
    let mut pieces = Vec::new();
    while let Some((piece, more)) = next_piece(rest) {
        pieces.push(piece);
        rest = more;
    }
    pieces.sort_by_key(|piece| piece.file == STATE);
    for piece in pieces {
        let log_end = [chains[2], chains[1]]
            .into_iter()
            .find(|c| *c != Digest::from_bytes([0; 32]));
        let chain = if piece.file == STATE {
            log_end.unwrap_or(chains[1])
        } else {
            chains[piece.file]
        };
        let (bytes, seal) = piece.stored(chain, sizes);
        if let Some(seal) = seal {
            chains[piece.file] = seal;
        }
        let file = files[piece.file].get_or_insert_default();
        let end = piece.page * PAGE + bytes.len();
        file.resize(file.len().max(end).min(MAX_PAGES * PAGE), 0);
        let end = end.min(file.len());
        file[piece.page * PAGE..end].copy_from_slice(&bytes[..end - piece.page * PAGE]);
    }
    if let Some(state) = &mut files[STATE] {
        state.resize(STATE_PAGES * PAGE, 0);
    }
    files
}

/// Describes files so that [`unpack`] makes the same of them, with chain values that follow a mutation where they can.
///
/// # Panics
/// When that is not possible: a file is too long, or does not consist of pages.
pub fn pack(files: &Files) -> Vec<u8> {
    let chained = [CHAINED; FILES.len()];
    let found = unpack(&pack_as(files, chained), Sizes::Any);
    // A value that is wrong already stays as it is.
    let mut kept = chained;
    for (kept, (found, wanted)) in kept.iter_mut().zip(found.iter().zip(files)) {
        if found != wanted {
            *kept = 0;
        }
    }
    let input = pack_as(files, kept);
    assert!(unpack(&input, Sizes::Any) == *files, "packed otherwise");
    input
}

fn pack_as(files: &Files, chained: [u8; FILES.len()]) -> Vec<u8> {
    let mut input = Vec::new();
    for (number, file) in files.iter().enumerate() {
        if let Some(file) = file {
            input.extend(pack_file(number, file, chained[number]));
        }
    }
    input
}

fn pack_file(file: usize, bytes: &[u8], chained: u8) -> Vec<u8> {
    let mut input = Vec::new();
    let mut page = 0;
    while page * PAGE < bytes.len() {
        let rest = &bytes[page * PAGE..];
        let sealed_pages = (1..=rest.len() / PAGE)
            .take(16)
            .find(|n| is_sealed(&rest[..n * PAGE]));
        let length = sealed_pages.unwrap_or(1) * PAGE;
        let stored = &rest[..length.min(rest.len())];
        let body = if sealed_pages.is_some() {
            &stored[..length - CHECKSUM_BYTES]
        } else {
            stored
        };
        let used = body
            .iter()
            .rposition(|b| *b != 0)
            .map_or(0, |last| last + 1);
        let period = sealed_pages.is_none().then(|| period_of(stored)).flatten();
        let used = period.unwrap_or(used);
        let kind = match (sealed_pages, period) {
            (Some(_), _) => SEALED | chained,
            (None, Some(_)) => REPEATED,
            (None, None) => 0,
        };
        if body.iter().any(|b| *b != 0) {
            input.extend([file as u8 | kind, page as u8]);
            input.extend((used as u16).to_le_bytes());
            input.extend(&body[..used]);
        }
        page += length / PAGE;
    }
    input
}

/// After how many bytes a whole page repeats itself.
fn period_of(page: &[u8]) -> Option<usize> {
    let repeats = |period: &usize| page.iter().zip(&page[*period..]).all(|(a, b)| a == b);
    (1..=MAX_PERIOD).find(|period| page.len() == PAGE && repeats(period))
}

fn is_sealed(bytes: &[u8]) -> bool {
    let (body, sum) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
    checksum(body).as_bytes() == sum
}

struct Piece<'a> {
    file: usize,
    kind: u8,
    page: usize,
    bytes: &'a [u8],
}

fn next_piece(input: &[u8]) -> Option<(Piece<'_>, &[u8])> {
    let (head, rest) = input.split_first_chunk::<4>()?;
    let length = usize::from(u16::from_le_bytes([head[2], head[3]])).min(rest.len());
    let (bytes, rest) = rest.split_at(length);
    let piece = Piece {
        file: usize::from(head[0]) % FILES.len(),
        kind: head[0],
        page: usize::from(head[1]) % MAX_PAGES,
        bytes,
    };
    Some((piece, rest))
}

impl Piece<'_> {
    /// The bytes as they lie in the file, and their checksum if they have one.
    fn stored(&self, chain: Digest, sizes: Sizes) -> (Vec<u8>, Option<Digest>) {
        let mut bytes = self.bytes.to_vec();
        if self.kind & SEALED == 0 {
            if self.kind & REPEATED != 0 {
                bytes = self.bytes.iter().copied().cycle().take(PAGE).collect();
            }
            bytes.resize(bytes.len().next_multiple_of(PAGE), 0);
            return (bytes, None);
        }
        let padded = (bytes.len() + CHECKSUM_BYTES).next_multiple_of(PAGE);
        bytes.resize(padded - CHECKSUM_BYTES, 0);
        if self.kind & CHAINED != 0 {
            put_chain(&mut bytes, chain);
        }
        if sizes == Sizes::Bounded && bytes.starts_with(b"BFRYLOG\0") {
            bound_sizes(&mut bytes);
        }
        let seal = checksum(&bytes);
        bytes.extend(seal.as_bytes());
        if self.kind & DAMAGED != 0 {
            bytes[padded / 2] ^= 1;
        }
        (bytes, Some(seal))
    }
}

fn put_chain(bytes: &mut [u8], chain: Digest) {
    let at = match bytes.first_chunk() {
        Some(b"BFRYREC\0") => PREVIOUS_OF_RECORD,
        Some(b"BFRYDEC\0") => CHAIN_OF_DECISION,
        _ => return,
    };
    bytes[at..at + 32].copy_from_slice(chain.as_bytes());
    if bytes.starts_with(b"BFRYREC\0") {
        // The length of the header, which the checksum covers.
        let length = (bytes.len() + CHECKSUM_BYTES) as u32;
        bytes[12..16].copy_from_slice(&length.to_le_bytes());
    }
}

fn bound_sizes(bytes: &mut [u8]) {
    for at in SIZES_OF_SEGMENT {
        let field = bytes[at..].first_chunk_mut().expect("a page is longer");
        let size = u64::from_le_bytes(*field) % MAX_IMAGE_BYTES;
        *field = size.to_le_bytes();
    }
}
