//! Both roles against each other, in an order that a seed decides.

use blockferry_core::{BlockSize, Geometry, RegionIndex, RegionLeaves, Root, block_digest};
use blockferry_transport::frame::{Frame, HEADER_BYTES};
use blockferry_transport::message::{Begin, NamedBlock, Sample};
use blockferry_transport::{Message, ShortDigests, Width};

use super::pair::{Pair, Sent};
use super::protocol::ProtocolError;
use super::source_role::{SourceJob, SourceRole};
use super::target_role::{Mapped, TargetJob, TargetRole};
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
        mapped: false,
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

fn mapped() -> Begin {
    Begin {
        mapped: true,
        ..begin(false)
    }
}

#[test]
fn with_a_map_only_blocks_that_may_differ_are_read_and_the_target_becomes_the_source() {
    let size = (5 << 20) * 4 + 12_345;
    let old = image(&[1, 0, 3, 4, 5, 6], size);
    let mut new = image(&[1, 0, 3, 4, 5, 6], size);
    for at in [
        5 << 20,
        12 << 20,
        (12 << 20) + 5000,
        (16 << 20) + 3,
        size - 1,
    ] {
        new[at] ^= 0xFF;
    }
    new[(17 << 20)..(17 << 20) + 4096].fill(0);
    new[(18 << 20)..(18 << 20) + 5 * 16384].fill(0);
    for seed in 0..20 {
        for window in [1, 2, 4, 300] {
            let begin = Begin { window, ..mapped() };
            let mut pair = Pair::new(&old, &new, begin, false, drawn(seed));

            assert_eq!(pair.run(), Ok(pair.root()), "seed {seed}");

            assert!(pair.old == new, "seed {seed}");
            let regions: Vec<u64> = pair.finished.iter().map(|l| l.region().get()).collect();
            assert!(regions.is_sorted(), "seed {seed}: {regions:?}");
            let may_differ = pair.may_differ.iter().filter(|may| **may).count();
            assert_eq!(pair.read_blocks, may_differ - told_zeros(&pair));
            // Six pages and five digests of four bytes for what is here, and some words.
            assert!(pair.sent.to_target_bytes < 2000, "{:?}", pair.sent);
        }
    }
}

#[test]
fn regions_that_a_map_says_are_equal_cost_no_message() {
    let size = 40 << 20;
    let old = image(&[1, 0, 3, 4, 5, 6, 7, 8, 9], size);
    let mut new = old.clone();
    new[21 << 20] ^= 1;
    let mut pair = Pair::new(&old, &new, mapped(), false, drawn(1));
    let place = (21 << 20) / (16 * 1024);
    pair.may_differ.fill(false);
    pair.may_differ[place] = true;
    let mut none = Pair::new(&old, &old, mapped(), false, drawn(1));
    none.may_differ.fill(false);

    pair.run().unwrap();
    none.run().unwrap();

    assert!(pair.old == new);
    assert_eq!((pair.read_blocks, pair.sent.data_messages), (1, 1));
    // Open, want, release; blocks, a page of one word again and again, and the root.
    let Sent {
        to_source_bytes,
        to_target_bytes,
        ..
    } = pair.sent;
    assert_eq!(to_source_bytes, 52 + 40 + 13);
    assert!(to_target_bytes < 200, "{to_target_bytes}");
    assert_eq!((none.read_blocks, none.sent.data_messages), (0, 0));
    assert!(
        none.sent.to_source_bytes < 60 && none.sent.to_target_bytes < 60,
        "{:?}",
        none.sent
    );
}

#[test]
fn an_image_without_regions_is_done_at_once_with_a_map_and_without() {
    for begin in [begin(false), mapped()] {
        let mut pair = Pair::new(&[], &[], begin, false, drawn(1));

        assert_eq!(pair.run(), Ok(pair.root()));
    }
}

/// Blocks that the map says are zero.
fn told_zeros(pair: &Pair) -> usize {
    let blocks = (0..).zip(pair.new.chunks(16 * 1024).zip(&pair.may_differ));
    let told =
        blocks.filter(|(n, (block, may))| **may && n % 2 == 0 && block.iter().all(|b| *b == 0));
    told.count()
}

fn named(blocks: &[u16]) -> Vec<NamedBlock> {
    blocks.iter().map(|block| (*block, None)).collect()
}

fn opens(region: u64, blocks: &[u16]) -> Message {
    Message::OpenBlocks {
        region,
        blocks: named(blocks),
    }
}

fn wants(region: u64, block: u16) -> Message {
    Message::Want {
        region,
        blocks: vec![(block, ShortDigests::new(Width::Four))],
    }
}

/// What a source's side of three regions, the last of one block, says of these messages after begin, the last of which
/// must be refused. What it is to read it reads at once, if `reads`; every block of it has data.
fn refused_by_source(begin: Begin, messages: &[Message], reads: bool) -> String {
    let size = (2 << 22) + 5000;
    let geometry = Geometry::new(size, begin.block_size);
    let (mut source, mut out) = (SourceRole::new(size), Vec::new());
    source.message(Message::Begin(begin), &mut out).unwrap();
    for (number, message) in messages.iter().enumerate() {
        let done = source.message(message.clone(), &mut out);
        if number + 1 == messages.len() {
            let Err(ProtocolError::Violation(what)) = done else {
                panic!("{message:?} after {messages:?}: {done:?}");
            };
            return what;
        }
        done.unwrap();
        while let Some(job) = source.next_job(&mut |_| panic!("it reads by itself")) {
            if let SourceJob::Digest { region, blocks } = job
                && reads
            {
                let mut leaves = RegionLeaves::zero(&geometry, region);
                for block in blocks {
                    leaves.set(usize::from(block), block_digest(b"data"));
                }
                source.digested(leaves, 1, &mut out);
            }
        }
    }
    unreachable!("the last one is refused")
}

