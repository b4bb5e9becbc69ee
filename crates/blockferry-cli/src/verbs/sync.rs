//! `sync SOURCE TARGET`: brings the target up to date, continuing where an interrupted run stopped.

use serde::de::DeserializeOwned;

use crate::address::{Location, There, pushed_from, typed};
use crate::arguments::{Pace, Reach, SyncArguments};
use crate::engine::transport::message::Role;
use crate::engine::{
    self, Context, DiskAddress, ErrorKind, Proof, Receipt, Strategy, SyncOptions, Target,
    format_size,
};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::file_url;
use crate::output::Output;
use crate::progress::Look;
use crate::remote::{Asked, Patience, Way};
use crate::session::{Session, same_command};
use crate::verbs::report::{Facts, duration, rate, short};
use crate::verbs::{dry_run, serve};

pub(crate) fn run(arguments: &SyncArguments, session: &Session) -> Result<Exit, Failure> {
    match (&arguments.source, &arguments.target) {
        (source, Location::Here(target)) if arguments.dry_run => {
            dry_run::run(source, target, arguments, session)
        }
        (source, Location::Here(target)) => {
            let request = Request {
                source,
                target,
                options: options(arguments),
                pace: &arguments.pace,
                reach: &arguments.reach,
                terms: Terms::AsAsked,
            };
            let receipt = bring_up_to_date(request, session)?;
            let target = target.absolute();
            report(
                "sync",
                &receipt,
                &|verb| session.command(verb, &target),
                session,
            );
            Ok(Exit::Done)
        }
        (Location::Here(source), Location::There(target)) => {
            push(source, target, arguments, session)
        }
        (Location::There(source), Location::There(target)) => {
            let message =
                format!("both {source} and {target} are on other hosts: one side must be here");
            let start = format!(
                "start the sync on {} or on {}",
                source.host(),
                target.host()
            );
            Err(Failure::new(Exit::Usage, message).with_hint(start))
        }
    }
}

/// What to bring where, and how.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) source: &'a Location,
    pub(crate) target: &'a DiskAddress,
    pub(crate) options: SyncOptions,
    pub(crate) pace: &'a Pace,
    pub(crate) reach: &'a Reach,
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

/// Brings a target that is here up to date, and explains failures; `resume` uses it too.
pub(crate) fn bring_up_to_date(
    request: Request<'_>,
    session: &Session,
) -> Result<Receipt, Failure> {
    let Request {
        source,
        target,
        mut options,
        pace,
        reach,
        terms,
    } = request;
    let path = target.absolute();
    let open_target = |options: &mut SyncOptions| {
        let mut place = Target::open(&path, &session.target_options())
            .map_err(|error| explain_decision(&error, &path, session))?;
        if terms == Terms::AsBegun {
            keep_terms(&mut place, options);
        }
        Ok::<_, Failure>(place)
    };
    let outcome = match source {
        Location::Here(source) => {
            let disk = super::open(source, pace.crash_consistent)?;
            refuse_same(source, target)?;
            let mut place = open_target(&mut options)?;
            let (context, _display) = session.context(Look::Bar);
            engine::sync(disk, &mut place, &options, &context)
        }
        Location::There(there) => {
            let way = Way::new(there, reach)?;
            let asked = Asked::of_source(pace);
            let (context, _display) = session.context(Look::Bar);
            with_patience(&way, &context, session, |patience| {
                let (_held, connection) = way.connect(Role::Source, &asked, session)?;
                patience.connected();
                options.attempt = Some(patience.attempt());
                match open_target(&mut options) {
                    Ok(mut place) => Ok(engine::sync_from_peer(
                        connection,
                        &mut place,
                        &options,
                        patience.context(),
                    )),
                    Err(failure) => {
                        let why = engine::Error::new(ErrorKind::Target, failure.message());
                        engine::refuse_peer(connection, &why);
                        Err(failure)
                    }
                }
            })?
        }
    };
    let words = match source {
        Location::Here(_) => String::new(),
        Location::There(_) => reach.words(),
    };
    outcome.map_err(|error| explain(&error, &path, pace, &words, options.in_place, session))
}

/// Makes attempts until one comes to something else than a lost connection. A first one that finds no way to the other
/// host is not repeated.
fn with_patience<T>(
    way: &Way<'_>,
    context: &Context,
    session: &Session,
    mut attempt: impl FnMut(&mut Patience) -> Result<Result<T, engine::Error>, Failure>,
) -> Result<Result<T, engine::Error>, Failure> {
    let mut patience = Patience::new(context).map_err(|error| session.failure(&error))?;
    loop {
        let (why, outcome) = match attempt(&mut patience) {
            Ok(Err(error)) if error.is_lost_link() => {
                let why = format!("the connection to {} was lost", way.host());
                (why, Ok(Err(error)))
            }
            Err(failure) if failure.exit() == Exit::Peer && patience.has_lost() => {
                (failure.message().to_owned(), Err(failure))
            }
            other => return other,
        };
        if !patience.try_again(&why) {
            return outcome;
        }
    }
}

