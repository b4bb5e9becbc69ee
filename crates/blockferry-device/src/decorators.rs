//! Decorators: a device that wraps another one and adds one thing. Each is a [`crate::BlockSource`] over a
//! source and a [`crate::BlockTarget`] over a target, so they stack in any order; [`CopyOnWrite`] makes a target of a source.

mod cancellable;
mod copy_on_write;
mod counting;
mod forward;
mod from_medium;
mod rate_limited;
mod read_only;

pub use cancellable::Cancellable;
pub use copy_on_write::CopyOnWrite;
pub use counting::{Counting, Counts};
pub use from_medium::FromMedium;
pub use rate_limited::{RateLimited, RateLimiter};
pub use read_only::ReadOnly;
