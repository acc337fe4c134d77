//! Fresh weights of a decoder.
//!
//! Matrices are normal with deviation `initializer_range`; those of the two projections that add to the residual stream
//! (`o_proj`, `down_proj`) are divided by √(2·layers), so that the stream's variance does not grow with depth (GPT-2).
//! Norms scale by 1, biases are 0. The numbers come from [`super::random`]: the same bits on every machine.

use tch::{Device, Kind, TchError, Tensor};

use super::{
    BuildSettings,
    decoder::config::{DecoderConfig, NormScale},
    random,
};

/// One parameter's first value: drawn on the CPU, so that the device makes no difference.
pub(super) fn fresh(
    config: &DecoderConfig,
    name: &str,
    shape: &[u64],
    settings: &BuildSettings,
) -> Result<Tensor, TchError> {
    let extents = extents(shape);
    let cpu = (Kind::Float, Device::Cpu);
    let tensor = if settings.seed.is_none() {
        Tensor::f_empty(&extents, cpu)?
    } else if name.ends_with(".bias") {
        Tensor::f_zeros(&extents, cpu)?
    } else if name.ends_with("norm.weight") {
        match config.scale {
            NormScale::Plain | NormScale::Exact => Tensor::f_ones(&extents, cpu)?,
            NormScale::PlusOne => Tensor::f_zeros(&extents, cpu)?,
        }
    } else {
        let mut std = config.initializer_range;
        if name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight") {
            std /= ((2 * config.layers.len()) as f64).sqrt();
        }
        let len = usize::try_from(extents.iter().product::<i64>()).unwrap_or(0);
        Tensor::f_from_slice(&random::normal(settings.seed.unwrap_or_default(), name, len, std))?
            .f_view(extents.as_slice())?
    };
    tensor.f_to_device(settings.device)?.f_set_requires_grad(true)
}

/// Each extent is at most 2^24 and each product below 2^31 by the description's bounds.
pub(super) fn extents(shape: &[u64]) -> Vec<i64> {
    shape.iter().map(|&extent| i64::try_from(extent).unwrap_or(i64::MAX)).collect()
}
