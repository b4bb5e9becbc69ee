//! Syncs with a server over TLS, on one machine: two sets of certificates, a server process of its own, and a wire
//! between that can be cut.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

mod lab;

use lab::{Lab, MIB, assert_went_on, begun, code, content, patch, same, signal, text};

const SOON: Duration = Duration::from_secs(60);

/// A host that serves, hosts with certificates, and disks.
struct Site {
    lab: Lab,
}

/// A server under way. Dropped, it is killed.
struct Server {
    child: Child,
    port: u16,
    log: Receiver<Value>,
    /// Everything that it said, as it said it.
    said: Arc<Mutex<String>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Site {
    /// `near` may do everything, `reader` and `other` less; `stranger` belongs to another authority.
    fn new() -> Self {
        let lab = Lab::new();
        lab.must("certs pki near reader other far,localhost,127.0.0.1");
        lab.must("certs pki-of-others stranger,near");
        let site = Self { lab };
        site.configure("");
        site
    }

    fn configure(&self, more: &str) {
        let [certs, disk, target, state] =
            ["pki/far", "far-source", "far-target", "far-state"].map(|name| self.lab.path(name));
        let (certs, disk, target, state) = (
            certs.display(),
            disk.display(),
            target.display(),
            state.display(),
        );
        let text = format!(
            "certs = \"{certs}\"\n\
             [exports.source]\npath = \"{disk}\"\nread = [\"near\", \"reader\"]\n\
             [exports.target]\npath = \"{target}\"\nwrite = [\"near\"]\nread = [\"near\"]\nstate = \"{state}\"\n{more}"
        );
        fs::write(self.lab.path("serve.toml"), text).expect("written");
    }

    fn serve(&self) -> Server {
        self.serve_at("127.0.0.1:0")
    }

    fn serve_at(&self, address: &str) -> Server {
        let line = format!("serve --listen {address} --config serve.toml --json -v");
        let mut command = self.lab.command(line.split_whitespace());
        command.env("BLOCKFERRY_STATE_ROOT", self.lab.path("far-state-root"));
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("runs");
        let said = Arc::new(Mutex::new(String::new()));
        let (told, log) = channel();
        let (out, err) = (
            child.stdout.take().expect("piped"),
            child.stderr.take().expect("piped"),
        );
        for stream in [Box::new(out) as Box<dyn Read + Send>, Box::new(err)] {
            let (said, told) = (Arc::clone(&said), told.clone());
            thread::spawn(move || {
                for line in BufReader::new(stream).lines() {
                    let line = line.expect("readable");
                    said.lock()
                        .expect("not poisoned")
                        .push_str(&format!("{line}\n"));
                    told.send(serde_json::from_str(&line).unwrap_or(Value::String(line)))
                        .ok();
                }
            });
        }
        let mut server = Server {
            child,
            port: 0,
            log,
            said,
        };
        let listening = server.until("listening");
        let address = listening["address"].as_str().expect("an address");
        let (_, port) = address.rsplit_once(':').expect("a port");
        server.port = port.parse().expect("a number");
        server
    }

    /// As `host`, with its certificates.
    fn run(&self, host: &str, line: &str) -> Output {
        let certs = self.lab.path("pki").join(host);
        let mut command = self.lab.command(line.split_whitespace());
        command
            .env("BLOCKFERRY_CERTS", certs)
            .output()
            .expect("runs")
    }

    fn json(&self, host: &str, line: &str) -> (i32, Vec<Value>) {
        let output = self.run(host, &format!("{line} --json"));
        let parsed = text(&output.stdout)
            .lines()
            .map(|line| serde_json::from_str(line).expect(line))
            .collect();
        (code(&output), parsed)
    }

    /// The summary of a run of `near` that must succeed.
    fn must(&self, line: &str) -> Value {
        let (code, lines) = self.json("near", line);
        assert_eq!(code, 0, "{line}: {lines:?}");
        lines.last().expect("a line").clone()
    }

    /// The message of a run that must fail so.
    fn fails(&self, host: &str, line: &str, expected: i32) -> String {
        let (code, lines) = self.json(host, line);
        let last = lines.last().expect("a line");
        assert_eq!(code, expected, "{line}: {lines:?}");
        last["message"].as_str().expect("a message").to_owned()
    }

    fn disk(&self, name: &str, bytes: usize, seed: u64) -> PathBuf {
        self.lab.disk(name, bytes, seed)
    }

    /// A delta of `near` between two disks of noise, slowed down so much that it lasts, once something is durable; and
    /// what it still says.
    fn begun(&self, line: &str) -> (Child, impl Iterator<Item = Value> + use<>) {
        let line = format!("{line} --mode delta --strategy redo --bwlimit 4M --json");
        let mut command = self.lab.command(line.split_whitespace());
        begun(command.env("BLOCKFERRY_CERTS", self.lab.path("pki/near")))
    }
}

impl Server {
    fn url(&self, export: &str) -> String {
        format!("blockferry://localhost:{}/{export}", self.port)
    }

