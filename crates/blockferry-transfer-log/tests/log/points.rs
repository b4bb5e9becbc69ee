//! What is recorded of the target without a session: adopting and refreshing a point; and what a session tells of
//! itself while it is under way.

use std::cell::RefCell;

use blockferry_core::{Extent, Root, block_digest};
use blockferry_device::{Evidence, Identity};
use blockferry_testkit::{Fault, FaultKind, OperationKind, SimDisk, SimOptions};
use blockferry_transfer_log::{
    ErrorKind, Old, Proof, Replica, SourceStamp, Stager, Strategy, Unwritten,
};

use crate::harness::{PAGE, Setup, id, image, quiet, root};
use crate::sessions::stage_some;

fn stamp(label: &str) -> SourceStamp {
    SourceStamp::new(label, Identity::unknown(), Evidence::unknown())
}

fn adopted(setup: &Setup, content: &[u8]) -> (SimDisk, Replica) {
    let disk = setup.machine(Some(content));
    let mut replica = setup.open(&disk).unwrap();
    let geometry = setup.geometry(content);
    replica
        .adopt(id(5), root(content), geometry, stamp("here.raw"), 77)
        .unwrap();
    (disk, replica)
}

#[test]
fn an_adopted_point_is_recorded_with_its_evidence() {
    let content = image(&[1, 2, 3], 3 * PAGE);
    for setup in [Setup::file(Strategy::Redo), Setup::device(Strategy::Redo)] {
        let (disk, replica) = adopted(&setup, &content);
        drop(replica);

        let mut replica = setup.open(&disk).unwrap();
        let point = replica.point().unwrap().clone();
        assert_eq!((point.id, point.root), (id(5), root(&content)));
        assert_eq!(point.geometry, setup.geometry(&content));
        assert_eq!((point.source, point.made_unix), (stamp("here.raw"), 77));
        assert_eq!(replica.retained(), None);
        assert_eq!(replica.unwritten().unwrap(), Unwritten::Proven);

        // A session begun on another handle before the point was adopted would have this epoch.
        drop(replica.begin(&setup.plan(6, &content)).unwrap());
        drop(replica);
        let replica = setup.open(&disk).unwrap();
        assert_eq!(replica.unfinished().unwrap().epoch, 2);
    }
}

#[test]
fn refreshing_follows_the_target_and_its_source_and_costs_nothing_where_nothing_changed() {
    let setup = Setup::file(Strategy::Redo);
    let content = image(&[1, 2, 3], 3 * PAGE);
    let (_disk, mut replica) = adopted(&setup, &content);
    let before = replica.stats().flushes();
    replica.refresh(stamp("here.raw")).unwrap();
    assert_eq!(replica.stats().flushes(), before, "nothing changed");

    replica.refresh(stamp("there.raw")).unwrap();
    let point = replica.point().unwrap();
    assert_eq!((point.id, &point.source), (id(5), &stamp("there.raw")));
    assert_eq!(replica.stats().flushes(), before + 1, "another source");

    // Written with what is there already: the evidence changes, the content does not.
    replica
        .target()
        .unwrap()
        .write_at(0, &content[..PAGE])
        .unwrap();
    assert_eq!(replica.unwritten().unwrap(), Unwritten::Written);
    replica.refresh(stamp("there.raw")).unwrap();
    assert_eq!(replica.unwritten().unwrap(), Unwritten::Proven);
    assert_eq!(replica.point().unwrap().root, root(&content));
    assert_eq!(replica.stats().flushes(), before + 2, "other evidence");
}

#[test]
fn a_target_that_is_written_while_it_is_read_is_recorded_as_nothing() {
    for setup in [Setup::file(Strategy::Redo), Setup::device(Strategy::Redo)] {
        let content = image(&[1, 2, 3], 3 * PAGE);
        let (_disk, mut replica) = adopted(&setup, &content);
        let geometry = setup.geometry(&content);
        let read_and_written = |replica: &mut Replica| {
            replica.begin_reading().unwrap();
            let target = replica.target().unwrap();
            target.write_at(0, &content[..PAGE]).unwrap();
        };

        read_and_written(&mut replica);
        let adopted = replica.adopt(id(6), root(&content), geometry, stamp("here.raw"), 78);
        read_and_written(&mut replica);
        let refreshed = replica.refresh(stamp("there.raw"));
        read_and_written(&mut replica);
        let begun = replica.begin(&setup.plan(7, &content)).map(drop);

        for refused in [adopted, refreshed, begun] {
            let error = refused.expect_err("nobody knows what it holds");
            assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
            assert!(error.to_string().contains("someone else"), "{error}");
        }
        assert_eq!(replica.unwritten().unwrap(), Unwritten::Written);
        assert_eq!(replica.point().unwrap().id, id(5));
        assert!(replica.unfinished().is_none());

        // Read once more, by whoever is alone with it.
        replica.begin_reading().unwrap();
        replica.refresh(stamp("there.raw")).unwrap();
        assert_eq!(replica.unwritten().unwrap(), Unwritten::Proven);
    }
}

