//! Before anything is read: whose is the target, do the sizes fit, and is there a session to go on with.

use blockferry_transfer_log::Strategy;

use super::Run;
use crate::error::{Error, ErrorKind, Result};
use crate::fence::{self, Found};
use crate::options::Mode;
use crate::plan::Choice;
use crate::target::Target;

impl Run<'_> {
    /// Another run that was at it does not go on any more.
    pub(super) fn take(&mut self, target: &Target) -> Result<()> {
        let state = target.replica.state_dir();
        let found = fence::take(&**state, self.options.attempt, &self.target)?;
        if found == Found::WithoutItsState {
            let what = format!(
                "what an attempt of this run left in the state of {} is gone: it begins anew",
                self.target
            );
            self.warn("state_lost", what)?;
        }
        Ok(())
    }

    pub(super) fn check_sizes(&self, target: &Target) -> Result<()> {
        let Some(device) = target.replica.target() else {
            return Ok(());
        };
        let (old, new) = (device.size_bytes(), self.geometry.image_bytes());
        if !target.replica.is_file() && old < new {
            return Err(Error::new(
                ErrorKind::Target,
                format!(
                    "target {} has {old} bytes, the source has {new}: it is too small",
                    self.target
                ),
            ));
        }
        if target.replica.is_file() && old > new && !self.options.allow_shrink {
            return Err(Error::new(
                ErrorKind::Target,
                format!(
                    "target {} has {old} bytes, the source only {new}: pass --allow-shrink to cut it",
                    self.target
                ),
            ));
        }
        Ok(())
    }

    /// What to do with an unfinished session: go on with it if it fits, else drop it, said aloud.
    pub(super) fn settle_unfinished(&mut self, target: &mut Target) -> Result<Option<Choice>> {
        let Some(header) = target.replica.unfinished().cloned() else {
            return Ok(None);
        };
        let mode = Mode::from_code(header.mode);
        let same_mode = matches!(self.options.mode, Mode::Auto) || self.options.mode == mode;
        let same_strategy = self.options.strategy.is_none_or(|s| s == header.strategy);
        let same_undo = header.undo == self.options.undo || header.strategy == Strategy::Direct;
        let fits = header.geometry == self.geometry && same_mode && same_strategy && same_undo;
        let can = target
            .replica
            .can_resume()
            .map_err(|e| Error::log("look at the session", e))?;
        if fits && can {
            self.id = header.session;
            let replica = &target.replica;
            let unwritten = replica
                .is_unwritten_since_session()
                .map_err(|e| Error::log("look at the target", e))?;
            // Where the target has a point, it is said with what is known of that.
            if header.strategy == Strategy::Redo && !unwritten && replica.point().is_none() {
                let what = format!(
                    "the target is not provably unwritten since session {} was begun: what is not staged is compared \
                     afresh",
                    header.session
                );
                self.warn("target_written", what)?;
            }
            return Ok(Some(Choice {
                mode,
                strategy: header.strategy,
                reason: format!("resuming session {}", header.session),
                required_bytes: 0,
                available_bytes: u64::MAX,
            }));
        }
        let why = if fits {
            "the target was written since"
        } else {
            "it was begun for another sync"
        };
        self.warn(
            "session_dropped",
            format!("unfinished session {} is dropped: {why}", header.session),
        )?;
        target
            .replica
            .cancel()
            .map_err(|e| Error::log("drop the unfinished session", e))?;
        Ok(None)
    }
}
