//! The configuration of a server: what it exports, and to whom. Every mistake in it is found when it is read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::Disk;
use crate::engine::transport::message::Role;
use crate::engine::transport::tls::{Identity, Peer};
use crate::engine::{DiskAddress, TargetOptions, parse_size};
use crate::exit::Exit;
use crate::export::is_name;
use crate::failure::Failure;
use crate::remote::{Asked, certs_dir, identity};

/// Connections served at once, unless the configuration says otherwise.
const CONNECTIONS: u16 = 8;
/// More than any configuration needs.
const MAX_BYTES: u64 = 1024 * 1024;
/// Every host with a certificate.
const ANYONE: &str = "*";

/// A configuration that holds together, and the identity it names.
#[derive(Debug)]
pub(super) struct Config {
    pub(super) identity: Identity,
    pub(super) connections: usize,
    exports: BTreeMap<String, Export>,
}

/// As it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Written {
    /// Directory of the certificates of this host.
    certs: Option<PathBuf>,
    /// Most connections served at once.
    connections: Option<u16>,
    #[serde(default)]
    exports: BTreeMap<String, Export>,
}

/// One disk, who may use it and how.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Export {
    path: DiskAddress,
    /// Names of certificates whose hosts may sync from it.
    #[serde(default)]
    read: Vec<String>,
    /// The same of those that may bring it up to date.
    #[serde(default)]
    write: Vec<String>,
    /// Options that they may ask for although these give something up, as [`Asked::dangers`] calls them.
    #[serde(default)]
    permit: Vec<String>,
    /// Most worker threads of one run.
    threads: Option<u16>,
    /// Most space of its transfer log.
    log_limit: Option<String>,
    /// Directory of its log and state.
    state: Option<PathBuf>,
}

impl Config {
    /// Reads it, and the certificates that it names.
    pub(super) fn load(file: &Path) -> Result<Self, Failure> {
        let wrong = |why: &str| {
            let message = format!("configuration {}: {why}", file.display());
            Failure::new(Exit::Usage, message)
        };
        let text = read(file).map_err(|error| wrong(&error))?;
        let written: Written =
            toml::from_str(&text).map_err(|error| wrong(error.to_string().trim()))?;
        for (name, export) in &written.exports {
            export
                .check(name)
                .map_err(|why| wrong(&format!("exports.{name}: {why}")))?;
        }
        if written.exports.is_empty() {
            return Err(wrong("it exports nothing; expected a table [exports.NAME]"));
        }
        let certs = absolute(written.certs.as_deref(), "certs").map_err(|why| wrong(&why))?;
        Ok(Self {
            identity: identity(&certs_dir(certs))?,
            connections: written.connections.unwrap_or(CONNECTIONS).max(1).into(),
            exports: written.exports,
        })
    }

    /// How many disks it exports.
    pub(super) fn exports(&self) -> usize {
        self.exports.len()
    }

    /// The export of this name, if the peer may use it so.
    pub(super) fn export_for(&self, peer: &Peer, role: Role, name: &str) -> Option<&Export> {
        self.exports
            .get(name)
            .filter(|export| export.admits(peer, role))
    }
}

impl Export {
    fn check(&self, name: &str) -> Result<(), String> {
        if !is_name(name) {
            return Err(
                "its name has letters, digits, '.', '_' and '-', at most 64 of them".to_owned(),
            );
        }
        absolute(self.path.path(), "path")?;
        absolute(self.state.as_deref(), "state")?;
        if self.read.is_empty() && self.write.is_empty() {
            return Err(
                "nobody may use it; expected names of certificates in read or write".to_owned(),
            );
        }
        if let Some(unknown) = self
            .permit
            .iter()
            .find(|option| !Asked::DANGERS.contains(&&***option))
        {
            let known = Asked::DANGERS.join(", ");
            return Err(format!(
                "permit: expected some of {known}, found {unknown:?}"
            ));
        }
        if self.threads == Some(0) {
            return Err("threads: expected at least 1, found 0".to_owned());
        }
        self.log_limit()?;
        Ok(())
    }

    fn log_limit(&self) -> Result<Option<u64>, String> {
        let parsed = self.log_limit.as_deref().map(parse_size).transpose();
        match parsed.map_err(|error| format!("log-limit: {error}"))? {
            Some(0) => Err("log-limit: it must be greater than zero".to_owned()),
            limit => Ok(limit),
        }
    }

    fn admits(&self, peer: &Peer, role: Role) -> bool {
        let admitted = match role {
            Role::Source => &self.read,
            Role::Target => &self.write,
            // An export is a disk.
            Role::Machine => return false,
        };
        admitted.iter().any(|name| name == ANYONE || peer.is(name))
    }

    /// What is asked, within what this host allows; or what it does not.
    pub(super) fn restrict(&self, asked: &mut Asked) -> Result<(), String> {
        if asked.state.take().is_some() {
            return Err("where a target's state is kept is the server's own business".to_owned());
        }
        if let Some(danger) = asked
            .dangers()
            .find(|danger| !self.permit.iter().any(|it| it == danger))
        {
            return Err(format!("this export does not permit {danger}"));
        }
        asked.pace.threads = least(self.threads, asked.pace.threads);
        asked.pace.log_limit = least(self.log_limit()?, asked.pace.log_limit);
        Ok(())
    }

