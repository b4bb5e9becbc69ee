//! The bounded codec every format of the workspace is written and read with.
//!
//! Little-endian, fixed widths. The [`Decoder`] checks every read; a length or a count from outside
//! meets its limit before anything is allocated, and bytes left over are an error. What the fields
//! mean, and their checksums, are the formats' matter.

use crate::{Digest, Error, ErrorKind, Extent, Result};

/// The checksum of our own records: plain BLAKE3 of the bytes. Formats may store its first bytes
/// only.
#[must_use]
pub fn checksum(bytes: &[u8]) -> Digest {
    blake3::hash(bytes).into()
}

/// Appends fields to a byte vector.
#[derive(Debug)]
pub struct Encoder<'a> {
    bytes: &'a mut Vec<u8>,
}

impl<'a> Encoder<'a> {
    /// Appends to `bytes`.
    pub fn new(bytes: &'a mut Vec<u8>) -> Self {
        Self { bytes }
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }

    /// Two bytes.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Eight bytes.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// The bytes as they are; the reader must know how many.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// The length in two bytes, then the bytes.
    ///
    /// # Panics
    /// When there are more than 65535 bytes.
    pub fn bytes_u16(&mut self, bytes: &[u8]) -> &mut Self {
        let length = u16::try_from(bytes.len()).expect("callers keep to 65535 bytes");
        self.u16(length).bytes(bytes)
    }

    /// The length in four bytes, then the bytes.
    ///
    /// # Panics
    /// When there are 4 GiB or more.
    pub fn bytes_u32(&mut self, bytes: &[u8]) -> &mut Self {
        self.count(bytes.len()).bytes(bytes)
    }

    /// A count of things that follow, in four bytes.
    ///
    /// # Panics
    /// When it does not fit 32 bits.
    pub fn count(&mut self, count: usize) -> &mut Self {
        self.u32(u32::try_from(count).expect("callers keep counts below 2^32"))
    }

    /// Thirty-two bytes.
    pub fn digest(&mut self, digest: &Digest) -> &mut Self {
        self.bytes(digest.as_bytes())
    }

    /// Start and length, sixteen bytes.
    pub fn extent(&mut self, extent: Extent) -> &mut Self {
        self.u64(extent.start()).u64(extent.length())
    }
}

/// Takes fields from a byte slice; every read is checked.
#[derive(Clone, Debug)]
pub struct Decoder<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Decoder<'a> {
    /// Reads from the start of `bytes`.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    /// One byte.
    ///
    /// # Errors
    /// [`ErrorKind::Truncated`] when the bytes end before.
    pub fn u8(&mut self) -> Result<u8> {
        self.array().map(u8::from_le_bytes)
    }

    /// Two bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Truncated`] when the bytes end before.
    pub fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_le_bytes)
    }

    /// Four bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Truncated`] when the bytes end before.
    pub fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// Eight bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Truncated`] when the bytes end before.
    pub fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Truncated`] when the bytes end before.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.position..];
        let Some((taken, _)) = rest.split_at_checked(count) else {
            let (position, found) = (self.position, rest.len());
            let message =
                format!("field at byte {position}: expected {count} bytes, found {found}");
            return Err(Error::new(ErrorKind::Truncated, message));
        };
        self.position += count;
        Ok(taken)
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Truncated`] when the bytes end before.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    /// Bytes behind a length of two bytes, at most `limit`.
    ///
    /// # Errors
    /// [`ErrorKind::LimitExceeded`] when they are more than `limit`, [`ErrorKind::Truncated`] when
    /// the bytes end before.
    pub fn bytes_u16(&mut self, limit: usize) -> Result<&'a [u8]> {
        let at = self.position;
        let length = usize::from(self.u16()?);
        check_limit(at, length, limit)?;
        self.bytes(length)
    }

    /// Bytes behind a length of four bytes, at most `limit`.
    ///
    /// # Errors
    /// [`ErrorKind::LimitExceeded`] when they are more than `limit`, [`ErrorKind::Truncated`] when
    /// the bytes end before.
    pub fn bytes_u32(&mut self, limit: usize) -> Result<&'a [u8]> {
        let length = self.count(limit)?;
        self.bytes(length)
    }

    /// A count of things that follow, in four bytes, at most `limit`; so that memory can be set
    /// aside for them.
    ///
    /// # Errors
    /// [`ErrorKind::LimitExceeded`] when it is above `limit`, [`ErrorKind::Truncated`] when the
    /// bytes end before.
    pub fn count(&mut self, limit: usize) -> Result<usize> {
        let at = self.position;
        let count = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        check_limit(at, count, limit)?;
        Ok(count)
    }

    /// Thirty-two bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Truncated`] when the bytes end before.
    pub fn digest(&mut self) -> Result<Digest> {
        self.array().map(Digest::from_bytes)
    }

    /// Start and length, sixteen bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when the extent's end does not fit 64 bits, [`ErrorKind::Truncated`]
    /// when the bytes end before.
    pub fn extent(&mut self) -> Result<Extent> {
        let at = self.position;
        let (start, length) = (self.u64()?, self.u64()?);
        Extent::new(start, length).ok_or_else(|| {
            let message = format!(
                "extent at byte {at}: expected an end below 2^64, found {length} bytes from {start}"
            );
            Error::new(ErrorKind::Corrupt, message)
        })
    }

    /// Bytes taken so far.
    #[must_use]
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes left.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when bytes are left.
    pub fn finish(self) -> Result<()> {
        if self.remaining() == 0 {
            return Ok(());
        }
        let (position, left) = (self.position, self.remaining());
        let message = format!("expected the end at byte {position}, found {left} more bytes");
        Err(Error::new(ErrorKind::Corrupt, message))
    }
}

