//! Large objects in parts.
//!
//! Parts are slices of the caller's bytes: nothing is copied on the way to the socket. The CRC64-NVME of each part is
//! computed once, on a blocking thread; it is sent with the part if the store can check it (S3: [`super::signed`]), and
//! the parts' sums are combined into that of the object. For Google's and Azure's stores object_store sends the parts.
//! On `file://` the parts are written into one hidden file, which is synced and renamed into its place
//! ([`super::local`]).
//!
//! # Names are not spread over prefixes
//! S3 handles at least 3,500 writes and 5,500 reads a second on each partition of a bucket's keys (Amazon S3 User
//! Guide, "Best practices design patterns"), and parts count as writes. With parts of 16 MiB that is 55 GiB/s up and 86
//! GiB/s down; one node with 100 Gbit/s moves 11.6 GiB/s, 745 requests a second, a fifth of the budget of *one*
//! partition. A run has one node, and its few small requests a second don't count. So a hash in front of the names
//! would cost readable, listable folders and gain nothing. If many runs share a bucket and exceed the budget, S3
//! answers `SlowDown` while it splits the partition; [`super::adaptive_limit`] then halves the requests in flight, and
//! `storage.part_mib = 64` quarters the requests.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::{PutMode, PutPayload, local::LocalFileSystem, path::Path};

use super::{
    backend::{Large, Part, Sent},
    crc::Crc64,
    download,
    error::StorageError,
    local::Staged,
    retry::{Again, Failure, Verdict},
    store::{Connections, Priority, Store, Uploaded},
};

/// The most parts of one upload (S3's limit; Google's is the same, Azure's is higher).
const MAX_PARTS: u64 = 10_000;
/// The smallest part that S3 accepts, except for the last.
const MIN_PART: u64 = 5 << 20;
/// Parts of one file that are summed and written at once: one is summed while another is written.
const FILE_PARTS: usize = 2;

impl Store {
    /// Writes a large object in parts, in parallel, without copying `body`, replacing any object there; `progress`
    /// receives the bytes of each finished part.
    ///
    /// The object appears whole or not at all. Dropping the future, or an error, aborts the upload.
    pub async fn upload(
        &self,
        key: &str,
        body: Bytes,
        progress: impl Fn(u64) + Send + Sync + 'static,
    ) -> Result<Uploaded, StorageError> {
        self.still_holds("upload", key).await?;
        let (store, key, uri) = (self.clone(), key.to_owned(), self.uri_of(key));
        let work =
            |connections: Arc<Connections>| async move { upload(&store, &connections, &key, body, &progress).await };
        match self.priority {
            Priority::Background => {
                let pool = self.background()?;
                self.end_of(pool.threads.spawn(work(Arc::clone(&pool.connections))), "upload", &uri).await
            }
            Priority::Normal | Priority::Urgent => work(Arc::clone(&self.inner.connections)).await,
        }
    }
}

/// Bytes of each part but the last, for an object of `len` bytes.
fn part_size(len: u64, wanted: u64) -> u64 {
    wanted.max(MIN_PART).max(len.div_ceil(MAX_PARTS))
}

/// One upload on its way.
struct Upload<'a> {
    store: &'a Store,
    connections: &'a Arc<Connections>,
    path: &'a Path,
    /// Bytes of each part but the last.
    size: u64,
    progress: &'a (dyn Fn(u64) + Send + Sync),
}

