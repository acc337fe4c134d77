//! Cross entropy of a linear layer without the whole matrix of scores in memory.
//!
//! Scores are `[rows, vocabulary]`, by far the largest tensor of a small model's step, and a plain backward pass holds
//! three of them. Here rows are taken in chunks: the gradient of cross entropy is known in closed form (softmax minus
//! one-hot), so each chunk's gradients with respect to hidden states and weights are computed along with its loss, and
//! its scores are dropped (the idea of Liger Kernel's fused linear cross entropy, arXiv 2410.10989). No operation is
//! done twice. The loss's backward pass hands both gradients out: see [`Weight::with_gradients`]. No value is computed
//! from them, so scores far apart can't turn the loss into a NaN.

use tch::{Device, Kind, Tensor};

use super::{Doing, ModelError, Targets, Weight, weight::refused};
use crate::torch::{
    Known,
    fused::{self, Fused},
};

/// Bytes of fp32 scores in one chunk. On a CPU less than the 32 MiB from which glibc returns every buffer to the
/// kernel, so that chunks reuse warm pages; more on a GPU, which needs larger products.
const fn chunk_bytes(device: Device) -> i64 {
    match device {
        Device::Cpu => 24 << 20,
        _ => 512 << 20,
    }
}

/// Mean cross entropy of `hidden · weightᵀ` over `targets`: an fp32 scalar, differentiable once in `hidden` and
/// `weight`. Without any target it is 0, and so are its gradients.
///
/// `hidden`: `[batch · T, width]`, fp32 or bf16, the type of the matrix products. `weight`: `[vocabulary, width]`.
/// Softmax and sums are fp32. Rows without a target are left out of the products.
pub(super) fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Weight,
    targets: &Targets,
    fused: Fused,
) -> Result<Tensor, ModelError> {
    let chunk = chunk_rows(hidden, weight, targets)?;
    chunked(hidden, weight, targets, chunk, fused).doing("compute loss")
}

/// The rows of one chunk. Targets of another number of positions are refused.
fn chunk_rows(hidden: &Tensor, weight: &Weight, targets: &Targets) -> Result<i64, ModelError> {
    let all = hidden.size().first().copied().unwrap_or(0);
    if all != targets.positions() {
        let reason = format!("are for {} positions, the vectors for {all}", targets.positions());
        return Err(ModelError::Input { what: "targets", reason });
    }
    let vocabulary = weight.values().size().first().copied().unwrap_or(0);
    Ok(rows_of(chunk_bytes(hidden.device()), vocabulary))
}

/// The rows of scores in one chunk.
fn rows_of(bytes: i64, vocabulary: i64) -> i64 {
    (bytes / (4 * vocabulary.max(1))).max(128)
}

/// The rows of scores that are in memory at a time, of a vocabulary of this size; on a GPU or on a CPU.
pub(super) fn rows(on_gpu: bool, vocabulary: u64) -> u64 {
    let device = if on_gpu { Device::Cuda(0) } else { Device::Cpu };
    rows_of(chunk_bytes(device), i64::try_from(vocabulary).unwrap_or(i64::MAX / 4)).unsigned_abs()
}

/// The cross entropy of each of `targets`, in their order: fp32 `[count]`, without gradients. Arguments as in
/// [`linear_cross_entropy`], which has their mean.
pub(super) fn linear_losses(
    hidden: &Tensor,
    weight: &Weight,
    targets: &Targets,
    fused: Fused,
) -> Result<Tensor, ModelError> {
    let (chunk, _guard) = (chunk_rows(hidden, weight, targets)?, tch::no_grad_guard());
    single(hidden, weight, targets, chunk, fused).doing("compute losses")
}

