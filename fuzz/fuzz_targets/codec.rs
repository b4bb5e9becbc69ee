//! The bounded codec: what is encoded is decoded, and no bytes make a decoder panic or read past its end.
#![no_main]

use arbitrary::Arbitrary;
use blockferry::core::{Decoder, Digest, Encoder, Extent, Result};
use blockferry::transfer_log::frame;
use blockferry_fuzz::text;
use libfuzzer_sys::fuzz_target;

/// Most bytes a frame is unpacked to.
const MAX_PLAIN_BYTES: usize = 1 << 20;

#[derive(Arbitrary, Debug)]
enum Field {
    U8(u8),
    U16(u16),
    U32(u32),
    U64(u64),
    Array([u8; 5]),
    Short(Vec<u8>),
    Long(Vec<u8>),
    Count(u16),
    Digest([u8; 32]),
    Extent(u64, u64),
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    fields: Vec<Field>,
    limit: u16,
    bytes: &'a [u8],
}

fuzz_target!(|input: Input<'_>| {
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes);
    input
        .fields
        .iter()
        .for_each(|field| encode(&mut encoder, field));
    let mut decoder = Decoder::new(&bytes);
    for field in &input.fields {
        assert!(
            decode(&mut decoder, field, usize::MAX).expect("it was encoded"),
            "{field:?}"
        );
    }
    decoder.finish().expect("nothing else was encoded");

    let mut decoder = Decoder::new(input.bytes);
    for field in &input.fields {
        let before = decoder.position();
        let decoded = decode(&mut decoder, field, usize::from(input.limit));
        assert!(decoder.position() >= before);
        assert_eq!(decoder.position() + decoder.remaining(), input.bytes.len());
        drop((text::of_result(&decoded), format!("{decoder:?}")));
        if decoded.is_err() {
            break;
        }
    }
    let left = decoder.remaining();
    let finished = decoder.finish();
    drop(text::of_result(&finished));
    assert_eq!(finished.is_ok(), left == 0);
    check_frames(&bytes, input.bytes, usize::from(input.limit));
});

/// A frame gives exactly what was promised or nothing.
fn check_frames(plain: &[u8], frame: &[u8], plain_bytes: usize) {
    let packed = frame::pack(plain, 1).expect("there is memory");
    assert_eq!(frame::unpack(&packed, plain.len()).expect("packed"), plain);
    for wrong in [plain.len() + 1, plain.len().saturating_sub(1)] {
        let unpacked = frame::unpack(&packed, wrong);
        drop(text::of_result(&unpacked));
        assert_eq!(unpacked.is_ok(), wrong == plain.len());
    }
    // Small frames may hold much.
    let promised = (plain_bytes * 16).min(MAX_PLAIN_BYTES);
    if let Ok(unpacked) = frame::unpack(frame, promised) {
        assert_eq!(unpacked.len(), promised);
    }
}

fn extent_of(start: u64, length: u64) -> Extent {
    Extent::new(start, length).unwrap_or_else(|| Extent::from_range(start..u64::MAX))
}

fn encode(encoder: &mut Encoder<'_>, field: &Field) {
    match field {
        Field::U8(value) => encoder.u8(*value),
        Field::U16(value) => encoder.u16(*value),
        Field::U32(value) => encoder.u32(*value),
        Field::U64(value) => encoder.u64(*value),
        Field::Array(bytes) => encoder.bytes(bytes),
        Field::Short(bytes) => encoder.bytes_u16(&bytes[..bytes.len().min(65535)]),
        Field::Long(bytes) => encoder.bytes_u32(bytes),
        Field::Count(count) => encoder.count(usize::from(*count)),
        Field::Digest(bytes) => encoder.digest(&Digest::from_bytes(*bytes)),
        Field::Extent(start, length) => encoder.extent(extent_of(*start, *length)),
    };
}

/// Whether the value found is that of `field`. Nothing longer than `limit` is ever handed out.
fn decode(decoder: &mut Decoder<'_>, field: &Field, limit: usize) -> Result<bool> {
    Ok(match field {
        Field::U8(value) => decoder.u8()? == *value,
        Field::U16(value) => decoder.u16()? == *value,
        Field::U32(value) => decoder.u32()? == *value,
        Field::U64(value) => decoder.u64()? == *value,
        Field::Array(bytes) => decoder.array()? == *bytes,
        Field::Short(bytes) => {
            within(decoder.bytes_u16(limit)?, limit) == &bytes[..bytes.len().min(65535)]
        }
        Field::Long(bytes) => within(decoder.bytes_u32(limit)?, limit) == bytes,
        Field::Count(count) => {
            let found = decoder.count(limit)?;
            assert!(found <= limit);
            found == usize::from(*count)
        }
        Field::Digest(bytes) => decoder.digest()?.as_bytes() == bytes,
        Field::Extent(start, length) => decoder.extent()? == extent_of(*start, *length),
    })
}

fn within(bytes: &[u8], limit: usize) -> &[u8] {
    assert!(bytes.len() <= limit);
    bytes
}
