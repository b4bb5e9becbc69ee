//! Delta sync: compare source and target, stage what differs
