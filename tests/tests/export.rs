//! Points of a target that the real command serves over NBD.

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::lab::{Child, Lab, MIB, skipped, tool};

const SOCKET: &str = "export.socket";
const EXPORT: &str = "nbd+unix:///?socket=export.socket";

/// A target that was synced, and what it held before and holds now.
fn synced(lab: &Lab, strategy: &str) -> [Vec<u8>; 2] {
    let old = lab.disk("target", 1, 12 * MIB);
    let mut new = lab.edited("source", 2, &old, 0.1);
    // Another size as well: what is cut off belongs to the old point.
    new.truncate(new.len() - 12_288);
    lab.write("source", &new);
    lab.write("old", &old);
    let line = format!("sync source target --mode delta --allow-shrink --strategy {strategy}");
    lab.must(&line);
    [old, new]
}

/// Begins an export, and waits until it serves. Returns what it says of itself.
#[track_caller]
fn export(lab: &Lab, words: &str) -> (Child, serde_json::Value) {
    let mut run = lab.start(&format!("export {words}"));
    let told = RefCell::new(serde_json::Value::Null);
    let serves = run.wait_for(|line| {
        told.replace(line.clone());
        line["event"] == "exporting"
    });
    assert!(serves, "export {words}: {:#?}", told.into_inner());
    (run, told.into_inner())
}

/// Ends an export as one that did what it was to do.
#[track_caller]
fn end(run: Child, signal: &str) -> crate::lab::Answer {
    run.signal(signal);
    let ended = run.finish();
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    assert_eq!(ended.summary()["verb"], "export");
    ended
}

/// All that is not of the source, the state of the host or the socket.
fn lasting(path: &Path) -> bool {
    let text = path.display().to_string();
    !text.contains("state-root") && !text.ends_with(SOCKET) && !text.ends_with("/lock")
}

#[test]
fn the_old_and_the_current_point_are_served_and_the_target_stays_as_it_is() {
    for strategy in ["redo", "shadow"] {
        let lab = Lab::new();
        let [old, new] = synced(&lab, strategy);
        let before = lab.footprint(lasting);
        for (point, image, content) in [("old", "old", &old), ("current", "source", &new)] {
            let words = format!("target --point {point} --socket {SOCKET}");
            let (run, told) = export(&lab, &words);

            assert_eq!(
                told["address"],
                format!("nbd+unix:///?socket={}", lab.path(SOCKET).display())
            );
            assert_eq!(
                (&told["point"], &told["size_bytes"]),
                (&point.into(), &content.len().into())
            );
            let mode = fs::metadata(lab.path(SOCKET))
                .expect("there")
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600);
            let equal = lab.must(&format!("verify {EXPORT} {image}"));
            assert_eq!(equal.summary()["equal"], true, "{equal:#?}");
            assert_eq!(
                lab.run(&format!("diff {EXPORT} target")).code,
                Some(i32::from(point == "old"))
            );

            let ended = end(run, "-TERM");
            assert!(ended.count("read_bytes") > 0);
            assert_eq!(ended.count("written_bytes"), 0);
            assert!(!lab.path(SOCKET).exists(), "the socket is gone");
        }
        assert_eq!(lab.footprint(lasting), before, "{strategy}");
        lab.must("rollback target");
        lab.assert_holds("target", &old);
    }
}

#[test]
fn clients_of_qemu_read_every_point_and_write_only_to_a_copy() {
    let name = "clients_of_qemu_read_every_point_and_write_only_to_a_copy";
    let lab = Lab::new();
    let [old, new] = synced(&lab, "redo");
    let address = format!("nbd+unix:///disk?socket={}", lab.path(SOCKET).display());
    let path = |name: &str| lab.path(name).display().to_string();
    let is_equal = |image: &str| {
        tool(&[
            "qemu-img",
            "compare",
            "-f",
            "raw",
            "-F",
            "raw",
            &address,
            &path(image),
        ])
        .is_some()
    };
    if tool(&["qemu-io", "--version"]).is_none() {
        return skipped(name, "qemu-img and qemu-io");
    }
    fs::create_dir(lab.path("scratch")).expect("made");
    let words = format!("--name disk --socket {SOCKET} --copy-on-write --scratch scratch");
    for (point, image, content) in [("old", "old", &old), ("current", "source", &new)] {
        let before = lab.footprint(lasting);
        let (run, _told) = export(&lab, &format!("target --point {point} {words}"));
        assert!(is_equal(image), "{point}");

        let mut commands = vec!["qemu-io", "-f", "raw", "-c", "write -P 0x55 1234 3M"];
        commands.extend(["-c", "write -z 8M 1M", "-c", "flush", &address]);
        assert!(tool(&commands).is_some());

        let mut changed = content.clone();
        changed[1234..1234 + 3 * (1 << 20)].fill(0x55);
        changed[8 << 20..9 << 20].fill(0);
        lab.write("changed", &changed);
        assert!(is_equal("changed"), "{point}: it shows what was written");
        let copy = path("copy");
        assert!(tool(&["qemu-img", "convert", "-O", "raw", &address, &copy]).is_some());
        lab.assert_holds("copy", &changed);
        let ended = end(run, "-INT");
        assert_eq!(ended.count("written_bytes"), 3 * MIB);
        for made in ["changed", "copy"] {
            fs::remove_file(lab.path(made)).expect("removed");
        }
        lab.assert_holds("target", &new);
        assert_eq!(lab.footprint(lasting), before, "nothing is left of {point}");
    }
}

