//! A dataset's files on this machine.
//!
//! A dataset in a `file://` folder is used where it is. Any other is downloaded once per machine:
//! ```text
//! <cache>/<index CRC64>-<index length>/   one folder a dataset: another index is another folder
//!   .lock                                 held by the process that downloads
//!   .use                                  held by all who use it; others may be removed (`eviction`)
//!   .part-<random>                        a download under way
//!   train-00000.bin …  tokenizer.json     complete and checked: they get their names by a rename at the end
//!   index.json                            last: with it, the folder is complete
//! ```
//! A worker's [`Dataset`] opens that folder; it knows of no store.
//!
//! # Which files are trusted
//! Lengths alone are not enough: a disk flips bits, and a power cut leaves files of the right length without their
//! bytes. So every shard is verified against its CRC64 once per process, on several threads (`data/checksums.rs`); a
//! wrong one in a cache is fetched again, one in a `file://` folder is an error that names it. The index of a cache is
//! trusted if it equals the store's, byte for byte. Folders of other users and links are never trusted
//! (`data/place.rs`).
//!
//! # Crash, retry, cancel, two at once
//! A file under its own name is complete, so an interrupted download continues with the missing files. The lock spares
//! the machine a second download; correctness doesn't rest on it, since two downloads would rename the same bytes over
//! each other. It belongs to the open file, so it vanishes with its process. Its holder removes old `.part-` files.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use rustix::fs::{FlockOperation, flock};

use super::{
    DataError, Dataset,
    checksums::{self, Checking},
    eviction::{self, InUse},
    fetch::fetch,
    input::local_path,
    place::{self, Private},
    shards::{FileEntry, INDEX, Index, MAX_INDEX_BYTES, read_index},
};
use crate::{
    config::StorageConfig,
    ids::random_hex,
    storage::{Crc64, StorageError, Store},
};

/// Files downloaded at once; each has a few ranges in flight.
const FILES_IN_FLIGHT: usize = 4;
/// How often a process checks whether another one has finished the download. It polls, so that waiting can be
/// cancelled.
const LOCK_POLL: Duration = Duration::from_millis(200);
const PART_PREFIX: &str = ".part-";
const LOCK: &str = ".lock";

/// The progress of a download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheProgress {
    /// Bytes present, including those of earlier downloads.
    pub done: u64,
    /// Bytes of the dataset.
    pub total: u64,
}

/// A dataset's folder on this machine. In a cache it stays while this value exists.
#[derive(Debug)]
pub struct LocalDataset {
    dir: PathBuf,
    /// In a folder that needed no download: the check of its files against the index.
    checking: Option<Checking>,
    _in_use: Option<InUse>,
    /// Dropped after the value that holds its lock.
    _private: Option<Arc<Private>>,
}

