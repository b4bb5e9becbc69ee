//! Sizes and ordinals that cannot be wrong, and how people write sizes.
//!
//! A [`BlockSize`] is always a power of two in range; block, page and region ordinals are different
//! types, so one cannot be passed for another.

use std::fmt;
use std::str::FromStr;

use crate::{Error, ErrorKind, Result};

/// Bytes of a page, the unit that travels and is logged.
pub const PAGE_BYTES: u64 = 4096;

/// Blocks of a region, the first inner level of the tree.
pub const REGION_BLOCKS: u64 = 256;

/// Bytes of a block: a power of two from 4 KiB to 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockSize {
    // Invariant: the size is `1 << shift`, with `shift` in 12..=20.
    shift: u32,
}

impl BlockSize {
    /// 4 KiB, one page.
    pub const MIN: Self = Self { shift: 12 };
    /// 1 MiB.
    pub const MAX: Self = Self { shift: 20 };
    /// 64 KiB.
    pub const DEFAULT: Self = Self { shift: 16 };
    /// How many different block sizes there are.
    pub(crate) const COUNT: usize = 9;

    /// A block size of `bytes`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] unless `bytes` is a power of two from 4096 to 1048576.
    pub fn new(bytes: u64) -> Result<Self> {
        if bytes.is_power_of_two() && (Self::MIN.bytes()..=Self::MAX.bytes()).contains(&bytes) {
            return Ok(Self {
                shift: bytes.trailing_zeros(),
            });
        }
        Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "block size: expected a power of two from {} to {}, found {bytes} bytes",
                Self::MIN,
                Self::MAX
            ),
        ))
    }

    /// Bytes of a block.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// Pages of a block: 1 to 256.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.bytes() / PAGE_BYTES
    }

    /// Every block size, ascending.
    pub fn all() -> impl Iterator<Item = Self> {
        (Self::MIN.shift..=Self::MAX.shift).map(|shift| Self { shift })
    }

    /// Ordinal among all block sizes: 0 for 4 KiB, 8 for 1 MiB.
    pub(crate) fn ordinal(self) -> usize {
        (self.shift - Self::MIN.shift) as usize
    }
}

impl Default for BlockSize {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bytes() {
            bytes if bytes >= 1 << 20 => write!(f, "{} MiB", bytes >> 20),
            bytes => write!(f, "{} KiB", bytes >> 10),
        }
    }
}

impl FromStr for BlockSize {
    type Err = Error;

    /// Any size [`parse_size`] takes, when it is a block size: `"64KiB"`, `"64k"`, `"65536"`.
    fn from_str(text: &str) -> Result<Self> {
        Self::new(parse_size(text)?)
    }
}