#[test]
fn a_point_is_digested_anew_only_while_nobody_wrote_the_target() {
    let setup = Setup::file(Strategy::Redo);
    let content = image(&[1, 2, 3], 3 * PAGE);
    let (disk, mut replica) = adopted(&setup, &content);
    let blocks = Setup {
        block_bytes: 4096,
        ..setup
    };
    let (anew, geometry) = (Root::from_bytes([9; 32]), blocks.geometry(&content));
    replica.create_manifest(id(6)).unwrap().finish().unwrap();

    replica
        .redigest(id(6), anew, geometry, stamp("there.raw"))
        .unwrap();

    drop(replica);
    let mut replica = setup.open(&disk).unwrap();
    let point = replica.point().unwrap();
    assert_eq!((point.id, point.root), (id(5), anew));
    assert_eq!((point.geometry, point.made_unix), (geometry, 77));
    assert_eq!(point.source, stamp("there.raw"));
    let names = disk.dir("state").names().unwrap();
    let manifests = names.iter().filter(|name| name.ends_with(".manifest"));
    let only = format!("{}.manifest", id(5));
    assert_eq!(manifests.collect::<Vec<_>>(), [&only]);

    let longer = setup.geometry(&image(&[1, 2, 3, 4], 4 * PAGE));
    let refused = replica.redigest(id(7), anew, longer, stamp("there.raw"));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Refused, "size");
    let target = replica.target().unwrap();
    target.write_at(0, &content[..PAGE]).unwrap();
    let refused = replica.redigest(id(7), anew, geometry, stamp("there.raw"));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Refused, "written");
}

#[test]
fn a_session_tells_what_it_holds() {
    let setup = Setup::device(Strategy::Redo);
    let old = image(&[1, 2, 3, 4, 5, 6], 6 * PAGE);
    let new = image(&[1, 0, 7, 0, 8, 9], 6 * PAGE);
    let disk = setup.machine(Some(&old));
    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
    assert!(session.staged_view().is_empty());
    assert_eq!(session.totals().live_bytes, 0);

    setup.finish(&mut session, target.as_ref(), &new).unwrap();

    let (totals, view) = (session.totals(), session.staged_view());
    let page = PAGE as u64;
    assert_eq!(
        (totals.live_bytes, totals.live_zero_bytes),
        (3 * page, 2 * page)
    );
    assert!(!view.is_empty());
    assert!(view.overlaps(Extent::from_range(page..2 * page)));
    assert!(!view.overlaps(Extent::from_range(0..page)));
}

#[test]
fn apply_and_restore_tell_how_far_they_are() {
    let old = image(&[1, 2, 3, 4, 5, 6], 6 * PAGE);
    let new = image(&[1, 0, 7, 0, 8, 9], 6 * PAGE);
    for setup in [Setup::device(Strategy::Redo), Setup::file(Strategy::Redo)] {
        let disk = setup.machine(Some(&old));
        let mut replica = setup.open(&disk).unwrap();
        let target = replica.target();
        let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
        setup.finish(&mut session, target.as_ref(), &new).unwrap();
        let told = RefCell::new(Vec::new());
        let tell = |done, of| told.borrow_mut().push((done, of));

        let applied = session.commit(root(&new), &tell).unwrap();

        let page = PAGE as u64;
        let changed = 5 * page;
        assert_eq!(applied.proven_bytes, changed);
        // Two pages to a batch.
        let steps = [(2 * page, changed), (4 * page, changed), (changed, changed)];
        assert_eq!(told.take(), steps, "apply");
        replica.rollback(&tell).unwrap();
        assert_eq!(told.take(), steps, "restore");
    }
}

