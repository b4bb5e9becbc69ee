//! `diff A B`: the extents that differ, as data.

use serde::Serialize;

use crate::arguments::DiffArguments;
use crate::engine::{self, Extent, format_size};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::stdout_is_terminal;
use crate::progress::Look;
use crate::session::Session;

#[derive(Serialize)]
struct Difference {
    event: &'static str,
    start: u64,
    length: u64,
}

pub(crate) fn run(arguments: &DiffArguments, session: &Session) -> Result<Exit, Failure> {
    let a = super::open(&arguments.a, true)?;
    let b = super::open(&arguments.b, true)?;
    let look = if stdout_is_terminal() {
        Look::NoBar
    } else {
        Look::Bar
    };
    let (context, display) = session.context(look);
    let outcome = engine::compare(&a, &b, &context, &mut |extent| list(extent, session));
    drop(display);
    if session.output.reader_left() {
        // Whoever read the list has seen enough; that a difference was found is why it was written to.
        return Ok(Exit::Differs);
    }
    let comparison = outcome.map_err(|error| session.failure(&error))?;
    session.output.summary("diff", &comparison);
    session.output.say(describe(&comparison));
    Ok(if comparison.equal {
        Exit::Done
    } else {
        Exit::Differs
    })
}

fn list(extent: Extent, session: &Session) {
    let (start, length) = (extent.start(), extent.length());
    session.output.data(format_args!("{start} {length}"));
    session.output.line(
        "event",
        &Difference {
            event: "difference",
            start,
            length,
        },
    );
    if session.output.reader_left() {
        session.stop();
    }
}

/// One line about a comparison; `verify A B` says the same.
pub(crate) fn describe(comparison: &engine::Comparison) -> String {
    let compared = format_size(comparison.compared_bytes);
    if comparison.equal {
        return format!("equal: {compared} compared");
    }
    let different = format_size(comparison.different_bytes);
    let mut text = format!("different: {different} of {compared} compared");
    if comparison.size_a != comparison.size_b {
        text.push_str(&format!(
            "; the sizes differ too ({} and {} bytes)",
            comparison.size_a, comparison.size_b
        ));
    }
    text
}
