//! Opens a run: finds it in a store, and creates or resumes it on this node.
//!
//! [`find`] is the first half, for every command that trains: `resume`, `boot` and the queue's consumer. `Opening` is
//! the second, on the agent: from a [`Begin`] to a journal and everything that generations are made of.
//!
//! A store is opened twice. The first time, to find the run, it is opened with the command's settings (`--set
//! storage.attempts=…`). If the run exists, the store is opened again with the run's settings, including the changes of
//! later generations and of this command: encryption, storage class and limits hold on every machine.
//!
//! Everything that a configuration names is checked before its run is created.
//!
//! # Crash, retry, cancel
//! Nothing is stored here but the journal's first record and the dataset's copy on this machine. All of it may be
//! dropped at any moment; `Opening::exists` says whether the run may exist by then.

use std::cell::Cell;

use jiff::Timestamp;
use tokio::sync::mpsc;

use super::{
    launch::{Begin, LaunchOptions, OnComplete},
    resolved::Resolved,
    words,
};
use crate::{
    config::{NoticeConfig, RunConfig, StorageConfig, TrainTask, apply_overrides, canonical_overrides},
    error::Result,
    history::{self, spent::at_cap},
    ids::{NodeId, RunId, Step},
    journal::{self, EarlyStop, Journal, JournalError, Reached, RunState},
    report::Reporter,
    storage::Store,
    workload::{self, Site},
};

/// Settings and their values, as `--set key=value`.
pub(super) type Overrides = Vec<(String, String)>;

/// The state of a run in a store.
#[derive(Debug)]
pub enum Found {
    /// It does not exist.
    New,
    /// It has steps left to train.
    Existing(Existing),
    /// Its last step is committed, and this command gives it no more steps.
    Complete(Existing, Completed),
    /// It has reached a cap, and this command gives it no higher one.
    Capped(Existing, Reached),
}

/// An existing run.
#[derive(Debug)]
pub struct Existing {
    /// The store that holds it, opened with the run's settings.
    pub store: Store,
    /// Its journal's state.
    pub state: Box<RunState>,
    /// Its settings: as created, with the changes of later generations and of this command.
    pub config: RunConfig,
    overrides: Overrides,
}

/// How a run was completed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Completed {
    /// Its last step.
    pub step: Step,
    /// The loss of that step, if it has one.
    pub loss: Option<f64>,
    /// Why there is no other, if it stopped early.
    pub early: Option<EarlyStop>,
}

/// Looks for run `run_id` in the store at `uri`, opened with the settings `reading`; `overrides` are this command's.
pub async fn find(uri: &str, reading: &StorageConfig, run_id: &RunId, overrides: Overrides) -> Result<Found> {
    let store = Store::open(uri, reading)?;
    let state = match journal::replay(&store.folder(run_id.as_str()), run_id).await {
        Ok(state) => Box::new(state),
        Err(JournalError::NoSuchRun { .. }) => return Ok(Found::New),
        Err(error) => return Err(error.into()),
    };
    let (config, _) = effective(&state, &overrides)?;
    let store = Store::open(&store.uri(), &config.storage)?;
    let completed = completed(&state, &config.workload);
    let capped = at_cap(&state, &config, Timestamp::now());
    let existing = Existing { store, state, config, overrides };
    Ok(match (completed, capped) {
        (Some(completed), _) => Found::Complete(existing, completed),
        (None, Some(cap)) => Found::Capped(existing, cap),
        (None, None) => Found::Existing(existing),
    })
}

impl Found {
    /// The run, which must exist.
    pub fn existing(self, run_id: &RunId, uri: &str) -> Result<Existing> {
        match self {
            Self::Existing(existing) | Self::Complete(existing, _) | Self::Capped(existing, _) => Ok(existing),
            Self::New => Err(JournalError::NoSuchRun { run_id: run_id.clone(), store: uri.to_owned() }.into()),
        }
    }
}

impl Existing {
    /// Its store, and how an agent resumes it: from the newest checkpoint, or from that of step `from`.
    pub fn resume(self, from: Option<Step>) -> (Store, Begin) {
        (self.store, Begin::Resume { from, overrides: self.overrides, state: self.state })
    }
}

