//! Opening a target: its place, its locks, its state directory.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockferry_device::{
    BlockTarget, OsDirectory, StorageDir, TargetPlace, WriteMode, open_target, refuse_other_formats,
};
use blockferry_nbd::{NbdDevice, NbdOptions, open_image_target};
use blockferry_transfer_log::{GroupVerdicts, Place, Recovered, Replica, Unwritten};

use crate::address::DiskAddress;
use crate::error::{Error, ErrorKind, Result};
use crate::status::status;

/// Where states are kept, and how exports are reached.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TargetOptions {
    /// The state directory of this target, instead of the usual place.
    pub state_dir: Option<PathBuf>,
    /// Holds the states of devices and exports, and the index of all targets of this host.
    pub device_state_root: PathBuf,
    /// How a target that is an NBD export is reached.
    pub nbd: NbdOptions,
    /// Where the socket of the program is that serves an image: a directory with a short path.
    pub scratch: PathBuf,
}

impl TargetOptions {
    /// `device_state_root` is usually `/var/lib/blockferry`.
    #[must_use]
    pub fn new(device_state_root: impl Into<PathBuf>) -> Self {
        Self {
            state_dir: None,
            device_state_root: device_state_root.into(),
            nbd: NbdOptions::default(),
            scratch: "/tmp".into(),
        }
    }

    /// With the state in a directory of its own.
    #[must_use]
    pub fn with_state_dir(mut self, state_dir: Option<PathBuf>) -> Self {
        self.state_dir = state_dir;
        self
    }

    /// The state directory of the target at `address`: beside a file, below the root for a device or an export.
    pub(crate) fn state_path(&self, address: &DiskAddress) -> PathBuf {
        if let Some(dir) = &self.state_dir {
            return dir.clone();
        }
        let Some(path) = address.path() else {
            return self.device_state_root.join(address.flat_name());
        };
        let is_device = fs::metadata(path)
            .is_ok_and(|found| std::os::unix::fs::FileTypeExt::is_block_device(&found.file_type()));
        if is_device {
            let resolved = path
                .canonicalize()
                .unwrap_or_else(|_unresolved| path.to_owned());
            return self
                .device_state_root
                .join(DiskAddress::Path(resolved).flat_name());
        }
        let mut name = OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(".blockferry");
        path.with_file_name(name)
    }
}

/// A target with its state directory, both locked. Opening it finishes what an earlier run left decided.
#[derive(Debug)]
pub struct Target {
    pub(crate) replica: Replica,
    /// Set where a receipt may be left.
    pub(crate) state_path: Option<PathBuf>,
    /// Holds the locks on the target, where there are any.
    _locks: Option<TargetPlace>,
}

impl Target {
    /// Opens the target at `address` and its state.
    ///
    /// # Errors
    /// The target is refused (mounted, open, locked, linked, an image format …), its state is damaged or held
    /// by someone else, or a decision could not be carried out.
    pub fn open(address: impl Into<DiskAddress>, options: &TargetOptions) -> Result<Self> {
        Self::open_in_group(address, options, None)
    }

    /// As [`Self::open`], with someone who answers for groups of disks.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_in_group(
        address: impl Into<DiskAddress>,
        options: &TargetOptions,
        groups: Option<&dyn GroupVerdicts>,
    ) -> Result<Self> {
        let address = address.into();
        let (place, locks) = open_place(&address, options)?;
        let state_path = options.state_path(&address);
        let state = open_state(&state_path)?;
        let mut target = Self::from_group_member(place, Arc::new(state), groups)?;
        target.state_path = Some(state_path);
        target._locks = locks;
        remember(&address, options);
        Ok(target)
    }

    /// Puts a target together from storage of the caller's own.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn from_parts(place: Place, state: Arc<dyn StorageDir>) -> Result<Self> {
        Self::from_group_member(place, state, None)
    }

    /// As [`Self::from_parts`], with someone who answers for groups of disks.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn from_group_member(
        place: Place,
        state: Arc<dyn StorageDir>,
        groups: Option<&dyn GroupVerdicts>,
    ) -> Result<Self> {
        let label = place.label();
        let replica = Replica::open(place, state, groups, &|_, _| {})
            .map_err(|e| Error::log(format!("open the state of {label}"), e))?;
        Ok(Self {
            replica,
            state_path: None,
            _locks: None,
        })
    }

    /// What opening it found and did.
    #[must_use]
    pub fn recovered(&self) -> &Recovered {
        self.replica.recovered()
    }

    /// Whether evidence says that nobody wrote it since its point.
    pub(crate) fn is_unwritten(&self) -> Result<bool> {
        let unwritten = self.replica.unwritten();
        let unwritten = unwritten.map_err(|e| Error::log("examine the target", e))?;
        Ok(unwritten == Unwritten::Proven)
    }

    /// The replica below, for those who drive sessions themselves.
    #[must_use]
    pub fn replica(&mut self) -> &mut Replica {
        &mut self.replica
    }

    /// For messages.
    #[must_use]
    pub fn label(&self) -> String {
        self.replica.label()
    }
}

