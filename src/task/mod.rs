//! Your own model: a program that trains it with everything that this library does.
//!
//! A [`Task`] is what such a program is about. It opens settings and gives a [`Trainable`]: named parameters, samples,
//! and a loss. Everything else is the library's: which samples a step has, how they are spread over workers, gradients,
//! the optimizer, checkpoints, interruptions, and the whole command line ([`crate::main`]).
//!
//! ```no_run
//! use std::process::ExitCode;
//!
//! use trainer::{
//!     task::{Fallible, Parameter, Parameters, Sample, Samples, Split, Task, Trainable},
//!     tch::{Device, Kind, Reduction, Tensor},
//! };
//!
//! /// Learns y = 3x - 1 from points that it makes itself.
//! struct Line;
//!
//! #[derive(serde::Serialize, serde::Deserialize)]
//! #[serde(deny_unknown_fields)]
//! struct Settings {
//!     #[serde(default = "thousand")]
//!     points: u64,
//! }
//!
//! fn thousand() -> u64 {
//!     1000
//! }
//!
//! impl Task for Line {
//!     type Settings = Settings;
//!     type Trainable = Points;
//!
//!     fn name(&self) -> &str {
//!         "line"
//!     }
//!     fn version(&self) -> u32 {
//!         1
//!     }
//!     fn open(&self, settings: Settings) -> Fallible<Points> {
//!         Ok(Points { points: settings.points })
//!     }
//! }
//!
//! struct Points {
//!     points: u64,
//! }
//!
//! impl Trainable for Points {
//!     fn parameters(&self) -> Vec<Parameter> {
//!         vec![Parameter::normal("slope", &[1], 0.1), Parameter::zeros("offset", &[1])]
//!     }
//!     fn samples(&self) -> Samples {
//!         Samples { train: self.points, held_out: 100 }
//!     }
//!     fn identity(&self) -> String {
//!         format!("{} points of 3x - 1", self.points)
//!     }
//!     fn batch(&mut self, _: Split, samples: &[Sample], device: Device) -> Fallible<Vec<Tensor>> {
//!         let x: Vec<f32> = samples.iter().map(|sample| sample.index as f32 / self.points as f32).collect();
//!         let x = Tensor::f_from_slice(&x)?.f_to_device(device)?;
//!         let y = x.f_mul_scalar(3.0)?.f_sub_scalar(1.0)?;
//!         Ok(vec![x, y])
//!     }
//!     fn loss(&self, parameters: &Parameters<'_>, batch: &[Tensor]) -> Fallible<Tensor> {
//!         let [x, y] = batch else { return Err("a batch has two tensors".into()) };
//!         let found = x.f_mul(parameters.get("slope")?)?.f_add(parameters.get("offset")?)?;
//!         Ok(found.f_to_kind(Kind::Float)?.f_mse_loss(y, Reduction::Sum)?)
//!     }
//! }
//!
//! fn main() -> ExitCode {
//!     trainer::main(Line)
//! }
//! ```
//!
//! # Invariants
//! - A step follows the mean over its targets, whatever micro-batches, workers and nodes compute it: a task gives sums,
//!   and says how many targets each sample has.
//! - What a step computes is a pure function of the run's settings, the parameters and the step. A task keeps nothing
//!   between calls that changes a result, and takes random numbers from the seeds that it is given.
//! - A run goes on with the task, the version and the data that it was made of. The first two are in its journal; the
//!   third is the checksum of [`Trainable::identity`], in each of its generations.
//!
//! *Crash, error, panic:* of a task's code ends the worker, with its step and its own words; the agent starts the
//! workers again from the newest checkpoint, and gives up after the same step has failed `restart.same_step` times.
#![doc = include_str!("README.md")]

mod guard;
mod learner;
mod parameters;
mod registry;
mod settings;

use serde::{Serialize, de::DeserializeOwned};
use tch::{Device, Tensor};

pub use self::{
    guard::at_work,
    learner::{Arithmetic, Learner},
    parameters::{Initial, Parameter, Parameters},
    registry::{Opened, TaskError, check_language_model, open, register, registered},
};
pub use crate::data::Split;

