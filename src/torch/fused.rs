//! Functions of a model that compute in one pass, forward and backward, what LibTorch's operations compute in several.
//!
//! Each saves its inputs and nothing else but a number a row, computes in fp32 and rounds once. On a CPU they are loops
//! that give the same bits for any number of threads and on any x86-64 processor. On a GPU they are kernels that are
//! compiled when a worker starts; one kind of GPU gives the same bits each time. A model computes what a device does
//! not have by LibTorch's operations, which are the reference. *Verification:* a function is used on a device only if
//! it agrees there with the reference, forward and backward ([`verified`]); it costs milliseconds, once a process.

use std::{ptr, sync::OnceLock};

use tch::{Device, Kind, TchError, Tensor};

use super::{
    Result, TorchError,
    ffi::{self, check},
    gpu,
};

/// The functions that a model uses in place of LibTorch's operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fused {
    /// [`rms_norm`].
    pub norm: bool,
    /// [`rotate`].
    pub turns: bool,
    /// [`gate`] and [`gate_of_both`].
    pub gate: bool,
    /// [`cross_entropy`].
    pub loss: bool,
    /// [`linear`], and gradients that are added where they belong.
    pub linear: bool,
}

impl Fused {
    /// LibTorch's operations alone.
    pub const NONE: Self = Self { norm: false, turns: false, gate: false, loss: false, linear: false };
    /// Every function.
    pub const ALL: Self = Self { norm: true, turns: true, gate: true, loss: true, linear: true };
    /// Those that LibTorch's operations compute on any device.
    const OF_ANY_DEVICE: Self = Self { linear: true, ..Self::NONE };
}

/// The function between a gate's projection and the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// GELU in its approximation by tanh (Hendrycks and Gimpel, arXiv 1606.08415).
    GeluTanh,
}

impl Activation {
    const fn number(self) -> i32 {
        match self {
            Self::Silu => 0,
            Self::GeluTanh => 1,
        }
    }
}

/// A tensor that a shim function writes.
fn made(doing: &'static str, make: impl FnOnce(*mut *mut ffi::AtTensor) -> i32) -> Result<Tensor> {
    let mut out = ptr::null_mut();
    check(doing, make(&mut out))?;
    // SAFETY: the call succeeded, so it wrote a tensor that is ours.
    Ok(unsafe { ffi::adopt(out) })
}

/// RMSNorm (Zhang and Sennrich, arXiv 1910.07467) over the last extent: `x / sqrt(mean(x²) + eps) · weight`, or
/// `· (1 + weight)` if `plus_one`. `x`: fp32 or bf16, the result's type; `weight`: `[width]`, of any floating type.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, plus_one: bool) -> Result<Tensor> {
    made("compute norm", |out| {
        // SAFETY: pointers are valid for the call; the shim checks types and extents.
        unsafe { ffi::trn_fused_rms_norm(ffi::raw(x), ffi::raw(weight), eps, plus_one.into(), out) }
    })
}

/// Rotary turns (Su et al., arXiv 2104.09864): element i of each head of `x` `[batch, T, heads, head]` becomes
/// `x[i] · cos[i] + x[i ± width/2] · sin[i]` for the first `width` elements; the others stay. `cos`, `sin`: fp32
/// `[T, 1, width]` or `[batch, T, 1, width]`.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    made("turn heads", |out| {
        // SAFETY: pointers are valid for the call; the shim checks types and extents.
        unsafe { ffi::trn_fused_rotate(ffi::raw(x), ffi::raw(cos), ffi::raw(sin), out) }
    })
}

/// `activation(gate) · up` (Shazeer, arXiv 2002.05202), of two tensors of one type and the same extents.
pub fn gate(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    made("compute gate", |out| {
        // SAFETY: pointers are valid for the call; the shim checks types and extents.
        unsafe { ffi::trn_fused_gate(ffi::raw(gate), ffi::raw(up), activation.number(), out) }
    })
}

