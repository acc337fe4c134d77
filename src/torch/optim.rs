//! The optimizer step and the gradient norm, each in one pass over memory.

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
/// divided values afterwards. If it is not a number, nothing is changed. All tensors contiguous. The result is the same
/// to the last bit for the same thread count.
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

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    const F32: (Kind, Device) = (Kind::Float, Device::Cpu);
    const SETTINGS: AdamW = AdamW { lr: 3e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    const SHAPES: [&[i64]; 3] = [&[33, 17], &[1000], &[]];

    struct State {
        params: Vec<Tensor>,
        exp_avgs: Vec<Tensor>,
        exp_avg_sqs: Vec<Tensor>,
    }

    fn wave(shape: &[i64], phase: f64) -> Tensor {
        (Tensor::arange(shape.iter().product::<i64>(), F32) * 0.37 + phase).sin().view(shape)
    }

    fn state() -> State {
        let zeros = || SHAPES.iter().map(|shape| Tensor::zeros(*shape, F32)).collect();
        let params = SHAPES.iter().map(|shape| wave(shape, 0.5)).collect();
        State { params, exp_avgs: zeros(), exp_avg_sqs: zeros() }
    }

    fn grads(step: u64, scale: f64) -> Vec<Tensor> {
        SHAPES.iter().map(|shape| wave(shape, step as f64) * scale).collect()
    }

    fn fused(steps: u64, scale: f64) -> State {
        let state = state();
        for step in 1..=steps {
            let grads = grads(step, scale);
            let divisor = (scale != 1.0).then(|| Tensor::from(scale as f32));
            let moments = Moments { exp_avgs: &state.exp_avgs, exp_avg_sqs: &state.exp_avg_sqs };
            adamw_step(&state.params, &grads, moments, Step(step), &SETTINGS, divisor.as_ref()).unwrap();
        }
        state
    }

    /// Algorithm 2 of arXiv 1711.05101, in double precision.
    fn plain(steps: u64) -> Vec<Tensor> {
        let AdamW { lr, beta1, beta2, eps, weight_decay } = SETTINGS;
        let mut params: Vec<_> = state().params.iter().map(|param| param.to_kind(Kind::Double)).collect();
        let mut m: Vec<_> = params.iter().map(Tensor::zeros_like).collect();
        let mut v: Vec<_> = params.iter().map(Tensor::zeros_like).collect();
        for step in 1..=steps {
            for (i, grad) in grads(step, 1.0).iter().enumerate() {
                let grad = grad.to_kind(Kind::Double);
                m[i] = &m[i] * beta1 + &grad * (1.0 - beta1);
                v[i] = &v[i] * beta2 + grad.square() * (1.0 - beta2);
                let m_hat = &m[i] / (1.0 - beta1.powi(step as i32));
                let v_hat = &v[i] / (1.0 - beta2.powi(step as i32));
                params[i] = &params[i] * (1.0 - lr * weight_decay) - m_hat / (v_hat.sqrt() + eps) * lr;
            }
        }
        params
    }

    fn distance(a: &[Tensor], b: &[Tensor]) -> f64 {
        let distance = |(a, b): (&Tensor, &Tensor)| {
            f64::try_from((a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max()).unwrap()
        };
        a.iter().zip(b).map(distance).fold(0.0, f64::max)
    }

    #[test]
    fn the_fused_step_is_adamw_and_the_same_each_time() {
        let (once, again) = (fused(10, 1.0), fused(10, 1.0));
        let difference = distance(&once.params, &plain(10));
        assert!(difference < 1e-6, "differs by {difference}");
        assert_eq!(once.params, again.params);
        assert_eq!(once.exp_avg_sqs, again.exp_avg_sqs);
        assert!(distance(&once.params, &state().params) > 1e-3, "nothing moved");
    }

    #[test]
    fn the_scale_divides_the_gradients() {
        // A power of two, so that dividing it out is exact.
        assert_eq!(fused(5, 8.0).params, fused(5, 1.0).params);
        assert!(distance(&fused(5, 8.0).exp_avgs, &fused(5, 1.0).exp_avgs) == 0.0);
    }

    #[test]
    fn tensors_that_do_not_belong_together_are_refused() {
        let State { params, exp_avgs, exp_avg_sqs } = state();
        let moments = Moments { exp_avgs: &exp_avgs, exp_avg_sqs: &exp_avg_sqs };
        let step = |grads: &[Tensor], step, scale: Option<&Tensor>| {
            adamw_step(&params, grads, moments, Step(step), &SETTINGS, scale)
        };
        let good = grads(1, 1.0);
        assert!(matches!(step(&good[..2], 1, None), Err(TorchError::Lists { .. })));
        assert!(matches!(step(&good, 0, None), Err(TorchError::Number { .. })));
        let mut wrong = grads(1, 1.0);
        wrong[1] = Tensor::zeros([999], F32);
        let error = step(&wrong, 1, None).unwrap_err();
        assert!(error.to_string().contains("[999] against [1000]"), "{error}");
        wrong[1] = Tensor::zeros([1000], (Kind::Double, Device::Cpu));
        assert!(step(&wrong, 1, None).is_err(), "another type");
        wrong[1] = Tensor::zeros([2000], F32).slice(0, 0, 2000, 2);
        assert!(step(&wrong, 1, None).is_err(), "not contiguous");
        wrong[1] = Tensor::new();
        assert!(step(&wrong, 1, None).is_err(), "undefined");
        assert!(step(&good, 1, Some(&Tensor::zeros([2], F32))).is_err(), "two scales");
        assert_eq!(params, state().params, "a refused step changes nothing");
        adamw_step(&[], &[], Moments { exp_avgs: &[], exp_avg_sqs: &[] }, Step(1), &SETTINGS, None).unwrap();
    }

    #[test]
    fn the_norm_is_over_all_elements() {
        let tensors = [Tensor::from_slice(&[3.0_f32, 0.0]), Tensor::from_slice(&[4.0_f32]), Tensor::from(12.0_f32)];
        let norm = grad_norm(&tensors).unwrap();
        assert_eq!((norm.size(), f64::try_from(&norm).unwrap()), (vec![], 13.0));
        assert!(grad_norm(&[]).is_err());
        let bad = [Tensor::from(f32::NAN), Tensor::from(1.0_f32)];
        assert!(f64::try_from(&grad_norm(&bad).unwrap()).unwrap().is_nan());
    }
}
