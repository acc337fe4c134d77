//! Causal attention, over everything before a position or over a window that ends with it.
//!
//! A window is computed in pieces: a piece of queries sees only the keys that its windows reach, so that time and
//! memory grow with length × window. The first window of positions sees all of the positions before it, as without a
//! window; every later piece has the same mask, because a window moves along with its query.
//!
//! The masks are constants of the description, made when they are first needed.

use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, TchError, Tensor};

use super::{config::DecoderConfig, kind};
use crate::{
    config::Precision,
    model::{BuildSettings, Spans},
};

/// Queries of a windowed layer that are computed at once, at most.
const PIECE: i64 = 1024;

/// Attention of one model.
pub(super) struct Attention {
    heads: i64,
    shared: i64,
    scale: Option<f64>,
    device: Device,
    precision: Precision,
    /// By window.
    masks: Mutex<Vec<(i64, Tensor)>>,
}

impl Attention {
    pub fn new(config: &DecoderConfig, settings: &BuildSettings) -> Self {
        Self {
            heads: config.num_attention_heads.into(),
            shared: config.num_key_value_heads.into(),
            scale: config.attention_scale,
            device: settings.device,
            precision: settings.precision,
            masks: Mutex::default(),
        }
    }

    /// Attention of queries `[batch, T, heads, width]` to keys and values `[batch, T, shared heads, width]`, within
    /// each document: `[batch, T, heads, width]`. `window`: the number of positions that one attends to, itself among
    /// them.
    pub fn mix(
        &self,
        [query, mut key, mut value]: [Tensor; 3],
        window: Option<u32>,
        spans: &Spans,
    ) -> Result<Tensor, TchError> {
        let (_, len, ..) = query.size4()?;
        let window = window.map(i64::from).filter(|&window| window < len);
        let shared = self.shared != self.heads;
        // On a GPU the fused kernels for fp32, and those that take a mask, don't share heads, and the fallback would
        // keep all T x T scores.
        let repeat = shared && self.device.is_cuda() && (self.precision == Precision::Fp32 || window.is_some());
        if repeat {
            key = repeat_heads(&key, self.heads / self.shared)?;
            value = repeat_heads(&value, self.heads / self.shared)?;
        }
        let plain = |query: &Tensor, key: &Tensor, value: &Tensor, mask: Option<&Tensor>| {
            let shares = shared && !repeat;
            Tensor::f_scaled_dot_product_attention(query, key, value, mask, 0.0, mask.is_none(), self.scale, shares)
        };
        spans.attend([&query, &key, &value], |[query, key, value]| {
            let [query, key, value] = [query.f_transpose(1, 2)?, key.f_transpose(1, 2)?, value.f_transpose(1, 2)?];
            let mixed = match window {
                Some(window) if window < query.size4()?.2 => self.windowed([&query, &key, &value], window, plain)?,
                _ => plain(&query, &key, &value, None)?,
            };
            mixed.f_transpose(1, 2)
        })
    }

