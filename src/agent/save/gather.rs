//! A state on its way into a slot: each file from the nearest place that has it.
//!
//! The order is this node's own memory (another slot than the one that is filled), then the memory of other nodes of
//! the generation ([`super::borrow`]), then the store. A file counts as there when its checksum, computed over the
//! bytes in their final place, is the one that its manifest gives. So no source is trusted, memory least of all: what
//! it gave wrongly is read again from the store, and says nothing about the checkpoint. Only the store's own bytes can
//! condemn one.
//!
//! *Crash, cancel:* the slot's content is worthless until the end. When the future is dropped, at most as many pieces
//! as this machine has cores are copied on, each into the memory that it owns. *Retry:* a new fetch begins anew.

use bytes::Bytes;
use futures::{StreamExt, stream};
use tokio::{sync::mpsc, task::JoinSet};

use super::borrow::{self, Neighbours};

use crate::{
    checkpoint::{
        CheckpointError,
        restore::{self, Piece, RemoteFile},
    },
    ids::Step,
    rendezvous::channel::bulk::Wanted,
    snapshot::image::ImageChunk,
    storage::{Crc64, Store},
};

/// The result of a fetch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fetched {
    /// Bytes of all files.
    pub bytes: u64,
    /// Those of them that came from the store.
    pub stored: u64,
    /// Those of them that came from the memory of other nodes.
    pub lent: u64,
    /// The time it took.
    pub seconds: f64,
}

/// A checkpoint, or a model, that is on its way into a slot.
#[derive(Debug)]
pub struct Fetch {
    /// The slot.
    pub slot: u8,
    /// Each file's first byte and length in the slot.
    pub places: Vec<(u64, u64)>,
    /// Where the files' bytes go.
    pub pieces: Vec<(Piece, ImageChunk)>,
    /// What this node's memory has of each file; empty: of none.
    pub here: Vec<Option<Bytes>>,
    /// The files.
    pub wanted: Vec<RemoteFile>,
    /// The nodes that may have what this one lacks, and what they are asked for.
    pub neighbours: Option<(Neighbours, Wanted)>,
}

/// A fetch under way; it ends when this is dropped.
#[must_use]
#[derive(Debug, Default)]
pub struct Fetching {
    /// The slot.
    pub slot: u8,
    /// Each file's first byte and length in the slot.
    pub places: Vec<(u64, u64)>,
    task: JoinSet<()>,
}

impl Fetching {
    /// Aborts it. Threads that work for it may write a moment longer: the end of a generation waits for them.
    pub fn stop(&mut self) {
        self.task.abort_all();
    }
}

impl Fetch {
    /// Fetches all of it, beside the event loop; the result goes to `done`. `told`: the step whose state this is, if
    /// the log shall say where it came from.
    pub fn start(
        self,
        store: Store,
        folder: String,
        told: Option<Step>,
        done: mpsc::UnboundedSender<Result<Fetched, CheckpointError>>,
    ) -> Fetching {
        let Self { slot, places, pieces, here, wanted, neighbours } = self;
        let mut fetching = Fetching { slot, places, task: JoinSet::new() };
        fetching.task.spawn(async move {
            let begin = tokio::time::Instant::now();
            let result = gather(&store, &folder, &wanted, pieces, here, neighbours).await;
            let bytes = wanted.iter().map(|file| file.bytes).sum();
            if let (Ok(origins), Some(step)) = (&result, told) {
                tracing::info!("restored step {step}: {origins}");
            }
            let fetched = |Origins { lent, stored, .. }| Fetched {
                bytes,
                stored: stored.bytes,
                lent: lent.bytes,
                seconds: begin.elapsed().as_secs_f64(),
            };
            let _ = done.send(result.map(fetched));
        });
        fetching
    }
}

/// What came from one place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Origin {
    files: u64,
    bytes: u64,
}

/// How much came from where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Origins {
    here: Origin,
    lent: Origin,
    stored: Origin,
}

impl Origin {
    fn add(&mut self, bytes: u64) {
        self.files += 1;
        self.bytes += bytes;
    }
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} MiB", self.bytes as f64 / f64::from(1 << 20))
    }
}

impl std::fmt::Display for Origins {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { here, lent, stored } = *self;
        write!(f, "{here} from memory here, {lent} from other nodes' memory, {stored} from the store ")?;
        write!(f, "({}, {} and {} files)", here.files, lent.files, stored.files)
    }
}

/// A file that is not there yet, and where its bytes go, in their order.
pub struct Lacking<B> {
    /// The file.
    pub file: RemoteFile,
    /// Its pieces.
    pub pieces: Vec<(Piece, B)>,
}

