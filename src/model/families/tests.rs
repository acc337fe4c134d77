//! Tests of the families' descriptions.

use serde_json::{Value, json};

use super::*;
use crate::model::decoder::config::{QueryKeyNorm, Scaling};

mod llama {
    use super::*;

    fn good() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4,
        })
    }

    fn with(key: &str, value: Value) -> Value {
        let mut config = good();
        config[key] = value;
        config
    }

    #[test]
    fn absent_keys_have_hugging_face_defaults() {
        let config = read(&with("num_key_value_heads", Value::Null)).unwrap();
        assert_eq!((config.num_key_value_heads, config.head_dim, config.context.positions), (4, 8, 2048));
        assert_eq!((config.rms_norm_eps, config.initializer_range), (1e-6, 0.02));
        assert_eq!(config.ropes, [Rope { theta: 10_000.0, width: 8, scaling: None }]);
        assert!(!config.tie_word_embeddings && config.biases == Biases::default());
    }

    #[test]
    fn both_spellings_of_the_rotary_settings_are_read() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192});
        let mut old = with("rope_scaling", scaling.clone());
        old["rope_theta"] = json!(5e5);
        let mut new = with("rope_parameters", scaling);
        new["rope_parameters"]["rope_theta"] = json!(5e5);
        let [old, new] = [old, new].map(|config| read(&config).unwrap().ropes);
        assert_eq!(old, new);
        assert!(matches!(&old[..], [Rope { theta: 5e5, scaling: Some(Scaling::Llama3(scaling)), .. }]
            if scaling.factor == 8.0));
        let default = read(&with("rope_scaling", json!({"type": "default"}))).unwrap();
        assert_eq!(default.ropes[0].scaling, None);
    }

    #[test]
    fn other_architectures_are_refused_by_name() {
        for (key, value) in [
            ("architectures", json!(["GPT2LMHeadModel"])),
            ("architectures", json!([])),
            ("architectures", json!("LlamaForCausalLM")),
            ("model_type", json!("gpt2")),
            ("other", json!(1)),
        ] {
            let mut config = with(key, value.clone());
            if key != "architectures" {
                config.as_object_mut().unwrap().remove("architectures");
            }
            let error = read(&config).unwrap_err();
            assert!(matches!(error, ModelError::Architecture { .. }), "{value} gave {error}");
        }
        let mut by_type = with("model_type", json!("llama"));
        by_type.as_object_mut().unwrap().remove("architectures");
        assert!(read(&by_type).is_ok());
    }

    #[test]
    fn hostile_values_are_errors_that_name_the_key() {
        let llama3 = |key: &str, value: Value| {
            let mut scaling = json!({"rope_type": "llama3", "factor": 8.0,
                                     "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192});
            scaling[key] = value;
            scaling
        };
        for (key, value) in [
            ("vocab_size", json!(0)),
            ("vocab_size", json!(null)),
            ("vocab_size", json!(4_294_967_296_u64)),
            ("vocab_size", json!(1e300)),
            ("hidden_size", json!(0)),
            ("hidden_size", json!(-32)),
            ("hidden_size", json!(33)),
            ("hidden_size", json!(32.5)),
            ("hidden_size", json!("32")),
            ("hidden_size", json!(18_446_744_073_709_551_615_u64)),
            ("intermediate_size", json!([])),
            ("num_hidden_layers", json!(0)),
            ("num_hidden_layers", json!(1_000_000_000)),
            ("num_attention_heads", json!(0)),
            ("num_key_value_heads", json!(0)),
            ("num_key_value_heads", json!(3)),
            ("num_key_value_heads", json!(8)),
            ("head_dim", json!(7)),
            ("head_dim", json!(1_048_576)),
            ("max_position_embeddings", json!(0)),
            ("max_position_embeddings", json!(1_u64 << 40)),
            ("rms_norm_eps", json!(-1e-6)),
            ("rope_theta", json!(0)),
            ("initializer_range", json!("wide")),
            ("tie_word_embeddings", json!(1)),
            ("attention_bias", json!("no")),
            ("attention_dropout", json!(0.1)),
            ("hidden_act", json!("gelu")),
            ("quantization_config", json!({"bits": 4})),
            ("rope_scaling", json!("llama3")),
            ("rope_scaling", json!({"rope_type": "yarn"})),
            ("rope_scaling", json!({"rope_type": 3})),
            ("rope_scaling", json!({"rope_type": "llama3"})),
            ("rope_scaling", llama3("factor", json!(0))),
            ("rope_scaling", llama3("high_freq_factor", json!(1.0))),
            ("rope_scaling", llama3("original_max_position_embeddings", json!(-1))),
        ] {
            let error = read(&with(key, value.clone())).unwrap_err().to_string();
            let named = key == "num_key_value_heads" && error.contains("num_attention_heads")
                || key == "head_dim" && error.contains("head_dim")
                || error.contains(&format!("config.json: {key}"));
            assert!(named, "{key} {value}: {error}");
        }
        for document in [json!(null), json!([]), json!("LlamaForCausalLM")] {
            assert!(read(&document).is_err());
        }
        // Each within bounds, together too large.
        let mut large = with("num_hidden_layers", json!(4096));
        large["hidden_size"] = json!(1 << 20);
        large["intermediate_size"] = json!(1 << 20);
        assert!(read(&large).unwrap_err().to_string().contains("parameters"));
    }

    #[test]
    fn the_shipped_models_have_the_sizes_they_are_named_after() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/models");
        let mut sizes = std::collections::BTreeMap::new();
        for file in std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()) {
            let config = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
            let config = read(&config).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            let listed: u64 = config.parameter_shapes().iter().map(|(_, shape)| shape.iter().product::<u64>()).sum();
            assert_eq!(listed, config.parameters(), "{}", file.display());
            sizes.insert(file.file_stem().unwrap().to_str().unwrap().to_owned(), listed);
        }
        let expected = [
            ("bench-170m", 170_550_272),
            ("bench-42m", 41_689_600),
            ("llama-125m", 123_587_328),
            ("llama-1b", 1_235_814_400),
            ("llama-8b", 8_030_261_248),
            ("tiny", 3_803_392),
        ];
        assert_eq!(sizes, expected.map(|(name, size)| (name.to_owned(), size)).into());
    }
}

