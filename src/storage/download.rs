//! An object's bytes, read straight into the caller's memory.
//!
//! Bytes from a connection are copied once, from the small buffer of its socket into their place, and summed there
//! while they are still in the processor's cache; a file is read by position into its place ([`super::local`]). A
//! request's own memory is only that small buffer (hyper reads at most some 400 KiB at once), whatever its range:
//! memory beside the targets is bounded by `storage.concurrency` times that.
//!
//! *Retry:* a range that failed half-way is requested again from its start. *Cancel:* dropping the future drops the
//! connection; a read from a file that is under way ends in the memory that it owns.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use object_store::{GetOptions, GetRange, GetResultPayload, path::Path};

use super::{
    crc::{Crc64, Summing},
    error::StorageError,
    local,
    pool::Task,
    retry,
    store::{Connections, Store},
};

impl Store {
    /// A range of an object: exactly the requested bytes, or [`StorageError::Short`] if the object ends before.
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StorageError> {
        if range.is_empty() {
            return self.path(key).map(|_| Bytes::new());
        }
        let store_and_key = (self.clone(), key.to_owned());
        let work = |connections: Arc<Connections>| async move {
            let (store, key) = store_and_key;
            get_range(&store, &connections, &key, range).await
        };
        match self.dedicated()? {
            Some(pool) => {
                self.end_of(pool.threads.spawn(work(Arc::clone(&pool.connections))), "get", &self.uri_of(key)).await
            }
            None => work(Arc::clone(&self.inner.connections)).await,
        }
    }

    /// Fills `target` with the bytes from `offset` on, straight from the connection or the disk; returns their
    /// checksum. An object that ends before is [`StorageError::Short`]; after an error the target's content is
    /// worthless.
    ///
    /// Works on a task of its own, so that many of these use many cores; dropping the future stops it.
    pub async fn get_into<B: AsMut<[u8]> + Send + 'static>(
        &self,
        key: &str,
        offset: u64,
        target: B,
    ) -> Result<Crc64, StorageError> {
        let (store, key, uri) = (self.clone(), key.to_owned(), self.uri_of(key));
        let work =
            |connections: Arc<Connections>| async move { get_into(&store, &connections, &key, offset, target).await };
        let pool = self.dedicated()?;
        let task = match &pool {
            Some(pool) => pool.threads.spawn(work(Arc::clone(&pool.connections))),
            None => Some(Task(tokio::spawn(work(Arc::clone(&self.inner.connections))))),
        };
        self.end_of(task, "get", &uri).await
    }
}

/// Fills `target` with the bytes from `offset` on; gives their checksum.
async fn get_into<B: AsMut<[u8]> + Send + 'static>(
    store: &Store,
    connections: &Connections,
    key: &str,
    offset: u64,
    mut target: B,
) -> Result<Crc64, StorageError> {
    let path = store.path(key)?;
    let len = target.as_mut().len() as u64;
    if len == 0 {
        return Ok(Crc64::EMPTY);
    }
    let range = offset..offset.saturating_add(len);
    // Locked by one attempt at a time; an attempt that is given up unlocks it.
    let target = tokio::sync::Mutex::new(Some(target));
    let request = || async {
        let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
        let result = match connections.backend.get(&path, options).await {
            Ok(result) if result.range == range => result,
            Ok(result) => {
                let error = retry::cut_short(len, result.range.end.saturating_sub(result.range.start));
                return explain_bad_range(connections, &path, &range, error).await;
            }
            Err(error) => return explain_bad_range(connections, &path, &range, error).await,
        };
        let mut held = target.lock().await;
        match result.payload {
            GetResultPayload::Stream(chunks) => match held.as_mut() {
                Some(target) => receive(chunks, target.as_mut()).await.map(Ok),
                None => Err(lost()),
            },
            GetResultPayload::File(file, _) => {
                let Some(mut target) = held.take() else { return Err(lost()) };
                let reading = tokio::task::spawn_blocking(move || {
                    let read = local::read(&file, offset, target.as_mut());
                    (target, read)
                });
                let (target, read) = reading.await.map_err(|error| object_store::Error::JoinError { source: error })?;
                *held = Some(target);
                match read {
                    Ok(sum) => Ok(Ok(sum)),
                    Err(error) => {
                        let error = object_store::Error::Generic { store: "file", source: Box::new(error) };
                        explain_bad_range(connections, &path, &range, error).await
                    }
                }
            }
        }
    };
    match store.bulk_get(connections, len).run(request).await {
        Ok(Ok(sum)) => Ok(sum),
        Ok(Err(size)) => Err(StorageError::Short { key: store.uri_of(key), end: range.end, size }),
        Err(failure) => Err(failure.explain(&store.uri_of(key))),
    }
}

