//! The state of a run, from its journal's records in order: a pure replay.

use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;

use super::{
    EarlyStop, Reached,
    checkpoints::Checkpoints,
    doubt::Clearance,
    members,
    record::{Committed, Drain, Entry, FORMAT, FormedReason, Means, Record, ResumePoint, RosterEntry, Succession},
    summary::{Spans, Tail},
};
use crate::{
    config::{CapsConfig, ModelKind, RunConfig, Strategy},
    ids::{DatasetId, Generation, NodeId, RunId, Step, WorldSize},
};

/// Why a record is refused; a verb phrase about the record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Inconsistent(pub(super) String);

/// One formation of the group of nodes.
#[derive(Clone, Debug, PartialEq)]
pub struct Formation {
    /// Number of its record.
    pub number: u64,
    /// When, by its writer's clock.
    pub at: Timestamp,
    /// Who formed it.
    pub node: NodeId,
    /// The generation.
    pub generation: Generation,
    /// Its nodes, the leader first.
    pub roster: Vec<RosterEntry>,
    /// Workers of all nodes.
    pub world_size: WorldSize,
    /// The checkpoint that it starts from; `None`: from the beginning.
    pub resume: Option<ResumePoint>,
    /// Settings changed for this generation and all later ones.
    pub overrides: Vec<(String, String)>,
    /// Why it was formed.
    pub reason: FormedReason,
    /// The data that it is trained on; `None`: not recorded.
    pub data: Option<DatasetId>,
    /// How it follows from the generation before it.
    pub succession: Succession,
    /// When it completed the run or failed, if it did; a later one may have opened the run again.
    pub ended: Option<Timestamp>,
}

/// The status of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckpointStatus {
    /// Nothing is known against it.
    Good,
    /// It was found damaged.
    Damaged {
        /// The object and what is wrong with it.
        reason: String,
    },
    /// It is deleted, or will be.
    Pruned,
}

/// One `committed` record and its checkpoint's status.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Number of its record.
    pub number: u64,
    /// When it was committed, by its writer's clock.
    pub at: Timestamp,
    /// The record.
    pub committed: Committed,
    /// Its current status.
    pub status: CheckpointStatus,
}

impl Checkpoint {
    /// Its step and generation.
    pub fn point(&self) -> ResumePoint {
        ResumePoint { step: self.committed.step, generation: self.committed.generation }
    }
}

/// A notice that was received.
#[derive(Clone, Debug, PartialEq)]
pub struct NoticeHeard {
    /// Number of its record.
    pub number: u64,
    /// When.
    pub at: Timestamp,
    /// The generation that received it.
    pub generation: Generation,
    /// Its source.
    pub source: String,
    /// Seconds left.
    pub deadline_s: Option<f64>,
    /// What it announced.
    pub means: Means,
}

/// The end of a generation before the last step.
#[derive(Clone, Debug, PartialEq)]
pub struct Interruption {
    /// Number of its record.
    pub number: u64,
    /// When.
    pub at: Timestamp,
    /// The generation that ended.
    pub generation: Generation,
    /// The last finished step.
    pub step: Step,
    /// The newest checkpoint's step.
    pub committed: Option<Step>,
    /// The steps to do again.
    pub lost_steps: u64,
    /// Why, and the outcome of the emergency save.
    pub verdict: String,
    /// How the drain went, if there was one.
    pub drain: Option<Drain>,
    /// The cap that the run had reached, if that ended it.
    pub cap: Option<Reached>,
}

/// What the choice of a resume point was made from.
#[derive(Clone, Debug, PartialEq)]
pub struct Basis {
    /// The newest generation.
    pub generation: Generation,
    /// The newest checkpoint.
    pub newest: Option<ResumePoint>,
    /// Whether the run has ended.
    pub outcome: Outcome,
}

/// The status of a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It has not ended; only heartbeats say whether it is running now.
    Open,
    /// The last step is committed.
    Completed {
        /// When.
        at: Timestamp,
        /// The generation that finished.
        generation: Generation,
        /// The last step.
        step: Step,
        /// Its loss, if it has one.
        loss: Option<f64>,
        /// Why it has no more steps, if it stopped early.
        early: Option<EarlyStop>,
    },
    /// It can't continue without a person.
    Failed {
        /// When.
        at: Timestamp,
        /// The generation that failed.
        generation: Generation,
        /// The last finished step.
        step: Step,
        /// Why.
        reason: String,
    },
}

