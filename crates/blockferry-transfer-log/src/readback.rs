//! Read-back: what was written is read from the medium and compared with its digests (D9, I4).

use blockferry_core::{Digest, Extent, Geometry, is_zero};
use blockferry_device::{AlignedBuffer, BlockTarget, ReadRequest};

use crate::error::{Error, Result};
use crate::format::{PAGE, Unit, usize_of};

/// Most bytes read at once.
const SPAN_BYTES: usize = 4 * 1024 * 1024;

/// What an extent must hold.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Expected<'a> {
    /// Units with these digests.
    Digests(&'a [Digest]),
    Zero,
}

/// Collects extents and checks them in batches, so that the device keeps its depth.
#[derive(Debug)]
pub(crate) struct ReadBack<'t> {
    target: &'t dyn BlockTarget,
    geometry: Geometry,
    unit: Unit,
    buffer: AlignedBuffer,
    /// Where in the buffer each piece lies and what it must be; `None` is zeros.
    pieces: Vec<(Extent, usize, Option<Vec<Digest>>)>,
    used: usize,
    checked_bytes: u64,
}

impl<'t> ReadBack<'t> {
    pub(crate) fn new(target: &'t dyn BlockTarget, geometry: Geometry, unit: Unit) -> Self {
        Self {
            target,
            geometry,
            unit,
            buffer: AlignedBuffer::zeroed(SPAN_BYTES),
            pieces: Vec::new(),
            used: 0,
            checked_bytes: 0,
        }
    }

    /// Adds an extent; it starts at a unit.
    pub(crate) fn add(&mut self, extent: Extent, expected: Expected<'_>) -> Result<()> {
        let step = self.unit.bytes(&self.geometry);
        let mut start = extent.start();
        while start < extent.end() {
            let room = ((SPAN_BYTES - self.used) as u64 / step) * step;
            if room == 0 {
                self.check()?;
                continue;
            }
            let piece = Extent::from_range(start..extent.end().min(start + room));
            let digests = match expected {
                Expected::Zero => None,
                Expected::Digests(all) => {
                    let first = usize_of((start - extent.start()) / step);
                    let count = usize_of(piece.length().div_ceil(step));
                    Some(all[first..first + count].to_vec())
                }
            };
            self.pieces.push((piece, self.used, digests));
            self.used += usize_of(piece.length()).next_multiple_of(PAGE);
            start = piece.end();
        }
        Ok(())
    }

    /// Checks what is left and returns how many bytes were checked in all.
    pub(crate) fn finish(mut self) -> Result<u64> {
        self.check()?;
        Ok(self.checked_bytes)
    }

    fn check(&mut self) -> Result<()> {
        let mut rest: &mut [u8] = &mut self.buffer;
        let mut requests = Vec::with_capacity(self.pieces.len());
        for (extent, _, _) in &self.pieces {
            let padded = usize_of(extent.length()).next_multiple_of(PAGE);
            let (head, tail) = rest.split_at_mut(padded);
            requests.push(ReadRequest {
                offset: extent.start(),
                buffer: &mut head[..usize_of(extent.length())],
            });
            rest = tail;
        }
        let label = self.target.label();
        self.target
            .read_medium(&mut requests)
            .map_err(|e| Error::target(format!("read back what was written to {label}"), e))?;
        for (extent, offset, digests) in self.pieces.drain(..) {
            let bytes = &self.buffer[offset..offset + usize_of(extent.length())];
            let good = match &digests {
                None => is_zero(bytes),
                Some(expected) => self
                    .unit
                    .digests(&self.geometry, extent, bytes)
                    .eq(expected.iter().copied()),
            };
            if !good {
                return Err(Error::corrupt(format!(
                    "read back {extent} of {label}: the medium does not hold what was written"
                )));
            }
            self.checked_bytes += extent.length();
        }
        self.used = 0;
        Ok(())
    }
}
