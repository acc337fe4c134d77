//! A run's journal as people read it: its status, the fate of each checkpoint, the story of its interruptions, its
//! nodes, and where its time and money went.
//!
//! Everything here is read from a [`RunState`]; nothing is stored. Commands, and all other displays of a run, print
//! these results. One of them decides: [`spent`] says whether a run has reached a cap.

pub mod account;
pub mod cost;
pub mod episodes;
pub mod rosters;
pub mod spent;
pub mod story;

mod held_out;

use jiff::Timestamp;
use serde::Serialize;

pub use self::held_out::{HeldOut, Which, early};
use crate::{
    checkpoint::catalog,
    config::{self, RunConfig},
    error::{Context, Error, Kind, Result},
    ids::{Generation, NodeId, RunId, Step},
    journal::{self, CheckpointStatus, Committed, FormedReason, Journal, Outcome, RunState},
    report::Counted,
    storage::Store,
};

/// Opens a run's journal for a reader that continues to read. `root` is the store.
pub async fn open(root: &Store, run_id: &RunId) -> Result<Journal> {
    let journal = Journal::open(root.folder(run_id.as_str()), NodeId::random(), run_id.clone()).await;
    journal.context(format!("read journal of run {run_id}"))
}

/// Reads on in a run's journal.
pub async fn read_on(journal: &mut Journal) -> Result<()> {
    let doing = format!("read journal of run {}", journal.state().run_id());
    journal.refresh().await.map(drop).context(doing)
}

/// Reads a run's journal. `root` is the store.
pub async fn read(root: &Store, run_id: &RunId) -> Result<RunState> {
    journal::replay(&root.folder(run_id.as_str()), run_id).await.context(format!("read journal of run {run_id}"))
}

/// The checkpoint that is asked for, or the newest that is whole as far as sizes show. Reports the damaged ones that
/// were skipped.
pub async fn choose(root: &Store, run_id: &RunId, which: Option<Which>) -> Result<(Store, Committed)> {
    let state = read(root, run_id).await?;
    let step = which.map(|which| which.step(&state)).transpose()?;
    choose_from(root, step, state).await
}

/// [`choose`], by a journal that was read a moment ago: a run that goes on prunes checkpoints meanwhile.
async fn choose_from(root: &Store, step: Option<Step>, mut state: RunState) -> Result<(Store, Committed)> {
    let run_id = state.run_id().clone();
    let folder = root.folder(run_id.as_str());
    let (outcome, looked_at) = loop {
        // By default only checkpoints of the run's current line; by step also those that it abandoned.
        let checkpoints = if step.is_some() { state.good() } else { state.candidates() };
        let candidates: Vec<Committed> =
            checkpoints.into_iter().map(|checkpoint| checkpoint.committed.clone()).collect();
        if candidates.is_empty() {
            return Err(Error::new(Kind::Usage, format!("run {run_id} has no checkpoint yet"))
                .with_hint(format!("`trainer status --run-id {run_id}` shows its progress")));
        }
        let outcome = catalog::newest_usable(&folder, &candidates, step).await?;
        if outcome.stepped_over.is_empty() {
            break (outcome, candidates.len());
        }
        // Each round drops a checkpoint that is pruned for good, so this ends.
        state = read(root, &run_id).await?;
        if !outcome.stepped_over.iter().any(|damage| is_pruned(&state, damage.step, damage.generation)) {
            break (outcome, candidates.len());
        }
    };
    for damage in outcome.stepped_over {
        tracing::warn!(step = %damage.step, object = damage.object, "checkpoint is damaged: {}", damage.reason);
    }
    let (committed, _) = outcome.found.ok_or_else(|| {
        let what = format!("none of the {looked_at} checkpoints of run {run_id} is usable");
        Error::new(Kind::Data, what)
            .with_hint(format!("run `trainer verify --run-id {run_id} --all --deep` on another machine"))
    })?;
    Ok((folder, committed))
}

