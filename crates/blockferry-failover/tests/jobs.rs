//! Jobs from end to end: a qemu-storage-daemon whose disks are written all the while.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blockferry_device::{BlockSource, BlockTarget, CancelToken};
use blockferry_engine::TargetOptions;
use blockferry_failover::{
    ErrorKind, JobContext, JobSpec, JobStatus, Jobs, OldSource, State, Told, Until,
};
use blockferry_nbd::{NbdAddress, NbdDevice, NbdOptions};
use blockferry_pipeline::{Event, Phase};
use blockferry_testkit::{StorageDaemon, Writer, images};

const BYTES: usize = 16 << 20;

/// A site with a machine of two disks, and a site with their replicas.
struct Sites {
    _daemon: StorageDaemon,
    place: tempfile::TempDir,
    told: Arc<Mutex<Vec<String>>>,
    cancel: CancelToken,
    /// What the targets held before the job.
    old: Vec<Vec<u8>>,
}

fn is_missing() -> bool {
    let missing = !StorageDaemon::is_installed();
    #[expect(clippy::print_stderr, reason = "what is skipped is said")]
    if missing {
        eprintln!("SKIPPED: qemu-storage-daemon is not installed");
    }
    missing
}

impl Sites {
    /// The targets hold something older; the second is absent.
    fn new() -> Self {
        // A target must not be kept on a file system in memory.
        let place = tempfile::tempdir_in("/var/tmp").expect("a directory");
        for (disk, seed) in [("disk0", 1), ("disk1", 2)] {
            let content = images::sparse_image(seed, BYTES as u64, 0.5);
            fs::write(place.path().join(disk), content).expect("written");
        }
        let old = images::sparse_image(1, BYTES as u64, 0.4);
        fs::write(place.path().join("replica0"), &old).expect("written");
        let daemon = StorageDaemon::start(place.path(), "raw").expect("a daemon");
        Self {
            _daemon: daemon,
            place,
            told: Arc::default(),
            cancel: CancelToken::new(),
            old: vec![old],
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn spec(&self, more: &str) -> JobSpec {
        let path = |name: &str| self.path(name).display().to_string();
        let text = format!(
            r#"
            name = "web1"
            downtime-budget = "2s"
            refresh = "200ms"
            {more}
            [machine]
            qmp = "{}"
            nbd = "{}"
            [[disk]]
            node = "disk0"
            target = "{}"
            writers = ["w-disk0"]
            [[disk]]
            node = "disk1"
            target = "{}"
            writers = ["w-disk1"]
            "#,
            path("qmp"),
            path("nbd"),
            path("replica0"),
            path("replica1")
        );
        JobSpec::from_toml(&text).expect("a job")
    }

    fn jobs(&self) -> Jobs {
        Jobs::open(&self.path("jobs")).expect("the jobs")
    }

    fn context(&self) -> JobContext {
        let mut context = JobContext::new(TargetOptions::new(self.path("states")));
        let told = Arc::clone(&self.told);
        context.cancel = self.cancel.clone();
        context.observer = Arc::new(move |event: &Told| {
            let line = match event {
                Told::State(state, text) => format!("{state}: {text}"),
                Told::Warning(code, text) => format!("warning {code}: {text}"),
                Told::Pass { pass, .. } => format!("pass {pass:?}"),
                _ => return,
            };
            told.lock().expect("no panic").push(line);
        });
        context
    }

    fn told(&self) -> String {
        self.told.lock().expect("no panic").join("\n")
    }

    fn status(&self) -> JobStatus {
        let targets = TargetOptions::new(self.path("states"));
        self.jobs().status("web1", &targets).expect("a status")
    }

    fn writer(&self, pause: Duration) -> Writer {
        let content: Vec<Vec<u8>> = ["disk0", "disk1"]
            .map(|disk| fs::read(self.path(disk)).expect("read"))
            .to_vec();
        let devices = ["disk0", "disk1"].map(|disk| {
            let address = NbdAddress::unix(self.path("nbd"), &format!("w-{disk}")).expect("fits");
            let opened = NbdDevice::open_target(&address, &NbdOptions::default());
            opened.expect("an export") as Arc<dyn BlockTarget>
        });
        Writer::start(devices.to_vec(), content, pause, 7)
    }

    fn replicas(&self) -> Vec<Vec<u8>> {
        ["replica0", "replica1"]
            .map(|replica| fs::read(self.path(replica)).expect("a replica"))
            .to_vec()
    }

    /// Copies passes until the job is ready, while the disks are written.
    fn ready(&self, context: &JobContext) -> Writer {
        let writer = self.writer(Duration::from_micros(300));
        let state = self.jobs().start(&self.spec(""), Until::Ready, context);
        assert_eq!(state.expect("ready"), State::Ready, "{}", self.told());
        writer
    }

    /// What is left of us in the machine's directory.
    fn leftovers(&self) -> Vec<String> {
        let names = fs::read_dir(self.place.path()).expect("a directory");
        let names = names.map(|entry| entry.expect("an entry").file_name());
        let names = names.map(|name| name.to_string_lossy().into_owned());
        names.filter(|name| name.starts_with("bf-")).collect()
    }
}

fn content(image: &Path) -> Vec<u8> {
    let opened = blockferry_nbd::open_image(
        blockferry_device::ImageFormat::Qcow2,
        image,
        &std::env::temp_dir(),
    );
    let device = opened.expect("an overlay");
    let mut bytes = vec![0; BYTES];
    device.read_at(0, &mut bytes).expect("read");
    bytes
}

#[test]
fn a_machine_that_is_written_comes_over_and_what_it_acknowledged_is_there() {
    if is_missing() {
        return;
    }
    let sites = Sites::new();
    let context = sites.context();
    let writer = sites.ready(&context);
    let status = sites.status();
    assert!(status.passes.len() >= 2, "{}", sites.told());
    assert!(status.passes[1].changed_bytes < status.passes[0].changed_bytes);
    let state = sites.jobs().complete("web1", None, &context);
    assert_eq!(
        state.expect("cut over"),
        State::CommitPending,
        "{}",
        sites.told()
    );

    // The writer was fenced: what it was told was written is what the replicas hold.
    assert!(writer.stop().is_on(&sites.replicas()), "{}", sites.told());
    let at_the_cut = sites.replicas();
    let status = sites.status();
    assert!(
        status.job.downtime_seconds.is_some_and(|s| s < 2.0),
        "{status:?}"
    );
    let overlays: Vec<PathBuf> = status
        .disks
        .iter()
        .filter_map(|d| d.overlay.clone())
        .collect();
    assert_eq!(overlays.len(), 2);
    // The replica runs for a while.
    let written = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 0x5A 1M 64k"])
        .arg(&overlays[1])
        .output();
    assert!(written.expect("qemu-io").status.success());
    assert!(
        sites.replicas() == at_the_cut,
        "an overlay does not touch its target"
    );
    let mut expected = at_the_cut;
    expected[1][1 << 20..][..64 << 10].fill(0x5A);
    assert!(content(&overlays[1]) == expected[1]);

    let state = sites.jobs().commit("web1", OldSource::Keep, &context);
    assert_eq!(
        state.expect("committed"),
        State::Committed,
        "{}",
        sites.told()
    );

    assert!(
        sites.replicas() == expected,
        "what the replica wrote is kept"
    );
    assert_eq!(sites.leftovers(), Vec::<String>::new());
    assert!(!overlays.iter().any(|overlay| overlay.exists()));
    let again = sites
        .jobs()
        .rollback("web1", &context)
        .expect_err("it is over");
    assert_eq!(again.kind(), ErrorKind::Refused);
}

#[test]
fn a_cutover_that_is_cancelled_while_the_replica_starts_leaves_a_source_that_runs() {
    if is_missing() {
        return;
    }
    let sites = Sites::new();
    let context = sites.context();
    let spec = sites.spec("hooks = { start-target = [\"sleep\", \"100\"] }");
    let state = sites.jobs().start(&spec, Until::Ready, &context);
    assert_eq!(state.expect("ready"), State::Ready, "{}", sites.told());
    let (cancel, told) = (sites.cancel.clone(), Arc::clone(&sites.told));
    let waiting = std::thread::spawn(move || {
        let starts = |told: &Vec<String>| told.iter().any(|line| line.starts_with("starting"));
        while !starts(&told.lock().expect("no panic")) {
            std::thread::sleep(Duration::from_millis(5));
        }
        cancel.cancel();
    });

    let outcome = sites.jobs().complete("web1", None, &context);

    waiting.join().expect("no panic");
    let error = outcome.expect_err("cancelled");
    assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
    assert_eq!(sites.status().job.state, State::Syncing, "{}", sites.told());
    let writer = sites.writer(Duration::from_micros(100));
    std::thread::sleep(Duration::from_millis(50));
    assert!(writer.stop().unsure.is_none(), "the source does not run");
}

#[test]
fn a_job_that_is_rolled_back_leaves_the_old_point_and_a_source_that_runs() {
    if is_missing() {
        return;
    }
    let sites = Sites::new();
    let context = sites.context();
    let writer = sites.ready(&context);
    sites
        .jobs()
        .complete("web1", None, &context)
        .expect("cut over");
    let stood_still = writer.stop();

    let state = sites.jobs().rollback("web1", &context);

    assert_eq!(
        state.expect("rolled back"),
        State::RolledBack,
        "{}",
        sites.told()
    );
    assert!(
        sites.replicas()[0] == sites.old[0],
        "the point before the job"
    );
    assert_eq!(sites.leftovers(), Vec::<String>::new());
    // The source goes on where it stood.
    let writer = sites.writer(Duration::from_micros(100));
    std::thread::sleep(Duration::from_millis(50));
    assert!(writer.stop().content != stood_still.content);
}

#[test]
fn a_run_waits_ready_refreshes_and_cuts_over_when_another_process_asks() {
    if is_missing() {
        return;
    }
    let sites = Sites::new();
    let writer = sites.writer(Duration::from_millis(1));
    let (spec, context) = (sites.spec(""), sites.context());
    std::thread::scope(|scope| {
        let running = scope.spawn(|| sites.jobs().start(&spec, Until::Cutover, &context));
        let end = std::time::Instant::now() + Duration::from_secs(30);
        // It is refreshed more than once while it waits.
        while sites
            .jobs()
            .status("web1", &context.targets)
            .map_or(0, |s| s.passes.len())
            < 5
        {
            assert!(std::time::Instant::now() < end, "{}", sites.told());
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(sites.status().running);
        let held = sites
            .jobs()
            .rollback("web1", &context)
            .expect_err("somebody works on it");
        assert_eq!(held.kind(), ErrorKind::Busy, "{held}");

        let state = sites.jobs().complete("web1", None, &context);

        assert_eq!(
            state.expect("cut over"),
            State::CommitPending,
            "{}",
            sites.told()
        );
        let ended = running.join().expect("no panic");
        assert_eq!(ended.expect("cut over"), State::CommitPending);
    });
    assert!(writer.stop().is_on(&sites.replicas()));
}

/// A small file system in memory; gone when dropped.
struct Small(PathBuf);

impl Small {
    /// `None` where nothing can be mounted.
    fn mount(path: PathBuf, size: &str) -> Option<Self> {
        fs::create_dir(&path).expect("a directory");
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", size, "tmpfs"]).arg(&path);
        let done = mount.output().is_ok_and(|done| done.status.success());
        done.then_some(Self(path))
    }

    /// Writes a file that leaves so much free, and is never larger.
    fn fill(&self, free_bytes: u64) {
        let found = rustix::fs::statvfs(&self.0).expect("mounted");
        let filling = found.f_bavail * found.f_frsize - free_bytes;
        let filling = usize::try_from(filling).expect("small");
        fs::write(self.0.join("filling"), vec![1; filling]).expect("written");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        std::process::Command::new("umount")
            .arg(&self.0)
            .status()
            .ok();
    }
}

#[test]
fn a_scratch_directory_that_fills_up_costs_the_pass_and_no_write_of_the_guest() {
    if is_missing() {
        return;
    }
    let sites = Sites::new();
    let Some(small) = Small::mount(sites.path("scratch"), "size=96m") else {
        #[expect(clippy::print_stderr, reason = "what is skipped is said")]
        return eprintln!("SKIPPED: nothing can be mounted here");
    };
    let small = Arc::new(small);
    let mut spec = sites.spec("");
    spec.machine.scratch = Some(sites.path("scratch"));
    let context = sites.context();
    // Slow enough for a machine that is busy, and fast enough to fill what is left while the pass is held up.
    let writer = sites.writer(Duration::from_millis(4));
    small.fill(8 << 20);

    let refused = sites.jobs().start(&spec, Until::Ready, &context);

    let error = refused.expect_err("there is no room");
    assert_eq!(error.kind(), ErrorKind::Source);
    let text = format!("{error:#?}");
    assert!(text.contains("expected at least 16.0 MiB free"), "{text}");
    fs::remove_file(sites.path("scratch/filling")).expect("removed");

    // It fills up while the first pass is read, which is held up for that.
    let mut filling = context.clone();
    let (once, filler) = (std::sync::Once::new(), Arc::clone(&small));
    filling.observer = Arc::new(move |told: &Told| {
        if matches!(told, Told::Disk(_, Event::Progress(progress)) if progress.phase == Phase::Scanning)
        {
            once.call_once(|| {
                filler.fill(12 << 20);
                std::thread::sleep(Duration::from_secs(4));
            });
        }
    });
    let given_up = sites.jobs().start(&spec, Until::Ready, &filling);

    let error = given_up.expect_err("the point is a mixture");
    let text = format!("{error:#?}");
    assert!(text.contains("the point was given up"), "{text}");
    assert!(sites.status().passes.is_empty(), "it does not count");
    fs::remove_file(sites.path("scratch/filling")).expect("removed");
    let state = sites.jobs().start(&spec, Until::Ready, &context);
    assert_eq!(state.expect("ready"), State::Ready, "{}", sites.told());
    let written = writer.stop();
    assert!(written.unsure.is_none(), "a write of the guest failed");
    sites
        .jobs()
        .complete("web1", None, &context)
        .expect("cut over");
    assert!(written.is_on(&sites.replicas()), "{}", sites.told());
}
