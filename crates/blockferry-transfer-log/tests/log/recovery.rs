//! Rot and failures: detected, and repaired where there is a source.

use blockferry_core::checksum;
use blockferry_testkit::{Fault, FaultKind, OperationKind, Repeat, SimDisk};
use blockferry_transfer_log::{ErrorKind, Prepared, Recovered, Strategy, Unwritten};

use crate::harness::{PAGE, Setup, TARGET, id, image, quiet, root};
use crate::sessions::stage_some;

fn old() -> Vec<u8> {
    image(&[1, 2, 0, 4], 4 * PAGE)
}

fn new() -> Vec<u8> {
    image(&[1, 5, 3, 6], 4 * PAGE)
}

fn log_of(session: u8) -> String {
    format!("state/{}.log.0000", id(session))
}

/// Changes a structure of one page at `at`, and its checksum with it, which is returned.
fn change(bytes: &mut [u8], at: usize, change: impl Fn(&mut [u8])) -> Vec<u8> {
    let (body, sum) = bytes[at..at + PAGE].split_at_mut(PAGE - 32);
    change(body);
    sum.copy_from_slice(checksum(body).as_bytes());
    sum.to_vec()
}

#[test]
fn a_record_whose_pages_are_said_to_be_elsewhere_does_not_count_where_the_log_keeps_them() {
    const PAGES: usize = 82;
    // Old pages would be looked for where the new ones are.
    let setup = Setup::device(Strategy::Redo).without_undo();
    let disk = setup.machine(Some(&old()));
    stage_some(&setup, &disk, 1, &new(), 9, false);
    let mut log = disk.content(&log_of(1)).unwrap();
    let last = (0..log.len())
        .step_by(PAGE)
        .rfind(|at| log[*at..].starts_with(b"BFRYREC\0"))
        .unwrap();
    assert_eq!(log[last + PAGES], 1, "plain");
    change(&mut log, last, |record| record[PAGES] = 0);
    disk.install("state", &log_of(1)["state/".len()..], &log);

    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut session = replica.resume(u64::MAX).unwrap();
    let left = setup.batches(&session, target.as_ref(), &new()).unwrap();
    assert!(left.iter().any(|batch| !batch.is_empty()), "it counts");
    setup.finish(&mut session, target.as_ref(), &new()).unwrap();
    session.commit(root(&new()), &quiet).unwrap();

    assert_eq!(setup.content(&disk), Some(new()));
}

#[test]
fn a_segment_about_another_image_does_not_go_on_with_the_one_before() {
    const CHANGES: [(&str, usize, u8); 5] = [
        ("epoch", 28, 1),
        ("strategy", 36, 1),
        ("undo", 37, 3),
        ("old size", 40, 1),
        ("new size", 48, 1),
    ];
    const PREVIOUS: usize = 40;
    let setup = Setup::device(Strategy::Redo);
    let machine = setup.machine(Some(&old()));
    stage_some(&setup, &machine, 1, &new(), 1, false);
    let mut replica = setup.open(&machine).unwrap();
    let target = replica.target();
    let mut session = replica.resume(u64::MAX).unwrap();
    setup.finish(&mut session, target.as_ref(), &new()).unwrap();
    drop(session);
    drop(replica);
    let name = format!("{}.log.0001", id(1));
    let segment = machine.content(&format!("state/{name}")).unwrap();
    let snapshot = machine.snapshot();
    let reopened = |segment: &[u8]| {
        let disk = snapshot.after_kill();
        disk.install("state", &name, segment);
        let mut replica = setup.open(&disk).unwrap();
        let target = replica.target();
        let session = replica.resume(u64::MAX).unwrap();
        let left = setup.batches(&session, target.as_ref(), &new()).unwrap();
        left.iter().any(|batch| !batch.is_empty())
    };
    assert!(!reopened(&segment), "all of it is there");
    for (field, at, bits) in CHANGES {
        let mut segment = segment.clone();
        let chain = change(&mut segment, 0, |header| header[at] ^= bits);
        change(&mut segment, PAGE, |record| {
            record[PREVIOUS..][..32].copy_from_slice(&chain);
        });

        assert!(reopened(&segment), "{field}");
    }
}

