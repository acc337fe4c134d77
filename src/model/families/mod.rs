//! The families of models that can be trained: what turns their `config.json` into the description of a decoder.
//!
//! A family is a [`Family`] in a file of its own and an entry in [`FAMILIES`]. It is found by the first known name in
//! `architectures`, or else by `model_type`. It reads its keys as transformers does: an absent key has the family's own
//! default, and both spellings of the rotary settings are known (that of transformers 4, `rope_theta` with
//! `rope_scaling`, and that of transformers 5, `rope_parameters`). A new run's description is restricted further:
//! [`check`] refuses every key that is neither computed nor harmless.

pub(super) mod check;
mod gemma3;
mod llama;
mod mistral;
mod olmo2;
mod phi3;
mod qwen;
mod rotary;
mod smollm3;
#[cfg(test)]
mod tests;

use serde_json::Value;

use super::{
    ModelError,
    decoder::config::{
        Activation, Biases, Context, DecoderConfig, LayerConfig, MAX_LAYERS, MAX_POSITIONS, MAX_VOCAB, MAX_WIDTH,
        NormScale, Placement, Rope,
    },
    keys::{Keys, shown},
};

/// One family.
pub(super) struct Family {
    /// Its `model_type`.
    pub model_type: &'static str,
    /// Its names in `architectures`, the usual one first.
    pub architectures: &'static [&'static str],
    /// The keys that it computes besides those that every family does.
    pub computed: &'static [&'static str],
    /// The keys that transformers writes for it, or has written, without reading them.
    pub harmless: &'static [&'static str],
    /// Where its rotary settings stand.
    pub rotary: Rotary,
    /// Reads its description.
    pub read: fn(&Keys<'_>) -> Result<DecoderConfig, ModelError>,
}

/// Where a family's rotary settings stand, and what may be among them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Rotary {
    /// All layers have the same ones.
    Same,
    /// So they have, and they may be LongRoPE's and cover a part of a head (Phi-3).
    Long,
    /// Layers with a window have their own (Gemma 3).
    ByLayerType,
}

/// All families.
pub(super) const FAMILIES: [&Family; 8] = [
    &llama::FAMILY,
    &mistral::FAMILY,
    &qwen::QWEN2,
    &qwen::QWEN3,
    &smollm3::FAMILY,
    &olmo2::FAMILY,
    &phi3::FAMILY,
    &gemma3::FAMILY,
];

/// Families that are known and refused: the names that say so, and why.
const REFUSED: [(&[&str], &str); 3] = [
    (
        &["gemma2", "Gemma2ForCausalLM"],
        "caps its attention scores (attn_logit_softcapping), which no fused attention kernel computes",
    ),
    (
        &[
            "mixtral",
            "MixtralForCausalLM",
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            "olmoe",
            "OlmoeForCausalLM",
            "phimoe",
            "PhimoeForCausalLM",
            "deepseek_v2",
            "DeepseekV2ForCausalLM",
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            "gpt_oss",
            "GptOssForCausalLM",
        ],
        "is a mixture of experts, and routers and experts are not computed here",
    ),
    (
        &[
            "gemma3",
            "Gemma3ForConditionalGeneration",
            "mistral3",
            "Mistral3ForConditionalGeneration",
            "qwen2_vl",
            "Qwen2VLForConditionalGeneration",
            "qwen2_5_vl",
            "Qwen2_5_VLForConditionalGeneration",
            "llava",
            "LlavaForConditionalGeneration",
        ],
        "takes images as well as text; export its text model to a folder of its own",
    ),
];

/// Reads a description of any family and checks it.
pub(super) fn read(config: &Value) -> Result<DecoderConfig, ModelError> {
    let keys = Keys::of(config)?;
    (of(&keys)?.read)(&keys)?.checked()
}