#[test]
fn a_source_refuses_blocks_that_a_target_may_not_open_and_pages_of_what_it_did_not() {
    let all: Vec<u16> = (0..256).collect();
    let theirs = ShortDigests::new(Width::Eight);
    let whole = Message::OpenRegion {
        region: 0,
        blocks: theirs,
    };
    for (messages, expected) in [
        (vec![opens(3, &[0])], "open blocks of region 3"),
        (vec![opens(u64::MAX, &[0])], "open blocks of region"),
        (
            vec![opens(2, &[1])],
            "some of its 1, found as the last Some(1)",
        ),
        (vec![opens(0, &[5, u16::MAX])], "some of its 256"),
        (
            vec![opens(0, &[])],
            "some of its 256, found as the last None",
        ),
        (vec![opens(1, &[5]), opens(1, &[6])], "in order"),
        (vec![opens(1, &[5]), opens(0, &[6])], "in order"),
        (
            vec![opens(0, &all), opens(1, &all), opens(2, &[0])],
            "more regions are open",
        ),
        (vec![Message::Release(4)], "release of regions below 4"),
        (
            vec![opens(0, &[5]), Message::Release(1), opens(0, &[5])],
            "in order",
        ),
        (
            vec![opens(0, &[5]), Message::Release(3), Message::Release(4)],
            "below 4 of 3",
        ),
        (vec![opens(0, &[5]), wants(0, 6)], "no block 6 with data"),
        (vec![wants(0, 5)], "not told of"),
        (
            vec![opens(0, &[5]), Message::Release(1), wants(0, 5)],
            "is released",
        ),
        (
            vec![opens(0, &[5]), wants(0, 5), wants(0, 5), wants(0, 5)],
            "again and again",
        ),
        (vec![opens(0, &[5]), whole], "a whole region is opened"),
    ] {
        let begin = Begin {
            window: 2,
            ..mapped()
        };
        let what = refused_by_source(begin, &messages, true);
        assert!(what.contains(expected), "{what}");
    }
    // What it did not read yet it has not to send; and where it leads nobody else does.
    let early = refused_by_source(mapped(), &[opens(0, &[5]), wants(0, 5)], false);
    assert!(early.contains("no block 5 with data"), "{early}");
    let early = refused_by_source(mapped(), &[opens(0, &[5]), Message::Release(1)], false);
    assert!(
        early.contains("expected all of them to be answered"),
        "{early}"
    );
    let (mut leading, mut out) = (SourceRole::new(4 << 20), Vec::new());
    leading
        .message(Message::Begin(begin(false)), &mut out)
        .unwrap();
    assert!(leading.message(opens(0, &[5]), &mut out).is_err());
}

#[test]
fn a_target_refuses_what_it_did_not_ask_for_in_a_scan_with_a_map() {
    let geometry = Geometry::new(4 << 20, mapped().block_size);
    let says = |differing| Message::Blocks {
        region: 0,
        differing,
    };
    let data = Some(block_digest(b"data"));
    let regions = Message::Regions {
        regions: Vec::new(),
        digests: ShortDigests::new(Width::Sixteen),
        below: 1,
    };
    for (messages, expected) in [
        (
            vec![says(vec![(4, data)])],
            "block 4 of region 0, which is not open",
        ),
        (
            vec![says(vec![(u16::MAX, data)])],
            "block 65535 of region 0",
        ),
        (
            vec![says(vec![(5, data)]), says(vec![(5, data)])],
            "blocks of region 0",
        ),
        (
            vec![Message::Blocks {
                region: 7,
                differing: Vec::new(),
            }],
            "blocks of region 7",
        ),
        (vec![regions], "a message regions"),
        (
            vec![Message::Scanned {
                root: Root::from_bytes([1; 32]),
                read_bytes: 0,
            }],
            "the root before the last region",
        ),
    ] {
        let (mut target, mut out) = (TargetRole::new(mapped(), 4 << 20, false), Vec::new());
        let job = target.next_job(&mut Some, &mut out);
        assert!(matches!(job, Some(TargetJob::Scan(_))), "{job:?}");
        let opened = Mapped {
            open: vec![5],
            zeros: vec![6],
        };
        let leaves = RegionLeaves::zero(&geometry, RegionIndex::new(0));
        target.scanned(leaves, opened, &mut out);
        assert_eq!(target.outcome(), Ok(None));
        assert_eq!(out, [opens(0, &[5])]);
        let count = messages.len();

        let mut done = messages
            .into_iter()
            .map(|message| target.message(message, &mut out));

        let last = done.nth(count - 1).unwrap();
        let Err(ProtocolError::Violation(what)) = last else {
            panic!("{last:?}");
        };
        assert!(what.contains(expected), "{what}");
    }
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
    for seed in 0..400 {
        let begin = Begin {
            mapped: seed % 4 == 3,
            ..begin(seed % 2 == 0)
        };
        let whole_image = seed % 3 == 2 && !begin.mapped;
        let mut pair = Pair::new(&old, &new, begin, whole_image, drawn(seed));
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
