//! The source on the other side of a connection: what holds of a local run holds of it, and little travels.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use blockferry_core::{Geometry, Root};
use blockferry_device::{BlockSource, Clock, Evidence, Identity};
use blockferry_engine::{
    Context, Error, ErrorKind, Mode, Prediction, Receipt, Result, Strategy, SyncOptions, Target,
    TargetOptions, Undo, predict, predict_from_peer, serve_source, sync_from_peer,
};
use blockferry_testkit::{Random, VirtualClock, images};
use blockferry_transport::frame::FrameDecoder;
use blockferry_transport::{
    Connection, Deadlines, Link, Message, PREAMBLE_BYTES, ShortDigests, Width, message,
};

use crate::harness::{
    Machine, On, Source, assert_rolls_back_to, assert_synced, block_size, edited, image, listening,
    options, warnings,
};

const BYTES: u64 = 6 << 20;

pub(crate) fn delta(strategy: Option<Strategy>) -> SyncOptions {
    options(|o| {
        o.block_size = block_size(16 * 1024);
        o.mode = Mode::Delta;
        o.strategy = strategy;
    })
}

/// What both sides came to, and what travelled: bytes to the source's side, and from there.
pub(crate) struct Ran {
    pub(crate) target: Result<Receipt>,
    source: Result<Vec<u8>>,
}

/// A sync over this pair of links.
pub(crate) fn run(
    machine: &Machine,
    source: &Arc<Source>,
    options: &SyncOptions,
    link: (Link, Link),
) -> Ran {
    run_in(machine, source, options, link, &Context::default())
}

/// The same, of which the target's side is watched.
pub(crate) fn run_in(
    machine: &Machine,
    source: &Arc<Source>,
    options: &SyncOptions,
    (here, there): (Link, Link),
    context: &Context,
) -> Ran {
    let served: Arc<dyn BlockSource> = Arc::<Source>::clone(source);
    let serving = thread::spawn(move || {
        let connection = Connection::open(there, Deadlines::default()).map_err(unopened)?;
        serve_source(&served, connection, 2, &Context::default())
    });
    let target = Connection::open(here, Deadlines::default())
        .map_err(unopened)
        .and_then(|connection| {
            let mut target = Target::from_parts(machine.place(), machine.state())?;
            sync_from_peer(connection, &mut target, options, context)
        });
    Ran {
        target,
        source: serving.join().unwrap(),
    }
}

fn unopened(error: blockferry_transport::Error) -> Error {
    let error: Box<dyn std::error::Error> = error.into();
    Error::new(ErrorKind::Peer, error.to_string())
}

#[test]
fn a_target_becomes_what_the_other_side_has_and_can_go_back() {
    let ways = [
        (On::File, false, delta(Some(Strategy::Redo))),
        (On::Device, false, delta(None)),
        (On::File, true, delta(Some(Strategy::Clone))),
    ];
    for (number, (on, clones, options)) in ways.into_iter().enumerate() {
        let mut old = image(40, BYTES);
        let machine = Machine::new(on, clones, Some(&old));
        let source = Source::new(old.clone());
        for round in 0..4 {
            let size = match (on, round) {
                (On::File, 2) => BYTES + 70_001,
                (On::File, 3) => BYTES - 5,
                _ => BYTES,
            };
            let next = edited(round, &source.bytes(), size, 30);
            source.change(|bytes| *bytes = next);

            let ran = run(&machine, &source, &options, Link::pair().unwrap());

            let receipt = ran
                .target
                .unwrap_or_else(|e| panic!("way {number}, {round}: {e:?}"));
            let told: Receipt = serde_json::from_slice(&ran.source.unwrap()).unwrap();
            assert_eq!(format!("{told:?}"), format!("{receipt:?}"));
            assert_synced(&machine, &source.bytes(), options.block_size, &receipt);
            assert_rolls_back_to(&machine, &old);
            let ran = run(&machine, &source, &options, Link::pair().unwrap());
            ran.target.unwrap();
            old = source.bytes();
        }
    }
}

