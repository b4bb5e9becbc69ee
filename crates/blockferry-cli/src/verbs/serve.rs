//! `serve`: the far end of a sync that another host began. What goes wrong is told to the other side, which shows it.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::thread;
use std::time::{Duration, Instant};

use crate::arguments::ServeArguments;
use crate::engine::failover::serve_machine;
use crate::engine::transport::message::{Open, Role};
use crate::engine::transport::{self, Message};
use crate::engine::{
    self, Connection, Context, Deadlines, DiskAddress, Error, ErrorKind, Link, PeerObserver,
    Target, TargetOptions,
};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::file_url;
use crate::remote::Asked;
use crate::session::Session;
use crate::verbs::failover::{freeze_guard, jobs_directory};

mod config;
mod listen;
mod log;

/// How long the far end of a connection that was cut may still hold the target: a silent peer is given up after 30
/// seconds.
const HELD: Duration = Duration::from_secs(45);
const TICK: Duration = Duration::from_millis(200);

pub(crate) fn run(arguments: &ServeArguments, session: &Session) -> Result<Exit, Failure> {
    match (&arguments.listen, &arguments.config) {
        (Some(address), Some(config)) => listen::run(address, config, session),
        _ => over_stdio(session),
    }
}

/// Standard output carries the protocol.
fn over_stdio(session: &Session) -> Result<Exit, Failure> {
    if session.output.is_json() {
        let message =
            "serve --stdio speaks to another blockferry over standard output: it has no --json";
        return Err(Failure::new(Exit::Usage, message));
    }
    if io::stdin().is_terminal() || io::stdout().is_terminal() {
        let message = "serve --stdio speaks to another blockferry, not to a terminal";
        return Err(Failure::new(Exit::Usage, message)
            .with_hint("on the other host: blockferry sync SOURCE USER@THIS-HOST:PATH starts it"));
    }
    let lost = |error: &transport::Error| Failure::from_error(Exit::Peer, error);
    let connection =
        Connection::open(stdio()?, Deadlines::default()).map_err(|error| lost(&error))?;
    let opened = match opened(&connection) {
        Ok(opened) => opened,
        // Kept ready by a job, and not needed.
        Err(error) if error.kind() == transport::ErrorKind::Lost => return Ok(Exit::Done),
        Err(error) => return Err(lost(&error)),
    };
    if let Ok(Open {
        role: Role::Machine,
        ..
    }) = &opened
    {
        // The other side was told, or is gone.
        let served = serve_machine(connection, &jobs_directory(), freeze_guard());
        return Ok(served.map_or(Exit::Source, |()| Exit::Done));
    }
    let served = opened.and_then(|open| {
        let asked = Asked::from_json(&open.options).map_err(|why| not_known(&why))?;
        Ok((open, asked))
    });
    let outcome = match served {
        Ok((open, asked)) => match DiskAddress::parse(OsString::from_vec(open.path)) {
            Ok(address) => {
                let place = session.target_options();
                let context = session.silent_context();
                serve(
                    connection,
                    open.role,
                    Disk { address, place },
                    &asked,
                    context,
                )
            }
            Err(error) => refuse(connection, Error::new(ErrorKind::Usage, error.to_string())),
        },
        Err(error) => refuse(connection, error),
    };
    // The other side was told, or is gone.
    Ok(outcome.map_or_else(|error| session.failure(&error).exit(), |_| Exit::Done))
}

/// What the other side wants first; the outer error is that of the link.
fn opened(connection: &Connection) -> transport::Result<Result<Open, Error>> {
    Ok(match connection.receive()? {
        Message::Open(open) => Ok(open),
        other => {
            let text = format!("expected what to open, found a message {}", other.name());
            Err(Error::new(ErrorKind::Peer, text))
        }
    })
}

