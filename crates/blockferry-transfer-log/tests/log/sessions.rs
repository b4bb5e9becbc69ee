//! Every strategy takes a target to the new point and back.

use blockferry_core::{Extent, block_digest};
use blockferry_device::Status;
use blockferry_testkit::{Fault, FaultKind, OperationKind};
use blockferry_transfer_log::{
    ErrorKind, Old, Prepared, Recovered, Replica, Strategy, Undo, Unwritten,
};

use crate::harness::{PAGE, Setup, TARGET, id, image, quiet, root};

/// Old and new content: changed, new, zeroed and unchanged pages; same size, grown, shrunk; even and odd sizes.
pub(crate) fn pairs() -> Vec<(Vec<u8>, Vec<u8>)> {
    let old = [1, 2, 0, 4, 5, 6, 7, 8];
    let new = [1, 9, 3, 4, 0, 6, 10, 8];
    let grown = [1, 9, 3, 4, 0, 6, 10, 8, 0, 11];
    let whole = 8 * PAGE;
    vec![
        (image(&old, whole), image(&new, whole)),
        (image(&old, whole - 100), image(&new, whole - 100)),
        (image(&old, whole - 100), image(&grown, 10 * PAGE - 7)),
        (image(&old, whole), image(&new, 5 * PAGE + 77)),
        (image(&old, whole - 9), image(&new, 6 * PAGE)),
        (image(&old, whole), image(&[0; 8], whole)),
        (image(&[0; 8], whole), image(&new, whole)),
        (image(&old, whole), image(&[], 0)),
        (image(&[], 0), image(&new, whole)),
    ]
}

fn setups() -> Vec<Setup> {
    let mut setups = Vec::new();
    for strategy in [Strategy::Redo, Strategy::Clone, Strategy::Shadow] {
        setups.push(Setup::file(strategy));
        setups.push(Setup::file(strategy).at_once());
    }
    setups.push(Setup::device(Strategy::Redo));
    setups
}

#[test]
fn every_strategy_reaches_the_new_point_and_rolls_back_bit_for_bit() {
    for setup in setups() {
        for (n, (old, new)) in pairs().iter().enumerate() {
            if setup.device && old.len() != new.len() {
                continue;
            }
            let disk = setup.machine(Some(old));
            let mut replica = setup.open(&disk).unwrap();

            let applied = setup.sync(&mut replica, 1, new);
            let applied = applied.unwrap_or_else(|e| panic!("{setup:?}, pair {n}: {e:?}"));
            assert_eq!(
                setup.content(&disk).as_deref(),
                Some(&new[..]),
                "{setup:?}, pair {n}"
            );
            assert_eq!(applied.point, id(1));
            assert_eq!(replica.point().map(|p| p.root), Some(root(new)));
            assert_eq!(replica.unwritten().unwrap(), Unwritten::Proven);

            let held = replica.held_bytes().unwrap();
            replica.rollback(&quiet).unwrap();
            assert_eq!(
                setup.content(&disk).as_deref(),
                Some(&old[..]),
                "{setup:?}, pair {n}"
            );
            assert!(replica.held_bytes().unwrap() < held);
            assert!(replica.retained().is_none());
            drop(replica);
            let again = setup.open(&disk).unwrap();
            assert_eq!(*again.recovered(), Recovered::Clean);
            assert_eq!(disk.misuses(), Vec::<String>::new());
        }
    }
}

#[test]
fn what_lies_behind_the_image_on_a_larger_device_stays_and_a_smaller_one_is_refused() {
    for setup in [
        Setup::device(Strategy::Redo),
        Setup::device(Strategy::Direct).without_undo(),
    ] {
        stays_behind(&setup);
        let new = image(&[1, 2, 3], 3 * PAGE);
        let disk = setup.machine(Some(&new[PAGE..]));
        let mut replica = setup.open(&disk).unwrap();

        let refused = replica.begin(&setup.plan(1, &new)).unwrap_err();

        assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
        assert_eq!(setup.content(&disk).as_deref(), Some(&new[PAGE..]));
    }
}

fn stays_behind(setup: &Setup) {
    let old = image(&[1, 2, 3, 4, 5, 6], 6 * PAGE);
    let new = image(&[1, 9, 0, 8], 4 * PAGE);
    let disk = setup.machine(Some(&old));
    let mut replica = setup.open(&disk).unwrap();

    setup.sync(&mut replica, 1, &new).unwrap();
    let after = setup.content(&disk).unwrap();
    assert!(after[..new.len()] == new && after[new.len()..] == old[new.len()..]);

    if !setup.is_without_undo() {
        replica.rollback(&quiet).unwrap();
        assert_eq!(setup.content(&disk), Some(old));
    }
}

