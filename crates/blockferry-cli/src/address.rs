//! Where a disk is: so far a local path, also as a `file://` URL. Forms that later versions understand are refused by
//! name, so that `host:/path` is never mistaken for a file that does not exist.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::file_url;

/// A local disk image or block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address(PathBuf);

/// Why an address cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AddressError {
    Empty,
    Url { what: &'static str },
    Unsupported { what: &'static str },
}

impl Address {
    /// Parses what the user typed; only the shape is looked at, never the file system.
    pub(crate) fn parse(text: OsString) -> Result<Self, AddressError> {
        if text.is_empty() {
            return Err(AddressError::Empty);
        }
        if let Some(path) = text.to_str().and_then(file_url::path_of) {
            return path.map(Self).map_err(|what| AddressError::Url { what });
        }
        match unsupported_form(&text.to_string_lossy()) {
            Some(what) => Err(AddressError::Unsupported { what }),
            None => Ok(Self(PathBuf::from(text))),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The form that means the same from every working directory; links are kept as typed.
    pub(crate) fn absolute(&self) -> PathBuf {
        std::path::absolute(&self.0).unwrap_or_else(|_| self.0.clone())
    }

    /// As it is recorded, to be parsed again by a later run wherever that is started.
    pub(crate) fn recorded(&self) -> String {
        file_url::text_of(&self.absolute())
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&file_url::text_of(&self.0))
    }
}

/// As rsync and scp do, a colon before the first slash makes an address remote; `./a:b` is a file.
fn unsupported_form(text: &str) -> Option<&'static str> {
    let (head, rest) = text.split_once(':')?;
    if head.contains('/') {
        return None;
    }
    let url = rest.starts_with("//");
    Some(match head {
        "ssh" if url => "a disk behind ssh",
        "blockferry" if url => "a disk behind a blockferry server",
        "nbd" | "nbd+unix" | "nbds" | "nbds+unix" => "an NBD export",
        _ if head.ends_with("+file") => "an image format other than raw",
        _ if url => "this kind of address",
        _ => "a disk on another host",
    })
}

impl fmt::Display for AddressError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("an empty address names no disk"),
            Self::Url { what } => f.write_str(what),
            Self::Unsupported { what } => write!(
                f,
                "{what} is not supported by this version; give a local path (write ./NAME for a file whose \
                 name contains a colon)"
            ),
        }
    }
}

impl std::error::Error for AddressError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Address, AddressError> {
        Address::parse(text.into())
    }

    #[test]
    fn local_paths_are_accepted_even_with_colons_after_a_slash() {
        for text in ["disk.raw", "/dev/disk/by-id/a:b", "./a:b", "../x", "/a b/c"] {
            assert_eq!(parse(text).expect(text).path(), Path::new(text));
        }
    }

    #[test]
    fn other_places_and_formats_are_refused_as_unsupported() {
        for text in [
            "host:/path",
            "user@host:/path",
            "host:",
            "ssh://user@host:22/path",
            "blockferry://host:9000/name",
            "nbd://host/export",
            "nbd+unix:///export?socket=/run/nbd",
            "qcow2+file:a.qcow2",
            "vhdx+file:/a",
            "https://host/disk",
        ] {
            let error = parse(text).expect_err(text);
            assert!(
                error
                    .to_string()
                    .contains("is not supported by this version"),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn a_recorded_address_is_the_same_disk_again() {
        use std::os::unix::ffi::OsStringExt;
        for bytes in [
            &b"/disks/a b:c%20"[..],
            b"/disks/\xff%\xc3\xbc",
            b"relative\xfe",
        ] {
            let address = Address::parse(OsString::from_vec(bytes.to_vec())).expect("local");

            let again = parse(&address.recorded()).expect("recorded");

            assert_eq!(again.path(), address.absolute());
        }
    }

    #[test]
    fn an_empty_address_is_refused() {
        assert_eq!(parse(""), Err(AddressError::Empty));
    }
}
