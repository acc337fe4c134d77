//! AdamW with explicit moments: one fused pass over weights, gradients and moments, clipping folded in.
//!
//! The update is that of Loshchilov and Hutter (arXiv 1711.05101) as `torch.optim.AdamW(fused=True)` computes it. Weight decay
//! applies to matrices (two or more dimensions), not to norms. Moments are plain tensors, so that a checkpoint can hold them.

use tch::Tensor;

use crate::{
    config::OptimizerConfig,
    ids::Step,
    torch::{self, AdamW, Moments, TorchError},
};

/// Weights of one decay group with their gradients and moments, in the order of the model's parameters.
#[derive(Debug)]
struct Group {
    params: Vec<Tensor>,
    gradients: Vec<Tensor>,
    exp_avgs: Vec<Tensor>,
    exp_avg_sqs: Vec<Tensor>,
    weight_decay: f64,
}

/// The optimizer of one rank.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    groups: Vec<Group>,
    params: Vec<Tensor>,
    gradients: Vec<Tensor>,
}

impl Optimizer {
    /// Over `params` with their `exp_avgs` and `exp_avg_sqs` (same order, shapes and dtype, fp32). Gradients must be where they will
    /// stay: make a [`torch::Reducer`] before the optimizer.
    pub fn new(
        config: OptimizerConfig,
        params: &[Tensor],
        exp_avgs: &[Tensor],
        exp_avg_sqs: &[Tensor],
    ) -> Result<Self, TorchError> {
        torch::zero_gradients(params)?;
        let gradients = torch::gradients(params)?;
        let mut groups = Vec::with_capacity(2);
        for decays in [true, false] {
            let chosen: Vec<usize> = (0..params.len()).filter(|&i| (params[i].dim() >= 2) == decays).collect();
            if chosen.is_empty() {
                continue;
            }
            let pick = |from: &[Tensor]| chosen.iter().map(|&i| from[i].shallow_clone()).collect::<Vec<_>>();
            groups.push(Group {
                params: pick(params),
                gradients: pick(&gradients),
                exp_avgs: pick(exp_avgs),
                exp_avg_sqs: pick(exp_avg_sqs),
                weight_decay: if decays { config.weight_decay } else { 0.0 },
            });
        }
        let params = params.iter().map(Tensor::shallow_clone).collect();
        Ok(Self { config, groups, params, gradients })
    }

    /// The `step`-th update of the run, from the gradients that the parameters hold. Returns the gradient's 2-norm before
    /// clipping, as a scalar on the device: reading it is the caller's to time.
    pub fn step(&mut self, step: Step, lr: f64) -> Result<Tensor, TorchError> {
        tch::no_grad(|| {
            let norm = torch::grad_norm(&self.gradients)?;
            // The kernel divides gradients by the scale: max(1, norm / limit) clips without a pass of its own.
            let scale = if self.config.grad_clip > 0.0 {
                Some(torch::tch_result(
                    "clip",
                    norm.f_div_scalar(self.config.grad_clip).and_then(|s| s.f_clamp_min(1.0)),
                )?)
            } else {
                None
            };
            for group in &self.groups {
                let settings = AdamW {
                    lr,
                    beta1: self.config.betas[0],
                    beta2: self.config.betas[1],
                    eps: self.config.eps,
                    weight_decay: group.weight_decay,
                };
                let moments = Moments { exp_avgs: &group.exp_avgs, exp_avg_sqs: &group.exp_avg_sqs };
                torch::adamw_step(&group.params, &group.gradients, moments, step, &settings, scale.as_ref())?;
            }
            Ok(norm)
        })
    }

    /// Sets every gradient to zero, in place: the all-reduce buckets keep pointing at them.
    pub fn zero_grad(&mut self) -> Result<(), TorchError> {
        torch::zero_gradients(&self.params)
    }
}
