//! One TLS session over one socket, as two streams for two threads.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustls::Connection as Session;

use crate::error::{Error, ErrorKind};
use crate::link::Link;

/// Bytes that are read from the socket at once.
const READ_BYTES: usize = 64 * 1024;
/// How often a reader that waits looks whether the link was closed here.
const TICK: Duration = Duration::from_secs(1);
/// How long what the peer still sends is taken after that, so that what was sent to it last is not lost: a socket that
/// is closed with bytes nobody took resets the connection.
const LINGER: Duration = Duration::from_secs(30);

struct Shared {
    session: Mutex<Session>,
    socket: TcpStream,
    /// Since when nobody here takes what comes.
    closed: OnceLock<Instant>,
}

impl Shared {
    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.closed.get_or_init(Instant::now);
        // A writer that waits fails, and the peer's reader ends; closed already is closed.
        self.socket.shutdown(Shutdown::Write).ok();
    }

    fn has_lingered(&self) -> bool {
        self.closed
            .get()
            .is_some_and(|since| since.elapsed() >= LINGER)
    }
}

/// A link over a session that is past its handshake.
pub(super) fn link(session: Session, socket: TcpStream, label: String) -> io::Result<Link> {
    socket.set_read_timeout(Some(TICK))?;
    socket.set_write_timeout(None)?;
    let shared = Arc::new(Shared {
        session: Mutex::new(session),
        socket,
        closed: OnceLock::new(),
    });
    let reader = Reader {
        shared: Arc::clone(&shared),
        encrypted: vec![0; READ_BYTES],
        unread: 0..0,
    };
    let writer = Writer {
        shared: Arc::clone(&shared),
        encrypted: Vec::new(),
    };
    Ok(Link::new(reader, writer, move || shared.close(), label))
}

/// Why a handshake, or what follows it, failed: TLS says who does not trust whom by alerts, which a client sees only
/// when it reads.
pub(super) fn explained(attempt: &str, error: io::Error) -> Error {
    match error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
    {
        Some(rustls::Error::AlertReceived(alert)) => Error::new(
            ErrorKind::Credentials,
            format!("{attempt}: the other side refuses our certificate ({alert:?})"),
        ),
        Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented) => {
            Error::with_cause(ErrorKind::Credentials, attempt, error)
        }
        Some(_) => Error::with_cause(ErrorKind::Protocol, attempt, error),
        None => Error::lost(attempt, error),
    }
}

struct Reader {
    shared: Arc<Shared>,
    encrypted: Vec<u8>,
    /// What of `encrypted` the session has not taken yet.
    unread: std::ops::Range<usize>,
}

impl Reader {
    /// Takes what is there out of the session; `None` where it needs more from the socket.
    fn decrypt(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let mut session = self.shared.session();
        loop {
            match session.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other.map(Some),
            }
            let mut unread = &self.encrypted[self.unread.clone()];
            if unread.is_empty() {
                return Ok(None);
            }
            self.unread.start += session.read_tls(&mut unread)?;
            session.process_new_packets().map_err(|error| {
                let error = io::Error::new(io::ErrorKind::InvalidData, error);
                io::Error::other(explained("read from the peer", error))
            })?;
        }
    }

    /// Waits for more from the socket; 0 at its end, or when nobody has taken it for long enough.
    fn receive(&mut self) -> io::Result<usize> {
        loop {
            match (&self.shared.socket).read(&mut self.encrypted) {
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock && !self.shared.has_lingered() => {
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
                received => return received,
            }
        }
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(count) = self.decrypt(buffer)? {
                return Ok(count);
            }
            match self.receive()? {
                0 => return Ok(0),
                count => self.unread = 0..count,
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.shared.closed.get_or_init(Instant::now);
        while !self.shared.has_lingered() && matches!(self.receive(), Ok(1..)) {}
    }
}

struct Writer {
    shared: Arc<Shared>,
    encrypted: Vec<u8>,
}

impl Writer {
    /// Sends what `put` put into the session; only this thread writes, so nothing comes in between.
    fn send(&mut self, put: impl FnOnce(&mut Session) -> io::Result<usize>) -> io::Result<usize> {
        self.encrypted.clear();
        let mut session = self.shared.session();
        let count = put(&mut session)?;
        while session.wants_write() {
            session.write_tls(&mut self.encrypted)?;
        }
        drop(session);
        (&self.shared.socket).write_all(&self.encrypted)?;
        Ok(count)
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(|session| session.writer().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // A peer that is gone need not be told.
        let _told = self.send(|session| {
            session.send_close_notify();
            Ok(0)
        });
    }
}
