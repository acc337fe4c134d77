//! The leftovers of killed uploads: on S3 multipart uploads that were neither completed nor aborted, whose parts cost
//! money but appear in no listing; on `file://` hidden files. Other stores remove them by themselves.
//!
//! *Crash, retry, cancel:* each is discarded by one request; discarding one that is already gone succeeds.

use std::path::{Path as FilePath, PathBuf};

use super::{error::StorageError, retry::Failure, store::Store};

/// An object that an upload to a folder has left unfinished, or is still writing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfinished {
    /// Its intended key, relative to the store handle that found it.
    pub key: String,
    /// When it began (S3) or was last written to (`file://`), by the store's clock.
    pub since: jiff::Timestamp,
    place: Remains,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Remains {
    /// A multipart upload's id.
    Upload(String),
    File(PathBuf),
}

async fn unfinished(store: &Store) -> Result<Vec<Unfinished>, StorageError> {
    if let Some(bucket) = &store.inner.connections.backend.s3 {
        let prefix = if store.prefix.is_empty() { String::new() } else { format!("{}/", store.prefix) };
        let request = || bucket.uploads(&prefix);
        let found = store.attempts("list of uploads", 0).slow().run(request).await;
        let found = found.map_err(|failure| failure.not_of_the_object().explain(&store.uri_of("")))?;
        let own = found.into_iter().filter_map(|upload| {
            let key = store.relative(&upload.key)?.to_owned();
            Some(Unfinished { key, since: upload.started, place: Remains::Upload(upload.id) })
        });
        return Ok(own.collect());
    }
    let Some(folder) = store.uri().strip_prefix("file://").map(PathBuf::from) else { return Ok(Vec::new()) };
    let looked = tokio::task::spawn_blocking(move || {
        let mut found = Vec::new();
        look_into(&folder, "", &mut found).map(|()| found)
    });
    settled(store, looked.await)
}

async fn discard(store: &Store, left: &Unfinished) -> Result<(), StorageError> {
    match &left.place {
        Remains::Upload(id) => {
            let path = store.path(&left.key)?;
            let abort = store.attempts("abort of an upload", 0);
            match abort.run(|| store.inner.connections.backend.large.abort(&path, id)).await {
                Err(failure) if !failure.is_not_found() => Err(failure.explain(&store.uri_of(&left.key))),
                _ => Ok(()),
            }
        }
        Remains::File(path) => {
            let path = path.clone();
            settled(store, tokio::task::spawn_blocking(move || gone_is_fine(std::fs::remove_file(path))).await)
        }
    }
}

/// The result of work on the local file system.
fn settled<T>(store: &Store, done: Result<std::io::Result<T>, tokio::task::JoinError>) -> Result<T, StorageError> {
    match done {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => {
            let error = object_store::Error::Generic { store: "file", source: Box::new(error) };
            Err(Failure::new("sweep", &error).explain(&store.uri()))
        }
        Err(_) => Err(Failure::stopped("sweep").explain(&store.uri())),
    }
}

fn gone_is_fine(result: std::io::Result<()>) -> std::io::Result<()> {
    result.or_else(|error| if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

fn look_into(folder: &FilePath, prefix: &str, found: &mut Vec<Unfinished>) -> std::io::Result<()> {
    let gone = |error: &std::io::Error| error.kind() == std::io::ErrorKind::NotFound;
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if gone(&error) => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let metadata = match entry.metadata() {
            Ok(metadata) => metadata,
            Err(error) if gone(&error) => continue,
            Err(error) => return Err(error),
        };
        // A name that is not UTF-8 is not ours.
        let Ok(name) = entry.file_name().into_string() else { continue };
        if metadata.is_dir() {
            look_into(&entry.path(), &format!("{prefix}{name}/"), found)?;
        } else if metadata.is_file()
            && let Some(place) = unfinished_name(&name)
        {
            // If its age is unknown, it does not count as old.
            let since = metadata.modified().ok().and_then(|since| jiff::Timestamp::try_from(since).ok());
            let since = since.unwrap_or(jiff::Timestamp::MAX);
            found.push(Unfinished { key: format!("{prefix}{place}"), since, place: Remains::File(entry.path()) });
        }
    }
    Ok(())
}

/// The intended place of a file named `<name>#<digits>`: object_store's name for a file that is not yet in its place.
fn unfinished_name(name: &str) -> Option<&str> {
    let (place, number) = name.split_once('#')?;
    (!number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())).then_some(place)
}

impl Store {
    /// The leftovers of uploads to this folder, including uploads under way: the caller distinguishes them by age and
    /// key.
    pub async fn unfinished(&self) -> Result<Vec<Unfinished>, StorageError> {
        unfinished(self).await
    }

    /// Discards an upload's leftover; if it is gone, or was finished, nothing happens. The handle must be the one that
    /// found it.
    pub async fn discard(&self, left: &Unfinished) -> Result<(), StorageError> {
        discard(self, left).await
    }
}
