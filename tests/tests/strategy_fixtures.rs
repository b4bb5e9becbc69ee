//! Golden files of the strategies on a file: what version 1 wrote is resumed, carried out and rolled back by today's
//! code to exactly the right image, and what is damaged is refused as what it is.
//!
//! The log of a session names files by their numbers, and its target by what proves it unwritten. So each scene has a
//! file `images` that tells of every file beside the target: name, number, changes it has seen, size, and a letter for
//! each page. [`install`] makes a simulated machine on which all of that is true. Images cost no bytes this way.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt::Write as _;
use std::path::Path;

use blockferry::core::{Extent, block_digest, is_zero};
use blockferry::device::{Evidence, Identity};
use blockferry::transfer_log::{
    Batch, Error, ErrorKind, Old, Place, Plan, Prepared, Recovered, Replica, Session, SourceStamp,
    Strategy, Undo,
};
use blockferry_testkit::{Boundary, OperationKind, SimDisk, SimOptions};

use crate::fixtures::{
    BLOCK, LOG, PAGE, SESSION, directory, disk_of, files_in, geometry_of, manifest_of, quiet,
    reseal, stored, write,
};

const TARGET: &str = "disk.raw";
/// The file of a scene that tells of the images.
const IMAGES: &str = "images";

/// A sync of one strategy: from which image to which, a letter for each page.
#[derive(Debug)]
struct Story {
    name: &'static str,
    strategy: Strategy,
    undo: Undo,
    old: (&'static str, usize),
    new: (&'static str, usize),
    /// Of its new content, how much the scene `staged` has not staged yet.
    missing_bytes: u64,
}

/// The file gets smaller: its log has pre-images of what is cut off, the last one shorter than a page.
const REDO: Story = Story {
    name: "redo-file",
    strategy: Strategy::Redo,
    undo: Undo::Keep,
    old: ("abcd", 4 * PAGE - 1000),
    new: ("aB", 2 * PAGE),
    missing_bytes: PAGE as u64,
};

const CLONE: Story = Story {
    name: "clone",
    strategy: Strategy::Clone,
    undo: Undo::Keep,
    old: ("abc.", 4 * PAGE),
    new: ("aB.D", 4 * PAGE),
    missing_bytes: PAGE as u64,
};

const SHADOW: Story = Story {
    name: "shadow",
    strategy: Strategy::Shadow,
    missing_bytes: BLOCK as u64,
    ..CLONE
};

/// In place: the old point is given up.
const DIRECT: Story = Story {
    name: "direct",
    strategy: Strategy::Direct,
    undo: Undo::None,
    ..SHADOW
};

const STORIES: [Story; 4] = [REDO, CLONE, SHADOW, DIRECT];

/// One group staged; decided, nothing carried out; at the new point; the way back decided and half gone.
const STATES: [&str; 4] = ["staged", "committed", "applied", "rolling-back"];

type Files = BTreeMap<String, Vec<u8>>;

impl Story {
    fn old_image(&self) -> Vec<u8> {
        cut(self.old)
    }

    fn new_image(&self) -> Vec<u8> {
        cut(self.new)
    }

    fn keeps_old(&self) -> bool {
        self.undo == Undo::Keep
    }

    fn states(&self) -> &'static [&'static str] {
        &STATES[..if self.keeps_old() { 4 } else { 3 }]
    }

    fn golden(&self, state: &str) -> Files {
        files_in(&directory().join(self.name).join("v1").join(state))
    }

    /// A golden scene with its log replaced by the damaged one of this name.
    fn damaged(&self, case: &Case) -> Files {
        let mut files = self.golden(case.state);
        let damaged = Path::new(self.name).join("v1/damaged").join(case.name);
        files.extend(files_in(&directory().join(damaged)));
        files
    }

    fn open(&self, disk: &SimDisk) -> blockferry::transfer_log::Result<Replica> {
        let (dir, name) = (disk.dir("images"), TARGET.to_owned());
        Replica::open(Place::File { dir, name }, disk.dir("state"), None, &quiet)
    }

    fn begin<'a>(&self, replica: &'a mut Replica) -> Session<'a> {
        let stamp = SourceStamp::new("source.raw", Identity::unknown(), Evidence::unknown());
        let mut plan = Plan::new(
            SESSION,
            self.strategy,
            geometry_of(&self.new_image()),
            stamp,
        );
        plan.undo = self.undo;
        replica.begin(&plan).expect("nothing is in the way")
    }

    /// What is not staged yet, a page or block in each group; at most `groups` of them.
    fn stage(&self, session: &mut Session<'_>, was: &[u8], groups: usize) {
        let batches = match self.strategy {
            Strategy::Redo | Strategy::Clone => self.changed_pages(session, was),
            Strategy::Shadow | Strategy::Direct => self.missing_blocks(session, groups),
        };
        for batch in batches.into_iter().take(groups) {
            session.stage(batch).expect("the log takes it");
            session.close_group().expect("the log takes it");
        }
    }

    fn changed_pages(&self, session: &Session<'_>, was: &[u8]) -> Vec<Batch> {
        let (new, view, stager) = (self.new_image(), session.staged_view(), session.stager());
        let wants_old = session.keeps_old() && stager.wants_old();
        let mut batches = Vec::new();
        let first_cut = new.len() / PAGE * PAGE;
        let cut_off = Extent::from_range(first_cut as u64..was.len() as u64);
        let cuts = wants_old && new.len() < was.len();
        if cuts && !session.has_pre_image(cut_off) {
            let mut batch = stager.pages();
            stager.add_cut_off(&mut batch, cut_off, Old::Data(&was[first_cut..]));
            batches.push(batch);
        }
        for (start, now) in (0..).step_by(PAGE).zip(new.chunks(PAGE)) {
            let extent = Extent::from_range(start as u64..(start + now.len()) as u64);
            let before = &was[start..start + now.len()];
            let mut shown = before.to_vec();
            view.patch(extent, &mut shown).expect("the log is sound");
            if shown == now {
                continue;
            }
            // The page across the new end has its pre-image with what is cut off.
            let old = match wants_old && !(cuts && start >= first_cut) {
                false => Old::None,
                true if is_zero(before) => Old::Zero,
                true => Old::Data(before),
            };
            let mut batch = stager.pages();
            if is_zero(now) {
                stager.add_zero(&mut batch, extent, old);
            } else {
                stager.add(&mut batch, extent, now, old);
            }
            batches.push(batch);
        }
        batches
    }

    /// Writes them to the working file, no more than `most`.
    fn missing_blocks(&self, session: &Session<'_>, most: usize) -> Vec<Batch> {
        let (new, view, stager) = (self.new_image(), session.staged_view(), session.stager());
        let blocks = (0..).step_by(BLOCK).zip(new.chunks(BLOCK));
        let missing = blocks.filter_map(|(start, now)| {
            let extent = Extent::from_range(start as u64..(start + now.len()) as u64);
            let digest = block_digest(now);
            let staged = view.digest_of(extent).expect("the log is sound");
            (staged != Some(digest)).then_some((extent, now, digest))
        });
        let write = |(extent, now, digest)| {
            let mut batch = stager.blocks();
            stager
                .write_blocks(&mut batch, extent, now, &[digest], Old::None)
                .expect("the working file takes it");
            batch
        };
        missing.take(most).map(write).collect()
    }

    /// Goes on to the new point; returns how much of its content was staged for that.
    fn finish(&self, mut session: Session<'_>, was: &[u8]) -> u64 {
        self.stage_all(&mut session, was);
        let staged_bytes = session.totals().staged_bytes;
        let root = manifest_of(&self.new_image()).1;
        session.commit(root, &quiet).expect("nothing fails");
        staged_bytes
    }

    fn stage_all(&self, session: &mut Session<'_>, was: &[u8]) {
        self.stage(session, was, usize::MAX);
        while let Prepared::Missing(_) = session.prepare().expect("the log is sound") {
            self.stage(session, was, usize::MAX);
        }
    }

    /// Rolls back, or is told that nothing was kept.
    fn expect_way_back(&self, disk: &SimDisk, replica: &mut Replica, when: &str) {
        let name = self.name;
        match replica.rollback(&quiet) {
            Ok(_) => {
                assert!(self.keeps_old(), "{name} {when}");
                assert!(content(disk) == self.old_image(), "{name} {when}");
                assert_eq!(beside(disk), [TARGET], "{name} {when}");
            }
            Err(error) => {
                assert!(!self.keeps_old(), "{name} {when}: {error:?}");
                assert_eq!(error.kind(), ErrorKind::Refused, "{name} {when}");
                assert!(content(disk) == self.new_image(), "{name} {when}");
            }
        }
    }
}

