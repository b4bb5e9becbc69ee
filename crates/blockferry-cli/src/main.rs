//! The `blockferry` command.
fn main() {}
