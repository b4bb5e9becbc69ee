//! Two network namespaces with a cable between them, a real sshd or a server in one and the command in the other: push,
//! pull, a cable that is pulled and put back, a far end that is killed, a connection that is reset.

use std::fs;
use std::process::Command;
use std::time::Duration;

use blockferry_testkit::Random;
use serde_json::Value;

use crate::lab::{Answer, Child, Lab, MIB, output, seeded, skipped, thorough, tool};

pub(crate) const NEAR: &str = "10.111.0.1";
pub(crate) const FAR: &str = "10.111.0.2";

/// Two hosts that share nothing but a cable, and the disks of this test.
pub(crate) struct Hosts {
    pub(crate) lab: Lab,
    near: String,
    far: String,
    sshd: std::process::Child,
    /// Of the near host, where a test began it.
    near_sshd: Option<std::process::Child>,
    shell: String,
}

impl Hosts {
    /// `None` where there is no root, no sshd or no namespaces.
    pub(crate) fn new(name: &str) -> Option<Self> {
        let lab = Lab::new();
        let id = std::process::id();
        let (near, far) = (
            format!("bf-{name}-near-{id}"),
            format!("bf-{name}-far-{id}"),
        );
        let cabled = connect(&near, &far);
        let sshd = cabled.and_then(|()| start_sshd(&lab, &far, FAR, "far-state-root"));
        let Some((sshd, shell)) = sshd else {
            remove(&near, &far);
            return None;
        };
        Some(Self {
            lab,
            near,
            far,
            sshd,
            near_sshd: None,
            shell,
        })
    }

    /// For a test of the long mode: `None` outside of it as well.
    fn thorough(name: &str) -> Option<Self> {
        thorough().then(|| Self::new(name)).flatten()
    }

    /// The command on the near host, in JSON.
    fn command(&self, line: &str) -> Command {
        self.command_behind(&[], line)
    }

    /// The same, started by another program with these arguments.
    pub(crate) fn command_behind(&self, before: &[&str], line: &str) -> Command {
        self.command_on(&self.near, before, line)
    }

    /// What starts a program on the far host.
    pub(crate) fn there_on_far(&self) -> Vec<String> {
        ["ip", "netns", "exec", &self.far]
            .map(str::to_owned)
            .to_vec()
    }

    /// The command on the far host, for which the near one is another.
    pub(crate) fn far_command(&mut self, line: &str) -> Command {
        if self.near_sshd.is_none() {
            let started = start_sshd(&self.lab, &self.near, NEAR, "state-root");
            self.near_sshd = Some(started.expect("the other one started").0);
        }
        let mut command = self.command_on(&self.far, &[], line);
        command.env("BLOCKFERRY_STATE_ROOT", self.lab.path("far-state-root"));
        command
    }

    fn command_on(&self, host: &str, before: &[&str], line: &str) -> Command {
        let near = self.lab.command(line);
        let mut command = crate::lab::command_of(self.lab.root(), "ip");
        command
            .args(["netns", "exec", host])
            .args(before)
            .arg(near.get_program())
            .args(near.get_args())
            .arg("--remote-path")
            .arg(near.get_program())
            .arg("--json")
            .env("BLOCKFERRY_RSH", &self.shell);
        command
    }

    #[track_caller]
    fn must(&self, line: &str) -> Answer {
        let answer = Child::start(&mut self.command(line)).finish();
        assert_eq!(answer.code, Some(0), "{line}: {answer:#?}");
        answer
    }

    /// The other host's name for a disk of this test.
    fn there(&self, disk: &str) -> String {
        format!("{FAR}:{}", self.lab.path(disk).display())
    }

    /// A server of the far host that has its disk `far`; one that was there is killed.
    fn serve(&self) -> Child {
        let pki = self.lab.path("pki");
        if !pki.exists() {
            let made =
                output(&mut self.lab.command(&format!("certs pki near {FAR}"))).expect("runs");
            assert!(made.status.success(), "{made:?}");
        }
        let config = format!(
            "certs = \"{}\"\n[exports.disk]\npath = \"{}\"\nread = [\"near\"]\nwrite = [\"near\"]\n",
            pki.join(FAR).display(),
            self.lab.path("far").display()
        );
        fs::write(self.lab.path("serve.toml"), config).expect("written");
        self.kill("serve\0--listen");
        let near = self
            .lab
            .command(&format!("serve --listen {FAR} --config serve.toml --json"));
        let mut command = crate::lab::command_of(self.lab.root(), "ip");
        command
            .args(["netns", "exec", &self.far])
            .arg(near.get_program())
            .args(near.get_args())
            .env("BLOCKFERRY_STATE_ROOT", self.lab.path("far-state-root"));
        // The one that was killed may have the port as long as one of its threads ends its last call.
        for _ in 0..50 {
            let mut server = Child::start(&mut command);
            if server.wait_for(|line| line["message"] == "listening") {
                return server;
            }
            let answer = server.finish();
            let told = format!("{answer:#?}");
            assert!(told.contains("Address already in use"), "{told}");
            std::thread::sleep(Duration::from_millis(200));
        }
        panic!("the port stays in use");
    }

