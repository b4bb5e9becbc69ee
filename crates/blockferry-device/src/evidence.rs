//! Which device this is ([`Identity`]) and whether its content may have changed ([`Evidence`]).
//!
//! Both are short opaque byte strings that are stored in state files and only ever compared.

/// Longest identity or evidence in bytes; formats reserve this much.
pub const MAX_EVIDENCE_BYTES: usize = 64;

/// Names a device across reboots: for a file its inode and birth time, for a block device its serial or UUID.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity(Vec<u8>);

/// Changes whenever the content of a device may have changed: for a file inode, size, ctime and mtime; for a
/// block device diskseq and the kernel's write count within one boot.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Evidence(Vec<u8>);

macro_rules! opaque_bytes {
    ($name:ident) => {
        impl $name {
            /// Nothing is known.
            #[must_use]
            pub fn unknown() -> Self {
                Self(Vec::new())
            }

            /// Wraps the bytes; longer than [`MAX_EVIDENCE_BYTES`] or empty means unknown.
            #[must_use]
            pub fn from_bytes(bytes: &[u8]) -> Self {
                if bytes.len() > MAX_EVIDENCE_BYTES {
                    Self::unknown()
                } else {
                    Self(bytes.to_vec())
                }
            }

            /// The bytes; empty if unknown.
            #[must_use]
            pub fn as_bytes(&self) -> &[u8] {
                &self.0
            }

            /// Whether anything is known at all.
            #[must_use]
            pub fn is_known(&self) -> bool {
                !self.0.is_empty()
            }

            /// Both known and equal: the only comparison that proves anything.
            #[must_use]
            pub fn proves_same(&self, other: &Self) -> bool {
                self.is_known() && self == other
            }
        }
    };
}
opaque_bytes!(Identity);
opaque_bytes!(Evidence);
