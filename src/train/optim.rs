//! AdamW with explicit moments: one fused pass over weights, gradients and moments, clipping folded in.
//!
//! The update is that of Loshchilov and Hutter (arXiv 1711.05101) as `torch.optim.AdamW(fused=True)` computes it.
//! Weight decay applies to matrices (two or more dimensions), not to norms. Moments are plain tensors, so that a
//! checkpoint can hold them. It works element by element, so parts of tensors may be updated apart from one another.

use tch::Tensor;

use crate::{
    config::OptimizerConfig,
    ids::Step,
    torch::{self, AdamW, Moments, TorchError},
};

/// The tensors that an update reads and writes for one tensor, or a part of one: four of the same extents, fp32.
#[derive(Debug)]
pub struct Slot {
    /// Changed.
    pub weight: Tensor,
    /// Read, and left divided by the clipping scale.
    pub gradient: Tensor,
    /// First moment, changed.
    pub exp_avg: Tensor,
    /// Second moment, changed.
    pub exp_avg_sq: Tensor,
    /// Whether the tensor is a matrix.
    pub decays: bool,
}

/// The update of some tensors of one rank.
#[derive(Debug)]
pub struct Update {
    groups: Vec<Group>,
}

/// The slots of one weight decay, in their order.
#[derive(Debug)]
struct Group {
    weights: Vec<Tensor>,
    gradients: Vec<Tensor>,
    exp_avgs: Vec<Tensor>,
    exp_avg_sqs: Vec<Tensor>,
    decays: bool,
}

impl Update {
    /// Of `slots`, whose tensors stay where they are.
    pub fn new(slots: Vec<Slot>) -> Self {
        let mut groups = [true, false].map(|decays| Group {
            weights: Vec::new(),
            gradients: Vec::new(),
            exp_avgs: Vec::new(),
            exp_avg_sqs: Vec::new(),
            decays,
        });
        for slot in slots {
            let group = &mut groups[usize::from(!slot.decays)];
            group.weights.push(slot.weight);
            group.gradients.push(slot.gradient);
            group.exp_avgs.push(slot.exp_avg);
            group.exp_avg_sqs.push(slot.exp_avg_sq);
        }
        Self { groups: groups.into_iter().filter(|group| !group.weights.is_empty()).collect() }
    }

    /// The `step`-th update of the run. `scale`, if any, divides the gradients first.
    pub fn apply(
        &self,
        config: &OptimizerConfig,
        step: Step,
        lr: f64,
        scale: Option<&Tensor>,
    ) -> Result<(), TorchError> {
        for group in &self.groups {
            let settings = AdamW {
                lr,
                beta1: config.betas[0],
                beta2: config.betas[1],
                eps: config.eps,
                weight_decay: if group.decays { config.weight_decay } else { 0.0 },
            };
            let moments = Moments { exp_avgs: &group.exp_avgs, exp_avg_sqs: &group.exp_avg_sqs };
            torch::adamw_step(&group.weights, &group.gradients, moments, step, &settings, scale)?;
        }
        Ok(())
    }
}

/// The divisor of gradients with this 2-norm: max(1, norm / limit) clips without a pass of its own. `None`: no
/// clipping.
pub fn clip_scale(config: &OptimizerConfig, norm: &Tensor) -> Result<Option<Tensor>, TorchError> {
    if config.grad_clip <= 0.0 {
        return Ok(None);
    }
    let scale = norm.f_div_scalar(config.grad_clip).and_then(|scale| scale.f_clamp_min(1.0));
    torch::tch_result("clip", scale).map(Some)
}
