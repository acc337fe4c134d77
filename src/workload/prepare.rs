//! From a configuration to a [`Workload`]: everything that it names is checked, and the data is fetched.

use std::{
    num::NonZeroU64,
    path::{Path, PathBuf},
};

use super::{
    Base, Data, Workload,
    companions::{self, Tokens},
    initial, loopback, provenance,
};
use crate::{
    config::{Machine, RunConfig, Spread, TrainTask, workers_per_node},
    data::{self, Dataset, Split, identity},
    env,
    error::{Error, Kind, Result},
    ids::WorldSize,
    journal::RunState,
    model,
    report::{Event, Reporter},
    storage::Store,
    task,
};

/// Where a workload is prepared.
#[derive(Clone, Copy, Debug)]
pub struct Site<'a> {
    /// Workers on this node, if given on the command line.
    pub nproc_per_node: Option<u32>,
    /// Where datasets from an object store are kept on this machine; `None`: in the user's cache.
    pub cache: Option<&'a Path>,
    /// Receives the events.
    pub reporter: &'a Reporter,
}

impl Workload {
    /// The work of a run that is about to be created, with stricter checks of what it starts from. All of its data has
    /// been verified.
    pub async fn of_new_run(config: &RunConfig, site: Site<'_>) -> Result<Self> {
        let TrainTask { model, .. } = &config.workload;
        if let Some(own) = model.task() {
            return Self::of_task(config, &own, site).await;
        }
        model::check_description(model.kind, &model.config)?;
        if let Some(lora) = &model.lora {
            model::lora::target_modules(model.kind, &model.config, lora)?;
        }
        let mut workload = Self::prepare(config, site).await?;
        workload.companions = companions::of_new_run(config, workload.tokens()?, site.reporter).await?;
        if let (Some(lora), Some(uri)) = (&mut workload.task.model.lora, &model.init_from) {
            reading_base(&site);
            let folder = initial::open(uri, &config.storage)?;
            let files = initial::weights(model, uri, &folder).await?;
            let base = Base::of_new_run(&folder, files, &config.storage).await?;
            (workload.base, lora.base) = (Some(base.0), base.1);
        }
        workload.verify().await?;
        Ok(workload)
    }

    /// The work of an existing run, whose folder is `run`. `accepted`: a person has named the data, so it need not be
    /// that of before.
    pub async fn of_existing_run(
        config: &RunConfig,
        site: Site<'_>,
        run: &Store,
        state: &RunState,
        accepted: bool,
    ) -> Result<Self> {
        if let Some(own) = config.workload.model.task() {
            let workload = Self::of_task(config, &own, site).await?;
            provenance::data_agrees(state, &workload, accepted)?;
            return Ok(workload);
        }
        let mut workload = Self::prepare(config, site).await?;
        provenance::data_agrees(state, &workload, accepted)?;
        let holders = companions::holders(state);
        if let Some(files) = companions::of_existing_run(config, workload.tokens()?, run, &holders).await? {
            workload.companions = files;
        }
        let model = &config.workload.model;
        if let (Some(lora), Some(uri)) = (&model.lora, &model.init_from) {
            reading_base(&site);
            workload.base = Some(Base::of_existing_run(uri, lora, &config.storage).await?);
        }
        Ok(workload)
    }

    /// The folder of its tokens.
    fn tokens(&self) -> Result<&Path> {
        match &self.data {
            Data::Tokens(dataset) => Ok(dataset.dir()),
            Data::Own => Err(Error::new(Kind::Bug, "a task has no tokens")),
        }
    }

    async fn prepare(config: &RunConfig, site: Site<'_>) -> Result<Self> {
        let TrainTask { model, data: wanted, .. } = &config.workload;
        task::check_language_model()?;
        let workers = workers(&config.workload, site).await?;
        site.reporter.event(&Event::Phase { doing: "opening the token shards".into() });
        let shown = |progress: data::cache::CacheProgress| {
            tracing::debug!(done = progress.done, total = progress.total, "downloading token shards");
        };
        let cache = site.cache.map(Path::to_owned).or_else(cache_folder);
        let data = data::ensure_local(&wanted.train, cache.as_deref(), &config.storage, shown).await?;
        let dataset = Dataset::open(data.dir())?;
        let identity = identity::identify(data.dir())?;
        let vocabulary = model::vocab_size(model.kind, &model.config)?;
        data::check_vocabulary(dataset.index(), &wanted.train, vocabulary.into(), "model.config")?;
        let longest = model::context(model.kind, &model.config)?;
        let length = wanted.sequence_length;
        if length > longest.positions {
            let model::Context { positions, key } = longest;
            let message = format!("data.sequence_length is {length}, but the model takes at most {positions} ({key})");
            return Err(Error::new(Kind::Config, message));
        }
        dataset.check_length(length)?;
        let samples = dataset.samples(Split::Train, length);
        let sequences = NonZeroU64::new(samples).ok_or_else(|| {
            let message = format!("{} holds no sequence of {length} tokens", wanted.train);
            Error::new(Kind::Config, message).with_hint("shorten data.sequence_length or prepare more data")
        })?;
        if config.workload.train.early_stopping.is_some() && dataset.samples(Split::Validation, length) == 0 {
            let message = format!(
                "{} holds no sequence of {length} tokens for validation, by which train.early_stopping decides",
                wanted.train
            );
            let hint = "prepare it with a higher --validation-ratio, or set train.early_stopping.patience = 0";
            return Err(Error::new(Kind::Config, message).with_hint(hint));
        }
        let mut task = config.workload.clone();
        task.train.settle_steps(samples)?;
        Ok(Self {
            task,
            storage: config.storage.clone(),
            workers,
            sequences,
            base: None,
            companions: companions::plain(&config.workload, &Tokens::of(data.dir(), dataset.index())?)?,
            data: Data::Tokens(data),
            identity,
        })
    }
}

/// Workers on this node, for a step that has a sample for each of them.
pub(super) async fn workers(task: &TrainTask, site: Site<'_>) -> Result<u32> {
    let TrainTask { train, parallel, .. } = task;
    provenance::compute_device(parallel.device).await?;
    let workers = workers_per_node(parallel, site.nproc_per_node, &Machine::detect());
    Spread::new(train.global_batch, WorldSize(workers), train.max_micro_batch)?;
    loopback::check(workers)?;
    Ok(workers)
}

fn reading_base(site: &Site<'_>) {
    site.reporter.event(&Event::Phase { doing: "reading the weights that the adapters are trained beside".into() });
}

/// Where datasets that lie in an object store are kept on this machine; `None`: this user has no such place.
fn cache_folder() -> Option<PathBuf> {
    Some(env::cache_folder()?.join("datasets"))
}
