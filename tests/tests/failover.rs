//! Jobs as the real command runs them, killed at random moments, over a qemu-storage-daemon that is written all the while
//! and killed itself: whatever dies, the replicas are at one moment of all disks, and the job goes on.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use blockferry::BlockTarget;
use blockferry::nbd::{NbdAddress, NbdDevice, NbdOptions};
use blockferry_testkit::{StorageDaemon, Writer};

use crate::lab::{Answer, Lab, MIB, seeded, skipped, while_starting, with_files};

const BYTES: u64 = 12 * MIB;
/// Of the machine at the other site: who writes its disks.
pub(crate) const EXPORTS: &str = "--export type=nbd,id=w-disk0,node-name=root,name=w-disk0,writable=on \
                       --export type=nbd,id=w-disk1,node-name=data,name=w-disk1,writable=on";

/// Two sites in one directory: a machine with two disks, and their replicas.
struct Sites {
    daemon: StorageDaemon,
    lab: Lab,
}

impl Sites {
    /// `None` if there is no qemu-storage-daemon.
    fn new(test: &str) -> Option<Self> {
        if !StorageDaemon::is_installed() {
            skipped(test, "qemu-storage-daemon");
            return None;
        }
        let lab = Lab::new();
        for (disk, seed) in [("disk0", 1), ("disk1", 2)] {
            lab.disk(disk, seed, BYTES);
        }
        // One replica begins with something older, the other with nothing.
        lab.disk("replica0", 3, BYTES);
        let daemon = while_starting(|| StorageDaemon::start(lab.root(), "raw")).expect("a daemon");
        let path = |name: &str| lab.path(name).display().to_string();
        let job = format!(
            "name = \"web\"\ndowntime-budget = \"5s\"\nrefresh = \"50ms\"\n\
             [machine]\nqmp = \"{}\"\nnbd = \"{}\"\n\
             [[disk]]\nnode = \"disk0\"\ntarget = \"{}\"\nwriters = [\"w-disk0\"]\n\
             [[disk]]\nnode = \"disk1\"\ntarget = \"{}\"\nwriters = [\"w-disk1\"]\n",
            path("qmp"),
            path("nbd"),
            path("replica0"),
            path("replica1")
        );
        fs::write(lab.path("web.toml"), job).expect("written");
        Some(Self { daemon, lab })
    }

    /// The job says how to come back: its replica runs in a storage daemon of its own. `started_with` are arguments of it
    /// besides its disks.
    fn with_a_way_back(self, started_with: &str) -> Away {
        self.with_a_replica("exit 0", started_with)
    }

    /// The same, whose replica runs while it is on trial, too, and can be written.
    fn with_a_trial(self) -> Away {
        let on_trial = format!(
            "set -- {EXPORTS}; driver=qcow2; \
             BLOCKFERRY_DISK_0_TARGET=$BLOCKFERRY_DISK_0_OVERLAY; \
             BLOCKFERRY_DISK_1_TARGET=$BLOCKFERRY_DISK_1_OVERLAY"
        );
        self.with_a_replica(&on_trial, "")
    }

    fn with_a_replica(self, on_trial: &str, started_with: &str) -> Away {
        let mut job = fs::read_to_string(self.lab.path("web.toml")).expect("read");
        job.push_str(&replica_of(&self.lab, "", on_trial, started_with));
        fs::write(self.lab.path("web.toml"), job).expect("written");
        Away { sites: self }
    }

