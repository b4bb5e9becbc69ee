//! A guest that is handed over with its memory, by real machines without an operating system: whenever the command is killed,
//! one of both runs in the end, and no more than one at any time.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use blockferry::qemu::{Machine, MachineOptions};

use crate::lab::{Lab, MIB, seeded, skipped, while_starting};

const PROGRAM: &str = "qemu-system-x86_64";
const COMPLETE: &str = "failover complete vm";

/// A machine and its replica, each in a directory of its own, started and stopped by one script.
struct Machines {
    lab: Lab,
}

impl Drop for Machines {
    fn drop(&mut self) {
        for site in ["home", "away"] {
            self.script(&["stop", site]);
        }
    }
}

impl Machines {
    fn new(test: &str) -> Option<Self> {
        let asked = Command::new(PROGRAM).arg("--version").output();
        if !asked.is_ok_and(|answer| answer.status.success()) {
            skipped(test, PROGRAM);
            return None;
        }
        let lab = Lab::new();
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
        let hooks = |site: &str| {
            ["start", "stop"].map(|verb| {
                let script = path("machine.sh");
                format!("{verb}-target = [\"sh\", \"{script}\", \"{verb}\", \"{site}\"]\n")
            })
        };
        let job = format!(
            "name = \"vm\"\nhand-over = \"warm\"\ndowntime-budget = \"20s\"\n[machine]\nqmp = \"{}\"\n\
             [[disk]]\nnode = \"disk\"\ntarget = \"{}\"\n[hooks]\n{}\
             [reverse.machine]\nqmp = \"{}\"\n[[reverse.disk]]\nnode = \"disk\"\ntarget = \"{}\"\n[reverse.hooks]\n{}",
            path("home/qmp"),
            path("away/disk"),
            hooks("away").concat(),
            path("away/qmp"),
            path("home/disk"),
            hooks("home").concat()
        );
        fs::write(lab.path("vm.toml"), job).expect("written");
        let machines = Self { lab };
        machines.script(&["start", "home"]);
        Some(machines)
    }

    fn script(&self, words: &[&str]) {
        let mut command = Command::new("sh");
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

    fn state(&self) -> String {
        let status = self.lab.must("failover status vm");
        let state = status.summary()["state"].as_str();
        state.expect("a state").to_owned()
    }
}

#[test]
fn a_guest_that_is_handed_over_runs_in_one_machine_whenever_the_command_is_killed() {
    let name = "a_guest_that_is_handed_over_runs_in_one_machine_whenever_the_command_is_killed";
    let Some(machines) = Machines::new(name) else {
        return;
    };
    let lab = &machines.lab;
    let mut random = seeded(name);
    let mut states = Vec::new();
    for round in 0..8 {
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
    lab.must("failover reverse vm --until ready");
    lab.must(COMPLETE);
    assert_eq!(machines.runs("home"), Some(true));
    assert_eq!(machines.runs("away"), Some(false));
    lab.must("failover commit vm --live --release-source");
    assert_eq!(machines.runs("home"), Some(true));
}
