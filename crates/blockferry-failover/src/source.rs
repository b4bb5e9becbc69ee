//! The source of a job: a QEMU machine, its points, and how it is stopped and let go.
//!
//! [`SourceMachine`] is what a job asks of it. [`Source`] is one on this host; [`FarSource`](crate::far::FarSource) asks
//! one on another host, where a [`Source`] does it.

use std::ffi::OsString;
use std::fmt::Debug;
use std::iter;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use blockferry_core::ChangeMap;
use blockferry_device::{BlockSource, CancelToken, Consistency, ErrorKind as ErrorKindOfDevice};
use blockferry_engine::SourceCheck;
use blockferry_nbd::{NbdAddress, NbdDevice, NbdOptions};
use blockferry_qemu::freeze::Guarded;
use blockferry_qemu::{Agent, HandOver, Held, Layers, Lost, Machine, MachineOptions, PointExport};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Error, ErrorKind, Result};
use crate::far::HostConnection;
use crate::room::Room;
use crate::scripts::Scripts;
use crate::spec::{DiskSpec, JobSpec, QuiesceBy};

/// For the guest to shut down.
const SHUTTING_DOWN: Duration = Duration::from_secs(120);
/// For a machine that was told to end.
const ENDING: Duration = Duration::from_secs(30);
/// For the agent of a guest that runs to answer.
const AGENT: Duration = Duration::from_secs(5);
/// For a freeze that a stop follows: the guest stands still, nothing waits for its end.
const FREEZE_BEFORE_STOP: Duration = Duration::from_secs(60);

/// What a job asks of the machine that it copies, wherever that is.
pub(crate) trait SourceMachine: Debug {
    /// Lets the connection go; it is made again when it is needed.
    fn release(&mut self);

    /// Makes sure that the machine is there.
    fn reach(&mut self) -> Result<()>;

    /// Ends what is under way and makes the bitmaps say what changed since the cuts that the targets hold.
    fn settle(&mut self, held: &[Option<u64>]) -> Result<Vec<Lost>>;

    /// Makes what the next cut is read over, while nothing is held up.
    fn make_ready(&mut self) -> Result<()>;

    /// A cut while the machine runs.
    fn cut(&mut self, number: u64, live: Live) -> Result<Cut>;

    /// Stops the machine: nothing is written any more. [`Self::resume`] takes it back, also after a failure here. What does
    /// not come to rest within `patience` is not stopped. A machine on another host goes on by itself after `patience`, unless
    /// it is to be held.
    fn quiesce(&mut self, patience: Duration) -> Result<(Consistency, Vec<String>)>;

    /// The last cut, once the machine is stopped.
    fn cut_at_rest(&mut self, number: u64, consistency: Consistency) -> Result<Cut>;

    /// From here on it stays stopped, whatever becomes of this process and of the way to the machine.
    fn hold(&mut self) -> Result<()>;

    /// Begins to send the guest's memory to `uri`, while it runs. Once it stands still it is as after [`Self::quiesce`].
    fn send_memory(&mut self, uri: &str, pause: Duration, patience: Duration) -> Result<()>;

    /// Whether the guest is to be kept from standing still for its memory.
    fn hold_memory_back(&mut self, held: bool) -> Result<()>;

    /// How far its memory is.
    ///
    /// # Errors
    /// It does not travel any more.
    fn sent(&mut self) -> Result<Sent>;

    /// The guest goes on in the machine that takes its memory.
    fn hand_over(&mut self) -> Result<()>;

    /// The machine is stopped, and its disks were not written since cut `number`.
    fn stood_still(&mut self, number: u64) -> Result<()>;

    /// Lets the machine go on as before [`Self::quiesce`], however far that came. Harmless where it runs.
    fn resume(&mut self) -> Result<()>;

    /// Takes everything of this job away from the machine.
    fn leave(&mut self) -> Result<()>;

    /// Ends the machine, and waits until it has.
    fn end(&mut self) -> Result<()>;
}

