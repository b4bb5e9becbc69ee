//! One sync, from planning to receipt.
//!
//! ```text
//! settle what is unfinished -> proven identical? -> sample, choose -> scan and stage -> prepare -> commit -> receipt
//! ```

mod choosing;
mod consumer;
mod identical;
mod origin;
mod point_files;
mod receipt;
mod scan;
mod settle;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blockferry_core::{Geometry, Root};
use blockferry_device::BlockSource;
use blockferry_pipeline::{Event, Phase};
use blockferry_transfer_log::{
    Applied, Plan, Retained, Session, SessionId, SourceStamp, Strategy, Undo,
};
use blockferry_transport::Connection;
use blockferry_transport::message::MAX_JSON_BYTES;

use self::origin::Origin;
use crate::error::{Error, ErrorKind, Result};
use crate::group::Cut;
use crate::handle::LogHandle;
use crate::options::{Context, Mode, SyncOptions};
use crate::plan::Choice;
use crate::receipt::Receipt;
use crate::remote::Peer;
use crate::target::Target;

/// Brings `target` to the content of `source`. An unfinished session of the same kind is resumed.
///
/// # Errors
/// See [`ErrorKind`]. Unless it is `DecisionPending`, the target is at its old point; where
/// [`Error::is_resumable`], the same call goes on where this one stopped.
pub fn sync(
    source: Arc<dyn BlockSource>,
    target: &mut Target,
    options: &SyncOptions,
    context: &Context,
) -> Result<Receipt> {
    Run::new(Origin::device(source, context), target, options, context)?.sync(target)
}

/// As [`sync`], as a member of a group that decides for all.
pub(crate) fn sync_in_group(
    source: Arc<dyn BlockSource>,
    target: &mut Target,
    options: &SyncOptions,
    context: &Context,
    cut: &Cut<'_>,
) -> Result<Receipt> {
    let mut run = Run::new(Origin::device(source, context), target, options, context)?;
    run.cut = Some(cut);
    run.sync(target)
}

/// As [`sync`], from a source on the other side of `connection`, where [`serve_source`](crate::serve_source) runs.
/// Which is told what came of it. Whoever makes connections again sets [`SyncOptions::attempt`]: between two of them anybody
/// may take the target.
///
/// # Errors
/// As [`sync`]; or the connection or the other side failed, after which the same call over another connection goes on.
pub fn sync_from_peer(
    connection: Connection,
    target: &mut Target,
    options: &SyncOptions,
    context: &Context,
) -> Result<Receipt> {
    sync_from_peer_in(connection, target, options, context, None)
}

/// As [`sync_from_peer`], alone or as a member of a group that decides for all.
pub(crate) fn sync_from_peer_in(
    connection: Connection,
    target: &mut Target,
    options: &SyncOptions,
    context: &Context,
    cut: Option<&Cut<'_>>,
) -> Result<Receipt> {
    let peer = Rc::new(Peer::new(connection));
    let origin = Origin::Peer(Rc::clone(&peer));
    let run = Run::new(origin, target, options, context);
    let outcome = run.and_then(|mut run| {
        run.cut = cut;
        run.sync(target)
    });
    if let Some(peer) = Rc::into_inner(peer) {
        peer.finish(outcome.as_ref().map(|r| r.to_json(MAX_JSON_BYTES)));
    }
    outcome
}

/// The state of one run.
struct Run<'a> {
    origin: Origin,
    target: String,
    options: &'a SyncOptions,
    context: &'a Context,
    geometry: Geometry,
    stamp: SourceStamp,
    id: SessionId,
    started: Duration,
    fallbacks: Vec<String>,
    phases: BTreeMap<String, f64>,
    counts: Counts,
    /// Flushes that opening and recovering the target took: not this run's.
    flushes_before: u64,
    /// Who decides with it.
    cut: Option<&'a Cut<'a>>,
}

/// What the workers did.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    source_read: u64,
    target_read: u64,
    changed: u64,
    done: u64,
}

impl<'a> Run<'a> {
    fn new(
        origin: Origin,
        target: &Target,
        options: &'a SyncOptions,
        context: &'a Context,
    ) -> Result<Self> {
        let flushes_before = target.replica.stats().flushes();
        let target = target.label();
        let found = origin.look()?;
        let address = if options.source_address.is_empty() {
            &found.label
        } else {
            &options.source_address
        };
        let stamp = SourceStamp::new(address, found.identity, found.evidence);
        let geometry = Geometry::new(found.size_bytes, options.block_size);
        Ok(Self {
            origin,
            target,
            options,
            context,
            geometry,
            stamp,
            id: random_id()?,
            started: context.clock.now(),
            fallbacks: Vec::new(),
            phases: BTreeMap::new(),
            counts: Counts::default(),
            flushes_before,
            cut: None,
        })
    }