async fn upload(
    store: &Store,
    connections: &Arc<Connections>,
    key: &str,
    body: Bytes,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Uploaded, StorageError> {
    let path = store.path(key)?;
    let len = body.len() as u64;
    let upload = Upload { store, connections, path: &path, size: part_size(len, store.part()), progress };
    let sent = match &connections.backend.large {
        Large::File(files) => upload.write_file(files, &body).await,
        _ if len <= upload.size => upload.whole(body).await,
        large => upload.in_parts(large, &body).await.map_err(Failure::not_of_the_object),
    };
    sent.map(|crc64| Uploaded { bytes: len, crc64 }).map_err(|failure| failure.explain(&store.uri_of(key)))
}

/// On a thread of its own: a checksum of many MiB would delay every timer and heartbeat of this thread.
async fn checksum(bytes: Bytes) -> Result<Crc64, Failure> {
    tokio::task::spawn_blocking(move || Crc64::of(&bytes)).await.map_err(|_| Failure::stopped("upload"))
}

/// The parts of `body`.
fn parts(body: &Bytes, size: u64) -> impl Iterator<Item = Bytes> {
    // A part is never larger than the body, whose length is a usize.
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    (0..body.len().div_ceil(size)).map(move |i| body.slice(i * size..body.len().min((i + 1).saturating_mul(size))))
}

impl Upload<'_> {
    /// As one request.
    async fn whole(&self, body: Bytes) -> Result<Crc64, Failure> {
        let (len, crc64) = (body.len() as u64, checksum(body.clone()).await?);
        let request = || async {
            match &self.connections.backend.large {
                Large::S3(s3) => s3.put(self.path, body.clone(), crc64).await,
                _ => {
                    let options = self.store.options(PutMode::Overwrite);
                    let payload = PutPayload::from_bytes(body.clone());
                    self.connections.backend.objects.put_opts(self.path, payload, options).await.map(drop)
                }
            }
        };
        self.store.bulk_put(self.connections, "put", len).run(request).await?;
        (self.progress)(len);
        Ok(crc64)
    }

    async fn in_parts(&self, large: &Large, body: &Bytes) -> Result<Crc64, Failure> {
        let connections = self.connections;
        // An upload begun twice is swept like the leftover of a killed one.
        let begin = self.store.small(connections, "upload").again(Again::Soon);
        let id = begin.run(|| large.begin(self.path)).await?;
        let target =
            Target { store: self.store.clone(), connections: Arc::clone(connections), path: self.path.clone(), id };
        let mut guard = Abort { target: Some(target.clone()) };
        let sent = async {
            let sends = parts(body, self.size).enumerate().map(|(n, part)| self.send(large, &target.id, n, part));
            // In order, so that the checksums can be combined as they come; no more is queued than can be in flight.
            let sent = futures::stream::iter(sends).buffered(self.store.inner.concurrency);
            let add = |mut sent: Sent, part| async {
                sent.add(part);
                Ok(sent)
            };
            let sent = sent.try_fold(Sent::default(), add).await?;
            self.complete(large, &target.id, &sent).await?;
            Ok(sent.crc64)
        };
        let sent = sent.await;
        if sent.is_ok() {
            guard.target = None;
        }
        // Otherwise it is aborted in the background: a store that does not answer would delay the caller's next attempt
        // for as long again.
        sent
    }

    async fn send(&self, large: &Large, id: &str, index: usize, part: Bytes) -> Result<(Part, Crc64, u64), Failure> {
        let (len, crc64) = (part.len() as u64, checksum(part.clone()).await?);
        let attempts = self.store.bulk_put(self.connections, "upload", len);
        let taken = attempts.run(|| large.part(self.path, id, index, part.clone(), crc64)).await?;
        (self.progress)(len);
        Ok((taken, crc64, len))
    }

    /// Completes an upload. Any request may get "no such upload" after another one's success, whose answer was lost or
    /// is still on its way: the object itself decides. Its size does not: an older attempt may have left an object of
    /// the same size.
    async fn complete(&self, large: &Large, id: &str, sent: &Sent) -> Result<(), Failure> {
        let request = || async {
            match large.complete(self.path, id, sent).await {
                Err(gone @ object_store::Error::NotFound { .. }) => {
                    if self.stands(large, sent).await? {
                        Ok(())
                    } else {
                        Err(gone)
                    }
                }
                other => other,
            }
        };
        // The store may take long to combine thousands of parts, and we to read the object back. On S3 one more small
        // request shows the outcome of the first; elsewhere the object would be read back.
        let again = if large.is_s3() { Again::By(&self.store.inner.completions) } else { Again::Never };
        self.store.small(self.connections, "upload").slow().again(again).run(request).await
    }

    /// Whether the stored object is byte for byte the one sent: by the store's checksum, or else by reading it.
    async fn stands(&self, large: &Large, sent: &Sent) -> object_store::Result<bool> {
        let found = async {
            if let Large::S3(s3) = large {
                match s3.look(self.path, sent.crc64).await? {
                    (size, _) if size != sent.bytes => return Ok(false),
                    (_, Some(same)) => return Ok(same),
                    (_, None) => {}
                }
            }
            Ok(download::sum(self.connections, self.path, sent.bytes).await? == Some(sent.crc64))
        };
        match found.await {
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            other => other,
        }
    }

    async fn write_file(&self, files: &LocalFileSystem, body: &Bytes) -> Result<Crc64, Failure> {
        let failed = |error: object_store::Error| Failure::new("upload", &error);
        let Some(_pass) = self.connections.up.enter().await else { return Err(Failure::stopped("upload")) };
        let place = files.path_to_filesystem(self.path).map_err(failed)?;
        // Dropped before it is finished, it removes its hidden file.
        let staged = Arc::new(on_disk(move || Staged::begin(place)).await?);
        let mut offset = 0;
        let writes = parts(body, self.size).map(|part| {
            let (at, len) = (offset, part.len() as u64);
            offset += len;
            let staged = Arc::clone(&staged);
            async move {
                if let Some(limit) = self.store.rate_limit() {
                    limit.take(len).await;
                }
                let sum = checksum(part.clone());
                let (crc64, written) = tokio::join!(sum, on_disk(move || staged.write(&part, at)));
                written?;
                (self.progress)(len);
                Ok::<_, Failure>((crc64?, len))
            }
        });
        let writes: Vec<_> = writes.collect();
        let combine = |whole: Crc64, (crc64, len)| async move { Ok(whole.followed_by(crc64, len)) };
        let crc64 = futures::stream::iter(writes).buffered(FILE_PARTS).try_fold(Crc64::EMPTY, combine).await?;
        // All writes have ended, and have released it.
        let staged = Arc::into_inner(staged).ok_or_else(|| Failure::stopped("upload"))?;
        on_disk(move || staged.finish()).await?;
        Ok(crc64)
    }
}