/// The configuration that holds now: as created, with the changes of every generation and of this command; and this
/// command's changes in the form in which the journal keeps them.
pub(super) fn effective(state: &RunState, typed: &[(String, String)]) -> Result<(RunConfig, Overrides)> {
    let base = apply_overrides(state.config(), &state.overrides())?;
    Ok((apply_overrides(&base, typed)?, canonical_overrides(&base, typed)?))
}

/// How the run was completed; `None`: it was not, or was given more steps since, or more patience.
pub(super) fn completed(state: &RunState, task: &TrainTask) -> Option<Completed> {
    match state.outcome() {
        journal::Outcome::Completed { step, loss, early, .. }
            if task.last_step() <= *step
                || early.is_some_and(|early| early.holds(task.train.early_stopping.as_ref())) =>
        {
            Some(Completed { step: *step, loss: *loss, early: *early })
        }
        _ => None,
    }
}

/// A run on this node, opened.
pub(super) enum Opened {
    /// It has steps left to train.
    Ready(Box<Ready>),
    /// It is complete.
    Complete(OnComplete),
    /// It has reached a cap.
    Capped(Reached, OnComplete),
}

/// The inputs of a run's first generation on this node.
pub(super) struct Ready {
    pub journal: Journal,
    pub resolved: Resolved,
    /// This command's changes of settings, as the journal keeps them.
    pub overrides: Overrides,
    /// The checkpoint that this command names.
    pub from: Option<Step>,
}

/// An existing run, as its journal stands now.
pub(super) enum Standing {
    /// It has steps left to train.
    Open(Box<Resolved>, Overrides),
    /// Its last step is committed.
    Complete(Step, OnComplete),
    /// It has reached a cap.
    Capped(Reached, OnComplete),
}

/// The inputs for resolving a run.
pub(super) struct Resolving<'a> {
    pub run: &'a Store,
    pub nproc_per_node: Option<u32>,
    pub options: &'a LaunchOptions,
    pub reporter: &'a Reporter,
    /// Receives the configuration's settings for notices as soon as they are known.
    pub settings: &'a mpsc::UnboundedSender<NoticeConfig>,
}

impl Resolving<'_> {
    fn known(&self, config: &RunConfig) {
        // The receiver waits for the end of the work that this is part of.
        let _ = self.settings.send(config.notice.clone());
    }

    /// Checks everything that a new run's configuration names, and fetches its data.
    async fn new_run(&self, config: &RunConfig) -> Result<Resolved> {
        self.options.nodes.carry(config)?;
        let resolved = Resolved::of_new_run(config, self.site()).await?;
        resolved.workload.verify().await?;
        Ok(resolved)
    }

    fn site(&self) -> Site<'_> {
        let Self { nproc_per_node, reporter, .. } = *self;
        Site { nproc_per_node, cache: self.options.cache.as_deref(), reporter }
    }

    /// The same for an existing run, with this command's changes `typed`. Going back to the checkpoint of step `from`
    /// reopens a complete run.
    pub async fn existing_run(
        &self,
        state: &RunState,
        typed: &[(String, String)],
        from: Option<Step>,
    ) -> Result<Standing> {
        let (config, overrides) = effective(state, typed)?;
        if let Some(Completed { step, early, .. }) = completed(state, &config.workload).filter(|_| from.is_none()) {
            if let Some(early) = early {
                let hint = crate::workload::words::stops_later(&early);
                tracing::info!("stopped early after step {step}: {early}; {hint}");
            }
            return Ok(Standing::Complete(step, self.options.then(&config, false)));
        }
        // Going back to an earlier checkpoint gives it no more time or money.
        if let Some(cap) = at_cap(state, &config, Timestamp::now()) {
            return Ok(Standing::Capped(cap, self.options.then(&config, false)));
        }
        if let Some(most) = config.restart.fruitless_starts
            && overrides.is_empty()
            && from.is_none()
            && history::fruitless_starts(state) >= most
        {
            return Err(words::fruitless(state, most));
        }
        self.known(&config);
        self.options.nodes.carry(&config)?;
        let accepted = self.options.accepts_data || workload::names_data(&overrides);
        let resolved = Resolved::of_existing_run(&config, self.site(), self.run, state, accepted).await?;
        Ok(Standing::Open(Box::new(resolved), overrides))
    }
}

