//! Marks of tokens: where documents start, and which tokens are targets. Format 2 of the shards.
//!
//! # Stored layout
//! Beside each shard lies a file with two bits for each of its tokens. Token `t` has bits `2·(t mod 4)` and
//! `2·(t mod 4) + 1` of byte `t / 4`: the lower one is set if a document starts with the token, the higher one if the
//! token is a target, that is, if the loss counts how well it is predicted from the tokens before it. Bits behind the
//! last token are 0. A sample's marks are one short read at a computed place, however large the shard is.
//!
//! # Invariants
//! - A shard's first token starts a document, and so does the first token of a row.
//! - No token both starts a document and is a target: it would be predicted from another document.
//! - The index has the size, the CRC64-NVME and the counts of each file. The first bits and the last are checked when
//!   a dataset is opened, all others when they are read.
//!
//! *Crash, retry, cancel:* as for the shards, whose index names these files too ([`mod@super::prepare`]).

use serde::{Deserialize, Serialize};

use super::{
    DataError, Dataset, Split,
    shards::{FileEntry, OpenBeside},
};
use crate::layout;

/// Tokens whose marks fit in a byte.
const PER_BYTE: u64 = 4;
/// The bits of a byte that say that a document starts.
const STARTS: u8 = 0b0101_0101;
/// The bits of a byte that say that a token is a target.
const TARGETS: u8 = STARTS << 1;
/// Bytes read at once: the marks of 16,384 tokens.
const READ: usize = 4 << 10;

/// What a sample says beside its tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Where documents start among the sample's T inputs, ascending, the first 0.
    pub starts: Vec<u32>,
    /// For each of the T inputs: whether the token after it is a target. (Never across the start of a document.)
    pub targets: Vec<bool>,
}

/// The file of a shard's marks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarksEntry {
    /// The file.
    #[serde(flatten)]
    pub file: FileEntry,
    /// Documents that start in the shard, the filler of rows included.
    pub documents: u64,
    /// Tokens that are targets.
    pub targets: u64,
}

impl MarksEntry {
    /// Checks the entry of the marks `name` of a shard of `tokens`; returns the file's length.
    pub(super) fn check(&self, name: &str, tokens: u64, packed: Option<u32>) -> Result<u64, String> {
        if self.file.file != name {
            return Err(format!("marks are named {:?}, not {name:?}", self.file.file));
        }
        if self.file.bytes != length(tokens) {
            return Err(format!("{name} has {} bytes for {tokens} tokens", self.file.bytes));
        }
        let most = tokens.checked_sub(self.documents);
        if self.documents == 0 || most.is_none_or(|most| self.targets > most) {
            let (documents, targets) = (self.documents, self.targets);
            return Err(format!("{name} has {documents} documents and {targets} targets in {tokens} tokens"));
        }
        if let Some(packed) = packed
            && !tokens.is_multiple_of(u64::from(packed) + 1)
        {
            return Err(format!("{name} has {tokens} tokens, which are no rows of {packed} and one"));
        }
        Ok(self.file.bytes)
    }
}

/// How the documents of a dataset were made and laid out: what format 2 adds to the index.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Documents {
    /// The token before each document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos_id: Option<u32>,
    /// The sequence length that rows were cut for; absent: a stream, from which windows of any length are cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packed: Option<u32>,
    /// Documents that are in neither split.
    #[serde(default)]
    pub dropped: Dropped,
    /// Documents are chats, rendered by this template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat: Option<Rendering>,
    /// The other files of the tokenizer's folder.
    #[serde(default)]
    pub files: Vec<FileEntry>,
}

/// Documents that are in neither split, and why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// Longer than a row.
    #[serde(default)]
    pub too_long: u64,
    /// Without a target.
    #[serde(default)]
    pub without_target: u64,
}

