//! The command line contract, tested on the real binary: exit codes, streams, JSON lines, signals.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

mod lab;

use lab::{Lab, MIB, code, content, patch, same, signal, text};

/// Reads JSON lines until one has this event, and returns it.
fn wait_for(lines: &mut impl Iterator<Item = std::io::Result<String>>, event: &str) -> Value {
    lines
        .map(|line| serde_json::from_str::<Value>(&line.expect("readable")).expect("JSON"))
        .find(|line| line["event"] == event)
        .expect("the event comes before the end")
}

// --- streams -------------------------------------------------------------------------------------------------------

/// The page that scripts rely on.
fn page() -> &'static str {
    static PAGE: OnceLock<String> = OnceLock::new();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/command-line.md");
    PAGE.get_or_init(|| fs::read_to_string(path).expect("the page is in the repository"))
}

/// Every second piece between backticks.
fn code_words(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The fields that a table of the page gives for `name`, in its first column.
fn documented_fields(table: &str, name: &str) -> BTreeSet<String> {
    let (_, rows) = page().split_once(table).expect(table);
    let mut rows = rows
        .lines()
        .skip(1)
        .take_while(|line| line.starts_with('|'));
    let row = rows.find_map(|line| line.strip_prefix(&format!("| `{name}` | ")));
    let row = row.unwrap_or_else(|| panic!("{name} is not documented"));
    // What comes behind a colon or in brackets is said about a field.
    let fields = row.split(": ").next().unwrap_or(row);
    let fields = fields
        .split(',')
        .filter_map(|field| code_words(field).next());
    fields.map(str::to_owned).collect()
}

/// The fields that the page promises for the summary of a sync.
fn promised_in_the_summary() -> impl Iterator<Item = &'static str> {
    let (_, behind) = page().split_once("It has at least").expect("the promise");
    let promised = code_words(behind).next().expect("a list");
    promised.split_whitespace()
}

/// A line has exactly the fields that are documented for it.
fn check_documented(line: &Value) {
    let kind = line["type"].as_str().expect("every line has a type");
    let mut expected = match kind {
        "summary" => return,
        "event" => {
            let event = line["event"].as_str().expect("every event has a name");
            let mut fields = documented_fields("| event | fields |", event);
            fields.insert("event".to_owned());
            fields
        }
        other => documented_fields("| type | fields |", other),
    };
    expected.insert("type".to_owned());
    let found: BTreeSet<String> = line
        .as_object()
        .expect("an object")
        .keys()
        .cloned()
        .collect();
    assert_eq!(found, expected, "{line}");
}

/// The shape every JSON stream has, whatever the verb.
fn check_stream(line: &str, code: i32, lines: &[Value]) {
    assert_eq!(lines[0]["version"], 1, "{line}: a version heads the stream");
    for value in lines {
        let kind = value["type"].as_str().expect("every line has a type");
        assert!(
            ["event", "progress", "warning", "summary", "error"].contains(&kind),
            "{line}: {kind}"
        );
        check_documented(value);
    }
    let endings: Vec<&Value> = lines
        .iter()
        .filter(|value| value["type"] == "summary" || value["type"] == "error")
        .collect();
    assert_eq!(
        endings.len(),
        1,
        "{line}: one summary or one error: {lines:?}"
    );
    assert_eq!(
        lines.last(),
        Some(endings[0]),
        "{line}: and it is the last line"
    );
    if endings[0]["type"] == "error" {
        assert_eq!(
            endings[0]["code"], code,
            "{line}: the error names the exit code"
        );
    }
}

