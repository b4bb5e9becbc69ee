//! All end-to-end tests, one module per subject.

mod arrows;
mod bounds;
mod docs;
mod export;
mod failing_devices;
mod failover;
mod failures;
mod far_jobs;
mod fixtures;
mod full_disks;
mod kills;
mod lab;
mod names;
mod nbd;
mod nbd_targets;
mod recorded_writes;
mod strategy_fixtures;
mod syscalls;
mod targets;
mod two_hosts;
mod undo;
mod warm;
