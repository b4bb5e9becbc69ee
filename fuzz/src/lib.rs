//! What the fuzz targets share: inputs that pass checksums, and small machines to run them on.
//!
//! Every format here is sealed, so bytes that are only mutated never come behind the checksum. [`pages`] and
//! [`manifest`] therefore put checksums (and chain values) right after the mutation, unless the input says that the
//! damage is to stay.

pub mod machine;
pub mod manifest;
pub mod oracle;
pub mod pages;
pub mod text;
