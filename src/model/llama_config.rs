//! A Llama model's Hugging Face `config.json`, checked.
//!
//! Read as Hugging Face does: an absent or null key has its default, and both spellings of the rotary settings are
//! known (`rope_theta` with `rope_scaling`, and `rope_parameters`). A new run's description is restricted further: see
//! [`super::description`], which refuses every key that is neither computed nor harmless.

use serde_json::{Map, Value};

use super::ModelError;

/// A Llama model's shape and constants. All values are within the bounds that [`LlamaConfig::from_json`] checks.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Tokens.
    pub vocab_size: u32,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Width of the feed-forward layer.
    pub intermediate_size: u32,
    /// Blocks.
    pub num_hidden_layers: u32,
    /// Query heads.
    pub num_attention_heads: u32,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: u32,
    /// Width of a head; even.
    pub head_dim: u32,
    /// The most positions in one sequence.
    pub max_position_embeddings: u32,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// Rotary position embedding.
    pub rope: Rope,
    /// The output layer is the token embedding, transposed.
    pub tie_word_embeddings: bool,
    /// Biases in the attention's four projections.
    pub attention_bias: bool,
    /// Biases in the feed-forward layer's three projections.
    pub mlp_bias: bool,
}

/// Rotary position embedding (Su et al., arXiv 2104.09864).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base of the wavelengths.
    pub theta: f64,
    /// Stretching to longer contexts.
    pub scaling: Option<Llama3Scaling>,
}

/// Llama 3.1's stretching: low frequencies divided by `factor`, high ones kept, a straight line between.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Llama3Scaling {
    /// The divisor of low frequencies.
    pub factor: f64,
    /// Wavelengths above the original context over this are low frequencies.
    pub low_freq_factor: f64,
    /// Wavelengths below the original context over this are high frequencies.
    pub high_freq_factor: f64,
    /// The context before stretching, positions.
    pub original_max_position_embeddings: u32,
}

/// Upper bounds that are far above any real model and keep all products within 64 bits.
const MAX_WIDTH: u64 = 1 << 20;
const MAX_LAYERS: u64 = 4096;
const MAX_VOCAB: u64 = 1 << 24;
const MAX_POSITIONS: u64 = 1 << 27;
/// Elements of the token embedding: LibTorch's dot product counts in 32 bits.
const MAX_EMBEDDING: u64 = i32::MAX as u64;
/// Elements of all parameters.
const MAX_PARAMETERS: u64 = 1 << 40;
/// Bases of the rotary wavelengths.
const THETA: std::ops::RangeInclusive<f64> = 1.0..=1e15;

impl LlamaConfig {
    /// Reads and checks a description.
    pub fn from_json(config: &Value) -> Result<Self, ModelError> {
        let keys = Keys {
            map: config.as_object().ok_or_else(|| ModelError::config("the document", "is not a JSON object"))?,
            path: "",
        };
        check_architecture(&keys)?;
        keys.must_be("hidden_act", &["silu", "swish"])?;
        if keys.number("attention_dropout", Some(0.0), 0.0..=1.0)? != 0.0 {
            return Err(ModelError::config("attention_dropout", "is not 0, which is not supported"));
        }
        if keys.get("quantization_config").is_some() {
            return Err(ModelError::config("quantization_config", "is set; quantised weights can't be trained"));
        }

        let hidden_size = keys.count("hidden_size", None, MAX_WIDTH)?;
        let num_attention_heads = keys.count("num_attention_heads", None, MAX_WIDTH)?;
        if keys.get("head_dim").is_none() && !hidden_size.is_multiple_of(num_attention_heads) {
            let reason = format!(
                "{hidden_size} is not a multiple of num_attention_heads {num_attention_heads}, and there is no head_dim"
            );
            return Err(ModelError::config("hidden_size", reason));
        }
        let num_key_value_heads = keys.count("num_key_value_heads", Some(num_attention_heads), MAX_WIDTH)?;
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let reason =
                format!("{num_attention_heads} is not a multiple of num_key_value_heads {num_key_value_heads}");
            return Err(ModelError::config("num_attention_heads", reason));
        }
        let head_dim = keys.count("head_dim", Some(hidden_size / num_attention_heads), MAX_WIDTH)?;
        if !head_dim.is_multiple_of(2) {
            let reason = format!("{head_dim} is odd; rotary embedding turns pairs");
            return Err(ModelError::config("head_dim", reason));
        }
        if u64::from(num_attention_heads) * u64::from(head_dim) > MAX_WIDTH {
            return Err(ModelError::config("num_attention_heads", format!("times head_dim is above {MAX_WIDTH}")));
        }
        let vocab_size = keys.count("vocab_size", None, MAX_VOCAB)?;
        if u64::from(vocab_size) * u64::from(hidden_size) > MAX_EMBEDDING {
            return Err(ModelError::config("vocab_size", format!("times hidden_size is above {MAX_EMBEDDING}")));
        }

