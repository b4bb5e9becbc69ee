//! Both roles of a sync against each other, in an order that the input draws, with messages changed on their way and
//! messages that nobody sent. Nothing panics, and a target that counts as done has the root that it was told.
#![no_main]

#[allow(dead_code)]
mod remote;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| remote::run(bytes));
