//! Reading and appending: the rules of [`super::admit`](fn@super::admit), carried out on a store.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;
use tokio::task::JoinHandle;

use super::{
    admit::{Refusal, admit},
    error::JournalError,
    record::{Committed, Entry, FormedReason, InvalidEntry, Record, ResumePoint, RosterEntry, Succession},
    replay::{self, damaged, is_begun, missing, read, read_otherwise},
    state::{Basis, RunState},
    summary::{SPANS, Spans},
};
use crate::{
    config::RunConfig,
    faults::{self, At},
    ids::{AttemptId, DatasetId, Generation, NodeId, RunId, Step, WorldSize},
    layout,
    storage::{CreateOutcome, StorageError, Store},
};

/// Runs checked at a time.
const RUNS_AT_ONCE: usize = 16;

/// A new generation to be formed; see [`Record::Formed`].
#[derive(Clone, Debug, PartialEq)]
pub struct Formed {
    /// The nodes, the leader first.
    pub roster: Vec<RosterEntry>,
    /// Workers of all nodes.
    pub world_size: WorldSize,
    /// The one checkpoint that every rank loads; `None`: from the beginning.
    pub resume: Option<ResumePoint>,
    /// Settings changed with `--set` for this generation and all later ones.
    pub overrides: Vec<(String, String)>,
    /// Why it is formed.
    pub reason: FormedReason,
    /// The data that it is trained on.
    pub data: Option<DatasetId>,
    /// How it follows from the newest generation.
    pub succession: Succession,
}

/// An append that was begun and whose outcome is unknown.
#[derive(Debug)]
struct Unsettled {
    entry: Entry,
    /// The number under which it was found.
    number: Option<u64>,
}

/// The most that are remembered; far beyond what one process interrupts.
const MOST_UNSETTLED: usize = 32;

/// A run's journal, as one node reads and writes it.
#[derive(Debug)]
pub struct Journal {
    /// The run's folder.
    store: Store,
    node: NodeId,
    state: RunState,
    /// The newest generation that this node has formed through this journal.
    held: Option<Generation>,
    /// The oldest first. Several: an append that is interrupted is begun again after others, which may have been begun
    /// and interrupted, too. At most one commit.
    unsettled: Vec<Unsettled>,
    /// The task that writes a summary; see [`super::summary`].
    summary: Option<JoinHandle<()>>,
}

impl Journal {
    /// Creates a run in its folder `store`: writes record 0.
    ///
    /// [`JournalError::Exists`] if the id is taken. Of several nodes that create one run at once exactly one succeeds.
    pub async fn create(store: Store, node: NodeId, run_id: RunId, config: RunConfig) -> Result<Self, JournalError> {
        let taken = |store: &Store, run_id| JournalError::Exists { run_id, store: parent(&store.uri()) };
        if is_begun(&store).await? {
            return Err(taken(&store, run_id));
        }
        let record = Record::Created { run_id: run_id.clone(), config: Box::new(config) };
        let entry = new_entry(&node, record);
        let body = encode(&entry)?;
        before_append(&entry.record)?;
        if store.create(&layout::journal_entry(0), body.clone()).await? == CreateOutcome::Exists {
            return Err(taken(&store, run_id));
        }
        let state = RunState::begin_as(&run_id, entry, body, SPANS).map_err(|error| damaged(&store, 0, &error))?;
        faults::check("journal.after-append", At::default())?;
        Ok(Self::new(store, node, state))
    }

    fn new(store: Store, node: NodeId, state: RunState) -> Self {
        Self { store, node, state, held: None, unsettled: Vec::new(), summary: None }
    }

    /// Opens the run in its folder `store` and reads all its records.
    pub async fn open(store: Store, node: NodeId, run_id: RunId) -> Result<Self, JournalError> {
        Self::open_by(store, node, run_id, SPANS).await
    }

    /// The same with summaries of these lengths.
    pub(super) async fn open_by(store: Store, node: NodeId, run_id: RunId, spans: Spans) -> Result<Self, JournalError> {
        let state = replay::replay_by(&store, &run_id, spans).await?;
        Ok(Self::new(store, node, state))
    }

    /// The same, continuing from a `state` that was read from there before.
    pub async fn follow(store: Store, node: NodeId, state: RunState) -> Result<Self, JournalError> {
        let mut journal = Self::new(store, node, state);
        journal.refresh().await?;
        Ok(journal)
    }

    /// The run as of the last record read.
    pub fn state(&self) -> &RunState {
        &self.state
    }

