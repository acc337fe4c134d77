//! SmolLM3 (Hugging Face, 2025): a Llama in which every fourth layer has no rotary positions (arXiv 2501.18795).

use serde_json::Value;

use super::{Defaults, Family, Rotary, attention_biases, common, layer_types, rotary, set_windows};
use crate::model::{
    ModelError,
    decoder::config::{Biases, DecoderConfig, MAX_LAYERS, MAX_POSITIONS},
    keys::{Keys, shown},
};

pub(super) const FAMILY: Family = Family {
    model_type: "smollm3",
    architectures: &["SmolLM3ForCausalLM"],
    computed: &[
        "attention_bias",
        "layer_types",
        "mlp_bias",
        "no_rope_layer_interval",
        "no_rope_layers",
        "sliding_window",
        "use_sliding_window",
    ],
    harmless: &["is_llama_config", "max_window_layers"],
    rotary: Rotary::Same,
    read,
};

const DEFAULTS: Defaults = Defaults {
    key_value_heads: Some(4),
    max_position_embeddings: 32_768,
    rope_theta: 2_000_000.0,
    tie_word_embeddings: true,
    ..Defaults::LLAMA
};

fn read(keys: &Keys<'_>) -> Result<DecoderConfig, ModelError> {
    let mut config = common(keys, &DEFAULTS, |width| rotary::same(keys, DEFAULTS.rope_theta, width))?;
    config.biases = Biases { mlp: keys.flag("mlp_bias", false)?, ..attention_biases(keys)? };
    let layers = config.layers.len();
    let turned = turned(keys, layers)?;
    for (layer, &turned) in config.layers.iter_mut().zip(&turned) {
        layer.rope = turned.then_some(0);
    }
    let window = keys.optional_count("sliding_window", None, MAX_POSITIONS)?;
    let window = if keys.flag("use_sliding_window", false)? { window } else { None };
    let by_rope = || turned.iter().map(|turned| window.is_some() && !turned).collect();
    let windowed = layer_types(keys, layers)?.unwrap_or_else(by_rope);
    set_windows(keys, &mut config, &windowed, window)?;
    Ok(config)
}

/// Whether each layer has rotary positions. The list counts where there is one, as in transformers.
fn turned(keys: &Keys<'_>, layers: usize) -> Result<Vec<bool>, ModelError> {
    let interval = keys.count("no_rope_layer_interval", Some(4), MAX_LAYERS)? as usize;
    let Some(value) = keys.get("no_rope_layers") else {
        return Ok((1..=layers).map(|layer| layer % interval != 0).collect());
    };
    let turned = |layer: &Value| match layer.as_u64() {
        Some(0) => Some(false),
        Some(1) => Some(true),
        _ => None,
    };
    let listed: Option<Vec<bool>> = value.as_array().and_then(|list| list.iter().map(turned).collect());
    match listed {
        Some(listed) if listed.len() >= layers => Ok(listed.into_iter().take(layers).collect()),
        Some(listed) => Err(keys.wrong("no_rope_layers", format!("has {} entries for {layers} layers", listed.len()))),
        None => Err(keys.wrong("no_rope_layers", format!("is {}, not a list of 0 and 1", shown(value)))),
    }
}
