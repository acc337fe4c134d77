//! Writes token ids into the shard files of one dataset.
//!
//! Each split has one shard in memory at a time; a full one is uploaded in the background while the next one fills, so
//! it takes the memory of at most two shards per split. The shards become a dataset with the index, which is written
//! from the result of [`ShardWriter::finish`] once every upload has succeeded.

use bytes::Bytes;
use tokio::{runtime::Handle, task::JoinHandle};

use super::{
    DataError,
    shards::{FileEntry, ShardEntry, Split, TokenType},
};
use crate::storage::{Crc64, Store};

/// Writes one split.
pub(super) struct ShardWriter {
    split: Split,
    dtype: TokenType,
    eos_id: u32,
    /// Bytes of a full shard; a multiple of the token's width.
    full: usize,
    store: Store,
    runtime: Handle,
    buffer: Vec<u8>,
    shards: Vec<ShardEntry>,
    upload: Option<JoinHandle<Result<(), DataError>>>,
    /// Number of the piece written last.
    last: Option<u64>,
}

impl ShardWriter {
    /// `shard_tokens` is at least 1.
    pub(super) fn new(
        split: Split,
        vocab_size: u32,
        eos_id: u32,
        shard_tokens: u64,
        store: Store,
        runtime: Handle,
    ) -> Self {
        let dtype = TokenType::for_vocabulary(vocab_size);
        let full = usize::try_from(shard_tokens).unwrap_or(usize::MAX).saturating_mul(dtype.width());
        let full = full - full % dtype.width();
        Self {
            split,
            dtype,
            eos_id,
            full,
            store,
            runtime,
            buffer: Vec::new(),
            shards: Vec::new(),
            upload: None,
            last: None,
        }
    }

    /// Adds a piece, the `number`-th of all pieces of all inputs. An end-of-text token goes before it unless it
    /// directly continues this split's last piece: so between documents, and if the piece in between went to the other
    /// split.
    pub(super) fn append(&mut self, number: u64, continues: bool, ids: &[u32]) -> Result<(), DataError> {
        if self.last.is_some_and(|last| !(continues && number == last + 1)) {
            self.push(self.eos_id)?;
        }
        self.last = Some(number);
        ids.iter().try_for_each(|&id| self.push(id))
    }

    fn push(&mut self, id: u32) -> Result<(), DataError> {
        match self.dtype {
            // Ids are below the vocabulary size: the caller has checked.
            TokenType::U16 => self.buffer.extend_from_slice(&(id as u16).to_le_bytes()),
            TokenType::U32 => self.buffer.extend_from_slice(&id.to_le_bytes()),
        }
        if self.buffer.len() >= self.full { self.flush() } else { Ok(()) }
    }

    /// Tokens so far.
    pub(super) fn tokens(&self) -> u64 {
        self.shards.iter().map(|shard| shard.tokens).sum::<u64>() + (self.buffer.len() / self.dtype.width()) as u64
    }

    fn flush(&mut self) -> Result<(), DataError> {
        self.wait()?;
        let body = Bytes::from(std::mem::take(&mut self.buffer));
        let crc64 = Crc64::of(&body);
        let name = self.split.shard_name(self.shards.len());
        self.shards.push(ShardEntry {
            file: FileEntry { file: name.clone(), bytes: body.len() as u64, crc64 },
            tokens: (body.len() / self.dtype.width()) as u64,
            marks: None,
        });
        let store = self.store.clone();
        self.upload = Some(self.runtime.spawn(async move {
            let uploaded = store.upload(&name, body, |_| {}).await.map_err(|source| DataError::Store {
                doing: "write a token shard to",
                uri: store.uri(),
                source,
            })?;
            if uploaded.crc64 != crc64 {
                return Err(DataError::Damaged {
                    file: format!("{}/{name}", store.uri()),
                    reason: "has another checksum in the store than in memory".into(),
                });
            }
            Ok(())
        }));
        Ok(())
    }

    fn wait(&mut self) -> Result<(), DataError> {
        let Some(upload) = self.upload.take() else { return Ok(()) };
        self.runtime.block_on(upload).map_err(|error| DataError::Stopped { reason: error.to_string() })?
    }

    /// Ends the last document and waits for the uploads.
    pub(super) fn finish(mut self) -> Result<Vec<ShardEntry>, DataError> {
        if self.last.is_some() {
            self.push(self.eos_id)?;
        }
        if !self.buffer.is_empty() {
            self.flush()?;
        }
        self.wait()?;
        Ok(std::mem::take(&mut self.shards))
    }
}

impl Drop for ShardWriter {
    /// An upload whose caller has gone is stopped: the dataset will not exist.
    fn drop(&mut self) {
        if let Some(upload) = self.upload.take() {
            upload.abort();
        }
    }
}
