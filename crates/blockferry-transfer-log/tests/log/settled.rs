//! What stands in the state counts, whatever became of the rest; and nothing is done that it does not ask for.

use blockferry_core::checksum;
use blockferry_device::Status;
use blockferry_testkit::{Fault, FaultKind, OperationKind, Repeat, SimDisk, SimOptions};
use blockferry_transfer_log::{
    ErrorKind, GroupDirectory, GroupId, GroupVerdicts, Place, Recovered, Replica, Session,
    Strategy, Unwritten, Verdict,
};

use crate::harness::{PAGE, Setup, TARGET, id, image, quiet, root};
use crate::sessions::stage_some;

/// Pages of the state: the copies of APPLIED of its first session, behind those of COMMIT, and its newer slot.
const APPLIED: [usize; 2] = [5, 6];
const NEWER_SLOT: usize = 2;
const STATE_PAGES: usize = 35;
const GROUP: GroupId = GroupId::from_bytes([7; 16]);

fn old() -> Vec<u8> {
    image(&[1, 2, 3, 4], 4 * PAGE)
}

fn new() -> Vec<u8> {
    image(&[1, 9, 3, 8], 4 * PAGE)
}

fn synced(setup: &Setup) -> SimDisk {
    let disk = setup.machine(Some(&old()));
    let mut replica = setup.open(&disk).unwrap();
    setup.sync(&mut replica, 1, &new()).unwrap();
    drop(replica);
    disk
}

fn state(disk: &SimDisk) -> Vec<u8> {
    disk.content("state/state").unwrap()
}

/// Fills pages of the state.
fn fill(disk: &SimDisk, pages: impl IntoIterator<Item = usize>, with: u8) {
    let mut state = state(disk);
    for page in pages {
        state[page * PAGE..(page + 1) * PAGE].fill(with);
    }
    disk.install("state", "state", &state);
}

fn write_as_somebody(disk: &SimDisk, setup: &Setup, page: u64) {
    let target = setup.open(disk).unwrap().target().unwrap();
    target.write_at(page * PAGE as u64, &[0xEE; PAGE]).unwrap();
    target.flush().unwrap();
}

/// Which pages of the target are holes.
fn holes(replica: &Replica) -> Vec<u64> {
    let target = replica.target().unwrap();
    let pages = target.size_bytes().div_ceil(PAGE as u64);
    (0..pages)
        .filter(|page| target.status_at(page * PAGE as u64).unwrap().0 == Status::Zero)
        .collect()
}

#[test]
fn torn_pages_of_the_state_are_struck_out_and_nothing_else_is_written() {
    let setup = Setup::file(Strategy::Redo);
    for torn in [
        &[6][..],
        &[5, 6],
        &[3],
        &[4],
        &[3, 4],
        &[1],
        &[34],
        &[33, 34],
    ] {
        let disk = synced(&setup);
        fill(&disk, torn.iter().copied(), 0x77);
        let mut expected = state(&disk);
        for page in torn {
            expected[page * PAGE..(page + 1) * PAGE].fill(0xFF);
        }
        // An APPLIED that is gone is decided again, in its place.
        let again = torn.contains(&5).then(|| state(&synced(&setup)));
        let expected = again.unwrap_or(expected);

        drop(setup.open(&disk).unwrap());

        let found = state(&disk);
        let differs =
            (0..STATE_PAGES).filter(|p| found[p * PAGE..][..PAGE] != expected[p * PAGE..][..PAGE]);
        assert_eq!(differs.collect::<Vec<_>>(), Vec::<usize>::new(), "{torn:?}");
        assert_eq!(setup.content(&disk), Some(new()));
    }
}

#[test]
fn a_state_that_is_cut_off_or_of_another_version_is_refused() {
    let setup = Setup::file(Strategy::Redo);
    let disk = synced(&setup);
    let whole = state(&disk);
    disk.install("state", "state", &whole[..whole.len() - 1]);

    let refused = setup.open(&disk).unwrap_err();

    assert_eq!(refused.kind(), ErrorKind::Corrupt, "{refused}");
    let sizes = format!("expected {} bytes, found {}", whole.len(), whole.len() - 1);
    assert!(refused.to_string().contains(&sizes), "{refused}");
    let mut longer = whole.clone();
    longer.resize(whole.len() + PAGE, 0);
    disk.install("state", "state", &longer);
    drop(setup.open(&disk).unwrap());

    let mut another = whole;
    another[8] = 9;
    let sum = checksum(&another[..PAGE - 32]);
    another[PAGE - 32..PAGE].copy_from_slice(sum.as_bytes());
    disk.install("state", "state", &another);
    let refused = setup.open(&disk).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::UnknownVersion, "{refused}");
}

