//! Moves whole disks between places incrementally, with minimal downtime, and never leaves a disk torn