/// The inputs for opening a run on this node.
pub(super) struct Opening<'a> {
    pub resolving: Resolving<'a>,
    pub node: &'a NodeId,
    pub run_id: &'a RunId,
    /// Set before the request that creates the run.
    pub exists: &'a Cell<bool>,
}

impl Opening<'_> {
    /// Opens or creates the journal, and checks everything that the configuration names.
    pub async fn open(self, begin: Begin) -> Result<Opened> {
        let (run, node, run_id) = (self.resolving.run, self.node, self.run_id);
        let (from, typed, journal) = match begin {
            Begin::Create(config) => {
                self.resolving.known(&config);
                let resolved = self.resolving.new_run(&config).await?;
                return Ok(created(self.create(resolved.config.clone()).await?, resolved));
            }
            Begin::CreateOrResume { config, overrides } => {
                self.resolving.known(&config);
                let journal = match self.resolving.new_run(&config).await {
                    Ok(resolved) => match self.create(resolved.config.clone()).await {
                        Ok(journal) => return Ok(created(journal, resolved)),
                        Err(JournalError::Exists { .. }) => {
                            Journal::open(run.clone(), node.clone(), run_id.clone()).await?
                        }
                        Err(error) => return Err(error.into()),
                    },
                    // A refused configuration creates no run; an existing run continues as it was created.
                    Err(refused) => match Journal::open(run.clone(), node.clone(), run_id.clone()).await {
                        Ok(journal) => {
                            self.exists.set(true);
                            journal
                        }
                        Err(_) => return Err(refused),
                    },
                };
                (None, overrides, journal)
            }
            Begin::Resume { from, overrides, state } => {
                (from, overrides, Journal::follow(run.clone(), node.clone(), *state).await?)
            }
        };
        match self.resolving.existing_run(journal.state(), &typed, from).await? {
            Standing::Open(resolved, overrides) => {
                Ok(Opened::Ready(Box::new(Ready { journal, resolved: *resolved, overrides, from })))
            }
            Standing::Complete(step, then) => {
                tracing::info!(run = %run_id, %step, "run has completed, nothing is left to do");
                Ok(Opened::Complete(then))
            }
            Standing::Capped(cap, then) => Ok(Opened::Capped(cap, then)),
        }
    }

    async fn create(&self, config: RunConfig) -> Result<Journal, JournalError> {
        self.exists.set(true);
        Journal::create(self.resolving.run.clone(), self.node.clone(), self.run_id.clone(), config).await
    }
}