    /// The node that writes here.
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// The newest generation that this node has formed here.
    pub fn held(&self) -> Option<Generation> {
        self.held
    }

    /// Reads on to the end; returns the number of new records.
    pub async fn refresh(&mut self) -> Result<u64, JournalError> {
        let before = self.state.next();
        while let Some((entry, body)) = read(&self.store, self.state.next()).await? {
            self.apply_read(entry, body).await?;
        }
        Ok(self.state.next() - before)
    }

    /// Appends a record other than `created` and `formed`; returns its number.
    ///
    /// [`JournalError::Fenced`]: another generation was formed since; stop. [`JournalError::Storage`]: it is not known
    /// whether the record exists; appending the same record again settles it, without writing it twice. A `committed`
    /// is the same if it names the same manifest.
    pub async fn append(&mut self, record: Record) -> Result<u64, JournalError> {
        if matches!(record, Record::Created { .. } | Record::Formed { .. }) {
            let reason = "it has a function of its own".into();
            return Err(JournalError::Refused { record: record.kind(), reason });
        }
        self.append_if(record, |_, _| Ok(())).await
    }

    /// Appends the record that `make` builds from the state before it. If a `committed` comes in between, the record is
    /// built again. So no record of lost steps contradicts a commit whose answer was late.
    pub async fn append_made(&mut self, make: impl Fn(&RunState) -> Record) -> Result<u64, JournalError> {
        loop {
            let record = make(&self.state);
            let still_right = |came: &Record, node: &NodeId| match came {
                Record::Committed(Committed { generation, .. }) => {
                    let what = format!("node {node} appended {}", came.kind());
                    Err(JournalError::Moved { generation: *generation, what })
                }
                _ => Ok(()),
            };
            match self.append_if(record, still_right).await {
                Err(JournalError::Moved { .. }) => {}
                other => return other,
            }
        }
    }

    /// The commit begun last, if it is not known to stand, whatever was appended since: its data is durable, and
    /// appending it again settles it. The last words of a generation, or the next one, leave it behind.
    pub fn doubtful(&self) -> Option<&Committed> {
        self.unsettled.iter().find_map(|begun| match &begun.entry.record {
            Record::Committed(committed) if begun.number.is_none() => Some(committed),
            _ => None,
        })
    }

    /// The same, if `formed` was chosen from an earlier state that another task may have read on from since: nothing is
    /// formed unless the choice's [basis](RunState::basis) is still the same.
    pub async fn form_upon(&mut self, formed: Formed, basis: &Basis) -> Result<Generation, JournalError> {
        let (now, generation) = (self.state.basis(), basis.generation.next());
        if now == *basis {
            return self.form(formed).await;
        }
        let what = format!("node {} appended a record", self.state.last_activity().1);
        Err(self.overtaken(generation).unwrap_or(JournalError::Moved { generation, what }))
    }

    /// Forms the next generation, which fences all older ones; this node holds it from then on.
    ///
    /// `formed` is chosen from [`state`](Self::state) as it is at the call. If the run has changed meanwhile, the
    /// choice may be wrong, and nothing is formed: [`JournalError::Overtaken`] if another node formed a generation
    /// (look at its heartbeat), [`JournalError::Moved`] if a checkpoint came or went, or the run ended (choose again).
    /// The state is up to date after either.
    pub async fn form(&mut self, formed: Formed) -> Result<Generation, JournalError> {
        let generation = self.state.generation().next();
        let Formed { roster, world_size, resume, overrides, reason, data, succession } = formed;
        let Succession { continues, gone, joined, why } = succession;
        let record = Record::Formed {
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
        };
        let still_right = |record: &Record, node: &NodeId| match record {
            Record::Formed { generation, .. } => {
                Err(JournalError::Overtaken { node: node.clone(), generation: *generation })
            }
            Record::Notice { .. } | Record::Interrupted { .. } => Ok(()),
            other => Err(JournalError::Moved { generation, what: format!("node {node} appended {}", other.kind()) }),
        };
        match self.append_if(record, still_right).await {
            Ok(_) => {
                self.held = Some(generation);
                Ok(generation)
            }
            Err(JournalError::Fenced { node, generation }) => Err(JournalError::Overtaken { node, generation }),
            // Of several, the newest is the one whose heartbeat matters.
            Err(error @ (JournalError::Overtaken { .. } | JournalError::Moved { .. })) => {
                Err(self.overtaken(generation).unwrap_or(error))
            }
            Err(error) => Err(error),
        }
    }

