//! The way to a blockferry on another host: one that a remote shell starts there, as rsync does it, and talks to over
//! that shell's standard input and output; or a server that listens there, over TLS.

mod asked;
mod hosts;
mod patience;
mod server;
mod shell;

use crate::address::There;
use crate::arguments::Reach;
use crate::engine::transport::Message;
use crate::engine::transport::message::{MAX_JSON_BYTES, MAX_TEXT_BYTES, Open, Role};
use crate::engine::{self, Connection};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::session::Session;

pub(crate) use asked::Asked;
pub(crate) use hosts::OverShell;
pub(crate) use patience::Patience;
pub(crate) use server::{certs_dir, identity};

/// How the other side is reached.
#[derive(Debug)]
pub(crate) struct Way<'a> {
    there: &'a There,
    means: Means<'a>,
}

#[derive(Debug)]
enum Means<'a> {
    Shell(shell::Shell<'a>),
    Server(server::Server<'a>),
}

/// What must live as long as the connection. Dropped, it is waited for.
#[derive(Debug)]
pub(crate) struct Held {
    _shell: Option<shell::Running>,
}

impl<'a> Way<'a> {
    /// Finds out how the host is reached.
    pub(crate) fn new(there: &'a There, reach: &'a Reach) -> Result<Self, Failure> {
        let means = match there {
            There::Shell(remote) => Means::Shell(shell::Shell::new(remote, &reach.shell)?),
            There::Server(export) => Means::Server(server::Server::new(export, reach)?),
        };
        Ok(Self { there, means })
    }

    pub(crate) fn host(&self) -> &str {
        self.there.host()
    }

    /// The command for `verb` on the disk of the other host, to be pasted here or, of a server, run there.
    pub(crate) fn command(&self, verb: &str, state: Option<&str>) -> String {
        match &self.means {
            Means::Shell(shell) => shell.command(verb, state),
            Means::Server(server) => server.command(verb),
        }
    }

    /// Greets the blockferry there, and says what is wanted of it.
    pub(crate) fn connect(
        &self,
        role: Role,
        asked: &Asked,
        session: &Session,
    ) -> Result<(Held, Connection), Failure> {
        let path = match &self.means {
            Means::Shell(shell) => shell.disk(),
            Means::Server(server) => server.disk(),
        };
        let open = Open {
            role,
            path: path.to_vec(),
            options: asked.to_json(),
        };
        if open.path.len() > MAX_TEXT_BYTES || open.options.len() > MAX_JSON_BYTES {
            return Err(Failure::new(
                Exit::Usage,
                "a path or an option is longer than can be told to another host",
            ));
        }
        let (shell, connection) = match &self.means {
            Means::Shell(shell) => {
                let (running, connection) = shell::connect(shell, session)?;
                (Some(running), connection)
            }
            Means::Server(server) => (None, server.connect(session)?),
        };
        let sent = connection.outbox().send(Message::Open(open));
        sent.map_err(|error| Failure::from_error(Exit::Peer, &error))?;
        Ok((Held { _shell: shell }, connection))
    }
}

/// A signal came before the other side answered.
fn stopped(host: &str, session: &Session) -> Failure {
    let error = engine::Error::new(
        engine::ErrorKind::Cancelled,
        format!("stopped before {host} answered"),
    );
    session.failure(&error)
}
