//! `ddp`: every rank has everything; gradients are all-reduced behind the backward pass, and each rank makes the same
//! update.

use std::time::Duration;

use tch::Tensor;

use super::{
    Buckets, Layout, Peers, Stages, Strategy,
    single::{Replica, Values, Whole},
};
use crate::{
    config::{OptimizerConfig, Precision},
    error::Result,
    ids::Step,
    model::Leaves,
    torch::{ProcessGroup, Reducer, Reduction, TorchError},
    train::state::State,
};

pub(super) fn lay_out(
    model: &mut dyn Leaves,
    buckets: Buckets,
    precision: Precision,
) -> Result<(State, Box<dyn Layout>)> {
    let (state, replica) = Replica::lay_out(model, precision)?;
    Ok((state, Box::new(Unconnected { replica, buckets })))
}

/// The same for another world, with the tensors of an earlier one.
pub(super) fn lay_out_again(
    model: &mut dyn Leaves,
    values: Values,
    buckets: Buckets,
) -> Result<(State, Box<dyn Layout>)> {
    let (state, replica) = Replica::lay_out_again(model, values)?;
    Ok((state, Box::new(Unconnected { replica, buckets })))
}

#[derive(Debug)]
struct Unconnected {
    replica: Replica,
    buckets: Buckets,
}

impl Layout for Unconnected {
    fn connect(self: Box<Self>, peers: Peers) -> Result<Box<dyn Strategy>> {
        let Self { replica, buckets: Buckets { first, rest } } = *self;
        let bytes = |size: u64| usize::try_from(size).unwrap_or(usize::MAX);
        let group = peers.group()?;
        let reducer = Reducer::new(&replica.leaves, &group, bytes(first), bytes(rest))?;
        Ok(Box::new(Ddp { whole: replica.start()?, reducer, group }))
    }
}

#[derive(Debug)]
struct Ddp {
    whole: Whole,
    reducer: Reducer,
    group: ProcessGroup,
}

impl Stages for Ddp {
    fn begin(&mut self, last: bool) -> Result<(), TorchError> {
        self.reducer.begin(Reduction::of(last))
    }

    fn end(&mut self, last: bool) -> Result<(), TorchError> {
        self.reducer.end(Reduction::of(last))
    }
}

impl Strategy for Ddp {
    fn norm(&self) -> Result<Tensor, TorchError> {
        self.whole.norm()
    }

    fn update(
        &mut self,
        config: &OptimizerConfig,
        step: Step,
        lr: f64,
        scale: Option<&Tensor>,
    ) -> Result<(), TorchError> {
        self.whole.update(config, step, lr, scale)
    }

    fn settle(&mut self) -> Result<(), TorchError> {
        Ok(())
    }

    fn set_patience(&self, limit: Duration) -> Result<(), TorchError> {
        self.group.set_timeout(limit)
    }

    fn zero_grad(&mut self) -> Result<(), TorchError> {
        self.whole.zero_grad()
    }

    fn release(self: Box<Self>) -> Option<Values> {
        let Self { whole, reducer, group } = *self;
        // It takes its hooks off the leaves, and keeps the group.
        drop(reducer);
        drop(group);
        Some(whole.release())
    }
}