#[test]
fn a_record_that_rots_is_staged_again_and_the_way_back_stays_whole() {
    for setup in [Setup::file(Strategy::Redo), Setup::device(Strategy::Redo)] {
        let probe = setup.machine(Some(&old()));
        stage_some(&setup, &probe, 1, &new(), 9, false);
        let log_bytes = probe.content(&log_of(1)).unwrap().len();
        let mut repaired = 0;
        for offset in (PAGE..log_bytes).step_by(509) {
            let disk = setup.machine(Some(&old()));
            let mut replica = setup.open(&disk).unwrap();
            let target = replica.target();
            let mut session = replica.begin(&setup.plan(1, &new())).unwrap();
            // All groups written but not yet read back by a resumed run.
            setup
                .stage(&mut session, target.as_ref(), &new(), 9, &mut |_| {})
                .unwrap();
            drop(session);
            drop(replica);
            disk.flip_bit(&log_of(1), offset as u64);

            let mut replica = setup.open(&disk).unwrap();
            let target = replica.target();
            let mut session = replica.resume(u64::MAX).unwrap();
            while let Prepared::Missing(_) = session.prepare().unwrap() {
                repaired += 1;
                setup
                    .stage(&mut session, target.as_ref(), &new(), 9, &mut |_| {})
                    .unwrap();
            }
            setup.finish(&mut session, target.as_ref(), &new()).unwrap();
            session.commit(root(&new()), &quiet).unwrap();

            assert_eq!(setup.content(&disk), Some(new()), "offset {offset}");
            drop(replica);
            let mut replica = setup.open(&disk).unwrap();
            replica.rollback(&quiet).unwrap();
            assert_eq!(setup.content(&disk), Some(old()), "offset {offset}");
        }
        assert!(repaired > 10, "{repaired}");
    }
}

#[test]
fn a_read_error_that_goes_away_forgets_nothing_that_was_acknowledged() {
    for setup in [Setup::file(Strategy::Redo), Setup::file(Strategy::Clone)] {
        let disk = setup.machine(Some(&old()));
        let staged = stage_some(&setup, &disk, 1, &new(), 9, false);
        let whole = disk.snapshot().after_kill();
        let before = whole.reads();
        drop(setup.open(&whole).unwrap());
        let reads = whole.reads() - before;
        assert!(reads > 1);
        for nth in 1..=reads {
            let disk = disk.snapshot().after_kill();
            disk.inject(Fault::on(OperationKind::Read, "state/", nth, FaultKind::Io));

            let mut replica = setup.open(&disk).unwrap();

            assert_eq!(*replica.recovered(), Recovered::Staging, "read {nth}");
            let session = replica.resume(u64::MAX).unwrap();
            assert_eq!(session.totals().resumed_bytes, staged, "read {nth}");
        }
    }
}

#[test]
fn what_cannot_be_read_is_said_with_its_cause() {
    let setup = Setup::file(Strategy::Redo);
    let disk = setup.machine(Some(&old()));
    setup
        .sync(&mut setup.open(&disk).unwrap(), 1, &new())
        .unwrap();
    for (path, step) in [("state/state", "open"), (&*log_of(1), "roll back")] {
        let disk = disk.snapshot().after_kill();
        let unreadable = Fault::on(OperationKind::Read, path, 1, FaultKind::Io);
        disk.inject(unreadable.repeat(Repeat::Forever));

        let failed = match setup.open(&disk) {
            Ok(mut replica) => replica.rollback(&quiet).unwrap_err(),
            Err(error) => error,
        };

        let told = format!("{failed:?}");
        assert!(told.contains(&format!("Read of {path}")), "{step}: {told}");
        assert_eq!(setup.content(&disk), Some(new()), "{step}");
    }
}

#[test]
fn every_bit_flip_of_the_state_is_detected_or_harmless() {
    let setup = Setup::file(Strategy::Redo);
    let disk = setup.machine(Some(&old()));
    setup
        .sync(&mut setup.open(&disk).unwrap(), 1, &new())
        .unwrap();
    disk.dir("state").sync().unwrap();
    let state = disk.content("state/state").unwrap();
    for offset in (0..state.len()).step_by(37) {
        let disk = disk.snapshot().after_kill();
        disk.flip_bit("state/state", offset as u64);

        match setup.open(&disk) {
            Ok(replica) => {
                assert_eq!(setup.content(&disk), Some(new()), "byte {offset}");
                assert!(
                    replica.point().is_none_or(|p| p.root == root(&new())),
                    "byte {offset}"
                );
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt, "byte {offset}"),
        }
        assert_eq!(setup.content(&disk), Some(new()), "byte {offset}");
    }
}

