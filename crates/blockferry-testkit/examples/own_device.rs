//! A device of your own on the rack: a mirror of two disks goes through the conformance suite and the crash
//! explorer, and a mirror with a mistake in it is caught.
//!
//! ```text
//! cargo run -p blockferry-testkit --example own_device
//! ```
#![expect(
    clippy::print_stdout,
    clippy::expect_used,
    reason = "an example shows what it found, and ends where its reader's would"
)]

use std::error::Error;
use std::sync::Arc;

use blockferry_core::Extent;
use blockferry_device::{BlockSource, BlockTarget, ReadRequest, Result};
use blockferry_testkit::conformance::target_conformance;
use blockferry_testkit::{Events, ExploreOptions, Scenario, SimDisk, SimOptions, explore};

/// Everything is written to two disks and read from whichever still can.
#[derive(Debug)]
struct Mirror {
    legs: [Arc<dyn BlockTarget>; 2],
    /// The mistake: the second leg is taken for as durable as the first.
    is_hasty: bool,
}

impl Mirror {
    fn on(disk: &SimDisk, size_bytes: u64, is_hasty: bool) -> Self {
        let legs = ["left", "right"].map(|name| disk.device(name, size_bytes));
        Self { legs, is_hasty }
    }

    fn either<T>(&self, read: impl Fn(&dyn BlockTarget) -> Result<T>) -> Result<T> {
        read(&*self.legs[0]).or_else(|_| read(&*self.legs[1]))
    }

    fn both(&self, write: impl Fn(&dyn BlockTarget) -> Result<()>) -> Result<()> {
        self.legs.iter().try_for_each(|leg| write(&**leg))
    }

    /// After a power loss the legs may differ in what was never flushed: the first one counts.
    fn resync(&self) -> Result<()> {
        let mut bytes = vec![0; usize::try_from(self.size_bytes()).expect("a small disk")];
        self.legs[0].read_at(0, &mut bytes)?;
        self.legs[1].write_at(0, &bytes)?;
        self.legs[1].flush()
    }
}

impl BlockSource for Mirror {
    fn label(&self) -> &'static str {
        "mirror"
    }

    fn size_bytes(&self) -> u64 {
        self.legs[0].size_bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let length = buffer.len();
        let bytes = self.either(|leg| {
            let mut bytes = vec![0; length];
            leg.read_at(offset, &mut bytes).map(|()| bytes)
        })?;
        buffer.copy_from_slice(&bytes);
        Ok(())
    }

    fn evidence(&self) -> Result<blockferry_device::Evidence> {
        self.either(|leg| leg.evidence())
    }
}

impl BlockTarget for Mirror {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.both(|leg| leg.write_at(offset, bytes))
    }

    fn write_zeroes(&self, extent: Extent) -> Result<()> {
        self.both(|leg| leg.write_zeroes(extent))
    }

    fn flush(&self) -> Result<()> {
        if self.is_hasty {
            return self.legs[0].flush();
        }
        self.both(|leg| leg.flush())
    }

    fn read_medium(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        self.legs[0].read_medium(requests)
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.both(|leg| leg.resize(size_bytes))
    }
}

/// Writes numbers, one after the other, and promises each that was flushed.
struct Numbers {
    is_hasty: bool,
}

const SIZE_BYTES: u64 = 8192;

impl Scenario for Numbers {
    /// This number is on both legs for good.
    type Event = u8;

    fn prepare(&self, disk: &SimDisk) {
        drop(Mirror::on(disk, SIZE_BYTES, self.is_hasty));
    }

    fn run(&self, disk: &SimDisk, events: &Events<u8>) -> std::result::Result<(), String> {
        let mirror = Mirror::on(disk, SIZE_BYTES, self.is_hasty);
        for number in 1..=3_u8 {
            disk.label("write a number");
            let written = mirror.write_at(0, &[number; 1024]);
            written
                .and_then(|()| mirror.flush())
                .map_err(|e| e.to_string())?;
            events.push(number);
        }
        Ok(())
    }

    fn recover(
        &self,
        disk: &SimDisk,
        before: &[u8],
        _: &Events<u8>,
    ) -> std::result::Result<(), String> {
        let mirror = Mirror::on(disk, SIZE_BYTES, self.is_hasty);
        let promised = before.last().copied().unwrap_or(0);
        for leg in &mirror.legs {
            let mut sector = [0; 512];
            // An unflushed write may have made the sector unreadable; a flushed one may not be lost.
            let is_read = leg.read_at(512, &mut sector).is_ok();
            let is_older = sector[0] < promised && sector.iter().all(|b| *b == sector[0]);
            if is_read && is_older {
                return Err(format!(
                    "{} was promised, {} holds {}",
                    promised,
                    leg.label(),
                    sector[0]
                ));
            }
        }
        mirror.resync().or(Ok(()))
    }
}

pub(crate) fn main() -> std::result::Result<(), Box<dyn Error>> {
    target_conformance(&|| {
        let disk = SimDisk::new(SimOptions::default());
        Arc::new(Mirror::on(&disk, 1 << 20, false))
    });
    println!("the mirror keeps the contract of a target");

    let sound = explore(&ExploreOptions::default(), &Numbers { is_hasty: false });
    println!("{sound}");
    sound.assert_clean();

    let hasty = explore(&ExploreOptions::default(), &Numbers { is_hasty: true });
    println!("with a mistake in it:\n{hasty}");
    if hasty.violations.is_empty() {
        return Err("the mistake was not found".into());
    }
    Ok(())
}