/// Passes so many bytes, then fails as a cut cable does.
struct Cut<S> {
    stream: S,
    left: usize,
}

impl<S: Read> Read for Cut<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Ok(0);
        }
        let most = buffer.len().min(self.left);
        let count = self.stream.read(&mut buffer[..most])?;
        self.left -= count;
        Ok(count)
    }
}

/// A pair of links of which the target's side hears through what `ear` makes of its socket.
fn heard_through<R: Read + Send + 'static>(ear: impl FnOnce(UnixStream) -> R) -> (Link, Link) {
    let (one, other) = UnixStream::pair().unwrap();
    let (reader, closer) = (one.try_clone().unwrap(), one.try_clone().unwrap());
    let close = move || {
        closer.shutdown(std::net::Shutdown::Both).ok();
    };
    let here = Link::new(ear(reader), one, close, "the source's side");
    (here, Link::over_socket(other, "the target's side").unwrap())
}

/// A pair of links of which the target's side hears no more than `left` bytes.
pub(crate) fn cut_after(left: usize) -> (Link, Link) {
    heard_through(|stream| Cut { stream, left })
}

/// A pair of links of which the target's side hears what was sent for `left` bytes, and then something else.
pub(crate) fn garbled_after(left: usize) -> (Link, Link) {
    heard_through(|stream| Garbling { stream, left })
}

/// Passes so many bytes, then changes each.
struct Garbling<S> {
    stream: S,
    left: usize,
}

impl<S: Read> Read for Garbling<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer)?;
        let good = self.left.min(count);
        self.left -= good;
        buffer[good..count]
            .iter_mut()
            .for_each(|byte| *byte ^= 0x55);
        Ok(count)
    }
}

#[test]
fn a_link_cut_anywhere_is_resumed_without_sending_anything_durable_again() {
    let mut random = Random::new(41);
    let mut without_undo = delta(Some(Strategy::Redo));
    without_undo.undo = Undo::None;
    let ways = [
        delta(Some(Strategy::Redo)),
        without_undo,
        full(Some(Strategy::Redo)),
        full(Some(Strategy::Shadow)),
    ];
    for options in ways {
        // Some ten megabytes travel, in messages of up to one.
        let old = image(41, 6 * BYTES);
        let machine = Machine::file(&old);
        let source = Source::new(edited(41, &old, 6 * BYTES, 300));
        let mut cuts = 0;
        let receipt = loop {
            let after = usize::try_from(random.below(3 << 20)).unwrap();
            let link = if cuts < 12 {
                cut_after(after)
            } else {
                Link::pair().unwrap()
            };
            let ran = run(&machine, &source, &options, link);
            match ran.target {
                Ok(receipt) => break receipt,
                Err(error) => assert_eq!(error.kind(), ErrorKind::Peer, "{error}"),
            }
            assert!(ran.source.is_err());
            assert_eq!(machine.content().unwrap(), old, "the old point");
            cuts += 1;
        };

        assert!(cuts > 3);
        assert!(receipt.resumed_bytes > 0);
        assert_synced(&machine, &source.bytes(), options.block_size, &receipt);
    }
}

/// Notes what it passes.
struct Noting<S> {
    stream: S,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl<S: Read> Read for Noting<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer)?;
        self.heard.lock().unwrap().extend(&buffer[..count]);
        Ok(count)
    }
}

