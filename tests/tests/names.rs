//! Names that are bytes and no text: what is recorded and printed still means the same file.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::lab::{Child, Lab, MIB, same};

/// A path in the laboratory with the byte 255 in it.
fn no_text(lab: &Lab, before: &str, after: &str) -> PathBuf {
    let name = [before.as_bytes(), b"\xff", after.as_bytes()].concat();
    lab.root().join(OsStr::from_bytes(&name))
}

/// A sync slow enough to be stopped, once something of it is durable.
fn begun(lab: &Lab, source: &OsStr, target: &OsStr) -> Child {
    let mut command = lab.command("sync --json --mode delta --strategy redo --bwlimit 12M");
    let mut run = Child::start(command.arg(source).arg(target));
    assert!(run.wait_for(|line| line["event"] == "checkpoint"));
    run
}

#[test]
fn a_source_whose_name_is_no_text_is_found_again_by_resume() {
    let lab = Lab::new();
    let old = lab.disk("target", 61, 16 * MIB);
    let new = lab.edited("new", 62, &old, 0.8);
    let source = no_text(&lab, "sou", "rce");
    fs::rename(lab.path("new"), &source).expect("renamed");
    // What a name with the byte replaced would find instead.
    lab.disk("sou\u{fffd}rce", 63, 16 * MIB);

    begun(&lab, source.as_os_str(), OsStr::new("target")).kill();

    let status = lab.must("status target");
    let recorded = status.summary()["session"]["source"]
        .as_str()
        .expect("text");
    assert!(
        recorded.starts_with("file:///") && recorded.ends_with("/sou%FFrce"),
        "{recorded}"
    );
    let resumed = lab.must("resume target");
    assert!(resumed.count("resumed_bytes") > 0);
    lab.assert_holds("target", &new);
    lab.must(&format!("verify {recorded} target"));
}

#[test]
fn commands_that_are_printed_for_a_directory_that_is_no_text_work() {
    let lab = Lab::new();
    let old = lab.disk("old", 64, 16 * MIB);
    let new = lab.edited("source", 65, &old, 0.8);
    let directory = no_text(&lab, "vm", "");
    fs::create_dir(&directory).expect("made");
    let target = directory.join("target");
    fs::rename(lab.path("old"), &target).expect("moved");

    let run = begun(&lab, OsStr::new("source"), target.as_os_str());
    run.signal("-INT");
    let stopped = run.finish();

    assert_eq!(stopped.code, Some(130), "{stopped:#?}");
    let complaint = stopped.complaint();
    let line = complaint.split("blockferry ").last().expect("a command");
    assert!(line.starts_with("resume file:///"), "{complaint}");
    lab.must(line);
    assert!(same(&target, &new));
    let all = lab.must("status");
    let listed = all.summary()["targets"][0]["path"].as_str().expect("text");
    assert!(listed.ends_with("/vm%FF/target"), "{listed}");
    lab.must(&format!("verify {listed}"));
}
