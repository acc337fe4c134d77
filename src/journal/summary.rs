//! Summaries: the journal's records once more, many packed into one object, so that a run of a million records opens
//! with a few requests. They only make reading faster: the records stay, and they alone are the authority.
//!
//! Stored layout: `summaries/<span>/<from>/<to>` holds the records `from` (inclusive) to `to` (exclusive). `to` is a
//! multiple of one of the [`SPANS`], the largest that it is a multiple of is its span, and `from` is the last multiple
//! of the next larger span before `to`. So at most one object of each span leads from the first record to the newest
//! multiple of the smallest span: 131072, 139264, 140288, 140416, 140432. Those of the largest span begin where the one
//! before them ends and are stored in `summaries/<span>/all/<to>`. An object is one line of JSON, [`Head`], and then
//! blocks of [`SPANS`]`[0]` records each ([`super::pack`]). It holds no state: it is replayed by the code that replays
//! records, so a field that a later version reads from a record is read from a summary as well.
//!
//! The writer: the node that appends record `to - 1` writes the summary in the background, one at a time, after it has
//! read the newest of the records back from the store. It also writes the summaries missing between the first record
//! and `to`, as far as it has not read or written them itself: so the next writer fills any gap left by a crash, a full
//! disk or an older program.
//!
//! Invariants
//! - **Only existing records are summarised.** A writer knows records that it has read or created, and records never
//!   change: a writer that is fenced, or far behind, writes the same bytes as any other. Summaries are created once;
//!   finding that another writer was first is no error.
//! - **Nothing waits for it**: no append, no heartbeat. It takes one small request at a time.
//! - **A reader believes** an object whose checksums are right, that names the place where it lies, and whose `before`
//!   is the digest of all records before it as the reader has it. Anything else is skipped with a warning, a newer
//!   format without; that costs time only.
//! - **A summary that contradicts the records is an error that names it** ([`JournalError::Disagrees`]): every replay
//!   compares the first record, the last before the end of the newest summary, and that of the newest good checkpoint;
//!   `verify --all --deep` compares all of them ([`super::audit`]).
//!
//! Crash: an object exists or does not; a missing one is written later. Retry: creates the same bytes again, or finds
//! them. Cancel: like a crash. A writer with faulty memory: each packed block is unpacked and compared, and the newest
//! records are read once more and compared, before anything is written; a block garbled in memory later does not match
//! its checksum.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{
    pack::{self, Row, Unreadable},
    record::{Entry, MAX_ENTRY},
};
use crate::{
    layout,
    storage::{Crc64, Store},
};

/// Version of the layout.
const FORMAT: u32 = 1;

/// Records between two summaries, and how many those of the next larger kind hold. A journal of 1.5 million records
/// takes 11 + 4 objects and 15 records, and its summaries together about twice the bytes of the records.
pub(super) const SPANS: Spans = Spans(&[16, 128, 1024, 8192, 131_072]);

/// The largest summary that is written or accepted.
pub(super) const MAX: u64 = 64 << 20;

/// The numbers of records whose multiples are ends of summaries, each a multiple of the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spans(pub &'static [u64]);

impl Spans {
    /// Records of a block.
    pub fn first(self) -> u64 {
        self.0[0]
    }

    /// Records of the largest.
    pub fn last(self) -> u64 {
        self.0[self.0.len() - 1]
    }

    /// Where the summary that ends at `to` begins, and its key; `None` if no summary ends there.
    pub fn place(self, to: u64) -> Option<(u64, String)> {
        let level = self.0.iter().rposition(|span| to > 0 && to.is_multiple_of(*span))?;
        let (span, from, folder) = match self.0.get(level + 1) {
            Some(window) => (self.0[level], to - to % window, true),
            None => (self.0[level], to - self.0[level], false),
        };
        Some((from, format!("{}/{to:020}", layout::summaries(span, folder.then_some(from)))))
    }

    /// The folders in which a summary that begins at `from` may lie, that of the largest first, and the most records
    /// that it holds there.
    pub fn folders(self, from: u64) -> Vec<String> {
        let mut folders = Vec::new();
        for (level, span) in self.0.iter().enumerate().rev() {
            match self.0.get(level + 1) {
                None if from.is_multiple_of(*span) => folders.push(layout::summaries(*span, None)),
                Some(window) if from.is_multiple_of(*window) => folders.push(layout::summaries(*span, Some(from))),
                _ => {}
            }
        }
        folders
    }
}

/// The first line of an object.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Head {
    format: u32,
    /// The first record in it.
    from: u64,
    /// The first record after it.
    to: u64,
    /// Digest of all records before.
    before: String,
    /// Digest of all records up to the end of this one.
    after: String,
}

/// The digest of all records up to the end of these rows.
fn chained(before: Crc64, rows: &[Row]) -> Crc64 {
    let sums = [before].into_iter().chain(rows.iter().map(|row| row.crc64));
    Crc64::of(&sums.flat_map(|sum| sum.0.to_be_bytes()).collect::<Vec<u8>>())
}

