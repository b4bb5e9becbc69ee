//! Shows how far a run is: a bar on a terminal, a line every two seconds otherwise, JSON lines on request.
//!
//! The observer is called from the threads that do the work. It never blocks: the newest progress goes into a slot
//! that is skipped when it is being read, everything else into a bounded queue whose overflow is counted.

mod meter;
mod render;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::engine::{Event, Observer, Progress};
use crate::output::Output;
use crate::signals::Received;
use render::Renderer;

/// Where the display may draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// A bar if standard error is a terminal.
    Bar,
    /// No bar: the verb writes data to the same terminal.
    NoBar,
    /// A bar, but decisions in JSON only: the demo tells them in its own words.
    Story,
}

/// How often the display looks for news. JSON progress is at most four lines a second.
const TICK: Duration = Duration::from_millis(250);

/// Events that may wait for the display; more are counted and dropped.
const QUEUED_EVENTS: usize = 1024;

#[derive(Debug, Default)]
struct Shared {
    newest: Mutex<Option<Progress>>,
    dropped_events: AtomicU64,
}

#[derive(Debug)]
enum Message {
    Event(Event),
    Stop,
}

#[derive(Debug)]
struct Watcher {
    shared: Arc<Shared>,
    queue: SyncSender<Message>,
}

impl Observer for Watcher {
    fn event(&self, event: &Event) {
        if let Event::Progress(progress) = event {
            if let Ok(mut newest) = self.shared.newest.try_lock() {
                *newest = Some(*progress);
            }
        } else if self.queue.try_send(Message::Event(event.clone())).is_err() {
            self.shared.dropped_events.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A thread that renders until it is dropped.
#[derive(Debug)]
pub(crate) struct Display {
    watcher: Arc<Watcher>,
    thread: Option<JoinHandle<()>>,
}

impl Display {
    pub(crate) fn start(output: &Arc<Output>, received: &Received, look: Look) -> Self {
        let (queue, messages) = sync_channel(QUEUED_EVENTS);
        let shared = Arc::new(Shared::default());
        let watcher = Arc::new(Watcher {
            shared: Arc::clone(&shared),
            queue,
        });
        let renderer = Renderer::new(Arc::clone(output), received.clone(), look);
        let thread = std::thread::Builder::new()
            .name("display".to_owned())
            .spawn(move || show(renderer, &shared, &messages))
            .ok();
        Self { watcher, thread }
    }

    pub(crate) fn observer(&self) -> Arc<dyn Observer> {
        Arc::clone(&self.watcher) as _
    }
}

impl Drop for Display {
    /// Shows what is still queued and clears the bar.
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            drop(self.watcher.queue.send(Message::Stop));
            drop(thread.join());
        }
    }
}

fn show(mut renderer: Renderer, shared: &Shared, messages: &Receiver<Message>) {
    loop {
        match messages.recv_timeout(TICK) {
            Ok(Message::Event(event)) => renderer.event(&event),
            Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {}
        }
        renderer.progress(newest(shared));
    }
    renderer.finish(
        newest(shared),
        shared.dropped_events.load(Ordering::Relaxed),
    );
}

fn newest(shared: &Shared) -> Option<Progress> {
    shared.newest.lock().ok().and_then(|slot| *slot)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Phase;
    use crate::output::Verbosity;

    fn watcher() -> (Watcher, Receiver<Message>) {
        let (queue, messages) = sync_channel(2);
        (
            Watcher {
                shared: Arc::default(),
                queue,
            },
            messages,
        )
    }

    #[test]
    fn an_observer_whose_display_hangs_never_blocks() {
        let (watcher, _messages) = watcher();
        let held = Arc::clone(&watcher.shared);
        let _guard = held.newest.lock().expect("not poisoned");

        for _ in 0..100 {
            watcher.event(&Event::Decision("full".to_owned()));
            watcher.event(&Event::Progress(Progress::new(Phase::Scanning, 1, 2, 0)));
        }

        assert_eq!(watcher.shared.dropped_events.load(Ordering::Relaxed), 98);
    }

    #[test]
    fn the_newest_progress_wins() {
        let (watcher, _messages) = watcher();

        for done in 1..=3 {
            watcher.event(&Event::Progress(Progress::new(Phase::Scanning, done, 3, 0)));
        }

        assert_eq!(
            newest(&watcher.shared),
            Some(Progress::new(Phase::Scanning, 3, 3, 0))
        );
    }

    #[test]
    fn a_display_ends_when_it_is_dropped() {
        let output = Arc::new(Output::new(false, Verbosity::Quiet));
        let display = Display::start(&output, &Received::default(), Look::NoBar);
        let observer = display.observer();

        drop(display);

        observer.event(&Event::Decision("nobody listens".to_owned()));
    }
}