    /// By scripts, which leave words in `told`; the first does this before. Not where their files cannot be root's.
    fn bring_to_rest_by(&self, before: &str) -> bool {
        if fs::metadata(self.lab.root()).expect("a directory").uid() != 0 {
            return false;
        }
        let path = |name: &str| self.lab.path(name).display().to_string();
        let file = |name: &str, text: &str, mode: u32| {
            fs::write(self.lab.path(name), text).expect("written");
            let permissions = fs::Permissions::from_mode(mode);
            fs::set_permissions(self.lab.path(name), permissions).expect("set");
        };
        for (script, before, word) in [("pre", before, "rest"), ("post", "", "on")] {
            let text = format!("#!/bin/sh\n{before}\necho {word} >>{}\n", path("told"));
            file(script, &text, 0o700);
        }
        let config = format!(
            r#"{{"preScriptLocation": "{}", "postScriptLocation": "{}", "timeoutInSeconds": 60,
            "continueBackupOnFailure": false, "fsFreezeEnabled": false}}"#,
            path("pre"),
            path("post")
        );
        file("scripts.json", &config, 0o600);
        let job = fs::read_to_string(self.lab.path("web.toml")).expect("read");
        let scripts = format!("[machine]\nscripts = \"{}\"", path("scripts.json"));
        let job = job.replace("[machine]", &scripts);
        fs::write(self.lab.path("web.toml"), job).expect("written");
        true
    }

    fn contents(&self, names: [&str; 2]) -> Vec<Vec<u8>> {
        let read = |name: &str| with_files(|| fs::read(self.lab.path(name))).expect("read");
        names.map(read).to_vec()
    }

    fn replicas(&self) -> Vec<Vec<u8>> {
        self.contents(["replica0", "replica1"])
    }

    fn disks(&self) -> Vec<Vec<u8>> {
        self.contents(["disk0", "disk1"])
    }

    fn writer(&self, seed: u64) -> Writer {
        writer(&self.daemon.path("nbd"), self.disks(), OFTEN, seed)
    }

    fn state(&self) -> String {
        let status = self.lab.must("failover status web");
        let state = status.summary()["state"].as_str();
        state.expect("a state").to_owned()
    }

    /// Runs a command and kills it after a while; its exit code if it came first.
    fn killed(&self, line: &str, after: Duration) -> Option<i32> {
        let child = self.lab.start(line);
        thread::sleep(after);
        child.kill().code
    }
}

/// A replica that runs in a storage daemon of its own in the directory `away`: what a job says of it. The disks that lead back
/// are in the directory `disks`, whose name ends with a slash.
pub(crate) fn replica_of(lab: &Lab, disks: &str, on_trial: &str, started_with: &str) -> String {
    let away = lab.path("away");
    fs::create_dir(&away).expect("a directory");
    let script = format!(
        "#!/bin/sh\ncd {away}\n\
         if [ -e pid ]; then pid=\"$(cat pid)\"; kill \"$pid\"\n\
         while kill -0 \"$pid\" 2>/dev/null; do sleep 0.02; done; rm -f pid qmp nbd; fi\n\
         if [ \"$1\" = stop ]; then exit 0; fi\n\
         set --\ndriver=raw\n\
         if [ -n \"$BLOCKFERRY_DISK_0_OVERLAY\" ]; then {on_trial}; fi\n\
         exec qemu-storage-daemon --daemonize --pidfile pid \
         --chardev socket,path=qmp,server=on,wait=off,id=m --monitor chardev=m \
         --nbd-server addr.type=unix,addr.path=nbd,max-connections=64 \
         --blockdev driver=$driver,node-name=root,file.driver=file,file.filename=$BLOCKFERRY_DISK_0_TARGET \
         --blockdev driver=$driver,node-name=data,file.driver=file,file.filename=$BLOCKFERRY_DISK_1_TARGET \
         \"$@\" {started_with} 2>log\n",
        away = away.display()
    );
    fs::write(lab.path("replica.sh"), script).expect("written");
    let path = |name: &str| lab.path(name).display().to_string();
    format!(
        "[hooks]\nstart-target = [\"sh\", \"{script}\", \"start\"]\nstop-target = [\"sh\", \"{script}\", \"stop\"]\n\
         [reverse.machine]\nqmp = \"{}\"\nnbd = \"{}\"\n\
         [[reverse.disk]]\nnode = \"root\"\ntarget = \"{}\"\nwriters = [\"w-disk0\"]\n\
         [[reverse.disk]]\nnode = \"data\"\ntarget = \"{}\"\nwriters = [\"w-disk1\"]\n",
        path("away/qmp"),
        path("away/nbd"),
        path(&format!("{disks}disk0")),
        path(&format!("{disks}disk1")),
        script = path("replica.sh"),
    )
}