#[test]
fn a_rotten_decision_is_read_from_its_mirror() {
    let setup = Setup::file(Strategy::Redo);
    let disk = setup.machine(Some(&old()));
    let commit_is_durable = |disk: &SimDisk| {
        let mut replica = setup.open(disk).unwrap();
        let target = replica.target();
        let mut session = replica.begin(&setup.plan(1, &new())).unwrap();
        setup.finish(&mut session, target.as_ref(), &new()).unwrap();
        // COMMIT becomes durable, then the target fails for good.
        let broken = Fault::on(OperationKind::Write, "images/", 1, FaultKind::PowerLoss);
        disk.inject(broken.repeat(Repeat::Forever));
        session.commit(root(&new()), &quiet).unwrap_err().kind()
    };
    assert_eq!(commit_is_durable(&disk), ErrorKind::DecisionPending);
    let snapshot = disk.snapshot();
    for page in [3, 4] {
        let disk = snapshot.after_kill();
        assert!(disk.spoil("state/state", page * 4096));

        let replica = setup.open(&disk).unwrap();

        assert_eq!(*replica.recovered(), Recovered::Applied(id(1)));
        assert_eq!(setup.content(&disk), Some(new()));
    }
}

#[test]
fn a_decided_session_without_all_of_its_log_is_reported_and_nothing_is_touched() {
    let setup = Setup::file(Strategy::Redo);
    // The header of the log, and that of its first record.
    for rotten in [100, PAGE as u64 + 50] {
        let disk = committed_before(OperationKind::Write, &setup);
        disk.flip_bit(&log_of(1), rotten);

        assert_eq!(setup.open(&disk).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(setup.content(&disk), Some(old()), "byte {rotten}");
        assert!(disk.content(&log_of(1)).is_some(), "evidence is kept");
    }
}

/// Gives the first copy of the first decision another epoch, and its checksum.
fn decide_in_epoch(disk: &SimDisk, epoch: u8) {
    const EPOCH: usize = 28;
    let mut state = disk.content("state/state").unwrap();
    let (body, sum) = state[3 * PAGE..4 * PAGE].split_at_mut(PAGE - 32);
    body[EPOCH] = epoch;
    sum.copy_from_slice(checksum(body).as_bytes());
    disk.install("state", "state", &state);
}

#[test]
fn a_decision_of_another_epoch_than_its_log_is_refused_and_nothing_is_touched() {
    let cases = [
        (Strategy::Redo, OperationKind::Write),
        (Strategy::Clone, OperationKind::Exchange),
    ];
    for (strategy, change) in cases {
        let setup = Setup::file(strategy);
        let disk = committed_before(change, &setup);
        decide_in_epoch(&disk, 9);

        let refused = setup.open(&disk).unwrap_err();

        assert_eq!(refused.kind(), ErrorKind::Corrupt, "{refused}");
        assert!(refused.to_string().contains("expected epoch 1"));
        assert_eq!(setup.content(&disk), Some(old()), "{strategy}");
    }
}

/// Puts another file of the same size at the name of the session's sibling.
fn replace_sibling(disk: &SimDisk) {
    let name = format!(".{TARGET}.{}.blockferry", id(1));
    disk.dir("images").remove(&name).unwrap();
    disk.install("images", &name, &image(&[9, 9, 9, 9], 4 * PAGE));
}

/// A machine that stopped when session 1 was committed, before this first change of the target.
fn committed_before(change: OperationKind, setup: &Setup) -> SimDisk {
    let disk = setup.machine(Some(&old()));
    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut session = replica.begin(&setup.plan(1, &new())).unwrap();
    setup.finish(&mut session, target.as_ref(), &new()).unwrap();
    // Whatever was done of this kind until here was no change of the target.
    disk.inject(Fault::on(change, "images/", 1, FaultKind::PowerLoss));
    session.commit(root(&new()), &quiet).unwrap_err();
    drop(replica);
    disk.snapshot().after_kill()
}

#[test]
fn a_target_that_someone_replaced_or_removed_after_commit_is_left_alone() {
    for strategy in [Strategy::Clone, Strategy::Shadow] {
        let setup = Setup::file(strategy);
        for theirs in [Some(image(&[8, 8], 2 * PAGE)), None] {
            let disk = committed_before(OperationKind::Exchange, &setup);
            disk.dir("images").remove(TARGET).unwrap();
            if let Some(theirs) = &theirs {
                disk.install("images", TARGET, theirs);
            }

            let refused = setup.open(&disk).unwrap_err();

            assert_eq!(refused.kind(), ErrorKind::DecisionPending, "{strategy}");
            assert_eq!(setup.content(&disk), theirs, "{strategy}");
        }
    }
}

#[test]
fn a_sibling_that_someone_replaced_never_becomes_the_target() {
    for strategy in [Strategy::Clone, Strategy::Shadow] {
        let setup = Setup::file(strategy);
        let disk = committed_before(OperationKind::Exchange, &setup);
        replace_sibling(&disk);

        let refused = setup.open(&disk).unwrap_err();

        assert_eq!(refused.kind(), ErrorKind::DecisionPending, "{strategy}");
        assert_eq!(setup.content(&disk), Some(old()), "{strategy}");
    }
}

#[test]
fn an_old_file_that_someone_replaced_never_becomes_the_target() {
    for strategy in [Strategy::Clone, Strategy::Shadow] {
        let setup = Setup::file(strategy);
        let disk = setup.machine(Some(&old()));
        let mut replica = setup.open(&disk).unwrap();
        setup.sync(&mut replica, 1, &new()).unwrap();
        // The way back is decided, and nothing of it is done.
        disk.inject(Fault::on(
            OperationKind::Exchange,
            "images/",
            1,
            FaultKind::PowerLoss,
        ));
        replica.rollback(&quiet).unwrap_err();
        drop(replica);
        let disk = disk.snapshot().after_kill();
        replace_sibling(&disk);

        let refused = setup.open(&disk).unwrap_err();

        assert_eq!(refused.kind(), ErrorKind::Corrupt, "{strategy}");
        assert_eq!(setup.content(&disk), Some(new()), "{strategy}");
    }
}

#[test]
fn a_failing_target_is_returned_to_its_old_point() {
    for kind in [FaultKind::Io, FaultKind::NoSpace] {
        for operation in [OperationKind::Write, OperationKind::Flush] {
            let setup = Setup::file(Strategy::Redo);
            let disk = setup.machine(Some(&old()));
            let mut replica = setup.open(&disk).unwrap();
            let target = replica.target();
            let mut session = replica.begin(&setup.plan(1, &new())).unwrap();
            setup.finish(&mut session, target.as_ref(), &new()).unwrap();
            disk.inject(Fault::on(operation, "images/", 1, kind));

            let failed = session.commit(root(&new()), &quiet).unwrap_err();

            assert_eq!(failed.kind(), ErrorKind::Target);
            assert_eq!(setup.content(&disk), Some(old()), "{operation:?} {kind:?}");
            assert_eq!(disk.misuses(), Vec::<String>::new());
        }
    }
}

#[test]
fn a_target_that_is_gone_while_it_is_written_goes_on_once_it_is_back() {
    for place in [Setup::file(Strategy::Redo), Setup::device(Strategy::Redo)] {
        for operation in [OperationKind::Write, OperationKind::Flush] {
            let (setup, disk) = (&place, place.machine(Some(&old())));
            let mut replica = setup.open(&disk).unwrap();
            let target = replica.target();
            let mut session = replica.begin(&setup.plan(1, &new())).unwrap();
            setup.finish(&mut session, target.as_ref(), &new()).unwrap();
            disk.inject(Fault::on(operation, TARGET, 1, FaultKind::Gone));

            let failed = session.commit(root(&new()), &quiet).unwrap_err();

            assert_eq!(failed.kind(), ErrorKind::DecisionPending, "{operation:?}");
            drop(replica);
            let mut replica = setup.open(&disk).unwrap();
            assert_eq!(
                replica.recovered(),
                &Recovered::Applied(id(1)),
                "not back, where it is not"
            );
            assert_eq!(setup.content(&disk), Some(new()), "{operation:?}");
            replica.rollback(&quiet).unwrap();
            assert_eq!(setup.content(&disk), Some(old()), "{operation:?}");
            assert_eq!(disk.misuses(), Vec::<String>::new());
        }
    }
}

#[test]
fn a_full_log_leaves_a_session_that_resumes() {
    for setup in [Setup::file(Strategy::Redo), Setup::file(Strategy::Clone)] {
        let disk = setup.machine(Some(&old()));
        let mut replica = setup.open(&disk).unwrap();
        let target = replica.target();
        let mut session = replica.begin(&setup.plan(1, &new())).unwrap();
        setup
            .stage(&mut session, target.as_ref(), &new(), 1, &mut |_| {})
            .unwrap();
        disk.inject(Fault::on(
            OperationKind::Write,
            ".log.",
            1,
            FaultKind::NoSpace,
        ));
        let full = setup
            .stage(&mut session, target.as_ref(), &new(), 9, &mut |_| {})
            .unwrap_err();
        assert_eq!(full.kind(), ErrorKind::Log);
        let dead = session
            .close_group()
            .and_then(|_| session.prepare().map(drop));
        assert!(
            dead.is_err(),
            "{setup:?}: a failed log is never appended to again"
        );
        drop(replica);

        let mut replica = setup.open(&disk).unwrap();
        let target = replica.target();
        let mut session = replica.resume(u64::MAX).unwrap();
        setup.finish(&mut session, target.as_ref(), &new()).unwrap();
        assert_eq!(session.totals().restaged_bytes, 0);
        session.commit(root(&new()), &quiet).unwrap();

        assert_eq!(setup.content(&disk), Some(new()));
        assert_eq!(disk.misuses(), Vec::<String>::new());
    }
}

#[test]
fn a_compaction_that_was_cut_short_leaves_no_segment_that_does_not_count() {
    let setup = Setup {
        log_limit_bytes: 192 * 1024,
        ..Setup::file(Strategy::Redo)
    };
    let pages = |round: u8| image(&[round, round + 1, round + 2, round + 3], 4 * PAGE);
    let (old_segment, new_segment) = (log_of(1), log_of(1).replace("0000", "0001"));
    // Cut short before the new segment counts, and after it does.
    for (operation, segment, nth, kept, gone) in [
        (
            OperationKind::Write,
            ".log.0001",
            4,
            &old_segment,
            &new_segment,
        ),
        (
            OperationKind::Remove,
            ".log.0000",
            1,
            &new_segment,
            &old_segment,
        ),
    ] {
        let disk = setup.machine(Some(&old()));
        let mut replica = setup.open(&disk).unwrap();
        let target = replica.target();
        let mut session = replica.begin(&setup.plan(1, &new())).unwrap();
        disk.inject(Fault::on(operation, segment, nth, FaultKind::PowerLoss));
        let mut rounds = (10u8..40)
            .map(|round| setup.stage(&mut session, target.as_ref(), &pages(round), 9, &mut |_| {}));
        assert!(
            rounds.any(|staged| staged.is_err()),
            "nothing was compacted"
        );
        let disk = disk.snapshot().after_kill();
        let is_there = |name: &str| disk.content(name).is_some();
        assert!(is_there(kept) && is_there(gone));

        let mut replica = setup.open(&disk).unwrap();

        assert!(is_there(kept) && !is_there(gone), "{operation:?}");
        let target = replica.target();
        let mut session = replica.resume(192 * 1024).unwrap();
        assert!(session.totals().resumed_bytes > 0);
        setup.finish(&mut session, target.as_ref(), &new()).unwrap();
        session.commit(root(&new()), &quiet).unwrap();
        replica.rollback(&quiet).unwrap();
        assert_eq!(setup.content(&disk), Some(old()));
    }
}

#[test]
fn a_failed_flush_of_the_sibling_is_never_taken_back() {
    let setup = Setup::file(Strategy::Clone);
    let disk = setup.machine(Some(&old()));
    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut session = replica.begin(&setup.plan(1, &new())).unwrap();
    disk.inject(Fault::on(OperationKind::Flush, "images/", 1, FaultKind::Io));

    assert!(
        setup
            .stage(&mut session, target.as_ref(), &new(), 9, &mut |_| {})
            .is_err()
    );
    assert!(session.close_group().is_err());
    assert!(session.prepare().is_err());

    assert_eq!(disk.misuses(), Vec::<String>::new());
    assert_eq!(setup.content(&disk), Some(old()));
}

#[test]
fn a_way_back_that_a_failed_session_left_can_be_taken_and_is_finished_by_recovery() {
    for setup in [Setup::file(Strategy::Redo), Setup::device(Strategy::Redo)] {
        let images: Vec<Vec<u8>> = [1, 11, 21]
            .map(|fill| image(&[fill, fill + 1, fill + 2, fill + 3], 4 * PAGE))
            .into();
        let disk = setup.machine(Some(&images[0]));
        let mut replica = setup.open(&disk).unwrap();
        setup.sync(&mut replica, 1, &images[1]).unwrap();
        let failing = || Fault::on(OperationKind::Write, TARGET, 2, FaultKind::Io);
        let target = replica.target();
        let mut session = replica.begin(&setup.plan(2, &images[2])).unwrap();
        setup
            .finish(&mut session, target.as_ref(), &images[2])
            .unwrap();
        disk.inject(failing());
        let failed = session.commit(root(&images[2]), &quiet).unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::Target, "{failed}");
        assert!(failed.to_string().contains("injected"), "{failed}");
        assert_eq!(setup.content(&disk).as_ref(), Some(&images[1]));

        // On the same handle, which has seen decisions of both sessions.
        disk.inject(failing());
        let pending = replica.rollback(&quiet).unwrap_err();
        assert_eq!(pending.kind(), ErrorKind::DecisionPending, "{pending}");
        drop(replica);

        let replica = setup.open(&disk).unwrap();
        assert_eq!(*replica.recovered(), Recovered::RolledBack(id(1)));
        assert_eq!(setup.content(&disk).as_ref(), Some(&images[0]), "{setup:?}");
    }
}