/// The state of a run by its journal.
///
/// A later `formed` reopens a run that had completed or failed. A copy is cheap, however long the run has lived.
#[derive(Clone, Debug, PartialEq)]
pub struct RunState {
    run_id: RunId,
    config: Arc<RunConfig>,
    created_at: Timestamp,
    next: u64,
    last_at: Timestamp,
    last_node: NodeId,
    formations: Arc<Vec<Formation>>,
    checkpoints: Checkpoints,
    notices: Arc<Vec<NoticeHeard>>,
    interruptions: Arc<Vec<Interruption>>,
    clearances: Arc<Vec<Clearance>>,
    outcome: Outcome,
    /// The material for the next summary.
    pub(super) tail: Tail,
}

impl RunState {
    /// The state after record 0, which must be the `created` of this very run.
    pub fn begin(run_id: &RunId, entry: Entry) -> Result<Self, Inconsistent> {
        check_format(&entry)?;
        let Record::Created { run_id: found, config } = entry.record else {
            return Err(Inconsistent(format!("is the first record and says {}, not created", entry.record.kind())));
        };
        if found != *run_id {
            return Err(Inconsistent(format!("belongs to run {found}, not {run_id}: the journal was copied")));
        }
        Ok(Self {
            run_id: found,
            config: Arc::new(*config),
            created_at: entry.at,
            next: 1,
            last_at: entry.at,
            last_node: entry.node,
            formations: Arc::default(),
            checkpoints: Checkpoints::default(),
            notices: Arc::default(),
            interruptions: Arc::default(),
            clearances: Arc::default(),
            outcome: Outcome::Open,
            tail: Tail::default(),
        })
    }

    /// The same from the record's stored bytes, with summaries of these lengths.
    pub(super) fn begin_as(run_id: &RunId, entry: Entry, body: Bytes, spans: Spans) -> Result<Self, Inconsistent> {
        let mut state = Self::begin(run_id, entry.clone())?;
        state.tail = Tail::new(spans);
        state.tail.push(0, entry, body);
        Ok(state)
    }

    /// [`apply`](Self::apply) of a record whose stored bytes are known.
    pub(super) fn take_in(&mut self, number: u64, entry: Entry, body: Bytes) -> Result<(), Inconsistent> {
        self.apply(number, entry.clone())?;
        self.tail.push(number, entry, body);
        Ok(())
    }

