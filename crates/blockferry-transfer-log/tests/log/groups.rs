//! Two disks of one machine share one cut (I12).

use blockferry_testkit::{
    Events, ExploreOptions, Fault, FaultKind, OperationKind, Scenario, SimDisk, SimOptions,
    sensitivity,
};
use blockferry_transfer_log::{
    ErrorKind, GroupDirectory, GroupId, GroupVerdicts, Place, Recovered, Replica, SessionId,
    Strategy, Verdict, inspect,
};

use crate::explorer::{Explored, options, run_with};
use crate::harness::{PAGE, Setup, id, image, quiet, root};
use crate::looked::check_looked;

const GROUP: GroupId = GroupId::from_bytes([7; 16]);
const DISKS: [&str; 2] = ["one", "two"];

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Promise {
    /// The group's record was on its way.
    Deciding,
    Committed,
}

struct Pair {
    setup: Setup,
}

impl Pair {
    fn old() -> Vec<u8> {
        image(&[1, 2, 0], 3 * PAGE)
    }

    fn after() -> Vec<u8> {
        image(&[1, 4, 5], 3 * PAGE)
    }

    fn place(disk: &SimDisk, name: &str) -> Place {
        Place::File {
            dir: disk.dir("images"),
            name: name.to_owned(),
        }
    }

    fn open(disk: &SimDisk, name: &str) -> Result<Replica, String> {
        let groups = GroupDirectory::new(disk.dir("job"));
        Replica::open(
            Self::place(disk, name),
            disk.dir(&format!("state of {name}")),
            Some(&groups),
            &quiet,
        )
        .map_err(|e| format!("open {name}: {e:?}"))
    }

    /// Opens what was looked at before: both must say the same.
    fn look_and_open(disk: &SimDisk, name: &str) -> Result<Replica, String> {
        let state = disk.dir(&format!("state of {name}"));
        let looked = inspect(&Self::place(disk, name), &*state);
        let looked = looked.map_err(|e| format!("look at {name}: {e:?}"))?;
        let replica = Self::open(disk, name)?;
        check_looked(looked.as_ref(), &replica).map_err(|e| format!("{name}: {e}"))?;
        Ok(replica)
    }

    fn shows(disk: &SimDisk) -> [Option<bool>; 2] {
        DISKS.map(|name| {
            let content = disk.content(&format!("images/{name}")).unwrap_or_default();
            match content {
                c if c == Self::old() => Some(false),
                c if c == Self::after() => Some(true),
                _ => None,
            }
        })
    }
}

impl Scenario for Pair {
    type Event = Promise;

    fn prepare(&self, disk: &SimDisk) {
        DISKS
            .iter()
            .for_each(|name| disk.install_sparse("images", name, &Self::old()));
        for name in DISKS {
            drop(Self::open(disk, name).unwrap());
            disk.dir(&format!("state of {name}")).sync().unwrap();
        }
        disk.dir("job").sync().unwrap();
    }

    fn run(&self, disk: &SimDisk, events: &Events<Promise>) -> Result<(), String> {
        let failed = |e: blockferry_transfer_log::Error| format!("{e:?}");
        let new = Self::after();
        disk.label("group stage");
        let mut replicas = [Self::open(disk, DISKS[0])?, Self::open(disk, DISKS[1])?];
        let mut sessions = Vec::new();
        for (replica, number) in replicas.iter_mut().zip(1u8..) {
            let target = replica.target();
            let mut session = replica
                .begin(&self.setup.plan(number, &new))
                .map_err(failed)?;
            self.setup
                .finish(&mut session, target.as_ref(), &new)
                .map_err(failed)?;
            session
                .prepare_for_group(root(&new), GROUP)
                .map_err(failed)?;
            sessions.push(session);
        }
        disk.label("group decide");
        events.push(Promise::Deciding);
        let members: Vec<_> = sessions.iter().map(|s| s.id()).collect();
        let committed = GroupDirectory::new(disk.dir("job"))
            .commit(GROUP, &members)
            .map_err(failed)?;
        events.push(Promise::Committed);
        disk.label("group carry out");
        for session in sessions {
            session
                .commit_in_group(root(&new), &committed, &quiet)
                .map_err(failed)?;
        }
        Ok(())
    }

