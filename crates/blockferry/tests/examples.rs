//! The examples are run, not only compiled.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs an example that cargo has built beside this test, in a directory of its own.
fn run(example: &str) -> (String, PathBuf) {
    let test = std::env::current_exe().unwrap();
    let built = test
        .parent()
        .and_then(Path::parent)
        .unwrap()
        .join("examples")
        .join(example);
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("example-{example}"));
    std::fs::remove_dir_all(&place).ok();
    let ran = Command::new(&built)
        .arg(&place)
        .output()
        .unwrap_or_else(|e| {
            panic!("{}: {e}", built.display());
        });
    assert!(
        ran.status.success(),
        "{example}: {}",
        String::from_utf8_lossy(&ran.stderr)
    );
    (String::from_utf8(ran.stdout).unwrap(), place)
}

#[test]
fn a_service_embeds_a_source_of_its_own_in_forty_lines() {
    let text = include_str!("../examples/custom_source.rs");
    assert!(text.lines().count() <= 40, "{} lines", text.lines().count());

    let (said, place) = run("custom_source");

    assert!(
        said.contains("scanning: ") && said.contains("applied: root "),
        "{said}"
    );
    let copy = std::fs::read(place.join("copy.raw")).unwrap();
    assert_eq!(copy.len(), 64 << 20);
    assert!(
        copy.iter()
            .enumerate()
            .all(|(at, byte)| usize::from(*byte) == at / 4096 % 256)
    );
}

#[test]
fn a_service_stays_responsive_while_a_worker_syncs() {
    let (said, place) = run("async_service");

    assert!(said.contains("applied: "), "{said}");
    let (old, new) = (place.join("old.raw"), place.join("new.raw"));
    assert!(std::fs::read(old).unwrap() == std::fs::read(new).unwrap());
}

#[test]
fn two_machines_sync_over_streams_of_the_callers_own() {
    let (said, _) = run("two_machines");

    assert!(said.contains("4096 of 8388608 bytes differed"), "{said}");
    let crossed = said.split(" bytes came").next().unwrap();
    let crossed: u64 = crossed.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(crossed < 2000, "{said}");
}