    pub(crate) fn cable(&self, state: &str) {
        tool(&["ip", "-n", &self.near, "link", "set", "cable", state]).expect("the cable is there");
    }

    /// Pulls it and puts it back, at random; 20 times in the long mode.
    pub(crate) fn pull_cable(&self, random: &mut Random) {
        for _ in 0..if thorough() { 20 } else { 3 } {
            self.cable("down");
            pause(random, 400);
            self.cable("up");
            pause(random, 200);
        }
    }

    /// Kills the far end's blockferry, or all that sshd started.
    pub(crate) fn kill(&self, what: &str) {
        let processes = tool(&["ip", "netns", "pids", &self.far]).expect("the namespace is there");
        for id in processes.split_whitespace() {
            let words = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words);
            let is_listener = id == self.sshd.id().to_string();
            if !is_listener && !words.starts_with("sh\0") && words.contains(what) {
                tool(&["kill", "-9", id]);
            }
        }
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for sshd in std::iter::once(&mut self.sshd).chain(&mut self.near_sshd) {
            sshd.kill().ok();
            sshd.wait().ok();
        }
        self.kill("");
        remove(&self.near, &self.far);
    }
}

fn connect(near: &str, far: &str) -> Option<()> {
    for name in [near, far] {
        tool(&["ip", "netns", "add", name])?;
        tool(&["ip", "-n", name, "link", "set", "lo", "up"])?;
    }
    let cable = ["ip", "link", "add", "cable", "netns", near, "type", "veth"];
    tool(&[&cable[..], &["peer", "name", "cable", "netns", far]].concat())?;
    for (name, address) in [(near, "10.111.0.1/24"), (far, "10.111.0.2/24")] {
        tool(&["ip", "-n", name, "address", "add", address, "dev", "cable"])?;
        tool(&["ip", "-n", name, "link", "set", "cable", "up"])?;
    }
    Some(())
}

fn remove(near: &str, far: &str) {
    for name in [near, far] {
        tool(&["ip", "netns", "delete", name]);
    }
}

/// An sshd that knows one key, and the remote shell that has it.
fn start_sshd(
    lab: &Lab,
    host: &str,
    address: &str,
    state_root: &str,
) -> Option<(std::process::Child, String)> {
    let sshd = tool(&["sh", "-c", "command -v sshd"])?;
    let path = |name: &str| lab.path(name).display().to_string();
    for key in ["host-key", "user-key"] {
        if lab.path(key).exists() {
            continue;
        }
        tool(&[
            "ssh-keygen",
            "-q",
            "-t",
            "ed25519",
            "-N",
            "",
            "-f",
            &path(key),
        ])?;
    }
    let config = format!(
        "ListenAddress {address}\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n\
         PidFile none\nSetEnv BLOCKFERRY_STATE_ROOT={}\n",
        path("host-key"),
        path("user-key.pub"),
        path(state_root),
    );
    let config_path = format!("sshd-config-{address}");
    fs::write(lab.path(&config_path), config).expect("written");
    // What it parts its privileges in; a package makes it when the service starts.
    fs::create_dir_all("/run/sshd").ok()?;
    let log = lab.path(&format!("sshd-log-{address}"));
    let mut daemon = Command::new("ip")
        .args([
            "netns",
            "exec",
            host,
            sshd.trim(),
            "-D",
            "-e",
            "-f",
            &path(&config_path),
        ])
        .stderr(fs::File::create(&log).expect("created"))
        .spawn()
        .ok()?;
    while !fs::read_to_string(&log).is_ok_and(|told| told.contains("Server listening")) {
        let ended = daemon.try_wait().expect("it is our child");
        assert_eq!(ended, None, "{:?}", fs::read_to_string(&log));
        std::thread::sleep(Duration::from_millis(20));
    }
    let shell = format!(
        "ssh -F none -i {} -o BatchMode=yes -o StrictHostKeyChecking=no -o LogLevel=ERROR -o UserKnownHostsFile={}",
        path("user-key"),
        path("known-hosts")
    );
    Some((daemon, shell))
}

/// From where to where, and the line that does it; `there` is the disk `far`.
fn between(push: bool, there: &str) -> (&'static str, &'static str, String) {
    if push {
        ("near", "far", format!("sync near {there}"))
    } else {
        ("far", "near", format!("sync {there} near"))
    }
}