    /// The newest generation as an error, if it is `generation` or a later one.
    fn overtaken(&self, generation: Generation) -> Option<JournalError> {
        let newest = self.state.formed().filter(|newest| newest.generation >= generation)?;
        Some(JournalError::Overtaken { node: newest.node.clone(), generation: newest.generation })
    }

    /// Appends `record` at the first free number, as long as the rules admit it there and `still_right` accepts every
    /// record that came before it unexpectedly.
    async fn append_if(
        &mut self,
        record: Record,
        still_right: impl Fn(&Record, &NodeId) -> Result<(), JournalError>,
    ) -> Result<u64, JournalError> {
        let begun = self.unsettled.iter().position(|begun| begun.entry.record == record);
        let entry = match begun.map(|place| self.unsettled.remove(place)) {
            // The same again: same attempt, same body.
            Some(Unsettled { number: Some(number), .. }) => return Ok(number),
            Some(Unsettled { entry, number: None }) => entry,
            None => new_entry(&self.node, record),
        };
        if is_commit(&entry.record) {
            self.unsettled.retain(|begun| !is_commit(&begun.entry.record));
        }
        let body = encode(&entry)?;
        loop {
            if let Some(number) = self.committed_as(&entry.record) {
                return self.settled(&entry, number);
            }
            admit(&self.state, &self.node, self.held, &entry.record)
                .map_err(|refusal| refused(&entry.record, refusal))?;
            before_append(&entry.record)?;
            let number = self.state.next();
            // Before the request: the future may be dropped, and the request still succeed.
            self.begins(&entry);
            match self.store.create(&layout::journal_entry(number), body.clone()).await? {
                CreateOutcome::Created => {
                    self.apply(entry.clone(), body)?;
                    return self.settled(&entry, number);
                }
                CreateOutcome::Exists => {
                    let mut verdict = Ok(());
                    while let Some((came, bytes)) = read(&self.store, self.state.next()).await? {
                        let number = self.state.next();
                        if came.attempt == entry.attempt {
                            self.apply(came, bytes)?;
                            return self.settled(&entry, number);
                        }
                        let came = self.apply_read(came, bytes).await?;
                        verdict = verdict.and_then(|()| still_right(&came.record, &came.node));
                    }
                    if self.state.next() == number {
                        return Err(missing(&self.store, number));
                    }
                    verdict?;
                }
            }
        }
    }

    /// The outcome of this append is unknown from now on, until it is [settled](Self::settled).
    fn begins(&mut self, entry: &Entry) {
        if self.unsettled.iter().any(|begun| begun.entry.attempt == entry.attempt) {
            return;
        }
        if self.unsettled.len() == MOST_UNSETTLED {
            let oldest = self.unsettled.iter().position(|begun| !is_commit(&begun.entry.record));
            if let Some(place) = oldest {
                self.unsettled.remove(place);
            }
        }
        self.unsettled.push(Unsettled { entry: entry.clone(), number: None });
    }

    /// The number of the record that has committed the very manifest of `record`. A manifest is created once and
    /// carries its attempt, so it is the same commit; a repeated save differs only in its times.
    fn committed_as(&self, record: &Record) -> Option<u64> {
        let Record::Committed(wanted) = record else { return None };
        let stands = self.state.checkpoint(wanted.step, wanted.generation)?;
        let same =
            |found: &Committed| (&found.manifest, &found.manifest_crc64) == (&wanted.manifest, &wanted.manifest_crc64);
        same(&stands.committed).then_some(stands.number)
    }

    /// `entry` has the number `number`, and is applied.
    fn settled(&mut self, entry: &Entry, number: u64) -> Result<u64, JournalError> {
        // After these no commit of before is tried again.
        let closes = matches!(
            entry.record,
            Record::Formed { .. } | Record::Interrupted { .. } | Record::Completed { .. } | Record::Failed { .. }
        );
        self.unsettled
            .retain(|begun| begun.entry.attempt != entry.attempt && !(closes && is_commit(&begun.entry.record)));
        faults::check("journal.after-append", at(&entry.record))?;
        self.sum_up(number + 1);
        Ok(number)
    }

    /// Starts writing the summaries that are due when all records before `next` exist. Nothing waits for that.
    fn sum_up(&mut self, next: u64) {
        // The next summary makes up for any that were skipped meanwhile, or failed.
        if self.summary.as_ref().is_none_or(JoinHandle::is_finished)
            && let Some(due) = self.state.tail.due(next)
        {
            self.summary = Some(tokio::spawn(due.write(self.store.clone())));
        }
    }

