//! All stored rows of a run, and the merging of small files.

use bytes::Bytes;
use futures::{StreamExt, stream};

use super::{
    file::{decode, encode},
    series::Series,
};
use crate::{
    error::{Error, Kind, Result},
    ids::{AttemptId, Generation, Step},
    layout,
    storage::{StorageError, Store},
};

/// Files that are read at once.
const AT_ONCE: usize = 16;
/// The largest file that is read, bytes.
const MOST_BYTES: u64 = 1 << 30;
/// Files smaller than this are put together.
const SMALL: u64 = 4 << 20;
/// As many small files are put together as one.
pub(super) const MANY: usize = 64;

/// Lists of files that may be out of date before the reader gives up: merges are minutes apart.
const TRIES: u32 = 5;

/// All rows of the run whose folder `run` is, and what is wrong with files that can't be read: they are left out, and
/// all others count.
pub async fn read(run: &Store) -> Result<(Series, Vec<String>)> {
    for _ in 0..TRIES {
        if let Some(read) = read_once(run).await? {
            return Ok(read);
        }
    }
    let message = format!("files below {}/{} disappear while they are read", run.uri(), layout::METRICS);
    Err(Error::new(Kind::Unavailable, message)
        .with_hint("try again; if it fails again, find out what else deletes files there"))
}

/// `None`: a file was replaced after it was listed, and its rows are in one that is listed now.
async fn read_once(run: &Store) -> Result<Option<(Series, Vec<String>)>> {
    let keys = run.list(layout::METRICS).await?.into_iter().map(|object| object.key);
    let keys: Vec<String> = keys.filter(|key| layout::is_metrics(key)).collect();
    let mut parts = stream::iter(keys).map(|key| async move { (fetch(run, &key).await, key) }).buffered(AT_ONCE);
    let (mut all, mut broken) = (Series::default(), Vec::new());
    while let Some((part, key)) = parts.next().await {
        match part {
            Ok(Some(part)) => all.append(part),
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == Kind::Data => broken.push(format!("{key}: {error}")),
            Err(error) => return Err(error),
        }
    }
    Ok(Some((all, broken)))
}

/// The rows of one file; `None`: it is gone.
async fn fetch(run: &Store, key: &str) -> Result<Option<Series>> {
    let bytes = match run.get(key, MOST_BYTES).await {
        Ok(bytes) => bytes,
        Err(StorageError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let series = tokio::task::spawn_blocking(move || decode(&bytes)).await;
    let series = series.map_err(|error| Error::from_source(Kind::Bug, error))?;
    series.map(Some).map_err(|error| Error::from_source(Kind::Data, error))
}

/// Writes rows under a key of their own.
pub(super) async fn put(run: &Store, rows: Series) -> Result<()> {
    let key = key(&rows);
    let bytes = tokio::task::spawn_blocking(move || encode(&rows)).await;
    let bytes = bytes.map_err(|error| Error::from_source(Kind::Bug, error))?;
    let bytes = bytes.map_err(|error| Error::from_source(Kind::Bug, error))?;
    Ok(run.put(&key, Bytes::from(bytes)).await?)
}

fn key(rows: &Series) -> String {
    let least = |values: &[u64]| Step(values.iter().copied().min().unwrap_or_default());
    let most = Step(rows.steps.iter().copied().max().unwrap_or_default());
    let generation = Generation(rows.generations.iter().copied().min().unwrap_or_default());
    layout::metrics(generation, least(&rows.steps), most, &AttemptId::random())
}

/// Puts small files together, if there are many; returns how many small ones are left.
///
/// The rows of the files are all kept, those that were done again as well: which of them count is decided when they are
/// read. A file that can't be read is left alone.
pub(super) async fn merge(run: &Store) -> Result<usize> {
    let mut small: Vec<(String, u64)> = run
        .list(layout::METRICS)
        .await?
        .into_iter()
        .filter(|object| layout::is_metrics(&object.key) && object.size < SMALL)
        .map(|object| (object.key, object.size))
        .collect();
    if small.len() < MANY {
        return Ok(small.len());
    }
    small.sort();
    let (mut total, mut chosen, mut rows) = (0, Vec::new(), Series::default());
    for (key, size) in small.iter().take(MANY) {
        if total + size > 2 * SMALL {
            break;
        }
        if let Ok(Some(part)) = fetch(run, key).await {
            total += size;
            rows.append(part);
            chosen.push(key);
        }
    }
    if chosen.len() < 2 {
        return Ok(0);
    }
    put(run, rows.without_repeats()).await?;
    for key in &chosen {
        run.delete(key).await?;
    }
    Ok(small.len() - chosen.len() + 1)
}