/// Standard input and output without the buffers of the library, which would hold back what is sent.
fn stdio() -> Result<Link, Failure> {
    let files = || -> io::Result<(File, File)> {
        let input = io::stdin().as_fd().try_clone_to_owned()?;
        let output = io::stdout().as_fd().try_clone_to_owned()?;
        Ok((input.into(), output.into()))
    };
    let (input, output) = files().map_err(|error| {
        Failure::new(
            Exit::Peer,
            format!("take standard input and output: {error}"),
        )
    })?;
    Ok(Link::new(input, output, || {}, "the other side"))
}

fn refuse<T>(connection: Connection, error: Error) -> Result<T, Error> {
    engine::refuse_peer(connection, &error);
    Err(error)
}

/// A disk that is served.
#[derive(Debug)]
struct Disk {
    address: DiskAddress,
    /// Of a target.
    place: TargetOptions,
}

/// What this side knows of a run that is over.
#[derive(Debug)]
struct Served {
    outcome: String,
    /// To a target that is here.
    sent_bytes: Option<u64>,
}

impl Served {
    /// Nothing was brought to a target that is here.
    fn nothing_here(outcome: &str) -> Self {
        Self {
            outcome: outcome.to_owned(),
            sent_bytes: None,
        }
    }
}

/// Does this side's half of the run.
fn serve(
    connection: Connection,
    role: Role,
    disk: Disk,
    asked: &Asked,
    mut context: Context,
) -> Result<Served, Error> {
    if role == Role::Source {
        serve_source(connection, &disk.address, asked, &context)?;
        return Ok(Served::nothing_here("read"));
    }
    context = context.with_observer(PeerObserver::new(&connection));
    serve_target(connection, disk, asked, &context)
}

fn not_known(why: &str) -> Error {
    let version = env!("CARGO_PKG_VERSION");
    Error::new(
        ErrorKind::Usage,
        format!(
            "version {version} of blockferry does not understand what is asked of it: {why}; update the older side"
        ),
    )
}

fn serve_source(
    connection: Connection,
    address: &DiskAddress,
    asked: &Asked,
    context: &Context,
) -> Result<(), Error> {
    match super::open(address, asked.pace.crash_consistent) {
        Ok(disk) => engine::serve_source(&disk, connection, threads(asked), context).map(drop),
        Err(failure) => {
            let mut text = failure.message().to_owned();
            for hint in failure.hints() {
                text = format!("{text} ({hint})");
            }
            refuse(connection, Error::new(ErrorKind::Source, text))
        }
    }
}

/// As many as asked for, or as there are processors.
pub(crate) fn threads(asked: &Asked) -> usize {
    let processors = || thread::available_parallelism().map_or(2, usize::from);
    asked.pace.threads.map_or_else(processors, usize::from)
}

fn serve_target(
    connection: Connection,
    disk: Disk,
    asked: &Asked,
    context: &Context,
) -> Result<Served, Error> {
    let Disk { address, mut place } = disk;
    let address = address.absolute();
    if let Some(state) = &asked.state {
        match file_url::path_or_url(state.into()) {
            Ok(path) => place.state_dir = Some(path),
            Err(why) => return refuse(connection, not_known(why)),
        }
    }
    if asked.dry_run {
        engine::predict_from_peer(connection, &address, &place, &asked.options(), context)?;
        return Ok(Served::nothing_here("predicted"));
    }
    let end = Instant::now() + HELD;
    let opened = loop {
        match Target::open(&address, &place) {
            Err(error)
                if asked.reconnecting
                    && error.is_busy()
                    && Instant::now() < end
                    && !context.cancel.is_cancelled() =>
            {
                thread::sleep(TICK);
            }
            opened => break opened,
        }
    };
    match opened {
        Ok(mut target) => {
            let options = asked.options();
            let receipt = engine::sync_from_peer(connection, &mut target, &options, context)?;
            Ok(Served {
                outcome: receipt.outcome.to_string(),
                sent_bytes: Some(receipt.sent_bytes),
            })
        }
        Err(error) => refuse(connection, error),
    }
}