        let config = Self {
            vocab_size,
            hidden_size,
            intermediate_size: keys.count("intermediate_size", None, MAX_WIDTH)?,
            num_hidden_layers: keys.count("num_hidden_layers", None, MAX_LAYERS)?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            max_position_embeddings: keys.count("max_position_embeddings", Some(2048), MAX_POSITIONS)?,
            rms_norm_eps: keys.number("rms_norm_eps", Some(1e-6), 0.0..=1.0)?,
            initializer_range: keys.number("initializer_range", Some(0.02), 0.0..=1.0)?,
            rope: Rope::from_keys(&keys)?,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?,
            attention_bias: keys.flag("attention_bias")?,
            mlp_bias: keys.flag("mlp_bias")?,
        };
        if config.parameters() > MAX_PARAMETERS {
            let reason = format!("and the widths make {} parameters, more than {MAX_PARAMETERS}", config.parameters());
            return Err(ModelError::config("num_hidden_layers", reason));
        }
        Ok(config)
    }

    /// Names and shapes of all parameters, in registration order.
    pub fn parameter_shapes(&self) -> Vec<(String, Vec<u64>)> {
        let mut shapes = vec![(EMBEDDING.to_owned(), vec![self.vocab_size.into(), self.hidden_size.into()])];
        for layer in 0..self.num_hidden_layers {
            shapes.extend(self.layer_shapes(layer));
        }
        shapes.push((FINAL_NORM.to_owned(), vec![self.hidden_size.into()]));
        if !self.tie_word_embeddings {
            shapes.push((OUTPUT.to_owned(), vec![self.vocab_size.into(), self.hidden_size.into()]));
        }
        shapes
    }

    /// Elements of all parameters.
    pub fn parameters(&self) -> u64 {
        let count = |shapes: &[(String, Vec<u64>)]| shapes.iter().map(|(_, shape)| shape.iter().product::<u64>()).sum();
        let layer: u64 = count(&self.layer_shapes(0));
        let embedding = u64::from(self.vocab_size) * u64::from(self.hidden_size);
        let embeddings = if self.tie_word_embeddings { embedding } else { 2 * embedding };
        embeddings + u64::from(self.num_hidden_layers) * layer + u64::from(self.hidden_size)
    }

    fn layer_shapes(&self, layer: u32) -> Vec<(String, Vec<u64>)> {
        let prefix = layer_prefix(layer);
        let hidden = u64::from(self.hidden_size);
        let intermediate = u64::from(self.intermediate_size);
        let queries = u64::from(self.num_attention_heads) * u64::from(self.head_dim);
        let keys = u64::from(self.num_key_value_heads) * u64::from(self.head_dim);
        let mut shapes = Vec::with_capacity(16);
        let mut linear = |name: &str, outputs: u64, inputs: u64, bias: bool| {
            shapes.push((format!("{prefix}{name}.weight"), vec![outputs, inputs]));
            if bias {
                shapes.push((format!("{prefix}{name}.bias"), vec![outputs]));
            }
        };
        linear("self_attn.q_proj", queries, hidden, self.attention_bias);
        linear("self_attn.k_proj", keys, hidden, self.attention_bias);
        linear("self_attn.v_proj", keys, hidden, self.attention_bias);
        linear("self_attn.o_proj", hidden, queries, self.attention_bias);
        linear("mlp.gate_proj", intermediate, hidden, self.mlp_bias);
        linear("mlp.up_proj", intermediate, hidden, self.mlp_bias);
        linear("mlp.down_proj", hidden, intermediate, self.mlp_bias);
        shapes.push((format!("{prefix}input_layernorm.weight"), vec![hidden]));
        shapes.push((format!("{prefix}post_attention_layernorm.weight"), vec![hidden]));
        shapes
    }
}

/// Name of the token embedding.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the last norm's scale.
pub(super) const FINAL_NORM: &str = "model.norm.weight";
/// Name of the output layer; absent when tied.
pub(super) const OUTPUT: &str = "lm_head.weight";