#[test]
fn a_replica_tells_what_it_is_and_what_its_file_system_can() {
    let content = image(&[1, 2, 3], 3 * PAGE);
    for clones in [true, false] {
        let disk = SimDisk::new(SimOptions {
            clones,
            ..SimOptions::default()
        });
        let setup = Setup::file(Strategy::Redo);
        setup.install(&disk, Some(&content));
        let replica = setup.open(&disk).unwrap();
        assert_eq!(replica.supports_clone(id(9)), clones);
        assert!(replica.supports_exchange(id(9)).unwrap());
        assert!(replica.is_file() && replica.target_dir().is_some());
        assert!(replica.label().contains("disk.raw"), "{}", replica.label());
        assert_eq!(disk.dir("images").names().unwrap(), ["disk.raw"]);
    }
    let setup = Setup::device(Strategy::Redo);
    let disk = setup.machine(Some(&content));
    let replica = setup.open(&disk).unwrap();
    assert!(!replica.is_file() && replica.target_dir().is_none());
    assert!(!replica.supports_clone(id(9)) && !replica.supports_exchange(id(9)).unwrap());
}

#[test]
fn a_session_goes_on_from_a_source_that_may_have_changed() {
    let known = |version: u8| {
        let identity = Identity::from_bytes(b"source");
        SourceStamp::new("source.raw", identity, Evidence::from_bytes(&[version]))
    };
    let (old, new) = (image(&[1, 2, 3], 3 * PAGE), image(&[4, 5, 6], 3 * PAGE));
    let setup = Setup::file(Strategy::Redo);
    for (now, proven) in [(known(1), true), (known(2), false)] {
        let disk = setup.machine(Some(&old));
        let mut replica = setup.open(&disk).unwrap();
        let target = replica.target();
        let mut plan = setup.plan(1, &new);
        plan.source = known(1);
        let mut session = replica.begin(&plan).unwrap();
        setup
            .stage(&mut session, target.as_ref(), &new, 1, &mut |_| {})
            .unwrap();
        drop(session);
        drop(replica);
        let mut replica = setup.open(&disk).unwrap();

        let session = replica.resume_from(u64::MAX, &now).unwrap();

        assert_eq!(session.source().evidence.proves_same(&now.evidence), proven);
        drop(session);
        drop(replica);
        // As the next run finds it, too.
        let replica = setup.open(&disk).unwrap();
        let stamp = &replica.unfinished().unwrap().source;
        assert_eq!(stamp.evidence.proves_same(&now.evidence), proven);
    }
}

#[test]
fn a_session_that_could_not_be_taken_up_keeps_others_out_until_the_next_open() {
    let (old, new) = (image(&[1, 2, 3], 3 * PAGE), image(&[4, 5, 6], 3 * PAGE));
    let setup = Setup::file(Strategy::Redo);
    let disk = setup.machine(Some(&old));
    stage_some(&setup, &disk, 1, &new, 1, false);
    let mut replica = setup.open(&disk).unwrap();
    disk.inject(Fault::on(OperationKind::Create, "state/", 1, FaultKind::Io));
    replica.resume(u64::MAX).unwrap_err();

    let refused = replica.begin(&setup.plan(2, &new)).unwrap_err();

    assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
    drop(replica);
    let mut replica = setup.open(&disk).unwrap();
    let session = replica.resume(u64::MAX).unwrap();
    assert!(session.totals().resumed_bytes > 0, "nothing is lost by it");
}

#[test]
fn a_session_tells_what_it_proves_and_when_its_group_is_full() {
    let (old, new) = (image(&[1, 2, 3], 3 * PAGE), image(&[4, 5, 6], 3 * PAGE));
    for setup in [Setup::file(Strategy::Redo), Setup::device(Strategy::Redo)] {
        let disk = setup.machine(Some(&old));
        let mut replica = setup.open(&disk).unwrap();
        let target = replica.target();
        let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
        assert_eq!(session.is_file(), !setup.device);
        assert!(session.keeps_old() && !session.group_is_full() && session.group_is_empty());
        let page = image(&[7], PAGE);
        let stager = session.stager();
        let mut batch = stager.pages();
        stager.add(
            &mut batch,
            Extent::from_range(0..PAGE as u64),
            &page,
            Old::Zero,
        );
        session.stage(batch).unwrap();
        assert!(!session.group_is_full() && !session.group_is_empty());
        let of = |page: u64| Extent::from_range(page * PAGE as u64..(page + 1) * PAGE as u64);
        assert!(session.has_pre_image(of(0)) && !session.has_pre_image(of(1)));
        session.prove_by(Proof::Flush);
        setup.finish(&mut session, target.as_ref(), &new).unwrap();

        let applied = session.commit(root(&new), &|_, _| {}).unwrap();

        assert_eq!(applied.proven_bytes, 0, "the flush is believed");
        assert_eq!(setup.content(&disk).as_ref(), Some(&new));
    }
}

