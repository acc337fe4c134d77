//! Reading a journal from its first record to its end, with as few requests as possible: through summaries, then record
//! by record.
//!
//! Finding the end: a writer creates a record only after it has read, or created, the one before it. So the first free
//! number is the end, unless an object was lost. A lost object must not pass for the end: a record appended there would
//! contradict those behind it.
//! - A journal of fewer than [`PAGE`] objects is listed whole: every gap in it is an error, however wide.
//! - Of a longer one, the part after the newest summary is listed (on a cloud, where a listing can begin in the
//!   middle), so any gap from there on is an error, too. On `file://`, where it can't, the next [`PROBES`] numbers are
//!   checked each time a number is free: a gap of fewer than [`PROBES`] records is an error, and a wider one is taken
//!   for the end. That mistake requires the loss of all of these files, and of any summaries behind them as well.
//! - Records that a summary holds are not read, except those that it is compared with ([`super::summary`]). The loss of
//!   one shows in `verify --all --deep` ([`audit`]), and is harmless until then.

use std::collections::BTreeSet;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::{
    error::JournalError,
    log::parent,
    pack::Unreadable,
    record::{Entry, InvalidEntry, MAX_ENTRY, Record},
    state::{Inconsistent, RunState},
    summary::{Loaded, MAX, SPANS, Spans, Summary},
};
use crate::{
    ids::RunId,
    layout,
    storage::{Crc64, StorageError, Store},
};

/// Records read at once.
const READ_AHEAD: usize = 16;
/// Summaries read at once.
const SUMMARIES: usize = 4;
/// Objects in a page of a listing, as S3 and most others give them out.
const PAGE: usize = 1000;
/// Numbers that are checked behind a free one.
const PROBES: u64 = 32;

/// Reads the journal of the run in its folder `store`.
pub async fn replay(store: &Store, run_id: &RunId) -> Result<RunState, JournalError> {
    replay_by(store, run_id, SPANS).await
}

/// The same with summaries of these lengths. Records and summaries that disagree are read once more: one of them may
/// have been garbled in transfer.
pub(super) async fn replay_by(store: &Store, run_id: &RunId, spans: Spans) -> Result<RunState, JournalError> {
    match replay_once(store, run_id, spans).await {
        Err(JournalError::Disagrees { .. }) => replay_once(store, run_id, spans).await,
        other => other,
    }
}

async fn replay_once(store: &Store, run_id: &RunId, spans: Spans) -> Result<RunState, JournalError> {
    let mut replay = Replay::begin(store, run_id, spans).await?;
    let mut stretch = spans.first();
    loop {
        if replay.summaries().await? {
            stretch = spans.first();
            continue;
        }
        // None begins here. Earlier writers without summaries may have left out many: look for them at growing
        // distances.
        let next = replay.state.next();
        if !replay.records((next / stretch + 1) * stretch).await? {
            break;
        }
        stretch = spans.0.iter().copied().find(|span| *span > stretch && *span < spans.last()).unwrap_or(stretch);
    }
    replay.compare().await?;
    Ok(replay.state)
}

/// Reads every record, and checks the summaries against them; returns the number of records. Objects that are no
/// summaries are reported and skipped.
pub async fn audit(store: &Store, run_id: &RunId) -> Result<usize, JournalError> {
    audit_by(store, run_id, SPANS).await
}

