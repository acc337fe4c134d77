//! Deleting checkpoints: a plan that can be shown, then its application.
//!
//! `checkpoint.keep` decides which checkpoints of the run's current line stay. In every case the newest verified one
//! stays ([`Standing`]): before anything is deleted it is verified against the store's own checksums, if the store
//! keeps them; otherwise every byte of it is read, unless it was read or restored from before, which compares the same
//! checksums. This avoids reading 100 GB after each save. Damaged checkpoints are quarantined: never counted, never
//! resumed from, deleted only when a person says so.
//!
//! Order of a deletion: the journal's `pruned` record, one for a whole plan (from then on they are not checkpoints),
//! then folder by folder the manifest and the other objects. *Crash:* after the record, the rest of the folders is
//! garbage that nobody reads; [`super::garbage`] removes it later. *Retry:* deleting an object that is gone is fine,
//! and a checkpoint already pruned is no longer in the list that a plan is made from. *Cancel:* like a crash.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    time::Duration,
};

use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use super::{
    CheckpointError,
    catalog::Damage,
    join,
    restore::IN_FLIGHT,
    verify::{Depth, Report, look_again, verify},
};
use crate::{
    config::{Keep, Spacing},
    ids::{Generation, Step},
    journal::{Checkpoint, CheckpointStatus, Committed, ResumePoint, RunState, Stagnation},
    layout,
    storage::Store,
};

/// Bytes of one request when the newest checkpoint must be read before anything is deleted: a few dozen requests are in
/// memory at once.
const PART: u64 = 4 << 20;
/// The most checkpoints in one `pruned` record: records are limited in size.
const ONE_RECORD: usize = 10_000;

/// Why a checkpoint stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// The newest verified one.
    Verified,
    /// Newer than the newest usable one, so perhaps damaged: neither deleted nor counted.
    Unproven,
    /// One of the newest `keep.last`.
    Last,
    /// One that `keep.every` names.
    Every,
    /// One of the `keep.best`.
    Best,
    /// A generation that may be running has resumed from it, or it is being read at the moment.
    InUse,
    /// Damaged: kept for diagnosis.
    Quarantined,
    /// It had been found damaged, but is whole when it is read again.
    Cleared,
}

/// The plan for one checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fate {
    /// The checkpoint.
    #[serde(flatten)]
    pub point: ResumePoint,
    /// Its bytes.
    pub bytes: u64,
    /// Why it stays; empty: it is deleted.
    pub stays: Vec<Why>,
}

impl Fate {
    /// Whether it is to be deleted.
    pub fn goes(&self) -> bool {
        self.stays.is_empty()
    }
}

/// The verified state of the newest checkpoints of the line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The newest that is whole as far as the store shows.
    pub usable: ResumePoint,
    /// The newest verified one, now or earlier; `None`: nothing is deleted.
    pub verified: Option<ResumePoint>,
}

