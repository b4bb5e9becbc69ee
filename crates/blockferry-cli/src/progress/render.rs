//! One renderer per operation: keeps the meter of the current phase and writes in the form that was asked for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::Look;
use super::meter::Meter;
use crate::engine::{Event, Phase, Progress, format_size};
use crate::output::{Output, Verbosity, stderr_is_terminal};
use crate::signals::Received;
use crate::verbs::report::about;

/// Between two plain lines.
const PLAIN_INTERVAL: Duration = Duration::from_secs(2);

/// Between two JSON progress lines.
const JSON_INTERVAL: Duration = Duration::from_millis(250);

/// A phase without so much as a page to do counts steps, and its bytes mean nothing to people.
const LEAST_TOTAL_BYTES: u64 = 4096;

#[derive(Debug)]
enum Form {
    Bar(ProgressBar),
    Plain,
    Json,
    Silent,
}

/// Renders events and progress.
#[derive(Debug)]
pub(crate) struct Renderer {
    output: Arc<Output>,
    received: Received,
    form: Form,
    tells_decisions: bool,
    started: Instant,
    last_line: Option<Instant>,
    shown: Option<Progress>,
    meter: Meter,
    stopping_said: bool,
}

#[derive(Serialize)]
struct ProgressLine {
    phase: String,
    done_bytes: u64,
    total_bytes: u64,
    changed_bytes: u64,
    bytes_per_second: Option<f64>,
    remaining_seconds: Option<f64>,
    elapsed_seconds: f64,
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum EventLine<'a> {
    Decision { message: &'a str },
    Accepted { message: &'a str },
    Checkpoint { sequence: u64, durable_bytes: u64 },
    Phase { phase: String },
    Stopping { signal: u8 },
}

#[derive(Serialize)]
struct WarningLine<'a> {
    code: &'a str,
    message: &'a str,
}

impl Renderer {
    pub(crate) fn new(output: Arc<Output>, received: Received, look: Look) -> Self {
        let form = form(&output, look);
        Self {
            output,
            received,
            form,
            tells_decisions: look != Look::Story,
            started: Instant::now(),
            last_line: None,
            shown: None,
            meter: Meter::default(),
            stopping_said: false,
        }
    }

    /// Shows an event at once.
    pub(crate) fn event(&self, event: &Event) {
        match event {
            Event::Decision(message) => self.aloud(&EventLine::Decision { message }, |output| {
                if self.tells_decisions {
                    output.say(message);
                }
            }),
            Event::Accepted(message) => self.aloud(&EventLine::Accepted { message }, |output| {
                if self.tells_decisions {
                    output.say(message);
                }
            }),
            &Event::Checkpoint {
                sequence,
                durable_bytes,
            } => {
                self.aloud(
                    &EventLine::Checkpoint {
                        sequence,
                        durable_bytes,
                    },
                    |output| {
                        output.detail(format_args!(
                            "durable up to record {sequence} ({})",
                            format_size(durable_bytes)
                        ));
                    },
                );
            }
            Event::Warning { code, message } => self.above_the_bar(|output| {
                output.line("warning", &WarningLine { code, message });
                output.warn(message);
            }),
            _ => {}
        }
    }

    /// Shows progress when it is due, and that a signal was understood.
    pub(crate) fn progress(&mut self, newest: Option<Progress>) {
        self.mention_signal();
        let Some(progress) = newest else { return };
        if self.shown == Some(progress) && !matches!(self.form, Form::Plain) {
            return;
        }
        let new_phase = self.shown.is_none_or(|shown| shown.phase != progress.phase);
        if new_phase {
            self.meter = Meter::default();
            self.output.line(
                "event",
                &EventLine::Phase {
                    phase: phase_word(progress.phase),
                },
            );
        }
        self.meter
            .observe(self.started.elapsed(), progress.done_bytes);
        self.shown = Some(progress);
        self.draw(progress);
    }

    /// Clears the bar and owns up to what was not shown.
    pub(crate) fn finish(mut self, newest: Option<Progress>, dropped_events: u64) {
        self.progress(newest);
        if let Form::Bar(bar) = &self.form {
            bar.finish_and_clear();
        }
        if dropped_events > 0 {
            let message = format!("{dropped_events} messages came faster than they could be shown");
            self.output.line(
                "warning",
                &WarningLine {
                    code: "messages_dropped",
                    message: &message,
                },
            );
            self.output.warn(message);
        }
    }

