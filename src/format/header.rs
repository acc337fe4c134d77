//! The safetensors header: written for shards, and read back without trust in the file.
//!
//! Stored layout of a file (<https://github.com/huggingface/safetensors#format>): 8 bytes little-endian header length,
//! a JSON object `{"<name>":{"dtype":"F32","shape":[2,3],"data_offsets":[begin,end]},"__metadata__":{"format":"pt"}}`
//! padded with spaces, then the data, from whose start the offsets count. We pad so that data begins on a 64-byte
//! boundary.
//!
//! A header read here is checked against the file's length before it is trusted: lengths are compared before they are
//! used, tensors must cover the data exactly (no gap, no overlap), and each must be as long as its shape says.

use std::{fmt, ops::Range};

use serde::{
    Deserialize, Serialize,
    de::{Deserializer, IgnoredAny, MapAccess, Visitor},
};

use crate::error::{Explain, Kind};

/// Bytes of the length in front of a header.
pub const PREFIX: u64 = 8;
/// Data begins on a multiple of this.
pub const DATA_ALIGN: u64 = 64;
/// The longest header that is written or accepted; the reference implementation has the same limit.
pub const MAX_HEADER: u64 = 100_000_000;
/// The one key of a header that is not a tensor.
pub const METADATA: &str = "__metadata__";

/// Element types that checkpoints may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// bfloat16.
    BF16,
    /// 16-bit float.
    F16,
    /// 64-bit integer.
    I64,
}

impl Dtype {
    /// Every element type.
    pub const ALL: [Self; 4] = [Self::F32, Self::BF16, Self::F16, Self::I64];

    /// Bytes of one element.
    pub const fn size(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
            Self::I64 => 8,
        }
    }
    /// The type of this name in a safetensors header.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.name() == name)
    }
    /// The name in a safetensors header.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::BF16 => "BF16",
            Self::F16 => "F16",
            Self::I64 => "I64",
        }
    }
    /// Bytes of a tensor of this type; `None` if they don't fit 64 bits.
    pub fn bytes(self, shape: &[u64]) -> Option<u64> {
        shape.iter().try_fold(1_u64, |elements, &extent| elements.checked_mul(extent))?.checked_mul(self.size())
    }
}

/// Why a header is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The file ends before its header does, or the length is beyond reason.
    #[error("safetensors header of {header} bytes does not fit a file of {file} bytes")]
    Length {
        /// As the file says.
        header: u64,
        /// Bytes of the file, or of the part that is there.
        file: u64,
    },
    /// Not UTF-8, not JSON, or JSON of another form.
    #[error("safetensors header can't be read: {0}")]
    Syntax(String),
    /// Two tensors of one name.
    #[error("safetensors header names tensor {0:?} twice")]
    Duplicate(String),
    /// An element type that no model here has.
    #[error("tensor {name:?} has elements of type {dtype:?}, which are not supported")]
    Dtype {
        /// The tensor.
        name: String,
        /// As the header says.
        dtype: String,
    },
    /// Offsets that don't agree with the shape or the file.
    #[error("tensor {name:?} {reason}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The tensors don't fill the file.
    #[error("safetensors file has {found} bytes of data, its tensors fill {expected}")]
    Data {
        /// According to the tensors.
        expected: u64,
        /// According to the file's length.
        found: u64,
    },
}

impl Explain for HeaderError {
    fn kind(&self) -> Kind {
        Kind::Data
    }
    fn hint(&self) -> Option<String> {
        match self {
            Self::Dtype { .. } => {
                Some(format!("convert the model to one of {}", Dtype::ALL.map(Dtype::name).join(", ")))
            }
            _ => Some("the file is damaged or not a safetensors file: fetch or export it again".into()),
        }
    }
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Unique in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Extents, outermost first.
    pub shape: Vec<u64>,
    /// Its bytes, counted from the start of the *file*.
    pub range: Range<u64>,
}

/// Reads the header of a whole file (`bytes`: header and data), in file order.
pub fn read(bytes: &[u8]) -> Result<Vec<TensorEntry>, HeaderError> {
    let file = bytes.len() as u64;
    let length = length(bytes, file)?;
    // `length` has compared it with the file's length, which fits usize.
    let json = &bytes[PREFIX as usize..(PREFIX + length) as usize];
    parse(json, file)
}

/// The length of the JSON behind the prefix, from the first bytes of a file of `file` bytes: never more than the file.
pub fn length(start: &[u8], file: u64) -> Result<u64, HeaderError> {
    let prefix = start.first_chunk::<8>().ok_or(HeaderError::Length { header: 0, file: start.len() as u64 })?;
    let header = u64::from_le_bytes(*prefix);
    if header > MAX_HEADER || header > file.saturating_sub(PREFIX) {
        return Err(HeaderError::Length { header, file });
    }
    Ok(header)
}

