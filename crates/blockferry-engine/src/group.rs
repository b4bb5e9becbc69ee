//! Several disks, one cut: all of them are staged side by side, and one record commits them all (I12).

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use blockferry_device::BlockSource;
use blockferry_transfer_log::{GroupCommitted, GroupDirectory, GroupId, SessionId};
use blockferry_transport::Connection;

use crate::error::{Error, ErrorKind, Result};
use crate::options::{Context, SyncOptions};
use crate::receipt::Receipt;
use crate::sync::{random_id, sync_from_peer_in, sync_in_group};
use crate::target::Target;

/// One disk of a group.
#[derive(Debug)]
#[non_exhaustive]
pub struct Member<'a> {
    origin: Origin,
    /// Opened with the verdicts of the same group directory.
    pub target: &'a mut Target,
    /// How.
    pub options: SyncOptions,
    /// Who hears of it.
    pub context: Context,
}

/// What a member is brought to.
#[derive(Debug)]
enum Origin {
    Device(Arc<dyn BlockSource>),
    Peer(Connection),
}

impl<'a> Member<'a> {
    /// Brings `target` to `source` together with the other members.
    #[must_use]
    pub fn new(
        source: Arc<dyn BlockSource>,
        target: &'a mut Target,
        options: SyncOptions,
        context: Context,
    ) -> Self {
        Self {
            origin: Origin::Device(source),
            target,
            options,
            context,
        }
    }

    /// Brings `target`, together with the other members, to a source on the other side of `connection`, where
    /// [`serve_source`](crate::serve_source) runs. Which is told what came of this member once all are decided.
    #[must_use]
    pub fn from_peer(
        connection: Connection,
        target: &'a mut Target,
        options: SyncOptions,
        context: Context,
    ) -> Self {
        Self {
            origin: Origin::Peer(connection),
            target,
            options,
            context,
        }
    }
}

/// Brings all targets to their sources, or none: each is staged on a thread of its own, and once all of them are
/// complete one record in `directory` commits them. After any crash, opening the targets with the verdicts of
/// `directory` brings all of them to the same cut. One disk alone needs no record.
///
/// Returns the receipts in the order of the members.
///
/// # Errors
/// Any of them failed as in [`sync`](crate::sync); the first failure in the order of the members that was not caused by
/// another one is returned. Then every target is at its old point, or, with
/// [`ErrorKind::DecisionPending`], the record decides. Targets that were prepared have to be opened again.
pub fn sync_group(members: Vec<Member<'_>>, directory: &GroupDirectory) -> Result<Vec<Receipt>> {
    let cut = Cut::new(directory, members.len())?;
    let outcomes: Vec<Result<Receipt>> = thread::scope(|scope| {
        let running: Vec<_> = members
            .into_iter()
            .map(|member| scope.spawn(|| run(member, &cut)))
            .collect();
        let joined = running.into_iter().map(|thread| thread.join());
        joined
            .map(|outcome| outcome.unwrap_or_else(|_panic| Err(panicked())))
            .collect()
    });
    let receipts = first_own_failure(outcomes)?;
    cut.retire()?;
    Ok(receipts)
}

fn run(member: Member<'_>, cut: &Cut<'_>) -> Result<Receipt> {
    let place = Place { cut };
    let Member {
        origin,
        target,
        options,
        context,
    } = member;
    let outcome = match origin {
        Origin::Device(source) => sync_in_group(source, target, &options, &context, cut),
        Origin::Peer(connection) => {
            sync_from_peer_in(connection, target, &options, &context, Some(cut))
        }
    };
    // Whoever arrived has been counted; whoever did not fails the others.
    drop(place);
    outcome
}

fn panicked() -> Error {
    Error::new(
        ErrorKind::Internal,
        "the thread of one disk of a group panicked",
    )
}

/// The receipts, or why there are none: what failed by itself tells more than what failed with it.
fn first_own_failure(outcomes: Vec<Result<Receipt>>) -> Result<Vec<Receipt>> {
    let mut receipts = Vec::new();
    let mut failure: Option<Error> = None;
    for outcome in outcomes {
        match outcome {
            Ok(receipt) => receipts.push(receipt),
            Err(error) if failure.as_ref().is_none_or(Error::is_of_another_member) => {
                failure = Some(error);
            }
            Err(_later) => {}
        }
    }
    failure.map_or(Ok(receipts), Err)
}

/// Where all members meet before anything is decided.
#[derive(Debug)]
pub(crate) struct Cut<'a> {
    directory: &'a GroupDirectory,
    group: GroupId,
    members: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Members that are complete or have nothing to commit.
    arrived: usize,
    prepared: Vec<SessionId>,
    decision: Decision,
}

#[derive(Clone, Copy, Debug, Default)]
enum Decision {
    #[default]
    Open,
    Committed(GroupCommitted),
    Nothing,
    Failed,
}

impl<'a> Cut<'a> {
    fn new(directory: &'a GroupDirectory, members: usize) -> Result<Self> {
        Ok(Self {
            directory,
            group: GroupId::from_bytes(*random_id()?.as_bytes()),
            members,
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// The group that a session is to be prepared for; nothing where the only member decides for itself.
    pub(crate) fn group(&self) -> Option<GroupId> {
        (self.members > 1).then_some(self.group)
    }

    /// Waits for all others. `prepared` is the session of a member that has something to commit.
    pub(crate) fn arrive(&self, prepared: Option<SessionId>) -> Result<Option<GroupCommitted>> {
        let mut state = self.lock();
        state.arrived += 1;
        state.prepared.extend(prepared);
        if state.arrived == self.members {
            self.decide(&mut state)?;
        }
        loop {
            match state.decision {
                Decision::Open => {
                    state = self
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                Decision::Committed(committed) => return Ok(Some(committed)),
                Decision::Nothing => return Ok(None),
                Decision::Failed => return Err(Error::of_another_member()),
            }
        }
    }

    fn decide(&self, state: &mut State) -> Result<()> {
        self.changed.notify_all();
        if state.prepared.is_empty() {
            state.decision = Decision::Nothing;
            return Ok(());
        }
        match self.directory.commit(self.group, &state.prepared) {
            Ok(committed) => {
                state.decision = Decision::Committed(committed);
                Ok(())
            }
            Err(error) => {
                state.decision = Decision::Failed;
                let text =
                    "commit the group of disks; opening the targets again tells whether it counts";
                Err(Error::because(ErrorKind::DecisionPending, text, error))
            }
        }
    }

    /// A member that ends before it arrived takes the decision with it.
    fn end(&self) {
        let mut state = self.lock();
        if matches!(state.decision, Decision::Open) {
            state.decision = Decision::Failed;
            self.changed.notify_all();
        }
    }

    /// Every member has reached its outcome: nobody asks for the record any more.
    fn retire(&self) -> Result<()> {
        if self.group().is_none() {
            return Ok(());
        }
        let retired = self.directory.retire(self.group);
        retired.map_err(|e| Error::log("remove the record of a group", e))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A member's place in the group; dropped when its thread ends, however it does.
struct Place<'a> {
    cut: &'a Cut<'a>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.cut.end();
    }
}
