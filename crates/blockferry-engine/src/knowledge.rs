//! What a scan knows of each region without reading it: the saved manifest of the target's point, and what a
//! change map claims of the source since then; and whether either turned out to be wrong.
//!
//! The first [`Doubt`] ends the scan; it is then repeated without what was doubted.

use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use blockferry_core::{ChangeMap, Content, Extent, Geometry, RegionIndex, Root, Trust};
use blockferry_delta_sync::{Claim, Known};
use blockferry_pipeline::block_in;

use crate::recorder::Cursor;

/// Of a map that is not trusted, one claimed block in so many is read all the same ...
const CHECKED_SHARE: u64 = 64;
/// ... and at least so many, where there are as many.
const LEAST_CHECKED: u64 = 16;

/// Why what was known is not believed any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// The saved manifest is damaged or another one.
    Manifest(String),
    /// A block that the change map claims to be the same is not.
    Map {
        /// Where it lies, at the granularity of regions.
        region: Extent,
    },
    /// A digest that travelled shortened was taken for another.
    Digests,
}

/// The first doubt of a scan, shared by those who may have one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Doubts {
    first: Arc<Mutex<Option<Doubt>>>,
}

impl Doubts {
    pub(crate) fn raise(&self, doubt: Doubt) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(doubt);
    }

    pub(crate) fn first(&self) -> Option<Doubt> {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.clone()
    }
}

/// Which sides the saved manifest is proven for, and its root.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ManifestTrust {
    pub(crate) source: bool,
    pub(crate) target: bool,
    pub(crate) root: Root,
}

/// Hands out what is known, region by region in ascending order.
#[derive(Debug)]
pub(crate) struct Knowledge<R: Read> {
    geometry: Geometry,
    saved: Option<(Cursor<R>, ManifestTrust)>,
    claims: Option<Claims>,
    doubts: Doubts,
}

impl<R: Read> Knowledge<R> {
    /// Without a manifest of the target a map is worth nothing: it says what did not change since then.
    pub(crate) fn new(
        geometry: Geometry,
        saved: Option<(Cursor<R>, ManifestTrust)>,
        map: Option<Arc<ChangeMap>>,
        seed: u64,
        doubts: Doubts,
    ) -> Self {
        let map = map.filter(|_| saved.as_ref().is_some_and(|(_, trust)| trust.target));
        let claims = map.map(|map| Claims::new(geometry, map, seed));
        Self {
            geometry,
            saved,
            claims,
            doubts,
        }
    }

    /// Whether a change map tells what may differ.
    pub(crate) fn is_mapped(&self) -> bool {
        self.claims.is_some()
    }

    /// What is known of a region; nothing once there is a doubt, which ends the scan.
    pub(crate) fn of(&mut self, region: RegionIndex) -> Option<Known> {
        if self.doubts.first().is_some() {
            return None;
        }
        let Some((cursor, trust)) = &mut self.saved else {
            return Some(Known::default());
        };
        let leaves = match cursor.leaves(region) {
            Ok(leaves) => leaves,
            Err(damage) => {
                self.doubts.raise(Doubt::Manifest(damage.to_string()));
                return None;
            }
        };
        let source = trust.source.then(|| leaves.clone());
        let known = Known::new(source, trust.target.then_some(leaves));
        Some(match &mut self.claims {
            Some(claims) => known.with_claims(claims.of(self.geometry, region)),
            None => known,
        })
    }

    /// After the last region: all regions together are the image the point was proven for.
    pub(crate) fn check_whole(&mut self) {
        let Some((cursor, trust)) = &mut self.saved else {
            return;
        };
        let wrong = match cursor.root() {
            Ok(root) if root == trust.root => return,
            Ok(root) => format!("its root is {root}, that of the point is {}", trust.root),
            Err(damage) => damage.to_string(),
        };
        self.doubts.raise(Doubt::Manifest(wrong));
    }
}

/// A change map as a scan goes through it.
#[derive(Debug)]
struct Claims {
    map: Arc<ChangeMap>,
    /// Of so many blocks that are claimed to be the same one is checked; 0 if the map is trusted.
    stride: u64,
    /// Blocks claimed so far.
    claimed: u64,
    seed: u64,
}

