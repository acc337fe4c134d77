//! Writes token ids into the shard files of one dataset.
//!
//! Each split has one shard in memory at a time; a full one is uploaded in the background while the next one fills, so
//! it takes the memory of at most two shards per split. The shards become a dataset with the index, which is written
//! from the result of [`ShardWriter::finish`] once every upload has succeeded.
//!
//! A *stream* takes pieces of text one after another, and may mark where documents start. *Rows* take whole documents,
//! packed ([`super::pack`]); a shard then holds whole rows.

use bytes::Bytes;
use tokio::{runtime::Handle, task::JoinHandle};

use super::{
    DataError,
    marks::{MarkWriter, MarksEntry},
    pack::{Marked, Packer},
    shards::{FileEntry, ShardEntry, Split, TokenType},
};
use crate::storage::{Crc64, Store};

/// How the documents of a dataset lie in its shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ShardShape {
    /// Below this all ids are.
    pub vocab_size: u32,
    /// The token behind each document.
    pub eos_id: u32,
    /// The token before each document.
    pub bos_id: Option<u32>,
    /// Tokens of a full shard, at least 1.
    pub shard_tokens: u64,
    /// Whether starts and targets are written.
    pub marks: bool,
    /// Whether the sources of tokens for validation are written.
    pub sources: bool,
    /// Tokens of a row; `None`: a stream.
    pub row: Option<usize>,
}

/// Writes one split.
pub(super) struct ShardWriter {
    split: Split,
    dtype: TokenType,
    shape: ShardShape,
    /// Bytes of a full shard; a multiple of the token's width, and of a row's.
    full: usize,
    store: Store,
    runtime: Handle,
    buffer: Vec<u8>,
    marks: MarkWriter,
    packer: Option<Packer>,
    shards: Vec<ShardEntry>,
    upload: Option<JoinHandle<Result<(), DataError>>>,
    /// Number of the piece written last, and of its source.
    last: Option<(u64, u8)>,
    sources: Vec<u8>,
}

impl ShardWriter {
    pub(super) fn new(split: Split, shape: ShardShape, store: Store, runtime: Handle) -> Self {
        let dtype = TokenType::for_vocabulary(shape.vocab_size);
        let unit = dtype.width() * shape.row.unwrap_or(1);
        let full = usize::try_from(shape.shard_tokens).unwrap_or(usize::MAX).saturating_mul(dtype.width());
        // A row longer than a shard is one.
        let full = (full - full % unit).max(unit);
        let packer = shape.row.map(|row| Packer::new(row, shape.eos_id));
        Self {
            split,
            dtype,
            shape,
            full,
            store,
            runtime,
            buffer: Vec::new(),
            marks: MarkWriter::default(),
            packer,
            shards: Vec::new(),
            upload: None,
            last: None,
            sources: Vec::new(),
        }
    }

    /// Adds a piece to a stream, the `number`-th of all pieces of all inputs. An end-of-text token goes before it
    /// unless it directly continues this split's last piece: so between documents, and if the piece in between went to
    /// the other split. The begin token goes before a document's first piece.
    pub(super) fn append(&mut self, number: u64, continues: bool, ids: &[u32], source: u8) -> Result<(), DataError> {
        let follows = continues && self.last.is_some_and(|(last, _)| number == last + 1);
        if let Some((_, before)) = self.last
            && !follows
        {
            self.push((self.shape.eos_id, false, true, before))?;
        }
        self.last = Some((number, source));
        let mut start = !follows;
        let bos_id = self.shape.bos_id.filter(|_| !continues);
        for id in bos_id.into_iter().chain(ids.iter().copied()) {
            self.push((id, start, true, source))?;
            start = false;
        }
        Ok(())
    }

    /// Adds a whole document, of at most a row's length, to rows.
    pub(super) fn add(&mut self, document: impl ExactSizeIterator<Item = Marked>) -> Result<(), DataError> {
        let done = self.packer.as_mut().map(|packer| packer.add(document)).unwrap_or_default();
        done.into_iter().flatten().try_for_each(|token| self.push(token))
    }

    /// Training shards need none: nothing is measured by them.
    fn has_sources(&self) -> bool {
        self.shape.sources && self.split == Split::Validation
    }

    fn push(&mut self, (id, start, target, source): Marked) -> Result<(), DataError> {
        if self.has_sources() {
            self.sources.push(source);
        }
        if self.shape.marks {
            // Windows begin anew with each shard.
            self.marks.push(start || self.buffer.is_empty(), target);
        }
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
        let number = self.shards.len();
        let named =
            |name: String, body: &Bytes| FileEntry { file: name, bytes: body.len() as u64, crc64: Crc64::of(body) };
        let tokens = (body.len() / self.dtype.width()) as u64;
        let file = named(self.split.shard_name(number), &body);
        let mut entry = ShardEntry { file, tokens, marks: None, sources: None };
        let mut files = vec![(entry.file.clone(), body)];
        if self.shape.marks {
            let (bytes, documents, targets) = self.marks.take();
            let body = Bytes::from(bytes);
            let file = named(self.split.marks_name(number), &body);
            entry.marks = Some(MarksEntry { file: file.clone(), documents, targets });
            files.push((file, body));
        }
        if self.has_sources() {
            let body = Bytes::from(std::mem::take(&mut self.sources));
            let file = named(self.split.sources_name(number), &body);
            entry.sources = Some(file.clone());
            files.push((file, body));
        }
        self.shards.push(entry);
        let store = self.store.clone();
        self.upload = Some(self.runtime.spawn(async move {
            for (file, body) in files {
                upload(&store, file, body).await?;
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
        if let Some((_, source)) = self.last {
            self.push((self.shape.eos_id, false, true, source))?;
        }
        let rows = self.packer.as_mut().map(Packer::finish).unwrap_or_default();
        rows.into_iter().flatten().try_for_each(|token| self.push(token))?;
        if !self.buffer.is_empty() {
            self.flush()?;
        }
        self.wait()?;
        Ok(std::mem::take(&mut self.shards))
    }
}

async fn upload(store: &Store, file: FileEntry, body: Bytes) -> Result<(), DataError> {
    let uploaded = store.upload(&file.file, body, |_| {}).await.map_err(|source| DataError::Store {
        doing: "write a token shard to",
        uri: store.uri(),
        source,
    })?;
    if uploaded.crc64 != file.crc64 {
        return Err(DataError::Damaged {
            file: format!("{}/{}", store.uri(), file.file),
            reason: "has another checksum in the store than in memory".into(),
        });
    }
    Ok(())
}

impl Drop for ShardWriter {
    /// An upload whose caller has gone is stopped: the dataset will not exist.
    fn drop(&mut self) {
        if let Some(upload) = self.upload.take() {
            upload.abort();
        }
    }
}
