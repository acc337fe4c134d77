//! A world of one: everything is here, and nobody is asked. `ddp` has the same tensors and the same update on each
//! rank.
//!
//! With bf16 the model computes with rounded copies of the fp32 weights. They are made anew after each update, so a
//! step casts every weight once, however many passes it has. The arithmetic is that of a cast at each use.

use std::time::Duration;

use tch::{Kind, Tensor};

use super::{Layout, Peers, Stages, Strategy, leaves, replace_trained};
use crate::{
    config::{OptimizerConfig, Precision},
    error::Result,
    ids::Step,
    model::{Leaves, Weight},
    torch::{self, TorchError},
    train::{
        optim::{Slot, Update},
        state::{Role, Row, State, Tensors},
    },
};

pub(super) fn lay_out(model: &mut dyn Leaves, precision: Precision) -> Result<(State, Box<dyn Layout>)> {
    let (state, replica) = Replica::lay_out(model, precision)?;
    Ok((state, Box::new(replica)))
}

/// The same for another world, with the tensors of an earlier one.
pub(super) fn lay_out_again(model: &mut dyn Leaves, values: Values) -> Result<(State, Box<dyn Layout>)> {
    let (state, replica) = Replica::lay_out_again(model, values)?;
    Ok((state, Box::new(replica)))
}

/// What an update reads and writes of every trained parameter, whole, in the order of the model's: fp32 values and
/// moments.
#[derive(Debug)]
pub struct Values {
    /// What is updated: the leaves' own values, or those that `copies` are rounded from.
    weights: Vec<Tensor>,
    /// With bf16, what the model computes with.
    copies: Vec<Tensor>,
    exp_avgs: Vec<Tensor>,
    exp_avg_sqs: Vec<Tensor>,
}

impl Values {
    /// Other handles to the same tensors.
    fn share(&self) -> Self {
        let share = |tensors: &[Tensor]| tensors.iter().map(Tensor::shallow_clone).collect();
        let [weights, copies, exp_avgs, exp_avg_sqs] =
            [&self.weights, &self.copies, &self.exp_avgs, &self.exp_avg_sqs].map(|tensors| share(tensors));
        Self { weights, copies, exp_avgs, exp_avg_sqs }
    }
}

/// Every trained parameter, in the order of the model's: its leaf, and its values.
#[derive(Debug)]
pub(super) struct Replica {
    pub leaves: Vec<Tensor>,
    values: Values,
}

impl Replica {
    /// With bf16 the model gets rounded copies of its weights, so that no pass has to round them; unless it needs some
    /// in fp32.
    pub fn lay_out(model: &mut dyn Leaves, precision: Precision) -> Result<(State, Self)> {
        let weights = detached(&leaves(model))?;
        let rounds = precision == Precision::Bf16 && model.needs_rounded_weights_only();
        let copies = if rounds { compute_with_copies(model)? } else { Vec::new() };
        let zeros = || torch::tch_result("make moments", weights.iter().map(Tensor::f_zeros_like).collect());
        let (exp_avgs, exp_avg_sqs): (Vec<Tensor>, Vec<Tensor>) = (zeros()?, zeros()?);
        Self::of(model, Values { weights, copies, exp_avgs, exp_avg_sqs })
    }

    /// With the values of an earlier world. The leaves are new ones that share their memory: gradients, and whoever
    /// reduced them, stay behind, as if the values had been loaded.
    pub fn lay_out_again(model: &mut dyn Leaves, values: Values) -> Result<(State, Self)> {
        let (precision, views) = match values.copies.as_slice() {
            [] => (Precision::Fp32, &values.weights),
            _ => (Precision::Bf16, &values.copies),
        };
        replace_trained(model, precision, views.iter().map(Tensor::shallow_clone))?;
        Self::of(model, values)
    }

    fn of(model: &dyn Leaves, values: Values) -> Result<(State, Self)> {
        let Values { weights, copies, exp_avgs, exp_avg_sqs } = &values;
        let mut rows = vec![
            Row { role: Role::Weight, tensors: Tensors::OfModel },
            Row { role: Role::ExpAvg, tensors: Tensors::Whole(exp_avgs) },
            Row { role: Role::ExpAvgSq, tensors: Tensors::Whole(exp_avg_sqs) },
        ];
        if !copies.is_empty() {
            rows.push(Row { role: Role::Master, tensors: Tensors::Whole(weights) });
        }
        let state = State::new(model, &rows)?;
        Ok((state, Self { leaves: leaves(model), values }))
    }

    /// Ready to train. Call it after the reducer, if there is one, is made: it decides where gradients are in memory.
    pub fn start(self) -> Result<Whole, TorchError> {
        torch::zero_gradients(&self.leaves)?;
        let gradients = torch::gradients(&self.leaves)?;
        let kept = self.values.share();
        let Values { weights, copies, exp_avgs, exp_avg_sqs } = self.values;
        let rounded = copies.into_iter().zip(weights.iter().map(Tensor::shallow_clone)).collect();
        let moments = exp_avgs.into_iter().zip(exp_avg_sqs);
        let slots = weights.into_iter().zip(&gradients).zip(moments);
        let slots = slots.map(|((weight, gradient), (exp_avg, exp_avg_sq))| Slot {
            decays: weight.dim() >= 2,
            weight,
            gradient: gradient.shallow_clone(),
            exp_avg,
            exp_avg_sq,
        });
        let update = Update::new(slots.collect());
        Ok(Whole { leaves: self.leaves, gradients, update, rounded, kept })
    }
}