#[test]
fn every_verb_speaks_valid_json_lines() {
    let lab = Lab::new();
    lab.disk("a", MIB, 1);
    lab.disk("b", MIB, 2);
    for (line, expected) in [
        ("sync a t --dry-run", 0),
        ("sync a t", 0),
        ("sync b t", 0),
        ("status t", 0),
        ("status", 0),
        ("resume t", 2),
        ("cancel t", 0),
        ("verify t", 0),
        ("rollback t", 0),
        ("sync b t", 0),
        ("sync b t --block-size 4KiB", 0),
        ("accept t", 0),
        ("diff a b", 1),
        ("digest a --manifest m", 0),
        ("verify a b", 1),
        ("completions fish", 0),
        ("man pages", 0),
        ("--help", 0),
        ("sync --help", 0),
        ("--version", 0),
    ] {
        let (code, lines) = lab.json(line);

        assert_eq!(code, expected, "{line}: {lines:?}");
        check_stream(line, code, &lines);
    }
}

#[test]
fn argument_errors_are_json_lines_too() {
    let lab = Lab::new();
    for line in [
        "",
        "nonsense",
        "sync",
        "sync a",
        "sync a b --mode sideways",
        "sync a b --force",
        "sync a b --yes",
        "sync a b --bwlimit 0",
        "sync a b --block-size 3000",
        "sync host: b",
        "sync a ssh://host",
        "status host:/a",
        "sync nbd+unix:///a b",
        "sync a nbd:///b",
        "sync blockferry://host:1/a b",
        "sync vdi+file:a b",
        "status t -q -v",
        "completions tcsh",
    ] {
        let (code, lines) = lab.json(line);

        assert_eq!(code, 2, "{line}");
        check_stream(line, code, &lines);
        assert_eq!(lines.last().expect("a line")["kind"], "usage", "{line}");
    }
}

#[test]
fn addresses_of_later_versions_are_called_unsupported_not_missing() {
    let lab = Lab::new();
    lab.disk("a", MIB, 1);
    for address in ["https://h/disk", "nbd:unix:/run/s", "vdi+file:d"] {
        for line in [
            format!("sync a {address}"),
            format!("sync {address} a"),
            format!("digest {address}"),
        ] {
            let output = lab.run(&line);

            assert_eq!(code(&output), 2, "{line}");
            assert!(
                text(&output.stderr).contains("is not supported by this version"),
                "{line}"
            );
        }
    }
}

#[test]
fn text_for_people_never_goes_to_standard_output() {
    let lab = Lab::new();
    lab.applied();
    for line in [
        "status target",
        "status",
        "verify target",
        "verify source target",
        "rollback target",
        "sync source target -v",
        "accept target",
        "cancel target",
        "man pages",
        "sync source target --dry-run",
    ] {
        let output = lab.run(line);

        assert_eq!(code(&output), 0, "{line}: {}", text(&output.stderr));
        assert_eq!(text(&output.stdout), "", "{line}");
        assert_ne!(text(&output.stderr), "", "{line}");
    }
}

#[test]
fn quiet_runs_say_nothing() {
    let lab = Lab::new();
    lab.disk("source", MIB, 1);

    let output = lab.run("sync -q source target");

    assert_eq!(
        (code(&output), text(&output.stderr), text(&output.stdout)),
        (0, String::new(), String::new())
    );
}

#[test]
fn the_summary_of_sync_has_every_field_of_the_contract() {
    let lab = Lab::new();
    lab.disk("source", MIB, 1);

    let (_, lines) = lab.json("sync source target");

    let summary = lines
        .last()
        .expect("a line")
        .as_object()
        .expect("an object");
    for field in promised_in_the_summary() {
        assert!(
            summary.contains_key(field),
            "{field} is missing: {summary:?}"
        );
    }
    assert_eq!(summary["source_root"], summary["target_root"]);
}

#[test]
fn a_reader_that_leaves_neither_panics_nor_hangs() {
    let lab = Lab::new();
    lab.disk("a", 8 * MIB, 1);
    // Every second page differs: more lines than a pipe holds.
    let mut other = content(8 * MIB, 1);
    other
        .iter_mut()
        .step_by(8192)
        .for_each(|byte| *byte ^= 0xff);
    fs::write(lab.path("b"), other).expect("written");
    for line in [
        "diff a b",
        "diff a b --json",
        "completions bash",
        "digest a",
        "--help",
    ] {
        let mut command = lab.command(line.split_whitespace());
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("runs");
        drop(child.stdout.take());

        let output = child.wait_with_output().expect("ends");

        assert!(
            output.status.code().is_some_and(|code| code <= 1),
            "{line}: {:?}",
            output.status
        );
        assert!(
            !text(&output.stderr).contains("panicked"),
            "{line}: {}",
            text(&output.stderr)
        );
    }
}

