//! A batch takes what one record may have, and no more.

use blockferry_core::{BlockSize, Extent, Geometry};
use blockferry_transfer_log::{Batch, Old, Stager};

use crate::harness::PAGE;

const KIB: u64 = 1024;

fn stager() -> Stager {
    Stager::detached(Geometry::new(1 << 30, BlockSize::DEFAULT))
}

fn extent(start: u64, length: u64) -> Extent {
    Extent::from_range(start..start + length)
}

/// Has room for as many bytes as `most`, and not for one more.
fn assert_room(batch: &Batch, most: u64) {
    assert!(batch.has_room(most), "{most} in {batch:?}");
    assert!(!batch.has_room(most + 1), "more than {most} in {batch:?}");
}

#[test]
fn pages_are_counted_on_either_side_and_padded() {
    let (stager, page) = (stager(), PAGE as u64);
    let bytes = vec![1; 255 * PAGE];
    let mut new = stager.pages();
    assert!(new.is_empty());
    assert_room(&new, 1024 * KIB);
    stager.add(&mut new, extent(0, 100), &bytes, Old::None);
    assert_room(&new, 1024 * KIB - page);
    assert_eq!((new.data_bytes(), new.is_empty()), (100, false));

    let mut new = stager.pages();
    stager.add(&mut new, extent(0, 255 * page), &bytes, Old::None);
    assert_room(&new, page);
    assert_eq!(new.data_bytes(), 255 * page);

    let mut old = stager.pages();
    stager.add_zero(&mut old, extent(0, 255 * page), Old::Data(&bytes));
    assert_room(&old, page);
    assert_eq!(old.data_bytes(), 0);
}

#[test]
fn extents_are_counted_whatever_they_hold() {
    let (stager, page) = (stager(), PAGE as u64);
    let mut batch = stager.pages();
    for n in 0..255 {
        stager.add_zero(&mut batch, extent(2 * n * page, page), Old::Zero);
    }
    assert!(batch.has_room(page));
    stager.add_zero(&mut batch, extent(600 * page, page), Old::Zero);

    assert!(!batch.has_room(1));
    assert_eq!(batch.extents().count(), 256);
}

#[test]
fn blocks_fill_a_record_by_their_bytes() {
    let stager = stager();
    let bytes = vec![1; 960 * 1024];
    let mut batch = stager.blocks();
    stager
        .write_blocks(&mut batch, extent(0, 960 * KIB), &bytes, &[], Old::None)
        .unwrap();
    assert_room(&batch, 64 * KIB);

    let mut batch = stager.blocks();
    stager
        .write_zeros(&mut batch, extent(0, 960 * KIB), false, Old::Data(&bytes))
        .unwrap();
    assert_room(&batch, 64 * KIB);
}
