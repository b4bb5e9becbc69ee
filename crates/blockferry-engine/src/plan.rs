//! Choosing: predict both modes from a sample, decide mode and strategy, check the space.

use std::fmt;

use blockferry_core::format_size;
use blockferry_transfer_log::{Strategy, Undo};

use crate::error::{Error, ErrorKind, Result};
use crate::options::{Mode, SyncOptions};
use crate::sample::{Sample, round};

/// Above this share of changed pages a new file is cheaper than log and apply.
const SHADOW_SHARE: f64 = 1.0 / 3.0;
/// Logs need room for headers and for what a sample cannot see.
const LOG_MARGIN: f64 = 1.1;

/// What the planner knows of the target.
#[derive(Clone, Copy, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent facts, named where they are found"
)]
pub(crate) struct Situation {
    pub(crate) target_present: bool,
    /// A new file can be put in the target's place, which a point that is anchored forbids.
    pub(crate) can_replace: bool,
    /// And that file may begin as a clone of it.
    pub(crate) can_clone: bool,
    /// The target's content is proven and its manifest is at hand.
    pub(crate) target_known: bool,
    pub(crate) state_free_bytes: u64,
    pub(crate) target_free_bytes: u64,
}

/// The decision.
#[derive(Clone, Debug)]
pub(crate) struct Choice {
    pub(crate) mode: Mode,
    pub(crate) strategy: Strategy,
    pub(crate) reason: String,
    pub(crate) required_bytes: u64,
    pub(crate) available_bytes: u64,
}

impl Choice {
    pub(crate) fn fits(&self) -> bool {
        self.required_bytes <= self.available_bytes
    }
}

impl fmt::Display for Choice {
    /// The choice and its reason, which may begin with the strategy.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            mode,
            strategy,
            reason,
            ..
        } = self;
        if reason.starts_with(&strategy.to_string()) {
            write!(f, "{mode}, {reason}")
        } else {
            write!(f, "{mode}, {strategy}: {reason}")
        }
    }
}

/// Decides mode and strategy. Pure.
pub(crate) fn choose(options: &SyncOptions, found: Situation, sample: &Sample) -> Choice {
    let (mode, strategy, why) =
        decided(options, found).unwrap_or_else(|| predicted(options, found, sample));
    let reason = if found.target_present {
        format!("{}; {why}", facts(options, found, sample, strategy))
    } else {
        why
    };
    with_space(mode, strategy, reason, options, found, sample)
}

/// The choice where no sample could change it: it is decided, and there is room for the most it can need.
pub(crate) fn choose_unread(
    options: &SyncOptions,
    found: Situation,
    at_most: &Sample,
) -> Option<Choice> {
    let (mode, strategy, why) = decided(options, found)?;
    let choice = with_space(mode, strategy, why, options, found, at_most);
    Some(choice).filter(Choice::fits)
}

/// The choice where the source is on another machine. A comparison is worth it on nearly every link, and a new file would
/// take whole blocks across it; so a sample, which costs bytes, is taken only to predict. Without one, the space that is
/// needed shows when it is needed.
pub(crate) fn choose_remote(
    options: &SyncOptions,
    found: Situation,
    sample: Option<&Sample>,
) -> Choice {
    let delta = SyncOptions {
        mode: match options.mode {
            Mode::Auto => Mode::Delta,
            asked => asked,
        },
        ..options.clone()
    };
    let (mode, strategy, reason) = decided(&delta, found).unwrap_or_else(|| {
        let why = "redo: what is new goes to the log, the old file stays until it is decided";
        (delta.mode, Strategy::Redo, why.to_owned())
    });
    let nothing = Sample::default();
    let sample = sample.unwrap_or(&nothing);
    with_space(mode, strategy, reason, options, found, sample)
}

/// What the caller and the target leave to choose nothing of.
fn decided(options: &SyncOptions, found: Situation) -> Option<(Mode, Strategy, String)> {
    if !found.target_present {
        let why = "the target is absent: there is nothing to compare with".to_owned();
        return Some((Mode::Full, Strategy::Direct, why));
    }
    let (strategy, why) = match options.mode {
        Mode::Auto => return None,
        Mode::Full => full_strategy(options, found),
        Mode::Delta => asked_for(options).or_else(|| only_delta_strategy(found))?,
    };
    Some((options.mode, strategy, why))
}

