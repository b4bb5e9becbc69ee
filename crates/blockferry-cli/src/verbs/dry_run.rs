//! `sync --dry-run`: what a sync would do, from a sample; nothing is written on either side.

use crate::address::Location;
use crate::arguments::SyncArguments;
use crate::engine::transport::message::Role;
use crate::engine::{self, DiskAddress, Prediction, format_size};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Output;
use crate::progress::Look;
use crate::remote::{Asked, Way};
use crate::session::Session;
use crate::verbs::report::{Facts, duration};
use crate::verbs::sync::{options, refuse_same};

/// Of a target that is here.
pub(crate) fn run(
    source: &Location,
    target: &DiskAddress,
    arguments: &SyncArguments,
    session: &Session,
) -> Result<Exit, Failure> {
    let (place, options) = (session.target_options(), options(arguments));
    let outcome = match source {
        Location::Here(source) => {
            let disk = super::open(source, arguments.pace.crash_consistent)?;
            refuse_same(source, target)?;
            let (context, _display) = session.context(Look::Bar);
            engine::predict(&disk, target, &place, &options, &context)
        }
        Location::There(there) => {
            let way = Way::new(there, &arguments.reach)?;
            let asked = Asked::of_source(&arguments.pace);
            let (context, _display) = session.context(Look::Bar);
            let (_held, connection) = way.connect(Role::Source, &asked, session)?;
            engine::predict_from_peer(connection, target, &place, &options, &context)
        }
    };
    report(&outcome.map_err(|error| session.failure(&error))?, session);
    Ok(Exit::Done)
}

/// Shows what was foretold, here or on the target's host.
pub(crate) fn report(prediction: &Prediction, session: &Session) {
    session.output.summary("sync", prediction);
    foretell(prediction, &session.output);
}

fn foretell(prediction: &Prediction, output: &Output) {
    let (mode, reason) = (prediction.mode, &prediction.reason);
    // Most reasons begin with the strategy.
    let strategy = prediction.strategy.map(|strategy| strategy.to_string());
    let named = strategy.filter(|strategy| !reason.starts_with(strategy));
    let named = named.map_or_else(String::new, |strategy| format!("{strategy}: "));
    output.say(format_args!("would run {mode}, {named}{reason}"));
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
    facts.add_some(
        "on the wire",
        prediction
            .predicted_wire_bytes
            .map(|bytes| format!("about {}", format_size(bytes))),
    );
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
