//! A guest that is handed over with its memory, by real machines without an operating system: whenever the command is killed,
//! one of both runs in the end, and no more than one at any time.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use blockferry::qemu::{Machine, MachineOptions};

use crate::lab::{Child, Lab, MIB, seeded, skipped, thorough, while_starting};
use crate::two_hosts::{FAR, Hosts, NEAR};

const PROGRAM: &str = "qemu-system-x86_64";
const COMPLETE: &str = "failover complete vm";

/// A machine and its replica, each in a directory of its own of a lab, started and stopped by one script.
struct Machines<'l> {
    lab: &'l Lab,
    /// What starts a program where the machine is.
    there: Vec<String>,
}

impl Drop for Machines<'_> {
    fn drop(&mut self) {
        for site in ["home", "away"] {
            self.script(&["stop", site]);
        }
    }
}

/// Says so where it is not.
fn is_installed(test: &str) -> bool {
    let asked = Command::new(PROGRAM).arg("--version").output();
    let is_installed = asked.is_ok_and(|answer| answer.status.success());
    if !is_installed {
        skipped(test, PROGRAM);
    }
    is_installed
}

impl<'l> Machines<'l> {
    /// A job whose machine is `there`, as its file says in these lines, and sends its memory as they say.
    fn new(lab: &'l Lab, there: Vec<String>, machine: &str, memory: &str) -> Self {
        for site in ["home", "away"] {
            fs::create_dir(lab.path(site)).expect("a directory");
        }
        let content = lab.disk("home/disk", 1, 8 * MIB);
        lab.edited("away/disk", 2, &content, 0.2);
        // What is to run says which machine it takes the place of, if any.
        let script = "#!/bin/sh\ncd \"$(dirname \"$0\")/$2\" || exit 1\n\
            if [ -e pid ]; then pid=\"$(cat pid)\"; kill -9 \"$pid\" 2>/dev/null\n\
            while kill -0 \"$pid\" 2>/dev/null; do sleep 0.02; done; rm -f pid; fi\n\
            [ \"$1\" = stop ] && exit 0\n\
            disk=${BLOCKFERRY_DISK_0_OVERLAY:-$PWD/disk}\n\
            driver=raw; [ -n \"$BLOCKFERRY_DISK_0_OVERLAY\" ] && driver=qcow2\n\
            set --; [ \"$BLOCKFERRY_HAND_OVER\" = warm ] && set -- -incoming defer\n\
            exec qemu-system-x86_64 -accel tcg -machine q35 -m 64 -nodefaults -display none -daemonize -pidfile pid \
            -blockdev driver=$driver,node-name=disk,file.driver=file,file.filename=\"$disk\" \
            -device virtio-blk-pci,drive=disk -qmp unix:qmp,server=on,wait=off -qmp unix:own,server=on,wait=off \"$@\" 2>log\n";
        fs::write(lab.path("machine.sh"), script).expect("written");
        let path = |name: &str| lab.path(name).display().to_string();
        fs::create_dir(lab.path("keys")).expect("a directory");
        fs::write(lab.path("keys/keys.psk"), "qemu:0123456789abcdef\n").expect("written");
        let keys = format!("memory-tls = \"{}\"\n", path("keys"));
        let hooks = |site: &str| {
            ["start", "stop"].map(|verb| {
                let script = path("machine.sh");
                format!("{verb}-target = [\"sh\", \"{script}\", \"{verb}\", \"{site}\"]\n")
            })
        };
        let job = format!(
            "name = \"vm\"\nhand-over = \"warm\"\ndowntime-budget = \"20s\"\n[machine]\n{machine}{keys}qmp = \"{}\"\n\
             [[disk]]\nnode = \"disk\"\ntarget = \"{}\"\n[hooks]\n{}\
             [reverse.machine]\n{memory}{keys}qmp = \"{}\"\n[[reverse.disk]]\nnode = \"disk\"\ntarget = \"{}\"\n[reverse.hooks]\n{}",
            path("home/qmp"),
            path("away/disk"),
            hooks("away").concat(),
            path("away/qmp"),
            path("home/disk"),
            hooks("home").concat()
        );
        fs::write(lab.path("vm.toml"), job).expect("written");
        let machines = Self { lab, there };
        machines.script(&["start", "home"]);
        machines
    }

    fn script(&self, words: &[&str]) {
        let program = self.there.iter().map(String::as_str).chain(["sh"]);
        let mut words_before = program.collect::<Vec<_>>().into_iter();
        let mut command = Command::new(words_before.next().unwrap_or("sh"));
        command.args(words_before);
        command.arg(self.lab.path("machine.sh")).args(words);
        let status = while_starting(|| command.status()).expect("sh");
        assert!(status.success(), "{words:?}");
    }

    /// Whether the guest of a site runs; nothing where there is no machine.
    fn runs(&self, site: &str) -> Option<bool> {
        let options = MachineOptions::new(
            self.lab.path(&format!("{site}/own")),
            "look",
            self.lab.root(),
        );
        let mut machine = Machine::open(&options).ok()?;
        machine.is_running().ok()?
    }

    /// Whether the machine of a site has files open that were removed, which keep their space.
    fn keeps_removed_files(&self, site: &str) -> bool {
        let pid =
            fs::read_to_string(self.lab.path(&format!("{site}/pid"))).expect("it was started");
        let open = fs::read_dir(format!("/proc/{}/fd", pid.trim())).expect("it runs");
        let mut files = open.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        files.any(|file| file.to_string_lossy().ends_with(".merged (deleted)"))
    }

