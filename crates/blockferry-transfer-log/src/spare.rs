//! Spare buffers: large aligned memory that is used again instead of being mapped, zeroed and unmapped for
//! every record. Faulting fresh memory in costs more than reading into it.

use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockferry_device::AlignedBuffer;

/// Buffers below this size are not worth keeping.
const SMALLEST: usize = 128 * 1024;
/// At most this many wait to be used again, of at most [`LARGEST`] bytes each.
const MOST_IDLE: usize = 16;
const LARGEST: usize = 4 * 1024 * 1024;

/// A handle to a stock of idle buffers; clones share it.
#[derive(Clone, Default)]
pub(crate) struct Spare {
    idle: Arc<Mutex<Vec<AlignedBuffer>>>,
}

impl Spare {
    /// A buffer of at least `length` bytes; what it holds is not defined.
    pub(crate) fn take(&self, length: usize) -> SpareBuffer {
        let rounded = length.max(AlignedBuffer::ALIGNMENT).next_power_of_two();
        let mut idle = self.lock();
        let found = idle
            .iter()
            .position(|b| b.len() >= length && b.len() <= 2 * rounded);
        let buffer = found.map(|n| idle.swap_remove(n));
        drop(idle);
        let buffer = buffer.unwrap_or_else(|| AlignedBuffer::zeroed(rounded));
        SpareBuffer {
            buffer: Some(buffer),
            home: self.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<AlignedBuffer>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Spare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Spare({} idle)", self.lock().len())
    }
}

/// A buffer that goes back to its stock when dropped.
pub(crate) struct SpareBuffer {
    /// `None` only while it is dropped.
    buffer: Option<AlignedBuffer>,
    home: Spare,
}

impl Deref for SpareBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.buffer.as_deref().unwrap_or_default()
    }
}

impl DerefMut for SpareBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.buffer.as_deref_mut().unwrap_or_default()
    }
}

impl SpareBuffer {
    /// Only its first bytes.
    pub(crate) fn first(self, length: usize) -> SpareSlice {
        SpareSlice {
            range: 0..length.min(self.len()),
            buffer: self,
        }
    }
}

/// The part of a spare buffer that holds something.
#[derive(Debug)]
pub(crate) struct SpareSlice {
    // Invariant: within the buffer.
    range: Range<usize>,
    buffer: SpareBuffer,
}

impl SpareSlice {
    /// Leaves the first bytes out.
    pub(crate) fn skip(&mut self, length: usize) {
        self.range.start = (self.range.start + length).min(self.range.end);
    }

    /// Bytes of memory it keeps.
    pub(crate) fn kept_bytes(&self) -> usize {
        self.buffer.len()
    }
}

impl Deref for SpareSlice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[self.range.clone()]
    }
}

impl Drop for SpareBuffer {
    fn drop(&mut self) {
        let Some(buffer) = self.buffer.take() else {
            return;
        };
        let mut idle = self.home.lock();
        if (SMALLEST..=LARGEST).contains(&buffer.len()) && idle.len() < MOST_IDLE {
            idle.push(buffer);
        }
    }
}

impl fmt::Debug for SpareBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SpareBuffer({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_was_given_back_is_used_again() {
        let spare = Spare::default();
        let mut first = spare.take(300_000);
        first[0] = 42;
        let place = first.as_ptr();
        drop(first);

        let again = spare.take(290_000);

        assert_eq!(again.as_ptr(), place);
        assert!(again.len() >= 290_000);
    }

    #[test]
    fn no_more_than_the_bound_is_kept() {
        let spare = Spare::default();
        let many: Vec<SpareBuffer> = (0..20).map(|_| spare.take(1 << 20)).collect();
        drop(many);
        drop(spare.take(LARGEST + 1));

        assert_eq!(spare.lock().len(), MOST_IDLE);
        assert!(spare.lock().iter().all(|b| b.len() == 1 << 20));
    }
}