/// Whether a checkpoint has been pruned. Ask a journal read after its objects: a run that goes on deletes old ones, and
/// what is missing then is not damaged.
pub fn is_pruned(state: &RunState, step: Step, generation: Generation) -> bool {
    state.checkpoint(step, generation).is_some_and(|checkpoint| checkpoint.status == CheckpointStatus::Pruned)
}

/// The store's monthly price of `bytes` by `checkpoint.price_per_gib_month`, US dollars.
#[expect(clippy::cast_precision_loss, reason = "it is an estimate")]
pub fn monthly_cost(state: &RunState, bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30) * config(state).checkpoint.price_per_gib_month
}

/// The status of a run, according to its journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// No workers have been started yet.
    Created,
    /// A generation was formed and has not ended. The journal can't know whether its machine is still alive.
    InProgress,
    /// Ended before the last step; to be resumed.
    Interrupted,
    /// The last step is committed.
    Completed,
    /// Needs a person.
    Failed,
    /// Ended before the last step, because it has reached a cap; a higher one lets it go on.
    Capped,
}

impl Standing {
    /// The status of a run.
    pub fn of(state: &RunState) -> Self {
        match (state.outcome(), state.formed(), state.interruptions().last()) {
            (Outcome::Completed { .. }, ..) => Self::Completed,
            (Outcome::Failed { .. }, ..) => Self::Failed,
            (Outcome::Open, None, _) => Self::Created,
            (Outcome::Open, Some(_), _) if state.capped().is_some() => Self::Capped,
            (Outcome::Open, Some(formed), Some(end)) if end.number > formed.number => Self::Interrupted,
            (Outcome::Open, Some(_), _) => Self::InProgress,
        }
    }

    /// For a table.
    pub fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::InProgress => "in progress",
            Self::Interrupted => "interrupted",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Capped => "at its cap",
        }
    }

    /// Whether the run stays as it is until a person acts.
    pub fn is_end(self) -> bool {
        !matches!(self, Self::Created | Self::InProgress)
    }
}

/// A checkpoint and its status.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Checkpoint<'a> {
    /// The record.
    #[serde(flatten)]
    pub committed: &'a Committed,
    /// When it was committed.
    pub at: Timestamp,
    /// `good`, `damaged` or `pruned`.
    pub status: &'static str,
    /// The damaged object and its damage.
    pub damage: Option<&'a str>,
}

impl<'a> From<&'a journal::Checkpoint> for Checkpoint<'a> {
    fn from(checkpoint: &'a journal::Checkpoint) -> Self {
        let (status, damage) = match &checkpoint.status {
            CheckpointStatus::Good => ("good", None),
            CheckpointStatus::Damaged { reason } => ("damaged", Some(reason.as_str())),
            CheckpointStatus::Pruned => ("pruned", None),
        };
        Self { committed: &checkpoint.committed, at: checkpoint.at, status, damage }
    }
}

/// An end before the last step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Interruption<'a> {
    /// When.
    pub at: Timestamp,
    /// The generation that ended.
    pub generation: Generation,
    /// The last finished step.
    pub step: Step,
    /// Steps that are done again.
    pub lost_steps: u64,
    /// Why it ended.
    pub verdict: &'a str,
}

impl<'a> From<&'a journal::Interruption> for Interruption<'a> {
    fn from(end: &'a journal::Interruption) -> Self {
        let journal::Interruption { at, generation, step, lost_steps, verdict, .. } = end;
        Self { at: *at, generation: *generation, step: *step, lost_steps: *lost_steps, verdict }
    }
}

/// The current configuration, with the changes of every resume.
pub fn config(state: &RunState) -> RunConfig {
    // A setting accepted once is accepted again; if this version disagrees, the run's original configuration is shown.
    config::apply_overrides(state.config(), &state.overrides()).unwrap_or_else(|_| state.config().clone())
}