/// Reads the JSON of a header of a file of `file` bytes in all; tensors come back in file order.
pub fn parse(json: &[u8], file: u64) -> Result<Vec<TensorEntry>, HeaderError> {
    parse_foreign(json, file)?
        .into_iter()
        .map(|ForeignTensor { name, dtype, shape, range }| match Dtype::of_name(&dtype) {
            Some(dtype) => Ok(TensorEntry { name, dtype, shape, range }),
            None => Err(HeaderError::Dtype { name, dtype }),
        })
        .collect()
}

/// One tensor of a file from elsewhere, of any element type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignTensor {
    /// Unique in the file.
    pub name: String,
    /// Element type, as the header spells it.
    pub dtype: String,
    /// Extents, outermost first.
    pub shape: Vec<u64>,
    /// Its bytes, counted from the start of the *file*.
    pub range: Range<u64>,
}

/// Reads the header of a whole file of any element types, in file order.
pub fn read_foreign(bytes: &[u8]) -> Result<Vec<ForeignTensor>, HeaderError> {
    let file = bytes.len() as u64;
    let length = length(bytes, file)?;
    // `length` has compared it with the file's length, which fits usize.
    parse_foreign(&bytes[PREFIX as usize..(PREFIX + length) as usize], file)
}

/// Bytes of one element of a type that safetensors knows; `None` for the others, and for those of parts of a byte.
fn size_of(dtype: &str) -> Option<u64> {
    match dtype {
        "BOOL" | "U8" | "I8" => Some(1),
        "U16" | "I16" | "F16" | "BF16" => Some(2),
        "U32" | "I32" | "F32" => Some(4),
        "U64" | "I64" | "F64" | "C64" => Some(8),
        _ if dtype.starts_with("F8_") => Some(1),
        _ => None,
    }
}

/// Reads the JSON of a header, whatever the element types. The length of a tensor of an unknown type is accepted.
pub fn parse_foreign(json: &[u8], file: u64) -> Result<Vec<ForeignTensor>, HeaderError> {
    let text = std::str::from_utf8(json).map_err(|error| HeaderError::Syntax(error.to_string()))?;
    let Raw(raw) = serde_json::from_str(text).map_err(|error| HeaderError::Syntax(error.to_string()))?;
    let data_start = PREFIX + json.len() as u64;
    let data_len = file.checked_sub(data_start).ok_or(HeaderError::Length { header: json.len() as u64, file })?;

    let mut tensors = Vec::with_capacity(raw.len());
    for (name, RawTensor { dtype, shape, data_offsets: [begin, end] }) in raw {
        let fail = |name: String, reason| Err(HeaderError::Tensor { name, reason });
        if begin > end || end > data_len {
            return fail(name, "lies outside of the file");
        }
        let elements = shape.iter().try_fold(1_u64, |elements, &extent| elements.checked_mul(extent));
        if let Some(size) = size_of(&dtype) {
            match elements.and_then(|elements| elements.checked_mul(size)) {
                Some(bytes) if bytes == end - begin => {}
                Some(_) => return fail(name, "is not as long as its shape says"),
                None => return fail(name, "has a shape beyond 64 bits"),
            }
        }
        tensors.push(ForeignTensor { name, dtype, shape, range: data_start + begin..data_start + end });
    }
    // Of two equal keys, readers that keep the last would miss one tensor.
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(HeaderError::Duplicate(pair[0].to_owned()));
    }
    tensors.sort_by(|a, b| (a.range.start, a.range.end, &a.name).cmp(&(b.range.start, b.range.end, &b.name)));
    let mut end = data_start;
    for tensor in &tensors {
        if tensor.range.start != end {
            let reason = if tensor.range.start < end { "overlaps another" } else { "leaves a gap before it" };
            return Err(HeaderError::Tensor { name: tensor.name.clone(), reason });
        }
        end = tensor.range.end;
    }
    if end != file {
        return Err(HeaderError::Data { expected: end - data_start, found: data_len });
    }
    Ok(tensors)
}

/// Writes a header (prefix and padding included) for tensors that follow one another without a gap, in this order.
///
/// `None` if the data or the header would be too long. The bytes depend only on the arguments.
pub fn write<'a>(tensors: impl IntoIterator<Item = (&'a str, Dtype, &'a [u64])>) -> Option<Vec<u8>> {
    let mut json = format!("{{\"{METADATA}\":{{\"format\":\"pt\"}}");
    let mut begin = 0_u64;
    for (name, dtype, shape) in tensors {
        let end = begin.checked_add(dtype.bytes(shape)?)?;
        let name = serde_json::Value::from(name);
        let shape = shape.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        json += &format!(r#",{name}:{{"dtype":"{}","shape":[{shape}],"data_offsets":[{begin},{end}]}}"#, dtype.name());
        begin = end;
    }
    json.push('}');
    let total = (PREFIX + json.len() as u64).next_multiple_of(DATA_ALIGN);
    let length = total - PREFIX;
    if length > MAX_HEADER {
        return None;
    }
    let mut header = Vec::with_capacity(total as usize);
    header.extend_from_slice(&length.to_le_bytes());
    header.extend_from_slice(json.as_bytes());
    header.resize(total as usize, b' ');
    Some(header)
}

