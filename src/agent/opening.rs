//! What all generations of a run are made of on this machine: its configuration, the data, the number of workers.
//!
//! Everything that the configuration names is checked, before a new run is created. Nothing is stored here but the
//! dataset's copy on this machine; it may be dropped at any moment.

use std::{
    num::NonZeroU64,
    path::{Path, PathBuf},
};

use bytes::Bytes;

use super::{
    companions::{self, Tokens},
    loopback, provenance,
};
use crate::{
    config::{Machine, RunConfig, micro_batches, workers_per_node},
    data::{self, Dataset, LocalDataset, Split, identity},
    env,
    error::{Error, Kind, Result},
    ids::{DatasetId, WorldSize},
    model,
    report::{Event, Reporter},
};

/// What all generations of this node have in common.
pub struct Resolved {
    pub config: RunConfig,
    /// Stays on this machine while this value exists.
    pub data: LocalDataset,
    pub sequences: NonZeroU64,
    pub workers: u32,
    pub companions: Vec<(String, Bytes)>,
    /// Which data it is.
    pub identity: DatasetId,
}

/// The same as [`resolve`] for a run that is about to be created, with stricter checks of what it starts from.
pub async fn resolve_new(
    config: &RunConfig,
    nproc_per_node: Option<u32>,
    cache: Option<&Path>,
    reporter: &Reporter,
) -> Result<Resolved> {
    model::check_description(config.model.kind, &config.model.config)?;
    let mut resolved = resolve(config, nproc_per_node, cache, reporter).await?;
    companions::of_new_run(config, &mut resolved, reporter).await?;
    Ok(resolved)
}

/// Checks everything that the configuration names, and fetches the data.
pub async fn resolve(
    config: &RunConfig,
    nproc_per_node: Option<u32>,
    cache: Option<&Path>,
    reporter: &Reporter,
) -> Result<Resolved> {
    provenance::compute_device(config).await?;
    let workers = workers_per_node(&config.parallel, nproc_per_node, &Machine::detect());
    micro_batches(config.train.global_batch, WorldSize(workers), config.train.max_micro_batch)?;
    loopback::check(workers)?;
    reporter.event(&Event::Phase { doing: "opening the token shards".into() });
    let shown = |progress: data::cache::CacheProgress| {
        tracing::debug!(done = progress.done, total = progress.total, "downloading token shards");
    };
    let cache = cache.map(Path::to_owned).or_else(cache_folder);
    let data = data::ensure_local(&config.data.train, cache.as_deref(), &config.storage, shown).await?;
    let dataset = Dataset::open(data.dir())?;
    let identity = identity::identify(data.dir())?;
    let vocabulary = model::vocab_size(config.model.kind, &config.model.config)?;
    data::check_vocabulary(dataset.index(), &config.data.train, vocabulary.into(), "model.config")?;
    let longest = model::max_sequence_length(config.model.kind, &config.model.config)?;
    if config.data.sequence_length > longest {
        let length = config.data.sequence_length;
        return Err(Error::new(
            Kind::Config,
            format!(
                "data.sequence_length is {length}, but the model takes at most {longest} (max_position_embeddings)"
            ),
        ));
    }
    let samples = dataset.samples(Split::Train, config.data.sequence_length);
    let sequences = NonZeroU64::new(samples).ok_or_else(|| {
        let message = format!("{} holds no sequence of {} tokens", config.data.train, config.data.sequence_length);
        Error::new(Kind::Config, message).with_hint("shorten data.sequence_length or prepare more data")
    })?;
    Ok(Resolved {
        workers,
        sequences,
        companions: companions::plain(config, &Tokens::of(data.dir(), dataset.index())?)?,
        config: config.clone(),
        data,
        identity,
    })
}

/// Where datasets that lie in an object store are kept on this machine; `None`: this user has no such place.
fn cache_folder() -> Option<PathBuf> {
    let named = |name| env::raw(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")));
    Some(base?.join("trainer").join("datasets"))
}