fn cut((letters, bytes): (&str, usize)) -> Vec<u8> {
    let mut image = disk_of(letters);
    image.truncate(bytes);
    image
}

fn content(disk: &SimDisk) -> Vec<u8> {
    let path = format!("images/{TARGET}");
    disk.content(&path).expect("the target is there")
}

fn beside(disk: &SimDisk) -> Vec<String> {
    disk.dir("images").names().expect("it can be listed")
}

/// The files that a story leaves in one of its states.
fn make(story: &Story, state: &str) -> Files {
    let disk = SimDisk::new(SimOptions::default());
    let old = story.old_image();
    disk.install_sparse("images", TARGET, &old);
    drop(disk.dir("state"));
    let mut replica = story.open(&disk).expect("nothing is there yet");
    let mut session = story.begin(&mut replica);
    let mut file = session.create_manifest().expect("there is room");
    let (manifest, root) = manifest_of(&story.new_image());
    std::io::Write::write_all(&mut file, &manifest).expect("there is room");
    file.finish().expect("there is room");
    if state == "staged" {
        story.stage(&mut session, &old, 1);
        return files_of(&disk);
    }
    story.stage_all(&mut session, &old);
    disk.record();
    session.commit(root, &quiet).expect("nothing fails");
    let committing = disk.take_trace();
    let moment = match state {
        "committed" => &committing[first_flush_of_state(&committing)],
        "applied" => return files_of(&disk),
        _ => {
            disk.record();
            replica.rollback(&quiet).expect("the old point is kept");
            return files_of(&half_way_back(&disk.take_trace()));
        }
    };
    files_of(&moment.snapshot.after_kill())
}