#[test]
fn a_transfer_outlives_its_reader() {
    let lab = Lab::new();
    lab.disk("source", 2 * MIB, 1);
    let mut command = lab.command(["sync", "source", "target", "--json"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("runs");
    drop(child.stdout.take());

    let output = child.wait_with_output().expect("ends");

    assert_eq!(code(&output), 0, "{}", text(&output.stderr));
    assert!(same(&lab.path("source"), &lab.path("target")));
}

// --- exit codes ----------------------------------------------------------------------------------------------------

#[test]
fn exit_0_means_done_or_equal() {
    let lab = Lab::new();
    lab.disk("source", 2 * MIB, 1);

    lab.must("sync source target");

    assert!(same(&lab.path("source"), &lab.path("target")));
    for line in [
        "diff source target",
        "verify source target",
        "verify target",
    ] {
        lab.must(line);
    }
    let (_, lines) = lab.json("sync source target");
    assert_eq!(lines.last().expect("a line")["outcome"], "identical");
}

#[test]
fn exit_1_means_different() {
    let lab = Lab::new();
    lab.disk("a", MIB, 1);
    fs::copy(lab.path("a"), lab.path("b")).expect("copied");
    patch(&lab.path("b"), 8192 + 5, b"x");
    patch(&lab.path("b"), 4 * 65536 - 1, b"xy");

    let output = lab.run("diff a b");

    assert_eq!(code(&output), 1, "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "8192 4096\n258048 8192\n");
    assert_eq!(code(&lab.run("verify a b")), 1);
    let (code, lines) = lab.json("diff a b");
    assert_eq!(code, 1);
    let starts: Vec<&Value> = lines
        .iter()
        .filter(|line| line["event"] == "difference")
        .map(|line| &line["start"])
        .collect();
    assert_eq!(starts, [8192, 258_048]);
}

#[test]
fn exit_3_means_the_source() {
    let lab = Lab::new();
    lab.disk("target", MIB, 1);
    fs::create_dir(lab.path("directory")).expect("made");
    for line in [
        "sync missing target",
        "sync directory target",
        "diff missing target",
        "digest missing",
    ] {
        let output = lab.run(line);

        assert_eq!(code(&output), 3, "{line}: {}", text(&output.stderr));
    }
    assert!(text(&lab.run("digest missing").stderr).contains("missing"));
}

#[test]
fn exit_4_means_the_target() {
    let lab = Lab::new();
    lab.disk("source", MIB, 1);
    lab.disk("real", MIB, 2);
    std::os::unix::fs::symlink(lab.path("real"), lab.path("link")).expect("linked");
    fs::create_dir(lab.path("directory")).expect("made");
    for line in [
        "sync source link",
        "sync source directory",
        "sync source nowhere/target",
    ] {
        let output = lab.run(line);

        assert_eq!(code(&output), 4, "{line}: {}", text(&output.stderr));
    }
    assert_eq!(
        fs::read(lab.path("real")).expect("readable"),
        content(MIB, 2)
    );
}

#[test]
fn exit_7_means_corruption() {
    let lab = Lab::new();
    lab.disk("source", 2 * MIB, 1);
    lab.must("sync source target");
    patch(&lab.path("target"), 1_000_000, b"rot");

    let output = lab.run("verify target");

    assert_eq!(code(&output), 7, "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("corruption"));
}

#[test]
fn a_signal_stops_cleanly_and_the_command_that_resumes_is_printed() {
    for (name, expected) in [("-INT", 130), ("-TERM", 143)] {
        let lab = Lab::new();
        let mut child = lab.slow_sync("--json");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        wait_for(&mut lines, "checkpoint");

        signal(&child, name);

        let rest: Vec<Value> = lines
            .map(|line| serde_json::from_str(&line.expect("readable")).expect("JSON"))
            .collect();
        let status = child.wait().expect("ends");
        rest.iter().for_each(check_documented);
        let error = rest.last().expect("an error line");
        assert_eq!(status.code(), Some(expected), "{rest:?}");
        assert_eq!(
            (&error["type"], &error["resumable"]),
            (&"error".into(), &true.into()),
            "{error}"
        );
        assert!(
            error["hints"].to_string().contains("blockferry resume"),
            "{error}"
        );
        assert_eq!(
            fs::read(lab.path("target")).expect("readable"),
            content(24 * MIB, 3)
        );

        let (code, lines) = lab.json("resume target");
        let summary = lines.last().expect("a line");
        assert_eq!(code, 0, "{summary}");
        assert_eq!(summary["restaged_bytes"], 0, "{summary}");
        assert!(
            summary["resumed_bytes"].as_u64().expect("a number") > 0,
            "{summary}"
        );
        assert!(same(&lab.path("source"), &lab.path("target")));
    }
}

#[test]
fn the_resume_command_of_the_hint_works_as_printed() {
    let lab = Lab::new();
    let mut child = lab.slow_sync("--state kept -v");
    let mut errors = BufReader::new(child.stderr.take().expect("piped"));
    let mut said = String::new();
    while !said.contains("durable up to record") {
        assert_ne!(
            errors.read_line(&mut said).expect("readable"),
            0,
            "ended early: {said}"
        );
    }
    signal(&child, "-INT");
    errors.read_to_string(&mut said).expect("readable");
    assert_eq!(child.wait().expect("ends").code(), Some(130), "{said}");
    let command = said
        .lines()
        .find_map(|line| line.strip_prefix("hint: continue with: "))
        .expect(&said);

    let binary = Path::new(env!("CARGO_BIN_EXE_blockferry"))
        .parent()
        .expect("a directory");
    let path = format!(
        "{}:{}",
        binary.display(),
        std::env::var("PATH").expect("a path")
    );
    let status = Command::new("sh")
        .args(["-c", command])
        .current_dir("/")
        .env("PATH", path)
        .env("BLOCKFERRY_STATE_ROOT", lab.path("state-root"))
        .stderr(Stdio::null())
        .status();

    assert!(status.expect("a shell").success(), "{command}");
    assert!(same(&lab.path("source"), &lab.path("target")));
}

#[test]
fn two_runs_cannot_meet_at_one_target() {
    let lab = Lab::new();
    let mut child = lab.slow_sync("--json");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    wait_for(&mut lines, "checkpoint");

    for line in [
        "sync source target",
        "cancel target",
        "rollback target --state elsewhere",
    ] {
        let output = lab.run(line);
        assert_eq!(code(&output), 4, "{line}: {}", text(&output.stderr));
    }
    let (_, status) = lab.json("status target");
    assert_eq!(status.last().expect("a line")["running"], true);

    child.kill().expect("killed");
    child.wait().expect("reaped");
}

#[test]
fn a_resume_keeps_what_the_session_was_begun_with() {
    let lab = Lab::new();
    let mut child = lab.slow_sync("--json --block-size 4KiB --undo none");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    wait_for(&mut lines, "checkpoint");
    child.kill().expect("killed");
    child.wait().expect("reaped");

    let (code, lines) = lab.json("resume target");

    let summary = lines.last().expect("a line");
    assert_eq!(
        (code, &summary["rollback_available"]),
        (0, &false.into()),
        "{summary}"
    );
    assert!(
        summary["resumed_bytes"].as_u64().expect("a number") > 0,
        "{summary}"
    );
}

#[test]
fn one_disk_is_never_source_and_target() {
    let lab = Lab::new();
    lab.disk("a", MIB, 1);
    fs::hard_link(lab.path("a"), lab.path("b")).expect("linked");
    for line in ["sync a a", "sync a b", "sync a ./a --dry-run"] {
        let output = lab.run(line);

        assert_eq!(code(&output), 2, "{line}: {}", text(&output.stderr));
    }
}

#[test]
fn asking_about_an_unknown_target_leaves_nothing_behind() {
    let lab = Lab::new();
    lab.disk("a", MIB, 1);
    for verb in ["accept", "rollback", "cancel", "verify"] {
        assert_eq!(code(&lab.run(&format!("{verb} a"))), 4, "{verb}");
    }
    let entries = fs::read_dir(lab.path("")).expect("readable");
    assert_eq!(entries.count(), 1);
}

// --- verbs ---------------------------------------------------------------------------------------------------------

#[test]
fn rollback_returns_to_the_old_point_and_accept_lets_it_go() {
    let lab = Lab::new();
    lab.applied();
    assert!(same(&lab.path("source"), &lab.path("target")));

    lab.must("rollback target");
    assert!(same(&lab.path("old"), &lab.path("target")));

    lab.must("sync source target");
    lab.must("accept target");
    let (_, lines) = lab.json("rollback target");
    assert_ne!(lines.last().expect("a line")["outcome"], "rolled_back");
    assert!(same(&lab.path("source"), &lab.path("target")));
}

#[test]
fn cancel_drops_what_was_staged() {
    let lab = Lab::new();
    let mut child = lab.slow_sync("--json");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    wait_for(&mut lines, "checkpoint");
    child.kill().expect("killed");
    child.wait().expect("reaped");
    let (_, lines) = lab.json("status target");
    assert_eq!(lines.last().expect("a line")["state"], "staging");

    let (code, lines) = lab.json("cancel target");

    assert_eq!(
        (code, &lines.last().expect("a line")["outcome"]),
        (0, &"cancelled".into())
    );
    assert_eq!(
        fs::read(lab.path("target")).expect("readable"),
        content(24 * MIB, 3)
    );
    assert_eq!(lab.json("resume target").0, 2, "nothing is left to resume");
}

#[test]
fn status_lists_all_targets_and_says_what_can_be_done() {
    let lab = Lab::new();
    lab.applied();

    let one = text(&lab.run("status target").stderr);
    let all = text(&lab.run("status").stderr);

    assert!(
        one.contains("blockferry rollback") && one.contains("blockferry accept"),
        "{one}"
    );
    assert!(
        all.contains("TARGET") && all.contains(&*lab.path("target").to_string_lossy()),
        "{all}"
    );
}

#[test]
fn a_dry_run_writes_nothing_at_all() {
    let lab = Lab::new();
    lab.disk("source", 2 * MIB, 1);
    lab.disk("target", 2 * MIB, 2);
    let names = |lab: &Lab| -> Vec<String> {
        let entries = fs::read_dir(lab.path("")).expect("readable");
        let mut names: Vec<String> = entries
            .map(|entry| {
                entry
                    .expect("an entry")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        names.sort();
        names
    };
    let before = names(&lab);

    lab.must("sync source target --dry-run");
    lab.must("sync source absent --dry-run");

    assert_eq!(names(&lab), before);
    assert_eq!(
        fs::read(lab.path("target")).expect("readable"),
        content(2 * MIB, 2)
    );
}

#[test]
fn bwlimit_holds() {
    let lab = Lab::new();
    lab.disk("source", 4 * MIB, 1);
    let started = Instant::now();

    lab.must("sync source target --bwlimit 4M");

    let elapsed = started.elapsed();
    assert!(
        elapsed > Duration::from_millis(700),
        "4 MiB at 4 MiB/s took {elapsed:?}"
    );
}

#[test]
fn a_digest_names_content_whatever_the_file_and_its_holes() {
    let lab = Lab::new();
    lab.disk("a", MIB, 1);
    fs::copy(lab.path("a"), lab.path("b")).expect("copied");
    let root = |line: &str| {
        let output = lab.run(line);
        assert_eq!(code(&output), 0, "{line}: {}", text(&output.stderr));
        let line = text(&output.stdout);
        line.split_once("  ")
            .expect("root, two blanks, address")
            .0
            .to_owned()
    };

    let first = root("digest a");

    assert_eq!(first.len(), 64);
    assert_eq!(root("digest b --manifest manifest"), first);
    assert!(fs::metadata(lab.path("manifest")).expect("written").len() > 0);
    patch(&lab.path("b"), 99, b"x");
    assert_ne!(root("digest b"), first);
    assert_eq!(
        code(&lab.run("digest a --manifest manifest")),
        4,
        "a manifest is never overwritten"
    );
}

#[test]
fn completions_and_manual_pages_know_every_verb() {
    let lab = Lab::new();
    let verbs = [
        "demo", "sync", "status", "resume", "cancel", "rollback", "accept", "diff", "digest",
        "verify",
    ];
    for shell in ["bash", "zsh", "fish"] {
        let output = lab.run(&format!("completions {shell}"));
        let script = text(&output.stdout);
        assert_eq!(code(&output), 0);
        assert!(verbs.iter().all(|verb| script.contains(verb)), "{shell}");
    }

    lab.must("man pages");

    for verb in verbs {
        let page = fs::read_to_string(lab.path(&format!("pages/blockferry-{verb}.1"))).expect(verb);
        assert!(page.contains(".TH"), "{verb}");
    }
    assert!(
        !lab.path("pages/blockferry-man.1").exists(),
        "hidden verbs have no page"
    );
}

#[test]
fn help_lists_the_verbs_and_the_exit_codes() {
    let lab = Lab::new();

    let help = text(&lab.run("--help").stdout);
    let none = lab.run("");

    for word in [
        "demo",
        "sync",
        "status",
        "rollback",
        "--json",
        "--state",
        "Exit codes:",
        "130",
    ] {
        assert!(help.contains(word), "{word} is missing: {help}");
    }
    assert!(!help.contains(" man "), "hidden: {help}");
    assert_eq!((code(&none), text(&none.stdout)), (2, String::new()));
}

#[test]
fn a_log_limit_that_is_too_small_leaves_the_target_alone() {
    let lab = Lab::new();
    lab.disk("source", 8 * MIB, 1);
    lab.disk("target", 8 * MIB, 2);

    let output = lab.run("sync source target --strategy redo --log-limit 1M");

    // Not even one record fits: there is nothing to resume.
    assert_eq!(code(&output), 4, "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("raise the limit"));
    assert_eq!(
        fs::read(lab.path("target")).expect("readable"),
        content(8 * MIB, 2)
    );
}

// --- demo ----------------------------------------------------------------------------------------------------------

#[test]
fn the_demo_holds_what_it_promises_and_leaves_its_receipt() {
    let lab = Lab::new();
    fs::create_dir(lab.path("demo")).expect("made");

    let (code, lines) = lab.json("demo --dir demo --size 64MiB");

    check_stream("demo", code, &lines);
    let summary = lines.last().expect("a line");
    assert_eq!(code, 0, "{summary}");
    assert_eq!(summary["resumed"]["restaged_bytes"], 0);
    assert!(
        summary["resumed"]["resumed_bytes"]
            .as_u64()
            .expect("a number")
            > 0
    );
    let receipt = summary["receipt"].as_str().expect("a path");
    let stored: Value =
        serde_json::from_str(&fs::read_to_string(lab.path(receipt)).expect("stored"))
            .expect("JSON");
    assert_eq!(
        stored["resumed"]["source_root"],
        stored["resumed"]["target_root"]
    );
    let machine = &stored["machine"];
    let runs = |program: &str| Command::new(program).arg("--version").output().is_ok();
    if runs("qemu-storage-daemon") && runs("qemu-img") && runs("qemu-nbd") {
        assert!(machine["pause_back_seconds"].as_f64().expect("a pause") > 0.0);
    } else {
        assert!(machine.is_null(), "{machine}");
    }
}
