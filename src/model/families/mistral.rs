//! Mistral 7B (Jiang et al., arXiv 2310.06825), Mistral Nemo and their relatives with dense layers: a Llama whose
//! layers all have the same window, or none, and whose heads may be of any width.

use super::{Defaults, Family, Rotary, common, rotary};
use crate::model::{
    ModelError,
    decoder::config::{DecoderConfig, MAX_POSITIONS},
    keys::Keys,
};

pub(super) const FAMILY: Family = Family {
    model_type: "mistral",
    architectures: &["MistralForCausalLM"],
    computed: &["sliding_window"],
    harmless: &[],
    rotary: Rotary::Same,
    read,
};

const DEFAULTS: Defaults = Defaults { key_value_heads: Some(8), max_position_embeddings: 131_072, ..Defaults::LLAMA };

fn read(keys: &Keys<'_>) -> Result<DecoderConfig, ModelError> {
    let mut config = common(keys, &DEFAULTS, |width| rotary::same(keys, DEFAULTS.rope_theta, width))?;
    let window = keys.optional_count("sliding_window", Some(4096), MAX_POSITIONS)?;
    if window.is_some() && keys.get("layer_types").is_some() {
        let reason = "is set, and so is sliding_window: transformers gives every layer of this model the window, \
                      whatever its type; remove one of them";
        return Err(keys.wrong("layer_types", reason));
    }
    config.layers.iter_mut().for_each(|layer| layer.window = window);
    Ok(config)
}