#[test]
fn nothing_else_is_done_with_a_target_that_is_exported_and_its_holder_is_named() {
    let lab = Lab::new();
    let [_old, new] = synced(&lab, "redo");
    lab.disk("other", 9, 12 * MIB);
    let (run, told) = export(&lab, "target");
    let holder = format!("process {}", run.id());

    for line in [
        "sync other target",
        "rollback target",
        "accept target",
        "export target",
    ] {
        let refused = lab.run(line);

        assert_eq!(refused.code, Some(4), "{line}: {refused:#?}");
        let complaint = refused.complaint();
        assert!(complaint.contains(&holder), "{line}: {complaint}");
    }

    let status = lab.must("status target");
    assert_eq!(status.summary()["running"], true, "{status:#?}");
    let address = told["address"].as_str().expect("text").to_owned();
    lab.must(&format!("verify {address} source"));
    let socket = PathBuf::from(
        address
            .strip_prefix("nbd+unix:///?socket=")
            .expect("a socket"),
    );
    let place = socket.parent().expect("a directory").to_owned();
    assert_eq!(
        fs::metadata(&place).expect("there").permissions().mode() & 0o777,
        0o700
    );
    end(run, "-TERM");
    assert!(!place.exists(), "the private directory is gone");
    lab.assert_holds("target", &new);
    lab.must("rollback target");
}

#[test]
fn an_id_names_a_point_and_its_target() {
    let lab = Lab::new();
    let [_old, new] = synced(&lab, "redo");
    let first = lab.must("status target").summary()["point"]["id"].clone();
    let mut newer = new.clone();
    newer[5 << 20..6 << 20].fill(7);
    lab.write("source", &newer);
    lab.write("middle", &new);
    lab.must("sync source target --strategy redo");
    let second = lab.must("status target").summary()["point"]["id"].clone();
    for (id, point, image) in [(&first, "old", "middle"), (&second, "current", "source")] {
        let id = id.as_str().expect("text");
        let (run, told) = export(&lab, &format!("{id} --socket {SOCKET}"));

        assert_eq!(
            (&told["point"], &told["sync_point"]),
            (&point.into(), &id.into())
        );
        lab.must(&format!("verify {EXPORT} {image}"));

        end(run, "-TERM");
        let other = lab.run(&format!("export {id} --point new"));
        assert_eq!(other.code, Some(2), "{other:#?}");
    }
    let unknown = lab.run("export 00112233445566778899aabbccddeeff");
    assert_eq!(unknown.code, Some(4), "{unknown:#?}");
    assert!(unknown.complaint().contains("has a point"), "{unknown:#?}");
}

#[test]
fn what_cannot_be_served_is_refused_and_says_why() {
    let lab = Lab::new();
    let [_old, new] = synced(&lab, "redo");
    lab.disk("stranger", 3, MIB);
    lab.write(SOCKET, b"");
    let mut sync = lab.start("sync source fresh --bwlimit 4M");
    assert!(sync.wait_for(|line| line["event"] == "checkpoint"));
    sync.kill();
    for (line, code, told) in [
        ("export stranger", 4, "was never synced here"),
        ("export absent", 4, "was never synced here"),
        (
            "export target --point new",
            4,
            "the current one is the newest",
        ),
        ("export fresh --point new", 4, "is not complete"),
        ("export fresh", 4, "is not there"),
        ("export fresh --point old", 4, "keeps no old point"),
        (
            "export target --socket export.socket",
            2,
            "cannot listen at",
        ),
        (
            "export target --socket absent/socket",
            2,
            "cannot listen at",
        ),
        (
            "export target --listen 203.0.113.1:1",
            2,
            "cannot listen at 203.0.113.1:1",
        ),
        (
            "export target --listen a --socket b",
            2,
            "cannot be used with",
        ),
        ("export target --scratch .", 2, "--copy-on-write"),
        (
            "export target --copy-on-write --scratch absent",
            4,
            "cannot keep changes in absent",
        ),
        ("export nbd://host/disk", 4, "never synced here"),
    ] {
        let refused = lab.run(line);

        assert_eq!(refused.code, Some(code), "{line}: {refused:#?}");
        assert!(refused.complaint().contains(told), "{line}: {refused:#?}");
    }
    lab.must("accept target");
    let accepted = lab.run("export target --point old");
    assert!(
        accepted.complaint().contains("keeps no old point"),
        "{accepted:#?}"
    );
    lab.assert_holds("target", &new);
}

#[test]
fn an_export_that_is_killed_leaves_the_target_as_it_was() {
    let lab = Lab::new();
    let [old, new] = synced(&lab, "redo");
    let (run, told) = export(
        &lab,
        "target --point old --copy-on-write --listen 127.0.0.1:0",
    );
    let address = told["address"].as_str().expect("text").to_owned();
    assert!(address.starts_with("nbd://127.0.0.1:"), "{address}");
    lab.must(&format!("verify {address} old"));

    run.kill();

    lab.assert_holds("target", &new);
    lab.must("rollback target");
    lab.assert_holds("target", &old);
}

#[test]
fn the_old_point_is_not_served_once_somebody_wrote_the_target() {
    let lab = Lab::new();
    synced(&lab, "redo");
    let (run, _told) = export(&lab, &format!("target --point old --socket {SOCKET}"));
    lab.must(&format!("verify {EXPORT} old"));

    lab.patch("target", 5_000_000, b"somebody");

    let torn = lab.run(&format!("verify {EXPORT} old"));
    assert_eq!(torn.code, Some(3), "{torn:#?}");
    let ended = end(run, "-TERM");
    let warning = ended.line("warning")["message"].to_string();
    assert!(warning.contains("somebody wrote the target"), "{warning}");
    let refused = lab.run("export target --point old");
    assert_eq!(refused.code, Some(4), "{refused:#?}");
    assert!(
        refused.complaint().contains("not provably unwritten"),
        "{refused:#?}"
    );
}
