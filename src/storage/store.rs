//! The client of a store: the handle, small requests, and the means that transfers share.
//!
//! `open` makes it; `download`, `upload`, `listing`, `examine` and others add requests of their own kind to it.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{
    Attribute, AttributeValue, Attributes, GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    PutPayload, path::Path,
};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use super::{
    adaptive_limit::AdaptiveLimit,
    anchor::Anchor,
    backend::{Backend, Large},
    crc::Crc64,
    error::StorageError,
    hedge::Tempo,
    limiter::Limiter,
    pool::{Pool, Task},
    rate_limit::RateLimit,
    retry::{self, Again, Attempts, Failure, Policy, Queue},
};
use crate::config::StorageConfig;

/// Small requests in flight at once, beside the bulk transfers.
const CONTROL_CONCURRENCY: usize = 16;
/// Small requests of housekeeping in flight at once, beside all others.
pub(super) const UPKEEP_CONCURRENCY: usize = 16;

/// The outcome of a create-once put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateOutcome {
    /// The object is ours: written now, or by an earlier attempt whose answer was lost.
    Created,
    /// Another writer's object exists.
    Exists,
}

/// An object as listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its key, relative to the store handle that listed it.
    pub key: String,
    /// Bytes.
    pub size: u64,
    /// When it was last written, by the store's clock.
    pub last_modified: jiff::Timestamp,
}

/// The result of an upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uploaded {
    /// Bytes.
    pub bytes: u64,
    /// Over all bytes.
    pub crc64: Crc64,
}

/// The processor time that a bulk transfer uses. Small requests (journal, heartbeats, listings) always run as
/// [`Priority::Normal`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// The caller's.
    #[default]
    Normal,
    /// Idle time only: threads of its own that yield to all others, with connections and limits of their own.
    Background,
    /// Everything available: no rate limit delays uploads, for the last save before the machine goes away; ranged
    /// reads get threads of their own, for a restore that training waits for.
    Urgent,
}

/// A path to the store: connections, and queues to them.
pub(super) struct Connections {
    pub backend: Backend,
    /// Small requests in flight.
    pub control: Semaphore,
    /// Those of housekeeping.
    pub upkeep: Semaphore,
    /// Parts going up.
    pub up: Limiter,
    /// Ranges coming down.
    pub down: Limiter,
}

impl Connections {
    fn new(backend: Backend, concurrency: usize) -> Arc<Self> {
        let limit = || match &backend.large {
            Large::File(_) => AdaptiveLimit::fixed(concurrency),
            _ => AdaptiveLimit::adaptive(concurrency),
        };
        let (up, down) = (Limiter::new("up", limit()), Limiter::new("down", limit()));
        let (control, upkeep) = (Semaphore::new(CONTROL_CONCURRENCY), Semaphore::new(UPKEEP_CONCURRENCY));
        Arc::new(Self { backend, control, upkeep, up, down })
    }
}

/// The means of transfers that do not run on the caller's threads.
pub(super) struct DedicatedPool {
    pub threads: Pool,
    pub connections: Arc<Connections>,
}

/// Opens the same store once more, with connections of its own.
pub(super) type Reopen = dyn Fn() -> Result<Backend, StorageError> + Send + Sync;

pub(super) struct Inner {
    /// URI of the key "", without a trailing `/`, without secrets.
    root: String,
    pub policy: Policy,
    pub connections: Arc<Connections>,
    /// For [`Priority::Background`]: created at first use.
    background: Mutex<Option<Arc<DedicatedPool>>>,
    /// For reads at [`Priority::Urgent`]: exists while one is under way.
    pub urgent: Mutex<Weak<DedicatedPool>>,
    reopen: Box<Reopen>,
    /// The most parts and ranges in flight, each way.
    pub concurrency: usize,
    /// Bytes of one part.
    part: u64,
    rate_limit: Option<RateLimit>,
    /// The upload times of parts.
    pub tempo: Tempo,
    /// The times to combine the parts of one object.
    pub completions: Tempo,
    /// The attributes of write-once objects.
    pub attributes: Attributes,
    /// Held folders, by their keys.
    anchors: Mutex<BTreeMap<String, Arc<Anchor>>>,
}