#[test]
fn what_was_applied_is_not_applied_again_where_only_its_slot_says_so() {
    for setup in [Setup::file(Strategy::Redo), Setup::device(Strategy::Redo)] {
        let disk = synced(&setup);
        write_as_somebody(&disk, &setup, 1);
        let written = setup.content(&disk);
        fill(&disk, APPLIED, 0);

        let replica = setup.open(&disk).unwrap();

        assert_eq!(*replica.recovered(), Recovered::Applied(id(1)));
        assert_eq!(setup.content(&disk), written, "{setup:?}");
        assert_eq!(replica.unwritten().unwrap(), Unwritten::Written);
    }
}

#[test]
fn a_slot_that_is_lost_is_derived_from_the_outcome() {
    let setup = Setup::file(Strategy::Redo);
    let disk = synced(&setup);
    fill(&disk, [NEWER_SLOT], 0x77);
    // The outcome does not need the log any more.
    let rotten = disk.snapshot().after_kill();
    assert!(rotten.flip_bit(&format!("state/{}.log.0000", id(1)), PAGE as u64 + 50));
    let replica = setup.open(&rotten).unwrap();
    assert_eq!(replica.point().map(|p| p.root), Some(root(&new())));
    drop(replica);

    let replica = setup.open(&disk).unwrap();

    assert_eq!(*replica.recovered(), Recovered::Applied(id(1)));
    assert_eq!(replica.point().map(|p| p.root), Some(root(&new())));
    assert_eq!(replica.unwritten().unwrap(), Unwritten::Proven);
    drop(replica);
    // Nothing but the slot is asked for the epoch now.
    let mut replica = setup.open(&disk).unwrap();
    drop(replica.begin(&setup.plan(2, &old())).unwrap());
    drop(replica);
    assert_eq!(setup.open(&disk).unwrap().unfinished().unwrap().epoch, 2);
}

#[test]
fn opening_what_is_settled_writes_nothing() {
    let setup = Setup::file(Strategy::Redo);
    let disk = setup.machine(Some(&old()));
    drop(setup.open(&disk).unwrap());
    let before = state(&disk);
    drop(setup.open(&disk).unwrap());
    assert!(state(&disk) == before, "never synced");

    for setup in Setup::of_every_kind() {
        let disk = synced(&setup);
        let mut replica = setup.open(&disk).unwrap();
        let stamp = blockferry_transfer_log::SourceStamp::new(
            "another.raw",
            blockferry_device::Identity::unknown(),
            blockferry_device::Evidence::unknown(),
        );
        replica.refresh(stamp.clone()).unwrap();
        drop(replica);
        let before = state(&disk);

        let replica = setup.open(&disk).unwrap();

        assert_eq!(*replica.recovered(), Recovered::Clean, "{setup:?}");
        assert_eq!(replica.point().map(|p| &p.source), Some(&stamp));
        assert!(state(&disk) == before, "{setup:?}");
    }
}

#[test]
fn a_log_whose_decisions_are_gone_is_neither_taken_up_nor_gone_back_by() {
    let setup = Setup::file(Strategy::Redo);
    let disk = synced(&setup);
    fill(&disk, 3..STATE_PAGES, 0);

    let mut replica = setup.open(&disk).unwrap();

    assert_eq!(*replica.recovered(), Recovered::Clean);
    assert!(replica.unfinished().is_none());
    let refused = replica.rollback(&quiet).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Corrupt, "{refused}");
    assert_eq!(setup.content(&disk), Some(new()));
}

#[test]
fn a_log_that_lost_records_after_they_were_applied_keeps_nobody_out() {
    let setup = Setup::file(Strategy::Redo);
    let disk = synced(&setup);
    let log = format!("state/{}.log.0000", id(1));
    assert!(disk.flip_bit(&log, PAGE as u64 + 50));

    let mut replica = setup.open(&disk).unwrap();

    assert_eq!(*replica.recovered(), Recovered::Clean);
    let refused = replica.rollback(&quiet).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Corrupt, "{refused}");
    assert_eq!(setup.content(&disk), Some(new()));
}