/// What the predictions decide.
fn predicted(options: &SyncOptions, found: Situation, sample: &Sample) -> (Mode, Strategy, String) {
    let threads = options.threads();
    let (strategy, why) = delta_strategy(options, found, sample);
    let delta = sample.delta_seconds(threads, strategy, found.target_known);
    let full = sample.full_seconds(threads);
    // Only a new file can be written without a comparison; where blocks are shared the clone keeps them shared.
    let room = round(sample.data_bytes()) <= found.target_free_bytes;
    let may_replace = found.can_replace && !found.can_clone && room && strategy != Strategy::Direct;
    let mode = match options.mode {
        Mode::Auto if strategy == Strategy::Shadow || full < delta && may_replace => Mode::Full,
        Mode::Auto => Mode::Delta,
        asked => asked,
    };
    // What made a new file the better way is also the reason for the mode.
    let (strategy, why) = if mode == Mode::Full && strategy != Strategy::Shadow {
        full_strategy(options, found)
    } else {
        (strategy, why)
    };
    (mode, strategy, why)
}

fn facts(options: &SyncOptions, found: Situation, sample: &Sample, strategy: Strategy) -> String {
    let threads = options.threads();
    format!(
        "{:.1} % of the sampled data differs ({} of {}); predicted delta {:.2} s, full {:.2} s",
        sample.changed_share() * 100.0,
        format_size(round(sample.changed_bytes())),
        format_size(round(sample.data_bytes())),
        sample.delta_seconds(threads, strategy, found.target_known),
        sample.full_seconds(threads)
    )
}

/// The strategy the caller named, in either mode.
fn asked_for(options: &SyncOptions) -> Option<(Strategy, String)> {
    if let Some(asked) = options.strategy {
        return Some((asked, format!("{asked} as asked for")));
    }
    options.in_place.then(|| {
        let why = "in place as asked for: the old content is given up";
        (Strategy::Direct, why.to_owned())
    })
}

fn delta_strategy(options: &SyncOptions, found: Situation, sample: &Sample) -> (Strategy, String) {
    if let Some(decided) = asked_for(options).or_else(|| only_delta_strategy(found)) {
        return decided;
    }
    let much = sample.changed_share() > SHADOW_SHARE;
    if much && round(sample.data_bytes()) <= found.target_free_bytes {
        let why = "shadow: more than a third differs, so a new file costs less than log and apply";
        return (Strategy::Shadow, why.to_owned());
    }
    (
        Strategy::Redo,
        "redo: little differs, or there is no room for a second file".to_owned(),
    )
}

/// The strategy of a delta where the target allows one only.
fn only_delta_strategy(found: Situation) -> Option<(Strategy, String)> {
    if found.can_clone {
        let why = "clone: the file system shares unchanged blocks";
        return Some((Strategy::Clone, why.to_owned()));
    }
    let only_redo = (!found.can_replace).then(|| format!("redo: {NOT_REPLACED}"));
    only_redo.map(|why| (Strategy::Redo, why))
}

const NOT_REPLACED: &str = "nothing can be put in the target's place, as it is a device, its file system exchanges no names, or a \
                            point of it is anchored";

fn full_strategy(options: &SyncOptions, found: Situation) -> (Strategy, String) {
    if let Some(asked) = asked_for(options) {
        return asked;
    }
    if found.can_replace {
        return (
            Strategy::Shadow,
            "shadow: a complete new file beside the old one".to_owned(),
        );
    }
    (Strategy::Redo, format!("redo: {NOT_REPLACED}"))
}

fn with_space(
    mode: Mode,
    strategy: Strategy,
    reason: String,
    options: &SyncOptions,
    found: Situation,
    sample: &Sample,
) -> Choice {
    let staged = if mode == Mode::Full {
        sample.data_bytes()
    } else {
        sample.changed_bytes()
    };
    let copies = if options.undo == Undo::Keep { 2.0 } else { 1.0 };
    let (required, available_bytes) = match strategy {
        Strategy::Redo => (staged * copies * LOG_MARGIN, found.state_free_bytes),
        Strategy::Shadow => (sample.data_bytes(), found.target_free_bytes),
        Strategy::Direct if !found.target_present => (sample.data_bytes(), found.target_free_bytes),
        Strategy::Clone => (sample.changed_bytes(), found.target_free_bytes),
        Strategy::Direct => (0.0, found.state_free_bytes),
    };
    Choice {
        mode,
        strategy,
        reason,
        required_bytes: round(required),
        available_bytes,
    }
}

/// Refuses before the first byte a strategy that the target does not allow.
pub(crate) fn check_strategy(options: &SyncOptions, found: Situation) -> Result<()> {
    match options.strategy {
        Some(asked @ (Strategy::Clone | Strategy::Shadow))
            if found.target_present && !found.can_replace =>
        {
            let text = format!("{asked} as asked for: {NOT_REPLACED}; name redo, or none");
            Err(Error::new(ErrorKind::Target, text))
        }
        _ => Ok(()),
    }
}

