//! Syncing from a provider of points (D7): begin, sync, and release only once the target holds the point.

use std::sync::Arc;

use blockferry_device::{PointProvider, PointRequest};

use crate::error::{Error, ErrorKind, Result};
use crate::options::{ChangesSince, Context, SyncOptions};
use crate::receipt::Receipt;
use crate::sync::sync;
use crate::target::Target;

/// Brings `target` to a point of `provider`, with the changes it knows of since the target's sync point. The
/// point is released after APPLIED and not before: a run that fails keeps its lease, and the next one takes it up
/// again. Leases that no unfinished session needs were left by a crash, and are released first.
///
/// # Errors
/// As [`sync`]; or the provider failed. If only the release failed the sync is done, and a later run releases.
pub fn sync_from(
    provider: &dyn PointProvider,
    target: &mut Target,
    options: &SyncOptions,
    context: &Context,
) -> Result<Receipt> {
    let failed = |e| Error::source("take a point of the source", e);
    let kept = reclaim(provider, target)?;
    let since = target.replica.point().map(|p| p.id.to_string());
    let request = PointRequest::new(since.as_deref(), kept.as_deref());
    let point = provider.begin(&request).map_err(failed)?;
    let mut options = options.clone();
    if let (Some(since), Some(changes)) = (since, point.changes) {
        options.changes = Some(ChangesSince::new(since, changes));
    }
    let mut receipt = sync(Arc::clone(&point.source), target, &options, context)?;
    receipt.consistency = Some(point.consistency.to_string());
    // APPLIED is durable: nobody will read this point, or the one an earlier run had begun, again.
    let leases = [
        Some(point.lease.clone()),
        kept.filter(|k| *k != point.lease),
    ];
    for lease in leases.into_iter().flatten().filter(|l| !l.is_empty()) {
        release(provider, &lease)?;
    }
    Ok(receipt)
}

/// Releases what a crash left behind, and returns the lease that the unfinished session may go on with.
fn reclaim(provider: &dyn PointProvider, target: &Target) -> Result<Option<String>> {
    let failed = |e| Error::source("list the leases of the source", e);
    let mut leases = provider.leases().map_err(failed)?;
    let kept = match target.replica.unfinished() {
        Some(_) => leases.pop(),
        None => None,
    };
    leases
        .iter()
        .try_for_each(|lease| release(provider, lease))?;
    Ok(kept)
}

fn release(provider: &dyn PointProvider, lease: &str) -> Result<()> {
    provider.release(lease).map_err(|e| {
        let message = format!("release lease {lease} of the source; the next run tries again");
        Error::because(ErrorKind::Source, message, e)
    })
}
