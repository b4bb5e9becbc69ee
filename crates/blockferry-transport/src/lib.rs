//! What two blockferries say to each other, and how it travels.

mod connection;
mod error;
pub mod frame;
mod link;
pub mod message;
mod preamble;
mod short;
#[cfg(feature = "tls")]
pub mod tls;

pub use connection::{Connection, Deadlines, Outbox};
pub use error::{Error, ErrorKind, Result};
pub use link::Link;
pub use message::Message;
pub use preamble::{PREAMBLE_BYTES, Preamble, WIRE_VERSION};
pub use short::{ShortDigests, Width};
