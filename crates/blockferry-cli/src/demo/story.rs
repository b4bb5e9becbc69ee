//! How the demo is told: numbered chapters with what really happened under each.

use std::fmt;

use serde::Serialize;

use crate::output::Output;

/// Tells chapters one after the other.
#[derive(Debug)]
pub(crate) struct Story<'a> {
    output: &'a Output,
    chapter: u32,
}

#[derive(Serialize)]
struct Chapter<'a> {
    event: &'static str,
    chapter: u32,
    title: &'a str,
}

#[derive(Serialize)]
struct Fact<'a> {
    event: &'static str,
    chapter: u32,
    message: &'a str,
}

impl<'a> Story<'a> {
    pub(crate) fn new(output: &'a Output) -> Self {
        Self { output, chapter: 0 }
    }

    /// Begins the next chapter.
    pub(crate) fn chapter(&mut self, title: &str) {
        self.chapter += 1;
        let chapter = self.chapter;
        self.output.line(
            "event",
            &Chapter {
                event: "chapter",
                chapter,
                title,
            },
        );
        self.output.say(format_args!("\n{chapter}. {title}"));
    }

    /// Tells one thing that happened.
    pub(crate) fn tell(&self, fact: impl fmt::Display) {
        let message = fact.to_string();
        let fact = Fact {
            event: "fact",
            chapter: self.chapter,
            message: &message,
        };
        self.output.line("event", &fact);
        self.output.say(format_args!("   {message}"));
    }
}