/// So a link that is cut within a message is one that was cut before it, whichever byte of it was the last.
#[test]
fn a_message_counts_with_its_last_byte_and_not_before() {
    let old = image(49, 512 * 1024);
    let source = Source::new(edited(49, &old, 512 * 1024, 600));
    let heard = Arc::new(Mutex::new(Vec::new()));
    let link = heard_through(|stream| Noting {
        stream,
        heard: Arc::clone(&heard),
    });
    let whole = delta(Some(Strategy::Redo));
    run(&Machine::file(&old), &source, &whole, link)
        .target
        .unwrap();
    let heard = heard.lock().unwrap().split_off(PREAMBLE_BYTES);
    assert!(heard.len() > 64 * 1024, "{}", heard.len());

    let (mut decoder, mut end, mut messages) = (FrameDecoder::new(), 0, 0);
    decoder.trust();
    for (at, byte) in heard.iter().enumerate() {
        if at == end {
            assert!(!decoder.is_within_frame());
            let length = heard[at..at + 4].try_into().unwrap();
            end = at + 5 + usize::try_from(u32::from_le_bytes(length)).unwrap();
        }
        decoder.push(&[*byte]);
        let frame = decoder.next_frame().unwrap();
        assert_eq!(frame.is_some(), at + 1 == end, "byte {at}");
        assert_eq!(decoder.is_within_frame(), at + 1 < end, "byte {at}");
        if let Some(frame) = frame {
            Message::decode(&frame).unwrap();
            messages += 1;
        }
    }
    assert!(messages > 5 && end == heard.len(), "{messages}");
}

/// Of what the target's side hears, any byte of the first 64 KiB may be the last one: each of the greeting and of the
/// digests, and of the data, of which a part of a message is as good as nothing, one in 61; each in the long mode.
#[test]
fn a_link_cut_at_any_byte_leaves_the_old_point_and_the_next_one_goes_on() {
    const HEARD: usize = 64 * 1024;
    const EACH: usize = 1200;
    let step = if std::env::var_os("BLOCKFERRY_TEST_LONG").is_some() {
        1
    } else {
        61
    };
    let old = image(48, 160 * 1024);
    let mut new = old.clone();
    // Noise, which does not become smaller on its way.
    for page in (0..40).step_by(2) {
        let at = page * 4096;
        new[at..at + 4096].copy_from_slice(&images::random_image(page as u64, 4096));
    }
    let source = Source::new(new);
    let mut options = delta(Some(Strategy::Redo));
    options.block_size = block_size(4096);
    let whole = run(
        &Machine::file(&old),
        &source,
        &options,
        Link::pair().unwrap(),
    );
    assert!(whole.target.unwrap().sent_bytes > HEARD as u64);
    let next = AtomicUsize::new(0);
    let resumed = AtomicUsize::new(0);
    let threads = thread::available_parallelism().map_or(2, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let after = number + number.saturating_sub(EACH) * (step - 1);
                    if after >= HEARD {
                        break;
                    }
                    let machine = Machine::file(&old);
                    let cut = run(&machine, &source, &options, cut_after(after));

                    let error = cut.target.expect_err("it was cut");
                    assert_eq!(error.kind(), ErrorKind::Peer, "after {after}: {error}");
                    assert_eq!(machine.content().unwrap(), old, "after {after}");

                    let again = run(&machine, &source, &options, Link::pair().unwrap());
                    let receipt = again
                        .target
                        .unwrap_or_else(|e| panic!("after {after}: {e}"));
                    assert_eq!(receipt.restaged_bytes, 0, "after {after}");
                    assert!(
                        machine.content().unwrap() == source.bytes(),
                        "after {after}"
                    );
                    resumed.fetch_add(usize::from(receipt.resumed_bytes > 0), Ordering::Relaxed);
                }
            });
        }
    });
    let resumed = resumed.into_inner();
    assert!(resumed > 100, "{resumed}");
}

#[test]
fn a_source_that_is_written_meanwhile_is_never_committed() {
    let old = image(42, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(42, &old, BYTES, 100));
    let changing = Arc::clone(&source);
    source.count_from_now();
    source.on_read(move |number| {
        if number == 30 {
            changing.bump();
        }
        Ok(())
    });

    let ran = run(&machine, &source, &delta(None), Link::pair().unwrap());

    let error = ran.target.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Source, "{error}");
    assert!(error.is_resumable());
    assert_eq!(machine.content().unwrap(), old);
}

#[test]
fn a_source_that_fails_is_told_of_on_the_other_side() {
    let old = image(43, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(43, &old, BYTES, 100));
    source.count_from_now();
    source.fail_from(20);

    let ran = run(&machine, &source, &delta(None), Link::pair().unwrap());

    let (target, source) = (ran.target.unwrap_err(), ran.source.unwrap_err());
    assert_eq!(
        (target.kind(), source.kind()),
        (ErrorKind::Source, ErrorKind::Source)
    );
    assert!(
        target.to_string().contains("injected read error"),
        "{target}"
    );
}

