//! Jobs whose machine is on another host, behind a cable that is pulled: the way between them is lost while passes are copied,
//! and in the cutover. What belongs to the other host is not to be seen from where the job runs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::{Duration, Instant};

use blockferry::nbd::{NbdAddress, NbdDevice, NbdOptions};
use blockferry_testkit::{StorageDaemon, Writer};

use crate::failover::{OFTEN, SELDOM, changed, replica_of, warnings, writer};
use crate::lab::{Answer, Child, MIB, seeded, skipped, while_starting, with_files};
use crate::two_hosts::{FAR, Hosts, NEAR, reconnected};

const BYTES: u64 = 12 * MIB;
const START: &str = "failover start web.toml";
const READY: &str = "failover start web.toml --until ready";
const COMPLETE: &str = "failover complete web";
/// How often a cutover that does not fit its budget is asked for again.
const TRIES: u32 = 20;
/// Hides a directory from the command that follows.
const HIDING: &str = "mount -t tmpfs none \"$0\" && exec \"$@\"";

/// A job on the near host, whose machine is on the far one.
struct FarJob {
    daemon: StorageDaemon,
    hosts: Hosts,
    far: String,
}

impl FarJob {
    fn new(name: &str, test: &str) -> Option<Self> {
        if !StorageDaemon::is_installed() {
            skipped(test, "qemu-storage-daemon");
            return None;
        }
        let Some(hosts) = Hosts::new(name) else {
            skipped(test, "root, namespaces and sshd");
            return None;
        };
        let lab = &hosts.lab;
        fs::create_dir(lab.path("far")).expect("a directory");
        for (disk, seed) in [("far/disk0", 1), ("far/disk1", 2)] {
            lab.disk(disk, seed, BYTES);
        }
        // One replica begins with something older, the other with nothing.
        lab.disk("replica0", 3, BYTES);
        let far = lab.path("far");
        let daemon = while_starting(|| StorageDaemon::start(&far, "raw")).expect("a daemon");
        let far = far.display().to_string();
        let job = format!(
            "name = \"web\"\ndowntime-budget = \"5s\"\nrefresh = \"50ms\"\n\
             [machine]\nhost = \"{FAR}\"\nqmp = \"{far}/qmp\"\nnbd = \"{far}/nbd\"\nscripts = \"{far}/scripts.json\"\n\
             [[disk]]\nnode = \"disk0\"\ntarget = \"{0}/replica0\"\nwriters = [\"w-disk0\"]\n\
             [[disk]]\nnode = \"disk1\"\ntarget = \"{0}/replica1\"\nwriters = [\"w-disk1\"]\n",
            lab.root().display()
        );
        fs::write(lab.path("web.toml"), job).expect("written");
        let file = |name: &str, text: &str, mode: u32| {
            let path = lab.path("far").join(name);
            fs::write(&path, text).expect("written");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("set");
        };
        // Comes to rest slowly when that is asked for.
        let slow = format!("#!/bin/sh\nif [ -e {far}/slow ]; then sleep 2; fi\n");
        file("pre", &slow, 0o700);
        file("post", "#!/bin/sh\n", 0o700);
        let scripts = format!(
            r#"{{"preScriptLocation": "{far}/pre", "postScriptLocation": "{far}/post", "timeoutInSeconds": 30,
            "continueBackupOnFailure": false, "fsFreezeEnabled": false}}"#
        );
        file("scripts.json", &scripts, 0o600);
        Some(Self { daemon, hosts, far })
    }

    /// Starts the command where the job is, which sees nothing of the other host's files.
    fn start(&self, line: &str) -> Child {
        let hiding = ["unshare", "--mount", "sh", "-c", HIDING, &self.far];
        Child::start(&mut self.hosts.command_behind(&hiding, line))
    }

    #[track_caller]
    fn must(&self, line: &str) -> Answer {
        let answer = self.start(line).finish();
        assert_eq!(answer.code, Some(0), "{line}: {answer:#?}");
        answer
    }

    /// On the other host, for which this one is another.
    #[track_caller]
    fn far(&mut self, line: &str) -> Answer {
        let answer = Child::start(&mut self.hosts.far_command(line)).finish();
        assert_eq!(answer.code, Some(0), "{line}: {answer:#?}");
        answer
    }

    /// Asks a job that `run` works on to cut over, again where that would not fit its budget, until it is in this state.
    fn cut_over_until(&self, run: &mut Child, state: &str) -> Child {
        for _ in 0..TRIES {
            let asking = self.start(COMPLETE);
            let mut is_reached = false;
            let answered = run.wait_for(|line| {
                is_reached = line["event"] == "state" && line["state"] == state;
                is_reached || line["code"] == "cutover_failed"
            });
            assert!(answered, "it ended before it was {state}");
            if is_reached {
                return asking;
            }
            let refused = asking.finish();
            assert!(refused.complaint().contains("budget"), "{refused:#?}");
        }
        panic!("no cutover fits its budget");
    }

    fn contents(&self, names: [&str; 2]) -> Vec<Vec<u8>> {
        let read = |name: &str| with_files(|| fs::read(self.hosts.lab.path(name))).expect("read");
        names.map(read).to_vec()
    }

    fn replicas(&self) -> Vec<Vec<u8>> {
        self.contents(["replica0", "replica1"])
    }

    fn writer(&self, seed: u64) -> Writer {
        let disks = self.contents(["far/disk0", "far/disk1"]);
        writer(&self.daemon.path("nbd"), disks, OFTEN, seed)
    }

    fn state(&self) -> String {
        let status = self.must("failover status web");
        let state = status.summary()["state"].as_str();
        state.expect("a state").to_owned()
    }

    /// The source waits for the job, though nobody is connected to it any more: what would write it cannot.
    #[track_caller]
    fn assert_stands_still(&self, why: &str) {
        // Longer than the end of a connection takes to be seen.
        thread::sleep(Duration::from_millis(700));
        for export in ["w-disk0", "w-disk1"] {
            let address = NbdAddress::unix(self.daemon.path("nbd"), export).expect("fits");
            let opened = NbdDevice::open_target(&address, &NbdOptions::default());
            assert!(opened.is_err(), "{why}: the source runs beside its replica");
        }
    }

    /// The source runs: what writes it can do so.
    fn assert_runs(&self, why: &str) {
        let writer = self.writer(1);
        thread::sleep(Duration::from_millis(20));
        assert!(
            writer.stop().unsure.is_none(),
            "{why}: the source does not run"
        );
    }

    fn slowly(&self, slowly: bool) {
        let slow = self.hosts.lab.path("far/slow");
        match slowly {
            true => fs::write(slow, "").expect("written"),
            false => fs::remove_file(slow).expect("removed"),
        }
    }
}