    /// Waits for a summary that is being written, at most `patience`: for a process that is about to end.
    pub async fn summed_up(&mut self, patience: Duration) {
        if let Some(mut summary) = self.summary.take()
            && tokio::time::timeout(patience, &mut summary).await.is_err()
        {
            summary.abort();
        }
    }

    /// As if this very journal had formed the newest generation: several writers of one leader.
    #[cfg(test)]
    pub(super) fn leading(self) -> Self {
        Self { held: Some(self.state.generation()), ..self }
    }

    /// The same state, on another store.
    #[cfg(test)]
    pub(super) fn moved_to(self, store: Store) -> Self {
        Self { store, ..self }
    }

    /// Applies the next record as read, and returns it. A record that contradicts those before it is read once more.
    async fn apply_read(&mut self, entry: Entry, body: Bytes) -> Result<Entry, JournalError> {
        let number = self.state.next();
        let Err(error) = self.apply(entry.clone(), body.clone()) else { return Ok(entry) };
        let (entry, body) = read_otherwise(&self.store, number, &body).await?.ok_or(error)?;
        self.apply(entry.clone(), body)?;
        Ok(entry)
    }

    /// Applies the next record, and notes if it is one of ours that was given up.
    fn apply(&mut self, entry: Entry, body: Bytes) -> Result<(), JournalError> {
        let number = self.state.next();
        let ours = self.unsettled.iter().position(|begun| begun.entry.attempt == entry.attempt);
        let formed = match &entry.record {
            Record::Formed { generation, .. } if ours.is_some() => Some(*generation),
            _ => None,
        };
        let judged = judged(&entry.record);
        self.state.take_in(number, entry, body).map_err(|error| damaged(&self.store, number, &error))?;
        if let Some(place) = ours {
            self.unsettled[place].number = Some(number);
        }
        // An older verdict on that checkpoint that stands is not the newest any more: to give it again is to write it.
        self.unsettled.retain(|begun| {
            let newer = begun.number.is_none_or(|found| found == number);
            newer || judged.is_none() || self::judged(&begun.entry.record) != judged
        });
        self.held = formed.or(self.held);
        Ok(())
    }
}

/// The runs of a store, sorted: folders that hold a journal record 0.
pub async fn list_runs(store: &Store) -> Result<Vec<RunId>, JournalError> {
    let names = store.list_folders("").await?;
    let ids = names.into_iter().filter_map(|name| RunId::new(name).ok());
    let looks = ids.map(|run_id| async {
        match store.folder(run_id.as_str()).head(&layout::journal_entry(0)).await {
            Ok(_) => Ok(Some(run_id)),
            Err(StorageError::NotFound { .. }) => Ok(None),
            Err(error) => Err(JournalError::Storage(error)),
        }
    });
    let mut runs: Vec<_> = futures::stream::iter(looks)
        .buffered(RUNS_AT_ONCE)
        .try_filter_map(|run| std::future::ready(Ok(run)))
        .try_collect()
        .await?;
    runs.sort_unstable();
    Ok(runs)
}

fn new_entry(node: &NodeId, record: Record) -> Entry {
    Entry { format: record.format(), attempt: AttemptId::random(), at: Timestamp::now(), node: node.clone(), record }
}

fn encode(entry: &Entry) -> Result<Bytes, JournalError> {
    let refused = |error: InvalidEntry| JournalError::Refused {
        record: entry.record.kind(),
        reason: format!("it could not be read back: it {error}"),
    };
    entry.encode().map(Bytes::from).map_err(refused)
}

const fn is_commit(record: &Record) -> bool {
    matches!(record, Record::Committed(_))
}

/// The checkpoint on which `record` is a verdict, if it is one.
const fn judged(record: &Record) -> Option<(Step, Generation)> {
    match record {
        Record::Damaged { step, generation, .. } | Record::Cleared { step, generation } => Some((*step, *generation)),
        _ => None,
    }
}

fn at(record: &Record) -> At {
    match record {
        Record::Committed(committed) => At { rank: None, step: Some(committed.step.get()) },
        _ => At::default(),
    }
}

fn before_append(record: &Record) -> Result<(), JournalError> {
    Ok(faults::check("journal.before-append", at(record))?)
}

fn refused(record: &Record, refusal: Refusal) -> JournalError {
    refusal.into_error(record.kind())
}

/// The URI of the store that holds a run's folder.
pub(super) fn parent(uri: &str) -> String {
    uri.rsplit_once('/').map_or_else(|| uri.to_owned(), |(store, _)| store.to_owned())
}