/// What makes a decision durable.
fn first_flush_of_state(trace: &[Boundary]) -> usize {
    let is_flush = |boundary: &Boundary| {
        let operation = boundary.operation.as_ref();
        operation
            .is_some_and(|o| o.kind == OperationKind::Flush && o.subject.starts_with("state/state"))
    };
    trace.iter().position(is_flush).expect("it was decided")
}

/// After the first change of the target that follows the decision.
fn half_way_back(trace: &[Boundary]) -> SimDisk {
    let decided = first_flush_of_state(trace);
    let is_change = |boundary: &&Boundary| {
        let operation = boundary.operation.as_ref();
        operation.is_some_and(|o| o.subject.starts_with("images/"))
    };
    let moment = trace[decided..].iter().find(is_change);
    moment.expect("the target changes").snapshot.after_kill()
}

fn files_of(disk: &SimDisk) -> Files {
    let state = disk.dir("state").names().expect("it can be listed");
    let mut files: Files = state
        .into_iter()
        .filter(|name| name != "lock")
        .map(|name| {
            let bytes = disk.content(&format!("state/{name}"));
            (name, bytes.expect("it was listed"))
        })
        .collect();
    files.insert(IMAGES.to_owned(), describe(disk).into_bytes());
    files
}

/// A line for each file beside the target, in the order of their numbers.
fn describe(disk: &SimDisk) -> String {
    let names = beside(disk);
    let by_number: BTreeMap<u64, String> = names
        .into_iter()
        .map(|n| (number_of(disk, &n), n))
        .collect();
    let mut text = String::from("# name, number, changes, bytes, letters of its pages\n");
    for (number, name) in by_number {
        let bytes = disk
            .content(&format!("images/{name}"))
            .expect("it is there");
        let (changes, length) = (changes_of(disk, &name), bytes.len());
        let letters: String = bytes.chunks(PAGE).map(letter_of).collect();
        writeln!(text, "{name} {number} {changes} {length} {letters}").expect("a string grows");
    }
    text
}

fn letter_of(page: &[u8]) -> char {
    let is_it = |letter: &char| disk_of(&letter.to_string()).starts_with(page);
    let found = ".abcdABCD".chars().find(is_it);
    found.expect("every page has a letter")
}

