//! Golden files: what format version 1 wrote is read by today's code, and what is damaged is refused as what it is.
//!
//! `tests/fixtures/README.md` tells which file shows what and how they were made. A version that is released is
//! never made again: its files stay as they are, and a new version gets a directory of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockferry::core::{
    BlockSize, Extent, Geometry, ManifestReader, ManifestWriter, RegionIndex, RegionLeaves, Root,
    block_digest, checksum,
};
use blockferry::device::{Evidence, Identity, MemoryDevice};
use blockferry::transfer_log::{
    Batch, ErrorKind, GroupDirectory, GroupId, Old, Place, Plan, Prepared, Recovered, Replica,
    Session, SessionId, SourceStamp, Strategy, frame, inspect,
};
use blockferry_testkit::{OperationKind, SimDisk, SimOptions};
use blockferry_tests::workspace_root;

use crate::strategy_fixtures;

pub(crate) const PAGE: usize = 4096;
/// Pages of a state file. Those at its end that were never written are left out of the fixtures.
const STATE_PAGES: usize = 35;
pub(crate) const SESSION: SessionId = SessionId::from_bytes([0x51; 16]);
const GROUP: GroupId = GroupId::from_bytes([0x67; 16]);
const GROUP_FILE: &str = "67676767676767676767676767676767.group";
pub(crate) const LOG: &str = "51515151515151515151515151515151.log.0000";

/// A disk of pages that are each filled with letters of its own; `.` makes a zero page.
pub(crate) fn disk_of(pages: &str) -> Vec<u8> {
    let page = |letter: u8| match letter {
        b'.' => vec![0; PAGE],
        _ => (0..=255)
            .cycle()
            .take(PAGE)
            .map(|n: u8| letter ^ (n & 7))
            .collect(),
    };
    pages.bytes().flat_map(page).collect()
}

fn old() -> Vec<u8> {
    disk_of("abc.")
}

fn new() -> Vec<u8> {
    disk_of("aB.D")
}

pub(crate) const BLOCK: usize = 8192;

pub(crate) fn geometry_of(image: &[u8]) -> Geometry {
    let block_size = BlockSize::new(BLOCK as u64).expect("a block size");
    Geometry::new(image.len() as u64, block_size)
}

fn leaves_of(image: &[u8]) -> RegionLeaves {
    let mut leaves = RegionLeaves::zero(&geometry_of(image), RegionIndex::new(0));
    for (number, block) in image.chunks(BLOCK).enumerate() {
        leaves.set(number, block_digest(block));
    }
    leaves
}

/// The manifest of an image, and its root.
pub(crate) fn manifest_of(image: &[u8]) -> (Vec<u8>, Root) {
    let mut bytes = Vec::new();
    let mut writer = ManifestWriter::new(geometry_of(image), &mut bytes).expect("memory takes all");
    writer.push(&leaves_of(image)).expect("memory takes all");
    let (root, _) = writer.finish().expect("memory takes all");
    (bytes, root)
}

pub(crate) fn quiet(_: u64, _: u64) {}

/// A replica on a device in memory, whose evidence is its content; its state on a simulated disk.
struct Scene {
    disk: SimDisk,
    device: Arc<MemoryDevice>,
}

impl Scene {
    fn new(content: Vec<u8>, files: &BTreeMap<String, Vec<u8>>) -> Self {
        let identity = Identity::from_bytes(b"golden");
        let device = MemoryDevice::from_bytes("golden", content).with_identity(identity);
        let disk = SimDisk::new(SimOptions::default());
        drop(disk.dir("state"));
        for (name, bytes) in files {
            disk.install("state", name, bytes);
        }
        Self {
            disk,
            device: Arc::new(device),
        }
    }

    fn place(&self) -> Place {
        Place::Device(Arc::clone(&self.device) as Arc<_>)
    }

