//! Rot everywhere (F5): every single bit, and every length, of the files that a small session leaves. Whatever is
//! damaged is detected or does no harm; the target is one of its two points and never anything else.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use blockferry_core::{Root, is_zero};
use blockferry_testkit::{Fault, FaultKind, OperationKind, Repeat, SimDisk, Snapshot};
use blockferry_transfer_log::{
    Error, ErrorKind, GroupDirectory, GroupId, Prepared, Replica, Strategy, inspect,
};

use crate::harness::{PAGE, Setup, TARGET, id, image, quiet, root};

const LOG: &str = "01010101010101010101010101010101.log.0000";
const STATE: &str = "state";
const GROUP: &str = "67676767676767676767676767676767.group";
const SESSION: u8 = 1;

/// One page becomes zero and one gets data: a log of five pages, in which every kind of entry is.
static OLD: LazyLock<Vec<u8>> = LazyLock::new(|| image(&[2, 0], 2 * PAGE));
static NEW: LazyLock<Vec<u8>> = LazyLock::new(|| image(&[0, 3], 2 * PAGE));
static NEW_ROOT: LazyLock<Root> = LazyLock::new(|| root(&NEW));

/// A session of one strategy, and how far it has come when its files begin to rot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Scene {
    strategy: Strategy,
    stage: Stage,
}

/// How far a session has come when its files begin to rot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Everything is staged, no decision.
    Staged,
    /// Prepared, and committed by the record of its group.
    InGroup,
    /// COMMIT is durable, the target is still at its old point.
    Committed,
    /// At the new point, with the way back.
    Applied,
}

impl Scene {
    fn setup(self) -> Setup {
        Setup {
            // Of a log that has payloads: two records, of which the second builds on the first.
            batch_pages: if self.strategy == Strategy::Redo {
                1
            } else {
                2
            },
            ..Setup::file(self.strategy)
        }
    }

    fn reached(self) -> Snapshot {
        let setup = self.setup();
        let disk = setup.machine(Some(&OLD));
        let mut replica = setup.open(&disk).unwrap();
        let target = replica.target();
        let mut session = replica.begin(&setup.plan(SESSION, &NEW)).unwrap();
        setup.finish(&mut session, target.as_ref(), &NEW).unwrap();
        match self.stage {
            Stage::Staged => drop(session),
            Stage::InGroup => {
                session.prepare_for_group(*NEW_ROOT, group()).unwrap();
                let groups = GroupDirectory::new(disk.dir("state"));
                groups.commit(group(), &[id(SESSION)]).unwrap();
            }
            Stage::Committed | Stage::Applied => {
                if self.stage == Stage::Committed {
                    let change = match self.strategy {
                        Strategy::Redo => OperationKind::WriteZeroes,
                        _ => OperationKind::Exchange,
                    };
                    let first = Fault::on(change, "images/", 1, FaultKind::PowerLoss);
                    disk.inject(first.repeat(Repeat::Forever));
                }
                let done = session.commit(*NEW_ROOT, &quiet);
                assert_eq!(done.is_ok(), self.stage == Stage::Applied);
            }
        }
        drop(replica);
        disk.snapshot()
    }

    fn open(self, disk: &SimDisk) -> Result<Replica, Error> {
        let groups = GroupDirectory::new(disk.dir("state"));
        self.setup().open_in_group(disk, Some(&groups))
    }

    /// What a user does next, with one file damaged.
    fn survives(self, disk: &SimDisk) -> Result<Harm, String> {
        let looked = inspect(&self.setup().place(disk), &*disk.dir("state"));
        expect_honest(&looked.map(drop))?;
        match self.stage {
            Stage::Staged => self.goes_on(disk),
            Stage::InGroup | Stage::Committed => self.is_decided(disk),
            Stage::Applied => self.goes_back(disk),
        }
    }
}

fn group() -> GroupId {
    GroupId::from_bytes([0x67; 16])
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
    match disk.content(&format!("images/{TARGET}")) {
        Some(found) if found == expected => Ok(()),
        Some(found) if found == *OLD => Err(format!("{when} the target is at its old point")),
        Some(found) if found == *NEW => Err(format!("{when} the target is at its new point")),
        _ => Err(format!("{when} the target is torn")),
    }
}

impl Scene {
    /// Resumed, or begun again where nothing of the session is left: the new point is reached, and the way back.
    fn goes_on(self, disk: &SimDisk) -> Result<Harm, String> {
        let opened = self.open(disk);
        expect_honest(&opened)?;
        expect_at(disk, &OLD, "after opening")?;
        let Ok(mut replica) = opened else {
            return Ok(Harm::Detected);
        };
        let failed = |e: Error| format!("going on: {e:?}");
        let harm = self.synced(&mut replica).map_err(failed)?;
        expect_at(disk, &NEW, "after going on")?;
        replica.rollback(&quiet).map_err(failed)?;
        expect_at(disk, &OLD, "after rolling back")?;
        Ok(harm)
    }