fn number_of(disk: &SimDisk, name: &str) -> u64 {
    let file = disk.dir("images").open(name).expect("it can be opened");
    let file = file.expect("it is there");
    file.file_id().expect("it has a number")
}

/// How often the file has changed: the second number in what proves it unwritten.
fn changes_of(disk: &SimDisk, name: &str) -> u64 {
    let file = disk.dir("images").open(name).expect("it can be opened");
    let evidence = file.expect("it is there").evidence().expect("it has some");
    let changes = evidence.as_bytes()[8..16].try_into();
    u64::from_le_bytes(changes.expect("eight bytes"))
}

/// The machine on which a scene was left: files beside the target have their numbers and have seen their changes.
fn install(files: &Files) -> SimDisk {
    let disk = SimDisk::new(SimOptions::default());
    let images = std::str::from_utf8(&files[IMAGES]).expect("it is text");
    for line in images.lines().filter(|line| !line.starts_with('#')) {
        let [name, number, changes, bytes, letters] =
            line.split(' ').collect::<Vec<_>>().try_into().expect(line);
        let count = |text: &str| text.parse::<u64>().expect(line);
        let bytes = cut((letters, usize::try_from(count(bytes)).expect(line)));
        // Numbers are given in turn.
        while number_if_there(&disk, name) != Some(count(number)) {
            disk.install_sparse("images", name, &bytes);
        }
        let file = disk.dir("images").open(name).expect(line).expect(line);
        let file = file.into_target();
        while changes_of(&disk, name) < count(changes) {
            file.write_at(0, &bytes[..PAGE]).expect("there is room");
        }
        file.flush().expect("nothing fails");
    }
    for (name, bytes) in files.iter().filter(|(name, _)| *name != IMAGES) {
        disk.install("state", name, bytes);
    }
    disk
}

fn number_if_there(disk: &SimDisk, name: &str) -> Option<u64> {
    beside(disk)
        .contains(&name.to_owned())
        .then(|| number_of(disk, name))
}

#[test]
fn staged_sessions_of_every_strategy_go_on_where_version_1_stopped() {
    for story in STORIES {
        let name = story.name;
        let disk = install(&story.golden("staged"));
        let was = content(&disk);
        let mut replica = story.open(&disk).expect(name);
        assert_eq!(*replica.recovered(), Recovered::Staging, "{name}");
        assert!(was == story.old_image() || !story.keeps_old(), "{name}");
        assert!(content(&disk) == was, "opening changes nothing: {name}");

        let session = replica.resume(u64::MAX).expect(name);
        let staged_bytes = story.finish(session, &was);

        assert!(content(&disk) == story.new_image(), "{name}");
        assert_eq!(staged_bytes, story.missing_bytes, "{name}");
        story.expect_way_back(&disk, &mut replica, "after going on");
    }
}

#[test]
fn decisions_of_every_strategy_are_carried_out() {
    for story in STORIES {
        let name = story.name;
        let disk = install(&story.golden("committed"));

        let mut replica = story.open(&disk).expect(name);

        assert_eq!(*replica.recovered(), Recovered::Applied(SESSION), "{name}");
        assert!(content(&disk) == story.new_image(), "{name}");
        let point = replica.point().map(|p| p.root);
        assert_eq!(point, Some(manifest_of(&story.new_image()).1), "{name}");
        story.expect_way_back(&disk, &mut replica, "after the decision");
    }
}

#[test]
fn points_of_every_strategy_are_known_and_lead_back() {
    for story in STORIES {
        let name = story.name;
        let disk = install(&story.golden("applied"));

        let mut replica = story.open(&disk).expect(name);

        assert_eq!(*replica.recovered(), Recovered::Clean, "{name}");
        assert!(content(&disk) == story.new_image(), "{name}");
        assert_eq!(replica.retained().is_some(), story.keeps_old(), "{name}");
        story.expect_way_back(&disk, &mut replica, "from a point at rest");
    }
}

#[test]
fn a_way_back_that_version_1_decided_is_finished() {
    for story in STORIES.iter().filter(|s| s.keeps_old()) {
        let name = story.name;
        let disk = install(&story.golden("rolling-back"));

        let replica = story.open(&disk).expect(name);

        let done = Recovered::RolledBack(SESSION);
        assert_eq!(*replica.recovered(), done, "{name}");
        assert!(content(&disk) == story.old_image(), "{name}");
        assert_eq!(beside(&disk), [TARGET], "{name}");
        assert_eq!(
            (replica.point(), replica.retained()),
            (None, None),
            "{name}"
        );
    }
}

