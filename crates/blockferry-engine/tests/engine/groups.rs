//! Several disks, one cut (I12): whatever happens to one of them, and whenever the power fails, all are at the same.

use std::sync::Arc;
use std::thread;

use blockferry_device::BlockSource;
use blockferry_engine::{
    Context, ErrorKind, GroupDirectory, Member, Mode, Place, Receipt, Result, Strategy,
    SyncOptions, Target, serve_source, sync_group,
};
use blockferry_testkit::{ImageLimits, SimDisk, SimOptions};
use blockferry_transport::{Connection, Deadlines, Link};

use crate::harness::{Source, block_size, edited, image, options};
use crate::remote::cut_after;

const BYTES: u64 = 96 << 10;
const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];

/// Three disks of one machine; the last of them never changes.
struct Group {
    disk: SimDisk,
    old: Vec<Vec<u8>>,
    new: Vec<Vec<u8>>,
}

impl Group {
    fn new() -> Self {
        let disk = SimDisk::new(SimOptions::default());
        let old: Vec<Vec<u8>> = (1..=3).map(|seed| image(seed, BYTES)).collect();
        for (name, bytes) in DISKS.iter().zip(&old) {
            disk.install_sparse("home", name, bytes);
            drop(disk.dir(&format!("state-{name}")));
        }
        drop(disk.dir("job"));
        let mut new: Vec<Vec<u8>> = (1u64..)
            .zip(&old)
            .map(|(seed, old)| edited(seed, old, BYTES, 300))
            .collect();
        new[2].clone_from(&old[2]);
        Self { disk, old, new }
    }

    fn sync(&self, sources: &[Arc<Source>]) -> Result<Vec<Receipt>> {
        sync_on(&self.disk, sources)
    }

    fn sources(&self) -> Vec<Arc<Source>> {
        self.new.iter().map(|new| Source::new(&new[..])).collect()
    }

    /// What the disks hold after each of them was opened: all the old content, or all the new one.
    fn assert_one_cut(&self, disk: &SimDisk) -> bool {
        let directory = GroupDirectory::new(disk.dir("job"));
        for name in DISKS {
            drop(open(disk, name, &directory));
        }
        let found: Vec<Vec<u8>> = DISKS
            .iter()
            .map(|name| disk.content(&format!("home/{name}")).unwrap())
            .collect();
        assert!(found == self.old || found == self.new, "a torn group");
        found == self.new
    }
}

fn redo() -> SyncOptions {
    options(|o| {
        o.block_size = block_size(4096);
        o.mode = Mode::Delta;
        o.strategy = Some(Strategy::Redo);
        o.threads = Some(1);
    })
}

fn open(disk: &SimDisk, name: &str, directory: &GroupDirectory) -> Target {
    let place = Place::File {
        dir: disk.dir("home"),
        name: name.to_owned(),
    };
    let state = disk.dir(&format!("state-{name}"));
    Target::from_group_member(place, state, Some(directory)).unwrap()
}

fn sync_on(disk: &SimDisk, sources: &[Arc<Source>]) -> Result<Vec<Receipt>> {
    let directory = GroupDirectory::new(disk.dir("job"));
    let mut targets: Vec<Target> = DISKS
        .iter()
        .map(|name| open(disk, name, &directory))
        .collect();
    let members = targets.iter_mut().zip(sources).map(|(target, source)| {
        source.count_from_now();
        let source = Arc::<Source>::clone(source) as Arc<dyn BlockSource>;
        Member::new(source, target, redo(), Context::default())
    });
    sync_group(members.collect(), &directory)
}

#[test]
fn all_disks_of_a_group_move_together_and_its_record_goes() {
    let group = Group::new();

    let receipts = group.sync(&group.sources()).unwrap();

    let outcomes: Vec<&str> = receipts.iter().map(|r| r.outcome.as_ref()).collect();
    assert_eq!(outcomes, ["applied", "applied", "identical"]);
    assert!(group.assert_one_cut(&group.disk));
    assert_eq!(group.disk.dir("job").names().unwrap(), Vec::<String>::new());
}

