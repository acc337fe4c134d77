//! The work of a run, as its agent knows it: what must be there before it starts, the processes that do it, what they
//! are told, and what their reports become.
//!
//! An agent knows steps, slots, image plans, metrics and exit statuses. What is particular to training a model is here:
//! its datasets, the checks of model and data against each other, the weights that a run starts from, the small files
//! that make a checkpoint a model folder, and the words that name its settings. There is one kind of work, training; of
//! a language model on tokens, or of a program's own task. A work of another kind would make [`Workload`] and
//! `config::TrainTask` enums, behind the same methods.
//!
//! - `prepare`: everything that a configuration names, checked and fetched; `loopback`, whether ranks reach each other
//! - `own`: the same for a program's own [`task`](crate::task)
//! - `provenance`: whether data and checkpoints are those that the run was made of
//! - [`initial`], `companions`: a model folder's weights and tokenizer, and the files taken along into checkpoints
//! - [`Base`]: the weights that adapters are trained beside
//! - `collectives`: what NCCL is told on a node of several
//! - `command`, `inherited`: the process of a worker, and what it inherits of the environment
//! - `reports`: what the reports of all ranks become
//! - `words`: hints that name settings of the work
//!
//! # Invariants
//! - A process that computes learns its task and nothing else of the configuration: no store, no secrets, no notices.
//! - A run continues with the data that it was trained on, unless a person names other data.
//!
//! # Stored layout
//! None of its own: it makes files that stand beside the shards of a checkpoint, and writes nothing.
//!
//! *Crash:* the copy of the data on this machine stays, and is found again. *Retry:* preparing again gives the same.
//! *Cancel:* preparing only reads and fetches; it may be dropped at any moment.

pub mod initial;
pub mod words;

mod base;
mod collectives;
mod command;
mod companions;
mod inherited;
mod loopback;
mod own;
mod prepare;
mod provenance;
mod reports;

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU64,
    path::PathBuf,
    process::Command,
};

use bytes::Bytes;

pub use self::{
    base::{Base, unlike},
    collectives::{Collectives, Recorder},
    companions::Files,
    prepare::Site,
    provenance::{DATA, MadeOf, names_data, newest_usable},
    reports::{Diverged, Figures, Measured, Outline, Progress, Reports},
};
use crate::{
    checkpoint::{manifest::TrainerState, restore::RemoteFile},
    config::{Device, LoraConfig, Shares, Spread, StorageConfig, Strategy, TrainTask},
    data::{LocalDataset, identity},
    error::{Error, Kind, Result},
    ids::{DatasetId, Generation, LocalRank, NodeRanks, RunId, Step, WorldSize},
    layout,
    protocol::Assignment,
    shortage,
    snapshot::image::SharedImage,
    storage::Store,
    worker::task::Task,
};

/// The data of a run.
#[derive(Debug)]
enum Data {
    /// Tokens, which stay on this machine while this value exists.
    Tokens(LocalDataset),
    /// A program's own task has its own.
    Own,
}

/// The work of a run on this node, prepared: everything that it names was checked, and its data is on this machine.
#[derive(Debug)]
pub struct Workload {
    task: TrainTask,
    /// For the places that the task names.
    storage: StorageConfig,
    workers: u32,
    data: Data,
    /// Which data it is.
    identity: DatasetId,
    /// Sequences of one pass over the data.
    sequences: NonZeroU64,
    companions: Files,
    /// The weights that adapters are trained beside; `None`: there are no adapters.
    base: Option<Base>,
}

impl Workload {
    /// One without workers or data, for tests of what surrounds it.
    #[cfg(test)]
    pub fn of_no_workers() -> Self {
        let config = crate::checkpoint::testing::config();
        Self {
            task: config.workload,
            storage: config.storage,
            workers: 0,
            data: Data::Tokens(LocalDataset::unread("/nowhere".into())),
            identity: DatasetId { index: "0".repeat(16), vocabulary: "1".repeat(16) },
            sequences: NonZeroU64::MIN,
            companions: Files::new(),
            base: None,
        }
    }

    /// Workers on this node.
    pub const fn workers(&self) -> u32 {
        self.workers
    }

    /// What is computed, with everything worked out that depends on the data.
    pub const fn task(&self) -> &TrainTask {
        &self.task
    }

    /// The step after which the run is complete.
    pub const fn last_step(&self) -> Step {
        self.task.last_step()
    }

    /// Each rank has the whole state, in a world of any size.
    pub fn is_replicated(&self) -> bool {
        self.task.parallel.strategy == Strategy::Ddp
    }

    /// The data that it is trained on.
    pub const fn data(&self) -> &DatasetId {
        &self.identity
    }

