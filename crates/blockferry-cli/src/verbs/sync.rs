//! `sync SOURCE TARGET`: brings the target up to date, continuing where an interrupted run stopped.

use std::path::Path;

use crate::address::Address;
use crate::arguments::{Pace, SyncArguments};
use crate::engine::{
    self, ErrorKind, Prediction, Proof, Receipt, Strategy, SyncOptions, Target, format_size,
};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Output;
use crate::progress::Look;
use crate::session::{Session, same_command};
use crate::verbs::report::{Facts, duration, rate, short};

pub(crate) fn run(arguments: &SyncArguments, session: &Session) -> Result<Exit, Failure> {
    let options = options(arguments);
    if arguments.dry_run {
        return dry_run(arguments, &options, session);
    }
    let request = Request {
        source: &arguments.source,
        target: &arguments.target,
        options,
        pace: &arguments.pace,
        terms: Terms::AsAsked,
    };
    let receipt = bring_up_to_date(request, session)?;
    report("sync", &receipt, &arguments.target.absolute(), session);
    Ok(Exit::Done)
}

/// What to bring where, and how.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) source: &'a Address,
    pub(crate) target: &'a Address,
    pub(crate) options: SyncOptions,
    pub(crate) pace: &'a Pace,
    pub(crate) terms: Terms,
}

/// Who decides what a session cannot change once it has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Terms {
    /// The options; an unfinished session that does not fit them is dropped.
    AsAsked,
    /// The unfinished session, which was begun with options of its own.
    AsBegun,
}

/// Runs the engine and explains its failures; `resume` uses it too.
pub(crate) fn bring_up_to_date(
    request: Request<'_>,
    session: &Session,
) -> Result<Receipt, Failure> {
    let Request {
        source,
        target,
        mut options,
        pace,
        terms,
    } = request;
    let disk = super::open(source.path(), pace.crash_consistent)?;
    refuse_same(source, target)?;
    let path = target.absolute();
    let mut place = Target::open(&path, &session.target_options())
        .map_err(|error| explain_decision(&error, &path, session))?;
    if terms == Terms::AsBegun {
        keep_terms(&mut place, &mut options);
    }
    let (context, display) = session.context(Look::Bar);
    let outcome = engine::sync(disk, &mut place, &options, &context);
    drop(display);
    outcome.map_err(|error| explain(&error, &path, pace, options.in_place, session))
}

/// Asked before the target is opened, because its lock would only say that someone holds it: we ourselves.
fn refuse_same(source: &Address, target: &Address) -> Result<(), Failure> {
    match engine::same_object(source.path(), target.path()) {
        Ok(true) => Err(Failure::new(
            Exit::Usage,
            format!("source {source} and target {target} are the same disk"),
        )),
        // What cannot be looked at is refused when it is opened, with a better message.
        Ok(false) | Err(_) => Ok(()),
    }
}

/// Block size, undo and a cut that was agreed to belong to the session.
fn keep_terms(place: &mut Target, options: &mut SyncOptions) {
    if let Some(header) = place.replica().unfinished() {
        options.block_size = header.geometry.block_size();
        options.undo = header.undo;
        options.in_place = header.strategy == Strategy::Direct && header.working_file_id.is_none();
        options.allow_shrink = header.old_bytes > header.geometry.image_bytes();
    }
}

/// Options of a run at this pace; the rest is default.
pub(crate) fn paced(source: &Address, pace: &Pace) -> SyncOptions {
    let mut options = SyncOptions::default();
    options.threads = pace.threads.map(usize::from);
    options.bwlimit_bytes_per_second = pace.bwlimit;
    options.log_limit_bytes = pace.log_limit;
    options.source_address = source.recorded();
    if pace.no_read_back {
        options.proof = Proof::Flush;
    }
    options
}

fn options(arguments: &SyncArguments) -> SyncOptions {
    let mut options = paced(&arguments.source, &arguments.pace);
    options.mode = arguments.mode.into();
    options.block_size = arguments.block_size;
    options.undo = arguments.undo.into();
    options.allow_shrink = arguments.allow_shrink;
    options.in_place = arguments.in_place;
    options.strict = arguments.strict;
    options.rescan = arguments.rescan;
    options.strategy = arguments.strategy.map(Into::into);
    options
}

/// What a failed run leaves, and the command that goes on.
fn explain(
    error: &engine::Error,
    target: &Path,
    pace: &Pace,
    in_place: bool,
    session: &Session,
) -> Failure {
    let failure = explain_decision(error, target, session);
    let resume = |pace: &Pace| format!("{}{}", session.command("resume", target), pace.words());
    let left = if in_place {
        "the target is incomplete, its old content was given up"
    } else {
        "the target is still at its old point"
    };
    match error.kind() {
        ErrorKind::DecisionPending | ErrorKind::Corruption => failure,
        ErrorKind::Cancelled if error.is_resumable() => failure
            .with_hint(format!("{left}, and what is durable is not sent again"))
            .with_hint(format!("continue with: {}", resume(pace))),
        ErrorKind::Interrupted if error.is_resumable() => {
            let unlimited = Pace {
                log_limit: None,
                ..pace.clone()
            };
            failure
                .with_hint(format!("{left}, and what is durable is not sent again"))
                .with_hint(format!(
                    "once the transfer log has room, continue with: {}",
                    resume(&unlimited)
                ))
        }
        ErrorKind::Cancelled | ErrorKind::Interrupted => failure
            .with_hint(format!("{left}; nothing was staged yet"))
            .with_hint(format!("start again with: {}", same_command())),
        _ if error.is_resumable() => failure.with_hint(format!(
            "once that is solved, continue with: {}",
            resume(pace)
        )),
        _ => failure,
    }
}

