//! Deleting checkpoints: a plan that can be shown, then its application.
//!
//! Order of a deletion: the journal's `pruned` record (from then on it is no checkpoint), the manifest, the other objects.
//! *Crash:* after the record, the rest of the folder is garbage that nobody reads; [`delete_folder`] takes it away later.
//! *Retry:* deleting what is gone is fine, and a checkpoint already pruned is no longer in the list that a plan is made
//! from. *Cancel:* like a crash.

use std::future::Future;

use futures::{StreamExt, TryStreamExt, stream};

use super::{CheckpointError, catalog, join, restore::IN_FLIGHT};
use crate::{
    config::Keep,
    ids::{Generation, Step},
    journal::{Checkpoint, Committed, ResumePoint, RunState},
    layout,
    storage::Store,
};

/// Which checkpoints may go, oldest first. `line`: the good ones that the run as it stands consists of
/// ([`RunState::candidates`](crate::journal::RunState::candidates)); `abandoned`: good ones that it has turned away from
/// with `--from`, those of the line among them or not. Both in any order.
///
/// Of the line are kept: `newest_verified`, the newest checkpoint that somebody has held against its manifest, and
/// everything newer (what is newer and was not verified is not counted either: damaged checkpoints must not push out good
/// ones); and the newest `keep.last` from there on. Abandoned ones don't count: they would push out what the run steps back
/// to. Of both are kept steps that are multiples of `keep.every`, and `live`, what a generation that may still be running
/// has resumed from. If `newest_verified` is not on the line nothing goes.
pub fn plan_prune(
    line: &[Committed],
    abandoned: &[Committed],
    keep: Keep,
    newest_verified: &ResumePoint,
    live: &[ResumePoint],
) -> Vec<ResumePoint> {
    let point = |c: &Committed| ResumePoint { step: c.step, generation: c.generation };
    let order = |point: &ResumePoint| (point.generation, point.step);
    let mut newest_first: Vec<ResumePoint> = line.iter().map(point).collect();
    newest_first.sort_by_key(|point| std::cmp::Reverse(order(point)));
    let Some(verified) = newest_first.iter().position(|point| point == newest_verified) else { return Vec::new() };
    let past_their_time = newest_first.iter().skip(verified).skip((keep.last as usize).max(1)).cloned();
    let mut doomed: Vec<ResumePoint> = abandoned
        .iter()
        .map(point)
        .filter(|point| !newest_first.contains(point))
        .chain(past_their_time)
        .filter(|point| !keep.every.is_some_and(|every| every != 0 && point.step.get().is_multiple_of(every)))
        .filter(|point| !live.contains(point))
        .collect();
    doomed.sort_by_key(order);
    doomed
}

/// What becomes of checkpoints that the run has turned away from with `--from`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abandoned {
    /// They stay: a running agent deletes nothing that a person may want to go back to.
    Keep,
    /// They go.
    Delete,
}

