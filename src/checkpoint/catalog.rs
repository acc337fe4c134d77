//! Finding the newest checkpoint that is whole.
//!
//! The journal says which checkpoints there are; this module checks them against the store, newest first: the manifest
//! against the digest in the journal, every file's presence and size against the manifest. Checksums of whole files are
//! compared while they are read ([`super::restore`]), since that reads every byte anyway; a caller that finds damage
//! there takes that checkpoint off the list and asks again.
//!
//! Damaged checkpoints are skipped and reported, never repaired, never deleted. A store that does not answer, or
//! refuses, is an error: it proves nothing about the checkpoint. *Crash, retry, cancel:* nothing is written here.

use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use super::{
    CheckpointError, Flaw, join,
    manifest::{MAX_JSON, Manifest, digest},
    restore::{IN_FLIGHT, RemoteFile, wrong_size},
};
use crate::{
    ids::{Generation, Step},
    journal::{Committed, ResumePoint},
    layout,
    storage::{Crc64, Store},
};

/// Checks of a checkpoint that seems damaged before it is skipped: the damage may have been in a transfer.
const LOOKS: u32 = 3;

/// A checkpoint that was skipped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// Its step.
    pub step: Step,
    /// The generation that wrote it.
    pub generation: Generation,
    /// The damaged object.
    pub object: String,
    /// The damage.
    pub reason: String,
}

impl Damage {
    /// Whether this damage is of that checkpoint.
    pub fn is_of(&self, point: &ResumePoint) -> bool {
        (self.step, self.generation) == (point.step, point.generation)
    }

    /// The checkpoint.
    pub fn point(&self) -> ResumePoint {
        ResumePoint { step: self.step, generation: self.generation }
    }
}

/// The result of a search.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The newest checkpoint that is whole as far as sizes show.
    pub found: Option<(Committed, Manifest)>,
    /// Newer ones that are not, newest first.
    pub stepped_over: Vec<Damage>,
}

/// Looks for the newest usable checkpoint among `candidates` (in any order). `store` is the run's folder.
///
/// Newest is the highest generation, then the highest step: that is the order of the journal, and after a resume from
/// an older step the run consists of the newer generation's work. With `from` only checkpoints of that
/// step are looked at.
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
        match inspect_again(store, committed).await {
            Ok(manifest) => return Ok(Outcome { found: Some((committed.clone(), manifest)), stepped_over }),
            Err(CheckpointError::Damaged { object, reason }) => {
                let Committed { step, generation, .. } = *committed;
                stepped_over.push(Damage { step, generation, object, reason: reason.to_string() });
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Outcome { found: None, stepped_over })
}

/// Inspects, and inspects again if that shows damage.
async fn inspect_again(store: &Store, committed: &Committed) -> Result<Manifest, CheckpointError> {
    for _ in 1..LOOKS {
        match inspect(store, committed).await {
            Err(CheckpointError::Damaged { .. }) => {}
            done => return done,
        }
    }
    inspect(store, committed).await
}

/// Reads a checkpoint's manifest and checks the presence and size of every file; any flaw is
/// [`CheckpointError::Damaged`].
pub async fn inspect(store: &Store, committed: &Committed) -> Result<Manifest, CheckpointError> {
    let manifest = read_manifest(store, committed).await?;
    let folder = manifest.folder();
    // Owned items: a stream of borrowed ones gives a future that can't be spawned.
    let files: Vec<RemoteFile> = manifest.files.iter().map(RemoteFile::from).collect();
    let check = |file| check_size(store, &folder, file);
    stream::iter(files).map(check).buffer_unordered(IN_FLIGHT).try_collect::<()>().await?;
    Ok(manifest)
}

/// Reads the manifest of a checkpoint and checks it against the journal's record.
pub async fn read_manifest(store: &Store, committed: &Committed) -> Result<Manifest, CheckpointError> {
    let key = &committed.manifest;
    let expected = join(&layout::checkpoint(committed.step, committed.generation), layout::MANIFEST);
    if *key != expected {
        return Err(CheckpointError::damaged(key, format!("the journal names this key instead of {expected}")));
    }
    let bytes = store.get(key, MAX_JSON).await.map_err(|error| CheckpointError::of_object(key, error))?;
    let found = digest(&bytes);
    if found != committed.manifest_crc64 {
        let reason = format!("its checksum is {found}, the journal says {}", committed.manifest_crc64);
        return Err(CheckpointError::damaged(key, Flaw::of_checksum(Crc64::of(&bytes), reason)));
    }
    let manifest = Manifest::parse(key, &bytes)?;
    if (manifest.step, manifest.generation) != (committed.step, committed.generation) {
        let reason = format!("it is of step {}, generation {}", manifest.step, manifest.generation);
        return Err(CheckpointError::damaged(key, reason));
    }
    Ok(manifest)
}

