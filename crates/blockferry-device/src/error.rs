//! The error of every device: what was attempted, on what, where, and what the caller can do about it.

use std::fmt;
use std::io;

/// Result of a device operation.
pub type Result<T> = std::result::Result<T, Error>;

/// What the caller can do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The device or file system failed (EIO and the like).
    Io,
    /// It cannot be reached any more: unplugged, or its server is gone. What became of writes since the last flush nobody
    /// knows; once it is back, they can be done again.
    Lost,
    /// No space left, or a quota.
    NoSpace,
    /// There is no such file or device.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// Someone else holds it: mounted, swapped on, locked, open.
    Busy,
    /// The operating system or file system cannot do this.
    Unsupported,
    /// Permission denied.
    Denied,
    /// Not what is needed: an image format, a symlink, a directory, too small.
    Unsuitable,
    /// Past the end of the device, or it shrank under way.
    OutOfRange,
    /// Cancelled by the caller's token.
    Cancelled,
}

/// A failed device operation.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    cause: Option<io::Error>,
}

impl Error {
    /// An error with a complete message: what was attempted, where, what was expected, what was found.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            cause: None,
        }
    }

    /// A system call failed; `attempt` says what it was for (`"write of 4096 bytes at offset 65536 to a.raw"`).
    pub fn from_io(attempt: impl Into<String>, cause: io::Error) -> Self {
        Self {
            kind: kind_of(&cause),
            message: attempt.into(),
            cause: Some(cause),
        }
    }

    /// One positioned request failed.
    pub(crate) fn of_request(
        attempt: &str,
        offset: u64,
        bytes: usize,
        label: &str,
        cause: io::Error,
    ) -> Self {
        let cause = match cause.kind() {
            // What the standard library says of it helps nobody.
            io::ErrorKind::UnexpectedEof => {
                io::Error::new(cause.kind(), "it is shorter than when it was opened")
            }
            _ => cause,
        };
        Self::from_io(
            format!("{attempt} of {bytes} bytes at offset {offset} of {label}"),
            cause,
        )
    }

    /// Some request of a batch failed.
    pub(crate) fn of_batch(attempt: &str, requests: usize, label: &str, cause: io::Error) -> Self {
        Self::from_io(
            format!("{attempt} of {requests} requests on {label}"),
            cause,
        )
    }

    /// The same failure, of a device that is gone with it.
    #[must_use]
    pub fn into_lost(self) -> Self {
        Self {
            kind: ErrorKind::Lost,
            ..self
        }
    }

    /// What the caller can do next.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

fn kind_of(cause: &io::Error) -> ErrorKind {
    use io::ErrorKind as K;
    if let Some(libc::ENODEV | libc::ENXIO) = cause.raw_os_error() {
        return ErrorKind::Lost;
    }
    match cause.kind() {
        K::NotFound => ErrorKind::NotFound,
        K::AlreadyExists => ErrorKind::AlreadyExists,
        K::PermissionDenied | K::ReadOnlyFilesystem => ErrorKind::Denied,
        K::StorageFull | K::QuotaExceeded | K::FileTooLarge => ErrorKind::NoSpace,
        K::ResourceBusy | K::WouldBlock | K::ExecutableFileBusy => ErrorKind::Busy,
        K::IsADirectory | K::NotADirectory => ErrorKind::Unsuitable,
        K::Unsupported | K::CrossesDevices => ErrorKind::Unsupported,
        K::UnexpectedEof => ErrorKind::OutOfRange,
        _ => ErrorKind::Io,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_ref().map(|c| c as _)
    }
}