/// What may go of a run, oldest first: [`plan_prune`] over its good checkpoints, after the newest one of the run as it stands has
/// been held against its manifest. `store` is the run's folder.
///
/// # Errors
/// [`CheckpointError::NoneUsable`] if no checkpoint verifies: what is left may be all there is, so nothing goes.
pub async fn plan_for(
    store: &Store,
    state: &RunState,
    keep: Keep,
    abandoned: Abandoned,
) -> Result<Vec<ResumePoint>, CheckpointError> {
    let own = |checkpoints: Vec<&Checkpoint>| -> Vec<Committed> {
        checkpoints.into_iter().map(|checkpoint| checkpoint.committed.clone()).collect()
    };
    let candidates = own(state.candidates());
    if candidates.is_empty() {
        return Ok(Vec::new());
    }
    let Some((verified, _)) = catalog::newest_usable(store, &candidates, None).await?.found else {
        return Err(CheckpointError::NoneUsable { run_id: state.run_id().clone() });
    };
    let verified = ResumePoint { step: verified.step, generation: verified.generation };
    let live: Vec<ResumePoint> = state.formed().and_then(|formed| formed.resume.clone()).into_iter().collect();
    let abandoned = match abandoned {
        Abandoned::Keep => Vec::new(),
        Abandoned::Delete => own(state.good()),
    };
    Ok(plan_prune(&candidates, &abandoned, keep, &verified, &live))
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

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        checkpoint::{
            catalog,
            testing::{checkpoint, memory_store},
        },
        journal::SaveCost,
    };

    fn point(step: u64, generation: u64) -> ResumePoint {
        ResumePoint { step: Step(step), generation: Generation(generation) }
    }

    fn record(point: &ResumePoint) -> Committed {
        Committed {
            step: point.step,
            generation: point.generation,
            manifest: String::new(),
            manifest_crc64: String::new(),
            bytes: 0,
            loss: 0.0,
            validation_loss: None,
            cost: SaveCost::default(),
        }
    }

    fn steps(plan: &[ResumePoint]) -> Vec<u64> {
        plan.iter().map(|point| point.step.get()).collect()
    }

    #[test]
    fn what_is_kept() {
        let list: Vec<Committed> = (1..=10).map(|i| record(&point(i * 100, 1))).collect();
        let keep = |last, every| Keep { last, every };
        let newest = point(1000, 1);
        let plan =
            |keep, verified: &ResumePoint, live: &[ResumePoint]| steps(&plan_prune(&list, &[], keep, verified, live));
        assert_eq!(plan(keep(3, None), &newest, &[]), [100, 200, 300, 400, 500, 600, 700]);
        assert_eq!(plan(keep(3, Some(300)), &newest, &[]), [100, 200, 400, 500, 700]);
        assert_eq!(plan(keep(8, None), &newest, &[point(100, 1)]), [200]);
        assert_eq!(plan(keep(99, None), &newest, &[]), [0_u64; 0]);
        // Nothing at all to keep still keeps the newest verified.
        assert_eq!(plan(keep(0, Some(0)), &newest, &[]).len(), 9);
        // What is newer than the newest verified is neither deleted nor counted.
        assert_eq!(plan(keep(2, None), &point(600, 1), &[]), [100, 200, 300, 400]);
        // No proof of a good one: nothing goes.
        assert_eq!(plan(keep(1, None), &point(1000, 2), &[]), [0_u64; 0]);
        // Generations count before steps.
        let list = [record(&point(500, 1)), record(&point(300, 2)), record(&point(900, 1))];
        assert_eq!(plan_prune(&list, &[], keep(1, None), &point(300, 2), &[]), [point(500, 1), point(900, 1)]);
    }

    #[test]
    fn what_the_run_turned_away_from_does_not_push_out_what_it_steps_back_to() {
        let records = |points: &[(u64, u64)]| points.iter().map(|&(s, g)| record(&point(s, g))).collect::<Vec<_>>();
        // 10 to 100 in generation 1, then `--from 50`; generation 3 has carried on from 60.
        let line = records(&[(60, 2), (50, 1), (40, 1), (30, 1)]);
        let abandoned = records(&[(100, 1), (90, 1), (70, 1)]);
        let keep = |every| Keep { last: 3, every };
        let plan = |every, live: &[ResumePoint]| plan_prune(&line, &abandoned, keep(every), &point(60, 2), live);
        assert_eq!(plan(None, &[point(60, 2)]), [point(30, 1), point(70, 1), point(90, 1), point(100, 1)]);
        assert_eq!(plan(Some(10), &[]), []);
        assert_eq!(plan(Some(50), &[point(90, 1)]), [point(30, 1), point(70, 1)]);
        assert_eq!(plan_prune(&line, &abandoned, keep(None), &point(100, 1), &[]), [], "not on the line");
        // Named in both lists, it is on the line.
        assert_eq!(plan_prune(&line, &line, keep(None), &point(60, 2), &[]), [point(30, 1)]);
    }

    proptest! {
        #[test]
        fn what_must_stay_stays(
            seed in proptest::collection::btree_set((1_u64..50, 1_u64..4), 1..30),
            turned in 0_usize..30, verified in any::<proptest::sample::Index>(), live in any::<proptest::sample::Index>(),
            last in 0_u32..6, every in proptest::option::of(0_u64..10)
        ) {
            let points: Vec<ResumePoint> = seed.iter().map(|&(step, generation)| point(step, generation)).collect();
            let (abandoned, points) = points.split_at(turned.min(points.len() - 1));
            let records = |points: &[ResumePoint]| points.iter().map(record).collect::<Vec<_>>();
            let (verified, live) = (verified.get(points), live.get(points));
            let keep = Keep { last, every };
            let plan = plan_prune(&records(points), &records(abandoned), keep, verified, std::slice::from_ref(live));
            let key = |point: &ResumePoint| (point.generation, point.step);
            prop_assert!(plan.is_sorted_by_key(key));
            let plan: Vec<_> = plan.into_iter().filter(|point| !abandoned.contains(point)).collect();
            prop_assert!(!plan.contains(verified) && !plan.contains(live));
            prop_assert!(plan.iter().all(|point| key(point) < key(verified)));
            let candidates = points.iter().filter(|point| key(point) <= key(verified)).count();
            prop_assert!(candidates - plan.len() >= (last as usize).min(candidates));
        }
    }

    #[tokio::test]
    async fn the_record_comes_first_and_only_the_doomed_folder_goes() {
        let store = memory_store();
        let (old, old_manifest) = checkpoint(&store, 1, 1, 2, 1).await;
        // A folder whose name begins like that of the doomed one.
        let (other, _) = checkpoint(&store, 1, 10_000, 1, 1).await;
        let (new, _) = checkpoint(&store, 2, 1, 1, 1).await;
        let plan = [point(1, 1)];

        let refuse = |_| async { Err(CheckpointError::Internal("the journal said no".into())) };
        apply_prune(&store, &plan, refuse).await.unwrap_err();
        catalog::inspect(&store, &old).await.unwrap();

        let appended = RefCell::new(Vec::new());
        let append = |point: ResumePoint| {
            appended.borrow_mut().push(point);
            let (store, old) = (store.clone(), old.clone());
            async move { catalog::inspect(&store, &old).await.map(|_| ()) }
        };
        let deleted = apply_prune(&store, &plan, append).await.unwrap();
        assert_eq!(appended.into_inner(), plan);
        // Its files, its receipt and its manifest.
        assert_eq!(deleted, old_manifest.files.len() as u64 + 2);
        assert!(store.list(&old_manifest.folder()).await.unwrap().is_empty());
        catalog::inspect(&store, &other).await.unwrap();
        catalog::inspect(&store, &new).await.unwrap();
        assert_eq!(delete_folder(&store, Step(1), Generation(1)).await.unwrap(), 0);
    }
}
