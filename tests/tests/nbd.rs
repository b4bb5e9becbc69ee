//! Exports of an NBD server as disks that the real command reads.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::lab::{EXPORT, Lab, MIB, NbdServer, Nbdkit, output, skipped, tool};

/// Certificates as nbdkit names them, in a directory of this name, and those of a client; whoever is no client is turned away.
struct Secured {
    // Ends before its disk is removed.
    _nbdkit: Nbdkit,
    lab: Lab,
}

impl Secured {
    /// `None` if there is no nbdkit with TLS.
    fn start(mode: &str) -> Option<Self> {
        let config = tool(&["nbdkit", "--dump-config"])?;
        if !config.lines().any(|line| line == "tls=yes") {
            return None;
        }
        let lab = Lab::new();
        lab.disk("disk", 5, 4 * MIB);
        for (pki, names) in [
            ("pki", ["localhost", "client"]),
            ("others", ["localhost", "client"]),
        ] {
            for name in names {
                let made = output(&mut lab.command(&format!("certs {pki} {name}")));
                assert!(made.expect("runs").status.success());
            }
        }
        for (ours, theirs) in [
            ("ca.pem", "ca-cert.pem"),
            ("host.pem", "server-cert.pem"),
            ("host.key", "server-key.pem"),
        ] {
            let directory = lab.path("pki/localhost");
            fs::copy(directory.join(ours), directory.join(theirs)).expect("copied");
        }
        let certificates = lab.path("pki/localhost");
        let words = [
            "--tls-verify-peer",
            &format!("--tls={mode}"),
            &format!("--tls-certificates={}", certificates.display()),
            "file",
            "disk",
        ];
        let nbdkit = Nbdkit::start(&lab, "secured", &words);
        Some(Self {
            lab,
            _nbdkit: nbdkit,
        })
    }

    fn refused(&self, export: &str, said: &str) {
        let answer = self.lab.run(&format!("digest {export}"));
        assert_eq!(answer.code, Some(3), "{export}: {answer:#?}");
        let complaint = answer.complaint();
        assert!(complaint.contains(said), "{export}: {complaint}");
    }
}

#[test]
fn an_export_over_tls_is_read_by_who_is_known_and_from_who_is_known() {
    let name = "an_export_over_tls_is_read_by_who_is_known_and_from_who_is_known";
    let Some(server) = Secured::start("require") else {
        return skipped(name, "nbdkit with TLS");
    };
    let secured = "nbds+unix:///?socket=secured";
    let export = format!("{secured}&tls-certificates=pki/client");
    let lab = &server.lab;
    let root = |disk: &str| lab.must(&format!("digest {disk}")).summary()["root"].clone();

    assert_eq!(root(&export), root("disk"));
    lab.must(&format!("sync {export} copy"));
    let status = lab.must("status copy");
    let source = status.summary()["point"]["source"].as_str();
    let written = source.expect("an address");
    assert!(written.starts_with("nbds+unix:///?socket=/"), "{written}");

    server.refused("nbd+unix:///?socket=secured", "nbds://");
    server.refused(
        &format!("{secured}&tls-certificates=others/client"),
        "TLS with",
    );
    server.refused(&format!("{export}&tls-hostname=elsewhere"), "elsewhere");
    server.refused(
        &format!("{secured}&tls-certificates=nowhere"),
        "ca-cert.pem",
    );
    // A key that others can read is not used.
    fs::create_dir(lab.path("loose")).expect("a directory");
    for file in ["ca.pem", "host.pem", "host.key"] {
        let copy = lab.path("loose").join(file);
        fs::copy(lab.path("pki/client").join(file), &copy).expect("copied");
        fs::set_permissions(copy, fs::Permissions::from_mode(0o644)).expect("set");
    }
    server.refused(
        &format!("{secured}&tls-certificates=loose"),
        "only its owner",
    );
    // Whom the server does not know it turns away.
    fs::create_dir(lab.path("nobody")).expect("a directory");
    fs::copy(
        lab.path("pki/client/ca.pem"),
        lab.path("nobody/ca-cert.pem"),
    )
    .expect("copied");
    server.refused(&format!("{secured}&tls-certificates=nobody"), "nobody");
}

#[test]
fn a_server_without_tls_is_not_spoken_to_as_if_it_had_any() {
    let Some(server) = Secured::start("off") else {
        return skipped(
            "a_server_without_tls_is_not_spoken_to_as_if_it_had_any",
            "nbdkit with TLS",
        );
    };
    let export = "nbds+unix:///?socket=secured&tls-certificates=pki/client";

    server.refused(export, "offers no TLS");

    server.lab.must("digest nbd+unix:///?socket=secured");
}

#[test]
fn an_nbd_export_is_synced_compared_and_digested_like_the_file_behind_it() {
    let name = "an_nbd_export_is_synced_compared_and_digested_like_the_file_behind_it";
    let lab = Lab::new();
    let old = lab.disk("target", 1, 24 * MIB);
    let mut new = lab.edited("source", 2, &old, 0.1);
    let hole = new.len() / 3..new.len();
    new[hole].fill(0);
    lab.write("source", &new);
    let Some(_server) = NbdServer::start(&lab, "source") else {
        return skipped(name, "qemu-nbd");
    };
    let digest = |disk: &str| lab.must(&format!("digest {disk}")).summary()["root"].clone();
    assert_eq!(digest(EXPORT), digest("source"));
    let differs = lab.run(&format!("diff target {EXPORT}"));
    assert_eq!(differs.code, Some(1), "{differs:#?}");
    let foretold = lab.must(&format!("sync {EXPORT} target --dry-run"));
    assert!(foretold.count("predicted_changed_bytes") > 0);

    let done = lab.must(&format!(
        "sync {EXPORT} target --mode delta --strategy redo"
    ));

    lab.assert_holds("target", &new);
    assert_eq!(done.summary()["outcome"], "applied");
    let address = done.summary()["source"].as_str().expect("an address");
    assert!(address.starts_with("nbd+unix:///?socket=/"), "{address}");
    // Holes are known without reading them.
    assert!(done.count("scanned_bytes") <= 8 * MIB, "{done:#?}");
    let again = lab.must(&format!("sync {EXPORT} target"));
    assert_eq!(again.summary()["outcome"], "identical");
    lab.must(&format!("verify {EXPORT} target"));
    lab.must(&format!("sync {EXPORT} fresh"));
    lab.assert_holds("fresh", &new);
}

