//! Token shards: the stored form of a prepared dataset, and reading samples from it.
//!
//! # Stored layout
//! ```text
//! index.json               format, dtype, vocabulary, tokenizer, each shard's tokens, bytes, CRC64-NVME; written last
//! tokenizer.json           Hugging Face `tokenizers`
//! train-00000.bin …        token ids, little endian, u16 if the vocabulary has at most 65,536 entries, else u32
//! train-00000.marks …      format 2, unless documents are joined: their starts, and the targets ([`super::marks`])
//! validation-00000.bin …   the same, of the documents kept for validation
//! validation-00000.sources …   if inputs have names: the number of the source of each token
//! tokenizer_config.json …  format 2: the other files of a given tokenizer's folder
//! ```
//! Documents follow one another, joined by the end-of-text token. A sample is a window of `sequence_length + 1` tokens;
//! the next one starts `sequence_length` further on, so each token but a shard's first is predicted exactly once.
//! Windows don't cross the end of a shard, whose last few tokens stay unused.
//!
//! Format 1 has nothing but tokens. Format 2 adds marks, and rows: a *packed* dataset is cut for one sequence length
//! when it is prepared, into rows of `sequence_length + 1` tokens that hold whole documents. A row is a sample.
//!
//! # Reading
//! With positioned reads into a buffer on the stack, not through a memory map: the bytes come from the same page cache,
//! a call costs a microsecond against milliseconds of compute for the sequence, and a truncated file or a failing disk
//! is an error that names the file, while a map would kill the process with SIGBUS. It also needs no `unsafe`.
//!
//! # Trust
//! The index is input: names must be exactly those that this program gives, so that none leads out of the folder;
//! counts are checked against file lengths, and each token id read against the vocabulary.

use std::{
    fmt,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    DataError,
    marks::{Documents, MarksEntry},
    sources,
};
use crate::storage::Crc64;

/// Name of the index.
pub const INDEX: &str = "index.json";
/// The format of an index of tokens alone.
pub const FORMAT: u32 = 1;
/// The format of an index that says how documents were made; its shards may have marks.
pub const FORMAT_WITH_MARKS: u32 = 2;
/// The longest index that is accepted: one of a hundred thousand shards has 15 MiB.
pub const MAX_INDEX_BYTES: u64 = 64 << 20;

/// A part of the documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Trained on.
    Train,
    /// Kept for validation.
    Validation,
}

impl Split {
    /// Both, in the order of the index.
    pub const ALL: [Self; 2] = [Self::Train, Self::Validation];

    /// As in file names.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
        }
    }

    /// Name of the shard with this number.
    pub fn shard_name(self, number: usize) -> String {
        format!("{}-{number:05}.bin", self.as_str())
    }

    /// Name of the marks of the shard with this number.
    pub fn marks_name(self, number: usize) -> String {
        format!("{}-{number:05}.marks", self.as_str())
    }

    /// Name of the sources of the shard with this number.
    pub fn sources_name(self, number: usize) -> String {
        format!("{}-{number:05}.sources", self.as_str())
    }

    /// The number in the name of a shard or of a file of its own; `None` for anything else.
    pub fn shard_number(self, name: &str) -> Option<usize> {
        let (stem, _) = name.rsplit_once('.')?;
        let number = stem.strip_prefix(self.as_str())?.strip_prefix('-')?.parse().ok()?;
        [self.shard_name(number), self.marks_name(number), self.sources_name(number)]
            .iter()
            .any(|own| own == name)
            .then_some(number)
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How a token id is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenType {
    /// Two bytes, little endian.
    U16,
    /// Four bytes, little endian.
    U32,
}

impl TokenType {
    /// The smallest type for ids below `vocab_size`.
    pub const fn for_vocabulary(vocab_size: u32) -> Self {
        if vocab_size <= 1 << 16 { Self::U16 } else { Self::U32 }
    }

    /// Bytes of one id.
    pub const fn width(self) -> usize {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }
}

/// `index.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    /// [`FORMAT`] or [`FORMAT_WITH_MARKS`].
    pub format: u32,
    /// How a token id is stored.
    pub dtype: TokenType,
    /// Every id is below this.
    pub vocab_size: u32,
    /// The token between documents.
    pub eos_id: u32,
    /// Checksum over the settings and inputs that this was made from; see [`mod@super::prepare`].
    pub recipe: String,
    /// The tokenizer's file.
    pub tokenizer: FileEntry,
    /// Format 2: how documents were made and laid out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub documents: Option<Documents>,
    /// The names of the sources that the inputs come from; empty: they have none. Earlier programs don't read it, and
    /// lack nothing but the held-out loss of each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<String>,
    /// Training shards, in order.
    pub train: Vec<ShardEntry>,
    /// Validation shards, in order.
    pub validation: Vec<ShardEntry>,
}

