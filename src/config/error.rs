//! The errors of a configuration. Every text names the key, where it was set, its value and its allowed values.

use std::{fmt, path::PathBuf};

use crate::error::{Explain, Kind};

/// Where a setting was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The embedded `default.toml`.
    Default,
    /// The run's file, at a line (from 1).
    File {
        /// As given by the user.
        path: PathBuf,
        /// From 1.
        line: usize,
    },
    /// A flag, or the environment variable that stands for it.
    Flag(&'static str),
    /// `--set`.
    Set,
    /// The configuration that the run was created with.
    Run,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Flag(name) => f.write_str(name),
            Self::Set => f.write_str("--set"),
            Self::Run => f.write_str("the run's configuration"),
        }
    }
}

/// The errors of a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("read configuration file {path}")]
    Unreadable {
        /// As given by the user.
        path: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{path}:{line}: not valid TOML: {reason}")]
    Syntax {
        /// As given by the user.
        path: String,
        /// From 1.
        line: usize,
        /// The parser's message.
        reason: String,
    },
    /// There is no such key.
    #[error("{origin}: unknown key {key}")]
    UnknownKey {
        /// The key's full path.
        key: String,
        /// Where it was set.
        origin: Origin,
        /// The nearest key that exists.
        nearest: Option<String>,
        /// The keys that exist in its place.
        siblings: Vec<String>,
    },
    /// The key exists, but not with that value.
    #[error("{origin}: {key} = {given}: expected {expected}")]
    WrongValue {
        /// The key's full path.
        key: String,
        /// Where it was set.
        origin: Origin,
        /// The value, as TOML.
        given: String,
        /// The allowed values.
        expected: String,
    },
    /// A key without a usable default was not given.
    #[error("{key} is not set")]
    Missing {
        /// The key's full path.
        key: &'static str,
        /// How to set it.
        remedy: String,
    },
    /// The file or object that a key names can't be read or is malformed.
    #[error("{origin}: {key} names {path}: {reason}")]
    Named {
        /// The key's full path.
        key: &'static str,
        /// Where it was set.
        origin: Origin,
        /// The file or URI.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The store did not return the object that a key names: its content is not known, so it can't be called wrong.
    #[error("{origin}: {key} names {path}: {reason}")]
    Withheld {
        /// The key's full path.
        key: &'static str,
        /// Where it was set.
        origin: Origin,
        /// Its URI.
        path: String,
        /// The store's error.
        reason: String,
        /// What to do about it.
        kind: Kind,
        /// How, if known.
        hint: Option<String>,
    },
    /// Two settings, each valid, that do not go together.
    #[error("{0}")]
    Together(String),
    /// A setting that a run keeps for life.
    #[error("{key} can't be changed on resume: {reason}")]
    Fixed {
        /// The key's full path.
        key: String,
        /// Why.
        reason: &'static str,
    },
    /// A worker would have no sequence of a step, so that the others would wait for it without end.
    #[error("train.global_batch = {global_batch} is too small for {world} workers: each needs a sequence")]
    TooManyWorkers {
        /// Sequences in one optimizer step.
        global_batch: u32,
        /// Workers of all nodes.
        world: u32,
    },
}

impl Explain for ConfigError {
    fn kind(&self) -> Kind {
        match self {
            Self::Withheld { kind, .. } => *kind,
            _ => Kind::Config,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownKey { nearest: Some(nearest), .. } => Some(format!("did you mean {nearest}?")),
            Self::UnknownKey { nearest: None, siblings, .. } => Some(format!("there are {}", siblings.join(", "))),
            Self::Withheld { hint, .. } => hint.clone(),
            Self::Missing { remedy, .. } => Some(remedy.clone()),
            Self::Fixed { .. } => Some("start a new run, with model.init_from to keep the weights".into()),
            Self::TooManyWorkers { global_batch: 0, .. } => Some("raise train.global_batch".into()),
            Self::TooManyWorkers { global_batch: most, .. } => {
                Some(format!("start at most {most} workers (--nproc-per-node {most}), or raise train.global_batch"))
            }
            Self::Named { key: "model.config", .. } => {
                Some("the path is taken from the working directory, then from the configuration file's folder".into())
            }
            _ => None,
        }
    }
}
