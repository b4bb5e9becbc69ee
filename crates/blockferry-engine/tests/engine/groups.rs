//! Several disks, one cut (I12): whatever happens to one of them, and whenever the power fails, all are at the same.

use std::sync::Arc;

use blockferry_device::BlockSource;
use blockferry_engine::{
    Context, ErrorKind, GroupDirectory, Member, Mode, Place, Receipt, Result, Strategy,
    SyncOptions, Target, sync_group,
};
use blockferry_testkit::{ImageLimits, SimDisk, SimOptions};

use crate::harness::{Source, block_size, edited, image, options};

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
