//! The accepted descriptions of a new run's model: each key of a `config.json` is computed, harmless, or refused by
//! name.
//!
//! An unknown key may change the mathematics, so that a run would train a different model from the one that other
//! programs build from its checkpoints. Existing runs were checked when they were created: they keep their description.

use serde_json::{Map, Value};

use super::{
    ModelError,
    llama_config::{Keys, LlamaConfig, Rope, shown},
};

/// Keys that [`LlamaConfig::from_json`] reads.
const COMPUTED: [&str; 20] = [
    "architectures",
    "attention_bias",
    "attention_dropout",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
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
const HARMLESS: [&str; 72] = [
    // Where it comes from, and who wrote it.
    "_commit_hash",
    "_name_or_path",
    "is_llama_config",
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
const NEUTRAL: [(&str, f64); 13] = [
    ("attn_pdrop", 0.0),
    ("chunk_size_feed_forward", 0.0),
    ("embd_pdrop", 0.0),
    ("embedding_multiplier", 1.0),
    ("hidden_dropout", 0.0),
    ("hidden_dropout_prob", 0.0),
    ("logit_scale", 1.0),
    ("logits_scaling", 1.0),
    ("mlp_dropout", 0.0),
    ("partial_rotary_factor", 1.0),
    ("resid_pdrop", 0.0),
    ("residual_multiplier", 1.0),
    ("typical_p", 1.0),
];

/// Switches that have no effect while they are off.
const OFF: [&str; 11] = [
    "add_cross_attention",
    "is_encoder_decoder",
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
pub(super) fn check(config: &Value) -> Result<(), ModelError> {
    let read = LlamaConfig::from_json(config)?;
    let none = Map::new();
    let keys = Keys { map: config.as_object().unwrap_or(&none), path: "" };
    if let Some(model_type) = keys.get("model_type").filter(|&model_type| model_type != "llama") {
        let reason = format!("is {}, and \"architectures\" names a Llama model: they contradict", shown(model_type));
        return Err(keys.wrong("model_type", reason));
    }
    for (key, value) in keys.map.iter().filter(|(_, value)| !value.is_null()) {
        if !COMPUTED.contains(&key.as_str()) && !HARMLESS.contains(&key.as_str()) {
            changes_nothing(key, value, read.num_hidden_layers).map_err(|reason| keys.wrong(key, reason))?;
        }
    }
    check_rope(&keys)
}

/// Why a key that is neither computed nor always harmless is refused with this value.
fn changes_nothing(key: &str, value: &Value, layers: u32) -> Result<(), String> {
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
    let empty = value.as_object().is_some_and(Map::is_empty) || value.as_array().is_some_and(Vec::is_empty);
    match key {
        "auto_map" | "pruned_heads" | "quantization_config" if empty => Ok(()),
        "auto_map" => Err("names code of the model's own, which is not run here; remove it if the model is a plain \
                           LlamaForCausalLM"
            .into()),
        "pruned_heads" => Err(format!("{}; heads that are cut out are not supported", is())),
        "quantization_config" => Err("is set; quantised weights can't be trained".into()),
        "sliding_window" | "max_window_layers" | "sliding_window_pattern" => {
            Err(format!("{}, but attention reaches over the whole sequence here", is()))
        }
        "layer_types" => match value.as_array() {
            Some(types) if types.iter().all(|layer| layer == "full_attention") => {
                if types.len() == layers as usize {
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
        "llama3" => &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
        _ => &[],
    }
}

/// The rotary settings appear in up to three places, and versions of transformers read different ones: all must agree.
fn check_rope(keys: &Keys) -> Result<(), ModelError> {
    let top = keys.get("rope_theta").and_then(Value::as_f64);
    let mut found: Vec<(&'static str, Rope)> = Vec::new();
    for name in ["rope_parameters.", "rope_scaling."] {
        let Some(nested) = keys.get(name.trim_end_matches('.')) else { continue };
        let none = Map::new();
        let inner = Keys { map: nested.as_object().unwrap_or(&none), path: name };
        check_rope_keys(&inner)?;
        let theta = inner.get("rope_theta").and_then(Value::as_f64);
        if let (Some(top), Some(theta)) = (top, theta)
            && top != theta
        {
            return Err(inner.wrong("rope_theta", format!("is {theta}, and the rope_theta outside of it is {top}")));
        }
        found.push((name, Rope::nested(nested, name, top.unwrap_or(10_000.0))?));
    }
    if let [(_, parameters), (_, scaling)] = found.as_slice()
        && parameters != scaling
    {
        return Err(keys.wrong("rope_scaling", "contradicts rope_parameters; remove the one that is not meant"));
    }
    Ok(())
}

/// The keys of one object of rotary settings.
fn check_rope_keys(keys: &Keys) -> Result<(), ModelError> {
    let (kind, old) = (keys.get("rope_type"), keys.get("type"));
    if let (Some(kind), Some(old)) = (kind, old)
        && kind != old
    {
        return Err(keys.wrong("type", format!("is {}, and rope_type is {}", shown(old), shown(kind))));
    }
    let kind = kind.or(old).and_then(Value::as_str);
    let allowed = keys_of_rope(kind.unwrap_or("default"));
    for (key, value) in keys.map.iter().filter(|(_, value)| !value.is_null()) {
        let key = key.as_str();
        match key {
            "rope_type" | "type" | "rope_theta" => {}
            "partial_rotary_factor" if value.as_f64() == Some(1.0) => {}
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// As transformers 4 writes one, with everything that it writes beside.
    fn of_version_4() -> Value {
        json!({
            "_name_or_path": "somebody/a-model", "architectures": ["LlamaForCausalLM"], "attention_bias": false,
            "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": [2, 5], "head_dim": 8, "hidden_act": "silu",
            "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48, "max_position_embeddings": 256,
            "mlp_bias": false, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2,
            "num_key_value_heads": 2, "pad_token_id": null, "pretraining_tp": 1, "quantization_config": null,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 64, "rope_type": "llama3"},
            "rope_theta": 500_000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
            "transformers_version": "4.57.6", "use_cache": true, "vocab_size": 96,
        })
    }

    /// As transformers 5 writes one.
    fn of_version_5() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
            "bos_token_id": 1, "dtype": "bfloat16", "eos_token_id": 2, "head_dim": 8, "hidden_act": "silu",
            "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48, "max_position_embeddings": 256,
            "mlp_bias": false, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2,
            "num_key_value_heads": 2, "pad_token_id": null, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
            "rope_parameters": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 64, "rope_theta": 500_000.0, "rope_type": "llama3"},
            "tie_word_embeddings": false, "transformers_version": "5.24.0", "use_cache": true, "vocab_size": 96,
        })
    }

    /// The first conversions of Llama.
    fn of_the_first_days() -> Value {
        json!({
            "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
            "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.02, "max_sequence_length": 2048,
            "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": -1,
            "rms_norm_eps": 1e-6, "torch_dtype": "float16", "transformers_version": "4.27.0.dev0", "use_cache": true,
            "vocab_size": 96,
        })
    }

    fn with(mut config: Value, changes: &[(&str, Value)]) -> Value {
        for (key, value) in changes {
            config[*key] = value.clone();
        }
        config
    }

    fn llama3() -> Value {
        of_version_4()["rope_scaling"].clone()
    }

    #[test]
    fn descriptions_as_they_are_found_are_accepted() {
        let accepted = [
            ("version 4", of_version_4()),
            ("version 5", of_version_5()),
            ("the first days", of_the_first_days()),
            ("the first days, by name alone", with(of_the_first_days(), &[("model_type", json!(null))])),
            ("no architecture, by type", with(of_version_4(), &[("architectures", json!([]))])),
            ("null architectures", with(of_version_5(), &[("architectures", json!(null))])),
            ("wide heads", with(of_version_4(), &[("head_dim", json!(16)), ("hidden_size", json!(30))])),
            ("swish is silu", with(of_version_4(), &[("hidden_act", json!("swish"))])),
            (
                "a small model's extras",
                with(
                    of_version_4(),
                    &[
                        ("is_llama_config", json!(true)),
                        ("rope_interleaved", json!(false)),
                        ("rope_scaling", json!(null)),
                        ("transformers.js_config", json!({"dtype": "q4"})),
                    ],
                ),
            ),
            (
                "every layer looks everywhere",
                with(
                    of_version_5(),
                    &[
                        ("layer_types", json!(["full_attention", "full_attention"])),
                        ("sliding_window", json!(null)),
                        ("use_sliding_window", json!(false)),
                        ("partial_rotary_factor", json!(1.0)),
                        ("anything_at_all", json!(null)),
                    ],
                ),
            ),
            (
                "both spellings that agree",
                with(of_version_5(), &[("rope_theta", json!(5e5)), ("rope_scaling", llama3())]),
            ),
            ("an empty object", with(of_the_first_days(), &[("rope_scaling", json!({}))])),
            (
                "the default spelt out",
                with(of_the_first_days(), &[("rope_parameters", json!({"rope_type": "default", "rope_theta": 1e6}))]),
            ),
        ];
        for (what, config) in accepted {
            check(&config).unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        assert_eq!(
            LlamaConfig::from_json(&of_version_4()).unwrap(),
            LlamaConfig::from_json(&of_version_5()).unwrap(),
            "two spellings of one model"
        );
    }

    #[test]
    fn a_key_that_may_change_the_mathematics_is_refused_by_name() {
        let nested = |change: &[(&str, Value)]| with(llama3(), change);
        let refused = [
            ("model_type", json!("mistral"), "model_type"),
            ("a_key_of_next_year", json!(3), "a_key_of_next_year"),
            ("auto_map", json!({"AutoModelForCausalLM": "modeling.Model"}), "auto_map"),
            ("quantization_config", json!({"quant_method": "gptq", "bits": 4}), "quantization_config"),
            ("partial_rotary_factor", json!(0.5), "partial_rotary_factor"),
            ("attention_dropout", json!(0.1), "attention_dropout"),
            ("resid_pdrop", json!(0.1), "resid_pdrop"),
            ("hidden_act", json!("gelu_pytorch_tanh"), "hidden_act"),
            ("sliding_window", json!(4096), "sliding_window"),
            ("use_sliding_window", json!(true), "use_sliding_window"),
            ("layer_types", json!(["full_attention", "sliding_attention"]), "layer_types"),
            ("layer_types", json!(["full_attention"]), "layer_types"),
            ("no_rope_layers", json!([1, 1]), "no_rope_layers"),
            ("final_logit_softcapping", json!(30.0), "final_logit_softcapping"),
            ("logit_scale", json!(0.0625), "logit_scale"),
            ("num_local_experts", json!(8), "num_local_experts"),
            ("qkv_bias", json!(true), "qkv_bias"),
            ("rope_interleaved", json!(true), "rope_interleaved"),
            ("rope_scaling", json!({"type": "linear", "factor": 4.0}), "rope_scaling.rope_type"),
            ("rope_scaling", json!({"factor": 4.0}), "rope_scaling.factor"),
            ("rope_scaling", json!({"rope_type": "default", "factor": 4.0}), "rope_scaling.factor"),
            ("rope_scaling", nested(&[("attention_factor", json!(0.9))]), "rope_scaling.attention_factor"),
            ("rope_scaling", nested(&[("mscale", json!(1.0))]), "rope_scaling.mscale"),
            ("rope_scaling", nested(&[("type", json!("yarn"))]), "rope_scaling.type"),
            ("rope_scaling", nested(&[("rope_theta", json!(1e4))]), "rope_scaling.rope_theta"),
            ("rope_parameters", nested(&[("rope_theta", json!(1e4))]), "rope_parameters.rope_theta"),
            ("rope_parameters", nested(&[("factor", json!(4.0))]), "rope_scaling"),
            ("rope_parameters", json!({"rope_type": "default"}), "rope_scaling"),
            (
                "rope_parameters",
                nested(&[("partial_rotary_factor", json!(0.25))]),
                "rope_parameters.partial_rotary_factor",
            ),
            (
                "rope_parameters",
                json!({"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {}}),
                "rope_parameters.full_attention",
            ),
        ];
        for (key, value, named) in refused {
            let config = with(of_version_4(), &[(key, value.clone())]);
            let error = check(&config).expect_err(&format!("{key}: {value}")).to_string();
            let found = error.split_whitespace().nth(1).unwrap_or_default().trim_end_matches(';').to_owned();
            assert_eq!(found, named, "{key}: {value} gave {error}");
        }
    }

    #[test]
    fn no_key_stands_in_two_lists() {
        let mut all: Vec<&str> = COMPUTED.iter().chain(&HARMLESS).chain(&OFF).copied().collect();
        all.extend(NEUTRAL.iter().map(|(key, _)| *key));
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    #[test]
    fn the_shipped_models_are_accepted() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/models");
        for file in std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()) {
            let config = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
            check(&config).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        }
    }
}
