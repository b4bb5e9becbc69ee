//! Exports of an NBD server that the real command brings up to date. They have a fixed size as devices have, and nothing
//! tells who else wrote them: what is not read is not believed.

use std::fs;
use std::time::{Duration, Instant};

use crate::lab::{
    Child, EXPORT, Lab, MIB, NbdServer, Nbdkit, command_of, output, seeded, skipped, tool,
};

/// An old disk that is served, and a new one beside it.
fn served() -> Option<(Lab, NbdServer, Vec<u8>, Vec<u8>)> {
    let lab = Lab::new();
    let old = lab.disk("disk", 1, 8 * MIB);
    let new = lab.edited("new", 2, &old, 0.2);
    let server = NbdServer::start_writable(&lab, "disk")?;
    Some((lab, server, old, new))
}

#[test]
fn an_export_goes_forth_and_back_as_any_target_does() {
    let Some((lab, _server, old, new)) = served() else {
        return skipped(
            "an_export_goes_forth_and_back_as_any_target_does",
            "qemu-nbd",
        );
    };
    let foretold = lab.must(&format!("sync new {EXPORT} --dry-run"));
    assert!(foretold.count("predicted_changed_bytes") > 0);
    lab.assert_holds("disk", &old);

    let done = lab.must(&format!("sync new {EXPORT}"));

    lab.assert_holds("disk", &new);
    assert_eq!(done.summary()["rollback_available"], true);
    lab.must(&format!("verify {EXPORT}"));
    lab.must(&format!("verify new {EXPORT}"));
    let known = lab.must("status");
    let listed = known.summary()["targets"][0]["path"].to_string();
    assert!(
        listed.contains("nbd+unix:///?socket=%2F") || listed.contains("socket=/"),
        "{listed}"
    );
    // What the list says names it from everywhere.
    let again = lab.must(&format!("sync new {}", listed.trim_matches('"')));
    assert_eq!(again.summary()["outcome"], "identical");

    lab.must(&format!("rollback {EXPORT}"));

    lab.assert_holds("disk", &old);
    lab.must(&format!("sync new {EXPORT} --mode full"));
    lab.must(&format!("accept {EXPORT}"));
    lab.assert_holds("disk", &new);
    let refused = lab.run(&format!("rollback {EXPORT}"));
    assert_eq!(refused.code, Some(4), "{refused:#?}");
}

#[test]
fn an_export_that_somebody_wrote_is_read_and_does_not_go_back() {
    let name = "an_export_that_somebody_wrote_is_read_and_does_not_go_back";
    let Some((lab, _server, old, new)) = served() else {
        return skipped(name, "qemu-nbd");
    };
    lab.must(&format!("sync new {EXPORT}"));
    // Where nothing differed: no pre-image is of it.
    let equal = (0..new.len()).step_by(4096);
    let mut equal = equal.filter(|at| new[*at..*at + 4096] == old[*at..*at + 4096]);
    let place = equal.next_back().expect("most is equal") as u64;
    lab.patch("disk", place, b"somebody");

    let refused = lab.run(&format!("rollback {EXPORT}"));

    assert_eq!(refused.code, Some(4), "{refused:#?}");
    assert!(
        refused.complaint().contains("not provably unwritten"),
        "{refused:#?}"
    );
    let found = lab.run(&format!("verify {EXPORT}"));
    assert_eq!(found.code, Some(7), "{found:#?}");
    lab.must(&format!("sync new {EXPORT}"));
    lab.assert_holds("disk", &new);
}

#[test]
fn what_is_no_export_to_write_is_refused_with_the_reason() {
    let lab = Lab::new();
    let old = lab.disk("disk", 1, 2 * MIB);
    lab.disk("new", 2, 4 * MIB);
    lab.disk("small", 2, MIB);
    lab.disk("same", 3, 2 * MIB);
    let Some(server) = NbdServer::start(&lab, "disk") else {
        return skipped(
            "what_is_no_export_to_write_is_refused_with_the_reason",
            "qemu-nbd",
        );
    };
    let refused = |line: String, code, told: &str| {
        let answer = lab.run(&line);
        assert_eq!(answer.code, Some(code), "{line}: {answer:#?}");
        assert!(answer.complaint().contains(told), "{line}: {answer:#?}");
    };
    refused(format!("sync same {EXPORT}"), 4, "read-only");
    drop(server);
    refused(format!("sync same {EXPORT}"), 4, "connect to nbd+unix");
    assert_eq!(
        lab.must(&format!("status {EXPORT}")).summary()["state"],
        "unknown"
    );
    let server = NbdServer::start_writable(&lab, "disk").expect("it did before");
    refused(format!("sync new {EXPORT}"), 4, "it is too small");
    refused(format!("sync {EXPORT} {EXPORT}"), 2, "are the same disk");
    refused(format!("rollback {EXPORT}"), 4, "there is no old point");
    lab.assert_holds("disk", &old);
    drop(server);
    lab.write(
        "disk",
        b"QFI\xfb\0\0\0\x03 that somebody serves as if it were raw",
    );
    lab.patch("disk", 2 * MIB - 1, b"\0");
    let _server = NbdServer::start_writable(&lab, "disk").expect("it did before");
    refused(format!("sync same {EXPORT}"), 4, "found qcow2");
}

