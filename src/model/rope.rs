//! Rotary position embedding (Su et al., arXiv 2104.09864) in Hugging Face's layout: element i of a head is turned
//! together with element i + width/2, where the width is that of the part that is turned, at the head's beginning.
//!
//! Cosines and sines are computed in fp32 on the CPU, with the same operations as Hugging Face's, and then moved to the
//! device; the turning is done in fp32 at any model precision, because bf16 loses positions in long sequences (arXiv
//! 2411.13476). The table grows to the longest sequence seen.

use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, Tensor};

use super::{
    Doing, ModelError, Spans,
    decoder::config::{Llama3Scaling, Rope, Scaling},
    weight::refused,
};
use crate::torch::fused;

/// Cosines and sines, fp32 `[T, 1, width]` or `[batch, T, 1, width]`: they broadcast over `[batch, T, heads, width]`.
pub(super) struct Turns {
    cos: Tensor,
    /// With the sign of each half's partner: minus in the first half, plus in the second.
    sin: Tensor,
    /// Elements of a head that are turned, and those of the whole head.
    width: i64,
    head: i64,
}

impl Turns {
    /// Turns `x` `[batch, T, heads, head]`; the result has the type of `x`. `fused`: in one pass.
    ///
    /// Hugging Face writes `x·cos + cat(-x₂, x₁)·sin`; with the sign within the table that is a rotation by half the
    /// width, and a product is saved.
    pub(super) fn apply(&self, x: &Tensor, fused: bool) -> Result<Tensor, tch::TchError> {
        if fused {
            return fused::rotate(x, &self.cos, &self.sin).map_err(refused);
        }
        if self.width == self.head {
            return self.turned(x);
        }
        let kept = x.f_narrow(-1, self.width, self.head - self.width)?;
        Tensor::f_cat(&[self.turned(&x.f_narrow(-1, 0, self.width)?)?, kept], -1)
    }

    fn turned(&self, x: &Tensor) -> Result<Tensor, tch::TchError> {
        let partner = x.f_roll(self.width / 2, -1_i64)?;
        x.f_mul(&self.cos)?.f_addcmul(&partner, &self.sin)?.f_to_kind(x.f_kind()?)
    }
}

/// The table of one rotary embedding.
pub(super) struct RopeTable {
    rope: Rope,
    width: i64,
    head: i64,
    max_positions: i64,
    device: Device,
    grown: Mutex<Option<Turns>>,
}

impl RopeTable {
    /// For heads of width `head`, and at most `positions` positions.
    pub(super) fn new(rope: Rope, head: u32, positions: u32, device: Device) -> Self {
        Self {
            width: rope.width.into(),
            head: head.into(),
            max_positions: positions.into(),
            device,
            rope,
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
                let [len, most] = [len, self.max_positions].map(|count| u64::try_from(count).unwrap_or(0));
                let positions = i64::try_from(positions(len, most)).unwrap_or(i64::MAX);
                self.compute(positions).doing("compute rotary table")?
            }
        };
        let table = grown.insert(table);
        let of = |tensor: &Tensor| spans.of_table(tensor, len).doing("slice rotary table");
        Ok(Turns { cos: of(&table.cos)?, sin: of(&table.sin)?, width: self.width, head: self.head })
    }

    fn compute(&self, positions: i64) -> Result<Turns, tch::TchError> {
        let _no_grad = tch::no_grad_guard();
        let options = (Kind::Float, Device::Cpu);
        let exponents = Tensor::f_arange_start_step(0, self.width, 2, options)?.f_div_scalar(self.width as f64)?;
        let mut wavelengths = Tensor::f_pow_scalar(self.rope.theta, &exponents)?;
        if let Some(Scaling::Long { divisors, .. }) = &self.rope.scaling {
            let divisors: Vec<f32> = divisors.iter().map(|&divisor| divisor as f32).collect();
            wavelengths = Tensor::f_from_slice(&divisors)?.f_mul(&wavelengths)?;
        }
        let mut frequencies = Vec::<f32>::try_from(&wavelengths.f_reciprocal()?)?;
        match &self.rope.scaling {
            None | Some(Scaling::Long { .. }) => {}
            Some(Scaling::Linear { factor }) => {
                frequencies.iter_mut().for_each(|frequency| *frequency /= *factor as f32);
            }
            Some(Scaling::Llama3(scaling)) => {
                frequencies.iter_mut().for_each(|frequency| *frequency = stretch(*frequency, scaling));
            }
        }
        let frequencies = Tensor::f_from_slice(&frequencies)?.f_unsqueeze(0)?;
        let angles = Tensor::f_arange(positions, options)?.f_unsqueeze(1)?.f_mul(&frequencies)?;
        let (mut cos, mut sin) = (angles.f_cos()?, angles.f_sin()?);
        if let Some(Scaling::Long { attention_factor, .. }) = self.rope.scaling {
            (cos, sin) = (cos.f_mul_scalar(attention_factor)?, sin.f_mul_scalar(attention_factor)?);
        }
        let table = |first: &Tensor, second: &Tensor| {
            Tensor::f_cat(&[first, second], -1)?.f_unsqueeze(1)?.f_to_device(self.device)
        };
        let (cos, sin) = (table(&cos, &cos)?, table(&sin.f_neg()?, &sin)?);
        Ok(Turns { cos, sin, width: self.width, head: self.head })
    }
}

/// The positions of a table that is made for sequences of `len`, of a model that has `most`.
pub(super) fn positions(len: u64, most: u64) -> u64 {
    len.next_power_of_two().max(128).min(most).max(len)
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
