//! Rotary position embedding (Su et al., arXiv 2104.09864) in Hugging Face's layout: element i of a head is turned
//! together with element i + width/2.
//!
//! Cosines and sines are computed in fp32 on the CPU, with the same operations as Hugging Face's, and then moved to the
//! device; the turning is done in fp32 at any model precision, because bf16 loses positions in long sequences (arXiv
//! 2411.13476). The table grows to the longest sequence seen.

use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, Tensor};

use super::{
    Doing, ModelError, Spans,
    llama_config::{Llama3Scaling, LlamaConfig, Rope},
};

/// Cosines and sines, fp32 `[T, 1, width]` or `[batch, T, 1, width]`: they broadcast over `[batch, T, heads, width]`.
pub(super) struct Turns {
    cos: Tensor,
    /// With the sign of each half's partner: minus in the first half, plus in the second.
    sin: Tensor,
}

impl Turns {
    /// Turns `x` `[batch, T, heads, width]`; the result has the type of `x`.
    ///
    /// Hugging Face writes `x·cos + cat(-x₂, x₁)·sin`; with the sign within the table that is a rotation by half the
    /// width, and a product is saved.
    pub(super) fn apply(&self, x: &Tensor, width: i64) -> Result<Tensor, tch::TchError> {
        let partner = x.f_roll(width / 2, -1_i64)?;
        x.f_mul(&self.cos)?.f_addcmul(&partner, &self.sin)?.f_to_kind(x.f_kind()?)
    }
}

/// The table for one model.
pub(super) struct RopeTable {
    rope: Rope,
    width: i64,
    max_positions: i64,
    device: Device,
    grown: Mutex<Option<Turns>>,
}

impl RopeTable {
    pub(super) fn new(config: &LlamaConfig, device: Device) -> Self {
        Self {
            rope: config.rope,
            width: config.head_dim.into(),
            max_positions: config.max_position_embeddings.into(),
            device,
            grown: Mutex::new(None),
        }
    }

    /// The turns of each token of rows of `len`, by its position in its document; `len` is at most the model's longest
    /// sequence.
    pub(super) fn turns(&self, len: i64, spans: &Spans) -> Result<Turns, ModelError> {
        // A panic in another thread can't leave half a table: it is replaced as a whole.
        let mut grown = self.grown.lock().unwrap_or_else(PoisonError::into_inner);
        let table = match grown.take() {
            Some(table) if table.cos.size().first().is_some_and(|&have| have >= len) => table,
            _ => {
                let positions = u64::try_from(len).unwrap_or(0).next_power_of_two().max(128);
                let positions = i64::try_from(positions).unwrap_or(len).min(self.max_positions).max(len);
                self.compute(positions).doing("compute rotary table")?
            }
        };
        let table = grown.insert(table);
        let of = |tensor: &Tensor| spans.of_table(tensor, len).doing("slice rotary table");
        Ok(Turns { cos: of(&table.cos)?, sin: of(&table.sin)? })
    }

    fn compute(&self, positions: i64) -> Result<Turns, tch::TchError> {
        let _no_grad = tch::no_grad_guard();
        let options = (Kind::Float, Device::Cpu);
        let exponents = Tensor::f_arange_start_step(0, self.width, 2, options)?.f_div_scalar(self.width as f64)?;
        let mut frequencies =
            Vec::<f32>::try_from(&Tensor::f_pow_scalar(self.rope.theta, &exponents)?.f_reciprocal()?)?;
        if let Some(scaling) = &self.rope.scaling {
            frequencies.iter_mut().for_each(|frequency| *frequency = stretch(*frequency, scaling));
        }
        let frequencies = Tensor::f_from_slice(&frequencies)?.f_unsqueeze(0)?;
        let angles = Tensor::f_arange(positions, options)?.f_unsqueeze(1)?.f_mul(&frequencies)?;
        let (cos, sin) = (angles.f_cos()?, angles.f_sin()?);
        let table = |first: &Tensor, second: &Tensor| {
            Tensor::f_cat(&[first, second], -1)?.f_unsqueeze(1)?.f_to_device(self.device)
        };
        Ok(Turns { cos: table(&cos, &cos)?, sin: table(&sin.f_neg()?, &sin)? })
    }
}

/// Llama 3.1's stretching of one frequency (radians per position); Hugging Face `_compute_llama3_parameters`.
fn stretch(frequency: f32, scaling: &Llama3Scaling) -> f32 {
    let context = f64::from(scaling.original_max_position_embeddings);
    let wavelength = (2.0 * std::f64::consts::PI) as f32 / frequency;
    if f64::from(wavelength) > context / scaling.low_freq_factor {
        return frequency / scaling.factor as f32;
    }
    if f64::from(wavelength) < context / scaling.high_freq_factor {
        return frequency;
    }
    let (low, high) = (scaling.low_freq_factor as f32, scaling.high_freq_factor as f32);
    let smooth = (context as f32 / wavelength - low) / (high - low);
    (1.0 - smooth) * frequency / scaling.factor as f32 + smooth * frequency
}
