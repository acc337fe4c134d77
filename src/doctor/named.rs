//! The places that a configuration names: its dataset and the weights that it starts from. Reads as much of them as a
//! run's first minute does.

use super::{
    LIMIT, open,
    verdict::{self, Line},
    within,
};
use crate::{
    config::{OwnTask, RunConfig, TrainTask},
    data::{self, cache, meaning::Meaning},
    error::{Error, Kind, Result},
    layout, model,
    report::human,
    storage::StorageError,
    task::{self, Samples},
    workload::initial,
};

/// The largest `tokenizer.json` that is read. Those in use are smaller.
const MAX_TOKENIZER: u64 = 256 << 20;

const DATASET: &str = "dataset";
const WEIGHTS: &str = "initial weights";
const TASK: &str = "task";

/// One line for each named place.
pub(super) async fn look(config: &RunConfig) -> Vec<Line> {
    if let Some(own) = config.workload.model.task() {
        return vec![within(TASK, async { task(&own).await.unwrap_or_else(|error| Line::error(TASK, &error)) }).await];
    }
    let dataset = within(DATASET, async { dataset(config).await.unwrap_or_else(|error| Line::error(DATASET, &error)) });
    let Some(uri) = &config.workload.model.init_from else { return vec![dataset.await] };
    let weights =
        within(WEIGHTS, async { weights(config, uri).await.unwrap_or_else(|error| Line::error(WEIGHTS, &error)) });
    let (dataset, weights) = tokio::join!(dataset, weights);
    vec![dataset, weights]
}

/// Whether the data's sequences may hold several documents; of data that can't be read another line speaks.
pub(super) async fn is_packed(config: &RunConfig) -> bool {
    if config.workload.model.task().is_some() {
        return false;
    }
    let read = cache::read_index_of(&config.workload.data.train, &config.storage);
    matches!(tokio::time::timeout(LIMIT, read).await, Ok(Ok(index)) if index.has_marks())
}

/// The index, and whether the model and its sequence length fit it. A dataset in a folder is opened; of another one
/// only the index is read.
async fn dataset(config: &RunConfig) -> Result<Line> {
    let TrainTask { model, data: settings, .. } = &config.workload;
    model::check_description(model.kind, &model.config)?;
    let uri = &settings.train;
    let index = cache::read_index_of(uri, &config.storage).await?;
    data::check_vocabulary(&index, uri, model::vocab_size(model.kind, &model.config)?.into(), "model.config")?;
    let samples = |split| index.samples(split, settings.sequence_length);
    let (train, validation) = (samples(data::Split::Train), samples(data::Split::Validation));
    Ok(verdict::dataset(uri, train, validation, settings.sequence_length, settings.validation_every))
}

/// A program's own task, opened as a run opens it.
async fn task(own: &OwnTask) -> Result<Line> {
    let wanted = own.clone();
    let opened = tokio::task::spawn_blocking(move || task::open(&wanted)).await;
    let opened = opened.map_err(|error| Error::from_source(Kind::Bug, error))??;
    let Samples { train, held_out } = opened.samples;
    let found = format!(
        "{} version {}: {}, {} held out, {}",
        opened.task.name,
        opened.task.version,
        human::plural(train, "sample"),
        held_out,
        human::plural(opened.elements(), "parameter"),
    );
    Ok(Line::ok(TASK, found))
}

/// The weights' files and their lengths, checked against the model; and the folder's tokenizer, checked against the
/// data's.
async fn weights(config: &RunConfig, uri: &str) -> Result<Line> {
    let folder = initial::open(uri, &config.storage)?;
    let files = initial::weights(&config.workload.model, uri, &folder).await?;
    if let Some(data) = tokenizer(config).await? {
        initial::check_tokenizer(&config.workload.data, uri, &folder, &data).await?;
    }
    let bytes = files.iter().map(|file| file.bytes).sum();
    Ok(Line::ok(WEIGHTS, format!("{} of {} in {uri}", human::plural(files.len() as u64, "file"), human::bytes(bytes))))
}

/// The meaning of the data's ids. `None`: there is no such file, which the dataset's line reports.
async fn tokenizer(config: &RunConfig) -> Result<Option<Meaning>> {
    let Some(data) = open(&config.workload.data.train, &config.storage)? else { return Ok(None) };
    match data.get(layout::TOKENIZER, MAX_TOKENIZER).await {
        Ok(json) => Ok(Meaning::of_json(&json).ok()),
        Err(StorageError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
