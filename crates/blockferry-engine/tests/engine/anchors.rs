//! Anchors: a point is kept through many syncs, however the disk moves, and can be returned to.

use std::sync::Arc;

use blockferry_device::BlockSource;
use blockferry_engine::{
    Context, ErrorKind, Mode, Strategy, SyncOptions, anchored_point, drop_anchor, keep_anchor,
    return_to_anchor, rollback,
};
use blockferry_testkit::{Events, ExploreOptions, Random, Scenario, SimDisk, explore};

use crate::harness::{
    Machine, On, Source, assert_synced, block_size, edited, image, one_of, options,
};

const SMALL: u64 = 4096;

fn delta() -> SyncOptions {
    options(|o| {
        o.block_size = block_size(SMALL);
        o.mode = Mode::Delta;
        o.strategy = Some(Strategy::Redo);
    })
}

fn anchor(machine: &Machine) -> Option<String> {
    let mut target = machine.open();
    keep_anchor(&mut target, block_size(SMALL), &Context::default()).unwrap()
}

#[test]
fn the_anchored_point_comes_back_after_any_number_of_syncs_and_roll_backs() {
    for seed in 0..12 {
        let mut random = Random::part(seed, 3);
        let sizes = [256 << 10, (200 << 10) + 77, 300 << 10];
        let on = one_of(&mut random, &[On::File, On::Device]);
        let bytes = |random: &mut Random| match on {
            On::File => one_of(random, &sizes),
            On::Device => sizes[0],
        };
        let first = bytes(&mut random);
        let old = image(seed, first);
        let machine = Machine::new(on, false, Some(&old));
        anchor(&machine);
        let source = Source::new(&old[..]);
        for step in 0..4 {
            let next = bytes(&mut random);
            source.change(|now| *now = edited(seed * 10 + step, now, next, 150));
            let receipt = machine.sync(&source, &delta()).unwrap();
            assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
            if receipt.outcome == "applied" && random.chance(1, 3) {
                rollback(&mut machine.open(), &Context::default()).unwrap();
            }
        }

        let receipt = return_to_anchor(&mut machine.open(), &Context::default()).unwrap();

        assert!(machine.content().unwrap() == old, "seed {seed}: {on:?}");
        assert_eq!(anchored_point(&mut machine.open()).unwrap(), None);
        assert!(receipt.scanned_bytes <= old.len() as u64 + (64 << 10));
    }
}

#[test]
fn only_what_was_replaced_is_read_to_return() {
    let old = image(1, 16 << 20);
    let machine = Machine::file(&old);
    anchor(&machine);
    let mut new = old.clone();
    new[5 << 20] ^= 1;
    new[9 << 20] ^= 1;
    machine.sync(&Source::new(new), &delta()).unwrap();

    let receipt = return_to_anchor(&mut machine.open(), &Context::default()).unwrap();

    assert!(machine.content().unwrap() == old);
    assert_eq!(receipt.fallbacks, Vec::<String>::new());
    assert!(receipt.scanned_bytes <= 2 * (64 << 10), "{receipt:?}");
}

#[test]
fn a_page_is_kept_once_however_often_it_is_replaced() {
    let old = image(2, 1 << 20);
    let machine = Machine::file(&old);
    anchor(&machine);
    let source = Source::new(&old[..]);
    let mut held = Vec::new();
    for seed in 0..5 {
        source.change(|now| {
            for page in now.chunks_mut(4096) {
                page[0] ^= seed + 1;
            }
        });
        machine.sync(&source, &delta()).unwrap();
        held.push(machine.disk.content("state/anchor").unwrap().len());
    }

    assert_eq!(held[0], held[4], "{held:?}");
    drop_anchor(&mut machine.open()).unwrap();
    assert_eq!(machine.disk.content("state/anchor"), None);
}

#[test]
fn while_a_point_is_anchored_no_other_strategy_takes_the_file_away() {
    let old = image(3, 512 << 10);
    let machine = Machine::new(On::File, true, Some(&old));
    let point = anchor(&machine);
    let source = Source::new(&old[..]);
    for mode in [Mode::Auto, Mode::Full, Mode::Delta] {
        source.change(|now| *now = edited(7, now, 512 << 10, 500));
        let asked = options(|o| o.mode = mode);
        let receipt = machine.sync(&source, &asked).unwrap();
        assert!(receipt.strategy.is_none_or(|s| s == Strategy::Redo));
    }
    let in_place = options(|o| o.in_place = true);

    source.change(|now| *now = image(4, 512 << 10));
    let refused = machine.sync(&source, &in_place);

    let refused = refused.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Target, "{refused}");
    assert_eq!(anchored_point(&mut machine.open()).unwrap(), point);
    return_to_anchor(&mut machine.open(), &Context::default()).unwrap();
    assert!(machine.content().unwrap() == old);
}

