//! Syncs with another host. The remote shell is a script whose hosts are all this machine, in a directory, a state root
//! and a process of their own; what it carries can be cut.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use blockferry::BlockSize;
use blockferry::core::block_digest;
use blockferry::device::{Evidence, Identity};
use blockferry::transport::{Message, Preamble, ShortDigests, Width, message};
use serde_json::Value;

mod lab;

use lab::{Lab, MIB, assert_went_on, begun, code, content, patch, same, signal, text};

/// Takes `[-p PORT] HOST COMMAND…`, as ssh does, and notes what it was called with. `cuts` holds a number for each
/// connection that is to be cut: after so many bytes from the other host.
const REMOTE_SHELL: &str = r#"#!/bin/sh
home=$(dirname "$0")/far
echo "$*" >> "$home/calls"
if [ "$1" = -p ]; then shift 2; fi
shift
cd "$home" || exit 255
export PATH="$home/bin:$PATH" BLOCKFERRY_STATE_ROOT="$home/state-root"
cut=$(head -n 1 cuts 2>/dev/null)
if [ -n "$cut" ]; then
    sed -i 1d cuts
    sh -c "$*" | stdbuf -o0 head -c "$cut"
else
    exec sh -c "$*"
fi
"#;

/// Two hosts: this one and `far`.
struct Hosts {
    lab: Lab,
}

impl Hosts {
    fn new() -> Self {
        let lab = Lab::new();
        fs::create_dir_all(lab.path("far/bin")).expect("created");
        std::os::unix::fs::symlink(
            env!("CARGO_BIN_EXE_blockferry"),
            lab.path("far/bin/blockferry"),
        )
        .expect("linked");
        let hosts = Self { lab };
        hosts.script("rsh", REMOTE_SHELL);
        hosts
    }

    fn script(&self, name: &str, text: &str) {
        let path = self.lab.path(name);
        fs::write(&path, text).expect("written");
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("changed");
    }

    fn command(&self, line: &str) -> Command {
        let mut command = self.lab.command(line.split_whitespace());
        command.env("BLOCKFERRY_RSH", self.lab.path("rsh"));
        command
    }

    fn run(&self, line: &str) -> Output {
        self.command(line).output().expect("the binary runs")
    }

    fn json(&self, line: &str) -> (i32, Vec<Value>) {
        let output = self
            .command(&format!("{line} --json"))
            .output()
            .expect("runs");
        let lines = text(&output.stdout);
        let parsed = lines
            .lines()
            .map(|line| serde_json::from_str(line).expect(line));
        (code(&output), parsed.collect())
    }

    /// The summary of a run that must succeed.
    fn must(&self, line: &str) -> Value {
        let (code, lines) = self.json(line);
        let last = lines.last().expect("a line").clone();
        assert_eq!(code, 0, "{line}: {lines:?}");
        last
    }

    /// Runs a line of shell here, as it was printed to be pasted.
    fn paste(&self, line: &str) {
        let bin = self.lab.path("far/bin");
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").expect("set"));
        let status = Command::new("sh")
            .args(["-c", line])
            .current_dir(self.lab.path("."))
            .env("PATH", path)
            .env("BLOCKFERRY_RSH", self.lab.path("rsh"))
            .env("BLOCKFERRY_STATE_ROOT", self.lab.path("state-root"))
            .status();
        assert!(status.expect("runs").success(), "{line}");
    }

    /// Two disks of noise, and the sync from here to there or back: the line, source and target.
    fn two_disks(&self, push: bool, bytes: usize) -> (&'static str, PathBuf, PathBuf) {
        let (here, there) = (self.lab.path("disk"), self.far("disk"));
        let (line, source, target) = if push {
            ("sync disk h:disk", here, there)
        } else {
            ("sync h:disk disk", there, here)
        };
        fs::write(&source, content(bytes, 5)).expect("written");
        fs::write(&target, content(bytes, 6)).expect("written");
        (line, source, target)
    }

    fn far(&self, name: &str) -> PathBuf {
        self.lab.path("far").join(name)
    }

    fn calls(&self) -> String {
        fs::read_to_string(self.far("calls")).expect("it was called")
    }

    /// A delta that is slowed down so much that it lasts, once something is durable; and what it still says.
    fn begun(&self, line: &str) -> (Child, impl Iterator<Item = Value> + use<>) {
        let mut command = self.command(&format!("{line} --mode delta --strategy redo --json"));
        begun(command.stderr(Stdio::null()))
    }

