//! Llama 2 and 3.x (Touvron et al., arXiv 2302.13971), and every model that says it is one.

use super::{Defaults, Family, Rotary, attention_biases, common, rotary};
use crate::model::{
    ModelError,
    decoder::config::{Biases, DecoderConfig},
    keys::Keys,
};

pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    // The second is its spelling in the first conversions.
    architectures: &["LlamaForCausalLM", "LLaMAForCausalLM"],
    computed: &["attention_bias", "mlp_bias"],
    harmless: &["is_llama_config"],
    rotary: Rotary::Same,
    read,
};

fn read(keys: &Keys<'_>) -> Result<DecoderConfig, ModelError> {
    let config = common(keys, &Defaults::LLAMA, |width| rotary::same(keys, Defaults::LLAMA.rope_theta, width))?;
    let biases = Biases { mlp: keys.flag("mlp_bias", false)?, ..attention_biases(keys)? };
    Ok(DecoderConfig { biases, ..config })
}
