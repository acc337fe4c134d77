//! Verifying stored checkpoints against their manifests: for `trainer verify`, before deletions, and for a running
//! agent's checks of the checkpoints that it keeps.
//!
//! [`Depth::Stored`] asks the store for every file's length and for the checksum that the store itself keeps of it (S3
//! keeps the CRC64-NVME of the whole object), so nothing is downloaded; if the store keeps none, only the length is
//! compared, and [`Proof`] says so. [`Depth::Bytes`] downloads every byte and compares checksums, with a few parts in
//! memory at a time. All flaws are collected, not only the first. [`look_again`] reads damaged objects again, since a
//! verdict is permanent and an answer may have been garbled in transfer. *Crash, retry, cancel:* nothing is written
//! here.

use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;
use tokio::sync::watch;

use super::{
    CheckpointError, Flaw, catalog, join,
    manifest::Manifest,
    restore::{IN_FLIGHT, RemoteFile, compare, ranges, wrong_size},
};
use crate::{
    ids::{Generation, Step},
    journal::Committed,
    storage::{Crc64, Priority, Store},
};

/// Bytes of one request when a damaged object is read again, and in gentle reading.
const PART: u64 = 4 << 20;

/// The thoroughness of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Presence, size and the store's own checksum of every file.
    Stored,
    /// Every byte, downloaded in parts of at most this many.
    Bytes {
        /// Bytes of one request.
        part: u64,
    },
}

/// How an object was verified, the weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Proof {
    /// Its size only: the store keeps no checksum that could be compared.
    Size,
    /// The checksum that the store keeps of it.
    Checksum,
    /// Every byte of it.
    Bytes,
}

/// The findings on one object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileReport {
    /// Its key, relative to the run.
    pub object: String,
    /// Its length by the manifest; for the manifest itself, 0.
    pub bytes: u64,
    /// How it was compared.
    pub by: Proof,
    /// The damage; `None`: none was found.
    pub damage: Option<Flaw>,
}

/// The findings on one checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Its step.
    pub step: Step,
    /// The generation that wrote it.
    pub generation: Generation,
    /// Whether every byte was read.
    pub deep: bool,
    /// How all of its objects were compared: the weakest of them.
    pub proof: Proof,
    /// Its objects: the manifest, then the files by name. An unreadable manifest is the only entry.
    pub files: Vec<FileReport>,
}

impl Report {
    /// Whether no damage was found.
    pub fn is_sound(&self) -> bool {
        self.damage().is_none()
    }

    /// Whether no damage was found, by checksums.
    pub fn is_verified(&self) -> bool {
        self.is_sound() && self.proof > Proof::Size
    }

    /// The first damaged object, and its damage.
    pub fn damage(&self) -> Option<(&str, &Flaw)> {
        self.files.iter().find_map(|file| Some((file.object.as_str(), file.damage.as_ref()?)))
    }

    fn of(committed: &Committed, files: Vec<FileReport>) -> Self {
        let proof = files.iter().map(|file| file.by).min().unwrap_or(Proof::Size);
        let Committed { step, generation, .. } = *committed;
        Self { step, generation, deep: proof == Proof::Bytes, proof, files }
    }
}

/// Reading that stays out of the way of other work: one request at a time, at most this many bytes per second on
/// average, and nothing while `busy` is `true`.
#[derive(Clone, Debug)]
pub struct Gentle {
    /// The bound.
    pub bytes_per_s: u64,
    /// Whether the store has more important work.
    pub busy: watch::Receiver<bool>,
}

impl Gentle {
    async fn wait_for_the_others(&self) {
        // When the sender is gone, nothing else can be busy.
        let _ = self.busy.clone().wait_for(|busy| !busy).await;
    }

    /// How long to pause after `len` bytes that took `took` to read.
    fn rest(&self, len: u64, took: Duration) -> Duration {
        let least = Duration::try_from_secs_f64(len as f64 / self.bytes_per_s.max(1) as f64);
        least.unwrap_or(Duration::MAX).saturating_sub(took)
    }
}