/// A block, and the digest that its records' digests continue.
#[derive(Clone, Debug)]
struct Block {
    bytes: Bytes,
    before: Crc64,
    after: Crc64,
}

/// An object, before it is written or after it is read.
#[derive(Clone, Debug)]
pub(super) struct Summary {
    from: u64,
    to: u64,
    blocks: Vec<Block>,
}

impl Summary {
    fn encode(&self) -> Option<Bytes> {
        let head = Head {
            format: FORMAT,
            from: self.from,
            to: self.to,
            before: self.blocks.first()?.before.to_string(),
            after: self.blocks.last()?.after.to_string(),
        };
        let mut body = serde_json::to_vec(&head).ok()?;
        body.push(b'\n');
        for block in &self.blocks {
            body.extend_from_slice(&block.bytes);
        }
        (body.len() as u64 <= MAX).then(|| body.into())
    }

    /// Takes apart an object that claims to hold `from..to` after records with the digest `before`.
    pub fn decode(body: &Bytes, spans: Spans, (from, to): (u64, u64), before: Crc64) -> Result<Loaded, Unreadable> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let end = body.iter().position(|byte| *byte == b'\n').ok_or(Unreadable::Garbled("it has no first line"))?;
        let no_head = |_| Unreadable::Garbled("its first line is malformed");
        let Version { format } = serde_json::from_slice(&body[..end]).map_err(no_head)?;
        if format > FORMAT {
            return Err(Unreadable::Newer);
        }
        let head: Head = serde_json::from_slice(&body[..end]).map_err(no_head)?;
        if (head.from, head.to) != (from, to) {
            return Err(Unreadable::Garbled("it belongs in another place"));
        }
        if head.before != before.to_string() {
            return Err(Unreadable::Garbled("it follows other records"));
        }
        let (mut rest, mut chain) = (body.slice(end + 1..), before);
        let (mut blocks, mut rows) = (Vec::new(), Vec::new());
        while !rest.is_empty() {
            let (bytes, behind) = pack::cut(&rest).ok_or(Unreadable::Garbled("it ends too early"))?;
            rest = behind;
            let found = pack::unpack(&bytes)?;
            if found.len() as u64 != spans.first() {
                return Err(Unreadable::Garbled("a block has a wrong number of records"));
            }
            let after = chained(chain, &found);
            blocks.push(Block { bytes, before: chain, after });
            chain = after;
            rows.extend(found);
        }
        if rows.len() as u64 != to - from || head.after != chain.to_string() {
            return Err(Unreadable::Garbled("its records are not the recorded ones"));
        }
        Ok(Loaded { summary: Self { from, to, blocks }, rows })
    }
}

/// A summary that was read, and its records.
#[derive(Debug)]
pub(super) struct Loaded {
    pub summary: Summary,
    pub rows: Vec<Row>,
}

/// The material for the next summaries: the records since the last that no summary of the largest span holds.
#[derive(Clone)]
pub(super) struct Tail {
    spans: Spans,
    /// The number of the record that comes next; [`u64::MAX`] if a record was left out: then no summary is made.
    next: u64,
    /// Since the last block, with their stored bytes.
    open: Vec<Arc<(Entry, Bytes)>>,
    /// Since the last multiple of the largest span.
    blocks: Vec<Block>,
    /// Digest of everything before `open`.
    chain: Crc64,
    /// Of the largest span; not known to be in the store.
    whole: Vec<Summary>,
    /// The ends of those in the store.
    standing: Arc<Mutex<BTreeSet<u64>>>,
}

impl Default for Tail {
    fn default() -> Self {
        Self::new(SPANS)
    }
}

impl fmt::Debug for Tail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tail").field("next", &self.next).finish_non_exhaustive()
    }
}

/// Two states are equal whatever they were read from.
impl PartialEq for Tail {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Tail {
    pub fn new(spans: Spans) -> Self {
        let (open, blocks, whole) = (Vec::new(), Vec::new(), Vec::new());
        Self { spans, next: 0, open, blocks, chain: Crc64::EMPTY, whole, standing: Arc::default() }
    }

    pub fn spans(&self) -> Spans {
        self.spans
    }

    /// The digest of the records up to the last block.
    pub fn chain(&self) -> Crc64 {
        self.chain
    }

    /// Adds a record and its bytes in the store.
    pub fn push(&mut self, number: u64, entry: Entry, body: Bytes) {
        if number != self.next {
            self.next = u64::MAX;
            return;
        }
        self.next += 1;
        self.open.push(Arc::new((entry, body)));
        if !self.next.is_multiple_of(self.spans.first()) {
            return;
        }
        let records = std::mem::take(&mut self.open);
        let packed = pack::pack(records.iter().map(|record| (&record.0, &record.1)));
        match packed.map(|bytes| (pack::unpack(&bytes), bytes)) {
            Some((Ok(rows), bytes)) => {
                let (before, after) = (self.chain, chained(self.chain, &rows));
                self.add(Block { bytes, before, after });
            }
            _ => {
                tracing::warn!(
                    record = number,
                    "no summary is made of the journal: a record does not read back as written"
                );
                self.next = u64::MAX;
            }
        }
    }

