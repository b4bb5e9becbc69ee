//! Records the new point's manifest while regions come in order, and its root.
//!
//! While every region equals the old manifest nothing is written: an identical pair costs no write. The first
//! difference starts the new manifest with a copy of what was equal so far.

use std::io::Read;

use blockferry_core::{
    Geometry, ManifestReader, ManifestWriter, RegionIndex, RegionLeaves, Root, TreeHasher,
};
use blockferry_transfer_log::ManifestFile;

use crate::error::{Error, ErrorKind, Result};

/// Yields the leaves of each region of a stored manifest in order, implicit zero regions included.
#[derive(Debug)]
pub(crate) struct Cursor<R: Read> {
    reader: ManifestReader<R>,
    ahead: Option<RegionLeaves>,
    ended: bool,
}

impl<R: Read> Cursor<R> {
    pub(crate) fn new(reader: ManifestReader<R>) -> Self {
        Self {
            reader,
            ahead: None,
            ended: false,
        }
    }

    /// Whether every region from the last one asked for up to, but without, `region` is zero.
    fn is_zero_until(
        &mut self,
        region: RegionIndex,
    ) -> std::result::Result<bool, blockferry_core::Error> {
        if !self.ended && self.ahead.is_none() {
            self.ahead = self.reader.next_region()?;
            self.ended = self.ahead.is_none();
        }
        Ok(self
            .ahead
            .as_ref()
            .is_none_or(|ahead| ahead.region() >= region))
    }

    /// The leaves of `region`; regions are asked for in ascending order.
    ///
    /// # Errors
    /// The manifest is damaged.
    pub(crate) fn leaves(
        &mut self,
        region: RegionIndex,
    ) -> std::result::Result<RegionLeaves, blockferry_core::Error> {
        let geometry = self.reader.geometry();
        while !self.ended && self.ahead.as_ref().is_none_or(|a| a.region() < region) {
            self.ahead = self.reader.next_region()?;
            self.ended = self.ahead.is_none();
        }
        match self.ahead.take_if(|ahead| ahead.region() == region) {
            Some(found) => Ok(found),
            None => Ok(RegionLeaves::zero(&geometry, region)),
        }
    }

    /// The root of the whole image; the cursor is at its end afterwards.
    ///
    /// # Errors
    /// The manifest is damaged.
    pub(crate) fn root(&mut self) -> std::result::Result<Root, blockferry_core::Error> {
        self.reader.read_to_end()
    }
}

type Opener<'a> = Box<dyn Fn() -> Option<Box<dyn Read + Send>> + 'a>;

/// Takes the leaves of every region in order.
pub(crate) struct Recorder {
    geometry: Geometry,
    tree: TreeHasher,
    writer: Option<ManifestWriter<std::io::BufWriter<ManifestFile>>>,
    /// All regions below `equal_below` equalled this.
    base: Option<Cursor<Box<dyn Read + Send>>>,
    equal_below: RegionIndex,
}

impl Recorder {
    /// `base` is a manifest that the result may turn out to equal.
    pub(crate) fn new(geometry: Geometry, base: Option<Box<dyn Read + Send>>) -> Self {
        let base = base
            .and_then(|b| ManifestReader::open(b).ok())
            .filter(|r| r.geometry() == geometry)
            .map(Cursor::new);
        Self {
            geometry,
            tree: TreeHasher::new(geometry),
            writer: None,
            base,
            equal_below: RegionIndex::new(0),
        }
    }

    /// Takes the next region. `reopen` opens the base again, `create` the new manifest.
    pub(crate) fn push(
        &mut self,
        leaves: &RegionLeaves,
        reopen: &Opener<'_>,
        create: &mut dyn FnMut() -> Result<ManifestFile>,
    ) -> Result<()> {
        self.tree.push(leaves);
        if let Some(base) = &mut self.base {
            let region = leaves.region();
            let equal = base.is_zero_until(region).is_ok_and(|zero| zero)
                && base.leaves(region).is_ok_and(|b| b == *leaves);
            if equal {
                self.equal_below = RegionIndex::new(region.get() + 1);
                return Ok(());
            }
        }
        self.start(reopen, create)?;
        match &mut self.writer {
            Some(writer) => writer.push(leaves).map_err(manifest_failed),
            None => Ok(()),
        }
    }

    /// Starts the new manifest with what equalled the base so far.
    pub(crate) fn start(
        &mut self,
        reopen: &Opener<'_>,
        create: &mut dyn FnMut() -> Result<ManifestFile>,
    ) -> Result<()> {
        if self.writer.is_some() {
            return Ok(());
        }
        let output = std::io::BufWriter::with_capacity(64 * 1024, create()?);
        let mut writer = ManifestWriter::new(self.geometry, output).map_err(manifest_failed)?;
        if self.base.take().is_some() && self.equal_below.get() > 0 {
            let mut again = reopen()
                .and_then(|r| ManifestReader::open(r).ok())
                .ok_or_else(|| {
                    Error::new(
                        ErrorKind::Target,
                        "the saved manifest disappeared while it was in use",
                    )
                })?;
            while let Some(leaves) = again.next_region().map_err(manifest_failed)? {
                if leaves.region() >= self.equal_below {
                    break;
                }
                writer.push(&leaves).map_err(manifest_failed)?;
            }
        }
        self.writer = Some(writer);
        Ok(())
    }

    /// The root, once every region was taken, with the manifest durable if one was written: always if `needed`,
    /// else unless the base is whole and equal.
    pub(crate) fn finish(
        mut self,
        needed: bool,
        reopen: &Opener<'_>,
        create: &mut dyn FnMut() -> Result<ManifestFile>,
    ) -> Result<Recorded> {
        let root = self.tree.clone().finish();
        let base = self.base.as_mut().and_then(|b| b.root().ok());
        if needed || base != Some(root) {
            self.start(reopen, create)?;
        }
        let Some(writer) = self.writer else {
            return Ok(Recorded {
                root,
                is_written: false,
            });
        };
        let (written, output) = writer.finish().map_err(manifest_failed)?;
        let file = output
            .into_inner()
            .map_err(|e| Error::because(ErrorKind::Target, "write the manifest", e.into_error()))?;
        file.finish()
            .map_err(|e| Error::log("make the manifest durable", e))?;
        if written != root {
            return Err(Error::new(
                ErrorKind::Internal,
                "the manifest's root is not the tree's",
            ));
        }
        Ok(Recorded {
            root,
            is_written: true,
        })
    }
}

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recorded {
    pub(crate) root: Root,
    /// A new manifest is durable; else the base is the manifest.
    pub(crate) is_written: bool,
}

fn manifest_failed(cause: blockferry_core::Error) -> Error {
    Error::because(ErrorKind::Target, "write or read a manifest", cause)
}