    /// From settling what is unfinished to the receipt.
    fn sync(mut self, target: &mut Target) -> Result<Receipt> {
        self.take(target)?;
        self.check_sizes(target)?;
        let resumed = self.settle_unfinished(target)?;
        if resumed.is_none() && self.is_proven_identical(target)? {
            let root = target.replica.point().map(|point| point.root);
            root.map_or(Ok(()), |root| self.check_expected(root))?;
            self.ask_check()?;
            self.wait_for_others()?;
            return self.proven_receipt(target);
        }
        let choice = match resumed {
            Some(choice) => choice,
            None => self.choose(target)?,
        };
        self.say(&Event::Decision(choice.to_string()));
        let receipt = self.execute(target, &choice)?;
        target.leave_receipt(&receipt);
        Ok(receipt)
    }

    /// Scans, stages, prepares, commits.
    fn execute(mut self, target: &mut Target, choice: &Choice) -> Result<Receipt> {
        let files = self.point_files(target, choice)?;
        let device = target.replica.target();
        let resuming = target.replica.unfinished().is_some();
        let plan = self.plan(choice);
        let limit = plan.log_limit_bytes;
        let point_before = target.replica.point().map(|p| p.id);
        let kept_before = target.replica.retained().cloned();
        let mut handle = if resuming {
            let mut session = target
                .replica
                .resume_from(limit, &self.stamp)
                .map_err(|e| Error::log("resume the session", e).ending_run(true))?;
            session.prove_by(self.options.proof);
            LogHandle::Open(Box::new(session))
        } else {
            let begun = target.replica.begin_reading();
            begun.map_err(|e| Error::log("look at the target", e))?;
            LogHandle::Idle(&mut target.replica, plan)
        };
        let target_size = device.as_ref().map(|d| d.size_bytes());
        let writes_blocks = writes_blocks(choice);
        if writes_blocks || (files.is_file && target_size != Some(self.geometry.image_bytes())) {
            handle.session()?;
        }
        let outcome = self.scan_until_prepared(&mut handle, choice, files, device);
        let outcome = outcome.and_then(|done| self.check_expected(done.0.root).map(|()| done));
        let (recorded, prepared) = match outcome {
            Ok(done) => done,
            Err(error) => return Err(self.stop(handle, error)),
        };
        if !prepared {
            drop(handle);
            self.wait_for_others()?;
            return self.identical(target, choice, recorded);
        }
        let root = recorded.root;
        let session = handle.into_session()?;
        let totals = session.totals();
        let strategy = session.strategy();
        let applied = self.commit(session, root)?;
        let choice = Choice {
            strategy,
            ..choice.clone()
        };
        let mut receipt = self.receipt(
            target,
            &choice,
            Some(strategy),
            root,
            applied.point,
            totals,
            applied.proven_bytes,
        );
        receipt.previous_point = point_before.map(|p| p.to_string());
        if let Some(kept) = kept_before {
            self.say_accepted(&kept, receipt.rollback_available);
        }
        Ok(receipt)
    }

    /// Only one point is kept: what was kept until now went with this run's commit.
    fn say_accepted(&self, kept: &Retained, keeps_another: bool) {
        let older = match &kept.point {
            Some(point) => format!("the older point {}", point.id),
            None => "the older content".to_owned(),
        };
        let now = if keeps_another {
            "rollback now returns to what this run replaced"
        } else {
            "there is nothing to roll back to any more"
        };
        self.say(&Event::Accepted(format!(
            "{older} is accepted with this run: {now}"
        )));
    }

    /// A member with nothing to commit is at the cut when the others are.
    fn wait_for_others(&self) -> Result<()> {
        self.cut
            .map_or(Ok(()), |cut| cut.arrive(None).map(|_committed| ()))
    }

