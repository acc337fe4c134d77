//! A store for tests that carries out requests but can answer something else.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex},
};

use futures::{FutureExt, StreamExt, stream::BoxStream};
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartId, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
    memory::InMemory,
    multipart::{MultipartStore, PartId},
    path::Path,
};

use super::{
    backend::{Backend, Large},
    retry::Policy,
    store::Store,
};
use crate::config::StorageConfig;

/// The fate of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// No fault.
    Pass,
    /// It does not reach the store.
    Lost,
    /// The store does it, but its answer is lost.
    AnswerLost,
    /// 409.
    Conflict,
    /// 503: slow down.
    SlowDown,
    /// No space is left.
    Full,
    /// 403.
    Denied,
    /// It never answers.
    Hang,
    /// The store does it, and never answers.
    LandsAndHangs,
    /// It reaches the store when it is let go ([`Faulty::let_go`]).
    Held,
    /// The store does it, and answers 404.
    Gone,
}

/// Called with the operation, the path, and the number of such requests before this one.
type Plan = dyn Fn(&str, &str, usize) -> Fault + Send + Sync;

/// A memory store with a plan of faults.
pub(crate) struct Faulty {
    pub inner: InMemory,
    plan: Box<Plan>,
    seen: Mutex<HashMap<String, usize>>,
    held: tokio::sync::Semaphore,
}

#[derive(Debug, thiserror::Error)]
#[error("connection reset by peer")]
struct Reset;

impl Faulty {
    pub(crate) fn new(plan: impl Fn(&str, &str, usize) -> Fault + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            inner: InMemory::new(),
            plan: Box::new(plan),
            seen: Mutex::default(),
            held: tokio::sync::Semaphore::new(0),
        })
    }

    /// Lets all requests go that are held, or will be.
    pub(crate) fn let_go(&self) {
        self.held.close();
    }

    /// Requests of this operation so far.
    pub(crate) fn count(&self, operation: &str) -> usize {
        self.seen.lock().unwrap().get(operation).copied().unwrap_or(0)
    }

    async fn apply<T>(&self, operation: &str, path: &Path, does: impl Future<Output = Result<T>>) -> Result<T> {
        let before = {
            let mut seen = self.seen.lock().unwrap();
            let count = seen.entry(operation.to_owned()).or_default();
            *count += 1;
            *count - 1
        };
        let reset = || object_store::Error::Generic {
            store: "faulty",
            source: Box::new(object_store::client::HttpError::new(object_store::client::HttpErrorKind::Unknown, Reset)),
        };
        let generic = |source| object_store::Error::Generic { store: "faulty", source };
        match (self.plan)(operation, path.as_ref(), before) {
            Fault::Pass => does.await,
            Fault::Lost => Err(reset()),
            Fault::AnswerLost => {
                let _ = does.await;
                Err(reset())
            }
            Fault::Conflict => {
                Err(object_store::Error::AlreadyExists { path: path.to_string(), source: "409 Conflict".into() })
            }
            Fault::SlowDown => Err(generic("status code: 503 Service Unavailable: SlowDown".into())),
            Fault::Full => Err(generic(Box::new(std::io::Error::from_raw_os_error(28)))),
            Fault::Denied => {
                Err(object_store::Error::PermissionDenied { path: path.to_string(), source: "403 Forbidden".into() })
            }
            Fault::Hang => std::future::pending().await,
            Fault::LandsAndHangs => {
                let _ = does.await;
                std::future::pending().await
            }
            Fault::Held => {
                let _ = self.held.acquire().await;
                does.await
            }
            Fault::Gone => {
                let _ = does.await;
                Err(object_store::Error::NotFound { path: path.to_string(), source: "404 Not Found".into() })
            }
        }
    }
}

impl Store {
    /// A store over `faulty` with pauses short enough for tests.
    pub(crate) fn faulty(faulty: &Arc<Faulty>, settings: &StorageConfig) -> Self {
        Self::faulty_with(faulty, settings, Policy::REMOTE.patience)
    }

    /// The same, with another time limit for one attempt.
    pub(crate) fn faulty_with(
        faulty: &Arc<Faulty>,
        settings: &StorageConfig,
        patience: Option<std::time::Duration>,
    ) -> Self {
        let policy = Policy {
            attempts: 5,
            patience,
            first_pause: std::time::Duration::from_micros(10),
            longest_pause: std::time::Duration::from_millis(1),
            ..Policy::REMOTE
        };
        let backend = Backend { objects: faulty.clone(), large: Large::Parts(faulty.clone()), s3: None };
        let again = backend.clone();
        let reopen = Box::new(move || Ok(again.clone()));
        Self::assemble(backend, "memory://".into(), String::new(), policy, settings, reopen)
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}
impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let operation = if options.mode == object_store::PutMode::Create { "create" } else { "put" };
        self.apply(operation, path, self.inner.put_opts(path, payload, options)).await
    }
    async fn put_multipart_opts(&self, path: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(path, options).await
    }
    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let operation = if options.head { "head" } else { "get" };
        self.apply(operation, path, self.inner.get_opts(path, options)).await
    }
    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(paths)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let shown: Vec<_> = self.inner.list(prefix).collect().now_or_never().unwrap_or_default();
        // "listed" says for each object whether a listing shows it.
        let shown = shown.into_iter().filter(|meta: &Result<ObjectMeta>| {
            meta.as_ref().map_or(true, |meta| (self.plan)("listed", meta.location.as_ref(), 0) == Fault::Pass)
        });
        futures::stream::iter(shown.collect::<Vec<_>>()).boxed()
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[async_trait::async_trait]
impl MultipartStore for Faulty {
    async fn create_multipart(&self, path: &Path) -> Result<MultipartId> {
        self.apply("begin", path, self.inner.create_multipart(path)).await
    }
    async fn put_part(&self, path: &Path, id: &MultipartId, index: usize, data: PutPayload) -> Result<PartId> {
        self.apply("part", path, self.inner.put_part(path, id, index, data)).await
    }
    async fn complete_multipart(&self, path: &Path, id: &MultipartId, parts: Vec<PartId>) -> Result<PutResult> {
        let complete = async {
            match self.inner.complete_multipart(path, id, parts).await {
                // S3 answers this if the upload was completed before.
                Err(error) if self.inner.head(path).await.is_ok() => {
                    Err(object_store::Error::NotFound { path: path.to_string(), source: Box::new(error) })
                }
                other => other,
            }
        };
        self.apply("complete", path, complete).await
    }
    async fn abort_multipart(&self, path: &Path, id: &MultipartId) -> Result<()> {
        self.apply("abort", path, self.inner.abort_multipart(path, id)).await
    }
}
