//! Words for people: times, ages, aligned facts.

use std::fmt;

use crate::output::Output;

/// `0.42 s`, `12.3 s`, `4 min 05 s`, `2 h 07 min`.
pub(crate) fn duration(seconds: f64) -> String {
    if seconds < 10.0 {
        return format!("{seconds:.2} s");
    }
    if seconds < 99.5 {
        return format!("{seconds:.1} s");
    }
    let whole = whole_seconds(seconds);
    if whole < 3600 {
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else {
        format!("{} h {:02} min", whole / 3600, whole / 60 % 60)
    }
}

/// A time nobody knows better than to the second: `3 s`, `4 min 05 s`.
pub(crate) fn about(seconds: f64) -> String {
    if seconds < 99.5 {
        format!("{seconds:.0} s")
    } else {
        duration(seconds)
    }
}

/// `just now`, `4 minutes ago`, `3 days ago`.
pub(crate) fn age(seconds: u64) -> String {
    const UNITS: [(u64, &str); 4] = [
        (86400 * 7, "week"),
        (86400, "day"),
        (3600, "hour"),
        (60, "minute"),
    ];
    for (unit, name) in UNITS {
        // Two of a unit before it is used: "36 hours ago" says more than "1 day ago".
        if seconds >= 2 * unit || (unit == 60 && seconds >= 60) {
            let count = seconds / unit;
            let plural = if count == 1 { "" } else { "s" };
            return format!("{count} {name}{plural} ago");
        }
    }
    "just now".to_owned()
}

/// Bytes per second as text; nothing for an instant.
pub(crate) fn rate(bytes: u64, seconds: f64) -> Option<u64> {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rate for people; never negative"
    )]
    (seconds > 0.001).then(|| (bytes as f64 / seconds) as u64)
}

/// The first twelve digits of an id or digest: enough for people to compare.
pub(crate) fn short(hex: &str) -> &str {
    hex.get(..12).unwrap_or(hex)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a time for people; never negative"
)]
fn whole_seconds(seconds: f64) -> u64 {
    seconds.round() as u64
}

/// Label and value, aligned in one column under a headline.
#[derive(Debug, Default)]
pub(crate) struct Facts(Vec<(&'static str, String)>);

impl Facts {
    pub(crate) fn add(&mut self, label: &'static str, value: impl fmt::Display) {
        self.0.push((label, value.to_string()));
    }

    pub(crate) fn add_some(&mut self, label: &'static str, value: Option<impl fmt::Display>) {
        if let Some(value) = value {
            self.add(label, value);
        }
    }

    /// Says them at normal verbosity.
    pub(crate) fn say(&self, output: &Output) {
        self.lines().for_each(|line| output.say(line));
    }

    /// Says them even when quiet: they are the answer.
    pub(crate) fn answer(&self, output: &Output) {
        self.lines().for_each(|line| output.answer(line));
    }

    fn lines(&self) -> impl Iterator<Item = String> {
        let width = self
            .0
            .iter()
            .map(|(label, _)| label.len())
            .max()
            .unwrap_or(0);
        self.0
            .iter()
            .map(move |(label, value)| format!("  {label:<width$}  {value}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_keep_about_three_digits() {
        for (seconds, text) in [
            (0.0, "0.00 s"),
            (0.418, "0.42 s"),
            (12.34, "12.3 s"),
            (99.6, "1 min 40 s"),
            (245.0, "4 min 05 s"),
            (7620.0, "2 h 07 min"),
        ] {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn ages_use_the_largest_unit_that_still_says_something() {
        for (seconds, text) in [
            (0, "just now"),
            (59, "just now"),
            (60, "1 minute ago"),
            (7199, "119 minutes ago"),
            (7200, "2 hours ago"),
            (86400 * 3, "3 days ago"),
            (86400 * 30, "4 weeks ago"),
        ] {
            assert_eq!(age(seconds), text);
        }
    }

    #[test]
    fn facts_are_aligned() {
        let mut facts = Facts::default();
        facts.add("a", 1);
        facts.add("long", 2);

        assert_eq!(
            facts.lines().collect::<Vec<_>>(),
            ["  a     1", "  long  2"]
        );
    }
}