pub(crate) fn full(strategy: Option<Strategy>) -> SyncOptions {
    let mut full = delta(strategy);
    full.mode = Mode::Full;
    full
}

#[test]
fn whole_blocks_come_from_another_machine_for_every_strategy() {
    let mut in_place = full(None);
    in_place.in_place = true;
    let ways = [
        (On::File, full(None), Strategy::Shadow),
        (On::File, delta(Some(Strategy::Shadow)), Strategy::Shadow),
        (On::File, full(Some(Strategy::Redo)), Strategy::Redo),
        (On::Device, full(None), Strategy::Redo),
        (On::Device, in_place.clone(), Strategy::Direct),
        (On::File, in_place, Strategy::Direct),
    ];
    for (number, (on, options, strategy)) in ways.into_iter().enumerate() {
        let old = image(44, BYTES);
        let machine = Machine::new(on, false, Some(&old));
        let size = if on == On::File {
            BYTES + 70_001
        } else {
            BYTES
        };
        let mut new = edited(44, &old, size, 100);
        // Where the target is not zero, it has to become so; one region has no data at all.
        new[..200_000].fill(0);
        new[4 << 20..5 << 20].fill(0);
        let source = Source::new(new);

        let ran = run(&machine, &source, &options, Link::pair().unwrap());

        let receipt = ran.target.unwrap_or_else(|e| panic!("way {number}: {e:?}"));
        assert_eq!(receipt.strategy, Some(strategy));
        assert_synced(&machine, &source.bytes(), options.block_size, &receipt);
        if strategy != Strategy::Direct {
            assert_rolls_back_to(&machine, &old);
        }
    }
}

#[test]
fn a_target_that_is_not_there_comes_from_another_machine() {
    let mut new = image(45, 3 * BYTES);
    new[5 << 20..12 << 20].fill(0);
    let (machine, source) = (Machine::new(On::File, false, None), Source::new(new));
    let mut auto = delta(None);
    auto.mode = Mode::Auto;

    let ran = run(&machine, &source, &auto, Link::pair().unwrap());

    let receipt = ran.target.unwrap();
    assert_synced(&machine, &source.bytes(), auto.block_size, &receipt);
}

#[test]
fn a_full_download_goes_on_here_or_from_another_machine() {
    for from_peer_first in [false, true] {
        let old = image(46, 4 * BYTES);
        let source = Source::new(edited(46, &old, 4 * BYTES, 100));
        let (machine, another) = (Machine::file(&old), Machine::file(&old));
        let mut auto = delta(None);
        auto.mode = Mode::Auto;
        let shadow = full(Some(Strategy::Shadow));
        let sync_from = |machine: &Machine, from_peer: bool, options: &SyncOptions| {
            if from_peer {
                run(machine, &source, options, Link::pair().unwrap()).target
            } else {
                machine.sync(&source, options)
            }
        };
        source.count_from_now();
        sync_from(&another, from_peer_first, &shadow).unwrap();
        let reads = source.take_reads().len() as u64;
        source.count_from_now();
        source.fail_from(reads * 3 / 4);
        sync_from(&machine, from_peer_first, &shadow).unwrap_err();
        assert_eq!(machine.content().unwrap(), old);
        source.heal();

        let receipt = sync_from(&machine, !from_peer_first, &auto).unwrap();

        assert_eq!(receipt.strategy, Some(Strategy::Shadow));
        assert!(receipt.resumed_bytes > 0, "{from_peer_first}");
        assert_synced(&machine, &source.bytes(), auto.block_size, &receipt);
        assert_rolls_back_to(&machine, &old);
    }
}