/// Deliberate damage to the log of a scene.
struct Case {
    name: &'static str,
    story: Story,
    state: &'static str,
    damage: fn(Vec<u8>) -> Vec<u8>,
}

const fn case(
    name: &'static str,
    story: Story,
    state: &'static str,
    damage: fn(Vec<u8>) -> Vec<u8>,
) -> Case {
    Case {
        name,
        story,
        state,
        damage,
    }
}

/// What is torn, and how much is staged for the new point then. A clone is compared with the file it writes, which has
/// the page that the record was about.
const TORN: [(Case, usize); 3] = [
    (case("torn-record", CLONE, "staged", tear_record), PAGE),
    (
        case("torn-record", SHADOW, "staged", tear_record),
        2 * BLOCK,
    ),
    (
        case("torn-record", DIRECT, "staged", tear_record),
        2 * BLOCK,
    ),
];

/// Damage that opening refuses, and how.
const REFUSED: [(Case, ErrorKind, &str); 6] = [
    (
        case("unknown-strategy", CLONE, "committed", set_strategy),
        ErrorKind::Corrupt,
        "is decided but its log is gone or cannot be read",
    ),
    (
        case("unknown-strategy", SHADOW, "rolling-back", set_strategy),
        ErrorKind::Corrupt,
        "is decided but its log is gone or cannot be read",
    ),
    (
        case("unknown-strategy", DIRECT, "committed", set_strategy),
        ErrorKind::Corrupt,
        "is decided but its log is gone or cannot be read",
    ),
    (
        case("another-new-file", CLONE, "committed", name_another_new),
        ErrorKind::DecisionPending,
        "is not the file that the session wrote",
    ),
    (
        case("another-old-file", SHADOW, "committed", name_another_old),
        ErrorKind::DecisionPending,
        "is neither the old file nor the new one",
    ),
    (
        case("short-of-records", REDO, "committed", lose_last_record),
        ErrorKind::Corrupt,
        "records",
    ),
];

const ANOTHER_STAGED: Case = case("another-new-file", SHADOW, "staged", name_another_new);

/// Damage that only the way back meets, and how that is refused.
const NO_WAY_BACK: [(Case, &str); 3] = [
    (
        case("cut-off", REDO, "applied", rot_cut_off),
        "digest mismatch",
    ),
    (
        case("another-old-file", CLONE, "applied", name_another_old),
        "is not the old file any more",
    ),
    (
        case("unknown-strategy", SHADOW, "applied", set_strategy),
        "is gone",
    ),
];

fn cases() -> Vec<Case> {
    let refused = REFUSED.into_iter().map(|(case, ..)| case);
    let no_way_back = NO_WAY_BACK.into_iter().map(|(case, _)| case);
    let torn = TORN.into_iter().map(|(case, _)| case);
    let all = torn.chain(refused).chain(no_way_back);
    all.chain([ANOTHER_STAGED]).collect()
}

/// The header of the first record.
fn tear_record(mut log: Vec<u8>) -> Vec<u8> {
    log[PAGE..][..512].fill(0xEE);
    log
}

/// The second page of what is cut off, behind the headers of segment and record.
fn rot_cut_off(mut log: Vec<u8>) -> Vec<u8> {
    log[3 * PAGE + 5] ^= 1;
    log
}

fn lose_last_record(mut log: Vec<u8>) -> Vec<u8> {
    // It ends with its header, its new page and its old one.
    log.truncate(log.len() - 3 * PAGE);
    log
}

fn set_strategy(mut log: Vec<u8>) -> Vec<u8> {
    // Behind magic, version, session and epoch.
    log[8 + 4 + 16 + 8] = 9;
    reseal(&mut log[..PAGE]);
    log
}

fn name_another_old(mut log: Vec<u8>) -> Vec<u8> {
    let place = file_ids(&log);
    log[place + 1] ^= 64;
    reseal(&mut log[..PAGE]);
    log
}

fn name_another_new(mut log: Vec<u8>) -> Vec<u8> {
    let place = file_ids(&log) + 9;
    log[place + 1] ^= 64;
    reseal(&mut log[..PAGE]);
    log
}

