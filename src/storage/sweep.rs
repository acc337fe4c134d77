//! Removes what uploads to `file://` left behind when their process was killed.

use std::{
    path::{Path as FilePath, PathBuf},
    time::{Duration, SystemTime},
};

use super::{StorageError, Store, retry::Failure};

pub(super) async fn sweep_unfinished(store: &Store, age: Duration) -> Result<u64, StorageError> {
    let Some(folder) = store.uri().strip_prefix("file://").map(PathBuf::from) else { return Ok(0) };
    let uri = store.uri();
    let swept = tokio::task::spawn_blocking(move || {
        let mut removed = 0;
        sweep_folder(&folder, SystemTime::now(), age, &mut removed).map(|()| removed)
    });
    match swept.await {
        Ok(Ok(removed)) => Ok(removed),
        Ok(Err(error)) => {
            let error = object_store::Error::Generic { store: "file", source: Box::new(error) };
            Err(Failure::new("sweep", &error).explain(&uri))
        }
        Err(_) => Err(Failure::stopped("sweep").explain(&uri)),
    }
}

fn sweep_folder(folder: &FilePath, now: SystemTime, age: Duration, removed: &mut u64) -> std::io::Result<()> {
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
        if metadata.is_dir() {
            sweep_folder(&entry.path(), now, age, removed)?;
        } else if metadata.is_file() && entry.file_name().to_str().is_some_and(is_unfinished) {
            // A file from the future is not old.
            let old = metadata.modified().ok().and_then(|at| now.duration_since(at).ok()).is_some_and(|a| a >= age);
            if old {
                match std::fs::remove_file(entry.path()) {
                    Ok(()) => *removed += 1,
                    Err(error) if gone(&error) => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }
    Ok(())
}

/// The name that object_store gives to a file not yet in its place: `<name>#<digits>`.
fn is_unfinished(name: &str) -> bool {
    name.split_once('#').is_some_and(|(_, number)| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}
