//! What people type: whole command lines, addresses, sizes, ids. Nothing panics, and what is printed to be typed again
//! means the same.
#![no_main]

// The parsers live in a program, so they are included; the rest of its modules is not needed here.
#[allow(dead_code)]
#[path = "../../crates/blockferry-cli/src/address.rs"]
mod address;
#[allow(dead_code)]
#[path = "../../crates/blockferry-cli/src/arguments.rs"]
mod arguments;
#[allow(dead_code)]
#[path = "../../crates/blockferry-cli/src/file_url.rs"]
mod file_url;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use blockferry as engine;
use clap::Parser;
use engine::{BlockSize, SessionId, format_size, parse_size};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // An argument never has a zero byte in it, so that is what separates words here.
    let words: Vec<OsString> = bytes
        .split(|b| *b == 0)
        .map(|word| OsString::from_vec(word.to_vec()))
        .collect();
    let line = [OsString::from("blockferry")]
        .into_iter()
        .chain(words.iter().cloned());
    if let Ok(cli) = arguments::Cli::try_parse_from(line) {
        check_pace(&cli.verb);
    }
    for word in words {
        check_address(word.clone());
        if let Some(word) = word.to_str() {
            check_text(word);
        }
    }
});

fn check_pace(verb: &arguments::Verb) {
    let arguments::Verb::Resume(resume) = verb else {
        return;
    };
    let words = format!("blockferry resume t{}", resume.pace.words());
    let again =
        arguments::Cli::try_parse_from(words.split(' ')).expect("printed to be typed again");
    assert!(
        matches!(&again.verb, arguments::Verb::Resume(again) if again.pace == resume.pace),
        "{words}"
    );
}

fn check_address(word: OsString) {
    let Ok(address) = address::Address::parse(word) else {
        return;
    };
    let recorded = address.recorded();
    let again =
        address::Address::parse(recorded.clone().into()).expect("recorded to be read again");
    assert_eq!(again.absolute(), address.absolute(), "{recorded}");
}

fn check_text(word: &str) {
    if let Ok(bytes) = parse_size(word) {
        // People are shown a rounded size; it is at least a size.
        parse_size(&format_size(bytes)).expect("printed to be typed again");
    }
    if let Ok(size) = word.parse::<BlockSize>() {
        let again = size.to_string().parse::<BlockSize>();
        assert_eq!(again.expect("printed to be typed again"), size);
    }
    if let Some(id) = SessionId::from_hex(word) {
        assert_eq!(id.to_string(), word);
    }
}
