//! Connections: messages to and from one peer, over a [`Link`].
//!
//! Two threads move the bytes. What the roles say goes out before data does, so that a full queue of data never keeps two
//! sides waiting for each other; data waits where the peer does not take it. A peer that is silent for longer than
//! [`Deadlines::silence`] is lost.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{
    Receiver, RecvTimeoutError, Sender, TrySendError, bounded, select, unbounded,
};

use crate::error::{Error, ErrorKind, Result};
use crate::frame::FrameDecoder;
use crate::link::Link;
use crate::message::Message;
use crate::preamble::{PREAMBLE_BYTES, Preamble};

/// Messages that came and wait to be taken.
const RECEIVED: usize = 8;
/// Data messages that wait to be sent.
const WAITING_DATA: usize = 4;
/// Other messages that wait to be sent; their number is bounded by what the roles allow, and a peer that does not
/// read while it goes on asking is cut off here.
const WAITING_CONTROL: usize = 16 * 1024;
/// Bytes that are read at once.
const READ_BYTES: usize = 64 * 1024;
/// Bytes that are written at once, where so much waits.
const WRITE_BYTES: usize = 256 * 1024;

/// How long a peer may take.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::exhaustive_structs, reason = "plain times")]
pub struct Deadlines {
    /// For its first bytes.
    pub greeting: Duration,
    /// Without a sign of life it is lost after this time.
    pub silence: Duration,
    /// A sign of life is sent when nothing else was for this long: less than half of `silence`.
    pub keep_alive: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            greeting: Duration::from_secs(10),
            silence: Duration::from_secs(30),
            keep_alive: Duration::from_secs(10),
        }
    }
}

/// What the threads and their owner share.
#[derive(Debug)]
struct Shared {
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
    /// Milliseconds since `begun` at which the peer was heard last.
    heard_ms: AtomicU64,
    begun: Instant,
    /// The peer is authenticated: its messages may be large.
    trusted: AtomicBool,
}

impl Shared {
    fn hear(&self) {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.heard_ms.store(now, Ordering::Relaxed);
    }

    fn silent_for(&self) -> Duration {
        let heard = Duration::from_millis(self.heard_ms.load(Ordering::Relaxed));
        self.begun.elapsed().saturating_sub(heard)
    }
}

/// Messages to and from one peer.
#[derive(Debug)]
pub struct Connection {
    received: Receiver<Result<Message>>,
    outbox: Outbox,
    shared: Arc<Shared>,
    deadlines: Deadlines,
    label: String,
    version: u16,
    /// Disconnected when everything queued was written, and nothing will be.
    written: Receiver<()>,
    _closer: Closer,
}

/// Ends the link when it is dropped, and with it the threads.
struct Closer(Arc<dyn Fn() + Send + Sync>);

impl Drop for Closer {
    fn drop(&mut self) {
        (self.0)();
    }
}

impl std::fmt::Debug for Closer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Closer")
    }
}

impl Connection {
    /// Greets the peer and waits for its greeting.
    ///
    /// # Errors
    /// It does not answer in time, is no blockferry, or speaks no common version.
    pub fn open(link: Link, deadlines: Deadlines) -> Result<Self> {
        let shared = Arc::new(Shared {
            sent_bytes: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
            heard_ms: AtomicU64::new(0),
            begun: Instant::now(),
            trusted: AtomicBool::new(false),
        });
        let (control, waiting_control) = unbounded();
        let (data, waiting_data) = bounded(WAITING_DATA);
        let outbox = Outbox { control, data };
        let (greeted, greeting) = bounded(1);
        let (take, received) = bounded(RECEIVED);
        let (writing, written) = bounded(0);
        let reader = Reader {
            stream: link.reader,
            shared: Arc::clone(&shared),
            answers: outbox.control.clone(),
        };
        let writer = Writer {
            stream: link.writer,
            shared: Arc::clone(&shared),
            keep_alive: deadlines.keep_alive,
            _writing: writing,
        };
        thread::spawn(move || reader.run(&greeted, &take));
        thread::spawn(move || writer.run(&waiting_control, &waiting_data));
        let mut connection = Self {
            received,
            outbox,
            shared,
            deadlines,
            label: link.label,
            version: 0,
            written,
            _closer: Closer(link.close),
        };
        let peer = match greeting.recv_timeout(deadlines.greeting) {
            Ok(peer) => peer?,
            Err(RecvTimeoutError::Timeout) => return Err(connection.silent(deadlines.greeting)),
            Err(RecvTimeoutError::Disconnected) => return Err(gone()),
        };
        connection.version = Preamble::OURS.version_with(peer)?;
        Ok(connection)
    }

