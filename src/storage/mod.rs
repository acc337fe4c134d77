//! The object store: open a URI, create-once puts, parallel uploads and ranged downloads, with retries and limits.
//!
//! One code path serves `s3://`, `gs://`, `az://`, `file://` and `memory://`. `store` is the client, on which all other
//! parts build; `open` turns a URI into a `backend`; `retry` decides which requests are repeated; `upload` writes large
//! objects in parts (`signed` on S3, `local` on disks); `download` reads ranges into memory; `adaptive_limit` and
//! `limiter` find how many requests a store handles at once; `rate_limit` bounds bandwidth; `pool` has threads apart
//! from the caller's; `probe` finds out whether create-once puts are atomic; `examine` checks further abilities of a
//! place. Keys are relative to a [`Store`] (a whole store or a folder of one) and use `/`.
//!
//! Invariants
//! - An object appears whole or not at all. On `file://` it is written beside its place, synced, and then linked or
//!   renamed into it, and the folder is synced; elsewhere the store guarantees it.
//! - [`Store::create`] says `Created` only if the object that stands is ours, byte for byte, and `Exists` only if
//!   it is not: an answer that was lost, a conflict (409) and a repeated request are settled by reading back.
//! - Every length from outside is checked before memory is allocated for it.
//! - No secret is in a URI or an error: credentials come from the environment, and causes are reduced to status, code
//!   and message.
//!
//! Retry: this module retries everything itself (object_store's own retries are switched off, so that there is one
//! budget, a request is signed anew each time, and a probe is one request). Crash and cancel: a future that is dropped,
//! or an upload that fails, aborts its multipart upload; a kill leaves one behind, which the bucket's lifecycle rule or
//! a sweep removes, and on `file://` a hidden `<name>#<number>` file: [`Store::unfinished`] finds both.
//!
//! Bulk transfers and small requests (journal, heartbeats) wait in separate queues: a checkpoint's upload never delays
//! the heartbeat that says its node is alive. At another [`Priority`] transfers have threads, connections and queues of
//! their own, too.
//!
//! Memory: uploads send the caller's pages, downloads fill them; in addition each request has a socket's buffer, at
//! most `storage.concurrency` each way.
#![doc = include_str!("README.md")]

mod anchor;
mod backend;
mod rate_limit;
mod connect;
mod crc;
mod download;
mod error;
mod examine;
mod limiter;
mod hedge;
mod links;
mod listing;
mod local;
mod open;
mod adaptive_limit;
mod pool;
mod probe;
mod retry;
mod s3;
mod signed;
mod store;
mod stored;
mod unfinished;
mod upload;

#[cfg(test)]
pub(crate) mod faulty;
#[cfg(test)]
mod reason_tests;
#[cfg(test)]
pub(crate) mod s3_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod transfer_tests;

pub use self::{
    anchor::Adrift,
    crc::{Crc64, InvalidCrc64},
    error::StorageError,
    examine::AbortRule,
    store::{CreateOutcome, Held, ObjectInfo, Priority, Store, Uploaded},
    stored::StoredObject,
    unfinished::Unfinished,
};
