//! Cuts through the disks of a machine, and what becomes of them.
//!
//! ```text
//!            prepare        cut (one transaction)              publish
//! disk 0  ── overlay f7 ──  end b6, begin b7, backup to f7 ──  export e7 of f7, with b6
//! disk 1  ── overlay f7 ──  end b6, begin b7, backup to f7 ──  export e7 of f7, with b6
//! ```
//! Bitmap b6 says what changed between cuts 6 and 7. If the target gets cut 7, b6 goes and b7 goes on. If it does not,
//! b7 is merged into b6, which records again: then b6 says what changed since cut 6, which the target still holds.
//! [`Machine::settle`] does either, and it is told only what the target holds.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockferry_device::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use crate::names::{Kind, MAX_DISKS, MAX_NUMBER, Tag};
use crate::nodes::{self, Node};
use crate::qmp::Qmp;

/// Unit of the bitmaps.
pub(crate) const GRANULARITY_BYTES: u64 = 64 << 10;
/// For QEMU to end a job of ours, or to let an export go.
const ENDING: Duration = Duration::from_secs(60);
/// As many connections as our client opens for each of a hundred disks.
const MAX_CONNECTIONS: u64 = 400;

/// How a machine is reached.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MachineOptions {
    /// Its QMP socket.
    pub qmp: PathBuf,
    /// Of the job, see [`Tag`].
    pub tag: String,
    /// Where overlays are kept while a point is read: they grow with what the machine overwrites meanwhile. The process
    /// of the machine must be able to write here.
    pub scratch: PathBuf,
    /// The socket of its NBD server, if somebody else started one: QEMU has one at most.
    pub nbd: Option<PathBuf>,
}

impl MachineOptions {
    /// A machine in which nobody runs an NBD server.
    pub fn new(
        qmp: impl Into<PathBuf>,
        tag: impl Into<String>,
        scratch: impl Into<PathBuf>,
    ) -> Self {
        Self {
            qmp: qmp.into(),
            tag: tag.into(),
            scratch: scratch.into(),
            nbd: None,
        }
    }
}

/// A node that can be copied.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskNode {
    /// Its name.
    pub name: String,
    /// As `raw` or `qcow2`.
    pub driver: String,
    /// Bytes that the machine sees.
    pub size_bytes: u64,
}

/// What the target of a disk holds.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Held {
    /// The node of the disk.
    pub disk: String,
    /// The number of the cut, if it holds one.
    pub number: Option<u64>,
}

impl Held {
    /// The target of `disk` holds cut `number`.
    pub fn cut(disk: impl Into<String>, number: u64) -> Self {
        Self {
            disk: disk.into(),
            number: Some(number),
        }
    }

    /// What the target of `disk` holds is no cut of this job.
    pub fn unknown(disk: impl Into<String>) -> Self {
        Self {
            disk: disk.into(),
            number: None,
        }
    }
}

/// A disk of which it is not known what changed since the cut that its target holds.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lost {
    /// The node of the disk.
    pub disk: String,
    /// Why, for people.
    pub why: String,
}

impl Lost {
    /// It is not known what changed on `disk`.
    pub fn new(disk: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            disk: disk.into(),
            why: why.into(),
        }
    }
}

/// A point that can be read over NBD.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PointExport {
    /// The node of the disk.
    pub disk: String,
    /// The server's socket.
    pub socket: PathBuf,
    /// The name of the export.
    pub export: String,
    /// The bitmap of what changed since the cut that the target holds, which the export carries; its meta context is
    /// `qemu:dirty-bitmap:` and this name.
    pub bitmap: Option<String>,
}

/// A running machine.
#[derive(Debug)]
pub struct Machine {
    qmp: Qmp,
    tag: Tag,
    scratch: PathBuf,
    nbd: Option<PathBuf>,
    /// Whether it has one, once it was asked.
    has_guest: Option<bool>,
}

