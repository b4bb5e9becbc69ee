//! [`OsDirectory`]: a held directory; every name is resolved in it, whatever is renamed above it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::data_path::WriteMode;
use crate::file::OsFile;
use crate::sys;
use crate::{Error, ErrorKind, LockGuard, Result, StorageDir, StorageFile};

/// A directory of the operating system.
#[derive(Debug)]
pub struct OsDirectory {
    path: PathBuf,
    label: String,
    handle: OwnedFd,
    write_mode: WriteMode,
}

impl OsDirectory {
    /// Opens an existing directory. Its files are written in [`WriteMode::default`].
    ///
    /// # Errors
    /// There is none, or it is no directory.
    pub fn open(path: &Path) -> Result<Self> {
        let label = path.display().to_string();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let handle = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|e| Error::from_io(format!("open of directory {label}"), e.into()))?;
        Ok(Self {
            path: path.to_owned(),
            label,
            handle,
            write_mode: WriteMode::default(),
        })
    }

    /// Creates a directory for its owner only (mode 0700), durably, and opens it.
    ///
    /// # Errors
    /// `ErrorKind::AlreadyExists`, or the file system failed.
    pub fn create(path: &Path) -> Result<Self> {
        rustix::fs::mkdir(path, Mode::RWXU).map_err(|e| {
            Error::from_io(
                format!("creation of directory {}", path.display()),
                e.into(),
            )
        })?;
        let created = Self::open(path)?;
        // The name is durable only with its parent.
        Self::open(parent_of(path))?.sync()?;
        Ok(created)
    }

    /// Opens a directory, creating it and its missing parents as [`Self::create`] does.
    ///
    /// # Errors
    /// The file system failed, or something else has the name.
    pub fn open_or_create(path: &Path) -> Result<Self> {
        match Self::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            outcome => return outcome,
        }
        let parent = parent_of(path);
        if parent != path {
            let _parent = Self::open_or_create(parent)?;
        }
        match Self::create(path) {
            // Somebody else was faster.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Self::open(path),
            outcome => outcome,
        }
    }

    /// The same directory with another way of writing its files.
    #[must_use]
    pub fn with_write_mode(mut self, write_mode: WriteMode) -> Self {
        self.write_mode = write_mode;
        self
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens an existing file for reading and writing, as [`StorageDir::open`] does.
    ///
    /// # Errors
    /// The file system failed or refused; the name is a symlink or no regular file.
    pub fn open_file(&self, name: &str) -> Result<Option<OsFile>> {
        let wrap = |file| OsFile::from_file(self.label_of(name), file, self.write_mode);
        self.open_raw(name)?.map(wrap).transpose()
    }

    /// Opens whatever has the name, except a symlink.
    pub(crate) fn open_raw(&self, name: &str) -> Result<Option<File>> {
        self.check_name(name)?;
        // O_NONBLOCK: opening a FIFO must not wait for its other end.
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let open = || {
            Ok(rustix::fs::openat(
                &self.handle,
                name,
                flags,
                Mode::empty(),
            )?)
        };
        let opened = sys::patiently(open);
        match opened.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO)) {
            Ok(file) => Ok(Some(file.into())),
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::LOOP) => Err(Error::new(
                ErrorKind::Unsuitable,
                format!("open of {}: it is a symbolic link", self.label_of(name)),
            )),
            Err(error) => Err(self.failed("open", name, error)),
        }
    }

    fn create_file(&self, name: &str, kind: OFlags) -> Result<File> {
        self.check_name(name)?;
        let flags = kind | OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&self.handle, name, flags, Mode::RUSR | Mode::WUSR);
        opened
            .map(File::from)
            .map_err(|e| self.failed("creation", name, e))
    }

    fn rename(&self, from: &str, to: &str, flags: RenameFlags) -> rustix::io::Result<()> {
        rustix::fs::renameat_with(&self.handle, from, &self.handle, to, flags)
    }

    /// Like a rename that replaces nothing, for file systems without it. A crash between the two leaves
    /// both names of one file; renaming again then reports that `to` exists.
    fn link_and_unlink(&self, from: &str, to: &str) -> rustix::io::Result<()> {
        rustix::fs::linkat(&self.handle, from, &self.handle, to, AtFlags::empty())?;
        rustix::fs::unlinkat(&self.handle, from, AtFlags::empty())
    }

    fn is_file(&self, entry: &rustix::fs::DirEntry) -> bool {
        match entry.file_type() {
            FileType::Unknown => {
                let found =
                    rustix::fs::statat(&self.handle, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW);
                found.is_ok_and(|f| FileType::from_raw_mode(f.st_mode).is_file())
            }
            known => known.is_file(),
        }
    }

    fn check_name(&self, name: &str) -> Result<()> {
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
            return Err(Error::new(
                ErrorKind::Unsuitable,
                format!(
                    "name {name:?} in {}: expected a single path component",
                    self.label
                ),
            ));
        }
        Ok(())
    }

    fn check_names(&self, one: &str, other: &str) -> Result<()> {
        self.check_name(one)?;
        self.check_name(other)
    }

    fn label_of(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }

    fn failed(&self, attempt: &str, name: &str, cause: Errno) -> Error {
        Error::from_io(
            format!("{attempt} of {}", self.label_of(name)),
            cause.into(),
        )
    }
}

impl StorageDir for OsDirectory {
    fn label(&self) -> &str {
        &self.label
    }

