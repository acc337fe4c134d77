//! Checks for the doctor: whether this place accepts uploads in parts and their aborts, and what the bucket does with
//! unfinished ones.
//!
//! *Crash, cancel:* an upload of one small part may stay behind, for a sweep or a lifecycle rule to remove.

use bytes::Bytes;
use object_store::{GetOptions, ObjectStore, path::Path};

use super::{crc::Crc64, error::StorageError, retry, store::Store};
use crate::{ids::random_hex, layout};

/// What the bucket's lifecycle rules do with unfinished uploads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AbortRule {
    /// They are aborted this many days after they began.
    After {
        /// Days.
        days: u32,
    },
    /// No enabled rule that covers this folder aborts them.
    Missing,
    /// This kind of store needs none.
    NotNeeded,
}

impl Store {
    /// Begins an upload in parts, sends one small part, and aborts it. Always succeeds if objects are not written in
    /// parts.
    pub async fn prove_parts(&self) -> Result<(), StorageError> {
        let large = &self.inner.connections.backend.large;
        if large.is_file() {
            return Ok(());
        }
        let key = format!("{}/{}", layout::PROBES, random_hex(16));
        let path = self.path(&key)?;
        let body = Bytes::from_static(b"a part that is given up");
        let crc64 = Crc64::of(&body);
        let explain = |failure: retry::Failure| failure.explain(&self.uri_of(&key));
        let begun = self.attempts("begin of an upload", 0).run(|| large.begin(&path)).await;
        let id = begun.map_err(explain)?;
        let put = self.attempts("put of a part", body.len() as u64);
        let put = put.run(|| large.part(&path, &id, 0, body.clone(), crc64)).await.map(drop);
        let given_up = self.attempts("abort of an upload", 0).run(|| large.abort(&path, &id)).await;
        put.map_err(explain)?;
        given_up.map_err(explain)
    }

    /// What the bucket's lifecycle rules do with unfinished uploads below this folder.
    pub async fn abort_rule(&self) -> Result<AbortRule, StorageError> {
        let Some(bucket) = &self.inner.connections.backend.s3 else { return Ok(AbortRule::NotNeeded) };
        let prefix = if self.prefix.is_empty() { String::new() } else { format!("{}/", self.prefix) };
        let asked = self.attempts("read of the lifecycle rules", 0).run(|| bucket.abort_after(&prefix)).await;
        let days = asked.map_err(|failure| failure.not_of_the_object().explain(&self.uri_of("")))?;
        Ok(days.map_or(AbortRule::Missing, |days| AbortRule::After { days }))
    }

    /// Why a HEAD failed. Only the answer to a GET gives the reason of a refusal, since it has a body.
    pub(super) async fn why(&self, path: &Path, error: object_store::Error) -> object_store::Error {
        if !retry::is_mute(&error) {
            return error;
        }
        let first = GetOptions { range: Some((0..1).into()), ..GetOptions::default() };
        self.objects().get_opts(path, first).await.err().unwrap_or(error)
    }
}
