//! Failover and failback of running machines.
mod convergence;
mod error;
mod hooks;
mod spec;
mod state;
mod store;