    fn open(&self) -> blockferry::transfer_log::Result<Replica> {
        let groups = GroupDirectory::new(self.disk.dir("state"));
        Replica::open(self.place(), self.disk.dir("state"), Some(&groups), &quiet)
    }

    /// Stages every page that differs, two records in each group.
    fn stage(&self, session: &mut Session<'_>, compressed: bool, groups: usize) {
        let mut was = vec![0; new().len()];
        was.copy_from_slice(&self.device.to_vec());
        let view = session.staged_view();
        let (stager, mut staged) = (session.stager(), 0);
        for (start, now) in (0..).step_by(PAGE).zip(new().chunks(PAGE)) {
            let extent = Extent::from_range(start as u64..(start + PAGE) as u64);
            let before = &was[start..start + PAGE];
            let mut shown = before.to_vec();
            view.patch(extent, &mut shown).expect("the log is sound");
            if shown == now || staged == groups {
                continue;
            }
            let mut batch: Batch = stager.pages();
            let old = if before.iter().all(|b| *b == 0) {
                Old::Zero
            } else {
                Old::Data(before)
            };
            if now.iter().all(|b| *b == 0) {
                stager.add_zero(&mut batch, extent, old);
            } else {
                stager.add(&mut batch, extent, now, old);
                if compressed {
                    batch.store_frame(&frame::pack(now, 1).expect("there is memory"));
                }
            }
            session.stage(batch).expect("the log takes it");
            session.close_group().expect("the log takes it");
            staged += 1;
        }
    }

    fn state_files(&self) -> BTreeMap<String, Vec<u8>> {
        let names = self.disk.dir("state").names().expect("it can be listed");
        names
            .into_iter()
            .filter(|name| name != "lock")
            .map(|name| {
                let bytes = self.disk.content(&format!("state/{name}"));
                (name, bytes.expect("it was listed"))
            })
            .collect()
    }
}

fn begin(replica: &mut Replica) -> Session<'_> {
    let stamp = SourceStamp::new("source.raw", Identity::unknown(), Evidence::unknown());
    let plan = Plan::new(SESSION, Strategy::Redo, geometry_of(&new()), stamp);
    replica.begin(&plan).expect("nothing is in the way")
}

fn finish(scene: &Scene, session: &mut Session<'_>, compressed: bool) {
    scene.stage(session, compressed, usize::MAX);
    while let Prepared::Missing(_) = session.prepare().expect("the log is sound") {
        scene.stage(session, compressed, usize::MAX);
    }
}

/// The scenes of format version 1, each with the files of its state.
fn make_scene(name: &str) -> BTreeMap<String, Vec<u8>> {
    let scene = Scene::new(old(), &BTreeMap::new());
    let mut replica = scene.open().expect("nothing is there yet");
    let mut session = begin(&mut replica);
    let (manifest, root) = manifest_of(&new());
    let mut file = session.create_manifest().expect("there is room");
    std::io::Write::write_all(&mut file, &manifest).expect("there is room");
    file.finish().expect("there is room");
    match name {
        "staged" => scene.stage(&mut session, false, 2),
        "member" => {
            finish(&scene, &mut session, false);
            session
                .prepare_for_group(root, GROUP)
                .expect("it is complete");
            GroupDirectory::new(scene.disk.dir("state"))
                .commit(GROUP, &[SESSION])
                .expect("there is room");
        }
        "applied" => {
            finish(&scene, &mut session, false);
            session.commit(root, &quiet).expect("nothing fails");
        }
        "committed" | "compressed" => {
            finish(&scene, &mut session, name == "compressed");
            scene.disk.record();
            session.commit(root, &quiet).expect("nothing fails");
            // The first flush of the state makes COMMIT durable; the target is written after it.
            let decided = scene.disk.take_trace().into_iter().find(|boundary| {
                let operation = boundary.operation.as_ref();
                operation.is_some_and(|o| {
                    o.kind == OperationKind::Flush && o.subject.starts_with("state/state")
                })
            });
            let disk = decided.expect("it was decided").snapshot.after_kill();
            return Scene { disk, ..scene }.state_files();
        }
        _ => unreachable!("{name} is no scene"),
    }
    scene.state_files()
}

