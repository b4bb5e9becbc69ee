//! The transfer log on a simulated machine: sessions, recovery, groups, refusals, and the crash explorer.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail as tests do; what was explored is printed for people"
)]

mod batches;
mod bitrot;
mod explorer;
mod faults;
mod groups;
mod harness;
mod large;
mod limits;
mod looked;
mod model;
mod points;
mod recovery;
mod refusals;
mod sabotage;
mod sessions;
mod settled;
mod stories;
mod story;
mod views;
