//! Mode and strategy, from what the caller asked for, what the target allows and what a sample shows.

use std::sync::Arc;

use blockferry_device::{BlockSource, StorageDir};
use blockferry_pipeline::Phase;

use super::Run;
use crate::error::{Error, Result};
use crate::plan::{Choice, Situation, check_space, choose};
use crate::sample::Sample;
use crate::target::Target;

impl Run<'_> {
    pub(super) fn choose(&mut self, target: &mut Target) -> Result<Choice> {
        let start = self.context.clock.now();
        let present = target.replica.target();
        let target_source = present.clone().map(|t| t as Arc<dyn BlockSource>);
        let seed = self.seed();
        self.context
            .progress(Phase::Sampling, 0, self.geometry.image_bytes(), 0);
        let sample = Sample::take(
            &*self.source,
            target_source.as_deref(),
            &self.geometry,
            seed,
            self.context,
        )?;
        let choice = choose(self.options, self.situation(target)?, &sample);
        self.time("sampling", start);
        check_space(&choice)?;
        Ok(choice)
    }

    fn situation(&self, target: &mut Target) -> Result<Situation> {
        let replica = &target.replica;
        let free = |dir: &dyn StorageDir| {
            dir.available_bytes()
                .map_err(|e| Error::target("ask for free space", e))
        };
        let may_clone = replica.target_dir().is_some_and(|d| d.may_clone());
        let wants_clone = self.options.strategy.is_none() && !self.options.in_place;
        let present = replica.target().is_some();
        let can_clone = may_clone && wants_clone && present && replica.supports_clone(self.id);
        Ok(Situation {
            target_present: present,
            is_file: replica.is_file(),
            can_clone,
            target_known: !self.options.rescan && self.target_is_proven(target)?,
            state_free_bytes: free(&**replica.state_dir())?,
            target_free_bytes: match replica.target_dir() {
                Some(dir) => free(&**dir)?,
                None => 0,
            },
        })
    }
}