/// Checks one file's presence and size.
pub(super) async fn check_size(store: &Store, folder: &str, file: RemoteFile) -> Result<(), CheckpointError> {
    let object = join(folder, &file.name);
    match store.head(&object).await {
        Ok(info) if info.size == file.bytes => Ok(()),
        Ok(info) => Err(wrong_size(&object, info.size, file.bytes)),
        Err(error) => Err(CheckpointError::of_object(&object, error)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    };

    use super::*;
    use crate::{
        checkpoint::{
            manifest::tests::manifest,
            testing::{HARMS, Harm, STORAGE, checkpoint, file_store, harm, memory_store},
        },
        error::{Explain, Kind},
        storage::faulty::{Fault, Faulty},
    };

    #[tokio::test]
    async fn the_newest_is_by_the_journal_whatever_the_order_of_the_list() {
        let store = memory_store();
        let mut list = Vec::new();
        // Generation 2 went back to step 5: what generation 1 did after it is no longer the run.
        for (step, generation) in [(5, 1), (100_000_000, 1), (6, 2), (7, 2)] {
            list.push(checkpoint(&store, step, generation, 1, step).await.0);
        }
        for _ in 0..list.len() {
            list.rotate_left(1);
            let outcome = newest_usable(&store, &list, None).await.unwrap();
            let (committed, manifest) = outcome.found.unwrap();
            assert_eq!((committed.step, manifest.generation), (Step(7), Generation(2)));
        }
        assert_eq!(newest_usable(&store, &[], None).await.unwrap(), Outcome { found: None, stepped_over: vec![] });
    }

    #[tokio::test]
    async fn a_damaged_checkpoint_is_skipped_and_its_object_named() {
        // A flipped byte of a shard does not change its size: restore finds it. In the manifest it shows at once.
        let cases = HARMS.map(|how| (layout::MANIFEST, how)).into_iter().chain([
            ("model-00001-of-00002.safetensors", Harm::Cut),
            ("optimizer-00002-of-00002.safetensors", Harm::Delete),
            (layout::TRAINER_STATE, Harm::Delete),
        ]);
        for (name, how) in cases {
            let (_guard, on_disk) = file_store();
            for store in [memory_store(), on_disk] {
                let (old, _) = checkpoint(&store, 5, 1, 2, 1).await;
                let (new, manifest) = checkpoint(&store, 6, 1, 2, 2).await;
                let object = harm(&store, &manifest.folder(), name, how).await;
                let outcome = newest_usable(&store, &[old.clone(), new.clone()], None).await.unwrap();
                assert_eq!(outcome.found.unwrap().0, old, "{name} {how:?}");
                let [damage] = outcome.stepped_over.as_slice() else { panic!("{name} {how:?}") };
                assert_eq!((damage.step, &damage.object), (Step(6), &object), "{name} {how:?}");
                let outcome = newest_usable(&store, &[new], None).await.unwrap();
                assert_eq!((outcome.found, outcome.stepped_over.len()), (None, 1));
                // Damage deletes nothing.
                assert!(!store.list(&manifest.folder()).await.unwrap().is_empty());
            }
        }
    }

    #[tokio::test]
    async fn only_the_requested_step_is_looked_at() {
        let store = memory_store();
        let (five, _) = checkpoint(&store, 5, 1, 1, 1).await;
        let (six, manifest) = checkpoint(&store, 6, 1, 1, 2).await;
        let list = [five.clone(), six];
        let outcome = newest_usable(&store, &list, Some(Step(5))).await.unwrap();
        assert_eq!(outcome.found.unwrap().0, five);
        let error = newest_usable(&store, &list, Some(Step(7))).await.unwrap_err();
        assert_eq!(error.to_string(), "there is no checkpoint of step 7; there are: 5, 6");
        harm(&store, &manifest.folder(), layout::MANIFEST, Harm::Delete).await;
        let outcome = newest_usable(&store, &list, Some(Step(6))).await.unwrap();
        assert_eq!((outcome.found, outcome.stepped_over.len()), (None, 1));
    }

    #[tokio::test]
    async fn a_manifest_that_is_not_the_one_committed_is_refused() {
        let store = memory_store();
        let (good, _) = checkpoint(&store, 5, 1, 1, 1).await;
        let refused = async |committed: Committed| {
            let outcome = newest_usable(&store, &[committed], None).await.unwrap();
            assert_eq!(outcome.found, None);
            outcome.stepped_over[0].reason.clone()
        };
        let elsewhere =
            Committed { manifest: "../other/checkpoints/s00000005-g0001/manifest.json".into(), ..good.clone() };
        assert!(refused(elsewhere).await.contains("names this key instead of"));
        // Another step's manifest under this one's key; the journal has the checksum of those bytes.
        let bytes = manifest().to_bytes().unwrap();
        let other = Committed { manifest_crc64: digest(&bytes), ..good.clone() };
        store.put(&good.manifest, bytes.into()).await.unwrap();
        assert!(refused(other).await.contains("it is of step 10"));
        // A newer layout is not damage: stepping back from it would lose work.
        let bytes = &br#"{"format":9}"#[..];
        let newer = Committed { manifest_crc64: digest(bytes), ..good.clone() };
        store.put(&good.manifest, bytes.into()).await.unwrap();
        let error = newest_usable(&store, &[newer], None).await.unwrap_err();
        assert!(matches!(error, CheckpointError::TooNew { found: 9, .. }), "{error}");
    }

    #[tokio::test]
    async fn a_failing_store_is_not_damage_and_nothing_is_skipped() {
        for (fault, kind) in [(Fault::Lost, Kind::Unavailable), (Fault::Denied, Kind::Permission)] {
            for object in [layout::MANIFEST, "model-00001-of-00002.safetensors"] {
                let armed = Arc::new(AtomicBool::new(false));
                let failing = armed.clone();
                let faulty = Faulty::new(move |operation, path, _| {
                    let hit = matches!(operation, "get" | "head") && path.ends_with(object);
                    if hit && failing.load(Ordering::Relaxed) { fault } else { Fault::Pass }
                });
                let store = Store::faulty(&faulty, &STORAGE);
                let (old, _) = checkpoint(&store, 5, 1, 2, 1).await;
                let (new, _) = checkpoint(&store, 6, 1, 2, 2).await;
                armed.store(true, Ordering::Relaxed);
                let error = newest_usable(&store, &[old, new], None).await.unwrap_err();
                assert_eq!(error.kind(), kind, "{object}: {error}");
            }
        }
    }
}