/// The same with summaries of these lengths.
pub(super) async fn audit_by(store: &Store, run_id: &RunId, spans: Spans) -> Result<usize, JournalError> {
    // Nothing is final here, so all blocks stay.
    let whole = Spans(if spans == SPANS { &[16, u64::MAX] } else { &[2, u64::MAX] });
    // This comes first: summaries written later may hold records that are not read here.
    let summaries = store.list(layout::SUMMARIES).await?;
    let mut replay = Replay::begin(store, run_id, whole).await?;
    replay.records(u64::MAX).await?;
    let tail = &replay.state.tail;
    let mut good = 0;
    for info in summaries {
        let Some((to, (from, key))) = layout::summary_number(&info.key).and_then(|to| Some((to, spans.place(to)?)))
        else {
            continue;
        };
        if key != info.key {
            continue;
        }
        let disagrees = |reason: &str| disagrees(store, &key, reason.to_owned());
        let blocks: Vec<_> =
            tail.blocks(from, to).ok_or_else(|| disagrees("it holds more records than there are"))?.collect();
        let before = blocks.first().map_or(Crc64::EMPTY, |block| block.1);
        let Some(loaded) = fetch(store, spans, (from, to), before).await else { continue };
        let mut rows = loaded.rows.iter();
        for (block, _) in blocks {
            let expected =
                super::pack::unpack(block).map_err(|_| disagrees("a record does not read back as written"))?;
            for row in expected {
                let same =
                    rows.next().is_some_and(|found| found.crc64 == row.crc64 && is_same(&found.entry, &row.entry));
                if !same {
                    return Err(disagrees(&format!("the record of {} differs", row.entry.at)));
                }
            }
        }
        good += 1;
    }
    Ok(good)
}

/// As text: NaN does not equal NaN.
fn is_same(a: &Entry, b: &Entry) -> bool {
    let text = |entry: &Entry| serde_json::to_vec(&(&entry.at, &entry.node, &entry.record)).ok();
    a.format == b.format && text(a) == text(b)
}

struct Replay<'a> {
    store: &'a Store,
    state: RunState,
    /// The sum of record 0.
    first: Crc64,
    /// The highest record seen in a listing.
    last: Option<u64>,
    /// Whether the listing went to the end.
    listed: bool,
    /// Summaries that are unusable.
    useless: BTreeSet<u64>,
    /// The newest summary's end, and its last record's sum.
    newest: Option<(u64, Crc64)>,
    /// The ends of the summaries of the largest span, once they are listed.
    whole: Option<BTreeSet<u64>>,
}

impl<'a> Replay<'a> {
    async fn begin(store: &'a Store, run_id: &RunId, spans: Spans) -> Result<Self, JournalError> {
        let listed = async { store.list_some(layout::JOURNAL, None, PAGE).await.map_err(JournalError::from) };
        let (page, first) = futures::try_join!(listed, read(store, 0))?;
        let numbers = numbers(page.iter().map(|info| info.key.as_str()));
        let Some((entry, body)) = first else {
            return Err(match numbers.last() {
                None => JournalError::NoSuchRun { run_id: run_id.clone(), store: parent(&store.uri()) },
                Some(_) => missing(store, 0),
            });
        };
        let copied = copied(store, run_id, &entry);
        let (state, first) = match RunState::begin_as(run_id, entry, body.clone(), spans) {
            Ok(state) => (state, Crc64::of(&body)),
            Err(error) => {
                let again = read_otherwise(store, 0, &body).await?;
                let (entry, body) = again.ok_or_else(|| copied.unwrap_or_else(|| damaged(store, 0, &error)))?;
                let first = Crc64::of(&body);
                (RunState::begin_as(run_id, entry, body, spans).map_err(|error| damaged(store, 0, &error))?, first)
            }
        };
        let (last, listed) = (numbers.last().copied(), page.len() < PAGE);
        Ok(Self { store, state, first, last, listed, useless: BTreeSet::new(), newest: None, whole: None })
    }

