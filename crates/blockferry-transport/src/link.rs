//! Links: a pair of byte streams to a peer, whatever carries them.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// Two streams to one peer, and a way to end both from another thread.
pub struct Link {
    pub(crate) reader: Box<dyn Read + Send>,
    pub(crate) writer: Box<dyn Write + Send>,
    pub(crate) close: Arc<dyn Fn() + Send + Sync>,
    pub(crate) label: String,
}

impl Link {
    /// Streams of the caller's own. `close` makes reads and writes that wait in other threads return; without it
    /// they end when the peer closes its end. `label` names the peer in messages.
    pub fn new(
        reader: impl Read + Send + 'static,
        writer: impl Write + Send + 'static,
        close: impl Fn() + Send + Sync + 'static,
        label: impl Into<String>,
    ) -> Self {
        Self {
            reader: Box::new(reader),
            writer: Box::new(writer),
            close: Arc::new(close),
            label: label.into(),
        }
    }

    /// Over one socket.
    ///
    /// # Errors
    /// The socket cannot be used from several threads.
    pub fn over_socket(socket: UnixStream, label: impl Into<String>) -> io::Result<Self> {
        let (reader, closer) = (socket.try_clone()?, socket.try_clone()?);
        let close = move || {
            // Closed already is closed.
            closer.shutdown(Shutdown::Both).ok();
        };
        Ok(Self::new(reader, socket, close, label))
    }

    /// Two ends in one process.
    ///
    /// # Errors
    /// The system gives no sockets.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = UnixStream::pair()?;
        Ok((
            Self::over_socket(one, "the other side")?,
            Self::over_socket(other, "the other side")?,
        ))
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("label", &self.label)
            .finish_non_exhaustive()
    }
}
