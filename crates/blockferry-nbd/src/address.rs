//! Where an export is, as the NBD project writes it: `nbd://host[:port]/export`, `nbd+unix:///export?socket=PATH`; with TLS
//! `nbds://` and `nbds+unix://`, and `tls-certificates=DIR` and `tls-hostname=NAME` in the query, as libnbd has them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use blockferry_device::{Error, ErrorKind, Result};

use crate::wire::MAX_TEXT_BYTES;

const SCHEMES: [&str; 4] = ["nbd", "nbds", "nbd+unix", "nbds+unix"];

/// The port of NBD.
pub const PORT: u16 = 10_809;

/// Where an export is. Equal for equal places, however they were written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NbdAddress {
    pub(crate) place: Place,
    // Invariant: at most `MAX_TEXT_BYTES`.
    pub(crate) export: String,
    pub(crate) tls: Option<Tls>,
}

/// Over TLS, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Tls {
    /// Where the certificates of the client are.
    pub(crate) certificates: Option<PathBuf>,
    /// The name that the certificate of the server is for, where it is not that of the host.
    host: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

impl NbdAddress {
    /// An export of a server that listens at a Unix socket.
    ///
    /// # Errors
    /// The name is longer than the protocol allows.
    pub fn unix(socket: impl AsRef<Path>, export: &str) -> Result<Self> {
        let place = Place::Unix(socket.as_ref().to_owned());
        Self::new(place, export.to_owned())
    }

    /// An export of a server that listens at a port of a host, which is a name or a number.
    ///
    /// # Errors
    /// The name is longer than the protocol allows, or the host is none.
    pub fn tcp(host: &str, port: u16, export: &str) -> Result<Self> {
        if host.is_empty() || !host.chars().all(may_be_in_host) {
            let text = format!("address of an NBD export: expected a host, found {host:?}");
            return Err(Error::new(ErrorKind::Unsuitable, text));
        }
        let host = host.to_owned();
        Self::new(Place::Tcp { host, port }, export.to_owned())
    }

    fn new(place: Place, export: String) -> Result<Self> {
        if export.len() > MAX_TEXT_BYTES {
            let text = format!(
                "name of an NBD export: expected at most {MAX_TEXT_BYTES} bytes, found {}",
                export.len()
            );
            return Err(Error::new(ErrorKind::Unsuitable, text));
        }
        Ok(Self {
            place,
            export,
            tls: None,
        })
    }

    /// Whether a text is to be read as such an address, by its scheme.
    #[must_use]
    pub fn is_meant_by(text: &str) -> bool {
        let scheme = text.split_once("://").map(|(scheme, _)| scheme);
        scheme.is_some_and(|scheme| SCHEMES.contains(&scheme))
    }

    /// The form that means the same from every working directory.
    #[must_use]
    pub fn absolute(&self) -> Self {
        let mut absolute = self.clone();
        let socket = match &mut absolute.place {
            Place::Unix(socket) => Some(socket),
            Place::Tcp { .. } => None,
        };
        let certificates = absolute
            .tls
            .as_mut()
            .and_then(|tls| tls.certificates.as_mut());
        for path in socket.into_iter().chain(certificates) {
            if let Ok(made) = std::path::absolute(&*path) {
                *path = made;
            }
        }
        absolute
    }

    /// The export alone, however its server is trusted: the same for the same disk.
    #[must_use]
    pub fn disk(&self) -> Self {
        Self {
            tls: None,
            ..self.clone()
        }
    }

    /// What the certificate of the server has to be for.
    #[cfg(feature = "tls")]
    pub(crate) fn server_name(&self) -> &str {
        let named = self.tls.as_ref().and_then(|tls| tls.host.as_deref());
        named.unwrap_or(match &self.place {
            Place::Tcp { host, .. } => host,
            // As libnbd has it.
            Place::Unix(_) => "localhost",
        })
    }

    /// The name of the export; empty is the server's usual one.
    #[must_use]
    pub fn export(&self) -> &str {
        &self.export
    }
}

impl FromStr for NbdAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refused = |why: &str| {
            let text = format!(
                "{text:?} is no NBD address: {why}; expected nbd://HOST[:PORT]/EXPORT or \
                 nbd+unix:///EXPORT?socket=PATH, or nbds for TLS"
            );
            Error::new(ErrorKind::Unsuitable, text)
        };
        let (scheme, rest) = text
            .split_once("://")
            .ok_or_else(|| refused("it has no scheme"))?;
        if !SCHEMES.contains(&scheme) {
            return Err(refused("it has another scheme"));
        }
        let (is_secured, is_unix) = (scheme.starts_with("nbds"), scheme.ends_with("+unix"));
        let decoded = |text: &str| decoded(text).ok_or_else(|| refused("a % is out of place"));
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut tls = is_secured.then(Tls::default);
        let mut socket = None;
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decoded(value)?;
            match (key, &mut tls) {
                (_, _) if value.is_empty() => return Err(refused("its query has an empty value")),
                ("socket", _) if is_unix && socket.is_none() => socket = Some(value),
                ("tls-certificates", Some(tls)) => tls.certificates = Some(value.into()),
                ("tls-hostname", Some(tls)) => tls.host = Some(value),
                _ => return Err(refused("its query has something else")),
            }
        }
        let (authority, export) = path.split_once('/').unwrap_or((path, ""));
        let place = match socket {
            Some(_) if !authority.is_empty() => {
                return Err(refused("a Unix socket has no host"));
            }
            Some(socket) => Place::Unix(socket.into()),
            None if is_unix => return Err(refused("it names no socket")),
            None => {
                let (host, port) =
                    host_and_port(authority).ok_or_else(|| refused("its host is none"))?;
                Place::Tcp { host, port }
            }
        };
        let address = Self::new(place, decoded(export)?)?;
        Ok(Self { tls, ..address })
    }
}