/// How a cut is made while the machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Live {
    /// At rest, as far as the application and the guest can be brought to it.
    Frozen,
    /// Nothing is held up for it.
    AsItIs,
}

/// How much of a guest's memory was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Sent {
    /// The guest runs, and so many bytes are missing yet, once that is known.
    Running(Option<u64>),
    /// The guest stands still, and the rest waits for [`SourceMachine::hand_over`].
    Standing,
}

/// One moment of all disks.
#[derive(Debug)]
pub(crate) struct Cut {
    pub(crate) consistency: Consistency,
    /// In the order of the job's disks.
    pub(crate) disks: Vec<CutDisk>,
    /// How long writes were held up for it.
    pub(crate) held_up: Duration,
    /// What did not go as hoped.
    pub(crate) warnings: Vec<String>,
    /// Whether its points are still what they were.
    pub(crate) check: SourceCheck,
}

#[derive(Debug)]
pub(crate) struct CutDisk {
    pub(crate) source: CutSource,
    /// Since the cut that the target holds.
    pub(crate) changes: Option<Arc<ChangeMap>>,
}

/// Where the point of a disk is read.
#[derive(Debug)]
pub(crate) enum CutSource {
    Here(Arc<dyn BlockSource>),
    There(HostConnection),
}

/// A cut that is exported, and not read yet.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) consistency: Consistency,
    pub(crate) points: Vec<PointExport>,
    pub(crate) held_up: Duration,
    pub(crate) warnings: Vec<String>,
}

/// An application or a guest at rest.
#[derive(Debug)]
struct AtRest {
    guarded: Guarded,
    consistency: Consistency,
}

/// A machine on this host. It is connected to when it is needed, and let go in between: its QMP socket serves one client.
#[derive(Debug)]
pub(crate) struct Source {
    spec: JobSpec,
    options: MachineOptions,
    /// Points that are read ask it as well.
    machine: Arc<Mutex<Option<Machine>>>,
    /// Of its disks, once they were looked for.
    nodes: Mutex<Option<Vec<String>>>,
    /// For the points that are read.
    room: Option<Arc<Room>>,
    /// What freezes the guest; without it no freeze is guarded, so none is made.
    guard: Option<Vec<OsString>>,
}

impl Source {
    pub(crate) fn new(spec: &JobSpec, scratch: &Path, guard: Option<Vec<OsString>>) -> Self {
        let machine = &spec.machine;
        let scratch = machine.scratch.as_deref().unwrap_or(scratch);
        let mut options = MachineOptions::new(&machine.qmp, &spec.name, scratch);
        options.nbd.clone_from(&machine.nbd);
        Self {
            spec: spec.clone(),
            options,
            machine: Arc::default(),
            nodes: Mutex::default(),
            room: None,
            guard,
        }
    }

