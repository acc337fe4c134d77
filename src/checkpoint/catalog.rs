//! Finding the newest checkpoint that is whole.
//!
//! The journal says which checkpoints there are; this module holds them against the store, newest first: the manifest
//! against the digest in the journal, every file's presence and size against the manifest. Checksums of whole files are
//! compared while they are read ([`super::restore`]), since that reads every byte anyway; a caller that finds damage there
//! takes that checkpoint off the list and asks again.
//!
//! Damage is stepped over and reported, never repaired, never deleted. A store that does not answer, or refuses, is an
//! error: it says nothing about the checkpoint. *Crash, retry, cancel:* nothing is written here.

use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use super::{
    CheckpointError, join,
    manifest::{MAX_JSON, Manifest, digest},
    restore::{IN_FLIGHT, RemoteFile, wrong_size},
};
use crate::{
    ids::{Generation, Step},
    journal::Committed,
    layout,
    storage::{StorageError, Store},
};

/// A checkpoint that was stepped over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// Its step.
    pub step: Step,
    /// The generation that wrote it.
    pub generation: Generation,
    /// The damaged object.
    pub object: String,
    /// What is wrong with it.
    pub reason: String,
}

/// What a search has found.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The newest checkpoint that is whole as far as sizes tell.
    pub found: Option<(Committed, Manifest)>,
    /// Newer ones that are not, newest first.
    pub stepped_over: Vec<Damage>,
}

/// Looks for the newest usable checkpoint among `candidates` (in any order). `store` is the run's folder.
///
/// Newest is the highest generation, then the highest step: that is the order of the journal, and after a resume from an
/// older step the work of the newer generation is what the run consists of. With `from` only checkpoints of that step
/// are looked at.
pub async fn newest_usable(
    store: &Store,
    candidates: &[Committed],
    from: Option<Step>,
) -> Result<Outcome, CheckpointError> {
    let mut newest_first: Vec<&Committed> = candidates.iter().collect();
    newest_first.sort_by_key(|committed| std::cmp::Reverse((committed.generation, committed.step)));
    if let Some(step) = from {
        let mut have: Vec<Step> = newest_first.iter().map(|committed| committed.step).collect();
        newest_first.retain(|committed| committed.step == step);
        if newest_first.is_empty() {
            have.sort_unstable();
            have.dedup();
            let have = have.iter().map(Step::to_string).collect::<Vec<_>>().join(", ");
            let have = if have.is_empty() { "none".into() } else { have };
            return Err(CheckpointError::NoSuchStep { step, have });
        }
    }
    let mut stepped_over = Vec::new();
    for committed in newest_first {
        match inspect(store, committed).await {
            Ok(manifest) => return Ok(Outcome { found: Some((committed.clone(), manifest)), stepped_over }),
            Err(CheckpointError::Damaged { object, reason }) => {
                let Committed { step, generation, .. } = *committed;
                stepped_over.push(Damage { step, generation, object, reason });
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Outcome { found: None, stepped_over })
}

/// Reads a checkpoint's manifest and looks at the presence and size of every file; any flaw is
/// [`CheckpointError::Damaged`].
pub async fn inspect(store: &Store, committed: &Committed) -> Result<Manifest, CheckpointError> {
    let manifest = read_manifest(store, committed).await?;
    let folder = manifest.folder();
    let checks = manifest.files.iter().map(|file| check_size(store, &folder, RemoteFile::from(file)));
    stream::iter(checks).buffer_unordered(IN_FLIGHT).try_collect::<()>().await?;
    Ok(manifest)
}

/// Reads the manifest of a checkpoint and holds it against the journal's record.
pub async fn read_manifest(store: &Store, committed: &Committed) -> Result<Manifest, CheckpointError> {
    let key = &committed.manifest;
    let expected = join(&layout::checkpoint(committed.step, committed.generation), layout::MANIFEST);
    if *key != expected {
        return Err(CheckpointError::damaged(key, format!("the journal names it where {expected} should be")));
    }
    let bytes = match store.head(key).await {
        Ok(info) if info.size > MAX_JSON => {
            return Err(CheckpointError::damaged(key, format!("{} bytes are too many for a manifest", info.size)));
        }
        Ok(_) => store.get(key, MAX_JSON).await,
        Err(error) => Err(error),
    };
    let bytes = bytes.map_err(|error| CheckpointError::of_object(key, error))?;
    let found = digest(&bytes);
    if found != committed.manifest_crc64 {
        let reason = format!("its checksum is {found}, the journal says {}", committed.manifest_crc64);
        return Err(CheckpointError::damaged(key, reason));
    }
    let manifest = Manifest::parse(key, &bytes)?;
    if (manifest.step, manifest.generation) != (committed.step, committed.generation) {
        let reason = format!("it is of step {}, generation {}", manifest.step, manifest.generation);
        return Err(CheckpointError::damaged(key, reason));
    }
    Ok(manifest)
}

/// Looks at one file's presence and size.
pub(super) async fn check_size(store: &Store, folder: &str, file: RemoteFile) -> Result<(), CheckpointError> {
    let object = join(folder, &file.name);
    match store.head(&object).await {
        Ok(info) if info.size == file.bytes => Ok(()),
        Ok(info) => Err(wrong_size(&object, info.size, file.bytes)),
        Err(error @ StorageError::NotFound { .. }) => Err(CheckpointError::of_object(&object, error)),
        Err(error) => Err(error.into()),
    }
}
