//! From a configuration to the work of a program's own [`task`]: it is opened, as each worker opens it again.
//!
//! Its checkpoints have the weights, and `task.json`: the task's name, its version and its settings.

use std::num::NonZeroU64;

use bytes::Bytes;
use serde_json::json;

use super::{Data, Files, Workload, prepare};
use crate::{
    config::{ModelConfig, OwnTask, RunConfig},
    error::{Error, Kind, Result},
    layout,
    report::Event,
    task::{self, Opened},
    workload::Site,
};

impl Workload {
    /// The work of a run, new or not, that trains `own`. The task of a new one has no version yet.
    pub(super) async fn of_task(config: &RunConfig, own: &OwnTask, site: Site<'_>) -> Result<Self> {
        // A program of another task needs no device to be told so.
        site.reporter.event(&Event::Phase { doing: format!("opening task {}", own.name) });
        let wanted = own.clone();
        let opened = tokio::task::spawn_blocking(move || task::open(&wanted)).await;
        let opened = opened.map_err(|error| Error::from_source(Kind::Bug, error))??;
        let workers = prepare::workers(&config.workload, site).await?;
        let samples = opened.samples.train;
        let sequences = NonZeroU64::new(samples).ok_or_else(|| Error::new(Kind::Bug, "a task has no samples"))?;
        if config.workload.train.early_stopping.is_some() && opened.samples.held_out == 0 {
            let message = format!("task {} holds no sample out, by which train.early_stopping decides", own.name);
            let hint = "hold samples out in Task::samples, or set train.early_stopping.patience = 0";
            return Err(Error::new(Kind::Config, message).with_hint(hint));
        }
        let mut task = config.workload.clone();
        task.model = ModelConfig::of_task(&opened.task);
        task.train.settle_steps(samples)?;
        Ok(Self {
            task,
            storage: config.storage.clone(),
            workers,
            data: Data::Own,
            identity: opened.data(),
            sequences,
            companions: companions(&opened)?,
            base: None,
        })
    }
}

/// What stands beside the weights.
fn companions(opened: &Opened) -> Result<Files> {
    let OwnTask { name, version, settings } = &opened.task;
    let text = json!({ "name": name, "version": version, "settings": settings });
    let bytes = serde_json::to_vec_pretty(&text).map_err(|error| Error::from_source(Kind::Bug, error))?;
    Ok(vec![(layout::TASK.to_owned(), Bytes::from(bytes))])
}
