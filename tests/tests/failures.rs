//! What can go wrong under way, with real disks that are really full and files that really go: each time the user is
//! told what happened, the target is bit for bit at its old point, nothing durable is lost, and the next run works.

use std::fs::{self, OpenOptions};
use std::sync::Arc;

use blockferry::{
    Context, ErrorKind, SourceOptions, SyncOptions, Target, TargetOptions, open_source, sync,
};
use blockferry_testkit::FaultySource;
use serde_json::Value;

use crate::lab::{
    Answer, Child, Lab, MIB, MountedFileSystem, disk_usage, same, skipped, with_files, write_sparse,
};

/// Slow enough to be interfered with, fast enough to wait for.
const SLOWLY: &str = "--bwlimit 12M";

/// An old disk, a new one that differs in most of its pages, and the target at the old point.
struct Disks {
    lab: Lab,
    old: Vec<u8>,
    new: Vec<u8>,
}

impl Disks {
    fn new() -> Self {
        Self::of(16 * MIB)
    }

    fn of(bytes: u64) -> Self {
        let lab = Lab::new();
        let old = lab.disk("target", 21, bytes);
        let new = lab.edited("source", 22, &old, 0.8);
        Self { lab, old, new }
    }

    /// Starts a slow sync and waits until something of it is durable.
    #[track_caller]
    fn start(&self, line: &str) -> Child {
        let mut run = self.lab.start(&format!("{line} {SLOWLY}"));
        if !run.wait_for(is_checkpoint) {
            panic!("it ended before anything was durable: {:#?}", run.finish());
        }
        run
    }

    /// Goes on as the message says, to the very end.
    #[track_caller]
    fn resumes(&self, line: &str) {
        let resumed = self.lab.must(line);
        assert_eq!(resumed.count("restaged_bytes"), 0);
        assert!(
            resumed.count("resumed_bytes") > 0,
            "nothing was kept: {:#}",
            resumed.summary()
        );
    }
}

fn is_checkpoint(line: &Value) -> bool {
    line["event"] == "checkpoint"
}

/// It ended with this code and a message that says all of this.
#[track_caller]
fn assert_says(answer: &Answer, code: i32, words: &[&str]) {
    assert_eq!(answer.code, Some(code), "{answer:#?}");
    let complaint = answer.complaint();
    for word in words {
        assert!(
            complaint.contains(word),
            "{word:?} is missing in: {complaint}"
        );
    }
}

#[track_caller]
fn assert_resumable(answer: &Answer) {
    assert_eq!(answer.line("error")["resumable"], true, "{answer:#?}");
    assert!(
        answer.complaint().contains("blockferry resume"),
        "{}",
        answer.complaint()
    );
}

// --- signals -------------------------------------------------------------------------------------------------------

#[test]
fn signals_stop_every_strategy_at_the_old_point_and_it_resumes() {
    for (signal, code, arguments) in [
        ("-INT", 130, "--mode delta --strategy redo"),
        ("-TERM", 143, "--mode full --strategy shadow"),
        ("-TERM", 143, "--mode delta --strategy redo --undo none"),
    ] {
        let disks = Disks::new();
        let run = disks.start(&format!("sync source target {arguments}"));

        run.signal(signal);
        let stopped = run.finish();

        assert_says(
            &stopped,
            code,
            &["cancelled", "still at its old point", "blockferry resume"],
        );
        assert_resumable(&stopped);
        disks.lab.assert_holds("target", &disks.old);
        disks.resumes("resume target");
        disks.lab.assert_holds("target", &disks.new);
    }
}

#[test]
fn a_signal_leaves_an_absent_target_absent_and_it_resumes() {
    let disks = Disks::new();
    let run = disks.start("sync source fresh");

    run.signal("-INT");
    let stopped = run.finish();

    assert_says(&stopped, 130, &["cancelled", "blockferry resume"]);
    assert!(!disks.lab.path("fresh").exists());
    disks.resumes("resume fresh");
    disks.lab.assert_holds("fresh", &disks.new);
}

// --- full disks ----------------------------------------------------------------------------------------------------