#[test]
fn a_server_that_dies_or_fails_while_it_is_written_leaves_the_run_to_be_resumed() {
    let name = "a_server_that_dies_or_fails_while_it_is_written_leaves_the_run_to_be_resumed";
    if tool(&["nbdkit", "--version"]).is_none() {
        return skipped(name, "nbdkit");
    }
    let mut random = seeded(name);
    let lab = Lab::new();
    let old = lab.disk("old", 1, 8 * MIB);
    let new = lab.edited("new", 2, &old, 0.3);
    let (mut pending, mut finished) = (0, 0);
    for fails in [true, false, false, true, false, false] {
        lab.write("disk", &old);
        fs::remove_dir_all(lab.path("state-root")).ok();
        // Some writes, and then nothing any more: by an error, or by its end.
        let delay = format!("wdelay={}ms", 5 + random.below(10));
        let words: &[&str] = match fails {
            true => &[
                "--filter=error",
                "file",
                "disk",
                "error-pwrite=EIO",
                "error-pwrite-rate=50%",
            ],
            false => &["--filter=delay", "file", "disk", &delay],
        };
        let mut kit = Some(Nbdkit::start(&lab, "nbd.socket", words));
        let mut run = lab.start(&format!("sync new {EXPORT}"));
        if !fails {
            run.wait_for(|line| line["phase"] == "applying");
            std::thread::sleep(Duration::from_millis(random.below(40)));
            kit = None;
        }
        let answer = run.finish();
        drop(kit);
        let _healthy = Nbdkit::start(&lab, "nbd.socket", &["file", "disk"]);
        if answer.code == Some(0) {
            finished += 1;
        } else {
            pending += 1;
            assert_eq!(answer.code, Some(6), "{answer:#?}");
            let status = lab.must(&format!("status {EXPORT}"));
            // What fails is returned to what it was; what is gone goes on once it is back.
            if fails {
                assert_eq!(status.summary()["state"], "rolling_back", "{answer:#?}");
                lab.must(&format!("rollback {EXPORT}"));
                lab.assert_holds("disk", &old);
                lab.must(&format!("sync new {EXPORT}"));
            } else {
                assert_eq!(status.summary()["state"], "committed", "{answer:#?}");
                lab.must(&format!("resume {EXPORT}"));
            }
        }
        lab.assert_holds("disk", &new);
        lab.must(&format!("rollback {EXPORT}"));
        lab.assert_holds("disk", &old);
    }
    assert!(pending > 0, "pending {pending}, finished {finished}");
}

const IMAGE: &str = "qcow2+file:disk.qcow2";

/// A qcow2 image of the old disk, and a new disk beside it.
fn imaged() -> Option<Lab> {
    tool(&["qemu-nbd", "--version"])?;
    let lab = Lab::new();
    let old = lab.disk("old", 1, 8 * MIB);
    lab.edited("new", 2, &old, 0.3);
    remake(&lab)?;
    Some(lab)
}

fn remake(lab: &Lab) -> Option<()> {
    fs::remove_dir_all(lab.path(".disk.qcow2.blockferry")).ok();
    let [old, image] = ["old", "disk.qcow2"].map(|name| lab.path(name).display().to_string());
    tool(&["qemu-img", "convert", "-O", "qcow2", &old, &image]).map(drop)
}

/// As qemu-img finds it: clusters that nobody uses are what a crash may leave, and no more than that.
fn is_sound(lab: &Lab) {
    let mut check = command_of(lab.root(), "qemu-img");
    let found = output(check.args(["check", "-q", "disk.qcow2"])).expect("it was there before");
    assert!(matches!(found.status.code(), Some(0 | 3)), "{found:?}");
}