/// Writes the two disks of a machine, which hold `content`.
pub(crate) fn writer(nbd: &Path, content: Vec<Vec<u8>>, pause: Duration, seed: u64) -> Writer {
    let devices = ["w-disk0", "w-disk1"].map(|export| {
        let address = NbdAddress::unix(nbd, export).expect("fits");
        let opened = NbdDevice::open_target(&address, &NbdOptions::default());
        opened.expect("an export") as Arc<dyn BlockTarget>
    });
    Writer::start(devices.to_vec(), content, pause, seed)
}

/// The replica runs, at the other site, once it is committed.
struct Away {
    sites: Sites,
}

impl Drop for Away {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Away {
    fn stop(&self) {
        let stopped = Command::new("sh")
            .arg(self.sites.lab.path("replica.sh"))
            .arg("stop")
            .status();
        assert!(stopped.expect("sh").success());
    }

    /// Over, with all that was written meanwhile; on trial.
    fn on_trial(&self, seed: u64) {
        self.sites.lab.must(READY);
        let writer = self.sites.writer(seed);
        self.sites.lab.must("failover complete web");
        assert!(writer.stop().is_on(&self.sites.replicas()));
    }

    /// The same, with something written on trial; committed. Returns what was told.
    fn go(&self, seed: u64) -> Answer {
        self.on_trial(seed);
        let status = self.sites.lab.must("failover status web");
        let overlay = status.summary()["disks"][1]["overlay"].as_str();
        let written = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", "write -P 0x5A 1M 64k"])
            .arg(overlay.expect("an overlay"))
            .output();
        assert!(written.expect("qemu-io").status.success());
        self.sites.lab.must("failover commit web --release-source")
    }

    fn writer(&self, pause: Duration, seed: u64) -> Writer {
        let nbd = self.sites.lab.path("away/nbd");
        writer(&nbd, self.sites.replicas(), pause, seed)
    }