/// [`gate`] of the two halves of the last extent.
pub fn gate_of_both(both: &Tensor, activation: Activation) -> Result<Tensor> {
    made("compute gate", |out| {
        // SAFETY: the pointer is valid for the call, and a null pointer says that the first has both; the shim checks
        // type and extents.
        unsafe { ffi::trn_fused_gate(ffi::raw(both), ptr::null(), activation.number(), out) }
    })
}

/// The cross entropy of each row of `scores` `[rows, vocabulary]` with `targets` (i64 `[rows]`): fp32 `[rows]`, nats.
/// If the `gradient` is wanted, the scores become the gradient of the losses' sum: softmax minus one-hot. Nothing is
/// recorded. A target outside the vocabulary is an error on a CPU; on a GPU, which nobody waits for, its loss is a NaN.
pub fn cross_entropy(scores: &mut Tensor, targets: &Tensor, gradient: bool) -> Result<Tensor> {
    made("compute cross entropy", |out| {
        // SAFETY: pointers are valid for the call; the shim checks types, extents and every target.
        unsafe { ffi::trn_fused_cross_entropy(ffi::raw(scores), ffi::raw(targets), gradient.into(), out) }
    })
}

/// `x · valuesᵀ + bias`. The gradient with respect to the weight goes to `leaf`, in fp32: if that has a gradient, the
/// product itself adds to it, and whoever waits for it (a reducer) is told; otherwise, and in a pass that returns
/// gradients, it is returned to autograd. `values`: what is computed with, the leaf or its copy in the type of `x`.
pub fn linear(x: &Tensor, leaf: &Tensor, values: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    made("compute linear layer", |out| {
        let bias = bias.map_or(ptr::null(), ffi::raw);
        // SAFETY: pointers are null or valid for the call; the shim checks types and extents.
        unsafe { ffi::trn_fused_linear(ffi::raw(x), ffi::raw(leaf), ffi::raw(values), bias, out) }
    })
}

/// What a device has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The functions that agree with the reference.
    pub fused: Fused,
    /// Of each that does not: its name, and how it differs.
    pub left_out: Vec<String>,
}

/// The functions that `device` has and that agree with LibTorch's operations there. Worked out once a process.
pub fn verified(device: Device) -> &'static Verified {
    static CPU: OnceLock<Verified> = OnceLock::new();
    static GPUS: [OnceLock<Verified>; 64] = [const { OnceLock::new() }; 64];
    static NOTHING: Verified = Verified { fused: Fused::NONE, left_out: Vec::new() };
    match device {
        Device::Cpu => CPU.get_or_init(|| tch::with_grad(|| compare_all(device, Fused::ALL))),
        Device::Cuda(index) => match GPUS.get(index) {
            Some(gpu) => gpu.get_or_init(|| tch::with_grad(|| of_gpu(device))),
            None => &NOTHING,
        },
        _ => &NOTHING,
    }
}

fn of_gpu(device: Device) -> Verified {
    match gpu::load(device) {
        Ok(()) => compare_all(device, Fused::ALL),
        Err(error) => {
            let mut verified = compare_all(device, Fused::OF_ANY_DEVICE);
            verified.left_out.insert(0, format!("RMSNorm, rotary turns, gates and cross entropy: {error}"));
            verified
        }
    }
}

/// Compares those of the functions that are `wanted`. Extents are such that rows are read element by element in one
/// case, and in wide pieces and several rounds in another.
fn compare_all(device: Device, wanted: Fused) -> Verified {
    let mut left_out = Vec::new();
    let mut agrees = |wanted: bool, name: &str, outcomes: &dyn Fn() -> Vec<Result<(), String>>| {
        if !wanted {
            return false;
        }
        let problem = outcomes().into_iter().find_map(Result::err);
        left_out.extend(problem.as_ref().map(|problem| format!("{name}: {problem}")));
        problem.is_none()
    };
    let fused = Fused {
        norm: agrees(wanted.norm, "RMSNorm", &|| norms(device)),
        turns: agrees(wanted.turns, "rotary turns", &|| turns(device)),
        gate: agrees(wanted.gate, "gates", &|| gates(device)),
        loss: agrees(wanted.loss, "cross entropy", &|| losses(device)),
        linear: agrees(wanted.linear, "linear layers", &|| linears(device)),
    };
    Verified { fused, left_out }
}

