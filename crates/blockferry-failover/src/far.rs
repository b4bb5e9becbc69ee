//! A machine on another host: what a job asks of the blockferry there, and what it answers.
//!
//! ```text
//! job                          host of the machine
//! FarSource  ── ask, answer ──  serve_machine ── Source ── QMP, agent, scripts
//!     └──────── pages ────────  serve_source  ── the export of a point, one connection for each disk
//! ```
//! What must not wait for the way between them is done there: a freeze, its cut and its thaw are one question, and a
//! machine that was stopped for its last cut goes on by itself when nobody has said in time that it is to be held.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockferry_device::{Consistency, ErrorKind as DeviceErrorKind};
use blockferry_engine::SourceCheck;
use blockferry_qemu::Lost;
use blockferry_transport::message::{MAX_ASKED_BYTES, Open, Role};
use blockferry_transport::{Connection, Message};
use serde::{Deserialize, Serialize};

use crate::changes::{Runs, Travelling};
use crate::error::{Error, ErrorKind, Result};
use crate::source::{Cut, CutDisk, CutSource, Live, Sent, SourceMachine};
use crate::spec::{HandOverBy, Hooks, JobSpec};
use crate::store::Origin;

/// The way to other hosts.
pub trait Hosts: Send + Sync {
    /// Starts a blockferry on `host`, which waits to be told what it is to open, and knows what to do with a [`Role::Machine`]
    /// and with the NBD exports of one as sources.
    ///
    /// # Errors
    /// The host cannot be reached, or has no blockferry that speaks this version.
    fn connect(&self, host: &str) -> Result<HostConnection>;
}

/// A connection to a blockferry on another host, and what has to live as long.
#[non_exhaustive]
pub struct HostConnection {
    /// To ask over.
    pub connection: Connection,
    /// Dropped after the connection, as the process that carries it.
    pub carrier: Box<dyn Send + Sync>,
}

impl HostConnection {
    /// A connection that lives as long as `carrier`.
    pub fn new(connection: Connection, carrier: impl Send + Sync + 'static) -> Self {
        Self {
            connection,
            carrier: Box::new(carrier),
        }
    }

    /// Ends it in order, which nobody waits for: the way may be lost.
    fn end(self) {
        std::thread::spawn(move || {
            self.connection.finish();
            drop(self.carrier);
        });
    }

    fn open(&self, role: Role, path: &str) -> Result<()> {
        let open = Open {
            role,
            path: path.as_bytes().to_vec(),
            options: b"{}".to_vec(),
        };
        self.connection.trust();
        let sent = self.connection.outbox().send(Message::Open(open));
        sent.map_err(|cause| lost(&self.connection, cause))
    }
}

impl fmt::Debug for HostConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.connection.fmt(f)
    }
}

/// What is asked of a machine.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) enum Ask {
    /// First of all: which machine it is.
    Machine(Box<JobSpec>),
    Reach,
    Settle(Vec<Option<u64>>),
    Cut(u64, Live),
    /// With the milliseconds after which it goes on by itself.
    Quiesce(u64),
    CutAtRest(u64),
    Check(u64),
    Hold,
    /// Where to, and milliseconds: for the rest of it, and after which a guest that stands still goes on by itself.
    SendMemory(String, u64, u64),
    HoldMemoryBack(bool),
    Sent,
    HandOver,
    StoodStill(u64),
    Resume,
    Leave,
    End,
    /// No machine: a committed job of that host, whose way back is to be one of the host that asks.
    Job(String),
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) enum Answer {
    Done,
    /// Disks of which it is not known what changed, each with the reason.
    Settled(Vec<(String, String)>),
    Cut(Box<FarCut>),
    Quiesced(String, Vec<String>),
    Sent(Sent),
    /// What it was to do, and what is known of its disks: of each a number, a root, and what was written.
    Job(Box<JobSpec>, Vec<(u64, String, Runs)>),
    Failed(Failed),
}

