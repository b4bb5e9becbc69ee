//! What the far end of a sync is asked to do: the options of the command line that matter there.

use serde::{Deserialize, Serialize};

use crate::arguments::{ModeArgument, Pace, StrategyArgument, SyncArguments, UndoArgument};
use crate::engine::{BlockSize, Proof, SyncOptions};

/// As it travels: what is not said is as usual, and what a far end does not know it refuses, for it would not be done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each one is a flag of the command line contract"
)]
pub(crate) struct Asked {
    /// A connection for the same was lost: the far end of that one may still be there for a moment.
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) reconnecting: bool,
    #[serde(skip_serializing_if = "is_default")]
    crash_consistent: bool,
    #[serde(skip_serializing_if = "is_default")]
    threads: Option<u16>,
    /// Where a target's host finds its source again, for people.
    #[serde(skip_serializing_if = "is_default")]
    source_address: String,
    /// Where the state of the target is, as text or URL.
    #[serde(skip_serializing_if = "is_default")]
    state: Option<String>,
    #[serde(skip_serializing_if = "is_default")]
    mode: Option<ModeArgument>,
    #[serde(skip_serializing_if = "is_default")]
    strategy: Option<StrategyArgument>,
    #[serde(skip_serializing_if = "is_default")]
    undo: Option<UndoArgument>,
    /// In bytes.
    #[serde(skip_serializing_if = "is_default")]
    block_size: Option<u64>,
    /// In bytes per second.
    #[serde(skip_serializing_if = "is_default")]
    bwlimit: Option<u64>,
    /// In bytes.
    #[serde(skip_serializing_if = "is_default")]
    log_limit: Option<u64>,
    #[serde(skip_serializing_if = "is_default")]
    no_read_back: bool,
    #[serde(skip_serializing_if = "is_default")]
    allow_shrink: bool,
    #[serde(skip_serializing_if = "is_default")]
    in_place: bool,
    #[serde(skip_serializing_if = "is_default")]
    strict: bool,
    #[serde(skip_serializing_if = "is_default")]
    rescan: bool,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Asked {
    /// Of the host that has the source.
    pub(crate) fn of_source(pace: &Pace) -> Self {
        Self {
            crash_consistent: pace.crash_consistent,
            threads: pace.threads,
            ..Self::default()
        }
    }

    /// Of the host that has the target.
    pub(crate) fn of_target(
        arguments: &SyncArguments,
        source_address: String,
        state: Option<String>,
    ) -> Self {
        let pace = &arguments.pace;
        Self {
            reconnecting: false,
            crash_consistent: false,
            threads: pace.threads,
            source_address,
            state,
            mode: Some(arguments.mode),
            strategy: arguments.strategy,
            undo: Some(arguments.undo),
            block_size: Some(arguments.block_size.bytes()),
            bwlimit: pace.bwlimit,
            log_limit: pace.log_limit,
            no_read_back: pace.no_read_back,
            allow_shrink: arguments.allow_shrink,
            in_place: arguments.in_place,
            strict: arguments.strict,
            rescan: arguments.rescan,
        }
    }

    pub(crate) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("options have string keys only")
    }

    /// What was asked, or what is wrong with it.
    pub(crate) fn from_json(json: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(json).map_err(|error| error.to_string())
    }

    pub(crate) fn crash_consistent(&self) -> bool {
        self.crash_consistent
    }

    pub(crate) fn threads(&self) -> Option<usize> {
        self.threads.map(usize::from)
    }

    /// Where the state of the target is, as text or URL.
    pub(crate) fn state(&self) -> Option<&str> {
        self.state.as_deref()
    }

    /// As the engine takes them.
    pub(crate) fn options(&self) -> Result<SyncOptions, String> {
        let mut options = SyncOptions::default();
        options.threads = self.threads();
        options.source_address.clone_from(&self.source_address);
        options.bwlimit_bytes_per_second = self.bwlimit;
        options.log_limit_bytes = self.log_limit;
        if self.no_read_back {
            options.proof = Proof::Flush;
        }
        if let Some(mode) = self.mode {
            options.mode = mode.into();
        }
        if let Some(undo) = self.undo {
            options.undo = undo.into();
        }
        if let Some(bytes) = self.block_size {
            options.block_size = BlockSize::new(bytes).map_err(|error| error.to_string())?;
        }
        options.strategy = self.strategy.map(Into::into);
        options.allow_shrink = self.allow_shrink;
        options.in_place = self.in_place;
        options.strict = self.strict;
        options.rescan = self.rescan;
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::arguments::{Cli, Verb};

    fn asked(line: &str) -> Asked {
        let words = ["blockferry"].into_iter().chain(line.split(' '));
        match Cli::try_parse_from(words).expect(line).verb {
            Verb::Sync(arguments) => {
                Asked::of_target(&arguments, "pushed://a/b".to_owned(), Some("/s".to_owned()))
            }
            verb => panic!("{verb:?}"),
        }
    }

    #[test]
    fn every_option_arrives() {
        let line = "sync a h:b --mode full --strategy shadow --undo none --block-size 16KiB --bwlimit 1M --threads 3 \
                    --log-limit 1G --no-read-back --allow-shrink --strict --rescan --in-place";
        let asked = asked(line);

        let arrived = Asked::from_json(&asked.to_json()).expect("what was sent");

        assert_eq!(arrived, asked);
        let options = arrived.options().expect("sound");
        let usual = SyncOptions::default();
        let (found, usual) = (format!("{options:#?}"), format!("{usual:#?}"));
        let same: Vec<&str> = found
            .lines()
            .filter(|line| line.ends_with(',') && line.contains(": ") && usual.contains(line))
            .collect();
        assert_eq!(same, ["    changes: None,"], "what was not asked for");
    }

    #[test]
    fn what_is_not_said_is_as_usual() {
        let arrived = Asked::from_json(b"{}").expect("nothing");

        assert_eq!(arrived, Asked::default());
        let options = arrived.options().expect("nothing");
        assert_eq!(
            format!("{options:?}"),
            format!("{:?}", SyncOptions::default())
        );
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        for json in [
            &b"{\"sparse_levels\":1}"[..],
            b"{\"mode\":\"magic\"}",
            b"[",
            b"{\"threads\":-1}",
        ] {
            Asked::from_json(json).expect_err("unknown");
        }
        let error = Asked::from_json(b"{\"sparse_levels\":1}").expect_err("unknown");
        assert!(error.contains("sparse_levels"), "{error}");
        let size = Asked::from_json(b"{\"block_size\":5}").expect("a number");
        size.options().expect_err("no block size");
    }
}
