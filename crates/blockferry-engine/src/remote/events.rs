//! Events on their way: what happens on the target's side, told to the one who watches on the other.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use blockferry_pipeline::{Event, Observer, Phase};
use blockferry_transport::message::MAX_JSON_BYTES;
use blockferry_transport::{Connection, Message, Outbox};

/// How often a phase under way is told of.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// Tells the source's side, over the connection of the run, what happens on the target's.
#[derive(Debug)]
pub struct PeerObserver {
    outbox: Outbox,
    /// The phase that was told of last, and when.
    told: Mutex<Option<(Phase, Instant)>>,
}

impl PeerObserver {
    /// For the run over this connection.
    #[must_use]
    pub fn new(connection: &Connection) -> Self {
        Self {
            outbox: connection.outbox().clone(),
            told: Mutex::new(None),
        }
    }

    /// Progress is news in a new phase, at its end, and now and then.
    fn is_news(&self, event: &Event) -> bool {
        let Event::Progress(progress) = event else {
            return true;
        };
        let Ok(mut told) = self.told.try_lock() else {
            return false;
        };
        let at_end = progress.done_bytes >= progress.total_bytes;
        let recent = told.is_some_and(|(phase, when)| {
            phase == progress.phase && when.elapsed() < PROGRESS_EVERY && !at_end
        });
        if !recent {
            *told = Some((progress.phase, Instant::now()));
        }
        !recent
    }
}

impl Observer for PeerObserver {
    fn event(&self, event: &Event) {
        if !self.is_news(event) {
            return;
        }
        // Who cannot be told does not matter to the run.
        if let Ok(json) = serde_json::to_vec(event)
            && json.len() <= MAX_JSON_BYTES
        {
            self.outbox.send(Message::Event(json)).ok();
        }
    }
}

/// Passes on what the target's side told; what a newer version says and this one does not know is passed over.
pub(super) fn pass_on(json: &[u8], observer: &dyn Observer) {
    if let Ok(event) = serde_json::from_slice::<Event>(json) {
        observer.event(&event);
    }
}
