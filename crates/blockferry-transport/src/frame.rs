//! Frames: what a stream of bytes is cut into. Sans I/O: bytes in, frames out.
//!
//! ```text
//! | 4 | length of the body | 1 | kind | body |
//! ```
//! A length meets its limit before memory is set aside for it, and the limit is small until the peer is known.

use crate::error::{Error, Result};

/// Length of what stands before a body, in bytes.
pub const HEADER_BYTES: usize = 5;
/// Most bytes of a body before the peer is authenticated.
pub const MAX_BODY_BEFORE_AUTHENTICATION: usize = 16 * 1024;
/// Most bytes of a body: pages of one record, compressed or not, with what says where they belong.
pub const MAX_BODY: usize = 1024 * 1024 + 256 * 1024;

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "a plain value")]
pub struct Frame {
    /// What the body is; the messages number their kinds.
    pub kind: u8,
    /// The body.
    pub body: Vec<u8>,
}

/// Appends a frame to `out`; `body` appends the body.
///
/// # Panics
/// When the body is longer than [`MAX_BODY`], which is a bug of the caller.
pub fn encode(kind: u8, out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0, 0, 0, 0, kind]);
    body(out);
    let length = out.len() - start - HEADER_BYTES;
    assert!(length <= MAX_BODY, "a body of {length} bytes");
    let length = u32::try_from(length).unwrap_or_else(|_| unreachable!("checked above"));
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
}

/// Puts frames together from bytes as they arrive, in pieces of any size.
#[derive(Debug)]
pub struct FrameDecoder {
    limit: usize,
    /// Bytes that came and were not handed out; those before `start` were.
    bytes: Vec<u8>,
    start: usize,
}

impl Default for FrameDecoder {
    fn default() -> Self {
        Self::new()
    }
}

impl FrameDecoder {
    /// A decoder for a peer that nobody knows yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            limit: MAX_BODY_BEFORE_AUTHENTICATION,
            bytes: Vec::new(),
            start: 0,
        }
    }

    /// From here on bodies may have [`MAX_BODY`] bytes.
    pub fn trust(&mut self) {
        self.limit = MAX_BODY;
    }

    /// Takes bytes as they came. Those of a frame that is too long are taken all the same, and refused by
    /// [`Self::next_frame`]: callers hand over no more than they read at once.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame; `None` until more bytes come.
    ///
    /// # Errors
    /// The frame is longer than agreed.
    pub fn next_frame(&mut self) -> Result<Option<Frame>> {
        let rest = &self.bytes[self.start..];
        let Some((header, rest)) = rest.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let [a, b, c, d, kind] = *header;
        let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        if length > self.limit {
            return Err(Error::protocol(format!(
                "frame of kind {kind}: expected at most {} bytes, found {length}",
                self.limit
            )));
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let body = body.to_vec();
        self.start += HEADER_BYTES + length;
        Ok(Some(Frame { kind, body }))
    }

    /// Whether a frame has begun and not ended: the stream must not end here.
    #[must_use]
    pub fn is_within_frame(&self) -> bool {
        self.bytes.len() > self.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(decoder: &mut FrameDecoder) -> Vec<Frame> {
        std::iter::from_fn(|| decoder.next_frame().unwrap()).collect()
    }

    proptest::proptest! {
        #[test]
        fn frames_come_out_however_the_bytes_are_cut(
            bodies in proptest::collection::vec(proptest::collection::vec(proptest::num::u8::ANY, 0..300), 0..20),
            piece in 1usize..200,
        ) {
            let mut bytes = Vec::new();
            for (kind, body) in (0u8..).zip(&bodies) {
                encode(kind, &mut bytes, |out| out.extend_from_slice(body));
            }
            let mut decoder = FrameDecoder::new();
            let mut found = Vec::new();

            for piece in bytes.chunks(piece) {
                decoder.push(piece);
                found.extend(frames(&mut decoder));
            }

            let expected: Vec<Frame> = (0u8..)
                .zip(bodies)
                .map(|(kind, body)| Frame { kind, body })
                .collect();
            proptest::prop_assert_eq!(found, expected);
            proptest::prop_assert!(!decoder.is_within_frame());
        }
    }

    #[test]
    fn a_length_is_refused_before_its_body_comes_and_more_is_allowed_once_the_peer_is_known() {
        let header = |length: usize| {
            let mut header = u32::try_from(length).unwrap().to_le_bytes().to_vec();
            header.push(3);
            header
        };
        let mut decoder = FrameDecoder::new();
        decoder.push(&header(MAX_BODY_BEFORE_AUTHENTICATION + 1));

        let error = decoder.next_frame().unwrap_err();

        assert!(error.to_string().contains("found 16385"), "{error}");
        decoder.trust();
        assert_eq!(decoder.next_frame().unwrap(), None);
        assert!(decoder.is_within_frame());
        let mut decoder = FrameDecoder::new();
        decoder.trust();
        decoder.push(&header(MAX_BODY + 1));
        assert!(decoder.next_frame().is_err());
    }
}