/// The family that a description is of.
pub(super) fn of(keys: &Keys<'_>) -> Result<&'static Family, ModelError> {
    let unnamed = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
    let (said, names): (String, Vec<&str>) = match (keys.get("architectures"), keys.get("model_type")) {
        (Some(Value::Array(names)), _) if !names.is_empty() => {
            let names: Vec<_> = names.iter().filter_map(Value::as_str).collect();
            (format!("{names:?}"), names)
        }
        (Some(other), _) if !unnamed(other) => (other.to_string(), Vec::new()),
        (_, Some(model_type)) => (model_type.to_string(), model_type.as_str().into_iter().collect()),
        (_, None) => ("no architecture".to_owned(), Vec::new()),
    };
    let by_type = keys.get("architectures").is_none_or(unnamed);
    let is_named = |family: &Family| match by_type {
        true => names.contains(&family.model_type),
        false => family.architectures.iter().any(|known| names.contains(known)),
    };
    FAMILIES.into_iter().find(|family| is_named(family)).ok_or_else(|| {
        let refused = REFUSED.iter().find(|(known, _)| known.iter().any(|known| names.contains(known)));
        let reason = refused.map_or("is not one of the families that are trained here", |(_, reason)| reason);
        ModelError::Architecture { found: said.chars().take(200).collect(), reason }
    })
}

/// The architectures of all families, each by its usual name.
pub(super) fn names() -> String {
    let names: Vec<&str> = FAMILIES.iter().filter_map(|family| family.architectures.first().copied()).collect();
    names.join(", ")
}

/// What a family's description has where a key is absent, and how it spells the activation.
struct Defaults {
    /// `None`: as many as query heads.
    key_value_heads: Option<u32>,
    /// `None`: the width of the residual stream, divided by the query heads.
    head_dim: Option<u32>,
    max_position_embeddings: u32,
    rms_norm_eps: f64,
    rope_theta: f64,
    tie_word_embeddings: bool,
    activation: (&'static str, &'static [&'static str], Activation),
}

impl Defaults {
    const LLAMA: Self = Self {
        key_value_heads: None,
        head_dim: None,
        max_position_embeddings: 2048,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        tie_word_embeddings: false,
        activation: ("hidden_act", &["silu", "swish"], Activation::Silu),
    };
}

/// A description of what all families have: a plain Llama without biases. `rope` reads the rotary settings for heads
/// of a width.
fn common(
    keys: &Keys<'_>,
    defaults: &Defaults,
    rope: impl FnOnce(u32) -> Result<Rope, ModelError>,
) -> Result<DecoderConfig, ModelError> {
    let (key, spellings, activation) = defaults.activation;
    keys.must_be(key, spellings)?;
    if keys.number("attention_dropout", Some(0.0), 0.0..=1.0)? != 0.0 {
        return Err(ModelError::config("attention_dropout", "is not 0, which is not supported"));
    }
    if keys.get("quantization_config").is_some() {
        return Err(ModelError::config("quantization_config", "is set; quantised weights can't be trained"));
    }
    let hidden_size = keys.count("hidden_size", None, MAX_WIDTH)?;
    let num_attention_heads = keys.count("num_attention_heads", None, MAX_WIDTH)?;
    let head_dim = match defaults.head_dim {
        None if keys.get("head_dim").is_none() && !hidden_size.is_multiple_of(num_attention_heads) => {
            let reason = format!(
                "{hidden_size} is not a multiple of num_attention_heads {num_attention_heads}, and there is no head_dim"
            );
            return Err(ModelError::config("hidden_size", reason));
        }
        None => keys.count("head_dim", Some(hidden_size / num_attention_heads), MAX_WIDTH)?,
        own => keys.count("head_dim", own, MAX_WIDTH)?,
    };
    let num_key_value_heads = keys.optional_count("num_key_value_heads", defaults.key_value_heads, MAX_WIDTH)?;
    let layers = keys.count("num_hidden_layers", None, MAX_LAYERS)?;
    Ok(DecoderConfig {
        vocab_size: keys.count("vocab_size", None, MAX_VOCAB)?,
        hidden_size,
        intermediate_size: keys.count("intermediate_size", None, MAX_WIDTH)?,
        num_attention_heads,
        num_key_value_heads: num_key_value_heads.unwrap_or(num_attention_heads),
        head_dim,
        context: Context {
            positions: keys.count("max_position_embeddings", Some(defaults.max_position_embeddings), MAX_POSITIONS)?,
            key: "max_position_embeddings",
        },
        rms_norm_eps: keys.number("rms_norm_eps", Some(defaults.rms_norm_eps), 0.0..=1.0)?,
        initializer_range: keys.number("initializer_range", Some(0.02), 0.0..=1.0)?,
        tie_word_embeddings: keys.flag("tie_word_embeddings", defaults.tie_word_embeddings)?,
        biases: Biases::default(),
        placement: Placement::Before,
        scale: NormScale::Plain,
        query_key_norm: None,
        activation,
        embedding_scale: None,
        attention_scale: None,
        fused: false,
        ropes: vec![rope(head_dim)?],
        layers: vec![LayerConfig { rope: Some(0), window: None }; layers as usize],
    })
}

/// Biases of all four projections of attention, as `attention_bias` says.
fn attention_biases(keys: &Keys<'_>) -> Result<Biases, ModelError> {
    let bias = keys.flag("attention_bias", false)?;
    Ok(Biases { inputs: bias, output: bias, mlp: false })
}

/// Whether each layer has a window, as `layer_types` says; `None`: it says nothing.
fn layer_types(keys: &Keys<'_>, layers: usize) -> Result<Option<Vec<bool>>, ModelError> {
    let Some(value) = keys.get("layer_types") else { return Ok(None) };
    let windowed = |layer: &Value| match layer.as_str() {
        Some("full_attention") => Some(false),
        Some("sliding_attention") => Some(true),
        _ => None,
    };
    let types: Option<Vec<bool>> = value.as_array().and_then(|types| types.iter().map(windowed).collect());
    match types {
        Some(types) if types.len() == layers => Ok(Some(types)),
        Some(types) => Err(keys.wrong("layer_types", format!("has {} entries for {layers} layers", types.len()))),
        None => {
            let reason = format!("is {}; only \"full_attention\" and \"sliding_attention\" are known", shown(value));
            Err(keys.wrong("layer_types", reason))
        }
    }
}

/// Gives the layers that are to have a window the one of `sliding_window`. `window` is its value where it counts.
fn set_windows(
    keys: &Keys<'_>,
    config: &mut DecoderConfig,
    windowed: &[bool],
    window: Option<u32>,
) -> Result<(), ModelError> {
    for (layer, &windowed) in config.layers.iter_mut().zip(windowed) {
        if windowed && window.is_none() {
            return Err(keys.wrong("layer_types", "has layers with \"sliding_attention\", and no window is in use"));
        }
        layer.window = if windowed { window } else { None };
    }
    Ok(())
}