    /// Kills the blockferry that is started there, as the system may.
    fn kill_far_end(&self) {
        // Its working directory tells it from every other.
        let far = fs::canonicalize(self.far(".")).expect("there");
        let serving = fs::read_dir("/proc")
            .expect("mounted")
            .flatten()
            .filter(|process| {
                let place = fs::read_link(process.path().join("cwd"));
                let words = fs::read(process.path().join("cmdline")).unwrap_or_default();
                place.is_ok_and(|place| place == far)
                    && words.ends_with(b"serve\0--stdio\0")
                    && !words.starts_with(b"sh\0")
            });
        for process in serving {
            let id = process.file_name();
            let id = id.to_str().expect("a number");
            Command::new("kill")
                .args(["-9", id])
                .status()
                .expect("runs");
        }
    }

    /// No way leads to the other host, or there is one again.
    fn set_way(&self, open: bool) {
        let (there, away) = (self.far("bin/blockferry"), self.far("bin/away"));
        let (from, to) = if open { (away, there) } else { (there, away) };
        fs::rename(from, to).expect("moved");
    }

    /// Runs a line on the host that has the target.
    fn beside_target(&self, push: bool, line: &str) -> Output {
        let mut command = self.lab.command(line.split_whitespace());
        if push {
            command
                .current_dir(self.far("."))
                .env("BLOCKFERRY_STATE_ROOT", self.far("state-root"));
        }
        command.output().expect("runs")
    }

    /// A run slowed down so much that it lasts, stopped by this signal once something is durable.
    fn stopped(&self, line: &str, name: &str) -> (Option<i32>, Vec<Value>) {
        let (mut child, lines) = self.begun(&format!("{line} --bwlimit 4M"));
        signal(&child, name);
        let rest = lines.collect();
        (child.wait().expect("ends").code(), rest)
    }
}

fn hint(lines: &[Value], words: &str) -> String {
    let hints = lines.last().expect("a line")["hints"]
        .as_array()
        .expect("hints");
    let found = hints
        .iter()
        .filter_map(Value::as_str)
        .find(|hint| hint.contains(words));
    found
        .unwrap_or_else(|| panic!("{words}: {hints:?}"))
        .to_owned()
}

fn behind<'t>(text: &'t str, words: &str) -> &'t str {
    let (_, found) = text
        .split_once(words)
        .unwrap_or_else(|| panic!("{words}: {text}"));
    found.lines().next().expect("a line").trim()
}

#[test]
fn a_disk_is_pushed_to_another_host_and_the_commands_that_are_printed_work() {
    let hosts = Hosts::new();
    let source = hosts.lab.disk("source", 8 * MIB, 1);
    fs::copy(&source, hosts.far("target")).expect("copied");
    patch(&source, 700_000, b"changed");

    let output = hosts.run("sync source me@example:target");

    assert_eq!(code(&output), 0, "{}", text(&output.stderr));
    assert!(same(&source, &hosts.far("target")));
    assert_eq!(text(&output.stdout), "", "nothing but data");
    assert!(
        hosts
            .calls()
            .starts_with("me@example blockferry serve --stdio\n"),
        "{}",
        hosts.calls()
    );

    hosts.paste(behind(&text(&output.stderr), "go back:"));
    assert_eq!(
        fs::read(hosts.far("target")).expect("readable"),
        content(8 * MIB, 1)
    );

    let output = hosts.run("sync source ssh://me@example:2200/ --mode full");
    assert_ne!(code(&output), 0);
    let place = hosts.far("target");
    let output = hosts.run(&format!(
        "sync source ssh://me@example:2200{}",
        place.display()
    ));
    assert!(
        hosts
            .calls()
            .contains("\n-p 2200 me@example blockferry serve --stdio\n")
    );
    hosts.paste(behind(&text(&output.stderr), "let go:"));
    let status = hosts.lab.path("far/bin/blockferry");
    let told = Command::new(status)
        .arg("status")
        .arg(place)
        .output()
        .expect("runs");
    assert!(
        !text(&told.stderr).contains("rollback"),
        "{}",
        text(&told.stderr)
    );
}

