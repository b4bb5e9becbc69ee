//! [`ChangeMap`]: what is said about an image without reading it, and how far that is trusted
//! (decision D3).
//!
//! A change map is a hint. It names where it comes from and whether it may be relied on; what a
//! hint below "trusted" says must be sampled before it is believed, which is the engine's matter.
//! Memory is one tree entry per run of equal content, whatever the size of the image.

use std::collections::BTreeMap;

use crate::Extent;

/// What a change map says about an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "callers must decide for every content"
)]
pub enum Content {
    /// Holds data that may have changed: read it.
    Data,
    /// Reads zero.
    Zero,
    /// Is what it was at the point the map was made against.
    Same,
    /// Nothing is said: read it.
    Unknown,
}

/// How far a change map may be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "callers must decide for every level of trust"
)]
pub enum Trust {
    /// Relied on without reading: the device or the engine itself guarantees it.
    Trusted,
    /// A random sample of it is read; one lie discards the map.
    Hint,
}

/// Where a change map comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Provenance {
    /// Holes of a sparse file.
    Holes,
    /// Block status of an NBD export.
    NbdBlockStatus,
    /// A dirty bitmap of QEMU.
    QemuDirtyBitmap,
    /// What an overlay of QEMU holds over its backing.
    QemuOverlay,
    /// A manifest saved by an earlier run.
    SavedManifest,
    /// What is kept of an earlier point of the target.
    Anchor,
    /// The program that embeds the engine.
    Embedder,
}

/// What is said about every extent of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangeMap {
    provenance: Provenance,
    trust: Trust,
    image_bytes: u64,
    // Invariant: start of a run → its content, up to the next start or the end of the image; the
    // first start is 0, the last lies before the end, and neighbours differ. Empty for an empty
    // image only.
    starts: BTreeMap<u64, Content>,
}

impl ChangeMap {
    /// A map of an image of `image_bytes` that says nothing yet: all is [`Content::Unknown`].
    #[must_use]
    pub fn new(provenance: Provenance, trust: Trust, image_bytes: u64) -> Self {
        let mut starts = BTreeMap::new();
        if image_bytes > 0 {
            starts.insert(0, Content::Unknown);
        }
        Self {
            provenance,
            trust,
            image_bytes,
            starts,
        }
    }

    /// Where the map comes from.
    #[must_use]
    pub fn provenance(&self) -> Provenance {
        self.provenance
    }

    /// How far it may be relied on.
    #[must_use]
    pub fn trust(&self) -> Trust {
        self.trust
    }

    /// Bytes of the image.
    #[must_use]
    pub fn image_bytes(&self) -> u64 {
        self.image_bytes
    }

    /// Says `content` of `extent`, in place of what was said before. What lies behind the image is
    /// ignored.
    pub fn set(&mut self, extent: Extent, content: Content) {
        let Some(extent) = extent.intersection(Extent::from_range(0..self.image_bytes)) else {
            return;
        };
        let after = (extent.end() < self.image_bytes).then(|| self.content_at(extent.end()));
        while let Some((&start, _)) = self.starts.range(extent.start()..=extent.end()).next() {
            self.starts.remove(&start);
        }
        let before = self.starts.range(..extent.start()).next_back();
        if before.is_none_or(|(_, &before)| before != content) {
            self.starts.insert(extent.start(), content);
        }
        if let Some(after) = after.filter(|&after| after != content) {
            self.starts.insert(extent.end(), after);
        }
    }

    /// What is said about the byte at `offset`; [`Content::Unknown`] behind the image.
    #[must_use]
    pub fn content_at(&self, offset: u64) -> Content {
        let run = self.starts.range(..=offset).next_back();
        run.filter(|_| offset < self.image_bytes)
            .map_or(Content::Unknown, |(_, &content)| content)
    }

    /// The runs of `within`, ascending and without gaps, clipped to it and to the image. Neighbours
    /// differ.
    pub fn runs(&self, within: Extent) -> impl Iterator<Item = (Extent, Content)> + '_ {
        let end = within.end().min(self.image_bytes);
        let mut at = within.start().min(end);
        let mut content = self.content_at(at);
        let mut later = self
            .starts
            .range(at..end)
            .filter(move |&(&start, _)| start > within.start());
        std::iter::from_fn(move || {
            if at == end {
                return None;
            }
            let (next, next_content) = later.next().map_or((end, content), |(&s, &c)| (s, c));
            let run = (Extent::from_range(at..next), content);
            (at, content) = (next, next_content);
            Some(run)
        })
    }

    /// Number of runs.
    #[must_use]
    pub fn run_count(&self) -> usize {
        self.starts.len()
    }

    /// How many bytes of the image are said to be `content`.
    #[must_use]
    pub fn total_bytes(&self, content: Content) -> u64 {
        let runs = self.runs(Extent::from_range(0..self.image_bytes));
        runs.filter(|&(_, c)| c == content)
            .map(|(extent, _)| extent.length())
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn extents() -> impl Strategy<Value = Extent> {
        (0_u64..50, 0_u64..20).prop_map(|(start, length)| Extent::new(start, length).unwrap())
    }

    fn contents() -> impl Strategy<Value = Content> {
        prop_oneof![
            Just(Content::Data),
            Just(Content::Zero),
            Just(Content::Same),
            Just(Content::Unknown)
        ]
    }

    proptest! {
        #[test]
        fn a_map_says_what_a_byte_by_byte_list_says(
            image_bytes in 0_u64..45,
            steps in vec((extents(), contents()), 0..15),
            within in extents(),
        ) {
            let mut map = ChangeMap::new(Provenance::Embedder, Trust::Hint, image_bytes);
            let mut oracle = vec![Content::Unknown; image_bytes as usize];
            prop_assert_eq!(map.image_bytes(), image_bytes);

            for (extent, content) in steps {
                map.set(extent, content);
                for offset in extent.range().filter(|&offset| offset < image_bytes) {
                    oracle[offset as usize] = content;
                }
            }

            let changes = oracle.windows(2).filter(|pair| pair[0] != pair[1]).count();
            prop_assert_eq!(map.run_count(), changes + usize::from(image_bytes > 0));
            let runs: Vec<(Extent, Content)> = map.runs(within).collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].1 != pair[1].1), "{:?}", runs);
            let bytes = |&(run, content): &(Extent, _)| run.range().map(move |x| (x, content));
            let listed: Vec<(u64, Content)> = runs.iter().flat_map(bytes).collect();
            let expected: Vec<(u64, Content)> = within
                .range()
                .filter(|&x| x < image_bytes)
                .map(|x| (x, oracle[x as usize]))
                .collect();
            prop_assert_eq!(listed, expected);
            let data = oracle.iter().filter(|&&c| c == Content::Data).count();
            prop_assert_eq!(map.total_bytes(Content::Data), data as u64);
            for offset in 0..70 {
                let said = oracle.get(offset as usize).copied().unwrap_or(Content::Unknown);
                prop_assert_eq!(map.content_at(offset), said);
            }
        }
    }
}
