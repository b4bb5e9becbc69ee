//! `export`: one point of a target as an NBD export, until a signal ends it. The target stays as it is.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use std::{fs, io};

use serde::Serialize;
use tempfile::TempDir;

use crate::arguments::ExportArguments;
use crate::engine::device::{CopyOnWrite, OsFile, WriteMode};
use crate::engine::nbd::{
    NbdAddress, NbdExport, NbdListener, NbdServer, NbdServerOptions, Served, ServerEvent,
};
use crate::engine::{
    self, BlockSource, BlockTarget, DiskAddress, ExportPoint, Exported, SessionId, format_size,
    list_targets,
};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Output;
use crate::session::Session;
use crate::verbs::report::{Facts, age, duration, short};

const TICK: Duration = Duration::from_millis(50);

pub(crate) fn run(arguments: &ExportArguments, session: &Session) -> Result<Exit, Failure> {
    let (address, point) = wanted(arguments, session)?;
    let target = super::open_known(&address, session)?;
    let exported = engine::export(target, point).map_err(|error| session.failure(&error))?;
    let Exported {
        source,
        point: known,
        ..
    } = exported;
    let entrance = Entrance::open(arguments)?;
    let told = Told {
        event: "exporting",
        address: entrance.address.to_string(),
        target: address.to_string(),
        point: name_of(point),
        sync_point: known.as_ref().map(|known| known.id.clone()),
        size_bytes: source.size_bytes(),
        copy_on_write: arguments.copy_on_write,
    };
    let export = disk(arguments, source)?;
    let mut options = NbdServerOptions::default();
    options.observer = observer(&session.output);
    if !entrance.is_local {
        let message = format!(
            "whoever reaches {} can read the disk: there is neither password nor encryption",
            told.address
        );
        warn(&session.output, "open_to_network", &message);
    }
    let Entrance {
        listeners, _place, ..
    } = entrance;
    let begun = Instant::now();
    let server = NbdServer::start(export, listeners, options)
        .map_err(|error| Failure::from_error(Exit::Internal, &error))?;
    session.output.line("event", &told);
    session.output.data(&told.address);
    announce(&told, known.as_ref(), session);
    while !session.is_cancelled() {
        thread::sleep(TICK);
    }
    let served = server.shutdown();
    report(&told, &served, begun.elapsed(), &session.output);
    // A server that was told to stop, and stopped, has done what it was to do.
    Ok(Exit::Done)
}

/// The target and its point; an id names both.
fn wanted(
    arguments: &ExportArguments,
    session: &Session,
) -> Result<(DiskAddress, ExportPoint), Failure> {
    let address = arguments.target.absolute();
    let named = arguments
        .target
        .path()
        .and_then(Path::to_str)
        .and_then(SessionId::from_hex);
    let point = arguments.point.map(ExportPoint::from);
    let Some(id) = named.filter(|_| !address.path().is_some_and(Path::exists)) else {
        return Ok((address, point.unwrap_or(ExportPoint::Current)));
    };
    let (address, found) = find(&id.to_string(), session).ok_or_else(|| {
        let message = format!("no target of this host has a point {id}");
        Failure::new(Exit::Target, message)
            .with_hint("the targets and their points are shown by: blockferry status --verbose")
    })?;
    match point {
        Some(other) if other != found => Err(Failure::new(
            Exit::Usage,
            format!("{id} is the {} point of {address}", name_of(found)),
        )),
        _ => Ok((address, found)),
    }
}

/// Where a point of this id is, and which one it is there.
fn find(id: &str, session: &Session) -> Option<(DiskAddress, ExportPoint)> {
    let options = session.target_options();
    list_targets(&options.device_state_root)
        .into_iter()
        .find_map(|address| {
            let status = engine::status(&address, &options).ok()?;
            let has =
                |point: &Option<engine::PointStatus>| point.as_ref().is_some_and(|p| p.id == id);
            let point = if has(&status.point) {
                ExportPoint::Current
            } else if has(&status.rollback_point) {
                ExportPoint::Old
            } else if status.session.is_some_and(|unfinished| unfinished.id == id) {
                ExportPoint::New
            } else {
                return None;
            };
            Some((address, point))
        })
}

