//! A service's own source and a progress callback: `cargo run -p blockferry --example custom_source`.
#![expect(clippy::print_stdout, reason = "an example talks")]
use std::{env, error::Error, fs, path::PathBuf, sync::Arc};

use blockferry::{BlockSource, Context, Event, SyncOptions, Target, TargetOptions, device, sync};

/// A volume of 64 MiB that exists only in this program: byte n of it is the low byte of n / 4096.
#[derive(Debug)]
struct Volume;

impl BlockSource for Volume {
    fn label(&self) -> &'static str {
        "volume 7"
    }
    fn size_bytes(&self) -> u64 {
        64 << 20
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> device::Result<()> {
        for (byte, at) in buffer.iter_mut().zip(offset..) {
            *byte = (at / 4096).to_le_bytes()[0];
        }
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let place = PathBuf::from(env::args().nth(1).unwrap_or("target/custom-source".into()));
    fs::create_dir_all(&place)?;
    let context = Context::new().with_observer(|event: &Event| {
        if let Event::Progress(p) = event {
            println!("{}: {} of {} bytes", p.phase, p.done_bytes, p.total_bytes);
        }
    });
    let mut target = Target::open(place.join("copy.raw"), &TargetOptions::new(&place))?;
    let options = SyncOptions::default();
    let receipt = sync(Arc::new(Volume), &mut target, &options, &context)?;
    println!("{}: root {}", receipt.outcome, receipt.target_root);
    Ok(())
}