/// Refuses before the first byte what cannot fit.
pub(crate) fn check_space(choice: &Choice) -> Result<()> {
    if choice.fits() {
        return Ok(());
    }
    let advice = match choice.strategy {
        Strategy::Redo => {
            "give the log more room (--state), keep no old point (--undo none), or give the old \
                           content up (--in-place)"
        }
        _ => "free space, or give the old content up (--in-place)",
    };
    Err(Error::new(
        ErrorKind::Target,
        format!(
            "{} needs about {}, {} are free: {advice}",
            choice.strategy,
            format_size(choice.required_bytes),
            format_size(choice.available_bytes)
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// 4 GiB of data, of which this share of the pages differs; comparing takes as long as `target_seconds` says.
    fn sample(share: f64, target_seconds: f64) -> Sample {
        Sample {
            blocks: 256,
            data_blocks: 256,
            data_pages: 4096,
            changed_pages: round(4096.0 * share),
            source_seconds: 0.01,
            target_seconds,
            digest_seconds: 0.01,
            weight: 256.0,
            block_bytes: 65536.0,
            ..Sample::default()
        }
    }

    fn file(target_free_bytes: u64) -> Situation {
        Situation {
            target_present: true,
            can_replace: true,
            can_clone: false,
            target_known: false,
            state_free_bytes: 100 * GIB,
            target_free_bytes,
        }
    }

    fn chosen(found: Situation, sample: &Sample) -> (Mode, Strategy, String) {
        let choice = choose(&SyncOptions::default(), found, sample);
        (choice.mode, choice.strategy, choice.reason)
    }

    #[test]
    fn a_large_change_gets_a_new_file_and_the_reason_says_so() {
        let (mode, strategy, reason) = chosen(file(100 * GIB), &sample(0.6, 0.01));

        assert_eq!((mode, strategy), (Mode::Full, Strategy::Shadow));
        assert!(
            reason.contains("60.0 %") && reason.contains("more than a third"),
            "{reason}"
        );
    }

    #[test]
    fn a_new_file_is_never_chosen_where_there_is_no_room_for_it() {
        for sample in [sample(0.6, 0.01), sample(0.01, 1e6)] {
            let (mode, strategy, _) = chosen(file(GIB), &sample);

            assert_eq!((mode, strategy), (Mode::Delta, Strategy::Redo));
        }
    }

    #[test]
    fn where_blocks_are_shared_they_stay_shared() {
        let found = Situation {
            can_clone: true,
            ..file(100 * GIB)
        };

        for sample in [sample(0.6, 0.01), sample(0.01, 1e6)] {
            let (mode, strategy, _) = chosen(found, &sample);

            assert_eq!((mode, strategy), (Mode::Delta, Strategy::Clone));
        }
    }

    #[test]
    fn a_comparison_that_takes_too_long_is_left_out() {
        let (mode, strategy, _) = chosen(file(100 * GIB), &sample(0.01, 1e6));

        assert_eq!((mode, strategy), (Mode::Full, Strategy::Shadow));
    }

    #[test]
    fn a_choice_names_its_strategy_once_at_the_front() {
        let full = SyncOptions {
            mode: Mode::Full,
            ..SyncOptions::default()
        };
        let sample = sample(0.1, 0.01);

        let unread = choose_unread(&full, file(100 * GIB), &sample).expect("nothing to choose");
        let sampled = choose(&full, file(100 * GIB), &sample);

        assert_eq!(
            unread.to_string(),
            "full, shadow: a complete new file beside the old one"
        );
        let front = "full, shadow: 10.0 % of the sampled data differs";
        assert!(sampled.to_string().starts_with(front), "{sampled}");
    }

    #[test]
    fn a_device_is_never_exchanged() {
        let found = Situation {
            can_replace: false,
            ..file(0)
        };

        let (_, strategy, _) = chosen(found, &sample(0.9, 1e6));

        assert_eq!(strategy, Strategy::Redo);
        for (asked, is_refused) in [
            (None, false),
            (Some(Strategy::Redo), false),
            (Some(Strategy::Direct), false),
            (Some(Strategy::Clone), true),
            (Some(Strategy::Shadow), true),
        ] {
            let options = SyncOptions {
                strategy: asked,
                ..SyncOptions::default()
            };

            let checked = check_strategy(&options, found);

            assert_eq!(checked.is_err(), is_refused, "{asked:?}");
            check_strategy(&options, file(0)).expect("a file is exchanged");
        }
    }

    #[test]
    fn what_cannot_fit_is_refused_with_a_way_out() {
        let found = Situation {
            state_free_bytes: GIB,
            ..file(GIB)
        };

        let error = check_space(&choose(&SyncOptions::default(), found, &sample(0.9, 0.01)));

        let message = error.expect_err("4 GiB do not fit").to_string();
        assert!(
            message.contains("--in-place") && message.contains("--state"),
            "{message}"
        );
    }
}
