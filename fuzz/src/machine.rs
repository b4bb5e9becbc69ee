//! A target with the state that an input describes, as a device or as a file.

use std::sync::Arc;

use blockferry::device::{BlockTarget, Identity, MemoryDevice};
use blockferry::transfer_log::{
    GroupDirectory, GroupVerdicts, Inspection, Place, Replica, Result, inspect,
};
use blockferry_testkit::{SimDisk, SimOptions};

use crate::oracle::Oracle;
use crate::pages::{FILES, Files, PAGE, Sizes, unpack};
use crate::text;

/// Name of the target where it is a file, in the directory `images`.
pub const TARGET: &str = "disk.raw";

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

    /// Whether the records of groups can be reached.
    fn has_groups(self) -> bool {
        self.0 & 128 == 0
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

/// The device that golden files belong to: its evidence is its content.
pub fn device(content: Vec<u8>) -> Arc<MemoryDevice> {
    let device = MemoryDevice::from_bytes("golden", content);
    Arc::new(device.with_identity(Identity::from_bytes(b"golden")))
}

/// The machine.
pub struct Machine {
    disk: SimDisk,
    device: Option<Arc<MemoryDevice>>,
    has_groups: bool,
    oracle: Oracle,
}

impl Machine {
    /// Puts the files of `input` beside a target.
    pub fn new(choice: Choice, input: &[u8], sizes: Sizes) -> Self {
        Self::with_files(choice, &unpack(input, sizes))
    }

    /// Puts these files beside a target.
    pub fn with_files(choice: Choice, files: &Files) -> Self {
        let disk = SimDisk::new(SimOptions::default());
        // First of all: files are identified by the order they were made in.
        if choice.is_file() {
            disk.install_sparse("images", TARGET, &choice.content());
        }
        let device = (!choice.is_file()).then(|| device(choice.content()));
        drop(disk.dir("state"));
        for (name, bytes) in FILES.iter().zip(files) {
            if let Some(bytes) = bytes {
                disk.install("state", name, bytes);
            }
        }
        Self {
            disk,
            device,
            has_groups: choice.has_groups(),
            oracle: Oracle::of(files),
        }
    }

    /// Whether the files have a decision that may move the target.
    pub fn may_move(&self) -> bool {
        self.oracle.may_move()
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

    /// Looks, without a lock and without changing anything; what is seen must be on the disk.
    pub fn look(&self) -> Result<Option<Inspection>> {
        let before = self.content();
        let looked = inspect(&self.place(), &*self.disk.dir("state"));
        let text = text::of_result(&looked);
        assert!(self.content() == before, "{text} has changed the target");
        if let Ok(Some(inspection)) = &looked {
            self.oracle.check(inspection);
        }
        looked
    }

    /// Opens, which recovers.
    pub fn open(&self) -> Result<Replica> {
        let groups = GroupDirectory::new(self.disk.dir("state"));
        let groups = self.has_groups.then_some(&groups as &dyn GroupVerdicts);
        let opened = Replica::open(self.place(), self.disk.dir("state"), groups, &|_, _| {});
        drop(text::of_result(&opened));
        opened
    }

    /// What the target holds.
    pub fn content(&self) -> Option<Vec<u8>> {
        match &self.device {
            Some(device) => Some(device.to_vec()),
            None => self.disk.content(&format!("images/{TARGET}")),
        }
    }
}
