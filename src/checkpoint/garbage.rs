//! Objects in a run's folder that nothing refers to: found by a pure function over listings, then deleted.
//!
//! - *Left over:* the folder of a checkpoint that was pruned. Its deleter was killed after the `pruned` record.
//! - *Orphaned:* a folder without a `committed` record, of a generation that can no longer commit, older than a day.
//!   Its writer was killed, or fenced, before its record.
//! - *Unfinished:* an upload that was neither completed nor aborted ([`Store::unfinished`]), equally old, of such a
//!   generation, or of one that was interrupted.
//!
//! A generation can no longer commit when a newer one exists, since that fences it, or when the run is complete or has
//! failed. An interruption does not prove this: a commit may come late. So safety comes from the journal; the age is
//! only a second safeguard, and may be measured by two clocks. Damaged checkpoints have a record: they are quarantined,
//! not garbage. An object that is not named like a checkpoint's is not ours.
//!
//! *Crash, retry, cancel:* leftovers that were not deleted are found again.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use serde::Serialize;

use super::{CheckpointError, prune::delete_folder};
use crate::{
    ids::{Generation, Step},
    journal::{CheckpointStatus, Outcome, RunState},
    layout,
    storage::{ObjectInfo, StorageError, Store, Unfinished},
};

/// How long objects that belong to no checkpoint are left alone.
pub const AGE: Duration = Duration::from_secs(24 * 60 * 60);

/// Why a folder is garbage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It was pruned, but not completely deleted.
    LeftOver,
    /// It was never committed.
    Orphaned,
}

/// A folder that nothing refers to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Folder {
    /// The step of its name.
    pub step: Step,
    /// The generation of its name.
    pub generation: Generation,
    /// Why nothing refers to it.
    pub why: Kind,
    /// Objects in it.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// All garbage of a run.
#[derive(Debug, Default)]
pub struct Garbage {
    /// Folders, by generation and step.
    pub folders: Vec<Folder>,
    /// Uploads, by key.
    pub uploads: Vec<Unfinished>,
    /// Why unfinished uploads could not be listed, if so.
    pub unlisted: Option<StorageError>,
}

/// Finds a run's garbage. `store` is the run's folder; `state` was read before. A store that does not list unfinished
/// uploads is no error: the bucket's lifecycle rule, or a person, may take care of them.
pub async fn find(store: &Store, state: &RunState, now: Timestamp) -> Result<Garbage, CheckpointError> {
    let objects = store.list(layout::CHECKPOINTS).await?;
    let (uploads, unlisted) = match store.unfinished().await {
        Ok(uploads) => (uploads, None),
        Err(error) => (Vec::new(), Some(error)),
    };
    let folders = folders(state, &objects, now);
    let mut uploads: Vec<Unfinished> =
        uploads.into_iter().filter(|left| is_stale(state, &left.key, left.since, now)).collect();
    uploads.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(Garbage { folders, uploads, unlisted })
}

/// Whether this generation can no longer commit.
fn is_over(state: &RunState, generation: Generation) -> bool {
    generation < state.generation() || generation == state.generation() && *state.outcome() != Outcome::Open
}

/// Whether this generation no longer uploads. If one of its uploads is discarded all the same, it does not commit that
/// checkpoint.
fn has_left(state: &RunState, generation: Generation) -> bool {
    let interrupted = || state.interruptions().iter().any(|end| end.generation == generation);
    is_over(state, generation) || generation == state.generation() && interrupted()
}

fn is_old(since: Timestamp, now: Timestamp) -> bool {
    // An object from the future is not old.
    Duration::try_from(now.duration_since(since)).is_ok_and(|age| age >= AGE)
}

/// The step and generation of the checkpoint folder that a key lies in.
fn place(key: &str) -> Option<(Step, Generation)> {
    let (folder, _) = key.strip_prefix(layout::CHECKPOINTS)?.strip_prefix('/')?.split_once('/')?;
    let place = layout::parse_checkpoint(folder)?;
    // If it is not written the way we write it, it is not ours.
    layout::checkpoint(place.0, place.1).ends_with(folder).then_some(place)
}

fn folders(state: &RunState, objects: &[ObjectInfo], now: Timestamp) -> Vec<Folder> {
    // By generation first: that is the order of the journal.
    let mut found: BTreeMap<(Generation, Step), (u64, u64, bool)> = BTreeMap::new();
    for object in objects {
        if let Some((step, generation)) = place(&object.key) {
            let (objects, bytes, old) = found.entry((generation, step)).or_insert((0, 0, true));
            *objects += 1;
            *bytes = bytes.saturating_add(object.size);
            *old &= is_old(object.last_modified, now);
        }
    }
    let judge = |((generation, step), (objects, bytes, old)): ((Generation, Step), (u64, u64, bool))| {
        let why = match state.checkpoint(step, generation).map(|checkpoint| &checkpoint.status) {
            Some(CheckpointStatus::Pruned) => Kind::LeftOver,
            None if old && is_over(state, generation) => Kind::Orphaned,
            _ => return None,
        };
        Some(Folder { step, generation, why, objects, bytes })
    };
    found.into_iter().filter_map(judge).collect()
}

