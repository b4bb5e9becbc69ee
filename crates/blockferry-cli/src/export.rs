//! `blockferry://host[:port]/name`: a disk that a listening server offers under a name.

use std::fmt;

use crate::address::port_of;

/// The port where a server listens, unless it is told another.
pub(crate) const PORT: u16 = 7417;
/// Most bytes of a name.
const MAX_NAME_BYTES: usize = 64;

/// A disk behind a server, which alone knows what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Export {
    host: String,
    port: u16,
    name: String,
}

impl Export {
    /// What stands behind the scheme.
    pub(crate) fn from_url(url: &str) -> Result<Self, &'static str> {
        let (authority, name) = url
            .split_once('/')
            .ok_or("expected the name of an export behind the host")?;
        if !is_name(name) {
            return Err(
                "the name of an export has letters, digits, '.', '_' and '-', at most 64 of them",
            );
        }
        let (host, port) = match port_of(authority)? {
            (host, Some(port)) => (host, port),
            (host, None) => (host, PORT),
        };
        let number = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        let host = match number {
            Some(number) if number.parse::<std::net::Ipv6Addr>().is_ok() => number,
            Some(_) => return Err("brackets stand around a number of IPv6 only"),
            None => host,
        };
        let of_host = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        let is_host = !host.is_empty() && !host.starts_with('-') && host.chars().all(of_host);
        if number.is_none() && !is_host {
            return Err("expected the name of a host");
        }
        Ok(Self {
            host: host.to_owned(),
            port,
            name: name.to_owned(),
        })
    }

    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

/// Whether an export can have this name.
pub(crate) fn is_name(name: &str) -> bool {
    let of_name = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    (1..=MAX_NAME_BYTES).contains(&name.len()) && name.chars().all(of_name)
}

impl fmt::Display for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("blockferry://")?;
        if self.host.contains(':') {
            write!(f, "[{}]", self.host)?;
        } else {
            f.write_str(&self.host)?;
        }
        if self.port != PORT {
            write!(f, ":{}", self.port)?;
        }
        write!(f, "/{}", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_has_a_host_a_port_and_a_name_and_is_written_as_it_is_read() {
        for (url, host, port, name) in [
            ("host/web", "host", PORT, "web"),
            ("a-b.example:1/web-1_x.y", "a-b.example", 1, "web-1_x.y"),
            ("10.0.0.1:7417/w", "10.0.0.1", PORT, "w"),
            ("[::1]/w", "::1", PORT, "w"),
            ("[fe80::1]:99/w", "fe80::1", 99, "w"),
        ] {
            let export = Export::from_url(url).expect(url);

            assert_eq!(
                (export.host(), export.port(), export.name()),
                (host, port, name),
                "{url}"
            );
            let written = export.to_string();
            let again = Export::from_url(written.strip_prefix("blockferry://").expect("a URL"));
            assert_eq!(again.as_ref(), Ok(&export), "{written}");
        }
    }

    #[test]
    fn what_names_no_export_is_refused() {
        let long = format!("host/{}", "a".repeat(65));
        for url in [
            "host",
            "host/",
            "/web",
            "host/a/b",
            "host/..%2f",
            "host:0/a",
            "host:x/a",
            "host:/a",
            "ho st/a",
            "a@host/x",
            "[host]/a",
            "[::1/a",
            "::1/a",
            "host/ü",
            "-x/a",
            &long,
        ] {
            assert!(Export::from_url(url).is_err(), "{url}");
        }
    }
}