/// The old content, that of point 1, and what comes next: the first and the last page differ.
fn three_images() -> [Vec<u8>; 3] {
    [[1, 2, 3, 4], [11, 12, 13, 14], [21, 12, 13, 24]].map(|fills| image(&fills, 4 * PAGE))
}

/// A machine at point 1, on which session 2 has staged the first page towards the third image, and then somebody wrote
/// this page of the target.
fn written_by_somebody(setup: &Setup, images: &[Vec<u8>], page: usize) -> SimDisk {
    let disk = setup.machine(Some(&images[0]));
    setup
        .sync(&mut setup.open(&disk).unwrap(), 1, &images[1])
        .unwrap();
    stage_some(setup, &disk, 2, &images[2], 1, false);
    let mut written = images[1].clone();
    written[page * PAGE..][..PAGE].fill(0xEE);
    if setup.device {
        // As after a reboot.
        disk.install_device(TARGET, &written);
    } else {
        let target = setup.open(&disk).unwrap().target().unwrap();
        target.write_at(0, &written).unwrap();
        target.flush().unwrap();
    }
    disk
}

#[test]
fn a_session_that_goes_on_after_somebody_wrote_elsewhere_does_not_vouch_for_the_old_point() {
    let images = three_images();
    let one_page = |setup: Setup| Setup {
        batch_pages: 1,
        ..setup
    };
    let setups = [Setup::file(Strategy::Redo), Setup::device(Strategy::Redo)].map(one_page);
    for setup in setups.into_iter().chain(setups.map(Setup::without_undo)) {
        let disk = written_by_somebody(&setup, &images, 2);
        let mut somebodys = images[1].clone();
        somebodys[2 * PAGE..3 * PAGE].fill(0xEE);
        let mut replica = setup.open(&disk).unwrap();
        assert!(replica.can_resume().unwrap(), "{setup:?}");
        let target = replica.target();
        let mut session = replica.resume(u64::MAX).unwrap();
        setup
            .finish(&mut session, target.as_ref(), &images[2])
            .unwrap();
        assert_eq!(session.totals().restaged_bytes, 0);
        session.commit(root(&images[2]), &quiet).unwrap();
        assert_eq!(setup.content(&disk).as_ref(), Some(&images[2]), "{setup:?}");
        if !setup.is_without_undo() {
            // What it returns to is not point 1.
            assert_eq!(replica.rollback(&quiet).unwrap(), None);
            assert_eq!(setup.content(&disk).as_ref(), Some(&somebodys), "{setup:?}");
            assert_eq!(replica.point(), None);
        }

        let disk = written_by_somebody(&setup, &images, 2);
        let mut replica = setup.open(&disk).unwrap();
        drop(replica.resume(u64::MAX).unwrap());
        drop(replica);
        let mut replica = setup.open(&disk).unwrap();
        replica.cancel().unwrap();
        assert_ne!(replica.unwritten().unwrap(), Unwritten::Proven, "{setup:?}");
        assert_eq!(setup.content(&disk).as_ref(), Some(&somebodys), "{setup:?}");
    }
}

#[test]
fn a_session_does_not_go_on_where_somebody_wrote_what_it_keeps_the_old_content_of() {
    let images = three_images();
    for setup in [Setup::file(Strategy::Redo), Setup::device(Strategy::Redo)] {
        let setup = Setup {
            batch_pages: 1,
            ..setup
        };
        let disk = written_by_somebody(&setup, &images, 0);

        let replica = setup.open(&disk).unwrap();

        assert!(!replica.can_resume().unwrap(), "{setup:?}");
    }
}
