//! The sync engine of blockferry: plans, sessions, receipts