/// A cut, and how its points are read there.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct FarCut {
    pub(crate) consistency: String,
    pub(crate) held_up_ms: u64,
    pub(crate) warnings: Vec<String>,
    /// The address of each point as an NBD export, and what changed.
    pub(crate) points: Vec<(String, Option<Travelling>)>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Failed {
    kind: FailedKind,
    text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FailedKind {
    Usage,
    Refused,
    Hook,
    Source,
}

impl Failed {
    pub(crate) fn of(error: &Error) -> Self {
        Self {
            kind: match error.kind() {
                ErrorKind::Usage => FailedKind::Usage,
                ErrorKind::Refused => FailedKind::Refused,
                ErrorKind::Hook => FailedKind::Hook,
                _ => FailedKind::Source,
            },
            text: error.in_full(),
        }
    }

    fn error(&self, host: &str) -> Error {
        let kind = match self.kind {
            FailedKind::Usage => ErrorKind::Usage,
            FailedKind::Refused => ErrorKind::Refused,
            FailedKind::Hook => ErrorKind::Hook,
            FailedKind::Source => ErrorKind::Source,
        };
        Error::new(kind, format!("on {host}: {}", self.text))
    }
}

/// All that a point can be, as it is told.
const CONSISTENCIES: [Consistency; 5] = [
    Consistency::Fuzzy,
    Consistency::Crash,
    Consistency::FileSystem,
    Consistency::Application,
    Consistency::AtRest,
];

/// A message of its JSON, if that is not too long.
pub(crate) fn packed(value: &impl Serialize) -> Result<Vec<u8>> {
    let json = serde_json::to_vec(value)
        .map_err(|cause| Error::because(ErrorKind::Internal, "tell another host", cause))?;
    if json.len() > MAX_ASKED_BYTES {
        let text = format!(
            "tell another host: expected at most {MAX_ASKED_BYTES} bytes, found {}",
            json.len()
        );
        return Err(Error::new(ErrorKind::Refused, text));
    }
    Ok(json)
}

fn lost(connection: &Connection, cause: blockferry_transport::Error) -> Error {
    let text = format!("the way to {}", connection.label());
    Error::because(ErrorKind::Peer, text, cause)
}

/// The blockferry on the machine's host. Connected to when it is needed.
struct Control {
    host: String,
    hosts: Arc<dyn Hosts>,
    spec: JobSpec,
    connected: Option<HostConnection>,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Control");
        debug.field("host", &self.host).finish_non_exhaustive()
    }
}

impl Control {
    fn ask(&mut self, ask: &Ask) -> Result<Answer> {
        let connected = match self.connected.take() {
            Some(connected) => connected,
            None => self.connect()?,
        };
        let answer = answer_to(&connected, ask)?;
        // A connection that failed is made again the next time.
        self.connected = Some(connected);
        match answer {
            Answer::Failed(failed) => Err(failed.error(&self.host)),
            answer => Ok(answer),
        }
    }

    fn connect(&self) -> Result<HostConnection> {
        let connected = self.hosts.connect(&self.host)?;
        connected.open(Role::Machine, &self.spec.name)?;
        let machine = Ask::Machine(Box::new(self.spec.clone()));
        match answer_to(&connected, &machine)? {
            Answer::Failed(failed) => Err(failed.error(&self.host)),
            _ => Ok(connected),
        }
    }
}

fn answer_to(connected: &HostConnection, ask: &Ask) -> Result<Answer> {
    let connection = &connected.connection;
    let sent = connection.outbox().send(Message::Ask(packed(ask)?));
    sent.map_err(|cause| lost(connection, cause))?;
    let wrong = |found: &str| {
        let text = format!(
            "{}: expected an answer, found {found}: bring both sides to one version",
            connection.label()
        );
        Err(Error::new(ErrorKind::Source, text))
    };
    match connection.receive() {
        Ok(Message::Answer(json)) => match serde_json::from_slice(&json) {
            Ok(answer) => Ok(answer),
            Err(cause) => wrong(&cause.to_string()),
        },
        Ok(Message::Failed(failed)) => wrong(&failed.text),
        Ok(other) => wrong(&format!("a message {}", other.name())),
        Err(cause) => Err(lost(connection, cause)),
    }
}