    /// Reads on through the summaries that begin here; returns whether there was one.
    async fn summaries(&mut self) -> Result<bool, JournalError> {
        let spans = self.state.tail.spans();
        let at = if self.state.next() == 1 { 0 } else { self.state.next() };
        for folder in spans.folders(at) {
            let whole = folder == layout::summaries(spans.last(), None);
            let ends = match &self.whole {
                Some(ends) if whole => ends.clone(),
                // The end is known, and this kind would go beyond it.
                _ if self.listed && self.last.is_none_or(|last| !may_hold(spans, at, &folder, last)) => continue,
                _ => self.ends(&folder).await,
            };
            if whole {
                self.whole = Some(ends.clone());
                let row = (1..).map(|n| at + n * spans.last());
                let row: Vec<u64> = row.take_while(|to| ends.contains(to) && !self.useless.contains(to)).collect();
                if self.load_all(at, &row).await? {
                    return Ok(true);
                }
                continue;
            }
            let usable = |to: &u64| *to > at && spans.place(*to).is_some_and(|(from, _)| from == at);
            for to in ends.into_iter().rev().filter(usable) {
                if !self.useless.contains(&to) && self.load_all(at, &[to]).await? {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// The ends of the summaries in a folder; none if it can't be listed.
    async fn ends(&self, folder: &str) -> BTreeSet<u64> {
        match self.store.list(folder).await {
            Ok(found) => found.iter().filter_map(|info| layout::summary_number(&info.key)).collect(),
            Err(error) => {
                tracing::warn!(%error, "can't list the summaries of the journal: reading its records one by one");
                BTreeSet::new()
            }
        }
    }

    /// Reads on through these summaries, each beginning where the one before it ends, as far as they are usable;
    /// returns whether any was.
    async fn load_all(&mut self, from: u64, ends: &[u64]) -> Result<bool, JournalError> {
        let spans = self.state.tail.spans();
        let store = self.store.clone();
        let mut bodies = stream::iter(ends.to_vec())
            .map(|to| {
                let store = store.clone();
                async move { (to, body(&store, spans, to).await) }
            })
            .buffered(SUMMARIES);
        let mut at = from;
        while let Some((to, body)) = bodies.next().await {
            let loaded = body.and_then(|body| unfold(&store, spans, (at, to), self.state.tail.chain(), &body));
            let Some(loaded) = loaded else {
                self.useless.insert(to);
                break;
            };
            self.load(at, to, loaded)?;
            at = to;
        }
        Ok(at > from)
    }

    fn load(&mut self, from: u64, to: u64, loaded: Loaded) -> Result<(), JournalError> {
        let spans = self.state.tail.spans();
        let key = || spans.place(to).map_or_else(String::new, |(_, key)| key);
        let Loaded { summary, rows } = loaded;
        self.newest = rows.last().map(|row| (to, row.crc64));
        for (number, row) in (from..).zip(rows) {
            if number == 0 {
                if row.crc64 != self.first {
                    return Err(disagrees(self.store, &key(), "record 0 reads differently".into()));
                }
                continue;
            }
            let applied = self.state.apply(number, row.entry);
            applied.map_err(|error| disagrees(self.store, &key(), format!("its record {number} {error}")))?;
        }
        self.state.tail.load(summary);
        Ok(())
    }

    /// Reads records up to `until`, exclusive; returns whether there are that many.
    async fn records(&mut self, until: u64) -> Result<bool, JournalError> {
        while self.state.next() < until {
            let next = self.state.next();
            match self.last.filter(|last| *last >= next) {
                Some(last) => self.listed_records(until.min(last.saturating_add(1))).await?,
                None if !self.listed => self.look_ahead(next).await?,
                // Records that appeared while the list was being read, and any that a folder's listing may have missed.
                None => match read(self.store, next).await? {
                    Some((entry, body)) => self.take_in(entry, body).await?,
                    None => return Ok(false),
                },
            }
        }
        Ok(true)
    }

    /// Reads records that are there.
    async fn listed_records(&mut self, until: u64) -> Result<(), JournalError> {
        let store = self.store.clone();
        let mut records = stream::iter(self.state.next()..until)
            .map(|number| {
                let store = store.clone();
                async move { read(&store, number).await?.ok_or_else(|| missing(&store, number)) }
            })
            .buffered(READ_AHEAD);
        while let Some((entry, body)) = records.try_next().await? {
            self.take_in(entry, body).await?;
        }
        Ok(())
    }

    /// Finds out which numbers from `next` on exist.
    async fn look_ahead(&mut self, next: u64) -> Result<(), JournalError> {
        if !self.store.is_local() {
            let behind = layout::journal_entry(next.saturating_sub(1));
            let page = self.store.list_some(layout::JOURNAL, Some(&behind), PAGE).await?;
            self.last = numbers(page.iter().map(|info| info.key.as_str())).last().copied();
            // A page of other objects brings no progress.
            self.listed = page.len() < PAGE || self.last.is_none_or(|last| last < next);
            return Ok(());
        }
        let store = self.store.clone();
        let looks = stream::iter(next..next.saturating_add(PROBES)).map(|number| {
            let store = store.clone();
            async move {
                match store.head(&layout::journal_entry(number)).await {
                    Ok(_) => Ok(Some(number)),
                    Err(StorageError::NotFound { .. }) => Ok(None),
                    Err(error) => Err(JournalError::Storage(error)),
                }
            }
        });
        let taken: Vec<Option<u64>> = looks.buffered(READ_AHEAD).try_collect().await?;
        self.last = taken.into_iter().flatten().last();
        self.listed = self.last.is_none();
        Ok(())
    }

    async fn take_in(&mut self, entry: Entry, body: Bytes) -> Result<(), JournalError> {
        let number = self.state.next();
        let Err(error) = self.state.take_in(number, entry, body.clone()) else { return Ok(()) };
        let again = read_otherwise(self.store, number, &body).await?;
        let (entry, body) = again.ok_or_else(|| damaged(self.store, number, &error))?;
        self.state.take_in(number, entry, body).map_err(|error| damaged(self.store, number, &error))
    }

    /// Compares records from summaries with the most important ones in the store.
    async fn compare(&self) -> Result<(), JournalError> {
        let Some((to, sum)) = self.newest else { return Ok(()) };
        let key = self.state.tail.spans().place(to).map_or_else(String::new, |(_, key)| key);
        let store = self.store;
        let record = |number: u64| async move { read(store, number).await?.ok_or_else(|| missing(store, number)) };
        let last = async {
            let (_, body) = record(to - 1).await?;
            if Crc64::of(&body) != sum {
                return Err(disagrees(self.store, &key, format!("record {} reads differently", to - 1)));
            }
            Ok(())
        };
        let newest = async {
            let Some(newest) = self.state.newest().filter(|newest| newest.number < to) else { return Ok(()) };
            let (entry, _) = record(newest.number).await?;
            let expected =
                Entry { record: Record::Committed(newest.committed.clone()), at: newest.at, ..entry.clone() };
            if !is_same(&entry, &expected) {
                return Err(disagrees(self.store, &key, format!("record {} reads differently", newest.number)));
            }
            Ok(())
        };
        futures::try_join!(last, newest).map(drop)
    }
}

/// Whether a summary in this folder, which begins at `at`, may end before record `last` or with it.
fn may_hold(spans: Spans, at: u64, folder: &str, last: u64) -> bool {
    spans.0.iter().any(|span| {
        let is_it = folder == layout::summaries(*span, Some(at)) || folder == layout::summaries(*span, None);
        is_it && at.checked_add(*span).is_some_and(|end| end <= last.saturating_add(1))
    })
}

/// A summary; `None`, with a warning, if it is unusable.
async fn fetch(store: &Store, spans: Spans, (from, to): (u64, u64), before: Crc64) -> Option<Loaded> {
    unfold(store, spans, (from, to), before, &body(store, spans, to).await?)
}

/// The bytes of the summary that ends at `to`.
async fn body(store: &Store, spans: Spans, to: u64) -> Option<Bytes> {
    let (_, key) = spans.place(to)?;
    match store.get(&key, MAX).await {
        Ok(body) => Some(body),
        Err(StorageError::NotFound { .. }) => None,
        Err(error) => {
            tracing::warn!(%error, "skipping a summary of the journal");
            None
        }
    }
}

fn unfold(store: &Store, spans: Spans, (from, to): (u64, u64), before: Crc64, body: &Bytes) -> Option<Loaded> {
    match Summary::decode(body, spans, (from, to), before) {
        Ok(loaded) => Some(loaded),
        Err(Unreadable::Newer) => None,
        Err(Unreadable::Garbled(reason)) => {
            let object = spans.place(to).map_or_else(String::new, |(_, key)| format!("{}/{key}", store.uri()));
            tracing::warn!(
                object,
                "skipping a damaged summary of the journal, which costs only time; delete it: {reason}"
            );
            None
        }
    }
}

/// Whether the run in its folder `store` has its first record.
pub(super) async fn is_begun(store: &Store) -> Result<bool, JournalError> {
    let page = store.list_some(layout::JOURNAL, None, PAGE).await?;
    let numbers = numbers(page.iter().map(|info| info.key.as_str()));
    match numbers.first() {
        Some(0) => Ok(true),
        None => Ok(false),
        // On a folder, a page has no order.
        Some(_) => match store.head(&layout::journal_entry(0)).await {
            Ok(_) => Ok(true),
            Err(StorageError::NotFound { .. }) => Err(missing(store, 0)),
            Err(error) => Err(error.into()),
        },
    }
}

/// The numbers of records among keys, in order.
fn numbers<'k>(keys: impl Iterator<Item = &'k str>) -> BTreeSet<u64> {
    keys.filter_map(layout::journal_number).collect()
}

/// One record and its stored bytes; `None` if there is no record of this number. A malformed record is read once more:
/// it may have been garbled in transfer.
pub(super) async fn read(store: &Store, number: u64) -> Result<Option<(Entry, Bytes)>, JournalError> {
    match read_once(store, number).await {
        Err(JournalError::Garbled { .. } | JournalError::Newer { .. }) => match read_once(store, number).await {
            Err(JournalError::Garbled { object, reason, .. }) => {
                let next = layout::journal_entry(number.saturating_add(1));
                let last = matches!(store.head(&next).await, Err(StorageError::NotFound { .. }));
                Err(JournalError::Garbled { object, reason, last })
            }
            Err(newer @ JournalError::Newer { .. }) => Err(newer),
            second => {
                tracing::warn!(number, "a record of the journal was garbled in transfer; reading it again was fine");
                second
            }
        },
        first => first,
    }
}

async fn read_once(store: &Store, number: u64) -> Result<Option<(Entry, Bytes)>, JournalError> {
    let key = layout::journal_entry(number);
    let object = || format!("{}/{key}", store.uri());
    let garbled = |reason| JournalError::Garbled { object: object(), reason, last: false };
    let body = match store.get(&key, MAX_ENTRY).await {
        Ok(body) => body,
        Err(StorageError::NotFound { .. }) => return Ok(None),
        Err(error @ StorageError::TooLarge { .. }) => return Err(garbled(format!("is too large: {error}"))),
        Err(error) => return Err(error.into()),
    };
    match Entry::decode(&body) {
        Ok(entry) => Ok(Some((entry, body))),
        Err(InvalidEntry::Newer { found }) => Err(JournalError::Newer { object: object(), format: found }),
        Err(error @ InvalidEntry::Garbled(_)) => Err(garbled(error.to_string())),
    }
}

/// The record again, if its bytes differ from `before`: then those were garbled in transfer.
pub(super) async fn read_otherwise(
    store: &Store,
    number: u64,
    before: &Bytes,
) -> Result<Option<(Entry, Bytes)>, JournalError> {
    let again = read(store, number).await?.filter(|(_, body)| body != before);
    if again.is_some() {
        tracing::warn!(number, "a record of the journal was garbled in transfer; reading it again was fine");
    }
    Ok(again)
}

pub(super) fn damaged(store: &Store, number: u64, error: &Inconsistent) -> JournalError {
    let object = format!("{}/{}", store.uri(), layout::journal_entry(number));
    JournalError::Damaged { object, reason: error.to_string() }
}

/// The error of a sound first record that is another run's.
fn copied(store: &Store, wanted: &RunId, entry: &Entry) -> Option<JournalError> {
    match &entry.record {
        Record::Created { run_id, .. } if run_id != wanted => {
            let (folder, found) = (store.uri(), run_id.clone());
            Some(JournalError::Copied { folder, found, wanted: wanted.clone() })
        }
        _ => None,
    }
}

pub(super) fn missing(store: &Store, number: u64) -> JournalError {
    let object = format!("{}/{}", store.uri(), layout::journal_entry(number));
    JournalError::Damaged { object, reason: "is missing, though later ones exist".into() }
}

fn disagrees(store: &Store, key: &str, reason: String) -> JournalError {
    JournalError::Disagrees { object: format!("{}/{key}", store.uri()), reason }
}