    fn recover(
        &self,
        disk: &SimDisk,
        before: &[Promise],
        _: &Events<Promise>,
    ) -> Result<(), String> {
        if !before.contains(&Promise::Deciding) && Self::shows(disk) != [Some(false); 2] {
            return Err("a member changed before the group was decided".to_owned());
        }
        for name in DISKS {
            let mut replica = Self::look_and_open(disk, name)?;
            if *replica.recovered() == Recovered::Staging {
                // It was not prepared yet: the job gives up.
                replica.cancel().map_err(|e| format!("cancel: {e:?}"))?;
            }
        }
        match Self::shows(disk) {
            [Some(true), Some(true)] if before.contains(&Promise::Deciding) => Ok(()),
            [Some(false), Some(false)] if !before.contains(&Promise::Committed) => Ok(()),
            shows => Err(format!("after {before:?} the disks show {shows:?}")),
        }
    }
}

#[test]
fn a_group_ends_at_one_point_after_every_crash() {
    let options = ExploreOptions {
        crashed_recoveries: 2,
        ..options()
    };
    let mut explored = Explored::of("a group");
    for strategy in [Strategy::Redo, Strategy::Clone] {
        let setup = Setup::file(strategy).at_once();
        let report = run_with(&options, &format!("group, {strategy}"), &Pair { setup });
        for step in ["group stage", "group decide", "group carry out"] {
            assert!(report.steps.contains_key(step), "{:?}", report.steps);
        }
        explored.add(&report);
    }
    explored.finish();
}

#[test]
fn the_record_of_a_group_and_its_name_must_be_durable_before_a_member_commits() {
    let setup = Setup::file(Strategy::Redo).at_once();
    let options = ExploreOptions {
        depth: 1,
        ..options()
    };

    let barriers = sensitivity(&options, &Pair { setup });

    let mut of_the_group = 0;
    for (barrier, report) in barriers {
        let caught = !report.violations.is_empty();
        println!(
            "group without {barrier} [{}]: caught {caught}",
            barrier.label
        );
        if barrier.subject.starts_with("job") {
            of_the_group += 1;
            assert!(caught, "without {barrier}");
        }
    }
    assert_eq!(of_the_group, 2, "the record and its name");
}

#[test]
fn a_prepared_member_waits_while_its_group_cannot_be_reached() {
    let setup = Setup::file(Strategy::Redo);
    let (old, new) = (Pair::old(), Pair::after());
    let disk = setup.machine(Some(&old));
    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut session = replica.begin(&setup.plan(1, &new)).unwrap();
    setup.finish(&mut session, target.as_ref(), &new).unwrap();
    session.prepare_for_group(root(&new), GROUP).unwrap();
    drop(replica);
    let mut waiting = setup.open(&disk).unwrap();
    assert!(matches!(waiting.recovered(), Recovered::GroupPending(_)));
    assert!(waiting.begin(&setup.plan(2, &new)).is_err());
    assert!(waiting.resume(u64::MAX).is_err());
    assert!(waiting.cancel().is_err());
    drop(waiting);

    struct Committed;
    impl GroupVerdicts for Committed {
        fn verdict(&self, _: GroupId) -> blockferry_transfer_log::Result<Verdict> {
            Ok(Verdict::Committed)
        }
    }
    let done = setup.open_in_group(&disk, Some(&Committed)).unwrap();
    assert!(matches!(done.recovered(), Recovered::Applied(_)));
    assert_eq!(setup.content(&disk), Some(new));
}

