//! Reading and appending: the rules of [`super::admit`](fn@super::admit), carried out on a store.

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;

use super::{
    admit::{Refusal, admit},
    error::JournalError,
    record::{Committed, Entry, FormedReason, InvalidEntry, MAX_ENTRY, Record, ResumePoint, RosterEntry},
    state::RunState,
};
use crate::{
    config::RunConfig,
    faults::{self, At},
    ids::{AttemptId, DatasetId, Generation, NodeId, RunId, WorldSize},
    layout,
    storage::{CreateOutcome, StorageError, Store},
};

/// Records read at once.
const READ_AHEAD: usize = 16;

/// What a new generation is to be; see [`Record::Formed`].
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
}

/// An append that was begun and whose end is not known.
#[derive(Debug)]
struct Unsettled {
    entry: Entry,
    /// Where it was found to stand.
    number: Option<u64>,
}

/// A run's journal, as one node reads and writes it.
#[derive(Debug)]
pub struct Journal {
    /// The run's folder.
    store: Store,
    node: NodeId,
    state: RunState,
    /// The newest generation that this node has formed through this journal.
    held: Option<Generation>,
    unsettled: Option<Unsettled>,
}

impl Journal {
    /// Creates a run in its folder `store`: writes record 0.
    ///
    /// [`JournalError::Exists`] if the id is taken. Of several nodes that create one run at once exactly one succeeds.
    pub async fn create(store: Store, node: NodeId, run_id: RunId, config: RunConfig) -> Result<Self, JournalError> {
        let taken = |store: &Store, run_id| JournalError::Exists { run_id, store: parent(&store.uri()) };
        let numbers = numbers(&store).await?;
        if numbers.first() == Some(&0) {
            return Err(taken(&store, run_id));
        }
        if !numbers.is_empty() {
            return Err(missing(&store, 0));
        }
        let record = Record::Created { run_id: run_id.clone(), config: Box::new(config) };
        let entry = new_entry(&node, record);
        let body = encode(&entry)?;
        before_append(&entry.record)?;
        if store.create(&layout::journal_entry(0), body).await? == CreateOutcome::Exists {
            return Err(taken(&store, run_id));
        }
        let state = RunState::begin(&run_id, entry).map_err(|error| damaged(&store, 0, &error))?;
        faults::check("journal.after-append", At::default())?;
        Ok(Self { store, node, state, held: None, unsettled: None })
    }

    /// Opens the run in its folder `store` and reads all its records.
    pub async fn open(store: Store, node: NodeId, run_id: RunId) -> Result<Self, JournalError> {
        let state = replay(&store, &run_id).await?;
        Ok(Self { store, node, state, held: None, unsettled: None })
    }

    /// The same where `state` was read from there before: reads on.
    pub async fn follow(store: Store, node: NodeId, state: RunState) -> Result<Self, JournalError> {
        let mut journal = Self { store, node, state, held: None, unsettled: None };
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

    /// Reads on to the end; says how many records were new.
    pub async fn refresh(&mut self) -> Result<u64, JournalError> {
        let before = self.state.next();
        while let Some(entry) = read(&self.store, self.state.next()).await? {
            self.apply(entry)?;
        }
        Ok(self.state.next() - before)
    }

    /// Appends a record other than `created` and `formed`; gives its number.
    ///
    /// [`JournalError::Fenced`]: another generation was formed since; stop. [`JournalError::Storage`]: it is not known
    /// whether the record stands; appending the same record again settles it, without writing it twice. A `committed`
    /// is the same if it names the same manifest.
    pub async fn append(&mut self, record: Record) -> Result<u64, JournalError> {
        if matches!(record, Record::Created { .. } | Record::Formed { .. }) {
            let reason = "it has a function of its own".into();
            return Err(JournalError::Refused { record: record.kind(), reason });
        }
        self.append_if(record, |_, _| Ok(())).await
    }

    /// Forms the next generation, which fences all older ones; this node holds it from then on.
    ///
    /// `formed` is chosen from [`state`](Self::state) as it stands at the call. If the run went on in the meantime, the
    /// choice may be wrong, and nothing is formed: [`JournalError::Overtaken`] if another node formed a generation (look
    /// at its heartbeat), [`JournalError::Moved`] if a checkpoint came or went, or the run ended (choose again). The
    /// state is up to date after either.
    pub async fn form(&mut self, formed: Formed) -> Result<Generation, JournalError> {
        let generation = self.state.generation().next();
        let Formed { roster, world_size, resume, overrides, reason, data } = formed;
        let record = Record::Formed { generation, roster, world_size, resume, overrides, reason, data };
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
            // Of several, the newest is the one whose heartbeat is worth a look.
            Err(error @ (JournalError::Overtaken { .. } | JournalError::Moved { .. })) => {
                Err(match self.state.formed() {
                    Some(newest) if newest.generation >= generation => {
                        JournalError::Overtaken { node: newest.node.clone(), generation: newest.generation }
                    }
                    _ => error,
                })
            }
            Err(error) => Err(error),
        }
    }