const SCENES: [&str; 5] = ["staged", "committed", "compressed", "member", "applied"];

pub(crate) fn directory() -> PathBuf {
    workspace_root().join("tests/fixtures")
}

/// The files of a directory; a state file gets the blank pages at its end back.
pub(crate) fn files_in(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries =
        fs::read_dir(directory).unwrap_or_else(|e| panic!("listing {}: {e}", directory.display()));
    entries
        .map(|entry| {
            let entry = entry.expect("it can be listed");
            let mut bytes = fs::read(entry.path()).expect("it can be read");
            let name = entry.file_name().into_string().expect("it is text");
            if name == "state" {
                bytes.resize(STATE_PAGES * PAGE, 0);
            }
            (name, bytes)
        })
        .collect()
}

fn golden(scene: &str) -> BTreeMap<String, Vec<u8>> {
    files_in(&directory().join("replica/v1").join(scene))
}

/// A golden scene with one of its files replaced by the damaged one of this name.
fn damaged(case: &str, scene: &str) -> BTreeMap<String, Vec<u8>> {
    let mut files = golden(scene);
    files.extend(files_in(&directory().join("replica/v1/damaged").join(case)));
    files
}

#[test]
fn a_staged_session_of_version_1_goes_on_and_back() {
    let scene = Scene::new(old(), &golden("staged"));
    let mut replica = scene.open().expect("it is sound");
    assert_eq!(*replica.recovered(), Recovered::Staging);

    let mut session = replica.resume(u64::MAX).expect("it can go on");
    finish(&scene, &mut session, false);
    let staged_bytes = session.totals().staged_bytes;
    session
        .commit(manifest_of(&new()).1, &quiet)
        .expect("nothing fails");

    assert_eq!(scene.device.to_vec(), new());
    assert_eq!(staged_bytes, PAGE as u64, "two of three pages were durable");
    replica.rollback(&quiet).expect("pre-images are kept");
    assert_eq!(scene.device.to_vec(), old());
}

#[test]
fn decisions_of_version_1_are_carried_out() {
    for name in ["committed", "compressed", "member"] {
        let scene = Scene::new(old(), &golden(name));

        let mut replica = scene.open().expect(name);

        assert_eq!(*replica.recovered(), Recovered::Applied(SESSION), "{name}");
        assert_eq!(scene.device.to_vec(), new(), "{name}");
        let point = replica.point().expect(name);
        assert_eq!(point.root, manifest_of(&new()).1, "{name}");
        replica.rollback(&quiet).expect(name);
        assert_eq!(scene.device.to_vec(), old(), "{name}");
    }
}

#[test]
fn a_point_of_version_1_and_its_way_back_are_known() {
    let scene = Scene::new(new(), &golden("applied"));
    let mut replica = scene.open().expect("it is sound");

    assert_eq!(*replica.recovered(), Recovered::Clean);
    let point = replica.point().expect("it is at one").clone();
    assert_eq!((point.id, point.geometry), (SESSION, geometry_of(&new())));
    let manifest = replica
        .manifest_source(&point)
        .open()
        .expect("it is beside it");
    let root = ManifestReader::open(manifest).and_then(|mut m| m.read_to_end());
    assert_eq!(root.expect("it is sound"), point.root);
    replica.rollback(&quiet).expect("pre-images are kept");
    assert_eq!(scene.device.to_vec(), old());
}

