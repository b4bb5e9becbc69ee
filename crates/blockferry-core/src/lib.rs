//! Blocks, digests, manifests, change maps and codec of blockferry; pure, no I/O
