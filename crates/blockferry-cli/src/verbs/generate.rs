//! Completions and manual pages, generated from the definition of the command line.

use std::io;
use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;
use serde::Serialize;

use crate::arguments::{Cli, CompletionsArguments, ManArguments};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::session::Session;

#[derive(Serialize)]
struct Completions<'a> {
    shell: String,
    script: &'a str,
}

#[derive(Serialize)]
struct Pages {
    pages: Vec<String>,
}

pub(crate) fn completions(arguments: &CompletionsArguments, session: &Session) -> Exit {
    let shell = Shell::from(arguments.shell);
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "blockferry", &mut script);
    let script = String::from_utf8_lossy(&script);
    if session.output.is_json() {
        let summary = Completions {
            shell: shell.to_string(),
            script: &script,
        };
        session.output.summary("completions", &summary);
    } else {
        session.output.document(&script);
    }
    Exit::Done
}

/// Writes `blockferry.1` and one page per visible verb.
pub(crate) fn man(arguments: &ManArguments, session: &Session) -> Result<Exit, Failure> {
    let directory = &arguments.dir;
    let pages = write_pages(directory).map_err(|error| {
        Failure::new(
            Exit::Target,
            format!("writing manual pages to {}: {error}", directory.display()),
        )
    })?;
    session.output.say(format_args!(
        "{} manual pages in {}",
        pages.len(),
        directory.display()
    ));
    session.output.summary("man", &Pages { pages });
    Ok(Exit::Done)
}

fn write_pages(directory: &Path) -> io::Result<Vec<String>> {
    std::fs::create_dir_all(directory)?;
    clap_mangen::generate_to(Cli::command(), directory)?;
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with("blockferry") && name.ends_with(".1") {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
