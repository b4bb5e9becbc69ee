//! Where a disk is: a path of this host, an image of another format there, or an export of an NBD server.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use blockferry_core::block_digest;
use blockferry_device::{Error, ImageFormat};
use blockferry_nbd::NbdAddress;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Between the format of an image and its path.
const IMAGE_SCHEME: &str = "+file:";
/// Longest name of a state; file systems take 255 bytes.
const MAX_NAME_BYTES: usize = 200;

/// Where a disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "callers must treat what has a path and what has none differently"
)]
pub enum DiskAddress {
    /// A raw file, which may be absent if it is a target, or a block device.
    Path(PathBuf),
    /// An image of a format other than raw, through qemu-nbd: a device of fixed size.
    Image(ImageFormat, PathBuf),
    /// An export of an NBD server: a device of fixed size, of which nobody can tell who else writes it.
    Nbd(NbdAddress),
}

impl DiskAddress {
    /// A URL of NBD, `FORMAT+file:PATH`, or else a path.
    ///
    /// # Errors
    /// It has the scheme of such a URL and is none.
    pub fn parse(text: impl Into<OsString>) -> Result<Self, Error> {
        let text = text.into();
        if let Some(url) = text.to_str().filter(|text| NbdAddress::is_meant_by(text)) {
            return url.parse().map(Self::Nbd);
        }
        let image = ImageFormat::ALL.into_iter().find_map(|format| {
            let scheme = format!("{format}{IMAGE_SCHEME}");
            let path = text.as_bytes().strip_prefix(scheme.as_bytes())?;
            Some(Self::Image(format, OsStr::from_bytes(path).into()))
        });
        Ok(image.unwrap_or_else(|| Self::Path(text.into())))
    }

    /// The form that means the same from every working directory; links are kept as they are.
    #[must_use]
    pub fn absolute(&self) -> Self {
        let made = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        match self {
            Self::Path(path) | Self::Image(_, path) => self.at(made(path)),
            Self::Nbd(export) => Self::Nbd(export.absolute()),
        }
    }

    /// The same kind of disk at another path.
    fn at(&self, path: PathBuf) -> Self {
        match self {
            Self::Image(format, _) => Self::Image(*format, path),
            Self::Path(_) | Self::Nbd(_) => Self::Path(path),
        }
    }

    /// The path, unless it has none.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) | Self::Image(_, path) => Some(path),
            Self::Nbd(_) => None,
        }
    }

    /// Where links lead to, if they lead anywhere.
    pub(crate) fn resolved(&self) -> Self {
        let found = self.path().and_then(|path| path.canonicalize().ok());
        found.map_or_else(|| self.absolute(), |path| self.at(path))
    }

    /// As [`Self::parse`] reads it again.
    pub(crate) fn text(&self) -> OsString {
        match self {
            Self::Path(path) => path.clone().into(),
            Self::Image(format, path) => {
                let mut text = OsString::from(format!("{format}{IMAGE_SCHEME}"));
                text.push(path);
                text
            }
            Self::Nbd(export) => export.to_string().into(),
        }
    }

    /// As one component of a path, the same for the same disk and another for others: `/dev/vg0/root` is `dev%2Fvg0%2Froot`.
    pub(crate) fn flat_name(&self) -> OsString {
        match self {
            Self::Path(_) | Self::Image(..) => flat_name(&self.text()),
            // How a server is trusted makes no other disk of it.
            Self::Nbd(export) => flat_name(OsStr::new(&export.absolute().disk().to_string())),
        }
    }
}

fn flat_name(text: &OsStr) -> OsString {
    let text = text.as_bytes();
    let mut name = Vec::new();
    for byte in text.strip_prefix(b"/").unwrap_or(text) {
        match byte {
            b'%' => name.extend(b"%25"),
            b'/' => name.extend(b"%2F"),
            other => name.push(*other),
        }
    }
    if name.len() > MAX_NAME_BYTES {
        let digest = block_digest(text).to_string();
        name.truncate(MAX_NAME_BYTES - digest.len());
        name.extend(digest.as_bytes());
    }
    OsStr::from_bytes(&name).to_owned()
}

impl From<PathBuf> for DiskAddress {
    fn from(path: PathBuf) -> Self {
        Self::Path(path)
    }
}

impl From<&PathBuf> for DiskAddress {
    fn from(path: &PathBuf) -> Self {
        Self::Path(path.clone())
    }
}

impl From<&Path> for DiskAddress {
    fn from(path: &Path) -> Self {
        Self::Path(path.to_owned())
    }
}

impl From<NbdAddress> for DiskAddress {
    fn from(export: NbdAddress) -> Self {
        Self::Nbd(export)
    }
}

impl From<&Self> for DiskAddress {
    fn from(address: &Self) -> Self {
        address.clone()
    }
}

/// As text; a path that is none is refused.
impl Serialize for DiskAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Path::new(&self.text()).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for DiskAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for DiskAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Path::new(&self.text()).display().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> DiskAddress {
        DiskAddress::parse(text).expect(text)
    }

    #[test]
    fn urls_of_nbd_are_exports_formats_are_images_and_everything_else_is_a_path() {
        for text in [
            "/dev/vg0/root",
            "a b",
            "nbd:",
            "./nbd://host/x",
            "raw+file:x",
            "./qcow2+file:x",
        ] {
            assert_eq!(parsed(text), DiskAddress::from(Path::new(text)), "{text}");
        }
        for text in [
            "nbd://host/x",
            "nbds+unix:///x?socket=/run/s&tls-hostname=a",
        ] {
            let address = parsed(text);

            assert!(address.path().is_none(), "{text}");
            assert_eq!(address.to_string(), text);
            assert_eq!(DiskAddress::parse(address.text()).expect(text), address);
        }
        for (text, format, path) in [
            ("qcow2+file:a:b c", ImageFormat::Qcow2, "a:b c"),
            ("vhdx+file:/a/b", ImageFormat::Vhdx, "/a/b"),
        ] {
            assert_eq!(parsed(text), DiskAddress::Image(format, path.into()));
            assert_eq!(parsed(text).to_string(), text);
        }
        DiskAddress::parse("nbd:///x").expect_err("it has no host");
    }

    #[test]
    fn different_disks_have_different_flat_names_that_fit() {
        let long = format!("nbd://host/{}", "x/".repeat(500));
        let longer = format!("{long}x");
        let all = [
            "/a/b",
            "/a%2Fb",
            "qcow2+file:/a/b",
            "/nbd:/host/x",
            "nbd://host/x",
            "nbd://host:99/x",
            "nbd://host/X",
            "nbd+unix:///x?socket=/run/s",
            &long,
            &longer,
        ];
        let mut names: Vec<OsString> = all.iter().map(|text| parsed(text).flat_name()).collect();
        for name in &names {
            assert!(
                name.len() <= MAX_NAME_BYTES && !name.as_bytes().contains(&b'/'),
                "{name:?}"
            );
        }
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all.len(), "{names:?}");
    }

    #[test]
    fn an_export_is_the_same_disk_however_its_server_is_trusted() {
        let plain = parsed("nbd://host/x").flat_name();

        for text in [
            "nbds://host/x",
            "nbds://host:10809/x?tls-certificates=/a&tls-hostname=b",
        ] {
            assert_eq!(parsed(text).flat_name(), plain, "{text}");
        }
    }
}
