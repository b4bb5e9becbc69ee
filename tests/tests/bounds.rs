//! What a run may use: memory, bandwidth, space; and what it must not do at all.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use blockferry_testkit::images;

use crate::lab::{Answer, Lab, MIB, MountedFileSystem, skipped, write_sparse};

const PEAK_BYTES: u64 = 192 * MIB;

#[track_caller]
fn assert_modest(answer: &Answer) {
    let peak = answer.peak_bytes;
    assert!(peak > 0, "the peak was not seen");
    assert!(peak <= PEAK_BYTES, "peak {} MiB", peak / MIB);
}

#[test]
fn memory_stays_bounded_when_far_more_than_that_changes() {
    let lab = Lab::new();
    let bytes = 320 * MIB;
    images::write_sparse_file(&lab.path("source"), 71, bytes, bytes).unwrap();
    images::write_sparse_file(&lab.path("target"), 72, bytes, bytes).unwrap();

    let applied = lab.must("sync source target --mode delta --strategy redo");

    assert_modest(&applied);
    assert!(applied.count("changed_bytes") > 300 * MIB);
    assert_eq!(lab.must("verify source target").summary()["equal"], true);
    assert_modest(&lab.must("rollback target"));
}

/// 64 runs of 1 MiB of noise, one every `stride`, on no block's boundary.
fn scattered(path: &Path, stride: u64) -> std::io::Result<()> {
    let noise = images::random_image(73, MIB);
    let file = std::fs::File::create(path)?;
    file.set_len(64 * stride)?;
    let offset = if stride > MIB { 12_288 } else { 0 };
    (0..64).try_for_each(|run| file.write_all_at(&noise, run * stride + offset))
}

#[test]
fn eight_tebibytes_of_holes_cost_what_their_data_costs() {
    let lab = Lab::new();
    let (dense, sparse) = ("dense", "sparse");
    if scattered(&lab.path(dense), MIB)
        .and_then(|()| scattered(&lab.path(sparse), 128 << 30))
        .is_err()
    {
        let needs = "a file system with files of 8 TiB";
        return skipped("eight_tebibytes_of_holes_cost_what_their_data_costs", needs);
    }

    let small = lab.must(&format!("sync {dense} a"));
    let large = lab.must(&format!("sync {sparse} b"));

    for field in ["scanned_bytes", "staged_bytes", "sent_bytes"] {
        let (small, large) = (small.count(field), large.count(field));
        assert!(
            large * 10 <= small * 12,
            "{field}: {large} bytes against {small}"
        );
    }
    assert_modest(&large);
    // Times are for benches; this only tells linear in the data from linear in the size.
    let allowed = small.elapsed * 3 + Duration::from_secs(3);
    assert!(
        large.elapsed < allowed,
        "{:?} against {:?}",
        large.elapsed,
        small.elapsed
    );

    // A delta with almost nothing to do, on both sides.
    lab.patch(sparse, 5 << 40, b"change");
    let delta = lab.must(&format!("sync {sparse} b --mode delta"));
    assert_modest(&delta);
    assert_eq!(delta.count("staged_bytes"), 4096);
    assert_eq!(
        lab.must(&format!("verify {sparse} b")).summary()["equal"],
        true
    );
}

#[test]
fn the_bandwidth_limit_slows_a_run_as_asked() {
    let lab = Lab::new();
    let old = lab.disk("target", 74, 8 * MIB);
    lab.edited("source", 75, &old, 1.0);

    let slow = lab.must("sync source target --mode delta --strategy redo --bwlimit 3M");

    let rate = slow.count("sent_bytes") as f64 / slow.elapsed.as_secs_f64();
    // A burst may go first; how exact the rate is, is tested on a virtual clock.
    assert!(
        rate < 1.3 * 3.0 * MIB as f64,
        "{:.1} MiB/s",
        rate / MIB as f64
    );
}

#[test]
fn a_dry_run_writes_nothing_whatever_it_finds() {
    let lab = Lab::new();
    let old = lab.disk("target", 76, 4 * MIB);
    lab.edited("source", 77, &old, 0.3);
    let everything = |_: &Path| true;
    let before = lab.footprint(everything);

    let present = lab.must("sync source target --dry-run");
    let absent = lab.must("sync source fresh --dry-run");

    assert_eq!(lab.footprint(everything), before);
    assert!(present.count("predicted_changed_bytes") > 0);
    assert_eq!(absent.summary()["strategy"], "direct");

    // And where there is a state already.
    lab.must("sync source target");
    lab.disk("source", 78, 4 * MIB);
    let before = lab.footprint(everything);
    lab.must("sync source target --dry-run");
    assert_eq!(lab.footprint(everything), before);
}

#[test]
fn a_larger_target_is_cut_only_when_that_is_allowed() {
    let lab = Lab::new();
    let old = lab.disk("target", 79, 5 * MIB + 512);
    let new = lab.edited("source", 80, &old[..usize::try_from(2 * MIB).unwrap()], 0.1);

    assert_eq!(lab.run("sync source target").code, Some(4));
    lab.assert_holds("target", &old);
    lab.must("sync source target --allow-shrink");
    lab.assert_holds("target", &new);
    lab.must("rollback target");
    lab.assert_holds("target", &old);
}

#[test]
fn a_dry_run_knows_whether_blocks_can_be_shared_and_writes_nothing_to_find_out() {
    for (kind, options, bytes, strategy) in [
        ("xfs", &[] as &[&str], 320 * MIB, "clone"),
        ("xfs", &["-m", "reflink=0"], 320 * MIB, "redo"),
        ("btrfs", &[], 160 * MIB, "clone"),
        ("ext4", &[], 96 * MIB, "redo"),
    ] {
        let lab = Lab::new();
        let Some(mounted) = MountedFileSystem::make_with(lab.root(), kind, options, bytes) else {
            skipped(
                "a_dry_run_knows_whether_blocks_can_be_shared",
                &format!("root and mkfs.{kind}"),
            );
            continue;
        };
        let old = lab.disk("old", 66, 8 * MIB);
        lab.edited("source", 67, &old, 0.05);
        let target = mounted.point().join("target");
        write_sparse(&target, &old);
        let before = lab.footprint(|path| path.starts_with(mounted.point()));
        let line = format!("sync source {} --mode delta", target.display());

        let foretold = lab.must(&format!("{line} --dry-run"));

        assert_eq!(
            lab.footprint(|path| path.starts_with(mounted.point())),
            before,
            "{kind} {options:?}: something was written"
        );
        let done = lab.must(&line);
        for answer in [foretold, done] {
            assert_eq!(answer.summary()["strategy"], strategy, "{kind} {options:?}");
        }
    }
}
