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
    /// What it lies in, as QEMU names it: a path, if it is a local file.
    pub(crate) file: String,
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
        file: text(value, "file").unwrap_or_default(),
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

/// Whether a device of the guest has this node.
pub(crate) fn is_of_a_device(qmp: &mut Qmp, node: &str) -> Result<bool> {
    let found = qmp.execute("query-block", json!({}))?;
    let mut devices = list(&found, "query-block")?.iter();
    Ok(devices.any(|device| {
        let inserted = device.pointer("/inserted/node-name");
        inserted.and_then(Value::as_str) == Some(node)
    }))
}

/// What serves a node to others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Export {
    pub(crate) id: String,
    pub(crate) node: String,
}

pub(crate) fn exports(qmp: &mut Qmp) -> Result<Vec<Export>> {
    let found = qmp.execute("query-block-exports", json!({}))?;
    let export = |value: &Value| {
        Ok(Export {
            id: text(value, "id")?,
            node: text(value, "node-name")?,
        })
    };
    let all = list(&found, "query-block-exports")?;
    all.iter().map(export).collect()
}

/// Something that QEMU does in the background.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) id: String,
    /// As `running` or `concluded`.
    pub(crate) status: String,
    pub(crate) error: Option<String>,
}

pub(crate) fn jobs(qmp: &mut Qmp) -> Result<Vec<Job>> {
    let found = qmp.execute("query-jobs", json!({}))?;
    let job = |value: &Value| {
        let error = value.get("error").and_then(Value::as_str);
        Ok(Job {
            id: text(value, "id")?,
            status: text(value, "status")?,
            error: error.map(crate::lines::shown),
        })
    };
    let all = list(&found, "query-jobs")?;
    all.iter().map(job).collect()
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