    /// Adds the next record; on an error nothing has changed.
    pub fn apply(&mut self, number: u64, entry: Entry) -> Result<(), Inconsistent> {
        if number != self.next {
            return Err(Inconsistent(format!("came instead of record {}", self.next)));
        }
        check_format(&entry)?;
        self.consistent(&entry.record)?;
        let Entry { at, node, record, .. } = entry;
        match record {
            // `consistent` refused it.
            Record::Created { .. } => {}
            Record::Formed {
                generation,
                roster,
                world_size,
                resume,
                overrides,
                reason,
                data,
                continues,
                gone,
                joined,
                why,
            } => {
                let node = node.clone();
                let succession = Succession { continues, gone, joined, why };
                self.outcome = Outcome::Open;
                Arc::make_mut(&mut self.formations).push(Formation {
                    number,
                    at,
                    node,
                    generation,
                    roster,
                    world_size,
                    resume,
                    overrides,
                    reason,
                    data,
                    succession,
                    ended: None,
                });
            }
            Record::Committed(committed) => {
                self.checkpoints.push(Checkpoint { number, at, committed, status: CheckpointStatus::Good });
            }
            Record::Notice { generation, source, deadline_s, means } => {
                Arc::make_mut(&mut self.notices).push(NoticeHeard {
                    number,
                    at,
                    generation,
                    source,
                    deadline_s,
                    means,
                });
            }
            Record::Interrupted { generation, step, committed, lost_steps, verdict, drain, cap } => {
                let drain = drain.map(|drain| *drain);
                let end = Interruption { number, at, generation, step, committed, lost_steps, verdict, drain, cap };
                Arc::make_mut(&mut self.interruptions).push(end);
            }
            Record::Damaged { step, generation, reason } => {
                if let Some(checkpoint) = self.checkpoint_mut(step, generation)
                    && checkpoint.status == CheckpointStatus::Good
                {
                    checkpoint.status = CheckpointStatus::Damaged { reason };
                }
            }
            Record::Pruned { step, generation } => {
                if let Some(checkpoint) = self.checkpoint_mut(step, generation) {
                    checkpoint.status = CheckpointStatus::Pruned;
                }
            }
            Record::Cleared { step, generation } => {
                if let Some(checkpoint) = self.checkpoint_mut(step, generation)
                    && matches!(checkpoint.status, CheckpointStatus::Damaged { .. })
                {
                    checkpoint.status = CheckpointStatus::Good;
                    let cleared = Clearance { number, at, point: ResumePoint { step, generation } };
                    Arc::make_mut(&mut self.clearances).push(cleared);
                }
            }
            Record::PrunedMany { checkpoints } => {
                for ResumePoint { step, generation } in checkpoints {
                    if let Some(checkpoint) = self.checkpoint_mut(step, generation) {
                        checkpoint.status = CheckpointStatus::Pruned;
                    }
                }
            }
            Record::Completed { generation, step, loss, early } => {
                self.outcome = Outcome::Completed { at, generation, step, loss, early };
                self.end_of_formation(at);
            }
            Record::Failed { generation, step, reason } => {
                self.outcome = Outcome::Failed { at, generation, step, reason };
                self.end_of_formation(at);
            }
        }
        self.checkpoints.settle();
        self.next = number + 1;
        self.last_at = at;
        self.last_node = node;
        Ok(())
    }

    /// The current formation, as `consistent` has made sure.
    fn end_of_formation(&mut self, at: Timestamp) {
        if let Some(formed) = Arc::make_mut(&mut self.formations).last_mut() {
            formed.ended = Some(at);
        }
    }

    /// The rules that keep a journal consistent, for all writers; a record that breaks one is neither written nor
    /// accepted.
    pub(super) fn consistent(&self, record: &Record) -> Result<(), Inconsistent> {
        let wrong = |reason: String| Err(Inconsistent(reason));
        match record {
            Record::Created { .. } => wrong("says created, which only the first record may".into()),
            Record::Formed { generation, resume, .. } => {
                if *generation <= self.generation() {
                    return wrong(format!("forms generation {generation} after generation {}", self.generation()));
                }
                self.has_a_sound_roster(record)?;
                match resume {
                    Some(point) if self.checkpoint(point.step, point.generation).is_none() => wrong(format!(
                        "resumes from step {} of generation {}, which was never committed",
                        point.step, point.generation
                    )),
                    _ => Ok(()),
                }
            }
            Record::Committed(Committed { generation, step, .. }) => {
                self.is_current(*generation)?;
                if self.checkpoint(*step, *generation).is_some() {
                    return wrong(format!("commits step {step} of generation {generation} a second time"));
                }
                Ok(())
            }
            Record::Notice { generation, .. }
            | Record::Interrupted { generation, .. }
            | Record::Completed { generation, .. }
            | Record::Failed { generation, .. } => self.is_current(*generation),
            Record::Damaged { step, generation, .. }
            | Record::Pruned { step, generation }
            | Record::Cleared { step, generation } => self.is_committed(*step, *generation),
            Record::PrunedMany { checkpoints } if checkpoints.is_empty() => wrong("names no checkpoint".into()),
            Record::PrunedMany { checkpoints } => {
                checkpoints.iter().try_for_each(|point| self.is_committed(point.step, point.generation))
            }
        }
    }

    fn is_committed(&self, step: Step, generation: Generation) -> Result<(), Inconsistent> {
        match self.checkpoint(step, generation) {
            Some(_) => Ok(()),
            None => {
                Err(Inconsistent(format!("names step {step} of generation {generation}, which was never committed")))
            }
        }
    }