    /// The nodes of its disks. Where the job says which files the way back brings up to date, they are found by those as well:
    /// a machine whose overlays were merged goes on with nodes of other names.
    fn nodes(&self) -> Result<Vec<String>> {
        let mut known = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(nodes) = &*known {
            return Ok(nodes.clone());
        }
        let files = self.spec.reverse.iter().flat_map(|way| &way.disk);
        let files = files.map(|disk| Some(disk.target.as_path()));
        let disks = self.spec.disk.iter().zip(files.chain(iter::repeat(None)));
        let node = |(disk, file): (&DiskSpec, Option<&Path>)| {
            self.with("look for a disk", |machine| {
                machine.node_called(&disk.node, file)
            })
        };
        let nodes: Vec<String> = disks.map(node).collect::<Result<_>>()?;
        *known = Some(nodes.clone());
        Ok(nodes)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Machine>> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `act`; a machine that failed is connected to afresh the next time.
    fn with<T>(
        &self,
        what: &str,
        act: impl FnOnce(&mut Machine) -> blockferry_device::Result<T>,
    ) -> Result<T> {
        let mut connected = self.lock();
        let mut machine = match connected.take() {
            Some(machine) => machine,
            None => Machine::open(&self.options)
                .map_err(|cause| Error::source("reach the machine", cause))?,
        };
        let done = act(&mut machine).map_err(|cause| Error::source(what.to_owned(), cause))?;
        *connected = Some(machine);
        Ok(done)
    }

    /// Makes a cut while the machine runs, and exports it.
    pub(crate) fn take(&mut self, number: u64, live: Live) -> Result<Taken> {
        let disks = self.nodes()?;
        self.with("prepare a cut", |machine| machine.prepare(number, &disks))?;
        let room = Room::watch(&self.options.scratch, Arc::clone(&self.machine));
        let room = room.map_err(|cause| Error::source("prepare a cut", cause))?;
        let room = Arc::new(room);
        self.room = Some(Arc::clone(&room));
        let mut warnings = Vec::new();
        let deadline = self.spec.freeze_deadline;
        let at_rest = match live {
            Live::Frozen => self.freeze(deadline, Duration::MAX, &mut warnings)?,
            Live::AsItIs => None,
        };
        let began = Instant::now();
        // Asked while nobody else has the machine: whoever gives a point up comes before the cut, or finds it.
        let done = self.with("cut", |machine| {
            room.check()?;
            machine.cut(number, &disks)
        });
        let mut held_up = began.elapsed();
        let thawed = at_rest
            .as_ref()
            .map(|at_rest| at_rest.guarded.thaw_telling());
        done?;
        let consistency = match (&at_rest, thawed) {
            (Some(at_rest), Some(Ok(thawed))) => {
                held_up = thawed.held_up;
                warnings.extend(thawed.remark);
                at_rest.consistency
            }
            (_, Some(Err(late))) if self.spec.machine.scripts.is_some() => {
                return Err(Error::source("let the source go on", late));
            }
            (_, Some(Err(late))) => {
                warnings.push(format!("the point is crash-consistent only: {late}"));
                Consistency::Crash
            }
            _ => Consistency::Crash,
        };
        let points = self.with("export a cut", |machine| machine.publish(number, &disks))?;
        Ok(Taken {
            consistency,
            points,
            held_up,
            warnings,
        })
    }

    /// Makes the last cut, once the machine is stopped, and exports it. Whoever stopped it knows how good that is: it is told as
    /// the least that it can be.
    pub(crate) fn take_at_rest(&mut self, number: u64) -> Result<Taken> {
        let disks = self.nodes()?;
        let points = self.with("the last cut", |machine| {
            machine.cut_at_rest(number, &disks)?;
            machine.publish_at_rest(number, &disks)
        })?;
        Ok(Taken {
            consistency: Consistency::Crash,
            points,
            held_up: Duration::ZERO,
            warnings: Vec::new(),
        })
    }

    fn opened(&self, number: u64, taken: Taken) -> Result<Cut> {
        let disks = taken.points.iter().map(|point| {
            let (source, changes) = open_point(point)?;
            Ok(CutDisk {
                source: CutSource::Here(source),
                changes: changes.map(Arc::new),
            })
        });
        let (machine, names, room) = (Arc::clone(&self.machine), self.nodes()?, self.room.clone());
        Ok(Cut {
            disks: disks.collect::<Result<_>>()?,
            consistency: taken.consistency,
            held_up: taken.held_up,
            warnings: taken.warnings,
            check: SourceCheck::new(move || check(&machine, room.as_deref(), number, &names)),
        })
    }

    /// Whether the points of a cut are still what they were.
    pub(crate) fn check(&self, number: u64) -> Result<()> {
        check(&self.machine, self.room.as_deref(), number, &self.nodes()?)
            .map_err(|cause| Error::source("look at a point that was read", cause))
    }

    /// Brings the application and the guest to rest, where there are scripts or an agent. What keeps an agent from that is
    /// said, and is no failure.
    fn freeze(
        &self,
        deadline: Duration,
        patience: Duration,
        warnings: &mut Vec<String>,
    ) -> Result<Option<AtRest>> {
        let machine = &self.spec.machine;
        let (agent, scripts) = (&machine.agent, &machine.scripts);
        if agent.is_none() && scripts.is_none() {
            return Ok(None);
        }
        let mut crash_consistent = |why: String| {
            warnings.push(format!("the point is crash-consistent only: {why}"));
            Ok(None)
        };
        let Some(guard) = &self.guard else {
            return crash_consistent("there is no program to guard a freeze".to_owned());
        };
        let mut command = guard.clone();
        for (option, path) in [("--agent", agent), ("--scripts", scripts)] {
            if let Some(path) = path {
                command.extend([option.into(), path.into()]);
            }
        }
        let guarded = Guarded::new(command);
        match guarded.freeze_telling(deadline, patience) {
            Ok(frozen) => {
                warnings.extend(frozen.remark);
                let consistency = frozen.consistency;
                Ok(Some(AtRest {
                    guarded,
                    consistency,
                }))
            }
            Err(cause) if cause.kind() == ErrorKindOfDevice::Busy => Err(Error::because(
                ErrorKind::Refused,
                "bring the source to rest",
                cause,
            )),
            // Their file says what a failure of theirs means.
            Err(cause) if scripts.is_some() => {
                Err(Error::source("bring the source to rest", cause))
            }
            Err(error) => crash_consistent(error.to_string()),
        }
    }

    fn take_writers_away(&mut self) -> Result<()> {
        let disks = self.nodes()?;
        let found = self.with("look for writers", |m| m.writable_exports(&disks))?;
        let known: Vec<&String> = self.spec.disk.iter().flat_map(|d| &d.writers).collect();
        if let Some(stranger) = found.iter().find(|export| !known.contains(export)) {
            let text = format!(
                "export {stranger:?} of the machine may be written by others: name it among the writers of its disk, \
                 so that it is taken away and given back"
            );
            return Err(Error::new(ErrorKind::Source, text));
        }
        for export in found {
            self.with("take a writer away", |m| m.remove_export(&export))?;
        }
        Ok(())
    }

    fn give_writers_back(&mut self) -> Result<()> {
        let disks = self.nodes()?;
        let found = self.with("look for writers", |m| m.writable_exports(&disks))?;
        for (disk, node) in self.spec.disk.iter().zip(&disks) {
            for export in disk.writers.iter().filter(|export| !found.contains(export)) {
                let arguments = json!({
                    "type": "nbd", "id": export, "name": export, "node-name": node,
                    "writable": true,
                });
                self.with("give a writer back", |machine| {
                    machine.qmp().execute("block-export-add", arguments)
                })?;
            }
        }
        Ok(())
    }

    /// From the first write on the machine records what changes, as since cut `number`; then it is let go. Returns why
    /// that is not known, if it ran before.
    pub(crate) fn watch(&mut self, number: u64) -> Result<Option<String>> {
        let recording = self.settle(&vec![Some(number); self.spec.disk.len()])?;
        if !recording.is_empty() {
            let disks = self.nodes()?;
            let written = self.with("look for writers", |m| m.may_have_written(&disks))?;
            if written.is_some() {
                return Ok(written);
            }
            self.with("record what changes", |m| m.cut_at_rest(number, &disks))?;
        }
        self.resume().map(|()| None)
    }

    /// Its disks are what is below these overlays now: lets those go, and finds the nodes. Returns why the machine holds on to an
    /// overlay, if it does.
    pub(crate) fn let_overlays_go(&mut self, merged: &[Layers]) -> Result<Option<String>> {
        let refused = merged.iter().filter_map(|layers| {
            let done = self.with("let an overlay go", |m| m.remove_overlay(layers));
            done.err().map(|error| error.in_full())
        });
        let refused = refused.last();
        let nodes = merged.iter().map(|layers| {
            self.with("look for a disk", |machine| {
                machine.raw_node_of(&layers.below)
            })
        });
        let nodes: Vec<String> = nodes.collect::<Result<_>>()?;
        self.nodes = Mutex::new(Some(nodes));
        Ok(refused)
    }

    /// Waits for the memory of a guest.
    pub(crate) fn receive_memory(&mut self, uri: &str) -> Result<()> {
        let credentials = self.spec.machine.memory_tls.as_deref();
        self.with("wait for the memory", |machine| {
            machine.receive_memory(uri, credentials)
        })
    }

    /// Whether its guest runs.
    pub(crate) fn runs(&mut self) -> Result<bool> {
        let running = self.with("look at the replica", Machine::is_running)?;
        Ok(running == Some(true))
    }

    /// Waits until a guest that was handed over runs.
    pub(crate) fn wait_until_it_runs(&mut self) -> Result<()> {
        self.with("look at the replica", Machine::wait_until_it_runs)
    }

    /// Merges overlays while they are written, see [`Machine::merge_overlays`].
    pub(crate) fn merge(
        &mut self,
        number: u64,
        layers: &[Option<Layers>],
        cancel: &CancelToken,
        counts: &mut dyn FnMut(usize, bool) -> blockferry_device::Result<()>,
    ) -> Result<()> {
        self.with("merge what the replica wrote", |machine| {
            machine.merge_overlays(number, layers, cancel, counts)
        })
    }
}

impl SourceMachine for Source {
    fn release(&mut self) {
        *self.lock() = None;
        self.nodes = Mutex::default();
    }