    /// The next line of its log with this message.
    fn until(&self, message: &str) -> Value {
        let end = Instant::now() + SOON;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = self.log.recv_timeout(left);
            let line = line.unwrap_or_else(|_| panic!("{message}: {}", self.said()));
            if line["message"] == message {
                return line;
            }
        }
    }

    fn said(&self) -> String {
        self.said.lock().expect("not poisoned").clone()
    }

    /// Most memory it ever had, in bytes.
    fn peak(&self) -> u64 {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it lives");
        let peak = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .expect("told");
        1024 * peak
            .trim_end_matches("kB")
            .trim()
            .parse::<u64>()
            .expect("a number")
    }
}

/// Passes on to `port` what comes, and cuts each connection after so many bytes from the server.
fn wire(port: u16, cuts: Vec<u64>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let at = listener.local_addr().expect("bound").port();
    thread::spawn(move || {
        let mut cuts = cuts.into_iter();
        while let Ok((near, _)) = listener.accept() {
            let far = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
            let most = cuts.next().unwrap_or(u64::MAX);
            let (mut from_near, mut to_far) = (
                near.try_clone().expect("open"),
                far.try_clone().expect("open"),
            );
            thread::spawn(move || {
                std::io::copy(&mut from_near, &mut to_far).ok();
                to_far.shutdown(Shutdown::Write).ok();
            });
            thread::spawn(move || {
                std::io::copy(&mut (&far).take(most), &mut &near).ok();
                near.shutdown(Shutdown::Both).ok();
                far.shutdown(Shutdown::Both).ok();
            });
        }
    });
    at
}

#[test]
fn disks_behind_names_are_read_and_written_by_those_who_may() {
    let site = Site::new();
    site.disk("far-source", 8 * MIB, 1);
    let server = site.serve();

    let pulled = site.must(&format!("sync {} here", server.url("source")));
    assert!(same(&site.lab.path("far-source"), &site.lab.path("here")));
    assert_eq!(pulled["mode"], "full");
    patch(&site.lab.path("far-source"), 3 << 20, b"changed");
    let again = site.must(&format!("sync {} here", server.url("source")));
    assert_eq!(again["changed_bytes"], 4096);
    assert!(same(&site.lab.path("far-source"), &site.lab.path("here")));

    site.must(&format!("sync here {}", server.url("target")));
    assert!(same(&site.lab.path("here"), &site.lab.path("far-target")));
    assert!(site.lab.path("far-state").is_dir(), "as configured");
    patch(&site.lab.path("here"), 5 << 20, b"changed");
    let output = site.run("near", &format!("sync here {}", server.url("target")));
    assert_eq!(code(&output), 0, "{}", text(&output.stderr));
    assert!(
        text(&output.stderr).contains(
            "on localhost, with the path of its export target: blockferry rollback TARGET"
        )
    );

    for (host, line, may) in [
        (
            "reader",
            format!("sync here {}", server.url("source")),
            "write",
        ),
        (
            "reader",
            format!("sync here {}", server.url("target")),
            "write",
        ),
        (
            "reader",
            format!("sync {} there", server.url("target")),
            "read",
        ),
        (
            "other",
            format!("sync {} there", server.url("source")),
            "read",
        ),
        ("near", format!("sync {} there", server.url("none")), "read"),
    ] {
        let message = site.fails(host, &line, 2);
        let export = line
            .rsplit('/')
            .next()
            .expect("a name")
            .split(' ')
            .next()
            .expect("a name");
        let expected = format!("localhost: there is no export {export} that {host} may {may}");
        assert_eq!(
            message, expected,
            "{line}: the same whether or not there is one"
        );
    }
    assert!(!site.lab.path("there").exists());
    assert_eq!(server.until("begins")["peer"], "near");
    assert_eq!(server.until("done")["does"], "reads");
}