#[test]
fn a_group_is_full_when_it_has_its_size_and_zeros_are_counted_apart() {
    let old = vec![0; 65 << 20];
    let setup = Setup::file(Strategy::Shadow).without_undo();
    let disk = setup.machine(Some(&[1; PAGE]));
    let mut replica = setup.open(&disk).unwrap();
    let mut session = replica.begin(&setup.plan(1, &old)).unwrap();
    assert!(!session.keeps_old());
    let stager = session.stager();
    let bytes = vec![7; 1 << 20];
    let digests: Vec<_> = bytes.chunks(8192).map(block_digest).collect();
    for mib in 0..64u64 {
        assert!(!session.group_is_full(), "{mib} MiB");
        let mut batch = stager.blocks();
        let extent = Extent::from_range(mib << 20..(mib + 1) << 20);
        stager
            .write_blocks(&mut batch, extent, &bytes, &digests, Old::None)
            .unwrap();
        session.stage(batch).unwrap();
    }
    assert!(session.group_is_full());
    for start in [64 << 20, (64 << 20) + 8192] {
        let mut batch = stager.blocks();
        let extent = Extent::from_range(start..start + 8192);
        stager
            .write_zeros(&mut batch, extent, true, Old::None)
            .unwrap();
        session.stage(batch).unwrap();
    }
    let totals = session.totals();
    assert_eq!(
        (totals.staged_bytes, totals.zero_bytes),
        (64 << 20, 2 * 8192)
    );
    assert_eq!(totals.restaged_bytes, 0);
    session.close_group().unwrap();
    assert!(session.group_is_empty());
}

/// A record may have 512 extents and 1024 digests: small batches are joined up to 256 and 768 of them.
#[test]
fn small_batches_are_joined_to_few_records_that_keep_their_limits() {
    let block = 8192u64;
    // Batches of a group, the blocks of each, how far apart these are, and the records that they make.
    for (batches, blocks, apart, records) in [(6, 100, 2, 3), (6, 300, 1, 3), (4, 1, 2, 1)] {
        let new = vec![7; usize::try_from(batches * blocks * apart * block).unwrap()];
        let setup = Setup::file(Strategy::Shadow);
        let disk = setup.machine(Some(&[1; PAGE]));
        let mut replica = setup.open(&disk).unwrap();
        let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
        let stager = session.stager();
        // Neighbours are one extent.
        let at_once = if apart == 1 { blocks } else { 1 };
        let bytes = vec![7; usize::try_from(at_once * block).unwrap()];
        let digests: Vec<_> = bytes.chunks(8192).map(block_digest).collect();
        for first in (0..batches).map(|batch| batch * blocks) {
            let mut batch = stager.blocks();
            for number in (first..first + blocks).step_by(digests.len()) {
                let start = number * apart * block;
                let extent = Extent::from_range(start..start + at_once * block);
                stager
                    .write_blocks(&mut batch, extent, &bytes, &digests, Old::None)
                    .unwrap();
            }
            session.stage(batch).unwrap();
        }
        session.close_group().unwrap();
        let staged = session.totals().staged_bytes;
        drop(session);

        assert_eq!(replica.stats().records(), records, "{batches} of {blocks}");
        drop(replica);
        let mut replica = setup.open(&disk).unwrap();
        let session = replica.resume(u64::MAX).unwrap();
        assert_eq!(
            session.totals().resumed_bytes,
            staged,
            "{batches} of {blocks}"
        );
    }
}

#[test]
fn what_is_durable_is_read_back_on_the_side_once() {
    let old = image(&[1; 16], 16 * PAGE);
    let new = image(
        &[2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17],
        16 * PAGE,
    );
    for setup in [Setup::file(Strategy::Redo), Setup::file(Strategy::Shadow)] {
        let disk = setup.machine(Some(&old));
        let mut replica = setup.open(&disk).unwrap();
        let target = replica.target();
        let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
        assert!(
            session.read_back_task().unwrap().is_none(),
            "nothing is staged"
        );
        setup
            .stage(&mut session, target.as_ref(), &new, 2, &mut |_| {})
            .unwrap();
        assert!(!session.is_read_back_under_way(), "nothing was handed out");

        let first = session
            .read_back_task()
            .unwrap()
            .expect("something is durable");
        assert!(session.is_read_back_under_way());
        assert!(
            session.read_back_task().unwrap().is_none(),
            "it is handed out once"
        );
        setup
            .stage(&mut session, target.as_ref(), &new, 9, &mut |_| {})
            .unwrap();
        let second = session.read_back_task().unwrap().expect("more is durable");
        let batch = setup
            .batches(&session, target.as_ref(), &old)
            .unwrap()
            .swap_remove(0);
        session.stage(batch).unwrap();
        assert!(
            session.read_back_task().unwrap().is_none(),
            "what is not durable is not handed out"
        );
        session.take_read_back(first.run()).unwrap();
        assert!(session.is_read_back_under_way(), "the second");
        session.take_read_back(second.run()).unwrap();
        assert!(!session.is_read_back_under_way());

        setup
            .stage(&mut session, target.as_ref(), &new, 9, &mut |_| {})
            .unwrap();
        setup.finish(&mut session, target.as_ref(), &new).unwrap();
        session.commit(root(&new), &quiet).unwrap();
        assert_eq!(setup.content(&disk).as_ref(), Some(&new));
    }
}