#[test]
fn a_file_grows_by_zeros_that_nobody_stages() {
    for setup in setups().into_iter().filter(|setup| !setup.device) {
        let old = image(&[1, 2], 2 * PAGE);
        let new = image(&[9, 2, 0, 0], 4 * PAGE - 100);
        let disk = setup.machine(Some(&old));
        let mut replica = setup.open(&disk).unwrap();

        setup.sync(&mut replica, 1, &new).unwrap();
        assert_eq!(setup.content(&disk), Some(new), "{setup:?}");

        replica.rollback(&quiet).unwrap();
        assert_eq!(setup.content(&disk), Some(old), "{setup:?}");
    }
}

#[test]
fn without_undo_the_new_point_is_reached_and_nothing_is_kept() {
    let mut all: Vec<Setup> = setups();
    all.push(Setup::file(Strategy::Direct));
    all.push(Setup::device(Strategy::Direct));
    for setup in all.into_iter().map(Setup::without_undo) {
        for (old, new) in pairs() {
            if setup.device && old.len() != new.len() {
                continue;
            }
            let disk = setup.machine(Some(&old));
            let mut replica = setup.open(&disk).unwrap();

            setup.sync(&mut replica, 1, &new).unwrap();

            assert_eq!(setup.content(&disk), Some(new), "{setup:?}");
            assert!(replica.retained().is_none());
            assert!(replica.rollback(&quiet).is_err());
            let names = disk.dir("state").names().unwrap();
            assert_eq!(names, ["lock", "state"], "{setup:?}");
        }
    }
}

#[test]
fn an_absent_target_is_made_by_direct_and_shadow() {
    for strategy in [Strategy::Direct, Strategy::Shadow] {
        let setup = Setup::file(strategy).without_undo();
        for (_, new) in pairs() {
            let disk = setup.machine(None);
            let mut replica = setup.open(&disk).unwrap();

            setup.sync(&mut replica, 1, &new).unwrap();

            assert_eq!(setup.content(&disk), Some(new));
            assert_eq!(disk.dir("images").names().unwrap(), [TARGET]);
        }
    }
}

#[test]
fn accept_frees_what_held_the_old_point() {
    for setup in setups() {
        let (old, new) = pairs().swap_remove(0);
        let disk = setup.machine(Some(&old));
        let mut replica = setup.open(&disk).unwrap();
        setup.sync(&mut replica, 1, &new).unwrap();

        let freed = replica.accept().unwrap();

        assert!(freed > 0, "{setup:?}");
        assert_eq!(setup.content(&disk), Some(new));
        assert!(replica.retained().is_none());
        assert_eq!(replica.unwritten().unwrap(), Unwritten::Proven, "{setup:?}");
        assert!(replica.rollback(&quiet).is_err());
        assert_eq!(
            disk.dir("state").names().unwrap(),
            ["lock", "state"],
            "{setup:?}"
        );
        assert_eq!(replica.accept().unwrap(), 0);
    }
}

#[test]
fn what_became_zero_gives_its_space_back_with_accept_and_not_before() {
    let (old, new) = (
        image(&[1, 2, 3, 4, 5], 5 * PAGE),
        image(&[1, 0, 0, 9, 0], 5 * PAGE),
    );
    let holes = |replica: &Replica| -> Vec<bool> {
        let target = replica.target().unwrap();
        let status = |page: u64| target.status_at(page * PAGE as u64).unwrap().0;
        (0..5).map(|page| status(page) == Status::Zero).collect()
    };
    let setup = Setup::file(Strategy::Redo);
    let disk = setup.machine(Some(&old));
    let mut replica = setup.open(&disk).unwrap();
    setup.sync(&mut replica, 1, &new).unwrap();
    // Space given back before could be missing for the way back.
    assert_eq!(holes(&replica), [false; 5]);

    replica.accept().unwrap();

    assert_eq!(holes(&replica), [false, true, true, false, true]);
    assert_eq!(setup.content(&disk), Some(new));
    assert_eq!(replica.unwritten().unwrap(), Unwritten::Proven);
}