    /// Adds a summary that was read; it follows all that is known.
    pub fn load(&mut self, summary: Summary) {
        self.open.clear();
        self.standing().insert(summary.to);
        for block in summary.blocks {
            self.next = (self.next / self.spans.first() + 1) * self.spans.first();
            self.add(block);
        }
    }

    fn add(&mut self, block: Block) {
        self.chain = block.after;
        self.blocks.push(block);
        if self.next.is_multiple_of(self.spans.last()) {
            let blocks = std::mem::take(&mut self.blocks);
            let summary = Summary { from: self.next - self.spans.last(), to: self.next, blocks };
            let (next, longest) = (self.next, self.spans.last());
            let mut standing = self.standing();
            // Nothing needs earlier records any more.
            standing.retain(|to| *to >= next || to.is_multiple_of(longest));
            let stands = standing.contains(&next);
            drop(standing);
            if !stands {
                self.whole.push(summary);
            }
        }
    }

    fn standing(&self) -> std::sync::MutexGuard<'_, BTreeSet<u64>> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The summaries to write once the record before `next` exists.
    pub fn due(&mut self, next: u64) -> Option<Due> {
        if next != self.next || !self.next.is_multiple_of(self.spans.first()) {
            return None;
        }
        let standing = Arc::clone(&self.standing);
        let standing = standing.lock().unwrap_or_else(PoisonError::into_inner);
        self.whole.retain(|summary| !standing.contains(&summary.to));
        let mut summaries = self.whole.clone();
        let base = self.next - self.next % self.spans.last();
        let mut to = self.next;
        while to > base
            && let Some((from, _)) = self.spans.place(to)
        {
            let block = |number: u64| ((number - base) / self.spans.first()) as usize;
            if !standing.contains(&to) {
                let blocks = self.blocks.get(block(from)..block(to))?.to_vec();
                summaries.push(Summary { from, to, blocks });
            }
            to = from;
        }
        (!summaries.is_empty()).then(|| Due { spans: self.spans, summaries, standing: Arc::clone(&self.standing) })
    }

    /// The blocks since the last multiple of the largest span.
    pub fn blocks(&self, from: u64, to: u64) -> Option<impl Iterator<Item = (&Bytes, Crc64)>> {
        let (from, to) = ((from / self.spans.first()) as usize, (to / self.spans.first()) as usize);
        self.blocks.get(from..to).map(|blocks| blocks.iter().map(|block| (&block.bytes, block.before)))
    }
}

/// Summaries that are to be written.
#[derive(Debug)]
pub(super) struct Due {
    spans: Spans,
    summaries: Vec<Summary>,
    standing: Arc<Mutex<BTreeSet<u64>>>,
}

impl Due {
    /// Writes them, one after the other. `store` is the run's folder.
    pub async fn write(self, store: Store) {
        let newest = self.summaries.iter().max_by_key(|summary| summary.to);
        let Some((block, to)) = newest.and_then(|newest| Some((newest.blocks.last()?, newest.to))) else { return };
        if !stands(&store, block, to - self.spans.first()).await {
            return;
        }
        for summary in &self.summaries {
            let Some((_, key)) = self.spans.place(summary.to) else { continue };
            // This also checks that it was not garbled in memory since it was packed.
            let before = summary.blocks.first().map_or(Crc64::EMPTY, |block| block.before);
            let place = (summary.from, summary.to);
            let body = summary.encode().filter(|body| Summary::decode(body, self.spans, place, before).is_ok());
            let Some(body) = body else {
                tracing::warn!(object = key, "no summary is made of the journal: it does not read back as written");
                continue;
            };
            match store.create(&key, body).await {
                Ok(_) => {
                    self.standing.lock().unwrap_or_else(PoisonError::into_inner).insert(summary.to);
                }
                Err(error) => return tracing::debug!(%error, "no summary of the journal was written"),
            }
        }
    }
}

/// Whether the records of a block are still those in the store.
async fn stands(store: &Store, block: &Block, from: u64) -> bool {
    let Ok(rows) = pack::unpack(&block.bytes) else { return false };
    for (number, row) in (from..).zip(rows) {
        match store.get(&layout::journal_entry(number), MAX_ENTRY).await {
            Ok(body) if Crc64::of(&body) == row.crc64 => {}
            Ok(_) => {
                tracing::warn!(
                    record = number,
                    "no summary is made of the journal: a record reads differently than before"
                );
                return false;
            }
            Err(error) => {
                tracing::debug!(%error, "no summary of the journal was written");
                return false;
            }
        }
    }
    true
}