/// What the names of all layers' parameters begin with.
const LAYERS: &str = "model.layers.";

/// The prefix of the names of a layer's parameters.
pub(super) fn layer_prefix(layer: u32) -> String {
    format!("{LAYERS}{layer}.")
}

/// The layer that a parameter of this name belongs to; `None`: to none.
pub(super) fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix(LAYERS)?.split_once('.')?.0.parse().ok()
}

/// The architecture's name, and its spelling in the first conversions.
const ARCHITECTURES: [&str; 2] = ["LlamaForCausalLM", "LLaMAForCausalLM"];

fn check_architecture(keys: &Keys) -> Result<(), ModelError> {
    let unnamed = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
    let (said, fits) = match (keys.get("architectures"), keys.get("model_type")) {
        (Some(Value::Array(names)), _) if !names.is_empty() => {
            let names: Vec<_> = names.iter().filter_map(Value::as_str).collect();
            (format!("{names:?}"), ARCHITECTURES.iter().any(|known| names.contains(known)))
        }
        (Some(other), _) if !unnamed(other) => (other.to_string(), false),
        (_, Some(model_type)) => (model_type.to_string(), model_type == "llama"),
        (_, None) => ("no architecture".to_owned(), false),
    };
    let found = || said.chars().take(200).collect();
    if fits { Ok(()) } else { Err(ModelError::Architecture { found: found() }) }
}

impl Rope {
    fn from_keys(keys: &Keys) -> Result<Self, ModelError> {
        let theta = keys.number("rope_theta", Some(10_000.0), THETA)?;
        match (keys.get("rope_parameters"), keys.get("rope_scaling")) {
            (Some(nested), _) => Self::nested(nested, "rope_parameters.", theta),
            (None, Some(nested)) => Self::nested(nested, "rope_scaling.", theta),
            (None, None) => Ok(Self { theta, scaling: None }),
        }
    }

    /// The content of the object `nested`; `name` is its key with a dot, `theta` holds if it names none.
    pub(super) fn nested(nested: &Value, name: &'static str, theta: f64) -> Result<Self, ModelError> {
        let map = nested
            .as_object()
            .ok_or_else(|| ModelError::config(name.trim_end_matches('.'), "is neither an object nor null"))?;
        let keys = Keys { map, path: name };
        let theta = keys.number("rope_theta", Some(theta), THETA)?;
        match keys.get("rope_type").or_else(|| keys.get("type")).map(|kind| (kind, kind.as_str())) {
            None | Some((_, Some("default"))) => Ok(Self { theta, scaling: None }),
            Some((_, Some("llama3"))) => {
                let scaling = Llama3Scaling {
                    factor: keys.number("factor", None, 1.0..=1e6)?,
                    low_freq_factor: keys.number("low_freq_factor", None, 1e-6..=1e6)?,
                    high_freq_factor: keys.number("high_freq_factor", None, 1e-6..=1e6)?,
                    original_max_position_embeddings: keys.count(
                        "original_max_position_embeddings",
                        None,
                        MAX_POSITIONS,
                    )?,
                };
                if scaling.high_freq_factor <= scaling.low_freq_factor {
                    return Err(keys.wrong("high_freq_factor", "is not above low_freq_factor"));
                }
                Ok(Self { theta, scaling: Some(scaling) })
            }
            Some((kind, _)) => {
                let kind: String = kind.to_string().chars().take(80).collect();
                Err(keys.wrong("rope_type", format!("is {kind}; \"default\" and \"llama3\" are supported")))
            }
        }
    }
}

/// An object's keys, read with errors that name them.
pub(super) struct Keys<'a> {
    pub map: &'a Map<String, Value>,
    pub path: &'static str,
}

