//! [`NbdServer`]: a disk of ours for the clients of others.
//!
//! ```text
//! listener ──accepts──> client: handshake ──> workers: take a request, carry it out, answer
//! ```
//! Spoken is the fixed newstyle handshake, without TLS and without a password: who can connect can read. What a client can
//! make us use is bounded: [`MOST_CLIENTS`] of them, a handshake with a deadline, and for each client as many buffers as it
//! has workers.

mod disk;
mod requests;
mod welcome;

pub use disk::NbdExport;

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Scope};
use std::time::{Duration, Instant};

use blockferry_device::{Error, Result};

use self::requests::Requests;
use self::welcome::welcome;
use crate::stream::Stream;

/// Most clients at once, unless it is said otherwise.
pub const MOST_CLIENTS: usize = 16;
/// Longest request, as is usual (`doc/proto.md`).
const MOST_REQUEST_BYTES: u32 = 32 * 1024 * 1024;
/// Requests of one client that are carried out at once.
const WORKERS: usize = 4;
/// Before accepting is tried again, where it failed.
const PAUSE: Duration = Duration::from_millis(100);

/// How a server deals with its clients. Build it with `default()` and set what differs.
#[derive(Clone)]
#[non_exhaustive]
pub struct NbdServerOptions {
    /// Most clients at once; who comes then is sent away.
    pub most_clients: usize,
    /// How long a client has until it has chosen its export.
    pub handshake: Duration,
    /// How long a client may stand still in the middle of a request, or let an answer wait. Between requests it may
    /// be silent for as long as it likes.
    pub silence: Duration,
    /// Told what happens, by the threads that it happens on: it must not block.
    pub observer: Arc<dyn Fn(&ServerEvent<'_>) + Send + Sync>,
}

impl Default for NbdServerOptions {
    fn default() -> Self {
        Self {
            most_clients: MOST_CLIENTS,
            handshake: Duration::from_secs(10),
            silence: Duration::from_secs(60),
            observer: Arc::new(|_| {}),
        }
    }
}

impl fmt::Debug for NbdServerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NbdServerOptions")
            .field("most_clients", &self.most_clients)
            .field("handshake", &self.handshake)
            .field("silence", &self.silence)
            .finish_non_exhaustive()
    }
}

/// What happens at a server.
#[derive(Debug)]
#[non_exhaustive]
pub enum ServerEvent<'e> {
    /// A client may ask for something.
    Arrived {
        /// Numbered from 1 on, in the order in which they came.
        client: u64,
    },
    /// A client is gone.
    Left {
        /// Its number.
        client: u64,
        /// Why, if it did not take leave.
        error: Option<&'e io::Error>,
    },
    /// A client was sent away, because there were as many as may be.
    SentAway,
    /// The disk could not do what a client asked for; the client was told no more than that.
    Failed {
        /// Its number.
        client: u64,
        /// What the disk says.
        error: &'e Error,
    },
}

/// Where clients come in.
#[derive(Debug)]
pub struct NbdListener(Listening);

#[derive(Debug)]
enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl From<TcpListener> for NbdListener {
    fn from(listener: TcpListener) -> Self {
        Self(Listening::Tcp(listener))
    }
}

impl From<UnixListener> for NbdListener {
    fn from(listener: UnixListener) -> Self {
        Self(Listening::Unix(listener))
    }
}

impl NbdListener {
    fn accept(&self) -> io::Result<Stream> {
        match &self.0 {
            Listening::Tcp(listener) => Stream::tcp(listener.accept()?.0),
            Listening::Unix(listener) => listener.accept().map(|(stream, _)| Stream::Unix(stream)),
        }
    }

    /// A second handle, with which the first one is woken. Linux ends the wait of a listener that is shut down,
    /// whatever its family.
    fn waker(&self) -> io::Result<UnixStream> {
        let handle: OwnedFd = match &self.0 {
            Listening::Tcp(listener) => listener.try_clone()?.into(),
            Listening::Unix(listener) => listener.try_clone()?.into(),
        };
        Ok(handle.into())
    }
}

/// What was served in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Served {
    /// Clients that were let in.
    pub clients: u64,
    /// Bytes that they read.
    pub read_bytes: u64,
    /// Bytes that they wrote.
    pub written_bytes: u64,
}

/// A server of one export. It ends with [`Self::shutdown`], or when it is dropped.
#[derive(Debug)]
pub struct NbdServer {
    hall: Arc<Hall>,
    listening: Vec<(UnixStream, JoinHandle<()>)>,
}

impl NbdServer {
    /// Begins to serve to who comes in at these listeners.
    ///
    /// # Errors
    /// The system has no handle or thread for it.
    pub fn start(
        export: NbdExport,
        listeners: Vec<NbdListener>,
        options: NbdServerOptions,
    ) -> Result<Self> {
        let hall = Arc::new(Hall {
            export,
            options,
            is_closing: AtomicBool::new(false),
            guests: Mutex::default(),
        });
        // Dropped on the way out, it ends what was begun.
        let mut server = Self {
            hall,
            listening: Vec::new(),
        };
        for listener in listeners {
            let failed = |cause| Error::from_io("start an NBD server", cause);
            let waker = listener.waker().map_err(failed)?;
            let hall = Arc::clone(&server.hall);
            let accepting = thread::Builder::new()
                .name("nbd listener".to_owned())
                .spawn(move || thread::scope(|scope| hall.accept(&listener, scope)))
                .map_err(failed)?;
            server.listening.push((waker, accepting));
        }
        Ok(server)
    }