    /// What was staged stays: the next run compares it again.
    fn check_expected(&self, root: Root) -> Result<()> {
        match self.options.expected_root {
            Some(expected) if expected != root => Err(Error::new(
                ErrorKind::Corruption,
                format!(
                    "{}: expected the content with root {expected}, found {root}; nothing was committed",
                    self.stamp.address
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Decides, alone or with the other members of its group, and applies.
    fn decide(
        &self,
        mut session: Session<'_>,
        root: Root,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Applied> {
        let failed = |e| Error::log("commit and apply", e);
        let Some((cut, group)) = self.cut.and_then(|cut| Some((cut, cut.group()?))) else {
            return session.commit(root, progress).map_err(failed);
        };
        session.prepare_for_group(root, group).map_err(failed)?;
        let committed = cut
            .arrive(Some(session.id()))?
            .ok_or_else(|| internal("a group with a prepared member decided nothing"))?;
        session
            .commit_in_group(root, &committed, progress)
            .map_err(failed)
    }

    /// Commits and applies. When writing reports tells deciding, writing and proving apart; a strategy that writes
    /// no page after its decision only commits.
    fn commit(&mut self, session: Session<'_>, root: Root) -> Result<Applied> {
        let context = self.context;
        let (live, start) = (session.totals().live_bytes, context.clock.now());
        context.progress(Phase::Applying, 0, live, live);
        let written = Cell::new(None);
        let applied = self.decide(session, root, &|done, total| {
            let now = context.clock.now();
            let (first, _) = written.get().unwrap_or((now, now));
            written.set(Some((first, now)));
            context.progress(Phase::Applying, done, total, total);
        })?;
        let end = context.clock.now();
        match written.get() {
            Some((first, last)) => {
                self.took("committing", first.saturating_sub(start));
                self.took("applying", last.saturating_sub(first));
                self.took("proving", end.saturating_sub(last));
            }
            None => self.took("committing", end.saturating_sub(start)),
        }
        Ok(applied)
    }

    fn plan(&self, choice: &Choice) -> Plan {
        let mut plan = Plan::new(self.id, choice.strategy, self.geometry, self.stamp.clone());
        plan.mode = choice.mode.code();
        plan.undo = if self.options.in_place {
            Undo::None
        } else {
            self.options.undo
        };
        plan.started_unix = unix_seconds();
        plan.log_limit_bytes = self.options.log_limit_bytes.unwrap_or(u64::MAX);
        plan.proof = self.options.proof;
        plan
    }

    /// Closes the group under way, so that what was staged is durable, and says whether it resumes.
    fn stop(&self, handle: LogHandle<'_>, error: Error) -> Error {
        let LogHandle::Open(mut session) = handle else {
            return error;
        };
        // A handle that failed is dead: a later flush through it proves nothing. The log knows that of itself, of a
        // new file beside the target only the error tells.
        let may_flush = session.strategy() == Strategy::Redo || error.kind() != ErrorKind::Target;
        let closed = may_flush.then(|| session.close_group().ok()).flatten();
        // Where the group cannot be closed the last acknowledgement counts.
        let durable = closed.unwrap_or_else(|| session.checkpoint());
        error.ending_run(durable.sequence > 0)
    }

    /// Of everything this run draws.
    fn seed(&self) -> u64 {
        u64::from_le_bytes(self.id.as_bytes()[..8].try_into().unwrap_or_default())
    }

    fn warn(&mut self, code: &'static str, message: String) -> Result<()> {
        self.fall_back(ErrorKind::Target, code, message)
    }

    /// Something that goes on, but not as hoped; an error of this kind where fallbacks are.
    fn fall_back(&mut self, kind: ErrorKind, code: &'static str, message: String) -> Result<()> {
        if self.options.strict {
            return Err(Error::new(
                kind,
                format!("{message} (an error with --strict)"),
            ));
        }
        self.fallbacks.push(message.clone());
        self.say(&Event::Warning {
            code: code.into(),
            message,
        });
        Ok(())
    }

    fn say(&self, event: &Event) {
        self.context.observer.event(event);
    }

    fn time(&mut self, phase: &str, start: Duration) {
        self.took(phase, self.context.clock.now().saturating_sub(start));
    }

    fn took(&mut self, phase: &str, time: Duration) {
        *self.phases.entry(phase.to_owned()).or_default() += time.as_secs_f64();
    }

    fn elapsed(&self, start: Duration) -> f64 {
        self.context.clock.now().saturating_sub(start).as_secs_f64()
    }
}

/// Full downloads, and deltas into a shadow, write whole blocks without comparing.
fn writes_blocks(choice: &Choice) -> bool {
    choice.mode == Mode::Full || choice.strategy == Strategy::Shadow
}

/// A new id for a session and its point.
pub(crate) fn random_id() -> Result<SessionId> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|e| Error::new(ErrorKind::Internal, format!("draw a session id: {e}")))?;
    Ok(SessionId::from_bytes(bytes))
}

fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

fn internal(message: &str) -> Error {
    Error::new(ErrorKind::Internal, message)
}
