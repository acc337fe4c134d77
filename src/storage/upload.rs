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
//! answers `SlowDown` while it splits the partition; [`super::pace`] then halves the requests in flight, and
//! `storage.part_mib = 64` quarters the requests.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::{
    PutMode, PutPayload,
    local::LocalFileSystem,
    multipart::{MultipartStore, PartId},
    path::Path,
};

use super::{
    Crc64, Lanes, StorageError, Store, Uploaded, download,
    local::Staged,
    retry::{Again, Failure, Verdict},
    signed::{S3, TakenPart},
};

/// The most parts of one upload (S3's limit; Google's is the same, Azure's is higher).
const MAX_PARTS: u64 = 10_000;
/// The smallest part that S3 accepts, except for the last.
const MIN_PART: u64 = 5 << 20;
/// Parts of one file that are summed and written at once: one is summed while another goes to the disk.
const FILE_PARTS: usize = 2;

/// The way in which large objects are written to a store.
#[derive(Clone)]
pub(super) enum Large {
    /// Into a file, by position.
    File(Arc<LocalFileSystem>),
    /// In parts, with requests of our own.
    S3(Arc<S3>),
    /// In parts, through object_store.
    Parts(Arc<dyn MultipartStore>),
}

/// The store's answer to a part.
pub(super) enum Part {
    S3(TakenPart),
    Other(PartId),
}

impl Large {
    /// Whether objects are written in one piece, by position.
    pub(super) const fn is_file(&self) -> bool {
        matches!(self, Self::File(_))
    }

    const fn is_s3(&self) -> bool {
        matches!(self, Self::S3(_))
    }

    pub(super) async fn begin(&self, path: &Path) -> object_store::Result<String> {
        match self {
            Self::S3(s3) => s3.begin(path).await,
            Self::Parts(store) => store.create_multipart(path).await,
            Self::File(_) => Err(not_in_parts()),
        }
    }

    pub(super) async fn part(
        &self,
        path: &Path,
        id: &str,
        index: usize,
        body: Bytes,
        crc: Crc64,
    ) -> object_store::Result<Part> {
        match self {
            Self::S3(s3) => s3.part(path, id, index, body, crc).await.map(Part::S3),
            Self::Parts(store) => {
                store.put_part(path, &id.to_owned(), index, PutPayload::from_bytes(body)).await.map(Part::Other)
            }
            Self::File(_) => Err(not_in_parts()),
        }
    }

    async fn complete(&self, path: &Path, id: &str, sent: &Sent) -> object_store::Result<()> {
        match self {
            Self::S3(s3) => s3.complete(path, id, &sent.taken, sent.crc64).await,
            Self::Parts(store) => store.complete_multipart(path, &id.to_owned(), sent.ids.clone()).await.map(drop),
            Self::File(_) => Err(not_in_parts()),
        }
    }

    pub(super) async fn abort(&self, path: &Path, id: &str) -> object_store::Result<()> {
        match self {
            Self::S3(s3) => s3.client.abort_multipart(path, &id.to_owned()).await,
            Self::Parts(store) => store.abort_multipart(path, &id.to_owned()).await,
            Self::File(_) => Err(not_in_parts()),
        }
    }
}

fn not_in_parts() -> object_store::Error {
    object_store::Error::NotSupported { source: "files are not written in parts".into() }
}

/// All parts of an object, in order.
#[derive(Default)]
struct Sent {
    taken: Vec<TakenPart>,
    ids: Vec<PartId>,
    bytes: u64,
    crc64: Crc64,
}

impl Sent {
    fn add(&mut self, (part, crc64, len): (Part, Crc64, u64)) {
        match part {
            Part::S3(taken) => self.taken.push(taken),
            Part::Other(id) => self.ids.push(id),
        }
        self.crc64 = self.crc64.followed_by(crc64, len);
        self.bytes += len;
    }
}

/// Bytes of each part but the last, for an object of `len` bytes.
fn part_size(len: u64, wanted: u64) -> u64 {
    wanted.max(MIN_PART).max(len.div_ceil(MAX_PARTS))
}

/// One upload on its way.
struct Upload<'a> {
    store: &'a Store,
    lanes: &'a Arc<Lanes>,
    path: &'a Path,
    /// Bytes of each part but the last.
    size: u64,
    progress: &'a (dyn Fn(u64) + Send + Sync),
}

pub(super) async fn upload(
    store: &Store,
    lanes: &Arc<Lanes>,
    key: &str,
    body: Bytes,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Uploaded, StorageError> {
    let path = store.path(key)?;
    let len = body.len() as u64;
    let upload = Upload { store, lanes, path: &path, size: part_size(len, store.part()), progress };
    let sent = match &lanes.backend.large {
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
            match &self.lanes.backend.large {
                Large::S3(s3) => s3.put(self.path, body.clone(), crc64).await,
                _ => {
                    let options = self.store.options(PutMode::Overwrite);
                    let payload = PutPayload::from_bytes(body.clone());
                    self.lanes.backend.objects.put_opts(self.path, payload, options).await.map(drop)
                }
            }
        };
        self.store.bulk_put(self.lanes, "put", len).run(request).await?;
        (self.progress)(len);
        Ok(crc64)
    }

    async fn in_parts(&self, large: &Large, body: &Bytes) -> Result<Crc64, Failure> {
        let lanes = self.lanes;
        // An upload begun twice is swept like the leftover of a killed one.
        let begin = self.store.small(lanes, "upload").again(Again::Soon);
        let id = begin.run(|| large.begin(self.path)).await?;
        let target = Target { store: self.store.clone(), lanes: Arc::clone(lanes), path: self.path.clone(), id };
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
        let attempts = self.store.bulk_put(self.lanes, "upload", len);
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
        self.store.small(self.lanes, "upload").slow().again(again).run(request).await
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
            Ok(download::sum(self.lanes, self.path, sent.bytes).await? == Some(sent.crc64))
        };
        match found.await {
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            other => other,
        }
    }

    async fn write_file(&self, files: &LocalFileSystem, body: &Bytes) -> Result<Crc64, Failure> {
        let failed = |error: object_store::Error| Failure::new("upload", &error);
        let Some(_pass) = self.lanes.up.enter().await else { return Err(Failure::stopped("upload")) };
        let place = files.path_to_filesystem(self.path).map_err(failed)?;
        // Dropped before it is finished, it removes its hidden file.
        let staged = Arc::new(on_disk(move || Staged::begin(place)).await?);
        let mut offset = 0;
        let writes = parts(body, self.size).map(|part| {
            let (at, len) = (offset, part.len() as u64);
            offset += len;
            let staged = Arc::clone(&staged);
            async move {
                if let Some(cap) = self.store.cap() {
                    cap.take(len).await;
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
        // All writes have ended, and released it.
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
    lanes: Arc<Lanes>,
    path: Path,
    id: String,
}

impl Target {
    async fn abort(self) {
        let attempts = self.store.small(&self.lanes, "abort of an upload");
        if let Err(failure) = attempts.run(|| self.lanes.backend.large.abort(&self.path, &self.id)).await
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
        // The task must not own an `Abort`: a runtime that shuts down drops tasks, each of which would spawn the next.
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
