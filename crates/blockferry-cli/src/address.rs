//! Where a disk is: a local path, also as a `file://` URL, an image of another format, an NBD export, a path on another
//! host, or an export of a server. Forms that later versions understand are refused by name, so that none is mistaken
//! for a file that does not exist.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::engine::DiskAddress;
use crate::engine::device::ImageFormat;
use crate::engine::nbd::NbdAddress;
use crate::export::Export;
use crate::file_url;

/// A disk here or on another host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Location {
    Here(DiskAddress),
    There(There),
}

/// A disk on another host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum There {
    Shell(Remote),
    Server(Export),
}

/// A disk on another host, reached by ssh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Remote {
    /// As ssh takes it: `host` or `user@host`.
    host: String,
    port: Option<u16>,
    path: PathBuf,
}

/// Why an address cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AddressError {
    Empty,
    Url { what: &'static str },
    Unsupported { what: &'static str },
    Nbd { why: String },
    Pushed { from: String },
    Job { name: String },
    Elsewhere,
}

/// What was synced from here to another host is recorded there with this scheme: the path means nothing there.
const PUSHED: &str = "pushed://";

/// What a job brings up to date records with this scheme; the name of the job follows, its number, and the disk.
const JOB: &str = "failover://";

impl Location {
    /// Parses what the user typed; only the shape is looked at, never the file system or the network.
    pub(crate) fn parse(text: OsString) -> Result<Self, AddressError> {
        if text.is_empty() {
            return Err(AddressError::Empty);
        }
        if let Some(path) = text.to_str().and_then(file_url::path_of) {
            let here = path.map(|path| Self::Here(path.into()));
            return here.map_err(|what| AddressError::Url { what });
        }
        let behind = |scheme| text.to_str().and_then(|text| text.strip_prefix(scheme));
        if let Some(url) = behind("ssh://") {
            let there = Remote::from_url(url).map(|remote| Self::There(There::Shell(remote)));
            return there.map_err(|what| AddressError::Url { what });
        }
        if let Some(url) = behind("blockferry://") {
            let there = Export::from_url(url).map(|export| Self::There(There::Server(export)));
            return there.map_err(|what| AddressError::Url { what });
        }
        if text.to_str().is_some_and(NbdAddress::is_meant_by) {
            let here = DiskAddress::parse(text).map(Self::Here);
            return here.map_err(|error| AddressError::Nbd {
                why: error.to_string(),
            });
        }
        if let Some(from) = behind(PUSHED) {
            let from = from.to_owned();
            return Err(AddressError::Pushed { from });
        }
        if let Some(disk) = behind(JOB) {
            let name = disk.split(['.', '/']).next().unwrap_or_default();
            let name = name.to_owned();
            return Err(AddressError::Job { name });
        }
        let Some((head, rest)) = head_of(text.as_bytes()) else {
            return Ok(Self::Here(PathBuf::from(text).into()));
        };
        if let Some(image) = image(head, rest) {
            let here = image.map(Self::Here);
            return here.map_err(|what| AddressError::Url { what });
        }
        match unsupported_form(head, rest) {
            Some(what) => Err(AddressError::Unsupported { what }),
            None => Remote::new(head, None, PathBuf::from(OsString::from_vec(rest.to_vec())))
                .map(|remote| Self::There(There::Shell(remote)))
                .map_err(|what| AddressError::Url { what }),
        }
    }

    /// As it is recorded, to be parsed again by a later run wherever that is started.
    pub(crate) fn recorded(&self) -> String {
        match self {
            Self::Here(disk) => recorded(disk),
            Self::There(there) => there.to_string(),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here(disk) => f.write_str(&typed(disk)),
            Self::There(there) => there.fmt(f),
        }
    }
}

/// As [`Location::parse`], of disks of this host only.
pub(crate) fn disk_here(text: OsString) -> Result<DiskAddress, AddressError> {
    match Location::parse(text)? {
        Location::Here(disk) => Ok(disk),
        Location::There(_) => Err(AddressError::Elsewhere),
    }
}

/// As it is typed: without loss.
pub(crate) fn typed(disk: &DiskAddress) -> String {
    match disk {
        DiskAddress::Path(path) => file_url::text_of(path),
        DiskAddress::Image(format, path) if path.to_str().is_none() => {
            format!("{format}+{}", file_url::text_of(path))
        }
        DiskAddress::Image(..) | DiskAddress::Nbd(_) => disk.to_string(),
    }
}

/// As it is recorded, to be parsed again by a later run wherever that is started.
pub(crate) fn recorded(disk: &DiskAddress) -> String {
    let disk = disk.absolute();
    match &disk {
        DiskAddress::Image(format, path) => format!("{format}+{}", file_url::url_of(path)),
        DiskAddress::Path(_) | DiskAddress::Nbd(_) => typed(&disk),
    }
}

/// As another host records it: whence it was pushed. There it must never pass for a path of its own.
pub(crate) fn pushed_from(disk: &DiskAddress, host: &str) -> String {
    match disk.absolute() {
        DiskAddress::Path(path) | DiskAddress::Image(_, path) => {
            format!("{PUSHED}{host}{}", file_url::escaped(&path))
        }
        DiskAddress::Nbd(export) => format!("{PUSHED}{host}/{export}"),
    }
}

impl There {
    /// For messages.
    pub(crate) fn host(&self) -> &str {
        match self {
            Self::Shell(remote) => remote.host(),
            Self::Server(export) => export.host(),
        }
    }
}

impl fmt::Display for There {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shell(remote) => remote.fmt(f),
            Self::Server(export) => export.fmt(f),
        }
    }
}