/// A source of zeros that says it has this root, first and again, and how its digests were wanted.
fn lies_about_its_root(link: Link, bytes: u64) -> Vec<bool> {
    let connection = Connection::open(link, Deadlines::default()).unwrap();
    let (outbox, mut exact) = (connection.outbox(), Vec::new());
    loop {
        let answers = match connection.receive() {
            Ok(Message::Examine) => vec![Message::Source(message::Source {
                label: "zeros".to_owned(),
                size_bytes: bytes,
                identity: Identity::unknown(),
                evidence: Evidence::unknown(),
            })],
            Ok(Message::Begin(begin)) => {
                exact.push(begin.exact);
                let below = Geometry::new(bytes, begin.block_size).region_count();
                let width = if begin.exact {
                    Width::Whole
                } else {
                    Width::Sixteen
                };
                let regions = Message::Regions {
                    regions: Vec::new(),
                    digests: ShortDigests::new(width),
                    below,
                };
                vec![
                    regions,
                    Message::Scanned {
                        root: Root::from_bytes([9; 32]),
                        read_bytes: 0,
                    },
                ]
            }
            Ok(Message::Stop) => vec![Message::Stopped],
            Ok(_) => Vec::new(),
            Err(_) => return exact,
        };
        for answer in answers {
            outbox.send(answer).unwrap();
        }
    }
}

#[test]
fn what_does_not_come_to_the_root_is_compared_again_with_whole_digests_and_then_refused() {
    let old = vec![0; usize::try_from(BYTES).unwrap()];
    let machine = Machine::file(&old);
    let (here, there) = Link::pair().unwrap();
    let lying = thread::spawn(move || lies_about_its_root(there, BYTES));
    let connection = Connection::open(here, Deadlines::default()).unwrap();
    let (context, events) = listening();

    let error =
        sync_from_peer(connection, &mut machine.open(), &delta(None), &context).unwrap_err();

    assert_eq!(error.kind(), ErrorKind::Peer, "{error}");
    assert_eq!(lying.join().unwrap(), [false, true]);
    assert_eq!(warnings(&events), ["digests_mistaken"]);
    assert_eq!(machine.content().unwrap(), old);
}

#[test]
fn a_rate_holds_back_what_comes_from_another_machine() {
    let old = image(45, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(45, &old, BYTES, 300));
    let clock = Arc::new(VirtualClock::default());
    let mut context = Context::default();
    context.clock = Arc::clone(&clock) as Arc<dyn Clock>;
    let mut options = delta(None);
    options.bwlimit_bytes_per_second = Some(100_000);
    let (here, there) = Link::pair().unwrap();
    let served: Arc<dyn BlockSource> = Arc::<Source>::clone(&source);
    let serving = thread::spawn(move || {
        let connection = Connection::open(there, Deadlines::default()).unwrap();
        serve_source(&served, connection, 2, &Context::default())
    });
    let connection = Connection::open(here, Deadlines::default()).unwrap();

    let receipt = sync_from_peer(connection, &mut machine.open(), &options, &context).unwrap();

    serving.join().unwrap().unwrap();
    let least = receipt.staged_bytes as f64 / 100_000.0 - 2.0;
    assert!(clock.now().as_secs_f64() > least, "{:?}", clock.now());
    assert!(least > 5.0, "{} bytes", receipt.staged_bytes);
}

/// A source's side that answers a wish for a sample with these messages, and what became of the prediction.
fn foretold_by(answers: Vec<Message>) -> Error {
    let (here, there) = Link::pair().unwrap();
    let lying = thread::spawn(move || {
        let connection = Connection::open(there, Deadlines::default()).unwrap();
        loop {
            let answers = match connection.receive() {
                Ok(Message::Examine) => vec![Message::Source(message::Source {
                    label: "disk".to_owned(),
                    size_bytes: BYTES,
                    identity: Identity::unknown(),
                    evidence: Evidence::unknown(),
                })],
                Ok(Message::Sample(_)) => answers.clone(),
                Ok(_) => continue,
                Err(_) => return,
            };
            for answer in answers {
                if connection.outbox().send(answer).is_err() {
                    return;
                }
            }
        }
    });
    let place = tempfile::tempdir().unwrap();
    let target = place.path().join("target");
    std::fs::write(&target, vec![1; 1 << 20]).unwrap();
    let connection = Connection::open(here, Deadlines::default()).unwrap();

    let foretold = predict_from_peer(
        connection,
        &target,
        &TargetOptions::new("/nowhere"),
        &delta(None),
        &Context::default(),
    );

    lying.join().unwrap();
    foretold.expect_err("lies")
}