    /// Back: what was acknowledged meanwhile is on the first disks.
    fn come_back(&self, writer: Writer) {
        self.sites.lab.must("failover complete web");
        assert!(
            writer.stop().is_on(&self.sites.disks()),
            "an acknowledged write is missing"
        );
        self.stop();
        self.sites.lab.must("failover commit web");
        assert_eq!(self.sites.state(), "committed");
        assert_eq!(self.sites.disks(), self.sites.replicas());
    }
}

pub(crate) fn changed(answer: &Answer) -> Vec<u64> {
    let passes = answer.lines.iter().filter(|line| line["event"] == "pass");
    passes
        .filter_map(|pass| pass["changed_bytes"].as_u64())
        .collect()
}

pub(crate) fn warnings(answer: &Answer) -> Vec<&str> {
    let warnings = answer.lines.iter().filter(|line| line["type"] == "warning");
    warnings.filter_map(|line| line["code"].as_str()).collect()
}

/// Between two pages that are written.
pub(crate) const OFTEN: Duration = Duration::from_micros(500);
/// However slow the rest is, half a disk is not written like that.
pub(crate) const SELDOM: Duration = Duration::from_millis(20);
const START: &str = "failover start web.toml";
const READY: &str = "failover start web.toml --until ready";

#[test]
fn a_job_that_is_killed_at_random_moments_goes_on_and_its_replicas_are_at_one_moment() {
    let name = "a_job_that_is_killed_at_random_moments_goes_on_and_its_replicas_are_at_one_moment";
    let Some(sites) = Sites::new(name) else {
        return;
    };
    let mut random = seeded(name);
    let writer = sites.writer(random.next_u64());
    let mut moments = Vec::new();
    for _ in 0..6 {
        let after = Duration::from_millis(random.below(900));
        assert_eq!(
            sites.killed(START, after),
            None,
            "it runs until its cutover"
        );

        let answer = sites.lab.must(READY);

        let (_, replicas) = writer.at(|| sites.replicas());
        moments.push((replicas, format!("{:?}", warnings(&answer))));
    }
    sites.lab.must("failover complete web");

    let written = writer.stop();
    assert!(
        written.is_on(&sites.replicas()),
        "an acknowledged write is missing"
    );
    let mut last = 0;
    for (replicas, warnings) in moments {
        let moment = written.moment_of(&replicas).expect("the replicas are torn");
        assert!(moment > last, "moment {moment} after {last}");
        assert!(!warnings.contains("bitmap_lost"), "{warnings}");
        last = moment;
    }
    sites.lab.must("failover commit web");
    assert!(written.is_on(&sites.replicas()));
}

#[test]
fn a_cutover_that_is_killed_at_random_moments_ends_on_one_side_with_every_acknowledged_write() {
    let name =
        "a_cutover_that_is_killed_at_random_moments_ends_on_one_side_with_every_acknowledged_write";
    let mut random = seeded(name);
    let mut states = Vec::new();
    for _ in 0..5 {
        let Some(sites) = Sites::new(name) else {
            return;
        };
        let before = sites.lab.path("replica0");
        let before = with_files(|| fs::read(before)).expect("read");
        sites.lab.must(READY);
        let writer = sites.writer(random.next_u64());
        let mut cutover = sites.lab.start("failover complete web");
        assert!(cutover.wait_for(|line| line["state"] == "quiescing"));
        thread::sleep(Duration::from_millis(random.below(350)));
        cutover.kill();

        let state = sites.state();
        // Where the source was stopped and the targets do not hold its last cut it is let go, else it goes on.
        if !["fencing", "starting", "commit-pending"].contains(&state.as_str()) {
            sites.lab.must(READY);
        }
        sites.lab.must("failover complete web");

        let written = writer.stop();
        assert!(
            written.is_on(&sites.replicas()),
            "{state}: an acknowledged write is missing"
        );
        // The way back is killed as well, and finished.
        sites.killed(
            "failover rollback web",
            Duration::from_millis(random.below(120)),
        );
        if sites.state() != "rolled-back" {
            sites.lab.must("failover rollback web");
        }
        let back = with_files(|| fs::read(sites.lab.path("replica0"))).expect("read");
        assert!(back == before, "{state}: not the point before the job");
        let writer = sites.writer(1);
        thread::sleep(Duration::from_millis(20));
        assert!(
            writer.stop().unsure.is_none(),
            "{state}: the source does not run"
        );
        states.push(state);
    }
    #[expect(clippy::print_stderr, reason = "where the kills landed")]
    {
        eprintln!("killed at {states:?}");
    }
}

#[test]
fn a_machine_that_is_killed_loses_its_bitmaps_which_is_said_and_its_disks_are_compared_in_full() {
    let name = "a_machine_that_is_killed_loses_its_bitmaps_which_is_said_and_its_disks_are_compared_in_full";
    let Some(mut sites) = Sites::new(name) else {
        return;
    };
    let mut random = seeded(name);
    sites.lab.must(READY);
    let writer = sites.writer(random.next_u64());
    let child = sites.lab.start(START);
    thread::sleep(Duration::from_millis(150 + random.below(300)));
    sites.daemon.kill().expect("killed");

    let failed = child.finish();

    assert_eq!(failed.code, Some(3), "{failed:#?}");
    drop(writer.stop());
    while_starting(|| sites.daemon.kill_and_restart()).expect("restarted");
    let writer = sites.writer(random.next_u64());
    let answer = sites.lab.must(READY);
    assert!(warnings(&answer).contains(&"bitmap_lost"), "{answer:#?}");
    assert!(!changed(&answer).is_empty());
    sites.lab.must("failover complete web");
    let written = writer.stop();
    assert!(
        written.is_on(&sites.replicas()),
        "an acknowledged write is missing"
    );
}

#[test]
fn a_source_that_is_gone_keeps_nobody_from_rolling_back() {
    let name = "a_source_that_is_gone_keeps_nobody_from_rolling_back";
    let Some(mut sites) = Sites::new(name) else {
        return;
    };
    let before = with_files(|| fs::read(sites.lab.path("replica0"))).expect("read");
    sites.lab.must(READY);
    // Both points are shown: that of the last pass, and that before the job, which only one target had.
    let status = sites.lab.must("failover status web");
    let disks = &status.summary()["disks"];
    let target = sites.lab.must("status replica0");
    let anchored = &target.summary()["anchored_point"]["id"];
    assert!(anchored.is_string() && disks[0]["point_before"] == *anchored);
    assert!(disks[0]["point"].is_string() && disks[0]["point"] != *anchored);
    assert!(disks[1]["point_before"].is_null(), "{disks}");
    sites.lab.must("failover complete web");
    sites.daemon.kill().expect("killed");

    let answer = sites.lab.must("failover rollback web");

    assert!(
        warnings(&answer).contains(&"source_not_reached"),
        "{answer:#?}"
    );
    assert_eq!(sites.state(), "rolled-back");
    let back = with_files(|| fs::read(sites.lab.path("replica0"))).expect("read");
    assert!(back == before, "not the point before the job");
    let target = sites.lab.must("status replica0");
    assert!(target.summary()["anchored_point"].is_null(), "{target:#?}");
}

#[test]
fn what_was_committed_comes_back_with_no_more_than_what_changed_since() {
    let name = "what_was_committed_comes_back_with_no_more_than_what_changed_since";
    let Some(sites) = Sites::new(name) else {
        return;
    };
    let mut random = seeded(name);
    let away = sites.with_a_way_back("");
    let over = away.go(random.next_u64());
    assert_eq!(warnings(&over), Vec::<&str>::new());
    let writer = away.writer(SELDOM, random.next_u64());

    // Killed as it begins, it goes on as what it is.
    away.sites.killed(
        "failover reverse web",
        Duration::from_millis(random.below(300)),
    );
    let verb = match away.sites.state().as_str() {
        "committed" => "reverse",
        _ => "start",
    };
    let back = away
        .sites
        .lab
        .must(&format!("failover {verb} web --until ready"));

    // A target whose run was killed between its last write and the record of it cannot be told from one that was written.
    let mut warnings = warnings(&back);
    warnings.retain(|code| !["target_written", "change_map_unusable"].contains(code));
    assert_eq!(warnings, Vec::<&str>::new());
    assert!(changed(&back).iter().sum::<u64>() < BYTES, "{back:#?}");
    away.come_back(writer);
    let jobs = away.sites.lab.must("jobs --operation reverse");
    assert_eq!(jobs.summary()["jobs"].as_array().map(Vec::len), Some(1));
}

#[test]
fn a_replica_that_runs_already_is_kept_when_its_start_was_cut_short() {
    let name = "a_replica_that_runs_already_is_kept_when_its_start_was_cut_short";
    let Some(sites) = Sites::new(name) else {
        return;
    };
    let away = sites.with_a_trial();
    let lab = &away.sites.lab;
    let job = fs::read_to_string(lab.path("web.toml")).expect("read");
    let slowly = "start-target = [\"sh\", \"-c\", \"sh $0 start && sleep 3\", ";
    let job = job.replace("start-target = [\"sh\", ", slowly);
    fs::write(lab.path("web.toml"), job.replace(", \"start\"]", "]")).expect("written");
    lab.must(READY);
    let mut cutover = lab.start("failover complete web");
    assert!(cutover.wait_for(|line| line["state"] == "starting"));
    let end = Instant::now() + Duration::from_secs(30);
    while !lab.path("away/nbd").exists() {
        assert!(Instant::now() < end, "the replica does not start");
        thread::sleep(Duration::from_millis(10));
    }
    cutover.kill();
    assert_eq!(away.sites.state(), "starting");
    let writer = away.writer(OFTEN, 1);
    thread::sleep(Duration::from_millis(100));
    let written = writer.stop();

    lab.must("failover complete web");

    assert_eq!(away.sites.state(), "commit-pending");
    away.stop();
    lab.must("failover commit web");
    assert!(
        written.is_on(&away.sites.replicas()),
        "what the replica acknowledged is missing"
    );
}

#[test]
fn an_old_disk_that_was_written_is_compared_in_full_which_is_said() {
    let name = "an_old_disk_that_was_written_is_compared_in_full_which_is_said";
    let Some(sites) = Sites::new(name) else {
        return;
    };
    // Its machine runs before it can be watched, too.
    let away = sites.with_a_way_back(EXPORTS);
    let over = away.go(1);
    assert_eq!(warnings(&over), ["not_watched"]);
    let disk = away.sites.lab.path("disk0");
    let mut content = with_files(|| fs::read(&disk)).expect("read");
    content[5 << 20..][..100].fill(7);
    with_files(|| fs::write(&disk, &content)).expect("written");
    let writer = away.writer(OFTEN, 2);

    let back = away.sites.lab.must("failover reverse web --until ready");

    assert_eq!(warnings(&back), ["diverged", "bitmap_lost"], "{back:#?}");
    away.come_back(writer);
}

#[test]
fn a_replica_is_committed_while_it_is_written_and_comes_back_with_what_changed() {
    let name = "a_replica_is_committed_while_it_is_written_and_comes_back_with_what_changed";
    let Some(sites) = Sites::new(name) else {
        return;
    };
    let mut random = seeded(name);
    let away = sites.with_a_trial();
    let lab = &away.sites.lab;
    away.on_trial(random.next_u64());
    let writer = away.writer(OFTEN, random.next_u64());
    thread::sleep(Duration::from_millis(200));

    // Killed wherever it is, it goes on; the replica does not notice.
    let live = "failover commit web --live --release-source";
    for _ in 0..3 {
        away.sites
            .killed(live, Duration::from_millis(random.below(60)));
    }
    if away.sites.state() != "committed" {
        let committed = lab.must(live);
        // The source may have been ended by a run before.
        let mut warnings = warnings(&committed);
        warnings.retain(|code| *code != "source_not_reached");
        assert_eq!(warnings, Vec::<&str>::new());
    }

    let (content, replicas) = writer.at(|| away.sites.replicas());
    assert!(
        content == replicas,
        "what was written is not on the targets"
    );
    let target = lab.must("status replica0");
    assert_eq!(
        target.summary()["state"],
        "unknown",
        "it is the machine's own"
    );
    let back = lab.must("failover reverse web --until ready");
    assert_eq!(warnings(&back), Vec::<&str>::new());
    away.come_back(writer);
}

#[test]
fn a_live_commit_that_was_cut_short_is_finished_with_the_replica_stopped() {
    let name = "a_live_commit_that_was_cut_short_is_finished_with_the_replica_stopped";
    let Some(sites) = Sites::new(name) else {
        return;
    };
    let mut random = seeded(name);
    let away = sites.with_a_trial();
    let lab = &away.sites.lab;
    away.on_trial(random.next_u64());
    let writer = away.writer(OFTEN, random.next_u64());
    thread::sleep(Duration::from_millis(300));
    let after = Duration::from_millis(random.below(50));
    away.sites.killed("failover commit web --live", after);
    let is_committed = away.sites.state() == "committed";
    away.stop();
    let written = writer.stop();

    if !is_committed {
        // That the machine wrote the targets is said; that nobody watched it would be wrong.
        let committed = lab.must("failover commit web");
        assert!(!warnings(&committed).contains(&"not_watched"));
    }

    assert!(
        written.is_on(&away.sites.replicas()),
        "what was written on trial is not on the targets"
    );
    if !is_committed {
        // Merged partly by the one, partly by the other: the way back knows both.
        away.sites
            .lab
            .must("failover reverse web --release-source --until ready");
        let writer = away.writer(OFTEN, random.next_u64());
        thread::sleep(Duration::from_millis(100));
        away.come_back(writer);
    }
}

#[test]
fn a_way_back_that_is_not_there_is_refused_with_what_is_missing() {
    let Some(sites) = Sites::new("a_way_back_that_is_not_there_is_refused_with_what_is_missing")
    else {
        return;
    };
    let refused = |line: &str, said: &str| {
        let answer = sites.lab.run(line);
        let complaint = answer.complaint();
        assert_eq!(answer.code, Some(4), "{line}: {complaint}");
        assert!(complaint.contains(said), "{line}: {complaint}");
    };
    sites.lab.must(READY);
    refused("failover reverse web", "expected complete or cancel");
    sites.lab.must("failover complete web");
    sites.lab.must("failover commit web");
    refused("failover reverse web", "[reverse]");
    let status = sites.lab.must("failover status web");
    assert_eq!(status.summary()["next"].as_array().map(Vec::len), Some(0));
    // Its file may say so later; but the first machine still has the disks.
    let away = sites.with_a_way_back("");
    let refused = away.sites.lab.run("failover reverse web.toml");
    assert!(
        refused.complaint().contains("has its disks still"),
        "{refused:#?}"
    );
}

#[test]
fn a_source_that_is_gone_is_replaced_by_its_last_pass_and_one_that_answers_is_not() {
    let name = "a_source_that_is_gone_is_replaced_by_its_last_pass_and_one_that_answers_is_not";
    let Some(mut sites) = Sites::new(name) else {
        return;
    };
    let mut random = seeded(name);
    let gone = "failover complete web --without-source";
    let refused = |sites: &Sites, said: &str| {
        let answer = sites.lab.run(gone);
        assert_eq!(answer.code, Some(4), "{answer:#?}");
        assert!(answer.complaint().contains(said), "{answer:#?}");
    };
    sites.lab.must(READY);
    let writer = sites.writer(random.next_u64());
    refused(&sites, "its source answers");
    // The source dies while it is copied, or while it is cut over.
    let verb = if random.chance(1, 2) {
        START
    } else {
        "failover complete web"
    };
    let child = sites.lab.start(verb);
    thread::sleep(Duration::from_millis(random.below(300)));
    sites.daemon.kill().expect("killed");
    child.finish();
    let written = writer.stop();
    if sites.state() == "commit-pending" {
        // It came in time.
        return;
    }

    let answer = sites.lab.must(gone);

    assert_eq!(warnings(&answer), ["not_fenced"]);
    assert_eq!(sites.state(), "commit-pending");
    let moment = written.moment_of(&sites.replicas());
    assert!(moment.is_some(), "the replicas are torn");
    sites.lab.must(gone);
    let committed = sites.lab.must("failover commit web");
    assert_eq!(warnings(&committed), ["source_not_reached"]);
    assert_eq!(written.moment_of(&sites.replicas()), moment);
}

#[test]
fn an_application_is_brought_to_rest_for_each_point_and_goes_on_whoever_dies() {
    let name = "an_application_is_brought_to_rest_for_each_point_and_goes_on_whoever_dies";
    let Some(sites) = Sites::new(name) else {
        return;
    };
    if !sites.bring_to_rest_by("") {
        return skipped(name, "root");
    }
    let told = || with_files(|| fs::read_to_string(sites.lab.path("told"))).expect("read");
    let goes_on = || {
        let told = told();
        let count = |word: &str| told.lines().filter(|line| *line == word).count();
        count("rest") == count("on")
    };
    let mut random = seeded(name);

    let ready = sites.lab.must(READY);

    let passes = ready.lines.iter().filter(|line| line["event"] == "pass");
    let labels: Vec<&str> = passes
        .filter_map(|pass| pass["consistency"].as_str())
        .collect();
    assert!(labels.len() >= 2 && goes_on(), "{labels:?}: {}", told());
    assert!(
        labels
            .iter()
            .all(|label| *label == "application-consistent"),
        "{labels:?}"
    );
    for _ in 0..6 {
        sites.killed(START, Duration::from_millis(random.below(400)));
        let end = Instant::now() + Duration::from_secs(10);
        while !goes_on() {
            assert!(Instant::now() < end, "it stays at rest: {}", told());
            thread::sleep(Duration::from_millis(10));
        }
    }
    // Where the source is stopped its application is at rest, until it is let go.
    sites.lab.must(READY);
    sites.lab.must("failover complete web");
    assert!(told().ends_with("rest\n"), "{}", told());
    sites.lab.must("failover rollback web");
    assert!(told().ends_with("on\n"), "{}", told());
}

#[test]
fn what_takes_longer_than_the_budget_is_cut_short_and_the_source_goes_on() {
    let name = "what_takes_longer_than_the_budget_is_cut_short_and_the_source_goes_on";
    let Some(sites) = Sites::new(name) else {
        return;
    };
    let path = |name: &str| sites.lab.path(name).display().to_string();
    // Slow from the second time on: the first is that of the pass before the cutover.
    let slow = format!(
        "if [ -e {0}.now ]; then sleep 40; fi\nif [ -e {0} ]; then mv {0} {0}.now; fi",
        path("slow")
    );
    if !sites.bring_to_rest_by(&slow) {
        return skipped(name, "root");
    }
    let hooks = format!(
        "[hooks]\nfence-source = [\"sh\", \"-c\", \"touch {fenced}; test -e {} || sleep 40\"]\n\
         unfence-source = [\"rm\", \"-f\", \"{fenced}\"]\n",
        path("quick"),
        fenced = path("fenced")
    );
    let job = fs::read_to_string(sites.lab.path("web.toml")).expect("read");
    fs::write(sites.lab.path("web.toml"), job + &hooks).expect("written");
    sites.lab.must(READY);
    let writer = sites.writer(1);
    // A machine that is busy may refuse before anything is stopped.
    let cut_short = |prepare: &dyn Fn(), said: &str| {
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            sites.lab.must(READY);
            prepare();
            let begun = Instant::now();
            let refused = sites.lab.run("failover complete web");
            assert_eq!(refused.code, Some(4), "{refused:#?}");
            if refused.complaint().contains(said) {
                assert!(
                    begun.elapsed() < Duration::from_secs(40),
                    "it was waited for"
                );
                assert_eq!(sites.state(), "syncing");
                return;
            }
            assert!(Instant::now() < end, "{refused:#?}");
        }
    };

