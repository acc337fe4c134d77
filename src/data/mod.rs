//! Training data: text to token shards, token shards to batches.
//!
//! ```text
//!  text, JSON lines, Parquet ──prepare──► <uri>/index.json  tokenizer.json  train-00000.bin …  validation-00000.bin …
//!                                              │ ensure_local (agent: download once, check, keep)
//!                                              ▼
//!                              Dataset (worker: positioned reads) ◄── Sampler (seed, position) -> sample
//! ```
//! A person runs [`prepare()`] once; the agent of every node calls [`ensure_local`]; the workers use [`Dataset`] and
//! [`Sampler`], and see local folders only. The state of the data within a run is one number, the step: which samples
//! it trains on is computed, never stored.
//!
//! # Invariants
//! - A dataset exists when, and only when, its `index.json` does; it is written last and names every other file with
//!   its size and CRC64-NVME.
//! - The same inputs and settings give the same bytes: files are taken in sorted order, the tokenizer's training breaks
//!   ties by value, and documents are assigned to splits by a hash of their text.
//!
//! *Crash:* a dataset without an index does not exist, and a cache without one is continued with its missing files.
//! *Retry:* the same preparation with the same inputs does nothing, so a script can repeat it; a wrong cached file is
//! fetched again. *Cancel:* a dropped future stops its threads within a few MiB.
#![doc = include_str!("README.md")]

pub mod around;
pub mod cache;
mod chat;
mod columns;
mod compressed;
mod conversations;
mod documents;
mod encode;
mod fetch;
mod given;
pub mod identity;
mod input;
mod json;
mod layout;
mod left_out;
pub mod marks;
pub mod meaning;
mod pack;
mod place;
mod placing;
pub mod prepare;
mod progress;
mod records;
mod remote;
mod eviction;
pub mod sampler;
mod scan;
pub mod shards;
mod sources;
mod special;
pub mod templates;
mod checksums;
pub mod tokenizer;
mod writer;

use std::path::PathBuf;

pub use cache::{LocalDataset, ensure_local};
pub use layout::{DocumentFormat, LayoutSettings};
pub use marks::Marks;
pub use prepare::{PrepareEvent, PrepareSettings, PrepareSummary, TokenizerSource, prepare};
pub use sampler::Sampler;
pub use shards::{Dataset, Split};
pub use tokenizer::check_vocabulary;

use crate::{
    error::{Explain, Kind},
    storage::StorageError,
};

/// The errors of training data.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// There is no dataset where the configuration says.
    #[error("no prepared dataset at {uri} (it has no index.json)")]
    Missing {
        /// As configured.
        uri: String,
    },
    /// A prepared dataset is not what its index says.
    #[error("dataset file {file}: {reason}")]
    Damaged {
        /// File or object.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Not one sequence can be cut from the shards.
    #[error("the {split} shards of {dataset} hold no sequence of {sequence_length} tokens with a token after it")]
    NoSamples {
        /// The dataset.
        dataset: String,
        /// The split.
        split: Split,
        /// The configured length.
        sequence_length: u32,
    },
    /// A packed dataset is used with another sequence length than it was cut for.
    #[error("{dataset} is packed for sequences of {packed} tokens, but data.sequence_length is {sequence_length}")]
    Packed {
        /// The dataset.
        dataset: String,
        /// The length that it was cut for.
        packed: u32,
        /// The configured length.
        sequence_length: u32,
    },
    /// A sample number outside of the dataset.
    #[error("sample {index} was requested, but the {split} split has {samples}")]
    NoSuchSample {
        /// The split.
        split: Split,
        /// The requested number.
        index: u64,
        /// The number of samples.
        samples: u64,
    },
    /// The data has token ids that the model has no embedding for.
    #[error("{dataset} has a vocabulary of {data_vocab} tokens, but model {model} has one of {model_vocab}")]
    Vocabulary {
        /// The dataset.
        dataset: String,
        /// Its vocabulary.
        data_vocab: u32,
        /// The model's `config.json`.
        model: String,
        /// Its vocabulary.
        model_vocab: u64,
    },
    /// An input of `trainer data prepare` can't be used.
    #[error("input {input}: {reason}")]
    Input {
        /// As given.
        input: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An input of `trainer data prepare` is broken, so that it can't be read to its end.
    #[error("input {input}: {reason}")]
    Broken {
        /// As given.
        input: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A setting of `trainer data prepare` can't be used.
    #[error("{setting}: {reason}")]
    Setting {
        /// Its name, as typed.
        setting: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The output already holds another dataset.
    #[error("{uri} already holds a dataset that differs from this one")]
    Exists {
        /// The output.
        uri: String,
    },
    /// A tokenizer can't be read or trained.
    #[error("tokenizer {file}: {reason}")]
    Tokenizer {
        /// The file, or `train:VOCAB`.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The local file system refused.
    #[error("{doing} {}", path.display())]
    Io {
        /// A verb: "read".
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The store refused.
    #[error("{doing} {uri}")]
    Store {
        /// A verb phrase: "read dataset index of".
        doing: &'static str,
        /// The store or folder.
        uri: String,
        /// The cause.
        #[source]
        source: StorageError,
    },
    /// The caller stopped waiting, or a thread of the preparation died.
    #[error("preparation stopped: {reason}")]
    Stopped {
        /// Why.
        reason: String,
    },
}

impl Explain for DataError {
    fn kind(&self) -> Kind {
        match self {
            Self::Damaged { .. } => Kind::Data,
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => Kind::Permission,
            // A full or broken disk: another machine, or this one later, can do it.
            Self::Io { source, .. } if source.kind() != std::io::ErrorKind::NotFound => Kind::Unavailable,
            Self::Store { source, .. } => source.kind(),
            Self::NoSuchSample { .. } | Self::Stopped { .. } => Kind::Bug,
            Self::Missing { .. }
            | Self::NoSamples { .. }
            | Self::Packed { .. }
            | Self::Vocabulary { .. }
            | Self::Input { .. }
            | Self::Broken { .. }
            | Self::Setting { .. }
            | Self::Exists { .. }
            | Self::Tokenizer { .. }
            | Self::Io { .. } => Kind::Config,
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Missing { uri } => {
                format!("make one: trainer data prepare --input 'FILES/**' --tokenizer train:4096 --out {uri}")
            }
            Self::Damaged { .. } => {
                "delete the dataset (in a cache: this folder) and make or download it again with trainer data prepare"
                    .into()
            }
            Self::NoSamples { .. } => "lower data.sequence_length, or prepare more text".into(),
            Self::Packed { packed, .. } => {
                format!("set data.sequence_length to {packed}, or prepare the data again with --sequence-length")
            }
            Self::Vocabulary { data_vocab, .. } => format!(
                "set vocab_size in the model's config.json to {data_vocab} or more, or prepare the data with the \
                model's tokenizer"
            ),
            Self::Broken { .. } => "--skip-unreadable continues without it".into(),
            Self::Exists { .. } => "give another --out, or --overwrite to replace it".into(),
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                "make room on that disk; datasets out of an object store are kept on a mounted instance store, else \
                below XDG_CACHE_HOME \
                 or ~/.cache"
                    .into()
            }
            Self::Io { path, source, .. } if path.starts_with(std::env::temp_dir()) => match source.kind() {
                std::io::ErrorKind::NotFound | std::io::ErrorKind::PermissionDenied => {
                    "set TMPDIR to a folder that exists, which you may write to".into()
                }
                _ => return None,
            },
            Self::Store { source, .. } => return source.hint(),
            _ => return None,
        })
    }
}
