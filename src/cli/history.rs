//! What a run's journal tells a reader: a pure function of its entries, in order.
//!
//! The writers' own view (who may write, from where to resume) is the journal's; this one is for people, and takes the
//! times that people want to see.

use jiff::Timestamp;
use serde::Serialize;

use super::args::RunArg;
use crate::{
    checkpoint::catalog,
    config::{self, RunConfig},
    error::{Context, Error, Kind, Result},
    ids::{Generation, RunId, Step, WorldSize},
    journal::{self, Committed, Entry, FormedReason, Record, ResumePoint},
    storage::Store,
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

/// Reads a run's journal. `root` is the store.
pub(super) async fn read(root: &Store, run_id: &RunId) -> Result<History> {
    let entries =
        journal::read(&root.folder(run_id.as_str())).await.context(format!("read journal of run {run_id}"))?;
    History::of(&entries).ok_or_else(|| no_such_run(root, run_id))
}

fn no_such_run(root: &Store, run_id: &RunId) -> Error {
    Error::new(Kind::Usage, format!("there is no run {run_id} in {}", root.uri()))
        .with_hint(format!("`trainer runs --store {}` lists the runs there are", root.uri()))
}

/// The checkpoint of a step, or the newest that is whole as far as sizes tell. Says which damaged ones were stepped over.
pub(super) async fn choose(run: &RunArg, step: Option<Step>) -> Result<(Store, Committed)> {
    let root = run.store.open()?;
    let history = read(&root, &run.run_id).await?;
    let folder = root.folder(run.run_id.as_str());
    let candidates: Vec<Committed> = history.good().map(|checkpoint| checkpoint.committed.clone()).collect();
    let outcome = catalog::newest_usable(&folder, &candidates, step).await?;
    for damage in outcome.stepped_over {
        tracing::warn!(step = %damage.step, object = damage.object, "checkpoint is damaged: {}", damage.reason);
    }
    let (committed, _) = outcome.found.ok_or_else(|| {
        let (kind, what) = if candidates.is_empty() {
            (Kind::Usage, format!("run {} has no checkpoint yet", run.run_id))
        } else {
            (Kind::Data, format!("none of the {} checkpoints of run {} is usable", candidates.len(), run.run_id))
        };
        Error::new(kind, what)
    })?;
    Ok((folder, committed))
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{
        ids::{AttemptId, NodeId},
        journal::{RosterEntry, SaveCost},
    };

    fn config() -> RunConfig {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("m.json"), "{}").unwrap();
        let set =
            [("model.config", "m.json"), ("data.train", "s3://b/d"), ("store", "s3://b/runs"), ("train.threads", "1")];
        config::load(&config::Sources {
            file: None,
            flags: vec![],
            set: &set.map(|(key, value)| (key.to_owned(), value.to_owned())),
            working_directory: folder.path(),
            machine: config::Machine { cores: 1, gpus: 0 },
            fetch: &|_, _| Err(String::new()),
        })
        .unwrap()
    }

    /// Entries with these records, a minute apart.
    pub fn entries(records: Vec<Record>) -> Vec<Entry> {
        let entry = |(i, record): (i64, Record)| Entry {
            format: 1,
            attempt: AttemptId::random(),
            at: Timestamp::from_second(1_000_000 + 60 * i).unwrap(),
            node: NodeId::new("n1").unwrap(),
            record,
        };
        (0..).zip(records).map(entry).collect()
    }

    pub fn created() -> Record {
        Record::Created { run_id: RunId::new("first").unwrap(), config: Box::new(config()) }
    }

    pub fn formed(generation: u64, resume: Option<(u64, u64)>, overrides: &[(&str, &str)]) -> Record {
        Record::Formed {
            generation: Generation(generation),
            roster: vec![RosterEntry { node: NodeId::new("n1").unwrap(), workers: 2 }],
            world_size: WorldSize(2),
            resume: resume
                .map(|(step, generation)| ResumePoint { step: Step(step), generation: Generation(generation) }),
            overrides: overrides.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            reason: if generation == 2 { FormedReason::WorkerDied } else { FormedReason::Started },
        }
    }

    pub fn committed(step: u64, generation: u64) -> Record {
        Record::Committed(Committed {
            step: Step(step),
            generation: Generation(generation),
            manifest: String::new(),
            manifest_crc64: String::new(),
            bytes: 3 << 20,
            loss: 2.5,
            validation_loss: None,
            cost: SaveCost { stall_s: 0.001, copy_s: 0.1, durable_s: 0.5 },
        })
    }

    pub fn story() -> Vec<Record> {
        vec![
            created(),
            formed(1, None, &[]),
            committed(10, 1),
            committed(20, 1),
            formed(2, Some((20, 1)), &[]),
            committed(30, 2),
            Record::Interrupted {
                generation: Generation(2),
                step: Step(34),
                committed: Some(Step(30)),
                lost_steps: 4,
                verdict: "no time".into(),
            },
            Record::Damaged { step: Step(30), generation: Generation(2), reason: "x is short".into() },
            formed(3, Some((20, 1)), &[("train.steps", "500")]),
            Record::Pruned { step: Step(10), generation: Generation(1) },
            committed(25, 3),
        ]
    }

    #[test]
    fn a_journal_is_read_as_a_story() {
        let history = History::of(&entries(story())).unwrap();
        assert_eq!(history.state, State::InProgress);
        assert_eq!((history.generation, history.world_size), (Some(Generation(3)), Some(WorldSize(2))));
        assert_eq!(history.config.train.steps, 500);
        assert_eq!((history.worker_restarts, history.lost_steps(), history.interruptions.len()), (1, 4, 1));
        let fates: Vec<_> = history.checkpoints.iter().map(|c| (c.committed.step.get(), c.fate.word())).collect();
        assert_eq!(fates, [(10, "pruned"), (20, "good"), (30, "damaged"), (25, "good")]);
        // The newest belongs to the newest generation, whatever steps older ones had reached.
        assert_eq!(history.newest().unwrap().committed.step, Step(25));
        assert_eq!(history.last_step, Some(Step(25)));
        assert_eq!(history.last_activity.as_second() - history.created.as_second(), 600);
    }

    #[test]
    fn ends_are_told_apart() {
        let state = |last| History::of(&entries(vec![created(), formed(1, None, &[]), last])).unwrap().state;
        let (generation, step) = (Generation(1), Step(9));
        assert_eq!(state(Record::Completed { generation, step, loss: 1.0 }), State::Completed);
        assert_eq!(state(Record::Failed { generation, step, reason: "x".into() }), State::Failed("x".into()));
        assert_eq!(state(Record::Notice { generation, source: "x".into(), deadline_s: None }), State::InProgress);
        assert_eq!(History::of(&entries(vec![created()])).unwrap().state, State::Created);
        assert!(History::of(&[]).is_none());
        assert!(History::of(&entries(vec![formed(1, None, &[])])).is_none());
    }
}