#[test]
fn what_a_peer_must_not_choose_is_refused_by_name() {
    let site = Site::new();
    let source = site.disk("source", 4 * MIB, 1);
    site.disk("far-target", 5 * MIB, 2);
    let server = site.serve();
    let line = format!("sync source {}", server.url("target"));

    for (option, told) in [
        ("--in-place", "in-place"),
        ("--allow-shrink", "allow-shrink"),
        ("--undo none", "undo-none"),
        ("--no-read-back", "no-read-back"),
        ("--state /tmp", "state"),
    ] {
        let message = site.fails("near", &format!("{line} {option}"), 2);
        assert!(message.contains(told), "{option}: {message}");
    }
    assert_eq!(
        fs::read(site.lab.path("far-target")).expect("readable"),
        content(5 * MIB, 2)
    );

    drop(server);
    site.configure("permit = [\"allow-shrink\"]\nthreads = 1\nlog-limit = \"1M\"\n");
    let server = site.serve();
    let line = format!("sync source {} --allow-shrink", server.url("target"));
    let message = site.fails("near", &format!("{line} --mode delta --strategy redo"), 5);
    assert!(
        message.contains("limit"),
        "the log is as large as the server lets it be: {message}"
    );
    drop(server);
    site.configure("permit = [\"allow-shrink\"]\n");
    let server = site.serve();
    site.must(&format!(
        "sync source {} --allow-shrink",
        server.url("target")
    ));
    assert!(same(&source, &site.lab.path("far-target")));
}

#[test]
fn who_has_no_certificate_of_the_authority_learns_nothing_and_gets_nothing() {
    let site = Site::new();
    site.disk("far-source", MIB, 1);
    let server = site.serve();
    let line = format!("sync {} here", server.url("source"));

    let stranger = site.lab.path("pki-of-others/stranger");
    let output = site.run("near", &format!("{line} --certs {}", stranger.display()));
    assert_eq!(code(&output), 8);
    assert!(
        text(&output.stderr).contains("certificates of one authority"),
        "{}",
        text(&output.stderr)
    );
    server.until("not admitted");
    let message = site.fails("nobody", &line, 2);
    assert!(message.contains("ca.pem"), "{message}");

    let mut plain = TcpStream::connect(("127.0.0.1", server.port)).expect("it listens");
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("sent");
    let mut answer = Vec::new();
    plain.read_to_end(&mut answer).ok();
    assert!(answer.len() < 16, "an alert of TLS at most: {answer:?}");
    server.until("not admitted");
    assert!(!site.lab.path("here").exists());
}

#[test]
fn a_wire_that_is_cut_and_a_server_that_is_killed_cost_nothing_durable() {
    for push in [true, false] {
        let site = Site::new();
        let server = site.serve();
        // From the server: few bytes in a push, all of the disk in a pull.
        let cuts = if push {
            vec![2500, 4000]
        } else {
            vec![5_000_000, 7_000_000]
        };
        let url = |port: u16, name: &str| format!("blockferry://localhost:{port}/{name}");
        let port = wire(server.port, cuts);
        let (line, source, target) = if push {
            let line = format!("sync near-source {}", url(port, "target"));
            (
                line,
                site.disk("near-source", 16 * MIB, 5),
                site.disk("far-target", 16 * MIB, 6),
            )
        } else {
            let line = format!("sync {} near-target", url(port, "source"));
            (
                line,
                site.disk("far-source", 16 * MIB, 5),
                site.disk("near-target", 16 * MIB, 6),
            )
        };

        let ran = site.json("near", &format!("{line} --mode delta --strategy redo"));

        assert_went_on(&ran, push);
        assert!(same(&source, &target));
    }

    let site = Site::new();
    let mut server = site.serve();
    site.disk("source", 24 * MIB, 7);
    site.disk("far-target", 24 * MIB, 8);
    let (mut running, mut lines) = site.begun(&format!("sync source {}", server.url("target")));
    let port = server.port;
    server.child.kill().expect("killed");
    server.child.wait().expect("ends");
    lines
        .find(|line| line["code"] == "reconnecting")
        .expect("it notices");
    let _server = site.serve_at(&format!("127.0.0.1:{port}"));

    let receipt = lines.last().expect("a line");
    assert_eq!(running.wait().expect("ends").code(), Some(0), "{receipt}");
    assert_eq!(receipt["restaged_bytes"], 0, "{receipt}");
    assert!(receipt["resumed_bytes"].as_u64() > Some(0), "{receipt}");
    assert!(same(&site.lab.path("source"), &site.lab.path("far-target")));
}

