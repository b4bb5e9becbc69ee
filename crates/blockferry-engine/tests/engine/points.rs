//! Providers of points (D7): when a point is begun, taken up again and released.

use std::sync::{Arc, Mutex};

use blockferry_core::{ChangeMap, Content, Extent, Provenance, Trust};
use blockferry_device::{
    BlockSource, Consistency, PointProvider, PointRequest, Result as DeviceResult, SourcePoint,
    WholeSource,
};
use blockferry_engine::{Context, Mode, Strategy, SyncOptions, sync_from};
use blockferry_testkit::{Fault, FaultKind, OperationKind};

use crate::harness::{Machine, Source, assert_synced, block_size, edited, image, options};

const SMALL: u64 = 4096;
const BYTES: u64 = 5 << 20;

/// Writes down what it is asked for, and what the target held when it was asked to release.
#[derive(Debug)]
struct Recording {
    source: Arc<Source>,
    calls: Mutex<Vec<String>>,
    leases: Mutex<Vec<String>>,
    changes: Option<Arc<ChangeMap>>,
}

impl Recording {
    fn new(source: &Arc<Source>) -> Self {
        Self {
            source: Arc::clone(source),
            calls: Mutex::default(),
            leases: Mutex::default(),
            changes: None,
        }
    }

    fn take_calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

impl PointProvider for Recording {
    fn begin(&self, request: &PointRequest<'_>) -> DeviceResult<SourcePoint> {
        let mut leases = self.leases.lock().unwrap();
        let lease = match request.resume {
            Some(lease) => lease.to_owned(),
            None => format!("lease {}", leases.len() + 1),
        };
        if !leases.contains(&lease) {
            leases.push(lease.clone());
        }
        self.calls.lock().unwrap().push(format!("begin {lease}"));
        let source = Arc::clone(&self.source) as Arc<dyn BlockSource>;
        let changes = self.changes.clone().filter(|_| request.since.is_some());
        Ok(SourcePoint::new(lease, source, Consistency::Crash).with_changes(changes))
    }

    fn release(&self, lease: &str) -> DeviceResult<()> {
        self.calls.lock().unwrap().push(format!("release {lease}"));
        self.leases.lock().unwrap().retain(|l| l != lease);
        Ok(())
    }

    fn leases(&self) -> DeviceResult<Vec<String>> {
        Ok(self.leases.lock().unwrap().clone())
    }
}

fn redo() -> SyncOptions {
    options(|o| {
        o.block_size = block_size(SMALL);
        o.mode = Mode::Delta;
        o.strategy = Some(Strategy::Redo);
        o.threads = Some(1);
    })
}

fn run(
    machine: &Machine,
    provider: &dyn PointProvider,
) -> blockferry_engine::Result<blockferry_engine::Receipt> {
    sync_from(provider, &mut machine.open(), &redo(), &Context::default())
}

#[test]
fn a_point_is_released_after_the_target_holds_it() {
    let old = image(80, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(80, &old, BYTES, 50));
    let provider = Recording::new(&source);

    let receipt = run(&machine, &provider).unwrap();

    assert_eq!(provider.take_calls(), ["begin lease 1", "release lease 1"]);
    assert_eq!(receipt.consistency.as_deref(), Some("crash-consistent"));
    assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
}

#[test]
fn a_run_that_fails_keeps_its_lease_and_the_next_one_takes_it_up_again() {
    let old = image(81, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(81, &old, BYTES, 300));
    let provider = Recording::new(&source);
    source.fail_from(84);
    let context = source.counting_from_the_decision(&Context::default());
    let failed = sync_from(&provider, &mut machine.open(), &redo(), &context);
    assert!(failed.unwrap_err().is_resumable());
    assert_eq!(provider.take_calls(), ["begin lease 1"]);
    source.heal();

    let receipt = run(&machine, &provider).unwrap();

    assert!(receipt.resumed_bytes > 0);
    assert_eq!(provider.take_calls(), ["begin lease 1", "release lease 1"]);
}

#[test]
fn a_commit_that_was_not_applied_keeps_its_lease() {
    let old = image(82, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(82, &old, BYTES, 30));
    let provider = Recording::new(&source);
    // The power goes while the target is written, which is after COMMIT.
    let fault = Fault::on(OperationKind::Write, "home/disk", 1, FaultKind::PowerLoss);
    machine.disk.inject(fault);

    run(&machine, &provider).unwrap_err();

    assert_eq!(provider.take_calls(), ["begin lease 1"]);
}

#[test]
fn leases_left_by_a_crash_are_released_first() {
    let old = image(83, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(83, &old, BYTES, 30));
    let provider = Recording::new(&source);
    provider
        .leases
        .lock()
        .unwrap()
        .extend(["left".to_owned(), "behind".to_owned()]);

    run(&machine, &provider).unwrap();

    let calls = [
        "release left",
        "release behind",
        "begin lease 3",
        "release lease 3",
    ];
    assert_eq!(provider.take_calls()[..2], calls[..2]);
    assert!(provider.leases.lock().unwrap().is_empty());
}

#[test]
fn what_a_provider_knows_of_changes_is_not_read() {
    let old = blockferry_testkit::images::random_image(84, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(old);
    let mut provider = Recording::new(&source);
    run(&machine, &provider).unwrap();
    source.change(|bytes| bytes[7 * 4096] ^= 1);
    let mut map = ChangeMap::new(Provenance::Embedder, Trust::Trusted, BYTES);
    map.set(Extent::from_range(0..BYTES), Content::Same);
    map.set(Extent::from_range(7 * SMALL..8 * SMALL), Content::Data);
    provider.changes = Some(Arc::new(map));

    let receipt = run(&machine, &provider).unwrap();

    assert_eq!(
        (receipt.scanned_bytes, receipt.changed_bytes),
        (SMALL, Some(SMALL))
    );
    assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
}

#[test]
fn a_source_at_rest_needs_no_lease() {
    let old = image(85, BYTES);
    let machine = Machine::file(&old);
    let source = Source::new(edited(85, &old, BYTES, 30));

    let receipt = run(&machine, &WholeSource::at_rest(Arc::clone(&source) as _)).unwrap();

    assert_eq!(receipt.consistency.as_deref(), Some("at rest"));
    assert_synced(&machine, &source.bytes(), block_size(SMALL), &receipt);
}
