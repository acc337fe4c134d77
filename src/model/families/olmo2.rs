//! OLMo 2 (arXiv 2501.00656): norms after attention and after the feed-forward layer, none before them; norms over all
//! queries and over all keys.

use super::{Defaults, Family, Rotary, attention_biases, common, rotary};
use crate::model::{
    ModelError,
    decoder::config::{DecoderConfig, NormScale, Placement, QueryKeyNorm},
    keys::Keys,
};

pub(super) const FAMILY: Family = Family {
    model_type: "olmo2",
    architectures: &["Olmo2ForCausalLM"],
    computed: &["attention_bias"],
    harmless: &[],
    rotary: Rotary::Same,
    read,
};

const DEFAULTS: Defaults = Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA };

fn read(keys: &Keys<'_>) -> Result<DecoderConfig, ModelError> {
    let config = common(keys, &DEFAULTS, |width| rotary::same(keys, DEFAULTS.rope_theta, width))?;
    Ok(DecoderConfig {
        biases: attention_biases(keys)?,
        placement: Placement::After,
        scale: NormScale::Exact,
        query_key_norm: Some(QueryKeyNorm::Whole),
        ..config
    })
}
