//! Opens a run: from a configuration to the journal, the data, and the number of workers.
//!
//! Everything that the configuration names is checked before a new run is created. Nothing is stored here but the
//! journal's first record and the data set's copy on this machine; both may be dropped at any moment.

use std::{
    cell::Cell,
    num::NonZeroU64,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::{
    Afterwards, Begin, Manner,
    companions::{self, Tokens},
    loopback,
    provenance::{self, names_data},
};
use crate::{
    config::{Machine, NoticeConfig, RunConfig, apply_overrides, canonical_overrides, micro_batches, workers_per_node},
    data::{self, Dataset, LocalDataset, Split, identity},
    env,
    error::{Error, Kind, Result},
    ids::{DatasetId, NodeId, RunId, Step, WorldSize},
    journal::{self, Journal, JournalError, RunState},
    model,
    report::{Event, Reporter},
    storage::Store,
};

/// A journal, the configuration that holds for its run, the settings that this command changes, and the checkpoint that
/// it names.
pub type Opened = (Journal, Resolved, Vec<(String, String)>, Option<Step>);

/// Everything that all generations of this agent have in common.
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

/// The inputs for opening a run.
pub struct Opening<'a> {
    pub run: &'a Store,
    pub node: &'a NodeId,
    pub run_id: &'a RunId,
    pub nproc_per_node: Option<u32>,
    pub manner: &'a Manner,
    /// Receives the configuration's settings for notices as soon as they are known.
    pub settings: &'a mpsc::UnboundedSender<NoticeConfig>,
    /// Set before the request that creates the run.
    pub exists: &'a Cell<bool>,
}

impl Opening<'_> {
    /// Opens or creates the journal and checks everything that the configuration names. `Err`: the run has completed;
    /// what to do with this machine then.
    pub async fn open(self, begin: Begin, reporter: &Reporter) -> Result<Result<Opened, Afterwards>> {
        let Self { run, node, run_id, nproc_per_node, manner, settings, exists } = self;
        let cache = manner.cache.as_deref();
        // The receiver waits for the end of this function.
        let configured = |config: &RunConfig| drop(settings.send(config.notice.clone()));
        let (from, overrides, journal) = match begin {
            Begin::Create(config) => {
                configured(&config);
                // Everything that the configuration names is checked before the run exists.
                let resolved = resolve_new(&config, nproc_per_node, cache, reporter).await?;
                resolved.data.whole().await?;
                exists.set(true);
                let journal = Journal::create(run.clone(), node.clone(), run_id.clone(), *config).await?;
                return Ok(Ok((journal, resolved, Vec::new(), None)));
            }
            Begin::CreateOrResume { config, overrides } => {
                configured(&config);
                let resolved = match resolve_new(&config, nproc_per_node, cache, reporter).await {
                    Ok(resolved) => resolved.data.whole().await.map(|()| resolved).map_err(Error::from),
                    Err(refused) => Err(refused),
                };
                match resolved {
                    Ok(resolved) => {
                        exists.set(true);
                        match Journal::create(run.clone(), node.clone(), run_id.clone(), *config).await {
                            Ok(journal) => return Ok(Ok((journal, resolved, Vec::new(), None))),
                            Err(JournalError::Exists { .. }) => {
                                (None, overrides, Journal::open(run.clone(), node.clone(), run_id.clone()).await?)
                            }
                            Err(error) => return Err(error.into()),
                        }
                    }
                    // A refused configuration creates no run; an existing run continues as it was created.
                    Err(refused) => match Journal::open(run.clone(), node.clone(), run_id.clone()).await {
                        Ok(journal) => {
                            exists.set(true);
                            (None, overrides, journal)
                        }
                        Err(_) => return Err(refused),
                    },
                }
            }
            Begin::Resume { from, overrides, state } => {
                (from, overrides, Journal::follow(run.clone(), node.clone(), *state).await?)
            }
        };
        let (config, overrides) = effective(journal.state(), &overrides)?;
        if let Some(step) = completed(journal.state(), &config, from) {
            tracing::info!(run = %run_id, %step, "run has completed, nothing is left to do");
            return Ok(Err(manner.then(&config, false)));
        }
        configured(&config);
        let mut resolved = resolve(&config, nproc_per_node, cache, reporter).await?;
        provenance::data_agrees(journal.state(), &resolved, manner.accepts_data || names_data(&overrides))?;
        companions::of_existing_run(&mut resolved, run, &companions::holders(journal.state())).await?;
        Ok(Ok((journal, resolved, overrides, from)))
    }
}

/// The last step of a completed run; `None` if it has not completed, was given more steps, or is told to go back.
pub fn completed(state: &RunState, config: &RunConfig, from: Option<Step>) -> Option<Step> {
    match state.outcome() {
        journal::Outcome::Completed { step, .. } if from.is_none() && config.train.steps <= step.get() => Some(*step),
        _ => None,
    }
}

/// The configuration that holds now: as created, with the changes of every generation and of this command; and this
/// command's changes in the form in which the journal keeps them.
pub fn effective(state: &RunState, typed: &[(String, String)]) -> Result<(RunConfig, Vec<(String, String)>)> {
    let base = apply_overrides(state.config(), &state.overrides())?;
    Ok((apply_overrides(&base, typed)?, canonical_overrides(&base, typed)?))
}

/// The same as [`resolve`] for a run that is about to be created, with stricter checks of what it starts from.
async fn resolve_new(
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
