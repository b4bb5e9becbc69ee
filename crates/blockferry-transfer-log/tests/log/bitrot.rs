//! Rot everywhere (F5): every single bit, and every length, of the files that a small session leaves. Whatever is
//! damaged is detected or does no harm; the target is one of its two points and never anything else.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use blockferry_core::is_zero;
use blockferry_testkit::{Fault, FaultKind, OperationKind, Repeat, SimDisk, Snapshot};
use blockferry_transfer_log::{Error, ErrorKind, Prepared, Replica, Strategy, inspect};

use crate::harness::{PAGE, Setup, id, image, quiet, root};

const LOG: &str = "01010101010101010101010101010101.log.0000";
const STATE: &str = "state";
const SESSION: u8 = 1;

fn setup() -> Setup {
    Setup {
        batch_pages: 1,
        ..Setup::file(Strategy::Redo)
    }
}

fn old() -> Vec<u8> {
    image(&[1, 2, 0], 3 * PAGE)
}

fn new() -> Vec<u8> {
    image(&[1, 5, 3], 3 * PAGE)
}

/// How far a session has come when its files begin to rot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Two durable groups, no decision.
    Staged,
    /// COMMIT is durable, the target is still at its old point.
    Committed,
    /// At the new point, with the way back.
    Applied,
}

impl Stage {
    fn reached(self) -> Snapshot {
        let disk = setup().machine(Some(&old()));
        let mut replica = setup().open(&disk).unwrap();
        let target = replica.target();
        let mut session = replica.begin(&setup().plan(SESSION, &new())).unwrap();
        setup()
            .stage(&mut session, target.as_ref(), &new(), 9, &mut |_| {})
            .unwrap();
        if self == Self::Staged {
            drop(session);
        } else {
            setup()
                .finish(&mut session, target.as_ref(), &new())
                .unwrap();
            if self == Self::Committed {
                let first_write =
                    Fault::on(OperationKind::Write, "images/", 1, FaultKind::PowerLoss);
                disk.inject(first_write.repeat(Repeat::Forever));
            }
            let done = session.commit(root(&new()), &quiet);
            assert_eq!(done.is_ok(), self == Self::Applied);
        }
        drop(replica);
        disk.snapshot()
    }

    /// What a user does next, with one file damaged.
    fn survives(self, disk: &SimDisk) -> Result<Harm, String> {
        let looked = inspect(&setup().place(disk), &*disk.dir("state"));
        expect_honest(&looked.map(drop))?;
        match self {
            Self::Staged => goes_on(disk),
            Self::Committed => is_decided(disk),
            Self::Applied => goes_back(disk),
        }
    }
}

/// What the damage cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Harm {
    None,
    Detected,
}

/// An error about damage says that it is one.
fn expect_honest<T>(result: &Result<T, Error>) -> Result<(), String> {
    match result.as_ref().map_err(Error::kind) {
        Ok(_)
        | Err(ErrorKind::Corrupt | ErrorKind::UnknownVersion | ErrorKind::DecisionPending) => {
            Ok(())
        }
        Err(kind) => Err(format!("an error of kind {kind:?}")),
    }
}

fn expect_at(disk: &SimDisk, expected: &[u8], when: &str) -> Result<(), String> {
    match setup().content(disk) {
        Some(found) if found == expected => Ok(()),
        Some(found) if found == old() => Err(format!("{when} the target is at its old point")),
        Some(found) if found == new() => Err(format!("{when} the target is at its new point")),
        _ => Err(format!("{when} the target is torn")),
    }
}

/// Resumed, or begun again where nothing of the session is left: the new point is reached, and the way back.
fn goes_on(disk: &SimDisk) -> Result<Harm, String> {
    let setup = setup();
    let opened = setup.open(disk);
    expect_honest(&opened)?;
    expect_at(disk, &old(), "after opening")?;
    let Ok(mut replica) = opened else {
        return Ok(Harm::Detected);
    };
    let failed = |e: Error| format!("going on: {e:?}");
    let harm = synced(&mut replica).map_err(failed)?;
    expect_at(disk, &new(), "after going on")?;
    replica.rollback(&quiet).map_err(failed)?;
    expect_at(disk, &old(), "after rolling back")?;
    Ok(harm)
}

fn synced(replica: &mut Replica) -> Result<Harm, Error> {
    let (setup, target) = (setup(), replica.target());
    let resumes = replica.unfinished().is_some();
    let mut session = if resumes {
        replica.resume(u64::MAX)?
    } else {
        replica.begin(&setup.plan(SESSION + 1, &new()))?
    };
    // Reading back first finds what rotted; it is staged again.
    while let Prepared::Missing(_) = session.prepare()? {
        setup.stage(&mut session, target.as_ref(), &new(), 9, &mut |_| {})?;
    }
    setup.finish(&mut session, target.as_ref(), &new())?;
    let staged_again = session.totals().staged_bytes > 0;
    session.commit(root(&new()), &quiet)?;
    Ok(if resumes && !staged_again {
        Harm::None
    } else {
        Harm::Detected
    })
}

/// Carried out, taken back, or refused with nothing touched; never half of it.
fn is_decided(disk: &SimDisk) -> Result<Harm, String> {
    let opened = setup().open(disk);
    let taken_back = matches!(&opened, Err(error) if error.kind() == ErrorKind::Target);
    if taken_back {
        // Apply met a page that is not what was written: the pre-images brought the target back.
        let again = setup().open(disk);
        again.map_err(|e| format!("after the decision was taken back: {e:?}"))?;
        return expect_at(disk, &old(), "taken back").map(|()| Harm::Detected);
    }
    expect_honest(&opened)?;
    match opened {
        Ok(replica) => {
            expect_at(disk, &new(), "after the decision was carried out")?;
            rolls_back(disk, replica)
        }
        Err(_) => expect_at(disk, &old(), "after a refusal").map(|()| Harm::Detected),
    }
}

