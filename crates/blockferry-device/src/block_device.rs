//! [`OsBlockDevice`]: a Linux block device as source and target.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use blockferry_core::Extent;
use rustix::fs::{Mode, OFlags};

use crate::data_path::{DataPath, WriteMode};
use crate::file::Access;
use crate::proc::{self, DeviceNumber};
use crate::{
    BlockSource, BlockTarget, Error, ErrorKind, Evidence, Identity, ReadRequest, Result,
    WriteRequest, file, holders, sys,
};

/// Requests that one device likes in flight.
const PREFERRED_DEPTH: usize = 4;

/// A block device. Opened for writing it is ours alone (`O_EXCL`): not mounted, not part of another device.
#[derive(Debug)]
pub struct OsBlockDevice {
    label: String,
    number: DeviceNumber,
    path: DataPath,
    logical_block_bytes: u32,
    /// The size when it was opened: the answer if the kernel gives none.
    opened_bytes: u64,
}

impl OsBlockDevice {
    /// Opens a block device. [`crate::open_target`] says more about who holds it.
    ///
    /// # Errors
    /// It cannot be opened, is no block device (`ErrorKind::Unsuitable`), or for writing is in use
    /// (`ErrorKind::Busy`).
    pub fn open(path: &Path, access: Access) -> Result<Self> {
        let label = path.display().to_string();
        let flags = match access {
            Access::Read => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR | OFlags::EXCL,
        };
        let opened = rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty());
        let file = opened.map_err(|e| Error::from_io(format!("open of {label}"), e.into()))?;
        Self::from_file(label, file.into())
    }

    /// Wraps an open block device.
    pub(crate) fn from_file(label: String, file: File) -> Result<Self> {
        let failed = |cause| Error::from_io(format!("status of {label}"), cause);
        let found = file.metadata().map_err(failed)?;
        if !found.file_type().is_block_device() {
            return Err(Error::new(
                ErrorKind::Unsuitable,
                format!("open of {label}: expected a block device, found something else"),
            ));
        }
        let block = rustix::fs::ioctl_blksszget(&file).map_err(|e| failed(e.into()))?;
        let opened_bytes = sys::block_device_bytes(&file).map_err(failed)?;
        Ok(Self {
            number: DeviceNumber::from_raw(found.rdev()),
            path: DataPath::new(file, u64::from(block), WriteMode::Direct),
            logical_block_bytes: block,
            opened_bytes,
            label,
        })
    }

    pub(crate) fn file(&self) -> &File {
        self.path.file()
    }

    /// The kernel answers writes behind the end with "no space"; that would name the wrong remedy.
    fn check_range(&self, attempt: &str, offset: u64, length: u64) -> Result<()> {
        let size = self.size_bytes();
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(Error::new(
                ErrorKind::OutOfRange,
                format!(
                    "{attempt} of {length} bytes at offset {offset}: {} has {size} bytes",
                    self.label
                ),
            ));
        }
        Ok(())
    }

    fn zero_out(&self, extent: Extent) -> io::Result<()> {
        let block = u64::from(self.logical_block_bytes);
        let (start, end) = (
            extent.start().next_multiple_of(block),
            extent.end() / block * block,
        );
        if start >= end {
            return self.path.write_zero_bytes(extent.range());
        }
        self.path.write_zero_bytes(extent.start()..start)?;
        match sys::block_device_zero_out(self.file(), start, end - start) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                self.path.write_zero_bytes(start..end)?;
            }
            outcome => outcome?,
        }
        self.path.write_zero_bytes(end..extent.end())
    }
}

impl BlockSource for OsBlockDevice {
    fn label(&self) -> &str {
        &self.label
    }

    fn size_bytes(&self) -> u64 {
        sys::block_device_bytes(self.file()).unwrap_or(self.opened_bytes)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let read = self.path.read(offset, buffer);
        read.map_err(|e| Error::of_request("read", offset, buffer.len(), &self.label, e))
    }

    fn read_batch(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        let count = requests.len();
        let read = self.path.read_batch(requests);
        read.map_err(|e| Error::of_batch("read", count, &self.label, e))
    }

    fn preferred_depth(&self) -> usize {
        PREFERRED_DEPTH
    }

    fn identity(&self) -> Result<Identity> {
        Ok(identity_of(self.number))
    }