#[test]
fn a_manifest_of_version_1_is_read_and_written_alike() {
    let golden = fs::read(directory().join("manifest/v1/small.manifest")).expect("it is there");

    let mut reader = ManifestReader::open(&golden[..]).expect("it is sound");
    let leaves = reader.next_region().expect("it is sound").expect("one");
    let root = reader.read_to_end().expect("it is sound");

    assert_eq!(
        (reader.geometry(), leaves),
        (geometry_of(&new()), leaves_of(&new()))
    );
    assert_eq!((golden, root), manifest_of(&new()));
}

/// Damaged manifests and the kind of error each one is refused with.
const DAMAGED_MANIFESTS: [(&str, blockferry::core::ErrorKind); 6] = {
    use blockferry::core::ErrorKind::{Corrupt, LimitExceeded, Truncated, UnknownVersion};
    [
        ("version-2", UnknownVersion),
        ("header-bit", Corrupt),
        ("digest-bit", Corrupt),
        ("wrong-root", Corrupt),
        ("too-many-digests", LimitExceeded),
        ("cut-short", Truncated),
    ]
};

#[test]
fn damaged_manifests_are_refused_as_what_they_are() {
    for (case, kind) in DAMAGED_MANIFESTS {
        let path = directory().join(format!("manifest/v1/damaged/{case}.manifest"));
        let bytes = fs::read(&path).expect(case);

        let read = ManifestReader::open(&bytes[..]).and_then(|mut m| m.read_to_end());

        assert_eq!(read.expect_err(case).kind(), kind, "{case}");
    }
}

/// Damage that a replica refuses: its name, the scene it befell, the error.
const REFUSED: [(&str, &str, ErrorKind); 6] = [
    ("state-version-2", "applied", ErrorKind::UnknownVersion),
    ("both-slots", "applied", ErrorKind::Corrupt),
    ("log-version-2", "staged", ErrorKind::UnknownVersion),
    ("header-of-decided", "committed", ErrorKind::Corrupt),
    ("record-of-decided", "committed", ErrorKind::Corrupt),
    ("end-of-decided", "compressed", ErrorKind::Corrupt),
];

#[test]
fn damaged_replicas_are_refused_as_what_they_are_and_left_alone() {
    for (case, scene, kind) in REFUSED {
        let content = if scene == "applied" { new() } else { old() };
        let scene = Scene::new(content.clone(), &damaged(case, scene));

        let refused = scene.open();

        assert_eq!(refused.expect_err(case).kind(), kind, "{case}");
        assert_eq!(scene.device.to_vec(), content, "{case}");
    }
}

#[test]
fn a_look_refuses_what_opening_refuses_of_the_state() {
    for (case, scene, kind) in &REFUSED[..3] {
        let scene = Scene::new(new(), &damaged(case, scene));

        let looked = inspect(&scene.place(), &*scene.disk.dir("state"));

        assert_eq!(looked.expect_err(case).kind(), *kind, "{case}");
    }
}

#[test]
fn one_damaged_copy_of_a_decision_or_slot_is_made_up_for() {
    for (case, of) in [
        ("one-decision-copy", "committed"),
        ("newer-slot", "applied"),
        ("one-group-copy", "member"),
    ] {
        let content = if of == "applied" { new() } else { old() };
        let scene = Scene::new(content, &damaged(case, of));

        let replica = scene.open().expect(case);

        assert_eq!(scene.device.to_vec(), new(), "{case}");
        let root = replica.point().map(|p| p.root);
        assert_eq!(root, Some(manifest_of(&new()).1), "{case}");
    }
}