    /// What was served so far.
    #[must_use]
    pub fn served(&self) -> Served {
        Served {
            clients: self.hall.guests().arrived,
            read_bytes: self.hall.export.read_bytes(),
            written_bytes: self.hall.export.written_bytes(),
        }
    }

    /// Lets nobody in any more, cuts off who is there, also who is slow, and waits until nobody uses the disk.
    pub fn shutdown(mut self) -> Served {
        self.end();
        self.served()
    }

    fn end(&mut self) {
        self.hall.close();
        for (waker, accepting) in self.listening.drain(..) {
            waker.shutdown(std::net::Shutdown::Both).ok();
            // One that panicked has said so already.
            accepting.join().ok();
        }
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.end();
    }
}

/// What all threads of a server share.
#[derive(Debug)]
struct Hall {
    export: NbdExport,
    options: NbdServerOptions,
    is_closing: AtomicBool,
    guests: Mutex<Guests>,
}

#[derive(Debug, Default)]
struct Guests {
    arrived: u64,
    here: HashMap<u64, Arc<Stream>>,
}

/// A client that is here, until it is dropped.
struct Guest<'h> {
    hall: &'h Hall,
    number: u64,
    stream: Arc<Stream>,
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        self.stream.end();
        self.hall.guests().here.remove(&self.number);
    }
}

impl Hall {
    fn guests(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: &ServerEvent<'_>) {
        (self.options.observer)(event);
    }

    fn close(&self) {
        self.is_closing.store(true, Ordering::SeqCst);
        // Who comes in behind this finds it closing.
        self.guests().here.values().for_each(|stream| stream.end());
    }

    fn accept<'s>(&'s self, listener: &NbdListener, scope: &'s Scope<'s, '_>) {
        while !self.is_closing.load(Ordering::SeqCst) {
            let Ok(stream) = listener.accept() else {
                // Too many files are open, or it left already, or we are woken.
                if !self.is_closing.load(Ordering::SeqCst) {
                    thread::sleep(PAUSE);
                }
                continue;
            };
            let Some(guest) = self.let_in(stream) else {
                continue;
            };
            let attending = thread::Builder::new().name("nbd client".to_owned());
            if attending
                .spawn_scoped(scope, move || self.attend(&guest))
                .is_err()
            {
                self.tell(&ServerEvent::SentAway);
            }
        }
    }

    fn let_in(&self, stream: Stream) -> Option<Guest<'_>> {
        let mut guests = self.guests();
        if self.is_closing.load(Ordering::SeqCst) {
            return None;
        }
        if guests.here.len() >= self.options.most_clients {
            drop(guests);
            self.tell(&ServerEvent::SentAway);
            return None;
        }
        let stream = Arc::new(stream);
        guests.arrived += 1;
        let number = guests.arrived;
        guests.here.insert(number, Arc::clone(&stream));
        Some(Guest {
            hall: self,
            number,
            stream,
        })
    }

    /// Serves one client from the first byte to the last.
    fn attend(&self, guest: &Guest<'_>) {
        let client = guest.number;
        self.tell(&ServerEvent::Arrived { client });
        let served = self.serve(guest);
        // Whom we cut off ourselves did nothing wrong.
        let error = served
            .err()
            .filter(|_| !self.is_closing.load(Ordering::SeqCst));
        let error = error.as_ref();
        self.tell(&ServerEvent::Left { client, error });
    }

    fn serve(&self, guest: &Guest<'_>) -> io::Result<()> {
        let stream = &*guest.stream;
        let mut timed = Timed {
            stream,
            end: Instant::now() + self.options.handshake,
        };
        let Some(agreed) = welcome(&mut timed, &self.export)? else {
            return Ok(());
        };
        stream.set_timeout(self.options.silence)?;
        let client = guest.number;
        let failed = |error: &Error| self.tell(&ServerEvent::Failed { client, error });
        let requests = Requests::new((stream, stream), &self.export, agreed, &failed);
        let work = || {
            let worked = requests.work();
            if worked.is_err() {
                // The others may be waiting for it.
                stream.end();
            }
            worked
        };
        thread::scope(|scope| {
            let others = (1..WORKERS).map_while(|_| {
                let worker = thread::Builder::new().name("nbd worker".to_owned());
                // With fewer of them it goes on more slowly.
                worker.spawn_scoped(scope, work).ok()
            });
            let others: Vec<_> = others.collect();
            let own = work();
            let rest = others.into_iter().map(|other| match other.join() {
                Ok(worked) => worked,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            rest.fold(own, io::Result::and)
        })
    }
}

/// A stream with a deadline, however slowly the bytes come.
struct Timed<'t> {
    stream: &'t Stream,
    end: Instant,
}

impl Timed<'_> {
    /// Does something with the stream that waits no longer than the deadline.
    fn in_time<T>(&self, act: impl FnOnce(&Stream) -> io::Result<T>) -> io::Result<T> {
        let late = || io::Error::new(io::ErrorKind::TimedOut, "the handshake takes too long");
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        self.stream.set_timeout(left)?;
        act(self.stream).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => late(),
            _ => error,
        })
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.in_time(|mut stream| stream.read(buffer))
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.in_time(|mut stream| stream.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
