use std::collections::BTreeSet;

use blockferry_device::{ReadRequest, Status, StorageFile};

use super::*;

fn disk() -> SimDisk {
    SimDisk::new(SimOptions::default())
}

fn images(disk: &SimDisk) -> Vec<CrashImage> {
    disk.snapshot()
        .crash_images(1, ImageLimits::default())
        .collect()
}

fn undamaged(disk: &SimDisk) -> Vec<CrashImage> {
    let limits = ImageLimits {
        damaged: 0,
        ..ImageLimits::default()
    };
    disk.snapshot().crash_images(1, limits).collect()
}

fn contents(images: &[CrashImage], path: &str) -> BTreeSet<Option<Vec<u8>>> {
    images
        .iter()
        .map(|image| image.disk().content(path))
        .collect()
}

fn new_file(disk: &SimDisk, name: &str) -> Arc<dyn StorageFile> {
    disk.dir("d").create(name).unwrap()
}

#[test]
fn nothing_written_is_certain_before_a_flush_and_all_of_it_after() {
    let disk = disk();
    disk.install("d", "f", &[1; 1024]);
    let file = disk.dir("d").open("f").unwrap().unwrap();

    file.write_at(0, &[2; 1024]).unwrap();
    let before = contents(&undamaged(&disk), "d/f");
    file.flush().unwrap();
    let after = contents(&images(&disk), "d/f");

    let mixed = |first: u8, second: u8| Some([[first; 512], [second; 512]].concat());
    assert_eq!(
        before,
        [mixed(1, 1), mixed(1, 2), mixed(2, 1), mixed(2, 2)].into()
    );
    assert_eq!(after, [mixed(2, 2)].into());
}

#[test]
fn every_version_written_since_the_flush_may_survive() {
    let disk = disk();
    let device = disk.device("v", 512);
    for version in 1..=3 {
        device.write_at(0, &[version; 512]).unwrap();
    }

    let firsts: BTreeSet<u8> = undamaged(&disk)
        .iter()
        .map(|i| i.disk().content("v").unwrap()[0])
        .collect();

    assert_eq!(firsts, [0, 1, 2, 3].into());
}

#[test]
fn size_content_and_name_of_a_new_file_are_lost_separately() {
    let disk = disk();
    let file = new_file(&disk, "f");
    file.write_at(0, &[9; 512]).unwrap();

    let found = contents(&undamaged(&disk), "d/f");

    let expected = [None, Some(vec![]), Some(vec![0; 512]), Some(vec![9; 512])];
    assert_eq!(found, expected.into());
}

#[test]
fn flushing_a_file_keeps_its_content_but_not_its_name() {
    let disk = disk();
    let file = new_file(&disk, "f");
    file.write_at(0, &[9; 512]).unwrap();
    file.flush().unwrap();

    let found = contents(&images(&disk), "d/f");
    disk.dir("d").sync().unwrap();
    let synced = contents(&images(&disk), "d/f");

    assert_eq!(found, [None, Some(vec![9; 512])].into());
    assert_eq!(synced, [Some(vec![9; 512])].into());
}

#[test]
fn an_exchange_survives_as_a_whole_or_not_at_all() {
    let disk = disk();
    disk.install("d", "a", b"one");
    disk.install("d", "b", b"two");

    disk.dir("d").exchange("a", "b").unwrap();
    let found: BTreeSet<_> = images(&disk)
        .iter()
        .map(|i| {
            (
                i.disk().content("d/a").unwrap(),
                i.disk().content("d/b").unwrap(),
            )
        })
        .collect();

    let pair = |a: &[u8], b: &[u8]| (a.to_vec(), b.to_vec());
    assert_eq!(found, [pair(b"one", b"two"), pair(b"two", b"one")].into());
}

