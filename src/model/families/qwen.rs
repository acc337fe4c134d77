//! Qwen 2 and 2.5 (arXiv 2412.15115), which are Llamas with biases on queries, keys and values; Qwen 3 (arXiv
//! 2505.09388), which has norms of each head's queries and keys instead. The dense models only.

use super::{Defaults, Family, Rotary, attention_biases, common, layer_types, rotary, set_windows};
use crate::model::{
    ModelError,
    decoder::config::{Biases, DecoderConfig, MAX_LAYERS, MAX_POSITIONS, QueryKeyNorm},
    keys::Keys,
};

pub(super) const QWEN2: Family = Family {
    model_type: "qwen2",
    architectures: &["Qwen2ForCausalLM"],
    computed: &WINDOWS,
    harmless: &[],
    rotary: Rotary::Same,
    read: |keys| {
        let biases = Biases { inputs: true, output: false, mlp: false };
        Ok(DecoderConfig { biases, ..read(keys, &DEFAULTS)? })
    },
};

pub(super) const QWEN3: Family = Family {
    model_type: "qwen3",
    architectures: &["Qwen3ForCausalLM"],
    computed: &["attention_bias", "layer_types", "max_window_layers", "sliding_window", "use_sliding_window"],
    harmless: &[],
    rotary: Rotary::Same,
    read: |keys| {
        let config = read(keys, &Defaults { head_dim: Some(128), ..DEFAULTS })?;
        let query_key_norm = Some(QueryKeyNorm::Head);
        Ok(DecoderConfig { biases: attention_biases(keys)?, query_key_norm, ..config })
    },
};

/// Which layers have a window.
const WINDOWS: [&str; 4] = ["layer_types", "max_window_layers", "sliding_window", "use_sliding_window"];

const DEFAULTS: Defaults = Defaults { key_value_heads: Some(32), max_position_embeddings: 32_768, ..Defaults::LLAMA };

fn read(keys: &Keys<'_>, defaults: &Defaults) -> Result<DecoderConfig, ModelError> {
    let mut config = common(keys, defaults, |width| rotary::same(keys, defaults.rope_theta, width))?;
    // Read where it does not count, too: a value that makes no sense is refused.
    let window = keys.optional_count("sliding_window", Some(4096), MAX_POSITIONS)?;
    let window = window.filter(|_| matches!(keys.flag("use_sliding_window", false), Ok(true)));
    keys.flag("use_sliding_window", false)?;
    let first = match keys.get("max_window_layers").and_then(serde_json::Value::as_u64) {
        Some(0) => 0,
        _ => keys.count("max_window_layers", Some(28), MAX_LAYERS)?,
    };
    let layers = config.layers.len();
    let by_index = || (0..layers).map(|layer| window.is_some() && layer >= first as usize).collect();
    let windowed = layer_types(keys, layers)?.unwrap_or_else(by_index);
    set_windows(keys, &mut config, &windowed, window)?;
    Ok(config)
}
