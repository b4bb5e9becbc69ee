//! One connection to a server: a socket, the export that was agreed on, and whether it still works.

use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;

use blockferry_device::{Error, ErrorKind, Result};

use crate::address::NbdAddress;
use crate::handshake::{Export, Wanted, agree, greet};
use crate::stream::Stream;
use crate::transfer::{Failure, Outcome, Transfer};
use crate::wire::Command;

/// For a server to let us in.
const CONNECTING: Duration = Duration::from_secs(10);

/// What carries a connection.
#[derive(Debug)]
pub(crate) enum Channel {
    Plain(Stream),
    #[cfg(feature = "tls")]
    Secured(Box<rustls::StreamOwned<rustls::ClientConnection, Stream>>),
}

impl Channel {
    fn stream(&self) -> &Stream {
        match self {
            Self::Plain(stream) => stream,
            #[cfg(feature = "tls")]
            Self::Secured(secured) => &secured.sock,
        }
    }
}

impl Read for Channel {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            #[cfg(feature = "tls")]
            Self::Secured(secured) => secured.read(buffer),
        }
    }
}

impl Write for Channel {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(bytes),
            #[cfg(feature = "tls")]
            Self::Secured(secured) => secured.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            #[cfg(feature = "tls")]
            Self::Secured(secured) => secured.flush(),
        }
    }
}

/// A connection in the transmission phase. Dropped, it takes leave of the server.
#[derive(Debug)]
pub(crate) struct Connection {
    channel: Channel,
    label: String,
    export: Export,
    next_cookie: u64,
    broken: bool,
}

impl Connection {
    /// Connects to a server that may be silent for so long, and comes to an agreement with it. `certificates` is where those
    /// of this client are unless the address says so.
    ///
    /// # Errors
    /// Nobody answers, or the server does not let us in.
    pub(crate) fn open(
        address: &NbdAddress,
        contexts: &[String],
        certificates: Option<&Path>,
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
        let greeted = greet(&mut stream, &wanted)?;
        let mut channel = match address.tls {
            None => Channel::Plain(stream),
            Some(_) => secured(stream, address, certificates, &wanted)?,
        };
        let export = agree(&mut channel, &wanted, greeted)?;
        channel.stream().set_timeout(silence).map_err(failed)?;
        Ok(Self {
            channel,
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
        work: impl FnOnce(Transfer<'_, Channel>) -> Outcome<T>,
    ) -> Outcome<T> {
        if self.broken {
            let text = format!("the connection to {} is broken", self.label);
            return Err(Failure::Broken(Error::new(ErrorKind::Io, text)));
        }
        let outcome = work(Transfer {
            stream: &mut self.channel,
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
            let _it_ends_anyhow = self.channel.write_all(&leave);
        }
    }
}

/// Goes on over TLS.
#[cfg(feature = "tls")]
fn secured(
    mut stream: Stream,
    address: &NbdAddress,
    certificates: Option<&Path>,
    wanted: &Wanted<'_>,
) -> Result<Channel> {
    let named = address
        .tls
        .as_ref()
        .and_then(|tls| tls.certificates.as_deref());
    let directory = named.or(certificates).ok_or_else(|| {
        let text = format!(
            "open {}: expected the directory of certificates for TLS, as ?tls-certificates=DIR",
            wanted.label
        );
        Error::new(ErrorKind::Unsuitable, text)
    })?;
    crate::handshake::start_tls(&mut stream, wanted)?;
    let secured = crate::tls::secure(stream, directory, address.server_name(), wanted.label)?;
    Ok(Channel::Secured(Box::new(secured)))
}

#[cfg(not(feature = "tls"))]
fn secured(
    _stream: Stream,
    _address: &NbdAddress,
    _certificates: Option<&Path>,
    wanted: &Wanted<'_>,
) -> Result<Channel> {
    let text = format!(
        "open {}: this build speaks no TLS (feature tls)",
        wanted.label
    );
    Err(Error::new(ErrorKind::Unsupported, text))
}