/// Exactly the requested bytes.
async fn get_range(
    store: &Store,
    connections: &Connections,
    key: &str,
    range: Range<u64>,
) -> Result<Bytes, StorageError> {
    let (path, wanted) = (store.path(key)?, range.end - range.start);
    let request = || async {
        let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
        let result = match connections.backend.get(&path, options).await {
            Ok(result) if result.range == range => result,
            Ok(result) => {
                let error = retry::cut_short(wanted, result.range.end.saturating_sub(result.range.start));
                return explain_bad_range(connections, &path, &range, error).await;
            }
            Err(error) => return explain_bad_range(connections, &path, &range, error).await,
        };
        let bytes = result.bytes().await?;
        if bytes.len() as u64 == wanted { Ok(Ok(bytes)) } else { Err(retry::cut_short(wanted, bytes.len() as u64)) }
    };
    match store.bulk_get(connections, wanted).run(request).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(size)) => Err(StorageError::Short { key: store.uri_of(key), end: range.end, size }),
        Err(failure) => Err(failure.explain(&store.uri_of(key))),
    }
}

/// The target was lost with the thread that was reading into it.
fn lost() -> object_store::Error {
    object_store::Error::NotSupported { source: "memory of an attempt that broke off is gone".into() }
}

async fn receive(
    mut chunks: BoxStream<'static, object_store::Result<Bytes>>,
    target: &mut [u8],
) -> object_store::Result<Crc64> {
    let wanted = target.len() as u64;
    let mut left = target;
    let mut summing = Summing::new();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk?;
        let Some((place, rest)) = std::mem::take(&mut left).split_at_mut_checked(chunk.len()) else {
            return Err(retry::cut_short(wanted, u64::MAX));
        };
        place.copy_from_slice(&chunk);
        // The checksum is of the memory, not of the bytes that arrived: so faulty memory is detected.
        summing.add(place);
        left = rest;
    }
    if left.is_empty() { Ok(summing.sum()) } else { Err(retry::cut_short(wanted, wanted - left.len() as u64)) }
}

/// The checksum of a whole object of `len` bytes, which are discarded; `None`: it has another length.
pub(super) async fn sum(connections: &Connections, path: &Path, len: u64) -> object_store::Result<Option<Crc64>> {
    let result = connections.backend.get(path, GetOptions::default()).await?;
    if result.meta.size != len {
        return Ok(None);
    }
    let mut chunks = result.into_stream();
    let (mut summing, mut got) = (Summing::new(), 0_u64);
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk?;
        got += chunk.len() as u64;
        summing.add(&chunk);
    }
    if got == len { Ok(Some(summing.sum())) } else { Err(retry::cut_short(len, got)) }
}

/// Stores say "the object is shorter than that" in many ways; its size decides. The inner error is that size.
async fn explain_bad_range<T>(
    connections: &Connections,
    path: &Path,
    range: &Range<u64>,
    error: object_store::Error,
) -> object_store::Result<Result<T, u64>> {
    if retry::is_answer(&error) {
        return Err(error);
    }
    match connections.backend.head(path).await {
        Ok(meta) if meta.size < range.end => Ok(Err(meta.size)),
        _ => Err(error),
    }
}
