//! What earlier runs left to know of the target, and why it is less than hoped for.

use std::sync::Arc;

use blockferry_core::Trust;

use super::origin::Origin;
use super::{Run, writes_blocks};
use crate::error::{ErrorKind, Result};
use crate::handle::PointFiles;
use crate::knowledge::ManifestTrust;
use crate::plan::Choice;
use crate::target::Target;

impl Run<'_> {
    /// What an earlier run left to know, and why it left less than hoped for.
    pub(super) fn point_files(&mut self, target: &Target, choice: &Choice) -> Result<PointFiles> {
        let mut files = PointFiles {
            manifest: None,
            trust: None,
            changes: None,
            is_file: target.replica.is_file(),
            exact: false,
        };
        let Some(point) = target.replica.point().cloned() else {
            return self.without_map(files, "the target has no sync point");
        };
        let present = target.replica.target().is_some();
        let compares = !writes_blocks(choice) && present;
        let fits = point.geometry == self.geometry;
        files.manifest = Some(target.replica.manifest_source(&point))
            .filter(|manifest| fits && manifest.open().is_some());
        let is_there = files.manifest.is_some();
        let trust = ManifestTrust {
            source: self.source_is_at_point(target),
            target: target.is_unwritten()?,
            root: point.root,
        };
        let full = |what: &str| format!("{what}: the target is compared in full");
        let written = "the target is not provably unwritten since its last sync point";
        if self.options.rescan || !compares {
            // Nothing is compared where blocks are written: whoever wrote the target is overwritten, and not silently.
            if !self.options.rescan && present && !trust.target {
                self.warn("target_written", format!("{written}: it is replaced"))?;
            }
            return self.without_map(files, "both sides are to be read");
        }
        if !trust.target {
            self.warn("target_written", full(written))?;
        } else if !fits {
            self.warn(
                "manifest_unusable",
                full("the saved manifest has another geometry"),
            )?;
        } else if !is_there {
            self.warn("manifest_missing", full("the saved manifest is gone"))?;
        }
        files.trust = Some(trust).filter(|_| is_there);
        if !(trust.target && is_there) {
            return self.without_map(files, "the target's content is not known");
        }
        let is_remote = matches!(self.origin, Origin::Peer(_));
        match &self.options.changes {
            Some(changes) if changes.point != point.id.to_string() => {
                self.without_map(files, "it is relative to another sync point")
            }
            Some(changes) if changes.map.image_bytes() != self.geometry.image_bytes() => {
                self.without_map(files, "it is of an image of another size")
            }
            Some(changes) if is_remote && changes.map.trust() != Trust::Trusted => {
                // Comparing everything finds every lie there; samples would find some.
                self.without_map(files, "it is a hint, and the source is on another machine")
            }
            changes => {
                files.changes = changes.as_ref().map(|c| Arc::clone(&c.map));
                Ok(files)
            }
        }
    }

    /// Losing a change map falls back to comparing, said aloud.
    fn without_map(&mut self, files: PointFiles, why: &str) -> Result<PointFiles> {
        if self.options.changes.is_some() {
            let message = format!("the change map is not used: {why}");
            self.fall_back(ErrorKind::Source, "change_map_unusable", message)?;
        }
        Ok(files)
    }
}
