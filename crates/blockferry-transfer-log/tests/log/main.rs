//! The transfer log on a simulated machine: sessions, recovery, groups, refusals, and the crash explorer.

mod explorer;
mod groups;
mod harness;
mod recovery;
mod refusals;
mod sessions;
