//! Everything that people may be shown must come out as text, whatever the bytes were that it is about.

use std::error::Error;
use std::fmt::{Debug, Write};

/// An error as a log has it: the message, its causes, and the form for developers.
pub fn of_error(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        write!(text, ": {next}").expect("a string takes everything");
        cause = next.source();
    }
    assert!(!text.is_empty(), "an error says what happened");
    write!(text, " ({error:?})").expect("a string takes everything");
    text
}

/// A result as a log has it.
pub fn of_result<T: Debug, E: Error>(result: &Result<T, E>) -> String {
    match result {
        Ok(value) => format!("{value:?}"),
        Err(error) => of_error(error),
    }
}
