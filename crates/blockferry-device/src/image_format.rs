//! Recognises image formats by their magic, so that none is taken for a raw disk.

use std::fmt;
use std::str::FromStr;

use crate::{Error, ErrorKind, Result};

/// An image format that is not raw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ImageFormat {
    /// QEMU copy-on-write, all versions.
    Qcow2,
    /// Virtual PC and Hyper-V, fixed and dynamic.
    Vhd,
    /// Hyper-V.
    Vhdx,
    /// `VMware` sparse extents and descriptors.
    Vmdk,
}

impl ImageFormat {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Qcow2, Self::Vhd, Self::Vhdx, Self::Vmdk];

    /// Bytes at the beginning and at the end of an image that [`Self::detect`] looks at.
    pub const PROBE_BYTES: usize = 512;

    /// The format of an image that begins with `head` and ends with `tail`, up to
    /// [`Self::PROBE_BYTES`] each; `None` is raw, as far as magics can tell.
    #[must_use]
    pub fn detect(head: &[u8], tail: &[u8]) -> Option<Self> {
        const VHD_COOKIE: &[u8] = b"conectix";
        let begins = |magic: &[u8]| head.starts_with(magic);
        // The footer has 512 bytes; those of Virtual PC before 2004 have 511.
        let footer = |bytes: usize| {
            tail.len()
                .checked_sub(bytes)
                .is_some_and(|at| tail[at..].starts_with(VHD_COOKIE))
        };
        if begins(b"QFI\xfb") {
            Some(Self::Qcow2)
        } else if begins(b"vhdxfile") {
            Some(Self::Vhdx)
        } else if begins(b"KDMV") || begins(b"COWD") || begins(b"# Disk DescriptorFile") {
            Some(Self::Vmdk)
        } else if begins(VHD_COOKIE) || footer(512) || footer(511) {
            Some(Self::Vhd)
        } else {
            None
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
            Self::Vmdk => "vmdk",
        })
    }
}

impl FromStr for ImageFormat {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL
            .into_iter()
            .find(|format| format.to_string() == text);
        found.ok_or_else(|| {
            let text = format!("image format {text:?}: expected qcow2, vhd, vhdx or vmdk");
            Error::new(ErrorKind::Unsuitable, text)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_magic_is_recognised_where_it_belongs() {
        let mut footer = [0; 512];
        footer[..8].copy_from_slice(b"conectix");

        let detected = [
            ImageFormat::detect(b"QFI\xfb\0\0\0\x03", &[]),
            ImageFormat::detect(b"vhdxfile", &[]),
            ImageFormat::detect(b"KDMV\x01", &[]),
            ImageFormat::detect(b"# Disk DescriptorFile\nversion=1", &[]),
            ImageFormat::detect(b"conectix", &[]),
            ImageFormat::detect(&[0; 512], &footer),
            ImageFormat::detect(&[0; 512], &footer[..511]),
        ];

        use ImageFormat::{Qcow2, Vhd, Vhdx, Vmdk};
        assert_eq!(detected, [Qcow2, Vhdx, Vmdk, Vmdk, Vhd, Vhd, Vhd].map(Some));
    }

    #[test]
    fn raw_disks_are_raw() {
        assert_eq!(ImageFormat::detect(&[0; 512], &[0; 512]), None);
        assert_eq!(ImageFormat::detect(b"LUKS\xba\xbe", &[]), None);
        assert_eq!(ImageFormat::detect(b"", b""), None);
        assert_eq!(ImageFormat::detect(b"\0conectix", b"\0\0conectix"), None);
    }
}