/// `host`, `host:port`, `[2001:db8::1]:port`.
fn host_and_port(authority: &str) -> Option<(String, u16)> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, behind) = rest.split_once(']')?;
            let port = match behind {
                "" => None,
                behind => Some(behind.strip_prefix(':')?),
            };
            (host, port)
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    if host.is_empty() || !host.chars().all(may_be_in_host) {
        return None;
    }
    let port = match port {
        Some(port) if port.bytes().all(|b| b.is_ascii_digit()) => port.parse().ok()?,
        Some(_) => return None,
        None => PORT,
    };
    Some((host.to_owned(), port))
}

fn may_be_in_host(c: char) -> bool {
    c.is_ascii_alphanumeric() || ".-_:%".contains(c)
}

/// Takes percent signs with two digits for the bytes that they mean.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let value = digit(rest.next()?)? * 16 + digit(rest.next()?)?;
        bytes.push(u8::try_from(value).ok()?);
    }
    String::from_utf8(bytes).ok()
}

fn encoded(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = encoded(&self.export);
        let secured = if self.tls.is_some() { "s" } else { "" };
        let mut query = Vec::new();
        match &self.place {
            Place::Unix(socket) => {
                query.push(("socket", socket.to_string_lossy().into_owned()));
                write!(f, "nbd{secured}+unix:///{export}")?;
            }
            Place::Tcp { host, port } => {
                let host = match host.contains(':') {
                    true => format!("[{host}]"),
                    false => host.clone(),
                };
                match *port {
                    PORT => write!(f, "nbd{secured}://{host}/{export}")?,
                    port => write!(f, "nbd{secured}://{host}:{port}/{export}")?,
                }
            }
        }
        if let Some(tls) = &self.tls {
            let certificates = tls.certificates.as_ref();
            let certificates = certificates.map(|path| path.to_string_lossy().into_owned());
            query.extend(certificates.map(|path| ("tls-certificates", path)));
            query.extend(tls.host.clone().map(|host| ("tls-hostname", host)));
        }
        for (number, (key, value)) in query.iter().enumerate() {
            let lead = if number == 0 { '?' } else { '&' };
            write!(f, "{lead}{key}={}", encoded(value))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> NbdAddress {
        text.parse().expect(text)
    }

    #[test]
    fn addresses_are_read_and_written_as_the_nbd_project_writes_them() {
        for (text, export, written) in [
            ("nbd://host", "", "nbd://host/"),
            ("nbd://host/a/b", "a/b", "nbd://host/a/b"),
            ("nbd://host:10809/", "", "nbd://host/"),
            ("nbd://10.0.0.1:99/x", "x", "nbd://10.0.0.1:99/x"),
            ("nbd://[2001:db8::1]:99/x", "x", "nbd://[2001:db8::1]:99/x"),
            ("nbd://host/a%20b%3f", "a b?", "nbd://host/a%20b%3F"),
            (
                "nbd+unix:///?socket=/run/s",
                "",
                "nbd+unix:///?socket=/run/s",
            ),
            ("nbds://host/x", "x", "nbds://host/x"),
            (
                "nbds://host:99/x?tls-hostname=other&tls-certificates=/a%20b",
                "x",
                "nbds://host:99/x?tls-certificates=/a%20b&tls-hostname=other",
            ),
            (
                "nbds+unix:///x?tls-certificates=/c&socket=/s",
                "x",
                "nbds+unix:///x?socket=/s&tls-certificates=/c",
            ),
            (
                "nbd+unix:///d%2F1?socket=a%20b",
                "d/1",
                "nbd+unix:///d/1?socket=a%20b",
            ),
        ] {
            let address = parsed(text);

            assert_eq!(address.export(), export, "{text}");
            assert_eq!(address.to_string(), written, "{text}");
            assert_eq!(parsed(written), address);
        }
    }

    #[test]
    fn addresses_that_are_put_together_are_those_that_are_read() {
        for (host, port, written) in [
            ("::1", 10_809, "nbd://[::1]/a%20b"),
            ("127.0.0.1", 99, "nbd://127.0.0.1:99/a%20b"),
        ] {
            let address = NbdAddress::tcp(host, port, "a b").expect(host);

            assert_eq!(address.to_string(), written);
            assert_eq!(parsed(written), address);
        }
        for host in ["", "a/b", "a b"] {
            NbdAddress::tcp(host, 1, "").expect_err(host);
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_what_is_expected() {
        let long = format!("nbd://host/{}", "x".repeat(MAX_TEXT_BYTES + 1));
        for text in [
            "",
            "nbd:",
            "nbd://",
            "nbd:///export",
            "nbd://:10809/x",
            "nbd://host:port/x",
            "nbd://host:99999/x",
            "nbd://host:/x",
            "nbd://a b/x",
            "nbd://host/x?tls=1",
            "nbd://host/%4",
            "nbd://host/%zz",
            "nbd://host/%ff",
            "nbd+unix:///x",
            "nbd+unix://host/x?socket=/s",
            "nbd+unix:///x?socket=",
            "nbd+unix:///x?socket=/a&b=1",
            "nbd+unix:///x?file=/a",
            "nbd://host/x?tls-hostname=a",
            "nbds://host/x?socket=/s",
            "nbds://host/x?tls-certificates=",
            "nbdx://host/x",
            "/a/path",
            &long,
        ] {
            let error = text.parse::<NbdAddress>().expect_err(text);
            assert!(error.to_string().contains("expected"), "{error}");
        }
    }
}
