//! Read-back: what was written is read from the medium and compared with its digests (D9, I4).

use std::sync::Arc;

use blockferry_core::{Digest, Extent, Geometry, is_zero};
use blockferry_device::{BlockTarget, ReadRequest};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{PAGE, Unit, usize_of};
use crate::log::{LogFiles, RecordPlace};
use crate::spare::Spare;

/// Most bytes read at once.
const SPAN_BYTES: usize = 4 * 1024 * 1024;

/// Most bytes of one request.
const REQUEST_BYTES: usize = 1024 * 1024;

/// What an extent must hold.
#[derive(Clone, Debug)]
pub(crate) enum Expected {
    /// Units with these digests.
    Digests(Vec<Digest>),
    Zero,
}

/// Collects extents and checks them in batches, so that the device keeps its depth.
#[derive(Debug)]
pub(crate) struct ReadBack<'t> {
    target: &'t dyn BlockTarget,
    geometry: Geometry,
    pieces: Vec<Check>,
    used: usize,
    spare: Spare,
}

/// An extent and what it must hold.
#[derive(Clone, Debug)]
pub(crate) struct Check {
    extent: Extent,
    unit: Unit,
    expected: Expected,
}

impl<'t> ReadBack<'t> {
    pub(crate) fn new(target: &'t dyn BlockTarget, geometry: Geometry) -> Self {
        Self {
            target,
            geometry,
            pieces: Vec::new(),
            used: 0,
            spare: Spare::default(),
        }
    }

    /// Adds a check; its digests are those of its units, counted from its start.
    pub(crate) fn add(&mut self, check: Check) -> Result<()> {
        let Check {
            extent,
            unit,
            expected,
        } = check;
        let step = unit.bytes(&self.geometry);
        let mut start = extent.start();
        while start < extent.end() {
            let room = ((SPAN_BYTES - self.used) as u64 / step) * step;
            if room == 0 {
                self.check()?;
                continue;
            }
            let piece = Extent::from_range(start..extent.end().min(start + room));
            let expected = match &expected {
                Expected::Zero => Expected::Zero,
                Expected::Digests(all) => {
                    let first = usize_of((start - extent.start()) / step);
                    let count = usize_of(piece.length().div_ceil(step));
                    Expected::Digests(all[first..first + count].to_vec())
                }
            };
            self.pieces.push(Check {
                extent: piece,
                unit,
                expected,
            });
            self.used += padded(piece);
            start = piece.end();
        }
        Ok(())
    }

    /// Checks what is left.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.check()
    }

    fn check(&mut self) -> Result<()> {
        if self.pieces.is_empty() {
            return Ok(());
        }
        let mut buffer = self.spare.take(self.used);
        let mut rest: &mut [u8] = &mut buffer;
        let mut requests = Vec::with_capacity(self.pieces.len());
        for (offset, length) in self.requests() {
            let (head, tail) = rest.split_at_mut(length.next_multiple_of(PAGE));
            let buffer = &mut head[..length];
            requests.push(ReadRequest { offset, buffer });
            rest = tail;
        }
        let label = self.target.label();
        self.target
            .read_medium(&mut requests)
            .map_err(|e| Error::target(format!("read back what was written to {label}"), e))?;
        let mut offset = 0;
        for piece in self.pieces.drain(..) {
            let bytes = &buffer[offset..offset + usize_of(piece.extent.length())];
            offset += padded(piece.extent);
            if !piece.holds(&self.geometry, bytes) {
                return Err(Error::corrupt(format!(
                    "read back {} of {label}: the medium does not hold what was written",
                    piece.extent
                )));
            }
        }
        self.used = 0;
        Ok(())
    }
}

impl ReadBack<'_> {
    /// Offset and length of the reads that fill the buffer: neighbours together, long ones in parts, so that the
    /// device gets requests of one size and serves several at a time.
    fn requests(&self) -> Vec<(u64, usize)> {
        let mut requests: Vec<(u64, usize)> = Vec::new();
        for part in self
            .pieces
            .iter()
            .flat_map(|p| p.extent.pieces(REQUEST_BYTES as u64))
        {
            let length = usize_of(part.length());
            match requests.last_mut() {
                Some((offset, so_far))
                    if *offset + *so_far as u64 == part.start()
                        && so_far.is_multiple_of(PAGE)
                        && *so_far + length <= REQUEST_BYTES =>
                {
                    *so_far += length;
                }
                _ => requests.push((part.start(), length)),
            }
        }
        requests
    }
}

impl Check {
    pub(crate) fn new(extent: Extent, unit: Unit, expected: Expected) -> Self {
        Self {
            extent,
            unit,
            expected,
        }
    }

    /// Bytes it covers.
    pub(crate) fn bytes(&self) -> u64 {
        self.extent.length()
    }

    fn holds(&self, geometry: &Geometry, bytes: &[u8]) -> bool {
        match &self.expected {
            Expected::Zero => is_zero(bytes),
            Expected::Digests(expected) => self
                .unit
                .digests(geometry, self.extent, bytes)
                .eq(expected.iter().copied()),
        }
    }
}

fn padded(extent: Extent) -> usize {
    usize_of(extent.length()).next_multiple_of(PAGE)
}

/// What is to be read back on another thread, as it was when it was handed out.
#[derive(Debug)]
pub struct ReadBackTask {
    pub(crate) generation: u32,
    pub(crate) geometry: Geometry,
    pub(crate) files: LogFiles,
    pub(crate) working: Option<Arc<dyn BlockTarget>>,
    pub(crate) records: Vec<(u32, RecordPlace, Vec<Check>)>,
}

/// What a [`ReadBackTask`] found.
#[derive(Debug)]
pub struct ReadBackOutcome {
    pub(crate) generation: u32,
    pub(crate) records: Vec<(u32, Result<Found>)>,
}

impl ReadBackTask {
    /// Reads everything back from the medium.
    #[must_use]
    pub fn run(self) -> ReadBackOutcome {
        let Self {
            generation,
            geometry,
            files,
            working,
            records,
        } = self;
        let check = |(number, place, checks): (u32, RecordPlace, Vec<Check>)| {
            let bytes = checks.iter().map(|c| c.extent.length()).sum();
            let checked = files.verify(&place).and_then(|_header| match &working {
                Some(target) => {
                    let mut read_back = ReadBack::new(&**target, geometry);
                    read_back.spare = files.spare();
                    checks.into_iter().try_for_each(|c| read_back.add(c))?;
                    read_back.finish()
                }
                None => Ok(()),
            });
            (number, Found::of(checked.map(|()| bytes)))
        };
        let records = records.into_iter().map(check).collect();
        ReadBackOutcome {
            generation,
            records,
        }
    }
}

/// What reading a record back found.
#[derive(Debug)]
pub(crate) enum Found {
    /// It is whole, and so many bytes of the working file with it.
    Whole(u64),
    /// It cannot be read, or is something else.
    Lost(Error),
}

impl Found {
    /// A record or working file that cannot be read, or holds something else, is staged again; a caller that
    /// cancelled is obeyed.
    pub(crate) fn of(checked: Result<u64>) -> Result<Self> {
        match checked {
            Ok(bytes) => Ok(Self::Whole(bytes)),
            Err(error) if error.kind() == ErrorKind::Cancelled => Err(error),
            Err(error) => Ok(Self::Lost(error)),
        }
    }
}
