//! What both modes share: an ordered, bounded, parallel walk over the regions of a disk, how a region is
//! read, and the progress events a run reports.
//!
//! [`walk`] is the principal function: workers take items in order, one consumer sees their results in order.

mod failure;
mod progress;
mod region;
mod walk;

pub use failure::{Failure, Side};
pub use progress::{Event, Observer, Phase, Progress, Silent};
pub use region::{
    BUFFER_BYTES, BlockRun, DataMap, DataRegions, PIECE_BYTES, block_in, read_padded, runs, runs_of,
};
pub use walk::{Emitter, Step, Stopped, WalkOptions, walk};
