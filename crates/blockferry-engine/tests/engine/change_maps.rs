//! Change maps (D3): what they claim is not read, what they hint is checked, and one lie ends the trust.

use std::sync::Arc;

use blockferry_core::{ChangeMap, Content, Extent, Provenance, Trust};
use blockferry_engine::{ChangesSince, ErrorKind, Mode, Strategy, SyncOptions};
use blockferry_testkit::Random;
use proptest::prelude::*;

use crate::harness::{
    Machine, Source, assert_synced, block_size, edited, image, listening, options, warnings,
};

pub(crate) const SMALL: u64 = 4096;
pub(crate) const BYTES: u64 = 5 << 20;
pub(crate) const PAGES: u64 = BYTES / SMALL;

/// A machine synced once, its source, and the point they have in common.
pub(crate) fn synced(seed: u64) -> (Machine, Arc<Source>, String) {
    let old = image(seed, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(seed, &old, BYTES, 50));
    let receipt = machine.sync(&source, &delta(None)).unwrap();
    source.hide_holes();
    (machine, source, receipt.sync_point)
}

pub(crate) fn delta(changes: Option<ChangesSince>) -> SyncOptions {
    options(|o| {
        o.block_size = block_size(SMALL);
        o.mode = Mode::Delta;
        o.strategy = Some(Strategy::Redo);
        o.changes = changes;
    })
}

fn page(number: u64) -> Extent {
    Extent::from_range(number * SMALL..(number + 1) * SMALL)
}

/// A map that claims everything but these pages to be the same.
pub(crate) fn all_but(trust: Trust, changed: &[u64]) -> ChangeMap {
    let mut map = ChangeMap::new(Provenance::Embedder, trust, BYTES);
    map.set(Extent::from_range(0..BYTES), Content::Same);
    changed
        .iter()
        .for_each(|n| map.set(page(*n), Content::Data));
    map
}

pub(crate) fn since(point: &str, map: ChangeMap) -> Option<ChangesSince> {
    Some(ChangesSince::new(point, Arc::new(map)))
}

/// The first pages from each of these on that hold data: a hole of the target is not read.
pub(crate) fn pages_with_data<const N: usize>(source: &Source, from: [u64; N]) -> [u64; N] {
    let bytes = source.bytes();
    let is_zero = |n: &u64| {
        let start = usize::try_from(n * SMALL).unwrap();
        bytes[start..start + 4096].iter().all(|b| *b == 0)
    };
    from.map(|n| (n..PAGES).find(|n| !is_zero(n)).unwrap())
}

pub(crate) fn change(source: &Source, pages: &[u64]) {
    source.change(|bytes| {
        for number in pages {
            bytes[usize::try_from(number * SMALL).unwrap() + 9] ^= 0x11;
        }
    });
}

#[test]
fn of_a_trusted_map_only_what_changed_is_read_on_either_side() {
    let (machine, source, point) = synced(30);
    let changed = pages_with_data(&source, [3, 400, 700, 1100]);
    change(&source, &changed);
    let map = since(&point, all_but(Trust::Trusted, &changed));

    let receipt = machine.sync(&source, &delta(map)).unwrap();

    let bytes = changed.len() as u64 * SMALL;
    assert_eq!(
        (receipt.scanned_bytes, receipt.target_read_bytes),
        (bytes, bytes)
    );
    assert_eq!(receipt.changed_bytes, Some(bytes));
    assert!(receipt.fallbacks.is_empty());
    assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
}

#[test]
fn of_a_hint_one_block_in_sixty_four_is_read_as_well() {
    let (machine, source, point) = synced(31);
    let changed = pages_with_data(&source, [3, 400, 700]);
    change(&source, &changed);
    let map = since(&point, all_but(Trust::Hint, &changed));

    let receipt = machine.sync(&source, &delta(map)).unwrap();

    let checked = receipt.scanned_bytes / SMALL - 3;
    assert!(
        (16..=PAGES / 64 + 1).contains(&checked),
        "{checked} blocks checked"
    );
    assert_eq!(receipt.target_read_bytes, 3 * SMALL);
    assert!(receipt.fallbacks.is_empty());
    assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
}

#[test]
fn a_lie_that_is_found_costs_a_full_comparison_and_is_said() {
    let (machine, source, point) = synced(32);
    // Every page changed, so that any sample finds one that is claimed not to have.
    change(&source, &(0..PAGES).collect::<Vec<_>>());
    let map = since(&point, all_but(Trust::Hint, &[5]));
    let (context, events) = listening();

    let receipt = machine.sync_in(&source, &delta(map), &context).unwrap();

    assert_eq!(warnings(&events), ["change_map_lied"]);
    assert_eq!(receipt.changed_bytes, Some(BYTES));
    assert_eq!(receipt.restaged_bytes, 0);
    assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
}

#[test]
fn strict_turns_a_lie_into_an_error_of_the_source() {
    let (machine, source, point) = synced(33);
    let before = machine.content();
    change(&source, &(0..PAGES).collect::<Vec<_>>());
    let mut strict = delta(since(&point, all_but(Trust::Hint, &[])));
    strict.strict = true;

    let error = machine.sync(&source, &strict).unwrap_err();

    assert_eq!(error.kind(), ErrorKind::Source);
    assert_eq!(machine.content(), before);
}

