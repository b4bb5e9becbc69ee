//! What is known is not read; what turns out not to be known is compared in full, and said.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockferry_core::{BlockSize, REGION_BLOCKS};
use blockferry_device::{BlockSource, BlockTarget, Counting, MemoryDevice};
use blockferry_engine::{Context, ErrorKind, Mode, Place, Strategy, Target, sync};
use blockferry_pipeline::Event;
use blockferry_testkit::SimDisk;

use crate::harness::{
    Machine, On, Source, assert_synced, block_size, edited, image, listening, options, warnings,
};

const SMALL: u64 = 4096;
const BYTES: u64 = 5 << 20;
const _: () = assert!(REGION_BLOCKS * SMALL < BYTES, "several regions");

fn delta() -> blockferry_engine::SyncOptions {
    options(|o| {
        o.block_size = block_size(SMALL);
        o.mode = Mode::Delta;
        o.strategy = Some(Strategy::Redo);
    })
}

/// A machine that was synced once, and the source it was synced from.
fn synced(seed: u64) -> (Machine, Arc<Source>) {
    let old = image(seed, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(seed, &old, BYTES, 50));
    machine.sync(&source, &delta()).unwrap();
    source.take_reads();
    (machine, source)
}

/// Changes one byte of each of these pages.
fn change_pages(source: &Source, pages: &[usize]) {
    source.change(|bytes| pages.iter().for_each(|p| bytes[p * 4096 + 17] ^= 0x40));
}

#[test]
fn only_blocks_that_changed_are_read_from_a_target_whose_manifest_is_proven() {
    let disk = SimDisk::new(blockferry_testkit::SimOptions::default());
    let old = image(3, BYTES);
    disk.install_device("vda", &old);
    let counting = Arc::new(Counting::new(disk.device("vda", BYTES)));
    let counts = counting.counts();
    let open = || {
        let device: Arc<dyn BlockTarget> = Arc::clone(&counting) as _;
        Target::from_parts(Place::Device(device), disk.dir("state")).unwrap()
    };
    let source = Source::new(edited(3, &old, BYTES, 30));
    // What was read when mode and strategy were decided: from then on nothing is sampled any more.
    let sampled = Arc::new(AtomicU64::new(0));
    let run = |source: &Arc<Source>| {
        let (sampled, counts) = (Arc::clone(&sampled), Arc::clone(&counts));
        let context = Context::new().with_observer(move |event: &Event| {
            if let Event::Decision(_) = event {
                sampled.store(counts.read_bytes(), Ordering::SeqCst);
            }
        });
        let source: Arc<dyn BlockSource> = Arc::<Source>::clone(source);
        sync(source, &mut open(), &delta(), &context).unwrap()
    };
    run(&source);
    let pages: Vec<usize> = (0..1280).step_by(97).collect();
    change_pages(&source, &pages);

    let receipt = run(&source);

    let changed = pages.len() as u64 * SMALL;
    assert_eq!(receipt.changed_bytes, Some(changed));
    assert_eq!(receipt.target_read_bytes, changed);
    let read = counts.read_bytes() - sampled.load(Ordering::SeqCst);
    assert_eq!(read, changed, "reads of the target itself");
    assert_eq!(disk.content("vda").unwrap(), source.bytes());
}

#[test]
fn a_target_that_someone_wrote_is_never_replaced_silently() {
    let full = |strict| {
        options(|o| {
            o.block_size = block_size(SMALL);
            o.mode = Mode::Full;
            o.strict = strict;
        })
    };
    let (machine, source) = synced(6);
    machine.scribble(3 * SMALL, &[9; 100]);

    let refused = machine.sync(&source, &full(true)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Target, "{refused}");

    let (context, events) = listening();
    let receipt = machine.sync_in(&source, &full(false), &context).unwrap();
    assert_eq!(warnings(&events), ["target_written"]);
    assert_eq!(receipt.fallbacks.len(), 1);
    assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
}