#[test]
fn a_disk_that_fills_up_under_the_log_leaves_the_old_point_and_the_run_resumes() {
    let name = "a_disk_that_fills_up_under_the_log_leaves_the_old_point_and_the_run_resumes";
    let disks = Disks::new();
    let Some(small) = MountedFileSystem::make(disks.lab.root(), "ext4", 96 * MIB) else {
        return skipped(name, "root and mkfs.ext4");
    };
    let state = small.point().join("state").display().to_string();
    let run = disks.start(&format!(
        "sync source target --mode delta --strategy redo --state {state}"
    ));

    small.fill(0);
    let stopped = run.finish();

    assert_says(&stopped, 5, &["No space left", "still at its old point"]);
    assert_resumable(&stopped);
    disks.lab.assert_holds("target", &disks.old);
    let still_full = disks.lab.run(&format!("resume target --state {state}"));
    assert_says(&still_full, 5, &["No space left"]);
    assert_resumable(&still_full);
    small.empty();
    disks.resumes(&format!("resume target --state {state}"));
    disks.lab.assert_holds("target", &disks.new);
}

#[test]
fn a_log_that_cannot_fit_is_refused_before_the_first_byte() {
    let name = "a_log_that_cannot_fit_is_refused_before_the_first_byte";
    let disks = Disks::new();
    let Some(small) = MountedFileSystem::make(disks.lab.root(), "ext4", 24 * MIB) else {
        return skipped(name, "root and mkfs.ext4");
    };
    small.fill(3 * MIB);
    let state = small.point().join("state").display().to_string();

    let refused = disks.lab.run(&format!(
        "sync source target --mode delta --strategy redo --state {state}"
    ));

    assert_says(&refused, 4, &["needs about", "are free", "--in-place"]);
    disks.lab.assert_holds("target", &disks.old);
}

#[test]
fn a_target_without_room_for_what_its_holes_become_keeps_its_old_point() {
    let name = "a_target_without_room_for_what_its_holes_become_keeps_its_old_point";
    let disks = Disks::new();
    let Some(small) = MountedFileSystem::make(disks.lab.root(), "ext4", 64 * MIB) else {
        return skipped(name, "root and mkfs.ext4");
    };
    let target = small.point().join("target");
    write_sparse(&target, &vec![0; disks.old.len()]);
    small.fill(2 * MIB);
    let before = disk_usage(small.point());
    let place = format!(
        "{} --state {}",
        target.display(),
        disks.lab.path("state").display()
    );

    let refused = disks
        .lab
        .run(&format!("sync source {place} --mode delta --strategy redo"));

    assert_says(&refused, 4, &["No space left"]);
    assert!(
        same(&target, &vec![0; disks.old.len()]),
        "the target changed"
    );
    assert!(
        disk_usage(small.point()) <= before,
        "reserved space was not given back"
    );
    small.empty();
    disks
        .lab
        .must(&format!("sync source {place} --mode delta --strategy redo"));
    assert!(same(&target, &disks.new));
}

#[test]
fn a_disk_that_fills_up_under_the_new_file_leaves_the_old_one() {
    let name = "a_disk_that_fills_up_under_the_new_file_leaves_the_old_one";
    // Space is allocated ahead, region by region.
    let disks = Disks::of(80 * MIB);
    let Some(small) = MountedFileSystem::make(disks.lab.root(), "ext4", 256 * MIB) else {
        return skipped(name, "root and mkfs.ext4");
    };
    let target = small.point().join("target");
    write_sparse(&target, &disks.old);
    let place = format!("{} --state state", target.display());
    let run = disks.start(&format!(
        "sync source {place} --mode full --strategy shadow"
    ));

    small.fill(0);
    let stopped = run.finish();

    assert_says(&stopped, 4, &["No space left"]);
    assert!(same(&target, &disks.old));
    small.empty();
    disks.resumes(&format!("sync source {place}"));
    assert!(same(&target, &disks.new));
}

// --- things that go away -------------------------------------------------------------------------------------------

#[test]
fn a_target_removed_under_way_is_noticed_and_made_anew_by_the_next_run() {
    let disks = Disks::new();
    let run = disks.start("sync source target --mode delta --strategy redo");

    fs::remove_file(disks.lab.path("target")).unwrap();
    let stopped = run.finish();

    assert_says(&stopped, 4, &["target", "removed"]);
    assert!(!disks.lab.path("target").exists());
    disks.lab.must("sync source target");
    disks.lab.assert_holds("target", &disks.new);
}

