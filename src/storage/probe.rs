//! Tests whether a store's create-once puts are atomic.
//!
//! Some stores ignore `If-None-Match`; others handle it correctly in sequence but still let several racing writers win.
//! The journal is safe on neither. A sequential test finds only the first kind, so several creates race. Each create is
//! one bare request here: the retries and the reading back of [`Store::create`] would hide what the store does.

use bytes::Bytes;
use futures::future::join_all;
use object_store::{ObjectStoreExt, PutMode, PutPayload, path::Path};

use super::{
    error::StorageError,
    retry::{Failure, Verdict, classify},
    store::Store,
};
use crate::{ids::random_hex, layout};

const ROUNDS: usize = 3;
const RACERS: usize = 16;
/// Rounds that may be repeated because nobody won: every request met a conflict, or the store was not reachable.
const SPARE_ROUNDS: usize = 3;

/// The answer to one bare create.
enum Heard {
    Created,
    /// 412, or 409: this one did not win.
    Refused,
    Failed(object_store::Error),
}

impl Store {
    /// Races parallel creates of a probe key: if more than one wins, the store is [`StorageError::Unfit`].
    ///
    /// 3 rounds of 16 creates below [`crate::layout::PROBES`] of this folder, each one bare request; then a create of
    /// the existing key, which must be refused. Cleans up after itself.
    pub async fn prove_create_is_atomic(&self) -> Result<(), StorageError> {
        prove_create_is_atomic(self).await
    }
}

async fn prove_create_is_atomic(store: &Store) -> Result<(), StorageError> {
    store.prove_links(layout::PROBES)?;
    let mut spare = SPARE_ROUNDS;
    let mut proven = 0;
    while proven < ROUNDS {
        let key = format!("{}/{}", layout::PROBES, random_hex(16));
        let path = store.path(&key)?;
        let result = round(store, &key, &path).await;
        // The probe is deleted before the verdict is reported. One attempt: a store that does not answer has delayed us
        // long enough, and a leftover is a few bytes.
        if let Err(error) = object_store::ObjectStoreExt::delete(store.objects(), &path).await {
            tracing::debug!(%error, "probe key was not deleted");
        }
        match result {
            Ok(()) => proven += 1,
            Err(error) if spare > 0 && matches!(error, StorageError::Unavailable { .. }) => {
                // One request with all its retries distinguishes a store that does not exist from a busy one.
                if spare == SPARE_ROUNDS
                    && let Err(error @ StorageError::Unavailable { .. }) = store.head(&key).await
                {
                    return Err(error);
                }
                tracing::debug!(error = %crate::error::Error::from(error), "a race of creates had no winner, racing \
                    again");
                spare -= 1;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

async fn create(store: &Store, path: &Path, body: &Bytes) -> Heard {
    match store.objects().put_opts(path, PutPayload::from_bytes(body.clone()), PutMode::Create.into()).await {
        Ok(_) => Heard::Created,
        Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => Heard::Refused,
        Err(error) => Heard::Failed(error),
    }
}

/// A create was refused for good. A put without the condition shows whether the store does not know the condition, or
/// refuses something else in the request.
async fn why_refused(store: &Store, key: &str, path: &Path, refused: Failure) -> StorageError {
    let unfit = |said: &dyn std::fmt::Display| StorageError::Unfit {
        reason: format!("{}: it does not know conditional puts: {said}", store.uri()),
    };
    if refused.is_not_implemented() {
        return unfit(refused.cause());
    }
    match store.objects().put_opts(path, PutPayload::from_static(b"plain"), PutMode::Overwrite.into()).await {
        Ok(_) => unfit(refused.cause()),
        Err(error) => Failure::new("put", &error).explain(&store.uri_of(key)),
    }
}

async fn round(store: &Store, key: &str, path: &Path) -> Result<(), StorageError> {
    let unfit = |reason: String| Err(StorageError::Unfit { reason: format!("{}: {reason}", store.uri()) });
    // Opens as many connections as there will be racers, so that all creates are sent at once.
    join_all((0..RACERS).map(|_| store.objects().head(path))).await;

    let bodies: Vec<Bytes> = (0..RACERS).map(|racer| format!("{racer} {}", random_hex(16)).into()).collect();
    let tasks = bodies.iter().map(|body| {
        let (store, path, body) = (store.clone(), path.clone(), body.clone());
        tokio::spawn(async move { create(&store, &path, &body).await })
    });
    let mut winners = Vec::new();
    let mut failure: Option<Failure> = None;
    for (racer, heard) in join_all(tasks).await.into_iter().enumerate() {
        match heard {
            Ok(Heard::Created) => winners.push(racer),
            Ok(Heard::Refused) => {}
            Ok(Heard::Failed(error)) => failure = Some(Failure::new("create", &error)).or(failure),
            Err(_) => failure = Some(Failure::stopped("create")),
        }
    }
    if winners.is_empty()
        && let Some(refused) = failure.take_if(|failure| failure.verdict == Verdict::Permanent)
    {
        return Err(why_refused(store, key, path, refused).await);
    }
    if winners.len() > 1 {
        return unfit(format!(
            "{} of {RACERS} parallel creates of one key succeeded; conditional writes are not atomic here",
            winners.len()
        ));
    }
    let Some(winner) = winners.first().and_then(|&racer| bodies.get(racer)) else {
        // Nobody won: only conflicts, or one succeeded and its answer was lost.
        let failure =
            failure.unwrap_or_else(|| Failure::transient("create", "every one of 16 parallel creates met a conflict"));
        return Err(failure.explain(&store.uri_of(key)));
    };
    let standing = store.get(key, 1 << 10).await?;
    if standing != *winner {
        return unfit("the object of the create that succeeded was replaced by one that was refused".into());
    }
    match create(store, path, &Bytes::from(random_hex(16))).await {
        Heard::Refused => {}
        Heard::Created => {
            return unfit("a create over an object that stood there succeeded; it ignores If-None-Match".into());
        }
        Heard::Failed(error) if classify(&error) == Verdict::Permanent => {
            return Err(why_refused(store, key, path, Failure::new("create", &error)).await);
        }
        Heard::Failed(error) => return Err(Failure::new("create", &error).explain(&store.uri_of(key))),
    }
    if store.get(key, 1 << 10).await? != *winner {
        return unfit("a create that was refused replaced the object that stood there".into());
    }
    Ok(())
}
