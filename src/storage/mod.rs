//! The object store: open a URI, create-once puts, parallel uploads and ranged downloads, with retries and limits.
//!
//! One code path serves `s3://`, `gs://`, `az://`, `file://` and `memory://`; `open` turns a URI into a backend, `retry`
//! decides what is tried again, `upload` writes large objects in parts, `probe` finds out whether create-once puts are
//! atomic. Keys are relative to a [`Store`] (a whole store or a folder of one) and use `/`.
//!
//! Invariants
//! - An object appears whole or not at all. On `file://` it is written beside its place, synced, and then linked or
//!   renamed into it, and the folder is synced; elsewhere the store sees to it.
//! - [`Store::create`] says `Created` only if the object that stands is ours, byte for byte, and `Exists` only if
//!   it is not: an answer that was lost, a conflict (409) and a repeated request are settled by reading back.
//! - Every length from outside is checked before memory is taken for it.
//! - No secret is in a URI or an error: credentials come from the environment, and causes are reduced to status, code
//!   and message.
//!
//! Retry: this module retries everything itself (object_store's own retries are switched off, so that there is one
//! budget, a request is signed anew each time, and a probe is one request). Crash and cancel: a future that is dropped,
//! or an upload that fails, aborts its multipart upload; a kill leaves one behind, which the bucket's lifecycle rule or
//! a sweep removes, and on `file://` a hidden `<name>#<number>` file: [`Store::unfinished`] finds both.
//!
//! Bulk transfers and small requests (journal, heartbeats) wait in separate queues: a checkpoint on its way never
//! delays the heartbeat that says its node is alive.

mod error;
mod open;
mod probe;
mod retry;
mod s3;
mod unfinished;
mod upload;

#[cfg(test)]
pub(crate) mod faulty;
#[cfg(test)]
pub(crate) mod s3_tests;
#[cfg(test)]
mod tests;

use std::{fmt, ops::Range, sync::Arc};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{
    GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutPayload, multipart::MultipartStore,
    path::Path,
};
use tokio::sync::Semaphore;

use self::retry::{Attempts, Policy};
pub use self::{error::StorageError, s3::StoredObject, unfinished::Unfinished};
use crate::config::StorageConfig;

/// Small requests in flight at once, beside the bulk transfers.
const CONTROL_CONCURRENCY: usize = 16;

/// What became of a create-once put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateOutcome {
    /// The object is ours: written now, or by an earlier try whose answer was lost.
    Created,
    /// Somebody else's object stands there.
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

/// CRC64-NVME of some bytes; 16 lower-case hex digits as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Crc64(pub u64);

impl Crc64 {
    /// Of no bytes.
    pub const EMPTY: Self = Self(0);

    /// The checksum of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes))
    }
    /// The checksum of these bytes with `len` bytes behind them, whose checksum is `next`.
    #[must_use]
    pub fn followed_by(self, next: Self, len: u64) -> Self {
        if len == 0 {
            return self;
        }
        Self(crc_fast::checksum_combine(crc_fast::CrcAlgorithm::Crc64Nvme, self.0, next.0, len))
    }
}

impl fmt::Display for Crc64 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Why a text is not a [`Crc64`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a CRC64 is 16 lower-case hex digits")]
pub struct InvalidCrc64;

impl std::str::FromStr for Crc64 {
    type Err = InvalidCrc64;
    fn from_str(text: &str) -> Result<Self, InvalidCrc64> {
        if text.len() != 16 || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(InvalidCrc64);
        }
        u64::from_str_radix(text, 16).map(Self).map_err(|_| InvalidCrc64)
    }
}

/// What an upload put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uploaded {
    /// Bytes.
    pub bytes: u64,
    /// Over all bytes.
    pub crc64: Crc64,
}

/// Where the objects are.
struct Backend {
    objects: Arc<dyn ObjectStore>,
    /// The same store's multipart interface; `None` on `file://`, where an upload is one file written in order.
    multipart: Option<Arc<dyn MultipartStore>>,
    /// On S3: what object_store does not ask for.
    s3: Option<s3::Bucket>,
}

struct Inner {
    backend: Backend,
    /// URI of the key "", without a trailing `/`, without secrets.
    root: String,
    policy: Policy,
    /// Parts and ranges in flight.
    bulk: Semaphore,
    /// Small requests in flight.
    control: Semaphore,
    /// The most parts of one upload in flight.
    concurrency: usize,
    /// Bytes of one part.
    part: u64,
}

/// A store, or a folder of one; cheap to clone. Keys are relative to it and use `/`.
///
/// Clones and folders share connections and limits.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
    /// Key of this folder within the store, without `/` at either end; "" for all of it.
    prefix: String,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.uri()).finish()
    }
}

/// Which queue a request waits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lane {
    Control,
    Bulk,
}

