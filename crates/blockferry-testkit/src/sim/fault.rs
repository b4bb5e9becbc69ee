//! Numbered operations and the faults that can hit them.

use std::fmt;
use std::sync::Arc;

use blockferry_core::Extent;

/// What an operation does. Those that change something are numbered from 1, and those that only ask
/// ([`Self::is_query`]) have numbers of their own, also from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OperationKind {
    /// `write_at`, also as a part of a batch.
    Write,
    /// `write_zeroes`.
    WriteZeroes,
    /// `punch`.
    Punch,
    /// `reserve`.
    Reserve,
    /// `resize`.
    Resize,
    /// `flush` of a file or device.
    Flush,
    /// `clone_from_file`.
    Clone,
    /// `copy_metadata`.
    CopyMetadata,
    /// `create`, also of a lock file.
    Create,
    /// `remove` of a name that exists.
    Remove,
    /// `rename_new`.
    Rename,
    /// `exchange`.
    Exchange,
    /// `sync` of a directory.
    SyncDirectory,
    /// Each request of `read_at`, `read_batch` and `read_medium`.
    Read,
    /// `status_at`.
    Status,
    /// `identity`, `evidence` or `file_id`.
    Examine,
    /// `open` of a name, whether it is there or not.
    Open,
    /// `names`.
    List,
    /// `available_bytes`.
    AvailableBytes,
    /// `lock`; where that makes the lock file, a [`Self::Create`] follows.
    Lock,
}

impl OperationKind {
    /// Whether it changes nothing.
    #[must_use]
    pub fn is_query(self) -> bool {
        match self {
            Self::Write
            | Self::WriteZeroes
            | Self::Punch
            | Self::Reserve
            | Self::Resize
            | Self::Flush
            | Self::Clone
            | Self::CopyMetadata
            | Self::Create
            | Self::Remove
            | Self::Rename
            | Self::Exchange
            | Self::SyncDirectory => false,
            Self::Read
            | Self::Status
            | Self::Examine
            | Self::Open
            | Self::List
            | Self::AvailableBytes
            | Self::Lock => true,
        }
    }

    /// Whether it may do a part of what was asked: it concerns a run of bytes, and the system call below it
    /// returns how far it got or changes them one after the other.
    pub(crate) fn can_fall_short(self) -> bool {
        matches!(
            self,
            Self::Write | Self::WriteZeroes | Self::Punch | Self::Reserve
        )
    }
}

/// One operation that was asked for.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Operation {
    /// From 1 in the life of the simulated disk, among queries or among the others.
    pub number: u64,
    /// What it did.
    pub kind: OperationKind,
    /// `directory/name`, the name of a device, or a directory.
    pub subject: Arc<str>,
    /// The bytes concerned, for operations that have some.
    pub extent: Option<Extent>,
    /// The protocol step the scenario was in.
    pub label: Arc<str>,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.kind.is_query() {
            "query"
        } else {
            "operation"
        };
        write!(
            f,
            "{what} {} ({:?} of {}",
            self.number, self.kind, self.subject
        )?;
        match self.extent {
            Some(extent) => write!(f, " {extent})"),
            None => f.write_str(")"),
        }
    }
}

/// What goes wrong.
///
/// The traits promise whole requests: the devices behind them go on after a short count and after an
/// interruption. So what the simulated machine gives is what is left of these when going on does not help.
/// A query that fails tells nothing, and leaves anything in the buffer of a read; [`Self::SilentLoss`] and
/// [`Self::Skipped`] do not concern queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FaultKind {
    /// The operation fails as with EIO. Of what was unflushed on that file, an unknown part is lost for good.
    Io,
    /// As [`Self::Io`], with ENODEV: the device was unplugged, or its server is gone.
    Gone,
    /// The operation fails as with ENOSPC; a write may have got half way.
    NoSpace,
    /// The operation does only a part and fails, as where a system call goes on returning a count of 0. Of a write
    /// or of zeros the first sectors are done, of a reservation or a hole the first pages, possibly none; a read finds
    /// its device too short; everything else is done wholly or not at all, and so is not done. What was
    /// unflushed before stays unflushed and is not lost.
    Short,
    /// The operation fails as with an EINTR that does not end, or that is not to be tried again (a flush). Nothing is
    /// done. What was unflushed before stays unflushed and is not lost.
    Interrupted,
    /// The operation claims success, but the medium loses an unknown part of what is unflushed on that file
    /// while the cache goes on showing it. For flushes and directory syncs.
    SilentLoss,
    /// The operation claims success and does nothing: a barrier that someone forgot.
    Skipped,
    /// The machine loses power before the operation; it and everything after it fails.
    PowerLoss,
}

