//! A sync that finds nothing to write leaves the way back to the old point, or says that it cannot.

use std::sync::Arc;

use blockferry_core::BlockSize;
use blockferry_engine::{Mode, Strategy, SyncOptions, rollback};
use blockferry_testkit::{Events, ExploreOptions, Scenario, SimDisk, explore};

use crate::harness::{
    Machine, On, Source, accepted, assert_rolls_back_to, assert_second_is_identical, assert_synced,
    block_size, edited, image, listening, options, warnings,
};

const BYTES: u64 = (1 << 20) + 512;

fn in_small_blocks(strategy: Option<Strategy>) -> SyncOptions {
    options(|o| {
        o.block_size = block_size(4096);
        o.mode = Mode::Delta;
        o.strategy = strategy;
    })
}

fn in_default_blocks() -> SyncOptions {
    options(|o| o.mode = Mode::Delta)
}

#[test]
fn another_block_size_keeps_the_point_and_the_way_back() {
    for (on, strategy) in [
        (On::File, Strategy::Redo),
        (On::File, Strategy::Shadow),
        (On::File, Strategy::Clone),
        (On::Device, Strategy::Redo),
    ] {
        let old = image(1, BYTES);
        let machine = Machine::new(on, strategy == Strategy::Clone, Some(&old));
        let source = Source::new(edited(1, &old, BYTES, 100));
        let first = machine
            .sync(&source, &in_small_blocks(Some(strategy)))
            .unwrap();
        let (context, events) = listening();

        let second = machine
            .sync_in(&source, &in_default_blocks(), &context)
            .unwrap();

        assert_eq!(second.outcome, "identical", "{strategy}");
        assert_eq!(second.sync_point, first.sync_point, "the same content");
        assert!(second.rollback_available, "{strategy}");
        assert!(!warnings(&events).contains(&"old_point_dropped".to_owned()));
        assert_synced(&machine, &source.bytes(), BlockSize::DEFAULT, &second);
        assert_second_is_identical(&machine, &source, &in_default_blocks());
        assert_rolls_back_to(&machine, &old);
        let again = machine.sync(&source, &in_default_blocks()).unwrap();
        assert_synced(&machine, &source.bytes(), BlockSize::DEFAULT, &again);
    }
}

/// A target that somebody else brought to the content of the source.
fn equal_by_other_hands() -> (Machine, Arc<Source>) {
    let old = image(2, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(2, &old, BYTES, 100));
    machine
        .sync(&source, &in_small_blocks(Some(Strategy::Redo)))
        .unwrap();
    source.change(|bytes| bytes[70_000..70_007].copy_from_slice(b"changed"));
    machine.scribble(70_000, b"changed");
    (machine, source)
}

#[test]
fn an_old_point_that_cannot_be_kept_is_let_go_aloud() {
    for options in [in_small_blocks(None), in_default_blocks()] {
        let (machine, source) = equal_by_other_hands();
        let (context, events) = listening();

        let receipt = machine.sync_in(&source, &options, &context).unwrap();

        assert_eq!(receipt.outcome, "identical");
        assert!(warnings(&events).contains(&"old_point_dropped".to_owned()));
        assert!(receipt.fallbacks.iter().any(|f| f.contains("no way back")));
        assert!(!receipt.rollback_available);
        rollback(&mut machine.open(), &context).expect_err("nothing proves the pre-images right");
        assert_synced(&machine, &source.bytes(), options.block_size, &receipt);
    }
}

#[test]
fn strict_keeps_the_old_point_instead() {
    let (machine, source) = equal_by_other_hands();
    let mut strict = in_small_blocks(None);
    // Reading everything is no fallback where it was asked for.
    strict.rescan = true;
    strict.strict = true;

    let error = machine.sync(&source, &strict).unwrap_err();

    assert!(error.to_string().contains("no way back"), "{error}");
    assert!(machine.open().replica().retained().is_some());
}

/// A point in small blocks with an old one behind it; then the same in blocks of the usual size.
struct OtherBlocks {
    old: Vec<u8>,
    new: Vec<u8>,
}

impl Scenario for OtherBlocks {
    type Event = ();

    fn prepare(&self, disk: &SimDisk) {
        disk.install_sparse("home", "disk", &self.old);
        let first = in_small_blocks(Some(Strategy::Redo));
        Machine::on(disk)
            .sync(&Source::new(self.new.clone()), &first)
            .unwrap();
    }

    fn run(&self, disk: &SimDisk, _: &Events<()>) -> Result<(), String> {
        let source = Source::new(self.new.clone());
        let receipt = Machine::on(disk).sync(&source, &in_default_blocks());
        let kept = receipt.map_err(|e| e.to_string())?.rollback_available;
        kept.then_some(()).ok_or("the old point was dropped".into())
    }

    fn recover(&self, disk: &SimDisk, _: &[()], _: &Events<()>) -> Result<(), String> {
        let machine = Machine::on(disk);
        let source = Source::new(self.new.clone());
        let receipt = machine.sync(&source, &in_default_blocks());
        let receipt = receipt.map_err(|e| e.to_string())?;
        assert_synced(&machine, &self.new, BlockSize::DEFAULT, &receipt);
        assert_rolls_back_to(&machine, &self.old);
        Ok(())
    }
}

#[test]
fn a_crash_at_any_write_of_the_other_digests_keeps_the_way_back() {
    let old = image(3, 192 << 10);
    let new = edited(3, &old, 192 << 10, 200);
    let options = ExploreOptions {
        depth: 1,
        ..ExploreOptions::default()
    };

    let report = explore(&options, &OtherBlocks { old, new });

    report.assert_clean();
    assert!(report.distinct_images > 20, "{report:?}");
}

#[test]
fn a_later_sync_says_that_it_accepts_the_older_point() {
    let old = image(1, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(1, &old, BYTES, 50));
    let first = machine.sync(&source, &in_default_blocks()).unwrap();
    let (context, heard) = listening();

    source.change(|bytes| *bytes = edited(2, &old, BYTES, 80));
    machine
        .sync_in(&source, &in_default_blocks(), &context)
        .unwrap();

    let said = accepted(&heard);
    assert!(said[0].contains("is accepted with this run"), "{said:?}");
    // What the second run replaced is what the first one made.
    rollback(&mut machine.open(), &context).unwrap();
    let point = machine.open().replica().point().map(|p| p.id.to_string());
    assert_eq!(point, Some(first.sync_point));
}