#[test]
fn a_rotten_pre_image_is_found_before_the_way_back_is_decided() {
    let setup = Setup::file(Strategy::Redo);
    let (old, new) = (
        image(&[1, 2, 3, 4, 5, 6, 7, 8], 8 * PAGE),
        image(&[11, 12, 13, 14, 15, 16, 17, 18], 8 * PAGE),
    );
    let disk = setup.machine(Some(&old));
    setup
        .sync(&mut setup.open(&disk).unwrap(), 1, &new)
        .unwrap();
    let log = format!("state/{}.log.0000", id(1));
    // Header of the segment, header of the first record of four, two new pages, two old ones.
    assert!(disk.flip_bit(&log, 5 * PAGE as u64 + 50));
    let mut replica = setup.open(&disk).unwrap();

    let refused = replica.rollback(&quiet).unwrap_err();

    assert_eq!(refused.kind(), ErrorKind::Corrupt, "{refused}");
    let place = format!("transfer log record 1 at offset {PAGE} of {log}");
    assert!(refused.to_string().contains(&place), "{refused}");
    drop(replica);
    assert_eq!(*setup.open(&disk).unwrap().recovered(), Recovered::Clean);
    assert_eq!(setup.content(&disk), Some(new));
}

#[test]
fn a_read_error_of_the_target_does_not_pass_for_somebody_who_wrote_it() {
    let setup = Setup::device(Strategy::Redo);
    let disk = setup.machine(Some(&old()));
    stage_some(&setup, &disk, 1, &new(), usize::MAX, false);
    disk.install_device(TARGET, &old());
    let replica = setup.open(&disk).unwrap();
    let unreadable = Fault::on(OperationKind::Read, TARGET, 1, FaultKind::Io);
    disk.inject(unreadable.repeat(Repeat::Forever));

    assert_eq!(replica.can_resume().unwrap_err().kind(), ErrorKind::Target);

    disk.clear_faults();
    assert!(replica.can_resume().unwrap());
}

#[test]
fn another_device_is_not_taken_for_the_one_that_the_state_belongs_to() {
    let setup = Setup::device(Strategy::Redo);
    let disk = synced(&setup);
    disk.install_device("another", &old());
    let another = Place::Device(disk.device("another", 0));

    let refused = Replica::open(another, disk.dir("state"), None, &quiet).unwrap_err();

    assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
    assert_eq!(disk.content("another"), Some(old()));
}

#[test]
fn space_is_reserved_noted_and_given_back() {
    let setup = Setup::file(Strategy::Redo);
    let old = image(&[1, 0, 0, 4], 4 * PAGE);
    let new = image(&[1, 2, 0, 5], 4 * PAGE);
    let disk = setup.machine(Some(&old));
    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
    setup.finish(&mut session, target.as_ref(), &new).unwrap();
    drop(session);
    assert_eq!(holes(&replica), [2], "reserved");
    drop(replica);

    let mut replica = setup.open(&disk).unwrap();
    assert!(replica.is_unwritten_since_session().unwrap(), "noted");
    replica.cancel().unwrap();

    assert_eq!(holes(&replica), [1, 2], "given back");
    assert_eq!(setup.content(&disk), Some(old));
}

/// Space that a run reserved, or that is to be given back, is nobody's any more once somebody wrote there.
#[test]
fn what_somebody_wrote_is_never_given_back_as_space() {
    let setup = Setup::file(Strategy::Redo);
    let disk = prepared(&setup, |_session, _new| {});
    write_as_somebody(&disk, &setup, 1);
    let written = setup.content(&disk);
    let mut replica = setup.open(&disk).unwrap();
    assert!(!replica.is_unwritten_since_session().unwrap());
    replica.cancel().unwrap();
    drop(replica);
    assert_eq!(setup.content(&disk), written, "cancel");

    // What is kept for a way back may be let go of although its log is gone.
    let disk = synced(&setup);
    disk.dir("state")
        .remove(&format!("{}.log.0000", id(1)))
        .unwrap();
    let mut replica = setup.open(&disk).unwrap();
    assert!(replica.retained().is_some());
    replica.accept().unwrap();
    assert!(replica.retained().is_none(), "and is not offered again");
    drop(replica);
    assert!(setup.open(&disk).unwrap().retained().is_none());

    let disk = setup.machine(Some(&old()));
    let mut replica = setup.open(&disk).unwrap();
    let zeroed = image(&[1, 0, 3, 8], 4 * PAGE);
    setup.sync(&mut replica, 1, &zeroed).unwrap();
    drop(replica);
    write_as_somebody(&disk, &setup, 1);
    let written = setup.content(&disk);
    setup.open(&disk).unwrap().accept().unwrap();
    assert_eq!(setup.content(&disk), written, "accept");
}