#[test]
fn a_qcow2_image_is_a_target_and_nobody_else_writes_it_meanwhile() {
    let name = "a_qcow2_image_is_a_target_and_nobody_else_writes_it_meanwhile";
    let Some(lab) = imaged() else {
        return skipped(name, "qemu-nbd");
    };
    lab.must(&format!("sync new {IMAGE}"));
    lab.must(&format!("verify {IMAGE}"));
    lab.must(&format!("verify new {IMAGE}"));
    is_sound(&lab);
    lab.must(&format!("rollback {IMAGE}"));
    lab.must(&format!("verify old {IMAGE}"));
    let foreign = tool(&[
        "qemu-img",
        "info",
        "--output=json",
        &lab.path("disk.qcow2").display().to_string(),
    ]);
    assert!(foreign.expect("an image").contains("\"format\": \"qcow2\""));

    let run = lab.start(&format!("sync new {IMAGE} --bwlimit 200K"));
    let has_staged = || !lab.must(&format!("status {IMAGE}")).summary()["session"].is_null();
    let end = Instant::now() + Duration::from_secs(30);
    while !has_staged() {
        if Instant::now() > end {
            panic!("it does not stage anything: {:#?}", run.kill());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let other = lab.run(&format!("sync new {IMAGE}"));
    assert_eq!(other.code, Some(4), "{other:#?}");
    assert!(other.complaint().contains("write\" lock"), "{other:#?}");
    run.signal("-INT");
    assert_eq!(run.finish().code, Some(130));
    lab.must(&format!("resume {IMAGE}"));
    lab.must(&format!("verify new {IMAGE}"));

    for (line, told) in [
        ("sync new qcow2+file:absent.qcow2", "No such file"),
        ("sync new vmdk+file:disk.qcow2", "expected qcow2"),
        ("sync new qcow2+file:old", "does not serve it"),
    ] {
        let refused = lab.run(line);
        assert_eq!(refused.code, Some(4), "{refused:#?}");
        assert!(refused.complaint().contains(told), "{refused:#?}");
    }
}

#[test]
fn a_qcow2_image_survives_kills_of_ours_and_of_its_server() {
    let name = "a_qcow2_image_survives_kills_of_ours_and_of_its_server";
    let mut random = seeded(name);
    let Some(lab) = imaged() else {
        return skipped(name, "qemu-nbd");
    };
    // Where the sockets are; below the lab their paths might be too long.
    let sockets = tempfile::tempdir_in("/tmp").expect("a directory");
    let begun = Instant::now();
    lab.must(&format!("sync new {IMAGE}"));
    let whole = begun.elapsed();
    let mut unfinished = 0;
    for round in 0..10 {
        remake(&lab);
        let mut command = lab.command(&format!("sync new {IMAGE}"));
        let run = Child::start(command.env("TMPDIR", sockets.path()));
        let permille = u32::try_from(random.below(1000)).expect("below 1000");
        std::thread::sleep(whole * permille / 1000);
        if round % 2 == 0 {
            run.kill();
        } else {
            let ours = run.id().to_string();
            tool(&["pkill", "-KILL", "--parent", &ours, "qemu-nbd"]);
            run.finish();
        }
        let status = lab.must(&format!("status {IMAGE}"));
        let state = status.summary()["state"]
            .as_str()
            .expect("a state")
            .to_owned();
        let goes_on = match &*state {
            "staging" | "committed" => "resume",
            "rolling_back" => panic!("of a server that is gone: {status:#?}"),
            _ => "sync new",
        };
        if matches!(&*state, "unknown" | "staging") {
            lab.must(&format!("verify old {IMAGE}"));
        }
        is_sound(&lab);
        unfinished += u32::from(goes_on == "resume");
        lab.must(&format!("{goes_on} {IMAGE}"));
        lab.must(&format!("verify new {IMAGE}"));
        is_sound(&lab);
    }
    assert!(unfinished > 0, "no kill hit anything");
    let end = Instant::now() + Duration::from_secs(60);
    let is_left = || fs::read_dir(sockets.path()).expect("it is there").count() > 0;
    while is_left() {
        assert!(Instant::now() < end, "sockets are left");
        std::thread::sleep(Duration::from_millis(20));
    }
}
