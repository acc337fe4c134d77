//! Checkpoints in the object store: written, found, verified against their manifests, read back, exported, deleted.
//!
//! This module knows bytes and names, and of tensors only what a safetensors header says. All stores given to it are a
//! run's folder (`<store>/<run-id>`), so that keys are those of [`crate::layout`]; layouts of single objects are in
//! [`manifest`] and [`crate::format`].
//!
//! The one invariant: *a checkpoint is a step whose `committed` record is in the journal*. Data is written in the order
//! shards → receipts → manifest → record, each complete before the next begins ([`save`]); it is trusted in the reverse
//! order, each verified against the one before: the record gives the manifest's checksum, the manifest gives every
//! file's size and checksum ([`catalog`], [`restore`], [`verify`]). A crash in between leaves objects that no record
//! leads to, and nothing here lists a folder to find checkpoints.
//!
//! Damage (an object missing, of another size, of another checksum) differs from a store that does not answer: a
//! damaged checkpoint is skipped; an unresponsive store is an error, because going back to an older checkpoint would
//! throw away good work.
#![doc = include_str!("README.md")]

pub mod catalog;
pub mod condemn;
pub mod export;
pub mod foreign;
pub mod manifest;
pub mod ordered;
pub mod prune;
pub mod restore;
pub mod garbage;
pub mod save;
pub mod verify;

#[cfg(test)]
pub(crate) mod testing;

use std::{fmt, path::PathBuf};

use serde::Serialize;

use crate::{
    error::{Explain, Kind},
    faults::Injected,
    ids::{Generation, RunId, Step},
    storage::{Crc64, StorageError},
};

/// The errors of checkpoints.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// An object is missing, cut short or altered. Another checkpoint may be whole.
    #[error("object {object} is damaged: {reason}")]
    Damaged {
        /// Its key.
        object: String,
        /// What is wrong with it.
        reason: Flaw,
    },
    /// The store failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// An object has a newer layout than this program knows.
    #[error("object {object} has format {found}, this program reads up to {known}")]
    TooNew {
        /// Its key.
        object: String,
        /// Its format.
        found: u32,
        /// The newest format that this program knows.
        known: u32,
    },
    /// A (step, generation) pair is written once.
    #[error("checkpoint of step {step}, generation {generation} is already written by another attempt")]
    AlreadyWritten {
        /// The step.
        step: Step,
        /// The generation.
        generation: Generation,
    },
    /// The files that the nodes have uploaded are not the planned checkpoint.
    #[error("checkpoint of step {step} is not complete: {reason}")]
    Incomplete {
        /// The step.
        step: Step,
        /// What is missing or superfluous.
        reason: String,
    },
    /// The user asked for a step that has no checkpoint.
    #[error("there is no checkpoint of step {step}; there are: {have}")]
    NoSuchStep {
        /// As asked.
        step: Step,
        /// The existing steps.
        have: String,
    },
    /// Nothing is deleted from a run without one whole checkpoint.
    #[error("no checkpoint of run {run_id} verifies")]
    NoneUsable {
        /// The run.
        run_id: RunId,
    },
    /// A folder named as a source of weights has none.
    #[error("{folder} is not a model folder: {reason}")]
    NotAModel {
        /// The folder's URI.
        folder: String,
        /// What is missing.
        reason: String,
    },
    /// A folder's weights are not those of the model that should start from them.
    #[error("{folder}: {reason}")]
    Mismatch {
        /// The folder's URI.
        folder: String,
        /// Which tensor of which file, and what is wrong with it.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// The checkpoints' files can't be handled on this machine.
    #[error("{bytes} bytes in {files} files can't be laid out")]
    TooLarge {
        /// Bytes in all.
        bytes: u64,
        /// Files.
        files: usize,
    },
    /// An export would overwrite something.
    #[error("{path} exists and is not an empty folder")]
    Occupied {
        /// The folder.
        path: PathBuf,
    },
    /// An export would overwrite a checkpoint.
    #[error("{folder} is the folder of a checkpoint")]
    IsACheckpoint {
        /// The folder's URI.
        folder: String,
    },
    /// The local file system failed.
    #[error("{doing} {path}")]
    Io {
        /// A verb phrase.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A crash point was armed.
    #[error(transparent)]
    Injected(#[from] Injected),
    /// A fault of this program.
    #[error("{0}")]
    Internal(String),
}

impl Explain for CheckpointError {
    fn kind(&self) -> Kind {
        match self {
            Self::Damaged { .. } | Self::NoneUsable { .. } => Kind::Data,
            Self::Storage(error) => error.kind(),
            Self::AlreadyWritten { .. } => Kind::Fenced,
            Self::TooNew { .. } | Self::NotAModel { .. } | Self::Mismatch { .. } | Self::TooLarge { .. } => {
                Kind::Config
            }
            Self::NoSuchStep { .. } | Self::Occupied { .. } | Self::IsACheckpoint { .. } => Kind::Usage,
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => Kind::Permission,
            Self::Io { .. } => Kind::Unavailable,
            Self::Incomplete { .. } | Self::Injected(_) | Self::Internal(_) => Kind::Bug,
        }
    }

    fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Damaged { .. } => {
                "`trainer verify --all` says which checkpoints are whole; `trainer resume` steps back to the newest of \
                them"
            }
            Self::NoneUsable { .. } => {
                "nothing was deleted; `trainer verify --run-id RUN --all` lists the damaged objects"
            }
            Self::Storage(error) => return error.hint(),
            Self::Mismatch { hint, .. } => return Some(hint.clone()),
            Self::TooNew { .. } => "use the version of trainer that wrote this run, or a newer one",
            Self::AlreadyWritten { .. } => "another process of this run is alive; stop one of the two",
            Self::NoSuchStep { .. } => "name one of these steps, or none for the newest",
            Self::NotAModel { .. } => {
                "name a Hugging Face folder with model.safetensors, or with its index and all shards"
            }
            Self::TooLarge { .. } => "the sizes in this folder can't be right, or the model needs a larger machine",
            Self::Occupied { .. } => "name a folder that does not exist yet",
            Self::IsACheckpoint { .. } => "name a folder outside of the runs",
            Self::Io { .. } => "check that the disk has room (`df -h`) and that you may write there (`ls -ld`)",
            Self::Incomplete { .. } | Self::Injected(_) | Self::Internal(_) => return None,
        };
        Some(text.into())
    }
}

