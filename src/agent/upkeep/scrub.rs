//! Checks of the checkpoints that a run keeps, while it trains: bit rot is found before they are needed, and garbage is
//! removed.
//!
//! One task beside the event loop. At the start of a generation and once a day it deletes the leftovers that
//! [`crate::checkpoint::garbage`] finds. Every kept checkpoint is verified against its checksums once in
//! `checkpoint.scrub`: against those that the store keeps, if it keeps any; otherwise its bytes are read at no more
//! than [`RATE`], one request at a time. While a restore or a save is under way nothing is begun and no byte is read. A
//! checkpoint that is damaged, and still is when it is read again while another one is whole, gets a `damaged` record
//! ([`crate::checkpoint::condemn`]): it is never resumed from again and never counted, and its bytes stay for
//! diagnosis.
//!
//! *Crash, cancel:* nothing is kept outside the journal; an interrupted check starts again in the next generation.
//! *Retry:* a store that fails is asked again after [`AGAIN`].

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use tokio::sync::watch;

use super::retention::Upkeep;
use crate::{
    checkpoint::{
        catalog::Damage,
        garbage,
        verify::{Depth, Gentle, Report, look_again, verify, verify_gently},
    },
    error::Error,
    ids::{Generation, Step},
    journal::{Committed, ResumePoint},
};

/// The most bytes read per second, on a store that keeps no checksums.
pub(super) const RATE: u64 = 32 << 20;
/// How long after the last check of a newest checkpoint the current newest is checked: this advances the newest
/// verified one, so that an older one need not be kept as such.
const NEWEST: Duration = Duration::from_secs(10 * 60);
/// How long after it is first seen a checkpoint is checked for the first time: many are deleted before.
const FIRST: Duration = Duration::from_secs(60 * 60);
/// The pause before a store that failed is asked again.
const AGAIN: Duration = Duration::from_secs(10 * 60);

/// Time since the generation began.
type Elapsed = Duration;

/// The known state of one kept checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Watched {
    point: ResumePoint,
    /// When this generation first saw it.
    since: Elapsed,
    /// The end of the last check, and whether the store allowed it.
    looked: Option<(Elapsed, bool)>,
}

/// The next task.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Next {
    /// Check this checkpoint now.
    Look(ResumePoint),
    /// Nothing is due for this long.
    Wait(Duration),
    /// There is nothing to check.
    Nothing,
}

/// What to check next. `watched`: the newest first; `newest`: the end of the last check of a checkpoint that was then
/// the newest.
///
/// Each is due `period` after its last check. One that this generation has not checked is due [`FIRST`] after it was
/// first seen, and the newest, if no newest one was checked for [`NEWEST`]; neither waits longer than `period`. Of two
/// that are due, the one due for longer comes first, then the newer: a resume would use it.
fn next(watched: &[Watched], newest: Option<Elapsed>, period: Duration, now: Elapsed) -> Next {
    let due = |(place, watched): (usize, &Watched)| {
        let due = match watched.looked {
            Some((at, true)) => at + period,
            Some((at, false)) => at + period.min(AGAIN),
            None if place == 0 => newest.unwrap_or_default() + period.min(NEWEST),
            None => watched.since + period.min(FIRST),
        };
        (due, place)
    };
    match watched.iter().enumerate().map(due).min() {
        None => Next::Nothing,
        Some((due, place)) if due <= now => Next::Look(watched[place].point.clone()),
        Some((due, _)) => Next::Wait(due - now),
    }
}

/// Sweeps and checks until it is aborted.
pub(super) async fn run(upkeep: Arc<Upkeep>, busy: watch::Receiver<bool>) {
    tokio::join!(sweep_daily(&upkeep, busy.clone()), look_around(&upkeep, busy));
}

async fn sweep_daily(upkeep: &Upkeep, mut busy: watch::Receiver<bool>) {
    loop {
        // Its sender is gone when the generation is over.
        if busy.wait_for(|busy| !busy).await.is_err() {
            return;
        }
        match sweep(upkeep).await {
            Ok(0) => {}
            Ok(swept) => tracing::info!(objects = swept, "removed leftovers of interrupted uploads and deletions"),
            Err(error) => tracing::warn!(%error, "could not remove leftovers of interrupted uploads"),
        }
        tokio::time::sleep(garbage::AGE).await;
    }
}

async fn sweep(upkeep: &Upkeep) -> Result<u64, Error> {
    let state = upkeep.journal.state();
    let garbage = garbage::find(&upkeep.run, &state, Timestamp::now()).await?;
    if let Some(error) = &garbage.unlisted {
        tracing::info!(%error, "unfinished uploads can't be listed: left to the bucket's lifecycle rule");
    }
    Ok(garbage::sweep(&upkeep.run, &garbage).await?)
}

