//! What only reads: digest, compare, verify; each against a slow and obvious answer.

use std::sync::Arc;

use blockferry_core::{Extent, ExtentSet};
use blockferry_device::{BlockSource, CancelToken};
use blockferry_engine::{Context, ErrorKind, Mode, compare, digest, verify_target};
use blockferry_testkit::Random;
use proptest::prelude::*;

use crate::harness::{
    Machine, On, Source, block_size, cancelled_by, edited, image, one_of, options, root_of,
};

/// Pages that differ; what only one of them has differs.
fn naive_difference(a: &[u8], b: &[u8]) -> ExtentSet {
    let common = a.len().min(b.len());
    let pages = (0..common)
        .step_by(4096)
        .map(|start| start..(start + 4096).min(common));
    let mut differing: ExtentSet = pages
        .filter(|page| a[page.clone()] != b[page.clone()])
        .map(|page| Extent::from_range(page.start as u64..page.end as u64))
        .collect();
    let longer = a.len().max(b.len());
    if longer > common {
        differing.insert(Extent::from_range(common as u64..longer as u64));
    }
    differing
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 0, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_comparison_finds_exactly_the_pages_that_differ(seed: u64) {
        let mut random = Random::new(seed);
        let sizes = [0, 1, 4095, 4096, 1 << 20, (20 << 20) + 77];
        let (one, other) = (one_of(&mut random, &sizes), one_of(&mut random, &sizes));
        let a = image(seed, one);
        let b = edited(seed, &a, if random.chance(1, 2) { one } else { other }, 20);
        let (left, right) = (Source::new(a.clone()), Source::new(b.clone()));
        if random.chance(1, 2) {
            left.hide_holes();
        }
        let (left, right): (Arc<dyn BlockSource>, Arc<dyn BlockSource>) = (left, right);
        let mut found = Vec::new();

        let report = compare(&left, &right, &Context::default(), &mut |e| found.push(e)).unwrap();

        let expected: Vec<Extent> = naive_difference(&a, &b).iter().collect();
        prop_assert_eq!(&found, &expected);
        prop_assert_eq!(report.equal, a == b);
        prop_assert_eq!(report.different_bytes, expected.iter().map(|e| e.length()).sum::<u64>());
        prop_assert_eq!((report.size_a, report.size_b), (a.len() as u64, b.len() as u64));
    }

    #[test]
    fn a_digest_is_the_root_of_the_bytes(seed: u64, block_bytes in prop::sample::select(vec![4096u64, 65_536, 1 << 20])) {
        let mut random = Random::new(seed);
        let bytes = image(seed, random.below(3 << 20));
        let source = Source::new(bytes.clone());
        if random.chance(1, 2) {
            source.hide_holes();
        }
        let source: Arc<dyn BlockSource> = source;

        let report = digest(&source, block_size(block_bytes), &Context::default(), None).unwrap();

        let block = usize::try_from(block_bytes).unwrap();
        let data = bytes.chunks(block).filter(|b| b.iter().any(|x| *x != 0)).map(|b| b.len() as u64);
        prop_assert_eq!(report.root, root_of(&bytes, block_size(block_bytes)));
        prop_assert_eq!(report.data_bytes, data.sum::<u64>());
        prop_assert_eq!(report.data_bytes + report.zero_bytes, bytes.len() as u64);
    }
}

#[test]
fn verify_names_the_blocks_that_are_not_as_recorded() {
    let old = image(60, 3 << 20);
    for on in [On::File, On::Device] {
        let machine = Machine::new(on, false, Some(&old));
        let source = Source::new(edited(60, &old, 3 << 20, 50));
        machine
            .sync(&source, &options(|o| o.mode = Mode::Delta))
            .unwrap();
        assert!(
            verify_target(&mut machine.open(), &Context::default())
                .unwrap()
                .matches
        );
        let path = if on == On::File { "home/disk" } else { "vda" };

        // Bit rot: nobody wrote the target.
        for offset in [65_536 * 3 + 5, 65_536 * 4, 65_536 * 40] {
            assert!(machine.disk.flip_bit(path, offset));
        }
        let report = verify_target(&mut machine.open(), &Context::default()).unwrap();

        assert!(!report.matches);
        assert!(!report.written_since, "{on:?}");
        assert_eq!(report.different_bytes, 3 * 65_536);
        let starts: Vec<u64> = report.different_extents.iter().map(|(s, _)| *s).collect();
        assert!(
            starts.contains(&(3 * 65_536)) && starts.contains(&(40 * 65_536)),
            "{starts:?}"
        );
        machine.scribble(0, b"written");
        assert!(
            verify_target(&mut machine.open(), &Context::default())
                .unwrap()
                .written_since
        );
    }
}

#[test]
fn verify_works_without_a_manifest_and_needs_a_point() {
    let old = image(61, 1 << 20);
    let machine = Machine::file(&old);
    let error = verify_target(&mut machine.open(), &Context::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Target);
    let receipt = machine.sync(&Source::new(old), &options(|_| ())).unwrap();

    machine
        .state()
        .remove(&format!("{}.manifest", receipt.sync_point))
        .unwrap();

    assert!(
        verify_target(&mut machine.open(), &Context::default())
            .unwrap()
            .matches
    );
    assert!(machine.disk.flip_bit("home/disk", 9));
    let report = verify_target(&mut machine.open(), &Context::default()).unwrap();
    assert!(!report.matches && report.expected_root != report.found_root);
}

#[test]
fn reading_obeys_the_cancel_token() {
    let token = CancelToken::new();
    token.cancel();
    let source: Arc<dyn BlockSource> = Source::new(image(62, 1 << 20));
    let context = cancelled_by(&token);

    let digested = digest(&source, block_size(4096), &context, None).unwrap_err();
    let compared = compare(&source, &source, &context, &mut |_| ()).unwrap_err();

    assert_eq!(
        (digested.kind(), compared.kind()),
        (ErrorKind::Cancelled, ErrorKind::Cancelled)
    );
}