#[test]
fn what_a_session_and_an_old_point_hold_is_counted_with_the_file_beside_the_target() {
    let (old, new) = (image(&[1; 9], 9 * PAGE), image(&[2; 9], 9 * PAGE));
    let setup = Setup::file(Strategy::Shadow);
    let disk = setup.machine(Some(&old));
    stage_some(&setup, &disk, 1, &new, usize::MAX, false);
    let mut replica = setup.open(&disk).unwrap();

    let freed = replica.cancel().unwrap();

    assert!(freed >= new.len() as u64, "{freed}");
    setup.sync(&mut replica, 2, &new).unwrap();
    assert!(replica.held_bytes().unwrap() >= old.len() as u64);
    let freed = replica.accept().unwrap();
    assert!(freed >= old.len() as u64, "{freed}");
    assert!(replica.retained().is_none());
}

#[test]
fn what_one_run_stages_twice_was_not_durable_before() {
    let (old, new) = (image(&[1, 2], 2 * PAGE), image(&[3, 4], 2 * PAGE));
    let setup = Setup::file(Strategy::Redo);
    let disk = setup.machine(Some(&old));
    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
    for _ in 0..2 {
        for batch in setup
            .batches(
                &session,
                target.as_ref(),
                &old.iter().map(|b| b ^ 1).collect::<Vec<_>>(),
            )
            .unwrap()
        {
            session.stage(batch).unwrap();
        }
    }

    assert_eq!(session.totals().restaged_bytes, 0);
}

#[test]
fn what_is_staged_is_known_by_the_digest_of_each_unit() {
    let old = image(&[1; 10], 10 * PAGE);
    let setup = Setup::file(Strategy::Shadow);
    let disk = setup.machine(Some(&old));
    let mut replica = setup.open(&disk).unwrap();
    let before = (replica.stats().log_bytes(), replica.stats().records());
    assert_eq!(before, (0, 0));
    let mut session = replica.begin(&setup.plan(1, &old)).unwrap();
    let stager = session.stager();
    assert!(stager.writes_new_file() && !stager.wants_old());
    let bytes = image(&[2, 3, 4, 5, 6, 7], 6 * PAGE);
    let block = |n: u64| Extent::from_range(n * 8192..(n + 1) * 8192);
    let digests: Vec<_> = bytes.chunks(8192).map(block_digest).collect();
    let mut batch = stager.blocks();
    // The block between them is not staged.
    for (first, count, from) in [(0, 1, 0), (2, 2, 1)] {
        let extent = Extent::from_range(first * 8192..(first + count) * 8192);
        let (bytes, digests) = (&bytes[from * 8192..], &digests[from..]);
        let digests = &digests[..usize::try_from(count).unwrap()];
        stager
            .write_blocks(&mut batch, extent, bytes, digests, Old::None)
            .unwrap();
    }
    stager
        .write_zeros(&mut batch, block(4), true, Old::None)
        .unwrap();
    session.stage(batch).unwrap();
    session.close_group().unwrap();

    let view = session.staged_view();

    let found: Vec<_> = (0..5).map(|n| view.digest_of(block(n)).unwrap()).collect();
    let expected = [
        Some(digests[0]),
        None,
        Some(digests[1]),
        Some(digests[2]),
        None,
    ];
    assert_eq!(found, expected);
    let two = Extent::from_range(0..2 * 8192);
    assert_eq!(view.digest_of(two).unwrap(), None, "no unit");
    let log_bytes = disk
        .content(&format!("state/{}.log.0000", id(1)))
        .unwrap()
        .len();
    let stats = replica.stats();
    // All but the header of the log.
    assert_eq!(stats.log_bytes(), (log_bytes - PAGE) as u64);
    assert_eq!(stats.records(), 1);
    assert!(!Stager::detached(setup.geometry(&old)).writes_new_file());
}