    fn reach(&mut self) -> Result<()> {
        self.release();
        self.with("reach the machine", |_machine| Ok(()))
    }

    fn settle(&mut self, held: &[Option<u64>]) -> Result<Vec<Lost>> {
        let held: Vec<Held> = self
            .nodes()?
            .iter()
            .zip(held)
            .map(|(disk, number)| match number {
                Some(number) => Held::cut(disk, *number),
                None => Held::unknown(disk),
            })
            .collect();
        self.room = None;
        self.with("tidy up in the machine", |machine| machine.settle(&held))
    }

    /// Its exports are opened at once.
    fn make_ready(&mut self) -> Result<()> {
        Ok(())
    }

    fn cut(&mut self, number: u64, live: Live) -> Result<Cut> {
        let taken = self.take(number, live)?;
        self.opened(number, taken)
    }

    fn quiesce(&mut self, patience: Duration) -> Result<(Consistency, Vec<String>)> {
        let mut warnings = Vec::new();
        let has_guest = self
            .with("look at the machine", Machine::is_running)?
            .is_some();
        let mut consistency = Consistency::Crash;
        let mut at_rest = None;
        match self.spec.machine.quiesce {
            QuiesceBy::PowerDown if has_guest => {
                self.with("shut the guest down", |m| m.power_down(SHUTTING_DOWN))?;
                consistency = Consistency::AtRest;
            }
            QuiesceBy::Stop => {}
            _ => at_rest = self.freeze(FREEZE_BEFORE_STOP, patience, &mut warnings)?,
        }
        if has_guest && consistency != Consistency::AtRest {
            self.with("stop the guest", Machine::stop)?;
        }
        self.take_writers_away()?;
        if let Some(at_rest) = at_rest {
            at_rest.guarded.leave_frozen();
            consistency = at_rest.consistency;
        }
        Ok((consistency, warnings))
    }

