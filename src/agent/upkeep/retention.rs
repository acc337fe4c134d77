//! `checkpoint.keep` while a run is alive: after a commit, checkpoints that are no longer wanted are deleted.
//!
//! Runs beside the event loop, one at a time; training does not wait for it. The rules are those of
//! [`crate::checkpoint::prune`]: a plan first, the journal's record before the data, never the newest checkpoint that
//! checksums vouch for, never the one that this generation resumed from. A failure deletes less than it might, and is
//! tried again after the next commit.
//!
//! It yields: the journal's writer prefers everything else, its small requests to the store wait in a queue of their
//! own, and it [ends](Retention::hush) at the first notice, and when the last state of a run is saved.
//!
//! Verified checkpoints are remembered for this generation ([`Known`]): those restored from, and those read. A store
//! that keeps checksums does not need this; it is asked each time. On another store the newest checkpoint that was read
//! stays beside the newest `keep.last`, until [`super::scrub`] has read a newer one.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};

use super::scrub;
use crate::{
    checkpoint::{
        catalog::Damage,
        condemn::Docket,
        prune::{Abandoned, Reading, apply_prune, doomed, plan_for},
        verify::{Gentle, Proof},
    },
    config::CheckpointConfig,
    error::Error,
    ids::{Generation, Step},
    journal::{CheckpointStatus, JournalWriter, Record, ResumePoint, RunState, Urgency},
    storage::Store,
};

/// What this generation knows of checkpoints beyond the journal.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Verified against checksums: restored from, or read.
    pub verified: Vec<ResumePoint>,
    /// Being read at the moment.
    pub reading: Option<ResumePoint>,
}

/// The shared inputs of retention and scrub.
#[derive(Debug)]
pub(super) struct Upkeep {
    /// The run's folder.
    pub run: Store,
    pub journal: JournalWriter,
    pub config: CheckpointConfig,
    /// A checkpoint was committed.
    pub committed: Notify,
    /// The damage that this process has found.
    pub docket: Docket,
    known: Mutex<Known>,
}

impl Upkeep {
    pub fn new(run: &Store, journal: &JournalWriter, config: CheckpointConfig, docket: &Docket) -> Self {
        let (run, journal, docket) = (run.for_upkeep(), journal.clone(), docket.clone());
        Self { run, journal, config, committed: Notify::new(), docket, known: Mutex::default() }
    }

    pub fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers that a checkpoint is verified: by the checksums that the store keeps, or by every byte of it.
    pub fn vouch(&self, point: &ResumePoint, proof: Proof) {
        self.docket.vouch(point, proof);
        let mut known = self.known();
        if !known.verified.contains(point) {
            known.verified.push(point.clone());
        }
    }

    /// A checkpoint was found damaged twice. It is only a suspect, unless the journal already says why it is not to be
    /// used.
    pub fn suspect(&self, damage: &Damage) {
        self.known().verified.retain(|point| !damage.is_of(point));
        let state = self.journal.state();
        let status = state.checkpoint(damage.step, damage.generation).map(|checkpoint| &checkpoint.status);
        if status == Some(&CheckpointStatus::Good) && self.docket.suspect(damage) {
            let Damage { step, object, reason, .. } = damage;
            tracing::warn!(%step, "checkpoint seems damaged: {object}: {reason}");
        }
    }

    /// Condemns a suspect, if this process can read another checkpoint in full.
    pub async fn settle(&self, busy: &watch::Receiver<bool>) -> Result<(), Error> {
        if !self.docket.has_suspects() {
            return Ok(());
        }
        let state = self.journal.state();
        let gentle = Gentle { bytes_per_s: scrub::RATE, busy: busy.clone() };
        if !self.docket.prove(&self.run, &state, Some(&gentle)).await? {
            tracing::warn!(
                "no checkpoint could be verified: this machine may be corrupting reads; nothing was condemned or \
                deleted"
            );
            return Ok(());
        }
        let Some((damage, record)) = self.docket.next_record(&self.journal.state()) else { return Ok(()) };
        let may = {
            let (docket, damage) = (self.docket.clone(), damage.clone());
            move |state: &RunState| docket.may_condemn(state, &damage)
        };
        if self.journal.append_if(Urgency::Housekeeping, record, may).await?.is_some() {
            self.docket.condemned(&damage);
            let Damage { step, object, reason, .. } = &damage;
            tracing::warn!(%step, "checkpoint is damaged and will not be resumed from: {object}: {reason}");
        }
        Ok(())
    }
}

/// Deletes by plan, and has kept checkpoints checked; dropped, it stops.
#[derive(Debug)]
pub struct Retention {
    upkeep: Arc<Upkeep>,
    busy: watch::Sender<bool>,
    pass: Option<JoinHandle<()>>,
    /// `None`: it was told to end.
    scrub: Option<JoinHandle<()>>,
}

