//! `certs DIR HOST...`: a small private authority, and certificates for hosts that are to trust each other.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::arguments::CertsArguments;
use crate::engine::transport::tls::Authority;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::quote::quoted_path;
use crate::session::Session;

#[derive(Serialize)]
struct Summary {
    authority: PathBuf,
    hosts: Vec<PathBuf>,
    days: u32,
}

pub(crate) fn run(arguments: &CertsArguments, session: &Session) -> Result<Exit, Failure> {
    let hosts: Vec<(Vec<String>, PathBuf)> = arguments
        .hosts
        .iter()
        .map(|names| host(names, &arguments.dir))
        .collect::<Result<_, _>>()?;
    let dir = &arguments.dir;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|error| Failure::new(Exit::Usage, format!("create {}: {error}", dir.display())))?;
    let failed = |error| Failure::from_error(Exit::Usage, &error);
    let authority = Authority::open(dir).map_err(failed)?;
    // All of them, or none.
    let issued: Vec<_> = hosts
        .iter()
        .map(|(names, dir)| Ok((authority.issue(names, arguments.days).map_err(failed)?, dir)))
        .collect::<Result<_, Failure>>()?;
    let output = &session.output;
    for (issued, dir) in issued {
        issued.write(dir, &authority).map_err(failed)?;
        output.say(format_args!("made {}", quoted_path(dir)));
    }
    output.say(format_args!(
        "copy each to its host, as /etc/blockferry/certs, over a way you trust; {} stays here and secret",
        quoted_path(&dir.join("ca.key"))
    ));
    let summary = Summary {
        authority: dir.join("ca.pem"),
        hosts: hosts.into_iter().map(|(_, dir)| dir).collect(),
        days: arguments.days,
    };
    output.summary("certs", &summary);
    Ok(Exit::Done)
}

/// The names of one host, and where its files go: under the first of them.
fn host(names: &str, dir: &Path) -> Result<(Vec<String>, PathBuf), Failure> {
    let names: Vec<String> = names
        .split(',')
        .map(|name| name.trim().to_owned())
        .collect();
    let of_name = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
    let is_host = |name: &String| {
        !name.is_empty() && !name.starts_with(['-', '.']) && name.chars().all(of_name)
    };
    if let Some(wrong) = names.iter().find(|name| !is_host(name)) {
        let message =
            format!("expected names and addresses of a host, parted by commas, found {wrong:?}");
        return Err(Failure::new(Exit::Usage, message));
    }
    let dir = dir.join(&names[0]);
    if dir.exists() {
        let message = format!("{} is there already: nothing was made", dir.display());
        return Err(Failure::new(Exit::Usage, message)
            .with_hint("move it away to make new certificates for that host"));
    }
    Ok((names, dir))
}
