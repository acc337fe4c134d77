//! Opens a run: from a configuration to the journal and the prepared work.
//!
//! Everything that the configuration names is checked before a new run is created. Nothing is stored here but the
//! journal's first record and the data set's copy on this machine; both may be dropped at any moment.

use std::{cell::Cell, sync::Arc};

use tokio::sync::mpsc;

use super::{Afterwards, Begin, Manner};
use crate::{
    config::{NoticeConfig, RunConfig, apply_overrides, canonical_overrides},
    error::Result,
    ids::{NodeId, RunId, Step},
    journal::{self, Journal, JournalError, RunState},
    report::Reporter,
    storage::Store,
    workload::{self, Site, Workload},
};

/// A journal, the configuration that holds for its run, the settings that this command changes, and the checkpoint that
/// it names.
pub type Opened = (Journal, Resolved, Vec<(String, String)>, Option<Step>);

/// Everything that all generations of this agent have in common.
pub struct Resolved {
    pub config: RunConfig,
    pub workload: Arc<Workload>,
}

impl Resolved {
    fn new(config: &RunConfig, workload: Workload) -> Self {
        Self { config: config.clone(), workload: Arc::new(workload) }
    }

    /// Of a run that is about to be created.
    async fn of_new_run(config: &RunConfig, site: Site<'_>) -> Result<Self> {
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

/// The inputs for opening a run.
pub struct Opening<'a> {
    pub run: &'a Store,
    pub node: &'a NodeId,
    pub run_id: &'a RunId,
    pub nproc_per_node: Option<u32>,
    pub manner: &'a Manner,
    /// Receives the configuration's settings for notices as soon as they are known.
    pub settings: &'a mpsc::UnboundedSender<NoticeConfig>,
    /// Set before the request that creates the run.
    pub exists: &'a Cell<bool>,
}

impl Opening<'_> {
    /// Opens or creates the journal and checks everything that the configuration names. `Err`: the run has completed;
    /// what to do with this machine then.
    pub async fn open(self, begin: Begin, reporter: &Reporter) -> Result<Result<Opened, Afterwards>> {
        let Self { run, node, run_id, nproc_per_node, manner, settings, exists } = self;
        let site = Site { nproc_per_node, cache: manner.cache.as_deref(), reporter };
        // The receiver waits for the end of this function.
        let configured = |config: &RunConfig| drop(settings.send(config.notice.clone()));
        let (from, overrides, journal) = match begin {
            Begin::Create(config) => {
                configured(&config);
                // Everything that the configuration names is checked before the run exists.
                let resolved = Resolved::of_new_run(&config, site).await?;
                exists.set(true);
                let journal = Journal::create(run.clone(), node.clone(), run_id.clone(), *config).await?;
                return Ok(Ok((journal, resolved, Vec::new(), None)));
            }
            Begin::CreateOrResume { config, overrides } => {
                configured(&config);
                match Resolved::of_new_run(&config, site).await {
                    Ok(resolved) => {
                        exists.set(true);
                        match Journal::create(run.clone(), node.clone(), run_id.clone(), *config).await {
                            Ok(journal) => return Ok(Ok((journal, resolved, Vec::new(), None))),
                            Err(JournalError::Exists { .. }) => {
                                (None, overrides, Journal::open(run.clone(), node.clone(), run_id.clone()).await?)
                            }
                            Err(error) => return Err(error.into()),
                        }
                    }
                    // A refused configuration creates no run; an existing run continues as it was created.
                    Err(refused) => match Journal::open(run.clone(), node.clone(), run_id.clone()).await {
                        Ok(journal) => {
                            exists.set(true);
                            (None, overrides, journal)
                        }
                        Err(_) => return Err(refused),
                    },
                }
            }
            Begin::Resume { from, overrides, state } => {
                (from, overrides, Journal::follow(run.clone(), node.clone(), *state).await?)
            }
        };
        let (config, overrides) = effective(journal.state(), &overrides)?;
        if let Some(step) = completed(journal.state(), &config, from) {
            tracing::info!(run = %run_id, %step, "run has completed, nothing is left to do");
            return Ok(Err(manner.then(&config, false)));
        }
        configured(&config);
        let accepted = manner.accepts_data || workload::names_data(&overrides);
        let resolved = Resolved::of_existing_run(&config, site, run, journal.state(), accepted).await?;
        Ok(Ok((journal, resolved, overrides, from)))
    }
}

/// The last step of a completed run; `None` if it has not completed, was given more steps, or is told to go back.
pub fn completed(state: &RunState, config: &RunConfig, from: Option<Step>) -> Option<Step> {
    match state.outcome() {
        journal::Outcome::Completed { step, .. } if from.is_none() && config.workload.last_step() <= *step => {
            Some(*step)
        }
        _ => None,
    }
}

/// The configuration that holds now: as created, with the changes of every generation and of this command; and this
/// command's changes in the form in which the journal keeps them.
pub fn effective(state: &RunState, typed: &[(String, String)]) -> Result<(RunConfig, Vec<(String, String)>)> {
    let base = apply_overrides(state.config(), &state.overrides())?;
    Ok((apply_overrides(&base, typed)?, canonical_overrides(&base, typed)?))
}
