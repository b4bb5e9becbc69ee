//! Numbered operations and the faults that can hit them.

use std::fmt;
use std::sync::Arc;

use blockferry_core::Extent;

/// What an operation does. Each mutating operation has a number, counted from 1.
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
}

/// One mutating operation that was asked for.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Operation {
    /// From 1 in the life of the simulated disk.
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
        write!(
            f,
            "operation {} ({:?} of {}",
            self.number, self.kind, self.subject
        )?;
        match self.extent {
            Some(extent) => write!(f, " {extent})"),
            None => f.write_str(")"),
        }
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FaultKind {
    /// The operation fails as with EIO. Of what was unflushed on that file, an unknown part is lost for good.
    Io,
    /// The operation fails as with ENOSPC; a write may have got half way.
    NoSpace,
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
        Self {
            aim: Aim::Number(number),
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
        Self {
            aim,
            kind,
            repeat: Repeat::Once,
            spent: false,
        }
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
            Aim::Number(number) if self.repeat == Repeat::Forever => operation.number >= *number,
            Aim::Number(number) => operation.number == *number,
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