fn name_of(point: ExportPoint) -> &'static str {
    match point {
        ExportPoint::Old => "old",
        ExportPoint::New => "new",
        ExportPoint::Current => "current",
    }
}

/// What is served: the point, or the point with what clients write laid over it.
fn disk(arguments: &ExportArguments, source: Arc<dyn BlockSource>) -> Result<NbdExport, Failure> {
    let export = match arguments.copy_on_write {
        false => NbdExport::read_only(&arguments.name, source),
        true => {
            let scratch = scratch(arguments.scratch.as_deref(), source.size_bytes())?;
            CopyOnWrite::new(source, scratch)
                .and_then(|target| NbdExport::writable(&arguments.name, Arc::new(target)))
        }
    };
    export.map_err(|error| Failure::from_error(Exit::Usage, &error))
}

/// A sparse file without a name: it is gone when we are, however we end.
fn scratch(dir: Option<&Path>, size_bytes: u64) -> Result<Arc<dyn BlockTarget>, Failure> {
    let usual = || std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from);
    let dir = dir.map_or_else(usual, Path::to_owned);
    let label = format!("a file in {}", dir.display());
    let failed = |error: &(dyn std::error::Error + 'static)| {
        let failure = Failure::from_error(Exit::Target, error);
        let message = format!(
            "cannot keep changes in {}: {}",
            dir.display(),
            failure.message()
        );
        Failure::new(Exit::Target, message)
    };
    let file = tempfile::tempfile_in(&dir).map_err(|error| failed(&error))?;
    let file = OsFile::from_file(label, file, WriteMode::Buffered);
    let sized = file.and_then(|file| file.resize(size_bytes).map(|()| file));
    match sized {
        Ok(file) => Ok(Arc::new(file)),
        Err(error) => Err(failed(&error)),
    }
}

/// Where clients come in.
struct Entrance {
    listeners: Vec<NbdListener>,
    address: NbdAddress,
    /// Only who is on this host can come in.
    is_local: bool,
    /// Removed with what is in it.
    _place: Option<Socket>,
}

/// A socket that is removed with its directory, where that was made for it.
struct Socket {
    path: PathBuf,
    _directory: Option<TempDir>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        fs::remove_file(&self.path).ok();
    }
}

impl Entrance {
    fn open(arguments: &ExportArguments) -> Result<Self, Failure> {
        match &arguments.listen {
            Some(address) => Self::tcp(address, &arguments.name),
            None => Self::unix(arguments.socket.as_deref(), &arguments.name),
        }
    }

    fn unix(path: Option<&Path>, name: &str) -> Result<Self, Failure> {
        let (path, directory) = match path {
            Some(path) => (
                std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
                None,
            ),
            None => {
                // Nobody else is to reach the socket, whatever its own mode is for a moment.
                let made = tempfile::Builder::new()
                    .prefix("blockferry-")
                    .permissions(fs::Permissions::from_mode(0o700))
                    .tempdir();
                let directory = made.map_err(|error| {
                    let message = format!("cannot make a directory for a socket: {error}");
                    Failure::new(Exit::Usage, message)
                })?;
                (directory.path().join("nbd.sock"), Some(directory))
            }
        };
        let failed = |error: io::Error| {
            let message = format!("cannot listen at {}: {error}", path.display());
            let failure = Failure::new(Exit::Usage, message);
            match error.kind() {
                io::ErrorKind::AddrInUse => failure.with_hint(
                    "something of that name is there: remove it if nobody listens at it",
                ),
                _ => failure,
            }
        };
        let listener = UnixListener::bind(&path).map_err(failed)?;
        let socket = Socket {
            path: path.clone(),
            _directory: directory,
        };
        // Who may connect may read the disk.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let address = NbdAddress::unix(&path, name).map_err(|error| usage(&error))?;
        Ok(Self {
            listeners: vec![listener.into()],
            address,
            is_local: true,
            _place: Some(socket),
        })
    }