#[test]
fn changes_of_one_name_survive_in_order() {
    let disk = disk();
    disk.install("d", "a", b"one");
    disk.dir("d").rename_new("a", "b").unwrap();
    disk.dir("d").rename_new("b", "c").unwrap();

    let found: BTreeSet<_> = images(&disk)
        .iter()
        .map(|i| i.disk().dir("d").names().unwrap())
        .collect();

    assert_eq!(
        found,
        [
            vec!["a".to_owned()],
            vec!["b".to_owned()],
            vec!["c".to_owned()]
        ]
        .into()
    );
}

#[test]
fn damaged_images_have_torn_garbage_and_unreadable_sectors() {
    let disk = disk();
    let device = disk.device("v", 4096);
    device.write_at(0, &[2; 512]).unwrap();

    let mut kinds = BTreeSet::new();
    for image in images(&disk) {
        let after = image.disk().device("v", 4096);
        let mut sector = [0; 512];
        kinds.insert(match after.read_at(0, &mut sector) {
            Err(_) => "unreadable",
            Ok(()) if sector == [0; 512] => "old",
            Ok(()) if sector == [2; 512] => "new",
            Ok(()) if sector.iter().all(|byte| [0, 2].contains(byte)) => "torn",
            Ok(()) => "garbage",
        });
    }

    assert_eq!(
        kinds,
        ["old", "new", "torn", "garbage", "unreadable"].into()
    );
}

#[test]
fn an_unreadable_sector_comes_back_by_rewriting_all_of_it() {
    let disk = disk();
    let device = disk.device("v", 4096);
    assert!(disk.spoil("v", 1024));

    assert!(device.read_at(0, &mut [0; 4096]).is_err());
    assert!(device.write_at(1025, &[1; 100]).is_err());
    device.write_at(1024, &[1; 512]).unwrap();

    device.read_at(0, &mut [0; 4096]).unwrap();
}

#[test]
fn after_a_failed_flush_the_cache_lies_and_a_second_flush_proves_nothing() {
    let disk = disk();
    let device = disk.device("v", 64 * 1024);
    device.write_at(0, &[5; 64 * 1024]).unwrap();
    disk.inject(Fault::on(OperationKind::Flush, "v", 1, FaultKind::Io));

    assert!(device.flush().is_err());
    device.flush().unwrap();

    let mut cached = vec![0; 64 * 1024];
    device.read_at(0, &mut cached).unwrap();
    let mut medium = vec![0; 64 * 1024];
    device
        .read_medium(&mut [ReadRequest {
            offset: 0,
            buffer: &mut medium,
        }])
        .unwrap();
    assert!(cached.iter().all(|byte| *byte == 5));
    assert!(medium.contains(&0) && medium.contains(&5));
    assert_eq!(contents(&images(&disk), "v"), [Some(medium.clone())].into());
    device.drop_cache();
    assert_eq!(disk.content("v"), Some(medium));
    assert_eq!(
        disk.misuses().len(),
        1,
        "the second flush used a dead handle"
    );
}

#[test]
fn a_silent_loss_shows_only_when_the_medium_is_read() {
    let disk = disk();
    let device = disk.device("v", 64 * 1024);
    device.write_at(0, &[5; 64 * 1024]).unwrap();
    disk.inject(Fault::on(
        OperationKind::Flush,
        "v",
        1,
        FaultKind::SilentLoss,
    ));

    device.flush().unwrap();

    assert_eq!(disk.content("v"), Some(vec![5; 64 * 1024]));
    device.drop_cache();
    assert_ne!(disk.content("v"), Some(vec![5; 64 * 1024]));
}

#[test]
fn with_a_way_past_the_cache_blocked_a_silent_loss_stays_hidden() {
    for bypass in [Bypass::DropsOnly, Bypass::MediumOnly] {
        let disk = SimDisk::new(SimOptions {
            bypass,
            ..SimOptions::default()
        });
        let device = disk.device("v", 64 * 1024);
        device.write_at(0, &[5; 64 * 1024]).unwrap();
        disk.inject(Fault::on(
            OperationKind::Flush,
            "v",
            1,
            FaultKind::SilentLoss,
        ));
        device.flush().unwrap();
        let mut read = vec![0; 64 * 1024];
        let mut request = [ReadRequest {
            offset: 0,
            buffer: &mut read,
        }];

        device.read_medium(&mut request).unwrap();
        let medium_shows = read == [5; 64 * 1024];
        device.drop_cache();
        let cache_stays = disk.content("v") == Some(vec![5; 64 * 1024]);

        assert_eq!(medium_shows, bypass == Bypass::DropsOnly);
        assert_eq!(cache_stays, bypass == Bypass::MediumOnly);
    }
}