    fn synced(self, replica: &mut Replica) -> Result<Harm, Error> {
        let (setup, target) = (self.setup(), replica.target());
        let mut session = if replica.unfinished().is_some() {
            replica.resume(u64::MAX)?
        } else {
            replica.begin(&setup.plan(SESSION + 1, &NEW))?
        };
        // Where all of it is found, the page with data is; its record comes last.
        let found_all = session.totals().resumed_bytes > 0;
        // Reading back first finds what rotted; it is staged again.
        while let Prepared::Missing(_) = session.prepare()? {
            setup.stage(&mut session, target.as_ref(), &NEW, 9, &mut |_| {})?;
        }
        setup.finish(&mut session, target.as_ref(), &NEW)?;
        let totals = session.totals();
        let staged_again = totals.staged_bytes + totals.zero_bytes > 0;
        session.commit(*NEW_ROOT, &quiet)?;
        Ok(if found_all && !staged_again {
            Harm::None
        } else {
            Harm::Detected
        })
    }

    /// Carried out, taken back, or refused with nothing touched; never half of it.
    fn is_decided(self, disk: &SimDisk) -> Result<Harm, String> {
        let opened = self.open(disk);
        let taken_back = matches!(&opened, Err(error) if error.kind() == ErrorKind::Target);
        if taken_back {
            // Apply met a page that is not what was written: the pre-images brought the target back.
            let again = self.open(disk);
            again.map_err(|e| format!("after the decision was taken back: {e:?}"))?;
            return expect_at(disk, &OLD, "taken back").map(|()| Harm::Detected);
        }
        expect_honest(&opened)?;
        match opened {
            Ok(replica) => {
                expect_at(disk, &NEW, "after the decision was carried out")?;
                rolls_back(disk, replica)
            }
            Err(_) => expect_at(disk, &OLD, "after a refusal").map(|()| Harm::Detected),
        }
    }

    fn goes_back(self, disk: &SimDisk) -> Result<Harm, String> {
        let opened = self.open(disk);
        expect_honest(&opened)?;
        expect_at(disk, &NEW, "after opening")?;
        match opened {
            Ok(replica) => rolls_back(disk, replica),
            Err(_) => Ok(Harm::Detected),
        }
    }
}

fn rolls_back(disk: &SimDisk, mut replica: Replica) -> Result<Harm, String> {
    if replica.point().is_none_or(|p| p.root != *NEW_ROOT) {
        return Err("the point that is named is not the one the target is at".to_owned());
    }
    let back = replica.rollback(&quiet);
    expect_honest(&back)?;
    match back {
        Ok(_) => expect_at(disk, &OLD, "after rolling back").map(|()| Harm::None),
        Err(_) => {
            expect_at(disk, &NEW, "after a way back that is refused").map(|()| Harm::Detected)
        }
    }
}

/// Does `damage` to every one of `cases`, on all processors, and prints how many were detected.
fn rot(
    scene: Scene,
    file: &str,
    what: &str,
    cases: impl Fn(&[u8]) -> Vec<usize>,
    damage: impl Fn(&mut Vec<u8>, usize) + Sync,
) {
    let snapshot = scene.reached();
    let sound = snapshot.after_kill().content(&format!("state/{file}"));
    let sound = sound.unwrap();
    let cases = cases(&sound);
    let (next, detected) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let disk = snapshot.after_kill();
            let mut bytes = sound.clone();
            damage(&mut bytes, *case);
            disk.install("state", file, &bytes);
            let harm = scene
                .survives(&disk)
                .unwrap_or_else(|why| panic!("{scene:?}, {what} {case} of {file}: {why}"));
            detected.fetch_add(usize::from(harm == Harm::Detected), Ordering::Relaxed);
        }
    };
    let workers = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| (0..workers).for_each(|_| drop(scope.spawn(work))));
    let (tried, detected) = (cases.len(), detected.into_inner());
    let harmless = tried - detected;
    let Scene { strategy, stage } = scene;
    println!(
        "{strategy} {stage:?}: {what} of {file}: {tried} tried, {detected} detected, {harmless} harmless"
    );
    assert!(tried > 0);
    // State and group keep everything twice: one bit of it is made up for. A new file holds what its log is about.
    let made_up_for = file != LOG || strategy != Strategy::Redo;
    assert!(detected > 0 || made_up_for);
}

fn flip(bytes: &mut [u8], bit: usize) {
    bytes[bit / 8] ^= 1 << (bit % 8);
}

fn is_blank(sound: &[u8], page: usize) -> bool {
    is_zero(&sound[page * PAGE..(page + 1) * PAGE])
}