/// What is wrong with a damaged object. It is shown, and stored, as its words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Flaw {
    words: String,
    #[serde(skip)]
    checksum: Option<Crc64>,
}

impl Flaw {
    /// Its bytes have this checksum, which is the wrong one.
    pub(crate) fn of_checksum(found: Crc64, words: String) -> Self {
        Self { words, checksum: Some(found) }
    }

    /// The checksum of the bytes that were read, if that is what is wrong. The bytes of an object never change, so two
    /// readings that give different ones contradict each other.
    pub const fn checksum(&self) -> Option<Crc64> {
        self.checksum
    }
}

impl From<String> for Flaw {
    fn from(words: String) -> Self {
        Self { words, checksum: None }
    }
}

impl From<&str> for Flaw {
    fn from(words: &str) -> Self {
        words.to_owned().into()
    }
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words)
    }
}

impl CheckpointError {
    /// Damage, with its object and reason.
    pub(crate) fn damaged(object: impl Into<String>, reason: impl Into<Flaw>) -> Self {
        Self::Damaged { object: object.into(), reason: reason.into() }
    }

    /// A store's error about an object that must exist with a known size: its absence or another size is damage;
    /// anything else is the store's failure.
    pub(crate) fn of_object(object: &str, error: StorageError) -> Self {
        match error {
            StorageError::NotFound { .. } => Self::damaged(object, "it does not exist"),
            StorageError::Short { size, .. } => Self::damaged(object, format!("it ends after {size} bytes")),
            StorageError::TooLarge { size, limit, .. } => {
                Self::damaged(object, format!("it has {size} bytes, it should have at most {limit}"))
            }
            error => Self::Storage(error),
        }
    }
}

/// The key of `name` in `folder`; "" is the store's own folder.
pub(crate) fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{
        catalog::newest_usable,
        export::{Form, Target, export},
        restore::{fetch, plan_pieces, tensor_files, weights_from_folder},
        save::{put_manifest, put_shards},
        testing::{checkpoint, expected, memory_store, save},
        verify::{Depth, verify},
    };

    /// The agent spawns all of these; a future that is not `Send` shows only there.
    #[tokio::test]
    async fn everything_can_be_spawned() {
        let store = memory_store();
        let (committed, manifest) = checkpoint(&store, 5, 1, 2, 1).await;
        let work = async move {
            let save = save(6, 1, 2, 2);
            let receipt = put_shards(&store, &save, |_| {}).await?;
            put_manifest(&store, &save, &[receipt], &expected(&save)).await?;
            newest_usable(&store, std::slice::from_ref(&committed), None).await?;
            verify(&store, &committed, Depth::Bytes { part: 1000 }, &|_| {}).await?;
            let files = tensor_files(&manifest);
            let pieces = plan_pieces(&files, 1000)?.pieces;
            let pieces = pieces.into_iter().map(|piece| (piece, vec![0; piece.len as usize])).collect();
            fetch(&store, &manifest.folder(), &files, pieces, |_| {}).await?;
            export(&store, &manifest, &Target::Store(store.folder("out")), &Form::plain(1000), |_| {}).await?;
            weights_from_folder(&store.folder("out")).await?;
            prune::apply_prune(&store, &[], |_| async { Ok::<_, CheckpointError>(()) }).await
        };
        assert_eq!(tokio::spawn(work).await.unwrap().unwrap(), 0);
    }
}
