//! How the ranks share the work of a step: one trait, and one place that chooses.
//!
//! | strategy | trained weights on a rank | gradients | moments and update | after an update |
//! |---|---|---|---|---|
//! | `single` | all | its own | all | nothing |
//! | `ddp` | all | all-reduced behind the backward pass | all, the same on every rank | nothing |
//! | `zero1` | all, to compute with | reduced by chunks | its chunk of each bucket | buckets are gathered |
//! | `shard` | its chunk of each block, and a few blocks for a while | reduced by chunks | its chunks | nothing |
//!
//! A pass runs in one graph or stage by stage ([`stages`]), and `shard` gathers a stage's weights before it is
//! computed.
//!
//! Frozen parameters are whole on every rank under each of them, and nobody reduces, updates or gathers them. Adapters
//! beside a frozen base are trained like any parameter, in fp32.
//!
//! A strategy is made in two steps, because a worker says what its state is before it meets its peers: [`lay_out`]
//! chooses and makes the tensors, [`Layout::connect`] makes what reduces and updates them.
//!
//! A rank may leave its peers between two steps and go on with others: [`Strategy::release`] gives back what it has,
//! and [`lay_out_again`] lays the same tensors out for another world. Nothing is copied, so this is for strategies
//! under which every rank has all of it: `single` and `ddp`.
//!
//! Invariants: the state changes in [`Strategy::step`] and, for weights that other ranks update, until
//! [`Strategy::settle`] returns; a capture runs between `settle` and `step`, so nothing writes what a capture reads.
//! All ranks call all of it in the same order. A world of one has nobody to share with and is `single`, whatever the
//! setting. *Crash:* a peer that dies breaks the collective; the error ends this worker too, and the state is that of
//! the newest checkpoint. *Resume:* buckets and chunks depend on the configuration and the world alone, and elements
//! are summed in the order of ranks, so a resume on the same world is exact.

mod ddp;
mod shard;
mod single;
pub mod stages;
mod zero1;

#[cfg(test)]
mod tests;

use std::{fmt, time::Duration};

use tch::{Device, TchError, Tensor};

pub(super) use self::shard::{rooms, stage_partition};
pub use self::{single::Values, stages::Stages};
use super::{optim::Brake, state::State};
use crate::{
    config::{self, OptimizerConfig, ParallelConfig, Precision},
    error::{Context, Error, Kind, Result},
    ids::{Rank, Step, WorldSize},
    model::{Leaves, Parameter, Weight},
    torch::{self, ProcessGroup, TorchError},
};

/// What a pass keeps for its backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Graph {
    /// Everything: one graph.
    Whole,
    /// The input of each block, and the graph of the last `keep` ones; the others are computed again.
    Blocks {
        /// How many.
        keep: usize,
    },
}

/// One rank's part in the work of a step. Passes add to the gradients: see [`stages::pass`].
pub trait Strategy: Stages + fmt::Debug {
    /// Whether weights are here for a while only, so that passes go stage by stage and all ranks do each of them
    /// together: those that have no batch left, too.
    fn is_staged(&self) -> bool {
        false
    }

    /// Whether any rank says so, where all ranks do a pass together; otherwise whether this one does.
    fn any(&self, here: bool) -> Result<bool, TorchError> {
        Ok(here)
    }

    /// After all passes of a step, those of other ranks too: the gradients are averages over the ranks on return.
    fn reduce(&mut self) -> Result<(), TorchError> {
        Ok(())
    }

    /// The 2-norm of the whole reduced gradient, the same number on every rank: a scalar on the device.
    fn norm(&self) -> Result<Tensor, TorchError>;

    /// Updates the elements that this rank has to update, and starts to send them to whoever computes with them.
    /// `scale`, if any, divides the gradients first. Gradients are not recorded.
    fn update(
        &mut self,
        config: &OptimizerConfig,
        step: Step,
        lr: f64,
        scale: Option<&Tensor>,
    ) -> Result<(), TorchError>;