#[test]
fn an_unchanged_source_is_not_read_when_only_the_target_was_written() {
    let (machine, source) = synced(5);
    machine.scribble(3 * SMALL, &[9; 100]);
    let (context, events) = listening();

    let receipt = machine.sync_in(&source, &delta(), &context).unwrap();

    // Its leaves are known, but what the target must get back has to be read.
    assert_eq!(warnings(&events), ["target_written"]);
    assert!(receipt.changed_bytes.unwrap() <= SMALL);
    assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
}

#[test]
fn two_sides_at_their_common_point_are_not_read_at_all() {
    let (machine, source) = synced(6);

    let receipt = machine.sync(&source, &delta()).unwrap();

    assert_eq!(receipt.outcome, "identical");
    assert_eq!(source.take_read_bytes(), 0);
    assert_eq!((receipt.scanned_bytes, receipt.target_read_bytes), (0, 0));
}

#[test]
fn a_source_that_proves_nothing_is_read_but_the_target_is_not() {
    let old = image(8, BYTES);
    let machine = Machine::file(&old);
    let source = Source::anonymous(edited(8, &old, BYTES, 50));
    machine.sync(&source, &delta()).unwrap();
    source.take_reads();

    let receipt = machine.sync(&source, &delta()).unwrap();

    assert_eq!(receipt.outcome, "identical");
    assert!(source.take_read_bytes() > 0);
    assert_eq!(receipt.target_read_bytes, 0);
}

#[test]
fn a_rescan_reads_both_sides_whatever_is_known() {
    let (machine, source) = synced(9);
    source.hide_holes();
    let mut rescan = delta();
    rescan.rescan = true;

    let receipt = machine.sync(&source, &rescan).unwrap();

    assert_eq!(receipt.scanned_bytes, BYTES);
    assert!(source.take_read_bytes() >= BYTES);
    assert!(receipt.target_read_bytes > BYTES / 2);
}

/// Every way of losing or damaging the manifest.
pub(crate) fn damage(machine: &Machine, how: &str) {
    let point = machine.open().replica().point().unwrap().id;
    let name = format!("{point}.manifest");
    let path = format!("state/{name}");
    let length = machine.disk.content(&path).unwrap().len() as u64;
    match how {
        "missing" => machine.state().remove(&name).unwrap(),
        "header" => assert!(machine.disk.flip_bit(&path, 9)),
        "first region" => assert!(machine.disk.flip_bit(&path, 300)),
        "last region" => assert!(machine.disk.flip_bit(&path, length - 3000)),
        "trailer" => assert!(machine.disk.flip_bit(&path, length - 5)),
        "cut short" => {
            let file = machine.state().open(&name).unwrap().unwrap();
            file.resize(length / 2).unwrap();
        }
        "another image" => {
            let other = crate::harness::manifest_of(&image(77, BYTES), block_size(SMALL));
            let file = machine.state().open(&name).unwrap().unwrap();
            file.resize(0).unwrap();
            file.write_at(0, &other).unwrap();
        }
        "another block size" => {
            let other =
                crate::harness::manifest_of(&machine.content().unwrap(), BlockSize::DEFAULT);
            let file = machine.state().open(&name).unwrap().unwrap();
            file.resize(0).unwrap();
            file.write_at(0, &other).unwrap();
        }
        _ => unreachable!("{how}"),
    }
}

pub(crate) const DAMAGES: [&str; 8] = [
    "missing",
    "header",
    "first region",
    "last region",
    "trailer",
    "cut short",
    "another image",
    "another block size",
];

#[test]
fn a_manifest_that_is_lost_or_damaged_costs_a_full_comparison_and_is_said() {
    for how in DAMAGES {
        let (machine, source) = synced(10);
        damage(&machine, how);
        change_pages(&source, &[5, 600, 1279]);
        let (context, events) = listening();

        let receipt = machine.sync_in(&source, &delta(), &context).unwrap();

        let codes = warnings(&events);
        assert_eq!(codes.len(), 1, "{how}: {codes:?}");
        assert!(codes[0].starts_with("manifest_"), "{how}: {codes:?}");
        assert_eq!(receipt.fallbacks.len(), 1, "{how}");
        assert_eq!(receipt.changed_bytes, Some(3 * SMALL), "{how}");
        assert!(
            receipt.target_read_bytes > BYTES / 2,
            "{how}: compared in full"
        );
        assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
    }
}

