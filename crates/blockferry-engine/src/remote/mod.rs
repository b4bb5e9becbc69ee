//! A sync between two machines: the roles of the two sides, pure, and their hosts.
//!
//! ```text
//! source's side: SourceRole <- serve_source (reads)        target's side: TargetRole <- TargetSide (reads, stages)
//!                     |                                          |                        `-> Consumer, as locally
//!                     `---------------- Connection --------------'
//! ```

mod data;
mod events;
#[cfg(test)]
mod pair;
mod protocol;
mod sampling;
mod scan;
mod serve;
mod source_role;
mod target_role;
#[cfg(test)]
mod tests;

use blockferry_core::{RegionLeaves, block_digest, is_zero};
use blockferry_transport::message::Failed;
use blockferry_transport::{Connection, Message};

pub use events::PeerObserver;
pub(crate) use scan::{Peer, Scanned, TargetSide};
pub(crate) use serve::examine;
pub use serve::serve_source;

use crate::error::{Error, ErrorKind, causes_of};
use protocol::{ProtocolError, ProtocolResult, block_number, unexpected, violates};

fn internal(what: &str) -> Error {
    Error::new(ErrorKind::Internal, what)
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// Takes the leaves of neighbouring blocks, of which `first` is the first, from their bytes.
fn take_leaves(leaves: &mut RegionLeaves, first: usize, bytes: &[u8]) {
    let block_bytes = to_usize(leaves.geometry().block_size().bytes());
    for (block, place) in bytes.chunks(block_bytes).zip(first..) {
        if is_zero(block) {
            leaves.set_zero(place);
        } else {
            leaves.set(place, block_digest(block));
        }
    }
}

/// The link failed, or the peer's messages did.
fn lost(cause: blockferry_transport::Error) -> Error {
    Error::because(ErrorKind::Peer, "the other side", cause).resumable(true)
}

fn violated(error: ProtocolError) -> Error {
    let (ProtocolError::Violation(what) | ProtocolError::Mistaken(what)) = error;
    Error::new(
        ErrorKind::Peer,
        format!("the other side does not keep to the protocol: {what}"),
    )
}

/// Tells the peer of a connection, on which no run has begun, why there will be none, and ends it.
pub fn refuse_peer(connection: Connection, why: &Error) {
    connection.outbox().send(failure(why)).ok();
    connection.finish();
}

/// Kinds of errors as they travel.
const KINDS: [ErrorKind; 10] = [
    ErrorKind::Usage,
    ErrorKind::Source,
    ErrorKind::Target,
    ErrorKind::Interrupted,
    ErrorKind::DecisionPending,
    ErrorKind::Corruption,
    ErrorKind::Peer,
    ErrorKind::Hook,
    ErrorKind::Cancelled,
    ErrorKind::Internal,
];

/// What the other side is told of an error here.
fn failure(error: &Error) -> Message {
    let kind = KINDS.iter().position(|kind| *kind == error.kind());
    let mut text = error.to_string();
    for cause in causes_of(error) {
        text = format!("{text}: {cause}");
    }
    let end = text.floor_char_boundary(blockferry_transport::message::MAX_TEXT_BYTES);
    text.truncate(end);
    let kind = kind
        .and_then(|kind| u8::try_from(kind).ok())
        .unwrap_or(u8::MAX);
    Message::Failed(Failed {
        kind,
        resumable: error.is_resumable(),
        text,
    })
}

/// An error of the other side.
fn failed_peer(peer: &Connection, failed: &Failed) -> Error {
    let kind = KINDS.get(usize::from(failed.kind)).copied();
    Error::new(
        kind.unwrap_or(ErrorKind::Peer),
        format!("{}: {}", peer.label(), failed.text),
    )
    .resumable(failed.resumable)
}
