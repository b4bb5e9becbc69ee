//! Where the new content comes from: a device here, or a source on the other side of a connection.

use std::rc::Rc;
use std::sync::Arc;

use blockferry_device::{BlockSource, Cancellable};
use blockferry_transport::message::Source;

use crate::error::Result;
use crate::options::Context;
use crate::remote::{Peer, examine};

/// The source of a run.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    Device(Arc<dyn BlockSource>),
    Peer(Rc<Peer>),
}

impl Origin {
    /// No read begins once the run is cancelled, wherever a worker is.
    pub(super) fn device(source: Arc<dyn BlockSource>, context: &Context) -> Self {
        Self::Device(Arc::new(Cancellable::new(source, context.cancel.clone())))
    }

    /// Bytes that crossed to the target's side, where there is a wire to cross.
    pub(super) fn crossed_bytes(&self) -> Option<u64> {
        match self {
            Self::Device(_) => None,
            Self::Peer(peer) => Some(peer.received_bytes()),
        }
    }

    /// What the source is now.
    pub(super) fn look(&self) -> Result<Source> {
        match self {
            Self::Device(source) => examine(&**source),
            Self::Peer(peer) => peer.examine(),
        }
    }
}