impl Store {
    /// Opens `s3://bucket/prefix`, `gs://…`, `az://container/…`, `file://./relative`, `file:///absolute` or `memory://`.
    ///
    /// Clouds take credentials, region and endpoint from the environment. No request is made; a `file://` folder is
    /// created. Each `memory://` is a new, empty store, shared by the clones of this handle only.
    pub fn open(uri: &str, settings: &StorageConfig) -> Result<Self, StorageError> {
        Self::open_with(uri, settings, &open::environment())
    }

    /// [`Store::open`] with environment variables given by name, instead of the process's own.
    pub fn open_with(
        uri: &str,
        settings: &StorageConfig,
        environment: &[(String, String)],
    ) -> Result<Self, StorageError> {
        let opened = open::open(uri, environment)?;
        Ok(Self::assemble(opened.backend, opened.root, opened.prefix, opened.policy, settings))
    }

    fn assemble(backend: Backend, root: String, prefix: String, policy: Policy, settings: &StorageConfig) -> Self {
        let concurrency = settings.concurrency.clamp(1, 1024) as usize;
        let inner = Inner {
            backend,
            root,
            policy,
            bulk: Semaphore::new(concurrency),
            control: Semaphore::new(CONTROL_CONCURRENCY),
            concurrency,
            part: u64::from(settings.part_mib.max(1)) << 20,
        };
        Self { inner: Arc::new(inner), prefix }
    }

    /// The URI of this store or folder; [`Store::open`] of it opens the same place.
    pub fn uri(&self) -> String {
        self.uri_of("")
    }

    /// A folder of this store, with the same connections and limits.
    #[must_use]
    pub fn folder(&self, name: &str) -> Self {
        Self { inner: Arc::clone(&self.inner), prefix: join(&self.prefix, name.trim_matches('/')) }
    }