    /// Waits until the last update has reached this rank's weights. Costs nothing if there is nothing to wait for.
    fn settle(&mut self) -> Result<(), TorchError>;

    /// The limit of every collective that is begun from now on. Call it when the last update has settled.
    fn set_patience(&self, limit: Duration) -> Result<(), TorchError>;

    /// Sets every gradient to zero, in place: whoever reduces them keeps pointing at them.
    fn zero_grad(&mut self) -> Result<(), TorchError>;

    /// Leaves the peers, and gives back what this rank has; `None`: others have parts of the state. Call it between two
    /// steps, when the last update has settled on every rank: then nothing of the peers' is in flight.
    fn release(self: Box<Self>) -> Option<Values> {
        None
    }

    /// The `step`-th update of the run, from the reduced gradients. Returns the 2-norm of the whole gradient before
    /// clipping, as a scalar on the device: the caller chooses when to read it. The weights may be read after
    /// [`Strategy::settle`].
    /// From the first norm on that is not finite, `brake` lets no update change anything.
    fn step(&mut self, config: &OptimizerConfig, step: Step, lr: f64, brake: &mut Brake) -> Result<Tensor, TorchError> {
        self.settle()?;
        tch::no_grad(|| {
            let norm = self.norm()?;
            let scale = brake.scale(config, &norm)?;
            self.update(config, step, lr, Some(&scale))?;
            Ok(norm)
        })
    }
}

/// A strategy that has laid out this rank's tensors and has not met its peers yet.
pub trait Layout: fmt::Debug {
    /// Takes over the gradients, which are zero afterwards and stay where they are. The state may have been loaded
    /// meanwhile.
    fn connect(self: Box<Self>, peers: Peers) -> Result<Box<dyn Strategy>>;
}

/// The other ranks, if there are any.
#[derive(Debug)]
pub struct Peers(Option<ProcessGroup>);

impl Peers {
    /// `group`: of all ranks; none is needed in a world of one.
    pub fn new(group: Option<ProcessGroup>) -> Self {
        Self(group)
    }

    fn group(self) -> Result<ProcessGroup> {
        self.0.ok_or_else(|| Error::new(Kind::Bug, "agent named no peers"))
    }
}

/// Bytes of the first bucket, so that the first reduction starts early.
const FIRST_BUCKET: u64 = 1 << 20;

/// Sizes of the buckets in which gradients are reduced, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Buckets {
    pub first: u64,
    pub rest: u64,
}

impl Buckets {
    pub fn of(mib: u32) -> Self {
        let rest = u64::from(mib) << 20;
        Self { first: rest.min(FIRST_BUCKET), rest }
    }
}

/// Whether a rank keeps a part of each weight, so that it need not have any of them whole.
pub fn keeps_parts(config: &ParallelConfig, world: WorldSize) -> bool {
    world.get() > 1 && config.strategy == config::Strategy::Shard
}

/// Makes the state of `model` as `config` and the world want it, with moments of zero. The model's tensors may be
/// replaced by others with the same values: ask for its parameters afterwards.
pub fn lay_out(
    config: &ParallelConfig,
    precision: Precision,
    model: &mut dyn Leaves,
    rank: Rank,
    world: WorldSize,
) -> Result<(State, Box<dyn Layout>)> {
    choose(config.strategy, Buckets::of(config.bucket_mib), precision, model, rank, world)
}

fn choose(
    wanted: config::Strategy,
    buckets: Buckets,
    precision: Precision,
    model: &mut dyn Leaves,
    rank: Rank,
    world: WorldSize,
) -> Result<(State, Box<dyn Layout>)> {
    // Adapters are so small that rounding them for computing saves nothing: PEFT's file has them in fp32.
    let adapted = model.parameters().iter().any(Parameter::is_base);
    let precision = if adapted { Precision::Fp32 } else { precision };
    let made = tch::no_grad(|| match wanted {
        _ if world.get() <= 1 => single::lay_out(model, precision),
        config::Strategy::Ddp => ddp::lay_out(model, buckets, precision),
        config::Strategy::Zero1 => zero1::lay_out(model, buckets, precision, rank, world),
        config::Strategy::Shard => shard::lay_out(model, precision, rank, world),
    });
    made.context("make the state")
}

