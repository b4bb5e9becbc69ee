//! A verb that failed: the exit, the whole chain of causes on one line, and what to do next.

use std::error::Error;

use crate::exit::Exit;

/// Ends a verb. Shown as one error (text or JSON) and mapped to the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    exit: Exit,
    message: String,
    hints: Vec<String>,
    resumable: bool,
}

impl Failure {
    /// A failure told in our own words.
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
            hints: Vec::new(),
            resumable: false,
        }
    }

    /// A failure with its causes, joined by `": "`.
    pub(crate) fn from_error(exit: Exit, error: &(dyn Error + 'static)) -> Self {
        Self::new(exit, chain(error))
    }

    /// A source that cannot be opened or read.
    pub(crate) fn source(error: &(dyn Error + 'static)) -> Self {
        Self::from_error(Exit::Source, error)
    }

    /// Adds a line that says what to do next.
    pub(crate) fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// States whether the same command would continue where this one stopped.
    pub(crate) fn resumable(mut self, resumable: bool) -> Self {
        self.resumable = resumable;
        self
    }

    pub(crate) fn exit(&self) -> Exit {
        self.exit
    }

    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    pub(crate) fn hints(&self) -> &[String] {
        &self.hints
    }

    pub(crate) fn is_resumable(&self) -> bool {
        self.resumable
    }
}

/// The error and its causes on one line; a cause that the text before it already ends with is not repeated.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use super::*;

    #[derive(Debug)]
    struct Layer(&'static str, Option<Box<Self>>);

    impl fmt::Display for Layer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Layer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_ref().map(|inner| inner.as_ref() as _)
        }
    }

    #[test]
    fn causes_follow_the_message_in_order() {
        let inner = Layer("no such file", None);
        let middle = Layer("open of a.raw", Some(Box::new(inner)));
        let outer = Layer("cannot read the source", Some(Box::new(middle)));

        assert_eq!(
            chain(&outer),
            "cannot read the source: open of a.raw: no such file"
        );
    }

    #[test]
    fn a_cause_that_was_already_told_is_not_repeated() {
        let outer = Layer(
            "open: no such file",
            Some(Box::new(Layer("no such file", None))),
        );

        assert_eq!(chain(&outer), "open: no such file");
    }
}
