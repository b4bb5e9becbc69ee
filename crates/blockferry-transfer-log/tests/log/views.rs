//! Points that are looked at: what is shown is, byte by byte, the image that was synced, and nothing changes.

use blockferry_device::{BlockSource, Status};
use blockferry_testkit::conformance::source_conformance;
use blockferry_testkit::{Random, SimDisk};
use blockferry_transfer_log::{ErrorKind, GroupId, Replica, Strategy};

use crate::harness::{PAGE, Setup, TARGET, id, image, root};

const GROUP: GroupId = GroupId::from_bytes([9; 16]);

fn number(random: &mut Random, below: usize) -> usize {
    usize::try_from(random.below(below as u64)).unwrap()
}

/// Some of the pages anew, some of them zero; a file also gets another length.
fn next_image(random: &mut Random, setup: &Setup, old: &[u8]) -> Vec<u8> {
    let mut fills: Vec<u8> = old.chunks(PAGE).map(|page| page[0]).collect();
    let mut bytes = old.len();
    if !setup.device {
        fills.resize(8 + number(random, 40), 0);
        bytes = fills.len() * PAGE - number(random, 2) * number(random, PAGE);
    }
    for _ in 0..number(random, 20) {
        let page = number(random, fills.len());
        fills[page] = u8::try_from(random.below(60) * 4).unwrap();
    }
    image(&fills, bytes)
}

fn whole(view: &dyn BlockSource) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(view.size_bytes()).unwrap()];
    view.read_at(0, &mut bytes).unwrap();
    bytes
}

/// Everything that lasts: names, and what is behind them.
fn footprint(setup: &Setup, disk: &SimDisk) -> Vec<(String, Option<Vec<u8>>)> {
    let mut found = vec![("target".to_owned(), setup.content(disk))];
    for directory in ["images", "state"] {
        for name in disk.dir(directory).names().unwrap() {
            let path = format!("{directory}/{name}");
            found.push((path.clone(), disk.content(&path)));
        }
    }
    found
}

#[test]
fn after_every_sync_the_old_point_is_the_image_before_and_the_current_one_the_last() {
    let kinds = Setup::of_every_kind();
    let kinds = kinds.iter().filter(|setup| !setup.is_without_undo());
    for (setup, seed) in kinds.flat_map(|setup| (0..6).map(move |seed| (*setup, seed))) {
        let setup = Setup {
            frames: setup.strategy == Strategy::Redo && seed % 2 == 1,
            ..setup
        };
        let mut random = Random::new(seed);
        let mut images = vec![image(&[7; 20], 20 * PAGE)];
        let disk = setup.machine(Some(&images[0]));
        for session in 1..=4 {
            let old = images.last().unwrap();
            let new = next_image(&mut random, &setup, old);
            let mut replica = setup.open(&disk).unwrap();
            setup.sync(&mut replica, session, &new).unwrap();
            drop(replica);
            let replica = setup.open(&disk).unwrap();
            let before = footprint(&setup, &disk);

            source_conformance(&*replica.old_view().unwrap(), old);
            source_conformance(&*replica.current_view().unwrap(), &new);

            assert_eq!(replica.new_view().unwrap_err().kind(), ErrorKind::Refused);
            assert!(before == footprint(&setup, &disk), "{setup:?} seed {seed}");
            images.push(new);
        }
    }
}

#[test]
fn a_prepared_member_of_a_group_shows_the_new_point_before_its_group_decides() {
    let kinds = Setup::of_every_kind();
    for (setup, seed) in kinds
        .iter()
        .flat_map(|setup| (0..4).map(move |seed| (*setup, seed)))
    {
        let mut random = Random::new(100 + seed);
        let first = image(&[7; 20], 20 * PAGE);
        let (old, new) = match setup.strategy {
            Strategy::Direct => (None, first),
            _ => (Some(first.clone()), next_image(&mut random, &setup, &first)),
        };
        let disk = setup.machine(old.as_deref());
        let mut replica = setup.open(&disk).unwrap();
        let target = replica.target();
        let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
        setup.finish(&mut session, target.as_ref(), &new).unwrap();
        session.prepare_for_group(root(&new), GROUP).unwrap();
        drop(session);
        drop(replica);

        let replica = setup.open(&disk).unwrap();
        let before = footprint(&setup, &disk);

        source_conformance(&*replica.new_view().unwrap(), &new);

        match old {
            Some(old) => assert!(whole(&*replica.current_view().unwrap()) == old),
            None => assert_eq!(
                replica.current_view().unwrap_err().kind(),
                ErrorKind::Refused
            ),
        }
        assert_eq!(replica.old_view().unwrap_err().kind(), ErrorKind::Refused);
        assert!(before == footprint(&setup, &disk), "{setup:?} seed {seed}");
    }
}

