//! What all generations of a run have in common on this node: its configuration, and its work, prepared.
//!
//! Everything that the configuration names is checked before a new run is created. Nothing is stored here but the
//! dataset's copy on this machine; it may be dropped at any moment.

use std::sync::Arc;

use crate::{
    config::RunConfig,
    error::Result,
    journal::RunState,
    storage::Store,
    workload::{Site, Workload},
};

/// What all generations of this node have in common.
pub struct Resolved {
    pub config: RunConfig,
    pub workload: Arc<Workload>,
}

impl Resolved {
    fn new(config: &RunConfig, workload: Workload) -> Self {
        Self { config: config.clone(), workload: Arc::new(workload) }
    }

    /// Of a run that is about to be created.
    pub async fn of_new_run(config: &RunConfig, site: Site<'_>) -> Result<Self> {
        Ok(Self::new(config, Workload::of_new_run(config, site).await?))
    }

    /// Of an existing run; see [`Workload::of_existing_run`].
    pub async fn of_existing_run(
        config: &RunConfig,
        site: Site<'_>,
        run: &Store,
        state: &RunState,
        accepted: bool,
    ) -> Result<Self> {
        Ok(Self::new(config, Workload::of_existing_run(config, site, run, state, accepted).await?))
    }
}
