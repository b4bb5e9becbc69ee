//! Merging what a machine wrote to overlays into what is below them, while it goes on writing.
//!
//! An overlay holds all that was written until its merge is at its end, so whatever dies before that, the machine's disk is
//! the overlay over what is below it. A job that has ended stays in the machine until it is dismissed, so that nobody
//! begins it again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use blockferry_device::{CancelToken, Error, ErrorKind, Result};
use serde_json::json;

use crate::machine::{GRANULARITY_BYTES, Machine, node_of};
use crate::names::Kind;
use crate::nodes::{self, Job, Node};

/// How often the jobs are looked at.
const TICK: Duration = Duration::from_millis(50);

/// An overlay, and the raw file or device below it: as they were named to the machine, by absolute paths.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Layers {
    /// A qcow2 overlay.
    pub overlay: PathBuf,
    /// What it lies on.
    pub below: PathBuf,
}

impl Layers {
    /// `overlay` over `below`.
    pub fn new(overlay: impl Into<PathBuf>, below: impl Into<PathBuf>) -> Self {
        Self {
            overlay: overlay.into(),
            below: below.into(),
        }
    }
}

impl Machine {
    /// The node whose data is this raw file or device.
    ///
    /// # Errors
    /// The machine has none, or did not answer.
    pub fn raw_node_of(&mut self, path: &Path) -> Result<String> {
        let found = nodes::nodes(self.qmp())?;
        node_on(&found, "raw", path).map(|node| node.name.clone())
    }

    /// Merges overlays into what is below them, which records from now on what was changed since cut `number`: what is
    /// merged and all that follows. Goes on with what an earlier call began. `merged` is called with the index of each that
    /// is at its end, after which it is not to be passed again.
    ///
    /// # Errors
    /// The machine does not run on an overlay, a merge failed, or it was cancelled: to be called again.
    pub fn merge_overlays(
        &mut self,
        number: u64,
        layers: &[Option<Layers>],
        cancel: &CancelToken,
        merged: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let wanted = layers.iter().enumerate();
        let mut under_way: Vec<(usize, String, bool)> = Vec::new();
        for (index, layers) in wanted.filter_map(|(index, l)| Some((index, l.as_ref()?))) {
            let id = self.tag().of(Kind::Job, number, index);
            if job(&nodes::jobs(self.qmp())?, &id).is_none() {
                self.begin_merge(number, &id, layers)?;
            }
            under_way.push((index, id, false));
        }
        while !under_way.is_empty() {
            let jobs = nodes::jobs(self.qmp())?;
            let mut rest = Vec::new();
            for (index, id, is_told) in under_way {
                let found = job(&jobs, &id).ok_or_else(|| {
                    let text =
                        format!("job {id:?} of the machine is gone before it was at its end");
                    Error::new(ErrorKind::Io, text)
                })?;
                match (found.status.as_str(), &found.error) {
                    ("concluded", None) => {
                        merged(index)?;
                        self.qmp().execute("job-dismiss", json!({"id": id}))?;
                    }
                    ("concluded", Some(why)) => {
                        self.qmp().execute("job-dismiss", json!({"id": id}))?;
                        let text = format!("merge an overlay in the machine: {why}");
                        return Err(Error::new(ErrorKind::Io, text));
                    }
                    ("ready", _) if !is_told => {
                        self.qmp().execute("job-complete", json!({"id": id}))?;
                        rest.push((index, id, true));
                    }
                    _ => rest.push((index, id, is_told)),
                }
            }
            under_way = rest;
            if !under_way.is_empty() {
                cancel.check("merge overlays")?;
                std::thread::sleep(TICK);
            }
        }
        Ok(())
    }

    fn begin_merge(&mut self, number: u64, id: &str, layers: &Layers) -> Result<()> {
        let found = nodes::nodes(self.qmp())?;
        let overlay = node_on(&found, "qcow2", &layers.overlay)?.name.clone();
        let below = node_on(&found, "raw", &layers.below)?.name.clone();
        let bitmap = self.tag().bitmap(number);
        let has_bitmap = node_of(&found, &below)?
            .bitmaps
            .iter()
            .any(|found| found.name == bitmap);
        if !has_bitmap {
            let arguments =
                json!({"node": below, "name": bitmap, "granularity": GRANULARITY_BYTES});
            self.qmp().execute("block-dirty-bitmap-add", arguments)?;
        }
        let arguments =
            json!({"job-id": id, "device": overlay, "base-node": below, "auto-dismiss": false});
        self.qmp().execute("block-commit", arguments).map(drop)
    }
}

fn job<'j>(jobs: &'j [Job], id: &str) -> Option<&'j Job> {
    jobs.iter().find(|job| job.id == id)
}

fn node_on<'n>(found: &'n [Node], driver: &str, path: &Path) -> Result<&'n Node> {
    let resolved = |path: &Path| {
        path.canonicalize()
            .unwrap_or_else(|_absent| path.to_owned())
    };
    let wanted = resolved(path);
    let mut nodes = found.iter().filter(|node| node.driver == driver);
    nodes
        .find(|node| resolved(Path::new(&node.file)) == wanted)
        .ok_or_else(|| {
            let text = format!("the machine has no {driver} node on {}", path.display());
            Error::new(ErrorKind::NotFound, text)
        })
}
