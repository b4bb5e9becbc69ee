//! The engine as an embedder uses it, on a simulated machine and on real directories.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests; what they print is shown when a test fails"
)]

mod anchors;
mod change_maps;
mod checks;
mod equal;
mod groups;
mod harness;
mod interrupted;
mod known;
mod old_point;
mod planning;
mod points;
mod proof;
mod reading;
mod real;
mod remote;
mod remote_crashes;
mod remote_maps;
