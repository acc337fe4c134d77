//! A loss or a gradient that is not finite changes nothing, on no rank, from its own step on.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use super::*;
use crate::{
    config::Strategy::{Ddp, Shard, Zero1},
    model::{Leaves, Model, ModelError, Parameter, Positions, Spans, Targets, Weight},
    torch::fused::Fused,
};

/// A model whose loss is infinite while it is told so; its gradient would be finite.
struct Loud {
    inner: Box<dyn Model>,
    now: Arc<AtomicBool>,
}

impl Leaves for Loud {
    fn parameters(&self) -> &[Parameter] {
        self.inner.parameters()
    }
    fn set_parameters(&mut self, weights: Vec<Weight>) -> Result<(), ModelError> {
        self.inner.set_parameters(weights)
    }
    fn device(&self) -> Device {
        self.inner.device()
    }
    fn first_values(&self, parameter: usize) -> Result<Option<Tensor>, ModelError> {
        self.inner.first_values(parameter)
    }
    fn needs_rounded_weights_only(&self) -> bool {
        self.inner.needs_rounded_weights_only()
    }
}

impl Model for Loud {
    fn adapt(&mut self, adapters: Vec<Parameter>, scale: f64) -> Result<(), ModelError> {
        self.inner.adapt(adapters, scale)
    }
    fn use_fused(&mut self, functions: Fused) {
        self.inner.use_fused(functions);
    }
    fn adds_in_place(&self) -> bool {
        self.inner.adds_in_place()
    }
    fn embed(&self, tokens: &Tensor) -> Result<Tensor, ModelError> {
        self.inner.embed(tokens)
    }
    fn blocks(&self) -> usize {
        self.inner.blocks()
    }
    fn block(&self, index: usize, x: Tensor, spans: &Spans) -> Result<Tensor, ModelError> {
        self.inner.block(index, x, spans)
    }
    fn head_loss(&self, x: Tensor, targets: &Targets) -> Result<Tensor, ModelError> {
        let loss = self.inner.head_loss(x, targets)?;
        Ok(if self.now.load(Ordering::Relaxed) { loss + f64::INFINITY } else { loss })
    }
    fn head_losses(&self, x: Tensor, targets: &Targets) -> Result<Tensor, ModelError> {
        self.inner.head_losses(x, targets)
    }
    fn head_scores(&self, x: Tensor, positions: Positions) -> Result<Tensor, ModelError> {
        self.inner.head_scores(x, positions)
    }
    fn vocab_size(&self) -> u32 {
        self.inner.vocab_size()
    }
    fn max_sequence_length(&self) -> u32 {
        self.inner.max_sequence_length()
    }
}

#[test]
fn a_loss_that_is_infinite_on_one_rank_changes_nothing_on_any_and_no_later_step_does() {
    for (strategy, world, precision, clip) in [
        (Ddp, 1, Precision::Fp32, 0.5),
        (Ddp, 1, Precision::Bf16, 0.0),
        (Ddp, 3, Precision::Bf16, 0.5),
        (Zero1, 2, Precision::Fp32, 0.0),
        (Zero1, 3, Precision::Bf16, 0.5),
        (Shard, 2, Precision::Fp32, 0.5),
        (Shard, 3, Precision::Bf16, 0.0),
    ] {
        let case = format!("{strategy:?} {world} {precision:?} {clip}");
        let mut run = run(strategy, precision, 2);
        run.train.optimizer.grad_clip = clip;
        let seen = everywhere(world, |group| {
            let now = Arc::new(AtomicBool::new(false));
            let loud = |inner| -> Box<dyn Model> { Box::new(Loud { inner, now: Arc::clone(&now) }) };
            let (mut training, state) = rank_of(&run, group, None, Device::Cpu, loud);
            let place = training.place;
            train(&mut training, 1..=2);
            let before = held(&state);
            let sound = train(&mut training, 3..=3);
            let good = held(&state);
            now.store(place.rank.get() + 1 == world, Ordering::Relaxed);
            let broken = train(&mut training, 4..=4);
            now.store(false, Ordering::Relaxed);
            let after = held(&state);
            let later = train(&mut training, 5..=6);
            (before, good, after, held(&state), [sound, broken, later])
        });
        for (before, good, after, end, [sound, broken, later]) in &seen {
            assert!(before != good, "{case}: step 3 learns");
            assert!(good == after && good == end, "{case}: the state is not that of step 3");
            let [loss, norm] = sound[0].map(f64::from_bits);
            assert!(loss.is_finite() && norm.is_finite(), "{case}");
            assert!(f64::from_bits(broken[0][1]).is_nan(), "{case}: every rank's norm says so");
            assert!(
                later.iter().flatten().all(|&bits| f64::from_bits(bits).is_finite()),
                "{case}: its weights are good"
            );
        }
        let losses: Vec<f64> = seen.iter().map(|rank| f64::from_bits(rank.4[1][0][0])).collect();
        assert!(losses.iter().any(|loss| loss.is_infinite()), "{case}: {losses:?}");
    }
}

#[test]
fn a_gradient_that_is_not_a_number_changes_nothing() {
    let run = run(Ddp, Precision::Fp32, 8);
    let (mut training, state) = rank(&run, None, None);
    train(&mut training, 1..=2);
    let good = held(&state);
    training.forward_backward(Step(3)).unwrap();
    let leaf = training.lesson.leaves().parameters().iter().find_map(crate::model::Parameter::leaf).unwrap();
    let _ = leaf.grad().flatten(0, -1).narrow(0, 5, 1).fill_(f64::NAN);
    training.update(Step(3)).unwrap();
    assert!(held(&state) == good, "the update was made");
    train(&mut training, 4..=4);
    assert!(held(&state) == good, "a later update was made");
}
