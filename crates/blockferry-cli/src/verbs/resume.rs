//! `resume TARGET`: reopens the recorded source and goes on; nothing that was durable is sent again.

use crate::address::{AddressError, Location};
use crate::arguments::ResumeArguments;
use crate::engine::{self, DiskAddress};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::progress::Look;
use crate::session::Session;
use crate::verbs::sync::{self, Request, Terms};

pub(crate) fn run(arguments: &ResumeArguments, session: &Session) -> Result<Exit, Failure> {
    let target = &arguments.target;
    let recorded = engine::resume_source(target, &session.target_options())
        .map_err(|error| session.failure(&error))?;
    let finished = finish_decided(target, session)?;
    let source = match Location::parse(recorded.clone().into()) {
        Ok(source) => source,
        // Another host is to push again, or a job to go on, if there is more to come.
        Err(AddressError::Pushed { .. } | AddressError::Job { .. }) if finished => {
            return Ok(Exit::Done);
        }
        Err(error) => return Err(gone(&recorded, &error)),
    };
    session.output.say(format_args!("continuing from {source}"));
    let options = sync::paced(source.recorded(), &arguments.pace);
    let request = Request {
        source: &source,
        target,
        options,
        pace: &arguments.pace,
        reach: &arguments.reach,
        terms: Terms::AsBegun,
    };
    let receipt = sync::bring_up_to_date(request, session)?;
    let target = target.absolute();
    sync::report(
        "resume",
        &receipt,
        &|verb| session.command(verb, &target),
        session,
    );
    Ok(Exit::Done)
}

/// What is committed needs its source no more: it is carried out whether or not that can still be opened. What is on
/// its way back does not go forward again. Returns whether there was anything to carry out.
fn finish_decided(target: &DiskAddress, session: &Session) -> Result<bool, Failure> {
    let (path, options) = (target.absolute(), session.target_options());
    let failed = |error: engine::Error| sync::explain_decision(&error, &path, session);
    match &*engine::status(&path, &options).map_err(failed)?.state {
        "committed" => {}
        "rolling_back" => return Err(on_its_way_back(&path, session)),
        _ => return Ok(false),
    }
    let mut place = engine::Target::open(&path, &options).map_err(failed)?;
    let (context, display) = session.context(Look::Bar);
    let outcome = engine::recover(&mut place, &context);
    drop(display);
    session.output.say(outcome.map_err(failed)?.message);
    Ok(true)
}

fn on_its_way_back(target: &DiskAddress, session: &Session) -> Failure {
    let message =
        format!("{target} is on its way back to its old point: there is no run to resume");
    Failure::new(Exit::Usage, message).with_hint(format!(
        "finish with: {}",
        session.command("rollback", target)
    ))
}

fn gone(recorded: &str, error: &AddressError) -> Failure {
    let message = format!("the recorded source {recorded:?} cannot be reopened: {error}");
    Failure::new(Exit::Usage, message)
        .with_hint("name it: blockferry sync SOURCE TARGET also resumes")
}