impl Remote {
    fn new(host: &str, port: Option<u16>, path: PathBuf) -> Result<Self, &'static str> {
        let (user, name) = match host.rsplit_once('@') {
            Some((user, name)) => (Some(user), name),
            None => (None, host),
        };
        // ssh wants a number of IPv6 without the brackets that part it from a port or path.
        let inside = name
            .strip_prefix('[')
            .and_then(|name| name.strip_suffix(']'));
        let name = inside.unwrap_or(name);
        let has = |text: &str, wrong: &dyn Fn(char) -> bool| text.chars().any(wrong);
        if user == Some("")
            || name.is_empty()
            || has(host, &|c| c.is_whitespace() || c.is_control())
        {
            return Err("expected a host, or a user and a host, before the path");
        }
        let no_number = inside.is_some() && !name.contains(':');
        if no_number || has(name, &|c| "[]".contains(c)) {
            return Err("brackets stand around a number of IPv6 only");
        }
        if user.is_some_and(|user| has(user, &|c| "[]:".contains(c))) {
            return Err("a user has no colon and no brackets");
        }
        if host.starts_with('-') || name.starts_with('-') {
            return Err("a host does not begin with -");
        }
        if path.as_os_str().is_empty() {
            return Err("expected the path of a disk behind the host");
        }
        if !path.is_absolute() && path.to_str().is_none() {
            return Err("a path that is no text must be absolute, in an ssh:// URL");
        }
        let host = user.map_or_else(|| name.to_owned(), |user| format!("{user}@{name}"));
        Ok(Self { host, port, path })
    }

    /// A host alone, of which no disk is named yet.
    pub(crate) fn of_host(host: &str) -> Result<Self, &'static str> {
        Self::new(host, None, PathBuf::from("/"))
    }

    /// `[user@]host[:port]/path`, in which `%FF` stands for the byte 255.
    fn from_url(url: &str) -> Result<Self, &'static str> {
        let slash = url.find('/').ok_or("expected a path behind the host")?;
        let (authority, path) = url.split_at(slash);
        let (host, port) = port_of(authority)?;
        let path = OsString::from_vec(file_url::unescaped(path)?);
        Self::new(host, port, PathBuf::from(path))
    }

    /// As ssh takes it: `host` or `user@host`.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    pub(crate) fn port(&self) -> Option<u16> {
        self.port
    }

    /// The path as it is typed on that host.
    pub(crate) fn word(&self) -> String {
        let url = || format!("file://{}", file_url::escaped(&self.path));
        self.path.to_str().map_or_else(url, str::to_owned)
    }

    /// Relative ones begin where the shell of that user does.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl fmt::Display for Remote {
    /// The URL where the path is absolute, else as rsync and scp write it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (user, name) = match self.host.rsplit_once('@') {
            Some((user, name)) => (format!("{user}@"), name),
            None => (String::new(), &*self.host),
        };
        let bracketed = if name.contains(':') {
            format!("[{name}]")
        } else {
            name.to_owned()
        };
        if !self.path.is_absolute() {
            return write!(f, "{user}{bracketed}:{}", self.path.display());
        }
        let port = self
            .port
            .map_or_else(String::new, |port| format!(":{port}"));
        write!(
            f,
            "ssh://{user}{bracketed}{port}{}",
            file_url::escaped(&self.path)
        )
    }
}