impl LocalDataset {
    /// One that nothing is known of, for tests that don't read it.
    #[cfg(test)]
    pub fn unread(dir: PathBuf) -> Self {
        Self { dir, checking: None, _in_use: None, _private: None }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Waits until every file has been verified against its checksum.
    ///
    /// # Errors
    /// [`DataError::Damaged`] names the first that is wrong.
    pub async fn verify(&self) -> Result<(), DataError> {
        let Some(checking) = &self.checking else { return Ok(()) };
        match checking.wrong().await?.into_iter().next() {
            Some((entry, found)) => Err(wrong_sum(self.dir.join(&entry.file).display().to_string(), &entry, found)),
            None => Ok(()),
        }
    }
}

fn wrong_sum(file: String, entry: &FileEntry, found: Crc64) -> DataError {
    DataError::Damaged { file, reason: format!("has CRC64 {found}, its index says {}", entry.crc64) }
}

/// A local folder that holds the dataset at `uri`, downloaded into `cache_root` if need be (`None`: into a folder of
/// this process) and verified by CRC64-NVME: for a `file://` folder that goes on in the background, see
/// [`LocalDataset::verify`]. If the disk is short of room, unused datasets there are removed first.
///
/// # Errors
/// [`DataError::Missing`] if there is no index at `uri`; [`DataError::Damaged`] names an object that isn't what the
/// index says; store and file system errors.
pub async fn ensure_local(
    uri: &str,
    cache_root: Option<&Path>,
    settings: &StorageConfig,
    progress: impl Fn(CacheProgress) + Send + Sync,
) -> Result<LocalDataset, DataError> {
    if let Some(path) = local_path(uri) {
        let index = read_index(&path).map_err(|error| match error {
            DataError::Missing { .. } => DataError::Missing { uri: uri.to_owned() },
            other => other,
        })?;
        // Workers may have another working directory.
        let dir = path.canonicalize().map_err(|source| DataError::Io { doing: "read", path, source })?;
        let files = index.files().filter(|entry| dir.join(&entry.file).is_file()).cloned().collect();
        let checking = Some(Checking::begin(&dir, files));
        return Ok(LocalDataset { dir, checking, _in_use: None, _private: None });
    }
    let store = open(uri, settings)?;
    let index = fetch_index(&store, uri).await?;
    let (root, private) = place::settle(cache_root)?;
    let local = download(&store, index, &root, settings, &progress, &eviction::free).await?;
    Ok(LocalDataset { _private: private, ..local })
}

/// The index of the dataset at `uri`, without a download; for one in a folder, the length of every file is checked
/// against it.
///
/// # Errors
/// Those of [`ensure_local`].
pub async fn read_index_of(uri: &str, settings: &StorageConfig) -> Result<Index, DataError> {
    match local_path(uri) {
        Some(path) => match Dataset::open(&path) {
            Ok(dataset) => Ok(dataset.index().clone()),
            Err(DataError::Missing { .. }) => Err(DataError::Missing { uri: uri.to_owned() }),
            Err(error) => Err(error),
        },
        None => Ok(fetch_index(&open(uri, settings)?, uri).await?.0),
    }
}

fn open(uri: &str, settings: &StorageConfig) -> Result<Store, DataError> {
    Store::open(uri, settings).map_err(|source| DataError::Store { doing: "open", uri: uri.to_owned(), source })
}

async fn fetch_index(store: &Store, uri: &str) -> Result<(Index, Bytes), DataError> {
    let bytes = store.get(INDEX, MAX_INDEX_BYTES).await.map_err(|source| match source {
        StorageError::NotFound { .. } => DataError::Missing { uri: uri.to_owned() },
        source => DataError::Store { doing: "read the dataset index of", uri: uri.to_owned(), source },
    })?;
    Ok((Index::parse(&bytes, &format!("{uri}/{INDEX}"))?, bytes))
}

/// [`ensure_local`] from an open store, with its index.
async fn download(
    store: &Store,
    (index, bytes): (Index, Bytes),
    cache_root: &Path,
    settings: &StorageConfig,
    progress: &(impl Fn(CacheProgress) + Send + Sync),
    free: &(impl Fn(&Path) -> Option<u64> + Send + Sync),
) -> Result<LocalDataset, DataError> {
    let dir = cache_root.join(format!("{}-{}", Crc64::of(&bytes), bytes.len()));
    if !is_complete(&dir, &index, &bytes) {
        // On a disk that is completely full not even a folder can be created.
        eviction::make(cache_root, 0, free);
    }
    // From here on nobody removes it.
    let in_use = eviction::take(&dir).await.map_err(io("make", &dir))?;
    let here = || LocalDataset { dir: dir.clone(), checking: None, _in_use: Some(in_use), _private: None };
    let wrong = || async {
        Checking::begin(&dir, index.files().filter(|entry| is_here(&dir, entry)).cloned().collect()).wrong().await
    };
    if wrong().await?.is_empty() && is_complete(&dir, &index, &bytes) {
        return Ok(here());
    }
    let _lock = lock(&dir).await?;
    // Another process may meanwhile have fetched the missing or wrong files.
    let wrong = wrong().await?;
    if wrong.is_empty() && is_complete(&dir, &index, &bytes) {
        return Ok(here());
    }
    for (entry, found) in &wrong {
        tracing::warn!("fetched again: {}", wrong_sum(dir.join(&entry.file).display().to_string(), entry, *found));
    }
    let is_missing = |entry: &&FileEntry| !is_here(&dir, entry) || wrong.iter().any(|(wrong, _)| wrong == *entry);
    let missing: Vec<FileEntry> = index.files().filter(is_missing).cloned().collect();
    let total: u64 = index.files().map(|entry| entry.bytes).sum();
    let needed: u64 = missing.iter().map(|entry| entry.bytes).sum();
    eviction::make(cache_root, needed, free);
    let done = std::sync::atomic::AtomicU64::new(total - needed);
    let report = |bytes: u64| {
        let done = done.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed) + bytes;
        progress(CacheProgress { done, total });
    };
    report(0);
    let part = u64::from(settings.part_mib) << 20;
    stream::iter(missing)
        .map(|entry| download_file(store, entry, part, &dir, &report))
        .buffer_unordered(FILES_IN_FLIGHT)
        .try_collect::<Vec<()>>()
        .await?;
    let temporary = dir.join(part_name());
    write_through(&temporary, &bytes).map_err(io("write", &temporary))?;
    rename(&temporary, &dir.join(INDEX))?;
    File::open(&dir).and_then(|dir| dir.sync_all()).map_err(io("write", &dir))?;
    Ok(here())
}