macro_rules! ordinal {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// The ordinal `index`, counted from 0.
            #[must_use]
            pub const fn new(index: u64) -> Self {
                Self(index)
            }

            /// The ordinal as a number, counted from 0.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

ordinal! {
    /// Which block of an image, from 0.
    BlockIndex
}
ordinal! {
    /// Which 4 KiB page of an image, from 0.
    PageIndex
}
ordinal! {
    /// Which region (256 blocks) of an image, from 0.
    RegionIndex
}

impl BlockIndex {
    /// The region the block is in.
    #[must_use]
    pub const fn region(self) -> RegionIndex {
        RegionIndex(self.0 / REGION_BLOCKS)
    }

    /// The block's place inside its region: 0 to 255.
    #[must_use]
    pub const fn in_region(self) -> usize {
        self.0.to_le_bytes()[0] as usize // REGION_BLOCKS is 256, so the place is the lowest byte
    }
}

impl RegionIndex {
    /// The region's first block. Meant for regions of an image: ordinals above 2^56 do not occur.
    #[must_use]
    pub const fn first_block(self) -> BlockIndex {
        BlockIndex(self.0 * REGION_BLOCKS)
    }
}

/// Reads a size as people write it, in bytes: `"512"`, `"64KiB"`, `"10 MiB"`, `"1.5G"`, `"10MB"`.
///
/// K, M, G, T, P, E and KiB, MiB, … are powers of 1024; KB, MB, … are powers of 1000. Case does not
/// matter. A decimal fraction is rounded down to a byte.
///
/// # Errors
/// [`ErrorKind::Invalid`] when the text is not a size, or does not fit 64 bits.
pub fn parse_size(text: &str) -> Result<u64> {
    parse_size_checked(text.trim()).ok_or_else(|| {
        Error::new(
            ErrorKind::Invalid,
            format!("size: expected a number with an optional unit such as 64KiB, found {text:?}"),
        )
    })
}

fn parse_size_checked(text: &str) -> Option<u64> {
    let unit_at = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let unit_bytes = unit_bytes(unit.trim_start())?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    // Neither has anything but digits and points, so no sign is taken for one.
    let whole_bytes = whole.parse::<u128>().ok()?.checked_mul(unit_bytes)?;
    // 18 digits times the largest unit (2^60) stay far inside 128 bits.
    let fraction = &fraction[..fraction.len().min(18)];
    let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let fraction_bytes = fraction.parse::<u128>().ok()? * unit_bytes / scale;
    u64::try_from(whole_bytes.checked_add(fraction_bytes)?).ok()
}

fn unit_bytes(unit: &str) -> Option<u128> {
    let unit = unit.to_ascii_lowercase();
    let Some(prefix) = unit.chars().next().filter(|&c| c != 'b') else {
        return matches!(unit.as_str(), "" | "b").then_some(1);
    };
    let power = u32::try_from("kmgtpe".find(prefix)?).ok()? + 1;
    match &unit[1..] {
        "" | "i" | "ib" => Some(1024_u128.pow(power)),
        "b" => Some(1000_u128.pow(power)),
        _ => None,
    }
}

/// Writes a size for people, in powers of 1024 with one decimal: `"512 B"`, `"65.2 MiB"`.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let bytes = u128::from(bytes);
    let mut unit_bytes = 1024_u128;
    let mut unit = 0;
    // Rounding comes first, so that 1023.96 KiB becomes 1.0 MiB and not 1024.0 KiB. It ends at 16 EiB.
    while tenths(bytes, unit_bytes) >= 10_240 {
        unit_bytes *= 1024;
        unit += 1;
    }
    let tenths = tenths(bytes, unit_bytes);
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// `bytes` in tenths of `unit_bytes`, rounded to the nearest.
fn tenths(bytes: u128, unit_bytes: u128) -> u128 {
    (bytes * 10 + unit_bytes / 2) / unit_bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn block_sizes_are_powers_of_two_between_a_page_and_a_mebibyte() {
        let sizes: Vec<u64> = BlockSize::all().map(BlockSize::bytes).collect();
        assert_eq!(sizes.len(), BlockSize::COUNT);
        let pages: Vec<u64> = BlockSize::all().map(BlockSize::pages).collect();
        assert_eq!(pages, [1, 2, 4, 8, 16, 32, 64, 128, 256]);

        for bytes in
            (0..=64)
                .map(|shift| (1_u128 << shift) as u64)
                .chain([4095, 4097, 65_535, 3 << 12])
        {
            assert_eq!(
                BlockSize::new(bytes).is_ok(),
                sizes.contains(&bytes),
                "{bytes}"
            );
        }
    }

    #[test]
    fn block_size_display_parses_back() {
        for size in BlockSize::all() {
            assert_eq!(size.to_string().parse::<BlockSize>().unwrap(), size);
            assert_eq!(BlockSize::new(size.bytes()).unwrap(), size);
        }
        assert_eq!(BlockSize::DEFAULT.to_string(), "64 KiB");
        assert_eq!(BlockSize::MAX.to_string(), "1 MiB");
        assert_eq!("64k".parse::<BlockSize>().unwrap(), BlockSize::DEFAULT);
        let error = "5k".parse::<BlockSize>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "block size: expected a power of two from 4 KiB to 1 MiB, found 5120 bytes"
        );
    }

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let cases = [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("64KiB", 64 << 10),
            ("64 kib", 64 << 10),
            ("10M", 10 << 20),
            ("10MB", 10_000_000),
            ("1G", 1 << 30),
            ("1.5G", 3 << 29),
            ("2T", 2 << 40),
            (" 15EiB ", 15 << 60),
            ("18446744073709551615", u64::MAX),
            ("0.1KB", 100),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        let cases = [
            "",
            " ",
            "K",
            "-1",
            "+1",
            "1.2.3",
            ".5",
            "5.",
            "1KK",
            "1KiBB",
            "1 X",
            "0x10",
            "16EiB",
            "18446744073709551616",
            "1e3",
            "ten",
            "1é",
            "99999999999999999999999999999999999999999T",
        ];
        for text in cases {
            let error = parse_size(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{text}");
        }
    }

    #[test]
    fn sizes_are_written_with_one_rounded_decimal() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (68_367_155, "65.2 MiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (1 << 30, "1.0 GiB"),
            (u64::MAX, "16.0 EiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(format_size(bytes), text);
        }
    }

    #[test]
    fn a_block_knows_its_place_in_its_region() {
        let block = BlockIndex::new(3 * 256 + 17);

        assert_eq!(block.region(), RegionIndex::new(3));
        assert_eq!(block.in_region(), 17);
        assert_eq!(block.region().first_block().get() + 17, block.get());
    }

    proptest! {
        #[test]
        fn plain_numbers_roundtrip(bytes: u64) {
            prop_assert_eq!(parse_size(&bytes.to_string()).unwrap(), bytes);
        }

        #[test]
        fn written_sizes_read_back_within_half_a_tenth(shift in 0_u32..63, low: u64) {
            let bytes = (1 << shift) | (low & ((1 << shift) - 1));

            let back = parse_size(&format_size(bytes)).unwrap();

            prop_assert!(back.abs_diff(bytes) <= bytes / 20 + 1, "{} became {}", bytes, back);
        }

        #[test]
        fn any_text_is_read_without_panic(text in "\\PC{0,12}") {
            let length = text.len();

            prop_assert!(parse_size(&text).is_err() || length > 0);
        }
    }
}