    /// For messages.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The version of the protocol that both speak.
    #[must_use]
    pub fn version(&self) -> u16 {
        self.version
    }

    /// From here on the peer may send large messages: it is known.
    pub fn trust(&self) {
        self.shared.trusted.store(true, Ordering::Relaxed);
    }

    /// Where messages are put to be sent.
    #[must_use]
    pub fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// What comes, for callers that wait for other things as well. Signs of life are not among it.
    #[must_use]
    pub fn receiver(&self) -> &Receiver<Result<Message>> {
        &self.received
    }

    /// Whether the peer is still there, for callers that use [`Self::receiver`] and got nothing.
    ///
    /// # Errors
    /// It was silent for too long.
    pub fn check_alive(&self) -> Result<()> {
        // What came and waits is a sign of life.
        if !self.received.is_empty() || self.shared.silent_for() <= self.deadlines.silence {
            return Ok(());
        }
        Err(self.silent(self.deadlines.silence))
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// The link ended, the peer sent what is no message, or was silent for too long.
    pub fn receive(&self) -> Result<Message> {
        loop {
            match self.received.recv_timeout(self.deadlines.keep_alive) {
                Ok(message) => return message,
                Err(RecvTimeoutError::Timeout) => self.check_alive()?,
                Err(RecvTimeoutError::Disconnected) => return Err(gone()),
            }
        }
    }

    /// Bytes sent so far, and bytes received.
    #[must_use]
    pub fn wire_bytes(&self) -> (u64, u64) {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (
            load(&self.shared.sent_bytes),
            load(&self.shared.received_bytes),
        )
    }

    /// Sends what is queued, then ends the link.
    pub fn finish(self) {
        // Either the writer ends by this, or it has ended.
        let _ended = self.outbox.control.send(None);
        let _done_or_too_late = self.written.recv_timeout(self.deadlines.keep_alive);
    }

    fn silent(&self, time: Duration) -> Error {
        Error::new(
            ErrorKind::TimedOut,
            format!(
                "{}: expected a sign of life, found none in {} s",
                self.label,
                time.as_secs_f64()
            ),
        )
    }
}

/// Where messages are put to be sent; every worker may have one.
#[derive(Clone, Debug)]
pub struct Outbox {
    /// `None` ends the connection when everything before it is written.
    control: Sender<Option<Message>>,
    data: Sender<Message>,
}

impl Outbox {
    /// Queues a message. It may overtake data.
    ///
    /// # Errors
    /// The link is lost, or the peer does not read.
    pub fn send(&self, message: Message) -> Result<()> {
        if self.control.len() >= WAITING_CONTROL {
            return Err(Error::new(
                ErrorKind::TimedOut,
                "the peer asks and does not read the answers",
            ));
        }
        self.control.send(Some(message)).map_err(|_closed| gone())
    }

    /// Queues data, or what must not overtake it; waits for room.
    ///
    /// # Errors
    /// The link is lost.
    pub fn send_data(&self, message: Message) -> Result<()> {
        self.data.send(message).map_err(|_closed| gone())
    }

    /// Whether as much data waits as may: the link is slower than who feeds it.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.data.is_full()
    }

    /// Queues a message behind the data that waits, where there is room; else it overtakes.
    ///
    /// # Errors
    /// The link is lost, or the peer does not read.
    pub fn send_last(&self, message: Message) -> Result<()> {
        match self.data.try_send(message) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(message)) => self.send(message),
            Err(TrySendError::Disconnected(_)) => Err(gone()),
        }
    }
}