#[test]
fn a_chain_of_syncs_keeps_the_way_back_of_the_last_one() {
    for setup in setups() {
        let images: Vec<Vec<u8>> = (0u8..6)
            .map(|n| image(&[n + 1, 2, n % 2, 4, n * 3], 5 * PAGE))
            .collect();
        let disk = setup.machine(Some(&images[0]));
        for (session, new) in (1u8..).zip(&images[1..]) {
            let mut replica = setup.open(&disk).unwrap();
            setup.sync(&mut replica, session, new).unwrap();
        }

        let mut replica = setup.open(&disk).unwrap();
        let back = replica.rollback(&quiet).unwrap();

        assert_eq!(setup.content(&disk).as_ref(), Some(&images[4]), "{setup:?}");
        assert_eq!(back.map(|p| p.id), Some(id(4)));
        assert_eq!(replica.point().map(|p| p.id), Some(id(4)));
    }
}

#[test]
fn cancel_drops_everything_and_leaves_the_target_as_it_was() {
    for setup in setups() {
        let (old, new) = pairs().swap_remove(0);
        let disk = setup.machine(Some(&old));
        let before = disk.snapshot().fingerprint();
        let mut replica = setup.open(&disk).unwrap();
        setup.sync(&mut replica, 1, &old).unwrap();
        drop(replica);
        stage_some(&setup, &disk, 2, &new, usize::MAX, true);

        let mut replica = setup.open(&disk).unwrap();
        assert_eq!(*replica.recovered(), Recovered::Staging);
        let freed = replica.cancel().unwrap();

        assert!(freed > 0);
        assert_ne!(before, 0);
        assert_eq!(setup.content(&disk), Some(old), "{setup:?}");
        assert_eq!(replica.unwritten().unwrap(), Unwritten::Proven, "{setup:?}");
        drop(replica);
        assert_eq!(*setup.open(&disk).unwrap().recovered(), Recovered::Clean);
        let names = disk.dir("state").names().unwrap();
        assert!(
            !names.iter().any(|n| n.starts_with(&id(2).to_string())),
            "{names:?}"
        );
    }
}

/// Stages some groups and drops the session, as if the process died.
pub(crate) fn stage_some(
    setup: &Setup,
    disk: &blockferry_testkit::SimDisk,
    session: u8,
    new: &[u8],
    groups: usize,
    prepare: bool,
) -> u64 {
    let mut replica = setup.open(disk).unwrap();
    let target = replica.target();
    let mut session = replica.begin(&setup.plan(session, new)).unwrap();
    setup
        .stage(&mut session, target.as_ref(), new, groups, &mut |_| {})
        .unwrap();
    if prepare {
        session.prepare().unwrap();
    }
    session.totals().staged_bytes
}

#[test]
fn a_dropped_session_resumes_without_staging_a_durable_byte_again() {
    let mut all = setups();
    all.push(Setup::file(Strategy::Direct));
    all.push(Setup::device(Strategy::Direct));
    for setup in all {
        for (old, new) in pairs() {
            if setup.device && old.len() != new.len() {
                continue;
            }
            for groups in 0..4 {
                let disk = setup.machine(Some(&old));
                let staged = stage_some(&setup, &disk, 1, &new, groups, false);

                let mut replica = setup.open(&disk).unwrap();
                assert!(replica.can_resume().unwrap(), "{setup:?}");
                let target = replica.target();
                let mut session = replica.resume(u64::MAX).unwrap();
                setup.finish(&mut session, target.as_ref(), &new).unwrap();

                let totals = session.totals();
                assert_eq!(totals.resumed_bytes, staged, "{setup:?}");
                assert_eq!(totals.restaged_bytes, 0, "{setup:?}");
                session.commit(root(&new), &quiet).unwrap();
                assert_eq!(setup.content(&disk).as_ref(), Some(&new), "{setup:?}");
                if setup.strategy != Strategy::Direct {
                    replica.rollback(&quiet).unwrap();
                    assert_eq!(setup.content(&disk).as_ref(), Some(&old), "{setup:?}");
                }
            }
        }
    }
}