/// Brings a target on another host to the content of a disk here.
fn push(
    source: &DiskAddress,
    target: &There,
    arguments: &SyncArguments,
    session: &Session,
) -> Result<Exit, Failure> {
    let disk = super::open(source, arguments.pace.crash_consistent)?;
    let way = Way::new(target, &arguments.reach)?;
    let state = session.state_dir().map(file_url::text_of);
    let recorded = pushed_from(source, &host_name());
    let mut asked = Asked::of_target(arguments, recorded, state.clone());
    let (context, display) = session.context(Look::Bar);
    let outcome = with_patience(&way, &context, session, |patience| {
        asked.reconnecting = patience.has_lost();
        asked.attempt = Some(patience.attempt());
        let (_held, connection) = way.connect(Role::Target, &asked, session)?;
        patience.connected();
        Ok(engine::serve_source(
            &disk,
            connection,
            serve::threads(&asked),
            patience.context(),
        ))
    });
    drop(display);
    let command = |verb: &str| way.command(verb, state.as_deref());
    let explain = |error: &engine::Error| {
        if arguments.dry_run {
            return session.failure(error);
        }
        explain_pushed(error, &command, arguments.in_place, session)
    };
    let json = outcome?.map_err(|error| explain(&error))?;
    if arguments.dry_run {
        dry_run::report(&told(&json)?, session);
    } else {
        report("sync", &told(&json)?, &command, session);
    }
    Ok(Exit::Done)
}

/// What the other side says that it came to.
fn told<T: DeserializeOwned>(json: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(json).map_err(|error| {
        let message = format!(
            "the run on the other side is done, but what it came to cannot be read: {error}"
        );
        Failure::new(Exit::Peer, message)
    })
}

/// For people who wonder whence a target came.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() {
        "another-host".to_owned()
    } else {
        name.to_owned()
    }
}

/// Asked before the target is opened, because its lock would only say that someone holds it: we ourselves.
pub(crate) fn refuse_same(source: &DiskAddress, target: &DiskAddress) -> Result<(), Failure> {
    let is_same = match (source, target) {
        (DiskAddress::Nbd(source), DiskAddress::Nbd(target)) => {
            source.absolute().disk() == target.absolute().disk()
        }
        // What cannot be looked at is refused when it is opened, with a better message.
        _ => match (source.path(), target.path()) {
            (Some(source), Some(target)) => engine::same_object(source, target).unwrap_or(false),
            _ => false,
        },
    };
    if !is_same {
        return Ok(());
    }
    let (source, target) = (typed(source), typed(target));
    let message = format!("source {source} and target {target} are the same disk");
    Err(Failure::new(Exit::Usage, message))
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
pub(crate) fn paced(source_address: String, pace: &Pace) -> SyncOptions {
    let mut options = SyncOptions::default();
    options.threads = pace.threads.map(usize::from);
    options.bwlimit_bytes_per_second = pace.bwlimit;
    options.log_limit_bytes = pace.log_limit;
    options.source_address = source_address;
    if pace.no_read_back {
        options.proof = Proof::Flush;
    }
    options
}

pub(crate) fn options(arguments: &SyncArguments) -> SyncOptions {
    Asked::of_target(arguments, arguments.source.recorded(), None).options()
}

/// What a failed run leaves, and the command that goes on.
fn explain(
    error: &engine::Error,
    target: &DiskAddress,
    pace: &Pace,
    reach: &str,
    in_place: bool,
    session: &Session,
) -> Failure {
    let failure = explain_decision(error, target, session);
    let resume = |pace: &Pace| {
        let command = session.command("resume", target);
        format!("{command}{}{reach}", pace.words())
    };
    let left = left(in_place);
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

fn left(in_place: bool) -> &'static str {
    if in_place {
        "the target is incomplete, its old content was given up"
    } else {
        "the target is still at its old point"
    }
}

/// What a failed run leaves on another host, and the command that goes on.
fn explain_pushed(
    error: &engine::Error,
    command: &dyn Fn(&str) -> String,
    in_place: bool,
    session: &Session,
) -> Failure {
    let failure = session.failure(error);
    match error.kind() {
        ErrorKind::DecisionPending => failure.with_hint(format!(
            "once that is solved, the same command finishes it, or: {}",
            command("resume")
        )),
        ErrorKind::Corruption => {
            failure.with_hint(format!("see where it stands with: {}", command("status")))
        }
        _ if error.is_resumable() || error.is_lost_link() => failure
            .with_hint(format!(
                "{}, unless its run had decided already, and what is durable is not sent again",
                left(in_place)
            ))
            .with_hint(format!("continue with: {}", same_command())),
        _ => failure,
    }
}

/// A failure that may leave a decision, or the target, in doubt.
pub(crate) fn explain_decision(
    error: &engine::Error,
    target: &DiskAddress,
    session: &Session,
) -> Failure {
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
pub(crate) fn report(
    verb: &str,
    receipt: &Receipt,
    command: &dyn Fn(&str) -> String,
    session: &Session,
) {
    let output = &session.output;
    output.summary(verb, receipt);
    output.say(headline(receipt));
    facts(receipt).say(output);
    details(receipt, output);
    if receipt.rollback_available {
        output.say(format_args!("  go back:  {}", command("rollback")));
        output.say(format_args!("  let go:   {}", command("accept")));
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