#[test]
fn a_sample_that_is_none_ends_the_prediction() {
    let run = |first, count| message::PageRun {
        first,
        count,
        zero: true,
    };
    let data = |blocks: Vec<(u64, u16)>, runs| Message::Data {
        blocks,
        runs,
        frame: Vec::new(),
    };
    let sampled = |blocks| {
        Message::Sampled(message::Sampled {
            data_blocks: 400,
            blocks,
            reading_ns: 1,
            digesting_ns: 1,
        })
    };
    let many = vec![(0, 0); 256];
    for (answers, told) in [
        (vec![sampled(257)], "sampled"),
        (vec![sampled(2), sampled(2)], "sampled"),
        (vec![data(vec![], vec![run(0, 1)])], "other blocks"),
        (
            vec![data(many, vec![]), data(vec![(0, 0)], vec![])],
            "other blocks",
        ),
        (
            vec![sampled(1), data(vec![(u64::MAX, 0)], vec![])],
            "has not",
        ),
        (vec![sampled(1), data(vec![(1, 200)], vec![])], "has not"),
        (
            vec![
                sampled(1),
                Message::Data {
                    blocks: vec![(0, 0)],
                    runs: vec![message::PageRun {
                        zero: false,
                        ..run(0, 4)
                    }],
                    frame: b"no frame".to_vec(),
                },
            ],
            "unpack",
        ),
        (vec![Message::Stopped], "stopped"),
    ] {
        let error = foretold_by(answers);

        assert_eq!(error.kind(), ErrorKind::Peer, "{error}");
        assert!(error.to_string().contains(told), "{told}: {error}");
    }
}

#[test]
fn what_is_foretold_of_a_peer_is_what_is_foretold_of_a_disk_here() {
    let place = tempfile::tempdir().unwrap();
    let target = place.path().join("target");
    let old = image(47, BYTES);
    std::fs::write(&target, &old).unwrap();
    let source = Source::new(edited(47, &old, BYTES, 60));
    let served: Arc<dyn BlockSource> = Arc::<Source>::clone(&source);
    let (here, there) = Link::pair().unwrap();
    let serving = {
        let served = Arc::clone(&served);
        thread::spawn(move || {
            let connection = Connection::open(there, Deadlines::default()).unwrap();
            serve_source(&served, connection, 2, &Context::default())
        })
    };
    let connection = Connection::open(here, Deadlines::default()).unwrap();
    let (options, nowhere, context) = (
        delta(Some(Strategy::Redo)),
        TargetOptions::new("/nowhere"),
        Context::default(),
    );

    let of_peer = predict_from_peer(connection, &target, &nowhere, &options, &context).unwrap();

    let told: Prediction = serde_json::from_slice(&serving.join().unwrap().unwrap()).unwrap();
    let facts = |p: &Prediction| {
        let bytes = (
            p.source_bytes,
            p.predicted_changed_bytes,
            p.predicted_wire_bytes,
        );
        (p.mode, p.strategy, p.reason.clone(), bytes, p.fits)
    };
    assert_eq!(facts(&told), facts(&of_peer));
    let here = predict(&served, &target, &nowhere, &options, &context).unwrap();
    assert_eq!(of_peer.source_bytes, here.source_bytes);
    assert_eq!(of_peer.strategy, here.strategy);
    let close = |a: u64, b: u64| a.abs_diff(b) <= b / 4;
    let changed = (
        of_peer.predicted_changed_bytes,
        here.predicted_changed_bytes,
    );
    assert!(close(changed.0, changed.1), "{changed:?}");
    assert!(
        close(of_peer.data_bytes, here.data_bytes),
        "{of_peer:?} {here:?}"
    );
    assert!(of_peer.predicted_wire_bytes.is_some_and(|bytes| bytes > 0));
    assert_eq!(here.predicted_wire_bytes, None);
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1);
}
