//! One connection to a server: a socket, the export that was agreed on, and whether it still works.

use std::io::Write;
use std::time::Duration;

use blockferry_device::{Error, ErrorKind, Result};

use crate::address::NbdAddress;
use crate::handshake::{Export, Wanted, negotiate};
use crate::stream::Stream;
use crate::transfer::{Failure, Outcome, Transfer};
use crate::wire::Command;

/// For a server to let us in.
const CONNECTING: Duration = Duration::from_secs(10);

/// A connection in the transmission phase. Dropped, it takes leave of the server.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: Stream,
    label: String,
    export: Export,
    next_cookie: u64,
    broken: bool,
}

impl Connection {
    /// Connects to a server that may be silent for so long, and comes to an agreement with it.
    ///
    /// # Errors
    /// Nobody answers, or the server does not let us in.
    pub(crate) fn open(
        address: &NbdAddress,
        contexts: &[String],
        silence: Duration,
    ) -> Result<Self> {
        let label = address.to_string();
        let failed = |cause| Error::from_io(format!("connect to {label}"), cause);
        let mut stream = Stream::connect(&address.place, CONNECTING).map_err(failed)?;
        stream.set_timeout(CONNECTING).map_err(failed)?;
        let wanted = Wanted {
            export: &address.export,
            contexts,
            label: &label,
        };
        let export = negotiate(&mut stream, &wanted)?;
        stream.set_timeout(silence).map_err(failed)?;
        Ok(Self {
            stream,
            label,
            export,
            next_cookie: 1,
            broken: false,
        })
    }

    pub(crate) fn export(&self) -> &Export {
        &self.export
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Does something with the server; after a failure of the connection itself nothing more.
    pub(crate) fn transfer<T>(
        &mut self,
        work: impl FnOnce(Transfer<'_, Stream>) -> Outcome<T>,
    ) -> Outcome<T> {
        if self.broken {
            let text = format!("the connection to {} is broken", self.label);
            return Err(Failure::Broken(Error::new(ErrorKind::Io, text)));
        }
        let outcome = work(Transfer {
            stream: &mut self.stream,
            label: &self.label,
            next_cookie: &mut self.next_cookie,
            most_bytes: self.export.most_bytes,
        });
        self.broken = matches!(outcome, Err(Failure::Broken(_)));
        outcome
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.broken {
            let leave = crate::wire::request(Command::Disconnect, self.next_cookie, 0, 0);
            let _it_ends_anyhow = self.stream.write_all(&leave);
        }
    }
}