/// Whether a fault goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "there is no third way")]
pub enum Repeat {
    /// It hits one operation.
    Once,
    /// It hits this and every later operation that matches.
    Forever,
}

/// Which operations a fault hits.
#[derive(Clone, Debug)]
enum Aim {
    Number(u64),
    Query(u64),
    Matching {
        kind: OperationKind,
        subject: String,
        skip: u64,
    },
}

/// A fault and the operations it hits.
#[derive(Clone, Debug)]
pub struct Fault {
    aim: Aim,
    pub(crate) kind: FaultKind,
    repeat: Repeat,
    spent: bool,
}

impl Fault {
    /// Hits the operation of this number.
    #[must_use]
    pub fn at(number: u64, kind: FaultKind) -> Self {
        Self::aimed(Aim::Number(number), kind)
    }

    /// Hits the query of this number ([`OperationKind::is_query`]).
    #[must_use]
    pub fn at_query(number: u64, kind: FaultKind) -> Self {
        Self::aimed(Aim::Query(number), kind)
    }

    fn aimed(aim: Aim, kind: FaultKind) -> Self {
        Self {
            aim,
            kind,
            repeat: Repeat::Once,
            spent: false,
        }
    }

    /// Hits operations of one kind on subjects that contain `subject`, from the `nth` (counted from 1) on.
    #[must_use]
    pub fn on(operation: OperationKind, subject: &str, nth: u64, kind: FaultKind) -> Self {
        let skip = nth.saturating_sub(1);
        let aim = Aim::Matching {
            kind: operation,
            subject: subject.to_owned(),
            skip,
        };
        Self::aimed(aim, kind)
    }

    /// Once or forever; once if this is not called.
    #[must_use]
    pub fn repeat(self, repeat: Repeat) -> Self {
        Self { repeat, ..self }
    }

    /// As it is written in a test.
    pub(crate) fn code(&self) -> String {
        let kind = self.kind;
        let aim = match &self.aim {
            Aim::Number(number) => format!("Fault::at({number}, FaultKind::{kind:?})"),
            Aim::Query(number) => format!("Fault::at_query({number}, FaultKind::{kind:?})"),
            Aim::Matching {
                kind: operation,
                subject,
                skip,
            } => {
                let nth = skip + 1;
                format!(
                    "Fault::on(OperationKind::{operation:?}, {subject:?}, {nth}, FaultKind::{kind:?})"
                )
            }
        };
        match self.repeat {
            Repeat::Once => aim,
            Repeat::Forever => format!("{aim}.repeat(Repeat::Forever)"),
        }
    }

    pub(crate) fn hits(&mut self, operation: &Operation) -> bool {
        if self.spent || !self.is_aimed_at(operation) {
            return false;
        }
        self.spent = self.repeat == Repeat::Once;
        true
    }

    fn is_aimed_at(&mut self, operation: &Operation) -> bool {
        match &mut self.aim {
            Aim::Number(number) => {
                !operation.kind.is_query() && has_come(operation.number, *number, self.repeat)
            }
            Aim::Query(number) => {
                operation.kind.is_query() && has_come(operation.number, *number, self.repeat)
            }
            Aim::Matching {
                kind,
                subject,
                skip,
            } => {
                if *kind != operation.kind || !operation.subject.contains(subject.as_str()) {
                    return false;
                }
                let skipped = *skip > 0;
                *skip = skip.saturating_sub(1);
                !skipped
            }
        }
    }
}

fn has_come(number: u64, wanted: u64, repeat: Repeat) -> bool {
    match repeat {
        Repeat::Once => number == wanted,
        Repeat::Forever => number >= wanted,
    }
}