#[test]
fn what_several_runs_staged_is_there_for_the_next() {
    let old = image(&[1; 12], 12 * PAGE);
    let new = image(&[2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], 12 * PAGE);
    for setup in [Setup::file(Strategy::Redo), Setup::file(Strategy::Shadow)] {
        let disk = setup.machine(Some(&old));
        let mut staged = stage_some(&setup, &disk, 1, &new, 1, false);
        for _ in 0..2 {
            let mut replica = setup.open(&disk).unwrap();
            let target = replica.target();
            let mut session = replica.resume(u64::MAX).unwrap();
            assert_eq!(session.totals().resumed_bytes, staged, "{setup:?}");
            setup
                .stage(&mut session, target.as_ref(), &new, 1, &mut |_| {})
                .unwrap();
            staged += session.totals().staged_bytes;
        }

        let mut replica = setup.open(&disk).unwrap();
        let target = replica.target();
        let mut session = replica.resume(u64::MAX).unwrap();
        assert_eq!(session.totals().resumed_bytes, staged, "{setup:?}");
        assert_eq!(session.strategy().to_string(), setup.strategy.to_string());
        setup.finish(&mut session, target.as_ref(), &new).unwrap();
        assert_eq!(session.totals().restaged_bytes, 0);
        session.commit(root(&new), &quiet).unwrap();
        assert_eq!(setup.content(&disk).as_ref(), Some(&new));
    }
    let names = [
        Strategy::Clone,
        Strategy::Shadow,
        Strategy::Redo,
        Strategy::Direct,
    ];
    let names = names.map(|strategy| strategy.to_string());
    assert_eq!(names, ["clone", "shadow", "redo", "direct"]);
}

#[test]
fn what_a_working_file_lost_in_a_flush_that_lied_is_found_and_staged_again() {
    for strategy in [Strategy::Clone, Strategy::Shadow, Strategy::Direct] {
        let setup = Setup::file(strategy);
        let (old, new) = pairs().swap_remove(0);
        let disk = setup.machine(Some(&old));
        let mut replica = setup.open(&disk).unwrap();
        let target = replica.target();
        let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
        let lies = Fault::on(OperationKind::Flush, TARGET, 1, FaultKind::SilentLoss);
        disk.inject(lies);
        setup
            .stage(&mut session, target.as_ref(), &new, usize::MAX, &mut |_| {})
            .unwrap();

        let prepared = session.prepare().unwrap();

        assert!(matches!(prepared, Prepared::Missing(_)), "{strategy}");
        setup.finish(&mut session, target.as_ref(), &new).unwrap();
        let live = session.totals();
        let applied = session.commit(root(&new), &quiet).unwrap();
        assert_eq!(setup.content(&disk), Some(new), "{strategy}");
        // Clone and shadow prove the file before it takes the target's place: all that is live, zeros too.
        let proven = live.live_bytes + live.live_zero_bytes;
        assert_eq!(applied.proven_bytes, proven, "{strategy}");
    }
}

#[test]
fn pages_staged_again_with_other_content_win_and_keep_the_first_pre_image() {
    for setup in setups() {
        let (old, new) = pairs().swap_remove(0);
        let middle = image(&[9, 9, 9, 0, 9, 9, 9, 9], 8 * PAGE);
        let disk = setup.machine(Some(&old));
        stage_some(&setup, &disk, 1, &middle, usize::MAX, true);

        let mut replica = setup.open(&disk).unwrap();
        let target = replica.target();
        let mut session = replica.resume(u64::MAX).unwrap();
        setup.finish(&mut session, target.as_ref(), &new).unwrap();
        session.commit(root(&new), &quiet).unwrap();

        assert_eq!(setup.content(&disk), Some(new), "{setup:?}");
        replica.rollback(&quiet).unwrap();
        assert_eq!(setup.content(&disk), Some(old), "{setup:?}");
    }
}

#[test]
fn blocks_and_pages_mix_in_one_session() {
    let setup = Setup::device(Strategy::Redo);
    let (old, new) = pairs().swap_remove(0);
    let disk = setup.machine(Some(&old));
    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
    let stager = session.stager();
    // A page first, then the whole of its block and the next, then a page of that one.
    let page = |p: u64| Extent::from_range(p * 4096..(p + 1) * 4096);
    let at = |offset: u64| usize::try_from(offset).unwrap();
    let of = |image: &[u8], e: Extent| image[at(e.start())..at(e.end())].to_vec();
    let mut first = stager.pages();
    stager.add(
        &mut first,
        page(1),
        &[7; PAGE],
        Old::Data(&of(&old, page(1))),
    );
    session.stage(first).unwrap();
    let blocks = Extent::from_range(0..4 * 4096);
    let mut second = stager.blocks();
    let bytes = [8; 4 * PAGE];
    let was = of(&old, blocks);
    stager
        .write_blocks(&mut second, blocks, &bytes, &[], Old::Data(&was))
        .unwrap();
    session.stage(second).unwrap();
    session.close_group().unwrap();

    setup.finish(&mut session, target.as_ref(), &new).unwrap();
    session.commit(root(&new), &quiet).unwrap();

    assert_eq!(setup.content(&disk), Some(new));
    replica.rollback(&quiet).unwrap();
    assert_eq!(setup.content(&disk), Some(old));
}

