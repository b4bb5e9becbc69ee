//! Change maps of a source on another machine: what did not change is not read there, and says nothing on the way.

use blockferry_core::{Content, Extent, Trust};
use blockferry_engine::{ErrorKind, Mode, SyncOptions};
use blockferry_testkit::{Random, images};
use blockferry_transport::Link;
use proptest::prelude::*;

use crate::change_maps::{
    BYTES, PAGES, SMALL, all_but, change, delta, pages_with_data, since, synced, truthful,
};
use crate::harness::{
    Machine, Source, assert_synced, block_size, edited, image, listening, options, warnings,
};
use crate::known::{DAMAGES, damage};
use crate::remote::{cut_after, run, run_in};

fn whole() -> (Link, Link) {
    Link::pair().unwrap()
}

#[test]
fn of_a_trusted_map_only_what_changed_is_read_on_another_machine_and_only_it_travels() {
    let (machine, source, point) = synced(50);
    let changed = pages_with_data(&source, [3, 400, 700, 1100]);
    change(&source, &changed);
    let told = delta(since(&point, all_but(Trust::Trusted, &changed)));
    source.take_reads();

    let receipt = run(&machine, &source, &told, whole()).target.unwrap();

    let bytes = changed.len() as u64 * SMALL;
    assert_eq!(
        (receipt.scanned_bytes, receipt.target_read_bytes),
        (bytes, 0)
    );
    assert!(receipt.fallbacks.is_empty(), "{:?}", receipt.fallbacks);
    assert!(receipt.sent_bytes < bytes + 1000, "{}", receipt.sent_bytes);
    // Once for its digest and once to send it, and nothing else.
    let mut read: Vec<u64> = source
        .take_reads()
        .iter()
        .map(|e| e.start() / SMALL)
        .collect();
    read.sort_unstable();
    let twice: Vec<u64> = changed.iter().flat_map(|n| [*n, *n]).collect();
    assert_eq!(read, twice);
    assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
}

#[test]
fn a_map_that_finds_nothing_changed_reads_nothing_on_another_machine() {
    let (machine, source, point) = synced(51);
    source.bump();
    let told = delta(since(&point, all_but(Trust::Trusted, &[])));
    source.take_reads();

    let receipt = run(&machine, &source, &told, whole()).target.unwrap();

    assert_eq!(
        (receipt.outcome.as_ref(), receipt.scanned_bytes),
        ("identical", 0)
    );
    assert_eq!(source.take_read_bytes(), 0);
    // The greeting, what the source is, twice, and the root of nothing.
    assert!(receipt.sent_bytes < 400, "{}", receipt.sent_bytes);
    assert_eq!(receipt.sync_point, point);
}

#[test]
fn trusted_zeros_of_another_machine_are_neither_read_nor_asked_for() {
    let (machine, source, point) = synced(52);
    source.change(|bytes| bytes[..1 << 20].fill(0));
    let mut map = all_but(Trust::Trusted, &[]);
    map.set(Extent::from_range(0..1 << 20), Content::Zero);

    let ran = run(&machine, &source, &delta(since(&point, map)), whole());

    let receipt = ran.target.unwrap();
    assert_eq!(receipt.scanned_bytes, 0);
    assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
}

#[test]
fn a_hint_of_a_source_on_another_machine_is_not_believed_and_that_is_said() {
    let (machine, source, point) = synced(53);
    change(&source, &[8, 900]);
    let told = delta(since(&point, all_but(Trust::Hint, &[8])));

    let receipt = run(&machine, &source, &told, whole()).target.unwrap();

    let said = |why: &String| why.contains("a hint");
    assert!(
        receipt.fallbacks.iter().any(said),
        "{:?}",
        receipt.fallbacks
    );
    assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
}

#[test]
fn a_damaged_manifest_under_a_map_costs_a_full_comparison_with_the_other_machine() {
    for how in DAMAGES {
        let (machine, source, point) = synced(54);
        damage(&machine, how);
        let changed = [5, 600, 1279];
        change(&source, &changed);
        let told = delta(since(&point, all_but(Trust::Trusted, &changed)));
        let (context, events) = listening();

        let ran = run_in(&machine, &source, &told, whole(), &context);

        let receipt = ran.target.unwrap_or_else(|e| panic!("{how}: {e}"));
        let codes = warnings(&events);
        assert!(codes[0].starts_with("manifest_"), "{how}: {codes:?}");
        assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
    }
}

