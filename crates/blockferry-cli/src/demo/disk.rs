//! The demo's disk: a real file system with real files, and a day of use. Stand-in.
use crate::failure::Failure;
use std::path::Path;
pub(crate) fn make(_path: &Path, _size: u64) -> Result<String, Failure> {
    Ok("a".into())
}
pub(crate) fn use_it(_path: &Path) -> Result<String, Failure> {
    Ok("a".into())
}
