//! The walk: several workers take items in order, one consumer sees their results in order.
//!
//! ```text
//! next() --> worker 1 --+--> bounded channel --> consumer (the calling thread)
//!        --> worker 2 --+      parts: as they come; results: in the order of the items
//! ```
//! Memory is bounded: the channel by [`WalkOptions::queue`], the results that wait for an earlier one by
//! [`WalkOptions::window`]. The first error ends the walk: no worker begins another item.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

/// Parts and results that may wait: at most 2 MiB each.
const QUEUE: usize = 16;
/// How often the consumer is called when nothing comes.
const TICK: Duration = Duration::from_millis(50);

/// How a walk is done.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct WalkOptions {
    /// Workers, at least 1.
    pub threads: usize,
    /// Parts and results that may wait for the consumer.
    pub queue: usize,
    /// How far a worker may be ahead of the oldest unfinished item.
    pub window: u64,
}

impl WalkOptions {
    /// As many workers as asked for, and queues that keep them busy.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let threads = threads.max(1);
        Self {
            threads,
            queue: QUEUE,
            window: 16 * threads as u64,
        }
    }
}

/// What the consumer is called with.
#[derive(Debug)]
#[expect(clippy::exhaustive_enums, reason = "consumers handle all of it")]
pub enum Step<P, D> {
    /// A worker emitted a part of an item; parts of different items come in any order.
    Part(P),
    /// The next item in order is done; all its parts came before.
    Done(D),
    /// Nothing came for a while.
    Tick,
}

/// The walk is over: the worker returns at once.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::exhaustive_structs, reason = "a marker")]
pub struct Stopped;

/// Hands parts to the consumer.
#[derive(Debug)]
pub struct Emitter<P, D> {
    sender: Sender<Message<P, D>>,
}

impl<P, D> Emitter<P, D> {
    /// Hands over one part; waits while the consumer is behind.
    ///
    /// # Errors
    /// The walk ended.
    pub fn emit(&self, part: P) -> Result<(), Stopped> {
        self.sender
            .send(Message::Part(part))
            .map_err(|_ended| Stopped)
    }
}

#[derive(Debug)]
enum Message<P, D> {
    Part(P),
    Done(u64, D),
}

/// Walks over the items of `next` with `work` on several threads, and `consume` on this one. `scratch` makes
/// what one worker keeps between items.
///
/// # Errors
/// The first error of `next`, `work` or `consume`.
pub fn walk<I, S, P, D, E>(
    options: WalkOptions,
    next: impl FnMut() -> Option<Result<I, E>> + Send,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, I, &Emitter<P, D>) -> Result<D, E> + Sync,
    mut consume: impl FnMut(Step<P, D>) -> Result<(), E>,
) -> Result<(), E>
where
    P: Send,
    D: Send,
    E: Send,
{
    let (sender, receiver) = bounded(options.queue.max(1));
    let claims = Claims::new(next, options.window.max(1));
    let (claims, scratch, work) = (&claims, &scratch, &work);
    std::thread::scope(|scope| {
        for _ in 0..options.threads.max(1) {
            let emitter = Emitter {
                sender: sender.clone(),
            };
            scope.spawn(move || {
                let mut kept = scratch();
                while let Some((number, item)) = claims.take() {
                    let sent = match work(&mut kept, item, &emitter) {
                        Ok(done) => emitter.sender.send(Message::Done(number, done)).is_ok(),
                        Err(error) => claims.fail(error),
                    };
                    if !sent {
                        break;
                    }
                }
            });
        }
        drop(sender);
        if let Err(error) = collect(&receiver, claims, &mut consume) {
            claims.fail(error);
        }
        // Workers that wait to send find the channel closed.
        drop(receiver);
    });
    claims.first_error().map_or(Ok(()), Err)
}