    fn is_current(&self, generation: Generation) -> Result<(), Inconsistent> {
        match self.formed() {
            Some(formed) if formed.generation == generation => Ok(()),
            Some(formed) => {
                Err(Inconsistent(format!("names generation {generation} while {} is the newest", formed.generation)))
            }
            None => Err(Inconsistent(format!("names generation {generation}, but none was formed"))),
        }
    }

    /// The run's id.
    pub fn run_id(&self) -> &RunId {
        &self.run_id
    }

    /// The configuration as created, without [`overrides`](Self::overrides).
    pub fn config(&self) -> &RunConfig {
        &self.config
    }

    /// Every `--set` of every generation, oldest first: applied in this order to [`config`](Self::config).
    pub fn overrides(&self) -> Vec<(String, String)> {
        self.formations.iter().flat_map(|formation| formation.overrides.iter().cloned()).collect()
    }

    /// The data that the run is trained on, according to the newest generation that has recorded it.
    pub fn data(&self) -> Option<&DatasetId> {
        self.formations.iter().rev().find_map(|formation| formation.data.as_ref())
    }

    /// When the run was created.
    pub fn created_at(&self) -> Timestamp {
        self.created_at
    }

    /// The number of the next record, which is how many there are.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// When and by which node the newest record was written; for people.
    pub fn last_activity(&self) -> (Timestamp, &NodeId) {
        (self.last_at, &self.last_node)
    }

    /// The newest generation; 0 if none was formed.
    pub fn generation(&self) -> Generation {
        self.formed().map_or(Generation(0), |formation| formation.generation)
    }

    /// The newest formation.
    pub fn formed(&self) -> Option<&Formation> {
        self.formations.last()
    }

    /// All formations, oldest first.
    pub fn formations(&self) -> &[Formation] {
        &self.formations
    }

    /// All checkpoints ever committed, in the order of their records.
    pub fn checkpoints(&self) -> &Checkpoints {
        &self.checkpoints
    }

    /// One checkpoint, whatever its status.
    pub fn checkpoint(&self, step: Step, generation: Generation) -> Option<&Checkpoint> {
        self.checkpoints.get(step, generation)
    }

    fn checkpoint_mut(&mut self, step: Step, generation: Generation) -> Option<&mut Checkpoint> {
        self.checkpoints.get_mut(step, generation)
    }

    /// All good checkpoints, including those that the run abandoned, the last committed first: the choices for an
    /// explicit `--from STEP`.
    pub fn good(&self) -> Vec<&Checkpoint> {
        self.checkpoints.good().collect()
    }

    /// The good checkpoints of the run's current line, newest first: those of the newest generation, then the one that
    /// it resumed from and those that its generation had committed up to there, and so on back.
    ///
    /// Checkpoints that an older generation committed beyond the point that a newer one resumed from are not among
    /// them: after `resume --from 50` the line continues from step 50, even before anything new is committed.
    pub fn candidates(&self) -> Vec<&Checkpoint> {
        self.line().collect()
    }

    /// The newest good checkpoint of the current line: the first of [`candidates`](Self::candidates).
    pub fn newest(&self) -> Option<&Checkpoint> {
        self.line().next()
    }

    /// What a choice that is made from this state depends on.
    pub fn basis(&self) -> Basis {
        let newest = self.newest().map(Checkpoint::point);
        Basis { generation: self.generation(), newest, outcome: self.outcome.clone() }
    }

    /// [`candidates`](Self::candidates), computed lazily.
    fn line(&self) -> impl Iterator<Item = &Checkpoint> {
        let newest = self.formations.last().map(|formation| (formation, None));
        let back = std::iter::successors(newest, move |(formation, _)| {
            // Generations rise in the list and a resume point is older than what resumes from it: this ends.
            let point = formation.resume.as_ref().filter(|point| point.generation < formation.generation)?;
            let at = self.formations.binary_search_by_key(&point.generation, |f| f.generation).ok()?;
            Some((&self.formations[at], Some(point.step)))
        });
        back.flat_map(move |(formation, limit)| self.checkpoints.good_of(formation.generation, limit))
    }

    /// All notices received, oldest first.
    pub fn notices(&self) -> &[NoticeHeard] {
        &self.notices
    }

    /// All interruptions, oldest first. A generation that was killed outright has none.
    pub fn interruptions(&self) -> &[Interruption] {
        &self.interruptions
    }

