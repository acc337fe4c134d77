//! `checkpoint.keep` while a run is alive: after a commit, what is no longer wanted goes.
//!
//! Runs beside the event loop, one at a time, and is not waited for by training. The rules are those of
//! [`crate::checkpoint::prune`]: a plan first, the journal's record before the data, never the newest checkpoint that checksums
//! vouch for, never the one that this generation resumed from. A failure deletes less than it might, and is tried again
//! after the next commit.
//!
//! What has been held against its checksums is remembered for this life ([`Known`]): what was restored from, and what was
//! read. On a store that keeps checksums it is not needed, they are asked for each time. On another one the newest
//! checkpoint that was read stays beside the newest `keep.last`, until [`super::scrub`] has read a newer one.

use std::{
    sync::{Arc, Mutex as PlainMutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Mutex, Notify, watch},
    task::JoinHandle,
};

use super::scrub;
use crate::{
    checkpoint::{
        catalog::Damage,
        prune::{Abandoned, Reading, apply_prune, doomed, plan_for},
    },
    config::CheckpointConfig,
    error::Error,
    ids::{Generation, Step},
    journal::{CheckpointStatus, Journal, Record, ResumePoint},
    storage::Store,
};

/// What this life knows of checkpoints beyond what the journal says.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Held against checksums: restored from, or read.
    pub verified: Vec<ResumePoint>,
    /// Being read just now.
    pub reading: Option<ResumePoint>,
}

/// What retention and scrub work on.
#[derive(Debug)]
pub(super) struct Kept {
    /// The run's folder.
    pub run: Store,
    pub journal: Arc<Mutex<Journal>>,
    pub config: CheckpointConfig,
    /// A checkpoint was committed.
    pub committed: Notify,
    known: PlainMutex<Known>,
}

impl Kept {
    pub fn new(run: &Store, journal: &Arc<Mutex<Journal>>, config: CheckpointConfig) -> Self {
        let (run, journal) = (run.clone(), Arc::clone(journal));
        Self { run, journal, config, committed: Notify::new(), known: PlainMutex::default() }
    }

    pub fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers that checksums vouch for a checkpoint.
    pub fn vouch(&self, point: &ResumePoint) {
        let mut known = self.known();
        if !known.verified.contains(point) {
            known.verified.push(point.clone());
        }
    }

    /// Writes down what was found damaged, unless the journal already says why it is not to be used.
    pub async fn quarantine(&self, damage: &Damage) -> Result<(), Error> {
        let mut journal = self.journal.lock().await;
        let status = journal.state().checkpoint(damage.step, damage.generation).map(|checkpoint| &checkpoint.status);
        if status == Some(&CheckpointStatus::Good) {
            journal.append(damage.record()).await?;
            let Damage { step, object, reason, .. } = damage;
            tracing::warn!(%step, "checkpoint is damaged and will not be resumed from: {object}: {reason}");
        }
        self.known().verified.retain(|point| !damage.is_of(point));
        Ok(())
    }
}

/// Deletes by plan, and has what is kept looked at; dropped, it stops.
#[derive(Debug)]
pub struct Retention {
    kept: Arc<Kept>,
    busy: watch::Sender<bool>,
    pass: Option<JoinHandle<()>>,
    scrub: JoinHandle<()>,
}

impl Retention {
    /// Begins to care for a run's checkpoints; until [`busy`](Self::busy) says otherwise there is more important work.
    pub fn begin(run: &Store, journal: &Arc<Mutex<Journal>>, config: CheckpointConfig) -> Self {
        let (kept, (busy, others)) = (Arc::new(Kept::new(run, journal, config)), watch::channel(true));
        let scrub = tokio::spawn(scrub::run(Arc::clone(&kept), others));
        Self { kept, busy, pass: None, scrub }
    }

    /// A checkpoint was restored from, so every byte of its tensors was held against its checksums.
    pub fn restored(&self, step: Step, generation: Generation) {
        self.kept.vouch(&ResumePoint { step, generation });
    }

    /// Whether there is more important work for the store than looking at what is kept: a restore, or a save.
    pub fn busy(&self, busy: bool) {
        self.busy.send_replace(busy);
    }

    /// Starts a pass after a commit, unless one is under way: the next commit asks again.
    pub fn start(&mut self) {
        self.kept.committed.notify_one();
        if self.pass.as_ref().is_none_or(JoinHandle::is_finished) {
            self.spawn(false);
        }
    }

    fn spawn(&mut self, exact: bool) {
        let kept = Arc::clone(&self.kept);
        self.pass = Some(tokio::spawn(async move {
            match pass(&kept, exact).await {
                Ok(0) => {}
                Ok(deleted) => tracing::debug!(checkpoints = deleted, "old checkpoints deleted"),
                Err(error) => tracing::warn!(%error, "old checkpoints were not deleted"),
            }
        }));
    }

    /// Lets the pass under way finish, for at most `patience`.
    pub async fn finish(&mut self, patience: Duration) {
        if let Some(pass) = self.pass.take() {
            let stop = pass.abort_handle();
            if tokio::time::timeout(patience, pass).await.is_err() {
                stop.abort();
            }
        }
    }

    /// At the end of a run that has the time: the store is left exactly as `checkpoint.keep` says. Each of two passes is
    /// waited for for at most `patience`.
    pub async fn complete(&mut self, patience: Duration) {
        self.scrub.abort();
        self.kept.known().reading = None;
        self.finish(patience).await;
        self.spawn(true);
        self.finish(patience).await;
    }
}

impl Drop for Retention {
    fn drop(&mut self) {
        self.scrub.abort();
        if let Some(pass) = &self.pass {
            pass.abort();
        }
    }
}

/// One pass. `exact`: the newest checkpoint itself is read where nothing vouches for it, so that no older one need stay.
async fn pass(kept: &Kept, exact: bool) -> Result<usize, Error> {
    // A copy, which is cheap: looking at the store takes time, and commits must not wait for it.
    let state = kept.journal.lock().await.state().clone();
    let (mut verified, reading) = {
        let known = kept.known();
        (known.verified.clone(), known.reading.clone())
    };
    if exact {
        let newest = state.newest().map(|newest| newest.point());
        verified.retain(|point| Some(point) == newest.as_ref());
    }
    let reading = reading.as_ref();
    let keep = kept.config.keep;
    let plan = plan_for(&kept.run, &state, keep, Abandoned::Keep, Reading::Unless(&verified), reading).await?;
    for damage in &plan.damaged {
        kept.quarantine(damage).await?;
    }
    if let Some(point) = &plan.verified {
        kept.vouch(point);
    }
    let doomed = doomed(&plan.fates);
    apply_prune(&kept.run, &doomed, |points| async move {
        kept.journal.lock().await.append(Record::pruned(points)).await?;
        Ok::<_, Error>(())
    })
    .await?;
    Ok(doomed.len())
}