fn single(
    hidden: &Tensor,
    weight: &Weight,
    targets: &Targets,
    chunk: i64,
    fused: Fused,
) -> Result<Tensor, tch::TchError> {
    let matrix = weight.at_use(hidden.f_kind()?)?;
    let (targets, places) = targets.selected()?;
    let inputs = match places {
        Some(places) => hidden.f_index_select(0, places)?,
        None => hidden.shallow_clone(),
    };
    let rows = targets.size1()?;
    let mut losses = vec![Tensor::f_zeros([0], (Kind::Float, hidden.device()))?];
    let mut start = 0;
    while start < rows {
        let len = chunk.min(rows - start);
        let mut scores = inputs.f_narrow(0, start, len)?.f_linear(&matrix, None::<&Tensor>)?;
        let target = targets.f_narrow(0, start, len)?;
        losses.push(if fused.loss {
            fused::cross_entropy(&mut scores, &target, false).map_err(refused)?
        } else {
            let scores = scores.f_log_softmax(-1, Kind::Float)?;
            scores.f_gather(1, &target.f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?.f_neg()?
        });
        start += len;
    }
    Tensor::f_cat(&losses, 0)
}

fn chunked(
    hidden: &Tensor,
    weight: &Weight,
    targets: &Targets,
    chunk: i64,
    fused: Fused,
) -> Result<Tensor, tch::TchError> {
    let by_hidden = hidden.requires_grad();
    let by_weight = weight.is_recorded()?;
    let guard = tch::no_grad_guard();
    let kind = hidden.f_kind()?;
    let matrix = weight.at_use(kind)?;
    let (targets, places) = targets.selected()?;
    let rows = targets.size1()?;
    let inputs = hidden.f_detach()?;
    let inputs = match places {
        Some(places) => inputs.f_index_select(0, places)?,
        None => inputs,
    };

    let mut losses = Vec::new();
    let mut hidden_gradients = Vec::new();
    let mut weight_gradient: Option<Tensor> = None;
    let mut start = 0;
    while start < rows {
        let len = chunk.min(rows - start);
        let input = inputs.f_narrow(0, start, len)?;
        let scores = input.f_linear(&matrix, None::<&Tensor>)?;
        let (loss, scores) = scored(scores, &targets.f_narrow(0, start, len)?, by_hidden || by_weight, fused)?;
        losses.push(loss);
        if by_hidden {
            hidden_gradients.push(scores.f_mm(&matrix)?);
        }
        if by_weight {
            weight_gradient = Some(match weight_gradient {
                None => scores.f_tr()?.f_mm(&input)?.f_to_kind(Kind::Float)?,
                Some(mut sum) if kind == Kind::Float => sum.f_addmm_(&scores.f_tr()?, &input)?,
                Some(mut sum) => sum.f_add_(&scores.f_tr()?.f_mm(&input)?)?,
            });
        }
        start += len;
    }
    let loss = match rows {
        0 => Tensor::f_zeros([], (Kind::Float, hidden.device()))?,
        _ => Tensor::f_cat(&losses, 0)?.f_mean(Kind::Float)?,
    };
    let hidden_gradient = match by_hidden {
        true => Some(spread(hidden, &hidden_gradients, places)?),
        false => None,
    };
    if by_weight && rows == 0 {
        weight_gradient = Some(matrix.f_zeros_like()?.f_to_kind(Kind::Float)?);
    }
    // A mean over nothing is 0, whatever it is divided by.
    let divisor = rows.max(1) as f64;
    drop((guard, hidden_gradients));

    let known = hidden_gradient.as_ref().map(|gradient| Known { of: hidden, gradient });
    weight.with_gradients(&loss, known, weight_gradient.as_ref(), divisor, fused.linear)
}

/// The loss of each row of `scores`, fp32 `[rows]`; and, where it is wanted, the gradient of their sum with respect to
/// the scores, in the scores' type.
fn scored(
    mut scores: Tensor,
    targets: &Tensor,
    gradient: bool,
    fused: Fused,
) -> Result<(Tensor, Tensor), tch::TchError> {
    if fused.loss {
        let losses = fused::cross_entropy(&mut scores, targets, gradient).map_err(refused)?;
        return Ok((losses, scores));
    }
    let (kind, target) = (scores.f_kind()?, targets.f_unsqueeze(1)?);
    let mut logs = scores.f_log_softmax(-1, Kind::Float)?;
    let losses = logs.f_gather(1, &target, false)?.f_squeeze_dim(1)?.f_neg()?;
    if gradient {
        let minus_one = Tensor::f_full_like(&losses, -1.0)?.f_unsqueeze(1)?;
        scores = logs.f_exp_()?.f_scatter_add_(1, &target, &minus_one)?.f_to_kind(kind)?;
    }
    Ok((losses, scores))
}

/// The gradients of the rows with a target, by chunks, as one tensor for all rows of `hidden`, in its type.
fn spread(hidden: &Tensor, chunks: &[Tensor], places: Option<&Tensor>) -> Result<Tensor, tch::TchError> {
    let Some(places) = places else { return Tensor::f_cat(chunks, 0) };
    let mut all = hidden.f_zeros_like()?;
    if chunks.is_empty() {
        return Ok(all);
    }
    // No place is there twice, so the order of writing does not matter.
    all.f_index_copy_(0, places, &Tensor::f_cat(chunks, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(shape: [i64; 2], seed: u64, kind: Kind) -> Tensor {
        let len = usize::try_from(shape[0] * shape[1]).unwrap();
        let values = super::super::random::normal(seed, "test", len, 1.0);
        let tensor = Tensor::f_from_slice(&values).unwrap().f_view(shape).unwrap().f_to_kind(kind).unwrap();
        tensor.f_set_requires_grad(true).unwrap()
    }

    fn share(leaf: &Tensor) -> Weight {
        Weight::Leaf(leaf.shallow_clone())
    }

    /// LibTorch's operations, and the fused function.
    fn both_ways() -> [Fused; 2] {
        [Fused::NONE, Fused { loss: true, ..Fused::NONE }]
    }

    fn targets() -> Tensor {
        Tensor::f_from_slice(&(0..10_i64).map(|i| (i * 5 + 2) % 7).collect::<Vec<_>>()).unwrap()
    }

    fn all() -> Targets {
        Targets::all(targets())
    }

    fn furthest(a: &Tensor, b: &Tensor) -> f64 {
        a.f_sub(b).unwrap().f_abs().unwrap().f_max().unwrap().f_double_value(&[]).unwrap()
    }

    /// Gradients of a third of the loss, as gradient accumulation has it.
    fn gradients(loss: &Tensor, of: [&Tensor; 2]) -> [Tensor; 2] {
        loss.f_div_scalar(3.0).unwrap().f_backward().unwrap();
        of.map(|tensor| {
            let gradient = tensor.f_grad().unwrap();
            let copy = gradient.f_mul_scalar(1.0).unwrap();
            let _ = gradient.shallow_clone().f_zero_().unwrap();
            copy
        })
    }

    #[test]
    fn chunks_give_the_loss_and_gradients_of_the_whole() {
        let (hidden, weight) = (leaf([10, 6], 1, Kind::Float), leaf([7, 6], 2, Kind::Float));
        let scores = hidden.f_linear(&weight, None::<&Tensor>).unwrap();
        let whole = scores.f_cross_entropy_loss(&targets(), None::<&Tensor>, tch::Reduction::Mean, -100, 0.0).unwrap();
        let expected = gradients(&whole, [&hidden, &weight]);
        for (chunk, fused) in [1, 3, 5, 9, 10, 11].into_iter().flat_map(|chunk| both_ways().map(|fused| (chunk, fused)))
        {
            let loss = chunked(&hidden, &share(&weight), &all(), chunk, fused).unwrap();
            assert!(furthest(&loss, &whole) < 1e-6, "chunk {chunk}");
            let [by_hidden, by_weight] = gradients(&loss, [&hidden, &weight]);
            assert!(furthest(&by_hidden, &expected[0]) < 1e-6, "chunk {chunk}");
            assert!(furthest(&by_weight, &expected[1]) < 1e-6, "chunk {chunk}");
        }
    }

    #[test]
    fn single_losses_are_those_that_the_mean_is_of() {
        let (hidden, weight) = (leaf([10, 6], 1, Kind::Float), leaf([7, 6], 2, Kind::Float));
        let some = Targets::at(targets(), &[1, 4, 9]).unwrap();
        for (targets, count) in [(all(), 10), (some, 3)] {
            let mean = chunked(&hidden, &share(&weight), &targets, 4, Fused::NONE).unwrap();
            for (chunk, fused) in [1, 3, 10].into_iter().flat_map(|chunk| both_ways().map(|fused| (chunk, fused))) {
                let losses = single(&hidden, &share(&weight), &targets, chunk, fused).unwrap();
                assert_eq!((losses.size(), losses.f_kind().unwrap()), (vec![count], Kind::Float));
                assert!(furthest(&losses.f_mean(Kind::Float).unwrap(), &mean) < 1e-6, "chunk {chunk}");
            }
        }
        let none = Targets::at(targets(), &[]).unwrap();
        let losses = linear_losses(&hidden, &share(&weight), &none, Fused::NONE).unwrap();
        assert!(losses.size() == [0] && !losses.requires_grad());
    }

    #[test]
    fn bf16_rounds_the_products_and_nothing_else() {
        for fused in both_ways() {
            let (hidden, weight) = (leaf([10, 6], 1, Kind::BFloat16), leaf([7, 6], 2, Kind::Float));
            let exact_hidden =
                hidden.f_detach().unwrap().f_to_kind(Kind::Float).unwrap().f_set_requires_grad(true).unwrap();
            let exact = chunked(&exact_hidden, &share(&weight), &all(), 4, fused).unwrap();
            let expected = gradients(&exact, [&exact_hidden, &weight]);
            let loss = chunked(&hidden, &share(&weight), &all(), 4, fused).unwrap();
            assert!(loss.f_kind().unwrap() == Kind::Float && furthest(&loss, &exact) < 2e-2);
            let [by_hidden, by_weight] = gradients(&loss, [&hidden, &weight]);
            assert_eq!((by_hidden.f_kind().unwrap(), by_weight.f_kind().unwrap()), (Kind::BFloat16, Kind::Float));
            assert!(furthest(&by_hidden.f_to_kind(Kind::Float).unwrap(), &expected[0]) < 2e-3);
            assert!(furthest(&by_weight, &expected[1]) < 2e-3);
        }
    }

    #[test]
    fn without_gradients_none_are_computed() {
        for fused in both_ways() {
            let (hidden, weight) = (leaf([10, 6], 1, Kind::Float), leaf([7, 6], 2, Kind::Float));
            let with = chunked(&hidden, &share(&weight), &all(), 4, fused).unwrap();
            let detached = hidden.f_detach().unwrap();
            let without = tch::no_grad(|| chunked(&detached, &share(&weight), &all(), 4, fused).unwrap());
            assert!(with.requires_grad() && !without.requires_grad());
            assert_eq!(furthest(&with, &without), 0.0);
        }
    }

    #[test]
    fn a_frozen_side_gets_no_gradient_and_changes_nothing_of_the_other() {
        for fused in both_ways() {
            let (hidden, weight) = (leaf([10, 6], 1, Kind::Float), leaf([7, 6], 2, Kind::Float));
            let both = chunked(&hidden, &share(&weight), &all(), 4, fused).unwrap();
            let expected = gradients(&both, [&hidden, &weight]);

            let frozen = Weight::Frozen(weight.f_detach().unwrap());
            let loss = chunked(&hidden, &frozen, &all(), 4, fused).unwrap();
            assert_eq!(furthest(&loss, &both), 0.0);
            let [by_hidden, by_weight] = gradients(&loss, [&hidden, &weight]);
            assert_eq!(furthest(&by_hidden, &expected[0]), 0.0);
            assert_eq!(by_weight.f_abs().unwrap().f_max().unwrap().f_double_value(&[]).unwrap(), 0.0);

            // Everything before the head is frozen.
            let loss = chunked(&hidden.f_detach().unwrap(), &share(&weight), &all(), 4, fused).unwrap();
            assert_eq!(furthest(&loss, &both), 0.0);
            let [by_hidden, by_weight] = gradients(&loss, [&hidden, &weight]);
            assert_eq!(furthest(&by_weight, &expected[1]), 0.0);
            assert_eq!(by_hidden.f_abs().unwrap().f_max().unwrap().f_double_value(&[]).unwrap(), 0.0);
        }
    }

    /// An improbable target does not turn into a NaN.
    #[test]
    fn scores_far_apart_stay_finite() {
        for fused in both_ways() {
            let hidden = leaf([10, 6], 1, Kind::Float).f_detach().unwrap().f_mul_scalar(1e3).unwrap();
            let hidden = hidden.f_set_requires_grad(true).unwrap();
            let weight = leaf([7, 6], 2, Kind::Float);
            let loss = chunked(&hidden, &share(&weight), &all(), 4, fused).unwrap();
            let value = loss.f_double_value(&[]).unwrap();
            assert!(value.is_finite() && value > 100.0, "{value}");
            let [by_hidden, by_weight] = gradients(&loss, [&hidden, &weight]);
            for gradient in [by_hidden, by_weight] {
                assert!(gradient.f_isfinite().unwrap().f_all().unwrap().f_int64_value(&[]).unwrap() == 1);
            }
        }
    }

    /// The inner product of the vectors and their gradient is no finite number here; the loss is.
    #[test]
    fn vectors_near_the_limit_of_fp32_have_a_finite_loss_and_gradient() {
        for fused in both_ways() {
            let ones = Tensor::f_full([10, 2], 2.0_f64.powi(127), (Kind::Float, Device::Cpu)).unwrap();
            let hidden = ones.f_set_requires_grad(true).unwrap();
            // Scores are zero, and the weights of the target are far from those of the others.
            let rows: Vec<f32> = (0..7).map(|token| if token == 3 { 127.0 / 128.0 } else { -127.0 / 128.0 }).collect();
            let column = Tensor::f_from_slice(&rows).unwrap().f_unsqueeze(1).unwrap();
            let weight = Weight::Frozen(Tensor::f_cat(&[&column, &column.f_neg().unwrap()], 1).unwrap());
            let targets = Targets::all(Tensor::f_from_slice(&[3_i64; 10]).unwrap());
            let loss = chunked(&hidden, &weight, &targets, 4, fused).unwrap();
            assert!((loss.f_double_value(&[]).unwrap() - 7.0_f64.ln()).abs() < 1e-6);
            loss.f_backward().unwrap();
            let gradient = hidden.f_grad().unwrap();
            let expected = 127.0 / 128.0 * (1.0 / 7.0 - 6.0 / 7.0 - 1.0) / 10.0;
            assert!((gradient.f_double_value(&[7, 0]).unwrap() - expected).abs() < 1e-6);
            let flat = |tensor: &Tensor| tensor.f_detach().unwrap().f_flatten(0, -1).unwrap();
            let inner = flat(&hidden).f_dot(&(flat(&gradient) * 10.0)).unwrap().f_double_value(&[]).unwrap();
            assert!(!inner.is_finite(), "{inner}");
        }
    }
}
