//! `resume TARGET`: reopens the recorded source and goes on; nothing that was durable is sent again.

use crate::address::Address;
use crate::arguments::ResumeArguments;
use crate::engine;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::session::Session;
use crate::verbs::sync::{self, Request, Terms};

pub(crate) fn run(arguments: &ResumeArguments, session: &Session) -> Result<Exit, Failure> {
    let target = &arguments.target;
    let recorded = engine::resume_source(target.path(), &session.target_options())
        .map_err(|error| session.failure(&error))?;
    let source = reopen(&recorded)?;
    session.output.say(format_args!("continuing from {source}"));
    let options = sync::paced(&source, &arguments.pace);
    let request = Request {
        source: &source,
        target,
        options,
        crash_consistent: arguments.pace.crash_consistent,
        terms: Terms::AsBegun,
    };
    let receipt = sync::bring_up_to_date(request, session)?;
    sync::report("resume", &receipt, &target.absolute(), session);
    Ok(Exit::Done)
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
