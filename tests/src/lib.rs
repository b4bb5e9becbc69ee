//! End-to-end tests of blockferry.