/// A run that something of is durable, and that is not over soon.
fn under_way(hosts: &Hosts, line: &str, rate: &str) -> Child {
    let line = format!("{line} --bwlimit {rate} --mode delta --strategy redo");
    let mut run = Child::start(&mut hosts.command(&line));
    let checkpoint = |line: &Value| line["event"] == "checkpoint";
    assert!(run.wait_for(checkpoint), "{:#?}", run.finish());
    run
}

/// A run that is disturbed while it is under way, and comes to its end all the same.
fn disturbed(hosts: &Hosts, line: &str, mut disturb: impl FnMut()) -> Answer {
    // Longer than all that disturbs it.
    let rate = if thorough() { "1M" } else { "6M" };
    let run = under_way(hosts, line, rate);
    disturb();
    let answer = run.finish();
    assert_eq!(answer.code, Some(0), "{line}: {answer:#?}");
    assert_eq!(answer.count("restaged_bytes"), 0, "{answer:#?}");
    answer
}

pub(crate) fn reconnected(answer: &Answer) -> usize {
    let again = |line: &&Value| line["code"] == "reconnecting";
    answer.lines.iter().filter(again).count()
}

fn pause(random: &mut Random, most: u64) {
    std::thread::sleep(Duration::from_millis(50 + random.below(most)));
}

#[test]
fn two_hosts_push_and_pull_over_ssh() {
    let Some(hosts) = Hosts::new("plain") else {
        return skipped(
            "two_hosts_push_and_pull_over_ssh",
            "root, namespaces and sshd",
        );
    };
    let old = hosts.lab.disk("far-disk", 81, 48 * MIB);
    let new = hosts.lab.edited("near-disk", 82, &old, 0.05);

    let pushed = hosts.must(&format!("sync near-disk {}", hosts.there("far-disk")));
    hosts.lab.assert_holds("far-disk", &new);
    let (changed, sent) = (pushed.count("changed_bytes"), pushed.count("sent_bytes"));
    assert!(
        sent < changed + changed / 20 + 100_000,
        "{changed} changed, {sent} sent"
    );

    let pulled = hosts.must(&format!("sync {} back", hosts.there("far-disk")));
    hosts.lab.assert_holds("back", &new);
    assert_eq!(
        pulled.summary()["source_root"],
        pushed.summary()["target_root"]
    );
}

#[test]
fn a_cable_that_is_pulled_a_far_end_that_is_killed_and_a_connection_that_is_reset_cost_nothing_durable()
 {
    let Some(hosts) = Hosts::new("cable") else {
        let name = "a_cable_that_is_pulled_a_far_end_that_is_killed_and_a_connection_that_is_reset_cost_nothing_durable";
        return skipped(name, "root, namespaces and sshd");
    };
    let mut random = seeded("a_cable_that_is_pulled");
    for push in [true, false] {
        let (from, to, line) = between(push, &hosts.there("far"));
        let old = hosts.lab.disk(to, 83, 64 * MIB);
        let new = hosts.lab.edited(from, 84, &old, 0.4);

        let answer = disturbed(&hosts, &line, || {
            hosts.pull_cable(&mut random);
            hosts.kill("serve\0--stdio");
        });

        assert!(reconnected(&answer) >= 1, "{answer:#?}");
        assert!(answer.count("resumed_bytes") > 0, "{answer:#?}");
        hosts.lab.assert_holds(to, &new);

        let newer = hosts.lab.edited(from, 85, &new, 0.4);
        let answer = disturbed(&hosts, &line, || hosts.kill("sshd"));

        assert!(reconnected(&answer) >= 1, "{answer:#?}");
        hosts.lab.assert_holds(to, &newer);
    }
}

#[test]
fn two_hosts_push_and_pull_over_tls_whatever_becomes_of_cable_and_server() {
    let name = "two_hosts_push_and_pull_over_tls_whatever_becomes_of_cable_and_server";
    let Some(hosts) = Hosts::new("tls") else {
        return skipped(name, "root, namespaces and sshd");
    };
    let mut random = seeded(name);
    let mut server = hosts.serve();
    let mut old = hosts.lab.disk("far", 89, 64 * MIB);
    for push in [true, false] {
        let (from, to, line) = between(push, &format!("blockferry://{FAR}/disk"));
        let line = format!("{line} --certs pki/near");
        let new = hosts.lab.edited(from, 90 + u64::from(push), &old, 0.4);

        let answer = disturbed(&hosts, &line, || {
            hosts.pull_cable(&mut random);
            server = hosts.serve();
        });

        assert!(reconnected(&answer) >= 1, "{answer:#?}");
        assert!(answer.count("resumed_bytes") > 0, "{answer:#?}");
        hosts.lab.assert_holds(to, &new);
        old = new;
    }
    drop(server);
}