/// A file beside the index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// CRC64-NVME of its bytes.
    #[serde(with = "crc_text")]
    pub crc64: Crc64,
}

/// A shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// Its file.
    #[serde(flatten)]
    pub file: FileEntry,
    /// Token ids in it.
    pub tokens: u64,
    /// Format 2: its marks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub marks: Option<MarksEntry>,
    /// Of a shard for validation, if the index has names of sources: the number of each token's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sources: Option<FileEntry>,
}

impl Index {
    /// Reads and checks an index; `origin` is its file or object, for messages.
    pub fn parse(bytes: &[u8], origin: &str) -> Result<Self, DataError> {
        let damaged = |reason: String| DataError::Damaged { file: origin.to_owned(), reason };
        let index: Self = serde_json::from_slice(bytes).map_err(|error| damaged(format!("not an index: {error}")))?;
        index.check().map_err(damaged)?;
        Ok(index)
    }

    fn check(&self) -> Result<(), String> {
        if !(FORMAT..=FORMAT_WITH_MARKS).contains(&self.format) {
            return Err(format!(
                "format {} is not known; this program reads formats {FORMAT} and {FORMAT_WITH_MARKS}",
                self.format
            ));
        }
        match (&self.documents, self.format == FORMAT_WITH_MARKS) {
            (Some(documents), true) => documents.check(self.vocab_size)?,
            (None, false) => {}
            (Some(_), false) => return Err(format!("format {} has no \"documents\"", self.format)),
            (None, true) => return Err("\"documents\" is missing".into()),
        }
        if self.vocab_size == 0 || self.eos_id >= self.vocab_size {
            return Err(format!("end-of-text id {} is not below vocabulary size {}", self.eos_id, self.vocab_size));
        }
        if self.dtype != TokenType::for_vocabulary(self.vocab_size) {
            return Err(format!("dtype {:?} does not fit vocabulary size {}", self.dtype, self.vocab_size));
        }
        if self.tokenizer.file != crate::layout::TOKENIZER {
            return Err(format!(
                "tokenizer file is named {:?}, not {:?}",
                self.tokenizer.file,
                crate::layout::TOKENIZER
            ));
        }
        sources::check(&self.sources)?;
        // Lengths are added in several places: this check makes sure that no sum overflows.
        let others = self.documents.iter().flat_map(|documents| &documents.files);
        let mut total = others
            .map(|file| file.bytes)
            .try_fold(self.tokenizer.bytes, u64::checked_add)
            .ok_or("the files have more than 2^64 bytes")?;
        for split in Split::ALL {
            for (number, shard) in self.shards(split).iter().enumerate() {
                let name = split.shard_name(number);
                if shard.file.file != name {
                    return Err(format!("shard {number} of {split} is named {:?}, not {name:?}", shard.file.file));
                }
                if shard.tokens.checked_mul(self.dtype.width() as u64) != Some(shard.file.bytes) {
                    return Err(format!("{name} has {} bytes for {} tokens", shard.file.bytes, shard.tokens));
                }
                let marks = match (&shard.marks, &self.documents) {
                    (Some(marks), Some(documents)) => {
                        marks.check(&split.marks_name(number), shard.tokens, documents.packed)?
                    }
                    // Joined documents need none.
                    (None, documents) if !documents.as_ref().is_some_and(|documents| documents.needs_marks()) => 0,
                    _ => return Err(format!("{name} lacks the marks of its format, or has those of another")),
                };
                if shard.marks.is_some() != self.has_marks() {
                    return Err(format!("{name} has marks and another shard has none, or the reverse"));
                }
                let wanted = split == Split::Validation && !self.sources.is_empty();
                let sources = sources::check_entry(shard, wanted, &split.sources_name(number))?;
                total = total
                    .checked_add(shard.file.bytes)
                    .and_then(|total| total.checked_add(marks))
                    .and_then(|total| total.checked_add(sources))
                    .ok_or("the files have more than 2^64 bytes")?;
            }
        }
        Ok(())
    }