/// Damage to the record of a group, beside the scene `member`: its name, what is done to each copy, the error.
type GroupDamage = (&'static str, fn(&mut [u8]), ErrorKind);

const DAMAGED_GROUPS: [GroupDamage; 2] = [
    ("both-copies", |copy| copy[20] ^= 1, ErrorKind::Corrupt),
    ("version-2", group_of_version_2, ErrorKind::UnknownVersion),
];

fn group_of_version_2(copy: &mut [u8]) {
    copy[8] = 2;
    reseal(copy);
}

fn damaged_group(case: &str) -> PathBuf {
    directory().join("group/v1/damaged").join(case)
}

#[test]
fn damaged_group_records_decide_nothing_and_are_refused_as_what_they_are() {
    for (case, _, kind) in DAMAGED_GROUPS {
        let mut files = golden("member");
        files.extend(files_in(&damaged_group(case)));
        let scene = Scene::new(old(), &files);

        let refused = scene.open();

        assert_eq!(refused.expect_err(case).kind(), kind, "{case}");
        assert_eq!(scene.device.to_vec(), old(), "{case}");
        // Put right, the decision is carried out: nothing was dropped.
        scene.disk.dir("state").remove(GROUP_FILE).expect(case);
        let sound = &golden("member")[GROUP_FILE];
        scene.disk.install("state", GROUP_FILE, sound);
        scene.open().expect(case);
        assert_eq!(scene.device.to_vec(), new(), "{case}");
    }
}

#[test]
fn a_torn_record_of_a_staged_session_is_staged_again() {
    let scene = Scene::new(old(), &damaged("torn-record", "staged"));
    let mut replica = scene.open().expect("it is only torn");

    let mut session = replica.resume(u64::MAX).expect("it can go on");
    finish(&scene, &mut session, false);
    let staged_bytes = session.totals().staged_bytes;
    session
        .commit(manifest_of(&new()).1, &quiet)
        .expect("nothing fails");

    assert_eq!(scene.device.to_vec(), new());
    assert_eq!(
        staged_bytes,
        2 * PAGE as u64,
        "nothing of the two records counts"
    );
}

#[test]
fn rotten_pre_images_are_found_before_a_way_back_is_begun() {
    let scene = Scene::new(new(), &damaged("pre-image", "applied"));
    let mut replica = scene.open().expect("the point is not concerned");

    let refused = replica.rollback(&quiet);

    assert_eq!(refused.expect_err("rotten").kind(), ErrorKind::Corrupt);
    assert_eq!(scene.device.to_vec(), new());
}

/// Puts the checksum of a sealed page right after a field of it was changed.
pub(crate) fn reseal(page: &mut [u8]) {
    let body = page.len() - 32;
    let sum = checksum(&page[..body]);
    page[body..].copy_from_slice(sum.as_bytes());
}

/// Deliberate damage to a golden file: case, scene, file, what is done to it.
pub(crate) type Damage = (&'static str, &'static str, &'static str, fn(&mut Vec<u8>));

const DAMAGES: [Damage; 11] = [
    ("state-version-2", "applied", "state", |state| {
        state[8] = 2;
        reseal(&mut state[..PAGE]);
    }),
    ("both-slots", "applied", "state", |state| {
        state[PAGE + 100] ^= 1;
        state[2 * PAGE + 100] ^= 1;
    }),
    ("newer-slot", "applied", "state", |state| {
        let newer = [1, 2].into_iter().max_by_key(|n| state[n * PAGE + 12]);
        state[newer.expect("there are two") * PAGE + 100] ^= 1;
    }),
    ("log-version-2", "staged", LOG, |log| {
        log[8] = 2;
        reseal(&mut log[..PAGE]);
    }),
    ("torn-record", "staged", LOG, |log| {
        // The first of two: with it, the one that builds on it is gone as well.
        log[PAGE..][..512].fill(0xEE);
    }),
    ("header-of-decided", "committed", LOG, |log| log[30] ^= 4),
    ("record-of-decided", "committed", LOG, |log| {
        log[PAGE + 200] ^= 4;
    }),
    ("end-of-decided", "compressed", LOG, |log| {
        log.truncate(log.len() - PAGE);
    }),
    ("one-decision-copy", "committed", "state", |state| {
        state[3 * PAGE + 40] ^= 1;
    }),
    ("one-group-copy", "member", GROUP_FILE, |group| {
        group[20] ^= 1;
    }),
    ("pre-image", "applied", LOG, |log| {
        // Behind the header of the segment, of the first record and its new page.
        log[3 * PAGE + 77] ^= 1;
    }),
];

pub(crate) fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().expect("it lies in a directory")).expect("made");
    fs::write(path, bytes).unwrap_or_else(|e| panic!("writing {}: {e}", path.display()));
}

