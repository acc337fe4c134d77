//! Holding stored checkpoints against their manifests, for `trainer verify`.
//!
//! [`Depth::Sizes`] asks the store for every file's length; [`Depth::Bytes`] downloads every byte and compares checksums,
//! with a few parts in memory at a time. All flaws are collected, not only the first. *Crash, retry, cancel:* nothing is
//! written here.

use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use super::{
    CheckpointError, catalog, join,
    restore::{IN_FLIGHT, RemoteFile, compare, ranges, with_range},
};
use crate::{
    ids::{Generation, Step},
    journal::Committed,
    storage::{Crc64, Store},
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
    let look = |file: RemoteFile| async {
        let (object, bytes) = (join(&folder, &file.name), file.bytes);
        let (_, damage) = split(catalog::check_size(store, &folder, file).await)?;
        Ok::<_, CheckpointError>(FileReport { object, bytes, damage })
    };
    let mut looked: Vec<FileReport> = stream::iter(files.clone()).map(look).buffered(IN_FLIGHT).try_collect().await?;
    if let Depth::Bytes { part } = depth {
        for (file, found) in files.iter().zip(&mut looked) {
            if found.damage.is_none() {
                (_, found.damage) = split(check_bytes(store, &folder, file, part, progress).await)?;
            }
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
        let sum = with_range(store, folder, file, range, |bytes| Ok(Crc64::of(bytes))).await?;
        progress(len);
        Ok::<_, CheckpointError>((sum, len))
    });
    let combine = |whole: Crc64, (sum, len)| async move { Ok(whole.followed_by(sum, len)) };
    let whole = stream::iter(sums).buffered(IN_FLIGHT).try_fold(Crc64::EMPTY, combine).await?;
    compare(&join(folder, &file.name), file, whole)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::{
        checkpoint::testing::{HARMS, Harm, checkpoint, harm, memory_store},
        layout,
    };

    #[tokio::test]
    async fn a_whole_checkpoint_is_sound_and_every_byte_of_it_is_looked_at() {
        let store = memory_store();
        let (committed, manifest) = checkpoint(&store, 5, 1, 2, 1).await;
        for depth in [Depth::Sizes, Depth::Bytes { part: 1000 }] {
            let seen = AtomicU64::new(0);
            let heard = |n| {
                seen.fetch_add(n, Ordering::Relaxed);
            };
            let report = verify(&store, &committed, depth, &heard).await.unwrap();
            assert!(report.is_sound(), "{report:?}");
            assert_eq!(report.files.len(), manifest.files.len() + 1);
            let expected = if depth == Depth::Sizes { 0 } else { manifest.bytes() };
            assert_eq!(seen.into_inner(), expected);
        }
    }

    #[tokio::test]
    async fn all_damage_is_reported_and_flipped_bytes_only_by_the_deep_look() {
        let store = memory_store();
        let (committed, manifest) = checkpoint(&store, 5, 1, 3, 1).await;
        let names: Vec<String> = manifest.tensor_files().map(|file| file.name.clone()).collect();
        let mut keys = Vec::new();
        for (name, how) in names.iter().zip(HARMS) {
            keys.push(harm(&store, &manifest.folder(), name, how).await);
        }
        for (depth, expected) in [(Depth::Sizes, &keys[1..]), (Depth::Bytes { part: 777 }, &keys[..])] {
            let report = verify(&store, &committed, depth, &|_| {}).await.unwrap();
            let damaged: Vec<&String> =
                report.files.iter().filter(|file| file.damage.is_some()).map(|file| &file.object).collect();
            assert_eq!(damaged, expected.iter().collect::<Vec<_>>());
            assert!(!report.is_sound());
        }
        harm(&store, &manifest.folder(), layout::MANIFEST, Harm::Flip).await;
        let report = verify(&store, &committed, Depth::Sizes, &|_| {}).await.unwrap();
        assert_eq!(report.files.len(), 1);
        assert!(report.files[0].damage.as_ref().unwrap().contains("checksum"));
    }
}
