//! The transfer log on a simulated machine: sessions, recovery, groups, refusals, and the crash explorer.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail as tests do; what was explored is printed for people"
)]

mod explorer;
mod groups;
mod harness;
mod large;
mod recovery;
mod refusals;
mod sabotage;
mod sessions;
mod stories;
