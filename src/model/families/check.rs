//! The accepted descriptions of a new run's model: each key of a `config.json` is computed, harmless, or refused by
//! name.
//!
//! An unknown key may change the mathematics, so that a run would train a different model from the one that other
//! programs build from its checkpoints. Existing runs were checked when they were created: they keep their description.

use serde_json::{Map, Value};

use super::{Family, Rotary, gemma3, of, rotary};
use crate::model::{
    ModelError,
    keys::{Keys, shown},
};

/// Keys that every family reads.
pub(super) const COMPUTED: [&str; 18] = [
    "architectures",
    "attention_dropout",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
];

/// Keys that don't affect the mathematics of training, whatever their value.
pub(super) const HARMLESS: [&str; 72] = [
    // Where it comes from, and who wrote it.
    "_commit_hash",
    "_model_name_or_path",
    "_name_or_path",
    "model_max_length",
    "max_sequence_length",
    "name_or_path",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    // How it is stored and run.
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_flash_attn_2_enabled",
    "attn_implementation",
    "dtype",
    "gradient_checkpointing",
    "output_attentions",
    "output_hidden_states",
    "pretraining_tp",
    "return_dict",
    "tf_legacy_loss",
    "torch_dtype",
    "torchscript",
    "use_bfloat16",
    "use_cache",
    "use_flash_attention",
    "use_return_dict",
    // Tokens, which the data has.
    "bos_token",
    "bos_token_id",
    "cls_token_id",
    "decoder_start_token_id",
    "eos_token",
    "eos_token_id",
    "pad_token",
    "pad_token_id",
    "prefix",
    "sep_token_id",
    "tokenizer_class",
    "unk_token_id",
    // Other heads and tasks.
    "classifier_dropout",
    "finetuning_task",
    "id2label",
    "is_decoder",
    "label2id",
    "num_labels",
    "problem_type",
    "task_specific_params",
    // Text generation.
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
];

/// Numbers that have no effect at this one value.
pub(super) const NEUTRAL: [(&str, f64); 15] = [
    ("attn_pdrop", 0.0),
    ("chunk_size_feed_forward", 0.0),
    ("embd_pdrop", 0.0),
    ("embedding_multiplier", 1.0),
    ("full_attn_mod", 1.0),
    ("hidden_dropout", 0.0),
    ("hidden_dropout_prob", 0.0),
    ("interpolate_factor", 1.0),
    ("logit_scale", 1.0),
    ("logits_scaling", 1.0),
    ("mlp_dropout", 0.0),
    ("partial_rotary_factor", 1.0),
    ("resid_pdrop", 0.0),
    ("residual_multiplier", 1.0),
    ("typical_p", 1.0),
];

/// Switches that have no effect while they are off.
pub(super) const OFF: [&str; 14] = [
    "add_cross_attention",
    "attention_bias",
    "is_encoder_decoder",
    "lm_head_bias",
    "mlp_bias",
    "qk_layernorm",
    "qkv_bias",
    "rope_interleaved",
    "tie_encoder_decoder",
    "use_bias",
    "use_mrope",
    "use_qk_norm",
    "use_sliding_window",
    "use_mup",
];

/// Refuses a description that is accepted here but means something else, or may do so, to other programs.
pub(in crate::model) fn check(config: &Value) -> Result<(), ModelError> {
    let layers = super::read(config)?.layers.len();
    let keys = Keys::of(config)?;
    let family = of(&keys)?;
    if let Some(model_type) = keys.get("model_type").filter(|&model_type| model_type != family.model_type) {
        let name = family.architectures.first().copied().unwrap_or_default();
        let reason = format!("is {}, and \"architectures\" names a {name}: they contradict", shown(model_type));
        return Err(keys.wrong("model_type", reason));
    }
    for (key, value) in keys.map.iter().filter(|(_, value)| !value.is_null()) {
        let known = [&COMPUTED[..], &HARMLESS, family.computed, family.harmless];
        if !known.iter().any(|list| list.contains(&key.as_str())) {
            changes_nothing(key, value, layers).map_err(|reason| keys.wrong(key, reason))?;
        }
    }
    check_rope(&keys, family)
}

/// Why a key that is neither computed nor always harmless is refused with this value.
fn changes_nothing(key: &str, value: &Value, layers: usize) -> Result<(), String> {
    let is = || format!("is {}", shown(value));
    if let Some((_, neutral)) = NEUTRAL.iter().find(|(known, _)| *known == key) {
        return if value.as_f64() == Some(*neutral) {
            Ok(())
        } else {
            Err(format!("{}; only {neutral} is supported", is()))
        };
    }
    if OFF.contains(&key) {
        return if value == false { Ok(()) } else { Err(format!("{}; only false is supported", is())) };
    }
    match key {
        "auto_map" | "pruned_heads" | "quantization_config" if is_empty(value) => Ok(()),
        "auto_map" => {
            Err("names code of the model's own, which is not run here; remove it if the model computes what \
                           its architecture's name says"
                .into())
        }
        "pruned_heads" => Err(format!("{}; heads that are cut out are not supported", is())),
        "quantization_config" => Err("is set; quantised weights can't be trained".into()),
        "sliding_window" | "max_window_layers" | "sliding_window_pattern" => {
            Err(format!("{}, but attention reaches over the whole sequence here", is()))
        }
        "layer_types" => match value.as_array() {
            Some(types) if types.iter().all(|layer| layer == "full_attention") => {
                if types.len() == layers {
                    Ok(())
                } else {
                    Err(format!("has {} entries for {layers} layers", types.len()))
                }
            }
            _ => Err(format!("{}; only \"full_attention\" is supported", is())),
        },
        _ => {
            Err(format!("{}, and is not known: it may change what the model computes; remove it if it does not", is()))
        }
    }
}

