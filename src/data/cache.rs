//! A dataset's files on this machine.
//!
//! A dataset in a `file://` folder is used where it is. Any other is downloaded once a machine:
//! ```text
//! <cache>/<index CRC64>-<index length>/   one folder a dataset: another index is another folder
//!   .lock                                 held by the process that downloads
//!   .part-<random>                        a download under way
//!   train-00000.bin …  tokenizer.json     complete and checked: they get their names by a rename at the end
//!   index.json                            last: with it, the folder is complete
//! ```
//! A workers' [`Dataset`](super::Dataset) opens that folder; it knows of no store.
//!
//! # Crash, retry, cancel, two at once
//! A file under its own name is complete, so a download that was broken off goes on with the files that are missing. The lock
//! spares the machine a second download; correctness doesn't rest on it, since two downloads would rename the same bytes
//! over each other. It belongs to the open file, so it vanishes with its process. Whoever holds it removes old `.part-` files.

use std::{
    fs::File,
    path::{Path, PathBuf},
    time::Duration,
};

use futures::{StreamExt, TryStreamExt, stream};
use rustix::fs::{FlockOperation, flock};

use super::{
    DataError,
    fetch::fetch,
    input::local_path,
    shards::{FileEntry, INDEX, Index, MAX_INDEX_BYTES, read_index},
};
use crate::{
    config::StorageConfig,
    ids::random_hex,
    storage::{StorageError, Store},
};

/// Files downloaded at once; each has a few ranges in flight.
const FILES_IN_FLIGHT: usize = 4;
/// How often a process looks whether another one has finished the download. Polled, so that waiting can be cancelled.
const LOCK_POLL: Duration = Duration::from_millis(200);
const PART_PREFIX: &str = ".part-";
const LOCK: &str = ".lock";

/// How far a download is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheProgress {
    /// Bytes here, those of earlier downloads included.
    pub done: u64,
    /// Bytes of the dataset.
    pub total: u64,
}

/// A local folder that holds the dataset at `uri`, downloaded into `cache_root` if need be and checked by CRC64-NVME.
///
/// # Errors
/// [`DataError::Missing`] if there is no index at `uri`; [`DataError::Damaged`] names an object that isn't what the index
/// says; store and file system errors.
pub async fn ensure_local(
    uri: &str,
    cache_root: &Path,
    settings: &StorageConfig,
    progress: impl Fn(CacheProgress) + Sync,
) -> Result<PathBuf, DataError> {
    if let Some(path) = local_path(uri) {
        read_index(&path).map_err(|error| match error {
            DataError::Missing { .. } => DataError::Missing { uri: uri.to_owned() },
            other => other,
        })?;
        // Workers may have another working directory.
        return path.canonicalize().map_err(|source| DataError::Io { doing: "read", path, source });
    }
    let store =
        Store::open(uri, settings).map_err(|source| DataError::Store { doing: "open", uri: uri.to_owned(), source })?;
    download(&store, uri, cache_root, settings, &progress).await
}

/// [`ensure_local`] from a store that is open.
async fn download(
    store: &Store,
    uri: &str,
    cache_root: &Path,
    settings: &StorageConfig,
    progress: &(impl Fn(CacheProgress) + Sync),
) -> Result<PathBuf, DataError> {
    let bytes = store.get(INDEX, MAX_INDEX_BYTES).await.map_err(|source| match source {
        StorageError::NotFound { .. } => DataError::Missing { uri: uri.to_owned() },
        source => DataError::Store { doing: "read the dataset index of", uri: uri.to_owned(), source },
    })?;
    let index = Index::parse(&bytes, &format!("{uri}/{INDEX}"))?;
    let dir = cache_root.join(format!("{:016x}-{}", crc_fast::crc64_nvme(&bytes), bytes.len()));
    if is_complete(&dir, &index) {
        return Ok(dir);
    }
    std::fs::create_dir_all(&dir).map_err(io("make", &dir))?;
    let _lock = lock(&dir).await?;
    if is_complete(&dir, &index) {
        return Ok(dir);
    }
    let missing: Vec<&FileEntry> = index.files().filter(|entry| !is_here(&dir, entry)).collect();
    let total: u64 = index.files().map(|entry| entry.bytes).sum();
    let done = std::sync::atomic::AtomicU64::new(total - missing.iter().map(|entry| entry.bytes).sum::<u64>());
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
    std::fs::write(&temporary, &bytes).map_err(io("write", &temporary))?;
    rename(&temporary, &dir.join(INDEX))?;
    Ok(dir)
}

async fn download_file(
    store: &Store,
    entry: &FileEntry,
    part: u64,
    dir: &Path,
    report: &(impl Fn(u64) + Sync),
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
        return Err(DataError::Damaged {
            file: format!("{}/{}", store.uri(), entry.file),
            reason: format!("has CRC64 {:016x}, its index says {:016x}", crc64.0, entry.crc64.0),
        });
    }
    rename(&temporary, &dir.join(&entry.file))
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
    std::fs::metadata(dir.join(&entry.file)).is_ok_and(|metadata| metadata.is_file() && metadata.len() == entry.bytes)
}

fn is_complete(dir: &Path, index: &Index) -> bool {
    dir.join(INDEX).is_file() && index.files().all(|entry| is_here(dir, entry))
}

/// Waits until no other process downloads into `dir`, then removes what broken-off downloads left. On a file system
/// without locks there is no waiting and no cleaning.
async fn lock(dir: &Path) -> Result<Option<File>, DataError> {
    let path = dir.join(LOCK);
    let file = File::options().create(true).append(true).open(&path).map_err(io("open", &path))?;
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
