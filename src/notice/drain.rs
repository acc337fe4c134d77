//! A request, in the run's own folder, that a live generation save and stop.
//!
//! Stored layout: `drains/g0003.json`, created once: [`Request`]. Its reader only checks that it exists. It belongs to
//! one generation and to those that continue it, so that it does not stop a later resume. It stays, as the journal
//! does, and costs a few bytes. It is for the whole run: all nodes of the generation save and stop.
//!
//! The agent that leads the generation looks for it every [`INTERVAL`], and in the first minute also for requests to
//! the generations that this one continues: when a worker dies, or the leader does, while the request is on its way,
//! whoever leads then still obeys it. A crash on either side loses nothing: a repeated command finds the request
//! already there.

use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    poll::Sender,
    types::{Confidence, Kind, Notice},
};
use crate::{
    ids::{AttemptId, Generation},
    layout,
    storage::{CreateOutcome, StorageError, Store},
};

/// The interval between two looks at the store.
pub const INTERVAL: Duration = Duration::from_secs(5);
/// The source of a notice that a person gave by `trainer drain`.
pub const DRAIN: &str = "drain";
const FORMAT: u32 = 1;

/// The stored object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Version of this layout.
    pub format: u32,
    /// Distinguishes this request from another.
    pub attempt: AttemptId,
    /// The generation that is asked to stop.
    pub generation: Generation,
    /// When, by the clock of the asking machine.
    pub at: Timestamp,
}

/// Asks `generation` of the run in folder `run` to save and stop. Returns whether this is the first request.
pub async fn ask(run: &Store, generation: Generation) -> Result<bool, StorageError> {
    let request = Request { format: FORMAT, attempt: AttemptId::random(), generation, at: Timestamp::now() };
    // A struct of numbers and strings always becomes JSON.
    let body = Bytes::from(serde_json::to_vec(&request).unwrap_or_default());
    Ok(run.create(&layout::drain(generation), body).await? == CreateOutcome::Created)
}

async fn is_asked(run: &Store, generation: Generation) -> Result<bool, StorageError> {
    match run.head(&layout::drain(generation)).await {
        Ok(_) => Ok(true),
        Err(StorageError::NotFound { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reports that `generation` is asked to stop, from then on again and again: it may be long before the report is taken.
pub(super) async fn listen(run: Store, generation: Generation, sender: Sender) {
    listen_every(INTERVAL, run, generation, sender).await;
}

async fn listen_every(interval: Duration, run: Store, generation: Generation, sender: Sender) {
    loop {
        tokio::time::sleep(interval).await;
        match is_asked(&run, generation).await {
            Ok(true) => break,
            Ok(false) => {}
            Err(error) => tracing::debug!(%error, "can't look for a request to stop this run"),
        }
    }
    let (kind, confidence) = (Kind::Stop, Confidence::Certain);
    let notice = Notice { kind, deadline: None, source: DRAIN, id: generation.to_string(), confidence };
    loop {
        sender.tell(notice.clone());
        tokio::time::sleep(interval).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::StorageConfig;

    #[tokio::test]
    async fn a_request_is_reported_again_and_again() {
        let dir = tempfile::tempdir().unwrap();
        let run = Store::open(&format!("file://{}", dir.path().display()), &StorageConfig::plain(4, 16)).unwrap();
        ask(&run, Generation(3)).await.unwrap();
        let (sender, mut receiver) = Sender::new();
        let listening = tokio::spawn(listen_every(Duration::from_millis(1), run, Generation(3), sender));
        let first = receiver.recv().await.map(|(_, notice)| (notice.kind, notice.id));
        assert_eq!(first, Some((Kind::Stop, Generation(3).to_string())));
        let again = receiver.recv().await.map(|(_, notice)| (notice.kind, notice.id));
        assert_eq!(again, first, "the first may not have been taken");
        listening.abort();
    }

    #[tokio::test]
    async fn a_request_is_for_one_generation_and_stored_once() {
        let dir = tempfile::tempdir().unwrap();
        let run = Store::open(&format!("file://{}", dir.path().display()), &StorageConfig::plain(4, 16)).unwrap();
        assert!(ask(&run, Generation(3)).await.unwrap());
        assert!(!ask(&run, Generation(3)).await.unwrap(), "it exists already");
        let body = run.get("drains/g0003.json", 4096).await.unwrap();
        let request: Request = serde_json::from_slice(&body).unwrap();
        assert_eq!((request.format, request.generation), (1, Generation(3)));
        assert!(is_asked(&run, Generation(3)).await.unwrap());
        assert!(!is_asked(&run, Generation(4)).await.unwrap(), "a later generation is not stopped");
        assert!(ask(&run, Generation(4)).await.unwrap());
        assert!(is_asked(&run, Generation(4)).await.unwrap());
    }
}
