//! What a rank learns from: a model, its samples, and the loss of both. The loop of a step knows nothing else of them.
//!
//! [`Language`] is a language model on a dataset of tokens, [`Own`] a program's own task.

use std::ops::Range;

use tch::Tensor;

use super::{Batches, Place, strategy};
use crate::{
    config::{ModelConfig, ParallelConfig, Passes, Spread, TrainConfig},
    error::{Context, Error, Kind, Result},
    ids::Step,
    model::{self, Batch, BuildSettings, Leaves, Model},
    protocol::HeldOutSum,
    task::{Arithmetic, Learner, Opened},
    torch::{
        self,
        fused::{self, Verified},
    },
};

/// The loss of a batch.
#[derive(Debug)]
pub struct Loss {
    /// The mean over its targets, an fp32 scalar on the device; 0 without any.
    pub mean: Tensor,
    /// Its targets.
    pub targets: u64,
}

/// What a loss is computed from: a model with its newest batch.
pub enum Newest<'a> {
    /// Stage by stage, or in one go.
    Language {
        /// The model.
        model: &'a dyn Model,
        /// The batch.
        batch: &'a Batch,
    },
    /// In one go.
    Own(&'a Learner),
}

impl Newest<'_> {
    /// The loss. `backward()` may be called on it once.
    pub fn loss(&self) -> Result<Loss> {
        let (mean, targets) = match self {
            Self::Language { model, batch } => (model.batch_loss(batch)?, batch.targets.count()),
            Self::Own(learner) => learner.loss()?,
        };
        Ok(Loss { mean, targets })
    }
}

/// Computes the losses of single targets, in the order of a batch's targets.
pub type TargetLosses<'a> = dyn FnMut(&dyn Model, &Batch) -> Result<Tensor> + 'a;

/// A model with its samples, on one rank.
pub trait Lesson {
    /// The model's parameters.
    fn leaves(&self) -> &dyn Leaves;

    /// The model's parameters, to be laid out otherwise.
    fn leaves_mut(&mut self) -> &mut dyn Leaves;

    /// How this rank's samples of a step are spread over passes.
    fn passes(&self) -> Passes;

    /// From now on the samples are those of another place, on the same device. An error if its world has more ranks
    /// than a step has samples.
    fn moves(&mut self, train: &TrainConfig, place: Place) -> Result<()>;

    /// Samples held out.
    fn held_out(&self) -> u64;

    /// Targets of the samples at these positions of the run's cursor, whichever ranks compute them.
    fn targets(&mut self, positions: Range<u64>) -> Result<u64>;

    /// The error of a step whose samples have no target at all.
    fn nothing_to_learn(&self, step: Step, samples: u32) -> Error;

    /// Makes the batch of the samples at these positions of the run's cursor.
    fn read(&mut self, positions: Range<u64>) -> Result<()>;

    /// The model with the newest batch.
    fn newest(&self) -> Result<Newest<'_>>;

    /// The language model, if that is what learns.
    fn model(&self) -> Option<&dyn Model>;

    /// The sums that [`Lesson::measure`] fills: one for each source of held-out samples, or one without a name.
    fn sums(&self) -> Vec<HeldOutSum>;

    /// Adds to `sums` what is measured of these of `count` held-out samples. What is added is rounded to
    /// 2⁻²⁴, so that a sum is the same whatever ranks and batches it is made of. A language model is measured with
    /// `losses`.
    fn measure(
        &mut self,
        samples: Range<u64>,
        count: u64,
        sums: &mut [HeldOutSum],
        losses: &mut TargetLosses<'_>,
    ) -> Result<()>;
}

/// Losses of single targets are rounded to multiples of this: sums of them are exact up to half a thousand million, so
/// they are the same however the targets are spread over passes and ranks, and in whatever order they are added.
const LOSS_UNIT: f64 = 1.0 / (1 << 24) as f64;

/// In whole units.
fn rounded(loss: f64) -> f64 {
    (loss / LOSS_UNIT).round() * LOSS_UNIT
}

/// A language model on a dataset.
pub struct Language {
    model: Box<dyn Model>,
    batches: Batches,
}