#[test]
fn a_run_from_an_nbd_export_is_stopped_and_resumed_and_its_server_may_fail() {
    let name = "a_run_from_an_nbd_export_is_stopped_and_resumed_and_its_server_may_fail";
    let lab = Lab::new();
    let old = lab.disk("target", 3, 24 * MIB);
    let new = lab.disk("source", 4, 24 * MIB);
    let Some(server) = NbdServer::start(&lab, "source") else {
        return skipped(name, "qemu-nbd");
    };
    let line = format!("sync {EXPORT} target --mode delta --strategy redo");
    let mut run = lab.start(&format!("{line} --bwlimit 4M"));
    assert!(run.wait_for(|line| line["event"] == "checkpoint"));
    run.signal("-TERM");
    assert_eq!(run.finish().code, Some(143));
    lab.assert_holds("target", &old);
    let mut run = lab.start("resume target --bwlimit 4M");
    assert!(run.wait_for(|line| line["event"] == "checkpoint"));

    drop(server);

    let failed = run.finish();
    assert_eq!(failed.code, Some(3), "{failed:#?}");
    assert!(failed.complaint().contains("nbd+unix:///"), "{failed:#?}");
    lab.assert_holds("target", &old);
    let _server = NbdServer::start(&lab, "source").expect("it did before");
    let done = lab.must("resume target");
    lab.assert_holds("target", &new);
    assert_eq!(done.count("restaged_bytes"), 0);
    assert!(done.count("resumed_bytes") > 0);
}

#[test]
fn images_of_other_formats_are_read_and_their_server_ends_with_us() {
    let name = "images_of_other_formats_are_read_and_their_server_ends_with_us";
    let lab = Lab::new();
    let content = lab.disk("raw", 6, 20 * MIB);
    for (format, driver) in [
        ("qcow2", "qcow2"),
        ("vhd", "vpc"),
        ("vhdx", "vhdx"),
        ("vmdk", "vmdk"),
    ] {
        let (raw, image) = (lab.path("raw"), lab.path(format));
        let mut words = vec!["qemu-img", "convert", "-f", "raw", "-O", driver];
        // Else it is rounded up to whole cylinders.
        if driver == "vpc" {
            words.extend(["-o", "force_size=on"]);
        }
        words.extend([&raw, &image].map(|path| path.to_str().expect("text")));
        if tool(&words).is_none() {
            return skipped(name, "qemu-img and qemu-nbd");
        }
        let address = format!("{format}+file:{format}");

        let done = lab.must(&format!("sync {address} target-{format}"));

        lab.assert_holds(&format!("target-{format}"), &content);
        let recorded = done.summary()["source"].as_str().expect("an address");
        assert!(
            recorded.starts_with(&format!("{format}+file:///")),
            "{recorded}"
        );
        lab.must(&format!("verify {address} raw"));
    }
    let mut run = lab.start("sync qcow2+file:qcow2 slow --bwlimit 1M");
    run.wait_for(|line| line["event"] == "checkpoint");
    run.kill();
    let serves = || {
        let processes = fs::read_dir("/proc").expect("mounted").flatten();
        let lines = processes.map(|p| fs::read(p.path().join("cmdline")).unwrap_or_default());
        let ours = lab.path("qcow2").display().to_string();
        lines
            .map(|line| String::from_utf8_lossy(&line).into_owned())
            .any(|line| line.starts_with("qemu-nbd") && line.contains(&ours))
    };
    let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while serves() {
        assert!(std::time::Instant::now() < end, "qemu-nbd stays");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    for (line, told) in [
        ("digest qcow2+file:raw", "does not serve it"),
        ("digest qcow2+file:absent", "open qcow2+file:absent"),
    ] {
        let answer = lab.run(line);
        assert_eq!(answer.code, Some(3), "{line}: {answer:#?}");
        assert!(answer.complaint().contains(told), "{line}: {answer:#?}");
    }
}

#[test]
fn what_is_no_export_or_is_not_there_is_said_to_be_so() {
    let lab = Lab::new();
    lab.disk("source", 5, MIB);
    for (line, code, told) in [
        ("sync source nbd:///export", 2, "its host is none"),
        ("digest nbd+unix:///export", 2, "names no socket"),
        (
            "digest nbd+unix:///?socket=absent",
            3,
            "connect to nbd+unix:///?socket=absent",
        ),
        (
            "sync nbd://127.0.0.1:1/export target",
            3,
            "connect to nbd://127.0.0.1:1/export",
        ),
    ] {
        let answer = lab.run(line);

        assert_eq!(answer.code, Some(code), "{line}: {answer:#?}");
        assert!(answer.complaint().contains(told), "{line}: {answer:#?}");
    }
}
