//! A caller that knows more of its source than the source does is asked before anything counts.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use blockferry_device::Result as DeviceResult;
use blockferry_engine::{Context, ErrorKind, Result, SourceCheck, SyncOptions};
use blockferry_transport::Link;

use crate::harness::{Machine, Source, assert_synced, edited, failure, image};
use crate::remote::{delta, full, run};

const BYTES: u64 = 3 << 20;

/// Options with this check.
fn checked(
    mut options: SyncOptions,
    check: impl Fn() -> DeviceResult<()> + Send + Sync + 'static,
) -> SyncOptions {
    options.check = Some(SourceCheck::new(check));
    options
}

type Way = fn(&Machine, &Arc<Source>, &SyncOptions) -> Result<blockferry_engine::Receipt>;

/// From a source here, and from one on another machine.
const WAYS: [Way; 2] = [
    |machine, source, options| machine.sync_in(source, options, &Context::default()),
    |machine, source, options| run(machine, source, options, Link::pair().unwrap()).target,
];

#[test]
fn a_check_is_asked_after_the_last_read_and_before_the_decision() {
    for way in WAYS {
        for options in [delta(None), full(None)] {
            let old = image(60, BYTES);
            let machine = Arc::new(Machine::file(&old));
            let source = Source::new(edited(60, &old, BYTES, 100));
            let (seen, asked) = (Arc::clone(&machine), Arc::clone(&source));
            let contents = Arc::new(Mutex::new(Vec::new()));
            let noted = Arc::clone(&contents);
            let options = checked(options, move || {
                noted.lock().unwrap().push(seen.content().unwrap());
                asked.fail_from(1);
                Ok(())
            });

            let receipt = way(&machine, &source, &options).unwrap();

            assert_eq!(
                *contents.lock().unwrap(),
                [old],
                "once, and at the old point"
            );
            assert_eq!(source.take_read_bytes(), 0);
            assert_synced(&machine, &source.bytes(), options.block_size, &receipt);
        }
    }
}

#[test]
fn a_check_that_fails_commits_nothing_and_the_next_run_goes_on() {
    for way in WAYS {
        let old = image(61, BYTES);
        let machine = Machine::file(&old);
        let source = Source::new(edited(61, &old, BYTES, 100));
        let holds = Arc::new(AtomicBool::new(false));
        let now = Arc::clone(&holds);
        let options = checked(delta(None), move || match now.load(Ordering::SeqCst) {
            true => Ok(()),
            false => Err(failure()),
        });

        let error = way(&machine, &source, &options).unwrap_err();

        assert_eq!(error.kind(), ErrorKind::Source);
        assert!(error.is_resumable());
        assert!(error.to_string().contains("no point any more"), "{error}");
        assert_eq!(machine.content().unwrap(), old);
        holds.store(true, Ordering::SeqCst);
        let receipt = way(&machine, &source, &options).unwrap();
        assert!(receipt.resumed_bytes > 0);
        assert_synced(&machine, &source.bytes(), options.block_size, &receipt);
    }
}

#[test]
fn a_check_is_asked_where_nothing_has_to_be_read_or_written() {
    for way in WAYS {
        let old = image(62, BYTES);
        let machine = Machine::file(&old);
        let source = Source::new(old);
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let options = checked(delta(None), move || {
            match count.fetch_add(1, Ordering::SeqCst) {
                2 => Err(failure()),
                _ => Ok(()),
            }
        });
        // Compared and found identical; proven identical; the same while it does not hold.
        for expected in [1, 2] {
            let receipt = way(&machine, &source, &options).unwrap();
            assert_eq!(receipt.outcome, "identical");
            assert_eq!(asked.load(Ordering::SeqCst), expected);
        }

        let error = way(&machine, &source, &options).unwrap_err();

        assert_eq!(error.kind(), ErrorKind::Source);
    }
}
