//! tbd
use crate::{arguments::DemoArguments, exit::Exit, failure::Failure, session::Session};
pub(crate) fn run(_arguments: &DemoArguments, _session: &Session) -> Result<Exit, Failure> {
    Ok(Exit::Done)
}
