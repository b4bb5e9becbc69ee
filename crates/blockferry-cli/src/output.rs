//! The only place that writes to the user: text on standard error, data on standard output, or JSON lines.
//!
//! A reader that goes away (`| head`) never panics and never stops a transfer; it is only remembered.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use crate::failure::Failure;

/// Version of the JSON stream; raised when a field changes its meaning or goes away.
pub(crate) const STREAM_VERSION: u32 = 1;

/// How much text the user wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verbosity {
    Quiet,
    Normal,
    Verbose,
}

/// Where and how to write.
#[derive(Debug)]
pub(crate) struct Output {
    json: bool,
    verbosity: Verbosity,
    reader_left: AtomicBool,
}

#[derive(Serialize)]
struct Line<'a, T> {
    r#type: &'static str,
    #[serde(flatten)]
    body: &'a T,
}

#[derive(Serialize)]
struct Named<'a, T> {
    r#type: &'static str,
    verb: &'a str,
    #[serde(flatten)]
    body: &'a T,
}

#[derive(Serialize)]
struct Head<'a> {
    r#type: &'static str,
    version: u32,
    event: &'static str,
    verb: Option<&'a str>,
    program: &'static str,
}

#[derive(Serialize)]
struct ErrorLine<'a> {
    r#type: &'static str,
    code: u8,
    kind: &'static str,
    message: &'a str,
    hints: &'a [String],
    resumable: bool,
}

#[derive(Serialize)]
struct RemoteLine<'a> {
    host: &'a str,
    text: &'a str,
}

impl Output {
    pub(crate) fn new(json: bool, verbosity: Verbosity) -> Self {
        Self {
            json,
            verbosity,
            reader_left: AtomicBool::new(false),
        }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    pub(crate) fn verbosity(&self) -> Verbosity {
        self.verbosity
    }

    /// Whether whoever read standard output has gone away.
    pub(crate) fn reader_left(&self) -> bool {
        self.reader_left.load(Ordering::Relaxed)
    }

    /// The first line of a JSON stream; `verb` is unknown where the arguments cannot be read.
    pub(crate) fn head(&self, verb: Option<&str>) {
        let program = env!("CARGO_PKG_VERSION");
        self.json_line(&Head {
            r#type: "event",
            version: STREAM_VERSION,
            event: "started",
            verb,
            program,
        });
    }

    /// A JSON line of this type; nothing in text mode.
    pub(crate) fn line(&self, r#type: &'static str, body: &impl Serialize) {
        self.json_line(&Line { r#type, body });
    }

    /// The last JSON line of a verb that ended as it should; nothing in text mode.
    pub(crate) fn summary(&self, verb: &str, body: &impl Serialize) {
        self.json_line(&Named {
            r#type: "summary",
            verb,
            body,
        });
    }

    /// A failed verb, in text or JSON.
    pub(crate) fn failure(&self, failure: &Failure) {
        if self.json {
            self.json_line(&ErrorLine {
                r#type: "error",
                code: failure.exit().code(),
                kind: failure.exit().kind(),
                message: failure.message(),
                hints: failure.hints(),
                resumable: failure.is_resumable(),
            });
            return;
        }
        write_text(format_args!("error: {}", failure.message()));
        for hint in failure.hints() {
            write_text(format_args!("hint: {hint}"));
        }
    }

    /// A line of text for people, at normal verbosity.
    pub(crate) fn say(&self, text: impl fmt::Display) {
        self.text(Verbosity::Normal, text);
    }

    /// A line of text for people who asked for more.
    pub(crate) fn detail(&self, text: impl fmt::Display) {
        self.text(Verbosity::Verbose, text);
    }

    /// A line of text that `--quiet` does not silence.
    pub(crate) fn warn(&self, text: impl fmt::Display) {
        self.text(Verbosity::Quiet, format_args!("warning: {text}"));
    }

    /// What a command on another host wrote to its standard error: shown as it is, with whose it is.
    pub(crate) fn remote(&self, host: &str, text: &str) {
        self.line("remote", &RemoteLine { host, text });
        self.text(Verbosity::Quiet, format_args!("{host}: {text}"));
    }

    /// A line that was asked for by the verb itself (`status`), so `--quiet` does not silence it.
    pub(crate) fn answer(&self, text: impl fmt::Display) {
        self.text(Verbosity::Quiet, text);
    }

    /// Data of the verb itself, on standard output; nothing in JSON mode.
    pub(crate) fn data(&self, text: impl fmt::Display) {
        if !self.json {
            self.to_stdout(format_args!("{text}\n"));
        }
    }

    /// A text that is data as a whole, with its own line ends.
    pub(crate) fn document(&self, text: &str) {
        self.to_stdout(format_args!("{text}"));
    }

    fn text(&self, least: Verbosity, text: impl fmt::Display) {
        if !self.json && self.verbosity >= least {
            write_text(format_args!("{text}"));
        }
    }

    fn json_line(&self, line: &impl Serialize) {
        if !self.json {
            return;
        }
        let text =
            serde_json::to_string(line).expect("lines have string keys and finite numbers only");
        self.to_stdout(format_args!("{text}\n"));
    }

    fn to_stdout(&self, text: fmt::Arguments<'_>) {
        if self.reader_left() {
            return;
        }
        let mut stdout = io::stdout().lock();
        if stdout
            .write_fmt(text)
            .and_then(|()| stdout.flush())
            .is_err()
        {
            self.reader_left.store(true, Ordering::Relaxed);
        }
    }
}

/// Whether people watch standard error.
pub(crate) fn stderr_is_terminal() -> bool {
    io::stderr().is_terminal()
}

/// Whether data goes to the screen, where a progress bar would mix with it.
pub(crate) fn stdout_is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Nothing can be done about a standard error that cannot be written.
fn write_text(text: fmt::Arguments<'_>) {
    drop(writeln!(
        io::stderr().lock(),
        "{}",
        printable(&text.to_string())
    ));
}

/// Names of files, and other hosts, decide what they say, not what our terminal does.
fn printable(text: &str) -> String {
    let shown = |c: char| match c {
        '\n' | '\t' => c,
        _ if c.is_control() => char::REPLACEMENT_CHARACTER,
        _ => c,
    };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_host_or_a_name_says_cannot_drive_the_terminal() {
        assert_eq!(
            printable("a\x1b[2Jb\tc\rd\n"),
            "a\u{fffd}[2Jb\tc\u{fffd}d\n"
        );
        assert_eq!(printable("\u{9b}31m\u{fc}"), "\u{fffd}31m\u{fc}");
    }
}
