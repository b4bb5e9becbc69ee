//! Ordered parallel work over the regions of a disk: workers, bounded queues, cancellation, progress.

mod progress;

pub use progress::{Event, Observer, Phase, Progress, Silent};