/// Where the header has the optional numbers of the old file and of the new one, 9 bytes each.
fn file_ids(log: &[u8]) -> usize {
    // The sizes follow strategy, undo and mode; no session here has a base.
    let evidence = 36 + 3 + 3 * 8 + 1;
    let place = evidence + 2 + usize::from(log[evidence]);
    assert_eq!((log[place], log[place + 9]), (1, 1), "both are there");
    place
}

fn text_of(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        write!(text, ": {next}").expect("a string grows");
        cause = next.source();
    }
    text
}

/// All files beside the target.
fn images_of(disk: &SimDisk) -> Vec<(String, Option<Vec<u8>>)> {
    let content = |name: String| (disk.content(&format!("images/{name}")), name);
    let files = beside(disk).into_iter().map(content);
    files.map(|(bytes, name)| (name, bytes)).collect()
}

#[test]
fn torn_records_of_a_working_file_are_staged_again() {
    for (case, expected_bytes) in TORN {
        let (story, name) = (&case.story, case.story.name);
        let disk = install(&story.damaged(&case));
        let was = content(&disk);
        let mut replica = story.open(&disk).expect("it is only torn");

        let session = replica.resume(u64::MAX).expect(name);
        let staged_bytes = story.finish(session, &was);

        assert!(content(&disk) == story.new_image(), "{name}");
        assert_eq!(staged_bytes, expected_bytes as u64, "{name}");
        story.expect_way_back(&disk, &mut replica, "after going on");
    }
}

#[test]
fn damaged_logs_of_decided_sessions_are_refused_and_nothing_is_touched() {
    for (case, kind, text) in REFUSED {
        let what = format!("{} of {}", case.name, case.story.name);
        let disk = install(&case.story.damaged(&case));
        let before = images_of(&disk);

        let refused = case.story.open(&disk).expect_err(&what);

        assert_eq!(refused.kind(), kind, "{what}: {refused:?}");
        assert!(text_of(&refused).contains(text), "{what}: {refused:?}");
        assert!(images_of(&disk) == before, "{what}");
    }
}

#[test]
fn a_session_that_wrote_another_file_does_not_go_on_and_can_be_cancelled() {
    let story = &ANOTHER_STAGED.story;
    let disk = install(&story.damaged(&ANOTHER_STAGED));
    let mut replica = story.open(&disk).expect("nothing is decided");

    let refused = replica.resume(u64::MAX).expect_err("it is another file");

    assert_eq!(refused.kind(), ErrorKind::Refused);
    let text = "is not what the unfinished session was compared with";
    assert!(refused.to_string().contains(text), "{refused:?}");
    assert!(content(&disk) == story.old_image());
    replica.cancel().expect("it can be cancelled");
    assert_eq!(beside(&disk), [TARGET]);
    assert!(content(&disk) == story.old_image());
}

#[test]
fn damage_to_the_old_point_of_a_file_is_found_before_a_way_back_is_begun() {
    for (case, text) in NO_WAY_BACK {
        let what = format!("{} of {}", case.name, case.story.name);
        let disk = install(&case.story.damaged(&case));
        let mut replica = case.story.open(&disk).expect(&what);
        let before = images_of(&disk);

        let refused = replica.rollback(&quiet).expect_err(&what);

        assert_eq!(refused.kind(), ErrorKind::Corrupt, "{what}: {refused:?}");
        assert!(text_of(&refused).contains(text), "{what}: {refused:?}");
        assert!(images_of(&disk) == before, "{what}");
        assert!(content(&disk) == case.story.new_image(), "{what}");
    }
}

/// Everything of `tests/fixtures` that is told here.
pub(crate) fn make_all(directory: &Path) {
    for story in STORIES {
        for state in story.states() {
            for (name, bytes) in make(&story, state) {
                let path = directory.join(story.name).join("v1").join(state);
                write(&path.join(&name), stored(&name, &bytes));
            }
        }
    }
    for case in cases() {
        let log = make(&case.story, case.state).remove(LOG).expect(case.name);
        let path = directory.join(case.story.name).join("v1/damaged");
        write(&path.join(case.name).join(LOG), &(case.damage)(log));
    }
}
