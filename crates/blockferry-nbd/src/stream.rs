//! A socket of either family, as client and server use it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::address::Place;

#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    pub(crate) fn connect(place: &Place, patience: Duration) -> io::Result<Self> {
        match place {
            Place::Unix(socket) => UnixStream::connect(socket).map(Self::Unix),
            Place::Tcp { host, port } => {
                let mut last = None;
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, patience) {
                        Ok(stream) => return Self::tcp(stream),
                        Err(error) => last = Some(error),
                    }
                }
                Err(last.unwrap_or_else(|| io::Error::other("the host has no address")))
            }
        }
    }

    pub(crate) fn tcp(stream: TcpStream) -> io::Result<Self> {
        // A request waits for nothing that may come after it.
        stream.set_nodelay(true)?;
        Ok(Self::Tcp(stream))
    }

    /// How long either direction may stand still.
    pub(crate) fn set_timeout(&self, silence: Duration) -> io::Result<()> {
        let silence = Some(silence);
        match self {
            Self::Tcp(stream) => stream
                .set_read_timeout(silence)
                .and_then(|()| stream.set_write_timeout(silence)),
            Self::Unix(stream) => stream
                .set_read_timeout(silence)
                .and_then(|()| stream.set_write_timeout(silence)),
        }
    }

    /// Ends both directions, also for who waits for one of them.
    pub(crate) fn end(&self) {
        // Where it fails, the other side was faster.
        match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both).ok(),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both).ok(),
        };
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).read(buffer),
            Stream::Unix(stream) => (&mut &*stream).read(buffer),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).write(bytes),
            Stream::Unix(stream) => (&mut &*stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buffer)
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