impl Machine {
    /// Connects to it. Nothing is changed.
    ///
    /// # Errors
    /// The tag is none, or the machine cannot be reached.
    pub fn open(options: &MachineOptions) -> Result<Self> {
        Ok(Self {
            tag: options.tag.parse()?,
            qmp: Qmp::connect(&options.qmp)?,
            // The machine has another working directory.
            scratch: absolute(&options.scratch)?,
            nbd: options.nbd.as_deref().map(absolute).transpose()?,
            has_guest: None,
        })
    }

    /// The connection, for what is not done here.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    pub(crate) fn tag(&self) -> &Tag {
        &self.tag
    }

    /// The nodes that may be copied: all with a size that are not ours.
    ///
    /// # Errors
    /// The machine did not answer.
    pub fn disks(&mut self) -> Result<Vec<DiskNode>> {
        let tag = self.tag.clone();
        let ours = |name: &str| tag.owns(Kind::Overlay, name) || tag.owns(Kind::File, name);
        let nodes = nodes::nodes(&mut self.qmp)?.into_iter();
        Ok(nodes
            .filter(|node| node.size_bytes > 0 && !ours(&node.name))
            .map(|node| DiskNode {
                name: node.name,
                driver: node.driver,
                size_bytes: node.size_bytes,
            })
            .collect())
    }

    /// Makes what the next cut needs, while nothing is held up: an overlay for each disk. Call [`Self::settle`] before,
    /// and after any failure.
    ///
    /// # Errors
    /// A disk is not there, the scratch directory is not writable by the machine, or the machine failed.
    pub fn prepare(&mut self, number: u64, disks: &[String]) -> Result<()> {
        check(number, disks)?;
        let found = nodes::nodes(&mut self.qmp)?;
        for (index, disk) in disks.iter().enumerate() {
            let node = node_of(&found, disk)?;
            self.make_overlay(number, index, node)?;
        }
        Ok(())
    }

    fn make_overlay(&mut self, number: u64, index: usize, disk: &Node) -> Result<()> {
        let path = self.scratch.join(self.tag.overlay_file(number, index));
        let path = path.to_str().ok_or_else(|| {
            let text = format!(
                "scratch directory {}: it is no UTF-8",
                self.scratch.display()
            );
            Error::new(ErrorKind::Unsuitable, text)
        })?;
        let file = self.tag.of(Kind::File, number, index);
        let overlay = self.tag.of(Kind::Overlay, number, index);
        let maker = self.tag.of(Kind::Job, number, index);
        let options = json!({"driver": "file", "filename": path, "size": 0});
        self.create(&maker, options)?;
        // What it holds is worth nothing after a crash: no need to wait for the disk.
        let cache = json!({"no-flush": true});
        self.qmp.execute(
            "blockdev-add",
            json!({"driver": "file", "node-name": file, "filename": path, "cache": cache}),
        )?;
        let options = json!({"driver": "qcow2", "file": file, "size": disk.size_bytes});
        self.create(&maker, options)?;
        let options = json!({
            "driver": "qcow2", "node-name": overlay, "file": file, "backing": disk.name,
            "cache": cache, "discard": "unmap",
        });
        self.qmp.execute("blockdev-add", options).map(drop)
    }

    /// Runs a job that makes an image, to its end.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "a value is made where it is passed"
    )]
    fn create(&mut self, job: &str, options: Value) -> Result<()> {
        self.qmp.forget_events();
        let arguments = json!({"job-id": job, "options": options});
        self.qmp.execute("blockdev-create", arguments)?;
        let concluded = |event: &crate::Event| status_of(event, job) == Some("concluded");
        self.qmp.wait_event(ENDING, concluded)?;
        let jobs = nodes::jobs(&mut self.qmp)?;
        let ours = jobs.into_iter().find(|found| found.id == job);
        let failure = ours.and_then(|job| job.error);
        self.qmp.execute("job-dismiss", json!({"id": job}))?;
        failure.map_or(Ok(()), |why| {
            let text = format!("make an overlay in {}: {why}", self.scratch.display());
            Err(Error::new(ErrorKind::Io, text))
        })
    }

    /// The cut: one transaction over all disks, which takes a millisecond or two. [`Self::prepare`] came before.
    ///
    /// # Errors
    /// The machine refused; then nothing of it happened.
    pub fn cut(&mut self, number: u64, disks: &[String]) -> Result<()> {
        self.transact(number, disks, true)
    }

    /// The last cut, through disks that nobody writes any more: no overlay is needed, the disks themselves are exported.
    ///
    /// # Errors
    /// The machine refused; then nothing of it happened.
    pub fn cut_at_rest(&mut self, number: u64, disks: &[String]) -> Result<()> {
        self.transact(number, disks, false)
    }

    fn transact(&mut self, number: u64, disks: &[String], fleeces: bool) -> Result<()> {
        check(number, disks)?;
        let found = nodes::nodes(&mut self.qmp)?;
        let mut actions = Vec::new();
        // These first: each holds its disk still from here to the end of the transaction, once what was under way there is
        // written. A write that ends between the end of one bitmap and the cut would be in the point and in no bitmap.
        for (index, disk) in disks.iter().enumerate().filter(|_| fleeces) {
            let data = json!({
                "job-id": self.tag.of(Kind::Job, number, index), "device": disk,
                "target": self.tag.of(Kind::Overlay, number, index), "sync": "none",
            });
            actions.push(action("blockdev-backup", data));
        }
        for disk in disks {
            let node = node_of(&found, disk)?;
            for bitmap in self.bitmaps_of(node).filter(|bitmap| bitmap.is_recording) {
                let data = json!({"node": disk, "name": bitmap.name});
                actions.push(action("block-dirty-bitmap-disable", data));
            }
            let data = json!({
                "node": disk, "name": self.tag.bitmap(number), "granularity": GRANULARITY_BYTES,
                // In this format a bitmap outlives the machine's end.
                "persistent": node.driver == "qcow2",
            });
            actions.push(action("block-dirty-bitmap-add", data));
        }
        let arguments = json!({"actions": actions});
        self.qmp.execute("transaction", arguments).map(drop)
    }

    /// Exports the points of a cut, each with the bitmap of what changed since the cut that its target holds.
    ///
    /// # Errors
    /// The machine failed.
    pub fn publish(&mut self, number: u64, disks: &[String]) -> Result<Vec<PointExport>> {
        self.export(number, disks, true)
    }

    /// As [`Self::publish`], after [`Self::cut_at_rest`].
    ///
    /// # Errors
    /// The machine failed.
    pub fn publish_at_rest(&mut self, number: u64, disks: &[String]) -> Result<Vec<PointExport>> {
        self.export(number, disks, false)
    }

    fn export(&mut self, number: u64, disks: &[String], fleeced: bool) -> Result<Vec<PointExport>> {
        check(number, disks)?;
        let socket = self.serve_nbd()?;
        let found = nodes::nodes(&mut self.qmp)?;
        let mut points = Vec::new();
        for (index, disk) in disks.iter().enumerate() {
            let bitmap = self.bitmap_before(number, node_of(&found, disk)?);
            let export = self.tag.of(Kind::Export, number, index);
            let node = match fleeced {
                true => self.tag.of(Kind::Overlay, number, index),
                false => disk.clone(),
            };
            let carried: Vec<Value> = bitmap
                .iter()
                .map(|name| json!({"node": disk, "name": name}))
                .collect();
            let arguments = json!({
                "type": "nbd", "id": export, "node-name": node, "name": export,
                "writable": false, "bitmaps": carried,
            });
            self.qmp.execute("block-export-add", arguments)?;
            points.push(PointExport {
                disk: disk.clone(),
                socket: socket.clone(),
                export,
                bitmap,
            });
        }
        Ok(points)
    }

    /// Whether the points of a cut are still what they were: to be asked once they were read, before that counts. If
    /// somebody ended the job that keeps what is overwritten, or wrote a disk that was cut at rest, whoever reads does not
    /// notice.
    ///
    /// # Errors
    /// They are not, or the machine does not tell.
    pub fn check(&mut self, number: u64, disks: &[String]) -> Result<()> {
        let (jobs, found) = (nodes::jobs(&mut self.qmp)?, nodes::nodes(&mut self.qmp)?);
        let runs = |id: &str| {
            let mut of_this_id = jobs.iter().filter(|job| job.id == id);
            of_this_id.any(|job| job.status == "running" && job.error.is_none())
        };
        for (index, disk) in disks.iter().enumerate() {
            let overlay = self.tag.of(Kind::Overlay, number, index);
            let is_fleeced = found.iter().any(|node| node.name == overlay);
            let why = match is_fleeced {
                true if runs(&self.tag.of(Kind::Job, number, index)) => continue,
                true => "the job that kept what is overwritten has ended, so it is a mixture",
                false if self.is_clean(number, node_of(&found, disk)?) => continue,
                false => "it was cut at rest, and written since",
            };
            let text = format!("cut {number} of disk {disk:?}: {why}");
            return Err(Error::new(ErrorKind::Io, text));
        }
        Ok(())
    }

    /// The newest bitmap of ours on a disk before this cut. [`Self::settle`] leaves one at most, that of the cut which
    /// the target holds.
    fn bitmap_before(&self, number: u64, node: &Node) -> Option<String> {
        let of = |name: &str| self.tag.number_of_bitmap(name);
        let older = self.bitmaps_of(node).filter(|bitmap| {
            !bitmap.is_inconsistent && of(&bitmap.name).is_some_and(|n| n < number)
        });
        older
            .max_by_key(|bitmap| of(&bitmap.name))
            .map(|bitmap| bitmap.name.clone())
    }

    fn bitmaps_of<'n>(&self, node: &'n Node) -> impl Iterator<Item = &'n nodes::Bitmap> + use<'n> {
        let tag = self.tag.clone();
        let bitmaps = node.bitmaps.iter();
        bitmaps.filter(move |bitmap| tag.number_of_bitmap(&bitmap.name).is_some())
    }

    /// Where the machine serves NBD; if nobody began to, we do.
    fn serve_nbd(&mut self) -> Result<PathBuf> {
        if let Some(socket) = &self.nbd {
            return Ok(socket.clone());
        }
        let socket = self.our_socket();
        let path = json!({"type": "unix", "data": {"path": socket}});
        let arguments = json!({"addr": path, "max-connections": MAX_CONNECTIONS});
        match self.qmp.execute("nbd-server-start", arguments) {
            Ok(_) => Ok(socket),
            // By us, in a life before.
            Err(_) if std::os::unix::net::UnixStream::connect(&socket).is_ok() => Ok(socket),
            Err(refused) => {
                let text = format!(
                    "{refused}; if the machine has an NBD server already, its socket has to be named"
                );
                Err(Error::new(refused.kind(), text))
            }
        }
    }

    fn our_socket(&self) -> PathBuf {
        self.scratch.join(format!("bf-{}.nbd", self.tag))
    }

    /// Ends what is under way, and makes each disk record what changes since the cut that its target holds: bitmaps of
    /// later cuts are merged into its bitmap, those of earlier ones go. May be called at any time, also twice, also after
    /// a crash of ours. Returns the disks of which that is not known.
    ///
    /// # Errors
    /// The machine failed; what changed stays recorded.
    pub fn settle(&mut self, held: &[Held]) -> Result<Vec<Lost>> {
        self.end_points()?;
        let found = nodes::nodes(&mut self.qmp)?;
        let mut lost = Vec::new();
        for held in held {
            if let Some(why) = self.settle_disk(held, node_of(&found, &held.disk)?)? {
                let disk = held.disk.clone();
                lost.push(Lost { disk, why });
            }
        }
        Ok(lost)
    }

    fn settle_disk(&mut self, held: &Held, node: &Node) -> Result<Option<String>> {
        let bitmaps: Vec<nodes::Bitmap> = self.bitmaps_of(node).cloned().collect();
        let name = held.number.map(|number| self.tag.bitmap(number));
        let kept = bitmaps
            .iter()
            .find(|bitmap| Some(&bitmap.name) == name.as_ref());
        // A later one that is damaged takes the changes of its time with it.
        let later = |bitmap: &&nodes::Bitmap| {
            let number = self.tag.number_of_bitmap(&bitmap.name);
            held.number
                .is_some_and(|held| number.is_some_and(|n| n > held))
        };
        let later: Vec<&nodes::Bitmap> = bitmaps.iter().filter(later).collect();
        let damaged = kept.into_iter().chain(later.iter().copied());
        let is_damaged = damaged.clone().any(|bitmap| bitmap.is_inconsistent);
        let keeps = kept.is_some() && !is_damaged;
        let mut actions = Vec::new();
        if let Some(kept) = kept.filter(|_| keeps) {
            let merged: Vec<&str> = later.iter().map(|bitmap| bitmap.name.as_str()).collect();
            if !merged.is_empty() {
                let data = json!({"node": held.disk, "target": kept.name, "bitmaps": merged});
                actions.push(action("block-dirty-bitmap-merge", data));
            }
            if !kept.is_recording {
                let data = json!({"node": held.disk, "name": kept.name});
                actions.push(action("block-dirty-bitmap-enable", data));
            }
        }
        for bitmap in &bitmaps {
            if !(keeps && Some(&bitmap.name) == name.as_ref()) {
                let data = json!({"node": held.disk, "name": bitmap.name});
                actions.push(action("block-dirty-bitmap-remove", data));
            }
        }
        if !actions.is_empty() {
            self.qmp
                .execute("transaction", json!({"actions": actions}))?;
        }
        Ok(match (held.number, kept, keeps) {
            (None, ..) => Some("the target holds no cut of this job".to_owned()),
            (_, None, _) => Some("its dirty bitmap is gone".to_owned()),
            (_, Some(_), false) => {
                Some("its dirty bitmap was in use when the machine died".to_owned())
            }
            (_, Some(_), true) => None,
        })
    }

    /// Takes away exports, jobs, overlays and their files, whatever is there of them.
    fn end_points(&mut self) -> Result<()> {
        self.qmp.forget_events();
        for export in nodes::exports(&mut self.qmp)? {
            if self.tag.owns(Kind::Export, &export.id) {
                self.end_export(&export.id)?;
            }
        }
        self.give_up()?;
        let found = nodes::nodes(&mut self.qmp)?;
        for kind in [Kind::Overlay, Kind::File] {
            for node in found.iter().filter(|node| self.tag.owns(kind, &node.name)) {
                let arguments = json!({"node-name": node.name});
                self.qmp.execute("blockdev-del", arguments)?;
            }
        }
        self.remove_files()
    }

    /// Keeps no more of what is overwritten: no write of the guest waits for it, or fails, any more. The points are mixtures from
    /// now on, as [`Self::check`] says.
    ///
    /// # Errors
    /// The machine failed.
    pub fn give_up(&mut self) -> Result<()> {
        self.qmp.forget_events();
        for job in nodes::jobs(&mut self.qmp)? {
            if self.tag.owns(Kind::Job, &job.id) {
                self.end_job(&job)?;
            }
        }
        Ok(())
    }

    fn end_export(&mut self, export: &str) -> Result<()> {
        let arguments = json!({"id": export, "mode": "hard"});
        self.qmp.execute("block-export-del", arguments)?;
        let gone = |event: &crate::Event| {
            let id = event.data.get("id").and_then(Value::as_str);
            event.name == "BLOCK_EXPORT_DELETED" && id == Some(export)
        };
        self.qmp.wait_event(ENDING, gone).map(drop)
    }

    fn end_job(&mut self, job: &nodes::Job) -> Result<()> {
        let id = json!({"id": job.id});
        // A job that makes an overlay waits to be dismissed.
        if job.status == "concluded" {
            return self.qmp.execute("job-dismiss", id).map(drop);
        }
        self.qmp.execute("job-cancel", id)?;
        let gone = |event: &crate::Event| status_of(event, &job.id) == Some("null");
        self.qmp.wait_event(ENDING, gone).map(drop)
    }

    fn remove_files(&self) -> Result<()> {
        let failed = |cause| {
            Error::from_io(
                format!("remove overlays from {}", self.scratch.display()),
                cause,
            )
        };
        for entry in fs::read_dir(&self.scratch).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            if name.to_str().is_some_and(|name| self.tag.owns_file(name)) {
                fs::remove_file(entry.path()).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Takes everything of this job away from `disks`, and stops the NBD server if we started it and nobody else uses it.
    ///
    /// # Errors
    /// The machine failed; to be called again.
    pub fn leave(&mut self, disks: &[String]) -> Result<()> {
        let held: Vec<Held> = disks.iter().map(Held::unknown).collect();
        self.settle(&held)?;
        if self.has_guest()? {
            self.forget_memory()?;
        }
        let socket = self.our_socket();
        let is_ours = self.nbd.is_none() && socket.exists();
        if is_ours && nodes::exports(&mut self.qmp)?.is_empty() {
            self.qmp.execute("nbd-server-stop", json!({}))?;
            fs::remove_file(&socket).ok();
        }
        Ok(())
    }

    /// The disks that were written since cut `number`, or of which that is not known.
    ///
    /// # Errors
    /// A disk is not there, or the machine did not answer.
    pub fn written_since(&mut self, number: u64, disks: &[String]) -> Result<Vec<String>> {
        let found = nodes::nodes(&mut self.qmp)?;
        let mut written = Vec::new();
        for disk in disks {
            if !self.is_clean(number, node_of(&found, disk)?) {
                written.push(disk.clone());
            }
        }
        Ok(written)
    }

    /// The bitmap of cut `number` records, and nothing was written since it was begun.
    fn is_clean(&self, number: u64, node: &Node) -> bool {
        let bitmap = self.tag.bitmap(number);
        let of_the_cut = node.bitmaps.iter().find(|found| found.name == bitmap);
        of_the_cut.is_some_and(|bitmap| {
            bitmap.is_recording && !bitmap.is_inconsistent && bitmap.dirty_bytes == 0
        })
    }

    /// Stops the guest's processors: nothing is written any more once this returns. A qemu-storage-daemon has none, see
    /// [`Self::writable_exports`].
    ///
    /// # Errors
    /// The machine refused.
    pub fn stop(&mut self) -> Result<()> {
        self.qmp.execute("stop", json!({})).map(drop)
    }

    /// Lets the guest go on; one that shut down boots.
    ///
    /// # Errors
    /// The machine refused.
    pub fn resume(&mut self) -> Result<()> {
        let status = self.qmp.execute("query-status", json!({}))?;
        if status.get("status").and_then(Value::as_str) == Some("shutdown") {
            self.qmp.execute("system_reset", json!({}))?;
        }
        self.qmp.execute("cont", json!({})).map(drop)
    }

    /// Presses the guest's power button and waits until it shut down. The machine stays.
    ///
    /// # Errors
    /// The guest did not shut down within `patience`, or the machine failed.
    pub fn power_down(&mut self, patience: Duration) -> Result<()> {
        self.qmp.forget_events();
        // As if it had been started with -no-shutdown.
        let stays = json!({"shutdown": "pause"});
        self.qmp.execute("set-action", stays)?;
        self.qmp.execute("system_powerdown", json!({}))?;
        let down = |event: &crate::Event| event.name == "SHUTDOWN";
        self.qmp.wait_event(patience, down).map(drop)
    }

    /// Whether the guest runs; nothing for a qemu-storage-daemon, which has none.
    ///
    /// # Errors
    /// The machine did not answer.
    pub fn is_running(&mut self) -> Result<Option<bool>> {
        if !self.has_guest()? {
            return Ok(None);
        }
        let status = self.qmp.execute("query-status", json!({}))?;
        Ok(status.get("running").and_then(Value::as_bool))
    }

    /// What may have written `disks` since the machine was started, for people; nothing if nothing may have: its guest
    /// never ran, and nobody else has them to write.
    ///
    /// # Errors
    /// The machine did not answer.
    pub fn may_have_written(&mut self, disks: &[String]) -> Result<Option<String>> {
        if self.has_guest()? {
            let status = self.qmp.execute("query-status", json!({}))?;
            if status.get("status").and_then(Value::as_str) != Some("prelaunch") {
                return Ok(Some("its guest was started already".to_owned()));
            }
        }
        let writers = self.writable_exports(disks)?;
        let writer = writers.first();
        Ok(writer.map(|writer| format!("export {writer:?} may be written")))
    }

    /// Ends the process of the machine.
    ///
    /// # Errors
    /// The machine refused.
    pub fn quit(&mut self) -> Result<()> {
        self.qmp.execute("quit", json!({})).map(drop)
    }

    pub(crate) fn has_guest(&mut self) -> Result<bool> {
        if let Some(known) = self.has_guest {
            return Ok(known);
        }
        let commands = self.qmp.execute("query-commands", json!({}))?;
        let names = commands.as_array().into_iter().flatten();
        let mut names = names.filter_map(|command| command.get("name").and_then(Value::as_str));
        let found = names.any(|name| name == "query-status");
        self.has_guest = Some(found);
        Ok(found)
    }

    /// The exports through which others may write these disks, by id.
    ///
    /// # Errors
    /// The machine did not answer.
    pub fn writable_exports(&mut self, disks: &[String]) -> Result<Vec<String>> {
        let all = nodes::exports(&mut self.qmp)?.into_iter();
        Ok(all
            .filter(|export| disks.contains(&export.node))
            .map(|export| export.id)
            .filter(|id| !self.tag.owns(Kind::Export, id))
            .collect())
    }

    /// Takes an export away, whoever uses it: fences a writer of a qemu-storage-daemon.
    ///
    /// # Errors
    /// The machine refused.
    pub fn remove_export(&mut self, id: &str) -> Result<()> {
        self.qmp.forget_events();
        self.end_export(id)
    }
}

fn status_of<'e>(event: &'e crate::Event, job: &str) -> Option<&'e str> {
    let field = |name| event.data.get(name).and_then(Value::as_str);
    (event.name == "JOB_STATUS_CHANGE" && field("id") == Some(job))
        .then(|| field("status"))
        .flatten()
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "a value is made where it is passed"
)]
fn action(kind: &str, data: Value) -> Value {
    json!({"type": kind, "data": data})
}

pub(crate) fn node_of<'n>(found: &'n [Node], disk: &str) -> Result<&'n Node> {
    found.iter().find(|node| node.name == disk).ok_or_else(|| {
        let names: Vec<&str> = found.iter().map(|node| node.name.as_str()).collect();
        let text = format!(
            "disk {disk:?}: the machine has no node of this name; it has {}",
            names.join(", ")
        );
        Error::new(ErrorKind::NotFound, text)
    })
}

fn check(number: u64, disks: &[String]) -> Result<()> {
    if number > MAX_NUMBER || disks.len() > MAX_DISKS {
        let text = format!(
            "cut {number} through {} disks: expected a number up to {MAX_NUMBER} and at most {MAX_DISKS} disks",
            disks.len()
        );
        return Err(Error::new(ErrorKind::Unsuitable, text));
    }
    Ok(())
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path)
        .map_err(|cause| Error::from_io(format!("the place of {}", path.display()), cause))
}