#[test]
fn what_later_records_left_of_a_record_is_proven_by_its_own_digests() {
    let pages = |range: std::ops::Range<u64>| {
        let page = PAGE as u64;
        Extent::from_range(range.start * page..range.end * page)
    };
    let filled = |fills: &[u8]| image(fills, fills.len() * PAGE);
    let old = filled(&[1; 8]);
    let (first, blocks) = (filled(&[11, 12, 13, 14]), filled(&[15, 16, 17, 18]));
    let (page, block) = (filled(&[21]), filled(&[22, 23]));
    let new = filled(&[21, 12, 13, 14, 22, 23, 17, 21]);

    let setup = Setup::device(Strategy::Redo).without_undo();
    let disk = setup.machine(Some(&old));
    let mut replica = setup.open(&disk).unwrap();
    let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
    let stager = session.stager();
    let mut staged = |extent, bytes: &[u8], in_blocks| {
        let mut batch = if in_blocks {
            stager.blocks()
        } else {
            stager.pages()
        };
        stager.add(&mut batch, extent, bytes, Old::None);
        session.stage(batch).unwrap();
    };
    staged(pages(0..4), &first, false);
    // Leaves pages 1 to 3.
    staged(pages(0..1), &page, false);
    staged(pages(4..8), &blocks, true);
    // Leaves the second block, of which page 6 stays in the end.
    staged(pages(4..6), &block, true);
    staged(pages(7..8), &page, false);
    assert!(matches!(session.prepare().unwrap(), Prepared::Complete));

    let applied = session.commit(root(&new), &quiet).unwrap();

    assert_eq!(applied.proven_bytes, new.len() as u64);
    assert_eq!(setup.content(&disk), Some(new));
}

#[test]
fn what_later_records_left_of_a_working_file_is_proven_before_it_counts() {
    let block = |fill: u8| image(&[fill, fill + 1], 2 * PAGE);
    let old = image(&[1; 8], 8 * PAGE);
    let written = [block(10), block(20), block(30), block(40)].concat();
    let new = [block(50), block(20), block(30), block(60)].concat();
    for strategy in [Strategy::Clone, Strategy::Shadow] {
        let setup = Setup::file(strategy);
        let disk = setup.machine(Some(&old));
        let mut replica = setup.open(&disk).unwrap();
        let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
        let stager = session.stager();
        let mut write = |start: usize, bytes: &[u8]| {
            let mut batch = stager.blocks();
            let digests: Vec<_> = bytes.chunks(2 * PAGE).map(block_digest).collect();
            let extent = Extent::from_range(start as u64..(start + bytes.len()) as u64);
            stager
                .write_blocks(&mut batch, extent, bytes, &digests, Old::None)
                .unwrap();
            session.stage(batch).unwrap();
        };
        write(0, &written[..4 * PAGE]);
        write(4 * PAGE, &written[4 * PAGE..6 * PAGE]);
        write(6 * PAGE, &written[6 * PAGE..]);
        write(0, &new[..2 * PAGE]);
        write(6 * PAGE, &new[6 * PAGE..]);
        let prepared = session.prepare().unwrap();
        assert!(matches!(prepared, Prepared::Complete), "{prepared:?}");

        let applied = session.commit(root(&new), &quiet).unwrap();

        // What was written once is in one record, what was written again in another.
        assert_eq!(replica.stats().records(), 2, "{strategy}");
        assert_eq!(applied.proven_bytes, new.len() as u64, "{strategy}");
        assert_eq!(setup.content(&disk).as_ref(), Some(&new), "{strategy}");
    }
}

