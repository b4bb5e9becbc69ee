//! `cancel`, `rollback` and `accept`: the three decisions a user takes about a target.

use crate::arguments::TargetArguments;
use crate::engine::{self, Recovered, format_size};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::progress::Look;
use crate::session::Session;
use crate::verbs::report::{Facts, duration, short};
use crate::verbs::sync;

pub(crate) fn run(
    verb: &'static str,
    arguments: &TargetArguments,
    session: &Session,
) -> Result<Exit, Failure> {
    let path = arguments.target.absolute();
    let mut target = super::open_known(&path, session)?;
    let (context, display) = session.context(Look::Bar);
    let decide = match (verb, target.recovered()) {
        // Opening it has just finished the one that was decided; there may be an older point behind.
        ("rollback", Recovered::RolledBack(_)) => engine::recover,
        ("rollback", _) => engine::rollback,
        ("cancel", _) => engine::cancel,
        _ => engine::accept,
    };
    let outcome = decide(&mut target, &context);
    drop(display);
    let outcome = outcome.map_err(|error| sync::explain_decision(&error, &path, session))?;
    report(verb, &outcome, session);
    Ok(Exit::Done)
}

fn report(verb: &str, outcome: &engine::Outcome, session: &Session) {
    session.output.summary(verb, outcome);
    session.output.say(&outcome.message);
    let mut facts = Facts::default();
    facts.add_some("point", outcome.point.as_deref().map(short));
    if outcome.freed_bytes > 0 {
        facts.add("freed", format_size(outcome.freed_bytes));
    }
    facts.add("time", duration(outcome.elapsed_seconds));
    facts.say(&session.output);
}
