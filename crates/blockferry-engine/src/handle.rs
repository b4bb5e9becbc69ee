//! The session of a run, begun only when something has to be staged; and the saved manifest it may use.

use std::io::Read;
use std::sync::Arc;

use blockferry_core::{ChangeMap, Geometry, ManifestReader};
use blockferry_transfer_log::{
    ManifestFile, ManifestSource, Plan, Replica, Session, SessionId, SourceStamp, StagedView,
    Stager,
};

use crate::error::{Error, ErrorKind, Result};
use crate::knowledge::{Doubt, Doubts, Knowledge, ManifestTrust};
use crate::recorder::Cursor;

/// A session that exists, or the means to begin it.
#[derive(Debug)]
pub(crate) enum LogHandle<'r> {
    Idle(&'r mut Replica, Plan),
    Open(Box<Session<'r>>),
    /// Beginning it failed.
    Failed,
}

impl<'r> LogHandle<'r> {
    /// The session, begun now if it was not.
    pub(crate) fn session(&mut self) -> Result<&mut Session<'r>> {
        if let Self::Idle(..) = self
            && let Self::Idle(replica, plan) = std::mem::replace(self, Self::Failed)
        {
            let session = replica
                .begin(&plan)
                .map_err(|e| Error::log("begin a session", e))?;
            *self = Self::Open(Box::new(session));
        }
        match self {
            Self::Open(session) => Ok(session),
            Self::Idle(..) | Self::Failed => Err(Error::new(
                ErrorKind::Internal,
                "the session could not be begun",
            )),
        }
    }

    pub(crate) fn into_session(self) -> Result<Session<'r>> {
        match self {
            Self::Open(session) => Ok(*session),
            Self::Idle(..) | Self::Failed => Err(Error::new(
                ErrorKind::Internal,
                "nothing was staged to commit",
            )),
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        matches!(self, Self::Open(_))
    }

    pub(crate) fn create_manifest(&mut self, id: SessionId) -> Result<ManifestFile> {
        let created = match self {
            Self::Idle(replica, _) => replica.create_manifest(id),
            Self::Open(session) => session.create_manifest(),
            Self::Failed => return Err(Error::new(ErrorKind::Internal, "no session")),
        };
        created.map_err(|e| Error::log("create the manifest", e))
    }

    /// What a resumed session has staged.
    pub(crate) fn staged_view(&self) -> Option<Arc<StagedView>> {
        match self {
            Self::Open(session) => Some(session.staged_view()).filter(|v| !v.is_empty()),
            Self::Idle(..) | Self::Failed => None,
        }
    }

    pub(crate) fn stager(&self) -> Option<Stager> {
        match self {
            Self::Open(session) => Some(session.stager()),
            Self::Idle(..) | Self::Failed => None,
        }
    }

    /// The source as it was when the session began.
    pub(crate) fn source_stamp(&self) -> Option<&SourceStamp> {
        match self {
            Self::Open(session) => Some(session.source()),
            Self::Idle(..) | Self::Failed => None,
        }
    }
}

/// What an earlier run left to know: the saved manifest of the target's last point, the sides it is proven for,
/// and what a change map says since then.
#[derive(Clone, Debug)]
pub(crate) struct PointFiles {
    pub(crate) manifest: Option<ManifestSource>,
    /// Nothing where the manifest may only be compared with.
    pub(crate) trust: Option<ManifestTrust>,
    pub(crate) changes: Option<Arc<ChangeMap>>,
    pub(crate) is_file: bool,
    /// Digests travel whole.
    pub(crate) exact: bool,
}

type Input = Box<dyn Read + Send>;

impl PointFiles {
    /// Opens the manifest that the result may turn out to equal, proven or not: it is compared, not trusted.
    pub(crate) fn open_target(&self) -> Option<Input> {
        self.manifest.as_ref().and_then(ManifestSource::open)
    }

    pub(crate) fn reopener(&self) -> Box<dyn Fn() -> Option<Input> + '_> {
        Box::new(|| self.open_target())
    }

    /// What a scan may leave unread.
    pub(crate) fn knowledge(
        &self,
        geometry: Geometry,
        seed: u64,
        doubts: Doubts,
    ) -> Knowledge<Input> {
        let opened = self
            .trust
            .and_then(|trust| Some((self.open_target()?, trust)));
        let saved = opened.and_then(|(input, trust)| match ManifestReader::open(input) {
            Ok(reader) if reader.geometry() == geometry => Some((Cursor::new(reader), trust)),
            Ok(_) => {
                doubts.raise(Doubt::Manifest("it has another geometry".to_owned()));
                None
            }
            Err(damage) => {
                doubts.raise(Doubt::Manifest(damage.to_string()));
                None
            }
        });
        Knowledge::new(geometry, saved, self.changes.clone(), seed, doubts)
    }

    /// Without what was doubted.
    pub(crate) fn distrust(&mut self, doubt: &Doubt) {
        match doubt {
            Doubt::Digests => self.exact = true,
            Doubt::Map { .. } => self.changes = None,
            Doubt::Manifest(_) => {
                // What a map claims to be the same is what the manifest says: it falls with the manifest.
                self.changes = None;
                self.manifest = None;
                self.trust = None;
            }
        }
    }
}
