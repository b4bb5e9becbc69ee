//! The log of a server: tracing events, each a line of text for people or of JSON.

use std::fmt::{self, Write};
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::output::{Output, Verbosity};

/// From now on, what this process traces goes to `output`.
pub(super) fn begin(output: &Arc<Output>) {
    let log = Log {
        output: Arc::clone(output),
    };
    // Whoever was there first hears it.
    tracing::subscriber::set_global_default(log).ok();
}

#[derive(Debug)]
struct Log {
    output: Arc<Output>,
}

#[derive(Serialize)]
struct Line<'a> {
    time: &'a str,
    level: &'a str,
    message: &'a str,
    #[serde(flatten)]
    fields: &'a Map<String, Value>,
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let most = match self.output.verbosity() {
            Verbosity::Quiet => Level::WARN,
            Verbosity::Normal => Level::INFO,
            Verbosity::Verbose => Level::DEBUG,
        };
        *metadata.level() <= most
    }

    // Each line says all that it is about: there are no spans.
    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut told = Told::default();
        event.record(&mut told);
        let time = OffsetDateTime::now_utc();
        let time = time.replace_nanosecond(0).unwrap_or(time);
        let time = time.format(&Rfc3339).unwrap_or_default();
        let level = event.metadata().level().as_str();
        self.output.line(
            "log",
            &Line {
                time: &time,
                level: &level.to_ascii_lowercase(),
                message: &told.message,
                fields: &told.fields,
            },
        );
        let mut text = format!("{time} {level:5} {}", told.message);
        for (name, value) in &told.fields {
            // Texts with blanks are quoted, as every value is in JSON.
            match value {
                Value::String(plain) if plain.chars().all(|c| c.is_ascii_graphic() && c != '"') => {
                    write!(text, " {name}={plain}").ok();
                }
                value => {
                    write!(text, " {name}={value}").ok();
                }
            }
        }
        self.output.answer(text);
    }
}

/// What one event says.
#[derive(Debug, Default)]
struct Told {
    message: String,
    fields: Map<String, Value>,
}

impl Visit for Told {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.fields.insert(field.name().to_owned(), value.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.insert(field.name().to_owned(), value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = text;
        } else {
            self.fields.insert(field.name().to_owned(), text.into());
        }
    }
}