impl Claims {
    fn new(geometry: Geometry, map: Arc<ChangeMap>, seed: u64) -> Self {
        let same = map.total_bytes(Content::Same) / geometry.block_size().bytes();
        let stride = match map.trust() {
            Trust::Trusted => 0,
            Trust::Hint => (same / LEAST_CHECKED).clamp(1, CHECKED_SHARE),
        };
        Self {
            map,
            stride,
            claimed: 0,
            seed,
        }
    }

    fn of(&mut self, geometry: Geometry, region: RegionIndex) -> Vec<Claim> {
        let extent = geometry.region_extent(region);
        if self.stride == 0 && whole(&self.map, extent) == Content::Same {
            // Most regions of a large disk.
            let blocks = geometry.region_block_count(region);
            return vec![Claim::Same; usize::try_from(blocks).unwrap_or(usize::MAX)];
        }
        let blocks = 0..usize::try_from(geometry.region_block_count(region)).unwrap_or(usize::MAX);
        blocks
            .map(|block| self.claim(block_in(&geometry, region, block)))
            .collect()
    }

    fn claim(&mut self, block: Extent) -> Claim {
        match whole(&self.map, block) {
            Content::Zero if self.map.trust() == Trust::Trusted => Claim::Zero,
            Content::Same => self.same(),
            Content::Data | Content::Zero | Content::Unknown => Claim::Nothing,
        }
    }

    /// One block of each full stretch is checked, at a place that only the seed knows.
    fn same(&mut self) -> Claim {
        if self.stride == 0 {
            return Claim::Same;
        }
        let (stretch, place) = (self.claimed / self.stride, self.claimed % self.stride);
        self.claimed += 1;
        if crate::sample::scramble(self.seed ^ stretch) % self.stride == place {
            Claim::SameToCheck
        } else {
            Claim::Same
        }
    }
}

/// What a map says of all of a block; nothing if it says this and that.
fn whole(map: &ChangeMap, block: Extent) -> Content {
    let mut runs = map.runs(block);
    match (runs.next(), runs.next()) {
        (Some((run, content)), None) if run == block => content,
        _ => Content::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use blockferry_core::{BlockSize, Provenance};

    use super::*;

    fn claims_of(trust: Trust, blocks: u64, seed: u64) -> Vec<Claim> {
        let geometry = Geometry::new(blocks * 4096, BlockSize::MIN);
        let mut map = ChangeMap::new(Provenance::Embedder, trust, geometry.image_bytes());
        map.set(Extent::from_range(0..geometry.image_bytes()), Content::Same);
        let mut claims = Claims::new(geometry, Arc::new(map), seed);
        let regions = (0..geometry.region_count()).map(RegionIndex::new);
        regions.flat_map(|r| claims.of(geometry, r)).collect()
    }

    #[test]
    fn a_hint_is_checked_in_one_block_of_sixty_four_and_in_sixteen_at_least() {
        for seed in 0..20 {
            for (blocks, expected) in [(7, 7), (16, 16), (100, 16), (1024, 16), (6400, 100)] {
                let claims = claims_of(Trust::Hint, blocks, seed);
                let checked = claims.iter().filter(|c| **c == Claim::SameToCheck).count();

                assert!(
                    checked.abs_diff(expected) <= 1 && checked >= expected.min(16),
                    "{checked} of {blocks}"
                );
            }
            assert!(
                claims_of(Trust::Trusted, 6400, seed)
                    .iter()
                    .all(|c| *c == Claim::Same)
            );
        }
        assert_ne!(
            claims_of(Trust::Hint, 6400, 1),
            claims_of(Trust::Hint, 6400, 2)
        );
    }

    #[test]
    fn a_claim_counts_only_for_whole_blocks() {
        let geometry = Geometry::new(3 * 65_536 - 100, BlockSize::DEFAULT);
        let mut map = ChangeMap::new(Provenance::Embedder, Trust::Trusted, geometry.image_bytes());
        map.set(
            Extent::from_range(4096..geometry.image_bytes()),
            Content::Same,
        );
        map.set(Extent::from_range(65_536..131_072), Content::Zero);
        let mut claims = Claims::new(geometry, Arc::new(map), 0);

        let found = claims.of(geometry, RegionIndex::new(0));

        assert_eq!(found, [Claim::Nothing, Claim::Zero, Claim::Same]);
    }
}
