//! The `blockferry` command: everything an operator types. It parses, shows and maps errors to exit codes; the
//! work itself is the library's.

mod address;
mod app;
mod arguments;
mod demo;
#[cfg(test)]
mod documented;
mod exit;
mod export;
mod failure;
mod file_url;
mod output;
mod progress;
mod quote;
mod remote;
mod session;
mod signals;
mod verbs;

use blockferry as engine;

fn main() -> std::process::ExitCode {
    app::run(&std::env::args_os().collect::<Vec<_>>())
}