/// A prepared member of a group, and the job's directory where that is committed.
fn committed_by_its_group(setup: &Setup, new: &[u8]) -> SimDisk {
    let disk = setup.machine(Some(&Pair::old()));
    let mut replica = setup.open(&disk).unwrap();
    let target = replica.target();
    let mut session = replica.begin(&setup.plan(1, new)).unwrap();
    setup.finish(&mut session, target.as_ref(), new).unwrap();
    session.prepare_for_group(root(new), GROUP).unwrap();
    let members = [session.id()];
    GroupDirectory::new(disk.dir("job"))
        .commit(GROUP, &members)
        .unwrap();
    disk
}

#[test]
fn a_group_record_that_cannot_be_read_is_never_taken_for_none() {
    let setup = Setup::file(Strategy::Redo);
    let new = Pair::after();
    let disk = committed_by_its_group(&setup, &new);
    let record = format!("job/{}.group", SessionId::from_bytes(*GROUP.as_bytes()));
    let whole = disk.content(&record).unwrap();
    let job = GroupDirectory::new(disk.dir("job"));
    let page = PAGE as u64;

    for damage in [SimDisk::spoil, SimDisk::flip_bit] {
        for copy in [0, page] {
            let half = disk.snapshot().after_kill();
            assert!(damage(&half, &record, copy));
            let one = GroupDirectory::new(half.dir("job")).verdict(GROUP);
            assert_eq!(one.unwrap(), Verdict::Committed, "one copy is enough");
        }
        let damaged = disk.snapshot().after_kill();
        assert!(damage(&damaged, &record, 0) && damage(&damaged, &record, page));
        let job = GroupDirectory::new(damaged.dir("job"));

        let refused = setup.open_in_group(&damaged, Some(&job)).unwrap_err();

        assert!(refused.to_string().contains("group record"), "{refused}");
        assert_eq!(setup.content(&damaged), Some(Pair::old()));
        damaged.install("job", record.trim_start_matches("job/"), &whole);
        drop(setup.open_in_group(&damaged, Some(&job)).unwrap());
        assert_eq!(setup.content(&damaged), Some(new.clone()));
    }
    job.retire(GROUP).unwrap();
    assert_eq!(job.verdict(GROUP).unwrap(), Verdict::Aborted);
    assert_eq!(disk.dir("job").names().unwrap(), Vec::<String>::new());
}

#[test]
fn a_group_record_that_did_not_get_its_name_commits_nobody() {
    let disk = SimDisk::new(SimOptions::default());
    let job = GroupDirectory::new(disk.dir("job"));
    disk.inject(Fault::on(OperationKind::Rename, "job/", 1, FaultKind::Io));

    assert!(job.commit(GROUP, &[id(1)]).is_err());

    assert_eq!(job.verdict(GROUP).unwrap(), Verdict::Aborted);
    let new_name = format!("{}.group.new", SessionId::from_bytes(*GROUP.as_bytes()));
    assert_eq!(disk.dir("job").names().unwrap(), [new_name]);
    job.commit(GROUP, &[id(1)]).unwrap();
    assert_eq!(job.verdict(GROUP).unwrap(), Verdict::Committed);
}

#[test]
fn a_group_has_as_many_disks_as_fit_its_record_and_no_more() {
    let disk = SimDisk::new(SimOptions::default());
    let job = GroupDirectory::new(disk.dir("job"));
    let members = |count: usize| vec![id(1); count];

    let refused = job.commit(GROUP, &members(201)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::LimitExceeded);
    assert_eq!(job.verdict(GROUP).unwrap(), Verdict::Aborted);

    job.commit(GROUP, &members(200)).unwrap();
    assert_eq!(job.verdict(GROUP).unwrap(), Verdict::Committed);
    let another = GroupId::from_bytes([8; 16]);
    assert_eq!(job.verdict(another).unwrap(), Verdict::Aborted);
}