struct Always(Verdict);

impl GroupVerdicts for Always {
    fn verdict(&self, _: GroupId) -> blockferry_transfer_log::Result<Verdict> {
        Ok(self.0)
    }
}

/// A member that is prepared, with space reserved in page 1 of its target.
fn prepared_member(setup: &Setup) -> SimDisk {
    prepared(setup, |session, new| {
        session.prepare_for_group(root(new), GROUP).unwrap();
        let batch = setup.batches(session, None, &old()).unwrap().swap_remove(0);
        let refused = session.stage(batch).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
    })
}

/// Everything is staged, with space reserved in page 1 of the target, and `then` done.
fn prepared(setup: &Setup, then: impl FnOnce(&mut Session<'_>, &[u8])) -> SimDisk {
    let disk = setup.machine(Some(&image(&[1, 0, 0, 4], 4 * PAGE)));
    let new = image(&[1, 2, 0, 5], 4 * PAGE);
    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
    setup.finish(&mut session, target.as_ref(), &new).unwrap();
    then(&mut session, &new);
    drop(session);
    drop(replica);
    disk
}

#[test]
fn an_aborted_member_gives_its_space_back_unless_somebody_used_it() {
    let setup = Setup::file(Strategy::Redo);
    let aborted = Always(Verdict::Aborted);
    let disk = prepared_member(&setup);
    let replica = setup.open_in_group(&disk, Some(&aborted)).unwrap();
    assert_eq!(holes(&replica), [1, 2]);
    assert!(replica.unfinished().is_none());

    let disk = prepared_member(&setup);
    write_as_somebody(&disk, &setup, 1);
    let written = setup.content(&disk);
    let replica = setup.open_in_group(&disk, Some(&aborted)).unwrap();
    assert_eq!(holes(&replica), [2]);
    assert_eq!(setup.content(&disk), written);
}

#[test]
fn a_prepared_member_without_its_log_is_refused_unless_its_group_aborted() {
    let setup = Setup::file(Strategy::Redo);
    for (verdict, accepted) in [
        (Verdict::Aborted, true),
        (Verdict::Unknown, false),
        (Verdict::Committed, false),
    ] {
        let disk = prepared_member(&setup);
        let log = format!("state/{}.log.0000", id(1));
        assert!(disk.flip_bit(&log, 100));

        let opened = setup.open_in_group(&disk, Some(&Always(verdict)));

        match opened {
            Ok(_) => assert!(accepted, "{verdict:?}"),
            Err(refused) => {
                assert!(!accepted, "{verdict:?}: {refused}");
                assert_eq!(refused.kind(), ErrorKind::Corrupt, "{refused}");
            }
        }
    }
}

#[test]
fn a_group_record_that_is_cut_off_another_groups_or_of_another_version_says_so() {
    let disk = SimDisk::new(SimOptions::default());
    let job = GroupDirectory::new(disk.dir("job"));
    let other = GroupId::from_bytes([8; 16]);
    job.commit(GROUP, &[id(1)]).unwrap();
    let name = |group: u8| format!("{}.group", id(group));
    let whole = disk.content(&format!("job/{}", name(7))).unwrap();

    disk.install("job", &name(8), &whole);
    let refused = job.verdict(other).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Corrupt, "another group's");

    disk.install("job", &name(8), &whole[..PAGE / 2]);
    let refused = job.verdict(other).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Corrupt, "cut off: {refused}");

    disk.install("job", &name(8), &whole);
    for copy in [0, PAGE as u64] {
        assert!(disk.spoil(&format!("job/{}", name(8)), copy));
    }
    let refused = job.verdict(other).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Log, "unreadable: {refused}");

    let mut another = whole;
    for copy in another.chunks_mut(PAGE) {
        let (body, sum) = copy.split_at_mut(PAGE - 32);
        body[8] = 9;
        sum.copy_from_slice(checksum(body).as_bytes());
    }
    disk.install("job", &name(8), &another);
    let refused = job.verdict(other).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::UnknownVersion, "{refused}");
}

#[test]
fn a_decision_that_may_not_be_durable_is_pending() {
    let setup = Setup::file(Strategy::Redo);
    let disk = setup.machine(Some(&old()));
    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut session = replica.begin(&setup.plan(1, &new())).unwrap();
    setup.finish(&mut session, target.as_ref(), &new()).unwrap();
    disk.inject(Fault::on(
        OperationKind::Flush,
        "state/state",
        1,
        FaultKind::Io,
    ));

    let error = session.commit(root(&new()), &quiet).unwrap_err();

    assert_eq!(error.kind(), ErrorKind::DecisionPending, "{error}");
}

