//! What all generations of a run have in common on this node: its configuration, and its work, prepared.
//!
//! Everything that the configuration names is checked before a new run is created. Nothing is stored here but the
//! dataset's copy on this machine; it may be dropped at any moment.

use std::sync::Arc;

use crate::{
    config::RunConfig,
    error::{Error, Kind, Result},
    journal::RunState,
    shortage::{self, Shortage},
    storage::Store,
    workload::{Site, Workload},
};

/// What all generations of this node have in common.
pub struct Resolved {
    pub config: RunConfig,
    pub workload: Arc<Workload>,
}

impl Resolved {
    /// Refuses a run if the limit of open files is too low for its saves.
    fn new(config: &RunConfig, workload: Workload) -> Result<Self> {
        let needed = files(workload.workers(), config.storage.concurrency);
        if let Some(limit) = shortage::open_files().filter(|limit| *limit < needed) {
            let message = format!("this process may have {limit} open files, and its saves need {needed}");
            return Err(Error::new(Kind::Unavailable, message).with_hint(Shortage::Files.hint()));
        }
        let mut config = config.clone();
        // A new run names the files of its adapters' base.
        config.workload.model.lora = workload.lora().cloned();
        Ok(Self { config, workload: Arc::new(workload) })
    }

    /// Of a run that is about to be created: its configuration is the one to create it with.
    pub async fn of_new_run(config: &RunConfig, site: Site<'_>) -> Result<Self> {
        let workload = Workload::of_new_run(config, site).await?;
        // The number of steps may depend on the data.
        let config = RunConfig { workload: workload.task().clone(), ..config.clone() };
        Self::new(&config, workload)
    }

    /// Of an existing run; see [`Workload::of_existing_run`].
    pub async fn of_existing_run(
        config: &RunConfig,
        site: Site<'_>,
        run: &Store,
        state: &RunState,
        accepted: bool,
    ) -> Result<Self> {
        Self::new(config, Workload::of_existing_run(config, site, run, state, accepted).await?)
    }
}

/// The least open files with which a save succeeds: each worker's socket, pipe and process, a few transfers side by
/// side, and what every agent has open, generously.
fn files(workers: u32, transfers: u32) -> u64 {
    32 + 3 * u64::from(workers) + u64::from(transfers.min(16))
}