/// The plan for a run's good checkpoints, oldest first. `line`: those of the run's current line
/// ([`RunState::candidates`]); `abandoned`: those that it abandoned with `--from`; they may include those of the line.
/// Both in any order.
///
/// These checkpoints of the line stay: `standing.verified`; everything newer than `standing.usable` (newer ones were
/// found damaged and are not counted either: damaged checkpoints must not push out good ones); the newest `keep.last`
/// from there on; and the `keep.best` with the lowest validation loss. Abandoned ones don't count: they would push out
/// the ones that the run steps back to. Of both kinds, those that `keep.every` names stay, and so do the `live` ones,
/// from which a generation that may still be running has resumed. If `standing.usable` is not on the line, or nothing
/// is verified, nothing is deleted.
pub fn plan_prune(
    line: &[Checkpoint],
    abandoned: &[Checkpoint],
    keep: Keep,
    standing: &Standing,
    live: &[ResumePoint],
) -> Vec<Fate> {
    let mut line: Vec<&Checkpoint> = line.iter().collect();
    let mut abandoned: Vec<&Checkpoint> =
        abandoned.iter().filter(|other| line.iter().all(|own| own.point() != other.point())).collect();
    line.sort_by_key(|checkpoint| order(checkpoint));
    abandoned.sort_by_key(|checkpoint| order(checkpoint));
    let usable = line.iter().position(|checkpoint| checkpoint.point() == standing.usable);
    let proven = standing.verified.is_some();
    let last = usable.map_or(0, |at| (at + 1).saturating_sub((keep.last as usize).max(1)));
    let (best, spaced) = (best(&line, keep.best), spaced(&line, keep.every));
    let spaced_abandoned = self::spaced(&abandoned, keep.every);
    let own = line.iter().enumerate().map(|(at, checkpoint)| {
        let point = checkpoint.point();
        let why = [
            (standing.verified.as_ref() == Some(&point), Why::Verified),
            (!proven || usable.is_none_or(|usable| at > usable), Why::Unproven),
            (usable.is_some_and(|usable| (last..=usable).contains(&at)), Why::Last),
            (spaced.contains(&at), Why::Every),
            (best.contains(&at), Why::Best),
            (live.contains(&point), Why::InUse),
        ];
        fate(checkpoint, &why)
    });
    let others = abandoned.iter().enumerate().map(|(at, checkpoint)| {
        let why = [
            (!proven || usable.is_none(), Why::Unproven),
            (spaced_abandoned.contains(&at), Why::Every),
            (live.contains(&checkpoint.point()), Why::InUse),
        ];
        fate(checkpoint, &why)
    });
    let mut fates: Vec<Fate> = own.chain(others).collect();
    fates.sort_by_key(|fate| (fate.point.generation, fate.point.step));
    fates
}

fn order(checkpoint: &Checkpoint) -> (Generation, Step) {
    (checkpoint.committed.generation, checkpoint.committed.step)
}

fn fate(checkpoint: &Checkpoint, why: &[(bool, Why)]) -> Fate {
    let stays = why.iter().filter(|(holds, _)| *holds).map(|(_, why)| *why).collect();
    Fate { point: checkpoint.point(), bytes: checkpoint.committed.bytes, stays }
}

/// Positions in the list that `every` keeps. Of each interval the first is kept, so that another plan, made later or
/// after this one was carried out, keeps the same. Times are those of the checkpoints' own records: a wrong clock keeps
/// one more or one fewer here, and decides nothing else.
fn spaced(oldest_first: &[&Checkpoint], every: Option<Spacing>) -> BTreeSet<usize> {
    let mut begun = BTreeSet::new();
    let stays = |checkpoint: &Checkpoint| match every {
        None => false,
        Some(Spacing::Steps(every)) => every != 0 && checkpoint.committed.step.get().is_multiple_of(every),
        Some(Spacing::Time { seconds }) => {
            let length = i64::try_from(seconds.max(Duration::from_secs(1)).as_secs()).unwrap_or(i64::MAX);
            begun.insert(checkpoint.at.as_second().div_euclid(length))
        }
    };
    let mut stays = stays;
    oldest_first.iter().enumerate().filter(|(_, checkpoint)| stays(checkpoint)).map(|(at, _)| at).collect()
}

/// Positions in the list of the `count` with the lowest validation loss; of equals, the newer ones. Checkpoints without
/// a finite loss are left out.
fn best(oldest_first: &[&Checkpoint], count: u32) -> BTreeSet<usize> {
    // A drain does not wait for the measurement of its last state, which a run that may stop early makes later: the
    // checkpoints after it know the loss.
    let later: BTreeMap<Step, f64> = oldest_first
        .iter()
        .map(|checkpoint| Stagnation::of(&checkpoint.committed.metrics))
        .map(|standing| (standing.step, standing.loss))
        .collect();
    let loss = |checkpoint: &Checkpoint| {
        let Committed { step, validation_loss, .. } = &checkpoint.committed;
        validation_loss.or_else(|| later.get(step).copied()).filter(|loss| loss.is_finite())
    };
    let mut ranked: Vec<(f64, usize)> =
        oldest_first.iter().enumerate().filter_map(|(at, checkpoint)| Some((loss(checkpoint)?, at))).collect();
    ranked.sort_by(|(a, i), (b, j)| a.total_cmp(b).then(j.cmp(i)));
    ranked.into_iter().take(count as usize).map(|(_, at)| at).collect()
}