#[test]
fn a_pull_that_was_stopped_is_resumed_from_the_server() {
    let site = Site::new();
    let server = site.serve();
    let source = site.disk("far-source", 24 * MIB, 7);
    let target = site.disk("target", 24 * MIB, 8);
    let (mut running, _lines) = site.begun(&format!("sync {} target", server.url("source")));
    signal(&running, "-INT");
    assert_eq!(running.wait().expect("ends").code(), Some(130));
    server.until("failed");

    let receipt = site.must("resume target");

    assert_eq!(receipt["restaged_bytes"], 0, "{receipt}");
    assert!(receipt["resumed_bytes"].as_u64() > Some(0), "{receipt}");
    assert!(same(&source, &target));
}

#[test]
fn a_server_reads_its_configuration_again_and_ends_in_order() {
    let site = Site::new();
    site.disk("far-source", MIB, 1);
    let mut server = site.serve();
    let line = format!("sync {} of-other", server.url("source"));
    site.fails("other", &line, 2);

    fs::write(site.lab.path("serve.toml"), "exports = nonsense").expect("written");
    signal(&server.child, "-HUP");
    server.until("configuration not read again: the old one stays");
    site.must(&format!("sync {} here", server.url("source")));
    site.configure("[exports.more]\npath = \"/dev/null\"\nread = [\"other\"]\n");
    let text = fs::read_to_string(site.lab.path("serve.toml")).expect("readable");
    let text = text.replace("\"reader\"", "\"reader\", \"other\"");
    fs::write(site.lab.path("serve.toml"), text).expect("written");
    signal(&server.child, "-HUP");
    assert_eq!(server.until("configuration read again")["exports"], 3);
    assert_eq!(site.json("other", &line).0, 0);

    // In the middle of a run: it ends resumable, and the server with 0.
    site.disk("source", 24 * MIB, 7);
    site.disk("far-target", 24 * MIB, 8);
    let (mut running, lines) = site.begun(&format!("sync source {}", server.url("target")));
    signal(&server.child, "-TERM");
    assert_eq!(
        server.child.wait().expect("ends").code(),
        Some(0),
        "{}",
        server.said()
    );
    server.until("stopped");
    let last = lines.last().expect("a line");
    assert_eq!(running.wait().expect("ends").code(), Some(5), "{last}");
    assert_eq!(last["resumable"], true, "{last}");
    assert_eq!(
        fs::read(site.lab.path("far-target")).expect("readable"),
        content(24 * MIB, 8)
    );
}

#[test]
fn no_more_runs_than_configured_are_served_at_once() {
    let site = Site::new();
    let text = fs::read_to_string(site.lab.path("serve.toml")).expect("readable");
    fs::write(
        site.lab.path("serve.toml"),
        format!("connections = 1\n{text}"),
    )
    .expect("written");
    site.disk("source", 24 * MIB, 7);
    site.disk("far-target", 24 * MIB, 8);
    site.disk("far-source", MIB, 1);
    let server = site.serve();
    let (mut running, _lines) = site.begun(&format!("sync source {}", server.url("target")));

    let message = site.fails("near", &format!("sync {} here", server.url("source")), 8);

    assert!(message.contains("1 runs are under way"), "{message}");
    running.kill().expect("killed");
    running.wait().expect("ends");
    server.until("failed");
    site.must(&format!("sync {} here", server.url("source")));
}

#[test]
fn peers_that_prove_nothing_take_little_and_are_sent_away() {
    let site = Site::new();
    site.disk("far-source", MIB, 1);
    let server = site.serve();
    let before = server.peak();
    let begun = Instant::now();

    let silent: Vec<TcpStream> = (0..60)
        .map(|n: u32| {
            let mut socket = TcpStream::connect(("127.0.0.1", server.port)).expect("it listens");
            // Some say nothing, some begin a record that never ends, some talk of something else.
            let said: &[u8] = match n % 3 {
                0 => b"",
                1 => &[22, 3, 1, 64, 0, 1],
                _ => &[0x5a; 4096],
            };
            socket.write_all(said).ok();
            socket
        })
        .collect();
    let fetched = site.must(&format!("sync {} here", server.url("source")));
    assert_eq!(fetched["source_bytes"], MIB);
    for _ in 0..silent.len() {
        server.until("not admitted");
    }

    assert!(begun.elapsed() < SOON, "each has ten seconds");
    let more = server.peak().saturating_sub(before);
    assert!(
        more < 64 << 20,
        "60 strangers and one run took {more} bytes"
    );
}

