//! What reaches a limit, and what lies right before it: nothing is written that a reader would refuse, and nothing is
//! refused that it would read.

use blockferry_core::{BlockSize, Extent, Geometry};
use blockferry_device::{Evidence, Identity};
use blockferry_testkit::{SimDisk, SimOptions};
use blockferry_transfer_log::{
    Batch, ErrorKind, Old, Plan, Prepared, Session, SessionTotals, SourceStamp, Stager, Strategy,
    Undo,
};

use crate::harness::{PAGE, Setup, TARGET, id, image, quiet, root};

const PAGES: usize = 5_000;

/// A device of some megabytes and a plan to make it this.
fn machine(strategy: Strategy) -> (Setup, SimDisk, Plan) {
    let setup = Setup::device(strategy).without_undo();
    let disk = SimDisk::new(SimOptions::default());
    disk.install_device(TARGET, &vec![0; PAGES * PAGE]);
    drop(disk.dir("state"));
    let geometry = Geometry::new((PAGES * PAGE) as u64, BlockSize::MIN);
    let stamp = SourceStamp::new("source.raw", Identity::unknown(), Evidence::unknown());
    let mut plan = Plan::new(id(1), strategy, geometry, stamp);
    plan.undo = Undo::None;
    (setup, disk, plan)
}

fn pages(first: u64, count: u64) -> Extent {
    let page = PAGE as u64;
    Extent::from_range(first * page..(first + count) * page)
}

/// Whether a batch that `fill` makes is staged, and then read again by the next open.
fn is_staged(fill: impl Fn(&Stager, &mut Batch)) -> bool {
    let Some((disk, live)) = staged(fill) else {
        return false;
    };
    let mut replica = Setup::device(Strategy::Redo).open(&disk).unwrap();
    let again = replica.resume(u64::MAX).unwrap().totals();
    assert_eq!(
        (again.live_bytes, again.live_zero_bytes),
        (live.live_bytes, live.live_zero_bytes)
    );
    assert_eq!(again.resumed_bytes, live.live_bytes);
    true
}

/// The machine and what its session holds, if a batch that `fill` makes is staged.
fn staged(fill: impl Fn(&Stager, &mut Batch)) -> Option<(SimDisk, SessionTotals)> {
    let (setup, disk, plan) = machine(Strategy::Redo);
    let mut replica = setup.open(&disk).unwrap();
    let mut session = replica.begin(&plan).unwrap();
    let stager = session.stager();
    let mut batch = stager.pages();
    fill(&stager, &mut batch);
    if let Err(error) = session.stage(batch) {
        assert_eq!(error.kind(), ErrorKind::LimitExceeded, "{error}");
        return None;
    }
    session.close_group().unwrap();
    let totals = session.totals();
    drop(session);
    drop(replica);
    Some((disk, totals))
}

#[test]
fn a_record_takes_as_much_as_is_read_again_and_no_more() {
    let bytes = vec![7; 257 * PAGE];
    let new = |count: u64| {
        let bytes = bytes.clone();
        move |stager: &Stager, batch: &mut Batch| {
            stager.add(batch, pages(0, count), &bytes, Old::None);
        }
    };
    assert!(is_staged(new(256)) && !is_staged(new(257)), "new pages");
    let old = |count: u64| {
        let bytes = bytes.clone();
        move |stager: &Stager, batch: &mut Batch| {
            stager.add_zero(batch, pages(0, count), Old::Data(&bytes));
        }
    };
    assert!(is_staged(old(256)) && !is_staged(old(257)), "old pages");
    let zeros = |count: u64| {
        move |stager: &Stager, batch: &mut Batch| {
            (0..count).for_each(|n| stager.add_zero(batch, pages(2 * n, 1), Old::None));
        }
    };
    assert!(is_staged(zeros(512)) && !is_staged(zeros(513)), "extents");
    let frame = |length: usize| {
        let bytes = bytes.clone();
        move |stager: &Stager, batch: &mut Batch| {
            stager.add(batch, pages(0, 1), &bytes, Old::None);
            batch.store_frame(&vec![1; length]);
        }
    };
    let most = 2 << 20;
    // No frame of one page is as long: it is not read again.
    assert!(staged(frame(most)).is_some() && staged(frame(most + 1)).is_none());
    // As a frame more pages than a record may have are still more pages than a record may have.
    let packed = |stager: &Stager, batch: &mut Batch| {
        stager.add(batch, pages(0, 257), &bytes, Old::None);
        batch.store_frame(&[1; 100]);
    };
    assert!(!is_staged(packed), "pages in a frame");
}