/// Puts results in order and calls the consumer until every worker is gone.
fn collect<I, P, D, E, N>(
    receiver: &Receiver<Message<P, D>>,
    claims: &Claims<N, E>,
    consume: &mut impl FnMut(Step<P, D>) -> Result<(), E>,
) -> Result<(), E>
where
    N: FnMut() -> Option<Result<I, E>>,
{
    let mut waiting = BTreeMap::new();
    let mut in_order = 0;
    loop {
        match receiver.recv_timeout(TICK) {
            Ok(Message::Part(part)) => consume(Step::Part(part))?,
            Ok(Message::Done(number, done)) => {
                waiting.insert(number, done);
                while let Some(done) = waiting.remove(&in_order) {
                    in_order += 1;
                    consume(Step::Done(done))?;
                    claims.advance(in_order);
                }
            }
            Err(RecvTimeoutError::Timeout) => consume(Step::Tick)?,
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

/// Hands items out in order, within the window.
struct Claims<N, E> {
    state: Mutex<ClaimState<N, E>>,
    moved: Condvar,
    window: u64,
}

struct ClaimState<N, E> {
    next: N,
    taken: u64,
    consumed: u64,
    ended: bool,
    error: Option<E>,
}

impl<N, E> Claims<N, E> {
    fn new(next: N, window: u64) -> Self {
        let state = ClaimState {
            next,
            taken: 0,
            consumed: 0,
            ended: false,
            error: None,
        };
        Self {
            state: Mutex::new(state),
            moved: Condvar::new(),
            window,
        }
    }

    fn lock(&self) -> MutexGuard<'_, ClaimState<N, E>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take<I>(&self) -> Option<(u64, I)>
    where
        N: FnMut() -> Option<Result<I, E>>,
    {
        let mut state = self.lock();
        while !state.ended && state.taken >= state.consumed + self.window {
            state = self
                .moved
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.ended {
            return None;
        }
        match (state.next)() {
            Some(Ok(item)) => {
                state.taken += 1;
                Some((state.taken - 1, item))
            }
            Some(Err(error)) => {
                drop(state);
                self.fail(error);
                None
            }
            None => {
                state.ended = true;
                None
            }
        }
    }

    /// Ends the walk; the first error stays. Returns `false` for the callers' convenience.
    fn fail(&self, error: E) -> bool {
        let mut state = self.lock();
        state.ended = true;
        state.error.get_or_insert(error);
        self.moved.notify_all();
        false
    }

    fn advance(&self, consumed: u64) {
        self.lock().consumed = consumed;
        self.moved.notify_all();
    }

    fn first_error(&self) -> Option<E> {
        self.lock().error.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count_to(limit: u64) -> impl FnMut() -> Option<Result<u64, String>> {
        let mut n = 0;
        move || {
            n += 1;
            (n <= limit).then_some(Ok(n))
        }
    }

    #[test]
    fn results_come_in_order_and_after_their_parts() {
        let mut done = Vec::new();
        let mut parts = std::collections::BTreeSet::new();

        walk(
            WalkOptions::new(4),
            count_to(1000),
            || 0u64,
            |kept, n, emit| {
                *kept += 1;
                if n % 7 == 0 {
                    std::thread::yield_now();
                }
                emit.emit(n).map_err(|_stopped| String::new())?;
                Ok(n)
            },
            |step| {
                match step {
                    Step::Part(n) => assert!(parts.insert(n)),
                    Step::Done(n) => {
                        assert!(parts.contains(&n), "{n} is done before its part came");
                        done.push(n);
                    }
                    Step::Tick => {}
                }
                Ok(())
            },
        )
        .unwrap();

        assert_eq!(done, (1..=1000).collect::<Vec<_>>());
    }

    #[test]
    fn the_first_error_ends_the_walk_wherever_it_comes_from() {
        let run = |fail_work: u64, fail_consume: u64| {
            walk(
                WalkOptions::new(3),
                count_to(u64::MAX),
                || (),
                |(), n, _: &Emitter<(), u64>| {
                    if n == fail_work {
                        Err("work".into())
                    } else {
                        Ok(n)
                    }
                },
                |step| match step {
                    Step::Done(n) if n == fail_consume => Err("consume".into()),
                    _ => Ok(()),
                },
            )
        };

        assert_eq!(run(50, u64::MAX), Err("work".to_owned()));
        assert_eq!(run(u64::MAX, 50), Err("consume".to_owned()));
    }

    #[test]
    fn no_worker_runs_further_ahead_than_the_window() {
        let options = WalkOptions {
            threads: 4,
            queue: 1000,
            window: 8,
        };
        let consumed = std::sync::atomic::AtomicU64::new(0);

        walk(
            options,
            count_to(500),
            || (),
            |(), n, _: &Emitter<(), u64>| {
                let behind = consumed.load(std::sync::atomic::Ordering::SeqCst);
                if n > behind + 8 {
                    Err(format!("{n} taken at {behind}"))
                } else {
                    Ok(n)
                }
            },
            |step| {
                if let Step::Done(n) = step {
                    consumed.store(n, std::sync::atomic::Ordering::SeqCst);
                }
                Ok(())
            },
        )
        .unwrap();
    }
}