#[test]
fn a_skipped_flush_leaves_everything_pending() {
    let disk = disk();
    let device = disk.device("v", 512);
    device.write_at(0, &[5; 512]).unwrap();
    disk.inject(Fault::on(OperationKind::Flush, "v", 1, FaultKind::Skipped));

    device.flush().unwrap();

    assert_eq!(undamaged(&disk).len(), 2);
}

#[test]
fn a_short_write_does_its_first_sectors_and_loses_nothing() {
    let mut ends = BTreeSet::new();
    for seed in 0..40 {
        let disk = SimDisk::new(SimOptions {
            seed,
            ..SimOptions::default()
        });
        disk.install("d", "f", &[1; 4096]);
        let file = disk.dir("d").open("f").unwrap().unwrap();
        file.write_at(0, &[2; 512]).unwrap();
        disk.fail_operation(2, FaultKind::Short, Repeat::Once);

        let error = file.write_at(1024, &[3; 2048]).unwrap_err();

        assert_eq!(error.kind(), ErrorKind::Io);
        let content = disk.content("d/f").unwrap();
        let written = content.iter().filter(|byte| **byte == 3).count();
        let expected = [&[2; 512][..], &[1; 512], &vec![3; written]].concat();
        assert!(
            content.starts_with(&expected),
            "the first sectors, in order"
        );
        ends.insert(written);
        disk.dir("d").open("f").unwrap().unwrap().flush().unwrap();
        assert_eq!(contents(&images(&disk), "d/f"), [Some(content)].into());
    }

    assert_eq!(ends, [0, 512, 1024, 1536].into(), "never all of it");
}

#[test]
fn an_interrupted_call_does_nothing_and_its_handle_is_dead() {
    let disk = disk();
    let file = new_file(&disk, "f");
    file.write_at(0, &[5; 512]).unwrap();
    disk.dir("d").sync().unwrap();
    for kind in [FaultKind::Interrupted, FaultKind::Short] {
        disk.inject(Fault::on(OperationKind::Flush, "f", 1, kind));
        disk.inject(Fault::on(OperationKind::Resize, "f", 1, kind));
        let file = disk.dir("d").open("f").unwrap().unwrap();
        let before = disk.snapshot().fingerprint();

        assert!(file.flush().is_err());
        assert!(file.resize(0).is_err());

        assert_eq!(disk.snapshot().fingerprint(), before, "{kind:?}");
    }

    assert_eq!(disk.misuses().len(), 2, "each resize used a dead handle");
}

#[test]
fn every_query_has_a_number_of_its_own_and_can_fail() {
    let disk = disk();
    disk.install("d", "f", &[1; 4096]);
    let ask = |disk: &SimDisk| -> Vec<Result<()>> {
        let dir = disk.dir("d");
        let Ok(Some(file)) = dir.open("f") else {
            return vec![dir.open("f").map(drop)];
        };
        vec![
            dir.names().map(drop),
            dir.available_bytes().map(drop),
            dir.lock("lock").map(drop),
            file.read_at(0, &mut [0; 10]),
            file.status_at(0).map(drop),
            file.identity().map(drop),
            file.evidence().map(drop),
            file.file_id().map(drop),
        ]
    };
    disk.record();
    assert!(ask(&disk).iter().all(Result::is_ok));
    let queries = disk.take_queries();
    assert_eq!(disk.operations(), 1, "the lock file was made");
    assert_eq!(disk.queries(), 9);

    for (query, number) in queries.iter().zip(1..) {
        let again = disk.snapshot().after_kill();
        again.inject(Fault::at_query(number, FaultKind::Io).repeat(Repeat::Forever));
        again.inject(Fault::at(1, FaultKind::Io).repeat(Repeat::Forever));

        let answers = ask(&again);

        assert_eq!(query.number, number);
        let failed = answers.iter().filter(|a| a.is_err()).count();
        assert_eq!(
            failed,
            answers.len().min(10 - usize::try_from(number).unwrap())
        );
        assert_eq!(again.operations(), 0, "queries are not counted among them");
    }
    assert_eq!(disk.misuses(), [] as [String; 0]);
}

