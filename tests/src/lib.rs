//! End-to-end tests of blockferry: what spans several crates, and what holds for the tree as a whole.
//!
//! The tests are the modules of `tests/all.rs`; here is what they share: where the workspace is and which
//! files it has.

use std::fs;
use std::path::{Path, PathBuf};

/// Directories that hold no file of the project.
const NOT_OURS: [&str; 3] = ["target", ".git", "__pycache__"];

/// The top of the workspace.
///
/// # Panics
/// The package does not lie in a directory of the workspace.
#[must_use]
pub fn workspace_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the package lies in a directory of the workspace")
}

/// All files of the project, sorted; build results and the repository itself left out.
///
/// # Panics
/// A directory cannot be listed.
#[must_use]
pub fn project_files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    collect(workspace_root(), &mut files);
    files.sort();
    files
}

/// The files of the project whose name ends in `.extension`, each with its text.
///
/// # Panics
/// A file cannot be read as UTF-8 text.
#[must_use]
pub fn texts_with_extension(extension: &str) -> Vec<(PathBuf, String)> {
    project_files()
        .into_iter()
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .map(|path| {
            let text = fs::read_to_string(&path)
                .unwrap_or_else(|e| panic!("reading {}: {e}", path.display()));
            (path, text)
        })
        .collect()
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) {
    let entries =
        fs::read_dir(directory).unwrap_or_else(|e| panic!("listing {}: {e}", directory.display()));
    for entry in entries {
        let entry = entry.unwrap_or_else(|e| panic!("listing {}: {e}", directory.display()));
        let kind = entry
            .file_type()
            .expect("the kind of an entry just listed is known");
        if kind.is_dir() && !NOT_OURS.iter().any(|name| entry.file_name() == *name) {
            collect(&entry.path(), files);
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
}