    /// The adapters and the files of their base, as the run's configuration has them.
    pub const fn lora(&self) -> Option<&LoraConfig> {
        self.task.model.lora.as_ref()
    }

    /// The memory that holds the base of adapters, for the workers.
    pub fn base(&self) -> Option<&SharedImage> {
        self.base.as_ref().map(Base::image)
    }

    /// The facts that decisions depend on, for this many workers of all nodes.
    pub fn outline(&self, world: WorldSize) -> Outline {
        Outline::of(&self.task, world)
    }

    /// The sequences of each rank in a world of this size, if they are not the same.
    pub fn uneven_shares(&self, world: WorldSize) -> Option<Shares> {
        let train = &self.task.train;
        Spread::new(train.global_batch, world, train.max_micro_batch).ok()?.uneven()
    }

    /// Waits until all of the data has been verified against its checksums.
    pub async fn verify(&self) -> Result<()> {
        match &self.data {
            Data::Tokens(dataset) => Ok(dataset.verify().await?),
            Data::Own => Ok(()),
        }
    }

    /// A dataset in a folder may be replaced at any moment: it must still be the one that was checked.
    pub fn is_still_there(&self) -> Result<()> {
        // A task's data is looked at by each worker that starts.
        let Data::Tokens(dataset) = &self.data else { return Ok(()) };
        if identity::is_still(dataset.dir(), &self.identity.index)? {
            return Ok(());
        }
        let what = format!("the dataset {} was replaced while this run used it", self.task.data.train);
        Err(Error::new(Kind::Config, what).with_hint(
            "put the run's dataset back and resume, or name this one with --set data.train=… to train on it from here \
             on",
        ))
    }

    /// The weights that a run without a checkpoint starts from: a folder, and its files. `None`: they are drawn, as
    /// adapters are.
    pub async fn beginning(&self) -> Result<Option<(Store, Vec<RemoteFile>)>> {
        let (Some(uri), None) = (&self.task.model.init_from, &self.base) else { return Ok(None) };
        let folder = initial::open(uri, &self.storage)?;
        let files = initial::weights(&self.task.model, uri, &folder).await?;
        Ok(Some((folder, files)))
    }

    /// What workers are told of their collectives, on a node of several that the others reach at `address`.
    pub fn collectives(&self, address: IpAddr) -> Collectives {
        // Without NCCL there is nobody to tell.
        let computes_on_gpus = cfg!(torch_cuda) && self.task.parallel.device != Device::Cpu;
        if computes_on_gpus { Collectives::on_gpus(address) } else { Collectives::default() }
    }

    /// The process of a worker.
    pub fn command(&self, collectives: &Collectives) -> Command {
        let mut command = command::worker(self.task.train.threads);
        collectives.tell(&mut command);
        command
    }

    /// What this worker, of a node with these ranks, is told first; rank 0 serves the ranks' store at `store`.
    pub fn assignment(
        &self,
        local_rank: LocalRank,
        ranks: NodeRanks,
        generation: Generation,
        resume_step: Step,
        store: SocketAddr,
    ) -> Result<Assignment> {
        let task = Task {
            config: self.task.clone(),
            data_dir: match &self.data {
                Data::Tokens(dataset) => dataset.dir().to_owned(),
                Data::Own => PathBuf::new(),
            },
            data: self.identity.clone(),
            base: self.base.as_ref().map_or_else(Vec::new, |base| base.places().to_vec()),
        };
        let (rank, world_size) = (ranks.rank(local_rank), ranks.world);
        let (several_nodes, task) = (!ranks.is_whole_world(), task.write()?);
        Ok(Assignment { rank, local_rank, world_size, generation, resume_step, store, several_nodes, task })
    }

    /// The files that stand beside the shards in the checkpoint of `step`; `index` says which shard holds which tensor.
    pub fn small_files(&self, step: Step, index: Bytes) -> Result<Files> {
        let state = TrainerState::at(step, &self.task, self.sequences)
            .ok_or_else(|| Error::new(Kind::Config, "train.steps × train.global_batch is too large"))?;
        let state = TrainerState { data: Some(self.identity.clone()), ..state };
        // Adapters are one file, which needs no index.
        let mut files = match &self.base {
            Some(_) => self.companions.clone(),
            None => {
                let mut files = companions::typed(&self.companions, &index)?;
                files.push((layout::MODEL_INDEX.to_owned(), index));
                files
            }
        };
        files.push((layout::TRAINER_STATE.to_owned(), state.to_bytes()?.into()));
        Ok(files)
    }

    /// Hint for a run whose workers have too little memory; `why` is what they said.
    pub fn less_memory(&self, run_id: &RunId, why: &str) -> String {
        words::less_memory(run_id, &self.task.train, self.workers, shortage::fitting(why))
    }
}

#[cfg(test)]
mod tests;
