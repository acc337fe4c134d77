//! The optimizer step and the gradient norm, each one pass over memory.

use std::ptr;

use tch::Tensor;

use super::{
    Result, TorchError,
    ffi::{self, check},
};
use crate::ids::Step;

/// Settings of one AdamW step (Loshchilov and Hutter, arXiv 1711.05101).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay; the parameter is first scaled by `1 - lr * weight_decay`.
    pub weight_decay: f64,
}

/// The running averages that belong to a list of parameters, in its order, with its extents, type and device.
#[derive(Clone, Copy, Debug)]
pub struct Moments<'a> {
    /// Of the gradients.
    pub exp_avgs: &'a [Tensor],
    /// Of their squares.
    pub exp_avg_sqs: &'a [Tensor],
}

/// Updates `params` and `moments` in place by one fused AdamW step.
///
/// `step` is the step being made, counted from 1, and corrects the bias of the moments. `grad_scale` (one `f32` on the
/// parameters' device) *divides* the gradients first, so that clipping costs no pass of its own; the gradients hold the
/// divided values afterwards. All tensors contiguous. The result is the same to the last bit for the same thread count.
pub fn adamw_step(
    params: &[Tensor],
    grads: &[Tensor],
    moments: Moments<'_>,
    step: Step,
    settings: &AdamW,
    grad_scale: Option<&Tensor>,
) -> Result<()> {
    let doing = "optimizer step";
    let Moments { exp_avgs, exp_avg_sqs } = moments;
    if [grads, exp_avgs, exp_avg_sqs].iter().any(|list| list.len() != params.len()) {
        return Err(TorchError::Lists { doing });
    }
    if step.get() == 0 {
        return Err(TorchError::Number { doing, what: "step 0" });
    }
    let [params, grads, exp_avgs, exp_avg_sqs] = [params, grads, exp_avgs, exp_avg_sqs].map(ffi::raws);
    let &AdamW { lr, beta1, beta2, eps, weight_decay } = settings;
    // SAFETY: the four lists have `params.len()` tensors each, alive for the call; the shim compares their extents.
    let status = unsafe {
        ffi::trn_adamw_step(
            params.len(),
            params.as_ptr(),
            grads.as_ptr(),
            exp_avgs.as_ptr(),
            exp_avg_sqs.as_ptr(),
            step.get(),
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            grad_scale.map_or(ptr::null(), ffi::raw),
        )
    };
    check(doing, status)
}

/// The 2-norm over all elements of all `tensors`, as a tensor without extents on their device; the host does not wait.
pub fn grad_norm(tensors: &[Tensor]) -> Result<Tensor> {
    let raws = ffi::raws(tensors);
    let mut norm = ptr::null_mut();
    // SAFETY: pointers are valid for the call.
    check("gradient norm", unsafe { ffi::trn_norm(raws.as_ptr(), raws.len(), &mut norm) })?;
    // SAFETY: the call succeeded, so it wrote a tensor that is ours.
    Ok(unsafe { ffi::adopt(norm) })
}
