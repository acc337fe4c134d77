//! Holding stored checkpoints against their manifests, for `trainer verify`.
//!
//! [`Depth::Sizes`] asks the store for every file's length; [`Depth::Bytes`] downloads every byte and compares checksums,
//! with a few parts in memory at a time. All flaws are collected, not only the first. *Crash, retry, cancel:* nothing is
//! written here.

use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use super::{
    CheckpointError, catalog, join,
    manifest::{crc64, crc64_combine},
    restore::{IN_FLIGHT, RemoteFile, compare, ranges, with_range},
};
use crate::{
    ids::{Generation, Step},
    journal::Committed,
    storage::Store,
};

/// How closely is looked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Presence and size of every file.
    Sizes,
    /// Every byte, got in parts of at most so many.
    Bytes {
        /// Bytes of one request.
        part: u64,
    },
}

/// What was found of one object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileReport {
    /// Its key, relative to the run.
    pub object: String,
    /// Its length by the manifest; for the manifest itself, 0.
    pub bytes: u64,
    /// What is wrong with it; `None`: nothing was found.
    pub damage: Option<String>,
}

/// What was found of one checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Its step.
    pub step: Step,
    /// The generation that wrote it.
    pub generation: Generation,
    /// Whether every byte was looked at.
    pub deep: bool,
    /// Its objects: the manifest, then the files by name. A manifest that can't be believed stands alone.
    pub files: Vec<FileReport>,
}

impl Report {
    /// Whether nothing is wrong with it.
    pub fn is_sound(&self) -> bool {
        self.files.iter().all(|file| file.damage.is_none())
    }
}

/// Looks at one checkpoint. Damage is part of the report; an error means that the store did not let us look.
///
/// `store` is the run's folder; `progress` hears downloaded bytes.
pub async fn verify(
    store: &Store,
    committed: &Committed,
    depth: Depth,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Report, CheckpointError> {
    let deep = depth != Depth::Sizes;
    let mut report = Report { step: committed.step, generation: committed.generation, deep, files: Vec::new() };
    let read = catalog::read_manifest(store, committed).await;
    let (manifest, damage) = split(read)?;
    report.files.push(FileReport { object: committed.manifest.clone(), bytes: 0, damage });
    let Some(manifest) = manifest else { return Ok(report) };

    let folder = manifest.folder();
    let files: Vec<RemoteFile> = manifest.files.iter().map(RemoteFile::from).collect();
    let sizes = files.iter().map(|file| async {
        let (_, damage) = split(catalog::check_size(store, &folder, file.clone()).await)?;
        Ok::<_, CheckpointError>(FileReport { object: join(&folder, &file.name), bytes: file.bytes, damage })
    });
    let mut looked: Vec<FileReport> = stream::iter(sizes).buffered(IN_FLIGHT).try_collect().await?;
    if let Depth::Bytes { part } = depth {
        for (file, found) in files.iter().zip(&mut looked).filter(|(_, found)| found.damage.is_none()) {
            (_, found.damage) = split(check_bytes(store, &folder, file, part, progress).await)?;
        }
    }
    report.files.append(&mut looked);
    Ok(report)
}

/// Takes damage out of the errors: it is what we are looking for.
fn split<T>(result: Result<T, CheckpointError>) -> Result<(Option<T>, Option<String>), CheckpointError> {
    match result {
        Ok(value) => Ok((Some(value), None)),
        Err(CheckpointError::Damaged { reason, .. }) => Ok((None, Some(reason))),
        Err(error) => Err(error),
    }
}

/// Downloads a file and compares its checksum.
async fn check_bytes(
    store: &Store,
    folder: &str,
    file: &RemoteFile,
    part: u64,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<(), CheckpointError> {
    let sums = ranges(file.bytes, part).map(|range| async {
        let len = range.end - range.start;
        let sum = with_range(store, folder, file, range, |bytes| Ok(crc64(bytes))).await?;
        progress(len);
        Ok::<_, CheckpointError>((sum, len))
    });
    let combine = |whole, (sum, len)| async move { Ok(crc64_combine(whole, sum, len)) };
    let whole = stream::iter(sums).buffered(IN_FLIGHT).try_fold(crc64(&[]), combine).await?;
    compare(&join(folder, &file.name), file, whole)
}