/// A failure that may leave a decision, or the target, in doubt.
pub(crate) fn explain_decision(error: &engine::Error, target: &Path, session: &Session) -> Failure {
    let failure = session.failure(error);
    match error.kind() {
        ErrorKind::DecisionPending => {
            let status = engine::status(target, &session.target_options());
            let back = status.is_ok_and(|status| status.state == "rolling_back");
            let verb = if back { "rollback" } else { "resume" };
            failure.with_hint(format!(
                "once that is solved, finish with: {}",
                session.command(verb, target)
            ))
        }
        ErrorKind::Corruption => failure.with_hint(format!(
            "see where it stands with: {}",
            session.command("status", target)
        )),
        _ => failure,
    }
}

/// Shows the receipt of a finished run.
pub(crate) fn report(verb: &str, receipt: &Receipt, target: &Path, session: &Session) {
    let output = &session.output;
    output.summary(verb, receipt);
    output.say(headline(receipt));
    facts(receipt).say(output);
    details(receipt, output);
    if receipt.rollback_available {
        output.say(format_args!(
            "  go back:  {}",
            session.command("rollback", target)
        ));
        output.say(format_args!(
            "  let go:   {}",
            session.command("accept", target)
        ));
    }
}

fn headline(receipt: &Receipt) -> String {
    let time = duration(receipt.elapsed_seconds);
    if receipt.outcome == "identical" {
        return format!(
            "identical: {} already equals the source; nothing was written ({time})",
            receipt.target
        );
    }
    let strategy = receipt
        .strategy
        .map_or_else(String::new, |strategy| format!(", {strategy}"));
    format!(
        "applied: {} is at the source's point ({}{strategy}, {time})",
        receipt.target, receipt.mode
    )
}

fn facts(receipt: &Receipt) -> Facts {
    let mut facts = Facts::default();
    let speed = rate(receipt.scanned_bytes, receipt.elapsed_seconds)
        .map_or_else(String::new, |rate| format!(" at {}/s", format_size(rate)));
    facts.add("size", format_size(receipt.source_bytes));
    facts.add(
        "read",
        format!("{}{speed}", format_size(receipt.scanned_bytes)),
    );
    facts.add_some("changed", receipt.changed_bytes.map(format_size));
    facts.add("sent", format_size(receipt.sent_bytes));
    if receipt.resumed_bytes > 0 {
        facts.add("resumed", format_size(receipt.resumed_bytes));
        facts.add("durable bytes sent again", receipt.restaged_bytes);
    }
    facts.add("point", short(&receipt.sync_point));
    facts.add("root", short(&receipt.target_root));
    facts
}

fn details(receipt: &Receipt, output: &Output) {
    output.detail(format_args!("  why: {}", receipt.reason));
    output.detail(format_args!(
        "  target read {}, staged {}, zeros {}, log {}, {} records, {} flushes",
        format_size(receipt.target_read_bytes),
        format_size(receipt.staged_bytes),
        format_size(receipt.zero_bytes),
        format_size(receipt.log_bytes),
        receipt.records,
        receipt.flushes
    ));
    output.detail(format_args!("  source root {}", receipt.source_root));
    output.detail(format_args!("  target root {}", receipt.target_root));
    for (phase, &seconds) in &receipt.phases {
        output.detail(format_args!("  {phase}: {}", duration(seconds)));
    }
    for fallback in &receipt.fallbacks {
        output.say(format_args!("  fallback: {fallback}"));
    }
}

fn dry_run(
    arguments: &SyncArguments,
    options: &SyncOptions,
    session: &Session,
) -> Result<Exit, Failure> {
    let disk = super::open(arguments.source.path(), arguments.pace.crash_consistent)?;
    refuse_same(&arguments.source, &arguments.target)?;
    let (context, display) = session.context(Look::Bar);
    let place = session.target_options();
    let outcome = engine::predict(&disk, arguments.target.path(), &place, options, &context);
    drop(display);
    let prediction = outcome.map_err(|error| session.failure(&error))?;
    session.output.summary("sync", &prediction);
    foretell(&prediction, &session.output);
    Ok(Exit::Done)
}

fn foretell(prediction: &Prediction, output: &Output) {
    let strategy = prediction
        .strategy
        .map_or_else(String::new, |strategy| format!(", {strategy}"));
    output.say(format_args!(
        "would run {}{strategy}: {}",
        prediction.mode, prediction.reason
    ));
    let mut facts = Facts::default();
    facts.add(
        "changed",
        format!("about {}", format_size(prediction.predicted_changed_bytes)),
    );
    let (data, all) = (
        format_size(prediction.data_bytes),
        format_size(prediction.source_bytes),
    );
    facts.add("data", format!("about {data} of {all}"));
    facts.add(
        "time",
        format!("about {}", duration(prediction.predicted_seconds)),
    );
    let (delta, full) = (
        duration(prediction.delta_seconds),
        duration(prediction.full_seconds),
    );
    facts.add("by mode", format!("delta about {delta}, full about {full}"));
    facts.add(
        "space",
        format!(
            "{} needed, {} available",
            format_size(prediction.required_bytes),
            format_size(prediction.available_bytes)
        ),
    );
    facts.say(output);
    if !prediction.fits {
        output
            .warn("there is not enough space; the run would be refused before it writes anything");
    }
    output.say("nothing was written");
}