    fn draw(&mut self, progress: Progress) {
        match &self.form {
            Form::Bar(bar) => self.draw_bar(bar, progress),
            Form::Plain if self.is_due(PLAIN_INTERVAL) => {
                self.last_line = Some(Instant::now());
                self.output.say(format_args!(
                    "{}: {}",
                    progress.phase,
                    self.describe(progress)
                ));
            }
            Form::Json if self.is_due(JSON_INTERVAL) => {
                self.last_line = Some(Instant::now());
                self.output.line("progress", &self.json(progress));
            }
            _ => {}
        }
    }

    /// The first line is due one interval after the start, so that short runs stay short in a log.
    fn is_due(&self, interval: Duration) -> bool {
        match (self.last_line, &self.form) {
            (Some(last), _) => last.elapsed() >= interval,
            (None, Form::Json) => true,
            (None, _) => self.started.elapsed() >= interval,
        }
    }

    fn draw_bar(&self, bar: &ProgressBar, progress: Progress) {
        bar.set_length(progress.total_bytes.max(1));
        bar.set_position(progress.done_bytes);
        bar.set_prefix(progress.phase.to_string());
        bar.set_message(self.describe(progress));
    }

    fn describe(&self, progress: Progress) -> String {
        if progress.total_bytes < LEAST_TOTAL_BYTES {
            return String::new();
        }
        let mut text = format!(
            "{} of {}",
            format_size(progress.done_bytes),
            format_size(progress.total_bytes)
        );
        if progress.changed_bytes > 0 {
            text.push_str(&format!(
                ", {} changed",
                format_size(progress.changed_bytes)
            ));
        }
        if let Some(rate) = self.meter.bytes_per_second() {
            text.push_str(&format!(", {}/s", format_size(whole(rate))));
        }
        if let Some(seconds) = self.meter.remaining_seconds(progress.total_bytes) {
            text.push_str(&format!(", {} left", about(seconds)));
        }
        text
    }

    fn json(&self, progress: Progress) -> ProgressLine {
        ProgressLine {
            phase: phase_word(progress.phase),
            done_bytes: progress.done_bytes,
            total_bytes: progress.total_bytes,
            changed_bytes: progress.changed_bytes,
            bytes_per_second: self.meter.bytes_per_second(),
            remaining_seconds: self.meter.remaining_seconds(progress.total_bytes),
            elapsed_seconds: self.started.elapsed().as_secs_f64(),
        }
    }

    fn mention_signal(&mut self) {
        let Some(signal) = self.received.signal().filter(|_| !self.stopping_said) else {
            return;
        };
        self.stopping_said = true;
        self.aloud(&EventLine::Stopping { signal }, |output| {
            output.say(
                "stopping: closing the group under way; once more ends at once, which is safe too",
            );
        });
    }

    fn aloud(&self, line: &EventLine<'_>, say: impl FnOnce(&Output)) {
        self.above_the_bar(|output| {
            output.line("event", line);
            say(output);
        });
    }

    fn above_the_bar(&self, write: impl FnOnce(&Output)) {
        match &self.form {
            Form::Bar(bar) => bar.suspend(|| write(&self.output)),
            _ => write(&self.output),
        }
    }
}

/// The phase as one word of JSON.
fn phase_word(phase: Phase) -> String {
    phase.to_string().replace(' ', "_")
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate for people; never negative"
)]
fn whole(rate: f64) -> u64 {
    rate as u64
}

fn form(output: &Output, look: Look) -> Form {
    if output.is_json() {
        Form::Json
    } else if output.verbosity() == Verbosity::Quiet {
        Form::Silent
    } else if !stderr_is_terminal() {
        Form::Plain
    } else if look == Look::NoBar {
        Form::Silent
    } else {
        Form::Bar(bar())
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{prefix:>12} [{bar:24}] {percent:>3} % {wide_msg}")
        .expect("the template is constant and valid");
    bar.set_style(style.progress_chars("=> "));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    fn renderer() -> Renderer {
        let output = Arc::new(Output::new(false, Verbosity::Quiet));
        Renderer::new(output, Received::default(), Look::NoBar)
    }

    #[test]
    fn a_new_phase_starts_a_new_measurement() {
        let mut renderer = renderer();
        renderer.progress(Some(Progress::new(Phase::Scanning, 1000, 1000, 0)));
        renderer.progress(Some(Progress::new(Phase::Recovering, 0, 10, 0)));

        assert_eq!(renderer.meter.bytes_per_second(), None);
    }

    #[test]
    fn phases_are_one_word_in_json() {
        assert!(!phase_word(Phase::Scanning).contains(' '));
    }
}