/// A store, or a folder of one; cheap to clone. Keys are relative to it and use `/`.
///
/// Clones and folders share connections and limits.
#[derive(Clone)]
pub struct Store {
    pub(super) inner: Arc<Inner>,
    /// Key of this folder within the store, without `/` at either end; "" for all of it.
    pub(super) prefix: String,
    pub(super) priority: Priority,
    /// Whether small requests of this handle are housekeeping.
    upkeep: bool,
}

/// A folder that is [held](Store::hold).
#[derive(Debug)]
pub struct Held {
    store: Store,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.store.anchors().remove(&self.store.prefix);
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.uri()).finish()
    }
}

impl Store {
    pub(super) fn assemble(
        backend: Backend,
        root: String,
        prefix: String,
        policy: Policy,
        settings: &StorageConfig,
        reopen: Box<Reopen>,
    ) -> Self {
        let concurrency = settings.concurrency.clamp(1, 1024) as usize;
        let class = settings.storage_class.clone();
        let inner = Inner {
            root,
            policy,
            connections: Connections::new(backend, concurrency),
            background: Mutex::new(None),
            urgent: Mutex::default(),
            reopen,
            concurrency,
            part: u64::from(settings.part_mib.max(1)) << 20,
            rate_limit: RateLimit::new(settings.max_upload_mib_per_s),
            tempo: Tempo::default(),
            completions: Tempo::default(),
            attributes: class.map(|class| (Attribute::StorageClass, AttributeValue::from(class))).into_iter().collect(),
            anchors: Mutex::default(),
        };
        Self { inner: Arc::new(inner), prefix, priority: Priority::Normal, upkeep: false }
    }

    /// The URI of this store or folder; [`Store::open`] of it opens the same place.
    pub fn uri(&self) -> String {
        self.uri_of("")
    }

    /// Whether it is in this machine, as far as its URI shows: a file system may be on a network.
    pub fn is_local(&self) -> bool {
        self.inner.policy.is_local()
    }

    /// A folder of this store, with the same connections and limits.
    #[must_use]
    pub fn folder(&self, name: &str) -> Self {
        Self { prefix: join(&self.prefix, name.trim_matches('/')), ..self.clone() }
    }

    /// The same place, whose uploads and ranged reads run at another priority.
    #[must_use]
    pub fn at_priority(&self, priority: Priority) -> Self {
        Self { priority, ..self.clone() }
    }

    /// The same place, for housekeeping: small requests wait in a queue of their own, so that deletions and checks that
    /// hang delay neither journal nor heartbeat.
    #[must_use]
    pub fn for_upkeep(&self) -> Self {
        Self { upkeep: true, ..self.clone() }
    }

    /// On `file://` holds this folder, which must exist, open while the result exists: its disk can't be unmounted
    /// meanwhile, and if the folder disappears all the same, every write and delete below it, by any handle of this
    /// store, is [`StorageError::Adrift`]. On other stores there is nothing to hold.
    pub async fn hold(&self) -> Result<Held, StorageError> {
        let held = Held { store: self.clone() };
        let Large::File(files) = &self.inner.connections.backend.large else { return Ok(held) };
        let failed = |error: object_store::Error| Failure::new("open", &error).explain(&self.uri());
        let path = files.path_to_filesystem(&self.path("")?).map_err(failed)?;
        let anchor = tokio::task::spawn_blocking(move || Anchor::hold(&path)).await;
        let anchor = anchor.map_err(|_| Failure::stopped("open").explain(&self.uri()))?;
        let anchor = anchor.map_err(|error| failed(retry::of_file(error)))?;
        self.anchors().insert(self.prefix.clone(), Arc::new(anchor));
        Ok(held)
    }

    fn anchors(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Anchor>>> {
        self.inner.anchors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the [held](Self::hold) folder, if any, is still there.
    pub async fn holds(&self) -> Result<(), StorageError> {
        self.still_holds("look", "").await
    }

    /// Before a write of `key`: whether its path still leads to the held folders.
    pub(super) async fn still_holds(&self, operation: &'static str, key: &str) -> Result<(), StorageError> {
        let whole = join(&self.prefix, key);
        let leads =
            |folder: &str| whole.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        let anchors: Vec<_> =
            self.anchors().iter().filter(|(folder, _)| leads(folder)).map(|(_, anchor)| Arc::clone(anchor)).collect();
        if anchors.is_empty() {
            return Ok(());
        }
        let checks = move || anchors.iter().try_for_each(|anchor| anchor.check());
        match tokio::task::spawn_blocking(checks).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(adrift)) => Err(StorageError::Adrift { operation, key: self.uri_of(key), source: Box::new(adrift) }),
            Err(_) => Err(Failure::stopped(operation).explain(&self.uri_of(key))),
        }
    }

