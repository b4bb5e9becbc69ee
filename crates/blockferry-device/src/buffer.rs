//! Buffers for large transfers: aligned for O_DIRECT, reused instead of allocated again.
//!
//! [`BufferPool`] is also the bound on memory: who finds it empty waits for a buffer to come back.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::sys::{AlignedMemory, MEMORY_ALIGNMENT};

/// Bytes aligned to 4096 in memory; derefs to `[u8]`.
pub struct AlignedBuffer {
    memory: AlignedMemory,
}

impl AlignedBuffer {
    /// Alignment of the first byte, and the unit of the length.
    pub const ALIGNMENT: usize = MEMORY_ALIGNMENT;

    /// A buffer of `length` zero bytes.
    ///
    /// # Panics
    /// If `length` is not a multiple of [`Self::ALIGNMENT`].
    #[must_use]
    pub fn zeroed(length: usize) -> Self {
        assert!(
            length.is_multiple_of(Self::ALIGNMENT),
            "aligned buffers have whole pages, not {length} bytes"
        );
        Self {
            memory: AlignedMemory::zeroed(length),
        }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.as_slice()
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.memory.as_mut_slice()
    }
}

impl Clone for AlignedBuffer {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len());
        copy.copy_from_slice(self);
        copy
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuffer({} bytes)", self.len())
    }
}

/// At most a fixed number of equal buffers, shared by threads; clones are handles to the same pool.
#[derive(Clone, Debug)]
pub struct BufferPool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    buffer_bytes: usize,
    stock: Mutex<Stock>,
    returned: Condvar,
}

#[derive(Debug)]
struct Stock {
    idle: Vec<AlignedBuffer>,
    /// How many buffers may still be allocated.
    unborn: usize,
}

impl BufferPool {
    /// A pool of at most `limit` buffers of `buffer_bytes` each, allocated when first needed.
    ///
    /// # Panics
    /// If `buffer_bytes` is not a multiple of [`AlignedBuffer::ALIGNMENT`], or `limit` is 0.
    #[must_use]
    pub fn new(buffer_bytes: usize, limit: usize) -> Self {
        assert!(
            buffer_bytes.is_multiple_of(AlignedBuffer::ALIGNMENT),
            "whole pages only"
        );
        assert!(limit > 0, "an empty pool would wait for ever");
        let stock = Mutex::new(Stock {
            idle: Vec::new(),
            unborn: limit,
        });
        Self {
            shared: Arc::new(Shared {
                buffer_bytes,
                stock,
                returned: Condvar::new(),
            }),
        }
    }

    /// Length of every buffer in bytes.
    #[must_use]
    pub fn buffer_bytes(&self) -> usize {
        self.shared.buffer_bytes
    }

    /// Takes a buffer, waiting until there is one. Its content is whatever it held last.
    #[must_use]
    pub fn take(&self) -> PooledBuffer {
        let mut stock = self.shared.lock();
        loop {
            if let Some(buffer) = self.shared.claim(&mut stock) {
                drop(stock);
                return self.wrap(buffer);
            }
            stock = self
                .shared
                .returned
                .wait(stock)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes a buffer if there is one now.
    #[must_use]
    pub fn try_take(&self) -> Option<PooledBuffer> {
        let claimed = self.shared.claim(&mut self.shared.lock())?;
        Some(self.wrap(claimed))
    }

    fn wrap(&self, claimed: Option<AlignedBuffer>) -> PooledBuffer {
        let buffer = claimed.unwrap_or_else(|| AlignedBuffer::zeroed(self.shared.buffer_bytes));
        PooledBuffer {
            buffer: Some(buffer),
            home: Arc::clone(&self.shared),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Stock> {
        // A panic elsewhere leaves the stock as it was: it is only ever pushed to and popped from.
        self.stock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `Some(Some(buffer))` is an idle one, `Some(None)` the right to allocate one.
    #[expect(
        clippy::option_option,
        reason = "none at all, or one that is yet to be allocated"
    )]
    fn claim(&self, stock: &mut Stock) -> Option<Option<AlignedBuffer>> {
        if let Some(buffer) = stock.idle.pop() {
            return Some(Some(buffer));
        }
        stock.unborn = stock.unborn.checked_sub(1)?;
        Some(None)
    }
}

/// A buffer of a [`BufferPool`]; dropping it gives it back.
pub struct PooledBuffer {
    // Invariant: `Some` until dropped.
    buffer: Option<AlignedBuffer>,
    home: Arc<Shared>,
}

const PRESENT: &str = "the buffer is there until drop";

impl Deref for PooledBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.buffer.as_ref().expect(PRESENT)
    }
}

impl DerefMut for PooledBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.buffer.as_mut().expect(PRESENT)
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        self.home.lock().idle.extend(self.buffer.take());
        self.home.returned.notify_one();
    }
}

impl fmt::Debug for PooledBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PooledBuffer({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_pool_never_holds_more_than_its_limit() {
        let pool = BufferPool::new(4096, 2);

        let one = pool.take();
        let two = pool.take();

        assert!(pool.try_take().is_none());
        drop(one);
        assert!(pool.try_take().is_some());
        drop(two);
    }

    #[test]
    fn a_waiting_taker_gets_the_buffer_that_comes_back() {
        let pool = BufferPool::new(8192, 1);
        let mut held = pool.take();
        held[0] = 7;
        let waiter = std::thread::spawn(move || pool.take()[0]);

        std::thread::sleep(Duration::from_millis(5));
        drop(held);

        assert_eq!(waiter.join().unwrap(), 7, "the same memory is used again");
    }

    #[test]
    #[should_panic(expected = "whole pages")]
    fn a_length_of_half_a_page_is_a_bug() {
        drop(AlignedBuffer::zeroed(2048));
    }
}
