//! From the words typed to the exit code.

use std::ffi::{OsStr, OsString};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use serde::Serialize;

use crate::arguments::{Cli, Verb};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::{Output, Verbosity};
use crate::session::Session;
use crate::{demo, verbs};

/// Runs the command with these words, the program's name first.
pub(crate) fn run(words: &[OsString]) -> ExitCode {
    let exit = match Cli::try_parse_from(words) {
        Ok(cli) => execute(&cli),
        Err(error) => refuse(&error, asks_for_json(words)),
    };
    ExitCode::from(exit.code())
}

fn execute(cli: &Cli) -> Exit {
    let session = match Session::start(&cli.global) {
        Ok(session) => session,
        Err(failure) => {
            Output::new(cli.global.json, Verbosity::Quiet).failure(&failure);
            return failure.exit();
        }
    };
    session.output.head(Some(cli.verb.name()));
    guarded(&cli.verb, &session).unwrap_or_else(|failure| {
        session.output.failure(&failure);
        failure.exit()
    })
}

/// A panic is a bug, but also then the stream ends with an error line and the exit code says what it is. What
/// panicked was already written by the panic hook.
fn guarded(verb: &Verb, session: &Session) -> Result<Exit, Failure> {
    catch_unwind(AssertUnwindSafe(|| perform(verb, session))).unwrap_or_else(|_| {
        Err(Failure::new(Exit::Internal, "a bug in blockferry ended the run")
            .with_hint("the target is safe: it keeps its old point until a commit, and recovery finishes one"))
    })
}

fn perform(verb: &Verb, session: &Session) -> Result<Exit, Failure> {
    match verb {
        Verb::Demo(arguments) => demo::run(arguments, session),
        Verb::Sync(arguments) => verbs::sync::run(arguments, session),
        Verb::Status(arguments) => verbs::status::run(arguments, session),
        Verb::Resume(arguments) => verbs::resume::run(arguments, session),
        Verb::Cancel(arguments) => verbs::decide::run("cancel", arguments, session),
        Verb::Rollback(arguments) => verbs::decide::run("rollback", arguments, session),
        Verb::Accept(arguments) => verbs::decide::run("accept", arguments, session),
        Verb::Diff(arguments) => verbs::diff::run(arguments, session),
        Verb::Digest(arguments) => verbs::digest::run(arguments, session),
        Verb::Verify(arguments) => verbs::verify::run(arguments, session),
        Verb::Export(arguments) => verbs::export::run(arguments, session),
        Verb::Serve(arguments) => verbs::serve::run(arguments, session),
        Verb::Certs(arguments) => verbs::certs::run(arguments, session),
        Verb::Failover(arguments) => verbs::failover::run(arguments, session),
        Verb::Jobs(arguments) => verbs::jobs::run(arguments, session),
        Verb::FreezeGuard(arguments) => verbs::failover::guard(arguments),
        Verb::Completions(arguments) => Ok(verbs::generate::completions(arguments, session)),
        Verb::Man(arguments) => verbs::generate::man(arguments, session),
    }
}

/// `--json` may stand anywhere before `--`, also where the rest cannot be understood.
fn asks_for_json(words: &[OsString]) -> bool {
    words
        .iter()
        .skip(1)
        .take_while(|word| *word != OsStr::new("--"))
        .any(|word| word == "--json")
}

#[derive(Serialize)]
struct HelpSummary<'a> {
    text: &'a str,
}

/// Help and version are answers; everything else is a usage error.
fn refuse(error: &clap::Error, json: bool) -> Exit {
    let output = Output::new(json, Verbosity::Normal);
    let answer = matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    );
    output.head(None);
    match (answer, json) {
        (true, true) => output.summary(
            "help",
            &HelpSummary {
                text: &error.to_string(),
            },
        ),
        (false, true) => output.failure(&Failure::new(Exit::Usage, plain_message(error))),
        // Colours on a terminal and the right stream are clap's business; a closed stream is no error.
        (_, false) => drop(error.print()),
    }
    if answer { Exit::Done } else { Exit::Usage }
}

/// Clap's message without its prefix and with its line ends folded.
fn plain_message(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "no verb given; see blockferry --help".to_owned();
    }
    let text = error.to_string();
    let first = text.split("\n\nUsage:").next().unwrap_or(&text);
    let text = first
        .split("\n\nFor more information")
        .next()
        .unwrap_or(first);
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").trim_start_matches("error: ").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn json_is_recognised_anywhere_before_the_double_dash() {
        assert!(asks_for_json(&words("blockferry --json nonsense")));
        assert!(asks_for_json(&words("blockferry sync a --nonsense --json")));
        assert!(!asks_for_json(&words("blockferry diff a -- --json")));
        assert!(!asks_for_json(&words("--json sync")));
    }

    #[test]
    fn an_argument_error_is_told_in_one_line_without_usage() {
        let error =
            Cli::try_parse_from(["blockferry", "sync", "a", "vdi+file:b"]).expect_err("VDI");

        let message = plain_message(&error);

        assert!(
            message.starts_with("invalid value 'vdi+file:b' for '<TARGET>'"),
            "{message}"
        );
        assert!(
            !message.contains('\n') && !message.contains("Usage"),
            "{message}"
        );
    }
}
