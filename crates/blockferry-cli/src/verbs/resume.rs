//! `resume TARGET`: reopens the recorded source and goes on; nothing that was durable is sent again.

use std::path::Path;

use crate::address::Address;
use crate::arguments::ResumeArguments;
use crate::engine;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::progress::Look;
use crate::session::Session;
use crate::verbs::sync::{self, Request, Terms};

pub(crate) fn run(arguments: &ResumeArguments, session: &Session) -> Result<Exit, Failure> {
    let target = &arguments.target;
    let recorded = engine::resume_source(target.path(), &session.target_options())
        .map_err(|error| session.failure(&error))?;
    finish_decided(target, session)?;
    let source = reopen(&recorded)?;
    session.output.say(format_args!("continuing from {source}"));
    let options = sync::paced(&source, &arguments.pace);
    let request = Request {
        source: &source,
        target,
        options,
        pace: &arguments.pace,
        terms: Terms::AsBegun,
    };
    let receipt = sync::bring_up_to_date(request, session)?;
    sync::report("resume", &receipt, &target.absolute(), session);
    Ok(Exit::Done)
}

/// What is committed needs its source no more: it is carried out whether or not that can still be opened. What is on
/// its way back does not go forward again.
fn finish_decided(target: &Address, session: &Session) -> Result<(), Failure> {
    let (path, options) = (target.absolute(), session.target_options());
    let failed = |error: engine::Error| sync::explain_decision(&error, &path, session);
    match &*engine::status(&path, &options).map_err(failed)?.state {
        "committed" => {}
        "rolling_back" => return Err(on_its_way_back(&path, session)),
        _ => return Ok(()),
    }
    let mut place = engine::Target::open(&path, &options).map_err(failed)?;
    let (context, display) = session.context(Look::Bar);
    let outcome = engine::recover(&mut place, &context);
    drop(display);
    session.output.say(outcome.map_err(failed)?.message);
    Ok(())
}

fn on_its_way_back(target: &Path, session: &Session) -> Failure {
    let message = format!(
        "{} is on its way back to its old point: there is no run to resume",
        target.display()
    );
    Failure::new(Exit::Usage, message).with_hint(format!(
        "finish with: {}",
        session.command("rollback", target)
    ))
}

fn reopen(recorded: &str) -> Result<Address, Failure> {
    Address::parse(recorded.into()).map_err(|error| {
        Failure::new(
            Exit::Usage,
            format!("the recorded source {recorded:?} cannot be reopened: {error}"),
        )
        .with_hint("name it: blockferry sync SOURCE TARGET also resumes")
    })
}
