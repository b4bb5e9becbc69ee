//! `serve --listen`: disks under names, for hosts whose certificates the configuration admits.

use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::SIGHUP;
use tracing::{debug, error, info, warn};

use super::config::Config;
use super::{Disk, Served, log, not_known, opened, serve};
use crate::engine::transport::message::{Open, Role};
use crate::engine::transport::tls::Peer;
use crate::engine::{self, Connection, Context, Deadlines, Error, ErrorKind, TargetOptions};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::remote::Asked;
use crate::session::Session;

/// For a peer to prove who it is.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Peers that may be about to; each takes a thread and less than 256 KiB.
const HANDSHAKES: usize = 64;
/// How long runs may take to end in order, once the server is to stop.
const STOPPING: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(100);

pub(super) fn run(address: &str, file: &Path, session: &Session) -> Result<Exit, Failure> {
    let config = Config::load(file)?;
    let listeners = bind(address)?;
    let reload = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGHUP, Arc::clone(&reload)).map_err(|error| {
        Failure::new(
            Exit::Internal,
            format!("cannot install a signal handler: {error}"),
        )
    })?;
    log::begin(&session.output);
    let server = Arc::new(Server {
        config: RwLock::new(Arc::new(config)),
        shaking: Arc::default(),
        serving: Arc::default(),
        context: session.silent_context(),
        place: session.target_options(),
    });
    let (accepted, arriving) = sync_channel(HANDSHAKES);
    for listener in listeners {
        let at = listener
            .local_addr()
            .map_or_else(|_| address.to_owned(), |at| at.to_string());
        info!(address = %at, exports = server.config().exports() as u64, "listening");
        let accepted = accepted.clone();
        thread::spawn(move || accept(&listener, &accepted));
    }
    while !session.is_cancelled() {
        match arriving.recv_timeout(TICK) {
            Ok((socket, from)) => {
                let server = Arc::clone(&server);
                let attending = move || server.attend(socket, &from);
                if let Err(error) = thread::Builder::new().spawn(attending) {
                    warn!(%from, %error, "sent away: no thread for it");
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Failure::new(Exit::Internal, "every listener ended"));
            }
        }
        if reload.swap(false, Ordering::Relaxed) {
            server.reload(file);
        }
    }
    server.stop();
    // A server that was told to stop, and stopped, has done what it was to do.
    Ok(Exit::Done)
}

fn bind(address: &str) -> Result<Vec<TcpListener>, Failure> {
    let failed = |error: std::io::Error| {
        Failure::new(Exit::Usage, format!("cannot listen at {address}: {error}"))
    };
    let addresses: Vec<SocketAddr> = address.to_socket_addrs().map_err(failed)?.collect();
    addresses
        .into_iter()
        .map(|address| TcpListener::bind(address).map_err(failed))
        .collect()
}

/// Until nobody takes what it accepts.
fn accept(listener: &TcpListener, accepted: &SyncSender<(TcpStream, SocketAddr)>) {
    loop {
        match listener.accept() {
            Ok(arrived) => {
                if accepted.send(arrived).is_err() {
                    return;
                }
            }
            Err(error) => {
                // Too many files are open, or the peer left already.
                warn!(%error, "cannot accept a connection");
                thread::sleep(TICK);
            }
        }
    }
}

#[derive(Debug)]
struct Server {
    config: RwLock<Arc<Config>>,
    shaking: Arc<AtomicUsize>,
    serving: Arc<AtomicUsize>,
    context: Context,
    place: TargetOptions,
}

/// One of so many at once.
struct Slot(Arc<AtomicUsize>);