#[test]
fn a_disk_that_fails_keeps_the_others_where_they_were_and_is_the_one_that_is_named() {
    for failing in 0..3 {
        let group = Group::new();
        let sources = group.sources();
        sources[failing].count_from_now();
        sources[failing].fail_from(1);

        let error = group.sync(&sources).unwrap_err();

        assert_eq!(error.kind(), ErrorKind::Source, "{error}");
        assert!(!group.assert_one_cut(&group.disk));
        sources[failing].heal();
        group.sync(&sources).unwrap();
        assert!(group.assert_one_cut(&group.disk));
    }
}

/// As `sync_on`, but the first of the disks come from peers over these links. What their sides were told is the second.
fn sync_from_peers(
    disk: &SimDisk,
    sources: &[Arc<Source>],
    links: Vec<(Link, Link)>,
) -> (Result<Vec<Receipt>>, Vec<Result<Vec<u8>>>) {
    let directory = GroupDirectory::new(disk.dir("job"));
    let mut targets: Vec<Target> = DISKS
        .iter()
        .map(|name| open(disk, name, &directory))
        .collect();
    let (mut members, mut serving) = (Vec::new(), Vec::new());
    let mut links = links.into_iter();
    for (target, source) in targets.iter_mut().zip(sources) {
        let source = Arc::<Source>::clone(source) as Arc<dyn BlockSource>;
        let Some((here, there)) = links.next() else {
            members.push(Member::new(source, target, redo(), Context::default()));
            continue;
        };
        serving.push(thread::spawn(move || {
            let connection = Connection::open(there, Deadlines::default()).unwrap();
            serve_source(&source, connection, 1, &Context::default())
        }));
        let connection = Connection::open(here, Deadlines::default()).unwrap();
        members.push(Member::from_peer(
            connection,
            target,
            redo(),
            Context::default(),
        ));
    }
    let outcome = sync_group(members, &directory);
    let told = serving.into_iter().map(|serving| serving.join().unwrap());
    (outcome, told.collect())
}

#[test]
fn disks_of_a_group_that_come_from_other_machines_are_at_the_same_cut() {
    for peers in 1..=3 {
        let group = Group::new();
        let links = (0..peers).map(|_| Link::pair().unwrap()).collect();

        let (outcome, told) = sync_from_peers(&group.disk, &group.sources(), links);

        let receipts = outcome.unwrap();
        assert!(group.assert_one_cut(&group.disk), "{peers} peers");
        assert_eq!(told.len(), peers);
        for (receipt, told) in receipts.iter().zip(told) {
            let told: Receipt = serde_json::from_slice(&told.unwrap()).unwrap();
            assert_eq!(told.sync_point, receipt.sync_point);
        }
        assert_eq!(group.disk.dir("job").names().unwrap(), Vec::<String>::new());
    }
}

#[test]
fn a_peer_that_is_cut_off_keeps_all_disks_of_the_group_where_they_were() {
    for after in [300, 6000] {
        let group = Group::new();
        let sources = group.sources();
        let links = vec![Link::pair().unwrap(), cut_after(after)];

        let (outcome, told) = sync_from_peers(&group.disk, &sources, links);

        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Peer, "{error}");
        assert!(!group.assert_one_cut(&group.disk));
        let told: Vec<ErrorKind> = told
            .iter()
            .map(|t| t.as_ref().unwrap_err().kind())
            .collect();
        assert_eq!(told, [ErrorKind::Interrupted, ErrorKind::Peer]);
        let links = vec![Link::pair().unwrap(), Link::pair().unwrap()];
        sync_from_peers(&group.disk, &sources, links).0.unwrap();
        assert!(group.assert_one_cut(&group.disk));
    }
}

#[test]
fn after_a_power_loss_at_any_moment_all_disks_are_at_the_same_cut() {
    let limits = ImageLimits {
        exhaustive: 32,
        samples: 10,
        damaged: 3,
    };
    let group = Group::new();
    group.disk.record();
    group.sync(&group.sources()).unwrap();
    let mut ends = [0, 0];

    for boundary in group.disk.take_trace() {
        let killed = boundary.snapshot.after_kill();
        ends[usize::from(group.assert_one_cut(&killed))] += 1;
        for image in boundary.snapshot.crash_images(boundary.number, limits) {
            let disk = image.disk();
            ends[usize::from(group.assert_one_cut(&disk))] += 1;
            // And once more, now that the first recovery is through.
            group.assert_one_cut(&disk);
        }
    }

    let [old, new] = ends;
    assert!(old > 50 && new > 50, "{ends:?}");
}