/// Which bits of a page are flipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Depth {
    /// Every bit of every field and checksum; a sample of what no code tells apart: payload and padding.
    Fields,
    /// Every bit.
    All,
}

impl Depth {
    /// Bytes at the start of a page in which every field of every structure lies.
    const FIELDS: usize = 320;
    const CHECKSUM: usize = 32;

    fn includes(self, bit: usize) -> bool {
        let byte = bit / 8 % PAGE;
        let in_field = !(Self::FIELDS..PAGE - Self::CHECKSUM).contains(&byte);
        self == Self::All || in_field || byte.is_multiple_of(16) && bit % 8 == byte / 16 % 8
    }
}

/// The bits of every page that was written, one at a time.
fn every_bit(scene: Scene, file: &str, depth: Depth) {
    let written = |sound: &[u8]| {
        let of_page = |bit: &usize| !is_blank(sound, bit / 8 / PAGE) && depth.includes(*bit);
        (0..sound.len() * 8).filter(of_page).collect()
    };
    let what = format!("bits ({depth:?})");
    rot(scene, file, &what, written, |bytes, bit| flip(bytes, bit));
}

/// The bits of the pages of the state that were never written: the same one of all of them at once.
fn every_bit_of_blanks(scene: Scene, depth: Depth) {
    let step = if depth == Depth::All { 1 } else { 127 };
    let of_one_page = |_: &[u8]| (0..PAGE * 8).step_by(step).collect();
    let what = format!("bits of all blank pages ({depth:?})");
    rot(scene, STATE, &what, of_one_page, |bytes, bit| {
        let blanks = bytes.chunks_mut(PAGE).filter(|page| is_zero(page));
        blanks.for_each(|page| flip(page, bit));
    });
}

fn every_length(scene: Scene, file: &str) {
    let lengths = |sound: &[u8]| (0..sound.len()).collect();
    rot(scene, file, "every length", lengths, |bytes, length| {
        bytes.truncate(length);
    });
}

fn of(strategy: Strategy, stage: Stage) -> Scene {
    Scene { strategy, stage }
}

const STAGES: [Stage; 3] = [Stage::Staged, Stage::Committed, Stage::Applied];

fn every_bit_of_logs_without_payload(depth: Depth) {
    for strategy in [Strategy::Clone, Strategy::Shadow] {
        for stage in STAGES {
            every_bit(of(strategy, stage), LOG, depth);
        }
    }
}

fn every_bit_of_states(depth: Depth) {
    for stage in STAGES {
        every_bit(of(Strategy::Redo, stage), STATE, depth);
        every_bit_of_blanks(of(Strategy::Redo, stage), depth);
    }
}

#[test]
fn every_bit_of_a_staged_log_is_detected_or_harmless() {
    assert_eq!(LOG, format!("{}.log.0000", id(SESSION)));
    every_bit(of(Strategy::Redo, Stage::Staged), LOG, Depth::Fields);
}

#[test]
fn every_bit_of_a_committed_log_is_detected_or_harmless() {
    every_bit(of(Strategy::Redo, Stage::Committed), LOG, Depth::Fields);
}

#[test]
fn every_bit_of_the_pre_images_is_detected_or_harmless() {
    every_bit(of(Strategy::Redo, Stage::Applied), LOG, Depth::Fields);
}

#[test]
fn every_bit_of_a_log_without_payload_is_detected_or_harmless() {
    every_bit_of_logs_without_payload(Depth::Fields);
}

#[test]
fn every_bit_of_slots_and_decisions_is_detected_or_harmless() {
    every_bit_of_states(Depth::Fields);
}

#[test]
fn every_bit_and_length_of_a_group_record_is_detected_or_harmless() {
    every_bit(of(Strategy::Redo, Stage::InGroup), GROUP, Depth::Fields);
    every_length(of(Strategy::Redo, Stage::InGroup), GROUP);
}

#[test]
fn every_length_of_log_and_state_is_detected_or_harmless() {
    for stage in STAGES {
        every_length(of(Strategy::Redo, stage), LOG);
        every_length(of(Strategy::Clone, stage), LOG);
        every_length(of(Strategy::Shadow, stage), LOG);
        every_length(of(Strategy::Redo, stage), STATE);
    }
}

#[test]
#[ignore = "four minutes of CPU time: payload, padding and blanks as well, where no code tells one bit from the next"]
fn every_single_bit_is_detected_or_harmless() {
    for stage in STAGES {
        every_bit(of(Strategy::Redo, stage), LOG, Depth::All);
    }
    every_bit_of_logs_without_payload(Depth::All);
    every_bit_of_states(Depth::All);
    every_bit(of(Strategy::Redo, Stage::InGroup), GROUP, Depth::All);
}