/// The bytes as they are committed: without the blank pages at the end of a state file.
pub(crate) fn stored<'a>(name: &str, bytes: &'a [u8]) -> &'a [u8] {
    let pages = bytes.chunks(PAGE).rposition(|p| p.iter().any(|b| *b != 0));
    match pages {
        Some(last) if name == "state" => &bytes[..(last + 1) * PAGE],
        _ => bytes,
    }
}

/// Everything in `tests/fixtures` for the version that this build writes.
fn make_all(directory: &Path) {
    strategy_fixtures::make_all(directory);
    for scene in SCENES {
        for (name, bytes) in make_scene(scene) {
            let path = directory.join("replica/v1").join(scene).join(&name);
            write(&path, stored(&name, &bytes));
        }
    }
    for (case, scene, name, damage) in DAMAGES {
        let mut bytes = make_scene(scene).remove(name).expect(case);
        damage(&mut bytes);
        let path = directory.join("replica/v1/damaged").join(case).join(name);
        write(&path, stored(name, &bytes));
    }
    for (case, damage, _) in DAMAGED_GROUPS {
        let mut record = make_scene("member").remove(GROUP_FILE).expect(case);
        record.chunks_mut(PAGE).for_each(damage);
        let damaged = directory.join("group/v1/damaged").join(case);
        write(&damaged.join(GROUP_FILE), &record);
    }
    let (manifest, _) = manifest_of(&new());
    write(&directory.join("manifest/v1/small.manifest"), &manifest);
    for (case, _) in DAMAGED_MANIFESTS {
        let path = directory.join(format!("manifest/v1/damaged/{case}.manifest"));
        write(&path, &damaged_manifest(case, manifest.clone()));
    }
}

fn damaged_manifest(case: &str, mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.len();
    match case {
        "version-2" => bytes[8] = 2,
        "header-bit" => bytes[17] ^= 1,
        "digest-bit" => bytes[48 + 50] ^= 1,
        "wrong-root" => {
            bytes[end - 40] ^= 1;
            let sum = checksum(&bytes[end - 56..end - 8]);
            bytes[end - 8..].copy_from_slice(&sum.as_bytes()[..8]);
        }
        "too-many-digests" => bytes[48 + 5] = 2,
        "cut-short" => bytes.truncate(end - 1),
        _ => unreachable!("{case} is no case"),
    }
    bytes
}

#[test]
#[ignore = "writes the golden files; only for a format version that was never released"]
fn make_golden_files() {
    make_all(&directory());
}

#[test]
fn todays_code_still_writes_what_version_1_wrote() {
    let fresh = tempfile::tempdir().expect("a directory");

    make_all(fresh.path());

    let names_below = |top: &Path| -> BTreeSet<PathBuf> {
        let relative = |path: PathBuf| path.strip_prefix(top).map(Path::to_path_buf);
        let names = files_below(top).into_iter().map(relative);
        names.collect::<Result<_, _>>().expect("it lies there")
    };
    let mut committed = names_below(&directory());
    committed.remove(Path::new("README.md"));
    assert_eq!(names_below(fresh.path()), committed);
    for name in committed {
        let golden = fs::read(directory().join(&name)).expect("it is committed");
        let today = fs::read(fresh.path().join(&name)).expect("just written");
        assert!(golden == today, "{} has changed", name.display());
    }
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).expect("it can be listed");
    let paths = entries.map(|entry| entry.expect("it can be listed").path());
    paths
        .flat_map(|path| {
            if path.is_dir() {
                files_below(&path)
            } else {
                vec![path]
            }
        })
        .collect()
}