    fn cut_at_rest(&mut self, number: u64, consistency: Consistency) -> Result<Cut> {
        let taken = Taken {
            consistency,
            ..self.take_at_rest(number)?
        };
        self.opened(number, taken)
    }

    fn send_memory(&mut self, uri: &str, pause: Duration, _patience: Duration) -> Result<()> {
        let credentials = self.spec.machine.memory_tls.as_deref();
        self.with("send the memory", |machine| {
            machine.send_memory(uri, pause, credentials)
        })
    }

    fn hold_memory_back(&mut self, held: bool) -> Result<()> {
        self.with("send the memory", |m| m.hold_memory_back(held))
    }

    fn sent(&mut self) -> Result<Sent> {
        self.with("send the memory", |machine| {
            match machine.hand_over_state()? {
                HandOver::Waiting => Ok(Sent::Standing),
                HandOver::Travelling { remaining } => Ok(Sent::Running(remaining)),
                _ => Err(machine.not_handed_over()),
            }
        })
    }

    fn hand_over(&mut self) -> Result<()> {
        self.with("hand the guest over", Machine::hand_over)
    }

    /// Nothing lets it go on but this process.
    fn hold(&mut self) -> Result<()> {
        Ok(())
    }

    fn stood_still(&mut self, number: u64) -> Result<()> {
        let disks = self.nodes()?;
        let running = self.with("look at the machine", Machine::is_running)?;
        let writers = self.with("look for writers", |m| m.writable_exports(&disks))?;
        let written = self.with("look at the bitmaps", |m| m.written_since(number, &disks))?;
        let text = match (running, writers.first(), written.first()) {
            (Some(true), ..) => "the machine runs".to_owned(),
            (_, Some(writer), _) => format!("export {writer:?} may be written"),
            (.., Some(disk)) => format!("disk {disk:?} was written"),
            _ => return Ok(()),
        };
        let text = format!("the source did not stand still since its last cut: {text}");
        Err(Error::new(ErrorKind::Source, text))
    }

