//! Simulated disk, crash explorer, conformance suites and generators for blockferry devices