#[test]
fn the_page_where_a_file_is_cut_off_is_in_the_log_even_if_it_stays() {
    let whole = image(&[1, 2, 3, 4, 5, 6], 6 * PAGE);
    let part = |bytes: usize| whole[..bytes].to_vec();
    let zeros_to = |bytes: usize, to: usize| {
        let mut grown = part(bytes);
        grown.resize(to, 0);
        grown
    };
    let (unaligned, page) = (4 * PAGE + 77, PAGE as u64);
    for (old, new, staged) in [
        // The page across the end that moves: cut off, or filled up with zeros.
        (part(6 * PAGE), part(unaligned), 77),
        (part(unaligned), zeros_to(unaligned, 6 * PAGE), page),
        (part(unaligned), zeros_to(unaligned, 4 * PAGE + 99), 99),
        // No page lies across the end, or it does not move.
        (part(6 * PAGE), part(4 * PAGE), 0),
        (part(4 * PAGE), zeros_to(4 * PAGE, 6 * PAGE), 0),
        (part(unaligned), part(unaligned), 0),
    ] {
        let sizes = (old.len(), new.len());
        for setup in [
            Setup::file(Strategy::Redo),
            Setup::file(Strategy::Redo).without_undo(),
            Setup::file(Strategy::Clone),
        ] {
            let disk = setup.machine(Some(&old));
            let mut replica = setup.open(&disk).unwrap();
            let target = replica.target();
            let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
            setup.finish(&mut session, target.as_ref(), &new).unwrap();

            let totals = session.totals();
            let live = totals.live_bytes + totals.live_zero_bytes;
            let expected = if setup.strategy == Strategy::Redo {
                staged
            } else {
                0
            };
            assert_eq!(live, expected, "{sizes:?} {setup:?}");
            session.commit(root(&new), &quiet).unwrap();
            assert_eq!(setup.content(&disk).as_ref(), Some(&new), "{sizes:?}");
        }
    }
}

/// Names that no version writes are not taken for a log, nor for a file of ours.
#[test]
fn names_that_no_session_has_are_passed_over() {
    let setup = Setup::file(Strategy::Shadow);
    let disk = setup.machine(Some(&old()));
    let log_of_none = format!("{}.log.{}", id(1), u32::MAX);
    disk.install("state", &log_of_none, &[1; PAGE]);
    let orphan = format!(".{TARGET}.{}.blockferry", id(9));
    let others = [
        format!(".{TARGET}.{}.blockferry", &id(9).to_string()[1..]),
        format!(
            ".{TARGET}.{}.blockferry",
            id(9).to_string().replace('0', "A")
        ),
    ];
    for name in others.iter().chain([&orphan]) {
        disk.install("images", name, &old());
    }

    stage_some(&setup, &disk, 1, &new(), 1, false);
    let mut replica = setup.open(&disk).unwrap();

    assert_eq!(*replica.recovered(), Recovered::Staging);
    let mut session = replica.resume(u64::MAX).unwrap();
    setup.finish(&mut session, None, &new()).unwrap();
    session.commit(root(&new()), &quiet).unwrap();
    assert_eq!(setup.content(&disk), Some(new()));
    let names = disk.dir("images").names().unwrap();
    assert!(
        !names.contains(&orphan),
        "a session that is gone left it: {names:?}"
    );
    assert!(others.iter().all(|name| names.contains(name)), "{names:?}");
    assert!(disk.dir("state").names().unwrap().contains(&log_of_none));
}

#[test]
fn a_log_of_another_version_is_refused_and_stays() {
    let setup = Setup::file(Strategy::Redo);
    let disk = setup.machine(Some(&old()));
    stage_some(&setup, &disk, 1, &new(), 1, false);
    let log = format!("{}.log.0000", id(1));
    let mut another = disk.content(&format!("state/{log}")).unwrap();
    another[8] = 9;
    let sum = checksum(&another[..PAGE - 32]);
    another[PAGE - 32..PAGE].copy_from_slice(sum.as_bytes());
    disk.install("state", &log, &another);

    let refused = setup.open(&disk).unwrap_err();

    assert_eq!(refused.kind(), ErrorKind::UnknownVersion, "{refused}");
    let versions = "format version 9, this build reads 1";
    assert!(refused.to_string().contains(versions), "{refused}");
    assert_eq!(disk.content(&format!("state/{log}")), Some(another));
}