/// A replica that was synced from one image to another.
fn synced(setup: &Setup) -> (SimDisk, Replica, [Vec<u8>; 2]) {
    let images = [&[1; 20][..], &[5; 20][..]].map(|fills| image(fills, 20 * PAGE));
    let disk = setup.machine(Some(&images[0]));
    let mut replica = setup.open(&disk).unwrap();
    setup.sync(&mut replica, 1, &images[1]).unwrap();
    (disk, replica, images)
}

#[test]
fn what_is_only_staged_is_no_point_and_what_was_given_up_is_none_any_more() {
    for setup in Setup::of_every_kind() {
        let old = image(&[1; 20], 20 * PAGE);
        let new = image(&[5; 20], 20 * PAGE);
        let disk = setup.machine(Some(&old));
        let mut replica = setup.open(&disk).unwrap();
        let target = replica.target();
        let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
        let all = usize::MAX;
        setup
            .stage(&mut session, target.as_ref(), &new, all, &mut |_| {})
            .unwrap();
        drop(session);
        drop(replica);
        let replica = setup.open(&disk).unwrap();

        let refused = replica.new_view().unwrap_err();

        assert_eq!(refused.kind(), ErrorKind::Refused);
        assert!(refused.to_string().contains("is not complete"), "{refused}");
        match replica.current_view() {
            Ok(view) => assert!(whole(&*view) == old),
            Err(error) => {
                assert_eq!(setup.strategy, Strategy::Direct);
                assert!(error.to_string().contains("is not complete"), "{error}");
            }
        }
    }
}

#[test]
fn an_old_point_that_was_accepted_is_not_shown() {
    for setup in [Setup::file(Strategy::Redo), Setup::file(Strategy::Shadow)] {
        let (_disk, mut replica, _) = synced(&setup);
        replica.old_view().unwrap();

        replica.accept().unwrap();

        let refused = replica.old_view().unwrap_err();
        assert!(
            refused.to_string().contains("keeps no old point"),
            "{refused}"
        );
    }
}

#[test]
fn pre_images_are_not_laid_over_a_target_that_somebody_writes() {
    for setup in [Setup::file(Strategy::Redo), Setup::device(Strategy::Redo)] {
        let (_disk, replica, [old, _]) = synced(&setup);
        let view = replica.old_view().unwrap();
        assert!(whole(&*view) == old);

        replica.target().unwrap().write_at(0, &[77]).unwrap();

        let torn = view.read_at(0, &mut [0; 512]).unwrap_err();
        assert!(torn.to_string().contains("wrote the target"), "{torn}");
        let refused = replica.old_view().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Refused);
    }
}

#[test]
fn the_old_file_is_shown_whatever_becomes_of_the_target() {
    for strategy in [Strategy::Clone, Strategy::Shadow] {
        let setup = Setup::file(strategy);
        let (_disk, replica, [old, _]) = synced(&setup);

        replica.target().unwrap().write_at(0, &[77]).unwrap();

        assert!(whole(&*replica.old_view().unwrap()) == old);
    }
}

#[test]
fn a_page_of_the_log_that_rotted_is_an_error_and_never_shown() {
    let setup = Setup::file(Strategy::Redo).at_once();
    let (disk, replica, [old, _]) = synced(&setup);
    let log = format!("state/{}.log.0000", id(1));
    let bytes = disk.content(&log).unwrap();
    let view = replica.old_view().unwrap();
    // The last page of a record is the last pre-image.
    let last = bytes
        .chunks(PAGE)
        .rposition(|page| page == &old[19 * PAGE..])
        .unwrap();

    assert!(disk.flip_bit(&log, (last * PAGE) as u64));

    assert_eq!(replica.old_view().unwrap_err().kind(), ErrorKind::Corrupt);
    let error = view.read_at(19 * PAGE as u64, &mut [0; 512]).unwrap_err();

    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("digest mismatch"), "{error}: {cause}");
}

#[test]
fn holes_of_a_point_are_told_from_what_the_log_says() {
    let setup = Setup::file(Strategy::Redo);
    let old = image(&[1, 0, 0, 4, 0, 6], 6 * PAGE);
    let new = image(&[0, 2, 0, 0, 5, 6], 6 * PAGE);
    let disk = setup.machine(Some(&old));
    let mut replica = setup.open(&disk).unwrap();
    setup.sync(&mut replica, 1, &new).unwrap();
    let view = replica.old_view().unwrap();

    let told = (0..6u64).map(|page| view.status_at(page * PAGE as u64).unwrap().0);

    use Status::{Data, Zero};
    let told: Vec<Status> = told.collect();
    assert_eq!(told, [Data, Zero, Zero, Data, Zero, Data], "{TARGET}");
}
