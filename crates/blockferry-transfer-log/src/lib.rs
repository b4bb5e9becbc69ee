//! The transfer log of blockferry: staging, commit, apply, recovery, rollback
