//! Where the new content comes from: a device here, or a source on the other side of a connection.

use std::rc::Rc;
use std::sync::Arc;

use blockferry_device::{BlockSource, Cancellable, Evidence, Identity};

use crate::error::{Error, Result};
use crate::options::Context;
use crate::remote::Peer;

/// The source of a run.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    Device(Arc<dyn BlockSource>),
    Peer(Rc<Peer>),
}

/// A source at some moment.
pub(super) struct Found {
    pub(super) size_bytes: u64,
    pub(super) identity: Identity,
    pub(super) evidence: Evidence,
}

impl Origin {
    /// No read begins once the run is cancelled, wherever a worker is.
    pub(super) fn device(source: Arc<dyn BlockSource>, context: &Context) -> Self {
        Self::Device(Arc::new(Cancellable::new(source, context.cancel.clone())))
    }

    /// For messages.
    pub(super) fn label(&self) -> &str {
        match self {
            Self::Device(source) => source.label(),
            Self::Peer(peer) => &peer.source.label,
        }
    }

    /// Bytes that crossed to the target's side, where there is a wire to cross.
    pub(super) fn crossed_bytes(&self) -> Option<u64> {
        match self {
            Self::Device(_) => None,
            Self::Peer(peer) => Some(peer.received_bytes()),
        }
    }

    /// What the source is now.
    pub(super) fn look(&self) -> Result<Found> {
        match self {
            Self::Device(source) => {
                let failed = |e| Error::source(format!("examine source {}", source.label()), e);
                Ok(Found {
                    identity: source.identity().map_err(failed)?,
                    evidence: source.evidence().map_err(failed)?,
                    size_bytes: source.size_bytes(),
                })
            }
            Self::Peer(peer) => {
                let found = peer.examine()?;
                Ok(Found {
                    size_bytes: found.size_bytes,
                    identity: found.identity,
                    evidence: found.evidence,
                })
            }
        }
    }
}
