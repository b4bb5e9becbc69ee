//! Manifests: the geometry of an image and the digests of its blocks, as a stream of bytes.
//!
//! `docs/format/manifest.md` is the definition. Regions that read zero are left out, so a manifest
//! costs what the data costs (about 0.05 %), and neither writer nor reader ever holds more than one
//! region. Where the bytes live, and whether the image still is what the manifest says, is the
//! callers' matter.

mod format;
mod reader;
mod writer;

pub use format::MANIFEST_VERSION;
pub use reader::ManifestReader;
pub use writer::ManifestWriter;