    /// Appends `record` at the first free number, as long as the rules admit it there and `still_right` lets pass every
    /// record that came before it unexpectedly.
    async fn append_if(
        &mut self,
        record: Record,
        still_right: impl Fn(&Record, &NodeId) -> Result<(), JournalError>,
    ) -> Result<u64, JournalError> {
        let entry = match self.unsettled.take() {
            // The same again: same attempt, same body.
            Some(Unsettled { entry, number }) if entry.record == record => {
                if let Some(number) = number {
                    return Ok(number);
                }
                entry
            }
            _ => new_entry(&self.node, record),
        };
        let body = encode(&entry)?;
        loop {
            if let Some(number) = self.committed_as(&entry.record) {
                return self.settled(&entry, number);
            }
            admit(&self.state, self.held, &entry.record).map_err(|refusal| refused(&entry.record, refusal))?;
            before_append(&entry.record)?;
            let number = self.state.next();
            // Before the request: the future may be dropped, and the request succeed.
            self.unsettled = Some(Unsettled { entry: entry.clone(), number: None });
            match self.store.create(&layout::journal_entry(number), body.clone()).await? {
                CreateOutcome::Created => {
                    self.apply(entry.clone())?;
                    return self.settled(&entry, number);
                }
                CreateOutcome::Exists => {
                    let mut verdict = Ok(());
                    while let Some(came) = read(&self.store, self.state.next()).await? {
                        let number = self.state.next();
                        if came.attempt == entry.attempt {
                            self.apply(came)?;
                            return self.settled(&entry, number);
                        }
                        verdict = verdict.and_then(|()| still_right(&came.record, &came.node));
                        self.apply(came)?;
                    }
                    if self.state.next() == number {
                        return Err(missing(&self.store, number));
                    }
                    verdict?;
                }
            }
        }
    }

    /// The number of the record that has committed the very manifest that `record` is about. A manifest is created once
    /// and carries its attempt, so this is the same commit; a save that is tried again differs in its times only.
    fn committed_as(&self, record: &Record) -> Option<u64> {
        let Record::Committed(wanted) = record else { return None };
        let stands = self.state.checkpoint(wanted.step, wanted.generation)?;
        let same =
            |found: &Committed| (&found.manifest, &found.manifest_crc64) == (&wanted.manifest, &wanted.manifest_crc64);
        same(&stands.committed).then_some(stands.number)
    }

    /// `entry` stands under `number`, and is applied.
    fn settled(&mut self, entry: &Entry, number: u64) -> Result<u64, JournalError> {
        self.unsettled = None;
        faults::check("journal.after-append", at(&entry.record))?;
        Ok(number)
    }

    /// The same knowledge, on another store.
    #[cfg(test)]
    pub(super) fn moved_to(self, store: Store) -> Self {
        Self { store, ..self }
    }

