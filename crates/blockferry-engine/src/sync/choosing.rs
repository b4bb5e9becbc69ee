//! Mode and strategy, from what the caller asked for, what the target allows and what a sample shows.

use blockferry_device::{BlockSource, StorageDir};
use blockferry_pipeline::Phase;

use super::Run;
use super::origin::Origin;
use crate::data_blocks::DataBlocks;
use crate::error::{Error, Result};
use crate::plan::{
    Choice, Situation, check_space, check_strategy, choose, choose_remote, choose_unread,
};
use crate::sample::Sample;
use crate::target::Target;

impl Run<'_> {
    /// Reads a sample of both sides only where it can change the choice, or where the space may not suffice.
    pub(super) fn choose(&mut self, target: &mut Target) -> Result<Choice> {
        let start = self.context.clock.now();
        let present = target.replica.target();
        let present = present.as_ref().map(|t| &**t as &dyn BlockSource);
        let Origin::Device(source) = self.origin.clone() else {
            let found = self.situation(target)?;
            return Ok(choose_remote(self.options, found, None));
        };
        let sides: Vec<&dyn BlockSource> = present.into_iter().chain([&*source]).collect();
        let data = DataBlocks::of(&sides, &self.geometry);
        let found = self.situation(target)?;
        let at_most = Sample::at_most(&data, &self.geometry);
        let choice = match choose_unread(self.options, found, &at_most) {
            Some(choice) => choice,
            None => choose(self.options, found, &self.sample(&*source, present, &data)?),
        };
        self.time("sampling", start);
        check_space(&choice)?;
        Ok(choice)
    }

    fn sample(
        &self,
        source: &dyn BlockSource,
        target: Option<&dyn BlockSource>,
        data: &DataBlocks,
    ) -> Result<Sample> {
        let context = self.context;
        context.progress(Phase::Sampling, 0, self.geometry.image_bytes(), 0);
        Sample::take(source, target, &self.geometry, data, self.seed(), context)
    }

    fn situation(&self, target: &mut Target) -> Result<Situation> {
        let replica = &target.replica;
        let free = |dir: &dyn StorageDir| {
            dir.available_bytes()
                .map_err(|e| Error::target("ask for free space", e))
        };
        let may_clone = replica.target_dir().is_some_and(|d| d.may_clone());
        let is_open = self.options.strategy.is_none() && !self.options.in_place;
        let present = replica.target().is_some();
        let exchanges = !(present && is_open && replica.is_file())
            || replica
                .supports_exchange(self.id)
                .map_err(|e| Error::log("look at the target's file system", e))?;
        let can_replace = replica.is_file() && exchanges && !replica.is_anchored();
        let can_clone =
            may_clone && is_open && present && can_replace && replica.supports_clone(self.id);
        let found = Situation {
            target_present: present,
            can_replace,
            can_clone,
            target_known: !self.options.rescan && target.is_unwritten()?,
            state_free_bytes: free(&**replica.state_dir())?,
            target_free_bytes: match replica.target_dir() {
                Some(dir) => free(&**dir)?,
                None => 0,
            },
        };
        check_strategy(self.options, found)?;
        Ok(found)
    }
}
