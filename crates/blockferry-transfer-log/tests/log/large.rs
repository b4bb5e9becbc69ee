//! More than one chunk: loading, writing and proving side by side.

use blockferry_testkit::{Fault, FaultKind, OperationKind};
use blockferry_transfer_log::{ErrorKind, Strategy};

use crate::harness::{PAGE, Setup, image, quiet, root};

/// Two chunks of 32 MiB and some pages.
const PAGES: usize = 17_000;

fn setup() -> Setup {
    Setup {
        batch_pages: 200,
        group_batches: 40,
        ..Setup::file(Strategy::Redo)
    }
}

fn filled(seed: usize) -> Vec<u8> {
    let fills: Vec<u8> = (0..PAGES)
        .map(|n| u8::try_from((n * 7 + seed) % 251).unwrap())
        .collect();
    image(&fills, PAGES * PAGE - 77)
}

#[test]
fn several_chunks_are_applied_proven_and_rolled_back() {
    let (old, new) = (filled(0), filled(1));
    let disk = setup().machine(Some(&old));
    let mut replica = setup().open(&disk).unwrap();

    let applied = setup().sync(&mut replica, 1, &new).unwrap();

    assert_eq!(applied.proven_bytes, new.len() as u64);
    assert!(setup().content(&disk) == Some(new), "applied");
    replica.rollback(&quiet).unwrap();
    assert!(setup().content(&disk) == Some(old), "rolled back");
    assert_eq!(disk.misuses(), Vec::<String>::new());
}

#[test]
fn what_an_early_chunk_lost_or_could_not_write_returns_the_target_to_its_old_point() {
    let (old, new) = (filled(0), filled(1));
    // One batch of writes has up to 1024 requests, a chunk some eight of them.
    for (operation, nth, kind) in [
        (OperationKind::Flush, 1, FaultKind::SilentLoss),
        (OperationKind::Flush, 2, FaultKind::SilentLoss),
        (OperationKind::Flush, 3, FaultKind::SilentLoss),
        (OperationKind::Flush, 2, FaultKind::Io),
        (OperationKind::Write, 12_000, FaultKind::NoSpace),
    ] {
        let disk = setup().machine(Some(&old));
        let mut replica = setup().open(&disk).unwrap();
        let target = replica.target();
        let mut session = replica.begin(&setup().plan(1, &new)).unwrap();
        setup().finish(&mut session, target.as_ref(), &new).unwrap();
        disk.inject(Fault::on(operation, "images/", nth, kind));

        let failed = session.commit(root(&new), &quiet).unwrap_err();

        assert_eq!(failed.kind(), ErrorKind::Target, "{failed}");
        assert!(
            setup().content(&disk).as_ref() == Some(&old),
            "{operation:?} {nth} {kind:?}"
        );
        assert_eq!(disk.misuses(), Vec::<String>::new());
    }
}
