//! Opens what a user names, and refuses what must not be read or written, naming who holds it.
//!
//! A source at rest is neither mounted writable nor open for writing. A target is used by nobody at all,
//! and stays locked against a second run for as long as what is returned here lives: a file by an OFD
//! lock and `flock`, a block device by `O_EXCL`.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::data_path::WriteMode;
use crate::holders::{Mounts, Object, Openers};
use crate::sys::{self, Lease};
use crate::{
    Access, BlockSource, Error, ErrorKind, ImageFormat, OsBlockDevice, OsDirectory, OsFile, Result,
    holders,
};

/// How a source is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SourceOptions {
    /// Accept a source that is mounted or open for writing. What is read is then a mixture of moments.
    pub crash_consistent: bool,
}

impl SourceOptions {
    /// Accepts, or not, a source that is being written.
    #[must_use]
    pub fn with_crash_consistent(mut self, accepted: bool) -> Self {
        self.crash_consistent = accepted;
        self
    }
}

/// Opens a raw image file or a block device for reading.
///
/// # Errors
/// `ErrorKind::Unsuitable`: neither, or an image format that is not raw. `ErrorKind::Busy`: not at rest.
/// Otherwise it cannot be opened or read.
pub fn open_source(path: &Path, options: SourceOptions) -> Result<Arc<dyn BlockSource>> {
    let label = path.display().to_string();
    // O_NONBLOCK: opening a FIFO must not wait for its other end.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = rustix::fs::open(path, flags, Mode::empty());
    let file = File::from(opened.map_err(|e| failed("open", path, e))?);
    let found = file.metadata().map_err(|e| failed("status", path, e))?;
    refuse_if("source", path, ErrorKind::Unsuitable, wrong_type(&found))?;
    let object = Object::of(&found);
    if !options.crash_consistent {
        let used = source_use(&file, object).map_err(|e| failed("check for writers", path, e))?;
        refuse_if("source", path, ErrorKind::Busy, used)?;
    }
    let source: Arc<dyn BlockSource> = match object {
        Object::Device(_) => Arc::new(OsBlockDevice::from_file(label, file)?),
        Object::File { .. } => Arc::new(OsFile::from_file(label, file, WriteMode::Buffered)?),
    };
    refuse_other_formats("source", &*source)?;
    Ok(source)
}

/// Why a source is not at rest.
fn source_use(file: &File, object: Object) -> io::Result<Option<String>> {
    if let Some(swap) = holders::swapped_on(object) {
        return Ok(Some(swap));
    }
    match object {
        Object::Device(number) => Ok(holders::mounted(number, Mounts::Writable)
            .or_else(|| holders::backing(object, Openers::Writers))
            .or_else(|| holders::open_elsewhere(object, Openers::Writers))),
        Object::File { .. } => lease_holder(file, object, Lease::NoWriters, Openers::Writers),
    }
}

/// Who has the file open: asks the kernel for a lease, which nobody can slip past, and /proc for names.
fn lease_holder(
    file: &File,
    object: Object,
    lease: Lease,
    openers: Openers,
) -> io::Result<Option<String>> {
    match sys::patiently(|| sys::probe_lease(file, lease)) {
        Ok(()) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Some(
            holders::open_elsewhere(object, openers).unwrap_or_else(|| match lease {
                Lease::NoWriters => "it is open for writing".to_owned(),
                Lease::Alone => "it is open elsewhere".to_owned(),
            }),
        )),
        // No leases here (file system, or not our file): /proc shows what it may.
        Err(_no_leases) => Ok(holders::open_elsewhere(object, openers)),
    }
}

/// Where a target is, or will be.
#[derive(Debug)]
#[expect(
    clippy::exhaustive_enums,
    reason = "callers must treat files and devices differently"
)]
pub enum TargetPlace {
    /// A name in a directory.
    File {
        /// The directory, held.
        directory: OsDirectory,
        /// The name in it.
        name: String,
        /// The file that has the name now, locked by us, if there is one.
        existing: Option<Arc<OsFile>>,
    },
    /// A block device, exclusively ours.
    Device(Arc<OsBlockDevice>),
}

