//! What is known of a region without reading it: leaves of a saved manifest, claims of a change map.

use blockferry_core::RegionLeaves;

/// What a change map claims of a block of the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a comparison decides for each")]
pub enum Claim {
    /// Nothing: read it.
    #[default]
    Nothing,
    /// It is what the target's manifest says; believed.
    Same,
    /// The same, to be read all the same: a map that is not trusted is checked in samples.
    SameToCheck,
    /// It reads as zeros; believed.
    Zero,
}

/// What is known of a region without reading it, from saved manifests of proven content and from a change map.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Known {
    /// Leaves of the source.
    pub source: Option<RegionLeaves>,
    /// Leaves of the target.
    pub target: Option<RegionLeaves>,
    /// What a change map claims of each block; empty without one. It counts only where the target's leaves
    /// are known.
    pub claims: Vec<Claim>,
}

impl Known {
    /// What is known of either side.
    #[must_use]
    pub fn new(source: Option<RegionLeaves>, target: Option<RegionLeaves>) -> Self {
        Self {
            source,
            target,
            claims: Vec::new(),
        }
    }

    /// With the claims of a change map, one for each block of the region.
    #[must_use]
    pub fn with_claims(mut self, claims: Vec<Claim>) -> Self {
        self.claims = claims;
        self
    }

    /// What is claimed of a block, counted in the region.
    #[must_use]
    pub fn claim(&self, block: usize) -> Claim {
        self.claims.get(block).copied().unwrap_or_default()
    }

    /// Whether both sides of a block are known and equal.
    #[must_use]
    pub fn is_equal(&self, block: usize) -> bool {
        let Some(target) = &self.target else {
            return false;
        };
        let source = self.source.as_ref();
        self.claim(block) == Claim::Same
            || source.is_some_and(|source| source.get(block) == target.get(block))
    }
}