    /// The kernel that LibTorch chooses for attention within documents of `len` tokens, without a window, in training.
    pub fn kernel(&self, len: i64, width: i64) -> Result<&'static str, TchError> {
        let repeats = self.device.is_cuda() && self.precision == Precision::Fp32;
        let shared = if repeats { self.heads } else { self.shared };
        let make = |heads: i64| {
            let zeros = Tensor::f_zeros([1, len, heads, width], (kind(self.precision), self.device))?;
            zeros.f_set_requires_grad(true)?.f_transpose(1, 2)
        };
        let (query, key, value) = (make(self.heads)?, make(shared)?, make(shared)?);
        let shares = shared != self.heads;
        let chosen =
            Tensor::f_internal_fused_sdp_choice(&query, &key, &value, None::<&Tensor>, 0.0, true, self.scale, shares)?;
        // at::SDPBackend.
        Ok(match chosen {
            0 => "math",
            1 => "flash",
            2 => "efficient",
            3 => "cudnn",
            _ => "none",
        })
    }

    /// Attention over a window shorter than the document, in pieces; all tensors are `[batch, heads, T, width]`.
    fn windowed(
        &self,
        [query, key, value]: [&Tensor; 3],
        window: i64,
        attend: impl Fn(&Tensor, &Tensor, &Tensor, Option<&Tensor>) -> Result<Tensor, TchError>,
    ) -> Result<Tensor, TchError> {
        let (_, _, len, _) = query.size4()?;
        let mask = self.mask(window)?;
        let part = |x: &Tensor, begin: i64, end: i64| x.f_narrow(2, begin, end - begin);
        let mut pieces =
            vec![attend(&part(query, 0, window)?, &part(key, 0, window)?, &part(value, 0, window)?, None)?];
        let mut begin = window;
        while begin < len {
            let end = len.min(begin + piece(window));
            let first = begin - window + 1;
            let mask = mask.f_narrow(0, 0, end - begin)?.f_narrow(1, 0, end - first)?;
            let (key, value) = (part(key, first, end)?, part(value, first, end)?);
            pieces.push(attend(&part(query, begin, end)?, &key, &value, Some(&mask))?);
            begin = end;
        }
        Tensor::f_cat(&pieces, 2)
    }

    /// Zero where a query of a piece attends to a key, and minus infinity elsewhere. Query `i` attends to the `window`
    /// keys from `i` on: the first key is the one that the first query's window begins with.
    fn mask(&self, window: i64) -> Result<Tensor, TchError> {
        // A panic in another thread can't leave half a mask.
        let mut masks = self.masks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, mask)) = masks.iter().find(|(known, _)| *known == window) {
            return Ok(mask.shallow_clone());
        }
        let _no_grad = tch::no_grad_guard();
        let extents = mask_extents(window);
        let inside = Tensor::f_ones(extents, (Kind::Bool, Device::Cpu))?.f_triu(0)?.f_tril(window - 1)?;
        let outside = Tensor::f_full(extents, f64::NEG_INFINITY, (kind(self.precision), Device::Cpu))?;
        let mask = outside.f_masked_fill(&inside, 0.0)?.f_to_device(self.device)?;
        masks.push((window, mask.shallow_clone()));
        Ok(mask)
    }
}

/// Queries and keys of a window's mask.
const fn mask_extents(window: i64) -> [i64; 2] {
    [piece(window), piece(window) + window - 1]
}

/// Elements of the mask of a window that is shorter than the sequences.
pub(in crate::model) const fn mask_elements(window: i64) -> u64 {
    let [queries, keys] = mask_extents(window);
    (queries * keys).unsigned_abs()
}

/// Queries of a piece.
const fn piece(window: i64) -> i64 {
    if window < PIECE { window } else { PIECE }
}

/// `[batch, T, shared, width]` to `[batch, T, shared * times, width]`, each head `times` times in a row.
pub(super) fn repeat_heads(x: &Tensor, times: i64) -> Result<Tensor, TchError> {
    let (batch, len, shared, width) = x.size4()?;
    x.f_unsqueeze(3)?.f_expand([batch, len, shared, times, width], false)?.f_reshape([
        batch,
        len,
        shared * times,
        width,
    ])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::families;

    /// Against all scores at once, for windows below and above the size of a piece, and for documents of one row.
    #[test]
    fn pieces_of_a_window_are_the_window() {
        tch::set_num_threads(1);
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        });
        let settings = BuildSettings { device: Device::Cpu, precision: Precision::Fp32, seed: None };
        let attention = Attention::new(&families::read(&config).unwrap(), &settings);
        let random = |name: &str, len: i64, heads: i64| {
            let count = (len * heads * 2) as usize;
            let values = crate::model::random::normal(5, name, count, 1.0);
            Tensor::f_from_slice(&values).unwrap().f_view([1, len, heads, 2]).unwrap()
        };
        for (window, len) in [(1, 4), (3, 3), (3, 4), (3, 6), (3, 11), (1023, 2050), (1100, 2500)] {
            let inputs = [random("q", len, 4), random("k", len, 2), random("v", len, 2)];
            let [query, key, value] = inputs.each_ref().map(|x| x.f_transpose(1, 2).unwrap());
            let all = Tensor::f_ones([len, len], (Kind::Bool, Device::Cpu)).unwrap();
            let mask = all.f_tril(0).unwrap().f_triu(1 - window).unwrap();
            let expected =
                Tensor::f_scaled_dot_product_attention(&query, &key, &value, Some(&mask), 0.0, false, None, true);
            let expected = expected.unwrap().f_transpose(1, 2).unwrap();
            let mixed = attention.mix(inputs, Some(window as u32), &Spans::whole()).unwrap();
            let far = mixed.f_sub(&expected).unwrap().f_abs().unwrap().f_max().unwrap().f_double_value(&[]).unwrap();
            assert!(far < 1e-6, "a window of {window} over {len}: {far:e}");
        }
    }
}
