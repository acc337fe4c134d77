//! CRC64-NVME, the checksum that S3 keeps for whole objects: it can be combined from the checksums of parts.

use std::fmt;

use crc_fast::CrcAlgorithm::Crc64Nvme;

/// CRC64-NVME of some bytes; 16 lower-case hex digits as text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Crc64(pub u64);

/// Bytes that are copied before they are summed: they are still in the processor's cache then.
const COPIED: usize = 256 << 10;

impl Crc64 {
    /// Of no bytes.
    pub const EMPTY: Self = Self(0);

    /// The checksum of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(crc_fast::checksum(Crc64Nvme, bytes))
    }
    /// Copies `from` into `to`, and gives the checksum of `to`, in one pass over memory. `None`: their lengths
    /// differ, and nothing is copied.
    pub fn of_copy(from: &[u8], to: &mut [u8]) -> Option<Self> {
        if from.len() != to.len() {
            return None;
        }
        let mut summing = Summing::new();
        for (from, to) in from.chunks(COPIED).zip(to.chunks_mut(COPIED)) {
            to.copy_from_slice(from);
            summing.add(to);
        }
        Some(summing.sum())
    }
    /// The checksum of these bytes with `len` bytes behind them, whose checksum is `next`.
    #[must_use]
    pub fn followed_by(self, next: Self, len: u64) -> Self {
        if len == 0 {
            return self;
        }
        Self(crc_fast::checksum_combine(Crc64Nvme, self.0, next.0, len))
    }
    /// As S3 writes it: base64 (RFC 4648) of the big-endian bytes, with its one `=`.
    pub(super) fn base64(self) -> String {
        const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        // 64 bits are ten groups of six and four bits over, which come as the high bits of an eleventh group.
        let group = |i: u32| if i < 10 { self.0 >> (58 - 6 * i) } else { self.0 << 2 };
        let digits = (0..11).map(|i| char::from(ALPHABET[(group(i) & 63) as usize]));
        digits.chain(['=']).collect()
    }
}

impl fmt::Display for Crc64 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Why a text is not a [`Crc64`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a CRC64 is 16 lower-case hex digits")]
pub struct InvalidCrc64;

impl std::str::FromStr for Crc64 {
    type Err = InvalidCrc64;
    fn from_str(text: &str) -> Result<Self, InvalidCrc64> {
        if text.len() != 16 || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(InvalidCrc64);
        }
        u64::from_str_radix(text, 16).map(Self).map_err(|_| InvalidCrc64)
    }
}

/// Sums bytes as they arrive.
pub(super) struct Summing(crc_fast::Digest);

impl Summing {
    pub(super) fn new() -> Self {
        Self(crc_fast::Digest::new(Crc64Nvme))
    }
    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }
    pub(super) fn sum(&self) -> Crc64 {
        Crc64(self.0.finalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_the_ones_that_s3_keeps() {
        // The check value of CRC-64/NVME.
        assert_eq!(Crc64::of(b"123456789"), Crc64(0xae8b_1486_0a79_9888));
        assert_eq!(Crc64::of(b""), Crc64::EMPTY);
        let whole = Crc64::of(b"123456789");
        for cut in 0..=9 {
            let (a, b) = b"123456789".split_at(cut);
            assert_eq!(Crc64::of(a).followed_by(Crc64::of(b), b.len() as u64), whole, "{cut}");
            let mut summing = Summing::new();
            summing.add(a);
            summing.add(b);
            assert_eq!(summing.sum(), whole, "{cut}");
        }
        for len in [0, 1, COPIED - 1, COPIED, COPIED + 1, 3 * COPIED + 5] {
            let from: Vec<u8> = (0..len).map(|n| (n * 7 + n / 251) as u8).collect();
            let mut to = vec![0; len];
            assert_eq!(Crc64::of_copy(&from, &mut to), Some(Crc64::of(&from)), "{len}");
            assert!(to == from, "{len}");
            to.push(9);
            assert_eq!(Crc64::of_copy(&from, &mut to), None, "{len}");
        }
        assert_eq!(whole.to_string(), "ae8b14860a799888");
        assert_eq!("ae8b14860a799888".parse(), Ok(whole));
        for bad in ["", "AE8B14860A799888", "ae8b14860a79988", "+e8b14860a799888", "ae8b14860a7998880"] {
            assert_eq!(bad.parse::<Crc64>(), Err(InvalidCrc64), "{bad}");
        }
        assert_eq!(whole.base64(), "rosUhgp5mIg=");
        assert_eq!((Crc64(0).base64(), Crc64(u64::MAX).base64()), ("AAAAAAAAAAA=".into(), "//////////8=".into()));
    }
}