    /// What is served; the state of a target is in the usual place unless it says otherwise.
    pub(super) fn disk(&self, usual: &TargetOptions) -> Disk {
        let mut place = usual.clone();
        if let Some(state) = &self.state {
            place.state_dir = Some(state.clone());
        }
        Disk {
            address: self.path.clone(),
            place,
        }
    }
}

fn least<T: Ord>(ours: Option<T>, theirs: Option<T>) -> Option<T> {
    ours.into_iter().chain(theirs).min()
}

fn read(file: &Path) -> Result<String, String> {
    use std::io::Read;
    let mut text = String::new();
    let open = std::fs::File::open(file);
    let read = open.and_then(|open| open.take(MAX_BYTES + 1).read_to_string(&mut text));
    read.map_err(|error| error.to_string())?;
    if text.len() as u64 > MAX_BYTES {
        return Err("it is larger than 1 MiB".to_owned());
    }
    Ok(text)
}

/// A server has no directory of its own from which a path could begin.
fn absolute<'p>(path: Option<&'p Path>, what: &str) -> Result<Option<&'p Path>, String> {
    match path {
        Some(path) if !path.is_absolute() => Err(format!(
            "{what}: expected an absolute path, found {}",
            path.display()
        )),
        path => Ok(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(text: &str) -> String {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("serve.toml");
        std::fs::write(&file, text).expect("written");
        Config::load(&file).expect_err(text).message().to_owned()
    }

    #[test]
    fn mistakes_are_found_when_it_is_read_and_say_where() {
        for (text, expected) in [
            ("", "it exports nothing"),
            ("exports = 3", "invalid type"),
            ("[exports.web]\nread = [\"a\"]", "missing field `path`"),
            (
                "[exports.web]\npath = \"/a\"",
                "exports.web: nobody may use it",
            ),
            (
                "[exports.web]\npath = \"a\"\nread = [\"*\"]",
                "exports.web: path: expected an absolute path, found a",
            ),
            (
                "[exports.\"a/b\"]\npath = \"/a\"\nread = [\"*\"]",
                "exports.a/b: its name has letters",
            ),
            (
                "[exports.web]\npath = \"/a\"\nraed = [\"*\"]",
                "unknown field `raed`",
            ),
            (
                "[exports.web]\npath = \"/a\"\nread = [\"*\"]\npermit = [\"everything\"]",
                "found \"everything\"",
            ),
            (
                "[exports.web]\npath = \"/a\"\nread = [\"*\"]\nlog-limit = \"0\"",
                "log-limit: it must be",
            ),
            (
                "[exports.web]\npath = \"/a\"\nread = [\"*\"]\nlog-limit = \"much\"",
                "log-limit: size: expected",
            ),
            (
                "[exports.web]\npath = \"/a\"\nread = [\"*\"]\nthreads = 0",
                "threads: expected at least 1",
            ),
            (
                "[exports.web]\npath = \"/a\"\nread = [\"*\"]\nstate = \"b\"",
                "exports.web: state: expected",
            ),
            (
                "certs = \"b\"\n[exports.web]\npath = \"/a\"\nread = [\"*\"]",
                "certs: expected an absolute path",
            ),
            (
                "certs = \"/none\"\n[exports.web]\npath = \"/a\"\nread = [\"*\"]",
                "read /none/ca.pem",
            ),
        ] {
            let found = wrong(text);
            assert!(found.contains(expected), "{text}: {found}");
        }
    }

    fn export(rest: &str) -> Export {
        toml::from_str(&format!("path = \"/a\"\nwrite = [\"*\"]\n{rest}")).expect(rest)
    }

    fn asked(json: &str) -> Asked {
        Asked::from_json(json.as_bytes()).expect(json)
    }

    #[test]
    fn a_peer_gets_no_more_than_the_configuration_gives() {
        let mut usual = asked(r#"{"mode":"full","strict":true,"pace":{"bwlimit":5}}"#);
        export("").restrict(&mut usual).expect("harmless");
        assert_eq!(
            usual,
            asked(r#"{"mode":"full","strict":true,"pace":{"bwlimit":5}}"#)
        );

        let mut greedy = asked(r#"{"pace":{"threads":64,"log_limit":900}}"#);
        export("threads = 2\nlog-limit = \"1K\"")
            .restrict(&mut greedy)
            .expect("less");
        assert_eq!(
            (greedy.pace.threads, greedy.pace.log_limit),
            (Some(2), Some(900))
        );

        assert!(
            export("")
                .restrict(&mut asked(r#"{"state":"/x"}"#))
                .is_err()
        );
        for (json, danger) in [
            (r#"{"in_place":true}"#, "in-place"),
            (r#"{"allow_shrink":true}"#, "allow-shrink"),
            (r#"{"undo":"none"}"#, "undo-none"),
            (r#"{"pace":{"no_read_back":true}}"#, "no-read-back"),
            (r#"{"pace":{"crash_consistent":true}}"#, "crash-consistent"),
        ] {
            let why = export("").restrict(&mut asked(json)).expect_err(json);
            assert!(why.contains(danger), "{why}");
            let permits = export(&format!("permit = [{danger:?}]"));
            permits.restrict(&mut asked(json)).expect(json);
            permits.check("a").expect("permitted");
        }
    }
}