    /// Writes `body` under `key` if, and only if, no object exists there. Atomic: of many racing creates exactly one
    /// wins. `body` must differ between writers (it carries an attempt id): a lost answer is settled by reading back.
    ///
    /// After [`StorageError::Unavailable`] the outcome is unknown, and a request still on its way may yet succeed: ask
    /// again with the same body.
    pub async fn create(&self, key: &str, body: Bytes) -> Result<CreateOutcome, StorageError> {
        let path = self.path(key)?;
        self.still_holds("create", key).await?;
        let request = || async {
            let payload = PutPayload::from_bytes(body.clone());
            match self.objects().put_opts(&path, payload, self.options(PutMode::Create)).await {
                Ok(_) => Ok(CreateOutcome::Created),
                // 412 says that an object exists there, 409 that another write was under way: check its outcome.
                Err(taken @ (object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. })) => {
                    match self.fetch(&path, body.len() as u64).await {
                        Ok(Ok(found)) if found == body => Ok(CreateOutcome::Created),
                        Ok(_) => Ok(CreateOutcome::Exists),
                        // No object exists there after all: neither write of the conflict succeeded.
                        Err(object_store::Error::NotFound { .. }) => Err(retry::conflict(taken)),
                        Err(error) => Err(error),
                    }
                }
                Err(error) => Err(error),
            }
        };
        let outcome = self.attempts("create", body.len() as u64).again(self.soon()).run(request).await;
        // A disk that disappeared meanwhile: the object may have been written beside it, or refused because it is gone.
        self.still_holds("create", key).await?;
        outcome.map_err(|failure| match self.prove_links(key) {
            Ok(()) => failure.explain(&self.uri_of(key)),
            Err(no_links) => no_links,
        })
    }

    /// Writes `body` under `key`, replacing any object there.
    pub async fn put(&self, key: &str, body: Bytes) -> Result<(), StorageError> {
        let path = self.path(key)?;
        self.still_holds("put", key).await?;
        let request =
            || self.objects().put_opts(&path, PutPayload::from_bytes(body.clone()), PutMode::Overwrite.into());
        let put = self.attempts("put", body.len() as u64).again(self.soon()).run(request).await;
        put.map(drop).map_err(|failure| failure.explain(&self.uri_of(key)))
    }

    /// The same with one request, given up after `limit`: for objects that are soon written anew. On this machine it is
    /// not given up: the system would go on with it anyway.
    pub async fn put_once(&self, key: &str, body: Bytes, limit: Duration) -> Result<(), StorageError> {
        let path = self.path(key)?;
        self.still_holds("put", key).await?;
        let request =
            || self.objects().put_opts(&path, PutPayload::from_bytes(body.clone()), PutMode::Overwrite.into());
        let policy = self.inner.policy.once(limit);
        let queue = Queue::Control(&self.inner.connections.control);
        let put = Attempts::new(&policy, queue, "put", body.len() as u64).run(request).await;
        put.map(drop).map_err(|failure| failure.explain(&self.uri_of(key)))
    }

    /// The whole object, refused if it has more than `limit` bytes.
    pub async fn get(&self, key: &str, limit: u64) -> Result<Bytes, StorageError> {
        let path = self.path(key)?;
        let got = self.attempts("get", limit.min(64 << 20)).run(|| self.fetch(&path, limit)).await;
        match got {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(size)) => Err(StorageError::TooLarge { key: self.uri_of(key), size, limit }),
            Err(failure) => Err(failure.explain(&self.uri_of(key))),
        }
    }

    /// One request for a whole object; the inner error is its size, if that is over the limit.
    async fn fetch(&self, path: &Path, limit: u64) -> object_store::Result<Result<Bytes, u64>> {
        let result = self.inner.connections.backend.get(path, GetOptions::default()).await?;
        let size = result.meta.size;
        if size > limit {
            return Ok(Err(size));
        }
        let bytes = result.bytes().await?;
        if bytes.len() as u64 != size {
            return Err(retry::cut_short(size, bytes.len() as u64));
        }
        Ok(Ok(bytes))
    }

    /// Size and age of an object.
    pub async fn head(&self, key: &str) -> Result<ObjectInfo, StorageError> {
        let path = self.path(key)?;
        let request = || async {
            match self.inner.connections.backend.head(&path).await {
                Ok(meta) => Ok(meta),
                Err(error) => Err(self.why(&path, error).await),
            }
        };
        let meta = self.attempts("head", 0).run(request).await;
        let meta = meta.map_err(|failure| failure.explain(&self.uri_of(key)))?;
        Ok(ObjectInfo { key: key.to_owned(), size: meta.size, last_modified: timestamp(&meta) })
    }

    /// All objects below `prefix` (a folder, without trailing `/`; "" for all), in no particular order.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>, StorageError> {
        let folder = self.path(prefix)?;
        let request = || self.objects().list(Some(&folder)).try_collect::<Vec<_>>();
        let found = self.attempts("list", 0).slow().run(request).await;
        let found = match found {
            Ok(found) => found,
            Err(failure) if failure.is_not_found() => Vec::new(),
            Err(failure) => return Err(failure.explain(&self.uri_of(prefix))),
        };
        let infos = found.into_iter().filter_map(|meta| {
            let key = self.relative(meta.location.as_ref())?.to_owned();
            Some(ObjectInfo { key, size: meta.size, last_modified: timestamp(&meta) })
        });
        Ok(infos.collect())
    }

    /// Names of the folders directly below `prefix`, sorted.
    pub async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        let folder = self.path(prefix)?;
        let request = || self.objects().list_with_delimiter(Some(&folder));
        let found = match self.attempts("list", 0).slow().run(request).await {
            Ok(found) => found.common_prefixes,
            Err(failure) if failure.is_not_found() => Vec::new(),
            Err(failure) => return Err(failure.explain(&self.uri_of(prefix))),
        };
        let mut names: Vec<_> = found.iter().filter_map(|path| path.filename().map(str::to_owned)).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Deletes an object; succeeds if there is none.
    pub async fn delete(&self, key: &str) -> Result<(), StorageError> {
        let path = self.path(key)?;
        self.still_holds("delete", key).await?;
        match self.attempts("delete", 0).run(|| self.objects().delete(&path)).await {
            Ok(()) => Ok(()),
            Err(failure) if failure.is_not_found() => Ok(()),
            Err(failure) => Err(failure.explain(&self.uri_of(key))),
        }
    }

    pub(super) async fn end_of<T>(
        &self,
        task: Option<Task<Result<T, StorageError>>>,
        operation: &'static str,
        uri: &str,
    ) -> Result<T, StorageError> {
        let ended = match task {
            Some(task) => task.end().await,
            None => None,
        };
        ended.unwrap_or_else(|| Err(Failure::stopped(operation).explain(uri)))
    }

    pub(super) fn objects(&self) -> &Arc<dyn ObjectStore> {
        &self.inner.connections.backend.objects
    }

    /// The put options of a write-once object.
    pub(super) fn options(&self, mode: PutMode) -> PutOptions {
        PutOptions { mode, attributes: self.inner.attributes.clone(), ..PutOptions::default() }
    }

    /// The means of this handle's reads; `None`: the caller's threads.
    pub(super) fn dedicated(&self) -> Result<Option<Arc<DedicatedPool>>, StorageError> {
        match self.priority {
            Priority::Normal => Ok(None),
            Priority::Background => self.background().map(Some),
            Priority::Urgent => self.urgent().map(Some),
        }
    }

    pub(super) fn background(&self) -> Result<Arc<DedicatedPool>, StorageError> {
        let mut background = self.inner.background.lock().unwrap_or_else(PoisonError::into_inner);
        match &*background {
            Some(background) => Ok(Arc::clone(background)),
            None => Ok(Arc::clone(background.insert(self.start(Pool::background)?))),
        }
    }

    fn urgent(&self) -> Result<Arc<DedicatedPool>, StorageError> {
        let mut urgent = self.inner.urgent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(urgent) = urgent.upgrade() {
            return Ok(urgent);
        }
        let started = self.start(Pool::urgent)?;
        *urgent = Arc::downgrade(&started);
        Ok(started)
    }

    fn start(&self, pool: impl FnOnce() -> std::io::Result<Pool>) -> Result<Arc<DedicatedPool>, StorageError> {
        let threads = pool().map_err(|error| {
            let error = object_store::Error::Generic { store: "threads", source: Box::new(error) };
            Failure::new("start of transfers", &error).explain(&self.uri())
        })?;
        let connections = Connections::new((self.inner.reopen)()?, self.inner.concurrency);
        Ok(Arc::new(DedicatedPool { threads, connections }))
    }

    pub(super) fn rate_limit(&self) -> Option<&RateLimit> {
        self.inner.rate_limit.as_ref().filter(|_| self.priority != Priority::Urgent)
    }

    /// Bytes of one part of an upload. Under a rate limit, one part should not occupy the line for long.
    pub(super) fn part(&self) -> u64 {
        self.rate_limit().map_or(self.inner.part, |limit| limit.smooth_part().min(self.inner.part))
    }

    /// A small request.
    pub(super) fn attempts(&self, operation: &'static str, bytes: u64) -> Attempts<'_> {
        let connections = &self.inner.connections;
        let queue = if self.upkeep { &connections.upkeep } else { &connections.control };
        Attempts::new(&self.inner.policy, Queue::Control(queue), operation, bytes)
    }

    /// A write may be sent twice, but not to this machine itself.
    fn soon(&self) -> Again<'_> {
        if self.is_local() { Again::Never } else { Again::Soon }
    }

    /// A small request that belongs to a bulk transfer.
    pub(super) fn small<'a>(&'a self, connections: &'a Connections, operation: &'static str) -> Attempts<'a> {
        Attempts::new(&self.inner.policy, Queue::Control(&connections.control), operation, 0)
    }

    pub(super) fn bulk_put<'a>(
        &'a self,
        connections: &'a Connections,
        operation: &'static str,
        bytes: u64,
    ) -> Attempts<'a> {
        let again = if self.is_local() { Again::Never } else { Again::By(&self.inner.tempo) };
        Attempts::new(&self.inner.policy, Queue::Bulk(&connections.up, self.rate_limit()), operation, bytes)
            .again(again)
    }

    pub(super) fn bulk_get<'a>(&'a self, connections: &'a Connections, bytes: u64) -> Attempts<'a> {
        Attempts::new(&self.inner.policy, Queue::Bulk(&connections.down, None), "get", bytes)
    }

    /// The key's place in the store; refuses one that could leave the folder.
    pub(super) fn path(&self, key: &str) -> Result<Path, StorageError> {
        let refused = |reason: String| StorageError::InvalidKey { key: key.chars().take(200).collect(), reason };
        let whole = join(&self.prefix, key);
        if whole.len() > 1024 {
            return Err(refused("is longer than 1024 bytes".into()));
        }
        let path = Path::parse(&whole).map_err(|error| refused(error.to_string()))?;
        Ok(path)
    }

    pub(super) fn uri_of(&self, key: &str) -> String {
        join(&self.inner.root, &join(&self.prefix, key))
    }

    /// A listed key, relative to this folder.
    pub(super) fn relative<'a>(&self, location: &'a str) -> Option<&'a str> {
        if self.prefix.is_empty() {
            return Some(location);
        }
        location.strip_prefix(&self.prefix)?.strip_prefix('/')
    }
}

/// `a/b`, or the one that is not empty.
fn join(a: &str, b: &str) -> String {
    match (a, b) {
        ("", _) => b.to_owned(),
        (_, "") => a.to_owned(),
        _ => format!("{a}/{b}"),
    }
}

pub(super) fn timestamp(meta: &ObjectMeta) -> jiff::Timestamp {
    let nanos = i32::try_from(meta.last_modified.timestamp_subsec_nanos()).unwrap_or(0);
    jiff::Timestamp::new(meta.last_modified.timestamp(), nanos.min(999_999_999)).unwrap_or(jiff::Timestamp::UNIX_EPOCH)
}