/// Runs `work` on a thread that may wait for a disk.
async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => {
            let error = object_store::Error::Generic { store: "file", source: Box::new(error) };
            Err(Failure::new("upload", &error).not_of_the_object())
        }
        Err(_) => Err(Failure::stopped("upload")),
    }
}

/// A multipart upload that is aborted unless it is completed.
#[derive(Clone)]
struct Target {
    store: Store,
    connections: Arc<Connections>,
    path: Path,
    id: String,
}

impl Target {
    async fn abort(self) {
        let attempts = self.store.small(&self.connections, "abort of an upload");
        if let Err(failure) = attempts.run(|| self.connections.backend.large.abort(&self.path, &self.id)).await
            && !failure.is_not_found()
        {
            let refused = matches!(failure.verdict, Verdict::Permission | Verdict::Credentials);
            let error = crate::error::Error::from(failure.explain(&self.store.uri_of("")));
            if refused {
                // The upload failed for the same reason, which is reported.
                tracing::debug!(%error, key = %self.path, "parts of a failed upload stay in the store");
                return;
            }
            tracing::warn!(%error, key = %self.path, "parts of a failed upload stay in the store until its lifecycle \
                rule removes them");
        }
    }
}

/// Aborts a multipart upload that failed, or whose future was dropped.
struct Abort {
    target: Option<Target>,
}

impl Drop for Abort {
    fn drop(&mut self) {
        // The task must not own an `Abort`: a runtime that shuts down drops tasks, and each would spawn the next one.
        if let Some(target) = self.target.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(target.abort());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_object_has_more_parts_than_a_store_takes() {
        assert_eq!(part_size(100, 1 << 20), MIN_PART);
        assert_eq!(part_size(100, 16 << 20), 16 << 20);
        for len in [u64::from(u32::MAX), 48_828_125 << 20, u64::MAX] {
            let size = part_size(len, 16 << 20);
            assert!(len.div_ceil(size) <= MAX_PARTS, "{len}");
        }
    }

    #[test]
    fn parts_cover_the_body_once_and_share_its_memory() {
        let body = Bytes::from((0..=255_u8).cycle().take(1000).collect::<Vec<_>>());
        for size in [1, 7, 999, 1000, 1001] {
            let parts: Vec<_> = parts(&body, size).collect();
            assert_eq!(parts.concat(), body, "{size}");
            assert!(parts.iter().all(|part| body.as_ptr_range().contains(&part.as_ptr())));
        }
    }
}