#[test]
fn a_record_whose_header_alone_reaches_the_end_of_the_log_counts() {
    // 18 bytes for each extent: two pages of header and no payload.
    let zeros = |stager: &Stager, batch: &mut Batch| {
        (0..250).for_each(|n| stager.add_zero(batch, pages(2 * n, 1), Old::None));
    };
    assert!(is_staged(zeros));
}

#[test]
fn what_is_longer_than_one_reading_is_proven_piece_by_piece() {
    let (setup, disk, plan) = machine(Strategy::Redo);
    let fills: Vec<u8> = (0..PAGES).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let new = image(&fills, PAGES * PAGE);
    let mut replica = setup.open(&disk).unwrap();
    let mut session = replica.begin(&plan).unwrap();
    let stager = session.stager();
    // One page less than a record may have, so that pieces end anywhere.
    for (chunk, first) in new.chunks(255 * PAGE).zip((0..).step_by(255)) {
        let mut batch = stager.pages();
        let extent = pages(first, (chunk.len() / PAGE) as u64);
        stager.add(&mut batch, extent, chunk, Old::None);
        session.stage(batch).unwrap();
    }
    assert!(matches!(session.prepare().unwrap(), Prepared::Complete));

    let applied = session.commit(root(&new), &quiet).unwrap();

    assert_eq!(applied.proven_bytes, new.len() as u64);
    assert!(setup.content(&disk) == Some(new));
}

#[test]
fn a_log_takes_as_much_as_it_may_and_no_more() {
    let (setup, disk, plan) = machine(Strategy::Redo);
    let page = vec![7; PAGE];
    let batch = |stager: &Stager, n: u64| {
        let mut batch = stager.pages();
        stager.add(&mut batch, pages(n, 1), &page, Old::None);
        batch
    };
    let mut replica = setup.open(&disk).unwrap();
    let mut session = replica.begin(&plan).unwrap();
    let stager = session.stager();
    session.stage(batch(&stager, 0)).unwrap();
    let used = session.close_group().unwrap().log_bytes;
    drop(session);
    drop(replica);

    // Its new pages count; their header comes on top.
    for (limit, fits) in [(used + PAGE as u64, true), (used + PAGE as u64 - 1, false)] {
        let disk = disk.snapshot().after_kill();
        let mut replica = setup.open(&disk).unwrap();
        let mut session = replica
            .resume(limit + used_by_a_resume(&disk, used))
            .unwrap();
        let staged = session.stage(batch(&stager, 1));
        assert_eq!(staged.is_ok(), fits, "{limit}");
    }
}

/// What another segment adds to a log.
fn used_by_a_resume(disk: &SimDisk, before: u64) -> u64 {
    let disk = disk.snapshot().after_kill();
    let mut replica = Setup::device(Strategy::Redo).open(&disk).unwrap();
    replica.resume(u64::MAX).unwrap().checkpoint().log_bytes - before
}

#[test]
fn what_is_durable_and_staged_again_is_counted() {
    let (setup, disk, plan) = machine(Strategy::Redo);
    let stage = |session: &mut Session<'_>, range: Extent, fill: u8| {
        let stager = session.stager();
        let mut batch = stager.pages();
        let bytes = vec![fill; usize::try_from(range.length()).unwrap()];
        stager.add(&mut batch, range, &bytes, Old::None);
        session.stage(batch).unwrap();
        session.close_group().unwrap();
    };
    let mut replica = setup.open(&disk).unwrap();
    let mut session = replica.begin(&plan).unwrap();
    stage(&mut session, pages(0, 3), 7);
    assert_eq!(session.totals().restaged_bytes, 0);
    drop(session);
    drop(replica);
    let mut replica = setup.open(&disk).unwrap();
    let mut session = replica.resume(u64::MAX).unwrap();

    stage(&mut session, pages(1, 1), 8);
    assert_eq!(session.totals().restaged_bytes, 0, "other content");
    stage(&mut session, pages(0, 1), 7);
    stage(&mut session, pages(2, 2), 7);

    let again = session.totals().restaged_bytes;
    assert_eq!(again, 2 * PAGE as u64, "one page of each");
}