/// Opens the place where a target is or will be, for writing, and locks it. Creates nothing.
///
/// # Errors
/// `ErrorKind::Busy`: mounted, swapped on, backing another device, locked, or open elsewhere.
/// `ErrorKind::Unsuitable`: a symbolic link to a file, a file with several names, an image format that is
/// not raw, neither file nor block device. Otherwise it cannot be opened.
pub fn open_target(path: &Path) -> Result<TargetPlace> {
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return open_place(path),
        Err(error) => return Err(failed("status", path, error)),
    };
    if found.is_symlink() {
        // Links below /dev/disk are how devices are named; a file's other name would be left behind.
        let leads_to_device =
            std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
        let reason = "it is a symbolic link; name the file itself".to_owned();
        refuse_if(
            "target",
            path,
            ErrorKind::Unsuitable,
            (!leads_to_device).then_some(reason),
        )?;
        return open_target_device(path);
    }
    if found.file_type().is_block_device() {
        return open_target_device(path);
    }
    open_place(path)
}

fn open_target_device(path: &Path) -> Result<TargetPlace> {
    let found = std::fs::metadata(path).map_err(|e| failed("status", path, e))?;
    let object = Object::of(&found);
    refuse_if("target", path, ErrorKind::Busy, device_use(object))?;
    let device = OsBlockDevice::open(path, Access::ReadWrite)?;
    lock("target", path, device.file(), object)?;
    refuse_other_formats("target", &device)?;
    Ok(TargetPlace::Device(Arc::new(device)))
}

fn device_use(object: Object) -> Option<String> {
    let Object::Device(number) = object else {
        return None;
    };
    holders::mounted(number, Mounts::Any)
        .or_else(|| holders::swapped_on(object))
        .or_else(|| holders::backing(object, Openers::Any))
        .or_else(|| holders::stacked_on(number))
        .or_else(|| holders::open_elsewhere(object, Openers::Writers))
}

fn open_place(path: &Path) -> Result<TargetPlace> {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .map(str::to_owned);
    let name = name.ok_or_else(|| {
        let reason = "expected a path that ends in a file name in UTF-8";
        Error::new(
            ErrorKind::Unsuitable,
            format!("target {}: {reason}", path.display()),
        )
    })?;
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let directory = OsDirectory::open(parent.unwrap_or(Path::new(".")))?;
    let existing = directory
        .open_raw(&name)?
        .map(|file| claim_file(path, file))
        .transpose()?;
    Ok(TargetPlace::File {
        directory,
        name,
        existing: existing.map(Arc::new),
    })
}

/// Checks an existing target file and locks it.
fn claim_file(path: &Path, file: File) -> Result<OsFile> {
    let found = file.metadata().map_err(|e| failed("status", path, e))?;
    refuse_if(
        "target",
        path,
        ErrorKind::Unsuitable,
        unsuitable_file(&found),
    )?;
    let object = Object::of(&found);
    let used =
        file_use(&file, path, object).map_err(|e| failed("check for other users", path, e))?;
    refuse_if("target", path, ErrorKind::Busy, used)?;
    lock("target", path, &file, object)?;
    let file = OsFile::from_file(path.display().to_string(), file, WriteMode::default())?;
    refuse_other_formats("target", &file)?;
    Ok(file)
}

fn unsuitable_file(found: &std::fs::Metadata) -> Option<String> {
    let names =
        || (found.nlink() > 1).then(|| format!("it has {} names (hard links)", found.nlink()));
    wrong_type(found).or_else(names)
}

fn wrong_type(found: &std::fs::Metadata) -> Option<String> {
    let known = found.is_file() || found.file_type().is_block_device();
    (!known).then(|| "expected a regular file or a block device".to_owned())
}

fn file_use(file: &File, path: &Path, object: Object) -> io::Result<Option<String>> {
    let known = holders::bound(file, path)
        .or_else(|| holders::swapped_on(object))
        .or_else(|| holders::backing(object, Openers::Any));
    match known {
        Some(known) => Ok(Some(known)),
        None => match lock_holder(file, object)? {
            // A lock says more about its holder than the open file does.
            Some(holder) => Ok(Some(holder)),
            None => lease_holder(file, object, Lease::Alone, Openers::Any),
        },
    }
}

fn lock_holder(file: &File, object: Object) -> io::Result<Option<String>> {
    let conflict = match sys::find_ofd_conflict(file) {
        Ok(conflict) => conflict,
        Err(error) if has_no_locks(&error) => None,
        Err(error) => return Err(error),
    };
    let Some(lock) = conflict else {
        return Ok(None);
    };
    if let Some(process) = lock.process {
        return Ok(Some(format!("it is locked by process {process}")));
    }
    let locked = if is_qemu_lock(lock.start) {
        "it is locked as QEMU locks the images of its machines"
    } else {
        "it is locked by another process or session"
    };
    // The lock of an open file description belongs to no process; those that have the file open are known.
    let opened = holders::open_elsewhere(object, Openers::Any);
    Ok(Some(opened.map_or_else(
        || locked.to_owned(),
        |opened| format!("{locked}; {opened}"),
    )))
}

