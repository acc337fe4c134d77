//! Gemma 3's text models (arXiv 2503.19786): norms around attention and the feed-forward layer that scale by one plus
//! their weight, norms of each head's queries and keys, scaled embeddings; layers with a window, which have rotary
//! settings of their own, and layers without.

use serde_json::{Map, Value};

use super::{Defaults, Family, Rotary, attention_biases, common, layer_types, rotary, set_windows};
use crate::model::{
    ModelError,
    decoder::config::{Activation, DecoderConfig, MAX_LAYERS, MAX_POSITIONS, NormScale, Placement, QueryKeyNorm, Rope},
    keys::Keys,
};

pub(super) const FAMILY: Family = Family {
    model_type: "gemma3_text",
    architectures: &["Gemma3ForCausalLM"],
    computed: &[
        "_sliding_window_pattern",
        "attention_bias",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "hidden_activation",
        "layer_types",
        "query_pre_attn_scalar",
        "rope_local_base_freq",
        "sliding_window",
        "sliding_window_pattern",
        "use_bidirectional_attention",
    ],
    harmless: &["cache_implementation"],
    rotary: Rotary::ByLayerType,
    read,
};

const DEFAULTS: Defaults = Defaults {
    key_value_heads: Some(4),
    head_dim: Some(256),
    max_position_embeddings: 131_072,
    rope_theta: 1_000_000.0,
    tie_word_embeddings: true,
    activation: ("hidden_activation", &["gelu_pytorch_tanh"], Activation::GeluTanh),
    ..Defaults::LLAMA
};

/// Base of the wavelengths in layers with a window.
const LOCAL_THETA: f64 = 10_000.0;

/// The settings of all layers without a window and of all layers with one.
pub(super) const FULL: &str = "rope_parameters.full_attention.";
pub(super) const SLIDING: &str = "rope_parameters.sliding_attention.";

fn read(keys: &Keys<'_>) -> Result<DecoderConfig, ModelError> {
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if keys.get(key).is_some() {
            return Err(keys.wrong(key, "is set; capped scores are not computed here"));
        }
    }
    if keys.flag("use_bidirectional_attention", false)? {
        return Err(
            keys.wrong("use_bidirectional_attention", "is true; only attention to earlier positions is trained")
        );
    }
    // The key of other families. Gemma's own counts.
    if keys.get("hidden_act").is_some_and(|value| value != "gelu_pytorch_tanh") {
        return Err(keys.wrong("hidden_act", "contradicts this family's hidden_activation, \"gelu_pytorch_tanh\""));
    }
    let config = common(keys, &DEFAULTS, |width| full(keys, width))?;
    let sliding = sliding(keys, config.head_dim)?;
    let scalar = keys.number("query_pre_attn_scalar", Some(256.0), 1e-6..=1e9)?;
    let mut config = DecoderConfig {
        biases: attention_biases(keys)?,
        placement: Placement::Around,
        scale: NormScale::PlusOne,
        query_key_norm: Some(QueryKeyNorm::Head),
        embedding_scale: Some(f64::from(config.hidden_size).sqrt()),
        attention_scale: Some(scalar.powf(-0.5)),
        ropes: config.ropes.into_iter().chain([sliding]).collect(),
        ..config
    };
    let window = keys.optional_count("sliding_window", Some(4096), MAX_POSITIONS)?;
    let layers = config.layers.len();
    let windowed = match layer_types(keys, layers)? {
        Some(types) => types,
        None => {
            let pattern = keys.count("sliding_window_pattern", Some(6), MAX_LAYERS)?;
            // Written by versions that also write layer_types, and read by none.
            let unread = keys.count("_sliding_window_pattern", Some(pattern), MAX_LAYERS)?;
            if unread != pattern {
                return Err(keys.wrong("_sliding_window_pattern", "has no effect without layer_types; remove it"));
            }
            (1..=layers).map(|layer| layer % pattern as usize != 0).collect()
        }
    };
    set_windows(keys, &mut config, &windowed, window)?;
    for (layer, &windowed) in config.layers.iter_mut().zip(&windowed) {
        layer.rope = Some(usize::from(windowed));
    }
    Ok(config)
}

/// `rope_parameters`, an object of objects.
pub(super) fn parameters<'a>(keys: &Keys<'a>) -> Result<Option<&'a Map<String, Value>>, ModelError> {
    let Some(value) = keys.get("rope_parameters") else { return Ok(None) };
    let map = value.as_object().ok_or_else(|| keys.wrong("rope_parameters", "is neither an object nor null"))?;
    let inner = Keys { map, path: "rope_parameters." };
    match map.keys().find(|key| !["full_attention", "sliding_attention"].contains(&key.as_str())) {
        None => Ok(Some(map)),
        Some(key) => {
            let reason = "is not of a layer type: this family has settings for full_attention and sliding_attention";
            Err(inner.wrong(key, reason))
        }
    }
}

fn of_type<'a>(keys: &Keys<'a>, layer_type: &str) -> Result<Option<&'a Value>, ModelError> {
    Ok(parameters(keys)?.and_then(|map| map.get(layer_type)).filter(|value| !value.is_null()))
}

/// The rotary settings of layers without a window.
fn full(keys: &Keys<'_>, width: u32) -> Result<Rope, ModelError> {
    let theta = keys.number("rope_theta", Some(DEFAULTS.rope_theta), rotary::THETA)?;
    match (of_type(keys, "full_attention")?, keys.get("rope_scaling")) {
        (Some(nested), _) => rotary::nested(nested, FULL, theta, width),
        (None, Some(nested)) => rotary::nested(nested, "rope_scaling.", theta, width),
        (None, None) => Ok(Rope { theta, width, scaling: None }),
    }
}

/// The rotary settings of layers with a window, which no version stretches.
fn sliding(keys: &Keys<'_>, width: u32) -> Result<Rope, ModelError> {
    let theta = keys.number("rope_local_base_freq", Some(LOCAL_THETA), rotary::THETA)?;
    let Some(nested) = of_type(keys, "sliding_attention")? else { return Ok(Rope { theta, width, scaling: None }) };
    let rope = rotary::nested(nested, SLIDING, theta, width)?;
    match rope.scaling {
        None => Ok(rope),
        Some(_) => Err(ModelError::config(
            format!("{SLIDING}rope_type"),
            "is not \"default\", which transformers 4 can't express for layers with a window",
        )),
    }
}
