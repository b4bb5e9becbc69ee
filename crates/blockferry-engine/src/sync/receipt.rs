//! What a run leaves to tell.

use blockferry_core::Root;
use blockferry_transfer_log::{Proof, SessionId, SessionTotals, Strategy};

use super::{Run, writes_blocks};
use crate::plan::Choice;
use crate::receipt::{RECEIPT_VERSION, Receipt};
use crate::target::Target;

impl Run<'_> {
    #[expect(
        clippy::too_many_arguments,
        reason = "a receipt has many parts and one maker"
    )]
    pub(super) fn receipt(
        &self,
        target: &Target,
        choice: &Choice,
        strategy: Option<Strategy>,
        root: Root,
        point: SessionId,
        totals: SessionTotals,
        proven_bytes: u64,
    ) -> Receipt {
        let stats = target.replica.stats();
        let compared = !writes_blocks(choice);
        Receipt {
            version: RECEIPT_VERSION,
            outcome: if strategy.is_some() {
                "applied"
            } else {
                "identical"
            }
            .into(),
            mode: choice.mode,
            requested_mode: self.options.mode,
            strategy,
            reason: choice.reason.clone(),
            source: self.stamp.address.clone(),
            target: self.target.clone(),
            consistency: None,
            source_bytes: self.geometry.image_bytes(),
            scanned_bytes: self.counts.source_read,
            target_read_bytes: self.counts.target_read,
            changed_bytes: compared.then_some(totals.live_bytes + totals.live_zero_bytes),
            sent_bytes: self.origin.crossed_bytes().unwrap_or(totals.staged_bytes),
            staged_bytes: totals.staged_bytes,
            resumed_bytes: totals.resumed_bytes,
            restaged_bytes: totals.restaged_bytes,
            log_bytes: stats.log_bytes(),
            zero_bytes: totals.zero_bytes,
            proof: match self.options.proof {
                Proof::ReadBack => "read-back",
                Proof::Flush => "flush",
            }
            .into(),
            proven_bytes,
            source_root: root.to_string(),
            target_root: root.to_string(),
            sync_point: point.to_string(),
            previous_point: None,
            rollback_available: target.replica.retained().is_some(),
            flushes: stats.flushes() - self.flushes_before,
            records: stats.records(),
            fallbacks: self.fallbacks.clone(),
            elapsed_seconds: self.elapsed(self.started),
            downtime_seconds: None,
            phases: self.phases.clone(),
        }
    }
}