    fn resume(&mut self) -> Result<()> {
        self.give_writers_back()?;
        if self
            .with("look at the machine", Machine::is_running)?
            .is_some()
        {
            self.with("take the guest back", Machine::take_back)?;
        }
        let running = self.with("look at the machine", Machine::is_running)?;
        if running == Some(false) {
            self.with("let the guest go on", Machine::resume)?;
        }
        if let Some(agent) = self
            .spec
            .machine
            .agent
            .as_ref()
            .filter(|_| running.is_some())
        {
            thaw(agent)?;
        }
        // Whether it is at rest nobody knows any more.
        let scripts = self.spec.machine.scripts.as_deref();
        scripts.map_or(Ok(()), |scripts| Scripts::load(scripts)?.run_post())
    }

    fn leave(&mut self) -> Result<()> {
        let disks = self.nodes()?;
        self.with("leave the machine", |machine| machine.leave(&disks))
    }

    fn end(&mut self) -> Result<()> {
        self.with("end the machine", Machine::quit)?;
        let end = Instant::now() + ENDING;
        while self.reach().is_ok() {
            if Instant::now() >= end {
                let text = "the machine was told to end, and did not";
                return Err(Error::new(ErrorKind::Source, text));
            }
            std::thread::sleep(crate::runner::TICK);
        }
        Ok(())
    }
}

/// Opens the point of a disk to read, with what changed since the cut that the target holds.
pub(crate) fn open_point(point: &PointExport) -> Result<(Arc<NbdDevice>, Option<ChangeMap>)> {
    let failed = |cause| Error::source(format!("open the point of {}", point.disk), cause);
    let address = NbdAddress::unix(&point.socket, &point.export).map_err(failed)?;
    let mut options = NbdOptions::default();
    options.bitmap.clone_from(&point.bitmap);
    let source = NbdDevice::open_source(&address, &options).map_err(failed)?;
    let changes = match point.bitmap {
        Some(_) => source.changes().map_err(failed)?,
        None => None,
    };
    Ok((source, changes))
}

fn check(
    machine: &Mutex<Option<Machine>>,
    room: Option<&Room>,
    number: u64,
    disks: &[String],
) -> blockferry_device::Result<()> {
    room.map_or(Ok(()), Room::check)?;
    let mut machine = machine.lock().unwrap_or_else(PoisonError::into_inner);
    match machine.as_mut() {
        Some(machine) => machine.check(number, disks),
        None => {
            let text = "the machine of a point that is read was let go";
            Err(blockferry_device::Error::new(ErrorKindOfDevice::Io, text))
        }
    }
}

/// A guest that we, or somebody before us, left frozen.
fn thaw(agent: &Path) -> Result<()> {
    let failed = |cause| Error::source("thaw the guest", cause);
    // Without an agent that answers nobody has frozen it.
    let Ok(mut agent) = Agent::connect(agent, AGENT) else {
        return Ok(());
    };
    if agent.is_frozen(AGENT).map_err(failed)? {
        agent.thaw(AGENT).map_err(failed)?;
    }
    Ok(())
}