/// Host, and port if there is one, of `host[:port]`; colons inside brackets belong to the host.
pub(crate) fn port_of(authority: &str) -> Result<(&str, Option<u16>), &'static str> {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => {
            let port = port.parse().ok().filter(|port| *port != 0);
            let port = port.ok_or("expected the number of a port behind the colon")?;
            Ok((host, Some(port)))
        }
        _ => Ok((authority, None)),
    }
}

/// As rsync and scp do, a colon before the first slash makes an address remote; `./a:b` is a file. A host that is a
/// number of IPv6 stands in brackets.
fn head_of(text: &[u8]) -> Option<(&str, &[u8])> {
    let begin = match text.iter().position(|byte| b"[/".contains(byte)) {
        Some(bracket) if text[bracket] == b'[' => {
            bracket + text[bracket..].iter().position(|byte| *byte == b']')?
        }
        _ => 0,
    };
    let colon = begin + text[begin..].iter().position(|byte| *byte == b':')?;
    let head = std::str::from_utf8(&text[..colon]).ok()?;
    (!head.contains('/')).then_some((head, &text[colon + 1..]))
}

/// `FORMAT+file:PATH`, or `FORMAT+file:///PATH` with `%FF` for the byte 255; nothing if it is no such form.
fn image(head: &str, rest: &[u8]) -> Option<Result<DiskAddress, &'static str>> {
    let format: ImageFormat = head.strip_suffix("+file")?.parse().ok()?;
    let path = match std::str::from_utf8(rest) {
        Ok(text) if text.starts_with("//") => file_url::path_of(&format!("file:{text}"))?,
        _ if rest.is_empty() => Err("expected the path of an image behind the colon"),
        _ => Ok(PathBuf::from(OsString::from_vec(rest.to_vec()))),
    };
    Some(path.map(|path| DiskAddress::Image(format, path)))
}

fn unsupported_form(head: &str, rest: &[u8]) -> Option<&'static str> {
    let url = rest.starts_with(b"//");
    Some(match head {
        "nbd" | "nbd+unix" | "nbds" | "nbds+unix" => "an NBD export of this form",
        _ if head.ends_with("+file") => "this image format",
        _ if url => "this kind of address",
        _ => return None,
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
                 name contains a colon) or HOST:PATH"
            ),
            Self::Nbd { why } => f.write_str(why),
            Self::Pushed { from } => write!(
                f,
                "it was pushed from another host, where its path was {from}: run the sync there again, it goes on"
            ),
            Self::Job { name } => write!(
                f,
                "a job brings it up to date: blockferry failover start {name} goes on with it"
            ),
            Self::Elsewhere => f.write_str(
                "only sync reaches disks of other hosts: log in there to ask for this (write ./NAME for a file whose \
                 name contains a colon)",
            ),
        }
    }
}

