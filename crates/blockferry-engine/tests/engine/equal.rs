//! Whatever the images, the mode and the strategy: afterwards the target is the source, proven and recorded.

use blockferry_engine::{Mode, Strategy, SyncOptions, Undo};
use blockferry_testkit::Random;
use proptest::prelude::*;

use crate::harness::{
    Machine, On, Source, assert_rolls_back_to, assert_second_is_identical, assert_synced,
    block_size, edited, first_difference, image, one_of, options,
};

/// A whole case follows from one number.
#[derive(Debug)]
struct Case {
    seed: u64,
    block_bytes: u64,
    old_bytes: Option<u64>,
    new_bytes: u64,
    per_mille: u64,
    on: On,
    clones: bool,
    tells_holes: bool,
    options: SyncOptions,
}

impl Case {
    fn of(seed: u64) -> Self {
        let random = &mut Random::new(seed);
        let block_bytes = one_of(random, &[4096, 65_536, 1 << 20]);
        // Sizes that fit every unit, and sizes that fit none.
        let unit = one_of(random, &[1, 512, 4096, block_bytes]);
        let on = one_of(random, &[On::File, On::File, On::Device]);
        let (one, other) = (some_size(random, unit), some_size(random, unit));
        let (old, new) = match (on, random.chance(2, 3)) {
            (_, true) => (one, one),
            (On::Device, false) => (one.max(other), one.min(other)),
            (On::File, false) => (one, other),
        };
        let absent = on == On::File && random.chance(1, 6);
        let clones = random.chance(1, 2);
        let options = options(|o| {
            o.block_size = block_size(block_bytes);
            o.threads = Some(one_of(random, &[1, 2, 3, 4]));
            o.mode = one_of(random, &[Mode::Auto, Mode::Delta, Mode::Full]);
            o.undo = one_of(random, &[Undo::Keep, Undo::Keep, Undo::None]);
            o.in_place = random.chance(1, 8);
            if on == On::File && !absent && !o.in_place && random.chance(1, 2) {
                let all = [Strategy::Redo, Strategy::Shadow, Strategy::Clone];
                o.strategy = Some(one_of(random, &all[..2 + usize::from(clones)]));
            }
        });
        Self {
            seed,
            block_bytes,
            old_bytes: (!absent).then_some(old),
            new_bytes: new,
            per_mille: one_of(random, &[0, 3, 50, 400, 1000]),
            on,
            clones,
            tells_holes: random.chance(1, 2),
            options,
        }
    }

    fn run(&self) {
        let old = self.old_bytes.map(|bytes| image(self.seed, bytes));
        let new = edited(
            self.seed,
            old.as_deref().unwrap_or_default(),
            self.new_bytes,
            self.per_mille,
        );
        let machine = Machine::new(self.on, self.clones, old.as_deref());
        let source = Source::new(new.clone());
        if !self.tells_holes {
            source.hide_holes();
        }

        let receipt = machine.sync(&source, &self.options).unwrap();

        assert_synced(&machine, &new, block_size(self.block_bytes), &receipt);
        let again = options(|o| {
            o.block_size = self.options.block_size;
            o.mode = Mode::Delta;
        });
        assert_second_is_identical(&machine, &source, &again);
        let rescan = options(|o| {
            o.block_size = self.options.block_size;
            o.mode = Mode::Delta;
            o.strategy = Some(Strategy::Redo);
            o.rescan = true;
        });
        assert_second_is_identical(&machine, &source, &rescan);
        if receipt.rollback_available {
            assert_rolls_back_to(&machine, old.as_deref().unwrap_or_default());
        }
        let wanted = self.options.undo == Undo::Keep && !self.options.in_place;
        let changed = receipt.outcome == "applied" && self.old_bytes.is_some();
        assert_eq!(receipt.rollback_available, wanted && changed);
    }
}

/// Around the edges of pages and regions, or anything up to 5 MiB.
fn some_size(random: &mut Random, unit: u64) -> u64 {
    match random.below(8) {
        0 => 0,
        1 => random.below(5000),
        2 => (1 << 20) - 4096 + random.below(3) * 4096 + random.below(2),
        _ => random.below((5 << 20) / unit) * unit,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, max_shrink_iters: 0, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn after_a_sync_the_target_is_the_source(seed: u64) {
        let case = Case::of(seed);
        println!("{case:?}");
        case.run();
    }
}

#[test]
fn what_lies_behind_a_smaller_image_on_a_device_is_left_alone_both_ways() {
    for strategy in [None, Some(Strategy::Direct)] {
        let old = blockferry_testkit::images::random_image(1, 935_424);
        let new = edited(1, &old, 265_728, 1000);
        let machine = Machine::new(On::Device, false, Some(&old));
        let receipt = machine
            .sync(
                &Source::new(new.clone()),
                &options(|o| o.strategy = strategy),
            )
            .unwrap();

        let behind = &machine.content().unwrap()[new.len()..];
        assert_eq!(first_difference(behind, &old[new.len()..]), None);
        if receipt.rollback_available {
            assert_rolls_back_to(&machine, &old);
        }
    }
}