/// Whether an upload is garbage. One outside a checkpoint belongs to no generation, and only its age decides.
fn is_stale(state: &RunState, key: &str, since: Timestamp, now: Timestamp) -> bool {
    let in_checkpoints = key.strip_prefix(layout::CHECKPOINTS).is_some_and(|rest| rest.starts_with('/'));
    let over = match place(key) {
        Some((_, generation)) => has_left(state, generation),
        None => !in_checkpoints,
    };
    over && is_old(since, now)
}

/// Deletes everything that [`find`] has found; returns the numbers of deleted objects and uploads. `store` is the same
/// folder.
pub async fn sweep(store: &Store, garbage: &Garbage) -> Result<u64, CheckpointError> {
    let mut swept = 0;
    for folder in &garbage.folders {
        swept += delete_folder(store, folder.step, folder.generation).await?;
    }
    for upload in &garbage.uploads {
        store.discard(upload).await?;
        swept += 1;
    }
    Ok(swept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::testing::{checkpoint, file_store, formed, state_after},
        journal::Record,
        storage::s3_tests,
    };

    const DAY: Duration = AGE;

    fn now() -> Timestamp {
        Timestamp::from_second(1_000_000_000).unwrap()
    }

    fn object(key: &str, age: Duration) -> ObjectInfo {
        ObjectInfo { key: key.into(), size: 10, last_modified: now() - age }
    }

    fn names(folders: &[Folder]) -> Vec<(u64, u64, Kind)> {
        folders.iter().map(|folder| (folder.step.get(), folder.generation.get(), folder.why)).collect()
    }

    async fn committed(step: u64, generation: u64) -> crate::journal::Committed {
        checkpoint(&crate::checkpoint::testing::memory_store(), step, generation, 1, 1).await.0
    }

    #[tokio::test]
    async fn only_what_nothing_can_lead_to_any_more_is_garbage() {
        let (step, generation) = (Step(1), Generation(1));
        let more = vec![
            Record::Pruned { step, generation },
            Record::Damaged { step: Step(2), generation, reason: "x".into() },
            formed(2, Some((3, 1))),
        ];
        let list = vec![committed(1, 1).await, committed(2, 1).await, committed(3, 1).await];
        let state = state_after(list.clone(), more.clone());
        let objects: Vec<ObjectInfo> = [
            ("checkpoints/s00000001-g0001/a", Duration::ZERO), // pruned, however young
            ("checkpoints/s00000002-g0001/a", 9 * DAY),        // damaged: quarantined
            ("checkpoints/s00000003-g0001/a", 9 * DAY),        // good
            ("checkpoints/s00000004-g0001/a", 9 * DAY),        // never committed
            ("checkpoints/s00000004-g0001/b", DAY),
            ("checkpoints/s00000005-g0001/a", 9 * DAY),
            ("checkpoints/s00000005-g0001/b", DAY / 2), // one of its objects is young
            ("checkpoints/s00000006-g0002/a", 9 * DAY), // of the generation that stands
            ("checkpoints/s00000006-g0003/a", 9 * DAY), // of one that was formed since
            ("checkpoints/s7-g1/a", 9 * DAY),           // not named as we name
            ("checkpoints/notes/a", 9 * DAY),
            ("checkpoints/readme", 9 * DAY),
            ("journal/00000000000000000000.json", 9 * DAY),
        ]
        .map(|(key, age)| object(key, age))
        .into();
        let found = folders(&state, &objects, now());
        assert_eq!(names(&found), [(1, 1, Kind::LeftOver), (4, 1, Kind::Orphaned)]);
        assert_eq!((found[1].objects, found[1].bytes), (2, 20));
        // The newest generation was interrupted: a commit of it may still be on its way. Its uploads are no longer
        // needed.
        let after = |end: Record| state_after(list.clone(), more.iter().cloned().chain([end]).collect());
        let interrupted = after(Record::Interrupted {
            generation: Generation(2),
            step: Step(9),
            committed: None,
            lost_steps: 0,
            verdict: "x".into(),
            drain: None,
            cap: None,
        });
        assert_eq!(names(&folders(&interrupted, &objects, now())), [(1, 1, Kind::LeftOver), (4, 1, Kind::Orphaned)]);
        let upload = "checkpoints/s00000006-g0002/a";
        assert!(is_stale(&interrupted, upload, now() - DAY, now()) && !is_stale(&state, upload, now() - DAY, now()));
        // A run that failed commits nothing more.
        let failed = after(Record::Failed { generation: Generation(2), step: Step(9), reason: "x".into() });
        let found = names(&folders(&failed, &objects, now()));
        assert_eq!(found, [(1, 1, Kind::LeftOver), (4, 1, Kind::Orphaned), (6, 2, Kind::Orphaned)]);
    }

    #[tokio::test]
    async fn an_upload_is_stale_when_it_is_old_and_its_generation_is_over() {
        let state = state_after(vec![committed(3, 1).await], vec![formed(2, Some((3, 1)))]);
        for (key, age, stale) in [
            ("checkpoints/s00000004-g0001/a", DAY, true),
            ("checkpoints/s00000004-g0001/a", DAY - Duration::from_secs(1), false),
            ("checkpoints/s00000004-g0002/a", 9 * DAY, false),
            ("checkpoints/s00000004-g0003/a", 9 * DAY, false),
            ("checkpoints/strange/a", 9 * DAY, false),
            ("nodes/n1.json", 9 * DAY, true),
            ("nodes/n1.json", DAY / 2, false),
        ] {
            assert_eq!(is_stale(&state, key, now() - age, now()), stale, "{key} {age:?}");
        }
        assert!(!is_stale(&state, "nodes/n1.json", now() + 9 * DAY, now()), "from the future");
    }

    /// On S3: orphans and uploads of a dead generation go; young ones, those of the living, and another run's stay.
    #[tokio::test]
    async fn on_s3_stale_uploads_and_orphans_go_and_all_others_stay() {
        let (store, server) = s3_tests::atomic();
        let run = store.folder("run");
        let (good, _) = checkpoint(&run, 3, 1, 1, 1).await;
        checkpoint(&run, 4, 1, 1, 1).await;
        checkpoint(&run, 5, 2, 1, 1).await;
        checkpoint(&store.folder("run2"), 4, 1, 1, 1).await;
        server.age("", 9 * DAY);
        checkpoint(&run, 6, 1, 1, 1).await;
        let state = state_after(vec![good.clone()], vec![formed(2, Some((3, 1)))]);
        let upload = |run: &str, place: &str, age| {
            let key = format!("some/prefix/{run}/checkpoints/{place}/model.safetensors");
            server.leave_upload(&key, age);
            key
        };
        upload("run", "s00000004-g0001", 2 * DAY);
        let mut stay = vec![
            upload("run", "s00000006-g0001", DAY / 2),
            upload("run", "s00000006-g0002", 2 * DAY),
            upload("run2", "s00000004-g0001", 2 * DAY),
        ];
        let found = find(&run, &state, Timestamp::now()).await.unwrap();
        assert_eq!(names(&found.folders), [(4, 1, Kind::Orphaned)]);
        assert_eq!(found.uploads.len(), 1);
        assert_eq!(server.upload_keys().len(), 4, "looking deletes nothing");
        assert_eq!(sweep(&run, &found).await.unwrap(), found.folders[0].objects + 1);
        stay.sort();
        assert_eq!(server.upload_keys(), stay);
        crate::checkpoint::catalog::inspect(&run, &good).await.unwrap();
        let left = |folder: &str| server.keys(&format!("some/prefix/{folder}/")).len();
        assert_eq!(left("run/checkpoints/s00000004-g0001"), 0);
        for folder in ["run/checkpoints/s00000005-g0002", "run/checkpoints/s00000006-g0001", "run2"] {
            assert!(left(folder) > 0, "{folder}");
        }
        // Without the permission to list uploads, folders are still swept.
        server.age("some/prefix/run/checkpoints/s00000006-g0001", 9 * DAY);
        server.set_rules(|rules| rules.deny_upload_list = true);
        let found = find(&run, &state, Timestamp::now()).await.unwrap();
        assert!(found.unlisted.is_some() && found.uploads.is_empty());
        assert_eq!(names(&found.folders), [(6, 1, Kind::Orphaned)]);
    }

    #[tokio::test]
    async fn on_files_hidden_files_of_killed_uploads_go() {
        let (guard, store) = file_store();
        let (good, _) = checkpoint(&store, 3, 1, 1, 1).await;
        let state = state_after(vec![good], vec![formed(2, Some((3, 1)))]);
        let root = guard.path().join("run/checkpoints");
        let old = std::time::SystemTime::from(Timestamp::now()) - 2 * DAY;
        let leave = |folder: &str, name: &str| {
            std::fs::create_dir_all(root.join(folder)).unwrap();
            let path = root.join(folder).join(name);
            std::fs::write(&path, b"half").unwrap();
            std::fs::File::options().write(true).open(&path).unwrap().set_modified(old).unwrap();
            path
        };
        let (dead, living) = (leave("s00000004-g0001", "model#1"), leave("s00000004-g0002", "model#1"));
        let found = find(&store, &state, Timestamp::now()).await.unwrap();
        assert_eq!(
            found.uploads.iter().map(|left| left.key.as_str()).collect::<Vec<_>>(),
            ["checkpoints/s00000004-g0001/model"]
        );
        assert_eq!(sweep(&store, &found).await.unwrap(), 1);
        assert!(!dead.exists() && living.exists());
    }
}
