//! Finds a run, for every command that trains: `resume`, `boot` and the queue's consumer.
//!
//! A store is opened twice. The first time, to find the run, it is opened with the command's settings (`--set
//! storage.attempts=…`). If the run exists, the store is opened again with the run's settings, including the changes of
//! later generations and of this command: encryption, storage class and limits hold on every machine.
//!
//! # Does not own
//! The creation of a run: the agent does that after it has checked everything that the configuration names.

use crate::{
    agent::{self, Begin},
    config::{RunConfig, StorageConfig},
    error::Result,
    ids::{RunId, Step},
    journal::{self, JournalError, RunState},
    storage::Store,
};

/// The state of a run in a store.
#[derive(Debug)]
pub enum Found {
    /// It does not exist.
    New,
    /// It has steps left to train.
    Existing(Existing),
    /// Its last step is committed, and this command gives it no more steps.
    Complete(Existing, Completed),
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
    overrides: Vec<(String, String)>,
}

/// How a run was completed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Completed {
    /// Its last step.
    pub step: Step,
    /// The loss of that step, if it has one.
    pub loss: Option<f64>,
}

/// Looks for run `run_id` in the store at `uri`, opened with the settings `reading`; `overrides` are this command's.
pub async fn find(
    uri: &str,
    reading: &StorageConfig,
    run_id: &RunId,
    overrides: Vec<(String, String)>,
) -> Result<Found> {
    let store = Store::open(uri, reading)?;
    let state = match journal::replay(&store.folder(run_id.as_str()), run_id).await {
        Ok(state) => Box::new(state),
        Err(JournalError::NoSuchRun { .. }) => return Ok(Found::New),
        Err(error) => return Err(error.into()),
    };
    let (config, _) = agent::effective(&state, &overrides)?;
    let store = Store::open(&store.uri(), &config.storage)?;
    let completed = match state.outcome() {
        journal::Outcome::Completed { step, loss, .. } if config.workload.last_step() <= *step => {
            Some(Completed { step: *step, loss: *loss })
        }
        _ => None,
    };
    let existing = Existing { store, state, config, overrides };
    Ok(match completed {
        Some(completed) => Found::Complete(existing, completed),
        None => Found::Existing(existing),
    })
}

impl Found {
    /// The run, which must exist.
    pub fn existing(self, run_id: &RunId, uri: &str) -> Result<Existing> {
        match self {
            Self::Existing(existing) | Self::Complete(existing, _) => Ok(existing),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::testing::{STORAGE, checkpoint, config},
        config::NoticeConfig,
        ids::{Generation, NodeId, WorldSize},
        journal::{Formed, FormedReason, Journal, Record, RosterEntry},
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
            roster: vec![RosterEntry { node, workers: 1 }],
            world_size: WorldSize(1),
            resume: None,
            overrides: pairs(&[("storage.attempts", "3")]),
            reason: FormedReason::Started,
            data: None,
        };
        journal.form(formed).await.unwrap();
        if complete {
            let (committed, _) = checkpoint(&run, 1, 1, 1, 1).await;
            journal.append(Record::Committed(committed)).await.unwrap();
            let completed = Record::Completed { generation: Generation(1), step: Step(1), loss: Some(0.5) };
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
        assert!(matches!(found, Found::Complete(_, Completed { step: Step(1), loss: Some(0.5) })), "{found:?}");
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
    }

    #[tokio::test]
    async fn settings_that_a_run_keeps_for_life_are_refused() {
        let (_folder, uri, run_id) = run(false).await;
        let error = find(&uri, &STORAGE, &run_id, pairs(&[("data.sequence_length", "7")])).await.unwrap_err();
        assert_eq!(error.kind(), crate::error::Kind::Config);
    }
}
