//! [`Extent`]: a run of bytes of an image.

use std::fmt;
use std::ops::Range;

/// A run of bytes: start and length. May be empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    // Invariant: start + length fits a u64.
    start: u64,
    length: u64,
}

impl Extent {
    /// `length` bytes from `start`; `None` when the end does not fit 64 bits.
    #[must_use]
    pub const fn new(start: u64, length: u64) -> Option<Self> {
        match start.checked_add(length) {
            Some(_) => Some(Self { start, length }),
            None => None,
        }
    }

    /// The bytes of `range`.
    ///
    /// # Panics
    /// When the range ends before it starts.
    #[must_use]
    pub const fn from_range(range: Range<u64>) -> Self {
        assert!(
            range.start <= range.end,
            "an extent does not end before it starts"
        );
        Self {
            start: range.start,
            length: range.end - range.start,
        }
    }

    /// First byte.
    #[must_use]
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// Number of bytes.
    #[must_use]
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// First byte after the extent.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.start + self.length
    }

    /// The extent as a range of byte offsets.
    #[must_use]
    pub const fn range(&self) -> Range<u64> {
        self.start..self.end()
    }

    /// Whether there is no byte in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Whether the byte at `offset` is in it.
    #[must_use]
    pub const fn contains(&self, offset: u64) -> bool {
        self.start <= offset && offset < self.end()
    }

    /// Whether every byte of `other` is in it; true for an empty `other`.
    #[must_use]
    pub const fn covers(&self, other: &Self) -> bool {
        other.is_empty() || (self.start <= other.start && other.end() <= self.end())
    }

    /// Whether the two have a byte in common.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.intersection(*other).is_some()
    }

    /// The bytes both have; `None` when there are none.
    #[must_use]
    pub fn intersection(&self, other: Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| Self::from_range(start..end))
    }

    /// The extent in consecutive pieces of at most `piece_bytes`; the last one may be shorter.
    ///
    /// # Panics
    /// When `piece_bytes` is 0.
    pub fn pieces(&self, piece_bytes: u64) -> impl Iterator<Item = Self> + use<> {
        assert!(piece_bytes > 0, "pieces have at least one byte");
        let whole = *self;
        (0..whole.length.div_ceil(piece_bytes)).map(move |index| {
            let start = whole.start + index * piece_bytes;
            Self::from_range(start..whole.end().min(start.saturating_add(piece_bytes)))
        })
    }

    /// The smallest extent that covers this one and starts and ends at multiples of `unit_bytes`.
    /// It may reach behind the image; clip it with [`Extent::intersection`] where that matters.
    ///
    /// # Panics
    /// When `unit_bytes` is 0 or the widened end does not fit 64 bits.
    #[must_use]
    pub fn widened(&self, unit_bytes: u64) -> Self {
        let start = self.start - self.start % unit_bytes;
        let end = self.end().checked_next_multiple_of(unit_bytes);
        Self::from_range(start..end.expect("callers widen extents of images below 2^63 bytes"))
    }
}

impl fmt::Display for Extent {
    /// `[start, end)`, in bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {})", self.start, self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_extent_never_ends_beyond_64_bits() {
        assert!(Extent::new(u64::MAX, 1).is_none());
        assert_eq!(Extent::new(u64::MAX, 0).unwrap().end(), u64::MAX);
        assert_eq!(Extent::new(u64::MAX - 5, 5).unwrap().end(), u64::MAX);
    }

    #[test]
    fn display_is_half_open() {
        assert_eq!(Extent::from_range(4096..8192).to_string(), "[4096, 8192)");
    }

    proptest! {
        #[test]
        fn relations_agree_with_single_bytes(
            a in 0_u64..20, n in 0_u64..10, b in 0_u64..20, m in 0_u64..10,
        ) {
            let (left, right) = (Extent::new(a, n).unwrap(), Extent::new(b, m).unwrap());

            let in_both = |&x: &u64| left.contains(x) && right.contains(x);
            let common: Vec<u64> = (0..40).filter(in_both).collect();

            prop_assert_eq!(left.overlaps(&right), !common.is_empty());
            let met: Vec<u64> = left.intersection(right).map_or(vec![], |e| e.range().collect());
            prop_assert_eq!(met, common);
            prop_assert_eq!(left.covers(&right), right.range().all(|x| left.contains(x)));
        }

        #[test]
        fn pieces_join_to_the_whole(
            start in 0_u64..1000, length in 0_u64..1000, piece in 1_u64..300,
        ) {
            let whole = Extent::new(start, length).unwrap();

            let bytes: Vec<u64> = whole.pieces(piece).flat_map(|p| p.range()).collect();

            prop_assert!(whole.pieces(piece).all(|p| !p.is_empty() && p.length() <= piece));
            prop_assert_eq!(bytes, whole.range().collect::<Vec<_>>());
        }

        #[test]
        fn widening_reaches_the_nearest_multiples(
            start in 0_u64..1000, length in 0_u64..1000, unit in 1_u64..70,
        ) {
            let extent = Extent::new(start, length).unwrap();

            let wide = extent.widened(unit);

            prop_assert!(wide.covers(&extent));
            prop_assert!(wide.start().is_multiple_of(unit) && wide.end().is_multiple_of(unit));
            prop_assert!(extent.start() - wide.start() < unit && wide.end() - extent.end() < unit);
        }
    }
}