/// Lays out for another world what [`Strategy::release`] has given back, of the same `model`: its weights and moments
/// stay where they are. An error if ranks of that world have parts of the state.
pub fn lay_out_again(
    config: &ParallelConfig,
    model: &mut dyn Leaves,
    values: Values,
    world: WorldSize,
) -> Result<(State, Box<dyn Layout>)> {
    let buckets = Buckets::of(config.bucket_mib);
    let made = tch::no_grad(|| match config.strategy {
        _ if world.get() <= 1 => single::lay_out_again(model, values),
        config::Strategy::Ddp => ddp::lay_out_again(model, values, buckets),
        config::Strategy::Zero1 | config::Strategy::Shard => {
            Err(Error::new(Kind::Bug, "a state of which each rank has a part is loaded"))
        }
    });
    made.context("make the state for another world")
}

/// Buckets so small that a tiny model has many.
#[cfg(test)]
const SMALL: Buckets = Buckets { first: 1000, rest: 9000 };

/// Like [`lay_out`], with [`SMALL`] buckets.
#[cfg(test)]
pub(super) fn lay_out_small(
    wanted: config::Strategy,
    precision: Precision,
    model: &mut dyn Leaves,
    rank: Rank,
    world: WorldSize,
) -> Result<(State, Box<dyn Layout>)> {
    choose(wanted, SMALL, precision, model, rank, world)
}

/// Lets the model compute with `views`, one for each trained parameter; frozen ones stay as they are.
fn replace_trained(
    model: &mut dyn Leaves,
    precision: Precision,
    mut views: impl Iterator<Item = Tensor>,
) -> Result<()> {
    let mut weights = Vec::with_capacity(model.parameters().len());
    for parameter in model.parameters() {
        // A model whose parameters have no views keeps them, and `State::new` refuses it.
        let view = parameter.leaf().and_then(|_| views.next());
        weights.push(match (view, precision) {
            (None, _) => parameter.weight.share(),
            (Some(view), Precision::Fp32) => {
                let leaf = view.f_detach().and_then(|leaf| leaf.f_set_requires_grad(true));
                Weight::Leaf(torch::tch_result("make parameters", leaf)?)
            }
            (Some(view), Precision::Bf16) => Weight::Copy { leaf: torch::leaf_like(&view)?, copy: view },
        });
    }
    Ok(model.set_parameters(weights)?)
}

/// The type of the weights that are computed with, where they are apart from those that are updated.
const fn computed_in(precision: Precision) -> tch::Kind {
    match precision {
        Precision::Fp32 => tch::Kind::Float,
        Precision::Bf16 => tch::Kind::BFloat16,
    }
}

/// The 2-norm of the whole gradient, of which each rank has these `chunks`: the same number on every rank.
fn norm_of_chunks(chunks: &[Tensor], group: &ProcessGroup, device: Device) -> Result<Tensor, TorchError> {
    let square = || match chunks {
        [] => Tensor::f_zeros([], (tch::Kind::Double, device)),
        // In double, so that squaring a norm and taking the root again costs nothing.
        chunks => torch::grad_norm(chunks)
            .map_err(|error| TchError::Torch(error.to_string()))?
            .f_to_kind(tch::Kind::Double)?
            .f_square(),
    };
    let mut sum = torch::tch_result("gradient norm", square())?;
    group.all_reduce_sum(&mut sum)?;
    torch::tch_result("gradient norm", sum.f_sqrt().and_then(|norm| norm.f_to_kind(tch::Kind::Float)))
}

/// The leaves of the trained parameters, in the order of the model's.
fn leaves(model: &dyn Leaves) -> Vec<Tensor> {
    model.parameters().iter().filter_map(Parameter::leaf).map(Tensor::shallow_clone).collect()
}
