//! What a machine has: its nodes with their bitmaps, its jobs, its exports.

use blockferry_device::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use crate::qmp::Qmp;

/// A node of QEMU's block graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) name: String,
    /// As `raw` or `qcow2`.
    pub(crate) driver: String,
    pub(crate) size_bytes: u64,
    pub(crate) bitmaps: Vec<Bitmap>,
}

/// A dirty bitmap of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bitmap {
    pub(crate) name: String,
    /// It takes note of writes.
    pub(crate) is_recording: bool,
    /// QEMU died while it was in use: what it says is worth nothing.
    pub(crate) is_inconsistent: bool,
    /// What it calls dirty.
    pub(crate) dirty_bytes: u64,
}

pub(crate) fn nodes(qmp: &mut Qmp) -> Result<Vec<Node>> {
    let found = qmp.execute("query-named-block-nodes", json!({"flat": true}))?;
    list(&found, "query-named-block-nodes")?
        .iter()
        .map(node)
        .collect()
}

fn node(value: &Value) -> Result<Node> {
    let bitmaps = value.get("dirty-bitmaps").and_then(Value::as_array);
    Ok(Node {
        name: text(value, "node-name")?,
        driver: text(value, "drv")?,
        size_bytes: value
            .pointer("/image/virtual-size")
            .and_then(Value::as_u64)
            .unwrap_or(0),
        bitmaps: bitmaps
            .into_iter()
            .flatten()
            // A bitmap without a name belongs to a job of QEMU's own.
            .filter(|bitmap| bitmap.get("name").is_some())
            .map(bitmap)
            .collect::<Result<_>>()?,
    })
}

fn bitmap(value: &Value) -> Result<Bitmap> {
    let is = |name: &str| value.get(name).and_then(Value::as_bool).unwrap_or(false);
    Ok(Bitmap {
        name: text(value, "name")?,
        is_recording: is("recording"),
        is_inconsistent: is("inconsistent"),
        dirty_bytes: value.get("count").and_then(Value::as_u64).unwrap_or(0),
    })
}

/// The ids of all exports.
pub(crate) fn exports(qmp: &mut Qmp) -> Result<Vec<String>> {
    let found = qmp.execute("query-block-exports", json!({}))?;
    let all = list(&found, "query-block-exports")?;
    all.iter().map(|export| text(export, "id")).collect()
}

/// The ids of all jobs.
pub(crate) fn jobs(qmp: &mut Qmp) -> Result<Vec<String>> {
    let found = qmp.execute("query-jobs", json!({}))?;
    let all = list(&found, "query-jobs")?;
    all.iter().map(|job| text(job, "id")).collect()
}

/// The ids of the jobs that do what they are for.
pub(crate) fn running_jobs(qmp: &mut Qmp) -> Result<Vec<String>> {
    let found = qmp.execute("query-jobs", json!({}))?;
    let running = list(&found, "query-jobs")?.iter().filter(|job| {
        let status = job.get("status").and_then(Value::as_str);
        status == Some("running") && job.get("error").is_none()
    });
    running.map(|job| text(job, "id")).collect()
}

fn list<'v>(value: &'v Value, command: &str) -> Result<&'v Vec<Value>> {
    value.as_array().ok_or_else(|| {
        let text = format!("QMP command {command}: expected a list, found something else");
        Error::new(ErrorKind::Unsuitable, text)
    })
}

fn text(value: &Value, field: &str) -> Result<String> {
    let found = value.get(field).and_then(Value::as_str);
    found.map(ToOwned::to_owned).ok_or_else(|| {
        let text = format!("an answer of QEMU lacks the text {field:?}");
        Error::new(ErrorKind::Unsuitable, text)
    })
}