/// The checkpoint with the lowest validation loss on the run's current line: the one that `keep.best` keeps first.
pub fn best_of(state: &RunState) -> Option<&Checkpoint> {
    let mut line = state.candidates();
    line.sort_by_key(|checkpoint| order(checkpoint));
    best(&line, 1).first().and_then(|at| line.get(*at).copied())
}

/// The checkpoints that a plan deletes, oldest first.
pub fn doomed(fates: &[Fate]) -> Vec<ResumePoint> {
    fates.iter().filter(|fate| fate.goes()).map(|fate| fate.point.clone()).collect()
}

/// The damaged checkpoints of a run, oldest first, as they stay in quarantine.
pub fn quarantined(state: &RunState) -> Vec<Fate> {
    let damaged = |checkpoint: &&Checkpoint| matches!(checkpoint.status, CheckpointStatus::Damaged { .. });
    let mut fates: Vec<Fate> = state
        .checkpoints()
        .iter()
        .filter(damaged)
        .map(|checkpoint| fate(checkpoint, &[(true, Why::Quarantined)]))
        .collect();
    fates.sort_by_key(|fate| (fate.point.generation, fate.point.step));
    fates
}

/// The treatment of checkpoints that the run abandoned with `--from`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abandoned {
    /// They stay: a running agent does not delete checkpoints that a person may want to go back to.
    Keep,
    /// They are deleted.
    Delete,
}

/// The source of a plan's proof that the newest checkpoint is good, if the store keeps no checksums.
#[derive(Clone, Copy, Debug)]
pub enum Reading<'a> {
    /// Nothing is read: the plan is shown as if the newest usable one had been read and found good.
    Assume,
    /// These have been read before, or restored from; if all of them are gone, the newest is read.
    Unless(&'a [ResumePoint]),
}

/// A plan, and the findings made for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The plan for each good checkpoint, oldest first.
    pub fates: Vec<Fate>,
    /// The newest verified one, if that had to be found out.
    pub verified: Option<ResumePoint>,
    /// Checkpoints that the journal calls good, and that were found damaged twice.
    pub damaged: Vec<Damage>,
    /// Nothing verifies the newest one yet: every byte of it is read before anything is deleted.
    pub unread: bool,
}

/// The plan for a run: [`plan_prune`] over its good checkpoints, after the newest one of its current line has been
/// verified. `store` is the run's folder; `in_use` stays. If nothing would be deleted anyway, no request goes to the
/// store.
///
/// # Errors
/// [`CheckpointError::NoneUsable`] if no checkpoint verifies: the remaining data may be all there is, so nothing is
/// deleted.
pub async fn plan_for(
    store: &Store,
    state: &RunState,
    keep: Keep,
    abandoned: Abandoned,
    reading: Reading<'_>,
    in_use: Option<&ResumePoint>,
) -> Result<Plan, CheckpointError> {
    let own = |checkpoints: Vec<&Checkpoint>| -> Vec<Checkpoint> { checkpoints.into_iter().cloned().collect() };
    let line = own(state.candidates());
    let Some(newest) = line.first().map(Checkpoint::point) else { return Ok(Plan::default()) };
    let resumed = state.formed().and_then(|formed| formed.resume.clone());
    let live: Vec<ResumePoint> = resumed.into_iter().chain(in_use.cloned()).collect();
    let abandoned = match abandoned {
        Abandoned::Keep => Vec::new(),
        Abandoned::Delete => own(state.good()),
    };
    let plan = |standing: &Standing| plan_prune(&line, &abandoned, keep, standing, &live);
    let hopeful = plan(&Standing { usable: newest.clone(), verified: Some(newest) });
    if hopeful.iter().all(|fate| !fate.goes()) {
        return Ok(Plan { fates: hopeful, ..Plan::default() });
    }
    let mut damaged = Vec::new();
    let mut usable = None;
    let mut verified = None;
    for checkpoint in &line {
        let point = checkpoint.point();
        let known = matches!(reading, Reading::Unless(known) if known.contains(&point));
        if usable.is_some() && !known {
            continue;
        }
        match sound(store, checkpoint, Depth::Stored).await? {
            Ok(report) if known || report.is_verified() => verified = Some(point.clone()),
            Ok(_) => {}
            Err(damage) => {
                damaged.push(damage);
                continue;
            }
        }
        usable.get_or_insert(point);
        if verified.is_some() {
            break;
        }
    }
    let unread = verified.is_none() && matches!(reading, Reading::Assume);
    if unread {
        verified.clone_from(&usable);
    } else if verified.is_none() {
        // None of them is verified: read, from the newest on, until one is good.
        usable = None;
        for checkpoint in &line {
            if damaged.iter().any(|damage: &Damage| damage.is_of(&checkpoint.point())) {
                continue;
            }
            match sound(store, checkpoint, Depth::Bytes { part: PART }).await? {
                Ok(_) => {
                    usable = Some(checkpoint.point());
                    break;
                }
                Err(damage) => damaged.push(damage),
            }
        }
        verified.clone_from(&usable);
    }
    let Some(usable) = usable else {
        return Err(CheckpointError::NoneUsable { run_id: state.run_id().clone() });
    };
    let fates = plan(&Standing { usable, verified: verified.clone() });
    Ok(Plan { fates, verified: verified.filter(|_| !unread), damaged, unread })
}

