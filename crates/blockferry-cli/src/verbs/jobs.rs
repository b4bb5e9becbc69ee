//! `jobs`: what jobs there are and were on this host.

use serde::Serialize;

use crate::arguments::JobsArguments;
use crate::engine::failover::{Filter, JobRecord};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::session::Session;
use crate::verbs::failover::{failure, jobs};
use crate::verbs::report::{age, duration};

#[derive(Serialize)]
struct Listing<'a> {
    jobs: &'a [JobRecord],
}

pub(crate) fn run(arguments: &JobsArguments, session: &Session) -> Result<Exit, Failure> {
    let mut filter = Filter::default();
    filter.state = arguments.in_state;
    filter.operation.clone_from(&arguments.operation);
    filter.from_ms = arguments.from;
    filter.to_ms = arguments.to;
    let listed = jobs(session)
        .and_then(|jobs| jobs.list(&filter).map_err(|error| failure(&error, session)))?;
    session.output.summary("jobs", &Listing { jobs: &listed });
    for job in &listed {
        session.output.data(line(job));
    }
    if listed.is_empty() {
        session.output.say("no such job");
    }
    Ok(Exit::Done)
}

fn line(job: &JobRecord) -> String {
    let mut line = format!(
        "{:<16}  {:<14}  {:<8}  {}",
        job.name,
        job.state.to_string(),
        job.operation,
        age(job.age_seconds())
    );
    if let Some(seconds) = job.downtime_seconds {
        line.push_str(&format!(
            ", the source stood still for {}",
            duration(seconds)
        ));
    }
    line
}
