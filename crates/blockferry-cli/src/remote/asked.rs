//! What the far end of a sync is asked to do: the options of the command line that matter there.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::arguments::{ModeArgument, Pace, StrategyArgument, SyncArguments, UndoArgument};
use crate::engine::{Attempt, BlockSize, SyncOptions};
use crate::verbs::sync::paced;

/// As it travels: what is not said is as usual, and what a far end does not know it refuses, for it would not be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each one is a flag of the command line contract"
)]
pub(crate) struct Asked {
    /// A connection for the same was lost: the far end of that one may still be there for a moment.
    pub(crate) reconnecting: bool,
    #[serde(with = "attempt")]
    pub(crate) attempt: Option<Attempt>,
    pub(crate) pace: Pace,
    /// Where a target's host finds its source again, for people.
    source_address: String,
    /// Where the state of the target is, as text or URL.
    pub(crate) state: Option<String>,
    mode: ModeArgument,
    strategy: Option<StrategyArgument>,
    undo: UndoArgument,
    #[serde(serialize_with = "bytes_of", deserialize_with = "block_size_of")]
    block_size: BlockSize,
    allow_shrink: bool,
    in_place: bool,
    strict: bool,
    rescan: bool,
    /// Nothing is written: what would be done is told instead.
    pub(crate) dry_run: bool,
}

impl Default for Asked {
    fn default() -> Self {
        Self {
            reconnecting: false,
            attempt: None,
            pace: Pace::default(),
            source_address: String::new(),
            state: None,
            mode: ModeArgument::default(),
            strategy: None,
            undo: UndoArgument::default(),
            block_size: BlockSize::DEFAULT,
            allow_shrink: false,
            in_place: false,
            strict: false,
            rescan: false,
            dry_run: false,
        }
    }
}

fn bytes_of<S: Serializer>(size: &BlockSize, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(size.bytes())
}

fn block_size_of<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BlockSize, D::Error> {
    BlockSize::new(u64::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

/// The run in hexadecimal digits, and whether this is not its first attempt.
mod attempt {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::engine::{Attempt, SessionId};

    pub(super) fn serialize<S: Serializer>(
        attempt: &Option<Attempt>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let told = attempt.map(|attempt| (attempt.run.to_string(), attempt.is_another));
        told.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Attempt>, D::Error> {
        let told: Option<(String, bool)> = Deserialize::deserialize(deserializer)?;
        let attempt = |(run, is_another): (String, bool)| {
            let run = SessionId::from_hex(&run)
                .ok_or_else(|| serde::de::Error::custom(format!("no id of a run: {run}")))?;
            Ok(Attempt::new(run, is_another))
        };
        told.map(attempt).transpose()
    }
}

/// A far end that is older need not know an option that nobody asked for.
fn leave_out_usual(told: &mut Value, usual: &Value) {
    let (Value::Object(told), Value::Object(usual)) = (told, usual) else {
        return;
    };
    told.retain(|key, value| {
        let usual = usual.get(key).unwrap_or(&Value::Null);
        let differs = value != usual;
        leave_out_usual(value, usual);
        differs
    });
}

impl Asked {
    /// Of the host that has the source.
    pub(crate) fn of_source(pace: &Pace) -> Self {
        Self {
            pace: pace.clone(),
            ..Self::default()
        }
    }

    /// Of the host that has the target.
    pub(crate) fn of_target(
        arguments: &SyncArguments,
        source_address: String,
        state: Option<String>,
    ) -> Self {
        Self {
            reconnecting: false,
            attempt: None,
            pace: arguments.pace.clone(),
            source_address,
            state,
            mode: arguments.mode,
            strategy: arguments.strategy,
            undo: arguments.undo,
            block_size: arguments.block_size,
            allow_shrink: arguments.allow_shrink,
            in_place: arguments.in_place,
            strict: arguments.strict,
            rescan: arguments.rescan,
            dry_run: arguments.dry_run,
        }
    }

    /// Options that give something up, as [`Self::dangers`] calls them.
    pub(crate) const DANGERS: [&str; 5] = [
        "in-place",
        "allow-shrink",
        "undo-none",
        "no-read-back",
        "crash-consistent",
    ];

    /// Which of them are asked for.
    pub(crate) fn dangers(&self) -> impl Iterator<Item = &'static str> {
        let asked = [
            self.in_place,
            self.allow_shrink,
            self.undo == UndoArgument::None,
            self.pace.no_read_back,
            self.pace.crash_consistent,
        ];
        let dangers = Self::DANGERS.into_iter().zip(asked);
        dangers.filter_map(|(danger, is_asked)| is_asked.then_some(danger))
    }

    pub(crate) fn to_json(&self) -> Vec<u8> {
        let value = |asked: &Self| serde_json::to_value(asked).expect("string keys only");
        let mut told = value(self);
        leave_out_usual(&mut told, &value(&Self::default()));
        told.to_string().into_bytes()
    }

    /// What was asked, or what is wrong with it.
    pub(crate) fn from_json(json: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(json).map_err(|error| error.to_string())
    }

    /// As the engine takes them.
    pub(crate) fn options(&self) -> SyncOptions {
        let mut options = paced(self.source_address.clone(), &self.pace);
        options.mode = self.mode.into();
        options.block_size = self.block_size;
        options.undo = self.undo.into();
        options.allow_shrink = self.allow_shrink;
        options.in_place = self.in_place;
        options.strict = self.strict;
        options.rescan = self.rescan;
        options.strategy = self.strategy.map(Into::into);
        options.attempt = self.attempt;
        options
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::arguments::{Cli, Verb};
    use crate::engine::SessionId;

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
                    --log-limit 1G --no-read-back --allow-shrink --strict --rescan --in-place --dry-run";
        let mut asked = asked(line);
        asked.attempt = Some(Attempt::new(SessionId::from_bytes([7; 16]), true));

        let arrived = Asked::from_json(&asked.to_json()).expect("what was sent");

        assert_eq!(arrived, asked);
        let options = arrived.options();
        let usual = SyncOptions::default();
        let (found, usual) = (format!("{options:#?}"), format!("{usual:#?}"));
        let same: Vec<&str> = found
            .lines()
            .filter(|line| line.ends_with(',') && line.contains(": ") && usual.contains(line))
            .collect();
        let of_the_library = [
            "    changes: None,",
            "    expected_root: None,",
            "    check: None,",
        ];
        assert_eq!(same, of_the_library, "what was not asked for");
    }

    #[test]
    fn what_is_not_said_is_as_usual() {
        let arrived = Asked::from_json(b"{}").expect("nothing");

        assert_eq!(arrived, Asked::default());
        assert_eq!(arrived.to_json(), b"{}");
        let threads = asked("sync a h:b --threads 3");
        let told = br#"{"pace":{"threads":3},"source_address":"pushed://a/b","state":"/s"}"#;
        assert_eq!(threads.to_json(), told, "and nothing that is usual");
        let options = arrived.options();
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
            b"{\"pace\":{\"threads\":-1}}",
            b"{\"pace\":{\"sparse_levels\":1}}",
            b"{\"block_size\":5}",
            b"{\"attempt\":[\"12\",true]}",
        ] {
            Asked::from_json(json).expect_err("unknown");
        }
        let error = Asked::from_json(b"{\"sparse_levels\":1}").expect_err("unknown");
        assert!(error.contains("sparse_levels"), "{error}");
    }
}
