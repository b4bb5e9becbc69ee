//! What is refused, and that refusing changes nothing.

use blockferry_core::{Extent, block_digest};
use blockferry_testkit::{SimDisk, SimOptions};
use blockferry_transfer_log::{ErrorKind, Old, Strategy, Unwritten};

use crate::harness::{PAGE, Setup, TARGET, id, image, quiet, root};
use crate::sessions::stage_some;

fn old() -> Vec<u8> {
    image(&[1, 2, 3, 4], 4 * PAGE)
}

fn new() -> Vec<u8> {
    image(&[1, 5, 3, 6], 4 * PAGE)
}

fn write_behind_our_back(setup: &Setup, disk: &SimDisk) -> Vec<u8> {
    let target = setup.open(disk).unwrap().target().unwrap();
    target.write_at(7, b"somebody").unwrap();
    target.flush().unwrap();
    setup.content(disk).unwrap()
}

fn setups() -> [Setup; 3] {
    [
        Setup::file(Strategy::Redo),
        Setup::device(Strategy::Redo),
        Setup::file(Strategy::Clone),
    ]
}

#[test]
fn a_target_that_was_written_since_is_not_rolled_back() {
    for setup in setups() {
        let disk = setup.machine(Some(&old()));
        setup
            .sync(&mut setup.open(&disk).unwrap(), 1, &new())
            .unwrap();
        let written = write_behind_our_back(&setup, &disk);

        let mut replica = setup.open(&disk).unwrap();
        assert_eq!(replica.unwritten().unwrap(), Unwritten::Written);
        let refused = replica.rollback(&quiet).unwrap_err();

        assert_eq!(refused.kind(), ErrorKind::Refused);
        assert_eq!(setup.content(&disk), Some(written));
    }
}

/// Its pages are in another file, where no reader of this log would look for them.
#[test]
fn a_batch_that_was_made_for_another_strategy_is_refused() {
    let clone = Setup::file(Strategy::Clone);
    let elsewhere = clone.machine(Some(&old()));
    let mut theirs = clone.open(&elsewhere).unwrap();
    let session = theirs.begin(&clone.plan(1, &new())).unwrap();
    let stager = session.stager();
    let mut batch = stager.blocks();
    let block = Extent::from_range(0..2 * PAGE as u64);
    let bytes = &new()[..2 * PAGE];
    stager
        .write_blocks(&mut batch, block, bytes, &[block_digest(bytes)], Old::None)
        .unwrap();
    let setup = Setup::device(Strategy::Redo).without_undo();
    let disk = setup.machine(Some(&old()));
    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut session = replica.begin(&setup.plan(2, &new())).unwrap();

    let refused = session.stage(batch).unwrap_err();

    assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
    setup.finish(&mut session, target.as_ref(), &new()).unwrap();
    session.commit(root(&new()), &quiet).unwrap();
    assert_eq!(setup.content(&disk), Some(new()));
}

#[test]
fn a_session_does_not_begin_while_another_is_unfinished() {
    let setup = Setup::file(Strategy::Redo);
    let disk = setup.machine(Some(&old()));
    stage_some(&setup, &disk, 1, &new(), 1, false);
    let mut replica = setup.open(&disk).unwrap();

    assert_eq!(
        replica.begin(&setup.plan(2, &new())).unwrap_err().kind(),
        ErrorKind::Refused
    );
    assert_eq!(replica.unfinished().map(|h| h.session), Some(id(1)));
    replica.cancel().unwrap();
    setup.sync(&mut replica, 2, &new()).unwrap();
}

#[test]
fn a_target_that_is_written_under_a_session_is_not_replaced() {
    for setup in setups() {
        let disk = setup.machine(Some(&old()));
        let mut replica = setup.open(&disk).unwrap();
        let target = replica.target();
        let mut session = replica.begin(&setup.plan(1, &new())).unwrap();
        setup
            .stage(&mut session, target.as_ref(), &new(), 9, &mut |_| {})
            .unwrap();
        target.unwrap().write_at(PAGE as u64, b"somebody").unwrap();

        assert_eq!(session.prepare().unwrap_err().kind(), ErrorKind::Refused);
        assert_eq!(
            session.commit(root(&new()), &quiet).unwrap_err().kind(),
            ErrorKind::Refused
        );

        drop(replica);
        let mut replica = setup.open(&disk).unwrap();
        assert!(!replica.can_resume().unwrap(), "{setup:?}");
        assert!(replica.resume(u64::MAX).is_err());
        replica.cancel().unwrap();
        assert_eq!(&setup.content(&disk).unwrap()[PAGE..PAGE + 8], b"somebody");
    }
}

