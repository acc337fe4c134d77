//! A world of one: everything is here, and nobody is asked. `ddp` has the same tensors and the same update on each
//! rank.

use std::time::Duration;

use tch::Tensor;

use super::{Layout, Peers, Stages, Strategy, leaves};
use crate::{
    config::OptimizerConfig,
    error::Result,
    ids::Step,
    model::Leaves,
    torch::{self, TorchError},
    train::{
        optim::{Slot, Update},
        state::{Role, Row, State, Tensors},
    },
};

pub(super) fn lay_out(model: &dyn Leaves) -> Result<(State, Box<dyn Layout>)> {
    let (state, replica) = Replica::lay_out(model)?;
    Ok((state, Box::new(replica)))
}

/// Every trained parameter, whole: its leaf and its moments, in the same order.
#[derive(Debug)]
pub(super) struct Replica {
    pub leaves: Vec<Tensor>,
    exp_avgs: Vec<Tensor>,
    exp_avg_sqs: Vec<Tensor>,
}

impl Replica {
    pub fn lay_out(model: &dyn Leaves) -> Result<(State, Self)> {
        let leaves = leaves(model);
        let zeros = || torch::tch_result("make moments", leaves.iter().map(Tensor::f_zeros_like).collect());
        let (exp_avgs, exp_avg_sqs): (Vec<Tensor>, Vec<Tensor>) = (zeros()?, zeros()?);
        let rows = [
            Row { role: Role::Weight, tensors: Tensors::OfModel },
            Row { role: Role::ExpAvg, tensors: Tensors::Whole(&exp_avgs) },
            Row { role: Role::ExpAvgSq, tensors: Tensors::Whole(&exp_avg_sqs) },
        ];
        let state = State::new(model, &rows)?;
        Ok((state, Self { leaves, exp_avgs, exp_avg_sqs }))
    }

    /// Ready to train. Call it after the reducer, if there is one, is made: it decides where gradients are in memory.
    pub fn start(self) -> Result<Whole, TorchError> {
        torch::zero_gradients(&self.leaves)?;
        let gradients = torch::gradients(&self.leaves)?;
        let moments = self.exp_avgs.into_iter().zip(self.exp_avg_sqs);
        let slots = self.leaves.iter().zip(&gradients).zip(moments);
        let slots = slots.map(|((weight, gradient), (exp_avg, exp_avg_sq))| Slot {
            decays: weight.dim() >= 2,
            weight: weight.shallow_clone(),
            gradient: gradient.shallow_clone(),
            exp_avg,
            exp_avg_sq,
        });
        let update = Update::new(slots.collect());
        Ok(Whole { leaves: self.leaves, gradients, update })
    }
}

impl Layout for Replica {
    fn connect(self: Box<Self>, _: Peers) -> Result<Box<dyn Strategy>> {
        Ok(Box::new(Single(self.start()?)))
    }
}

/// All gradients and the whole update.
#[derive(Debug)]
pub(super) struct Whole {
    leaves: Vec<Tensor>,
    gradients: Vec<Tensor>,
    update: Update,
}

impl Whole {
    pub fn norm(&self) -> Result<Tensor, TorchError> {
        torch::grad_norm(&self.gradients)
    }

    pub fn update(
        &self,
        config: &OptimizerConfig,
        step: Step,
        lr: f64,
        scale: Option<&Tensor>,
    ) -> Result<(), TorchError> {
        self.update.apply(config, step, lr, scale)
    }

    pub fn zero_grad(&self) -> Result<(), TorchError> {
        torch::zero_gradients(&self.leaves)
    }
}

#[derive(Debug)]
struct Single(Whole);

impl Stages for Single {
    fn begin(&mut self, _: bool) -> Result<(), TorchError> {
        Ok(())
    }

    fn end(&mut self, _: bool) -> Result<(), TorchError> {
        Ok(())
    }
}

impl Strategy for Single {
    fn norm(&self) -> Result<Tensor, TorchError> {
        self.0.norm()
    }

    fn update(
        &mut self,
        config: &OptimizerConfig,
        step: Step,
        lr: f64,
        scale: Option<&Tensor>,
    ) -> Result<(), TorchError> {
        self.0.update(config, step, lr, scale)
    }

    fn settle(&mut self) -> Result<(), TorchError> {
        Ok(())
    }

    fn set_patience(&self, _: Duration) -> Result<(), TorchError> {
        Ok(())
    }

    fn zero_grad(&mut self) -> Result<(), TorchError> {
        self.0.zero_grad()
    }
}
