//! The threads that read groups back from the medium while the next ones are staged.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Scope;

use blockferry_transfer_log::{ReadBackOutcome, ReadBackTask, Session};

use crate::error::{Error, Result};

/// Groups that may wait to be read back before staging waits for them.
const WAITING_GROUPS: usize = 4;
/// One reads while the other hashes.
const THREADS: usize = 2;

/// A handle to the threads; they end when the handle is dropped.
#[derive(Debug)]
pub(crate) struct ReadBackThreads {
    tasks: crossbeam_channel::Sender<ReadBackTask>,
    outcomes: Receiver<ReadBackOutcome>,
}

/// How long to wait for outcomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Collect {
    /// Not at all: what has finished.
    Finished,
    /// Until everything handed over is read back.
    All,
}

impl ReadBackThreads {
    pub(crate) fn start<'scope>(scope: &'scope Scope<'scope, '_>) -> Self {
        let (tasks, waiting) = crossbeam_channel::bounded(WAITING_GROUPS);
        let (finished, outcomes) = channel();
        for _ in 0..THREADS {
            let (waiting, finished) = (waiting.clone(), finished.clone());
            scope.spawn(move || serve(&waiting, &finished));
        }
        Self { tasks, outcomes }
    }

    /// Hands a group over; waits while too many are waiting.
    pub(crate) fn run(&self, task: ReadBackTask) {
        // The threads outlive the handle. Were they gone, `prepare` would read the group back itself.
        let _kept_by_prepare = self.tasks.send(task);
    }

    /// Gives what was read back to the session.
    pub(crate) fn collect(&self, session: &mut Session<'_>, how: Collect) -> Result<()> {
        let take = |session: &mut Session<'_>, outcome| {
            session
                .take_read_back(outcome)
                .map_err(|e| Error::log("read back what was staged", e))
        };
        if how == Collect::All {
            while session.is_read_back_under_way() {
                let Ok(outcome) = self.outcomes.recv() else {
                    break;
                };
                take(session, outcome)?;
            }
        }
        self.outcomes
            .try_iter()
            .try_for_each(|outcome| take(session, outcome))
    }
}

fn serve(waiting: &crossbeam_channel::Receiver<ReadBackTask>, finished: &Sender<ReadBackOutcome>) {
    for task in waiting {
        if finished.send(task.run()).is_err() {
            break;
        }
    }
}