/// One checkpoint's report, or its damage if it was found damaged twice.
async fn sound(
    store: &Store,
    checkpoint: &Checkpoint,
    depth: Depth,
) -> Result<Result<Report, Damage>, CheckpointError> {
    let committed = &checkpoint.committed;
    let report = verify(store, committed, depth, &|_| {}).await?;
    if report.is_sound() {
        return Ok(Ok(report));
    }
    let again = look_again(store, committed, &report).await?;
    let damage = again.damage().map(|(object, reason)| Damage {
        step: committed.step,
        generation: committed.generation,
        object: object.to_owned(),
        reason: reason.to_string(),
    });
    Ok(damage.map_or(Ok(again), Err))
}

/// Carries a plan out. `append` writes the journal's one `pruned` record of all these checkpoints and must not return
/// before it exists; if it fails, none of their data is deleted. `store` is the run's folder. Returns the number of
/// deleted objects. A folder that can't be deleted does not stop the deletion of others; the first error is returned at
/// the end.
pub async fn apply_prune<E, F, A>(store: &Store, plan: &[ResumePoint], mut append: A) -> Result<u64, E>
where
    E: From<CheckpointError>,
    F: Future<Output = Result<(), E>>,
    A: FnMut(Vec<ResumePoint>) -> F,
{
    let mut deleted = Ok(0);
    for points in plan.chunks(ONE_RECORD) {
        append(points.to_vec()).await?;
        for point in points {
            match (delete_folder(store, point.step, point.generation).await, &mut deleted) {
                (Ok(more), Ok(deleted)) => *deleted += more,
                (Err(error), Ok(_)) => deleted = Err(error),
                (_, Err(_)) => {}
            }
        }
    }
    Ok(deleted?)
}