/// The values themselves, without a gradient: they share their memory with `leaves`.
fn detached(leaves: &[Tensor]) -> Result<Vec<Tensor>, TorchError> {
    torch::tch_result("find weights", leaves.iter().map(Tensor::f_detach).collect())
}

/// Lets the model compute with bf16 copies of its trained weights, beside leaves that receive the gradients; the other
/// weights stay as they are. Returns the copies.
fn compute_with_copies(model: &mut dyn Leaves) -> Result<Vec<Tensor>> {
    let mut copies = Vec::new();
    let mut weights = Vec::with_capacity(model.parameters().len());
    for parameter in model.parameters() {
        weights.push(match parameter.leaf() {
            None => parameter.weight.share(),
            Some(_) => {
                let rounded = parameter.values().f_detach().and_then(|values| values.f_to_kind(Kind::BFloat16));
                let copy = torch::tch_result("round weights", rounded)?;
                copies.push(copy.shallow_clone());
                Weight::Copy { leaf: torch::leaf_like(&copy)?, copy }
            }
        });
    }
    model.set_parameters(weights)?;
    Ok(copies)
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
    /// Copies to compute with, and the fp32 weights that are rounded into them.
    rounded: Vec<(Tensor, Tensor)>,
    /// The same tensors, for another world.
    kept: Values,
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
        self.update.apply(config, step, lr, scale)?;
        for (copy, weights) in &self.rounded {
            torch::tch_result("round weights", copy.shallow_clone().f_copy_(weights))?;
        }
        Ok(())
    }

    pub fn zero_grad(&self) -> Result<(), TorchError> {
        torch::zero_gradients(&self.leaves)
    }

    /// All that is worth keeping: gradients are zero between two steps.
    pub fn release(self) -> Values {
        self.kept
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

    fn release(self: Box<Self>) -> Option<Values> {
        Some(self.0.release())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tch::Device;

    use super::*;
    use crate::{
        config::ModelKind,
        model::{self, BuildSettings, Model},
        torch::fused::Fused,
        train::optim::Brake,
    };

    fn build(architecture: &str) -> Box<dyn Model> {
        let config = json!({
            "architectures": [architecture], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": true,
        });
        let settings = BuildSettings { device: Device::Cpu, precision: Precision::Bf16, seed: Some(7) };
        model::build(ModelKind::Decoder, &config, &settings).unwrap()
    }

    fn floats(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.detach().to_kind(Kind::Float).view([-1])).unwrap()
    }

    /// The losses of four steps with two passes each, and the fp32 weights after them.
    fn train(model: &mut dyn Model, layout: Precision) -> (Vec<f64>, Vec<Vec<f32>>) {
        tch::set_num_threads(1);
        let replica = Replica::lay_out(model, layout).unwrap().1;
        let weights: Vec<Tensor> = replica.values.weights.iter().map(Tensor::shallow_clone).collect();
        let mut single = Single(replica.start().unwrap());
        let optimizer = OptimizerConfig { lr: 1e-2, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, grad_clip: 0.5 };
        let (mut losses, mut brake) = (Vec::new(), Brake::new());
        for step in 1..=4 {
            for pass in 0..2 {
                let tokens = (Tensor::arange(34, (Kind::Int64, Device::Cpu)) * 7 + pass * 5).remainder(96);
                let loss = model.loss(&tokens.view([2, 17])).unwrap() / 2.0;
                single.begin(pass == 1).unwrap();
                loss.backward();
                single.end(pass == 1).unwrap();
                losses.push(torch::to_f64(&loss).unwrap());
            }
            let _norm = single.step(&optimizer, Step(step), 1e-2, &mut brake).unwrap();
            single.zero_grad().unwrap();
        }
        (losses, weights.iter().map(floats).collect())
    }

    /// An earlier version cast each weight at each use: that is what fp32 weights alone do.
    #[test]
    fn rounded_copies_give_the_bits_of_a_cast_at_each_use() {
        for fused in [Fused::NONE, Fused::ALL] {
            let [cast, rounded] = [Precision::Fp32, Precision::Bf16].map(|layout| {
                let mut model = build("LlamaForCausalLM");
                model.use_fused(fused);
                train(model.as_mut(), layout)
            });
            assert!(cast.0[7] < cast.0[0] * 0.99, "nothing was learnt: {:?}", cast.0);
            assert_eq!(cast, rounded, "{fused:?}");
        }
    }

    #[test]
    fn a_model_computes_with_copies_where_it_needs_no_more_and_they_follow_the_weights() {
        for (architecture, copied) in [("LlamaForCausalLM", true), ("Olmo2ForCausalLM", false)] {
            let mut model = build(architecture);
            let (_, weights) = train(model.as_mut(), Precision::Bf16);
            for (parameter, weights) in model.parameters().iter().zip(weights) {
                assert_eq!(matches!(parameter.weight, Weight::Copy { .. }), copied, "{}", parameter.name);
                let rounded = Tensor::from_slice(&weights).to_kind(if copied { Kind::BFloat16 } else { Kind::Float });
                assert_eq!(floats(parameter.values()), floats(&rounded), "{}", parameter.name);
            }
        }
    }
}
