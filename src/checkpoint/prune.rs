//! Deleting checkpoints: a plan that can be shown, then its application.
//!
//! Order of a deletion: the journal's `pruned` record (from then on it is no checkpoint), the manifest, the other objects.
//! *Crash:* after the record, the rest of the folder is garbage that nobody reads; [`delete_folder`] takes it away later.
//! *Retry:* deleting what is gone is fine, and a checkpoint already pruned is no longer in the list that a plan is made
//! from. *Cancel:* like a crash.

use std::future::Future;

use futures::{StreamExt, TryStreamExt, stream};

use super::{CheckpointError, join, restore::IN_FLIGHT};
use crate::{
    config::Keep,
    ids::{Generation, Step},
    journal::{Committed, ResumePoint},
    layout,
    storage::Store,
};

/// Which of `checkpoints` (in any order) may go, oldest first.
///
/// Kept are: `newest_verified`, the newest checkpoint that somebody has held against its manifest, and everything newer
/// (what is newer and was not verified is not counted either: damaged checkpoints must not push out good ones); the
/// newest `keep.last` from there on; steps that are multiples of `keep.every`; and `live`, what a generation that may
/// still be running has resumed from. If `newest_verified` is not in the list nothing goes.
pub fn plan_prune(
    checkpoints: &[Committed],
    keep: Keep,
    newest_verified: &ResumePoint,
    live: &[ResumePoint],
) -> Vec<ResumePoint> {
    let mut newest_first: Vec<ResumePoint> =
        checkpoints.iter().map(|c| ResumePoint { step: c.step, generation: c.generation }).collect();
    newest_first.sort_by_key(|point| std::cmp::Reverse((point.generation, point.step)));
    let Some(verified) = newest_first.iter().position(|point| point == newest_verified) else { return Vec::new() };
    let counted = newest_first.into_iter().skip(verified);
    let mut doomed: Vec<ResumePoint> = counted
        .skip((keep.last as usize).max(1))
        .filter(|point| !keep.every.is_some_and(|every| every != 0 && point.step.get().is_multiple_of(every)))
        .filter(|point| !live.contains(point))
        .collect();
    doomed.reverse();
    doomed
}

/// Carries a plan out. `append` writes the journal's `pruned` record of one checkpoint and must not return before it
/// stands; if it fails nothing of that checkpoint is deleted. `store` is the run's folder. Gives the objects deleted.
pub async fn apply_prune<E, F, A>(store: &Store, plan: &[ResumePoint], mut append: A) -> Result<u64, E>
where
    E: From<CheckpointError>,
    F: Future<Output = Result<(), E>>,
    A: FnMut(ResumePoint) -> F,
{
    let mut deleted = 0;
    for point in plan {
        append(point.clone()).await?;
        deleted += delete_folder(store, point.step, point.generation).await?;
    }
    Ok(deleted)
}

/// Deletes all data of one (step, generation), the manifest first; gives the objects deleted. The caller has made sure
/// that no record makes it a checkpoint.
pub async fn delete_folder(store: &Store, step: Step, generation: Generation) -> Result<u64, CheckpointError> {
    let folder = layout::checkpoint(step, generation);
    let manifest = join(&folder, layout::MANIFEST);
    let mut deleted = 0;
    let objects = store.list(&folder).await?;
    if objects.iter().any(|object| object.key == manifest) {
        store.delete(&manifest).await?;
        deleted += 1;
    }
    let inside = format!("{folder}/");
    let others: Vec<String> = objects
        .into_iter()
        .map(|object| object.key)
        .filter(|key| *key != manifest && key.starts_with(&inside))
        .collect();
    deleted += others.len() as u64;
    let delete = |key: String| async move { store.delete(&key).await };
    stream::iter(others).map(delete).buffer_unordered(IN_FLIGHT).try_collect::<()>().await?;
    Ok(deleted)
}