impl Language {
    /// The model of `model`, with fresh weights if they are to be drawn (`draw`); otherwise with arbitrary ones, which
    /// are loaded afterwards. If there are adapters, they are what is drawn; their base is loaded in any case.
    pub fn new(
        model: &ModelConfig,
        train: &TrainConfig,
        parallel: &ParallelConfig,
        place: Place,
        draw: bool,
        batches: Batches,
    ) -> Result<Self> {
        let settings =
            BuildSettings { device: place.device, precision: train.precision, seed: draw.then_some(train.seed) };
        let model = match &model.lora {
            None if strategy::keeps_parts(parallel, place.world) => {
                model::build_bare(model.kind, &model.config, &settings)
            }
            None => model::build(model.kind, &model.config, &settings),
            Some(lora) => model::lora::build(model.kind, &model.config, &settings, lora),
        };
        let mut model = model.context("build model")?;
        if place.device.is_cuda()
            && let Some(kernel) = model.attention_kernel(batches.length())?
        {
            tracing::info!("attention is computed by LibTorch's {kernel} kernel");
        }
        if train.fused {
            let Verified { fused, left_out } = fused::verified(place.device);
            for problem in left_out {
                tracing::warn!("a fused function is left out, LibTorch computes in its place: {problem}");
            }
            model.use_fused(*fused);
        }
        Ok(Self { model, batches })
    }
}

#[cfg(test)]
impl Language {
    /// With another model in place of its own.
    pub fn with_model(self, wrap: impl FnOnce(Box<dyn Model>) -> Box<dyn Model>) -> Self {
        Self { model: wrap(self.model), batches: self.batches }
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

    fn moves(&mut self, train: &TrainConfig, place: Place) -> Result<()> {
        self.batches = self.batches.of_place(train, place)?;
        Ok(())
    }

    fn held_out(&self) -> u64 {
        self.batches.held_out()
    }

    fn targets(&mut self, positions: Range<u64>) -> Result<u64> {
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

    fn newest(&self) -> Result<Newest<'_>> {
        let batch = self.batches.newest().ok_or_else(|| Error::new(Kind::Bug, "no batch was read"))?;
        Ok(Newest::Language { model: self.model.as_ref(), batch })
    }

    fn model(&self) -> Option<&dyn Model> {
        Some(self.model.as_ref())
    }

    fn sums(&self) -> Vec<HeldOutSum> {
        self.batches.source_names().map(HeldOutSum::of).collect()
    }

    fn measure(
        &mut self,
        samples: Range<u64>,
        count: u64,
        sums: &mut [HeldOutSum],
        losses: &mut TargetLosses<'_>,
    ) -> Result<()> {
        let (batch, sources) = self.batches.held_out_at(samples, count)?;
        let losses = losses(self.model.as_ref(), batch)?;
        let losses = torch::tch_result("read losses", Vec::<f32>::try_from(&losses))?;
        for (at, loss) in losses.into_iter().enumerate() {
            // Data without sources has one sum, and no list of them.
            let source = sources.get(at).copied().unwrap_or(0);
            if let Some(sum) = sums.get_mut(usize::from(source)) {
                sum.loss += rounded(loss.into());
                sum.targets += 1;
            }
        }
        Ok(())
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
        let passes = passes(train, place)?;
        let arithmetic = Arithmetic { device: place.device, precision: train.precision, draw };
        Ok(Self { learner: Learner::new(opened, train.seed, arithmetic)?, passes })
    }
}

fn passes(train: &TrainConfig, place: Place) -> Result<Passes> {
    Ok(Spread::new(train.global_batch, place.world, train.max_micro_batch)?.passes(place.rank))
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

    fn moves(&mut self, train: &TrainConfig, place: Place) -> Result<()> {
        self.passes = passes(train, place)?;
        Ok(())
    }

    fn held_out(&self) -> u64 {
        self.learner.held_out()
    }

    fn targets(&mut self, positions: Range<u64>) -> Result<u64> {
        Ok(self.learner.targets(positions)?)
    }

    fn nothing_to_learn(&self, step: Step, samples: u32) -> Error {
        let what = format!("none of the {samples} samples of step {step} has a target");
        Error::new(Kind::Config, what).with_hint("raise train.global_batch, or leave out samples without a target")
    }

    fn read(&mut self, positions: Range<u64>) -> Result<()> {
        Ok(self.learner.read(positions)?)
    }

    fn newest(&self) -> Result<Newest<'_>> {
        Ok(Newest::Own(&self.learner))
    }

    fn model(&self) -> Option<&dyn Model> {
        None
    }

    fn sums(&self) -> Vec<HeldOutSum> {
        vec![HeldOutSum::of("")]
    }

    fn measure(
        &mut self,
        samples: Range<u64>,
        _: u64,
        sums: &mut [HeldOutSum],
        _: &mut TargetLosses<'_>,
    ) -> Result<()> {
        self.learner.read_held_out(samples)?;
        let (mean, targets) = tch::no_grad(|| self.learner.metric())?;
        if let Some(sum) = sums.first_mut() {
            sum.loss += rounded(torch::to_f64(&mean)? * targets as f64);
            sum.targets += targets;
        }
        Ok(())
    }
}