    /// Whether the shards have marks.
    pub fn has_marks(&self) -> bool {
        self.train.iter().chain(&self.validation).any(|shard| shard.marks.is_some())
    }

    /// The one sequence length that a packed dataset was cut for.
    pub fn packed(&self) -> Option<u32> {
        self.documents.as_ref().and_then(|documents| documents.packed)
    }

    /// The shards of a split, in order.
    pub fn shards(&self, split: Split) -> &[ShardEntry] {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
        }
    }

    /// Tokens of a split.
    pub fn tokens(&self, split: Split) -> u64 {
        self.shards(split).iter().map(|shard| shard.tokens).sum()
    }

    /// The number of samples of `sequence_length` predictions in a split; 0 for a length of 0, and for a length that a
    /// packed dataset was not cut for.
    pub fn samples(&self, split: Split, sequence_length: u32) -> u64 {
        self.shards(split).iter().map(|shard| self.samples_in(shard.tokens, u64::from(sequence_length))).sum()
    }

    fn samples_in(&self, tokens: u64, length: u64) -> u64 {
        match self.packed() {
            Some(packed) if u64::from(packed) != length => 0,
            Some(_) => tokens / (length + 1),
            None => tokens.saturating_sub(1).checked_div(length).unwrap_or(0),
        }
    }

    /// Tokens from the beginning of one sample to that of the next.
    fn stride(&self, length: u64) -> u64 {
        if self.packed().is_some() { length + 1 } else { length }
    }

    /// Every file beside the index: the tokenizer and its other files, then all shards, each before its marks and its
    /// sources.
    pub fn files(&self) -> impl Iterator<Item = &FileEntry> {
        let others = self.documents.iter().flat_map(|documents| &documents.files);
        let shards = Split::ALL.into_iter().flat_map(|split| self.shards(split));
        let shards = shards.flat_map(|shard| {
            [Some(&shard.file), shard.marks.as_ref().map(|marks| &marks.file), shard.sources.as_ref()]
        });
        std::iter::once(&self.tokenizer).chain(others).chain(shards.flatten())
    }

    /// The stored form: the same index gives the same bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Writing plain numbers and strings to memory can't fail; an empty index would be refused by every reader.
        let mut bytes = serde_json::to_vec_pretty(self).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }
}