    /// What the kernel counted as written since this disk appeared in this boot.
    fn evidence(&self) -> Result<Evidence> {
        // What is dirty in the cache has not been counted yet.
        rustix::fs::fsync(self.file())
            .map_err(|e| Error::from_io(format!("flush of {}", self.label), e.into()))?;
        Ok(evidence_of(self.number).unwrap_or_else(Evidence::unknown))
    }
}

impl BlockTarget for OsBlockDevice {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check_range("write", offset, bytes.len() as u64)?;
        let written = self.path.write(offset, bytes);
        written.map_err(|e| Error::of_request("write", offset, bytes.len(), &self.label, e))
    }

    fn write_batch(&self, requests: &[WriteRequest<'_>]) -> Result<()> {
        for request in requests {
            self.check_range("write", request.offset, request.bytes.len() as u64)?;
        }
        let written = self.path.write_batch(requests);
        written.map_err(|e| Error::of_batch("write", requests.len(), &self.label, e))
    }

    /// Without unmapping: a thin device must still have the space for a rollback.
    fn write_zeroes(&self, extent: Extent) -> Result<()> {
        self.check_range("zeroing", extent.start(), extent.length())?;
        let zeroed = self.zero_out(extent);
        zeroed.map_err(|e| Error::from_io(format!("zeroing of {extent} of {}", self.label), e))
    }

    // `punch` stays at "cannot": no discard of the kernel guarantees zeros afterwards.

    fn flush(&self) -> Result<()> {
        let flushed = self.path.flush_data();
        flushed.map_err(|e| Error::from_io(format!("flush of {}", self.label), e))
    }

    fn read_medium(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        let count = requests.len();
        let read = self.path.read_medium(requests);
        read.map_err(|e| Error::of_batch("read from the medium", count, &self.label, e))
    }

    fn drop_cache(&self) {
        if sys::block_device_drop_cache(self.file()).is_err() {
            self.path.forget(0, self.opened_bytes);
        }
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        let size = self.size_bytes();
        if size_bytes == size {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unsuitable,
            format!(
                "resize of {} to {size_bytes} bytes: it always has {size}",
                self.label
            ),
        ))
    }

    fn logical_block_bytes(&self) -> u32 {
        self.logical_block_bytes
    }
}

/// Attributes of a disk in sysfs that name it for good, best first.
const NAMES: [&str; 6] = [
    "wwid",
    "device/wwid",
    "serial",
    "device/serial",
    "dm/uuid",
    "md/uuid",
];

fn identity_of(number: DeviceNumber) -> Identity {
    if let Some(backing) = holders::loop_backing(number) {
        let opened = File::open(backing);
        return opened.map_or_else(|_gone| Identity::unknown(), |f| file::identity_of(&f));
    }
    let (disk, partition) = (
        holders::disk_of(number).sysfs(),
        number.sysfs().join("partition"),
    );
    let Some((kind, name)) = NAMES
        .iter()
        .find_map(|&kind| Some((kind, fact(&disk.join(kind))?)))
    else {
        return Identity::unknown();
    };
    let partition = fact(&partition).unwrap_or_default();
    // A digest, because names are of any length.
    let text = format!("{kind}\n{name}\n{partition}\n");
    Identity::from_bytes(blockferry_core::checksum(text.as_bytes()).as_bytes())
}

fn evidence_of(number: DeviceNumber) -> Option<Evidence> {
    // Writes to the disk count for its partitions too.
    let disk = holders::disk_of(number).sysfs();
    if fact(&disk.join("queue/iostats")).as_deref() != Some("1") {
        return None;
    }
    let boot = proc::parse_boot_id(&fact(Path::new("/proc/sys/kernel/random/boot_id"))?)?;
    let sequence: u64 = fact(&disk.join("diskseq"))?.parse().ok()?;
    let sectors = proc::parse_written_sectors(&fact(&disk.join("stat"))?)?;
    let mut bytes = boot.to_vec();
    bytes.extend([sequence, sectors].map(u64::to_le_bytes).as_flattened());
    if let Some(backing) = holders::loop_backing(number) {
        // Somebody may write the file behind the loop device.
        let found = std::fs::metadata(backing).ok()?;
        let changed = [found.ctime(), found.ctime_nsec()].map(i64::to_le_bytes);
        bytes.extend(found.ino().to_le_bytes());
        bytes.extend(changed.as_flattened());
    }
    Some(Evidence::from_bytes(&bytes))
}

fn fact(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}
