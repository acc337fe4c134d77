//! The object store: open a URI, create-once puts, parallel uploads and ranged downloads, with retries and limits.

use std::ops::Range;

use bytes::Bytes;

use crate::error::{Explain, Kind};

/// What can go wrong with a store.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The URI is not one we can open.
    #[error("store {uri:?} {reason}")]
    InvalidUri {
        /// As given.
        uri: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No such object.
    #[error("object {key} does not exist")]
    NotFound {
        /// The key.
        key: String,
    },
    /// Refused for want of permission.
    #[error("store refused {operation} of {key} for want of permission")]
    Permission {
        /// What was tried.
        operation: &'static str,
        /// The key.
        key: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Not reachable, or failing, after retries.
    #[error("{operation} of {key} failed")]
    Unavailable {
        /// What was tried.
        operation: &'static str,
        /// The key.
        key: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store does not do what the protocol needs.
    #[error("store can't be used: {reason}")]
    Unfit {
        /// What it did.
        reason: String,
    },
}

impl Explain for StorageError {
    fn kind(&self) -> Kind {
        match self {
            Self::InvalidUri { .. } | Self::Unfit { .. } => Kind::Config,
            Self::NotFound { .. } => Kind::Data,
            Self::Permission { .. } => Kind::Permission,
            Self::Unavailable { .. } => Kind::Unavailable,
        }
    }
}

/// What became of a create-once put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateOutcome {
    /// The object is ours: written now, or by an earlier try whose answer was lost.
    Created,
    /// Somebody else's object stands there.
    Exists,
}

/// An object as listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its key, relative to the store handle that listed it.
    pub key: String,
    /// Bytes.
    pub size: u64,
    /// When it was last written, by the store's clock.
    pub last_modified: jiff::Timestamp,
}

/// CRC64-NVME of some bytes; 16 lower-case hex digits as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Crc64(pub u64);

/// What an upload put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uploaded {
    /// Bytes.
    pub bytes: u64,
    /// Over all bytes.
    pub crc64: Crc64,
}

/// A store, or a folder of one; cheap to clone. Keys are relative to it and use `/`.
#[derive(Clone, Debug)]
pub struct Store {}

#[expect(unused_variables, clippy::unused_async, clippy::todo)]
impl Store {
    /// Opens a URI. No request is made.
    pub fn open(uri: &str, settings: &crate::config::StorageConfig) -> Result<Self, StorageError> {
        todo!()
    }
    /// The URI of this store or folder.
    pub fn uri(&self) -> String {
        todo!()
    }
    /// A folder of this store, with the same connections and limits.
    #[must_use]
    pub fn folder(&self, name: &str) -> Self {
        todo!()
    }
    /// Writes `body` under `key` if, and only if, nothing stands there. Atomic: of many racing creates exactly one wins.
    /// `body` must differ between writers (it carries an attempt id): a lost answer is settled by reading back.
    pub async fn create(&self, key: &str, body: Bytes) -> Result<CreateOutcome, StorageError> {
        todo!()
    }
    /// Writes `body` under `key`, over whatever stands there.
    pub async fn put(&self, key: &str, body: Bytes) -> Result<(), StorageError> {
        todo!()
    }
    /// The whole object, refused if it has more than `limit` bytes.
    pub async fn get(&self, key: &str, limit: u64) -> Result<Bytes, StorageError> {
        todo!()
    }
    /// Some bytes of an object.
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StorageError> {
        todo!()
    }
    /// Size of an object.
    pub async fn head(&self, key: &str) -> Result<ObjectInfo, StorageError> {
        todo!()
    }
    /// All objects below `prefix` (a folder, without trailing `/`; "" for all), in no particular order.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>, StorageError> {
        todo!()
    }
    /// Names of the folders directly below `prefix`.
    pub async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        todo!()
    }
    /// Deletes an object; one that is not there is fine.
    pub async fn delete(&self, key: &str) -> Result<(), StorageError> {
        todo!()
    }
    /// Writes a large object in parts, in parallel, without copying `body`; `progress` hears the bytes of each finished part.
    pub async fn upload(
        &self,
        key: &str,
        body: Bytes,
        progress: impl Fn(u64) + Send + Sync + 'static,
    ) -> Result<Uploaded, StorageError> {
        todo!()
    }
    /// Races parallel creates of a probe key: a store on which more than one wins is [`StorageError::Unfit`].
    pub async fn prove_create_is_atomic(&self) -> Result<(), StorageError> {
        todo!()
    }
}
