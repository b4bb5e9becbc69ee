//! Full download: copy everything that is not zero, without comparing; digests are taken while it streams.
//!
//! [`Copying`] holds what all workers share; [`Copying::region`] does one region. Blocks go to the working file on
//! the worker's thread, or to the log where there is none. A resumed run skips what its progress record proves.

mod region;

pub use region::{Copying, RegionCopy, Scratch};
