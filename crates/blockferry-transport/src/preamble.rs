//! The preamble: the first bytes of either side, in every version of the protocol.
//!
//! ```text
//! | 8 | "BFRYWIRE" | 2 | oldest version | 2 | newest version | 4 | capabilities |
//! ```
//! Both sides send theirs at once and use the newest version that both speak. Capabilities of the other side that
//! this one does not know mean nothing.

use blockferry_core::{Decoder, Encoder};

use crate::error::{Error, ErrorKind, Result};

/// What a side speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Preamble {
    /// Oldest version of the protocol it speaks.
    pub oldest: u16,
    /// Newest version.
    pub newest: u16,
    /// What it can do beyond its version; none so far.
    pub capabilities: u32,
}

const MAGIC: &[u8; 8] = b"BFRYWIRE";
/// The version of the protocol that this build speaks.
pub const WIRE_VERSION: u16 = 1;
/// Length of the preamble.
pub const PREAMBLE_BYTES: usize = 16;
/// Of what is no preamble so much is shown.
const SHOWN_BYTES: usize = 80;

impl Preamble {
    /// What this build speaks.
    pub const OURS: Self = Self {
        oldest: WIRE_VERSION,
        newest: WIRE_VERSION,
        capabilities: 0,
    };

    /// The bytes to send.
    #[must_use]
    pub fn encode(self) -> [u8; PREAMBLE_BYTES] {
        let mut bytes = Vec::with_capacity(PREAMBLE_BYTES);
        Encoder::new(&mut bytes)
            .bytes(MAGIC)
            .u16(self.oldest)
            .u16(self.newest)
            .u32(self.capabilities);
        bytes
            .try_into()
            .unwrap_or_else(|_| unreachable!("8 + 2 + 2 + 4 bytes"))
    }

    /// Reads the peer's; `None` until there are enough bytes.
    ///
    /// # Errors
    /// It is not the preamble of a blockferry: a shell that greets, another protocol.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>> {
        let begun = bytes.len().min(MAGIC.len());
        if bytes[..begun] != MAGIC[..begun] {
            let shown = &bytes[..bytes.len().min(SHOWN_BYTES)];
            return Err(Error::protocol(format!(
                "expected the peer to be a blockferry, found {:?}: on the other side nothing may print before \
                 blockferry starts",
                String::from_utf8_lossy(shown)
            )));
        }
        let Some(bytes) = bytes.get(..PREAMBLE_BYTES) else {
            return Ok(None);
        };
        let read = || {
            let mut d = Decoder::new(&bytes[MAGIC.len()..]);
            Ok(Self {
                oldest: d.u16()?,
                newest: d.u16()?,
                capabilities: d.u32()?,
            })
        };
        read()
            .map(Some)
            .map_err(|e| Error::undecodable("preamble", e))
    }

    /// The newest version that this side and `peer` speak.
    ///
    /// # Errors
    /// There is none; the message names both.
    pub fn version_with(self, peer: Self) -> Result<u16> {
        let version = self.newest.min(peer.newest);
        if version >= self.oldest && version >= peer.oldest {
            return Ok(version);
        }
        let versions = |side: Self| match (side.oldest, side.newest) {
            (oldest, newest) if oldest == newest => format!("version {newest}"),
            (oldest, newest) => format!("versions {oldest} to {newest}"),
        };
        Err(Error::new(
            ErrorKind::UnknownVersion,
            format!(
                "the peer speaks {} of the protocol, this build {}: update the older one",
                versions(peer),
                versions(self)
            ),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speaking(oldest: u16, newest: u16) -> Preamble {
        Preamble {
            oldest,
            newest,
            capabilities: 0,
        }
    }

    #[test]
    fn a_preamble_comes_back_and_only_when_it_is_whole() {
        let preamble = Preamble {
            capabilities: 0xABCD_EF01,
            ..speaking(2, 7)
        };
        let bytes = preamble.encode();

        for end in 0..PREAMBLE_BYTES {
            assert_eq!(Preamble::decode(&bytes[..end]).unwrap(), None, "{end}");
        }
        assert_eq!(Preamble::decode(&bytes).unwrap(), Some(preamble));
    }

    #[test]
    fn a_shell_that_greets_is_shown() {
        let error = Preamble::decode(b"Welcome to Debian\n").unwrap_err();

        assert_eq!(error.kind(), ErrorKind::Protocol);
        assert!(error.to_string().contains("Welcome to Debian"), "{error}");
        assert!(Preamble::decode(b"BFRYWIRF").is_err());
        assert!(Preamble::decode(b"X").is_err(), "at the first byte");
    }

    #[test]
    fn both_sides_find_the_newest_common_version_or_name_both() {
        for (ours, theirs, expected) in [
            ((1, 1), (1, 1), Some(1)),
            ((1, 3), (2, 5), Some(3)),
            ((2, 5), (1, 3), Some(3)),
            ((1, 2), (3, 4), None),
            ((3, 4), (1, 2), None),
        ] {
            let (ours, theirs) = (speaking(ours.0, ours.1), speaking(theirs.0, theirs.1));
            assert_eq!(ours.version_with(theirs).ok(), expected);
            assert_eq!(theirs.version_with(ours).ok(), expected);
        }
        let error = speaking(1, 1).version_with(speaking(2, 3)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("versions 2 to 3") && text.contains("version 1"),
            "{text}"
        );
    }
}
