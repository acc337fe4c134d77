//! `checkpoint.keep` while a run is alive: after a commit, what is no longer wanted goes.
//!
//! Runs beside the event loop, one at a time, and is not waited for by training. The rules are those of
//! [`crate::checkpoint::prune`]: a plan first, the journal's record before the data, never the newest checkpoint that verifies, never
//! the one that this generation resumed from. A failure deletes less than it might, and is tried again after the next commit.

use std::{sync::Arc, time::Duration};

use tokio::{sync::Mutex, task::JoinHandle};

use crate::{
    checkpoint::prune::{Abandoned, apply_prune, plan_for},
    config::Keep,
    error::Error,
    journal::{Journal, Record, ResumePoint},
    storage::Store,
};

/// What a killed upload has left in a local store is swept after so long; an upload under way is younger.
const STALE: Duration = Duration::from_secs(24 * 60 * 60);

/// Deletes by plan, one pass at a time.
#[derive(Debug, Default)]
pub struct Retention {
    running: Option<JoinHandle<()>>,
}

impl Retention {
    /// Starts a pass, unless one is under way: the next commit asks again.
    pub fn start(&mut self, run: &Store, journal: &Arc<Mutex<Journal>>, keep: Keep) {
        if self.running.as_ref().is_some_and(|running| !running.is_finished()) {
            return;
        }
        let (run, journal) = (run.clone(), Arc::clone(journal));
        self.running = Some(tokio::spawn(async move {
            match pass(&run, &journal, keep).await {
                Ok(0) => {}
                Ok(deleted) => tracing::debug!(checkpoints = deleted, "old checkpoints deleted"),
                Err(error) => tracing::warn!(%error, "old checkpoints were not deleted"),
            }
        }));
    }

    /// Lets the pass under way finish, for at most `patience`.
    pub async fn finish(&mut self, patience: Duration) {
        if let Some(running) = self.running.take() {
            let stop = running.abort_handle();
            if tokio::time::timeout(patience, running).await.is_err() {
                stop.abort();
            }
        }
    }
}

async fn pass(run: &Store, journal: &Arc<Mutex<Journal>>, keep: Keep) -> Result<usize, Error> {
    // A copy: looking at the store takes time, and commits must not wait for it.
    let state = journal.lock().await.state().clone();
    let plan = plan_for(run, &state, keep, Abandoned::Keep).await?;
    apply_prune(run, &plan, |ResumePoint { step, generation }| {
        let journal = Arc::clone(journal);
        async move {
            journal.lock().await.append(Record::Pruned { step, generation }).await?;
            Ok::<_, Error>(())
        }
    })
    .await?;
    run.sweep_unfinished(STALE).await?;
    Ok(plan.len())
}
