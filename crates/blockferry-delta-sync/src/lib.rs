//! Delta sync: compare source and target region by region, stage the 4 KiB pages that differ.
//!
//! [`Comparison`] holds what all workers share: both devices, what is known of either without reading it (holes,
//! a saved manifest of proven content, a change map, a staged session), and where the pages go. [`Comparison::region`] does
//! one region. Which regions are done when, and in which order, is the pipeline's business; what a batch means is
//! the transfer log's.

mod known;
mod pages;
mod region;

pub use known::{Claim, Known};
pub use pages::{PageRun, differing_runs};
pub use region::{Comparison, RegionDelta, Scratch};