/// Longer than either side waits for a sign of life.
#[test]
fn a_cable_that_stays_away_is_given_up_and_found_again() {
    let Some(hosts) = Hosts::thorough("away") else {
        return skipped(
            "a_cable_that_stays_away_is_given_up_and_found_again",
            "root, namespaces, sshd and BLOCKFERRY_TEST_LONG",
        );
    };
    let old = hosts.lab.disk("far", 86, 64 * MIB);
    let new = hosts.lab.edited("near", 87, &old, 0.4);
    let line = format!("sync near {}", hosts.there("far"));

    let answer = disturbed(&hosts, &line, || {
        hosts.cable("down");
        std::thread::sleep(Duration::from_secs(45));
        hosts.cable("up");
    });

    assert!(reconnected(&answer) >= 1, "{answer:#?}");
    hosts.lab.assert_holds("far", &new);
}

/// The workloads of the benches, both ways, over ssh and TLS: the cable is pulled at random and the target's side killed.
#[test]
#[expect(clippy::print_stdout, reason = "a count to read")]
fn disks_of_4_gib_arrive_whatever_becomes_of_cable_and_target_host() {
    let name = "disks_of_4_gib_arrive_whatever_becomes_of_cable_and_target_host";
    let Some(hosts) = Hosts::thorough("large") else {
        return skipped(name, "root, namespaces, sshd and BLOCKFERRY_TEST_LONG");
    };
    let mut random = seeded(name);
    let images = hosts.lab.path("images").display().to_string();
    let builder = concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/images");
    tool(&[builder, &images, "--size", "4G"]).expect("images can be built");
    // Rates at which a run lasts longer than what disturbs it.
    for (workload, rate) in [("new_a.img", "6M"), ("new_b.img", "40M")] {
        for (over_tls, push) in [(false, true), (false, false), (true, true), (true, false)] {
            let there = match over_tls {
                true => format!("blockferry://{FAR}/disk"),
                false => hosts.there("far"),
            };
            let (from, to, line) = between(push, &there);
            let line = format!("{line}{}", if over_tls { " --certs pki/near" } else { "" });
            for (image, disk) in [(workload, from), ("old.img", to)] {
                let image = format!("{images}/{image}");
                let disk = hosts.lab.path(disk).display().to_string();
                tool(&["cp", "--sparse=always", &image, &disk]).expect("there is room");
            }
            let mut server = over_tls.then(|| hosts.serve());

            let run = under_way(&hosts, &line, rate);
            hosts.pull_cable(&mut random);
            let answer = if push {
                match &mut server {
                    Some(server) => *server = hosts.serve(),
                    None => hosts.kill("serve\0--stdio"),
                }
                let answer = run.finish();
                assert_eq!(answer.code, Some(0), "{line}: {answer:#?}");
                assert!(reconnected(&answer) >= 1, "{answer:#?}");
                answer
            } else {
                let killed = run.kill();
                assert_eq!(killed.code, None, "it was over already: {killed:#?}");
                hosts.must(&format!("{line} --mode delta --strategy redo"))
            };

            println!(
                "{workload}, {}, {}: {} resumed, {} durable bytes staged again, {} connections lost",
                if over_tls { "TLS" } else { "ssh" },
                if push { "push" } else { "pull" },
                answer.count("resumed_bytes"),
                answer.count("restaged_bytes"),
                reconnected(&answer)
            );
            assert!(answer.count("resumed_bytes") > 0, "{answer:#?}");
            assert_eq!(answer.count("restaged_bytes"), 0, "{answer:#?}");
            let disks = [from, to].map(|disk| hosts.lab.path(disk).display().to_string());
            assert!(tool(&["cmp", &disks[0], &disks[1]]).is_some(), "{line}");
        }
    }
}

/// A key that is not known there, or a host that is not there, is an answer and not a puzzle.
#[test]
fn a_host_that_does_not_let_us_in_or_is_not_there_is_said_to_be_so() {
    let Some(hosts) = Hosts::new("shut") else {
        let name = "a_host_that_does_not_let_us_in_or_is_not_there_is_said_to_be_so";
        return skipped(name, "root, namespaces and sshd");
    };
    hosts.lab.disk("disk", 88, MIB);
    let stranger = hosts.lab.path("stranger");
    let key = stranger.display().to_string();
    tool(&["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", &key]).expect("a key");
    for (shell, host) in [
        (hosts.shell.replace("user-key", "stranger"), FAR),
        (format!("{} -o ConnectTimeout=1", hosts.shell), "10.111.0.9"),
    ] {
        let line = format!("sync disk {host}:{}", hosts.lab.path("target").display());
        let output = output(hosts.command(&line).env("BLOCKFERRY_RSH", shell)).expect("runs");

        let told = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(8), "{told}");
        assert!(told.contains("could not log in"), "{told}");
        assert!(
            told.contains("\"type\":\"remote\""),
            "what ssh says is shown: {told}"
        );
        assert!(!hosts.lab.path("target").exists());
    }
}