    fn state(&self) -> String {
        let status = self.lab.must("failover status vm");
        let state = status.summary()["state"].as_str();
        state.expect("a state").to_owned()
    }
}

#[test]
fn a_guest_that_is_handed_over_runs_in_one_machine_whenever_the_command_is_killed() {
    let name = "a_guest_that_is_handed_over_runs_in_one_machine_whenever_the_command_is_killed";
    if !is_installed(name) {
        return;
    }
    let lab = &Lab::new();
    let machines = Machines::new(lab, Vec::new(), "", "");
    let mut random = seeded(name);
    let mut states = Vec::new();
    let rounds = if thorough() { 12 } else { 5 };
    for round in 0..rounds {
        lab.must("failover start vm.toml --until ready");
        let mut cutover = lab.start(COMPLETE);
        let (reached, within_ms) =
            [("quiescing", 200), ("last-pass", 20), ("starting", 20)][round % 3];
        assert!(cutover.wait_for(|line| line["state"] == reached));
        let killed_at = Instant::now() + Duration::from_millis(random.below(within_ms));
        while Instant::now() < killed_at {
            let both = machines.runs("away") == Some(true) && machines.runs("home") == Some(true);
            assert!(!both, "both machines run");
            thread::sleep(Duration::from_millis(1));
        }
        let code = cutover.kill().code;
        let state = machines.state();
        states.push(format!("{state}, {code:?}"));

        // It goes on, or begins again.
        if !["fencing", "starting", "commit-pending"].contains(&state.as_str()) {
            lab.must("failover start vm.toml --until ready");
            assert_eq!(machines.runs("home"), Some(true), "{states:?}");
        }
        lab.must(COMPLETE);

        assert_eq!(machines.runs("away"), Some(true), "{states:?}");
        assert_eq!(machines.runs("home"), Some(false), "{states:?}");
        lab.must("failover rollback vm");
        assert_eq!(machines.runs("home"), Some(true), "{states:?}");
        assert_eq!(machines.runs("away"), None, "{states:?}");
    }
    #[expect(clippy::print_stderr, reason = "where the kills landed")]
    {
        eprintln!("killed at {states:?}");
    }

    // There, committed while it runs, and back again.
    lab.must("failover start vm.toml --until ready");
    lab.must(COMPLETE);
    lab.must("failover commit vm --live --release-source");
    assert_eq!(machines.runs("home"), None);
    assert!(!machines.keeps_removed_files("away"));
    lab.must("failover reverse vm --until ready");
    lab.must(COMPLETE);
    assert_eq!(machines.runs("home"), Some(true));
    assert_eq!(machines.runs("away"), Some(false));
    lab.must("failover commit vm --live --release-source");
    assert_eq!(machines.runs("home"), Some(true));

    // And there once more by the same file, though the disk is another node now.
    lab.must("failover start vm.toml --until ready");
    lab.must(COMPLETE);
    assert_eq!(machines.runs("away"), Some(true));
    assert_eq!(machines.runs("home"), Some(false));
}

#[test]
fn a_guest_of_another_host_is_handed_over_or_goes_on_there_whenever_the_way_is_cut() {
    let name = "a_guest_of_another_host_is_handed_over_or_goes_on_there_whenever_the_way_is_cut";
    if !is_installed(name) {
        return;
    }
    let Some(hosts) = Hosts::new("warm") else {
        return skipped(name, "root, namespaces and sshd");
    };
    let machine = format!("host = \"{FAR}\"\n");
    let memory = format!("memory = \"tcp:{NEAR}:4444\"\n");
    let machines = Machines::new(&hosts.lab, hosts.there_on_far(), &machine, &memory);
    let start = |line: &str| Child::start(&mut hosts.command_behind(&[], line));
    let must = |line: &str| {
        let answer = start(line).finish();
        assert_eq!(answer.code, Some(0), "{line}: {answer:#?}");
    };
    let mut random = seeded(name);
    let mut states = Vec::new();
    for round in 0..4 {
        must("failover start vm.toml --until ready");
        let mut cutover = start(COMPLETE);
        let (reached, within_ms) = [
            ("quiescing", 200),
            ("last-pass", 20),
            ("fencing", 1),
            ("starting", 1),
        ][round];
        assert!(cutover.wait_for(|line| line["state"] == reached));
        thread::sleep(Duration::from_millis(random.below(within_ms)));
        hosts.kill("serve\0--stdio");
        let code = cutover.finish().code;
        let state = machines.state();
        states.push(format!("{state}, {code:?}"));
        let both = (machines.runs("home"), machines.runs("away"));
        assert_ne!(both, (Some(true), Some(true)), "{states:?}");

        if !["fencing", "starting", "commit-pending"].contains(&state.as_str()) {
            must("failover start vm.toml --until ready");
            assert_eq!(machines.runs("home"), Some(true), "{states:?}");
        }
        must(COMPLETE);

        assert_eq!(machines.runs("away"), Some(true), "{states:?}");
        assert_eq!(machines.runs("home"), Some(false), "{states:?}");
        must("failover rollback vm");
        assert_eq!(machines.runs("home"), Some(true), "{states:?}");
        assert_eq!(machines.runs("away"), None, "{states:?}");
    }
    #[expect(clippy::print_stderr, reason = "where the cuts landed")]
    {
        eprintln!("cut at {states:?}");
    }
}