async fn download_file(
    store: &Store,
    entry: FileEntry,
    part: u64,
    dir: &Path,
    report: &(impl Fn(u64) + Send + Sync),
) -> Result<(), DataError> {
    let temporary = dir.join(part_name());
    let crc64 =
        fetch(store, &entry.file, entry.bytes, part, &temporary, report).await.map_err(|error| match error {
            DataError::Store { source: StorageError::NotFound { .. }, uri, .. } => DataError::Damaged {
                file: format!("{uri}/{}", entry.file),
                reason: "is in the index but not there".into(),
            },
            other => other,
        })?;
    if crc64 != entry.crc64 {
        let _ = std::fs::remove_file(&temporary);
        return Err(wrong_sum(format!("{}/{}", store.uri(), entry.file), &entry, crc64));
    }
    let path = dir.join(&entry.file);
    rename(&temporary, &path)?;
    checksums::know(&path, crc64);
    Ok(())
}

/// Writes a new file to the disk itself: after a power cut a name must not stand for bytes that never arrived there.
fn write_through(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn part_name() -> String {
    format!("{PART_PREFIX}{}", random_hex(8))
}

fn rename(from: &Path, to: &Path) -> Result<(), DataError> {
    std::fs::rename(from, to).map_err(io("write", to))
}

fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> DataError {
    let path = path.to_owned();
    move |source| DataError::Io { doing, path, source }
}

fn is_here(dir: &Path, entry: &FileEntry) -> bool {
    std::fs::symlink_metadata(dir.join(&entry.file))
        .is_ok_and(|metadata| metadata.is_file() && metadata.len() == entry.bytes)
}

/// `bytes`: the store's index. A file of that name with any other content is useless.
fn is_complete(dir: &Path, index: &Index, bytes: &[u8]) -> bool {
    let path = dir.join(INDEX);
    let is_file = |length| path.symlink_metadata().is_ok_and(|found| found.is_file() && found.len() == length);
    let holds = is_file(bytes.len() as u64) && std::fs::read(&path).is_ok_and(|found| found == bytes);
    holds && index.files().all(|entry| is_here(dir, entry))
}

/// Waits until no other process downloads into `dir`, then removes the leftovers of interrupted downloads. On a file
/// system without locks there is no waiting and no cleaning.
async fn lock(dir: &Path) -> Result<Option<File>, DataError> {
    let path = dir.join(LOCK);
    let file = place::no_link().create(true).append(true).open(&path).map_err(io("open", &path))?;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => tokio::time::sleep(LOCK_POLL).await,
            Err(_) => return Ok(None),
        }
    }
    for entry in std::fs::read_dir(dir).map_err(io("read", dir))?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(PART_PREFIX) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    Ok(Some(file))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::data::{
        Dataset, PrepareSettings, Split, TokenizerSource,
        prepare::{prepare, prepare_into},
    };

    const STORAGE: StorageConfig = StorageConfig::plain(4, 1);

    fn ignore(_: CacheProgress) {}

    fn endless(_: &Path) -> Option<u64> {
        Some(u64::MAX)
    }

    /// A dataset of several shards in a store in memory.
    async fn prepared() -> Store {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..40 {
            let text = format!("document {number} says {} things\n", number * 7).repeat(60);
            std::fs::write(dir.path().join(format!("{number}.txt")), text).unwrap();
        }
        let store = Store::open("memory://", &STORAGE).unwrap();
        let settings = PrepareSettings {
            shard_tokens: 1024,
            validation_ratio: 0.2,
            ..PrepareSettings::new(
                vec![dir.path().display().to_string()],
                TokenizerSource::Train { vocab: 300 },
                "memory://",
            )
        };
        let summary = prepare_into(store.clone(), settings, |_| {}).await.unwrap();
        assert!(summary.shards > 4 && summary.validation_tokens > 0);
        store
    }

    async fn fetch_into(store: &Store, cache: &Path) -> Result<PathBuf, DataError> {
        Ok(download(store, fetch_index(store, "memory://").await?, cache, &STORAGE, &ignore, &endless).await?.dir)
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn a_dataset_is_downloaded_whole_and_once() {
        let (store, cache) = (prepared().await, tempfile::tempdir().unwrap());
        let seen = Mutex::new(Vec::new());
        let hear = |progress: CacheProgress| seen.lock().unwrap().push(progress);
        let dir =
            download(&store, fetch_index(&store, "memory://").await.unwrap(), cache.path(), &STORAGE, &hear, &endless)
                .await
                .unwrap()
                .dir;
        let seen = seen.into_inner().unwrap();
        assert_eq!((seen[0].done, seen.iter().map(|p| p.done).max().unwrap()), (0, seen[0].total));
        let data = Dataset::open(&dir).unwrap();
        let mut tokens = [0; 65];
        for split in Split::ALL {
            assert!(data.samples(split, 64) > 0);
            for index in 0..data.samples(split, 64) {
                data.read_sample(split, index, &mut tokens).unwrap();
            }
        }
        assert!(!names(&dir).iter().any(|name| name.starts_with(PART_PREFIX)));
        // It is complete, so only the index is requested again.
        for entry in data.index().files() {
            store.delete(&entry.file).await.unwrap();
        }
        assert_eq!(fetch_into(&store, cache.path()).await.unwrap(), dir);
    }

    /// What a power cut, a bad disk and a person leave behind: the next process, which knows nothing of the files,
    /// repairs it.
    #[tokio::test]
    async fn an_index_or_shard_that_differs_from_the_store_is_fetched_again() {
        let (store, cache) = (prepared().await, tempfile::tempdir().unwrap());
        let dir = fetch_into(&store, cache.path()).await.unwrap();
        let index = std::fs::read(dir.join(INDEX)).unwrap();
        let shard = dir.join(&Dataset::open(&dir).unwrap().index().train[1].file.file);
        let good = std::fs::read(&shard).unwrap();
        let mut stale = index.clone();
        let digit = stale.iter().rposition(u8::is_ascii_digit).unwrap();
        stale[digit] ^= 1;
        for bad in [Vec::new(), stale] {
            std::fs::write(dir.join(INDEX), bad).unwrap();
            fetch_into(&store, cache.path()).await.unwrap();
            assert_eq!(std::fs::read(dir.join(INDEX)).unwrap(), index);
        }
        // Where this process has not looked yet.
        let moved = tempfile::tempdir().unwrap();
        let elsewhere = moved.path().join(dir.file_name().unwrap());
        std::fs::rename(&dir, &elsewhere).unwrap();
        let shard = elsewhere.join(shard.file_name().unwrap());
        let mut bad = good.clone();
        bad[3] ^= 4;
        std::fs::write(&shard, &bad).unwrap();
        assert_eq!(fetch_into(&store, moved.path()).await.unwrap(), elsewhere);
        assert_eq!(std::fs::read(&shard).unwrap(), good);
        // A link in a shard's place is not ours, wherever it leads.
        std::fs::rename(&shard, moved.path().join("away")).unwrap();
        std::os::unix::fs::symlink(moved.path().join("away"), &shard).unwrap();
        fetch_into(&store, moved.path()).await.unwrap();
        assert!(!shard.is_symlink() && std::fs::read(&shard).unwrap() == good);
        // Nor is a link in the folder's place.
        let linked = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(&elsewhere, linked.path().join(dir.file_name().unwrap())).unwrap();
        let error = fetch_into(&store, linked.path()).await.unwrap_err();
        assert!(matches!(&error, DataError::Io { source, .. } if source.to_string().contains("is a link")), "{error}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn two_downloads_at_once_give_one_whole_folder() {
        let (store, cache) = (prepared().await, tempfile::tempdir().unwrap());
        let tasks: Vec<_> = (0..4)
            .map(|_| {
                let (store, root) = (store.clone(), cache.path().to_owned());
                tokio::spawn(async move { fetch_into(&store, &root).await })
            })
            .collect();
        for task in tasks {
            Dataset::open(task.await.unwrap().unwrap()).unwrap();
        }
        assert_eq!(names(cache.path()).len(), 1);
    }

    /// With a disk on which nothing is ever free, everything unused is removed, and datasets in use stay, including a
    /// download under way.
    #[tokio::test]
    async fn a_dataset_in_use_stays_on_a_full_disk() {
        let (store, cache) = (prepared().await, tempfile::tempdir().unwrap());
        let local = download(
            &store,
            fetch_index(&store, "memory://").await.unwrap(),
            cache.path(),
            &STORAGE,
            &ignore,
            &endless,
        )
        .await
        .unwrap();
        let full = |_: &Path| Some(0);
        eviction::make(cache.path(), 1, full);
        Dataset::open(local.dir()).unwrap();
        drop(local);
        eviction::make(cache.path(), 1, full);
        assert!(names(cache.path()).is_empty(), "{:?}", names(cache.path()));
        // While it is downloaded.
        let squeeze = |_: CacheProgress| eviction::make(cache.path(), 1, full);
        let local = download(
            &store,
            fetch_index(&store, "memory://").await.unwrap(),
            cache.path(),
            &STORAGE,
            &squeeze,
            &endless,
        )
        .await
        .unwrap();
        Dataset::open(local.dir()).unwrap();
    }

    /// A consumer of a queue meets this: the disk holds the data of earlier jobs.
    #[tokio::test]
    async fn a_download_on_a_full_disk_replaces_unused_datasets() {
        let (store, cache) = (prepared().await, tempfile::tempdir().unwrap());
        let earlier = fetch_into(&store, cache.path()).await.unwrap();
        // Another index is another dataset, with the same files here.
        let mut index = store.get(INDEX, 1 << 20).await.unwrap().to_vec();
        index.push(b'\n');
        store.put(INDEX, index.into()).await.unwrap();
        let folders = Mutex::new(Vec::new());
        let full_while_it_is_there = |root: &Path| {
            folders.lock().unwrap().push(names(root));
            Some(if earlier.exists() { 0 } else { u64::MAX })
        };
        let later = download(
            &store,
            fetch_index(&store, "memory://").await.unwrap(),
            cache.path(),
            &STORAGE,
            &ignore,
            &full_while_it_is_there,
        )
        .await
        .unwrap();
        Dataset::open(later.dir()).unwrap();
        assert!(!earlier.exists() && later.dir() != earlier);
        let first = folders.lock().unwrap()[0].clone();
        assert_eq!(first.len(), 1, "room is made before anything is written: {first:?}");
        // It fits, except for the missing part.
        drop(later);
        let one = cache.path().join(&names(cache.path())[0]);
        std::fs::remove_file(one.join(INDEX)).unwrap();
        std::fs::remove_file(one.join("train-00001.bin")).unwrap();
        let other = cache.path().join("00000000000000aa-1");
        std::fs::create_dir_all(&other).unwrap();
        let spare = (1 << 30) + 1;
        let nearly_full = move |_: &Path| Some(if other.exists() { spare } else { u64::MAX });
        download(
            &store,
            fetch_index(&store, "memory://").await.unwrap(),
            cache.path(),
            &STORAGE,
            &ignore,
            &nearly_full,
        )
        .await
        .unwrap();
        assert_eq!(names(cache.path()).len(), 1, "what is missing needs more than is spare");
    }

    #[tokio::test]
    async fn an_interrupted_download_continues_with_the_missing_files() {
        let (store, cache) = (prepared().await, tempfile::tempdir().unwrap());
        let dir = fetch_into(&store, cache.path()).await.unwrap();
        // The state after a crash: no index, one file missing, one cut short, one under way.
        std::fs::remove_file(dir.join(INDEX)).unwrap();
        std::fs::remove_file(dir.join("train-00001.bin")).unwrap();
        File::options().write(true).open(dir.join("train-00002.bin")).unwrap().set_len(10).unwrap();
        std::fs::write(dir.join(".part-0123"), "x").unwrap();
        // These exist already, so they are not requested.
        store.delete("train-00000.bin").await.unwrap();
        store.delete("tokenizer.json").await.unwrap();
        let seen = Mutex::new(Vec::new());
        let hear = |progress: CacheProgress| seen.lock().unwrap().push(progress);
        let index = fetch_index(&store, "memory://").await.unwrap();
        download(&store, index, cache.path(), &STORAGE, &hear, &endless).await.unwrap();
        let missing: u64 = Dataset::open(&dir).unwrap().index().train[1..=2].iter().map(|shard| shard.file.bytes).sum();
        let first = seen.into_inner().unwrap()[0];
        assert_eq!(first.done, first.total - missing, "what is here counts");
        assert!(!dir.join(".part-0123").exists());
    }

    #[tokio::test]
    async fn a_damaged_object_is_named_and_never_kept() {
        let (store, cache) = (prepared().await, tempfile::tempdir().unwrap());
        let name = "train-00001.bin";
        let good = store.get(name, 1 << 20).await.unwrap();
        let mut bad = good.to_vec();
        bad[100] ^= 1;
        for (body, said) in [(bad.into(), "has CRC64"), (good.slice(..100), "shorter")] {
            store.put(name, body).await.unwrap();
            let error = fetch_into(&store, cache.path()).await.unwrap_err();
            assert!(matches!(error, DataError::Damaged { .. }), "{error:?}");
            assert!(error.to_string().contains(name) && error.to_string().contains(said), "{error}");
            let dir = cache.path().join(&names(cache.path())[0]);
            assert!(!dir.join(name).exists() && !dir.join(INDEX).exists());
        }
        store.delete(name).await.unwrap();
        let error = fetch_into(&store, cache.path()).await.unwrap_err();
        assert!(error.to_string().contains("in the index but not there"), "{error}");
        store.put(name, good).await.unwrap();
        Dataset::open(fetch_into(&store, cache.path()).await.unwrap()).unwrap();
    }

    #[tokio::test]
    async fn a_local_dataset_is_used_in_place_and_a_missing_one_says_how_to_make_it() {
        use crate::error::Explain;
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.txt"), "some words ".repeat(500)).unwrap();
        let out = dir.path().join("out");
        let uri = format!("file://{}", out.display());
        let cache = dir.path().join("cache");
        for missing in [uri.as_str(), "memory://"] {
            let error = ensure_local(missing, Some(&cache), &STORAGE, ignore).await.unwrap_err();
            assert!(error.to_string().contains(missing), "{error}");
            assert!(error.hint().unwrap().contains("trainer data prepare"));
        }
        let input = dir.path().join("a.txt").display().to_string();
        let settings = PrepareSettings {
            validation_ratio: 0.0,
            ..PrepareSettings::new(vec![input], TokenizerSource::Train { vocab: 257 }, &uri)
        };
        prepare(settings, |_| {}).await.unwrap();
        assert_eq!(
            ensure_local(&uri, Some(&cache), &STORAGE, ignore).await.unwrap().dir(),
            out.canonicalize().unwrap()
        );
        assert!(!cache.exists());
    }

    #[tokio::test]
    async fn no_link_in_a_dataset_s_folder_is_written_through() {
        let (store, cache) = (prepared().await, tempfile::tempdir().unwrap());
        let dir = fetch_into(&store, cache.path()).await.unwrap();
        let outside = cache.path().join("outside");
        for name in [LOCK, ".use"] {
            // So that there is a file to fetch.
            std::fs::remove_file(dir.join(INDEX)).unwrap();
            let _ = std::fs::remove_file(dir.join(name));
            std::os::unix::fs::symlink(&outside, dir.join(name)).unwrap();
            let result = fetch_into(&store, cache.path()).await;
            assert!(!outside.exists(), "{name} led to a file elsewhere");
            assert!(result.is_err() || dir.join(INDEX).is_file());
            std::fs::remove_file(dir.join(name)).unwrap();
            fetch_into(&store, cache.path()).await.unwrap();
        }
    }
}