fn check_limit(at: usize, found: usize, limit: usize) -> Result<()> {
    if found <= limit {
        return Ok(());
    }
    let message = format!("count at byte {at}: expected at most {limit}, found {found}");
    Err(Error::new(ErrorKind::LimitExceeded, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    #[derive(Clone, Debug, PartialEq)]
    enum Field {
        U8(u8),
        U16(u16),
        U32(u32),
        U64(u64),
        Array([u8; 5]),
        Bytes16(Vec<u8>),
        Bytes32(Vec<u8>),
        Count(usize),
        Digest(Digest),
        Extent(Extent),
    }

    const LIMIT: usize = 40;

    fn field() -> impl Strategy<Value = Field> {
        prop_oneof![
            any::<u8>().prop_map(Field::U8),
            any::<u16>().prop_map(Field::U16),
            any::<u32>().prop_map(Field::U32),
            any::<u64>().prop_map(Field::U64),
            any::<[u8; 5]>().prop_map(Field::Array),
            vec(any::<u8>(), 0..=LIMIT).prop_map(Field::Bytes16),
            vec(any::<u8>(), 0..=LIMIT).prop_map(Field::Bytes32),
            (0..=LIMIT).prop_map(Field::Count),
            any::<[u8; 32]>().prop_map(|bytes| Field::Digest(Digest::from_bytes(bytes))),
            (any::<u64>(), any::<u64>())
                .prop_map(|(a, b)| Field::Extent(Extent::from_range(a.min(b)..a.max(b)))),
        ]
    }

    fn encode(fields: &[Field]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = Encoder::new(&mut bytes);
        for field in fields {
            match field {
                Field::U8(value) => encoder.u8(*value),
                Field::U16(value) => encoder.u16(*value),
                Field::U32(value) => encoder.u32(*value),
                Field::U64(value) => encoder.u64(*value),
                Field::Array(value) => encoder.bytes(value),
                Field::Bytes16(value) => encoder.bytes_u16(value),
                Field::Bytes32(value) => encoder.bytes_u32(value),
                Field::Count(value) => encoder.count(*value),
                Field::Digest(value) => encoder.digest(value),
                Field::Extent(value) => encoder.extent(*value),
            };
        }
        bytes
    }

    /// Reads fields of the same kinds as `like`.
    fn decode(like: &[Field], bytes: &[u8]) -> Result<Vec<Field>> {
        let mut decoder = Decoder::new(bytes);
        let mut fields = Vec::new();
        for field in like {
            fields.push(match field {
                Field::U8(_) => Field::U8(decoder.u8()?),
                Field::U16(_) => Field::U16(decoder.u16()?),
                Field::U32(_) => Field::U32(decoder.u32()?),
                Field::U64(_) => Field::U64(decoder.u64()?),
                Field::Array(_) => Field::Array(decoder.array()?),
                Field::Bytes16(_) => Field::Bytes16(decoder.bytes_u16(LIMIT)?.to_vec()),
                Field::Bytes32(_) => Field::Bytes32(decoder.bytes_u32(LIMIT)?.to_vec()),
                Field::Count(_) => Field::Count(decoder.count(LIMIT)?),
                Field::Digest(_) => Field::Digest(decoder.digest()?),
                Field::Extent(_) => Field::Extent(decoder.extent()?),
            });
        }
        assert_eq!(decoder.position() + decoder.remaining(), bytes.len());
        decoder.finish()?;
        Ok(fields)
    }

    proptest! {
        #[test]
        fn fields_roundtrip(fields in vec(field(), 0..12)) {
            prop_assert_eq!(decode(&fields, &encode(&fields)).unwrap(), fields);
        }

        #[test]
        fn every_truncation_and_every_addition_is_an_error(fields in vec(field(), 1..8)) {
            let bytes = encode(&fields);

            for cut in 0..bytes.len() {
                let error = decode(&fields, &bytes[..cut]).unwrap_err();
                prop_assert_eq!(error.kind(), ErrorKind::Truncated);
            }
            let longer = [&bytes[..], &[0]].concat();
            prop_assert_eq!(decode(&fields, &longer).unwrap_err().kind(), ErrorKind::Corrupt);
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            fields in vec(field(), 0..8), bytes in vec(any::<u8>(), 0..200),
        ) {
            if let Ok(decoded) = decode(&fields, &bytes) {
                prop_assert_eq!(encode(&decoded), bytes);
            }
        }
    }

    #[test]
    fn little_endian_is_what_is_written() {
        let mut bytes = vec![9];
        Encoder::new(&mut bytes)
            .u16(0x0201)
            .u32(0x0605_0403)
            .bytes_u16(b"ab")
            .count(3);

        assert_eq!(bytes, [9, 1, 2, 3, 4, 5, 6, 2, 0, b'a', b'b', 3, 0, 0, 0]);
    }

    #[test]
    fn counts_meet_their_limit_before_anything_is_read() {
        let bytes = u32::MAX.to_le_bytes();

        let error = Decoder::new(&bytes).count(1000).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LimitExceeded);
        assert_eq!(
            error.to_string(),
            "count at byte 0: expected at most 1000, found 4294967295"
        );
        let error = Decoder::new(&bytes).bytes_u32(1000).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LimitExceeded);
        let error = Decoder::new(&bytes).bytes_u16(65_534).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LimitExceeded);
    }

    #[test]
    fn an_extent_beyond_64_bits_is_corrupt() {
        let mut bytes = Vec::new();
        Encoder::new(&mut bytes).u64(u64::MAX).u64(1);

        assert_eq!(
            Decoder::new(&bytes).extent().unwrap_err().kind(),
            ErrorKind::Corrupt
        );
    }
}
