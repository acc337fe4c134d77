//! Copies one object of a store into one local file, in ranges, with a checksum on the way.

use std::path::Path;

use crc_fast::{CrcAlgorithm, Digest};
use futures::{StreamExt, TryStreamExt, stream};
use tokio::io::AsyncWriteExt;

use super::DataError;
use crate::storage::{Crc64, StorageError, Store};

/// Ranges of one object in flight at once. They are written in order, so this also bounds the memory it takes.
const RANGES_IN_FLIGHT: usize = 4;

/// Writes object `key`, known to have `bytes` bytes, to the new file `to`, in ranges of `part` bytes, and syncs it;
/// `progress` receives the bytes of each range. Cancelled or failed, it leaves an incomplete file behind.
pub(super) async fn fetch(
    store: &Store,
    key: &str,
    bytes: u64,
    part: u64,
    to: &Path,
    progress: &(impl Fn(u64) + Send + Sync),
) -> Result<Crc64, DataError> {
    let io = |source| DataError::Io { doing: "write", path: to.to_owned(), source };
    // For this user alone: fetched training data stays private.
    let mut file = tokio::fs::File::options().write(true).create_new(true).mode(0o600).open(to).await.map_err(io)?;
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    let part = part.max(1);
    let ranges = (0..bytes.div_ceil(part)).map(|n| n * part..(n * part).saturating_add(part).min(bytes));
    let mut parts = stream::iter(ranges)
        .map(|range| async move {
            store.get_range(key, range).await.map_err(|source| match source {
                StorageError::Short { key, size, .. } => DataError::Damaged {
                    file: key,
                    reason: format!("is shorter ({size} bytes) than the {bytes} it should have"),
                },
                source => DataError::Store { doing: "read an object of", uri: store.uri(), source },
            })
        })
        .buffered(RANGES_IN_FLIGHT);
    while let Some(body) = parts.try_next().await? {
        digest.update(&body);
        file.write_all(&body).await.map_err(io)?;
        progress(body.len() as u64);
    }
    file.sync_all().await.map_err(io)?;
    Ok(Crc64(digest.finalize()))
}
