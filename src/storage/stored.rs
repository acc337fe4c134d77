//! A store's own facts about an object.

use super::{crc::Crc64, error::StorageError, store::Store};

/// The store's own facts about an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredObject {
    /// Bytes.
    pub size: u64,
    /// The store's checksum of all of them; `None`: it keeps none, or not this one.
    pub crc64: Option<Crc64>,
}

impl Store {
    /// The store's facts about an object, without a download: its size and, on S3, the checksum that the store computed
    /// when the object was uploaded.
    pub async fn stored(&self, key: &str) -> Result<StoredObject, StorageError> {
        let Some(bucket) = &self.inner.connections.backend.s3 else {
            return Ok(StoredObject { size: self.head(key).await?.size, crc64: None });
        };
        let path = self.path(key)?;
        let request = || async {
            match bucket.stored(path.as_ref()).await {
                Ok(stored) => Ok(stored),
                Err(error) => Err(self.why(&path, error).await),
            }
        };
        let head = self.attempts("head", 0).run(request).await;
        let (size, crc64) = head.map_err(|failure| failure.explain(&self.uri_of(key)))?;
        Ok(StoredObject { size, crc64 })
    }
}
