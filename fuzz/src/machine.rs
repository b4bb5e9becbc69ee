//! A target with the state that an input describes, as a device or as a file.

use std::sync::Arc;

use blockferry::device::{BlockTarget, Identity, MemoryDevice};
use blockferry::transfer_log::{GroupDirectory, Place, Replica, Result, inspect};
use blockferry_testkit::{SimDisk, SimOptions};

use crate::pages::{FILES, PAGE, Sizes, unpack};

const TARGET: &str = "disk.raw";

/// What the first byte of an input chooses.
#[derive(Clone, Copy, Debug)]
pub struct Choice(pub u8);

impl Choice {
    fn is_file(self) -> bool {
        self.0 & 1 != 0
    }

    /// The content of the target: that of the golden files before or after their session.
    fn content(self) -> Vec<u8> {
        image(if self.0 & 2 == 0 { "abc." } else { "aB.D" })
    }

    /// Which of `count` things to do next.
    pub fn next(self, count: u8) -> u8 {
        (self.0 >> 2) % count
    }
}

/// An image of pages that are each filled with letters of their own, as the golden files have it.
pub fn image(pages: &str) -> Vec<u8> {
    let page = |letter: u8| -> Vec<u8> {
        let fill = |n: u8| if letter == b'.' { 0 } else { letter ^ (n & 7) };
        (0..=255).cycle().take(PAGE).map(fill).collect()
    };
    pages.bytes().flat_map(page).collect()
}

/// The machine.
pub struct Machine {
    disk: SimDisk,
    device: Option<Arc<MemoryDevice>>,
    /// Whether the input has a decision that may move the target.
    pub is_decided: bool,
}

impl Machine {
    /// Puts the files of `input` beside a target.
    pub fn new(choice: Choice, input: &[u8], sizes: Sizes) -> Self {
        let disk = SimDisk::new(SimOptions::default());
        drop(disk.dir("state"));
        let files = unpack(input, sizes);
        let decision = |page: &[u8]| page.starts_with(b"BFRYDEC\0");
        let is_decided = files[0]
            .as_ref()
            .is_some_and(|state| state.chunks(PAGE).any(decision));
        for (name, bytes) in FILES.iter().zip(files) {
            if let Some(bytes) = bytes {
                disk.install("state", name, &bytes);
            }
        }
        let device = (!choice.is_file()).then(|| {
            let device = MemoryDevice::from_bytes("golden", choice.content());
            Arc::new(device.with_identity(Identity::from_bytes(b"golden")))
        });
        if choice.is_file() {
            disk.install_sparse("images", TARGET, &choice.content());
        }
        Self {
            disk,
            device,
            is_decided,
        }
    }

    fn place(&self) -> Place {
        match &self.device {
            Some(device) => Place::Device(Arc::clone(device) as Arc<dyn BlockTarget>),
            None => Place::File {
                dir: self.disk.dir("images"),
                name: TARGET.to_owned(),
            },
        }
    }

    /// Looks, without a lock and without changing anything.
    pub fn look(&self) {
        let before = self.content();
        let looked = inspect(&self.place(), &*self.disk.dir("state"));
        assert!(
            self.content() == before,
            "{looked:?} has changed the target"
        );
    }

    /// Opens, which recovers.
    pub fn open(&self) -> Result<Replica> {
        let groups = GroupDirectory::new(self.disk.dir("state"));
        Replica::open(
            self.place(),
            self.disk.dir("state"),
            Some(&groups),
            &|_, _| {},
        )
    }

    /// What the target holds.
    pub fn content(&self) -> Option<Vec<u8>> {
        match &self.device {
            Some(device) => Some(device.to_vec()),
            None => self.disk.content(&format!("images/{TARGET}")),
        }
    }
}