#[test]
fn a_failed_read_leaves_nothing_to_believe_and_the_handle_alive() {
    let disk = disk();
    disk.install("d", "f", &[0; 4096]);
    let file = disk.dir("d").open("f").unwrap().unwrap();
    for (kind, expected) in [
        (FaultKind::Io, ErrorKind::Io),
        (FaultKind::Gone, ErrorKind::Lost),
        (FaultKind::Interrupted, ErrorKind::Io),
        (FaultKind::Short, ErrorKind::OutOfRange),
    ] {
        disk.inject(Fault::on(OperationKind::Read, "d/f", 1, kind));
        let mut buffer = [0; 512];

        let error = file.read_at(0, &mut buffer).unwrap_err();

        assert_eq!(error.kind(), expected);
        assert_ne!(buffer, [0; 512]);
    }
    file.write_at(0, &[1; 512]).unwrap();
    file.flush().unwrap();
    assert_eq!(disk.misuses(), [] as [String; 0]);
}

#[test]
fn nothing_works_after_power_loss_and_the_image_does() {
    let disk = disk();
    let device = disk.device("v", 512);
    disk.crash_at(2);
    device.write_at(0, &[5; 512]).unwrap();

    assert!(device.flush().is_err());
    assert!(device.read_at(0, &mut [0; 512]).is_err());
    assert!(disk.dir("d").create("f").is_err());

    let after = images(&disk)[0].disk();
    after.device("v", 512).read_at(0, &mut [0; 512]).unwrap();
}

#[test]
fn after_a_kill_the_cache_stays_and_is_still_not_durable() {
    let disk = disk();
    let device = disk.device("v", 512);
    let guard = disk.dir("d").lock("lock").unwrap();
    device.write_at(0, &[5; 512]).unwrap();

    let after = disk.snapshot().after_kill();

    assert_eq!(after.content("v"), Some(vec![5; 512]));
    assert_eq!(undamaged(&after).len(), 4, "the lock's name and the sector");
    assert!(disk.dir("d").lock("lock").is_err());
    let again = after.dir("d").lock("lock").unwrap();
    drop((guard, again));
    drop(disk.dir("d").lock("lock").unwrap());
}

#[test]
fn reserved_space_is_listed_and_punching_gives_it_back() {
    let disk = disk();
    disk.install_sparse("d", "f", &vec![0; 32 * 1024]);
    disk.limit_space("d", 16 * 1024);
    let file = disk.dir("d").open("f").unwrap().unwrap();
    let extent = |start: u64, end: u64| Extent::from_range(start..end);

    let reserved = file
        .reserve(&[extent(4096, 8192), extent(5000, 12_288)])
        .unwrap();
    let refused = file.reserve(&[extent(16_384, 32_768)]).unwrap_err();

    assert_eq!(reserved, [extent(4096, 12_288)]);
    assert_eq!(refused.kind(), ErrorKind::NoSpace);
    assert_eq!(disk.dir("d").available_bytes().unwrap(), 8192);
    assert_eq!(file.status_at(0).unwrap(), (Status::Zero, 4096));
    assert!(file.punch(extent(4096, 12_288)).unwrap());
    assert_eq!(disk.dir("d").available_bytes().unwrap(), 16 * 1024);
}

