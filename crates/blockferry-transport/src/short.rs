//! Digests as they travel: shortened where a mistake only costs that something is sent again.

use blockferry_core::{Decoder, Digest, Encoder, ErrorKind, Result};

/// How many bytes of each digest travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "the format has these widths")]
pub enum Width {
    /// Of pages: a page that is mistaken for another is found by the digest of its block, and sent whole.
    Four,
    /// Of blocks: a mistake is found by the root, and everything is compared again with whole digests.
    Eight,
    /// Of regions: found by the root as well.
    Sixteen,
    /// All of it.
    Whole,
}

impl Width {
    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Four => 4,
            Self::Eight => 8,
            Self::Sixteen => 16,
            Self::Whole => Digest::BYTES,
        }
    }

    fn of_code(code: u8) -> Result<Self> {
        [Self::Four, Self::Eight, Self::Sixteen, Self::Whole]
            .into_iter()
            .find(|width| width.bytes() == usize::from(code))
            .ok_or_else(|| {
                blockferry_core::Error::new(
                    ErrorKind::Invalid,
                    format!("width of digests: expected 4, 8, 16 or 32 bytes, found {code}"),
                )
            })
    }
}

/// A list of digests, each cut to the same width.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShortDigests {
    width: Width,
    // Invariant: a multiple of the width.
    bytes: Vec<u8>,
}

impl ShortDigests {
    /// None yet.
    #[must_use]
    pub fn new(width: Width) -> Self {
        Self {
            width,
            bytes: Vec::new(),
        }
    }

    /// These, cut.
    pub fn of(width: Width, digests: impl IntoIterator<Item = Digest>) -> Self {
        let mut short = Self::new(width);
        digests.into_iter().for_each(|digest| short.push(&digest));
        short
    }

    /// Appends one, cut.
    pub fn push(&mut self, digest: &Digest) {
        self.bytes
            .extend_from_slice(&digest.as_bytes()[..self.width.bytes()]);
    }

    /// How much of each digest there is.
    #[must_use]
    pub fn width(&self) -> Width {
        self.width
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() / self.width.bytes()
    }

    /// None at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether the digest of this number may be `digest`: as far as it travelled it is. `false` beyond the end.
    #[must_use]
    pub fn matches(&self, number: usize, digest: &Digest) -> bool {
        let width = self.width.bytes();
        let found = self.bytes.chunks_exact(width).nth(number);
        found.is_some_and(|short| *short == digest.as_bytes()[..width])
    }

    /// The digest of this number alone.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn one(&self, number: usize) -> Self {
        let width = self.width.bytes();
        Self {
            width: self.width,
            bytes: self.bytes[number * width..(number + 1) * width].to_vec(),
        }
    }

    pub(crate) fn encode(&self, e: &mut Encoder<'_>) {
        let width = u8::try_from(self.width.bytes()).unwrap_or_else(|_| unreachable!("32 at most"));
        e.u8(width).count(self.len()).bytes(&self.bytes);
    }

    pub(crate) fn decode(d: &mut Decoder<'_>, most: usize) -> Result<Self> {
        let width = Width::of_code(d.u8()?)?;
        let count = d.count(most)?;
        let bytes = d.bytes(count * width.bytes())?.to_vec();
        Ok(Self { width, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockferry_core::block_digest;

    #[test]
    fn a_short_digest_matches_what_it_is_cut_from_and_nothing_beyond() {
        let digests = [b"a", b"b", b"c"].map(|bytes| block_digest(bytes));
        for width in [Width::Four, Width::Eight, Width::Sixteen, Width::Whole] {
            let short = ShortDigests::of(width, digests);
            let mut bytes = Vec::new();
            short.encode(&mut Encoder::new(&mut bytes));

            let mut d = Decoder::new(&bytes);
            assert_eq!(ShortDigests::decode(&mut d, 3).unwrap(), short);
            assert_eq!(bytes.len(), 5 + 3 * width.bytes());
            assert_eq!(short.len(), 3);
            for (number, digest) in digests.iter().enumerate() {
                assert!(short.matches(number, digest));
                assert!(!short.matches(number + 1, digest));
            }
            assert!(
                ShortDigests::decode(&mut Decoder::new(&bytes), 2).is_err(),
                "too many"
            );
        }
        assert!(ShortDigests::decode(&mut Decoder::new(&[5, 0, 0, 0, 0]), 2).is_err());
    }
}