/// Of a comparison in each type.
fn in_each_type(
    device: Device,
    shapes: &[&[i64]],
    reference: Function<'_>,
    fused: Function<'_>,
) -> [Result<(), String>; 2] {
    [Kind::Float, Kind::BFloat16].map(|kind| compare(device, kind, shapes, reference, fused))
}

fn norms(device: Device) -> Vec<Result<(), String>> {
    let of = |[rows, width]: [i64; 2], plus_one: bool| {
        in_each_type(
            device,
            &[&[rows, width], &[width]],
            &|x| {
                let weight = if plus_one { x[1].f_add_scalar(1.0)? } else { x[1].shallow_clone() };
                x[0].f_rms_norm([width], Some(weight), 1e-5)
            },
            &|x| rms_norm(&x[0], &x[1], 1e-5, plus_one).map_err(refused),
        )
    };
    [of([15, 37], false), of([15, 37], true), of([3, 2304], false), of([530, 8], false)].concat()
}

fn turns(device: Device) -> Vec<Result<(), String>> {
    let of = |shape: [i64; 4], table: &[i64]| {
        let width = table.last().copied().unwrap_or(0);
        let tables = || Ok::<_, TchError>((on(device, wave(table, 0.3)?)?, on(device, wave(table, 0.7)?)?));
        in_each_type(
            device,
            &[&shape],
            &|x| {
                let ((cos, sin), turned) = (tables()?, x[0].f_narrow(-1, 0, width)?);
                let partner = turned.f_roll(width / 2, -1_i64)?;
                let kept = x[0].f_narrow(-1, width, shape[3] - width)?;
                Tensor::f_cat(&[turned.f_mul(&cos)?.f_addcmul(&partner, &sin)?, kept], -1)
            },
            &|x| {
                let (cos, sin) = tables()?;
                rotate(&x[0], &cos, &sin).map_err(refused)
            },
        )
    };
    [of([2, 7, 3, 45], &[7, 1, 42]), of([2, 7, 9, 144], &[2, 7, 1, 128])].concat()
}

fn gates(device: Device) -> Vec<Result<(), String>> {
    let of = |width: i64, activation: Activation, fused: Function<'_>| {
        let reference = |x: &[Tensor]| {
            let [gate, up] = halves(&x[0])?;
            match activation {
                Activation::Silu => gate.f_silu()?.f_mul(&up),
                Activation::GeluTanh => gate.f_gelu("tanh")?.f_mul(&up),
            }
        };
        in_each_type(device, &[&[3, 5, 2 * width]], &reference, fused)
    };
    let each = [Activation::Silu, Activation::GeluTanh].map(|activation| {
        let apart = |x: &[Tensor]| {
            let [one, other] = halves(&x[0])?;
            gate(&one, &other, activation).map_err(refused)
        };
        let both = |x: &[Tensor]| gate_of_both(&x[0], activation).map_err(refused);
        [of(37, activation, &apart), of(37, activation, &both), of(2304, activation, &both)].concat()
    });
    each.concat()
}

fn losses(device: Device) -> Vec<Result<(), String>> {
    let of = |width: i64| {
        let targets = || on(device, Tensor::f_from_slice(&[0_i64, width - 1, 15, 16, 20])?);
        in_each_type(
            device,
            &[&[5, width]],
            &|x| {
                let scores = x[0].f_mul_scalar(8.0)?.f_to_kind(Kind::Float)?;
                scores.f_log_softmax(-1, Kind::Float)?.f_gather(1, &targets()?.f_unsqueeze(1)?, false)?.f_neg()
            },
            &|x| {
                let scores = x[0].f_mul_scalar(8.0)?;
                let mut gradient = scores.f_detach()?.f_mul_scalar(1.0)?;
                let losses = cross_entropy(&mut gradient, &targets()?, true).map_err(refused)?.f_unsqueeze(1)?;
                // The gradient enters through a product with the scores: their own values are taken off again.
                let products = scores.f_to_kind(Kind::Float)?.f_mul(&gradient)?;
                let through = products.f_sum_dim_intlist(-1, true, Kind::Float)?;
                losses.f_add(&through.f_sub(&through.f_detach()?)?)
            },
        )
    };
    [of(37), of(4608)].concat()
}