#[test]
fn frames_are_stored_as_they_came_and_apply_right() {
    for setup in [
        Setup::file(Strategy::Redo),
        Setup::file(Strategy::Clone),
        Setup::device(Strategy::Redo),
    ] {
        let (old, new) = pairs().swap_remove(0);
        let disk = setup.machine(Some(&old));
        let mut replica = setup.open(&disk).unwrap();
        let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
        let stager = session.stager();
        let mut batch = stager.pages();
        for start in (0..new.len()).step_by(PAGE) {
            let extent = Extent::from_range(start as u64..(start + PAGE) as u64);
            let old = Old::Data(&old[start..start + PAGE]);
            stager.add(&mut batch, extent, &new[start..start + PAGE], old);
        }
        let frame = blockferry_transfer_log::frame::pack(&new, 3).unwrap();
        batch.store_frame(&frame);

        session.stage(batch).unwrap();
        let log_bytes = session.close_group().unwrap().log_bytes;
        session.prepare().unwrap();
        session.commit(root(&new), &quiet).unwrap();

        assert_eq!(setup.content(&disk), Some(new), "{setup:?}");
        assert!(
            frame.len() < PAGE && log_bytes < 14 * PAGE as u64,
            "{log_bytes}"
        );
        drop(replica);
        let mut replica = setup.open(&disk).unwrap();
        replica.rollback(&quiet).unwrap();
        assert_eq!(setup.content(&disk), Some(old), "{setup:?}");
    }
}

#[test]
fn a_small_run_costs_at_most_six_flushes() {
    let setup = Setup::device(Strategy::Redo).at_once();
    let (old, new) = pairs().swap_remove(0);
    let disk = setup.machine(Some(&old));
    drop(setup.open(&disk).unwrap());
    let mut replica = setup.open(&disk).unwrap();
    let before = replica.stats().flushes();
    let target = replica.target();

    let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
    let manifest = session.create_manifest().unwrap();
    setup
        .stage(&mut session, target.as_ref(), &new, 9, &mut |_| {})
        .unwrap();
    manifest.finish().unwrap();
    setup.finish(&mut session, target.as_ref(), &new).unwrap();
    session.commit(root(&new), &quiet).unwrap();

    assert_eq!(replica.stats().flushes() - before, 6);
}

#[test]
fn the_manifest_of_the_new_point_is_durable_with_it() {
    let setup = Setup::file(Strategy::Redo);
    let (old, new) = pairs().swap_remove(0);
    let disk = setup.machine(Some(&old));
    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
    setup.finish(&mut session, target.as_ref(), &new).unwrap();
    let mut manifest = session.create_manifest().unwrap();
    std::io::Write::write_all(&mut manifest, b"what the ").unwrap();
    std::io::Write::write_all(&mut manifest, b"manifest says").unwrap();
    manifest.finish().unwrap();
    session.commit(root(&new), &quiet).unwrap();
    let point = replica.point().unwrap().clone();
    let mut read = Vec::new();
    let mut source = replica.manifest_source(&point).open().unwrap();
    std::io::Read::read_to_end(&mut source, &mut read).unwrap();
    assert_eq!(read, b"what the manifest says");
    drop(replica);

    for image in disk
        .snapshot()
        .crash_images(1, blockferry_testkit::ImageLimits::default())
    {
        let name = format!("state/{}.manifest", id(1));
        assert_eq!(
            image.disk().content(&name).as_deref(),
            Some(&b"what the manifest says"[..])
        );
    }
}

#[test]
fn compaction_keeps_what_counts_and_drops_the_rest() {
    let setup = Setup {
        undo: Undo::Keep,
        ..Setup::file(Strategy::Redo)
    };
    let old = image(&[1, 2, 0, 4, 5, 6, 7, 8], 8 * PAGE);
    let disk = setup.machine(Some(&old));
    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut plan = setup.plan(1, &old);
    plan.log_limit_bytes = 600 * 1024;
    let mut session = replica.begin(&plan).unwrap();

    let (mut highest, mut sequence) = (0, 0);
    let mut new = old.clone();
    for round in 0u8..60 {
        new = image(
            &[round + 1, 2, round, 4, round % 3, 6, round + 7, 8],
            8 * PAGE,
        );
        setup
            .stage(&mut session, target.as_ref(), &new, 99, &mut |c| {
                highest = highest.max(c.log_bytes);
                assert!(c.sequence > sequence, "{} after {sequence}", c.sequence);
                sequence = c.sequence;
            })
            .unwrap();
    }
    drop(session);
    drop(replica);

    assert!(highest < 600 * 1024, "{highest}");
    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut session = replica.resume(u64::MAX).unwrap();
    setup.finish(&mut session, target.as_ref(), &new).unwrap();
    assert_eq!(session.totals().staged_bytes, 0);
    session.commit(root(&new), &quiet).unwrap();
    assert_eq!(setup.content(&disk), Some(new));
    replica.rollback(&quiet).unwrap();
    assert_eq!(setup.content(&disk), Some(old));
}
