//! Receipts: what a run proved and what it cost. They serialise to the summary of the command line.

use std::borrow::Cow;
use std::collections::BTreeMap;

use blockferry_transfer_log::Strategy;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::options::Mode;

/// Version of the receipt's fields.
pub const RECEIPT_VERSION: u32 = 1;

/// The receipt of a completed sync.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Receipt {
    /// Version of these fields.
    pub version: u32,
    /// `applied`, or `identical` when nothing had to be written.
    pub outcome: Cow<'static, str>,
    /// The mode that ran.
    pub mode: Mode,
    /// The mode that was asked for.
    pub requested_mode: Mode,
    /// How the target was brought to the new point; nothing for an identical pair.
    #[serde(serialize_with = "strategy_name", deserialize_with = "named_strategy")]
    pub strategy: Option<Strategy>,
    /// Why this mode and strategy, with the numbers.
    pub reason: String,
    /// The source.
    pub source: String,
    /// The target.
    pub target: String,
    /// What the source's content was consistent with, where a provider of points said so.
    pub consistency: Option<String>,
    /// Size of the image.
    pub source_bytes: u64,
    /// Bytes read from the source.
    pub scanned_bytes: u64,
    /// Bytes read from the target to compare.
    pub target_read_bytes: u64,
    /// Bytes of 4 KiB pages that differed; unknown where nothing was compared.
    pub changed_bytes: Option<u64>,
    /// Bytes that crossed from source to target in this run.
    pub sent_bytes: u64,
    /// New data made durable in this run.
    pub staged_bytes: u64,
    /// New data that was durable when this run began.
    pub resumed_bytes: u64,
    /// Durable data that was staged again all the same. Always 0.
    pub restaged_bytes: u64,
    /// Bytes written to the transfer log.
    pub log_bytes: u64,
    /// Bytes that became zeros.
    pub zero_bytes: u64,
    /// `read-back`: what was written was read back from the medium; `flush`: the flush was believed.
    pub proof: Cow<'static, str>,
    /// Bytes read back from the target's medium and proven.
    pub proven_bytes: u64,
    /// Root of the source, hexadecimal.
    pub source_root: String,
    /// Root of the target, hexadecimal: equal, or the run failed.
    pub target_root: String,
    /// The point the target is at now.
    pub sync_point: String,
    /// The point it was at, if a known one.
    pub previous_point: Option<String>,
    /// Whether the old point can be returned to.
    pub rollback_available: bool,
    /// Flushes of files, directories and the target.
    pub flushes: u64,
    /// Records written.
    pub records: u64,
    /// What was hoped for and did not work.
    pub fallbacks: Vec<String>,
    /// Whole run.
    pub elapsed_seconds: f64,
    /// Only a live cutover has one.
    pub downtime_seconds: Option<f64>,
    /// Seconds of each phase the run had: `sampling`, `scanning`, `preparing`, `committing`, `applying`, `proving`. The
    /// last counts what was not proven beside the writing.
    pub phases: BTreeMap<String, f64>,
}

impl Receipt {
    /// As JSON of at most so many bytes: what was hoped for in vain is told as far as there is room.
    pub(crate) fn to_json(&self, most: usize) -> Vec<u8> {
        let mut told = self.clone();
        loop {
            let json = serde_json::to_vec(&told).unwrap_or_default();
            if json.len() <= most || told.fallbacks.pop().is_none() {
                return json;
            }
        }
    }
}

/// What became of an unfinished or completed sync.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Outcome {
    /// `cancelled`, `rolled_back`, `accepted`, `applied` or `nothing_to_do`.
    pub outcome: &'static str,
    /// The target.
    pub target: String,
    /// The point it is at now, if a known one.
    pub point: Option<String>,
    /// Bytes given back.
    pub freed_bytes: u64,
    /// Time taken.
    pub elapsed_seconds: f64,
    /// For people.
    pub message: String,
}

/// What a sync would do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Prediction {
    /// The mode that would run.
    pub mode: Mode,
    /// The strategy that would be used; nothing if both sides look identical.
    #[serde(serialize_with = "strategy_name", deserialize_with = "named_strategy")]
    pub strategy: Option<Strategy>,
    /// Why.
    pub reason: String,
    /// Size of the image.
    pub source_bytes: u64,
    /// Bytes of data in it, estimated.
    pub data_bytes: u64,
    /// Bytes of pages that differ, estimated from the sample.
    pub predicted_changed_bytes: u64,
    /// Bytes that cross the wire to the target's host, estimated; nothing where both disks are on one.
    pub predicted_wire_bytes: Option<u64>,
    /// Seconds of a delta sync, estimated.
    pub delta_seconds: f64,
    /// Seconds of a full download, estimated.
    pub full_seconds: f64,
    /// Seconds of the chosen one, estimated.
    pub predicted_seconds: f64,
    /// Bytes it needs beside the target.
    pub required_bytes: u64,
    /// Bytes that are free there.
    pub available_bytes: u64,
    /// Whether it fits.
    pub fits: bool,
    /// Blocks that were sampled.
    pub sampled_blocks: u64,
}

impl Prediction {
    /// As it travels.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }
}

pub(crate) fn strategy_name<S: Serializer>(
    strategy: &Option<Strategy>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match strategy {
        Some(strategy) => serializer.collect_str(strategy),
        None => serializer.serialize_none(),
    }
}

fn named_strategy<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Strategy>, D::Error> {
    let name: Option<Cow<'de, str>> = Deserialize::deserialize(deserializer)?;
    let all = [
        Strategy::Clone,
        Strategy::Shadow,
        Strategy::Redo,
        Strategy::Direct,
    ];
    let named = |name: Cow<'de, str>| {
        let found = all.into_iter().find(|one| one.to_string() == name);
        found.ok_or_else(|| serde::de::Error::custom(format!("unknown strategy {name:?}")))
    };
    name.map(named).transpose()
}
