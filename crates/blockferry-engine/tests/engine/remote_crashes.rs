//! The target's host loses its power while the source is on another one: whatever the peer does, the target is old or new,
//! and what was acknowledged is not sent again.

use blockferry_core::BlockSize;
use blockferry_engine::{Context, Strategy, SyncOptions, Target};
use blockferry_pipeline::Event;
use blockferry_testkit::{Events, ExploreOptions, Scenario, SimDisk, SimOptions, explore};
use blockferry_transport::Link;

use crate::harness::{Machine, Source, assert_rolls_back_to, assert_synced, edited, image};
use crate::remote::{cut_after, delta, full, garbled_after, run_in};

/// What the target's side promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Promise {
    /// So many bytes are durable: they are not sent again.
    Durable(u64),
    /// The run came to its end.
    Applied,
}

/// What becomes of the first connection.
#[derive(Clone, Copy, Debug)]
enum Peer {
    Honest,
    /// Its link ends after so many bytes, and is made again.
    Cut(usize),
    /// What it sends is changed after so many bytes; then comes an honest one.
    Garbles(usize),
}

struct FromPeer {
    options: SyncOptions,
    peer: Peer,
    old: Vec<u8>,
    new: Vec<u8>,
}

impl FromPeer {
    fn sync(
        &self,
        disk: &SimDisk,
        link: (Link, Link),
        promised: &Events<Promise>,
    ) -> Result<(), String> {
        let promised = promised.clone();
        let context = Context::default().with_observer(move |event: &Event| {
            if let Event::Checkpoint { durable_bytes, .. } = event {
                promised.push(Promise::Durable(*durable_bytes));
            }
        });
        let source = Source::new(self.new.clone());
        let ran = run_in(&Machine::on(disk), &source, &self.options, link, &context);
        ran.target.map(drop).map_err(|error| error.to_string())
    }
}

fn whole() -> (Link, Link) {
    Link::pair().expect("the system has sockets")
}

impl Scenario for FromPeer {
    type Event = Promise;

    fn prepare(&self, disk: &SimDisk) {
        disk.install_sparse("home", "disk", &self.old);
        drop(disk.dir("state"));
    }

    fn run(&self, disk: &SimDisk, events: &Events<Promise>) -> Result<(), String> {
        let first = match self.peer {
            Peer::Honest => None,
            Peer::Cut(after) => Some(cut_after(after)),
            Peer::Garbles(after) => Some(garbled_after(after)),
        };
        let outcome = first.map_or(Ok(()), |link| match self.sync(disk, link, events) {
            Ok(()) => Err("the first connection was to fail".to_owned()),
            Err(_expected) => Ok(()),
        });
        let outcome = outcome.and_then(|()| self.sync(disk, whole(), events));
        outcome?;
        events.push(Promise::Applied);
        Ok(())
    }

    fn recover(
        &self,
        disk: &SimDisk,
        before: &[Promise],
        _: &Events<Promise>,
    ) -> Result<(), String> {
        let machine = Machine::on(disk);
        drop(
            Target::from_parts(machine.place(), machine.state())
                .map_err(|error| error.to_string())?,
        );
        let found = machine.content().ok_or("the target is gone")?;
        let is_new = found == self.new;
        if !is_new && found != self.old {
            return Err("the target is neither old nor new".to_owned());
        }
        if !is_new && before.contains(&Promise::Applied) {
            return Err("what was applied is gone".to_owned());
        }
        let source = Source::new(self.new.clone());
        let ran = run_in(
            &machine,
            &source,
            &self.options,
            whole(),
            &Context::default(),
        );
        let receipt = ran.target.map_err(|error| error.to_string())?;
        let durable = before.iter().rev().find_map(|promise| match promise {
            Promise::Durable(bytes) => Some(*bytes),
            Promise::Applied => None,
        });
        if !is_new && receipt.resumed_bytes < durable.unwrap_or(0) {
            return Err(format!(
                "{durable:?} was durable, {} resumed",
                receipt.resumed_bytes
            ));
        }
        assert_synced(&machine, &self.new, self.options.block_size, &receipt);
        assert_rolls_back_to(&machine, &self.old);
        Ok(())
    }
}

#[test]
fn a_target_whose_host_loses_power_is_old_or_new_whatever_its_peer_does() {
    let old = image(60, 96 << 10);
    let new = edited(60, &old, 96 << 10, 700);
    assert_ne!(old, new);
    let in_small_blocks = |mut options: SyncOptions| {
        options.block_size = BlockSize::new(4096).expect("a size");
        options
    };
    let redo = in_small_blocks(delta(Some(Strategy::Redo)));
    let ways = [
        (redo.clone(), Peer::Honest),
        (redo.clone(), Peer::Cut(9_000)),
        (redo, Peer::Garbles(9_000)),
        (
            in_small_blocks(delta(Some(Strategy::Clone))),
            Peer::Cut(9_000),
        ),
        (in_small_blocks(full(Some(Strategy::Shadow))), Peer::Honest),
        (
            in_small_blocks(full(Some(Strategy::Shadow))),
            Peer::Cut(40_000),
        ),
    ];
    for (options, peer) in ways {
        let scenario = FromPeer {
            options,
            peer,
            old: old.clone(),
            new: new.clone(),
        };
        let explored = ExploreOptions {
            sim: SimOptions {
                clones: true,
                ..SimOptions::default()
            },
            depth: 1,
            max_recoveries: 250,
            ..ExploreOptions::default()
        };

        let report = explore(&explored, &scenario);

        report.assert_clean();
        assert!(report.distinct_images > 50, "{peer:?}: {report:?}");
    }
}
