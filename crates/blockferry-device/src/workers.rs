//! Runs the parts of one batch on a few short-lived threads, to keep several requests in flight.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::AlignedBuffer;

/// Requests in flight that SSDs need to reach most of their throughput; more only costs threads.
pub(crate) const MAX_WORKERS: usize = 8;

/// Fewer parts than this per thread are not worth the 20 µs that starting it costs.
const PARTS_PER_WORKER: usize = 2;

/// What one worker keeps between its parts.
#[derive(Default)]
pub(crate) struct Scratch {
    bounce: Option<AlignedBuffer>,
}

impl Scratch {
    /// An aligned buffer of at least `length` bytes with arbitrary content.
    pub(crate) fn bounce(&mut self, length: usize) -> &mut [u8] {
        if self.bounce.as_ref().is_none_or(|b| b.len() < length) {
            let length = length.next_multiple_of(AlignedBuffer::ALIGNMENT);
            self.bounce = Some(AlignedBuffer::zeroed(length));
        }
        let bounce = self.bounce.as_mut().expect("allocated just above");
        &mut bounce[..length]
    }
}

/// Does `work` on every part, in any order, on as many threads as the number of parts deserves. The first
/// failure wins; parts that have not begun by then never do.
pub(crate) fn run_parts<T: Send>(
    parts: Vec<T>,
    work: impl Fn(&mut Scratch, T) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let workers = (parts.len() / PARTS_PER_WORKER).clamp(1, MAX_WORKERS);
    let queue = Mutex::new(parts.into_iter());
    if workers == 1 {
        return drain(&queue, &work);
    }
    thread::scope(|scope| {
        let others: Vec<_> = (1..workers)
            .map(|_| scope.spawn(|| drain(&queue, &work)))
            .collect();
        let mut outcome = drain(&queue, &work);
        for other in others {
            let theirs = other
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome = outcome.and(theirs);
        }
        outcome
    })
}

fn drain<T>(
    queue: &Mutex<std::vec::IntoIter<T>>,
    work: &impl Fn(&mut Scratch, T) -> io::Result<()>,
) -> io::Result<()> {
    let mut scratch = Scratch::default();
    while let Some(part) = next_part(queue) {
        if let Err(error) = work(&mut scratch, part) {
            // Nobody begins another part.
            while next_part(queue).is_some() {}
            return Err(error);
        }
    }
    Ok(())
}

fn next_part<T>(queue: &Mutex<std::vec::IntoIter<T>>) -> Option<T> {
    queue.lock().unwrap_or_else(PoisonError::into_inner).next()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_part_is_worked_on_once() {
        let sum = AtomicUsize::new(0);

        run_parts((1..=1000).collect(), |_, part| {
            sum.fetch_add(part, Ordering::Relaxed);
            Ok(())
        })
        .unwrap();

        assert_eq!(sum.into_inner(), 500_500);
    }

    #[test]
    fn the_first_failure_is_reported_and_ends_the_batch() {
        let begun = AtomicUsize::new(0);

        let outcome = run_parts((0..10_000).collect::<Vec<usize>>(), |_, part| {
            begun.fetch_add(1, Ordering::Relaxed);
            if part == 3 {
                Err(io::ErrorKind::StorageFull.into())
            } else {
                Ok(())
            }
        });

        assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(begun.into_inner() < 10_000);
    }
}