mod spelling {
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
            check::check(&config).unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        assert_eq!(read(&of_version_4()).unwrap(), read(&of_version_5()).unwrap(), "two spellings of one model");
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
            ("rope_scaling", json!({"type": "dynamic", "factor": 4.0}), "rope_scaling.rope_type"),
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
            let error = check::check(&config).expect_err(&format!("{key}: {value}")).to_string();
            let found = error.split_whitespace().nth(1).unwrap_or_default().trim_end_matches(';').to_owned();
            assert_eq!(found, named, "{key}: {value} gave {error}");
        }
    }

    /// Published configurations have keys that only other families read, such as those of Phi-4-mini.
    #[test]
    fn a_key_that_a_family_does_not_read_is_accepted_while_it_says_nothing() {
        for architecture in ["MistralForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM"] {
            let of = [("architectures", json!([architecture])), ("model_type", json!(null))];
            let config = with(with(of_the_first_days(), &of), &[("num_key_value_heads", json!(4))]);
            for (key, neutral, other) in [
                ("attention_bias", json!(false), json!(true)),
                ("mlp_bias", json!(false), json!(true)),
                ("lm_head_bias", json!(false), json!(true)),
                ("full_attn_mod", json!(1), json!(2)),
                ("interpolate_factor", json!(1), json!(0.5)),
            ] {
                check::check(&with(config.clone(), &[(key, neutral)])).unwrap_or_else(|error| panic!("{key}: {error}"));
                let error = check::check(&with(config.clone(), &[(key, other)])).unwrap_err().to_string();
                assert!(error.contains(key), "{architecture}: {error}");
            }
        }
    }

    #[test]
    fn no_key_stands_in_two_lists() {
        for family in FAMILIES {
            let mut all: Vec<&str> = check::COMPUTED.iter().chain(&check::HARMLESS).copied().collect();
            all.extend(family.computed.iter().chain(family.harmless));
            let count = all.len();
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), count, "{}", family.model_type);
        }
        let mut all: Vec<&str> = check::COMPUTED.iter().chain(&check::HARMLESS).chain(&check::OFF).copied().collect();
        all.extend(check::NEUTRAL.iter().map(|(key, _)| *key));
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
            check::check(&config).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        }
    }
}

