//! The exit codes of the command line contract, and the one place where the engine's error kinds become them.

use crate::engine::ErrorKind;

/// How the command ends; the numbers are a promise to scripts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done, or equal.
    Done,
    /// `diff` and `verify A B`: they differ.
    Differs,
    /// The command line asks for something that cannot be.
    Usage,
    /// The source failed.
    Source,
    /// The target refused or failed.
    Target,
    /// Interrupted otherwise than by a signal; resumable, the target is at its old point.
    Interrupted,
    /// Committed but not applied: a decision is pending.
    DecisionPending,
    /// `verify TARGET` or the final proof found corruption.
    Corruption,
    /// The other side or the way to it.
    Peer,
    /// A hook failed.
    Hook,
    /// A bug of blockferry (`EX_SOFTWARE` of sysexits).
    Internal,
    /// A clean stop after this signal.
    Signal(u8),
}

impl Exit {
    /// The process exit status.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Differs => 1,
            Self::Usage => 2,
            Self::Source => 3,
            Self::Target => 4,
            Self::Interrupted => 5,
            Self::DecisionPending => 6,
            Self::Corruption => 7,
            Self::Peer => 8,
            Self::Hook => 9,
            Self::Internal => 70,
            Self::Signal(number) => 128 + number,
        }
    }

    /// The word for it in JSON error lines.
    pub(crate) fn kind(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Differs => "differs",
            Self::Usage => "usage",
            Self::Source => "source",
            Self::Target => "target",
            Self::Interrupted => "interrupted",
            Self::DecisionPending => "decision_pending",
            Self::Corruption => "corruption",
            Self::Peer => "peer",
            Self::Hook => "hook",
            Self::Internal => "internal",
            Self::Signal(_) => "cancelled",
        }
    }

    /// The exit for an engine error; `signal` is the one that arrived, if any did.
    pub(crate) fn for_kind(kind: ErrorKind, signal: Option<u8>) -> Self {
        match kind {
            ErrorKind::Usage => Self::Usage,
            ErrorKind::Source => Self::Source,
            ErrorKind::Target => Self::Target,
            ErrorKind::DecisionPending => Self::DecisionPending,
            ErrorKind::Corruption => Self::Corruption,
            ErrorKind::Peer => Self::Peer,
            ErrorKind::Hook => Self::Hook,
            ErrorKind::Cancelled | ErrorKind::Interrupted => {
                signal.map_or(Self::Interrupted, Self::Signal)
            }
            _ => Self::Internal,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_the_contract() {
        let codes: Vec<u8> = [
            Exit::Done,
            Exit::Differs,
            Exit::Usage,
            Exit::Source,
            Exit::Target,
            Exit::Interrupted,
            Exit::DecisionPending,
            Exit::Corruption,
            Exit::Peer,
            Exit::Hook,
            Exit::Signal(2),
            Exit::Signal(15),
        ]
        .map(Exit::code)
        .to_vec();

        assert_eq!(codes, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 130, 143]);
    }

    #[test]
    fn every_error_kind_has_its_own_exit() {
        let kinds = [
            (ErrorKind::Usage, 2),
            (ErrorKind::Source, 3),
            (ErrorKind::Target, 4),
            (ErrorKind::Interrupted, 5),
            (ErrorKind::DecisionPending, 6),
            (ErrorKind::Corruption, 7),
            (ErrorKind::Peer, 8),
            (ErrorKind::Hook, 9),
            (ErrorKind::Internal, 70),
        ];
        for (kind, code) in kinds {
            assert_eq!(Exit::for_kind(kind, None).code(), code, "{kind:?}");
        }
    }

    #[test]
    fn a_cancelled_run_ends_with_the_signal_that_cancelled_it() {
        assert_eq!(Exit::for_kind(ErrorKind::Cancelled, Some(2)).code(), 130);
        assert_eq!(Exit::for_kind(ErrorKind::Cancelled, Some(15)).code(), 143);
        assert_eq!(Exit::for_kind(ErrorKind::Cancelled, None).code(), 5);
    }

    #[test]
    fn a_signal_does_not_hide_another_failure() {
        assert_eq!(Exit::for_kind(ErrorKind::Source, Some(2)).code(), 3);
    }
}
