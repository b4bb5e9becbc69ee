//! After a completed sync: back to the old point bit for bit, or letting it go; nothing to do the second time; and
//! a target that somebody else wrote.

use std::fs::{self, OpenOptions};
use std::path::Path;

use crate::lab::{Lab, MIB, MountedFileSystem, disk_usage, file_usage, same, skipped, with_files};

/// Sizes of the old and the new image: equal, grown, shrunk, none of them a round number of anything.
const SIZES: [(u64, u64); 3] = [
    (6 * MIB + 512, 6 * MIB + 512),
    (4 * MIB + 1536, 7 * MIB + 512 + 4096),
    (7 * MIB + 512, 3 * MIB + 1024),
];

/// Old content as `target` in `place`, new content as `source`.
fn disks(lab: &Lab, place: &Path, (old_bytes, new_bytes): (u64, u64)) -> (Vec<u8>, Vec<u8>) {
    let old = lab.disk("old", 31, old_bytes);
    crate::lab::write_sparse(&place.join("target"), &old);
    let mut resized = old.clone();
    resized.resize(usize::try_from(new_bytes).expect("small"), 3);
    let new = lab.edited("source", 32, &resized, 0.2);
    (old, new)
}

fn there_and_back(lab: &Lab, place: &Path, arguments: &str, sizes: (u64, u64)) {
    let (old, new) = disks(lab, place, sizes);
    let target = place.join("target");
    let line = format!(
        "sync source {} --allow-shrink {arguments}",
        target.display()
    );
    let case = format!("{arguments} {sizes:?}");

    let applied = lab.must(&line);
    assert_eq!(applied.summary()["rollback_available"], true, "{case}");
    assert!(same(&target, &new), "{case}");
    lab.must(&format!("verify {}", target.display()));

    lab.must(&format!("rollback {}", target.display()));
    assert!(same(&target, &old), "{case}: not the old point");

    lab.must(&line);
    assert!(same(&target, &new), "{case}: not the new point again");
    lab.must(&format!("accept {}", target.display()));
    assert!(same(&target, &new), "{case}: accept changed the target");
    assert_eq!(
        lab.run(&format!("rollback {}", target.display())).code,
        Some(4),
        "{case}"
    );
    fs::remove_dir_all(place.join(".target.blockferry")).expect("removed");
}

#[test]
fn rollback_returns_the_old_point_bit_for_bit_whatever_the_sizes() {
    let lab = Lab::new();

    for arguments in [
        "--mode delta --strategy redo",
        "--mode full --strategy shadow",
    ] {
        for sizes in SIZES {
            there_and_back(&lab, lab.root(), arguments, sizes);
        }
    }
}

#[test]
fn rollback_of_a_clone_returns_the_old_file() {
    for (kind, bytes) in [("xfs", 320 * MIB), ("btrfs", 160 * MIB)] {
        let lab = Lab::new();
        let Some(mounted) = MountedFileSystem::make(lab.root(), kind, bytes) else {
            skipped(
                "rollback_of_a_clone_returns_the_old_file",
                &format!("root and mkfs.{kind}"),
            );
            continue;
        };

        for sizes in SIZES {
            there_and_back(&lab, mounted.point(), "--mode delta", sizes);
        }
    }
}

#[test]
fn accept_frees_the_space_of_the_old_point() {
    for arguments in [
        "--mode delta --strategy redo",
        "--mode full --strategy shadow",
    ] {
        let lab = Lab::new();
        let (_, new) = disks(&lab, lab.root(), (8 * MIB, 8 * MIB));
        // Of everything but the target itself, which may need more or less than before.
        let beside = || disk_usage(lab.root()) - file_usage(&lab.path("target"));
        let before = beside();
        lab.must(&format!("sync source target {arguments}"));
        let held = beside();
        assert!(
            held > before + MIB,
            "{arguments}: {before} -> {held}: the old point takes space"
        );

        let accepted = lab.must("accept target");

        let after = beside();
        let freed = accepted.count("freed_bytes");
        assert!(
            freed.abs_diff(held - after) < MIB / 4,
            "{arguments}: it says {freed}, the disk says {}",
            held - after
        );
        assert!(
            after < before + MIB / 4,
            "{arguments}: {before} -> {held} -> {after}"
        );
        lab.assert_holds("target", &new);
        lab.must("verify target");
    }
}

#[test]
fn an_unwritten_pair_is_neither_read_nor_written_the_second_time() {
    for arguments in ["--mode delta --strategy redo", "--strategy shadow", ""] {
        let lab = Lab::new();
        disks(&lab, lab.root(), (8 * MIB + 512, 8 * MIB + 512));
        lab.must(&format!("sync source target {arguments}"));
        // The lock file names its holder, so a run leaves its process number there.
        let unlocked = |path: &Path| path.file_name().is_some_and(|name| name != "lock");
        let before = lab.footprint(unlocked);

        let again = lab.must("sync source target");

        assert_eq!(
            lab.footprint(unlocked),
            before,
            "{arguments}: something was written"
        );
        assert_eq!(again.summary()["outcome"], "identical");
        for field in [
            "target_read_bytes",
            "log_bytes",
            "staged_bytes",
            "sent_bytes",
            "records",
        ] {
            assert_eq!(again.count(field), 0, "{field} after {arguments}");
        }
    }
}