/// Deletes all data of one (step, generation), the manifest first; returns the number of deleted objects. The caller
/// has made sure that no record counts it as a checkpoint.
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
    use std::{cell::RefCell, sync::Arc};

    use jiff::Timestamp;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        checkpoint::testing::{Harm, STORAGE, checkpoint, harm, memory_store, state_of},
        journal::{Committed, Metrics, SaveCost},
        storage::{
            faulty::{Fault, Faulty},
            s3_tests,
        },
    };

    fn point(step: u64, generation: u64) -> ResumePoint {
        ResumePoint { step: Step(step), generation: Generation(generation) }
    }

    /// Committed a minute a step after 1970, with that validation loss.
    fn record(point: &ResumePoint, validation_loss: Option<f64>) -> Checkpoint {
        let committed = Committed {
            step: point.step,
            generation: point.generation,
            manifest: String::new(),
            manifest_crc64: String::new(),
            bytes: point.step.get(),
            loss: Some(0.0),
            validation_loss,
            metrics: Metrics::new(),
            cost: SaveCost::default(),
        };
        let at = Timestamp::from_second(60 * point.step.get() as i64).unwrap();
        Checkpoint { number: 0, at, committed, status: CheckpointStatus::Good }
    }

    fn records(points: &[(u64, u64)]) -> Vec<Checkpoint> {
        points.iter().map(|&(step, generation)| record(&point(step, generation), None)).collect()
    }

    fn steps(plan: &[ResumePoint]) -> Vec<u64> {
        plan.iter().map(|point| point.step.get()).collect()
    }

    fn by_steps(last: u32, every: Option<u64>) -> Keep {
        Keep { last, every: every.map(Spacing::Steps), best: 0 }
    }

    fn proven(point: &ResumePoint) -> Standing {
        Standing { usable: point.clone(), verified: Some(point.clone()) }
    }

    fn goes(
        line: &[Checkpoint],
        abandoned: &[Checkpoint],
        keep: Keep,
        verified: &ResumePoint,
        live: &[ResumePoint],
    ) -> Vec<ResumePoint> {
        doomed(&plan_prune(line, abandoned, keep, &proven(verified), live))
    }

    #[test]
    fn what_is_kept() {
        let list: Vec<Checkpoint> = (1..=10).map(|i| record(&point(i * 100, 1), None)).collect();
        let newest = point(1000, 1);
        let plan = |keep, verified: &ResumePoint, live: &[ResumePoint]| steps(&goes(&list, &[], keep, verified, live));
        assert_eq!(plan(by_steps(3, None), &newest, &[]), [100, 200, 300, 400, 500, 600, 700]);
        assert_eq!(plan(by_steps(3, Some(300)), &newest, &[]), [100, 200, 400, 500, 700]);
        assert_eq!(plan(by_steps(8, None), &newest, &[point(100, 1)]), [200]);
        assert_eq!(plan(by_steps(99, None), &newest, &[]), [0_u64; 0]);
        // Even if no rule keeps anything, the newest verified one stays.
        assert_eq!(plan(by_steps(0, Some(0)), &newest, &[]).len(), 9);
        // Checkpoints newer than the newest usable one are neither deleted nor counted.
        assert_eq!(plan(by_steps(2, None), &point(600, 1), &[]), [100, 200, 300, 400]);
        // Without proof of a good one nothing is deleted.
        assert_eq!(plan(by_steps(1, None), &point(1000, 2), &[]), [0_u64; 0]);
        let unproven = Standing { usable: newest.clone(), verified: None };
        assert_eq!(doomed(&plan_prune(&list, &list, by_steps(1, None), &unproven, &[])), []);
        // One that was verified before stays beside the newest, which was not.
        let before = Standing { usable: newest, verified: Some(point(400, 1)) };
        let left = plan_prune(&list, &[], by_steps(2, None), &before, &[]);
        assert_eq!(steps(&doomed(&left)), [100, 200, 300, 500, 600, 700, 800]);
        assert_eq!(left[3].stays, [Why::Verified]);
        assert_eq!(left[9].stays, [Why::Last]);
        // Generations count before steps.
        let list = records(&[(500, 1), (300, 2), (900, 1)]);
        assert_eq!(goes(&list, &[], by_steps(1, None), &point(300, 2), &[]), [point(500, 1), point(900, 1)]);
    }

    #[test]
    fn the_first_checkpoint_of_each_interval_is_kept_and_stays_the_first() {
        // A checkpoint every 20 minutes, from 00:20 to 04:00.
        let list: Vec<Checkpoint> = (1..=12).map(|i| record(&point(i * 20, 1), None)).collect();
        let hourly = Some(Spacing::Time { seconds: Duration::from_secs(3600) });
        let keep = Keep { last: 2, every: hourly, best: 0 };
        let fates = plan_prune(&list, &[], keep, &proven(&point(240, 1)), &[]);
        let stay =
            |why| fates.iter().filter(|f| f.stays.contains(&why)).map(|f| f.point.step.get()).collect::<Vec<_>>();
        assert_eq!(stay(Why::Every), [20, 60, 120, 180, 240]);
        assert_eq!(stay(Why::Last), [220, 240]);
        // A plan made later, after this one was carried out, finds the same ones first.
        let mut left: Vec<Checkpoint> = list.into_iter().filter(|c| !doomed(&fates).contains(&c.point())).collect();
        left.push(record(&point(260, 1), None));
        left.push(record(&point(310, 1), None));
        assert_eq!(steps(&goes(&left, &[], keep, &point(310, 1), &[])), [220]);
        // An interval of zero does not divide by zero.
        let none = Keep { every: Some(Spacing::Time { seconds: Duration::ZERO }), ..keep };
        assert_eq!(goes(&left, &[], none, &point(310, 1), &[]), []);
    }

    #[test]
    fn the_best_are_those_with_the_lowest_validation_loss() {
        let losses =
            [None, Some(3.0), Some(1.0), Some(f64::NAN), Some(2.0), Some(1.0), Some(f64::NEG_INFINITY), Some(9.0)];
        let list: Vec<Checkpoint> = losses.iter().zip(1..).map(|(loss, step)| record(&point(step, 1), *loss)).collect();
        let plan = |best| {
            let keep = Keep { last: 1, every: None, best };
            let fates = plan_prune(&list, &[], keep, &proven(&point(8, 1)), &[]);
            fates.iter().filter(|f| f.stays.contains(&Why::Best)).map(|f| f.point.step.get()).collect::<Vec<_>>()
        };
        assert_eq!(plan(0), [0_u64; 0]);
        assert_eq!(plan(1), [6], "of equals the newer");
        assert_eq!(plan(3), [3, 5, 6]);
        assert_eq!(plan(100), [2, 3, 5, 6, 8]);
    }

    #[test]
    fn abandoned_checkpoints_do_not_push_out_those_that_the_run_goes_back_to() {
        // Steps 10 to 100 in generation 1, then `--from 50`; generation 3 continued from 60.
        let line = records(&[(60, 2), (50, 1), (40, 1), (30, 1)]);
        let abandoned = records(&[(100, 1), (90, 1), (70, 1)]);
        let plan = |every, live: &[ResumePoint]| goes(&line, &abandoned, by_steps(3, every), &point(60, 2), live);
        assert_eq!(plan(None, &[point(60, 2)]), [point(30, 1), point(70, 1), point(90, 1), point(100, 1)]);
        assert_eq!(plan(Some(10), &[]), []);
        assert_eq!(plan(Some(50), &[point(90, 1)]), [point(30, 1), point(70, 1)]);
        assert_eq!(goes(&line, &abandoned, by_steps(3, None), &point(100, 1), &[]), [], "not on the line");
        // Named in both lists, it is on the line.
        assert_eq!(goes(&line, &line, by_steps(3, None), &point(60, 2), &[]), [point(30, 1)]);
    }

    proptest! {
        #[test]
        fn the_plan_keeps_every_checkpoint_that_it_must(
            seed in proptest::collection::btree_map((1_u64..50, 1_u64..4), proptest::option::of(-5_i32..5), 1..30),
            turned in 0_usize..30, usable in any::<proptest::sample::Index>(), live in any::<proptest::sample::Index>(),
            verified in any::<proptest::sample::Index>(), last in 0_u32..6, best in 0_u32..6,
            every in proptest::option::of((any::<bool>(), 0_u64..10))
        ) {
            let all: Vec<Checkpoint> =
                seed.iter().map(|(&(s, g), loss)| record(&point(s, g), loss.map(f64::from))).collect();
            let (abandoned, line) = all.split_at(turned.min(all.len() - 1));
            let (usable, live) = (usable.get(line).point(), live.get(line).point());
            let verified = verified.get(line).point();
            let every = every.map(|(steps, n)| {
                if steps { Spacing::Steps(n) } else { Spacing::Time { seconds: Duration::from_secs(60 * n) } }
            });
            let keep = Keep { last, every, best };
            let standing = Standing { usable: usable.clone(), verified: Some(verified.clone()) };
            let fates = plan_prune(line, abandoned, keep, &standing, std::slice::from_ref(&live));
            let key = |point: &ResumePoint| (point.generation, point.step);
            prop_assert_eq!(fates.len(), all.len(), "each has a fate");
            prop_assert!(fates.is_sorted_by_key(|fate| key(&fate.point)));
            let gone = doomed(&fates);
            prop_assert!(!gone.contains(&usable) && !gone.contains(&verified) && !gone.contains(&live));
            let own: Vec<_> = gone.iter().filter(|point| line.iter().any(|c| c.point() == **point)).collect();
            prop_assert!(own.iter().all(|point| key(point) < key(&usable)));
            let candidates = line.iter().filter(|c| key(&c.point()) <= key(&usable)).count();
            prop_assert!(candidates - own.len() >= (last as usize).min(candidates));
            // No better one goes than one that stays for being good.
            let loss = |point: &ResumePoint| {
                line.iter().find(|c| c.point() == *point).and_then(|c| c.committed.validation_loss)
            };
            let worst = fates.iter().filter(|f| f.stays.contains(&Why::Best)).filter_map(|f| loss(&f.point));
            let worst = worst.fold(f64::NEG_INFINITY, f64::max);
            let measured = line.iter().filter(|c| c.committed.validation_loss.is_some()).count();
            let stay = fates.iter().filter(|f| f.stays.contains(&Why::Best)).count();
            prop_assert_eq!(stay, measured.min(best as usize));
            prop_assert!(best == 0 || own.iter().filter_map(|point| loss(point)).all(|loss| loss >= worst));
            // A second plan, over the remaining ones, deletes nothing more.
            let left = |list: &[Checkpoint]| -> Vec<Checkpoint> {
                list.iter().filter(|c| !gone.contains(&c.point())).cloned().collect()
            };
            let again = plan_prune(&left(line), &left(abandoned), keep, &standing, std::slice::from_ref(&live));
            prop_assert_eq!(doomed(&again), []);
        }
    }

    /// Three checkpoints, of which `keep` deletes the first.
    async fn three(store: &Store) -> RunState {
        let mut committed = Vec::new();
        for step in 1..=3 {
            committed.push(checkpoint(store, step, 1, 1, step).await.0);
        }
        state_of(committed)
    }

    async fn plan(store: &Store, state: &RunState, reading: Reading<'_>) -> Result<Plan, CheckpointError> {
        plan_for(store, state, by_steps(2, None), Abandoned::Keep, reading, None).await
    }

    const SHARD: &str = "model-00001-of-00001.safetensors";

    #[tokio::test]
    async fn on_a_store_with_checksums_the_newest_is_verified_without_a_download() {
        let (store, server) = s3_tests::atomic();
        let state = three(&store).await;
        let gets = server.count("GetObject");
        let planned = plan(&store, &state, Reading::Unless(&[])).await.unwrap();
        assert_eq!((steps(&doomed(&planned.fates)), planned.verified.clone()), (vec![1], Some(point(3, 1))));
        assert_eq!(server.count("GetObject") - gets, 1, "its manifest");
        // The newest has other bytes of the same length: it is skipped, reported, and not counted.
        harm(&store, &layout::checkpoint(Step(3), Generation(1)), SHARD, Harm::Flip).await;
        let planned = plan(&store, &state, Reading::Unless(&[])).await.unwrap();
        assert_eq!((doomed(&planned.fates), planned.verified.clone()), (vec![], Some(point(2, 1))));
        assert!(planned.damaged.len() == 1 && planned.damaged[0].is_of(&point(3, 1)), "{planned:?}");
        assert_eq!(planned.fates[2].stays, [Why::Unproven]);
    }

    #[tokio::test]
    async fn on_a_store_without_checksums_the_newest_is_read_once() {
        let faulty = Faulty::new(|_, _, _| Fault::Pass);
        let store = Store::faulty(&faulty, &STORAGE);
        let state = three(&store).await;
        let reads = async |reading: Reading<'_>| {
            let before = faulty.count("get");
            let planned = plan(&store, &state, reading).await.unwrap();
            (planned, faulty.count("get") - before)
        };
        let files = 2 + 3;
        let (planned, read) = reads(Reading::Unless(&[])).await;
        assert_eq!((steps(&doomed(&planned.fates)), planned.verified.clone()), (vec![1], Some(point(3, 1))));
        assert_eq!(read, 1 + 1 + files, "the manifest twice, and every file");
        // It was read before, so only its sizes are asked for.
        let (again, read) = reads(Reading::Unless(&[point(3, 1)])).await;
        assert_eq!((doomed(&again.fates), read), (doomed(&planned.fates), 1));
        // An older one was read before: it stays, and nothing is read.
        let (older, read) = reads(Reading::Unless(&[point(1, 1)])).await;
        assert_eq!((doomed(&older.fates), older.verified.clone(), read), (vec![], Some(point(1, 1)), 2));
        assert_eq!(older.fates[0].stays, [Why::Verified]);
        // A plan that is only shown reads nothing, and says so.
        let (shown, read) = reads(Reading::Assume).await;
        assert_eq!(
            (doomed(&shown.fates), shown.unread, shown.verified.clone(), read),
            (vec![point(1, 1)], true, None, 1)
        );
    }

    #[tokio::test]
    async fn a_newest_checkpoint_with_bit_rot_does_not_push_out_a_good_one() {
        let store = memory_store();
        let state = three(&store).await;
        harm(&store, &layout::checkpoint(Step(3), Generation(1)), SHARD, Harm::Flip).await;
        let planned = plan(&store, &state, Reading::Unless(&[])).await.unwrap();
        assert_eq!((doomed(&planned.fates), planned.verified.clone()), (vec![], Some(point(2, 1))));
        assert!(planned.damaged[0].object.ends_with(SHARD), "{planned:?}");
        for step in [1, 2] {
            harm(&store, &layout::checkpoint(Step(step), Generation(1)), SHARD, Harm::Delete).await;
        }
        let error = plan(&store, &state, Reading::Unless(&[point(1, 1)])).await.unwrap_err();
        assert!(matches!(error, CheckpointError::NoneUsable { .. }), "{error:?}");
    }

    #[tokio::test]
    async fn a_plan_without_deletions_makes_no_request_and_a_failing_store_deletes_nothing() {
        let faulty = Faulty::new(|operation, _, n| match operation {
            "get" | "head" if n > 100 => Fault::Denied,
            _ => Fault::Pass,
        });
        let store = Store::faulty(&faulty, &STORAGE);
        let state = three(&store).await;
        let asked = || faulty.count("get") + faulty.count("head");
        let before = asked();
        let keep = by_steps(3, None);
        let planned = plan_for(&store, &state, keep, Abandoned::Keep, Reading::Unless(&[]), None).await.unwrap();
        assert_eq!((doomed(&planned.fates), asked()), (vec![], before));
        let denied = Arc::clone(&faulty);
        while denied.count("head") <= 101 {
            let _ = store.head("x").await;
        }
        let error = plan(&store, &state, Reading::Unless(&[])).await.unwrap_err();
        assert!(matches!(error, CheckpointError::Storage(_)), "{error:?}");
    }

    #[tokio::test]
    async fn the_record_comes_first_and_only_the_planned_folder_is_deleted() {
        let store = memory_store();
        let (old, old_manifest) = checkpoint(&store, 1, 1, 2, 1).await;
        // A folder whose name begins like that of the one to delete.
        let (other, _) = checkpoint(&store, 1, 10_000, 1, 1).await;
        let (new, _) = checkpoint(&store, 2, 1, 1, 1).await;
        let plan = [point(1, 1)];

        let refuse = |_| async { Err(CheckpointError::Internal("the journal said no".into())) };
        apply_prune(&store, &plan, refuse).await.unwrap_err();
        crate::checkpoint::catalog::inspect(&store, &old).await.unwrap();

        let appended = RefCell::new(Vec::new());
        let append = |points: Vec<ResumePoint>| {
            appended.borrow_mut().extend(points);
            let (store, old) = (store.clone(), old.clone());
            async move { crate::checkpoint::catalog::inspect(&store, &old).await.map(|_| ()) }
        };
        let deleted = apply_prune(&store, &plan, append).await.unwrap();
        assert_eq!(appended.into_inner(), plan);
        // Its files, its receipt and its manifest.
        assert_eq!(deleted, old_manifest.files.len() as u64 + 2);
        assert!(store.list(&old_manifest.folder()).await.unwrap().is_empty());
        crate::checkpoint::catalog::inspect(&store, &other).await.unwrap();
        crate::checkpoint::catalog::inspect(&store, &new).await.unwrap();
        assert_eq!(delete_folder(&store, Step(1), Generation(1)).await.unwrap(), 0);
    }
}
