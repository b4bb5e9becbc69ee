//! `digest IMAGE`: the root digest as data, in the form `sha256sum` made familiar.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::arguments::DigestArguments;
use crate::engine::{self, DigestReport, format_size};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::stdout_is_terminal;
use crate::progress::Look;
use crate::session::Session;
use crate::verbs::report::{duration, rate};

pub(crate) fn run(arguments: &DigestArguments, session: &Session) -> Result<Exit, Failure> {
    let report = match &arguments.manifest {
        None => take(arguments, None, session)?,
        Some(path) => with_manifest(arguments, path, session)?,
    };
    session.output.summary("digest", &report);
    session
        .output
        .data(format_args!("{}  {}", report.root, arguments.image));
    session.output.detail(describe(&report));
    Ok(Exit::Done)
}

fn take(
    arguments: &DigestArguments,
    manifest: Option<&mut dyn Write>,
    session: &Session,
) -> Result<DigestReport, Failure> {
    let image = super::open(&arguments.image, true)?;
    let look = if stdout_is_terminal() {
        Look::NoBar
    } else {
        Look::Bar
    };
    let (context, display) = session.context(look);
    let outcome = engine::digest(&image, arguments.block_size, &context, manifest);
    drop(display);
    outcome.map_err(|error| session.failure(&error))
}

/// A manifest that is not complete is removed again.
fn with_manifest(
    arguments: &DigestArguments,
    path: &Path,
    session: &Session,
) -> Result<DigestReport, Failure> {
    let failed = |what: &str, error: &std::io::Error| {
        Failure::new(
            Exit::Target,
            format!("{what} of manifest {}: {error}", path.display()),
        )
    };
    let mut file = BufWriter::new(create(path).map_err(|error| failed("create", &error))?);
    let outcome = take(arguments, Some(&mut file), session).and_then(|report| {
        let stored = file
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error);
        stored
            .and_then(|file| file.sync_all())
            .map_err(|error| failed("write", &error))?;
        Ok(report)
    });
    if outcome.is_err() {
        drop(std::fs::remove_file(path));
    }
    outcome
}

fn create(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().write(true).create_new(true).open(path)
}

fn describe(report: &DigestReport) -> String {
    let speed = rate(report.image_bytes, report.elapsed_seconds)
        .map_or_else(String::new, |rate| format!(" at {}/s", format_size(rate)));
    format!(
        "{} with {} of data in blocks of {}, {}{speed}",
        format_size(report.image_bytes),
        format_size(report.data_bytes),
        format_size(report.block_size),
        duration(report.elapsed_seconds)
    )
}
