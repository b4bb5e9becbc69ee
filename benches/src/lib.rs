//! End-to-end benches of blockferry.