/// The next pass that is copied.
fn wait_for_passes(run: &mut Child, count: usize) {
    for _ in 0..count {
        assert!(run.wait_for(|line| line["event"] == "pass"), "it ended");
    }
}

/// Cuts over. On a machine that is busy the last pass may not fit its budget: then it is asked again.
#[track_caller]
fn completed(mut complete: impl FnMut() -> Answer) {
    for _ in 0..TRIES {
        let answer = complete();
        if answer.code == Some(0) {
            return;
        }
        assert!(answer.complaint().contains("budget"), "{answer:#?}");
    }
    panic!("no cutover fits its budget");
}

#[test]
fn a_machine_on_another_host_comes_over_though_the_way_is_lost_in_passes_and_in_the_cutover() {
    let name =
        "a_machine_on_another_host_comes_over_though_the_way_is_lost_in_passes_and_in_the_cutover";
    let Some(job) = FarJob::new("job", name) else {
        return;
    };
    let mut random = seeded(name);
    let before = with_files(|| fs::read(job.hosts.lab.path("replica0"))).expect("read");
    let first = job.writer(random.next_u64());

    let ready = job.must(READY);

    assert!(warnings(&ready).is_empty(), "{ready:#?}");
    let (_, replicas) = first.at(|| job.replicas());
    assert!(
        first.stop().moment_of(&replicas).is_some(),
        "the replicas are torn"
    );
    let quiet = job.must(READY);
    assert!(
        changed(&quiet).iter().all(|bytes| *bytes < BYTES),
        "{quiet:#?}"
    );

    // Phase 1: passes go on, the cable is pulled, and the connections are cut.
    let second = job.writer(random.next_u64());
    let mut run = job.start(START);
    wait_for_passes(&mut run, 2);
    for _ in 0..2 {
        job.hosts.pull_cable(&mut random);
        job.hosts.kill("sshd");
        wait_for_passes(&mut run, 2);
    }
    let (_, replicas) = second.at(|| job.replicas());
    assert!(
        second.stop().moment_of(&replicas).is_some(),
        "the replicas are torn"
    );

    // Phase 2: the cable is pulled while the source comes to rest. Nobody can say that it is to go on: it does by itself.
    let third = job.writer(random.next_u64());
    wait_for_passes(&mut run, 2);
    job.slowly(true);
    let asking = job.cut_over_until(&mut run, "quiescing");
    job.hosts.cable("down");
    let pulled = Instant::now();
    // Two seconds to come to rest, six until it goes on.
    thread::sleep(Duration::from_secs(10));
    drop(third);
    job.assert_runs("the cable is pulled");
    job.slowly(false);
    job.hosts.cable("up");
    let refused = asking.finish();
    assert_ne!(refused.code, Some(0), "{refused:#?}");
    assert!(run.wait_for(|line| line["code"] == "cutover_failed"));
    wait_for_passes(&mut run, 1);
    assert!(
        pulled.elapsed() < Duration::from_secs(100),
        "it was sought again"
    );

    // The same once more, with the way cut for good while the last pass is copied.
    let fourth = job.writer(random.next_u64());
    let asking = job.cut_over_until(&mut run, "last-pass");
    job.hosts.kill("serve\0--stdio");
    let outcome = asking.finish();
    let written = fourth.stop();
    let is_over = outcome.code == Some(0);
    if !is_over {
        wait_for_passes(&mut run, 1);
        job.assert_runs("the way was cut in the last pass");
        let fifth = job.writer(random.next_u64());
        completed(|| job.start(COMPLETE).finish());
        assert!(
            fifth.stop().is_on(&job.replicas()),
            "an acknowledged write is missing"
        );
    } else {
        assert!(
            written.is_on(&job.replicas()),
            "an acknowledged write is missing"
        );
    }
    let run = run.finish();
    assert_eq!(run.code, Some(0), "{run:#?}");
    assert!(reconnected(&run) >= 1, "{run:#?}");
    assert!(!warnings(&run).contains(&"bitmap_lost"), "{run:#?}");

    job.must("failover rollback web");
    assert_eq!(job.state(), "rolled-back");
    job.hosts.lab.assert_holds("replica0", &before);
    job.assert_runs("rolled back");
}

