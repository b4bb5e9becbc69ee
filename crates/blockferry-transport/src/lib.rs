//! What two blockferries say to each other, and how it travels.

mod error;
pub mod frame;
pub mod message;
mod preamble;
mod short;

pub use error::{Error, ErrorKind, Result};
pub use message::Message;
pub use preamble::{PREAMBLE_BYTES, Preamble, WIRE_VERSION};
pub use short::{ShortDigests, Width};