#[test]
fn an_identical_pair_gets_no_log_and_no_write_to_the_target() {
    let lab = Lab::new();
    let image = lab.disk("source", 33, 8 * MIB);
    lab.write("target", &image);
    let target_only = |path: &Path| path.ends_with("target");
    let before = lab.footprint(target_only);

    let first = lab.must("sync source target --mode delta");

    assert_eq!(first.summary()["outcome"], "identical");
    assert_eq!(lab.footprint(target_only), before, "the target was written");
    let logs = fs::read_dir(lab.path(".target.blockferry"))
        .expect("listed")
        .flatten();
    let logs: Vec<_> = logs
        .map(|e| e.file_name())
        .filter(|n| n.to_string_lossy().contains("log"))
        .collect();
    assert!(logs.is_empty(), "{logs:?}");
}

#[test]
fn with_a_saved_manifest_an_untouched_target_is_read_only_where_the_source_changed() {
    let lab = Lab::new();
    let (_, new) = disks(&lab, lab.root(), (32 * MIB, 32 * MIB));
    lab.must("sync source target --mode delta --strategy redo");
    let mut newer = new;
    newer[5_000_000..5_000_006].copy_from_slice(b"change");
    lab.write("source", &newer);

    let second = lab.must("sync source target --mode delta --strategy redo");

    lab.assert_holds("target", &newer);
    let read = second.count("target_read_bytes");
    assert!(
        read <= 64 * 1024,
        "{read} bytes of the target were read for one changed block"
    );
}

#[test]
fn a_target_written_behind_our_back_is_noticed_compared_in_full_and_brought_right() {
    let lab = Lab::new();
    let (_, new) = disks(&lab, lab.root(), (8 * MIB, 8 * MIB));
    lab.must("sync source target --mode delta --strategy redo");
    let modified = fs::metadata(lab.path("target"))
        .unwrap()
        .modified()
        .unwrap();
    lab.patch("target", 3_000_000, b"somebody else");
    // Even one who covers the tracks he can.
    with_files(|| {
        let file = OpenOptions::new()
            .write(true)
            .open(lab.path("target"))
            .unwrap();
        file.set_modified(modified).unwrap();
    });

    let status = lab.must("status target");
    assert_eq!(status.summary()["target_unwritten"], false);
    let rollback = lab.run("rollback target");
    assert_eq!(rollback.code, Some(4), "{rollback:#?}");
    assert!(
        rollback.complaint().contains("unwritten"),
        "{}",
        rollback.complaint()
    );
    let verify = lab.run("verify target");
    assert_eq!(verify.code, Some(7), "{verify:#?}");
    // Whether it would be compared or, without a look at it, replaced.
    for mode in ["auto", "delta", "full"] {
        let strict = lab.run(&format!("sync source target --strict --mode {mode}"));
        assert_eq!(strict.code, Some(4), "{mode}: {strict:#?}");
    }
    assert!(
        !same(&lab.path("target"), &new),
        "a refused run changes nothing"
    );

    // By name: where both modes are predicted equally fast, either may be chosen, and full compares nothing.
    let again = lab.must("sync source target --mode delta");

    assert!(again.has_warning(), "{again:#?}");
    assert!(!again.summary()["fallbacks"].as_array().unwrap().is_empty());
    assert!(again.count("target_read_bytes") > 0);
    lab.assert_holds("target", &new);
}

#[test]
fn letting_the_old_point_go_does_not_vouch_for_what_somebody_else_wrote() {
    let lab = Lab::new();
    for strategy in ["redo", "shadow"] {
        let (_, new) = disks(&lab, lab.root(), SIZES[0]);
        lab.must(&format!("sync source target --strategy {strategy}"));
        lab.patch("target", 3_000_000, b"somebody else");

        lab.must("accept target");

        let status = lab.must("status target");
        assert_eq!(status.summary()["target_unwritten"], false, "{status:#?}");
        lab.must("sync source target");
        lab.assert_holds("target", &new);
        fs::remove_dir_all(lab.path(".target.blockferry")).expect("removed");
    }
}

#[test]
fn a_write_in_the_second_of_ours_is_noticed_where_files_have_no_finer_times() {
    let name = "a_write_in_the_second_of_ours_is_noticed_where_files_have_no_finer_times";
    let lab = Lab::new();
    // Inodes of this size have room for whole seconds only.
    let options = ["-I", "128"];
    let Some(mounted) = MountedFileSystem::make_with(lab.root(), "ext4", &options, 64 * MIB) else {
        return skipped(name, "root and mkfs.ext4");
    };
    let (_, new) = disks(&lab, mounted.point(), SIZES[0]);
    let target = "ext4/target";
    for _ in 0..3 {
        lab.must(&format!("sync source {target} --strategy redo"));
        lab.assert_holds(target, &new);

        lab.patch(target, 1_000_000, b"somebody else");

        let refused = lab.run(&format!("rollback {target}"));
        assert_eq!(refused.code, Some(4), "{refused:#?}");
        assert!(refused.complaint().contains("unwritten"), "{refused:#?}");
        lab.must(&format!("accept {target}"));
    }
}