#[test]
fn a_cutover_between_two_hosts_that_is_cut_at_random_moments_ends_on_one_side() {
    let name = "a_cutover_between_two_hosts_that_is_cut_at_random_moments_ends_on_one_side";
    let mut random = seeded(name);
    let mut states = Vec::new();
    let Some(job) = FarJob::new("cut", name) else {
        return;
    };
    for _ in 0..4 {
        job.must(READY);
        let writer = job.writer(random.next_u64());
        let cutting = (0..TRIES).find_map(|_| {
            let mut cutting = job.start(COMPLETE);
            let begins = cutting.wait_for(|line| line["state"] == "quiescing");
            begins.then_some(cutting)
        });
        let cutting = cutting.expect("a cutover that fits its budget");
        thread::sleep(Duration::from_millis(random.below(500)));
        // Our own end, the connections, or the blockferry of the far end.
        let cut = match random.below(3) {
            0 => cutting.kill(),
            1 => {
                job.hosts.kill("sshd");
                cutting.finish()
            }
            _ => {
                job.hosts.kill("serve\0--stdio");
                cutting.finish()
            }
        };

        let state = job.state();
        let told = format!("{state}, {:?}", cut.code);
        // It goes on where the targets hold the last cut of a source that stands still; else the source was let go.
        if !["fencing", "starting", "commit-pending"].contains(&state.as_str()) {
            job.must(READY);
        }
        completed(|| job.start(COMPLETE).finish());

        job.assert_stands_still(&told);
        let written = writer.stop();
        assert!(
            written.is_on(&job.replicas()),
            "{told}: an acknowledged write is missing"
        );
        job.must("failover rollback web");
        job.assert_runs(&told);
        states.push(told);
    }
    #[expect(clippy::print_stderr, reason = "where the cuts landed")]
    {
        eprintln!("cut at {states:?}");
    }
}

#[test]
fn the_way_back_of_a_job_between_two_hosts_is_a_job_of_the_other_host() {
    let name = "the_way_back_of_a_job_between_two_hosts_is_a_job_of_the_other_host";
    let Some(mut job) = FarJob::new("back", name) else {
        return;
    };
    let mut random = seeded(name);
    let lab = &job.hosts.lab;
    let mut spec = fs::read_to_string(lab.path("web.toml")).expect("read");
    spec.push_str(&replica_of(lab, "far/", "exit 0", ""));
    fs::write(lab.path("web.toml"), spec).expect("written");
    job.must(READY);
    let there = job.writer(random.next_u64());
    completed(|| job.start(COMPLETE).finish());
    assert!(
        there.stop().is_on(&job.replicas()),
        "an acknowledged write is missing"
    );

    let over = job.must("failover commit web --release-source");

    assert_eq!(warnings(&over), Vec::<&str>::new());
    let refused = job.start("failover reverse web").finish();
    assert!(refused.complaint().contains(FAR), "{refused:#?}");
    let away = job.hosts.lab.path("away/nbd");
    let back = writer(&away, job.replicas(), SELDOM, random.next_u64());
    let reversed = job.far(&format!("failover reverse {NEAR}:web --until ready"));
    assert_eq!(warnings(&reversed), Vec::<&str>::new());
    assert!(
        changed(&reversed).iter().sum::<u64>() < BYTES,
        "{reversed:#?}"
    );
    completed(|| Child::start(&mut job.hosts.far_command(COMPLETE)).finish());
    assert!(
        back.stop().is_on(&job.contents(["far/disk0", "far/disk1"])),
        "an acknowledged write is missing on the way back"
    );
    job.far("failover commit web --release-source");
    let status = job.far("failover status web");
    assert_eq!(status.summary()["operation"], "reverse");
    assert_eq!(status.summary()["state"], "committed");
}