/// The last step that the journal names as finished, on the run's current line.
pub fn last_step(state: &RunState) -> Option<Step> {
    let formed = state.formed()?;
    let of_this_generation = state.interruptions().iter().filter(|end| end.generation == formed.generation);
    let ended = match state.outcome() {
        Outcome::Completed { step, .. } | Outcome::Failed { step, .. } => Some(*step),
        Outcome::Open => None,
    };
    let newest = state.newest().map(|checkpoint| checkpoint.committed.step);
    of_this_generation.map(|end| end.step).chain(ended).chain(newest).max()
}

/// Steps that were or will be done again after interruptions.
pub fn lost_steps(state: &RunState) -> u64 {
    state.interruptions().iter().map(|end| end.lost_steps).sum()
}

/// Starts of the run in a row, up to the newest, after which nothing new became durable: what machines have cost for
/// nothing. One that changed a setting begins the row: whoever changed it expects it to help. Generations that followed
/// from another one without a new start do not count.
pub fn fruitless_starts(state: &RunState) -> u32 {
    let mut starts = 0;
    for formed in state.formations().iter().rev() {
        if formed.ended.is_some() || state.checkpoints().of(formed.generation).next().is_some() {
            break;
        }
        if formed.reason == FormedReason::Started && formed.succession.continues.is_none() {
            starts += 1;
        }
        if !formed.overrides.is_empty() {
            break;
        }
    }
    starts
}

/// What the journal counts, for displays of a run at work.
pub fn counted(state: &RunState) -> Counted {
    Counted {
        run_id: Some(state.run_id().clone()),
        generations: state.formations().len() as u64,
        checkpoints: state.checkpoints().len() as u64,
        durable: state.checkpoints().iter().map(|checkpoint| checkpoint.committed.step).max().unwrap_or_default(),
        interruptions: state.interruptions().len() as u64,
        lost_steps: lost_steps(state),
        worker_restarts: worker_restarts(state),
    }
}