fn linears(device: Device) -> Vec<Result<(), String>> {
    let own =
        |x: &[Tensor]| linear(&x[0], &x[1].f_to_kind(Kind::Float)?, &x[1].f_detach()?, Some(&x[2])).map_err(refused);
    let shapes: [&[i64]; 3] = [&[3, 5, 37], &[20, 37], &[20]];
    in_each_type(device, &shapes, &|x| x[0].f_linear(&x[1], Some(&x[2])), &own).into()
}

/// The halves of the last extent.
fn halves(both: &Tensor) -> Result<[Tensor; 2], TchError> {
    let width = both.size().last().copied().unwrap_or(0) / 2;
    Ok([both.f_narrow(-1, 0, width)?, both.f_narrow(-1, width, width)?])
}

fn refused(error: TorchError) -> TchError {
    TchError::Torch(error.to_string())
}

/// A tensor from some of one type.
type Function<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor, TchError>;

/// How far a number of the fused function may be from the reference's, as a part of 1 + the latter's magnitude: in bf16
/// two roundings, in fp32 sums in another order.
const fn bound(kind: Kind) -> f64 {
    match kind {
        Kind::BFloat16 => 1.0 / 64.0,
        _ => 1e-5,
    }
}

/// Compares a function's value and gradients, with inputs of these extents in this type on this device, with those of
/// the reference in fp32 for the same inputs there.
fn compare(
    device: Device,
    kind: Kind,
    shapes: &[&[i64]],
    reference: Function<'_>,
    fused: Function<'_>,
) -> Result<(), String> {
    let run = |function: Function<'_>, computed: Kind| -> Result<Vec<Tensor>, TchError> {
        let inputs = shapes.iter().zip(0_i8..).map(|(shape, number)| {
            let input = on(device, wave(shape, f64::from(number))?)?.f_to_kind(kind)?.f_to_kind(computed)?;
            input.f_detach()?.f_set_requires_grad(true)
        });
        let inputs = inputs.collect::<Result<Vec<_>, TchError>>()?;
        let value = function(&inputs)?;
        let direction = on(device, wave(&value.size(), 0.5)?)?.f_to_kind(kind)?.f_to_kind(Kind::Float)?;
        value.f_to_kind(Kind::Float)?.f_mul(&direction)?.f_sum(Kind::Float)?.f_backward()?;
        let gradients = inputs.iter().map(Tensor::f_grad);
        let value = value.f_detach();
        std::iter::once(value).chain(gradients).map(|tensor| tensor?.f_to_kind(Kind::Double)).collect()
    };
    let far = |(own, right): (&Tensor, &Tensor)| -> Result<f64, TchError> {
        own.f_sub(right)?.f_abs()?.f_div(&right.f_abs()?.f_add_scalar(1.0)?)?.f_max()?.f_double_value(&[])
    };
    let compared = || {
        let (own, right) = (run(fused, kind)?, run(reference, Kind::Float)?);
        own.iter().zip(&right).map(far).collect::<Result<Vec<f64>, TchError>>()
    };
    let distances = compared().map_err(|error| error.to_string())?;
    match distances.iter().position(|&distance| distance.is_nan() || distance > bound(kind)) {
        None => Ok(()),
        Some(0) => Err(format!("values in {kind:?} differ by {:.1e}", distances[0])),
        Some(number) => Err(format!("gradient {number} in {kind:?} differs by {:.1e}", distances[number])),
    }
}

/// The tensor on `device`.
fn on(device: Device, tensor: Tensor) -> Result<Tensor, TchError> {
    tensor.f_to_device(device)
}

/// Numbers between -1 and 1, on the CPU.
fn wave(shape: &[i64], phase: f64) -> Result<Tensor, TchError> {
    let count = shape.iter().product::<i64>();
    let numbers = Tensor::f_arange(count, (Kind::Float, Device::Cpu))?;
    numbers.f_mul_scalar(0.37)?.f_add_scalar(phase)?.f_sin()?.f_view(shape)
}