impl Slot {
    fn take(taken: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let free = |count: usize| (count < most).then_some(count + 1);
        taken
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, free)
            .ok()
            .map(|_| Self(Arc::clone(taken)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What a peer that is known may do.
struct Granted {
    disk: Disk,
    role: Role,
    asked: Asked,
    _slot: Slot,
}

impl Server {
    fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs under way go on as they began.
    fn reload(&self, file: &Path) {
        match Config::load(file) {
            Ok(config) => {
                info!(
                    exports = config.exports() as u64,
                    "configuration read again"
                );
                *self.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
            }
            Err(failure) => {
                error!(
                    error = failure.message(),
                    "configuration not read again: the old one stays"
                );
            }
        }
    }

    /// The runs were cancelled by the same signal.
    fn stop(&self) {
        let under_way = || self.serving.load(Ordering::SeqCst);
        info!(runs = under_way() as u64, "stopping");
        let end = Instant::now() + STOPPING;
        while under_way() > 0 && Instant::now() < end {
            thread::sleep(TICK);
        }
        match under_way() {
            0 => info!("stopped"),
            runs => warn!(
                runs = runs as u64,
                "stopped before these ended; what they staged is kept"
            ),
        }
    }

    /// Serves one connection from its first byte to its last.
    fn attend(&self, socket: TcpStream, from: &SocketAddr) {
        let config = self.config();
        let Some(shaking) = Slot::take(&self.shaking, HANDSHAKES) else {
            return debug!(%from, "sent away: too many handshakes under way");
        };
        let admitted = config
            .identity
            .accept(socket, &from.to_string(), HANDSHAKE)
            .and_then(|(link, peer)| Ok((Connection::open(link, Deadlines::default())?, peer)));
        let (connection, peer) = match admitted {
            Ok(admitted) => admitted,
            Err(error) => {
                let failure = Failure::from_error(Exit::Peer, &error);
                return info!(%from, error = failure.message(), "not admitted");
            }
        };
        let peer_name = peer.name().unwrap_or_else(|| from.ip().to_string());
        let granted = match opened(&connection) {
            Ok(open) => open.and_then(|open| self.grant(&config, &peer, &peer_name, &open)),
            Err(error) => return info!(%from, peer = peer_name, %error, "said nothing"),
        };
        drop(shaking);
        let granted = match granted {
            Ok(granted) => granted,
            Err(error) => {
                engine::refuse_peer(connection, &error);
                return warn!(%from, peer = peer_name, %error, "refused");
            }
        };
        let does = match granted.role {
            Role::Source => "reads",
            Role::Target => "writes",
            Role::Machine => "asks",
        };
        let path = granted.disk.address.to_string();
        info!(%from, peer = peer_name, does, path, "begins");
        let begun = Instant::now();
        let outcome = serve(
            connection,
            granted.role,
            granted.disk,
            &granted.asked,
            self.context.clone(),
        );
        let seconds = begun.elapsed().as_secs();
        match outcome {
            Ok(Served {
                outcome,
                sent_bytes,
            }) => {
                info!(
                    peer = peer_name,
                    does, path, outcome, sent_bytes, seconds, "done"
                );
            }
            Err(error) => {
                let failure = Failure::from_error(Exit::Peer, &error);
                warn!(
                    peer = peer_name,
                    does,
                    path,
                    error = failure.message(),
                    seconds,
                    "failed"
                );
            }
        }
    }

    /// What is asked, if it may be. Who may not use an export does not learn whether there is one.
    fn grant(
        &self,
        config: &Config,
        peer: &Peer,
        peer_name: &str,
        open: &Open,
    ) -> Result<Granted, Error> {
        let refused = |text: String| Error::new(ErrorKind::Usage, text);
        let name = String::from_utf8_lossy(&open.path);
        let export = config.export_for(peer, open.role, &name).ok_or_else(|| {
            let may = match open.role {
                Role::Source => "read",
                Role::Target => "write",
                Role::Machine => "ask",
            };
            refused(format!(
                "there is no export {name} that {peer_name} may {may}"
            ))
        })?;
        let mut asked = Asked::from_json(&open.options).map_err(|why| not_known(&why))?;
        export
            .restrict(&mut asked)
            .map_err(|why| refused(format!("export {name}: {why}")))?;
        let slot = Slot::take(&self.serving, config.connections).ok_or_else(|| {
            let text = format!(
                "{} runs are under way, and more are not served at once",
                config.connections
            );
            Error::new(ErrorKind::Peer, text)
        })?;
        Ok(Granted {
            disk: export.disk(&self.place),
            role: open.role,
            asked,
            _slot: slot,
        })
    }
}
