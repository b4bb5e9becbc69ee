//! Ordered parallel work over the regions of a disk: workers, bounded queues, cancellation, progress
