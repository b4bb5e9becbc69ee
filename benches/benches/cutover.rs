//! How long a machine stands still when it is cut over, and when a point of it is taken: a qemu-storage-daemon whose disk
//! is written between the last live pass and the stop.
//!
//! No harness times it: the job does, as it does for its users. Beside each pause stands how long the same bytes take to be
//! written and flushed by themselves, into a file on the same file system, right before.

#![expect(clippy::print_stdout, reason = "a bench shows its figures")]

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use blockferry::failover::{JobContext, JobSpec, Jobs, State, Told, Until};
use blockferry::nbd::{NbdAddress, NbdDevice, NbdOptions};
use blockferry::{BlockTarget, TargetOptions};
use blockferry_benches::noise;
use blockferry_testkit::StorageDaemon;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Of each run: what is written before the machine stops, in pieces that lie apart.
const PIECE_BYTES: u64 = 256 << 10;
/// Data at the beginning of each disk.
const DATA_BYTES: u64 = 256 * MIB;
const ROUNDS: usize = 3;

struct Case {
    disk_bytes: u64,
    delta_bytes: u64,
}

struct Pause {
    whole: f64,
    /// Until the machine stood still, until its last changes were copied and proven, until the replica was started.
    parts: [f64; 3],
    written: f64,
    /// For the points that were taken while it ran.
    held_up: f64,
}

fn main() -> ExitCode {
    if !StorageDaemon::is_installed() {
        println!("cutover: SKIPPED: qemu-storage-daemon is not installed");
        return ExitCode::SUCCESS;
    }
    let only_test = std::env::args().any(|argument| argument == "--test");
    let case = |disk_bytes, delta_bytes| Case {
        disk_bytes,
        delta_bytes,
    };
    let (cases, rounds) = match only_test {
        true => (vec![case(64 * MIB, MIB)], 1),
        false => {
            let deltas = [0, 11 * MIB, 64 * MIB];
            let sizes = [4 * GIB, 1024 * GIB];
            let all = sizes.map(|size| deltas.map(|delta| case(size, delta)));
            (all.into_iter().flatten().collect(), ROUNDS)
        }
    };
    println!("disk      last delta   pause  (stop, copy, start)      / writing it   point");
    for case in cases {
        let pauses: Vec<Pause> = (0..rounds).map(|_| measure(&case)).collect();
        let middle = |of: &dyn Fn(&Pause) -> f64| {
            let mut all: Vec<f64> = pauses.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        println!(
            "{:>5} GiB {:>6} MiB {:>8.3} s  ({:.3}, {:.3}, {:.3}) s   {:>6.2} x     {:>6.1} ms",
            case.disk_bytes / GIB,
            case.delta_bytes / MIB,
            middle(&|pause| pause.whole),
            middle(&|pause| pause.parts[0]),
            middle(&|pause| pause.parts[1]),
            middle(&|pause| pause.parts[2]),
            middle(&|pause| pause.whole / pause.written),
            middle(&|pause| pause.held_up) * 1000.0,
        );
    }
    ExitCode::SUCCESS
}

fn measure(case: &Case) -> Pause {
    // A socket's path has to be short, and a state must not be kept in memory.
    let place = tempfile::tempdir_in("/var/tmp").expect("a directory");
    let path = |name: &str| place.path().join(name);
    let data = noise(
        1,
        usize::try_from(DATA_BYTES.min(case.disk_bytes)).expect("fits"),
    );
    for name in ["disk0", "replica"] {
        let disk = File::create(path(name)).expect("a file");
        disk.write_all_at(&data, 0).expect("written");
        disk.set_len(case.disk_bytes).expect("sized");
        disk.sync_all().expect("flushed");
    }
    let written = write_alone(&path("alone"), &data[..delta(case)]);
    let _daemon = StorageDaemon::start(place.path(), "raw").expect("a daemon");
    let mut jobs = Jobs::open(&path("jobs")).expect("the jobs");
    let mut context = JobContext::new(TargetOptions::new(path("states")));
    let states = Arc::new(Mutex::new(Vec::new()));
    let held_up = Arc::new(Mutex::new(Vec::new()));
    let (seen, taken) = (Arc::clone(&states), Arc::clone(&held_up));
    let (nbd, fresh) = (path("nbd"), noise(2, delta(case)));
    context.observer = Arc::new(move |told: &Told| match told {
        Told::State(state, _) => {
            // The last moment before anything is stopped, and timed.
            if *state == State::Quiescing {
                overwrite(&nbd, &fresh);
            }
            seen.lock()
                .expect("no panic")
                .push((*state, Instant::now()));
        }
        Told::Pass {
            held_up_seconds, ..
        } if *held_up_seconds > 0.0 => taken.lock().expect("no panic").push(*held_up_seconds),
        _ => {}
    });
    let spec = spec(place.path());
    jobs.start(&spec, Until::Ready, &context).expect("ready");
    jobs.complete(&spec.name, None, &context).expect("cut over");
    let status = jobs.status(&spec.name, &context.targets);
    let whole = status.expect("a status").job.downtime_seconds;
    let states = states.lock().expect("no panic");
    let at = |wanted: State| {
        let found = states.iter().rev().find(|(state, _)| *state == wanted);
        found.expect("it was there").1
    };
    let part = |from: State, to: State| (at(to) - at(from)).as_secs_f64();
    let mut held_up = held_up.lock().expect("no panic").clone();
    held_up.sort_by(f64::total_cmp);
    Pause {
        whole: whole.expect("a pause"),
        parts: [
            part(State::Quiescing, State::LastPass),
            part(State::LastPass, State::Fencing),
            part(State::Fencing, State::CommitPending),
        ],
        written,
        held_up: held_up[held_up.len() / 2],
    }
}

fn delta(case: &Case) -> usize {
    usize::try_from(case.delta_bytes).expect("fits")
}

/// What the same bytes cost by themselves; of nothing, one flush.
fn write_alone(path: &Path, bytes: &[u8]) -> f64 {
    let mut file = File::create(path).expect("a file");
    let began = Instant::now();
    file.write_all(bytes).expect("written");
    file.sync_data().expect("flushed");
    began.elapsed().as_secs_f64()
}

fn overwrite(nbd: &Path, bytes: &[u8]) {
    let address = NbdAddress::unix(nbd, "w-disk0").expect("fits");
    let disk = NbdDevice::open_target(&address, &NbdOptions::default()).expect("an export");
    let pieces = bytes.chunks(usize::try_from(PIECE_BYTES).expect("fits"));
    for (at, piece) in (0..).step_by(2).zip(pieces) {
        disk.write_at(at * PIECE_BYTES, piece).expect("written");
    }
    disk.flush().expect("flushed");
}

fn spec(place: &Path) -> JobSpec {
    let text = format!(
        "name = \"bench\"\ndowntime-budget = \"1m\"\n[machine]\nqmp = {:?}\nnbd = {:?}\n\
         [[disk]]\nnode = \"disk0\"\ntarget = {:?}\nwriters = [\"w-disk0\"]\n",
        place.join("qmp"),
        place.join("nbd"),
        place.join("replica")
    );
    JobSpec::from_toml(&text).expect("a job")
}