    /// Writes `body` under `key` if, and only if, nothing stands there. Atomic: of many racing creates exactly one wins.
    /// `body` must differ between writers (it carries an attempt id): a lost answer is settled by reading back.
    ///
    /// After [`StorageError::Unavailable`] the outcome is unknown, and a request still on its way may yet succeed: ask
    /// again with the same body.
    pub async fn create(&self, key: &str, body: Bytes) -> Result<CreateOutcome, StorageError> {
        let path = self.path(key)?;
        let request = || async {
            let payload = PutPayload::from_bytes(body.clone());
            match self.objects().put_opts(&path, payload, PutMode::Create.into()).await {
                Ok(_) => Ok(CreateOutcome::Created),
                // 412 says that something stands there, 409 that another write was under way: look what came of it.
                Err(taken @ (object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. })) => {
                    match self.fetch(&path, body.len() as u64).await {
                        Ok(Ok(found)) if found == body => Ok(CreateOutcome::Created),
                        Ok(_) => Ok(CreateOutcome::Exists),
                        // Nothing stands there after all: neither write of the conflict succeeded.
                        Err(object_store::Error::NotFound { .. }) => Err(retry::conflict(taken)),
                        Err(error) => Err(error),
                    }
                }
                Err(error) => Err(error),
            }
        };
        let outcome = self.attempts(Lane::Control, "create", body.len() as u64).run(request).await;
        outcome.map_err(|failure| failure.explain(&self.uri_of(key)))
    }

    /// Writes `body` under `key`, over whatever stands there.
    pub async fn put(&self, key: &str, body: Bytes) -> Result<(), StorageError> {
        self.put_in(Lane::Control, key, body).await
    }

    async fn put_in(&self, lane: Lane, key: &str, body: Bytes) -> Result<(), StorageError> {
        let path = self.path(key)?;
        let request =
            || self.objects().put_opts(&path, PutPayload::from_bytes(body.clone()), PutMode::Overwrite.into());
        let put = self.attempts(lane, "put", body.len() as u64).run(request).await;
        put.map(drop).map_err(|failure| failure.explain(&self.uri_of(key)))
    }

    /// The whole object, refused if it has more than `limit` bytes.
    pub async fn get(&self, key: &str, limit: u64) -> Result<Bytes, StorageError> {
        let path = self.path(key)?;
        let got = self.attempts(Lane::Control, "get", limit.min(64 << 20)).run(|| self.fetch(&path, limit)).await;
        match got {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(size)) => Err(StorageError::TooLarge { key: self.uri_of(key), size, limit }),
            Err(failure) => Err(failure.explain(&self.uri_of(key))),
        }
    }

    /// One request for a whole object; the inner error is its size, if that is over the limit.
    async fn fetch(&self, path: &Path, limit: u64) -> object_store::Result<Result<Bytes, u64>> {
        let result = self.objects().get_opts(path, GetOptions::default()).await?;
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

    /// Some bytes of an object: exactly the asked ones, or [`StorageError::Short`] if the object ends before.
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StorageError> {
        let path = self.path(key)?;
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let wanted = range.end - range.start;
        let request = || async {
            let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
            let result = match self.objects().get_opts(&path, options).await {
                Ok(result) => result,
                Err(error) => return self.explain_bad_range(&path, &range, error).await,
            };
            if result.range != range {
                let error = retry::cut_short(wanted, result.range.end.saturating_sub(result.range.start));
                return self.explain_bad_range(&path, &range, error).await;
            }
            let bytes = result.bytes().await?;
            if bytes.len() as u64 != wanted {
                return Err(retry::cut_short(wanted, bytes.len() as u64));
            }
            Ok(Ok(bytes))
        };
        match self.attempts(Lane::Bulk, "get", wanted).run(request).await {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(size)) => Err(StorageError::Short { key: self.uri_of(key), end: range.end, size }),
            Err(failure) => Err(failure.explain(&self.uri_of(key))),
        }
    }

    /// Stores word "the object is shorter than that" in many ways; its size decides. The inner error is that size.
    async fn explain_bad_range(
        &self,
        path: &Path,
        range: &Range<u64>,
        error: object_store::Error,
    ) -> object_store::Result<Result<Bytes, u64>> {
        if retry::is_answer(&error) {
            return Err(error);
        }
        match self.objects().head(path).await {
            Ok(meta) if meta.size < range.end => Ok(Err(meta.size)),
            _ => Err(error),
        }
    }

    /// Size and age of an object.
    pub async fn head(&self, key: &str) -> Result<ObjectInfo, StorageError> {
        let path = self.path(key)?;
        let meta = self.attempts(Lane::Control, "head", 0).run(|| self.objects().head(&path)).await;
        let meta = meta.map_err(|failure| failure.explain(&self.uri_of(key)))?;
        Ok(ObjectInfo { key: key.to_owned(), size: meta.size, last_modified: timestamp(&meta) })
    }

    /// All objects below `prefix` (a folder, without trailing `/`; "" for all), in no particular order.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>, StorageError> {
        let folder = self.path(prefix)?;
        let request = || self.objects().list(Some(&folder)).try_collect::<Vec<_>>();
        let found = self.attempts(Lane::Control, "list", 0).slow().run(request).await;
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
        let found = match self.attempts(Lane::Control, "list", 0).slow().run(request).await {
            Ok(found) => found.common_prefixes,
            Err(failure) if failure.is_not_found() => Vec::new(),
            Err(failure) => return Err(failure.explain(&self.uri_of(prefix))),
        };
        let mut names: Vec<_> = found.iter().filter_map(|path| path.filename().map(str::to_owned)).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Deletes an object; one that is not there is fine.
    pub async fn delete(&self, key: &str) -> Result<(), StorageError> {
        let path = self.path(key)?;
        match self.attempts(Lane::Control, "delete", 0).run(|| self.objects().delete(&path)).await {
            Ok(()) => Ok(()),
            Err(failure) if failure.is_not_found() => Ok(()),
            Err(failure) => Err(failure.explain(&self.uri_of(key))),
        }
    }

    /// Writes a large object in parts, in parallel, without copying `body`, over whatever stands there; `progress` hears
    /// the bytes of each finished part.
    ///
    /// The object appears whole or not at all. Dropping the future, or an error, aborts the upload.
    pub async fn upload(
        &self,
        key: &str,
        body: Bytes,
        progress: impl Fn(u64) + Send + Sync + 'static,
    ) -> Result<Uploaded, StorageError> {
        upload::upload(self, key, body, &progress).await
    }

    /// Races parallel creates of a probe key: a store on which more than one wins is [`StorageError::Unfit`].
    ///
    /// 3 rounds of 16 creates below [`crate::layout::PROBES`] of this folder, each one bare request; then a create of
    /// the key that stands, which must be refused. Cleans up after itself.
    pub async fn prove_create_is_atomic(&self) -> Result<(), StorageError> {
        probe::prove_create_is_atomic(self).await
    }

    fn objects(&self) -> &Arc<dyn ObjectStore> {
        &self.inner.backend.objects
    }

    fn attempts(&self, lane: Lane, operation: &'static str, bytes: u64) -> Attempts<'_> {
        let queue = match lane {
            Lane::Control => &self.inner.control,
            Lane::Bulk => &self.inner.bulk,
        };
        Attempts::new(&self.inner.policy, queue, operation, bytes)
    }

    /// The key's place in the store; refuses what could leave the folder.
    fn path(&self, key: &str) -> Result<Path, StorageError> {
        let refused = |reason: String| StorageError::InvalidKey { key: key.chars().take(200).collect(), reason };
        let whole = join(&self.prefix, key);
        if whole.len() > 1024 {
            return Err(refused("is longer than 1024 bytes".into()));
        }
        let path = Path::parse(&whole).map_err(|error| refused(error.to_string()))?;
        Ok(path)
    }

    fn uri_of(&self, key: &str) -> String {
        join(&self.inner.root, &join(&self.prefix, key))
    }

    /// A listed key, relative to this folder.
    fn relative<'a>(&self, location: &'a str) -> Option<&'a str> {
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

fn timestamp(meta: &ObjectMeta) -> jiff::Timestamp {
    let nanos = i32::try_from(meta.last_modified.timestamp_subsec_nanos()).unwrap_or(0);
    jiff::Timestamp::new(meta.last_modified.timestamp(), nanos.min(999_999_999)).unwrap_or(jiff::Timestamp::UNIX_EPOCH)
}
