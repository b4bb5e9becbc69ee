//! The same on a real file system, with the paths and locks the command line uses.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockferry_device::{SourceOptions, open_source};
use blockferry_engine::{
    Context, ErrorKind, ExportPoint, Mode, Strategy, SyncOptions, Target, TargetOptions, export,
    list_targets, predict, resume_source, rollback, status, sync,
};
use blockferry_testkit::FaultySource;

use crate::harness::{edited, image, options};

const BYTES: u64 = 6 << 20;

/// A directory with a source and a target.
struct Place {
    directory: tempfile::TempDir,
    old: Vec<u8>,
    new: Vec<u8>,
}

impl Place {
    fn new(seed: u64, per_mille: u64) -> Self {
        // Not in /tmp, which may be a file system in memory.
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let old = image(seed, BYTES);
        let new = edited(seed, &old, BYTES + 12_345, per_mille);
        fs::write(directory.path().join("old.raw"), &old).unwrap();
        fs::write(directory.path().join("new.raw"), &new).unwrap();
        Self {
            directory,
            old,
            new,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn options(&self) -> TargetOptions {
        TargetOptions::new(self.path("root"))
    }

    fn source(&self) -> Arc<dyn blockferry_device::BlockSource> {
        open_source(&self.path("new.raw"), SourceOptions::default()).unwrap()
    }

    fn open(&self) -> Target {
        Target::open(self.path("old.raw"), &self.options()).unwrap()
    }

    fn sync(&self, options: &SyncOptions) -> blockferry_engine::Receipt {
        sync(
            self.source(),
            &mut self.open(),
            options,
            &Context::default(),
        )
        .unwrap()
    }

    fn target(&self) -> Vec<u8> {
        fs::read(self.path("old.raw")).unwrap()
    }

    /// Every file below, with its bytes.
    fn everything(&self) -> Vec<(PathBuf, Vec<u8>)> {
        fn walk(path: &Path, found: &mut Vec<(PathBuf, Vec<u8>)>) {
            for entry in fs::read_dir(path).unwrap().map(Result::unwrap) {
                match entry.file_type().unwrap().is_dir() {
                    true => walk(&entry.path(), found),
                    false => found.push((entry.path(), fs::read(entry.path()).unwrap())),
                }
            }
        }
        let mut found = Vec::new();
        walk(self.directory.path(), &mut found);
        found.sort();
        found
    }
}

#[test]
fn a_point_that_is_exported_keeps_its_target_locked_until_it_is_let_go() {
    for strategy in [Strategy::Redo, Strategy::Shadow] {
        let place = Place::new(77, 60);
        let receipt = place.sync(&options(|o| {
            o.mode = Mode::Delta;
            o.strategy = Some(strategy);
        }));
        let whole = |source: &dyn blockferry_device::BlockSource| {
            let mut bytes = vec![0; usize::try_from(source.size_bytes()).unwrap()];
            source.read_at(0, &mut bytes).unwrap();
            bytes
        };
        let before = place.everything();

        let old = export(place.open(), ExportPoint::Old).unwrap();

        assert!(whole(&*old.source) == place.old, "{strategy}");
        assert!(old.point.is_none(), "the first sync knew no name for it");
        let held = Target::open(place.path("old.raw"), &place.options()).unwrap_err();
        assert!(held.is_busy(), "{held}");
        drop(old);
        let current = export(place.open(), ExportPoint::Current).unwrap();
        assert!(whole(&*current.source) == place.new, "{strategy}");
        assert_eq!(Some(&current.point.unwrap().id), Some(&receipt.sync_point));
        drop(current.source);
        assert!(place.everything() == before, "{strategy}");
        let refused = export(place.open(), ExportPoint::New).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Target);
    }
}

#[test]
fn every_strategy_works_on_real_files_and_rolls_back() {
    for (mode, strategy) in [
        (Mode::Auto, None),
        (Mode::Delta, Some(Strategy::Redo)),
        (Mode::Delta, Some(Strategy::Shadow)),
        (Mode::Full, None),
        (Mode::Full, Some(Strategy::Redo)),
    ] {
        let place = Place::new(70, 60);
        let with = options(|o| {
            o.mode = mode;
            o.strategy = strategy;
        });

        let receipt = place.sync(&with);

        assert!(place.target() == place.new, "{mode} {strategy:?}");
        assert_eq!(receipt.source_bytes, place.new.len() as u64);
        let again = place.sync(&options(|o| o.mode = Mode::Delta));
        assert_eq!(
            (
                &*again.outcome,
                again.scanned_bytes,
                again.target_read_bytes
            ),
            ("identical", 0, 0)
        );
        rollback(&mut place.open(), &Context::default()).unwrap();
        assert!(
            place.target() == place.old,
            "{mode} {strategy:?} rolled back"
        );
    }
}

#[test]
fn a_prediction_writes_nothing_and_says_what_the_sync_then_does() {
    for (per_mille, mode, strategy) in [
        (10, Mode::Delta, Strategy::Redo),
        (700, Mode::Full, Strategy::Shadow),
    ] {
        let place = Place::new(71, per_mille);
        let before = place.everything();

        let predicted = predict(
            &place.source(),
            place.path("old.raw"),
            &place.options(),
            &options(|_| ()),
            &Context::default(),
        )
        .unwrap();

        assert_eq!(
            place.everything(),
            before,
            "a prediction writes nothing at all"
        );
        assert!(predicted.fits);
        let receipt = place.sync(&options(|_| ()));
        // Where the file system shares blocks, a clone is cheaper than anything else.
        if receipt.strategy != Some(Strategy::Clone) {
            assert_eq!((predicted.mode, predicted.strategy), (mode, Some(strategy)));
        }
        assert_eq!(
            (predicted.mode, predicted.strategy),
            (receipt.mode, receipt.strategy)
        );
    }
}

#[test]
fn status_tells_each_state_and_the_commands_that_lead_on_and_back() {
    let place = Place::new(72, 300);
    let path = place.path("old.raw");
    let look = || status(&path, &place.options()).unwrap();
    let commands = |s: &blockferry_engine::Status| -> Vec<String> {
        let verb =
            |step: &blockferry_engine::NextStep| step.command.split(' ').next().unwrap().to_owned();
        s.next.iter().map(verb).collect()
    };
    assert_eq!(
        (look().state.as_str(), commands(&look())),
        ("unknown", vec!["sync".to_owned()])
    );
    let end = blockferry_core::Extent::from_range(BYTES..BYTES + 4096);
    let faulty = Arc::new(FaultySource::new(place.source()).fail_reads_in(end));
    let with = options(|o| {
        // One worker: what comes before the failure is staged for sure.
        o.threads = Some(1);
        o.mode = Mode::Delta;
        o.block_size = crate::harness::block_size(4096);
        o.strategy = Some(Strategy::Redo);
        o.source_address = place.path("new.raw").display().to_string();
    });

    let error = sync(faulty, &mut place.open(), &with, &Context::default()).unwrap_err();

    assert_eq!(error.kind(), ErrorKind::Source);
    let staging = look();
    assert_eq!(
        (staging.state.as_str(), commands(&staging)),
        ("staging", vec!["resume".to_owned(), "cancel".to_owned()])
    );
    assert!(staging.session.unwrap().durable_records > 0);
    assert_eq!(
        resume_source(&path, &place.options()).unwrap(),
        with.source_address
    );
    {
        let _held = place.open();
        let running = look();
        assert!(running.running && running.next.is_empty());
    }
    let receipt = place.sync(&with);
    assert!(receipt.resumed_bytes > 0);
    assert_eq!(receipt.restaged_bytes, 0);
    let applied = look();
    assert_eq!(
        (applied.state.as_str(), commands(&applied)),
        ("applied", vec!["rollback".to_owned(), "accept".to_owned()])
    );
    assert_eq!(applied.target_unwritten, Some(true));
    assert_eq!(applied.point.unwrap().id, receipt.sync_point);
    fs::OpenOptions::new()
        .append(true)
        .open(&path)
        .unwrap()
        .set_len(1)
        .unwrap();
    assert_eq!(commands(&look()), ["accept"]);
}

#[test]
fn who_looks_keeps_nobody_from_working() {
    let place = Place::new(76, 30);
    place.sync(&options(|_| ()));
    let path = place.path("old.raw");
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    status(&path, &place.options()).unwrap();
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
        }
        let opened: Vec<_> = (0..100)
            .map(|_| Target::open(&path, &place.options()).err())
            .collect();
        is_over.store(true, Ordering::Relaxed);
        let refused: Vec<_> = opened.into_iter().flatten().collect();
        assert!(refused.is_empty(), "{refused:?}");
    });
}

#[test]
fn targets_are_listed_as_long_as_they_have_a_state() {
    let place = Place::new(75, 30);
    let path = place.path("old.raw");
    place.sync(&options(|_| ()));
    let list = || list_targets(&place.path("root"));

    assert_eq!(list(), [path.canonicalize().unwrap().into()]);
    // A target that is gone for now still has one.
    fs::rename(&path, place.path("away")).unwrap();
    assert_eq!(list(), [path.into()]);
    fs::remove_dir_all(place.path(".old.raw.blockferry")).unwrap();
    assert_eq!(list(), []);
}

#[test]
fn two_runs_never_meet_even_with_states_of_their_own() {
    let place = Place::new(73, 10);
    let _held = place.open();
    let other = place.options().with_state_dir(Some(place.path("other")));

    let refused = Target::open(place.path("old.raw"), &other).unwrap_err();

    assert_eq!(refused.kind(), ErrorKind::Target);
}
