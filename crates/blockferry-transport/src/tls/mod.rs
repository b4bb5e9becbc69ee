//! TLS 1.3 between hosts that know each other: both show a certificate of the same private authority, before a byte of
//! the protocol is read.
//!
//! An [`Authority`] makes certificates for those who have none; an [`Identity`] is what one host shows and trusts;
//! [`Identity::connect`] and [`Identity::accept`] turn a socket into a [`Link`](crate::Link).

mod authority;
mod identity;
mod private;
mod stream;
#[cfg(test)]
mod tests;

pub use authority::{Authority, Issued};
pub use identity::{Identity, Peer};

/// What the certificates of one host are called in its directory.
pub mod file {
    /// The authority that it trusts.
    pub const AUTHORITY: &str = "ca.pem";
    /// Its own certificate.
    pub const CERTIFICATE: &str = "host.pem";
    /// The key of that, which nobody else may read.
    pub const KEY: &str = "host.key";
}