    /// Takes in the next record, and notes when it is one of ours that had been given up.
    fn apply(&mut self, entry: Entry) -> Result<(), JournalError> {
        let number = self.state.next();
        let ours = self.unsettled.as_ref().is_some_and(|unsettled| unsettled.entry.attempt == entry.attempt);
        let formed = match &entry.record {
            Record::Formed { generation, .. } if ours => Some(*generation),
            _ => None,
        };
        self.state.apply(number, entry).map_err(|error| damaged(&self.store, number, &error))?;
        if let Some(unsettled) = self.unsettled.as_mut().filter(|_| ours) {
            unsettled.number = Some(number);
        }
        self.held = formed.or(self.held);
        Ok(())
    }
}

/// Reads the journal of the run in its folder `store`.
pub async fn replay(store: &Store, run_id: &RunId) -> Result<RunState, JournalError> {
    let listed = numbers(store).await?;
    if listed.is_empty() {
        return Err(JournalError::NoSuchRun { run_id: run_id.clone(), store: parent(&store.uri()) });
    }
    let mut read_ahead = futures::stream::iter(0..listed.len() as u64)
        .map(|number| async move { read(store, number).await?.ok_or_else(|| missing(store, number)) })
        .buffered(READ_AHEAD);
    let Some(first) = read_ahead.try_next().await? else { return Err(missing(store, 0)) };
    let mut state = RunState::begin(run_id, first).map_err(|error| damaged(store, 0, &error))?;
    let add = |state: &mut RunState, entry: Entry| {
        let number = state.next();
        state.apply(number, entry).map_err(|error| damaged(store, number, &error))
    };
    while let Some(entry) = read_ahead.try_next().await? {
        add(&mut state, entry)?;
    }
    // What came while the list was being read, and what a folder's listing may have missed.
    while let Some(entry) = read(store, state.next()).await? {
        add(&mut state, entry)?;
    }
    if listed.last().is_some_and(|&last| last >= state.next()) {
        return Err(missing(store, state.next()));
    }
    Ok(state)
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
        .buffered(READ_AHEAD)
        .try_filter_map(|run| std::future::ready(Ok(run)))
        .try_collect()
        .await?;
    runs.sort_unstable();
    Ok(runs)
}

/// The numbers of the journal's records, in order.
async fn numbers(store: &Store) -> Result<Vec<u64>, JournalError> {
    let listed = store.list(layout::JOURNAL).await?;
    let mut numbers: Vec<_> = listed.iter().filter_map(|info| layout::journal_number(&info.key)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// One record; `None` if there is none of this number.
async fn read(store: &Store, number: u64) -> Result<Option<Entry>, JournalError> {
    let key = layout::journal_entry(number);
    let object = || format!("{}/{key}", store.uri());
    let body = match store.get(&key, MAX_ENTRY).await {
        Ok(body) => body,
        Err(StorageError::NotFound { .. }) => return Ok(None),
        Err(error @ StorageError::TooLarge { .. }) => {
            return Err(JournalError::Damaged { object: object(), reason: format!("is too large: {error}") });
        }
        Err(error) => return Err(error.into()),
    };
    match Entry::decode(&body) {
        Ok(entry) => Ok(Some(entry)),
        Err(InvalidEntry::Newer { found }) => Err(JournalError::Newer { object: object(), format: found }),
        Err(error @ InvalidEntry::Garbled(_)) => {
            Err(JournalError::Damaged { object: object(), reason: error.to_string() })
        }
    }
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
    match refusal {
        Refusal::Fenced { node, generation } => JournalError::Fenced { node, generation },
        Refusal::Wrong(reason) => JournalError::Refused { record: record.kind(), reason },
    }
}

fn damaged(store: &Store, number: u64, error: &super::Inconsistent) -> JournalError {
    let object = format!("{}/{}", store.uri(), layout::journal_entry(number));
    JournalError::Damaged { object, reason: error.to_string() }
}

fn missing(store: &Store, number: u64) -> JournalError {
    let object = format!("{}/{}", store.uri(), layout::journal_entry(number));
    JournalError::Damaged { object, reason: "is missing, though later ones are there".into() }
}

/// The URI of the store that a run's folder lies in.
fn parent(uri: &str) -> String {
    uri.rsplit_once('/').map_or_else(|| uri.to_owned(), |(store, _)| store.to_owned())
}
