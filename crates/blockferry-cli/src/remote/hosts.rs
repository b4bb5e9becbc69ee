//! Other hosts that machines of jobs run on, each reached by a remote shell.

use crate::address::Remote;
use crate::arguments::RemoteShell;
use crate::engine::failover::{Error, ErrorKind, HostConnection, Hosts, Result};
use crate::failure::Failure;
use crate::session::Session;

use super::shell::{self, Shell};

/// The way of one invocation.
#[derive(Debug)]
pub(crate) struct OverShell {
    shell: RemoteShell,
    session: Session,
}

impl OverShell {
    pub(crate) fn new(shell: &RemoteShell, session: &Session) -> Self {
        Self {
            shell: shell.clone(),
            session: session.clone(),
        }
    }
}

impl Hosts for OverShell {
    fn connect(&self, host: &str) -> Result<HostConnection> {
        let remote = Remote::of_host(host).map_err(|why| {
            let text = format!("machine.host {host:?}: {why}");
            Error::new(ErrorKind::Usage, text)
        })?;
        let connected = Shell::new(&remote, &self.shell)
            .and_then(|shell| shell::connect(&shell, &self.session));
        let (running, connection) = connected.map_err(|failure| unreachable(&failure))?;
        Ok(HostConnection::new(connection, running))
    }
}

fn unreachable(failure: &Failure) -> Error {
    let mut text = failure.message().to_owned();
    for hint in failure.hints() {
        text.push_str(&format!(" ({hint})"));
    }
    Error::new(ErrorKind::Peer, text)
}