struct Reader {
    stream: Box<dyn Read + Send>,
    shared: Arc<Shared>,
    answers: Sender<Option<Message>>,
}

impl Reader {
    fn run(mut self, greeted: &Sender<Result<Preamble>>, take: &Sender<Result<Message>>) {
        let mut buffer = vec![0; READ_BYTES];
        let mut rest = Vec::new();
        let preamble = self.greeting(&mut buffer, &mut rest);
        let failed = preamble.is_err();
        if greeted.send(preamble).is_err() || failed {
            return;
        }
        let mut decoder = FrameDecoder::new();
        decoder.push(&rest);
        drop(rest);
        loop {
            if self.shared.trusted.load(Ordering::Relaxed) {
                decoder.trust();
            }
            match self.hand_out(&mut decoder, take) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    // Nobody listens any more: then nobody needs to know.
                    let _nobody = take.send(Err(error));
                    return;
                }
            }
            match self.read(&mut buffer) {
                Ok(0) => {
                    let error = match decoder.is_within_frame() {
                        true => Error::new(ErrorKind::Lost, "the link ended within a message"),
                        false => gone(),
                    };
                    let _nobody = take.send(Err(error));
                    return;
                }
                Ok(count) => decoder.push(&buffer[..count]),
                Err(error) => {
                    let _nobody = take.send(Err(error));
                    return;
                }
            }
        }
    }

    fn greeting(&mut self, buffer: &mut [u8], rest: &mut Vec<u8>) -> Result<Preamble> {
        loop {
            if let Some(preamble) = Preamble::decode(rest)? {
                rest.drain(..PREAMBLE_BYTES);
                return Ok(preamble);
            }
            let count = self.read(buffer)?;
            if count == 0 {
                return Err(Error::new(
                    ErrorKind::Lost,
                    "the link ended before the peer said what it is",
                ));
            }
            rest.extend_from_slice(&buffer[..count]);
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        loop {
            match self.stream.read(buffer) {
                Ok(count) => {
                    self.shared
                        .received_bytes
                        .fetch_add(count as u64, Ordering::Relaxed);
                    self.shared.hear();
                    return Ok(count);
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::of_stream("read from the peer", error)),
            }
        }
    }

    /// Whether anyone takes what came.
    fn hand_out(&self, decoder: &mut FrameDecoder, take: &Sender<Result<Message>>) -> Result<bool> {
        while let Some(frame) = decoder.next_frame()? {
            match Message::decode(&frame)? {
                Message::Pong => {}
                Message::Ping => {
                    let full = self.answers.len() >= WAITING_CONTROL;
                    if full || self.answers.send(Some(Message::Pong)).is_err() {
                        return Ok(false);
                    }
                }
                message => {
                    if take.send(Ok(message)).is_err() {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    }
}

struct Writer {
    stream: Box<dyn Write + Send>,
    shared: Arc<Shared>,
    keep_alive: Duration,
    _writing: Sender<()>,
}

impl Writer {
    /// Until the owner ends it and everything before is written, or the link ends.
    fn run(mut self, control: &Receiver<Option<Message>>, data: &Receiver<Message>) {
        let mut buffer = Preamble::OURS.encode().to_vec();
        let mut ending = false;
        while self.write(&buffer).is_ok() {
            buffer.clear();
            if ending {
                return;
            }
            match self.next(control, data) {
                Some(message) => message.encode(&mut buffer),
                None => ending = true,
            }
            while buffer.len() < WRITE_BYTES || ending {
                match control.try_recv() {
                    Ok(Some(message)) => message.encode(&mut buffer),
                    Ok(None) => ending = true,
                    Err(_empty) => match data.try_recv() {
                        Ok(message) => message.encode(&mut buffer),
                        Err(_empty) => break,
                    },
                }
            }
        }
        // It failed: the reader finds out as well, and says so.
    }

    /// What to send next; `None` at the end.
    fn next(
        &self,
        control: &Receiver<Option<Message>>,
        data: &Receiver<Message>,
    ) -> Option<Message> {
        if let Ok(message) = control.try_recv() {
            return message;
        }
        select! {
            recv(control) -> message => message.ok().flatten(),
            recv(data) -> message => message.ok(),
            default(self.keep_alive) => Some(Message::Ping),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)?;
        self.stream.flush()?;
        let count = bytes.len() as u64;
        self.shared.sent_bytes.fetch_add(count, Ordering::Relaxed);
        Ok(())
    }
}

fn gone() -> Error {
    Error::new(ErrorKind::Lost, "the link to the peer ended")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn quick() -> Deadlines {
        Deadlines {
            greeting: Duration::from_secs(10),
            silence: Duration::from_millis(300),
            keep_alive: Duration::from_millis(50),
        }
    }

    fn connected(deadlines: Deadlines) -> (Connection, Connection) {
        let (one, other) = Link::pair().unwrap();
        let other = thread::spawn(move || Connection::open(other, deadlines).unwrap());
        let one = Connection::open(one, deadlines).unwrap();
        (one, other.join().unwrap())
    }

    #[test]
    fn messages_arrive_and_the_end_of_the_link_is_told() {
        let (one, other) = connected(Deadlines::default());
        assert_eq!(one.version(), 1);

        one.outbox().send(Message::Examine).unwrap();
        one.outbox().send(Message::Release(7)).unwrap();
        one.finish();

        assert_eq!(other.receive().unwrap(), Message::Examine);
        assert_eq!(other.receive().unwrap(), Message::Release(7));
        assert_eq!(other.receive().unwrap_err().kind(), ErrorKind::Lost);
        assert_eq!(other.wire_bytes().1, 16 + 5 + 13);
    }

    #[test]
    fn a_silent_peer_is_lost_and_one_that_only_lives_is_not() {
        let (one, other) = connected(quick());
        let waiting = thread::spawn(move || one.receive());
        thread::sleep(Duration::from_millis(700));
        assert!(!waiting.is_finished(), "signs of life keep it waiting");
        other.outbox().send(Message::Examine).unwrap();
        assert_eq!(waiting.join().unwrap().unwrap(), Message::Examine);

        let (one, mut silent) = UnixStream::pair().unwrap();
        silent.write_all(&Preamble::OURS.encode()).unwrap();
        let link = Link::over_socket(one, "a silent peer").unwrap();
        let error = Connection::open(link, quick())
            .unwrap()
            .receive()
            .unwrap_err();

        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(error.to_string().contains("a silent peer"), "{error}");
    }

    #[test]
    fn nothing_large_is_taken_from_a_peer_that_is_not_known() {
        let event = Message::Data {
            blocks: Vec::new(),
            runs: Vec::new(),
            frame: vec![0; 100_000],
        };
        let (one, other) = connected(Deadlines::default());
        one.outbox().send_data(event.clone()).unwrap();
        assert_eq!(other.receive().unwrap_err().kind(), ErrorKind::Protocol);

        let (one, other) = connected(Deadlines::default());
        other.trust();
        one.outbox().send_data(event.clone()).unwrap();
        assert_eq!(other.receive().unwrap(), event);
    }

    #[test]
    fn a_peer_that_is_no_blockferry_is_told_apart_from_one_that_says_nothing() {
        let (one, mut shell) = UnixStream::pair().unwrap();
        shell.write_all(b"Last login: yesterday\n").unwrap();
        let link = Link::over_socket(one, "host").unwrap();
        let error = Connection::open(link, quick()).unwrap_err();
        assert!(error.to_string().contains("Last login"), "{error}");

        let (one, shell) = UnixStream::pair().unwrap();
        drop(shell);
        let link = Link::over_socket(one, "host").unwrap();
        assert_eq!(
            Connection::open(link, quick()).unwrap_err().kind(),
            ErrorKind::Lost
        );
    }
}