#[test]
fn a_state_directory_removed_under_way_leaves_the_old_point() {
    let disks = Disks::new();
    let run = disks.start("sync source target --mode delta --strategy redo");

    fs::remove_dir_all(disks.lab.path(".target.blockferry")).unwrap();
    let stopped = run.finish();

    assert_ne!(
        stopped.code,
        Some(0),
        "what it could not record it must not report as done: {stopped:#?}"
    );
    disks.lab.assert_holds("target", &disks.old);
    disks.lab.must("sync source target");
    disks.lab.assert_holds("target", &disks.new);
}

#[test]
fn a_source_truncated_under_way_leaves_the_old_point() {
    let disks = Disks::new();
    let run = disks.start("sync source target --mode delta --strategy redo");

    with_files(|| {
        let source = OpenOptions::new()
            .write(true)
            .open(disks.lab.path("source"));
        source.unwrap().set_len(5 * MIB + 1).unwrap();
    });
    let stopped = run.finish();

    assert_says(&stopped, 3, &["source", "shorter"]);
    disks.lab.assert_holds("target", &disks.old);
    // The rest comes back: what was durable still counts.
    disks.lab.write("source", &disks.new);
    disks.resumes("sync source target --mode delta --strategy redo");
    disks.lab.assert_holds("target", &disks.new);
}

#[test]
fn a_source_written_under_way_commits_nothing_and_the_next_run_takes_what_it_is_then() {
    let disks = Disks::new();
    let run = disks.start("sync source target --mode delta --strategy redo");

    let mut newer = disks.new.clone();
    newer[..9].copy_from_slice(b"under way");
    disks.lab.patch("source", 0, b"under way");
    let stopped = run.finish();

    assert_says(
        &stopped,
        3,
        &["written while it was read", "nothing was committed"],
    );
    assert_resumable(&stopped);
    disks.lab.assert_holds("target", &disks.old);
    disks.resumes("resume target");
    disks.lab.assert_holds("target", &newer);
}

#[test]
fn a_read_error_of_the_source_leaves_the_old_point_and_the_run_resumes() {
    let disks = Disks::new();
    let healthy = open_source(&disks.lab.path("source"), SourceOptions::default()).unwrap();
    let faulty = FaultySource::new(Arc::clone(&healthy)).fail_read_at(11 * MIB);
    let options = TargetOptions::new(disks.lab.path("state-root"));
    let place = disks.lab.path("target");
    let mut how = SyncOptions::default();
    how.mode = blockferry::Mode::Delta;
    how.strategy = Some(blockferry::transfer_log::Strategy::Redo);

    let mut target = Target::open(&place, &options).unwrap();
    // A sample of every block would meet the error before anything is staged, which is fine but not the point here.
    let error = sync(Arc::new(faulty), &mut target, &how, &Context::new()).unwrap_err();
    drop(target);

    assert_eq!(error.kind(), ErrorKind::Source, "{error:?}");
    disks.lab.assert_holds("target", &disks.old);
    let mut target = Target::open(&place, &options).unwrap();
    let receipt = sync(healthy, &mut target, &how, &Context::new()).unwrap();
    drop(target);
    assert_eq!(receipt.restaged_bytes, 0);
    assert_eq!(
        receipt.resumed_bytes > 0,
        error.is_resumable(),
        "{receipt:?}"
    );
    disks.lab.assert_holds("target", &disks.new);
}

// --- limits --------------------------------------------------------------------------------------------------------

#[test]
fn a_log_limit_interrupts_and_the_printed_command_goes_on_without_it() {
    let disks = Disks::new();

    let stopped = disks
        .lab
        .run("sync source target --mode delta --strategy redo --log-limit 4M --threads 2");

    assert_says(&stopped, 5, &["limit", "still at its old point"]);
    assert_resumable(&stopped);
    disks.lab.assert_holds("target", &disks.old);
    let again = disks.lab.run("resume target --log-limit 5M");
    assert_says(&again, 5, &["limit"]);
    let printed = again.complaint();
    let line = printed.split("blockferry ").last().expect("a command");
    assert!(
        line.starts_with("resume ") && !line.contains("limit"),
        "{printed}"
    );
    disks.resumes(line);
    disks.lab.assert_holds("target", &disks.new);
}