    fn create(&self, name: &str) -> Result<Arc<dyn StorageFile>> {
        let file = self.create_file(name, OFlags::EXCL)?;
        Ok(Arc::new(OsFile::from_file(
            self.label_of(name),
            file,
            self.write_mode,
        )?))
    }

    fn open(&self, name: &str) -> Result<Option<Arc<dyn StorageFile>>> {
        Ok(self.open_file(name)?.map(|file| Arc::new(file) as _))
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.check_name(name)?;
        match rustix::fs::unlinkat(&self.handle, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(self.failed("removal", name, error)),
        }
    }

    fn rename_new(&self, from: &str, to: &str) -> Result<()> {
        self.check_names(from, to)?;
        let renamed = match self.rename(from, to, RenameFlags::NOREPLACE) {
            Err(Errno::INVAL | Errno::NOSYS) => self.link_and_unlink(from, to),
            outcome => outcome,
        };
        renamed.map_err(|e| self.failed(&format!("renaming to {to:?}"), from, e))
    }

    fn exchange(&self, one: &str, other: &str) -> Result<()> {
        self.check_names(one, other)?;
        let attempt = format!("exchange with {other:?}");
        match self.rename(one, other, RenameFlags::EXCHANGE) {
            Err(Errno::INVAL | Errno::NOSYS) => Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{attempt} of {}: not on this file system",
                    self.label_of(one)
                ),
            )),
            outcome => outcome.map_err(|e| self.failed(&attempt, one, e)),
        }
    }

    fn names(&self) -> Result<Vec<String>> {
        let failed = |e: Errno| Error::from_io(format!("listing of {}", self.label), e.into());
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.handle).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            // Names that are not UTF-8 are not ours.
            if let (true, Ok(name)) = (self.is_file(&entry), entry.file_name().to_str()) {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn sync(&self) -> Result<()> {
        rustix::fs::fsync(&self.handle)
            .map_err(|e| Error::from_io(format!("flush of directory {}", self.label), e.into()))
    }

    fn available_bytes(&self) -> Result<u64> {
        let found = rustix::fs::fstatvfs(&self.handle)
            .map_err(|e| Error::from_io(format!("free space of {}", self.label), e.into()))?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }

    /// By the kind of file system; XFS may have been made without reflinks.
    fn may_clone(&self) -> bool {
        let found = rustix::fs::fstatfs(&self.handle);
        found.is_ok_and(|found| CLONING_FILE_SYSTEMS.contains(&found.f_type))
    }

    fn lock(&self, name: &str) -> Result<Box<dyn LockGuard>> {
        loop {
            let mut file = self.create_file(name, OFlags::empty())?;
            sys::try_ofd_lock(&file).map_err(|e| self.not_locked(name, &mut file, e))?;
            if self.is_current(name, &file)? {
                note_holder(&mut file);
                return Ok(Box::new(FileLock { _file: file }));
            }
            // Removed and made again between the two calls: that lock guards nothing.
        }
    }
}

impl OsDirectory {
    /// Whether somebody holds the lock of this name. Nobody who wants it is kept from it by that.
    ///
    /// # Errors
    /// It cannot be asked.
    pub fn is_locked(&self, name: &str) -> Result<bool> {
        let Some(file) = self.open_raw(name)? else {
            return Ok(false);
        };
        let conflict = sys::find_ofd_conflict(&file);
        let conflict = conflict.map_err(|cause| {
            Error::from_io(
                format!("look at the lock of {}", self.label_of(name)),
                cause,
            )
        })?;
        Ok(conflict.is_some())
    }

    /// Whether `name` still leads to this very file.
    fn is_current(&self, name: &str, file: &File) -> Result<bool> {
        let held = rustix::fs::fstat(file).map_err(|e| self.failed("status", name, e))?;
        match rustix::fs::statat(&self.handle, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => Ok((found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(self.failed("status", name, error)),
        }
    }

    fn not_locked(&self, name: &str, file: &mut File, cause: std::io::Error) -> Error {
        let label = self.label_of(name);
        if cause.kind() != std::io::ErrorKind::WouldBlock {
            return Error::from_io(format!("lock of {label}"), cause);
        }
        let mut holder = String::new();
        let noted = file
            .take(MAX_HOLDER_BYTES)
            .read_to_string(&mut holder)
            .is_ok();
        let by = match holder.trim() {
            pid if noted && !pid.is_empty() => format!("process {pid}"),
            _ => "another process".to_owned(),
        };
        Error::new(ErrorKind::Busy, format!("lock of {label}: held by {by}"))
    }
}

/// Magic numbers (statfs(2)) of Btrfs, XFS, OCFS2 and bcachefs.
const CLONING_FILE_SYSTEMS: [i64; 4] = [0x9123_683E, 0x5846_5342, 0x7461_636F, 0xCA45_1A4E];

/// A decimal process id and a line feed are shorter.
const MAX_HOLDER_BYTES: u64 = 32;

/// Leaves our process id for the error message of whoever comes second. Failing at it harms nobody.
fn note_holder(file: &mut File) {
    let _for_messages_only = file
        .set_len(0)
        .and_then(|()| writeln!(file, "{}", std::process::id()));
}

/// An OFD lock: gone when its file is closed, however the process ends.
#[derive(Debug)]
struct FileLock {
    _file: File,
}

impl LockGuard for FileLock {}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}