/// QEMU locks one byte for each permission that it uses, from byte 100 on, and one for each that it does not
/// share, from byte 200 on (`raw_apply_lock_bytes` in QEMU's block/file-posix.c). The lock of a whole target
/// covers both, so QEMU notices us just as well.
fn is_qemu_lock(start: i64) -> bool {
    /// A permission is one bit of a u64.
    const PERMISSIONS: i64 = 64;
    [100, 200]
        .into_iter()
        .any(|base| (base..base + PERMISSIONS).contains(&start))
}

/// Takes both kinds of locks; they last as long as the open file description.
fn lock(role: &str, path: &Path, file: &File, object: Object) -> Result<()> {
    let ofd = sys::try_ofd_lock(file);
    let flock = || {
        let operation = FlockOperation::NonBlockingLockExclusive;
        rustix::fs::flock(file, operation).map_err(io::Error::from)
    };
    match ofd.and_then(|()| flock()) {
        Ok(()) => Ok(()),
        Err(error) if has_no_locks(&error) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            let holder = lock_holder(file, object).ok().flatten();
            let holder =
                holder.unwrap_or_else(|| "it is locked by another process or session".to_owned());
            refuse_if(role, path, ErrorKind::Busy, Some(holder))
        }
        Err(error) => Err(failed("lock", path, error)),
    }
}

/// File systems without locks cannot be shared by two runs that know nothing of each other anyway.
fn has_no_locks(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOLCK | libc::ENOSYS)
    )
}

fn refuse_if(role: &str, path: &Path, kind: ErrorKind, reason: Option<String>) -> Result<()> {
    match reason {
        Some(reason) => Err(Error::new(
            kind,
            format!("{role} {}: {reason}", path.display()),
        )),
        None => Ok(()),
    }
}

/// Refuses a device whose bytes are an image of a format that is not raw. `role` is for the message: source or target.
///
/// # Errors
/// `ErrorKind::Unsuitable` if they are one; or it cannot be read.
pub fn refuse_other_formats(role: &str, source: &dyn BlockSource) -> Result<()> {
    let size = source.size_bytes();
    let probe = usize::try_from(size)
        .unwrap_or(usize::MAX)
        .min(ImageFormat::PROBE_BYTES);
    let (mut head, mut tail) = (vec![0; probe], vec![0; probe]);
    source.read_at(0, &mut head)?;
    source.read_at(size - probe as u64, &mut tail)?;
    match ImageFormat::detect(&head, &tail) {
        Some(format) => Err(Error::new(
            ErrorKind::Unsuitable,
            format!(
                "{role} {}: expected a raw image, found {format}",
                source.label()
            ),
        )),
        None => Ok(()),
    }
}

/// Whether two paths lead to the same bytes: by links, by device nodes, as a loop device and its file, or
/// as a disk and its partition. A path that leads nowhere is the same as none.
///
/// # Errors
/// A path cannot be looked at.
pub fn same_object(a: &Path, b: &Path) -> Result<bool> {
    match (layers(a)?, layers(b)?) {
        // Two partitions of one disk lie on the same file if that is a loop device, and still share no bytes.
        (Some(a), Some(b)) if holders::are_of_one_disk(a[0], b[0]) => {
            Ok(holders::touches(a[0], b[0]))
        }
        (Some(a), Some(b)) => Ok(a.iter().any(|&x| b.iter().any(|&y| holders::touches(x, y)))),
        _ => Ok(false),
    }
}

/// What the path leads to, and what loop devices lie on below it; `None` if it leads nowhere.
fn layers(path: &Path) -> Result<Option<Vec<Object>>> {
    /// Loop devices on files on loop devices: nobody stacks them deeper on purpose.
    const MAX_LAYERS: usize = 8;
    let mut layers = Vec::new();
    let mut path = path.to_owned();
    loop {
        let found = match std::fs::metadata(&path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) => return Err(failed("status", &path, error)),
        };
        let object = Object::of(&found);
        layers.push(object);
        let Object::Device(number) = object else {
            break;
        };
        match holders::loop_backing(holders::disk_of(number)) {
            Some(backing) if layers.len() < MAX_LAYERS => path = backing,
            _ => break,
        }
    }
    Ok((!layers.is_empty()).then_some(layers))
}

fn failed(attempt: &str, path: &Path, cause: impl Into<io::Error>) -> Error {
    Error::from_io(format!("{attempt} of {}", path.display()), cause.into())
}
