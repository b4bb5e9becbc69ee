//! `status [TARGET]`: where a target stands and the commands that go on and back. Reads only.

use serde::Serialize;

use crate::address::typed;
use crate::arguments::StatusArguments;
use crate::engine::{
    self, DiskAddress, PointStatus, SessionStatus, Status, TargetOptions, format_size,
};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Output;
use crate::session::{Session, device_state_root};
use crate::verbs::report::{Facts, age, short};

pub(crate) fn run(arguments: &StatusArguments, session: &Session) -> Result<Exit, Failure> {
    match &arguments.target {
        Some(target) => one(&target.absolute(), session),
        None => {
            all(session);
            Ok(Exit::Done)
        }
    }
}

fn one(target: &DiskAddress, session: &Session) -> Result<Exit, Failure> {
    let status = look(target, &session.target_options(), session)
        .map_err(|error| session.failure(&error))?;
    session.output.summary("status", &status);
    describe(&status, &session.output);
    Ok(Exit::Done)
}

/// The status, its next steps as commands that can be pasted.
pub(crate) fn look(
    target: &DiskAddress,
    options: &TargetOptions,
    session: &Session,
) -> engine::Result<Status> {
    let mut status = engine::status(target, options)?;
    for step in &mut status.next {
        // The engine names verb and target; quoting and `--state` are the command line's.
        let words = step
            .command
            .strip_suffix(&status.target)
            .unwrap_or(&step.command);
        step.command = session.command(words.trim_end(), target);
    }
    Ok(status)
}

/// The whole status of one target, as text.
fn describe(status: &Status, output: &Output) {
    let running = if status.running {
        " (a run is under way)"
    } else {
        ""
    };
    output.answer(format_args!(
        "{}: {}{running}",
        status.target,
        meaning(&status.state)
    ));
    let mut facts = Facts::default();
    facts.add_some("point", status.point.as_ref().map(point));
    if let Some(session) = &status.session {
        add_session(&mut facts, session);
    }
    facts.add_some("can return to", status.rollback_point.as_ref().map(point));
    facts.add_some("kept for a job", status.anchored_point.as_ref().map(point));
    facts.add_some(
        "unwritten since",
        status
            .target_unwritten
            .map(|yes| if yes { "yes" } else { "no" }),
    );
    if status.held_bytes > 0 {
        facts.add("space held", format_size(status.held_bytes));
    }
    facts.answer(output);
    steps(status, output);
}

fn add_session(facts: &mut Facts, session: &SessionStatus) {
    facts.add(
        "session",
        format!(
            "{} ({}, {})",
            short(&session.id),
            session.mode,
            session.strategy
        ),
    );
    facts.add("source", &session.source);
    facts.add(
        "durable so far",
        format!(
            "{} in {} records",
            format_size(session.durable_bytes),
            session.durable_records
        ),
    );
}

fn steps(status: &Status, output: &Output) {
    let width = status
        .next
        .iter()
        .map(|step| step.command.len())
        .max()
        .unwrap_or(0);
    if width > 0 {
        output.answer("  next:");
    }
    for step in &status.next {
        output.answer(format_args!(
            "    {:<width$}  {}",
            step.command, step.effect
        ));
    }
}

fn point(point: &PointStatus) -> String {
    format!(
        "{} ({}, root {}, {})",
        short(&point.id),
        format_size(point.bytes),
        short(&point.root),
        age(point.age_seconds)
    )
}

/// The state in words an operator can act on.
fn meaning(state: &str) -> &str {
    match state {
        "unknown" => "never synced here, nothing is recorded",
        "at" => "at its point, at rest",
        "staging" => "at its old point; a run has staged part of the new one",
        "prepared" => "at its old point; the new one is staged and waits for its commit",
        "committed" => "committed but not applied; a decision is pending",
        "applied" => "at its new point; the old one is kept",
        "rolling_back" => "on its way back to the old point; opening it finishes that",
        "incomplete" => "incomplete: written in place and not finished",
        other => other,
    }
}

#[derive(Serialize)]
struct Known {
    targets: Vec<Entry>,
}

#[derive(Serialize)]
struct Entry {
    path: String,
    #[serde(flatten)]
    status: Option<Status>,
    error: Option<String>,
}

/// Every target synced from this host, whatever state it is in; one that cannot be read is still listed.
fn all(session: &Session) {
    let options = session.target_options();
    let entry = |target: DiskAddress| {
        let found = look(&target, &options, session);
        let error = found.as_ref().err().map(|error| session.failure(error));
        Entry {
            path: typed(&target),
            status: found.ok(),
            error: error.map(|failure| failure.message().to_owned()),
        }
    };
    let mut targets: Vec<Entry> = engine::list_targets(&device_state_root())
        .into_iter()
        .map(entry)
        .collect();
    // The list remembers targets that were removed with their state.
    targets.retain(|entry| {
        entry
            .status
            .as_ref()
            .is_none_or(|status| status.state != "unknown")
    });
    table(&targets, &session.output);
    session.output.summary("status", &Known { targets });
}

fn table(targets: &[Entry], output: &Output) {
    if targets.is_empty() {
        output.answer("no target was synced from this host yet");
        return;
    }
    let rows: Vec<[String; 4]> = targets.iter().map(row).collect();
    let header = ["TARGET", "STATE", "POINT", "HELD"].map(str::to_owned);
    let mut widths = [0; 4];
    for row in std::iter::once(&header).chain(&rows) {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let [target, state, point, _] = widths;
    for [a, b, c, d] in std::iter::once(&header).chain(&rows) {
        let line = format!("{a:<target$}  {b:<state$}  {c:<point$}  {d}");
        output.answer(line.trim_end());
    }
}

fn row(entry: &Entry) -> [String; 4] {
    let path = entry.path.clone();
    match (&entry.status, &entry.error) {
        (Some(status), _) => {
            let running = if status.running { ", running" } else { "" };
            let point = status.point.as_ref().map_or_else(
                || "-".to_owned(),
                |point| format!("{}, {}", short(&point.id), age(point.age_seconds)),
            );
            [
                path,
                format!("{}{running}", status.state),
                point,
                format_size(status.held_bytes),
            ]
        }
        (None, error) => [
            path,
            "unreadable".to_owned(),
            error.clone().unwrap_or_default(),
            String::new(),
        ],
    }
}
