//! Large objects in parts.
//!
//! Parts are slices of the caller's bytes: nothing is copied. The CRC64-NVME of each part is computed once, on a blocking
//! thread while the part is on its way, and the parts' sums are combined. On `file://` the parts are written in order
//! into one hidden file, which is synced and renamed into its place.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::{
    MultipartId, MultipartUpload, ObjectStoreExt, PutPayload,
    multipart::{MultipartStore, PartId},
    path::Path,
};

use super::{Crc64, Lane, StorageError, Store, Uploaded, retry::Failure};

/// The most parts of one upload (S3's limit; Google's is the same, Azure's is higher).
const MAX_PARTS: u64 = 10_000;
/// The smallest part that S3 takes, but for the last.
const MIN_PART: u64 = 5 << 20;

/// Bytes of each part but the last, for an object of `len` bytes.
fn part_size(len: u64, wanted: u64) -> u64 {
    wanted.max(MIN_PART).max(len.div_ceil(MAX_PARTS))
}

pub(super) async fn upload(
    store: &Store,
    key: &str,
    body: Bytes,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Uploaded, StorageError> {
    let path = store.path(key)?;
    let uri = store.uri_of(key);
    let len = body.len() as u64;
    let size = part_size(len, store.inner.part);
    let crc64 = match &store.inner.backend.multipart {
        None => write_in_order(store, &path, &body, size, progress).await.map_err(|failure| failure.explain(&uri))?,
        Some(_) if len <= size => {
            let (crc, put) = tokio::join!(checksum(body.clone()), store.put_in(Lane::Bulk, key, body));
            put?;
            progress(len);
            crc.map_err(|failure| failure.explain(&uri))?
        }
        Some(multipart) => {
            let sent = send_in_parts(store, multipart, &path, &body, size, progress).await;
            sent.map_err(|failure| failure.not_of_the_object().explain(&uri))?
        }
    };
    Ok(Uploaded { bytes: len, crc64 })
}

/// On a thread of its own: a checksum of many MiB would hold up every timer and heartbeat of this thread.
async fn checksum(bytes: Bytes) -> Result<Crc64, Failure> {
    tokio::task::spawn_blocking(move || Crc64::of(&bytes)).await.map_err(|_| Failure::stopped("upload"))
}

/// The parts of `body`.
fn parts(body: &Bytes, size: u64) -> impl Iterator<Item = Bytes> {
    // A part is never larger than the body, whose length is a usize.
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    (0..body.len().div_ceil(size)).map(move |i| body.slice(i * size..body.len().min((i + 1).saturating_mul(size))))
}

async fn send_in_parts(
    store: &Store,
    multipart: &Arc<dyn MultipartStore>,
    path: &Path,
    body: &Bytes,
    size: u64,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Crc64, Failure> {
    let id = store.attempts(Lane::Control, "upload", 0).run(|| multipart.create_multipart(path)).await?;
    let mut guard = Abort { target: Some((store.clone(), Arc::clone(multipart), path.clone(), id.clone())) };
    let sent = async {
        let sends = parts(body, size)
            .enumerate()
            .map(|(index, part)| send_part(store, multipart, path, &id, index, part, progress));
        // In order, so that the checksums can be combined as they come; no more is queued than can be in flight.
        let sent: Vec<_> = futures::stream::iter(sends).buffered(store.inner.concurrency).try_collect().await?;
        let mut crc = Crc64::EMPTY;
        let mut ids = Vec::with_capacity(sent.len());
        for (part_id, part_crc, len) in sent {
            crc = crc.followed_by(part_crc, len);
            ids.push(part_id);
        }
        complete(store, multipart, path, &id, ids, body.len() as u64).await?;
        Ok(crc)
    };
    match sent.await {
        Ok(crc) => {
            guard.target = None;
            Ok(crc)
        }
        Err(failure) => {
            if let Some(target) = guard.target.take() {
                abort(target).await;
            }
            Err(failure)
        }
    }
}

async fn send_part(
    store: &Store,
    multipart: &Arc<dyn MultipartStore>,
    path: &Path,
    id: &MultipartId,
    index: usize,
    part: Bytes,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<(PartId, Crc64, u64), Failure> {
    let len = part.len() as u64;
    let attempts = store.attempts(Lane::Bulk, "upload", len);
    let put = attempts.run(|| multipart.put_part(path, id, index, PutPayload::from_bytes(part.clone())));
    let (crc, put) = tokio::join!(checksum(part.clone()), put);
    let part_id = put?;
    progress(len);
    Ok((part_id, crc?, len))
}

/// Completes an upload. A repeated request may hear "no such upload" after a success whose answer was lost: the object's
/// size tells.
async fn complete(
    store: &Store,
    multipart: &Arc<dyn MultipartStore>,
    path: &Path,
    id: &MultipartId,
    parts: Vec<PartId>,
    len: u64,
) -> Result<(), Failure> {
    let tries = std::sync::atomic::AtomicUsize::new(0);
    let request = || async {
        let first = tries.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 0;
        match multipart.complete_multipart(path, id, parts.clone()).await {
            Ok(_) => Ok(()),
            Err(gone @ object_store::Error::NotFound { .. }) if !first => match store.objects().head(path).await {
                Ok(meta) if meta.size == len => Ok(()),
                _ => Err(gone),
            },
            Err(error) => Err(error),
        }
    };
    // The store may take long to put thousands of parts together.
    store.attempts(Lane::Control, "upload", 0).slow().run(request).await
}

/// A multipart upload that is to be aborted unless it is completed.
type Target = (Store, Arc<dyn MultipartStore>, Path, MultipartId);

/// Aborts a multipart upload also when its future was dropped.
struct Abort {
    target: Option<Target>,
}

impl Drop for Abort {
    fn drop(&mut self) {
        // The task must not own an `Abort`: a runtime that shuts down drops tasks, each of which would spawn the next.
        if let Some(target) = self.target.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(abort(target));
        }
    }
}

async fn abort((store, multipart, path, id): Target) {
    let attempts = store.attempts(Lane::Control, "abort of an upload", 0);
    if let Err(failure) = attempts.run(|| multipart.abort_multipart(&path, &id)).await
        && !failure.is_not_found()
    {
        let error = crate::error::Error::from(failure.explain(&store.uri_of("")));
        tracing::warn!(%error, key = %path, "parts of a failed upload stay in the store until its lifecycle rule removes them");
    }
}

async fn write_in_order(
    store: &Store,
    path: &Path,
    body: &Bytes,
    size: u64,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Crc64, Failure> {
    let Ok(_permit) = store.inner.bulk.acquire().await else { return Err(Failure::stopped("upload")) };
    let failed = |error: object_store::Error| Failure::new("upload", &error);
    // Dropped without `complete`, it removes its hidden file.
    let mut file: Box<dyn MultipartUpload> = store.objects().put_multipart(path).await.map_err(failed)?;
    let written = async {
        let mut crc = Crc64::EMPTY;
        for part in parts(body, size) {
            let len = part.len() as u64;
            let (part_crc, put) = tokio::join!(checksum(part.clone()), file.put_part(PutPayload::from_bytes(part)));
            put.map_err(failed)?;
            crc = crc.followed_by(part_crc?, len);
            progress(len);
        }
        file.complete().await.map_err(failed)?;
        Ok(crc)
    }
    .await;
    if written.is_err() {
        // Best effort: what stays is hidden, and swept later.
        let _ = file.abort().await;
    }
    written
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