#[test]
fn nothing_is_committed_that_was_not_prepared() {
    let setup = Setup::file(Strategy::Redo);
    let disk = setup.machine(Some(&old()));
    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut session = replica.begin(&setup.plan(1, &new())).unwrap();
    setup
        .stage(&mut session, target.as_ref(), &new(), 9, &mut |_| {})
        .unwrap();

    assert_eq!(
        session.commit(root(&new()), &quiet).unwrap_err().kind(),
        ErrorKind::Refused
    );

    assert_eq!(setup.content(&disk), Some(old()));
}

#[test]
fn fuzzy_pages_are_committed_only_after_another_pass() {
    let setup = Setup::file(Strategy::Redo);
    let disk = setup.machine(Some(&old()));
    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut session = replica.begin(&setup.plan(1, &new())).unwrap();
    let stager = session.stager();
    let mut batch = stager.pages();
    batch.mark_fuzzy();
    let page = Extent::from_range(4096..8192);
    stager.add(
        &mut batch,
        page,
        &[9; PAGE],
        Old::Data(&old()[PAGE..2 * PAGE]),
    );
    session.stage(batch).unwrap();

    assert_eq!(session.prepare().unwrap_err().kind(), ErrorKind::Refused);
    setup.finish(&mut session, target.as_ref(), &new()).unwrap();
    session.commit(root(&new()), &quiet).unwrap();

    assert_eq!(setup.content(&disk), Some(new()));
}

#[test]
fn a_page_without_its_pre_image_is_not_committed_where_undo_is_kept() {
    let setup = Setup::file(Strategy::Redo);
    let disk = setup.machine(Some(&old()));
    let mut replica = setup.open(&disk).unwrap();
    let mut session = replica.begin(&setup.plan(1, &new())).unwrap();
    let stager = session.stager();
    let mut batch = stager.pages();
    stager.add(
        &mut batch,
        Extent::from_range(0..4096),
        &[9; PAGE],
        Old::None,
    );
    session.stage(batch).unwrap();

    assert_eq!(session.prepare().unwrap_err().kind(), ErrorKind::Refused);
}

#[test]
fn an_image_larger_than_the_device_is_refused_before_anything_is_written() {
    let setup = Setup::device(Strategy::Redo);
    let disk = setup.machine(Some(&old()));
    let mut replica = setup.open(&disk).unwrap();

    let refused = replica
        .begin(&setup.plan(1, &image(&[1; 5], 5 * PAGE)))
        .unwrap_err();

    assert_eq!(refused.kind(), ErrorKind::Refused);
    assert_eq!(disk.dir("state").names().unwrap(), ["lock", "state"]);
}

#[test]
fn a_second_process_is_refused() {
    let setup = Setup::file(Strategy::Redo);
    let disk = setup.machine(Some(&old()));
    let _first = setup.open(&disk).unwrap();

    assert_eq!(setup.open(&disk).unwrap_err().kind(), ErrorKind::Busy);
}

#[test]
fn nothing_is_staged_where_the_exchange_that_must_follow_is_impossible() {
    for strategy in [Strategy::Clone, Strategy::Shadow] {
        let setup = Setup::file(strategy);
        let disk = SimDisk::new(SimOptions {
            exchanges: false,
            ..SimOptions::default()
        });
        setup.install(&disk, Some(&old()));
        let mut replica = setup.open(&disk).unwrap();

        let refused = setup.sync(&mut replica, 1, &new()).unwrap_err();

        assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
        assert!(refused.to_string().contains("use redo"), "{refused}");
        assert!(!replica.supports_exchange(id(9)).unwrap());
        assert_eq!(setup.content(&disk), Some(old()));
        assert_eq!(disk.dir("images").names().unwrap(), [TARGET]);
        assert_eq!(disk.dir("state").names().unwrap(), ["lock", "state"]);
        let instead = Setup::file(Strategy::Redo);
        instead.sync(&mut replica, 1, &new()).unwrap();
        assert_eq!(setup.content(&disk), Some(new()));
    }
}

#[test]
fn an_exchange_is_tried_on_siblings_that_are_gone_afterwards() {
    let setup = Setup::file(Strategy::Redo);
    let disk = setup.machine(Some(&old()));
    let replica = setup.open(&disk).unwrap();

    assert!(replica.supports_exchange(id(9)).unwrap());

    assert_eq!(disk.dir("images").names().unwrap(), [TARGET]);
    assert_eq!(replica.unwritten().unwrap(), Unwritten::Unknown);
    let tried = disk.operations();
    assert!(replica.supports_exchange(id(9)).unwrap());
    assert_eq!(disk.operations(), tried, "it is tried once");
}