#[test]
fn a_disk_is_pulled_from_another_host_and_only_what_differs_crosses() {
    let hosts = Hosts::new();
    fs::write(hosts.far("source"), content(8 * MIB, 2)).expect("written");

    let first = hosts.must("sync far-host:source target");
    assert!(same(&hosts.far("source"), &hosts.lab.path("target")));
    assert_eq!(
        (&first["mode"], &first["strategy"]),
        (&"full".into(), &"direct".into())
    );
    patch(&hosts.far("source"), 3 << 20, b"changed");

    let second = hosts.must("sync far-host:source target");

    assert!(same(&hosts.far("source"), &hosts.lab.path("target")));
    assert_eq!(second["changed_bytes"], 4096);
    let sent = second["sent_bytes"].as_u64().expect("a number");
    assert!((4000..9000).contains(&sent), "{second}");
    assert_eq!(second["scanned_bytes"], 8 * MIB);
}

#[test]
fn options_hold_on_the_other_host() {
    let hosts = Hosts::new();
    let source = hosts.lab.disk("source", 4 * MIB, 3);
    fs::write(hosts.far("target"), content(5 * MIB, 4)).expect("written");
    let line = "sync source h:target --block-size 16KiB --undo none --state kept-there";

    let (code, lines) = hosts.json(line);
    assert_eq!(code, 4, "it would be cut off: {lines:?}");
    let message = lines.last().expect("a line")["message"]
        .as_str()
        .expect("text");
    assert!(
        message.starts_with("h: ") && message.contains("--allow-shrink"),
        "{message}"
    );

    let receipt = hosts.must(&format!("{line} --allow-shrink"));
    assert!(same(&source, &hosts.far("target")));
    assert_eq!(receipt["rollback_available"], false);
    assert!(hosts.far("kept-there").is_dir());
}

#[test]
fn a_signal_ends_a_push_and_a_pull_in_order_and_nothing_durable_is_sent_again() {
    for push in [true, false] {
        let hosts = Hosts::new();
        let (line, source, target) = hosts.two_disks(push, 24 * MIB);

        let (code, lines) = hosts.stopped(line, "-INT");

        assert_eq!(code, Some(130), "{lines:?}");
        assert_eq!(
            lines.last().expect("a line")["resumable"],
            true,
            "{lines:?}"
        );
        assert_eq!(fs::read(&target).expect("readable"), content(24 * MIB, 6));
        let again = hint(&lines, "continue with: ");
        let again = behind(&again, "continue with: ");
        assert_eq!(again.starts_with("blockferry resume "), !push, "{again}");
        let again = again
            .replacen("--bwlimit 4M", "", 1)
            .replacen("--bwlimit 4194304", "", 1);
        let again = again.strip_prefix("blockferry ").expect("a command");
        let receipt = hosts.must(&again.replace("--json", ""));
        assert_eq!(receipt["restaged_bytes"], 0, "{receipt}");
        assert!(receipt["resumed_bytes"].as_u64() > Some(0), "{receipt}");
        assert!(same(&source, &target));
    }
}

#[test]
fn a_connection_that_is_cut_is_made_again_by_itself() {
    for push in [true, false] {
        let hosts = Hosts::new();
        let (line, source, target) = hosts.two_disks(push, 16 * MIB);
        // From the far end: few bytes in a push, all of the disk in a pull.
        let cuts = if push {
            "900\n2500\n"
        } else {
            "5000000\n7000000\n"
        };
        fs::write(hosts.far("cuts"), cuts).expect("written");

        let ran = hosts.json(&format!("{line} --mode delta --strategy redo"));

        assert_went_on(&ran, push);
        assert!(same(&source, &target));
        assert_eq!(hosts.calls().lines().count(), 3);
    }
}

#[test]
fn a_far_end_that_is_killed_is_started_again() {
    let hosts = Hosts::new();
    let source = hosts.lab.disk("source", 24 * MIB, 9);
    fs::write(hosts.far("target"), content(24 * MIB, 10)).expect("written");
    let (mut child, lines) = hosts.begun("sync source h:target --bwlimit 8M");
    hosts.kill_far_end();

    let rest: Vec<Value> = lines.collect();

    assert_eq!(child.wait().expect("ends").code(), Some(0), "{rest:?}");
    let receipt = rest.last().expect("a line");
    assert!(
        rest.iter().any(|line| line["code"] == "reconnecting"),
        "{rest:?}"
    );
    assert_eq!(receipt["restaged_bytes"], 0, "{receipt}");
    assert!(receipt["resumed_bytes"].as_u64() > Some(0), "{receipt}");
    assert!(same(&source, &hosts.far("target")));
}