/// A CRC as 16 lower-case hex digits.
pub(super) mod crc_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::storage::Crc64;

    pub fn serialize<S: Serializer>(value: &Crc64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Crc64, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[derive(Debug)]
pub(super) struct OpenShard {
    file: File,
    name: String,
    tokens: u64,
    pub(super) marks: Option<OpenBeside>,
    pub(super) sources: Option<OpenBeside>,
}

/// The marks or the sources of an open shard.
#[derive(Debug)]
pub(super) struct OpenBeside {
    pub file: File,
    pub name: String,
}

/// A prepared dataset in a local folder, open for reading. Can be read from several threads at once.
#[derive(Debug)]
pub struct Dataset {
    dir: PathBuf,
    index: Index,
    train: Vec<OpenShard>,
    validation: Vec<OpenShard>,
}

/// Bytes read at once: a sequence of 4,096 four-byte ids in one call.
const CHUNK: usize = 16 << 10;

impl Dataset {
    /// Opens every shard in `dir` and checks its length against the index. Checksums were verified when the files
    /// came here (see [`ensure_local`](super::ensure_local)).
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, DataError> {
        let dir = dir.as_ref();
        let index = read_index(dir)?;
        let open_all = |split: Split| -> Result<Vec<OpenShard>, DataError> {
            index.shards(split).iter().map(|shard| open_shard(dir, shard)).collect()
        };
        let (train, validation) = (open_all(Split::Train)?, open_all(Split::Validation)?);
        let dataset = Self { dir: dir.to_owned(), index, train, validation };
        dataset.check_marks()?;
        Ok(dataset)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The index.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// [`Index::samples`].
    pub fn samples(&self, split: Split, sequence_length: u32) -> u64 {
        self.index.samples(split, sequence_length)
    }

    /// Refuses a sequence length that a packed dataset was not cut for.
    ///
    /// # Errors
    /// [`DataError::Packed`].
    pub fn check_length(&self, sequence_length: u32) -> Result<(), DataError> {
        match self.index.packed().filter(|packed| *packed != sequence_length) {
            Some(packed) => Err(DataError::Packed { dataset: self.dir.display().to_string(), packed, sequence_length }),
            None => Ok(()),
        }
    }

    /// Fills `tokens`, of length `sequence_length + 1`, with sample `index` of those that [`Dataset::samples`] counts.
    ///
    /// The first `sequence_length` tokens are the input, the last `sequence_length` the targets. Allocates nothing.
    pub fn read_sample(&self, split: Split, index: u64, tokens: &mut [i64]) -> Result<(), DataError> {
        let (shard, first) = self.locate(split, index, (tokens.len() as u64).saturating_sub(1))?;
        self.read_tokens(shard, first, tokens)
    }

    /// The shard of a sample, and the sample's first token in it.
    pub(super) fn locate(&self, split: Split, index: u64, length: u64) -> Result<(&OpenShard, u64), DataError> {
        let mut within = index;
        for shard in self.shards(split) {
            let here = self.index.samples_in(shard.tokens, length);
            if within < here {
                return Ok((shard, within * self.index.stride(length)));
            }
            within -= here;
        }
        Err(DataError::NoSuchSample { split, index, samples: index - within })
    }

    pub(super) fn shards(&self, split: Split) -> &[OpenShard] {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
        }
    }

    fn read_tokens(&self, shard: &OpenShard, first: u64, tokens: &mut [i64]) -> Result<(), DataError> {
        let width = self.index.dtype.width();
        let mut buffer = [0_u8; CHUNK];
        let mut at = first;
        for part in tokens.chunks_mut(CHUNK / width) {
            let bytes = &mut buffer[..part.len() * width];
            // No overflow: the shard's last byte has an offset below 2^64, and the caller stays within its tokens.
            self.read_at(&shard.file, &shard.name, at * width as u64, bytes)?;
            match self.index.dtype {
                TokenType::U16 => {
                    for (token, bytes) in part.iter_mut().zip(bytes.chunks_exact(2)) {
                        *token = i64::from(u16::from_le_bytes([bytes[0], bytes[1]]));
                    }
                }
                TokenType::U32 => {
                    for (token, bytes) in part.iter_mut().zip(bytes.chunks_exact(4)) {
                        *token = i64::from(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
                    }
                }
            }
            // An id beyond the embedding's rows would be undefined behaviour or an abort deep inside a kernel.
            if let Some(place) = part.iter().position(|&token| token >= i64::from(self.index.vocab_size)) {
                let (token, id, vocab_size) = (at + place as u64, part[place], self.index.vocab_size);
                let reason = format!("token {token} has id {id}, the vocabulary has {vocab_size}");
                return Err(self.damaged(&shard.name, reason));
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Bytes of the open file `name`.
    pub(super) fn read_at(&self, file: &File, name: &str, offset: u64, bytes: &mut [u8]) -> Result<(), DataError> {
        file.read_exact_at(bytes, offset).map_err(|source| match source.kind() {
            std::io::ErrorKind::UnexpectedEof => self.damaged(name, "has become shorter since it was opened".into()),
            _ => DataError::Io { doing: "read", path: self.dir.join(name), source },
        })
    }

    pub(super) fn damaged(&self, name: &str, reason: String) -> DataError {
        DataError::Damaged { file: self.dir.join(name).display().to_string(), reason }
    }
}

/// Reads and checks `dir/index.json`.
pub fn read_index(dir: &Path) -> Result<Index, DataError> {
    Index::parse(&read_index_bytes(dir)?, &dir.join(INDEX).display().to_string())
}

/// The bytes of `dir/index.json`.
pub(super) fn read_index_bytes(dir: &Path) -> Result<Vec<u8>, DataError> {
    let path = dir.join(INDEX);
    let missing = || DataError::Missing { uri: dir.display().to_string() };
    let length = match std::fs::metadata(&path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(missing()),
        Err(source) => return Err(DataError::Io { doing: "read", path, source }),
    };
    if length > MAX_INDEX_BYTES {
        return Err(DataError::Damaged {
            file: path.display().to_string(),
            reason: format!("has {length} bytes, more than the {MAX_INDEX_BYTES} that an index may have"),
        });
    }
    std::fs::read(&path).map_err(|source| DataError::Io { doing: "read", path, source })
}

fn open_shard(dir: &Path, shard: &ShardEntry) -> Result<OpenShard, DataError> {
    let beside = |entry: Option<&FileEntry>| -> Result<Option<OpenBeside>, DataError> {
        let Some(entry) = entry else { return Ok(None) };
        Ok(Some(OpenBeside { file: open_file(dir, entry)?, name: entry.file.clone() }))
    };
    let (marks, sources) = (beside(shard.marks.as_ref().map(|marks| &marks.file))?, beside(shard.sources.as_ref())?);
    let name = shard.file.file.clone();
    Ok(OpenShard { file: open_file(dir, &shard.file)?, name, tokens: shard.tokens, marks, sources })
}

/// Opens a file beside the index, and checks its length.
fn open_file(dir: &Path, entry: &FileEntry) -> Result<File, DataError> {
    let path = dir.join(&entry.file);
    let file = File::open(&path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => {
            DataError::Damaged { file: path.display().to_string(), reason: "is in the index but not there".into() }
        }
        _ => DataError::Io { doing: "open", path: path.clone(), source },
    })?;
    let length = file.metadata().map_err(|source| DataError::Io { doing: "read", path: path.clone(), source })?.len();
    if length != entry.bytes {
        return Err(DataError::Damaged {
            file: path.display().to_string(),
            reason: format!("has {length} bytes, its index says {}", entry.bytes),
        });
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Explain, Kind};

    fn entry(name: &str, body: &[u8]) -> FileEntry {
        FileEntry { file: name.into(), bytes: body.len() as u64, crc64: Crc64::of(body) }
    }

    /// A dataset whose shards hold 0, 1, 2, … throughout, in shards of the given numbers of tokens.
    fn dataset(dir: &Path, vocab_size: u32, shards: &[u64]) -> Index {
        let dtype = TokenType::for_vocabulary(vocab_size);
        let mut at = 0_u32;
        let train = shards
            .iter()
            .enumerate()
            .map(|(number, &tokens)| {
                let ids = at..at + tokens as u32;
                at = ids.end;
                let body: Vec<u8> = ids.flat_map(|id| id.to_le_bytes()[..dtype.width()].to_vec()).collect();
                let name = Split::Train.shard_name(number);
                std::fs::write(dir.join(&name), &body).unwrap();
                ShardEntry { file: entry(&name, &body), tokens, marks: None, sources: None }
            })
            .collect();
        std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
        let index = Index {
            format: FORMAT,
            dtype,
            vocab_size,
            eos_id: 0,
            recipe: String::new(),
            tokenizer: entry("tokenizer.json", b"{}"),
            documents: None,
            sources: Vec::new(),
            train,
            validation: Vec::new(),
        };
        std::fs::write(dir.join(INDEX), index.to_bytes()).unwrap();
        index
    }

    #[test]
    fn windows_overlap_by_one_token_and_stay_within_their_shard() {
        // Two-byte ids, and four-byte ids.
        for vocab_size in [65_536, 65_537] {
            let dir = tempfile::tempdir().unwrap();
            dataset(dir.path(), vocab_size, &[11, 4, 1, 5, 9]);
            let data = Dataset::open(dir.path()).unwrap();
            assert_eq!(data.samples(Split::Train, 4), 2 + 1 + 2);
            assert_eq!(data.samples(Split::Validation, 4), 0);
            let mut seen = Vec::new();
            for index in 0..5 {
                let mut tokens = [0; 5];
                data.read_sample(Split::Train, index, &mut tokens).unwrap();
                assert_eq!(tokens, std::array::from_fn(|i| tokens[0] + i as i64));
                seen.push(tokens[0]);
            }
            assert_eq!(seen, [0, 4, 16, 21, 25]);
            let error = data.read_sample(Split::Train, 5, &mut [0; 5]).unwrap_err();
            assert!(matches!(error, DataError::NoSuchSample { index: 5, samples: 5, .. }), "{error}");
            assert!(data.read_sample(Split::Train, u64::MAX, &mut [0; 5]).is_err());
            assert!(data.read_sample(Split::Train, 0, &mut [0; 1]).is_err());
            assert!(data.read_sample(Split::Train, 0, &mut []).is_err());
        }
    }

    #[test]
    fn a_sample_longer_than_the_read_buffer_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        dataset(dir.path(), 70_000, &[60_000]);
        let data = Dataset::open(dir.path()).unwrap();
        let mut tokens = vec![0; 20_001];
        data.read_sample(Split::Train, 1, &mut tokens).unwrap();
        assert!(tokens.iter().copied().eq(20_000..=40_000));
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_caught_when_read() {
        let dir = tempfile::tempdir().unwrap();
        dataset(dir.path(), 20, &[15, 15]);
        let data = Dataset::open(dir.path()).unwrap();
        data.read_sample(Split::Train, 0, &mut [0; 15]).unwrap();
        let error = data.read_sample(Split::Train, 1, &mut [0; 15]).unwrap_err();
        assert_eq!(error.kind(), Kind::Data);
        let text = error.to_string();
        assert!(text.contains("train-00001.bin") && text.contains("token 5 has id 20"), "{text}");
    }

    #[test]
    fn files_that_differ_from_the_index_are_damage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        assert!(matches!(Dataset::open(path).unwrap_err(), DataError::Missing { .. }));
        dataset(path, 100, &[50]);
        let data = Dataset::open(path).unwrap();
        let shard = path.join("train-00000.bin");
        std::fs::File::options().write(true).open(&shard).unwrap().set_len(60).unwrap();
        // Cut while open: an error, where a memory map would end the process.
        assert!(data.read_sample(Split::Train, 0, &mut [0; 30]).is_ok());
        let error = data.read_sample(Split::Train, 0, &mut [0; 40]).unwrap_err();
        assert!(error.to_string().contains("shorter"), "{error}");
        assert!(Dataset::open(path).unwrap_err().to_string().contains("has 60 bytes, its index says 100"));
        std::fs::remove_file(&shard).unwrap();
        let error = Dataset::open(path).unwrap_err();
        assert_eq!(error.kind(), Kind::Data);
        assert!(error.to_string().contains("not there"), "{error}");
    }

    #[test]
    fn a_hostile_index_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let index = dataset(dir.path(), 100, &[50, 7]);
        let good = String::from_utf8(index.to_bytes()).unwrap();
        assert_eq!(Index::parse(good.as_bytes(), "x").unwrap(), index);
        for (from, to) in [
            ("\"format\": 1", "\"format\": 2"),
            ("\"format\": 1", "\"format\": 3"),
            ("u16", "u32"),
            ("u16", "f32"),
            ("\"vocab_size\": 100", "\"vocab_size\": 0"),
            ("\"vocab_size\": 100", "\"vocab_size\": 70000"),
            ("\"eos_id\": 0", "\"eos_id\": 100"),
            ("\"eos_id\": 0", "\"eos_id\": -1"),
            ("train-00000.bin", "../../etc/passwd"),
            ("train-00000.bin", "/etc/passwd"),
            ("train-00000.bin", "train-00001.bin"),
            ("tokenizer.json", "../tokenizer.json"),
            ("\"tokens\": 50", "\"tokens\": 51"),
            ("\"tokens\": 50", "\"tokens\": 9223372036854775858"),
            ("\"tokens\": 50", "\"tokens\": 1e30"),
            ("\"bytes\": 2,", "\"bytes\": 18446744073709551615,"),
            ("\"crc64\": \"", "\"crc64\": \"+"),
            ("\"train\"", "\"trains\""),
        ] {
            let bad = good.replacen(from, to, 1);
            assert_ne!(bad, good, "{from}");
            let error = Index::parse(bad.as_bytes(), "the-index").unwrap_err();
            assert!(error.to_string().contains("the-index"), "{from} -> {to}: {error}");
        }
        for bytes in [b"" as &[u8], b"{}", b"null", b"[[[[", &[0xff; 64]] {
            assert!(Index::parse(bytes, "x").is_err());
        }
        File::create(dir.path().join(INDEX)).unwrap().set_len(MAX_INDEX_BYTES + 1).unwrap();
        assert!(read_index(dir.path()).unwrap_err().to_string().contains("more than"));
    }

    #[test]
    fn only_our_own_shard_names_are_shards() {
        assert_eq!(Split::Train.shard_number("train-00012.bin"), Some(12));
        assert_eq!(Split::Train.shard_number("train-123456.bin"), Some(123_456));
        for name in
            ["train-12.bin", "train-+0012.bin", "a/train-00012.bin", "train-00012.bin.txt", "validation-00000.bin"]
        {
            assert_eq!(Split::Train.shard_number(name), None, "{name}");
        }
    }
}