/// The number of levels of instructions that this machine has; all give the same bits.
pub fn levels() -> Result<u64> {
    let mut count = 0;
    // SAFETY: the pointer is valid for the call.
    check("count levels of instructions", unsafe { ffi::trn_fused_levels(&mut count) })?;
    Ok(count)
}

/// Uses this level, counted from 0, in the whole process; one beyond the last is the last, which is the default.
pub fn use_level(level: u64) -> Result<()> {
    // SAFETY: takes a number.
    check("choose level of instructions", unsafe { ffi::trn_fused_use_level(level) })
}

#[cfg(test)]
mod device_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torch::gpu::Emulated;

    const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn bits(tensor: &Tensor) -> Vec<u8> {
        let tensor = tensor.detach().contiguous();
        let mut bytes = vec![0; super::super::byte_len(&tensor).unwrap()];
        super::super::store_bytes(&tensor, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn every_function_agrees_with_libtorch() {
        assert_eq!(*verified(Device::Cpu), Verified { fused: Fused::ALL, left_out: Vec::new() });
        if crate::torch::device_count().unwrap() == 0 {
            let Verified { fused, left_out } = verified(Device::Cuda(0));
            assert_eq!((*fused, left_out.len()), (Fused::NONE, 2));
            assert!(left_out[0].starts_with("RMSNorm, rotary turns"), "{left_out:?}");
        }
    }

    /// The kernels for GPUs, on this thread: every form of each, forward and backward.
    #[test]
    fn kernels_agree_with_libtorch() {
        let Some(_emulated) = Emulated::begin() else { return };
        let found = compare_all(Device::Cpu, Fused::ALL);
        assert_eq!(found, Verified { fused: Fused::ALL, left_out: Vec::new() });
        let (all, done) = Emulated::forms();
        assert_eq!(done, all, "forms of kernels that were run");
        assert!(all >= 35, "{all}");
    }

    /// Against the loops for CPUs, which are another program: rows apart, beginnings at odd places, and nothing beside
    /// the rows is touched.
    #[test]
    fn kernels_read_and_write_what_loops_do() {
        for kind in [Kind::Float, Kind::BFloat16] {
            // Views within a larger memory, at a beginning of `skip` elements.
            let view = |phase: f64, [rows, width, apart, skip]: [i64; 4]| {
                let memory = (wave(&[rows * apart + skip], phase).unwrap() * 3.0).to_kind(kind);
                memory.narrow(0, skip, rows * apart).view([rows, apart]).narrow(1, 0, width)
            };
            let cases = [[3, 64, 64, 0], [3, 64, 72, 0], [3, 64, 64, 1], [5, 61, 64, 0], [2, 1, 7, 3], [70, 8, 8, 0]];
            for extents in cases {
                let all = |emulate: bool| {
                    let _emulated = if emulate { Emulated::begin() } else { None };
                    let leaf = |phase| view(phase, extents).detach().set_requires_grad(true);
                    let weight = wave(&[extents[1]], 1.0).unwrap().set_requires_grad(true);
                    let (x, g, u) = (leaf(0.0), leaf(1.0), leaf(2.0));
                    let mut tensors = Vec::new();
                    let mut learn = |value: Tensor, of: &[&Tensor]| {
                        let direction = wave(&value.size(), 0.1).unwrap();
                        (value.to_kind(Kind::Float) * direction).sum(Kind::Float).backward();
                        tensors.push(value.detach());
                        tensors.extend(of.iter().map(|leaf| leaf.grad()));
                    };
                    learn(rms_norm(&x, &weight, 1e-5, true).unwrap(), &[&x, &weight]);
                    learn(gate(&g, &u, Activation::Silu).unwrap(), &[&g, &u]);
                    learn(gate(&g, &u, Activation::GeluTanh).unwrap(), &[&g, &u]);
                    let targets = Tensor::arange(extents[0], (Kind::Int64, Device::Cpu)).remainder(extents[1]);
                    for gradient in [false, true] {
                        let mut scores = (view(0.4, extents) * 2.0).contiguous();
                        tensors.push(cross_entropy(&mut scores, &targets, gradient).unwrap());
                        tensors.push(scores);
                    }
                    tensors
                };
                for (number, (own, right)) in all(true).iter().zip(all(false)).enumerate() {
                    let far = (own.to_kind(Kind::Float) - right.to_kind(Kind::Float)).abs();
                    let far = (far / (right.to_kind(Kind::Float).abs() + 1.0)).max().double_value(&[]);
                    let within = if kind == Kind::Float { 2e-6 } else { 0.01 };
                    assert!(far <= within, "{kind:?} {extents:?}: result {number} is {far:e} away");
                }
            }
        }
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_a_nan_of_a_kernel() {
        let Some(_emulated) = Emulated::begin() else { return };
        for width in [40, 4608] {
            let mut scores = Tensor::ones([3, width], F32);
            let targets = Tensor::from_slice(&[-1, width, 7]);
            let losses = Vec::<f32>::try_from(cross_entropy(&mut scores, &targets, true).unwrap()).unwrap();
            assert!(losses[0].is_nan() && losses[1].is_nan(), "{losses:?}");
            assert!((f64::from(losses[2]) - (width as f64).ln()).abs() < 1e-5, "{losses:?}");
            assert!(scores.get(0).isnan().all().int64_value(&[]) == 1, "its gradient, too");
            assert!((scores.get(2).sum(Kind::Double).double_value(&[])).abs() < 1e-5);
        }
    }

    /// As the loops for CPUs have it: see below.
    #[test]
    fn a_kernel_hides_no_number_that_is_not_finite_and_takes_scores_of_minus_infinity() {
        let Some(_emulated) = Emulated::begin() else { return };
        let target = Tensor::from_slice(&[1_i64]);
        for bad in [f64::NAN, f64::INFINITY] {
            let mut scores = Tensor::full([1, 40], 1.0, F32);
            let _ = scores.narrow(1, 35, 1).fill_(bad);
            assert!(!cross_entropy(&mut scores, &target, true).unwrap().double_value(&[0]).is_finite());
            let x = Tensor::full([1, 40], 1.0, F32);
            let _ = x.narrow(1, 3, 1).fill_(bad);
            for kind in [Kind::Float, Kind::BFloat16] {
                let x = x.to_kind(kind);
                let normed = rms_norm(&x, &Tensor::ones([40], F32), 1e-5, false).unwrap();
                assert!(normed.double_value(&[0, 3]).is_nan());
                assert!(!gate(&x, &x, Activation::GeluTanh).unwrap().double_value(&[0, 3]).is_finite());
            }
        }
        let mut scores = Tensor::full([1, 40], f64::NEG_INFINITY, F32);
        let _ = scores.narrow(1, 1, 1).fill_(-300.0);
        assert_eq!(cross_entropy(&mut scores, &target, true).unwrap().double_value(&[0]), 0.0);
        assert_eq!(scores.abs().max().double_value(&[]), 0.0);
    }

    #[test]
    fn a_function_that_differs_in_value_or_gradient_or_fails_is_named() {
        let right: Function<'_> = &|x| x[0].f_square();
        let cases: [(Function<'_>, &str); 5] = [
            (&|x| x[0].f_square()?.f_mul_scalar(1.0001), "values in Float"),
            (&|x| x[0].f_detach()?.f_square()?.f_add(&x[0].f_sub(&x[0].f_detach()?)?), "gradient 1 in Float"),
            (&|x| x[0].f_square()?.f_mul_scalar(f64::NAN), "values in Float"),
            (&|x| x[0].f_view([1]), "shape"),
            (&|x| x[0].f_detach()?.f_square(), "grad"),
        ];
        for (wrong, said) in cases {
            let error = compare(Device::Cpu, Kind::Float, &[&[3, 5]], right, wrong).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
        compare(Device::Cpu, Kind::BFloat16, &[&[3, 5]], right, right).unwrap();
    }

    /// Value and gradients of every function, in both types, as bytes.
    fn everything() -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        for kind in [Kind::Float, Kind::BFloat16] {
            let leaf = |shape: &[i64], phase: f64| {
                let tensor = (wave(shape, phase).unwrap() * 3.0).to_kind(kind).detach();
                tensor.set_requires_grad(true)
            };
            let mut learn = |value: Tensor, of: &[&Tensor]| {
                (value.to_kind(Kind::Float) * wave(&value.size(), 0.1).unwrap()).sum(Kind::Float).backward();
                all.push(bits(&value));
                all.extend(of.iter().map(|leaf| bits(&leaf.grad())));
            };
            let (x, weight) = (leaf(&[70, 173], 0.0), leaf(&[173], 1.0));
            learn(rms_norm(&x, &weight, 1e-5, true).unwrap(), &[&x, &weight]);
            let x = leaf(&[2, 33, 3, 45], 0.5);
            let tables = [0.3, 0.7].map(|phase| wave(&[33, 1, 42], phase).unwrap());
            learn(rotate(&x, &tables[0], &tables[1]).unwrap(), &[&x]);
            for activation in [Activation::Silu, Activation::GeluTanh] {
                let (x, both) = (leaf(&[70, 173], 0.0), leaf(&[70, 2 * 173], 0.0));
                learn(gate(&x, &x.sin(), activation).unwrap(), &[&x]);
                learn(gate_of_both(&both, activation).unwrap(), &[&both]);
            }
            let targets = Tensor::arange(70, (Kind::Int64, Device::Cpu)) * 2;
            for gradient in [false, true] {
                let mut scores = leaf(&[70, 173], 0.2).detach().copy() * 5.0;
                all.push(bits(&cross_entropy(&mut scores, &targets, gradient).unwrap()));
                all.push(bits(&scores));
            }
        }
        all
    }

    #[test]
    fn bits_are_the_same_for_every_number_of_threads_and_level_of_instructions() {
        // What is chosen holds for other tests, too, and changes nothing for them.
        tch::set_num_threads(1);
        let expected = everything();
        assert_eq!(expected.len(), 2 * (3 + 2 + 2 * 4 + 4));
        for level in 0..levels().unwrap() {
            use_level(level).unwrap();
            assert_eq!(everything(), expected, "level {level}");
        }
        use_level(u64::MAX).unwrap();
        tch::set_num_threads(3);
        let threaded = everything();
        tch::set_num_threads(1);
        assert_eq!(threaded, expected, "three threads");
    }

    /// By the softmax of two scores, and the loss: ln(1 + e^d).
    #[test]
    fn exponentials_are_right_over_their_whole_range() {
        for step in -4000..4000 {
            let score = step as f32 / 40.0;
            let mut scores = Tensor::from_slice(&[0.0_f32, score]).view([1, 2]);
            let loss = cross_entropy(&mut scores, &Tensor::from_slice(&[0_i64]), true).unwrap().double_value(&[0]);
            let score = f64::from(score);
            let (softmax, found) = (1.0 / (1.0 + (-score).exp()), scores.double_value(&[0, 1]));
            if score > -87.0 {
                assert!((found / softmax - 1.0).abs() < 4e-7, "{score}: {found:e}, not {softmax:e}");
            } else {
                assert!(found < 2e-38, "{score}");
            }
            assert!((scores.double_value(&[0, 0]) + softmax).abs() < 2e-7, "{score}");
            let expected = score.max(0.0) + (-score.abs()).exp().ln_1p();
            assert!((loss - expected).abs() < 2e-7 * (1.0 + expected), "{score}: {loss}, not {expected}");
        }
    }

    #[test]
    fn numbers_that_are_not_finite_stay_visible() {
        let target = Tensor::from_slice(&[1_i64]);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut scores = Tensor::full([1, 40], 1.0, F32);
            let _ = scores.narrow(1, 35, 1).fill_(f64::from(bad));
            assert!(!cross_entropy(&mut scores, &target, true).unwrap().double_value(&[0]).is_finite());
            let mut x = Tensor::full([1, 40], 1.0, F32);
            let _ = x.narrow(1, 3, 1).fill_(f64::from(bad));
            for kind in [Kind::Float, Kind::BFloat16] {
                let x = x.to_kind(kind);
                let normed = rms_norm(&x, &Tensor::ones([40], F32), 1e-5, false).unwrap();
                assert!(normed.double_value(&[0, 3]).is_nan());
                let gated = gate(&x, &x, Activation::GeluTanh).unwrap();
                assert!(!gated.double_value(&[0, 3]).is_finite());
            }
            x = Tensor::zeros([1, 40], F32);
            assert_eq!(rms_norm(&x, &Tensor::ones([40], F32), 1e-5, false).unwrap().abs().max().double_value(&[]), 0.0);
        }
    }

    #[test]
    fn a_weights_gradient_is_added_where_it_is_and_hooks_see_it_whole() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let x = wave(&[3, 5, 37], 0.2).unwrap().to_kind(kind).set_requires_grad(true);
            let weight = wave(&[20, 37], 0.4).unwrap();
            let pass = |leaf: &Tensor| {
                let values = leaf.detach().to_kind(kind);
                // Twice the same leaf, as with tied weights: once by a product, once by plain autograd.
                let y = linear(&x, leaf, &values, None).unwrap().to_kind(Kind::Float);
                (y.square().sum(Kind::Float) + leaf.square().sum(Kind::Float)).backward();
            };
            let (returned, added) = (weight.copy().set_requires_grad(true), weight.copy().set_requires_grad(true));
            pass(&returned);
            super::super::zero_gradients(&[added.shallow_clone()]).unwrap();
            let place = added.grad().data_ptr();
            pass(&added);
            assert_eq!(added.grad().data_ptr(), place);
            let far = (returned.grad() - added.grad()).abs().max().double_value(&[]);
            assert!(far < 1e-4 && returned.grad().abs().max().double_value(&[]) > 1.0, "{kind:?}: {far}");
            // A pass that returns gradients gets them, and adds to none.
            let y = linear(&x, &added, &added.detach().to_kind(kind), None).unwrap().to_kind(Kind::Float);
            let before = bits(&added.grad());
            let found = Tensor::run_backward(&[y.square().sum(Kind::Float)], &[&added], false, false);
            let expected = returned.grad() - &weight * 2.0;
            let far = (&found[0] - expected).abs().max().double_value(&[]);
            assert!(far < 1e-4, "{kind:?}: returned: {far}");
            assert_eq!(bits(&added.grad()), before);
            pass(&added);
            let far = (returned.grad() * 2.0 - added.grad()).abs().max().double_value(&[]);
            assert!(far < 1e-4, "{kind:?}: a second pass: {far}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let x = Tensor::zeros([2, 4, 3, 8], F32);
        let table = |shape: &[i64]| Tensor::zeros(shape, F32);
        for shape in [&[4, 1, 10][..], &[4, 1, 7], &[5, 1, 8], &[3, 4, 1, 8], &[4, 2, 8], &[4, 8]] {
            assert!(rotate(&x, &table(shape), &table(shape)).is_err(), "{shape:?}");
        }
        assert!(rotate(&x, &table(&[4, 1, 8]), &table(&[4, 1, 6])).is_err());
        assert!(rms_norm(&x, &Tensor::zeros([7], F32), 1e-5, false).is_err());
        assert!(rms_norm(&x.to_kind(Kind::Double), &Tensor::zeros([8], F32), 1e-5, false).is_err());
        assert!(gate(&x, &x.narrow(0, 0, 1), Activation::Silu).is_err());
        assert!(gate_of_both(&x.narrow(-1, 0, 7), Activation::Silu).is_err());
        let mut scores = Tensor::zeros([2, 5], F32);
        for targets in [vec![0_i64, 5], vec![-1, 0], vec![1]] {
            assert!(cross_entropy(&mut scores, &Tensor::from_slice(&targets), true).is_err(), "{targets:?}");
        }
        assert_eq!(bits(&scores), vec![0; 40], "a refused call changes nothing");
    }
}