#[test]
fn a_damaged_manifest_is_replaced_even_where_nothing_differs() {
    for how in DAMAGES {
        let (machine, source) = synced(11);
        damage(&machine, how);
        source.change(|_same| ());

        let receipt = machine.sync(&source, &delta()).unwrap();

        assert_eq!(receipt.outcome, "identical", "{how}");
        assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
    }
}

#[test]
fn strict_turns_a_fallback_into_an_error_and_leaves_everything_as_it_is() {
    for how in DAMAGES {
        let (machine, source) = synced(12);
        let at_point = machine.content();
        damage(&machine, how);
        change_pages(&source, &[5, 600, 1279]);
        let mut strict = delta();
        strict.strict = true;

        let error = machine.sync(&source, &strict).unwrap_err();

        assert_eq!(error.kind(), ErrorKind::Target, "{how}: {error}");
        assert_eq!(machine.content(), at_point, "{how}");
    }
}

#[test]
fn a_target_somebody_wrote_is_compared_in_full() {
    let (machine, source) = synced(13);
    machine.scribble(700 * SMALL, &[1; 10_000]);
    change_pages(&source, &[5]);
    let (context, events) = listening();

    let receipt = machine.sync_in(&source, &delta(), &context).unwrap();

    assert_eq!(warnings(&events), ["target_written"]);
    assert_eq!(receipt.fallbacks.len(), 1);
    assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
}

#[test]
fn a_full_download_leaves_a_manifest_that_spares_the_next_delta_the_target() {
    for on in [On::File, On::Device] {
        let old = image(14, BYTES);
        let machine = Machine::new(on, false, Some(&old));
        let source = Source::new(edited(14, &old, BYTES, 500));
        let full = options(|o| {
            o.block_size = block_size(SMALL);
            o.mode = Mode::Full;
        });
        machine.sync(&source, &full).unwrap();
        change_pages(&source, &[1, 2, 300]);
        let mut next = delta();
        next.strategy = None;

        let receipt = machine.sync(&source, &next).unwrap();

        assert_eq!(receipt.target_read_bytes, 3 * SMALL, "{on:?}");
        assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
    }
}

#[test]
fn a_manifest_in_blocks_of_another_size_is_not_used_and_that_is_said() {
    let (machine, source) = synced(15);
    let other = options(|o| o.mode = Mode::Delta);

    let (context, events) = listening();
    let receipt = machine.sync_in(&source, &other, &context).unwrap();

    assert_eq!(receipt.outcome, "identical");
    assert_eq!(warnings(&events), ["manifest_unusable"]);
    assert_synced(&machine, &source.bytes(), BlockSize::DEFAULT, &receipt);
}

#[test]
fn a_memory_device_without_identity_gives_no_proof_and_is_read() {
    let bytes = image(16, 1 << 20);
    let disk = SimDisk::new(blockferry_testkit::SimOptions::default());
    let device = Arc::new(MemoryDevice::from_bytes("memory", bytes.clone()));
    let source: Arc<dyn BlockSource> = Arc::new(MemoryDevice::from_bytes("source", bytes));
    let run = || {
        let place = Place::Device(Arc::clone(&device) as _);
        let mut target = Target::from_parts(place, disk.dir("state")).unwrap();
        let (context, events) = listening();
        let receipt = sync(Arc::clone(&source), &mut target, &delta(), &context).unwrap();
        (receipt, warnings(&events))
    };

    let (first, none) = run();
    let (second, said) = run();

    assert_eq!([first.outcome, second.outcome], ["identical"; 2]);
    assert!(none.is_empty());
    assert_eq!(said, ["target_written"]);
    assert!(second.scanned_bytes > 0 && second.target_read_bytes > 0);
    assert!(!matches!(
        Event::Decision(second.reason),
        Event::Warning { .. }
    ));
}