fn goes_back(disk: &SimDisk) -> Result<Harm, String> {
    let opened = setup().open(disk);
    expect_honest(&opened)?;
    expect_at(disk, &new(), "after opening")?;
    match opened {
        Ok(replica) => rolls_back(disk, replica),
        Err(_) => Ok(Harm::Detected),
    }
}

fn rolls_back(disk: &SimDisk, mut replica: Replica) -> Result<Harm, String> {
    if replica.point().is_none_or(|p| p.root != root(&new())) {
        return Err("the point that is named is not the one the target is at".to_owned());
    }
    let back = replica.rollback(&quiet);
    expect_honest(&back)?;
    match back {
        Ok(_) => expect_at(disk, &old(), "after rolling back").map(|()| Harm::None),
        Err(_) => {
            expect_at(disk, &new(), "after a way back that is refused").map(|()| Harm::Detected)
        }
    }
}

/// How much of a file is damaged, one place after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Depth {
    /// Every bit of every field and checksum; a sample of what no code tells apart: payload, padding, blanks.
    Fields,
    /// Everything.
    All,
}

impl Depth {
    /// Bytes at the start of a page in which every field of every structure lies.
    const FIELDS: usize = 320;
    const CHECKSUM: usize = 32;

    fn bits(self, sound: &[u8]) -> Vec<usize> {
        let wanted = |bit: &usize| self == Self::All || Self::tells(sound, *bit);
        (0..sound.len() * 8).filter(wanted).collect()
    }

    fn tells(sound: &[u8], bit: usize) -> bool {
        let (byte, page) = (bit / 8, bit / 8 / PAGE * PAGE);
        let place = byte - page;
        if is_zero(&sound[page..page + PAGE]) {
            return place.is_multiple_of(512) && bit.is_multiple_of(8);
        }
        let in_field = !(Self::FIELDS..PAGE - Self::CHECKSUM).contains(&place);
        in_field || byte.is_multiple_of(8) && bit % 8 == byte / 8 % 8
    }

    fn lengths(self, sound: &[u8]) -> Vec<usize> {
        let near_a_page = |length: &usize| (length + 8) % PAGE <= 16 || length.is_multiple_of(61);
        let wanted = |length: &usize| self == Self::All || near_a_page(length);
        (0..sound.len()).filter(wanted).collect()
    }
}

/// Runs all cases on all processors and prints how many were detected.
fn damage(
    stage: Stage,
    file: &str,
    cases: fn(Depth, &[u8]) -> Vec<usize>,
    depth: Depth,
    damaged: fn(&[u8], usize) -> Vec<u8>,
) {
    let snapshot = stage.reached();
    let sound = snapshot.after_kill().content(&format!("state/{file}"));
    let sound = sound.unwrap();
    let cases = cases(depth, &sound);
    let (next, detected) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let disk = snapshot.after_kill();
            disk.install("state", file, &damaged(&sound, *case));
            let harm = stage
                .survives(&disk)
                .unwrap_or_else(|what| panic!("{stage:?}, case {case} of {file}: {what}"));
            detected.fetch_add(usize::from(harm == Harm::Detected), Ordering::Relaxed);
        }
    };
    let workers = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| (0..workers).for_each(|_| drop(scope.spawn(work))));
    let (cases, detected) = (cases.len(), detected.into_inner());
    println!("{stage:?}: {cases} places of {file}, {detected} detected, the others harmless");
    // The state keeps everything twice: one bit of it is made up for.
    assert!(detected > 0 || file == STATE);
}

fn flipped(sound: &[u8], bit: usize) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    bytes[bit / 8] ^= 1 << (bit % 8);
    bytes
}

fn cut_off(sound: &[u8], length: usize) -> Vec<u8> {
    sound[..length].to_vec()
}

const STAGES: [Stage; 3] = [Stage::Staged, Stage::Committed, Stage::Applied];

#[test]
fn every_bit_of_a_staged_log_is_detected_or_harmless() {
    assert_eq!(LOG, format!("{}.log.0000", id(SESSION)));
    damage(Stage::Staged, LOG, Depth::bits, Depth::Fields, flipped);
}

#[test]
fn every_bit_of_a_committed_log_is_detected_or_harmless() {
    damage(Stage::Committed, LOG, Depth::bits, Depth::Fields, flipped);
}

#[test]
fn every_bit_of_the_pre_images_is_detected_or_harmless() {
    damage(Stage::Applied, LOG, Depth::bits, Depth::Fields, flipped);
}

#[test]
fn every_bit_of_slots_and_decisions_is_detected_or_harmless() {
    for stage in STAGES {
        damage(stage, STATE, Depth::bits, Depth::Fields, flipped);
    }
}

#[test]
fn every_length_of_log_and_state_is_detected_or_harmless() {
    for stage in STAGES {
        damage(stage, LOG, Depth::lengths, Depth::Fields, cut_off);
        damage(stage, STATE, Depth::lengths, Depth::Fields, cut_off);
    }
}

#[test]
#[ignore = "minutes: payload, padding and blanks as well, where no code tells one bit from the next"]
fn every_single_bit_and_length_is_detected_or_harmless() {
    for stage in STAGES {
        for file in [LOG, STATE] {
            damage(stage, file, Depth::bits, Depth::All, flipped);
            damage(stage, file, Depth::lengths, Depth::All, cut_off);
        }
    }
}
