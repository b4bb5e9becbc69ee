//! JSON values one to a line over a Unix socket, as QMP and the guest agent speak them: bounded, with a deadline.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use blockferry_device::{Error, ErrorKind, Result};
use serde_json::Value;

/// Longest line that is taken in. A machine with hundreds of disks answers in less, and a value takes some twenty times
/// the space of its text.
const MAX_LINE_BYTES: usize = 4 << 20;
const READ_BYTES: usize = 64 << 10;
/// Most of a foreign text that an error shows.
const SHOWN_CHARS: usize = 200;

/// A connection over which lines go both ways.
#[derive(Debug)]
pub(crate) struct Lines {
    stream: UnixStream,
    /// Whom we speak to, for messages.
    label: String,
    /// Received and not yet taken.
    received: Vec<u8>,
    /// So much of it has no end of a line.
    searched: usize,
}

impl Lines {
    pub(crate) fn connect(socket: &Path, what: &str) -> Result<Self> {
        let label = format!("{what} at {}", socket.display());
        let stream = UnixStream::connect(socket)
            .map_err(|cause| Error::from_io(format!("connect to {label}"), cause))?;
        Ok(Self {
            stream,
            label,
            received: Vec::new(),
            searched: 0,
        })
    }

    pub(crate) fn label(&self) -> &str {
        &self.label
    }

    /// Sends `lead` and the value on a line.
    pub(crate) fn send(&mut self, lead: &[u8], value: &Value, end: Instant) -> Result<()> {
        let mut line = lead.to_vec();
        line.extend(value.to_string().into_bytes());
        line.push(b'\n');
        let failed = |cause| Error::from_io(format!("speak to {}", self.label), cause);
        self.stream
            .set_write_timeout(Some(left(end)))
            .map_err(failed)?;
        self.stream.write_all(&line).map_err(failed)
    }

    /// The next line that holds something, without what stands before the last byte 255 in it: with that byte the
    /// guest agent marks where an answer begins.
    pub(crate) fn receive(&mut self, end: Instant) -> Result<Value> {
        loop {
            while let Some(line) = self.next_line() {
                let start = line.iter().rposition(|b| *b == 0xFF).map_or(0, |at| at + 1);
                let line = line[start..].trim_ascii();
                if !line.is_empty() {
                    return self.parsed(line);
                }
            }
            self.read(end)?;
        }
    }

    fn parsed(&self, line: &[u8]) -> Result<Value> {
        serde_json::from_slice(line).map_err(|cause| {
            let said = shown(&String::from_utf8_lossy(line));
            let text = format!(
                "{}: expected a JSON value on each line, found {said:?}: {cause}",
                self.label
            );
            Error::new(ErrorKind::Unsuitable, text)
        })
    }

    fn next_line(&mut self) -> Option<Vec<u8>> {
        let found = self.received[self.searched..]
            .iter()
            .position(|b| *b == b'\n');
        let Some(at) = found.map(|at| self.searched + at) else {
            self.searched = self.received.len();
            return None;
        };
        let rest = self.received.split_off(at + 1);
        self.searched = 0;
        Some(std::mem::replace(&mut self.received, rest))
    }

    fn read(&mut self, end: Instant) -> Result<()> {
        let failed = |cause| Error::from_io(format!("hear from {}", self.label), cause);
        if self.received.len() > MAX_LINE_BYTES {
            let text = format!(
                "hear from {}: expected lines of at most {MAX_LINE_BYTES} bytes, found a longer one",
                self.label
            );
            return Err(Error::new(ErrorKind::Unsuitable, text));
        }
        self.stream
            .set_read_timeout(Some(left(end)))
            .map_err(failed)?;
        let mut buffer = vec![0; READ_BYTES];
        match self.stream.read(&mut buffer) {
            Ok(0) => {
                let text = format!("hear from {}: it closed the connection", self.label);
                Err(Error::new(ErrorKind::Io, text))
            }
            Ok(count) => {
                self.received.extend_from_slice(&buffer[..count]);
                Ok(())
            }
            Err(cause) if is_timeout(&cause) && Instant::now() >= end => {
                let text = format!("hear from {}: nothing came in time", self.label);
                Err(Error::new(ErrorKind::Io, text))
            }
            Err(cause) if is_timeout(&cause) || cause.kind() == io::ErrorKind::Interrupted => {
                Ok(())
            }
            Err(cause) => Err(failed(cause)),
        }
    }
}

fn is_timeout(cause: &io::Error) -> bool {
    matches!(
        cause.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

/// A timeout of nothing would mean to wait for ever.
fn left(end: Instant) -> Duration {
    end.saturating_duration_since(Instant::now())
        .max(Duration::from_millis(1))
}

/// A foreign text as an error shows it: short, and without what moves a terminal's cursor.
pub(crate) fn shown(text: &str) -> String {
    let plain = |c: char| if c.is_control() { '\u{FFFD}' } else { c };
    text.chars().take(SHOWN_CHARS).map(plain).collect()
}