/// How chats were rendered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rendering {
    /// SHA-256 of the template, 64 hexadecimal digits.
    pub template_sha256: String,
    /// The same of the template of chats with tools, if that is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools_template_sha256: Option<String>,
    /// The date that the template was told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub date: Option<String>,
    /// The tokens that end an assistant's turn.
    #[serde(default)]
    pub end_ids: Vec<u32>,
}

/// Whether a file of this name may travel with a dataset.
pub(super) fn travels(name: &str) -> bool {
    layout::TOKENIZER_FILES.contains(&name) || [layout::GENERATION_CONFIG, layout::MODEL_CONFIG].contains(&name)
}

impl Documents {
    /// Whether shards without marks would be wrong.
    pub(super) fn needs_marks(&self) -> bool {
        self.packed.is_some() || self.chat.is_some()
    }

    pub(super) fn check(&self, vocab_size: u32) -> Result<(), String> {
        if let Some(bos_id) = self.bos_id.filter(|id| *id >= vocab_size) {
            return Err(format!("begin-of-text id {bos_id} is not below vocabulary size {vocab_size}"));
        }
        if self.packed == Some(0) {
            return Err("rows are packed for sequences of 0 tokens".into());
        }
        for (number, file) in self.files.iter().enumerate() {
            let twice = self.files.iter().take(number).any(|other| other.file == file.file);
            if twice || !travels(&file.file) {
                return Err(format!("{:?} is no name of a tokenizer's file, or there twice", file.file));
            }
        }
        match &self.chat {
            Some(Rendering { template_sha256: sum, .. })
                if sum.len() != 64 || !sum.bytes().all(|byte| byte.is_ascii_hexdigit()) =>
            {
                Err(format!("{sum:?} is no SHA-256 of a template"))
            }
            Some(Rendering { end_ids, .. }) if end_ids.iter().any(|id| *id >= vocab_size) => {
                Err(format!("one of the ends of turns {end_ids:?} is not below vocabulary size {vocab_size}"))
            }
            _ => Ok(()),
        }
    }
}

/// Bytes of the marks of `tokens` tokens.
pub(super) const fn length(tokens: u64) -> u64 {
    tokens.div_ceil(PER_BYTE)
}

/// Marks in the making.
#[derive(Debug, Default)]
pub(super) struct MarkWriter {
    bytes: Vec<u8>,
    tokens: u64,
    documents: u64,
    targets: u64,
}

impl MarkWriter {
    /// The next token's marks. A token that starts a document is no target.
    pub(super) fn push(&mut self, start: bool, target: bool) {
        let (shift, target) = (2 * (self.tokens % PER_BYTE), target && !start);
        if shift == 0 {
            self.bytes.push(0);
        }
        if let Some(byte) = self.bytes.last_mut() {
            *byte |= (u8::from(start) | u8::from(target) << 1) << shift;
        }
        self.tokens += 1;
        self.documents += u64::from(start);
        self.targets += u64::from(target);
    }

    /// The file's bytes, and its counts: documents, targets. Begins anew.
    pub(super) fn take(&mut self) -> (Vec<u8>, u64, u64) {
        let done = std::mem::take(self);
        (done.bytes, done.documents, done.targets)
    }
}

impl Dataset {
    /// Whether the samples of this dataset have marks: format 2. Without, every token is a target of one document.
    pub fn has_marks(&self) -> bool {
        self.index().has_marks()
    }