/// What a task's code returns: any error, whose text reaches the user with the worker and the step.
pub type Fallible<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// What a program trains. It is `main`'s argument: `trainer::main(MyTask)`.
pub trait Task: Send + Sync + 'static {
    /// The settings in `[task.settings]`, complete: a run stores them as they are serialized when it is created, with
    /// the defaults that this program has. They serialize to a table. A key that is not in it is refused by name.
    type Settings: Serialize + DeserializeOwned;
    /// What can be trained.
    type Trainable: Trainable + 'static;

    /// The task's name, as in `task.name`: up to 64 letters, digits, `-` and `_`. A run keeps it.
    fn name(&self) -> &str;

    /// Raise it when a run that exists must not go on with the new code: other parameters, another loss, or another
    /// meaning of a setting or of a sample's index. A run goes on with the version that it was created with alone.
    fn version(&self) -> u32;

    /// Opens what these settings describe. The agent calls it when it prepares a run (and `doctor` does), and each
    /// worker when it starts; workers work in the folder `/`, so that relative paths mean another place there.
    /// It must not use the GPU.
    ///
    /// # Errors
    /// For settings that can't be used, in words that name the key. They end the command with exit code 78.
    fn open(&self, settings: Self::Settings) -> Fallible<Self::Trainable>;
}

/// A model and its data, opened: parameters, samples, and a loss over both.
pub trait Trainable: Send {
    /// All parameters, in the order of a forward pass: gradients are reduced from the last to the first. Always the
    /// same list for the same settings.
    fn parameters(&self) -> Vec<Parameter>;

    /// How many samples there are; always the same for the same settings.
    fn samples(&self) -> Samples;

    /// Which data this is: a text that differs if the samples do, such as a checksum of the files. A run holds it
    /// against its own whenever it goes on, and refuses other data.
    fn identity(&self) -> String;

    /// The targets of one sample: how many losses [`Trainable::loss`] adds up for it. A step divides the sum of all
    /// losses by the sum of these over its samples, on whichever workers they are. A pure function of the sample that
    /// every worker calls for every sample of a step, so it must be quick.
    fn targets(&self, split: Split, index: u64) -> u64 {
        let _ = (split, index);
        1
    }

    /// The tensors of these samples on `device`, of any number, shapes and types: they are what
    /// [`Trainable::loss`] gets. There is at least one sample, and at most `train.max_micro_batch`.
    ///
    /// LibTorch's own generators are seeded before each call, for this batch and its loss together, by the place of
    /// its first sample in the run; [`Sample::seed`] is for whatever is drawn sample by sample, and does not depend on
    /// how samples are put together to batches.
    ///
    /// # Errors
    /// Any; see [`Fallible`].
    fn batch(&mut self, split: Split, samples: &[Sample], device: Device) -> Fallible<Vec<Tensor>>;

    /// The sum, not the mean, of the losses of the batch's targets: an fp32 tensor of one element, on the parameters'
    /// device, from which gradients flow back to every trained parameter. A parameter that it does not use has a
    /// gradient of zero.
    ///
    /// # Errors
    /// Any; see [`Fallible`].
    fn loss(&self, parameters: &Parameters<'_>, batch: &[Tensor]) -> Fallible<Tensor>;

    /// The sum of the metric over the targets of a held-out batch, an fp32 tensor of one element: what
    /// `data.validation_every` measures, printed as the mean over all targets; lower is better. Gradients are not
    /// recorded. Unless given: the loss.
    ///
    /// # Errors
    /// Any; see [`Fallible`].
    fn evaluate(&self, parameters: &Parameters<'_>, batch: &[Tensor]) -> Fallible<Tensor> {
        self.loss(parameters, batch)
    }
}

/// How many samples a task has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Samples {
    /// Samples to train on: indices from 0 in [`Split::Train`]. At least one.
    pub train: u64,
    /// Samples held out: indices from 0 in [`Split::Validation`]. 0: nothing is ever measured.
    pub held_out: u64,
}

/// One sample of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Its index in its split.
    pub index: u64,
    /// A seed for whatever is drawn for it, such as an augmentation. It follows from `train.seed` and the sample's
    /// place in the run, so that it differs from pass to pass over the data, and is the same on any worker of any
    /// world. A held-out sample has the same seed whenever it is measured.
    pub seed: u64,
}