/// Opens the place, and locks it if that can be done; creates nothing.
pub(crate) fn open_place(
    address: &DiskAddress,
    options: &TargetOptions,
) -> Result<(Place, Option<TargetPlace>)> {
    let failed = |e| Error::target(format!("open target {address}"), e);
    match address {
        DiskAddress::Path(path) => {
            let locks = open_target(path).map_err(failed)?;
            Ok((place_of(&locks)?, Some(locks)))
        }
        DiskAddress::Image(format, path) => {
            let device = open_image_target(*format, path, &options.scratch).map_err(failed)?;
            Ok((Place::Device(device), None))
        }
        DiskAddress::Nbd(export) => {
            let device = NbdDevice::open_target(export, &options.nbd).map_err(failed)?;
            refuse_other_formats("target", &*device).map_err(failed)?;
            Ok((Place::Device(device), None))
        }
    }
}

/// The place as the transfer log wants it.
fn place_of(opened: &TargetPlace) -> Result<Place> {
    match opened {
        TargetPlace::File {
            directory, name, ..
        } => {
            let dir = OsDirectory::open(directory.path())
                .map_err(|e| Error::target("open the target's directory", e))?;
            Ok(Place::File {
                dir: Arc::new(dir),
                name: name.clone(),
            })
        }
        TargetPlace::Device(device) => {
            let device: Arc<dyn BlockTarget> = Arc::clone(device) as _;
            Ok(Place::Device(device))
        }
    }
}

fn open_state(path: &Path) -> Result<OsDirectory> {
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(|e| {
            let message = format!("create {} for the state of the target", parent.display());
            Error::because(ErrorKind::Target, message, e)
        })?;
    }
    refuse_volatile(path)?;
    let dir = OsDirectory::open_or_create(path)
        .map_err(|e| Error::target(format!("open state directory {}", path.display()), e))?;
    Ok(dir.with_write_mode(WriteMode::Direct))
}

/// A state on a file system that forgets would break the promise at the first power loss.
fn refuse_volatile(path: &Path) -> Result<()> {
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58f6;
    let existing = path
        .ancestors()
        .find(|p| p.exists())
        .unwrap_or(Path::new("."));
    let found = rustix::fs::statfs(existing).map(|s| s.f_type);
    match found {
        Ok(TMPFS | RAMFS) => Err(Error::new(
            ErrorKind::Target,
            format!(
                "state directory {}: it is on a file system in memory, which forgets the transfer log at a \
                 power loss; name another with --state",
                path.display()
            ),
        )),
        _ => Ok(()),
    }
}

/// Leaves the address in the index of this host, so that a status without a target finds it. Best effort.
fn remember(address: &DiskAddress, options: &TargetOptions) {
    let index = options.device_state_root.join("targets");
    let resolved = address.resolved();
    let (entry, text) = (index.join(resolved.flat_name()), resolved.text());
    let is_known = fs::read(&entry).is_ok_and(|known| known == text.as_bytes());
    if !is_known && fs::create_dir_all(&index).is_ok() {
        let _best_effort = fs::write(entry, text.as_bytes());
    }
}

/// Removes all that is recorded of the target at `address`, without opening it: for one that somebody else has taken over,
/// and whose points mean nothing any more. Nothing happens where nothing is recorded.
///
/// # Errors
/// A session is unfinished, somebody works on it, or the state cannot be removed.
pub fn forget(address: impl Into<DiskAddress>, options: &TargetOptions) -> Result<()> {
    let label = address.into();
    let found = status(&label, options)?;
    if found.session.is_some() || found.running {
        let text = format!("forget the state of {label}: a session of it is unfinished");
        return Err(Error::new(ErrorKind::Target, text));
    }
    let state_path = options.state_path(&label);
    let failed = |cause| {
        let cause =
            blockferry_device::Error::from_io(format!("forget the state of {label}"), cause);
        Error::target("forget a target", cause)
    };
    // Away in one step: half a state would be a damaged one.
    let mut away = state_path.clone().into_os_string();
    away.push(".forgotten");
    let remove = |path: &Path| match fs::remove_dir_all(path) {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => Err(failed(cause)),
        _ => Ok(()),
    };
    remove(Path::new(&away))?;
    match fs::rename(&state_path, &away) {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => return Err(failed(cause)),
        _ => {}
    }
    remove(Path::new(&away))
}

/// Every target that was synced from this host and still has a state at its usual place.
#[must_use]
pub fn list_targets(device_state_root: &Path) -> Vec<DiskAddress> {
    let Ok(entries) = fs::read_dir(device_state_root.join("targets")) else {
        return Vec::new();
    };
    let usual = TargetOptions::new(device_state_root);
    let has_state = |target: &DiskAddress| {
        // A device that is not plugged in looks like a file that is absent.
        let places = [
            usual.state_path(target),
            device_state_root.join(target.flat_name()),
        ];
        places.iter().any(|place| !is_absent(place))
    };
    let mut targets: Vec<DiskAddress> = entries
        .flatten()
        .filter_map(|e| fs::read(e.path()).ok())
        .filter_map(|text| DiskAddress::parse(OsString::from_vec(text)).ok())
        .filter(has_state)
        .collect();
    targets.sort_by_key(DiskAddress::text);
    targets
}

/// Provably: what cannot be looked at may be there.
fn is_absent(path: &Path) -> bool {
    fs::metadata(path).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
}
