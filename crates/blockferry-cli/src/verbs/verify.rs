//! `verify A B` compares two disks; `verify TARGET` reads a target completely and checks it against its point.

use crate::address::typed;
use crate::arguments::VerifyArguments;
use crate::engine::{self, DiskAddress, VerifyReport, format_size};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::progress::Look;
use crate::session::Session;
use crate::verbs::diff;
use crate::verbs::report::{duration, short};

pub(crate) fn run(arguments: &VerifyArguments, session: &Session) -> Result<Exit, Failure> {
    match &arguments.second {
        Some(second) => pair(&arguments.first, second, session),
        None => target(&arguments.first, session),
    }
}

fn pair(first: &DiskAddress, second: &DiskAddress, session: &Session) -> Result<Exit, Failure> {
    let a = super::open(first, true)?;
    let b = super::open(second, true)?;
    let (context, display) = session.context(Look::Bar);
    let outcome = engine::compare(&a, &b, &context, &mut |_| {});
    drop(display);
    let comparison = outcome.map_err(|error| session.failure(&error))?;
    session.output.summary("verify", &comparison);
    session.output.say(diff::describe(&comparison));
    Ok(if comparison.equal {
        Exit::Done
    } else {
        Exit::Differs
    })
}

fn target(address: &DiskAddress, session: &Session) -> Result<Exit, Failure> {
    let failure = |error: engine::Error| session.failure(&error);
    let mut target = super::open_known(&address.absolute(), session)?;
    let (context, display) = session.context(Look::Bar);
    let outcome = engine::verify_target(&mut target, &context);
    drop(display);
    let report = outcome.map_err(failure)?;
    session.output.summary("verify", &report);
    let time = duration(report.elapsed_seconds);
    if report.matches {
        session.output.say(format_args!(
            "matches: {} is exactly at its recorded point (root {}, {time})",
            typed(address),
            short(&report.found_root)
        ));
        return Ok(Exit::Done);
    }
    mismatch(&report, session);
    let path = address.absolute();
    session.output.say(format_args!(
        "hint: see where it stands with: {}",
        session.command("status", &path)
    ));
    Ok(Exit::Corruption)
}

fn mismatch(report: &VerifyReport, session: &Session) {
    session.output.answer(format_args!(
        "corruption: {} is not at its recorded point: expected root {}, found {}",
        report.target,
        short(&report.expected_root),
        short(&report.found_root)
    ));
    if report.written_since {
        session
            .output
            .say("  somebody wrote it since its last sync");
    }
    if report.different_bytes > 0 {
        session.output.say(format_args!(
            "  {} differ:",
            format_size(report.different_bytes)
        ));
    }
    for &(start, length) in &report.different_extents {
        session.output.say(format_args!("    {start} {length}"));
    }
}
