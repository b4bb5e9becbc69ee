//! [`ManifestReader`]: bytes in, regions out; nothing is believed before its checksum.

use std::fmt;
use std::io::{ErrorKind as IoErrorKind, Read};

use super::format::{self, EntryHead};
use crate::{Error, ErrorKind, Geometry, RegionLeaves, Result, Root, TreeHasher};

/// Reads a manifest from a sequential reader, region by region.
///
/// Holds one region (at most 8 KiB and its bytes) and the open nodes of the tree, whatever the
/// bytes say. It takes exactly the manifest from the reader and nothing behind it, in two or three
/// reads per region: give it a buffered reader. A region it returns has a right checksum; that all
/// of them together are the image the manifest was made of is known when [`ManifestReader::root`]
/// has a value.
pub struct ManifestReader<R> {
    input: R,
    geometry: Geometry,
    tree: TreeHasher,
    buffer: Vec<u8>,
    entry_count: u64,
    /// No region below this one may follow.
    next_region: u64,
    /// Bytes taken from the input.
    position: u64,
    state: State,
}

#[derive(Clone, Copy)]
enum State {
    Reading,
    Ended(Root),
    Failed,
}

impl<R: Read> ManifestReader<R> {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownVersion`] for another version, [`ErrorKind::Truncated`] or
    /// [`ErrorKind::Corrupt`] for what is not a manifest, [`ErrorKind::Io`] when the input fails.
    pub fn open(mut input: R) -> Result<Self> {
        let geometry = read_header(&mut input).map_err(|error| error.at("manifest header"))?;
        Ok(Self {
            input,
            geometry,
            tree: TreeHasher::new(geometry),
            buffer: Vec::new(),
            entry_count: 0,
            next_region: 0,
            position: format::HEADER_BYTES as u64,
            state: State::Reading,
        })
    }

    /// Geometry of the image.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The next region that does not read zero, ascending; `None` at the end, when count and root
    /// were right.
    ///
    /// # Errors
    /// [`ErrorKind::Truncated`], [`ErrorKind::LimitExceeded`] or [`ErrorKind::Corrupt`] when the
    /// bytes are not a manifest any more, [`ErrorKind::Io`] when the input fails. Every later call
    /// then fails, too.
    pub fn next_region(&mut self) -> Result<Option<RegionLeaves>> {
        match self.state {
            State::Reading => {}
            State::Ended(_) => return Ok(None),
            State::Failed => {
                let message = "manifest: read on after an error".to_owned();
                return Err(format::corrupt(message));
            }
        }
        let (entry, at) = (self.entry_count, self.position);
        self.read_entry().map_err(|error| {
            self.state = State::Failed;
            error.at(format_args!("manifest entry {entry} at byte {at}"))
        })
    }

    /// The root of the image, once [`ManifestReader::next_region`] has said that there are no more
    /// regions.
    #[must_use]
    pub fn root(&self) -> Option<Root> {
        match self.state {
            State::Ended(root) => Some(root),
            State::Reading | State::Failed => None,
        }
    }

    /// Reads what is left, only to check it, and gives the root.
    ///
    /// # Errors
    /// Those of [`ManifestReader::next_region`].
    pub fn read_to_end(&mut self) -> Result<Root> {
        loop {
            if self.next_region()?.is_none()
                && let State::Ended(root) = self.state
            {
                return Ok(root);
            }
        }
    }

    /// The input, at the first byte that was not read.
    pub fn into_inner(self) -> R {
        self.input
    }

    fn read_entry(&mut self) -> Result<Option<RegionLeaves>> {
        let head = read_array(&mut self.input)?;
        match format::decode_entry_head(&head)? {
            EntryHead::Region { data_blocks } => {
                self.read_rest(head, format::entry_bytes(data_blocks))?;
                self.take_region().map(Some)
            }
            EntryHead::End => {
                self.read_rest(head, format::END_BYTES)?;
                self.take_end()?;
                Ok(None)
            }
        }
    }

    /// Reads the rest of a part of `total_bytes` behind its head. `total_bytes` is bounded by the
    /// format.
    fn read_rest(
        &mut self,
        head: [u8; format::ENTRY_HEAD_BYTES],
        total_bytes: usize,
    ) -> Result<()> {
        self.buffer.clear();
        self.buffer.extend_from_slice(&head);
        self.buffer.resize(total_bytes, 0);
        read_exactly(&mut self.input, &mut self.buffer[head.len()..])?;
        self.position += total_bytes as u64;
        Ok(())
    }

    fn take_region(&mut self) -> Result<RegionLeaves> {
        let leaves = format::decode_region(&self.buffer, &self.geometry, self.next_region)?;
        self.next_region = leaves.region().get() + 1;
        self.entry_count += 1;
        self.tree.push(&leaves);
        Ok(leaves)
    }

    fn take_end(&mut self) -> Result<()> {
        let bytes = self
            .buffer
            .first_chunk()
            .expect("`read_rest` read the whole end");
        let (entry_count, root) = format::decode_end(bytes)?;
        format::expect("entry count", self.entry_count, entry_count)?;
        let found = self.tree.clone().finish();
        if found != root {
            return Err(format::corrupt(format!(
                "root: expected {root}, found {found}"
            )));
        }
        self.state = State::Ended(root);
        Ok(())
    }
}

impl<R> fmt::Debug for ManifestReader<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ManifestReader")
            .field("geometry", &self.geometry)
            .field("entry_count", &self.entry_count)
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}

fn read_header(input: &mut impl Read) -> Result<Geometry> {
    // The version decides what follows, so it is judged before a byte more is asked for.
    let prefix: [u8; format::PREFIX_BYTES] = read_array(input)?;
    format::decode_prefix(&prefix)?;
    let mut header = [0; format::HEADER_BYTES];
    header[..prefix.len()].copy_from_slice(&prefix);
    read_exactly(input, &mut header[prefix.len()..])?;
    format::decode_header(&header)
}

fn read_array<const N: usize>(input: &mut impl Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    read_exactly(input, &mut bytes)?;
    Ok(bytes)
}

fn read_exactly(input: &mut impl Read, buffer: &mut [u8]) -> Result<()> {
    let mut found = 0;
    while found < buffer.len() {
        match input.read(&mut buffer[found..]) {
            Ok(0) => {
                let message = format!("expected {} more bytes, found {found}", buffer.len());
                return Err(Error::new(ErrorKind::Truncated, message));
            }
            Ok(count) => found += count,
            Err(cause) if cause.kind() == IoErrorKind::Interrupted => {}
            Err(cause) => return Err(Error::from_io("read", cause)),
        }
    }
    Ok(())
}