/// Checks one checkpoint. Damage is part of the report; an error means that the store did not allow the check.
///
/// `store` is the run's folder; `progress` receives downloaded bytes.
pub async fn verify(
    store: &Store,
    committed: &Committed,
    depth: Depth,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Report, CheckpointError> {
    look(store, committed, depth, None, progress).await
}

/// [`verify`] of every byte, at a low rate and on threads that yield to all others.
pub async fn verify_gently(store: &Store, committed: &Committed, gentle: &Gentle) -> Result<Report, CheckpointError> {
    let store = &store.at_priority(Priority::Background);
    look(store, committed, Depth::Bytes { part: PART }, Some(gentle), &|_| {}).await
}

async fn look(
    store: &Store,
    committed: &Committed,
    depth: Depth,
    gentle: Option<&Gentle>,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Report, CheckpointError> {
    let (manifest, own) = look_at_manifest(store, committed).await?;
    let mut reports = vec![own];
    if let Some(manifest) = manifest {
        let folder = manifest.folder();
        let files: Vec<RemoteFile> = manifest.files.iter().map(RemoteFile::from).collect();
        let folder_name = folder.as_str();
        let ask = |file: RemoteFile| async move { ask_the_store(store, folder_name, &file).await };
        let mut asked: Vec<FileReport> = stream::iter(files.clone()).map(ask).buffered(IN_FLIGHT).try_collect().await?;
        if let Depth::Bytes { part } = depth {
            for (file, found) in files.iter().zip(&mut asked) {
                // A checksum of the store that differs from the manifest's does not settle it: the bytes do.
                if found.damage.is_none() || found.by > Proof::Size {
                    found.by = Proof::Bytes;
                    (_, found.damage) = split(check_bytes(store, &folder, file, part, gentle, progress).await)?;
                }
            }
        }
        reports.append(&mut asked);
    }
    Ok(Report { deep: depth != Depth::Stored, ..Report::of(committed, reports) })
}

/// Reads every byte of the objects that `report` says are damaged; the other objects are taken over as they were.
/// Damage in the result was thus found twice.
pub async fn look_again(store: &Store, committed: &Committed, report: &Report) -> Result<Report, CheckpointError> {
    let (manifest, own) = look_at_manifest(store, committed).await?;
    let mut reports = vec![own];
    if let Some(manifest) = manifest {
        let folder = manifest.folder();
        for file in manifest.files.iter().map(RemoteFile::from) {
            let before = report.files.iter().find(|before| before.object == join(&folder, &file.name));
            let now = match before {
                Some(sound) if sound.damage.is_none() => sound.clone(),
                _ => {
                    let mut now = ask_the_store(store, &folder, &file).await?;
                    if now.damage.is_none() || now.by > Proof::Size {
                        now.by = Proof::Bytes;
                        (_, now.damage) = split(check_bytes(store, &folder, &file, PART, None, &|_| {}).await)?;
                    }
                    now
                }
            };
            reports.push(now);
        }
    }
    Ok(Report { deep: report.deep, ..Report::of(committed, reports) })
}

async fn look_at_manifest(
    store: &Store,
    committed: &Committed,
) -> Result<(Option<Manifest>, FileReport), CheckpointError> {
    let (manifest, damage) = split(catalog::read_manifest(store, committed).await)?;
    Ok((manifest, FileReport { object: committed.manifest.clone(), bytes: 0, by: Proof::Bytes, damage }))
}

/// The store's metadata of one file. Damage by [`Proof::Size`] can't be disproved by reading the file.
async fn ask_the_store(store: &Store, folder: &str, file: &RemoteFile) -> Result<FileReport, CheckpointError> {
    let object = join(folder, &file.name);
    let found = store.stored(&object).await.map_err(|error| CheckpointError::of_object(&object, error));
    let (found, gone) = split(found)?;
    let (by, checked) = match found {
        None => (Proof::Size, Ok(())),
        Some(found) if found.size != file.bytes => (Proof::Size, Err(wrong_size(&object, found.size, file.bytes))),
        Some(found) => match found.crc64 {
            Some(crc64) => (Proof::Checksum, compare(&object, file, crc64)),
            None => (Proof::Size, Ok(())),
        },
    };
    let (_, damage) = split(checked)?;
    Ok(FileReport { object, bytes: file.bytes, by, damage: gone.or(damage) })
}

/// Separates damage from errors: damage is the result, not a failure.
fn split<T>(result: Result<T, CheckpointError>) -> Result<(Option<T>, Option<Flaw>), CheckpointError> {
    match result {
        Ok(value) => Ok((Some(value), None)),
        Err(CheckpointError::Damaged { reason, .. }) => Ok((None, Some(reason))),
        Err(error) => Err(error),
    }
}

/// Downloads a file and verifies its checksum.
async fn check_bytes(
    store: &Store,
    folder: &str,
    file: &RemoteFile,
    part: u64,
    gentle: Option<&Gentle>,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<(), CheckpointError> {
    let object = &join(folder, &file.name);
    let checksums = ranges(file.bytes, part).map(|range| async move {
        if let Some(gentle) = gentle {
            gentle.wait_for_the_others().await;
        }
        let (begun, len) = (Instant::now(), range.end - range.start);
        // Never longer than a part.
        let buffer = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        let sum = store.get_into(object, range.start, buffer).await;
        let sum = sum.map_err(|error| CheckpointError::of_object(object, error))?;
        progress(len);
        if let Some(gentle) = gentle {
            tokio::time::sleep(gentle.rest(len, begun.elapsed())).await;
        }
        Ok::<_, CheckpointError>((sum, len))
    });
    let combine = |whole: Crc64, (sum, len)| async move { Ok(whole.followed_by(sum, len)) };
    let at_once = if gentle.is_some() { 1 } else { IN_FLIGHT };
    let whole = stream::iter(checksums).buffered(at_once).try_fold(Crc64::EMPTY, combine).await?;
    compare(object, file, whole)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::{
        checkpoint::testing::{HARMS, Harm, STORAGE, checkpoint, harm, memory_store},
        layout,
        storage::{
            faulty::{Fault, Faulty},
            s3_tests,
        },
        threads,
    };

    #[tokio::test]
    async fn a_whole_checkpoint_is_sound_and_every_byte_of_it_is_looked_at() {
        let store = memory_store();
        let (committed, manifest) = checkpoint(&store, 5, 1, 2, 1).await;
        for (depth, proof) in [(Depth::Stored, Proof::Size), (Depth::Bytes { part: 1000 }, Proof::Bytes)] {
            let seen = AtomicU64::new(0);
            let heard = |n| {
                seen.fetch_add(n, Ordering::Relaxed);
            };
            let report = verify(&store, &committed, depth, &heard).await.unwrap();
            assert!(report.is_sound(), "{report:?}");
            assert_eq!((report.proof, report.is_verified()), (proof, proof == Proof::Bytes));
            assert_eq!(report.files.len(), manifest.files.len() + 1);
            let expected = if depth == Depth::Stored { 0 } else { manifest.bytes() };
            assert_eq!(seen.into_inner(), expected);
        }
    }

    #[tokio::test]
    async fn gentle_reading_uses_threads_that_yield() {
        let faulty = Faulty::new(|op, path, _| {
            let is_idle = threads::testing::policy() == threads::testing::SCHED_IDLE;
            let bytes = op == "get" && path.ends_with(".safetensors");
            if bytes && !is_idle { Fault::Denied } else { Fault::Pass }
        });
        let store = Store::faulty(&faulty, &STORAGE);
        let (committed, _) = checkpoint(&store, 5, 1, 1, 1).await;
        let gentle = Gentle { bytes_per_s: u64::MAX, busy: watch::channel(false).1 };
        assert!(verify_gently(&store, &committed, &gentle).await.unwrap().is_sound());
        verify(&store, &committed, Depth::Bytes { part: 1000 }, &|_| {})
            .await
            .expect_err("the caller's thread is no such thread");
    }

    #[tokio::test]
    async fn all_damage_is_reported_and_flipped_bytes_only_by_deep_verification() {
        let store = memory_store();
        let (committed, manifest) = checkpoint(&store, 5, 1, 3, 1).await;
        let names: Vec<String> = manifest.tensor_files().map(|file| file.name.clone()).collect();
        let mut keys = Vec::new();
        for (name, how) in names.iter().zip(HARMS) {
            keys.push(harm(&store, &manifest.folder(), name, how).await);
        }
        for (depth, expected) in [(Depth::Stored, &keys[1..]), (Depth::Bytes { part: 777 }, &keys[..])] {
            let report = verify(&store, &committed, depth, &|_| {}).await.unwrap();
            let damaged = |report: &Report| -> Vec<String> {
                report.files.iter().filter(|file| file.damage.is_some()).map(|file| file.object.clone()).collect()
            };
            assert_eq!(damaged(&report), expected);
            assert!(!report.is_sound() && !report.is_verified());
            let again = look_again(&store, &committed, &report).await.unwrap();
            assert_eq!(damaged(&again), expected, "found damaged twice");
        }
        harm(&store, &manifest.folder(), layout::MANIFEST, Harm::Flip).await;
        let report = verify(&store, &committed, Depth::Stored, &|_| {}).await.unwrap();
        assert_eq!(report.files.len(), 1);
        assert!(report.files[0].damage.as_ref().unwrap().checksum().is_some());
        assert!(!look_again(&store, &committed, &report).await.unwrap().is_sound());
    }

    #[tokio::test]
    async fn an_object_that_a_second_read_finds_whole_is_not_damaged() {
        let store = memory_store();
        let (committed, manifest) = checkpoint(&store, 5, 1, 2, 1).await;
        for name in ["model-00001-of-00002.safetensors", layout::MANIFEST] {
            let key = join(&manifest.folder(), name);
            let bytes = store.get(&key, u64::MAX).await.unwrap();
            harm(&store, &manifest.folder(), name, Harm::Delete).await;
            let report = verify(&store, &committed, Depth::Stored, &|_| {}).await.unwrap();
            assert_eq!(report.damage(), Some((key.as_str(), &"it does not exist".into())));
            store.put(&key, bytes).await.unwrap();
            let again = look_again(&store, &committed, &report).await.unwrap();
            assert!(again.is_sound(), "{again:?}");
            assert_eq!(again.files.len(), manifest.files.len() + 1);
        }
    }

    #[tokio::test]
    async fn on_s3_the_stores_checksums_show_damage_without_a_download() {
        let (store, server) = s3_tests::atomic();
        let (committed, manifest) = checkpoint(&store, 5, 1, 2, 1).await;
        let gets = server.count("GetObject");
        let report = verify(&store, &committed, Depth::Stored, &|_| {}).await.unwrap();
        assert!(report.is_verified() && !report.deep, "{report:?}");
        assert!(report.files[1..].iter().all(|file| file.by == Proof::Checksum), "{report:?}");
        assert_eq!(server.count("GetObject") - gets, 1, "the manifest, and nothing else");

        // Other bytes of the same length.
        let name = "model-00002-of-00002.safetensors";
        let object = harm(&store, &manifest.folder(), name, Harm::Flip).await;
        let report = verify(&store, &committed, Depth::Stored, &|_| {}).await.unwrap();
        let (damaged, reason) = report.damage().unwrap();
        assert!(damaged == object && reason.checksum().is_some(), "{report:?}");
        assert!(!look_again(&store, &committed, &report).await.unwrap().is_sound());

        // A server that keeps no checksums has not confirmed anything.
        server.set_rules(|rules| rules.keeps_checksums = false);
        let report = verify(&store, &committed, Depth::Stored, &|_| {}).await.unwrap();
        assert!(report.is_sound() && !report.is_verified() && report.proof == Proof::Size, "{report:?}");
        let report = verify(&store, &committed, Depth::Bytes { part: 1 << 20 }, &|_| {}).await.unwrap();
        assert_eq!(report.damage().unwrap().0, object);
    }

    #[tokio::test]
    async fn a_store_that_does_not_answer_is_not_damage() {
        let faulty = Faulty::new(|operation, path, _| match operation {
            "head" if path.ends_with(".safetensors") => Fault::Denied,
            _ => Fault::Pass,
        });
        let store = Store::faulty(&faulty, &STORAGE);
        let committed = crate::checkpoint::testing::commit(&store, &crate::checkpoint::testing::save(5, 1, 2, 1)).await;
        let error = verify(&store, &committed, Depth::Stored, &|_| {}).await.unwrap_err();
        assert!(matches!(error, CheckpointError::Storage(_)), "{error:?}");
    }

    #[test]
    fn a_gentle_reader_keeps_its_rate() {
        let (_, busy) = watch::channel(false);
        let gentle = |bytes_per_s| Gentle { bytes_per_s, busy: busy.clone() };
        let ms = Duration::from_millis;
        assert_eq!(gentle(1 << 20).rest(1 << 20, ms(0)), ms(1000));
        assert_eq!(gentle(1 << 20).rest(1 << 20, ms(400)), ms(600));
        assert_eq!(gentle(1 << 20).rest(1 << 20, ms(1400)), ms(0));
        assert_eq!(gentle(0).rest(0, ms(1)), ms(0));
        assert!(gentle(0).rest(u64::MAX, ms(0)) > Duration::from_secs(1 << 60));
    }

    #[tokio::test]
    async fn a_gentle_reader_waits_while_others_are_busy() {
        let faulty = Faulty::new(|_, _, _| Fault::Pass);
        let store = Store::faulty(&faulty, &STORAGE);
        let (committed, manifest) = checkpoint(&store, 5, 1, 1, 1).await;
        let (says, busy) = watch::channel(true);
        let (before, asked) = (faulty.count("get"), faulty.count("head"));
        let reading = tokio::spawn({
            let store = store.clone();
            async move { verify_gently(&store, &committed, &Gentle { bytes_per_s: u64::MAX, busy }).await }
        });
        // The manifest is read, and the sizes are asked for; there it stops.
        while faulty.count("head") < asked + manifest.files.len() {
            tokio::task::yield_now().await;
        }
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        assert_eq!(faulty.count("get"), before + 1);
        says.send(false).unwrap();
        assert!(reading.await.unwrap().unwrap().is_verified());
        assert_eq!(faulty.count("get"), before + 1 + manifest.files.len());
    }
}