/// The order of tensors in the files that we write: largest elements first, so that each tensor is aligned to its
/// elements; then by name.
pub fn file_order(a: (Dtype, &str), b: (Dtype, &str)) -> std::cmp::Ordering {
    b.0.size().cmp(&a.0.size()).then_with(|| a.1.cmp(b.1))
}

/// A header's tensors as written, duplicates included.
struct Raw(Vec<(String, RawTensor)>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tensors;
        impl<'de> Visitor<'de> for Tensors {
            type Value = Raw;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        tensors.push((name, map.next_value()?));
                    }
                }
                Ok(Raw(tensors))
            }
        }
        deserializer.deserialize_map(Tensors)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(json: &str, data: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.resize(bytes.len() + data, 7);
        bytes
    }

    #[test]
    fn a_written_header_is_read_back_by_us_and_by_the_reference() {
        let shapes: [&[u64]; 4] = [&[2, 3], &[], &[0, 5], &[7]];
        let tensors = [
            ("a\"\\\n", Dtype::F32, shapes[0]),
            ("b", Dtype::I64, shapes[1]),
            ("c", Dtype::BF16, shapes[2]),
            ("d", Dtype::F16, shapes[3]),
        ];
        let mut bytes = write(tensors).unwrap();
        assert_eq!(bytes.len() as u64 % DATA_ALIGN, 0);
        bytes.resize(bytes.len() + 24 + 8 + 14, 1);
        let ours = read(&bytes).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(ours.len(), 4);
        for (entry, (name, dtype, shape)) in ours.iter().zip(tensors) {
            assert_eq!((entry.name.as_str(), entry.dtype, entry.shape.as_slice()), (name, dtype, shape));
            let view = theirs.tensor(name).unwrap();
            assert_eq!(view.data(), &bytes[entry.range.start as usize..entry.range.end as usize]);
            assert_eq!(format!("{:?}", view.dtype()), dtype.name());
        }
    }

    #[test]
    fn hostile_headers_are_refused() {
        let t = |begin: u64, end: u64, shape: &str| {
            format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
        };
        let cases: [(&str, Vec<u8>, &str); 14] = [
            ("empty", vec![], "does not fit"),
            ("huge length", vec![0xff; 16], "does not fit"),
            ("length beyond the file", [100_u64.to_le_bytes().as_slice(), b"{}"].concat(), "does not fit"),
            ("not UTF-8", [2_u64.to_le_bytes().as_slice(), &[0xff, 0xfe]].concat(), "utf-8"),
            ("not JSON", file("nonsense", 0), "can't be read"),
            ("a list", file("[]", 0), "can't be read"),
            ("outside", file(&format!(r#"{{"a":{}}}"#, t(0, 8, "[2]")), 4), "outside"),
            ("backwards", file(&format!(r#"{{"a":{}}}"#, t(8, 0, "[2]")), 8), "outside"),
            ("wrong size", file(&format!(r#"{{"a":{}}}"#, t(0, 8, "[3]")), 8), "as its shape says"),
            ("overflow", file(&format!(r#"{{"a":{}}}"#, t(0, 8, "[4294967296,4294967296]")), 8), "beyond 64 bits"),
            ("overlap", file(&format!(r#"{{"a":{},"b":{}}}"#, t(0, 8, "[2]"), t(4, 12, "[2]")), 12), "overlaps"),
            ("gap", file(&format!(r#"{{"a":{},"b":{}}}"#, t(0, 8, "[2]"), t(12, 16, "[1]")), 16), "gap"),
            ("duplicate", file(&format!(r#"{{"a":{},"a":{}}}"#, t(0, 4, "[1]"), t(4, 8, "[1]")), 8), "twice"),
            ("unused data", file(&format!(r#"{{"a":{}}}"#, t(0, 4, "[1]")), 8), "its tensors fill"),
        ];
        for (what, bytes, expected) in cases {
            let error = read(&bytes).unwrap_err().to_string();
            assert!(error.contains(expected), "{what}: {error}");
        }
        let error = read(&file(r#"{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}"#, 1)).unwrap_err();
        assert!(matches!(error, HeaderError::Dtype { .. }));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
        }

        #[test]
        fn every_mutated_file_that_we_accept_the_reference_accepts_too(
            mutations in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
            cut in proptest::option::of(any::<proptest::sample::Index>()),
        ) {
            let shapes: [&[u64]; 2] = [&[3, 2], &[4]];
            let mut bytes = write([("w", Dtype::F32, shapes[0]), ("b", Dtype::BF16, shapes[1])]).unwrap();
            bytes.resize(bytes.len() + 32, 0);
            for (index, byte) in mutations {
                let at = index.index(bytes.len());
                bytes[at] = byte;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            if let Ok(ours) = read(&bytes) {
                let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
                prop_assert_eq!(ours.len(), theirs.len());
                for entry in ours {
                    prop_assert_eq!(
                        theirs.tensor(&entry.name).unwrap().data(),
                        &bytes[entry.range.start as usize..entry.range.end as usize]
                    );
                }
            }
        }
    }
}