    cut_short(
        &|| {
            fs::remove_file(sites.lab.path("slow.now")).ok();
            fs::write(sites.lab.path("slow"), "").expect("written");
        },
        "did not come to rest within",
    );
    fs::remove_file(sites.lab.path("slow.now")).expect("it was slow");
    assert!(writer.stop().unsure.is_none(), "it was never stopped");
    cut_short(&|| {}, "fence-source (sh) was killed: the budget is 5.00 s");

    assert!(!sites.lab.path("fenced").exists(), "it is fenced");
    fs::write(sites.lab.path("quick"), "").expect("written");
    let writer = sites.writer(2);
    thread::sleep(Duration::from_millis(20));
    assert!(writer.stop().unsure.is_none(), "the source goes on");
    sites.lab.must(READY);
    sites.lab.must("failover complete web");
    assert_eq!(sites.disks(), sites.replicas());
}

#[test]
fn what_a_job_cannot_do_is_refused_with_what_it_can() {
    let Some(sites) = Sites::new("what_a_job_cannot_do_is_refused_with_what_it_can") else {
        return;
    };
    let refused = |line: &str, code: i32, said: &str| {
        let answer = sites.lab.run(line);
        let complaint = answer.complaint();
        assert_eq!(answer.code, Some(code), "{line}: {complaint}");
        assert!(complaint.contains(said), "{line}: {complaint}");
    };
    refused("failover status web", 2, "no job \"web\"");
    refused("failover start nowhere.toml", 2, "nowhere.toml");
    refused("failover commit web --at +1m", 2, "--at");
    sites.lab.must(READY);
    refused("failover commit web", 4, "expected complete or cancel");
    refused("failover rollback web", 4, "expected complete or cancel");
    let job = fs::read_to_string(sites.lab.path("web.toml")).expect("read");
    let other = job.replace("5s", "1ms");
    fs::write(sites.lab.path("other.toml"), &other).expect("written");
    refused("failover start other.toml", 4, "described otherwise");

    sites.lab.must("failover cancel web");
    refused("failover complete web", 4, "expected commit or rollback");
    sites.lab.must("failover commit web");

    // A budget that cannot be kept: nothing is stopped.
    fs::write(sites.lab.path("web.toml"), other).expect("written");
    sites.lab.must(READY);
    refused("failover complete web", 4, "nothing was stopped");
    let writer = sites.writer(3);
    thread::sleep(Duration::from_millis(20));
    assert!(writer.stop().unsure.is_none(), "the source runs");
    let jobs = sites.lab.must("jobs --in-state committed --to +1h");
    assert_eq!(jobs.summary()["jobs"].as_array().map(Vec::len), Some(1));
}