async fn look_around(upkeep: &Upkeep, busy: watch::Receiver<bool>) {
    let Some(period) = upkeep.config.scrub else { return };
    let begun = Instant::now();
    let mut memory: BTreeMap<(Generation, Step), Watched> = BTreeMap::new();
    let mut newest = None;
    loop {
        let state = upkeep.journal.state();
        let good: Vec<Committed> = state.good().into_iter().map(|checkpoint| checkpoint.committed.clone()).collect();
        let key = |committed: &Committed| (committed.generation, committed.step);
        memory.retain(|known, _| good.iter().any(|committed| key(committed) == *known));
        for committed in &good {
            let point = ResumePoint { step: committed.step, generation: committed.generation };
            let watched = || Watched { point, since: begun.elapsed(), looked: None };
            memory.entry(key(committed)).or_insert_with(watched);
        }
        let watched: Vec<Watched> = memory.values().rev().cloned().collect();
        match next(&watched, newest, period, begun.elapsed()) {
            Next::Nothing => upkeep.committed.notified().await,
            Next::Wait(time) => {
                // A commit may change what is due first.
                let _ = tokio::time::timeout(time, upkeep.committed.notified()).await;
            }
            Next::Look(point) => {
                if busy.clone().wait_for(|busy| !busy).await.is_err() {
                    return;
                }
                let committed = good.iter().find(|c| (c.generation, c.step) == (point.generation, point.step));
                let Some(committed) = committed else { continue };
                upkeep.known().reading = Some(point.clone());
                let looked = look(upkeep, committed, &busy).await;
                upkeep.known().reading = None;
                if let Err(error) = &looked {
                    tracing::debug!(%error, step = %point.step, "checkpoint could not be verified");
                }
                let now = begun.elapsed();
                if watched.first().is_some_and(|first| first.point == point) {
                    newest = Some(now);
                }
                if let Some(watched) = memory.get_mut(&(point.generation, point.step)) {
                    watched.looked = Some((now, looked.is_ok()));
                }
            }
        }
    }
}