#[test]
fn a_log_limit_is_said_clearly_and_the_session_can_be_cancelled() {
    let disks = Disks::new();
    let limited = "sync source target --mode delta --strategy redo --log-limit 4M";
    assert_says(&disks.lab.run(limited), 5, &["limit of 4194304 bytes"]);

    let cancelled = disks.lab.must("cancel target");

    assert_eq!(cancelled.summary()["outcome"], "cancelled");
    disks.lab.assert_holds("target", &disks.old);
    disks.lab.must("sync source target");
    disks.lab.assert_holds("target", &disks.new);
}

#[test]
fn a_log_that_may_not_grow_interrupts_and_resumes_where_it_may() {
    let disks = Disks::new();

    // Slow enough for a group to be durable before the file is as large as it may be.
    let stopped = disks.lab.run_with_small_files(
        16 * MIB,
        "sync source target --mode delta --strategy redo --bwlimit 4M",
    );

    assert_says(&stopped, 5, &["File too large", "still at its old point"]);
    assert_resumable(&stopped);
    disks.lab.assert_holds("target", &disks.old);
    disks.resumes("resume target");
    disks.lab.assert_holds("target", &disks.new);
}

// --- between commit and apply --------------------------------------------------------------------------------------

/// Disks that differ in a page far behind: small logs, and a write that is refused where files must stay small.
fn committed_and_stuck() -> (Lab, Vec<u8>) {
    let lab = Lab::new();
    let mut image = lab.disk("target", 23, 48 * MIB);
    image[usize::try_from(40 * MIB).expect("small")..][..8192].fill(b'!');
    lab.write("source", &image);
    let line = "sync source target --mode delta --strategy redo --undo none";

    let stopped = lab.run_with_small_files(32 * MIB, line);

    assert_says(
        &stopped,
        6,
        &["committed but not yet in place", "blockferry resume"],
    );
    let status = lab.must("status target");
    assert_eq!(status.summary()["state"], "committed");
    (lab, image)
}

#[test]
fn what_is_committed_and_could_not_be_applied_is_finished_by_the_next_command() {
    for line in ["resume target", "sync source target", "verify target"] {
        let (lab, new) = committed_and_stuck();
        let stuck = lab.run_with_small_files(32 * MIB, line);
        assert_says(&stuck, 6, &["committed but not yet in place"]);

        lab.must(line);

        lab.assert_holds("target", &new);
        assert_eq!(lab.must("status target").summary()["state"], "at");
    }
}

#[test]
fn what_is_committed_needs_its_source_no_more() {
    let (lab, new) = committed_and_stuck();
    fs::remove_file(lab.path("source")).unwrap();

    let resumed = lab.run("resume target");

    assert_says(&resumed, 3, &["source"]);
    lab.assert_holds("target", &new);
}

#[test]
fn a_way_back_that_was_cut_short_is_finished_and_goes_no_further() {
    let lab = Lab::new();
    let image = lab.disk("target", 24, 48 * MIB);
    let first = lab.edited("source", 25, &image, 0.01);
    lab.must("sync source target --mode delta --strategy redo");
    let mut second = first.clone();
    second[usize::try_from(40 * MIB).expect("small")..][..8192].fill(b'!');
    lab.write("source", &second);

    // Neither the new pages nor the old ones can be written there.
    let stopped = lab.run_with_small_files(32 * MIB, "sync source target --strategy redo");

    assert_says(
        &stopped,
        6,
        &["returned to its old point", "blockferry rollback"],
    );
    let status = lab.must("status target");
    assert_eq!(status.summary()["state"], "rolling_back");
    let resumed = lab.run("resume target");
    assert_says(&resumed, 2, &["on its way back", "blockferry rollback"]);
    let finished = lab.must("rollback target");
    assert_eq!(finished.summary()["outcome"], "rolled_back");
    // Not at the point before that, which is kept as well.
    lab.assert_holds("target", &first);
    lab.must("rollback target");
    lab.assert_holds("target", &image);
}