impl Keys<'_> {
    pub fn wrong(&self, key: &str, reason: impl Into<String>) -> ModelError {
        ModelError::config(format!("{}{key}", self.path), reason)
    }

    /// The value; null counts as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// An integer from 1 to `max`.
    fn count(&self, key: &str, default: Option<u32>, max: u64) -> Result<u32, ModelError> {
        let Some(value) = self.get(key) else {
            return default.ok_or_else(|| self.wrong(key, "is missing"));
        };
        value
            .as_u64()
            .filter(|count| (1..=max).contains(count))
            .and_then(|count| u32::try_from(count).ok())
            .ok_or_else(|| self.wrong(key, format!("is {}, not an integer from 1 to {max}", shown(value))))
    }

    /// A finite number within `range`.
    fn number(&self, key: &str, default: Option<f64>, range: std::ops::RangeInclusive<f64>) -> Result<f64, ModelError> {
        let Some(value) = self.get(key) else {
            return default.ok_or_else(|| self.wrong(key, "is missing"));
        };
        value.as_f64().filter(|number| range.contains(number)).ok_or_else(|| {
            let (from, to) = range.into_inner();
            self.wrong(key, format!("is {}, not a number from {from} to {to}", shown(value)))
        })
    }

    /// A Boolean, false if absent.
    fn flag(&self, key: &str) -> Result<bool, ModelError> {
        match self.get(key) {
            None => Ok(false),
            Some(value) => {
                value.as_bool().ok_or_else(|| self.wrong(key, format!("is {}, not true or false", shown(value))))
            }
        }
    }

    /// Text that is one of `spellings`, of which the first is the usual one.
    fn must_be(&self, key: &str, spellings: &[&str]) -> Result<(), ModelError> {
        match self.get(key) {
            Some(value) if !value.as_str().is_some_and(|text| spellings.contains(&text)) => {
                let wanted = spellings.first().copied().unwrap_or_default();
                Err(self.wrong(key, format!("is {}; only {wanted:?} is supported", shown(value))))
            }
            _ => Ok(()),
        }
    }
}

/// A value for an error message, truncated.
pub(super) fn shown(value: &Value) -> String {
    value.to_string().chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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
        let config = LlamaConfig::from_json(&with("num_key_value_heads", Value::Null)).unwrap();
        assert_eq!((config.num_key_value_heads, config.head_dim, config.max_position_embeddings), (4, 8, 2048));
        assert_eq!((config.rms_norm_eps, config.initializer_range), (1e-6, 0.02));
        assert_eq!(config.rope, Rope { theta: 10_000.0, scaling: None });
        assert!(!config.tie_word_embeddings && !config.attention_bias && !config.mlp_bias);
    }

    #[test]
    fn both_spellings_of_the_rotary_settings_are_read() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192});
        let mut old = with("rope_scaling", scaling.clone());
        old["rope_theta"] = json!(5e5);
        let mut new = with("rope_parameters", scaling);
        new["rope_parameters"]["rope_theta"] = json!(5e5);
        let [old, new] = [old, new].map(|config| LlamaConfig::from_json(&config).unwrap().rope);
        assert_eq!(old, new);
        assert_eq!((old.theta, old.scaling.unwrap().factor), (5e5, 8.0));
        assert_eq!(
            LlamaConfig::from_json(&with("rope_scaling", json!({"type": "default"}))).unwrap().rope.scaling,
            None
        );
    }

    #[test]
    fn other_architectures_are_refused_by_name() {
        for (key, value) in [
            ("architectures", json!(["GPT2LMHeadModel"])),
            ("architectures", json!([])),
            ("architectures", json!("LlamaForCausalLM")),
            ("model_type", json!("qwen2")),
            ("other", json!(1)),
        ] {
            let mut config = with(key, value.clone());
            if key != "architectures" {
                config.as_object_mut().unwrap().remove("architectures");
            }
            let error = LlamaConfig::from_json(&config).unwrap_err();
            assert!(matches!(error, ModelError::Architecture { .. }), "{value} gave {error}");
        }
        let mut by_type = with("model_type", json!("llama"));
        by_type.as_object_mut().unwrap().remove("architectures");
        assert!(LlamaConfig::from_json(&by_type).is_ok());
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
            let error = LlamaConfig::from_json(&with(key, value.clone())).unwrap_err().to_string();
            let named = key == "num_key_value_heads" && error.contains("num_attention_heads")
                || key == "head_dim" && error.contains("head_dim")
                || error.contains(&format!("config.json: {key}"));
            assert!(named, "{key} {value}: {error}");
        }
        for document in [json!(null), json!([]), json!("LlamaForCausalLM")] {
            assert!(LlamaConfig::from_json(&document).is_err());
        }
        // Each within bounds, together too large.
        let mut large = with("num_hidden_layers", json!(4096));
        large["hidden_size"] = json!(1 << 20);
        large["intermediate_size"] = json!(1 << 20);
        assert!(LlamaConfig::from_json(&large).unwrap_err().to_string().contains("parameters"));
    }

    #[test]
    fn the_shipped_models_have_the_sizes_they_are_named_after() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/models");
        let mut sizes = std::collections::BTreeMap::new();
        for file in std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()) {
            let config = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
            let config = LlamaConfig::from_json(&config).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
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
