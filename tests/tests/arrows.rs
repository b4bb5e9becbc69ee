//! The direction of the arrows between crates, as ARCHITECTURE.md draws them: a crate names only crates of
//! levels below its own. Dev-dependencies are exempt: a test may look anywhere.

use std::collections::BTreeSet;
use std::process::Command;

use blockferry_tests::workspace_root;
use serde_json::Value;

use crate::lab::output;

/// The shipped crates from the bottom up. Crates on one level never name each other.
const LEVELS: [&[&str]; 8] = [
    &["blockferry-core"],
    &["blockferry-device"],
    &[
        "blockferry-transfer-log",
        "blockferry-transport",
        "blockferry-nbd",
        "blockferry-qemu",
        "blockferry-pipeline",
    ],
    &["blockferry-delta-sync", "blockferry-full-download"],
    &["blockferry-engine"],
    &["blockferry-failover"],
    &["blockferry"],
    &["blockferry-cli"],
];

const TEST_KIT: &str = "blockferry-testkit";

/// What the test kit builds on; everything else is free to use it in its tests.
const BELOW_THE_TEST_KIT: [&str; 2] = ["blockferry-core", "blockferry-device"];

/// Packages that are not shipped; they may name everything.
const ON_TOP: [&str; 2] = ["blockferry-tests", "blockferry-benches"];

/// The only shipped package that may name the test kit: its demo runs on the kit's generators.
const HAS_THE_DEMO: &str = "blockferry-cli";

/// One crate of the workspace naming another, in a dependency that ends up in what is shipped.
struct Arrow {
    from: String,
    to: String,
}

#[test]
fn every_crate_has_a_level() {
    let known: BTreeSet<String> = LEVELS
        .concat()
        .iter()
        .chain(&ON_TOP)
        .chain([&TEST_KIT])
        .map(ToString::to_string)
        .collect();

    let found: BTreeSet<String> = packages().iter().map(name_of).collect();

    assert_eq!(
        found, known,
        "a crate came or went: give it a level here and a place in ARCHITECTURE.md"
    );
}

#[test]
fn arrows_point_down() {
    for Arrow { from, to } in arrows() {
        if let (Some(upper), Some(lower)) = (level_of(&from), level_of(&to)) {
            assert!(
                upper >= lower,
                "{from} (level {upper}) names {to} (level {lower}) above it"
            );
        }
    }
}

#[test]
fn crates_of_one_level_never_name_each_other() {
    for Arrow { from, to } in arrows() {
        if let (Some(one), Some(other)) = (level_of(&from), level_of(&to)) {
            assert_ne!(one, other, "{from} names {to} on its own level");
        }
    }
}

#[test]
fn the_test_kit_stays_out_of_what_is_shipped() {
    for Arrow { from, to } in arrows() {
        if to == TEST_KIT {
            let may = ON_TOP.contains(&from.as_str()) || from == HAS_THE_DEMO;
            assert!(may, "{from} may name {TEST_KIT} only as a dev-dependency");
        }
        if from == TEST_KIT {
            assert!(
                BELOW_THE_TEST_KIT.contains(&to.as_str()),
                "{TEST_KIT} names {to}, which is not below it"
            );
        }
    }
}

#[test]
fn nothing_names_the_packages_on_top() {
    for Arrow { from, to } in arrows() {
        assert!(!ON_TOP.contains(&to.as_str()), "{from} names {to}");
    }
}

fn level_of(package: &str) -> Option<usize> {
    LEVELS.iter().position(|level| level.contains(&package))
}

fn arrows() -> Vec<Arrow> {
    let packages = packages();
    let ours: BTreeSet<String> = packages.iter().map(name_of).collect();
    let arrows: Vec<Arrow> = packages
        .iter()
        .flat_map(|package| arrows_of(package, &ours))
        .collect();
    assert!(
        arrows.len() >= LEVELS.len(),
        "the metadata was not understood: {} arrows",
        arrows.len()
    );
    arrows
}

fn arrows_of(package: &Value, ours: &BTreeSet<String>) -> Vec<Arrow> {
    let dependencies = package["dependencies"]
        .as_array()
        .expect("a package lists its dependencies");
    dependencies
        .iter()
        .filter(|dependency| dependency["kind"] != "dev")
        .map(name_of)
        .filter(|name| ours.contains(name))
        .map(|to| Arrow {
            from: name_of(package),
            to,
        })
        .collect()
}

fn name_of(value: &Value) -> String {
    value["name"]
        .as_str()
        .expect("packages and dependencies have names")
        .to_owned()
}

fn packages() -> Vec<Value> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
        ])
        .current_dir(workspace_root());
    let output = output(&mut cargo).expect("cargo runs: it built this test");
    assert!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value =
        serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    metadata["packages"]
        .as_array()
        .expect("the metadata lists packages")
        .clone()
}