#[test]
fn a_lie_is_found_where_the_source_tells_a_hole_instead() {
    let (machine, source, point) = synced(34);
    source.change(|bytes| bytes[..1 << 20].fill(0));
    // Even a trusted map is contradicted by what the source itself tells for nothing.
    source.show_holes();
    let map = since(&point, all_but(Trust::Trusted, &[]));
    let (context, events) = listening();

    let receipt = machine.sync_in(&source, &delta(map), &context).unwrap();

    assert_eq!(warnings(&events), ["change_map_lied"]);
    assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
}

#[test]
fn a_map_of_another_point_or_size_or_without_a_manifest_is_not_used_and_said() {
    let lose_manifest = |machine: &Machine, point: &str| {
        machine
            .state()
            .remove(&format!("{point}.manifest"))
            .unwrap();
    };
    let short = ChangeMap::new(Provenance::Embedder, Trust::Trusted, BYTES - 1);
    let same = || all_but(Trust::Trusted, &[]);
    type Lose<'a> = &'a dyn Fn(&Machine, &str) -> Option<ChangesSince>;
    let cases: [(Lose<'_>, &[&str]); 4] = [
        (&|_, _| since("another", same()), &["change_map_unusable"]),
        (
            &|_, point| since(point, short.clone()),
            &["change_map_unusable"],
        ),
        (
            &|machine, point| {
                lose_manifest(machine, point);
                since(point, same())
            },
            &["manifest_missing", "change_map_unusable"],
        ),
        (
            &|machine, point| {
                machine.scribble(0, b"somebody");
                since(point, same())
            },
            &["target_written", "change_map_unusable"],
        ),
    ];
    for (lose, expected) in cases {
        let (machine, source, point) = synced(35);
        let map = lose(&machine, &point);
        change(&source, &[8]);
        let (context, events) = listening();

        let receipt = machine.sync_in(&source, &delta(map), &context).unwrap();

        assert_eq!(warnings(&events), expected);
        assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
    }
}

#[test]
fn trusted_zeros_are_not_read_from_the_source() {
    let (machine, source, point) = synced(36);
    source.change(|bytes| bytes[..1 << 20].fill(0));
    let mut map = all_but(Trust::Trusted, &[]);
    map.set(Extent::from_range(0..1 << 20), Content::Zero);

    let receipt = machine.sync(&source, &delta(since(&point, map))).unwrap();

    assert_eq!(receipt.scanned_bytes, 0);
    assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
}

#[test]
fn a_resumed_run_uses_the_map_and_stages_nothing_again() {
    let (machine, source, point) = synced(37);
    let changed: Vec<u64> = (0..PAGES).step_by(3).collect();
    change(&source, &changed);
    let mut resumable = delta(since(&point, all_but(Trust::Trusted, &changed)));
    resumable.threads = Some(1);
    source.fail_from(300);
    assert!(
        machine
            .sync(&source, &resumable)
            .unwrap_err()
            .is_resumable()
    );
    source.heal();

    let receipt = machine.sync(&source, &resumable).unwrap();

    assert!(receipt.resumed_bytes > 0);
    assert_eq!(receipt.scanned_bytes, changed.len() as u64 * SMALL);
    assert_eq!(receipt.changed_bytes, Some(changed.len() as u64 * SMALL));
    assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
}

/// Says the same only where it is, in runs of any length, and often says nothing.
pub(crate) fn truthful(random: &mut Random, trust: Trust, before: &[u8], now: &[u8]) -> ChangeMap {
    let mut map = ChangeMap::new(Provenance::Embedder, trust, now.len() as u64);
    let mut at = 0;
    while at < now.len() {
        let end = (at + 1 + usize::try_from(random.below(200_000)).unwrap()).min(now.len());
        let extent = Extent::from_range(at as u64..end as u64);
        let content = match before[at..end] == now[at..end] {
            true if random.chance(4, 5) => Content::Same,
            _ if now[at..end].iter().all(|b| *b == 0) => Content::Zero,
            false if random.chance(1, 2) => Content::Data,
            _ => Content::Unknown,
        };
        map.set(extent, content);
        at = end;
    }
    map
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 0, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_truthful_map_never_changes_the_result(seed: u64, hint: bool, block_bytes in prop::sample::select(vec![4096u64, 65_536, 1 << 20])) {
        let mut random = Random::new(seed);
        let old = image(seed, BYTES);
        let machine = Machine::file(&old);
        let source = Source::new(old);
        let with = |changes| options(|o| {
            o.block_size = block_size(block_bytes);
            o.mode = Mode::Delta;
            o.changes = changes;
        });
        let first = machine.sync(&source, &with(None)).unwrap();
        let before = source.bytes();
        source.change(|bytes| *bytes = edited(seed, &before, BYTES, 30));
        let trust = if hint { Trust::Hint } else { Trust::Trusted };
        let now = source.bytes();
        let map = truthful(&mut random, trust, &before, &now);

        let receipt = machine.sync(&source, &with(since(&first.sync_point, map))).unwrap();

        prop_assert!(receipt.fallbacks.is_empty(), "{:?}", receipt.fallbacks);
        assert_synced(&machine, &now, block_size(block_bytes), &receipt);
    }
}