    /// All withdrawn verdicts, oldest first.
    pub fn clearances(&self) -> &[Clearance] {
        &self.clearances
    }

    /// The run's standing.
    pub fn outcome(&self) -> &Outcome {
        &self.outcome
    }
}

/// Whether this setting says when a run stops early.
fn is_early_stopping(key: &str) -> bool {
    key.starts_with("train.early_stopping.")
}

/// Whether this setting caps the run's time or cost, and so may end it before its last step.
fn is_cap(key: &str) -> bool {
    key.starts_with("run.")
}

/// Settings that no version knows whose latest format is 6: it would call a change of them a mistake.
const KEYS_OF_7: [&str; 7] = [
    "checkpoint.slots",
    "parallel.peak_tflops",
    "parallel.share_device",
    "restart.fruitless_starts",
    "train.activations",
    "train.deterministic",
    "train.fused",
];

/// Whether only a version that knows format 7 understands this change of a setting.
fn is_of_7(key: &str, value: &str) -> bool {
    is_cap(key) || KEYS_OF_7.contains(&key) || (key == "parallel.strategy" && value.contains("shard"))
}

fn check_format(entry: &Entry) -> Result<(), Inconsistent> {
    if entry.format > FORMAT {
        return Err(Inconsistent(format!("has format {}, and this version reads up to {FORMAT}", entry.format)));
    }
    Ok(())
}

impl Record {
    /// The lowest layout version that can hold it.
    pub fn format(&self) -> u32 {
        match self {
            // An earlier version would train on.
            Self::Created { config, .. } if config.run != CapsConfig::default() => 7,
            Self::Formed { overrides, .. } if overrides.iter().any(|(key, value)| is_of_7(key, value)) => 7,
            // An earlier version knows no such strategy.
            Self::Created { config, .. } if config.workload.parallel.strategy == Strategy::Shard => 7,
            Self::Interrupted { cap: Some(_), .. } => 7,
            Self::Created { config, .. } if config.workload.train.early_stopping.is_some() => 6,
            Self::Formed { overrides, .. } if overrides.iter().any(|(key, _)| is_early_stopping(key)) => 6,
            Self::Completed { early: Some(_), .. } => 6,
            Self::Committed(committed) if committed.loss.is_none() || !committed.metrics.is_empty() => 3,
            Self::Completed { loss: None, .. } => 3,
            Self::PrunedMany { .. } | Self::Cleared { .. } => 2,
            // An earlier version knows no task.
            Self::Created { config, .. } if config.workload.model.kind == ModelKind::Task => 6,
            // An earlier version would train all weights.
            Self::Created { config, .. } if config.workload.model.lora.is_some() => 5,
            Self::Formed { roster, reason, continues, gone, joined, .. }
                if members::has_new_words(roster, *reason)
                    || continues.is_some()
                    || !gone.is_empty()
                    || !joined.is_empty() =>
            {
                4
            }
            Self::Created { .. }
            | Self::Formed { .. }
            | Self::Committed(_)
            | Self::Notice { .. }
            | Self::Interrupted { .. }
            | Self::Damaged { .. }
            | Self::Completed { .. }
            | Self::Failed { .. }
            | Self::Pruned { .. } => 1,
        }
    }

    /// The record that prunes these checkpoints. One checkpoint takes a kind that every program knows; several take one
    /// record.
    pub fn pruned(checkpoints: Vec<ResumePoint>) -> Self {
        match <[ResumePoint; 1]>::try_from(checkpoints) {
            Ok([ResumePoint { step, generation }]) => Self::Pruned { step, generation },
            Err(checkpoints) => Self::PrunedMany { checkpoints },
        }
    }

    /// Its name in stored records.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Created { .. } => "created",
            Self::Formed { .. } => "formed",
            Self::Committed(_) => "committed",
            Self::Notice { .. } => "notice",
            Self::Interrupted { .. } => "interrupted",
            Self::Damaged { .. } => "damaged",
            Self::Completed { .. } => "completed",
            Self::Failed { .. } => "failed",
            Self::Pruned { .. } => "pruned",
            Self::PrunedMany { .. } => "pruned_many",
            Self::Cleared { .. } => "cleared",
        }
    }
}
