//! Failover and failback of running machines.
//!
//! Principal type: [`Jobs`], the jobs of a host. A job copies the disks of a running machine pass by pass, each a
//! consistent point of its targets, until the last one is small; at the cutover it stops the machine, copies that last
//! pass, and starts a replica on overlays; then it is committed or rolled back. [`State`] is where a job is, [`JobSpec`]
//! what it is to do.
//!
//! ```no_run
//! use blockferry_engine::TargetOptions;
//! use blockferry_failover::{JobContext, JobSpec, Jobs, OldSource, Until};
//!
//! let spec = JobSpec::from_toml(&std::fs::read_to_string("web1.toml")?)?;
//! let context = JobContext::new(TargetOptions::new("/var/lib/blockferry"));
//! let mut jobs = Jobs::open("/var/lib/blockferry/jobs".as_ref())?;
//! jobs.start(&spec, Until::Ready, &context)?;
//! jobs.complete("web1", None, &context)?;
//! jobs.commit("web1", OldSource::Keep, &context)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What keeps its promises: every pass goes through the transfer log of its target, several disks are committed by one
//! record, the point before the job is kept by an anchor, and a state is durable before what it names is begun.

mod changes;
mod convergence;
mod error;
mod far;
mod hooks;
mod jobs;
mod overlay;
mod room;
mod runner;
mod scripts;
mod serve;
mod source;
mod spec;
mod state;
mod store;

pub use convergence::{Next, Pass, next, predicted_downtime};
pub use error::{Error, ErrorKind, Result};
pub use far::{HostConnection, Hosts};
pub use jobs::{DiskStatus, JobContext, JobObserver, JobStatus, Jobs, OldSource, Told, Until};
pub use scripts::{AtRest, Scripts};
pub use serve::serve_machine;
pub use spec::{
    DiskSpec, HandOverBy, HookTimeout, Hooks, JobSpec, MachineSpec, QuiesceBy, Reverse,
    parse_duration,
};
pub use state::{Input, Recovery, Refusal, State};
pub use store::{Filter, JobEvent, JobRecord};