    /// Marks of a sample, into buffers that are used again. `index` is one of those that [`Dataset::samples`] counts.
    ///
    /// # Errors
    /// [`DataError::Damaged`] for marks that contradict each other, and the errors of reading.
    pub fn read_marks(
        &self,
        split: Split,
        index: u64,
        sequence_length: u32,
        marks: &mut Marks,
    ) -> Result<(), DataError> {
        marks.starts.clear();
        marks.targets.clear();
        let length = u64::from(sequence_length);
        let (shard, first) = self.locate(split, index, length)?;
        let Some(open) = &shard.marks else {
            marks.starts.push(0);
            marks.targets.resize(sequence_length as usize, true);
            return Ok(());
        };
        let in_rows = self.index().packed().is_some();
        let last = first + length;
        self.chunks(open, first, last, |byte, bytes| {
            for (token, bits) in (byte * PER_BYTE..).step_by(PER_BYTE as usize).zip(bytes) {
                for (slot, token) in (token..token + PER_BYTE).enumerate() {
                    let bits = bits >> (2 * slot);
                    let (start, target) = (bits & 1 != 0, bits & 2 != 0);
                    // Neither before the sample nor behind the token that follows its inputs.
                    if token < first || token > last {
                        continue;
                    }
                    if start && target {
                        return Err(format!("token {token} starts a document and is a target"));
                    }
                    let at = token - first;
                    if at == 0 && in_rows && !start {
                        return Err(format!("token {token} begins a row and starts no document"));
                    }
                    if at < length && (start || at == 0) {
                        // Below the sequence length, which has 32 bits.
                        marks.starts.push(at as u32);
                    }
                    if at > 0 {
                        marks.targets.push(target);
                    }
                }
            }
            Ok(())
        })
    }

    /// The number of targets of a sample, without reading its tokens; T for a dataset without marks. Cheap: called for
    /// every sample of a step's global batch on every rank.
    ///
    /// # Errors
    /// The errors of reading.
    pub fn targets(&self, split: Split, index: u64, sequence_length: u32) -> Result<u32, DataError> {
        let (shard, first) = self.locate(split, index, u64::from(sequence_length))?;
        let Some(open) = &shard.marks else { return Ok(sequence_length) };
        // The tokens that follow the inputs.
        let (from, last) = (first + 1, first + u64::from(sequence_length));
        let mut count = 0;
        self.chunks(open, from, last, |byte, bytes| {
            for (byte, bits) in (byte..).zip(bytes) {
                let mut bits = bits & TARGETS;
                if byte == from / PER_BYTE {
                    bits &= u8::MAX << (2 * (from % PER_BYTE));
                }
                if byte == last / PER_BYTE {
                    bits &= u8::MAX >> (2 * (PER_BYTE - 1 - last % PER_BYTE));
                }
                count += bits.count_ones();
            }
            Ok(())
        })?;
        Ok(count)
    }

    /// Passes on the bytes with the marks of the tokens `first` to `last`, each time with the number of the first byte.
    fn chunks(
        &self,
        open: &OpenBeside,
        first: u64,
        last: u64,
        mut each: impl FnMut(u64, &[u8]) -> Result<(), String>,
    ) -> Result<(), DataError> {
        let mut buffer = [0_u8; READ];
        let (mut byte, end) = (first / PER_BYTE, last / PER_BYTE + 1);
        while byte < end {
            let count = (end - byte).min(READ as u64);
            let bytes = &mut buffer[..count as usize];
            self.read_at(&open.file, &open.name, byte, bytes)?;
            each(byte, bytes).map_err(|reason| self.damaged(&open.name, reason))?;
            byte += count;
        }
        Ok(())
    }

    /// Checks the first and the last marks of every shard.
    pub(super) fn check_marks(&self) -> Result<(), DataError> {
        for split in Split::ALL {
            for (open, entry) in self.shards(split).iter().zip(self.index().shards(split)) {
                // A shard with marks has a document, so it has a token.
                let (Some(open), Some(last)) = (&open.marks, entry.tokens.checked_sub(1)) else { continue };
                let mut bits = [0];
                self.read_at(&open.file, &open.name, 0, &mut bits)?;
                if bits[0] & 1 == 0 {
                    return Err(self.damaged(&open.name, "its first token starts no document".into()));
                }
                self.read_at(&open.file, &open.name, last / PER_BYTE, &mut bits)?;
                if bits[0] & !(u8::MAX >> (2 * (PER_BYTE - 1 - last % PER_BYTE))) != 0 {
                    return Err(self.damaged(&open.name, "has marks behind its last token".into()));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