#[test]
fn a_write_without_space_is_refused() {
    let disk = disk();
    disk.limit_space("d", 8192);
    let file = new_file(&disk, "f");

    file.write_at(0, &[1; 8192]).unwrap();
    let refused = file.write_at(8192, &[1; 1]).unwrap_err();

    assert_eq!(refused.kind(), ErrorKind::NoSpace);
}

#[test]
fn a_clone_has_the_bytes_of_its_origin_and_a_life_of_its_own() {
    let disk = disk();
    disk.install("d", "origin", &[3; 10_000]);
    disk.set_attributes("d/origin", 77);
    let origin = disk.dir("d").open("origin").unwrap().unwrap();
    let clone = new_file(&disk, "clone");

    clone.clone_from_file(&*origin).unwrap();
    clone.copy_metadata(&*origin).unwrap();
    origin.write_at(0, &[4; 10]).unwrap();

    assert_eq!(disk.content("d/clone"), Some(vec![3; 10_000]));
    assert_eq!(disk.attributes("d/clone"), Some(77));
}

#[test]
fn evidence_changes_with_every_change_and_identity_never() {
    let disk = disk();
    let file = new_file(&disk, "f");
    let mut seen = vec![file.evidence().unwrap()];
    let identity = file.identity().unwrap();

    file.write_at(0, &[1; 600]).unwrap();
    seen.push(file.evidence().unwrap());
    file.write_at(0, &[1; 600]).unwrap();
    seen.push(file.evidence().unwrap());
    file.resize(100).unwrap();
    seen.push(file.evidence().unwrap());
    file.flush().unwrap();

    assert!(seen.is_sorted_by(|a, b| !a.proves_same(b)));
    assert!(file.evidence().unwrap().proves_same(&seen[3]));
    assert!(file.identity().unwrap().proves_same(&identity));
}

#[test]
fn a_lost_shrink_brings_the_old_bytes_back() {
    let disk = disk();
    disk.install("d", "f", &[1; 512]);
    let file = disk.dir("d").open("f").unwrap().unwrap();

    file.resize(0).unwrap();

    let found = contents(&undamaged(&disk), "d/f");
    assert_eq!(
        found,
        [Some(vec![]), Some(vec![0; 512]), Some(vec![1; 512])].into()
    );
}

#[test]
fn one_seed_gives_one_list_of_images() {
    let make = |seed: u64| {
        let disk = disk();
        disk.device("v", 64 * 1024)
            .write_at(0, &[7; 64 * 1024])
            .unwrap();
        let images = disk.snapshot().crash_images(seed, ImageLimits::default());
        images.map(|image| image.fingerprint()).collect::<Vec<_>>()
    };

    assert!(make(1).len() > 100);
    assert_eq!(make(1), make(1));
    assert_ne!(make(1), make(2));
}

#[test]
fn minimising_keeps_only_the_changes_that_matter() {
    let disk = disk();
    disk.device("v", 64 * 1024)
        .write_at(0, &[7; 64 * 1024])
        .unwrap();
    let bad = |image: &CrashImage| image.disk().content("v").unwrap()[5 * 512] == 7;
    let found = disk
        .snapshot()
        .crash_images(1, ImageLimits::default())
        .find(|i| bad(i))
        .unwrap();

    let smallest = found.minimised(bad);

    assert_eq!(smallest.survivors(), ["v sector 5: as operation 1 made it"]);
    assert_eq!(smallest.lost(), 127);
}

#[test]
fn the_simulated_machine_keeps_the_contracts_of_every_device() {
    use crate::conformance::{storage_conformance, target_conformance};
    const MIB: u64 = 1 << 20;

    target_conformance(&|| disk().device("v", MIB));
    target_conformance(&|| {
        let file = new_file(&disk(), "f");
        file.resize(MIB).unwrap();
        file.into_target()
    });
    storage_conformance(&*disk().dir("d"));
    let plain = SimOptions {
        clones: false,
        exchanges: true,
        ..SimOptions::default()
    };
    storage_conformance(&*SimDisk::new(plain).dir("d"));
}
