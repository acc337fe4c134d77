//! A worker's task: what it trains, and on which data. Its agent passes it on as JSON that it does not read.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    config::TrainTask,
    error::{Context, Error, Kind, Result},
    ids::DatasetId,
};

/// Everything that a worker knows of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// The model, its data, and the mathematics.
    pub config: TrainTask,
    /// Local folder that holds the token shards.
    pub data_dir: PathBuf,
    /// The data that must be there.
    pub data: DatasetId,
    /// The files of the weights that adapters are trained beside: each one's first byte and length in the memory that
    /// the worker inherits. Empty: there are no adapters.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub base: Vec<(u64, u64)>,
}

impl Task {
    /// As an assignment carries it.
    pub fn write(&self) -> Result<Value> {
        serde_json::to_value(self).map_err(|error| Error::from_source(Kind::Bug, error)).context("write a task")
    }

    /// From an assignment.
    pub fn read(task: Value) -> Result<Self> {
        serde_json::from_value(task).map_err(|error| Error::from_source(Kind::Bug, error)).context("read the task")
    }
}