    /// At all addresses of a name; what is told is the first.
    fn tcp(address: &str, name: &str) -> Result<Self, Failure> {
        let failed = |error: io::Error| {
            Failure::new(Exit::Usage, format!("cannot listen at {address}: {error}"))
        };
        let addresses: Vec<SocketAddr> = address.to_socket_addrs().map_err(failed)?.collect();
        let is_local = addresses.iter().all(|address| address.ip().is_loopback());
        let listeners = addresses.into_iter().map(TcpListener::bind);
        let listeners: Vec<TcpListener> = listeners.collect::<io::Result<_>>().map_err(failed)?;
        let first = listeners
            .first()
            .ok_or_else(|| failed(io::Error::other("the name has no address")))?;
        let at = first.local_addr().map_err(failed)?;
        let host = at.ip().to_string();
        let address = NbdAddress::tcp(&host, at.port(), name).map_err(|error| usage(&error))?;
        Ok(Self {
            listeners: listeners.into_iter().map(NbdListener::from).collect(),
            address,
            is_local,
            _place: None,
        })
    }
}

fn usage(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::from_error(Exit::Usage, error)
}

#[derive(Serialize)]
struct Told {
    event: &'static str,
    address: String,
    target: String,
    point: &'static str,
    sync_point: Option<String>,
    size_bytes: u64,
    copy_on_write: bool,
}

#[derive(Serialize)]
struct Warning<'a> {
    code: &'static str,
    message: &'a str,
}

#[derive(Serialize)]
struct Summary<'a> {
    address: &'a str,
    target: &'a str,
    point: &'a str,
    clients: u64,
    read_bytes: u64,
    written_bytes: u64,
    elapsed_seconds: f64,
}

/// Failures of the disk are told once for each kind that comes in a row: a client may try again as fast as it can.
fn observer(output: &Arc<Output>) -> Arc<dyn Fn(&ServerEvent<'_>) + Send + Sync> {
    let output = Arc::clone(output);
    let last = Mutex::new(String::new());
    Arc::new(move |event| match event {
        ServerEvent::Failed { error, .. } => {
            let failure = Failure::from_error(Exit::Target, *error);
            let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
            if *last != failure.message() {
                warn(&output, "export_failed", failure.message());
                failure.message().clone_into(&mut last);
            }
        }
        ServerEvent::SentAway => output.detail("a client was sent away: there are too many"),
        ServerEvent::Arrived { client } => output.detail(format_args!("client {client} came")),
        ServerEvent::Left {
            client,
            error: None,
        } => {
            output.detail(format_args!("client {client} left"));
        }
        ServerEvent::Left {
            client,
            error: Some(error),
        } => {
            output.detail(format_args!("client {client} was cut off: {error}"));
        }
        _ => {}
    })
}

fn warn(output: &Output, code: &'static str, message: &str) {
    output.line("warning", &Warning { code, message });
    output.warn(message);
}

fn announce(told: &Told, known: Option<&engine::PointStatus>, session: &Session) {
    let output = &session.output;
    let how = match told.copy_on_write {
        true => "what clients write is forgotten at the end",
        false => "read-only",
    };
    output.say(format_args!(
        "serving the {} point of {}, {how}",
        told.point, told.target
    ));
    let mut facts = Facts::default();
    facts.add("size", format_size(told.size_bytes));
    facts.add_some("point", known.map(|known| short(&known.id)));
    facts.add_some("made", known.map(|known| age(known.age_seconds)));
    facts.say(output);
    output.say("  ends with Ctrl-C; until then nothing else can be done with the target");
}

fn report(told: &Told, served: &Served, elapsed: Duration, output: &Output) {
    let elapsed_seconds = elapsed.as_secs_f64();
    output.summary(
        "export",
        &Summary {
            address: &told.address,
            target: &told.target,
            point: told.point,
            clients: served.clients,
            read_bytes: served.read_bytes,
            written_bytes: served.written_bytes,
            elapsed_seconds,
        },
    );
    let mut facts = Facts::default();
    facts.add("clients", served.clients);
    facts.add("read", format_size(served.read_bytes));
    facts.add("written", format_size(served.written_bytes));
    facts.add("time", duration(elapsed_seconds));
    output.say("the export ended; the target is as it was");
    facts.say(output);
}
