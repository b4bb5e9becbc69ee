//! zstd frames: pages that came compressed stay compressed; unpacking never exceeds what the header promised.

use std::io::Read;

use crate::error::{Error, Result};

/// Largest window a frame may ask for: 2^20 bytes, one record.
const MAX_WINDOW_LOG: u32 = 20;

/// Packs plain pages into one frame.
///
/// # Errors
/// The compressor failed (out of memory).
pub fn pack(plain: &[u8], level: i32) -> Result<Vec<u8>> {
    zstd::bulk::compress(plain, level).map_err(|e| {
        Error::new(
            crate::ErrorKind::LimitExceeded,
            format!("compress pages: {e}"),
        )
    })
}

/// Unpacks a frame that must hold exactly `plain_bytes` bytes.
///
/// # Errors
/// The frame is damaged, asks for a larger window than a record, or holds more or less.
pub fn unpack(frame: &[u8], plain_bytes: usize) -> Result<Vec<u8>> {
    let damaged = |e: std::io::Error| Error::corrupt(format!("compressed pages: {e}"));
    let mut decoder = zstd::stream::read::Decoder::with_buffer(frame).map_err(damaged)?;
    decoder.window_log_max(MAX_WINDOW_LOG).map_err(damaged)?;
    let mut plain = vec![0; plain_bytes];
    decoder.read_exact(&mut plain).map_err(damaged)?;
    let mut more = [0];
    match decoder.read(&mut more) {
        Ok(0) => Ok(plain),
        Ok(_) => Err(Error::corrupt(format!(
            "compressed pages: more than {plain_bytes} bytes"
        ))),
        Err(e) => Err(damaged(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_yields_exactly_what_was_packed() {
        let plain: Vec<u8> = (0..200_000u32)
            .flat_map(|n| (n / 7).to_le_bytes())
            .collect();

        let frame = pack(&plain, 1).unwrap();

        assert_eq!(unpack(&frame, plain.len()).unwrap(), plain);
        assert!(
            unpack(&frame, plain.len() - 1).is_err(),
            "more than promised"
        );
        assert!(
            unpack(&frame, plain.len() + 1).is_err(),
            "less than promised"
        );
    }

    #[test]
    fn a_frame_with_a_large_window_is_refused() {
        let plain = vec![7u8; 8 << 20];
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(23).unwrap();
        std::io::Write::write_all(&mut encoder, &plain).unwrap();
        let frame = encoder.finish().unwrap();

        assert_eq!(
            unpack(&frame, plain.len()).unwrap_err().kind(),
            crate::ErrorKind::Corrupt
        );
    }
}
