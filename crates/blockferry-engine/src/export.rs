//! The points of a target as disks to read: to look inside, to try a failover, to boot early.

use std::sync::Arc;

use blockferry_device::{
    BlockSource, Evidence, Identity, ReadRequest, Result as DeviceResult, Status,
};
use blockferry_transfer_log::Unwritten;

use crate::error::{Error, Result};
use crate::status::{PointStatus, point_status};
use crate::target::Target;

/// Which point of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a target has no other points")]
pub enum ExportPoint {
    /// What [`rollback`](crate::rollback) would return it to.
    Old,
    /// What a prepared session will bring, while its group of disks has not decided. What is committed is applied when
    /// the target is opened, so that this is the current point then.
    New,
    /// What it holds.
    Current,
}

/// A point of a target, and what is known of it.
#[derive(Debug)]
#[non_exhaustive]
pub struct Exported {
    /// The content. As long as it is kept, so are the locks of the target: nobody syncs it meanwhile.
    pub source: Arc<dyn BlockSource>,
    /// The sync point that the content provably is; nothing if it has no name or the target was written since.
    pub point: Option<PointStatus>,
}

/// Takes a target to serve one of its points. Nothing is changed that opening it did not change.
///
/// # Errors
/// There is no such point, it is not complete, or what it needs is not provably there.
pub fn export(target: Target, which: ExportPoint) -> Result<Exported> {
    let replica = &target.replica;
    let view = match which {
        ExportPoint::Old => replica.old_view(),
        ExportPoint::New => replica.new_view(),
        ExportPoint::Current => replica.current_view(),
    };
    let label = target.label();
    let content = view.map_err(|e| Error::log(format!("export a point of {label}"), e))?;
    let point = match which {
        ExportPoint::Old => replica.retained().and_then(|kept| kept.point.as_ref()),
        ExportPoint::New => None,
        ExportPoint::Current => replica
            .point()
            .filter(|_| matches!(replica.unwritten(), Ok(Unwritten::Proven))),
    };
    let point = point.map(point_status);
    let source = Arc::new(Locked {
        content,
        _target: target,
    });
    Ok(Exported { source, point })
}

/// A point with the locks of its target.
// Fields are dropped in order: the content is let go of before the locks are.
#[derive(Debug)]
struct Locked {
    content: Arc<dyn BlockSource>,
    _target: Target,
}

impl BlockSource for Locked {
    fn label(&self) -> &str {
        self.content.label()
    }

    fn size_bytes(&self) -> u64 {
        self.content.size_bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> DeviceResult<()> {
        self.content.read_at(offset, buffer)
    }

    fn read_batch(&self, requests: &mut [ReadRequest<'_>]) -> DeviceResult<()> {
        self.content.read_batch(requests)
    }

    fn preferred_depth(&self) -> usize {
        self.content.preferred_depth()
    }

    fn status_at(&self, offset: u64) -> DeviceResult<(Status, u64)> {
        self.content.status_at(offset)
    }

    fn identity(&self) -> DeviceResult<Identity> {
        self.content.identity()
    }

    fn evidence(&self) -> DeviceResult<Evidence> {
        self.content.evidence()
    }
}