#[test]
fn what_is_kept_and_was_damaged_is_never_returned_to() {
    let old = image(5, 256 << 10);
    let new = edited(5, &old, 256 << 10, 400);
    for offset in [8192 + 100, 3 * 8192, 0, 4096] {
        let machine = Machine::file(&old);
        anchor(&machine);
        machine.sync(&Source::new(&new[..]), &delta()).unwrap();
        assert!(machine.disk.flip_bit("state/anchor", offset));

        match return_to_anchor(&mut machine.open(), &Context::default()) {
            // One of the two slots is enough.
            Ok(_) => assert!(
                offset < 8192 && machine.content().unwrap() == old,
                "offset {offset}"
            ),
            Err(_) => assert!(machine.content().unwrap() == new, "offset {offset}"),
        }
    }
}

#[test]
fn a_target_that_somebody_wrote_is_not_returned_to_something_torn() {
    let old = image(6, 256 << 10);
    let machine = Machine::file(&old);
    anchor(&machine);
    let new = edited(6, &old, 256 << 10, 200);
    machine.sync(&Source::new(new), &delta()).unwrap();
    // Where nothing is kept of the old content.
    let kept = machine.open().replica().anchored_point().unwrap().unwrap();
    let free = (0..64)
        .map(|page| page * 4096)
        .find(|at| !kept.replaced.contains(*at))
        .unwrap();
    drop(kept);
    machine.scribble(free, &[0xAB; 512]);
    let before = machine.content();

    let refused = return_to_anchor(&mut machine.open(), &Context::default()).unwrap_err();

    assert_eq!(refused.kind(), ErrorKind::Corruption, "{refused}");
    assert_eq!(machine.content(), before);
}

/// Power fails while a target returns to its anchor.
struct Returning {
    old: Vec<u8>,
    new: Vec<u8>,
}

impl Scenario for Returning {
    type Event = ();

    fn prepare(&self, disk: &SimDisk) {
        disk.install_sparse("home", "disk", &self.old);
        drop(disk.dir("state"));
        let machine = Machine::on(disk);
        anchor(&machine);
        machine.sync(&Source::new(&self.new[..]), &delta()).unwrap();
    }

    fn run(&self, disk: &SimDisk, events: &Events<()>) -> Result<(), String> {
        let machine = Machine::on(disk);
        return_to_anchor(&mut machine.open(), &Context::default()).map_err(|e| e.to_string())?;
        events.push(());
        Ok(())
    }

    fn recover(&self, disk: &SimDisk, done: &[()], _: &Events<()>) -> Result<(), String> {
        let machine = Machine::on(disk);
        let mut target = machine.open();
        let content = machine.content().unwrap_or_default();
        let is_old = content == self.old;
        if !(is_old || done.is_empty() && content == self.new) {
            return Err("neither the anchored content nor the new one".to_owned());
        }
        if done.is_empty() && target.replica().is_anchored() {
            return_to_anchor(&mut target, &Context::default()).map_err(|e| e.to_string())?;
        }
        let is_old = machine.content().unwrap_or_default() == self.old;
        is_old
            .then_some(())
            .ok_or_else(|| "there was no way back".to_owned())
    }
}

#[test]
fn a_crash_on_the_way_back_leaves_one_of_the_two_and_a_way_on() {
    let old = image(8, 64 << 10);
    let new = edited(8, &old, 64 << 10, 300);
    let options = ExploreOptions {
        depth: 1,
        ..ExploreOptions::default()
    };

    let report = explore(&options, &Returning { old, new });

    report.assert_clean();
    assert!(report.distinct_images > 100, "{report:?}");
}

#[test]
fn an_absent_target_has_no_point_to_keep() {
    let machine = Machine::new(On::File, false, None);

    assert_eq!(anchor(&machine), None);
    let source: Arc<dyn BlockSource> = Source::new(image(1, 64 << 10));
    let synced = blockferry_engine::sync(source, &mut machine.open(), &delta(), &Context::new());
    assert_eq!(synced.unwrap().strategy, Some(Strategy::Direct));
}
