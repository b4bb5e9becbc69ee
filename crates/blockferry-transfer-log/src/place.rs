//! Where a target is: a file in a directory (present or not), or a device.

use std::sync::Arc;

use blockferry_device::{BlockTarget, Identity, StorageDir, StorageFile};

use crate::error::{Error, Result};
use crate::format::SessionId;

/// Where a target is.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Place {
    /// A file; it may be absent.
    File {
        /// The directory that holds it, and its siblings while they are written.
        dir: Arc<dyn StorageDir>,
        /// Its name there.
        name: String,
    },
    /// A device of fixed size: only redo and direct are possible.
    Device(Arc<dyn BlockTarget>),
}

impl Place {
    /// For messages.
    #[must_use]
    pub fn label(&self) -> String {
        match self {
            Self::File { dir, name } => format!("{}/{name}", dir.label().trim_end_matches('/')),
            Self::Device(device) => device.label().to_owned(),
        }
    }

    /// Opens what is there now, on a fresh handle where there is one to be had.
    pub(crate) fn open(&self) -> Result<Content> {
        match self {
            Self::Device(device) => Ok(Content::Device(Arc::clone(device))),
            Self::File { dir, name } => {
                let file = dir
                    .open(name)
                    .map_err(|e| Error::target(format!("open target {}", self.label()), e))?;
                Ok(file.map_or(Content::Absent, Content::File))
            }
        }
    }

    /// The directory and name of a file target.
    pub(crate) fn file(&self) -> Option<(&Arc<dyn StorageDir>, &str)> {
        match self {
            Self::File { dir, name } => Some((dir, name)),
            Self::Device(_) => None,
        }
    }

    /// Name of the sibling a session writes.
    pub(crate) fn sibling(&self, session: SessionId) -> String {
        match self {
            Self::File { name, .. } => format!(".{name}.{session}.blockferry"),
            Self::Device(_) => String::new(),
        }
    }

    /// Whether a session's sibling is there and is the file of this number: a name proves nothing of what it names.
    pub(crate) fn sibling_is(&self, session: SessionId, number: Option<u64>) -> Result<bool> {
        let Some((dir, _)) = self.file() else {
            return Ok(false);
        };
        let name = self.sibling(session);
        let failed = |e| Error::target(format!("identify {name} beside the target"), e);
        let sibling = dir.open(&name).map_err(failed)?;
        let found = sibling.map(|s| s.file_id()).transpose().map_err(failed)?;
        Ok(found.is_some() && found == number)
    }
}

/// What is at a place now.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    Absent,
    File(Arc<dyn StorageFile>),
    Device(Arc<dyn BlockTarget>),
}

impl Content {
    pub(crate) fn target(&self) -> Option<Arc<dyn BlockTarget>> {
        match self {
            Self::Absent => None,
            Self::File(file) => Some(Arc::clone(file).into_target()),
            Self::Device(device) => Some(Arc::clone(device)),
        }
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::File(file) => file.size_bytes(),
            Self::Device(device) => device.size_bytes(),
        }
    }

    /// Identity of the target. A file's state lives beside it and the file itself is replaced by an exchange,
    /// so only a device has one that counts.
    pub(crate) fn identity(&self) -> Result<Identity> {
        match self {
            Self::Absent | Self::File(_) => Ok(Identity::unknown()),
            Self::Device(device) => device
                .identity()
                .map_err(|e| Error::target("identify the target", e)),
        }
    }

    pub(crate) fn evidence(&self) -> Result<blockferry_device::Evidence> {
        match self.target() {
            None => Ok(blockferry_device::Evidence::unknown()),
            Some(target) => target
                .evidence()
                .map_err(|e| Error::target("examine the target", e)),
        }
    }

    pub(crate) fn file_id(&self) -> Result<Option<u64>> {
        match self {
            Self::File(file) => file
                .file_id()
                .map(Some)
                .map_err(|e| Error::target("identify the target", e)),
            Self::Absent | Self::Device(_) => Ok(None),
        }
    }
}
