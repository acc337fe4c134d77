//! The files that an export reads: each byte once, in any order, and verified at the end.
//!
//! Every range that is read is summed, and the sums are combined in the order of the file. What no tensor needed is
//! read last, for its sum alone. So an export is complete only if every byte of its files is right.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use crate::{
    checkpoint::{
        CheckpointError, join,
        restore::{IN_FLIGHT, RemoteFile, compare, ranges, with_range},
    },
    format::header::{self, ForeignTensor},
    storage::{Crc64, Store},
};

/// One safetensors file of a folder.
pub(super) struct Input {
    store: Store,
    folder: String,
    file: RemoteFile,
    /// Its tensors, in file order.
    pub tensors: Vec<ForeignTensor>,
    /// What has been read, and its sums.
    read: Mutex<Vec<(Range<u64>, Crc64)>>,
}

impl Input {
    /// Reads the headers of files, which come back in the order of their names.
    pub(super) async fn open_all(
        store: &Store,
        folder: &str,
        files: impl IntoIterator<Item = RemoteFile>,
    ) -> Result<Vec<Self>, CheckpointError> {
        let mut files: Vec<RemoteFile> = files.into_iter().collect();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        stream::iter(files).map(|file| Self::open(store, folder, file)).buffered(IN_FLIGHT).try_collect().await
    }

    async fn open(store: &Store, folder: &str, file: RemoteFile) -> Result<Self, CheckpointError> {
        let object = join(folder, &file.name);
        let damaged = |error: header::HeaderError| CheckpointError::damaged(&object, error.to_string());
        let get = |end| with_range(store, folder, &file, 0..end, |bytes| Ok(Bytes::copy_from_slice(bytes)));
        let first = file.bytes.min(64 << 10);
        let mut start = get(first).await?;
        let length = header::length(&start, file.bytes).map_err(damaged)?;
        let whole = header::PREFIX + length;
        if whole > first {
            start = get(whole).await?;
        }
        // `whole` is at most the length of `start` now, on either path.
        start.truncate(whole as usize);
        let json = start.get(header::PREFIX as usize..).unwrap_or_default();
        let tensors = header::parse_foreign(json, file.bytes).map_err(damaged)?;
        let read = Mutex::new(vec![(0..whole, Crc64::of(&start))]);
        Ok(Self { store: store.clone(), folder: folder.to_owned(), file, tensors, read })
    }

    /// The file's key.
    pub(super) fn key(&self) -> String {
        join(&self.folder, &self.file.name)
    }

    /// Reads a range that has not been read before, and works on it on a thread of the blocking pool.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        range: Range<u64>,
        work: impl FnOnce(&[u8]) -> Result<T, CheckpointError> + Send + 'static,
    ) -> Result<T, CheckpointError> {
        let both = move |bytes: &[u8]| Ok((work(bytes)?, Crc64::of(bytes)));
        let (done, sum) = with_range(&self.store, &self.folder, &self.file, range.clone(), both).await?;
        self.read.lock().unwrap_or_else(PoisonError::into_inner).push((range, sum));
        Ok(done)
    }

    /// Reads what nobody has read, and compares the file with its checksum; returns the bytes that were read by nothing
    /// else. Without a checksum there is nothing to do.
    pub(super) async fn verify(&self, part: u64) -> Result<u64, CheckpointError> {
        if self.file.crc64.is_none() {
            return Ok(0);
        }
        let mut read = std::mem::take(&mut *self.read.lock().unwrap_or_else(PoisonError::into_inner));
        read.sort_unstable_by_key(|(range, _)| range.start);
        let (mut end, mut more) = (0, read.first().map_or(0, |(header, _)| header.end));
        let mut gaps = Vec::new();
        for (range, _) in &read {
            gaps.push(end..range.start);
            end = range.end;
        }
        gaps.push(end..self.file.bytes);
        let parts = gaps.into_iter().flat_map(|gap| {
            ranges(gap.end.saturating_sub(gap.start), part).map(move |it| gap.start + it.start..gap.start + it.end)
        });
        let sum = |range: Range<u64>| async move {
            let sum = |bytes: &[u8]| Ok(Crc64::of(bytes));
            let sum = with_range(&self.store, &self.folder, &self.file, range.clone(), sum).await?;
            Ok::<_, CheckpointError>((range, sum))
        };
        let rest: Vec<_> = stream::iter(parts).map(sum).buffer_unordered(IN_FLIGHT).try_collect().await?;
        more += rest.iter().map(|(range, _)| range.end - range.start).sum::<u64>();
        read.extend(rest);
        read.sort_unstable_by_key(|(range, _)| range.start);
        let (mut whole, mut end) = (Crc64::EMPTY, 0);
        for (range, sum) in read {
            if range.start != end {
                return Err(CheckpointError::Internal(format!("parts of {} were read twice", self.file.name)));
            }
            whole = whole.followed_by(sum, range.end - range.start);
            end = range.end;
        }
        compare(&self.key(), &self.file, whole)?;
        Ok(more)
    }
}