/// Brings `files` into their buffers: each file that `here` has from there, others from the nodes that lend them, the
/// rest from the store.
async fn gather<B: AsMut<[u8]> + Send + 'static>(
    store: &Store,
    folder: &str,
    files: &[RemoteFile],
    pieces: Vec<(Piece, B)>,
    here: Vec<Option<Bytes>>,
    neighbours: Option<(Neighbours, Wanted)>,
) -> Result<Origins, CheckpointError> {
    let mut lacking: Vec<Lacking<B>> =
        files.iter().map(|file| Lacking { file: file.clone(), pieces: Vec::new() }).collect();
    for (piece, buffer) in pieces {
        let of = lacking.get_mut(piece.file);
        let of = of.ok_or_else(|| CheckpointError::Internal(format!("piece of file {}", piece.file)))?;
        of.pieces.push((piece, buffer));
    }
    let mut origins = Origins::default();
    let mut left = Vec::new();
    let mut here = here.into_iter();
    let asking =
        neighbours.map(|(neighbours, wanted)| JoinSet::from_iter([async move { neighbours.ask(&wanted).await }]));
    for it in lacking {
        match here.next().flatten() {
            Some(bytes) => match from_here(&bytes, it).await? {
                None => origins.here.add(bytes.len() as u64),
                Some(it) => {
                    tracing::info!(file = it.file.name, "memory no longer has this file of the checkpoint");
                    left.push(it);
                }
            },
            None => left.push(it),
        }
    }
    if let Some(mut asking) = asking.filter(|_| !left.is_empty()) {
        let lenders = asking.join_next().await.and_then(Result::ok).unwrap_or_default();
        let shares = borrow::divide(lenders, left);
        shares.left.iter().for_each(|it| origins.stored.add(it.file.bytes));
        // What nobody lends is read in the store meanwhile.
        let borrowing = async { Ok(borrow::read(shares.of).await) };
        let (borrowed, ()) = tokio::try_join!(borrowing, from_store(store, folder, shares.left))?;
        origins.lent = Origin { files: borrowed.files, bytes: borrowed.bytes };
        left = borrowed.left;
    }
    if !left.is_empty() {
        left.iter().for_each(|it| origins.stored.add(it.file.bytes));
        from_store(store, folder, left).await?;
    }
    Ok(origins)
}

async fn from_store<B: AsMut<[u8]> + Send + 'static>(
    store: &Store,
    folder: &str,
    lacking: Vec<Lacking<B>>,
) -> Result<(), CheckpointError> {
    let (mut files, mut pieces) = (Vec::with_capacity(lacking.len()), Vec::new());
    for (index, it) in lacking.into_iter().enumerate() {
        files.push(it.file);
        pieces.extend(it.pieces.into_iter().map(|(piece, buffer)| (Piece { file: index, ..piece }, buffer)));
    }
    restore::fetch(store, folder, &files, pieces, |_| {}).await
}

/// Copies a file from `bytes`; `Some`: they are not that file.
async fn from_here<B: AsMut<[u8]> + Send + 'static>(
    bytes: &Bytes,
    lacking: Lacking<B>,
) -> Result<Option<Lacking<B>>, CheckpointError> {
    let Lacking { file, pieces } = lacking;
    let copy = |(piece, mut buffer): (Piece, B)| {
        let bytes = bytes.clone();
        async move {
            let copying = tokio::task::spawn_blocking(move || {
                let range = usize::try_from(piece.offset).ok().zip(usize::try_from(piece.len).ok());
                let from = range.and_then(|(start, len)| bytes.get(start..start.checked_add(len)?));
                let sum = from.and_then(|from| Crc64::of_copy(from, buffer.as_mut()));
                (piece, sum, buffer)
            });
            copying.await.map_err(|error| CheckpointError::Internal(format!("copy a piece: {error}")))
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut copied = stream::iter(pieces).map(copy).buffered(threads);
    let (mut sum, mut end, mut pieces) = (Some(Crc64::EMPTY), 0, Vec::new());
    while let Some(copied) = copied.next().await {
        let (piece, crc64, buffer) = copied?;
        sum = sum.zip(crc64).map(|(sum, crc64)| sum.followed_by(crc64, piece.len));
        end += piece.len;
        pieces.push((piece, buffer));
    }
    let is_it = end == file.bytes && sum.is_some() && file.crc64 == sum;
    Ok(if is_it { None } else { Some(Lacking { file, pieces }) })
}
