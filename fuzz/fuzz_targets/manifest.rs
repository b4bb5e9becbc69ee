//! Manifests: arbitrary bytes, and the same with right checksums. What is accepted is written again byte for byte.
#![no_main]

use blockferry::core::{ManifestReader, ManifestWriter, Result};
use blockferry_fuzz::manifest::resealed;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for bytes in [bytes, &resealed(bytes)] {
        let mut again = Vec::new();
        if let Ok(rest) = read_and_write(bytes, &mut again) {
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
            Ok(Some(leaves)) => writer.push(&leaves)?,
            Ok(None) => break,
            Err(error) => failed = Some(error),
        }
    }
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
