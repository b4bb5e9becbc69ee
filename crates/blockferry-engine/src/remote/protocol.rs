//! What ends a role before its run does.

use blockferry_transport::Message;

/// What became of a message.
pub(super) type ProtocolResult<T = ()> = Result<T, ProtocolError>;

/// Why a role does not go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ProtocolError {
    /// The peer does what the protocol does not allow.
    Violation(String),
    /// A shortened digest was taken for another: the same again with whole ones.
    Mistaken(String),
}

pub(super) fn violates(what: impl Into<String>) -> ProtocolError {
    ProtocolError::Violation(what.into())
}

pub(super) fn unexpected(role: &str, message: &Message) -> ProtocolError {
    violates(format!(
        "the {role}'s side got a message {}",
        message.name()
    ))
}

pub(super) fn block_number(block: usize) -> u16 {
    u16::try_from(block).unwrap_or_else(|_| unreachable!("a region has 256 blocks at most"))
}