impl Drop for FarSource {
    fn drop(&mut self) {
        self.release();
    }
}

/// A machine on another host.
#[derive(Debug)]
pub(crate) struct FarSource {
    /// Points that are read ask it as well.
    control: Arc<Mutex<Control>>,
    disks: usize,
    /// Connections that no disk has yet: none has to be waited for while the machine stands still.
    ready: Vec<HostConnection>,
}

impl FarSource {
    pub(crate) fn new(spec: &JobSpec, host: &str, hosts: Arc<dyn Hosts>) -> Self {
        // What is done with the replica is no business of the other host's.
        let mut told = JobSpec {
            hooks: Hooks::default(),
            hand_over: HandOverBy::Cold,
            ..spec.clone()
        };
        if let Some(way) = &mut told.reverse {
            way.hooks = Hooks::default();
        }
        told.machine.host = None;
        let control = Control {
            host: host.to_owned(),
            hosts,
            spec: told,
            connected: None,
        };
        Self {
            control: Arc::new(Mutex::new(control)),
            disks: spec.disk.len(),
            ready: Vec::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, ask: &Ask) -> Result<Answer> {
        self.lock().ask(ask)
    }

    /// For what has nothing to tell.
    fn tell(&self, ask: &Ask) -> Result<()> {
        match self.ask(ask)? {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    fn opened(&mut self, number: u64, answer: Answer) -> Result<Cut> {
        let Answer::Cut(cut) = answer else {
            return Err(unexpected(&answer));
        };
        let mut disks = Vec::new();
        for (address, changes) in &cut.points {
            let Some(connected) = self.ready.pop() else {
                return Err(unexpected(&Answer::Cut(cut)));
            };
            connected.open(Role::Source, address)?;
            let changes = changes.as_ref().map(|told| {
                told.map().ok_or_else(|| {
                    let text = "changes of a disk: expected runs inside of it";
                    Error::new(ErrorKind::Source, text)
                })
            });
            disks.push(CutDisk {
                source: CutSource::There(connected),
                changes: changes.transpose()?.map(Arc::new),
            });
        }
        if disks.len() != self.disks {
            return Err(unexpected(&Answer::Cut(cut)));
        }
        let control = Arc::clone(&self.control);
        let check = move || {
            let mut control = control.lock().unwrap_or_else(PoisonError::into_inner);
            let asked = control.ask(&Ask::Check(number));
            asked.map(drop).map_err(|error| {
                blockferry_device::Error::new(DeviceErrorKind::Io, error.in_full())
            })
        };
        Ok(Cut {
            consistency: consistency(&cut.consistency)?,
            disks,
            held_up: Duration::from_millis(cut.held_up_ms),
            warnings: cut.warnings,
            check: SourceCheck::new(check),
        })
    }
}

/// A committed job of another host, and what is known of its disks.
pub(crate) fn job_of(hosts: &dyn Hosts, host: &str, name: &str) -> Result<(JobSpec, Vec<Origin>)> {
    let connected = hosts.connect(host)?;
    connected.open(Role::Machine, name)?;
    let answer = answer_to(&connected, &Ask::Job(name.to_owned()))?;
    connected.end();
    let (spec, told) = match answer {
        Answer::Job(spec, origins) => (spec, origins),
        Answer::Failed(failed) => return Err(failed.error(host)),
        other => return Err(unexpected(&other)),
    };
    let origins = told.into_iter().map(|(number, root, changed)| {
        let changed = changed.extents().ok_or_else(|| {
            let text = format!("job {name} of {host}: what changed: expected runs of a disk");
            Error::new(ErrorKind::Source, text)
        })?;
        Ok(Origin {
            number,
            root,
            changed,
        })
    });
    Ok((*spec, origins.collect::<Result<_>>()?))
}

fn consistency(told: &str) -> Result<Consistency> {
    let known = CONSISTENCIES.into_iter();
    let mut known = known.filter(|known| known.to_string() == told);
    known.next().ok_or_else(|| {
        let text = format!("a point of another host: expected how good it is, found {told:?}");
        Error::new(ErrorKind::Source, text)
    })
}

fn unexpected(answer: &Answer) -> Error {
    let text = format!("another host answered what was not asked: {answer:?}");
    Error::new(ErrorKind::Source, text)
}

pub(crate) fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn panicked() -> Error {
    Error::new(ErrorKind::Internal, "a thread that connected panicked")
}

impl SourceMachine for FarSource {
    fn release(&mut self) {
        let ready = std::mem::take(&mut self.ready);
        let connected = self.lock().connected.take();
        ready
            .into_iter()
            .chain(connected)
            .for_each(HostConnection::end);
    }

    fn reach(&mut self) -> Result<()> {
        self.release();
        self.tell(&Ask::Reach)
    }

    fn settle(&mut self, held: &[Option<u64>]) -> Result<Vec<Lost>> {
        match self.ask(&Ask::Settle(held.to_vec()))? {
            Answer::Settled(lost) => {
                let lost = lost.into_iter();
                Ok(lost.map(|(disk, why)| Lost::new(disk, why)).collect())
            }
            other => Err(unexpected(&other)),
        }
    }

    /// One connection for each disk, side by side.
    fn make_ready(&mut self) -> Result<()> {
        let (host, hosts) = {
            let control = self.lock();
            (control.host.clone(), Arc::clone(&control.hosts))
        };
        let missing = self.disks.saturating_sub(self.ready.len());
        let made: Vec<Result<HostConnection>> = std::thread::scope(|scope| {
            let connecting: Vec<_> = (0..missing)
                .map(|_| scope.spawn(|| hosts.connect(&host)))
                .collect();
            let joined = connecting.into_iter().map(|thread| thread.join());
            joined
                .map(|made| made.unwrap_or_else(|_panic| Err(panicked())))
                .collect()
        });
        for made in made {
            self.ready.push(made?);
        }
        Ok(())
    }

    fn cut(&mut self, number: u64, live: Live) -> Result<Cut> {
        let answer = self.ask(&Ask::Cut(number, live))?;
        self.opened(number, answer)
    }

    fn quiesce(&mut self, patience: Duration) -> Result<(Consistency, Vec<String>)> {
        match self.ask(&Ask::Quiesce(milliseconds(patience)))? {
            Answer::Quiesced(told, warnings) => Ok((consistency(&told)?, warnings)),
            other => Err(unexpected(&other)),
        }
    }

    fn cut_at_rest(&mut self, number: u64, consistency: Consistency) -> Result<Cut> {
        let answer = self.ask(&Ask::CutAtRest(number))?;
        let cut = self.opened(number, answer)?;
        Ok(Cut { consistency, ..cut })
    }

    fn hold(&mut self) -> Result<()> {
        self.tell(&Ask::Hold)
    }

    fn send_memory(&mut self, uri: &str, pause: Duration, patience: Duration) -> Result<()> {
        let (pause_ms, patience_ms) = (milliseconds(pause), milliseconds(patience));
        self.tell(&Ask::SendMemory(uri.to_owned(), pause_ms, patience_ms))
    }

    fn hold_memory_back(&mut self, held: bool) -> Result<()> {
        self.tell(&Ask::HoldMemoryBack(held))
    }

    fn sent(&mut self) -> Result<Sent> {
        match self.ask(&Ask::Sent)? {
            Answer::Sent(sent) => Ok(sent),
            other => Err(unexpected(&other)),
        }
    }

    fn hand_over(&mut self) -> Result<()> {
        self.tell(&Ask::HandOver)
    }

    fn stood_still(&mut self, number: u64) -> Result<()> {
        self.tell(&Ask::StoodStill(number))
    }

    fn resume(&mut self) -> Result<()> {
        self.tell(&Ask::Resume)
    }

    fn leave(&mut self) -> Result<()> {
        self.tell(&Ask::Leave)
    }

    fn end(&mut self) -> Result<()> {
        self.tell(&Ask::End)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use blockferry_transport::{Deadlines, Link};

    use super::*;

    const SPEC: &str = "name = \"web\"\n[machine]\nhost = \"b\"\nqmp = \"/q\"\n[[disk]]\nnode = \"d\"\ntarget = \"/t\"\n";

    /// A host whose blockferry answers the first ask as it should, and the next ones with this.
    struct Scripted(String, AtomicU32);

    impl Hosts for Scripted {
        fn connect(&self, _host: &str) -> Result<HostConnection> {
            self.1.fetch_add(1, Ordering::Relaxed);
            let (near, far) = Link::pair().unwrap();
            let told = self.0.clone();
            std::thread::spawn(move || {
                let connection = Connection::open(far, Deadlines::default()).unwrap();
                connection.trust();
                let mut answers = vec![told.as_str(), "\"done\""];
                while let Ok(message) = connection.receive() {
                    if let Message::Ask(_) = message {
                        let answer = answers.pop().unwrap_or(&told);
                        let answer = Message::Answer(answer.as_bytes().to_vec());
                        connection.outbox().send(answer).unwrap();
                    }
                }
            });
            let connection = Connection::open(near, Deadlines::default());
            let connection = connection.map_err(|e| Error::because(ErrorKind::Peer, "open", e))?;
            Ok(HostConnection::new(connection, ()))
        }
    }

    fn machine(told: &str) -> (FarSource, Arc<Scripted>) {
        let spec = JobSpec::from_toml(SPEC).unwrap();
        let hosts = Arc::new(Scripted(told.to_owned(), AtomicU32::new(0)));
        (FarSource::new(&spec, "b", hosts.clone()), hosts)
    }

    #[test]
    fn what_another_host_answers_wrongly_is_an_error_that_is_not_tried_again() {
        let point = |changes: &str| {
            let cut = r#"{"cut":{"consistency":"crash-consistent","held-up-ms":1,"warnings":[],"points":["#;
            format!("{cut}[\"nbd://x/y\",{changes}]]}}}}")
        };
        for told in [
            "",
            "\"done\"",
            "{\"sent\":\"standing\"}",
            "{\"cut\":{}}",
            "\"no-such-answer\"",
            "{\"failed\":{\"kind\":\"source\",\"text\":\"there is no such disk\"}}",
            &point(r#"{"size_bytes":65536,"runs":[1]}"#),
            &point(r#"{"size_bytes":65536,"runs":[1,1]}"#),
            &point(r#"{"size_bytes":65536,"runs":[0,18446744073709551615]}"#),
            &point("null],[\"nbd://x/z\",null"),
            &point("null").replace("crash-consistent", "splendid"),
        ] {
            let (mut source, _) = machine(told);
            source.make_ready().unwrap();

            let error = source.cut(7, Live::Frozen).map(drop).unwrap_err();

            assert_eq!(error.kind(), ErrorKind::Source, "{told}: {error}");
        }
    }

    #[test]
    fn a_cut_comes_with_what_changed_and_a_lost_way_is_made_again() {
        let told = r#"{"cut":{"consistency":"at rest","held-up-ms":1,"warnings":["w"],"points":[["nbd://x/y",
            {"size_bytes":131072,"runs":[1,1]}]]}}"#;
        let (mut source, hosts) = machine(told);
        source.make_ready().unwrap();

        let cut = source.cut(7, Live::Frozen).unwrap();

        assert_eq!(cut.consistency, Consistency::AtRest);
        assert_eq!(cut.warnings, ["w"]);
        let changed = cut.disks[0].changes.as_ref().unwrap();
        assert_eq!(changed.total_bytes(blockferry_core::Content::Data), 65_536);
        assert_eq!(hosts.1.load(Ordering::Relaxed), 2);
        source.release();
        source
            .cut(8, Live::Frozen)
            .map(drop)
            .expect_err("nothing is ready");
        assert_eq!(hosts.1.load(Ordering::Relaxed), 3);
    }
}
