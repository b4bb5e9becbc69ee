//! Both roles against each other, in an order that a seed decides.

use blockferry_core::{BlockSize, Root, block_digest};
use blockferry_transport::Message;
use blockferry_transport::frame::{Frame, HEADER_BYTES};
use blockferry_transport::message::{Begin, Sample};

use super::pair::{Pair, Sent};
use super::protocol::ProtocolError;
use super::source_role::{SourceJob, SourceRole};
use crate::sample::scramble;

fn pair(old: &[u8], new: &[u8], begin: Begin, seed: u64) -> Pair {
    Pair::new(old, new, begin, seed % 3 == 2, drawn(seed))
}

fn drawn(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed;
    move |below| {
        state = scramble(state);
        usize::try_from(state % below as u64).unwrap()
    }
}

fn begin(exact: bool) -> Begin {
    Begin {
        block_size: BlockSize::new(16 * 1024).unwrap(),
        exact,
        level: 1,
        window: 4,
    }
}

/// An image of regions of 4 MiB; each byte of `regions` says how a region is filled, 0 leaves it empty.
fn image(regions: &[u8], bytes: usize) -> Vec<u8> {
    let mut image = vec![0; bytes];
    for (region, fill) in image.chunks_mut(4 << 20).zip(regions) {
        if *fill == 0 {
            continue;
        }
        for (number, page) in region.chunks_mut(4096).enumerate() {
            let word = scramble(u64::from(*fill) << 32 | number as u64);
            page.iter_mut()
                .zip(word.to_le_bytes().iter().cycle())
                .for_each(|(byte, with)| *byte = *with);
        }
    }
    image
}

#[test]
fn the_target_becomes_the_source_in_any_order_of_events() {
    let size = (5 << 20) * 4 + 12_345;
    let old = image(&[1, 0, 3, 4, 5, 6], size);
    let mut new = image(&[1, 2, 0, 4, 5, 6], size);
    // A page here and there, the end, a zero page, a zero block.
    for at in [12 << 20, (12 << 20) + 5000, (16 << 20) + 3, size - 1] {
        new[at] ^= 0xFF;
    }
    new[(17 << 20)..(17 << 20) + 4096].fill(0);
    new[(18 << 20)..(18 << 20) + 16384].fill(0);
    let root = Root::of_bytes(&new, begin(false).block_size);
    for seed in 0..20 {
        for exact in [false, true] {
            let mut pair = pair(&old, &new, begin(exact), seed);

            assert_eq!(pair.run(), Ok(root), "seed {seed}");

            assert!(pair.old == new, "seed {seed}");
            let regions: Vec<u64> = pair.finished.iter().map(|l| l.region().get()).collect();
            assert!(regions.is_sorted(), "seed {seed}: {regions:?}");
        }
    }
    assert_ne!(block_digest(&old), block_digest(&new));
}

#[test]
fn identical_images_cost_a_digest_for_each_region() {
    let size = 20 << 20;
    let old = image(&[1, 0, 3, 4, 5], size);
    let mut pair = pair(&old, &old, begin(false), 1);

    pair.run().unwrap();

    let Sent {
        to_source_bytes,
        to_target_bytes,
        data_messages,
    } = pair.sent;
    assert_eq!(data_messages, 0);
    assert!(to_target_bytes <= 4 * 60 + 60, "{to_target_bytes}");
    assert!(to_source_bytes <= 120, "{to_source_bytes}");
}

#[test]
fn whatever_is_changed_on_its_way_never_makes_another_image() {
    let size = (3 << 20) * 4;
    let old = image(&[1, 0, 3], size);
    let mut new = image(&[1, 2, 3], size);
    for at in (0..size).step_by(700_001) {
        new[at] ^= 0xFF;
    }
    let (mut whole, mut refused) = (0, 0);
    for seed in 0..300 {
        let mut pair = pair(&old, &new, begin(seed % 2 == 0), seed);
        pair.changed_in = 12;
        match pair.run() {
            Ok(_) => {
                assert!(pair.old == new, "seed {seed}");
                whole += 1;
            }
            Err(_) => refused += 1,
        }
    }
    assert!(
        whole > 5 && refused > 50,
        "{whole} whole, {refused} refused"
    );
}

#[test]
fn pages_that_come_twice_end_the_run() {
    let size = 4 << 20;
    let (old, new) = (image(&[1], size), image(&[2], size));
    for seed in 0..20 {
        let mut pair = pair(&old, &new, begin(false), seed);
        pair.repeats = true;

        let refused = pair.run().unwrap_err();

        let ProtocolError::Violation(what) = refused else {
            panic!("{refused:?}");
        };
        assert!(what.contains("nobody asked for"), "{what}");
    }
}

#[test]
fn a_message_that_its_side_did_not_wait_for_ends_the_run() {
    let size = 4 << 20;
    let (old, new) = (image(&[1], size), image(&[2], size));
    for (to_target, message) in [
        (true, Message::Release(0)),
        (
            true,
            Message::Blocks {
                region: 0,
                differing: Vec::new(),
            },
        ),
        (false, Message::Stopped),
        (false, Message::Release(9)),
    ] {
        let mut pair = pair(&old, &new, begin(false), 1);
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let body = bytes.split_off(HEADER_BYTES);
        let kind = bytes[HEADER_BYTES - 1];
        pair.forge(to_target, &Frame { kind, body });

        let refused = pair.run().unwrap_err();

        assert!(
            matches!(refused, ProtocolError::Violation(_)),
            "{refused:?}"
        );
    }
}

fn sample() -> Message {
    Message::Sample(Sample {
        block_size: BlockSize::DEFAULT,
        level: 1,
        most: 256,
        seed: 1,
    })
}

#[test]
fn a_source_is_sampled_once_and_before_it_is_scanned() {
    let mut out = Vec::new();
    let mut source = SourceRole::new(4 << 20);
    let refused = |source: &mut SourceRole| {
        let refused = source.message(sample(), &mut Vec::new());
        assert!(
            matches!(refused, Err(ProtocolError::Violation(_))),
            "{refused:?}"
        );
    };

    source.message(sample(), &mut out).unwrap();

    let job = source.next_job(&mut |_| None);
    assert!(matches!(job, Some(SourceJob::Sample(_))), "{job:?}");
    refused(&mut source);
    let begins = Message::Begin(begin(false));
    source.message(begins.clone(), &mut out).unwrap();
    let job = source.next_job(&mut |_| Some(0));
    assert!(matches!(job, Some(SourceJob::Scan(_))), "{job:?}");
    let mut scanning = SourceRole::new(4 << 20);
    scanning.message(begins, &mut out).unwrap();
    refused(&mut scanning);
}
