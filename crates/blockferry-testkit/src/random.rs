//! The one source of randomness of the test kit: a seeded sequence that is the same everywhere.

/// A `SplitMix64` sequence (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
///
/// Good enough to draw test cases, never for secrets.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// The sequence of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// A sequence of its own for `part` of the same seed, so that parts do not disturb each other.
    #[must_use]
    pub fn part(seed: u64, part: u64) -> Self {
        Self::new(mix(seed ^ mix(part.wrapping_add(0x9E37_79B9_7F4A_7C15))))
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.state)
    }

    /// A number in `0..bound`; 0 if `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        let (_, high) = self.next_u64().carrying_mul(bound, 0);
        high
    }

    /// True in `numerator` of `denominator` cases.
    pub fn chance(&mut self, numerator: u64, denominator: u64) -> bool {
        self.below(denominator) < numerator
    }

    /// Fills `bytes` with noise.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for piece in bytes.chunks_mut(8) {
            let word = self.next_u64().to_le_bytes();
            piece.copy_from_slice(&word[..piece.len()]);
        }
    }
}

pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// Bytes, sectors or pages as an index into memory; the simulated world is far below 2^32 of them.
pub(crate) fn index(value: u64) -> usize {
    usize::try_from(value).expect("test devices fit in memory")
}

/// The reverse of [`index`].
pub(crate) fn count(value: usize) -> u64 {
    u64::try_from(value).expect("usize has at most 64 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_gives_one_sequence_and_parts_differ() {
        let draw = |mut r: Random| (r.next_u64(), r.below(10), r.chance(1, 2));

        assert_eq!(draw(Random::new(7)), draw(Random::new(7)));
        assert_ne!(draw(Random::part(7, 0)).0, draw(Random::part(7, 1)).0);
        assert!((0..1000).all(|i| Random::new(i).below(3) < 3));
    }
}
