//! What a rank learns from: a model, its samples, and the loss of both. The loop of a step knows nothing else of them.
//!
//! [`Language`] is a language model on a dataset of tokens, [`Own`] a program's own task.

use std::ops::Range;

use tch::Tensor;

use super::{Batches, Place};
use crate::{
    config::{ModelConfig, Passes, Spread, TrainConfig},
    error::{Context, Error, Kind, Result},
    ids::Step,
    model::{self, BuildSettings, Leaves, Model},
    task::{Arithmetic, Learner, Opened},
};

/// The loss of a batch.
#[derive(Debug)]
pub struct Loss {
    /// The mean over its targets, an fp32 scalar on the device; 0 without any.
    pub mean: Tensor,
    /// Its targets.
    pub targets: u64,
}

/// A model with its samples, on one rank.
pub trait Lesson {
    /// The model's parameters.
    fn leaves(&self) -> &dyn Leaves;

    /// The model's parameters, to be laid out otherwise.
    fn leaves_mut(&mut self) -> &mut dyn Leaves;

    /// How this rank's samples of a step are spread over passes.
    fn passes(&self) -> Passes;

    /// Samples held out.
    fn held_out(&self) -> u64;

    /// Targets of the samples at these positions of the run's cursor, whichever ranks compute them.
    fn targets(&self, positions: Range<u64>) -> Result<u64>;

    /// The error of a step whose samples have no target at all.
    fn nothing_to_learn(&self, step: Step, samples: u32) -> Error;

    /// Makes the batch of the samples at these positions of the run's cursor.
    fn read(&mut self, positions: Range<u64>) -> Result<()>;

    /// Makes the batch of these held-out samples.
    fn read_held_out(&mut self, samples: Range<u64>) -> Result<()>;

    /// The loss of the newest batch. `backward()` may be called on it once.
    fn loss(&self) -> Result<Loss>;

    /// What is measured of a held-out batch, the newest one.
    fn metric(&self) -> Result<Loss>;
}

/// A language model on a dataset.
pub struct Language {
    model: Box<dyn Model>,
    batches: Batches,
}

impl Language {
    /// The model of `model`, with fresh weights if they are to be drawn (`draw`); otherwise with arbitrary ones, which
    /// are loaded afterwards. If there are adapters, they are what is drawn; their base is loaded in any case.
    pub fn new(model: &ModelConfig, train: &TrainConfig, place: Place, draw: bool, batches: Batches) -> Result<Self> {
        let settings =
            BuildSettings { device: place.device, precision: train.precision, seed: draw.then_some(train.seed) };
        let model = match &model.lora {
            None => model::build(model.kind, &model.config, &settings),
            Some(lora) => model::lora::build(model.kind, &model.config, &settings, lora),
        };
        Ok(Self { model: model.context("build model")?, batches })
    }
}

impl Lesson for Language {
    fn leaves(&self) -> &dyn Leaves {
        self.model.as_ref()
    }

    fn leaves_mut(&mut self) -> &mut dyn Leaves {
        self.model.as_mut()
    }

    fn passes(&self) -> Passes {
        self.batches.passes()
    }

    fn held_out(&self) -> u64 {
        self.batches.held_out()
    }

    fn targets(&self, positions: Range<u64>) -> Result<u64> {
        Ok(self.batches.targets(positions)?)
    }

    fn nothing_to_learn(&self, step: Step, samples: u32) -> Error {
        let what = format!("none of the {samples} sequences of step {step} has a token to learn");
        Error::new(Kind::Config, what).with_hint(
            "raise train.global_batch, or prepare the data with --pack --sequence-length, so that sequences have whole \
             answers",
        )
    }

    fn read(&mut self, positions: Range<u64>) -> Result<()> {
        Ok(self.batches.at_positions(positions)?)
    }

    fn read_held_out(&mut self, samples: Range<u64>) -> Result<()> {
        Ok(self.batches.held_out_at(samples)?)
    }

    fn loss(&self) -> Result<Loss> {
        let batch = self.batches.newest().ok_or_else(|| Error::new(Kind::Bug, "no batch was read"))?;
        Ok(Loss { mean: self.model.batch_loss(batch)?, targets: batch.targets.count() })
    }

    fn metric(&self) -> Result<Loss> {
        self.loss()
    }
}

/// A program's own task.
pub struct Own {
    learner: Learner,
    passes: Passes,
}

impl Own {
    /// With parameters that are fresh (`draw`), or arbitrary ones that are loaded afterwards. An error if the world has
    /// more ranks than a step has samples.
    pub fn new(opened: Opened, train: &TrainConfig, place: Place, draw: bool) -> Result<Self> {
        let passes = Spread::new(train.global_batch, place.world, train.max_micro_batch)?.passes(place.rank);
        let arithmetic = Arithmetic { device: place.device, precision: train.precision, draw };
        Ok(Self { learner: Learner::new(opened, train.seed, arithmetic)?, passes })
    }
}

impl Lesson for Own {
    fn leaves(&self) -> &dyn Leaves {
        self.learner.leaves()
    }

    fn leaves_mut(&mut self) -> &mut dyn Leaves {
        self.learner.leaves_mut()
    }

    fn passes(&self) -> Passes {
        self.passes
    }

    fn held_out(&self) -> u64 {
        self.learner.held_out()
    }

    fn targets(&self, positions: Range<u64>) -> Result<u64> {
        Ok(self.learner.targets(positions)?)
    }

    fn nothing_to_learn(&self, step: Step, samples: u32) -> Error {
        let what = format!("none of the {samples} samples of step {step} has a target");
        Error::new(Kind::Config, what).with_hint("raise train.global_batch, or leave out samples without a target")
    }

    fn read(&mut self, positions: Range<u64>) -> Result<()> {
        Ok(self.learner.read(positions)?)
    }

    fn read_held_out(&mut self, samples: Range<u64>) -> Result<()> {
        self.learner.read_held_out(samples)
    }

    fn loss(&self) -> Result<Loss> {
        let (mean, targets) = self.learner.loss()?;
        Ok(Loss { mean, targets })
    }

    fn metric(&self) -> Result<Loss> {
        let (mean, targets) = self.learner.metric()?;
        Ok(Loss { mean, targets })
    }
}