mod families {
    use super::*;

    /// A small description of a family, with changes; a change to null removes the key.
    fn of(family: &str, changes: Value) -> Value {
        let architecture = FAMILIES.iter().find(|known| known.model_type == family).unwrap().architectures[0];
        let mut config = json!({
            "architectures": [architecture], "model_type": family, "vocab_size": 16, "hidden_size": 64,
            "intermediate_size": 20, "num_hidden_layers": 4, "num_attention_heads": 32,
        });
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    fn windows(config: &DecoderConfig) -> Vec<Option<u32>> {
        config.layers.iter().map(|layer| layer.window).collect()
    }

    fn ropes(config: &DecoderConfig) -> Vec<Option<usize>> {
        config.layers.iter().map(|layer| layer.rope).collect()
    }

    #[test]
    fn absent_keys_have_the_defaults_of_their_own_family() {
        // Key and value heads, width of a head, positions, epsilon, base of the wavelengths, tied.
        let expected = [
            ("llama", 32, 1, 2048, 1e-6, 1e4, false),
            ("mistral", 8, 1, 131_072, 1e-6, 1e4, false),
            ("qwen2", 32, 1, 32_768, 1e-6, 1e4, false),
            ("qwen3", 32, 128, 32_768, 1e-6, 1e4, false),
            ("smollm3", 4, 1, 32_768, 1e-6, 2e6, true),
            ("olmo2", 32, 1, 2048, 1e-5, 1e4, false),
            ("phi3", 32, 1, 4096, 1e-5, 1e4, false),
            ("gemma3_text", 4, 256, 131_072, 1e-6, 1e6, true),
        ];
        assert_eq!(expected.len(), FAMILIES.len());
        for (family, shared, head, positions, eps, theta, tied) in expected {
            // Heads of width 2, where their width follows from that of the stream.
            let config = read(&of(family, json!({}))).unwrap();
            let width = if head == 1 { 2 } else { head };
            let found = (config.num_key_value_heads, config.head_dim, config.context.positions);
            assert_eq!(found, (shared, width, positions), "{family}");
            let found = (config.rms_norm_eps, config.ropes[0].theta, config.tie_word_embeddings);
            assert_eq!(found, (eps, theta, tied), "{family}");
            let none = read(&of(family, json!({"num_key_value_heads": null}))).unwrap();
            assert_eq!(none.num_key_value_heads, 32, "{family}");
        }
    }

    #[test]
    fn windows_are_where_transformers_has_them() {
        let read = |family, changes: Value| read(&of(family, changes)).unwrap();
        assert_eq!(windows(&read("mistral", json!({}))), [Some(4096); 4]);
        assert_eq!(windows(&read("mistral", json!({"sliding_window": null}))), [None; 4]);
        assert_eq!(windows(&read("qwen2", json!({"sliding_window": 7}))), [None; 4]);
        let changes = json!({"sliding_window": 7, "use_sliding_window": true, "max_window_layers": 3});
        assert_eq!(windows(&read("qwen3", changes)), [None, None, None, Some(7)]);
        let types = json!(["sliding_attention", "full_attention", "full_attention", "full_attention"]);
        let changes = json!({"sliding_window": 7, "use_sliding_window": true, "layer_types": types});
        assert_eq!(windows(&read("qwen2", changes)), [Some(7), None, None, None]);
        assert_eq!(windows(&read("phi3", json!({}))), [None; 4]);
        assert_eq!(windows(&read("phi3", json!({"sliding_window": 2047}))), [Some(2047); 4]);
        let gemma = read("gemma3_text", json!({"sliding_window": 9, "sliding_window_pattern": 2}));
        assert_eq!(windows(&gemma), [Some(9), None, Some(9), None]);
        assert_eq!(ropes(&gemma), [Some(1), Some(0), Some(1), Some(0)]);
        assert_eq!((gemma.ropes[0].theta, gemma.ropes[1].theta), (1e6, 1e4));
        assert_eq!((gemma.embedding_scale, gemma.attention_scale), (Some(8.0), Some(0.0625)));
        let small = read("smollm3", json!({"use_sliding_window": true, "sliding_window": 5}));
        assert_eq!(ropes(&small), [Some(0), Some(0), Some(0), None]);
        assert_eq!(windows(&small), [None, None, None, Some(5)]);
        assert_eq!(read("olmo2", json!({})).query_key_norm, Some(QueryKeyNorm::Whole));
    }

    #[test]
    fn long_rope_is_computed_within_its_original_context_alone() {
        let scaling = json!({"type": "su", "short_factor": [1.0, 2.0], "long_factor": [4.0, 8.0]});
        let changes = json!({"hidden_size": 128, "rope_scaling": scaling, "max_position_embeddings": 131_072});
        let config = read(&of("phi3", changes)).unwrap();
        assert_eq!(config.context, Context { positions: 4096, key: "original_max_position_embeddings" });
        let [Rope { width: 4, scaling: Some(Scaling::Long { divisors, attention_factor }), .. }] = &config.ropes[..]
        else {
            panic!("{:?}", config.ropes);
        };
        assert_eq!(divisors, &[1.0, 2.0]);
        assert!((attention_factor - (1.0_f64 + 32_f64.ln() / 4096_f64.ln()).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn families_that_are_not_computed_are_refused_with_the_reason() {
        for (architecture, model_type, reason) in [
            ("Gemma2ForCausalLM", "gemma2", "attn_logit_softcapping"),
            ("MixtralForCausalLM", "mixtral", "mixture of experts"),
            ("Qwen3MoeForCausalLM", "qwen3_moe", "mixture of experts"),
            ("Gemma3ForConditionalGeneration", "gemma3", "images"),
            ("GPT2LMHeadModel", "gpt2", "not one of the families"),
        ] {
            for config in [json!({"architectures": [architecture]}), json!({"model_type": model_type})] {
                let error = read(&config).unwrap_err();
                assert!(error.to_string().contains(reason), "{error}");
                let hint = crate::error::Explain::hint(&error).unwrap();
                assert!(hint.contains("Qwen3ForCausalLM") && hint.contains("LlamaForCausalLM"), "{hint}");
            }
        }
    }

    /// Each is refused when a run is created, and the message begins with the key.
    #[test]
    fn hostile_and_contradictory_configurations_are_refused_by_key() {
        let long = json!({"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [4.0, 8.0]});
        let with = |changes: Value| {
            let mut long = long.clone();
            for (key, value) in changes.as_object().unwrap() {
                long[key] = value.clone();
            }
            json!({"hidden_size": 128, "rope_scaling": long})
        };
        let experts = json!({"num_local_experts": 8});
        let sliding = json!(["sliding_attention", "full_attention", "full_attention", "full_attention"]);
        let refused: Vec<(&str, Value, &str)> = vec![
            ("mistral", json!({"model_type": "llama"}), "model_type"),
            ("llama", json!({"model_type": "mistral"}), "model_type"),
            ("qwen2", json!({"model_type": "qwen3"}), "model_type"),
            ("mistral", json!({"attention_bias": true}), "attention_bias"),
            ("mistral", json!({"sliding_window": 0}), "sliding_window"),
            ("mistral", json!({"sliding_window": "4096"}), "sliding_window"),
            ("mistral", json!({"sliding_window": 8, "layer_types": vec!["full_attention"; 4]}), "layer_types"),
            ("mistral", experts.clone(), "num_local_experts"),
            ("qwen2", json!({"attention_bias": true}), "attention_bias"),
            ("qwen2", json!({"mlp_bias": true}), "mlp_bias"),
            ("qwen2", json!({"layer_types": sliding}), "layer_types"),
            ("qwen2", json!({"layer_types": ["full_attention"]}), "layer_types"),
            ("qwen2", json!({"layer_types": vec!["chunked_attention"; 4]}), "layer_types"),
            ("qwen2", json!({"use_mrope": true}), "use_mrope"),
            ("qwen2", json!({"use_sliding_window": "no"}), "use_sliding_window"),
            ("qwen2", json!({"max_window_layers": -1}), "max_window_layers"),
            ("qwen2", json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}), "rope_scaling.rope_type"),
            ("qwen3", json!({"head_dim": 7}), "head_dim"),
            ("qwen3", json!({"num_experts": 128}), "num_experts"),
            ("qwen3", json!({"qk_layernorm": true}), "qk_layernorm"),
            ("qwen3", json!({"rope_parameters": {"full_attention": {}}}), "rope_parameters.full_attention"),
            ("smollm3", json!({"no_rope_layers": [1, 0]}), "no_rope_layers"),
            ("smollm3", json!({"no_rope_layers": [1, 0, 2, 1]}), "no_rope_layers"),
            ("smollm3", json!({"no_rope_layers": "none"}), "no_rope_layers"),
            ("smollm3", json!({"no_rope_layer_interval": 0}), "no_rope_layer_interval"),
            ("smollm3", json!({"layer_types": sliding}), "layer_types"),
            ("olmo2", json!({"clip_qkv": 8.0}), "clip_qkv"),
            ("olmo2", json!({"sliding_window": 4096}), "sliding_window"),
            ("olmo2", json!({"mlp_bias": true}), "mlp_bias"),
            ("phi3", json!({"partial_rotary_factor": 0.3}), "partial_rotary_factor"),
            ("phi3", json!({"partial_rotary_factor": 1.5}), "partial_rotary_factor"),
            ("phi3", json!({"resid_pdrop": 0.1}), "resid_pdrop"),
            ("phi3", json!({"embd_pdrop": 0.1}), "embd_pdrop"),
            ("phi3", json!({"attention_bias": true}), "attention_bias"),
            ("phi3", with(json!({"short_factor": [1.0]})), "rope_scaling.short_factor"),
            ("phi3", with(json!({"short_factor": [1.0, -2.0]})), "rope_scaling.short_factor"),
            ("phi3", with(json!({"long_factor": null})), "rope_scaling.long_factor"),
            ("phi3", with(json!({"factor": 2.0})), "rope_scaling.factor"),
            ("phi3", with(json!({"attention_factor": 1.2})), "rope_scaling.attention_factor"),
            (
                "phi3",
                with(json!({"original_max_position_embeddings": 8192})),
                "rope_scaling.original_max_position_embeddings",
            ),
            ("gemma3_text", json!({"attn_logit_softcapping": 50.0}), "attn_logit_softcapping"),
            ("gemma3_text", json!({"final_logit_softcapping": 30.0}), "final_logit_softcapping"),
            ("gemma3_text", json!({"use_bidirectional_attention": true}), "use_bidirectional_attention"),
            ("gemma3_text", json!({"hidden_activation": "silu"}), "hidden_activation"),
            ("gemma3_text", json!({"hidden_act": "silu"}), "hidden_act"),
            ("gemma3_text", json!({"query_pre_attn_scalar": 0}), "query_pre_attn_scalar"),
            ("gemma3_text", json!({"sliding_window": null}), "layer_types"),
            ("gemma3_text", json!({"_sliding_window_pattern": 3}), "_sliding_window_pattern"),
            ("gemma3_text", json!({"rope_parameters": {"rope_theta": 1e6}}), "rope_parameters.rope_theta"),
            (
                "gemma3_text",
                json!({"rope_theta": 1e6, "rope_parameters": {"full_attention": {"rope_theta": 1e5}}}),
                "rope_parameters.full_attention.rope_theta",
            ),
            (
                "gemma3_text",
                json!({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8.0}}}),
                "rope_parameters.sliding_attention.rope_type",
            ),
            ("gemma3_text", json!({"vision_config": {}}), "vision_config"),
        ];
        assert!(refused.len() >= 25);
        for (family, changes, named) in refused {
            let error = check::check(&of(family, changes.clone())).expect_err(&format!("{family} {changes}"));
            let error = error.to_string();
            let found = error.split_whitespace().nth(1).unwrap_or_default().trim_end_matches(';');
            assert_eq!(found, named, "{family} {changes} gave {error}");
        }
        for family in FAMILIES {
            check::check(&of(family.model_type, json!({}))).unwrap();
        }
    }
}
