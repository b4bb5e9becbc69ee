//! The way to a blockferry on another host: it is started there by a remote shell, as rsync does it, and talks over
//! that shell's standard input and output.

mod asked;
mod patience;
mod shell;

pub(crate) use asked::Asked;
pub(crate) use patience::Patience;
pub(crate) use shell::{Shell, connect};
