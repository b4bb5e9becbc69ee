//! A blockferry that listens on another host, reached over TLS.

use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::arguments::Reach;
use crate::engine::transport::tls::Identity;
use crate::engine::transport::{self, Error, ErrorKind};
use crate::engine::{Connection, Deadlines};
use crate::exit::Exit;
use crate::export::Export;
use crate::failure::Failure;
use crate::quote::quoted_path;
use crate::session::{Session, is_root};

/// The certificates of this host, where no option names them.
const CERTS_VARIABLE: &str = "BLOCKFERRY_CERTS";
/// For each of the addresses of a host to answer, and for the handshake.
const ANSWER: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(20);

/// A disk behind a server, and who asks for it.
#[derive(Debug)]
pub(super) struct Server<'a> {
    export: &'a Export,
    identity: Identity,
}

impl<'a> Server<'a> {
    pub(super) fn new(export: &'a Export, reach: &Reach) -> Result<Self, Failure> {
        let identity = identity(&certs_dir(reach.certs.as_deref()))?;
        Ok(Self { export, identity })
    }

    /// What is asked for there.
    pub(super) fn disk(&self) -> &[u8] {
        self.export.name().as_bytes()
    }

    /// Where the target is only its own host knows.
    pub(super) fn command(&self, verb: &str) -> String {
        let (host, name) = (self.export.host(), self.export.name());
        format!("on {host}, with the path of its export {name}: blockferry {verb} TARGET")
    }

    pub(super) fn connect(&self, session: &Session) -> Result<Connection, Failure> {
        let (export, identity) = (self.export.clone(), self.identity.clone());
        let connecting = thread::spawn(move || reach(&export, &identity));
        while !connecting.is_finished() {
            if session.is_cancelled() {
                return Err(super::stopped(self.export.host(), session));
            }
            thread::sleep(TICK);
        }
        let connected = connecting.join().map_err(|_panicked| {
            Failure::new(Exit::Internal, "a bug in blockferry ended the connection")
        })?;
        connected.map_err(|error| self.explain(&error))
    }

    fn explain(&self, error: &Error) -> Failure {
        let told = Failure::from_error(Exit::Peer, error);
        let (host, port) = (self.export.host(), self.export.port());
        let message = format!(
            "cannot reach blockferry on {host}, port {port}: {}",
            told.message()
        );
        let failure = Failure::new(Exit::Peer, message);
        match error.kind() {
            ErrorKind::Credentials => failure.with_hint(format!(
                "both hosts need certificates of one authority, and {host} one with that name: see blockferry certs --help"
            )),
            ErrorKind::Lost => failure.with_hint(format!(
                "is a server there? on {host}: blockferry serve --listen ADDRESS --config FILE"
            )),
            _ => failure,
        }
    }
}

/// At the first address of the host that answers.
fn reach(export: &Export, identity: &Identity) -> transport::Result<Connection> {
    let lost = |attempt: &str, error| Error::lost(format!("{attempt} {}", export.host()), error);
    let addresses = (export.host(), export.port())
        .to_socket_addrs()
        .map_err(|error| lost("look up", error))?;
    let mut failed = None;
    for address in addresses {
        match TcpStream::connect_timeout(&address, ANSWER) {
            Ok(socket) => {
                let link = identity.connect(socket, export.host(), ANSWER)?;
                return Connection::open(link, Deadlines::default());
            }
            Err(error) => failed = Some(error),
        }
    }
    let none = || std::io::Error::other("it has no address");
    Err(lost("connect to", failed.unwrap_or_else(none)))
}

/// What this host shows and trusts.
pub(crate) fn identity(dir: &Path) -> Result<Identity, Failure> {
    Identity::from_dir(dir).map_err(|error| {
        Failure::from_error(Exit::Usage, &error).with_hint(format!(
            "{} holds ca.pem, host.pem and host.key of this host; blockferry certs makes them, --certs names another \
             directory",
            quoted_path(dir)
        ))
    })
}

/// `dir`, else `$BLOCKFERRY_CERTS`, else `/etc/blockferry/certs` for root, else `$XDG_CONFIG_HOME/blockferry/certs` or
/// `~/.config/blockferry/certs`.
pub(crate) fn certs_dir(dir: Option<&Path>) -> PathBuf {
    let named = || {
        std::env::var_os(CERTS_VARIABLE)
            .filter(|dir| !dir.is_empty())
            .map(PathBuf::from)
    };
    let usual = || match is_root() {
        true => PathBuf::from("/etc/blockferry/certs"),
        false => crate::session::user_dir("XDG_CONFIG_HOME", ".config").join("blockferry/certs"),
    };
    dir.map(Path::to_owned).or_else(named).unwrap_or_else(usual)
}