impl Retention {
    /// Begins to care for a run's checkpoints; until [`busy`](Self::busy) says otherwise, there is more important work.
    pub fn begin(run: &Store, journal: &JournalWriter, config: CheckpointConfig, docket: &Docket) -> Self {
        let (upkeep, (busy, others)) = (Arc::new(Upkeep::new(run, journal, config, docket)), watch::channel(true));
        let scrub = tokio::spawn(scrub::run(Arc::clone(&upkeep), others));
        Self { upkeep, busy, pass: None, scrub: Some(scrub) }
    }

    /// A checkpoint was restored from, so every byte of its tensors was verified against its checksums.
    pub fn restored(&self, step: Step, generation: Generation) {
        self.upkeep.vouch(&ResumePoint { step, generation }, Proof::Bytes);
    }

    /// Whether the store has more important work than checking kept checkpoints: a restore, or a save.
    pub fn busy(&self, busy: bool) {
        self.busy.send_replace(busy);
    }

    /// Starts a pass after a commit, unless one is under way: the next commit asks again.
    pub fn start(&mut self) {
        self.upkeep.committed.notify_one();
        // It was ended for a save that a notice asked for, but the run goes on.
        let upkeep = &self.upkeep;
        self.scrub.get_or_insert_with(|| tokio::spawn(scrub::run(Arc::clone(upkeep), self.busy.subscribe())));
        if self.pass.as_ref().is_none_or(JoinHandle::is_finished) {
            self.spawn(false);
        }
    }

    fn spawn(&mut self, exact: bool) {
        let (upkeep, busy) = (Arc::clone(&self.upkeep), self.busy.subscribe());
        self.pass = Some(tokio::spawn(async move {
            match pass(&upkeep, exact, &busy).await {
                Ok(0) => {}
                Ok(deleted) => tracing::debug!(checkpoints = deleted, "old checkpoints deleted"),
                Err(error) => tracing::warn!(%error, "old checkpoints were not deleted"),
            }
        }));
    }

    /// Stops deletions and checks at once: the last saves have the store and the journal to themselves. Interrupted
    /// work is as good as never begun.
    pub fn hush(&mut self) {
        for task in self.scrub.take().into_iter().chain(self.pass.take()) {
            task.abort();
        }
        self.upkeep.known().reading = None;
    }

    /// Lets the pass under way finish, for at most `patience`.
    async fn finish(&mut self, patience: Duration) {
        if let Some(pass) = self.pass.take() {
            let stop = pass.abort_handle();
            if tokio::time::timeout(patience, pass).await.is_err() {
                stop.abort();
            }
        }
    }

    /// At the end of a run, if there is time: leaves the store exactly as `checkpoint.keep` says. Waits for at most
    /// `patience`.
    pub async fn complete(&mut self, patience: Duration) {
        self.hush();
        self.spawn(true);
        self.finish(patience).await;
    }
}

impl Drop for Retention {
    fn drop(&mut self) {
        self.hush();
    }
}

/// One pass. `exact`: the newest checkpoint itself is read if nothing verifies it, so that no older one need stay.
async fn pass(upkeep: &Upkeep, exact: bool, busy: &watch::Receiver<bool>) -> Result<usize, Error> {
    // Checkpoints that were skipped before another one was loaded. A machine that can read none in full deletes nothing
    // either.
    if upkeep.docket.is_distrusted() {
        return Ok(0);
    }
    upkeep.settle(busy).await?;
    let state = upkeep.journal.state();
    let (mut verified, reading) = {
        let known = upkeep.known();
        (known.verified.clone(), known.reading.clone())
    };
    if exact {
        let newest = state.newest().map(|newest| newest.point());
        verified.retain(|point| Some(point) == newest.as_ref());
    }
    let reading = reading.as_ref();
    let keep = upkeep.config.keep;
    let plan = plan_for(&upkeep.run, &state, keep, Abandoned::Keep, Reading::Unless(&verified), reading).await?;
    if let Some(point) = &plan.verified {
        upkeep.vouch(point, Proof::Checksum);
    }
    if !plan.damaged.is_empty() {
        for damage in &plan.damaged {
            upkeep.suspect(damage);
        }
        upkeep.settle(busy).await?;
    }
    if upkeep.docket.is_distrusted() {
        return Ok(0);
    }
    let doomed = doomed(&plan.fates);
    apply_prune(&upkeep.run, &doomed, |points| async move {
        let record = Record::pruned(points.clone());
        let stands = move |state: &RunState| {
            let status =
                |point: &ResumePoint| state.checkpoint(point.step, point.generation).map(|found| &found.status);
            points.iter().any(|point| status(point).is_some_and(|status| *status != CheckpointStatus::Pruned))
        };
        upkeep.journal.append_if(Urgency::Housekeeping, record, stands).await?;
        Ok::<_, Error>(())
    })
    .await?;
    Ok(doomed.len())
}
