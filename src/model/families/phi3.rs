//! Phi-3 (arXiv 2404.14219), Phi-3.5-mini and Phi-4-mini (arXiv 2503.01743): a Llama with fused projections, whose
//! rotary positions may cover a part of a head and may be LongRoPE's.
//!
//! LongRoPE has two sets of divisors, one for sequences within the original context and one for longer ones. The first
//! is used, and longer sequences are refused: their positions would be turned otherwise from the first one on.

use serde_json::Value;

use super::{Defaults, Family, Rotary, common, rotary};
use crate::model::{
    ModelError,
    decoder::config::{Context, DecoderConfig, MAX_POSITIONS, Rope, Scaling},
    keys::{Keys, shown},
};

pub(super) const FAMILY: Family = Family {
    model_type: "phi3",
    architectures: &["Phi3ForCausalLM"],
    computed: &["original_max_position_embeddings", "partial_rotary_factor", "sliding_window"],
    harmless: &[],
    rotary: Rotary::Long,
    read,
};

const DEFAULTS: Defaults = Defaults { max_position_embeddings: 4096, rms_norm_eps: 1e-5, ..Defaults::LLAMA };

fn read(keys: &Keys<'_>) -> Result<DecoderConfig, ModelError> {
    let original = keys.count("original_max_position_embeddings", Some(4096), MAX_POSITIONS)?;
    let longest = keys.count("max_position_embeddings", Some(DEFAULTS.max_position_embeddings), MAX_POSITIONS)?;
    let config = common(keys, &DEFAULTS, |head| rope(keys, head, original, longest))?;
    let window = keys.optional_count("sliding_window", None, MAX_POSITIONS)?;
    let is_long = config.ropes.iter().any(|rope| matches!(rope.scaling, Some(Scaling::Long { .. })));
    let context = match is_long && original < longest {
        true => Context { positions: original, key: "original_max_position_embeddings" },
        false => config.context,
    };
    let mut config = DecoderConfig { fused: true, context, ..config };
    config.layers.iter_mut().for_each(|layer| layer.window = window);
    Ok(config)
}

fn rope(keys: &Keys<'_>, head: u32, original: u32, longest: u32) -> Result<Rope, ModelError> {
    let Some((nested, path)) = rotary::object(keys) else {
        return rotary::same(keys, DEFAULTS.rope_theta, width(keys, head, None)?);
    };
    let inner = Keys { map: nested.as_object().ok_or_else(|| not_an_object(path))?, path };
    let width = width(keys, head, Some(&inner))?;
    let theta = keys.number("rope_theta", Some(DEFAULTS.rope_theta), rotary::THETA)?;
    // The earliest models have the first two names for it.
    let is_long = matches!(rotary::kind(&inner).and_then(Value::as_str), Some("su" | "yarn" | "longrope"));
    if !is_long {
        return rotary::nested(nested, path, theta, width);
    }
    let ratio = f64::from(longest) / f64::from(original);
    let factor = inner.number("factor", Some(ratio), 1e-6..=1e6)?;
    if factor != ratio {
        let reason = format!(
            "is {factor}, and max_position_embeddings over original_max_position_embeddings is {ratio}: versions of \
            transformers take the one or the other"
        );
        return Err(inner.wrong("factor", reason));
    }
    if inner.count("original_max_position_embeddings", Some(original), MAX_POSITIONS)? != original {
        return Err(inner.wrong("original_max_position_embeddings", "contradicts the one outside of it"));
    }
    let attention_factor = if ratio <= 1.0 { 1.0 } else { (1.0 + ratio.ln() / f64::from(original).ln()).sqrt() };
    divisors(&inner, "long_factor", width)?;
    let scaling = Scaling::Long { divisors: divisors(&inner, "short_factor", width)?, attention_factor };
    Ok(Rope { theta: inner.number("rope_theta", Some(theta), rotary::THETA)?, width, scaling: Some(scaling) })
}

fn not_an_object(path: &str) -> ModelError {
    ModelError::config(path.trim_end_matches('.'), "is neither an object nor null")
}

/// The width of a head's part that is turned.
fn width(keys: &Keys<'_>, head: u32, inner: Option<&Keys<'_>>) -> Result<u32, ModelError> {
    let range = 0.0..=1.0;
    let outer = keys.number("partial_rotary_factor", Some(1.0), range.clone())?;
    let (by, factor) = match inner {
        Some(inner) => (inner, inner.number("partial_rotary_factor", Some(outer), range)?),
        None => (keys, outer),
    };
    // Rounded down, as transformers does.
    let width = (f64::from(head) * factor) as u32;
    if width == 0 || !width.is_multiple_of(2) {
        let reason = format!("is {factor}, which turns {width} elements of a head; rotary embedding turns pairs");
        return Err(by.wrong("partial_rotary_factor", reason));
    }
    Ok(width)
}

/// LongRoPE's divisors: one for each pair.
fn divisors(keys: &Keys<'_>, key: &str, width: u32) -> Result<Vec<f64>, ModelError> {
    let value = keys.get(key).ok_or_else(|| keys.wrong(key, "is missing"))?;
    let positive = |value: &Value| value.as_f64().filter(|divisor| (1e-6..=1e6).contains(divisor));
    let divisors: Option<Vec<f64>> = value.as_array().and_then(|list| list.iter().map(positive).collect());
    match divisors {
        Some(divisors) if divisors.len() == width as usize / 2 => Ok(divisors),
        Some(divisors) => Err(keys.wrong(key, format!("has {} entries for {} pairs", divisors.len(), width / 2))),
        None => Err(keys.wrong(key, format!("is {}, not a list of positive numbers", shown(value)))),
    }
}
