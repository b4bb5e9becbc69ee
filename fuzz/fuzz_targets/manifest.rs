//! Manifests: arbitrary bytes, and the same with right checksums. What is accepted is written again byte for byte.
#![no_main]

use blockferry::core::{ManifestReader, ManifestWriter, Result};
use blockferry_fuzz::manifest::{resealed, with_its_root};
use blockferry_fuzz::text;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let resealed = resealed(bytes);
    for bytes in [bytes, &resealed, &with_its_root(&resealed)] {
        let mut again = Vec::new();
        let read = read_and_write(bytes, &mut again);
        drop(text::of_result(&read));
        if let Ok(rest) = read {
            assert_eq!(
                again,
                bytes[..bytes.len() - rest],
                "one image, two manifests"
            );
        }
    }
});

/// Returns how many bytes lie behind the manifest.
fn read_and_write(bytes: &[u8], again: &mut Vec<u8>) -> Result<usize> {
    let mut reader = ManifestReader::open(bytes)?;
    let mut writer = ManifestWriter::new(reader.geometry(), again)?;
    let mut failed = None;
    while failed.is_none() {
        match reader.next_region() {
            Ok(Some(leaves)) => writer.push(&leaves).expect("memory takes all"),
            Ok(None) => break,
            Err(error) => failed = Some(error),
        }
    }
    drop(format!("{reader:?}"));
    if let Some(error) = failed {
        assert!(
            reader.root().is_none() && reader.next_region().is_err(),
            "believed after {error}"
        );
        return Err(error);
    }
    let (root, _) = writer.finish()?;
    assert_eq!(reader.root(), Some(root));
    Ok(reader.into_inner().len())
}