/// A run that this command has created as it is: there is nothing to change and nothing to go back to.
fn created(journal: Journal, resolved: Resolved) -> Opened {
    Opened::Ready(Box::new(Ready { journal, resolved, overrides: Vec::new(), from: None }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::testing::{STORAGE, checkpoint, config},
        config::NoticeConfig,
        ids::{Generation, NodeId, WorldSize},
        journal::{Formed, FormedReason, Journal, Record, RosterEntry, Succession},
    };

    fn pairs(set: &[(&str, &str)]) -> Vec<(String, String)> {
        set.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    /// A run of one step in a folder, whose generation changed `storage.attempts`; complete if `complete`.
    async fn run(complete: bool) -> (tempfile::TempDir, String, RunId) {
        let folder = tempfile::tempdir().unwrap();
        let uri = format!("file://{}", folder.path().display());
        let (node, run_id) = (NodeId::random(), RunId::new("run").unwrap());
        let run = Store::open(&uri, &STORAGE).unwrap().folder(run_id.as_str());
        let mut config = config();
        (config.workload.train.steps, config.workload.train.schedule.warmup_steps) = (1, 0);
        (config.workload.data.validation_sequences, config.notice) = (1, NoticeConfig::default());
        let mut journal = Journal::create(run.clone(), node.clone(), run_id.clone(), config).await.unwrap();
        let formed = Formed {
            roster: vec![RosterEntry::new(node, 1)],
            world_size: WorldSize(1),
            resume: None,
            overrides: pairs(&[("storage.attempts", "3")]),
            reason: FormedReason::Started,
            data: None,
            succession: Succession::default(),
        };
        journal.form(formed).await.unwrap();
        if complete {
            let (committed, _) = checkpoint(&run, 1, 1, 1, 1).await;
            journal.append(Record::Committed(committed)).await.unwrap();
            let completed =
                Record::Completed { generation: Generation(1), step: Step(1), loss: Some(0.5), early: None };
            journal.append(completed).await.unwrap();
        }
        (folder, uri, run_id)
    }

    #[tokio::test]
    async fn a_run_is_new_existing_or_complete() {
        let (_folder, uri, run_id) = run(false).await;
        let other = RunId::new("other").unwrap();
        assert!(matches!(find(&uri, &STORAGE, &other, Vec::new()).await.unwrap(), Found::New));
        let error = Found::New.existing(&other, &uri).unwrap_err();
        assert!(error.to_string().contains("run id other does not exist"), "{error}");
        assert!(matches!(find(&uri, &STORAGE, &run_id, Vec::new()).await.unwrap(), Found::Existing(_)));
        let (_folder, uri, run_id) = run(true).await;
        let found = find(&uri, &STORAGE, &run_id, Vec::new()).await.unwrap();
        assert!(
            matches!(found, Found::Complete(_, Completed { step: Step(1), loss: Some(0.5), early: None })),
            "{found:?}"
        );
    }

    #[tokio::test]
    async fn a_complete_run_that_is_given_more_steps_is_not_complete() {
        let (_folder, uri, run_id) = run(true).await;
        for (steps, complete) in [("1", true), ("2", false)] {
            let found = find(&uri, &STORAGE, &run_id, pairs(&[("train.steps", steps)])).await.unwrap();
            assert_eq!(matches!(found, Found::Complete(..)), complete, "{steps}");
        }
    }

    #[tokio::test]
    async fn the_store_is_used_as_the_run_and_this_command_say() {
        let (_folder, uri, run_id) = run(false).await;
        let found = find(&uri, &STORAGE, &run_id, pairs(&[("storage.concurrency", "5")])).await.unwrap();
        let existing = found.existing(&run_id, &uri).unwrap();
        assert_eq!((existing.config.storage.attempts, existing.config.storage.concurrency), (3, 5));
        let (store, begin) = existing.resume(Some(Step(0)));
        assert_eq!(store.uri(), uri);
        let Begin::Resume { from: Some(Step(0)), overrides, .. } = begin else { panic!("{begin:?}") };
        assert_eq!(overrides, pairs(&[("storage.concurrency", "5")]));
        // Only S3 encrypts: the store itself is opened again, with these settings.
        let encrypted = pairs(&[("storage.encryption", "sse-s3")]);
        let error = find(&uri, &STORAGE, &run_id, encrypted).await.unwrap_err();
        assert!(error.to_string().contains("storage.encryption"), "{error}");
    }

    #[tokio::test]
    async fn a_complete_run_is_resolved_no_further_unless_it_is_to_go_back() {
        let (_folder, uri, run_id) = run(true).await;
        let found = find(&uri, &STORAGE, &run_id, Vec::new()).await.unwrap();
        let Existing { store, state, .. } = found.existing(&run_id, &uri).unwrap();
        let (folder, options, reporter) = (store.folder(run_id.as_str()), LaunchOptions::default(), Reporter::silent());
        let (settings, mut known) = mpsc::unbounded_channel();
        let (run, options, reporter, settings) = (&folder, &options, &reporter, &settings);
        let resolving = Resolving { run, nproc_per_node: None, options, reporter, settings };
        let Standing::Complete(step, _) = resolving.existing_run(&state, &[], None).await.unwrap() else { panic!() };
        assert_eq!(step, Step(1));
        assert!(known.try_recv().is_err(), "nothing is resolved");
        // Its data does not exist.
        assert!(resolving.existing_run(&state, &[], Some(Step(1))).await.is_err());
        let more = pairs(&[("train.steps", "2"), ("notice.lifecycle_hook", "hook")]);
        assert!(resolving.existing_run(&state, &more, None).await.is_err());
        let told = [known.try_recv().unwrap(), known.try_recv().unwrap()].map(|notice| notice.lifecycle_hook);
        assert_eq!(told, ["auto", "hook"], "settings for notices are known before anything is fetched");
    }

    #[tokio::test]
    async fn settings_that_a_run_keeps_for_life_are_refused() {
        let (_folder, uri, run_id) = run(false).await;
        let error = find(&uri, &STORAGE, &run_id, pairs(&[("data.sequence_length", "7")])).await.unwrap_err();
        assert_eq!(error.kind(), crate::error::Kind::Config);
    }
}
