//! Merging what a machine wrote to overlays into what is below them, while it goes on writing.
//!
//! Until the last step of a merge the overlay holds all that was written, so whatever dies before it, the machine's disk is
//! the overlay over what is below it. Before that step the disk stands still, both hold the same, and that is flushed: this is
//! the moment at which the overlay is put aside, durably, after which what is below it counts. Were it put aside later, the
//! end of the machine would leave an overlay that is older than what is below it, and nobody could tell.

use std::path::{Path, PathBuf};
use std::time::Duration;

use blockferry_device::{CancelToken, Error, ErrorKind, Result};
use serde_json::json;

use crate::machine::{GRANULARITY_BYTES, Machine, node_of};
use crate::names::Kind;
use crate::nodes::{self, Job, Node};

const OVERLAY_DRIVER: &str = "qcow2";
/// How often the jobs are looked at.
const TICK: Duration = Duration::from_millis(10);

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

    /// The node of this name, or the one whose data is this raw file or device: where there is no other, and where the name is
    /// that of an overlay, which was merged into it and is kept.
    ///
    /// # Errors
    /// The machine has neither, or did not answer.
    pub fn node_called(&mut self, name: &str, file: Option<&Path>) -> Result<String> {
        let found = nodes::nodes(self.qmp())?;
        let on_file = file.and_then(|file| node_on(&found, "raw", file).ok());
        let node = match (node_of(&found, name), on_file) {
            (Ok(named), Some(below)) if named.driver == OVERLAY_DRIVER => below,
            (Err(_), Some(other)) => other,
            (named, _) => named?,
        };
        Ok(node.name.clone())
    }

    /// Removes the node of an overlay that was merged into `below`, which would keep its file until the end of the machine.
    /// Harmless where there is none. Where no device has what is below the overlay keeps that, and stays.
    ///
    /// # Errors
    /// Something uses it, or the machine did not answer.
    pub fn remove_overlay(&mut self, layers: &Layers) -> Result<()> {
        let found = nodes::nodes(self.qmp())?;
        let below = node_on(&found, "raw", &layers.below)?;
        let Ok(overlay) = node_on(&found, OVERLAY_DRIVER, &layers.overlay) else {
            return Ok(());
        };
        if !self.has_guest()? || !nodes::is_of_a_device(self.qmp(), &below.name)? {
            return Ok(());
        }
        let arguments = json!({"node-name": overlay.name});
        self.qmp().execute("blockdev-del", arguments).map(drop)
    }

    /// Merges overlays into what is below them, which records from now on what was changed since cut `number`: what is
    /// merged and all that follows. Goes on with what an earlier call began. `counts` is called with the index of a disk and
    /// `true` when what is below its overlay is to count from now on, which has to be durable when it returns: the disk stands
    /// still for so long; and with `false` where that did not come to pass. Of disks without an overlay nothing is begun.
    ///
    /// # Errors
    /// The machine does not run on an overlay, a merge failed, or it was cancelled: to be called again.
    pub fn merge_overlays(
        &mut self,
        number: u64,
        layers: &[Option<Layers>],
        cancel: &CancelToken,
        counts: &mut dyn FnMut(usize, bool) -> Result<()>,
    ) -> Result<()> {
        let jobs = nodes::jobs(self.qmp())?;
        let mut under_way = Vec::new();
        for (index, layers) in layers.iter().enumerate() {
            let id = self.tag().of(Kind::Job, number, index);
            match (job(&jobs, &id), layers) {
                (None, None) => continue,
                (None, Some(layers)) => self.begin_merge(number, &id, layers)?,
                (Some(_), _) => {}
            }
            under_way.push((index, id));
        }
        while !under_way.is_empty() {
            let jobs = nodes::jobs(self.qmp())?;
            let mut rest = Vec::new();
            for (index, id) in under_way {
                let found = job(&jobs, &id).ok_or_else(|| {
                    let text = format!("job {id:?} of the machine is gone before its end");
                    Error::new(ErrorKind::Io, text)
                })?;
                if !self.go_on(found, index, counts)? {
                    rest.push((index, id));
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

    /// Takes a merge a step further; returns whether it is at its end.
    fn go_on(
        &mut self,
        job: &Job,
        index: usize,
        counts: &mut dyn FnMut(usize, bool) -> Result<()>,
    ) -> Result<bool> {
        let id = json!({"id": job.id});
        match (job.status.as_str(), &job.error) {
            // The last of it is copied, then the disk stands still.
            ("ready", _) => self.qmp().execute("job-complete", id).map(|_| false),
            ("pending", _) => {
                counts(index, true)?;
                self.qmp().execute("job-finalize", id).map(|_| false)
            }
            ("concluded", None) => self.qmp().execute("job-dismiss", id).map(|_| true),
            ("concluded", Some(why)) => {
                counts(index, false)?;
                self.qmp().execute("job-dismiss", id)?;
                let text = format!("merge an overlay in the machine: {why}");
                Err(Error::new(ErrorKind::Io, text))
            }
            _ => Ok(false),
        }
    }

    fn begin_merge(&mut self, number: u64, id: &str, layers: &Layers) -> Result<()> {
        let found = nodes::nodes(self.qmp())?;
        let overlay = node_on(&found, OVERLAY_DRIVER, &layers.overlay)?;
        let below = node_on(&found, "raw", &layers.below)?;
        let bitmap = self.tag().bitmap(number);
        if !below.bitmaps.iter().any(|found| found.name == bitmap) {
            let arguments =
                json!({"node": below.name, "name": bitmap, "granularity": GRANULARITY_BYTES});
            self.qmp().execute("block-dirty-bitmap-add", arguments)?;
        }
        let arguments = json!({
            "job-id": id, "device": overlay.name, "base-node": below.name,
            "auto-finalize": false, "auto-dismiss": false,
        });
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