impl std::error::Error for AddressError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Location, AddressError> {
        Location::parse(text.into())
    }

    fn there(text: &str) -> Remote {
        match parse(text).expect(text) {
            Location::There(There::Shell(remote)) => remote,
            other => panic!("{text}: {other}"),
        }
    }

    #[test]
    fn local_paths_are_accepted_even_with_colons_after_a_slash() {
        for text in [
            "disk.raw",
            "/dev/disk/by-id/a:b",
            "./a:b",
            "../x",
            "/a b/c",
            "./[a:b]:c",
        ] {
            let address = disk_here(text.into()).expect(text);
            assert_eq!(address.path(), Some(Path::new(text)));
        }
    }

    #[test]
    fn what_a_job_recorded_names_the_job_that_goes_on() {
        let refused = parse("failover://web-1.12/disk0#7").expect_err("no disk");

        let name = "web-1".to_owned();
        assert_eq!(refused, AddressError::Job { name });
        let text = refused.to_string();
        assert!(text.contains("failover start web-1"), "{text}");
    }

    #[test]
    fn a_host_before_a_colon_or_in_a_url_is_another_one() {
        for (text, host, port, path) in [
            ("host:/dev/sdx", "host", None, "/dev/sdx"),
            ("me@host:disk.raw", "me@host", None, "disk.raw"),
            ("host:a:b", "host", None, "a:b"),
            ("[::1]:/a", "::1", None, "/a"),
            ("me@[fe80::1]:a", "me@fe80::1", None, "a"),
            ("ssh://host/a", "host", None, "/a"),
            (
                "ssh://me@host:2222/a%20b%25",
                "me@host",
                Some(2222),
                "/a b%",
            ),
            ("ssh://me@[::1]:22/a", "me@::1", Some(22), "/a"),
            ("ssh://[::1]/a", "::1", None, "/a"),
        ] {
            let remote = there(text);

            let found = (remote.host(), remote.port(), remote.path());
            assert_eq!(found, (host, port, Path::new(path)), "{text}");
            assert_eq!(there(&remote.to_string()), remote, "{text} is {remote}");
        }
    }

    #[test]
    fn what_a_shell_or_ssh_would_take_for_something_else_is_refused() {
        let no_text = OsString::from_vec(b"host:a\xff".to_vec());
        assert!(matches!(
            Location::parse(no_text),
            Err(AddressError::Url { .. })
        ));
        for text in [
            "host:",
            ":/a",
            "@host:/a",
            "-oProxyCommand=x:/a",
            "me@-x:/a",
            "[-oProxyCommand=x]:/a",
            "me@[-x]:/a",
            "]:a",
            "[]:a",
            "[[::1]]:a",
            "a[b]c:/x",
            "[me]@h:/x",
            "[nbd]:x",
            "me::@[::1]:x",
            "ssh://me:secret@h:22/x",
            "ssh://-oProxyCommand=x/a",
            "ssh://host",
            "ssh://host:0/a",
            "ssh://host:x/a",
            "ssh:///a",
            "ssh://host/a%2",
            "a b:/c",
            "ssh://host:99999/a",
        ] {
            let error = parse(text).expect_err(text);
            assert!(matches!(error, AddressError::Url { .. }), "{text}: {error}");
        }
    }

    #[test]
    fn other_places_and_formats_are_refused_as_unsupported() {
        for text in [
            "nbd:unix:/run/nbd",
            "vdi+file:a",
            "raw+file:/a",
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
    fn an_nbd_export_is_a_disk_and_is_recorded() {
        let text = "nbd+unix:///export?socket=run/nbd";
        let disk = disk_here(text.into()).expect("an export");
        assert_eq!(typed(&disk), text);
        let again = disk_here(recorded(&disk).into()).expect("recorded");
        assert!(recorded(&again).contains("socket=/"), "{again}");
        assert_eq!(again, disk.absolute());
        assert!(parse(&pushed_from(&disk, "here")).is_err());
        let error = parse("nbd+unix:///export").expect_err("no socket");
        assert!(error.to_string().contains("names no socket"), "{error}");
    }

    #[test]
    fn an_image_of_another_format_is_a_disk_and_is_recorded() {
        for text in [
            "qcow2+file:a b:c%20.qcow2",
            "vhdx+file:/a/b",
            "vmdk+file:///a%FFb",
        ] {
            let disk = disk_here(text.into()).expect(text);
            assert_eq!(typed(&disk), text);
            assert!(recorded(&disk).contains("+file:///"), "{disk}");
            let again = disk_here(recorded(&disk).into()).expect("recorded");
            assert_eq!(again, disk.absolute(), "{text}");
        }
        for text in ["qcow2+file:", "qcow2+file://host/a", "qcow2+file:///%zz"] {
            let error = parse(text).expect_err(text);
            assert!(matches!(error, AddressError::Url { .. }), "{text}: {error}");
        }
    }

    #[test]
    fn where_only_disks_of_this_host_are_meant_others_are_refused() {
        assert_eq!(disk_here("host:/a".into()), Err(AddressError::Elsewhere));
    }

    #[test]
    fn a_recorded_address_is_the_same_disk_again() {
        for bytes in [
            &b"/disks/a b:c%20"[..],
            b"/disks/\xff%\xc3\xbc",
            b"relative\xfe",
        ] {
            let address = disk_here(OsString::from_vec(bytes.to_vec())).expect("local");

            let again = disk_here(recorded(&address).into()).expect("recorded");

            assert_eq!(again, address.absolute());
        }
        let remote = there("me@host:/disks/a b%\u{fc}");
        assert_eq!(
            there(&Location::There(There::Shell(remote.clone())).recorded()),
            remote
        );
        let export = parse("blockferry://host:99/web").expect("an export");
        assert!(matches!(&export, Location::There(There::Server(export)) if export.port() == 99));
        assert_eq!(parse(&export.recorded()).as_ref(), Ok(&export));
    }

    #[test]
    fn what_was_pushed_never_passes_for_a_disk_of_the_other_host() {
        let address = disk_here("/disks/a".into()).expect("local");

        let recorded = pushed_from(&address, "here");

        let error = parse(&recorded).expect_err("it is no disk there");
        assert!(error.to_string().contains("here/disks/a"), "{error}");
    }

    #[test]
    fn an_empty_address_is_refused() {
        assert_eq!(parse(""), Err(AddressError::Empty));
    }
}