/// Runs `what` on the target's host while a run that has lost its connection finds no way back, and returns what that
/// run comes to when it finds one.
fn come_back(hosts: &Hosts, push: bool, line: &str, what: impl Fn() -> bool) -> (i32, Vec<Value>) {
    let (mut child, lines) = hosts.begun(&format!("{line} --bwlimit 4M"));
    hosts.set_way(false);
    hosts.kill_far_end();
    let end = Instant::now() + Duration::from_secs(60);
    while !what() {
        assert!(
            Instant::now() < end,
            "push {push}: the target is not let go"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    hosts.set_way(true);
    let rest = lines.collect();
    (child.wait().expect("ends").code().expect("by itself"), rest)
}

#[test]
fn a_run_that_comes_back_late_is_refused_by_a_target_that_somebody_took() {
    for push in [true, false] {
        for taken_by in ["sync other disk", "cancel disk"] {
            let hosts = Hosts::new();
            let (line, _, target) = hosts.two_disks(push, 24 * MIB);
            fs::write(target.with_file_name("other"), content(24 * MIB, 20)).expect("written");
            let take = || code(&hosts.beside_target(push, taken_by)) == 0;

            let (exit, lines) = come_back(&hosts, push, line, take);

            assert_eq!(exit, 4, "{lines:?}");
            let said = lines.last().expect("a line");
            let message = said["message"].as_str().expect("said");
            assert!(message.contains("taken by another command"), "{said}");
            assert_eq!(said["resumable"], false, "{said}");
            let left = if taken_by == "cancel disk" { 6 } else { 20 };
            assert!(
                fs::read(&target).expect("readable") == content(24 * MIB, left),
                "{taken_by}"
            );
            // Who means it starts again.
            hosts.must(line);
        }
    }
}

#[test]
fn a_target_that_comes_back_without_its_state_gets_a_new_session_that_is_said() {
    for push in [true, false] {
        let hosts = Hosts::new();
        let (line, source, target) = hosts.two_disks(push, 24 * MIB);
        let state = target.with_file_name(".disk.blockferry");
        let lose = || {
            // Works once the target is let go.
            let free = code(&hosts.beside_target(push, "cancel disk")) == 0;
            if free {
                fs::remove_dir_all(&state).expect("removed");
            }
            free
        };

        let (exit, lines) = come_back(&hosts, push, line, lose);

        assert_eq!(exit, 0, "{lines:?}");
        assert!(
            lines.iter().any(|line| line["code"] == "state_lost"),
            "{lines:?}"
        );
        assert!(same(&source, &target));
    }
}

#[test]
fn what_keeps_two_hosts_apart_is_said_with_what_to_do() {
    let hosts = Hosts::new();
    hosts.lab.disk("source", MIB, 11);
    hosts.script(
        "old",
        "#!/bin/sh\necho \"error: unrecognized subcommand 'serve'\" >&2\nexit 2\n",
    );
    hosts.script(
        "refused",
        "#!/bin/sh\necho 'Permission denied (publickey).' >&2\nexit 255\n",
    );
    hosts.script(
        "greets",
        "#!/bin/sh\necho 'Welcome to far'\ncat > /dev/null\n",
    );
    hosts.script(
        "escapes",
        "#!/bin/sh\nprintf 'a\\033[2Jb\\n' >&2\nexit 255\n",
    );
    hosts.script(
        "newer",
        "#!/bin/sh\nprintf 'BFRYWIRE\\007\\000\\011\\000\\000\\000\\000\\000'\ncat > /dev/null\n",
    );
    for (options, told) in [
        (
            "--remote-path blockferry-9",
            &["finds no command blockferry-9", "--remote-path", "h: sh: "][..],
        ),
        (
            "--remote-path ../old",
            &["too old", "h: error: unrecognized subcommand"],
        ),
        (
            "-e ./refused",
            &["could not log in", "h: Permission denied (publickey)."],
        ),
        ("-e ./greets", &["Welcome to far", "must print nothing"]),
        ("-e ./escapes", &["h: a\u{fffd}[2Jb"]),
        ("-e ./newer", &["versions 7 to 9", "update the older one"]),
        (
            "-e no-such-shell",
            &["there is no command no-such-shell here", "-e"],
        ),
    ] {
        let output = hosts.run(&format!("sync source h:target {options}"));

        let shown = text(&output.stderr);
        assert_eq!(code(&output), 8, "{options}: {shown}");
        for words in told {
            assert!(shown.contains(words), "{options}: {words}: {shown}");
        }
        assert!(!hosts.far("target").exists());
    }
    for (line, exit, told) in [
        ("sync h:absent target", 3, "h: open of absent"),
        ("sync source h:no/such/place", 4, "h: "),
        ("sync h:a g:b", 2, "one side must be here"),
        ("sync h:absent target --dry-run", 3, "h: open of absent"),
        ("sync source h:no/such/place --dry-run", 4, "h: "),
        ("sync source h:target -e 'ssh", 2, "quotes"),
        ("digest h:a", 2, "only sync reaches disks of other hosts"),
        ("serve", 2, "--stdio"),
        ("serve --stdio --json", 2, "no --json"),
    ] {
        let output = hosts.run(line);

        let shown = format!("{}{}", text(&output.stderr), text(&output.stdout));
        assert_eq!(code(&output), exit, "{line}: {shown}");
        assert!(shown.contains(told), "{line}: {shown}");
    }
}

#[test]
fn a_target_that_was_pushed_never_takes_a_disk_of_its_own_host_for_the_source() {
    let hosts = Hosts::new();
    hosts.lab.disk("disk", 24 * MIB, 12);
    fs::write(hosts.far("target"), content(24 * MIB, 13)).expect("written");
    hosts.stopped("sync disk h:target", "-TERM");

    let there = hosts.beside_target(true, "resume target");

    assert_eq!(code(&there), 2);
    let shown = text(&there.stderr);
    assert!(shown.contains("pushed from another host"), "{shown}");
    assert_eq!(
        fs::read(hosts.far("target")).expect("readable"),
        content(24 * MIB, 13)
    );
}

#[test]
fn a_pull_into_a_target_that_is_refused_says_that_and_nothing_else() {
    let hosts = Hosts::new();
    fs::write(hosts.far("disk"), content(MIB, 14)).expect("written");
    fs::create_dir(hosts.lab.path("target")).expect("created");

    let output = hosts.run("sync h:disk target");

    let shown = text(&output.stderr);
    assert_eq!(code(&output), 4, "{shown}");
    assert!(
        shown.starts_with("error: ") && !shown.contains("h: "),
        "{shown}"
    );
}

#[test]
fn a_dry_run_between_hosts_writes_nothing_and_says_what_the_sync_then_does() {
    for push in [true, false] {
        let hosts = Hosts::new();
        let (line, source, target) = hosts.two_disks(push, 24 * MIB);
        let mut old = content(24 * MIB, 5);
        // A tenth of it, all over it.
        for block in old.chunks_mut(640 * 1024) {
            let changed = block.len().min(64 * 1024);
            block[..changed].fill(7);
        }
        fs::write(&target, &old).expect("written");
        let names = || {
            let mut found = Vec::new();
            for place in ["", "far", "far/state-root", "state-root"] {
                for entry in fs::read_dir(hosts.lab.path(place)).into_iter().flatten() {
                    found.push(entry.expect("an entry").path());
                }
            }
            found.retain(|path| !path.ends_with("calls"));
            found.sort();
            found
        };
        let before = names();

        let foretold = hosts.must(&format!("{line} --dry-run"));

        assert_eq!(names(), before, "{line}");
        assert!(fs::read(&target).expect("readable") == old, "{line}");
        let changed = foretold["predicted_changed_bytes"].as_u64().expect("said");
        let wire = foretold["predicted_wire_bytes"].as_u64().expect("said");
        assert!(foretold["predicted_seconds"].as_f64().expect("said") > 0.0);
        let shown = hosts.run(&format!("{line} --dry-run"));
        let shown = text(&shown.stderr);
        assert!(
            shown.contains("on the wire") && shown.contains("nothing was written"),
            "{shown}"
        );
        let done = hosts.must(line);
        assert_eq!(
            (&foretold["mode"], &foretold["strategy"]),
            (&done["mode"], &done["strategy"])
        );
        let really = done["changed_bytes"].as_u64().expect("said");
        assert!(
            changed.abs_diff(really) < really / 3,
            "{line}: {changed} foretold, {really}"
        );
        let crossed = done["sent_bytes"].as_u64().expect("said");
        assert!(
            wire.abs_diff(crossed) < crossed / 2,
            "{line}: {wire} foretold, {crossed}"
        );
        assert!(same(&source, &target));
    }
}

/// What a connection may cost, whoever is on its other side.
const MOST_BYTES: u64 = 64 << 20;

/// The most memory that a process has had so far, if it is still there.
fn peak_bytes(id: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

fn open(role: message::Role, options: &[u8]) -> Message {
    Message::Open(message::Open {
        role,
        path: b"disk".to_vec(),
        options: options.to_vec(),
    })
}

fn begin(window: u32) -> Message {
    Message::Begin(message::Begin {
        block_size: BlockSize::new(4096).expect("a power of two"),
        exact: false,
        level: 22,
        window,
        mapped: false,
    })
}

/// What hostile peers say after the greeting: name, and bytes.
fn hostile_talk() -> Vec<(&'static str, Vec<u8>)> {
    let said = |messages: &[Message]| {
        let mut bytes = Vec::new();
        messages
            .iter()
            .for_each(|message| message.encode(&mut bytes));
        bytes
    };
    let source = |size_bytes| {
        Message::Source(message::Source {
            label: "\u{1b}[2J".to_owned(),
            size_bytes,
            identity: Identity::unknown(),
            evidence: Evidence::unknown(),
        })
    };
    let (from, to) = (
        open(message::Role::Source, b"{}"),
        open(message::Role::Target, b"{}"),
    );
    let regions = |numbers: std::ops::Range<u64>| Message::Regions {
        digests: ShortDigests::of(
            Width::Sixteen,
            numbers.clone().map(|n| block_digest(&n.to_le_bytes())),
        ),
        below: numbers.end,
        regions: numbers.collect(),
    };
    let unasked = Message::Data {
        blocks: vec![(0, 0)],
        runs: vec![message::PageRun {
            first: 0,
            count: 256,
            zero: false,
        }],
        frame: vec![0x28; message::MAX_FRAME_BYTES],
    };
    let endless = |message: &Message, count: usize| said(&vec![message.clone(); count]);
    vec![
        ("noise", content(3 * MIB, 21)),
        ("a frame of 4 GiB", vec![0xFF; 64 * 1024]),
        (
            "large before it is known",
            said(std::slice::from_ref(&unasked)),
        ),
        (
            "what nobody understands",
            said(&[open(message::Role::Target, b"{\"magic\":1}")]),
        ),
        (
            "asks and does not read",
            [
                said(std::slice::from_ref(&from)),
                endless(&Message::Examine, 300_000),
            ]
            .concat(),
        ),
        (
            "opens what it was not told of",
            said(&[
                from.clone(),
                begin(u32::MAX),
                Message::OpenRegion {
                    region: 7,
                    blocks: ShortDigests::of(
                        Width::Eight,
                        std::iter::repeat_n(block_digest(b""), 256),
                    ),
                },
            ]),
        ),
        ("takes the wrong part", said(&[from, regions(0..4)])),
        (
            "a source beyond all disks",
            said(&[to.clone(), source(u64::MAX)]),
        ),
        (
            "tells of more than it may",
            said(&[
                to.clone(),
                source(64 << 30),
                regions(0..1000),
                regions(1000..2000),
            ]),
        ),
        (
            "sends what nobody asked for",
            said(&[to.clone(), source(MIB as u64), unasked]),
        ),
        (
            "tells nothing but events",
            [
                said(&[to]),
                endless(&Message::Event(vec![b' '; 12_000]), 5000),
            ]
            .concat(),
        ),
    ]
}

#[test]
fn a_hostile_peer_gets_an_error_and_no_memory_and_the_disk_stays() {
    for (name, talk) in hostile_talk() {
        let hosts = Hosts::new();
        let disk = hosts.lab.disk("disk", MIB, 20);
        let mut bytes = Preamble::OURS.encode().to_vec();
        bytes.extend(talk);
        let said = hosts.lab.path("said");
        fs::write(&said, bytes).expect("written");
        let mut far = hosts
            .command("serve --stdio")
            .stdin(fs::File::open(&said).expect("opened"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("runs");
        let end = Instant::now() + Duration::from_secs(40);
        let mut peak = 0;
        let status = loop {
            peak = peak_bytes(far.id()).unwrap_or(0).max(peak);
            if let Some(status) = far.try_wait().expect("our child") {
                break status;
            }
            assert!(Instant::now() < end, "{name}: it does not end");
            std::thread::sleep(Duration::from_millis(2));
        };

        let output = far.wait_with_output().expect("it has ended");
        let shown = text(&output.stderr);
        assert!(
            matches!(status.code(), Some(2..=8)),
            "{name}: {status:?} {shown}"
        );
        assert!(!shown.contains("panicked"), "{name}: {shown}");
        assert!(peak > 0 && peak <= MOST_BYTES, "{name}: {peak} bytes");
        assert_eq!(
            fs::read(&disk).expect("readable"),
            content(MIB, 20),
            "{name}"
        );
    }
}
