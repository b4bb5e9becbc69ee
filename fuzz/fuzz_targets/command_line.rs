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
#[path = "../../crates/blockferry-cli/src/export.rs"]
mod export;
#[allow(dead_code)]
#[path = "../../crates/blockferry-cli/src/file_url.rs"]
mod file_url;
#[allow(dead_code)]
#[path = "../../crates/blockferry-cli/src/quote.rs"]
mod quote;

use address::{Location, pushed_from, recorded};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use blockferry as engine;
use blockferry_fuzz::text;
use clap::Parser;
use engine::{BlockSize, DiskAddress, SessionId, format_size, parse_size};
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
    match arguments::Cli::try_parse_from(line) {
        Ok(cli) => check_pace(&cli.verb),
        Err(refused) => drop(refused.to_string()),
    }
    for word in words {
        check_path(Path::new(&word));
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

/// A path that is printed to be pasted is one word to a shell, and the same file to this command.
fn check_path(path: &Path) {
    if path.as_os_str().is_empty() {
        return;
    }
    let printed = quote::quoted_path(path);
    let word = word_of(&printed).unwrap_or_else(|| panic!("a shell makes no word of {printed}"));
    assert_eq!(word, file_url::text_of(path), "{printed}");
    let again = file_url::path_of(&word).unwrap_or_else(|| Ok(Path::new(&word).to_owned()));
    if path.to_str().is_none() {
        let absolute = std::path::absolute(path).expect("it is not empty");
        assert_eq!(again.expect("printed to be pasted"), absolute, "{printed}");
    }
}

/// The one word that a shell makes of this text, if it is one: plain characters, quotes, escaped characters.
fn word_of(text: &str) -> Option<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@,%".contains(c);
    let mut word = String::new();
    let mut rest = text.chars();
    while let Some(character) = rest.next() {
        match character {
            '\\' => word.push(rest.next()?),
            '\'' => {
                let (quoted, behind) = rest.as_str().split_once('\'')?;
                word.push_str(quoted);
                rest = behind.chars();
            }
            plain_one if plain(plain_one) => word.push(plain_one),
            _ => return None,
        }
    }
    Some(word)
}

fn check_address(word: OsString) {
    let location = match Location::parse(word) {
        Ok(location) => location,
        Err(refused) => return drop(text::of_error(&refused)),
    };
    drop(format!("{location} {location:?}"));
    let noted = location.recorded();
    let again = Location::parse(noted.clone().into()).expect("recorded to be read again");
    match (location, again) {
        (Location::Here(disk), Location::Here(again)) => {
            match (&disk, &again) {
                (DiskAddress::Path(_), DiskAddress::Path(_)) => {
                    assert_eq!(again.absolute(), disk.absolute(), "{noted}");
                }
                _ => assert_eq!(recorded(&again), recorded(&disk)),
            }
            let pushed = Location::parse(pushed_from(&disk, "here").into());
            drop(pushed.expect_err("it is no disk of another host"));
        }
        (there, again) => {
            assert_eq!(again, there, "{noted}");
            if let Location::There(there) = there {
                // ssh takes neither for an option.
                assert!(!there.host().starts_with('-') && !there.host().is_empty());
            }
        }
    }
}

fn check_text(word: &str) {
    if let Ok(bytes) = parse_size(word) {
        // People are shown a rounded size; it is at least a size, but for what rounds up to 2^64.
        let shown = format_size(bytes);
        let again = parse_size(&shown);
        assert!(again.is_ok() || shown == "16.0 EiB", "{again:?}");
    }
    if let Ok(size) = word.parse::<BlockSize>() {
        let again = size.to_string().parse::<BlockSize>();
        assert_eq!(again.expect("printed to be typed again"), size);
    }
    if let Some(id) = SessionId::from_hex(word) {
        assert_eq!(id.to_string(), word);
    }
}
