//! AdamW with explicit moments: one fused pass over weights, gradients and moments, clipping folded in.
//!
//! No update is made from a gradient that is not finite, nor any after it: see [`Brake`].
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

    /// The `step`-th update of the run. `scale`, if any, divides the gradients first; nothing is changed if it is not a
    /// number.
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

/// Stops all updates from the first gradient on that is not finite, on the device and without a host that waits: the
/// weights and the moments stay those of the step before.
///
/// The gradient's norm is the same on every rank, so all ranks stop alike. A loss that is not finite makes the gradient
/// so, too: see [`torch::telling`].
#[derive(Debug)]
pub struct Brake {
    /// One, until it is not a number: a scalar on the device. `None`: no norm was seen yet.
    sound: Option<Tensor>,
}

impl Brake {
    /// Not pulled.
    pub const fn new() -> Self {
        Self { sound: None }
    }

    /// What gradients with this 2-norm are divided by: max(1, norm / limit) clips without a pass of its own, and 1 is
    /// no clipping. Not a number, if this norm or one before it is not finite: then nothing may be updated.
    pub fn scale(&mut self, config: &OptimizerConfig, norm: &Tensor) -> Result<Tensor, TorchError> {
        let scale = || {
            // 0 · x + 1 is 1 for every x that is finite.
            let sound = norm.f_mul_scalar(0.0)?.f_add_scalar(1.0)?;
            let sound = match &self.sound {
                Some(before) => before.f_mul(&sound)?,
                None => sound,
            };
            let scale = match config.grad_clip {
                limit if limit > 0.0 => norm.f_div_scalar(limit)?.f_clamp_min(1.0)?.f_mul(&sound)?,
                _ => sound.shallow_clone(),
            };
            Ok((sound, scale))
        };
        let (sound, scale) = torch::tch_result("clip", scale())?;
        self.sound = Some(sound);
        Ok(scale)
    }
}