/// Checks one checkpoint against the store's checksums, or reads its bytes if the store keeps none.
async fn look(upkeep: &Upkeep, committed: &Committed, busy: &watch::Receiver<bool>) -> Result<(), Error> {
    let mut report = verify(&upkeep.run, committed, Depth::Stored, &|_| {}).await?;
    if report.is_sound() && !report.is_verified() {
        report = verify_gently(&upkeep.run, committed, &Gentle { bytes_per_s: RATE, busy: busy.clone() }).await?;
    }
    if let Some((object, reason)) = report.damage() {
        let again = look_again(&upkeep.run, committed, &report).await?;
        if again.is_sound() {
            tracing::warn!(
                "{object}: {reason}; a second read was clean: reads are corrupted on the way to this machine"
            );
        }
        report = again;
    }
    let Report { step, generation, proof, .. } = report;
    match report.damage() {
        None => upkeep.vouch(&ResumePoint { step, generation }, proof),
        Some((object, reason)) => {
            let (object, reason) = (object.to_owned(), reason.to_string());
            upkeep.suspect(&Damage { step, generation, object, reason });
            upkeep.settle(busy).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::{
            condemn::Docket,
            testing::{Harm, checkpoint, config, harm, memory_store},
        },
        config::CheckpointConfig,
        ids::{NodeId, RunId, WorldSize},
        journal::{
            CheckpointStatus, Formed, FormedReason, Journal, JournalWriter, Record, RosterEntry, Succession, Urgency,
        },
        layout,
    };

    const DAY: Duration = Duration::from_secs(86_400);

    fn watched(step: u64, since: Elapsed, looked: Option<(Elapsed, bool)>) -> Watched {
        Watched { point: ResumePoint { step: Step(step), generation: Generation(1) }, since, looked }
    }

    fn minutes(count: u64) -> Duration {
        Duration::from_secs(60 * count)
    }

    #[test]
    fn the_newest_is_looked_at_soon_and_every_one_once_in_a_period() {
        let look = |step| Next::Look(ResumePoint { step: Step(step), generation: Generation(1) });
        assert_eq!(next(&[], None, DAY, minutes(5)), Next::Nothing);
        let new = [watched(3, minutes(8), None), watched(2, minutes(4), None), watched(1, minutes(0), None)];
        assert_eq!(next(&new, None, DAY, minutes(8)), Next::Wait(minutes(2)));
        assert_eq!(next(&new, None, DAY, minutes(10)), look(3));
        // One that was the newest was looked at a moment ago: this one can wait, and an older one comes first.
        assert_eq!(next(&new, Some(minutes(55)), DAY, minutes(58)), Next::Wait(minutes(2)));
        assert_eq!(next(&new, Some(minutes(55)), DAY, minutes(60)), look(1));
        assert_eq!(next(&new, Some(minutes(55)), DAY, minutes(65)), look(1), "due for longer");
        let looked = Some((minutes(60), true));
        let seen = [watched(3, minutes(0), looked), watched(2, minutes(0), looked)];
        assert_eq!(next(&seen, Some(minutes(60)), DAY, minutes(100)), Next::Wait(DAY - minutes(40)));
        assert_eq!(next(&seen, Some(minutes(60)), DAY, minutes(60) + DAY), look(3), "of equals the newer");
        // A store that failed is asked again before the period is over, and not at once.
        let failed = [watched(3, minutes(0), Some((minutes(60), false)))];
        assert_eq!(next(&failed, Some(minutes(60)), DAY, minutes(61)), Next::Wait(minutes(9)));
        assert_eq!(next(&failed, Some(minutes(60)), DAY, minutes(70)), look(3));
        // A short period bounds every wait.
        let second = Duration::from_secs(1);
        assert_eq!(next(&new, None, second, minutes(9)), look(3));
        assert_eq!(next(&new, Some(minutes(9)), second, minutes(9)), look(1));
        assert_eq!(next(&failed, None, second, minutes(60) + second), look(3));
    }

    /// A journal whose generation 1 has committed steps 1 to 3, in a store that keeps no checksums.
    async fn upkeep() -> (Arc<Upkeep>, Vec<Committed>) {
        let (run, node) = (memory_store(), NodeId::random());
        let run_id = RunId::new("run").unwrap();
        let mut journal = Journal::create(run.clone(), node.clone(), run_id, config()).await.unwrap();
        let formed = Formed {
            roster: vec![RosterEntry::new(node, 1)],
            world_size: WorldSize(1),
            resume: None,
            overrides: Vec::new(),
            reason: FormedReason::Started,
            data: None,
            succession: Succession::default(),
        };
        journal.form(formed).await.unwrap();
        let mut list = Vec::new();
        for step in 1..=3 {
            let (committed, _) = checkpoint(&run, step, 1, 1, step).await;
            journal.append(Record::Committed(committed.clone())).await.unwrap();
            list.push(committed);
        }
        let config = CheckpointConfig { scrub: Some(DAY), ..config().checkpoint };
        (Arc::new(Upkeep::new(&run, &JournalWriter::start(journal), config, &Docket::default())), list)
    }

    async fn status(upkeep: &Upkeep, step: u64) -> CheckpointStatus {
        upkeep.journal.state().checkpoint(Step(step), Generation(1)).unwrap().status.clone()
    }

    #[tokio::test]
    async fn without_stored_checksums_bytes_are_read_and_what_has_rotted_is_written_down() {
        let (upkeep, list) = upkeep().await;
        let (_idle, busy) = watch::channel(false);
        look(&upkeep, &list[0], &busy).await.unwrap();
        assert_eq!(upkeep.known().verified, [ResumePoint { step: Step(1), generation: Generation(1) }]);
        assert_eq!(status(&upkeep, 1).await, CheckpointStatus::Good);
        let folder = layout::checkpoint(Step(3), Generation(1));
        let object = harm(&upkeep.run, &folder, "optimizer-00001-of-00001.safetensors", Harm::Flip).await;
        look(&upkeep, &list[2], &busy).await.unwrap();
        match status(&upkeep, 3).await {
            CheckpointStatus::Damaged { reason } => assert!(reason.starts_with(&object), "{reason}"),
            other => panic!("{other:?}"),
        }
        assert!(!upkeep.run.list(&folder).await.unwrap().is_empty(), "its bytes stay");
        let records = upkeep.journal.state().next();
        look(&upkeep, &list[2], &busy).await.unwrap();
        assert_eq!(upkeep.journal.state().next(), records, "said once");
    }

    #[tokio::test]
    async fn a_checkpoint_that_was_pruned_while_it_was_read_is_not_called_damaged() {
        let (upkeep, list) = upkeep().await;
        let (_idle, busy) = watch::channel(false);
        let (step, generation) = (Step(1), Generation(1));
        upkeep.journal.append(Urgency::Commit, Record::Pruned { step, generation }).await.unwrap();
        crate::checkpoint::prune::delete_folder(&upkeep.run, step, generation).await.unwrap();
        let records = upkeep.journal.state().next();
        look(&upkeep, &list[0], &busy).await.unwrap();
        assert_eq!(status(&upkeep, 1).await, CheckpointStatus::Pruned);
        assert_eq!(upkeep.journal.state().next(), records, "nothing is written down");
        assert!(upkeep.known().verified.is_empty());
    }

    #[tokio::test]
    async fn what_a_killed_deletion_has_left_is_swept() {
        let (upkeep, _) = upkeep().await;
        let (step, generation) = (Step(1), Generation(1));
        assert_eq!(sweep(&upkeep).await.unwrap(), 0);
        upkeep.journal.append(Urgency::Commit, Record::Pruned { step, generation }).await.unwrap();
        assert!(sweep(&upkeep).await.unwrap() > 0);
        assert!(upkeep.run.list(&layout::checkpoint(step, generation)).await.unwrap().is_empty());
    }
}
