//! What every decorator passes on unchanged.

/// Forwards the questions of [`crate::BlockSource`] that move no bytes to `self.inner`.
macro_rules! forward_source_facts {
    () => {
        fn label(&self) -> &str {
            self.inner.label()
        }

        fn size_bytes(&self) -> u64 {
            self.inner.size_bytes()
        }

        fn preferred_depth(&self) -> usize {
            self.inner.preferred_depth()
        }

        fn identity(&self) -> $crate::Result<$crate::Identity> {
            self.inner.identity()
        }

        fn evidence(&self) -> $crate::Result<$crate::Evidence> {
            self.inner.evidence()
        }
    };
}

/// The same for [`crate::BlockTarget`].
macro_rules! forward_target_facts {
    () => {
        fn drop_cache(&self) {
            self.inner.drop_cache();
        }

        fn logical_block_bytes(&self) -> u32 {
            self.inner.logical_block_bytes()
        }
    };
}

pub(super) use {forward_source_facts, forward_target_facts};