/// Pieces of the keys of this site, which nothing must ever say.
fn canaries(site: &Site) -> Vec<String> {
    let mut canaries = Vec::new();
    for file in ["pki/ca.key", "pki/near/host.key", "pki/far/host.key"] {
        let key = fs::read_to_string(site.lab.path(file)).expect("readable");
        let body: Vec<&str> = key.lines().filter(|line| !line.starts_with('-')).collect();
        // Keys of one kind begin alike.
        let body = body.concat().split_off(48);
        canaries.extend(
            (0..body.len() - 12)
                .step_by(4)
                .map(|at| body[at..at + 12].to_owned()),
        );
    }
    canaries
}

#[test]
fn keys_are_in_no_log_error_or_argument() {
    let site = Site::new();
    site.disk("far-source", MIB, 1);
    let server = site.serve();
    let canaries = canaries(&site);
    assert!(canaries.len() > 60, "{canaries:?}");
    let mut said = String::new();
    let mut note = |output: Output| {
        said.push_str(&String::from_utf8_lossy(&output.stdout));
        said.push_str(&String::from_utf8_lossy(&output.stderr));
    };
    let line = format!("sync {} here -v", server.url("source"));
    note(site.run("near", &line));
    let key = site.lab.path("pki/near/host.key");
    let good = fs::read_to_string(&key).expect("readable");
    for damaged in [
        good.replace("BEGIN", "BEGUN"),
        good.replace('=', "!"),
        good[30..].to_owned(),
    ] {
        fs::write(&key, damaged).expect("written");
        note(site.run("near", &line));
    }
    fs::write(&key, &good).expect("written");
    for (file, line) in [
        (
            "pki/far/host.key",
            "serve --listen 127.0.0.1:0 --config serve.toml",
        ),
        ("pki/ca.key", "certs pki one-more"),
    ] {
        let key = site.lab.path(file);
        let good = fs::read_to_string(&key).expect("readable");
        fs::write(&key, &good[20..]).expect("written");
        let output = site.run("far", line);
        assert_eq!(code(&output), 2, "{line}: {}", text(&output.stderr));
        note(output);
        signal(&server.child, "-HUP");
        let outcome = match file.contains("far") {
            true => "configuration not read again: the old one stays",
            false => "configuration read again",
        };
        server.until(outcome);
        fs::write(&key, &good).expect("written");
    }
    let arguments = fs::read(format!("/proc/{}/cmdline", server.child.id())).expect("it lives");
    said.push_str(&String::from_utf8_lossy(&arguments));
    said.push_str(&server.said());

    for canary in canaries {
        assert!(!said.contains(&canary), "{canary}: {said}");
    }
}

#[test]
fn a_key_that_others_may_read_is_refused_on_both_sides() {
    use std::os::unix::fs::PermissionsExt;
    let site = Site::new();
    site.disk("far-source", MIB, 1);
    let server = site.serve();
    for host in ["near", "far"] {
        let key = site.lab.path("pki").join(host).join("host.key");
        fs::set_permissions(key, fs::Permissions::from_mode(0o640)).expect("changed");
    }

    let message = site.fails("near", &format!("sync {} here", server.url("source")), 2);
    assert!(message.contains("found mode 640"), "{message}");
    let message = site.fails("far", "serve --listen 127.0.0.1:0 --config serve.toml", 2);
    assert!(message.contains("found mode 640"), "{message}");
}

#[test]
fn certificates_are_made_once_and_never_overwritten() {
    let site = Site::new();
    let message = site.fails("near", "certs pki new near", 2);
    assert!(
        message.contains("pki/near is there already: nothing was made"),
        "{message}"
    );
    assert!(!site.lab.path("pki/new").exists());
    for wrong in ["../up", "a,b/c", "", "-x", "a,,b", ".", "a b"] {
        let output = site
            .lab
            .command(["certs", "pki", "--", wrong])
            .output()
            .expect("runs");
        assert_eq!(code(&output), 2, "{wrong:?}: {}", text(&output.stderr));
    }
}