/// The keys that an object of rotary settings may have, by its type. `None`: the type is unknown, and was refused
/// before.
fn keys_of_rope(kind: &str) -> &'static [&'static str] {
    match kind {
        "linear" => &["factor"],
        "llama3" => &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
        "longrope" | "su" | "yarn" => &["factor", "short_factor", "long_factor", "original_max_position_embeddings"],
        _ => &[],
    }
}

/// The rotary settings appear in several places, and versions of transformers read different ones: all must agree.
fn check_rope(keys: &Keys<'_>, family: &Family) -> Result<(), ModelError> {
    let none = Map::new();
    let mut places = vec![(keys.get("rope_scaling"), "rope_scaling.", "rope_theta")];
    match family.rotary {
        Rotary::Same | Rotary::Long => places.push((keys.get("rope_parameters"), "rope_parameters.", "rope_theta")),
        Rotary::ByLayerType => {
            let types = gemma3::parameters(keys)?.unwrap_or(&none);
            places.push((types.get("full_attention"), gemma3::FULL, "rope_theta"));
            places.push((types.get("sliding_attention"), gemma3::SLIDING, "rope_local_base_freq"));
        }
    }
    for (nested, path, outside) in places {
        let Some(map) = nested.and_then(Value::as_object) else { continue };
        let inner = Keys { map, path };
        check_rope_keys(&inner, family)?;
        let number = |keys: &Keys<'_>, key| keys.get(key).and_then(Value::as_f64);
        if let (Some(outer), Some(theta)) = (number(keys, outside), number(&inner, "rope_theta"))
            && outer != theta
        {
            return Err(inner.wrong("rope_theta", format!("is {theta}, and the {outside} outside of it is {outer}")));
        }
        if let (Some(outer), Some(factor)) =
            (number(keys, "partial_rotary_factor"), number(&inner, "partial_rotary_factor"))
            && outer != factor
        {
            let reason = format!("is {factor}, and the one outside of it is {outer}");
            return Err(inner.wrong("partial_rotary_factor", reason));
        }
    }
    if keys.get("rope_parameters").is_some() && keys.get("rope_scaling").is_some_and(|scaling| !is_empty(scaling)) {
        let without = |key: &str| {
            let mut map = keys.map.clone();
            map.remove(key);
            super::read(&Value::Object(map)).map(|config| config.ropes)
        };
        if without("rope_scaling")? != without("rope_parameters")? {
            return Err(keys.wrong("rope_scaling", "contradicts rope_parameters; remove the one that is not meant"));
        }
    }
    Ok(())
}

fn is_empty(value: &Value) -> bool {
    value.as_object().is_some_and(Map::is_empty) || value.as_array().is_some_and(Vec::is_empty)
}

/// The keys of one object of rotary settings.
fn check_rope_keys(keys: &Keys<'_>, family: &Family) -> Result<(), ModelError> {
    let (kind, old) = (keys.get("rope_type"), keys.get("type"));
    if let (Some(kind), Some(old)) = (kind, old)
        && kind != old
    {
        return Err(keys.wrong("type", format!("is {}, and rope_type is {}", shown(old), shown(kind))));
    }
    let kind = rotary::kind(keys).and_then(Value::as_str);
    let allowed = keys_of_rope(kind.unwrap_or("default"));
    for (key, value) in keys.map.iter().filter(|(_, value)| !value.is_null()) {
        let key = key.as_str();
        match key {
            "rope_type" | "type" | "rope_theta" => {}
            "partial_rotary_factor" if value.as_f64() == Some(1.0) || family.rotary == Rotary::Long => {}
            "partial_rotary_factor" => return Err(keys.wrong(key, format!("is {}; only 1 is supported", shown(value)))),
            _ if value.is_object() => {
                return Err(keys.wrong(key, "holds settings of its own; all layers have the same ones here"));
            }
            _ if allowed.contains(&key) => {}
            _ => {
                let reason = match kind {
                    None => format!("is {}, and there is no rope_type that uses it", shown(value)),
                    Some(kind) => format!("is {}, which rope_type {kind:?} does not use", shown(value)),
                };
                return Err(keys.wrong(key, reason));
            }
        }
    }
    Ok(())
}