/// Every third page is other noise.
fn rewrite(source: &Source) -> Vec<u64> {
    let changed: Vec<u64> = (0..PAGES).step_by(3).collect();
    source.change(|bytes| {
        for number in &changed {
            let at = usize::try_from(number * SMALL).unwrap();
            bytes[at..at + 4096].copy_from_slice(&images::random_image(*number, SMALL));
        }
    });
    changed
}

fn cut_off(machine: &Machine, source: &std::sync::Arc<Source>, told: &SyncOptions) {
    let before = machine.content();
    let error = run(machine, source, told, cut_after(1 << 20))
        .target
        .unwrap_err();
    assert!(
        error.is_resumable() && error.kind() == ErrorKind::Peer,
        "{error}"
    );
    assert_eq!(machine.content(), before);
}

#[test]
fn a_run_with_a_map_that_was_cut_off_goes_on_and_nothing_durable_travels_again() {
    let (machine, source, point) = synced(55);
    let changed = rewrite(&source);
    let told = delta(since(&point, all_but(Trust::Trusted, &changed)));
    cut_off(&machine, &source, &told);

    let receipt = run(&machine, &source, &told, whole()).target.unwrap();

    let bytes = changed.len() as u64 * SMALL;
    assert!(
        receipt.resumed_bytes > 512 * 1024,
        "{}",
        receipt.resumed_bytes
    );
    assert_eq!(receipt.scanned_bytes, bytes);
    // Of the target only what is staged over is read.
    assert!(
        receipt.target_read_bytes < bytes,
        "{}",
        receipt.target_read_bytes
    );
    let rest = bytes - receipt.resumed_bytes;
    assert!(
        receipt.sent_bytes < rest + 40_000,
        "{} of {rest}",
        receipt.sent_bytes
    );
    assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
}

#[test]
fn what_was_staged_is_asked_for_whatever_the_map_says_and_a_lie_is_found() {
    for lies in [false, true] {
        let (machine, source, point) = synced(56);
        let old = source.bytes();
        let changed = rewrite(&source);
        cut_off(
            &machine,
            &source,
            &delta(since(&point, all_but(Trust::Trusted, &changed))),
        );
        // All is as it was at the point, or is said to be.
        source.change(|bytes| *bytes = old);
        if lies {
            change(&source, &changed);
        }
        let told = delta(since(&point, all_but(Trust::Trusted, &[])));
        let (context, events) = listening();

        let ran = run_in(&machine, &source, &told, whole(), &context);

        let receipt = ran.target.unwrap();
        let said: &[&str] = if lies { &["change_map_lied"] } else { &[] };
        assert_eq!(warnings(&events), said);
        assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 30, max_shrink_iters: 0, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_truthful_map_of_another_machine_comes_to_what_one_here_does(seed: u64, cut: bool, block_bytes in prop::sample::select(vec![4096u64, 65_536, 1 << 20])) {
        let mut random = Random::new(seed);
        let old = image(seed, BYTES);
        let machines = [Machine::file(&old), Machine::file(&old)];
        let source = Source::new(old);
        let with = |changes| options(|o| {
            o.block_size = block_size(block_bytes);
            o.mode = Mode::Delta;
            o.changes = changes;
        });
        let points = machines.each_ref().map(|m| m.sync(&source, &with(None)).unwrap().sync_point);
        let before = source.bytes();
        source.change(|bytes| *bytes = edited(seed, &before, BYTES, 30));
        let map = truthful(&mut random, Trust::Trusted, &before, &source.bytes());
        let [here, there] = points.map(|point| with(since(&point, map.clone())));
        let link = if cut { cut_after(usize::try_from(random.below(150_000)).unwrap()) } else { whole() };

        let local = machines[0].sync(&source, &here).unwrap();
        let mut ran = run(&machines[1], &source, &there, link);
        let resumes = cut && ran.target.is_err();
        if resumes {
            ran = run(&machines[1], &source, &there, whole());
        }

        let remote = ran.target.unwrap();
        prop_assert!(remote.fallbacks.is_empty(), "{:?}", remote.fallbacks);
        prop_assert_eq!(&remote.source_root, &local.source_root);
        if !resumes {
            prop_assert_eq!(remote.scanned_bytes, local.scanned_bytes);
        }
        assert_synced(&machines[1], &source.bytes(), block_size(block_bytes), &remote);
    }
}
