//! What a run's journal tells a reader: a pure function of its entries, in order.
//!
//! The writers' own view (who may write, from where to resume) is the journal's; this one is for people, and takes the
//! times that people want to see.

use jiff::Timestamp;
use serde::Serialize;

use crate::{
    config::{self, RunConfig},
    ids::{Generation, Step, WorldSize},
    journal::{Committed, Entry, FormedReason, Record, ResumePoint},
};

/// What became of a run, as far as its journal knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum State {
    /// No workers have been started yet.
    Created,
    /// A generation was formed and has not ended; whether its machine still lives the journal can't know.
    InProgress,
    /// Ended before the last step; to be resumed.
    Interrupted,
    /// The last step is committed.
    Completed,
    /// Needs a person; for this reason.
    Failed(String),
}

impl State {
    /// For a table.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::InProgress => "in progress",
            Self::Interrupted => "interrupted",
            Self::Completed => "completed",
            Self::Failed(_) => "failed",
        }
    }
}

/// What became of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Fate {
    /// Nobody has found anything wrong with it.
    Good,
    /// Found damaged; the object and what is wrong with it.
    Damaged(String),
    /// Deleted by plan.
    Pruned,
}

impl Fate {
    /// For a table.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Damaged(_) => "damaged",
            Self::Pruned => "pruned",
        }
    }
}

/// A checkpoint and what became of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Checkpoint {
    #[serde(flatten)]
    pub committed: Committed,
    pub at: Timestamp,
    pub fate: Fate,
}

/// An end before the last step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Interruption {
    pub at: Timestamp,
    pub generation: Generation,
    pub step: Step,
    pub lost_steps: u64,
    pub verdict: String,
}

/// A run, by its journal.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct History {
    pub created: Timestamp,
    pub last_activity: Timestamp,
    pub state: State,
    /// As it is now: with every change of a resume.
    pub config: RunConfig,
    /// Settings changed since the run was created, `(key, value)`, in order.
    pub overrides: Vec<(String, String)>,
    pub generation: Option<Generation>,
    pub world_size: Option<WorldSize>,
    pub resumed_from: Option<ResumePoint>,
    pub worker_restarts: u64,
    /// In the order of the journal.
    pub checkpoints: Vec<Checkpoint>,
    pub interruptions: Vec<Interruption>,
    /// The last step that any record names as finished.
    pub last_step: Option<Step>,
}

impl History {
    /// Reads the entries; `None` if the first is no `created`.
    pub fn of(entries: &[Entry]) -> Option<Self> {
        let (first, rest) = entries.split_first()?;
        let Record::Created { config, .. } = &first.record else { return None };
        let mut history = Self {
            created: first.at,
            last_activity: first.at,
            state: State::Created,
            config: (**config).clone(),
            overrides: Vec::new(),
            generation: None,
            world_size: None,
            resumed_from: None,
            worker_restarts: 0,
            checkpoints: Vec::new(),
            interruptions: Vec::new(),
            last_step: None,
        };
        for entry in rest {
            history.add(entry);
        }
        Some(history)
    }

    fn add(&mut self, entry: &Entry) {
        self.last_activity = entry.at;
        match &entry.record {
            Record::Created { .. } | Record::Notice { .. } => {}
            Record::Formed { generation, world_size, resume, overrides, reason, .. } => {
                self.state = State::InProgress;
                self.generation = Some(*generation);
                self.world_size = Some(*world_size);
                self.resumed_from.clone_from(resume);
                self.worker_restarts += u64::from(*reason == FormedReason::WorkerDied);
                // What was accepted once is accepted again; if a later version thinks otherwise, show what it still can.
                if let Ok(changed) = config::apply_overrides(&self.config, overrides) {
                    self.config = changed;
                }
                self.overrides.extend(overrides.iter().cloned());
            }
            Record::Committed(committed) => {
                self.last_step = Some(committed.step);
                self.checkpoints.push(Checkpoint { committed: committed.clone(), at: entry.at, fate: Fate::Good });
            }
            Record::Interrupted { generation, step, lost_steps, verdict, .. } => {
                self.state = State::Interrupted;
                self.last_step = Some(*step);
                self.interruptions.push(Interruption {
                    at: entry.at,
                    generation: *generation,
                    step: *step,
                    lost_steps: *lost_steps,
                    verdict: verdict.clone(),
                });
            }
            Record::Damaged { step, generation, reason } => {
                self.set_fate(*step, *generation, &Fate::Damaged(reason.clone()));
            }
            Record::Pruned { step, generation } => self.set_fate(*step, *generation, &Fate::Pruned),
            Record::Completed { step, .. } => {
                self.state = State::Completed;
                self.last_step = Some(*step);
            }
            Record::Failed { step, reason, .. } => {
                self.state = State::Failed(reason.clone());
                self.last_step = Some(*step);
            }
        }
    }

    fn set_fate(&mut self, step: Step, generation: Generation, fate: &Fate) {
        for checkpoint in &mut self.checkpoints {
            if (checkpoint.committed.step, checkpoint.committed.generation) == (step, generation) {
                checkpoint.fate = fate.clone();
            }
        }
    }

    /// Checkpoints that can be resumed from, as far as the journal knows.
    pub fn good(&self) -> impl DoubleEndedIterator<Item = &Checkpoint> {
        self.checkpoints.iter().filter(|checkpoint| checkpoint.fate == Fate::Good)
    }

    /// The newest of them.
    pub fn newest(&self) -> Option<&Checkpoint> {
        self.good().max_by_key(|checkpoint| (checkpoint.committed.generation, checkpoint.committed.step))
    }

    /// Steps that were done again, or are to be.
    pub fn lost_steps(&self) -> u64 {
        self.interruptions.iter().map(|interruption| interruption.lost_steps).sum()
    }
}
