//! Rotary settings in both spellings.

use std::ops::RangeInclusive;

use serde_json::Value;

use crate::model::{
    ModelError,
    decoder::config::{Llama3Scaling, MAX_POSITIONS, Rope, Scaling},
    keys::Keys,
};

/// Bases of the rotary wavelengths.
pub(super) const THETA: RangeInclusive<f64> = 1.0..=1e15;

/// The object of settings that counts, and its key with a dot: transformers 5 writes the first, transformers 4 the
/// second.
pub(super) fn object<'a>(keys: &Keys<'a>) -> Option<(&'a Value, &'static str)> {
    let first = keys.get("rope_parameters").map(|nested| (nested, "rope_parameters."));
    first.or_else(|| keys.get("rope_scaling").map(|nested| (nested, "rope_scaling.")))
}

/// The settings of a family whose layers all have the same ones. `theta` holds if the document names none.
pub(super) fn same(keys: &Keys<'_>, theta: f64, width: u32) -> Result<Rope, ModelError> {
    let theta = keys.number("rope_theta", Some(theta), THETA)?;
    match object(keys) {
        Some((value, path)) => nested(value, path, theta, width),
        None => Ok(Rope { theta, width, scaling: None }),
    }
}

/// The type that an object names.
pub(super) fn kind<'a>(keys: &Keys<'a>) -> Option<&'a Value> {
    keys.get("rope_type").or_else(|| keys.get("type"))
}

/// The content of the object `nested`; `path` is its key with a dot, `theta` holds if it names none.
pub(super) fn nested(nested: &Value, path: &'static str, theta: f64, width: u32) -> Result<Rope, ModelError> {
    let map = nested
        .as_object()
        .ok_or_else(|| ModelError::config(path.trim_end_matches('.'), "is neither an object nor null"))?;
    let keys = Keys { map, path };
    let theta = keys.number("rope_theta", Some(theta), THETA)?;
    let scaling = match kind(&keys).map(|kind| (kind, kind.as_str())) {
        None | Some((_, Some("default"))) => None,
        Some((_, Some("linear"))) => Some(Scaling::Linear { factor: keys.number("factor", None, 1.0..=1e6)? }),
        Some((_, Some("llama3"))) => {
            let scaling = Llama3Scaling {
                factor: keys.number("factor", None, 1.0..=1e6)?,
                low_freq_factor: keys.number("low_freq_factor", None, 1e-6..=1e6)?,
                high_freq_factor: keys.number("high_freq_factor", None, 1e-6..=1e6)?,
                original_max_position_embeddings: keys.count(
                    "original_max_position_embeddings",
                    None,
                    MAX_POSITIONS,
                )?,
            };
            if scaling.high_freq_factor <= scaling.low_freq_factor {
                return Err(keys.wrong("high_freq_factor", "is not above low_freq_factor"));
            }
            Some(Scaling::Llama3(scaling))
        }
        Some((kind, _)) => {
            let kind: String = kind.to_string().chars().take(80).collect();
            let reason = format!("is {kind}; \"default\", \"linear\" and \"llama3\" are supported");
            return Err(keys.wrong("rope_type", reason));
        }
    };
    Ok(Rope { theta, width, scaling })
}