/// How often workers were restarted because one had died.
pub fn worker_restarts(state: &RunState) -> u64 {
    state.formations().iter().filter(|formed| formed.reason == FormedReason::WorkerDied).count() as u64
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        checkpoint::{prune::delete_folder, testing},
        ids::{AttemptId, Rank, WorldSize},
        journal::{Entry, Formed, Gone, Metrics, Record, ResumePoint, RosterEntry, SaveCost, Succession},
    };

    /// A run that has committed `count` checkpoints, then one more, and pruned all but that. Returns its state as it
    /// was before the last one, and the last one.
    pub async fn run_that_pruned(root: &Store, count: u64) -> (RunState, Committed) {
        let run_id = RunId::new("run").unwrap();
        let (folder, node) = (root.folder("run"), NodeId::random());
        let mut journal = Journal::create(folder.clone(), node.clone(), run_id, testing::config()).await.unwrap();
        let formed = Formed {
            roster: vec![RosterEntry::new(node, 1)],
            world_size: WorldSize(1),
            resume: None,
            overrides: Vec::new(),
            reason: FormedReason::Started,
            data: None,
            succession: Succession::default(),
        };
        journal.form(formed).await.unwrap();
        let mut all = Vec::new();
        let mut stale = journal.state().clone();
        for step in 1..=count + 1 {
            stale = journal.state().clone();
            let (committed, _) = testing::checkpoint(&folder, step, 1, 1, step).await;
            journal.append(Record::Committed(committed.clone())).await.unwrap();
            all.push(committed);
        }
        let newest = all.pop().unwrap();
        for Committed { step, generation, .. } in all {
            journal.append(Record::Pruned { step, generation }).await.unwrap();
            delete_folder(&folder, step, generation).await.unwrap();
        }
        (stale, newest)
    }

    #[tokio::test]
    async fn checkpoints_that_are_pruned_meanwhile_are_not_chosen_and_not_damaged() {
        let root = testing::memory_store();
        let (stale, newest) = run_that_pruned(&root, 3).await;
        assert_eq!(choose_from(&root, None, stale.clone()).await.unwrap().1, newest);
        let error = choose_from(&root, Some(Step(2)), stale.clone()).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Usage, "{error}");
        assert!(!is_pruned(&stale, Step(2), Generation(1)));
        let now = read(&root, stale.run_id()).await.unwrap();
        assert!(is_pruned(&now, Step(2), Generation(1)) && !is_pruned(&now, newest.step, newest.generation));
    }

    fn config() -> RunConfig {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("m.json"), "{}").unwrap();
        let set =
            [("model.config", "m.json"), ("data.train", "s3://b/d"), ("store", "s3://b/runs"), ("train.threads", "1")];
        config::load(&config::Sources {
            file: None,
            text: None,
            flags: vec![],
            set: &set.map(|(key, value)| (key.to_owned(), value.to_owned())),
            working_directory: folder.path(),
            machine: config::Machine { cores: 1, gpus: 0 },
            fetch: &|_, _| Err(crate::error::Error::new(crate::error::Kind::Data, "none")),
        })
        .unwrap()
    }

    /// Entries with these records, a minute apart. A leader writes its `formed`, node n1 all else.
    pub fn entries(records: Vec<Record>) -> Vec<Entry> {
        let entry = |(i, record): (i64, Record)| Entry {
            format: record.format(),
            attempt: AttemptId::random(),
            at: Timestamp::from_second(1_000_000 + 60 * i).unwrap(),
            node: match &record {
                Record::Formed { roster, .. } => roster[0].node.clone(),
                _ => NodeId::new("n1").unwrap(),
            },
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
            roster: vec![RosterEntry::new(NodeId::new("n1").unwrap(), 2)],
            world_size: WorldSize(2),
            resume: resume
                .map(|(step, generation)| ResumePoint { step: Step(step), generation: Generation(generation) }),
            overrides: overrides.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            reason: if generation == 2 { FormedReason::WorkerDied } else { FormedReason::Started },
            data: None,
            continues: None,
            gone: Vec::new(),
            joined: Vec::new(),
            why: None,
        }
    }

    /// A generation of these nodes, each with this many workers.
    pub fn group(number: u64, before: Option<u64>, nodes: &[(&str, u32)]) -> Record {
        let mut next = 0;
        let members = nodes.iter().map(|(name, workers)| {
            let first_rank = Some(Rank(next));
            next += workers;
            RosterEntry { first_rank, ..RosterEntry::new(NodeId::new(*name).unwrap(), *workers) }
        });
        let members: Vec<RosterEntry> = members.collect();
        let mut record = formed(number, None, &[]);
        if let Record::Formed { roster, world_size, continues, reason, .. } = &mut record {
            (*roster, *world_size, *continues) = (members, WorldSize(next), before.map(Generation));
            *reason = FormedReason::Started;
        }
        record
    }

    /// The same with who is gone, and why, and who came.
    pub fn changed(mut record: Record, went: &[(&str, &str)], came: &[&str]) -> Record {
        if let Record::Formed { gone, joined, reason, .. } = &mut record {
            let node = |name: &str| NodeId::new(name).unwrap();
            *gone = went.iter().map(|(name, why)| Gone { node: node(name), why: (*why).into() }).collect();
            *joined = came.iter().map(|name| node(name)).collect();
            *reason = if went.is_empty() { FormedReason::NodeJoined } else { FormedReason::NodeLost };
        }
        record
    }

    pub fn committed(step: u64, generation: u64) -> Record {
        Record::Committed(Committed {
            step: Step(step),
            generation: Generation(generation),
            manifest: String::new(),
            manifest_crc64: String::new(),
            bytes: 3 << 20,
            loss: Some(2.5),
            validation_loss: None,
            metrics: Metrics::new(),
            cost: SaveCost { stall_s: 0.001, copy_s: 0.1, durable_s: 0.5, lived_s: 0.0 },
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
                drain: None,
                cap: None,
            },
            Record::Damaged { step: Step(30), generation: Generation(2), reason: "x is short".into() },
            formed(3, Some((20, 1)), &[("train.steps", "500")]),
            Record::Pruned { step: Step(10), generation: Generation(1) },
            committed(25, 3),
        ]
    }

    pub fn state(records: Vec<Record>) -> RunState {
        let mut entries = entries(records).into_iter();
        let mut state = RunState::begin(&RunId::new("first").unwrap(), entries.next().unwrap()).unwrap();
        for (number, entry) in (1..).zip(entries) {
            state.apply(number, entry).unwrap();
        }
        state
    }

    #[test]
    fn a_journal_becomes_a_story() {
        let state = state(story());
        assert_eq!(Standing::of(&state), Standing::InProgress);
        assert_eq!(super::config(&state).workload.train.steps, 500);
        assert_eq!((worker_restarts(&state), lost_steps(&state)), (1, 4));
        let statuses: Vec<_> =
            state.checkpoints().iter().map(|c| (c.committed.step.get(), Checkpoint::from(c).status)).collect();
        assert_eq!(statuses, [(10, "pruned"), (20, "good"), (30, "damaged"), (25, "good")]);
        assert_eq!(Checkpoint::from(&state.checkpoints()[2]).damage, Some("x is short"));
        // A generation that the run abandoned reached step 34.
        assert_eq!(last_step(&state), Some(Step(25)));
    }

    #[test]
    fn starts_that_make_no_checkpoint_are_counted_until_one_does_or_a_setting_changes() {
        let start = |generation| {
            let mut record = formed(generation, None, &[]);
            if let Record::Formed { reason, .. } = &mut record {
                *reason = FormedReason::Started;
            }
            record
        };
        let cost = |records: &[Record]| {
            let mut all = vec![created()];
            all.extend_from_slice(records);
            fruitless_starts(&state(all))
        };
        assert_eq!(cost(&[]), 0);
        assert_eq!(cost(&[start(1)]), 1);
        assert_eq!(cost(&[start(1), start(2), start(3)]), 3);
        assert_eq!(cost(&[start(1), start(2), committed(9, 2)]), 0);
        assert_eq!(cost(&[start(1), committed(9, 1), start(2), start(3)]), 2);
        // Workers that died within one start.
        assert_eq!(cost(&[start(1), formed(2, None, &[]), start(3)]), 2);
        // A group that has gone on without a start.
        assert_eq!(cost(&[start(1), group(2, Some(1), &[("n1", 2)]), start(3)]), 2);
        let mut changed = formed(3, None, &[("train.threads", "2")]);
        if let Record::Formed { reason, .. } = &mut changed {
            *reason = FormedReason::Started;
        }
        assert_eq!(cost(&[start(1), start(2), changed.clone()]), 1);
        assert_eq!(cost(&[start(1), start(2), changed, start(4)]), 2);
    }

    #[test]
    fn the_kinds_of_endings_differ() {
        let ended = |last| state(vec![created(), formed(1, None, &[]), committed(9, 1), last]);
        let (generation, step) = (Generation(1), Step(12));
        let completed = ended(Record::Completed { generation, step: Step(9), loss: Some(1.0), early: None });
        assert_eq!((Standing::of(&completed), last_step(&completed)), (Standing::Completed, Some(Step(9))));
        let failed = ended(Record::Failed { generation, step, reason: "x".into() });
        assert_eq!((Standing::of(&failed), last_step(&failed)), (Standing::Failed, Some(step)));
        let noticed =
            ended(Record::Notice { generation, source: "x".into(), deadline_s: None, means: journal::Means::Stop });
        assert_eq!((Standing::of(&noticed), last_step(&noticed)), (Standing::InProgress, Some(Step(9))));
        let (verdict, committed) = ("x".to_owned(), Some(Step(9)));
        let stopped =
            ended(Record::Interrupted { generation, step, committed, lost_steps: 3, verdict, drain: None, cap: None });
        assert_eq!((Standing::of(&stopped), last_step(&stopped)), (Standing::Interrupted, Some(step)));
        assert_eq!(Standing::of(&state(vec![created()])), Standing::Created);
    }
}
