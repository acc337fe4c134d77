//! The description of a decoder: what it computes, whatever family's `config.json` said so.
//!
//! A family's file (see [`super::super::families`]) fills one of these in, and `DecoderConfig::checked` is the one
//! place that holds it against the bounds of this program. Everything that depends on the description alone is here:
//! the names, the extents and the order of the parameters.

use crate::model::ModelError;

/// A decoder's shape and constants. All values are within the bounds that `DecoderConfig::checked` demands.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// Tokens.
    pub vocab_size: u32,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Width of the feed-forward layer.
    pub intermediate_size: u32,
    /// Query heads.
    pub num_attention_heads: u32,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: u32,
    /// Width of a head; even.
    pub head_dim: u32,
    /// The longest sequence.
    pub context: Context,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// The output layer is the token embedding, transposed.
    pub tie_word_embeddings: bool,
    /// The projections that have biases.
    pub biases: Biases,
    /// Where the norms stand.
    pub placement: Placement,
    /// How a norm applies its weight.
    pub scale: NormScale,
    /// Norms of queries and keys.
    pub query_key_norm: Option<QueryKeyNorm>,
    /// The feed-forward layer's activation.
    pub activation: Activation,
    /// Factor on the token embeddings.
    pub embedding_scale: Option<f64>,
    /// Factor on the products of queries and keys; `None`: 1/√[`head_dim`](Self::head_dim).
    pub attention_scale: Option<f64>,
    /// Queries, keys and values have one matrix, and so have gate and up.
    pub fused: bool,
    /// The different rotary embeddings.
    pub ropes: Vec<Rope>,
    /// The blocks.
    pub layers: Vec<LayerConfig>,
}

/// The longest sequence, and the key that says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// Positions.
    pub positions: u32,
    /// The key of `config.json`.
    pub key: &'static str,
}

/// The settings of one block that may differ from those of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerConfig {
    /// Its rotary embedding, by index of [`DecoderConfig::ropes`]; `None`: positions are not encoded.
    pub rope: Option<usize>,
    /// A position attends to this many positions up to itself; `None`: to all of them.
    pub window: Option<u32>,
}

/// The projections that have biases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    /// Queries, keys and values.
    pub inputs: bool,
    /// The attention's output.
    pub output: bool,
    /// All of the feed-forward layer.
    pub mlp: bool,
}

/// Where a block's norms stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Before attention and before the feed-forward layer.
    Before,
    /// After each of them, before the sum with the residual stream (OLMo 2).
    After,
    /// Before and after each of them (Gemma 3).
    Around,
}

/// How RMSNorm applies its weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormScale {
    /// In the type that the model computes in.
    Plain,
    /// In fp32; the product is rounded.
    Exact,
    /// In fp32, with one added to the weight; the product is rounded.
    PlusOne,
}

/// The extent of the norms of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueryKeyNorm {
    /// Each head for itself.
    Head,
    /// All heads together.
    Whole,
}

/// The activation of the feed-forward layer's gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x·σ(x).
    Silu,
    /// GELU in its approximation by tanh.
    GeluTanh,
}

/// Rotary position embedding (Su et al., arXiv 2104.09864).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the wavelengths.
    pub theta: f64,
    /// The part of a head that is turned: its first elements; even.
    pub width: u32,
    /// Stretching to longer contexts.
    pub scaling: Option<Scaling>,
}

/// How frequencies are stretched to longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// All are divided by one factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// As in Llama 3.1.
    Llama3(Llama3Scaling),
    /// LongRoPE (arXiv 2402.13753) within the original context.
    Long {
        /// Each frequency's divisor.
        divisors: Vec<f64>,
        /// Factor on cosines and sines.
        attention_factor: f64,
    },
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
pub(in crate::model) const MAX_WIDTH: u64 = 1 << 20;
pub(in crate::model) const MAX_LAYERS: u64 = 4096;
pub(in crate::model) const MAX_VOCAB: u64 = 1 << 24;
pub(in crate::model) const MAX_POSITIONS: u64 = 1 << 27;
/// Elements of the token embedding: LibTorch's dot product counts in 32 bits.
const MAX_EMBEDDING: u64 = i32::MAX as u64;
/// Elements of all parameters.
const MAX_PARAMETERS: u64 = 1 << 40;

/// The names of a block's norms, each where it stands.
pub(in crate::model) struct NormNames {
    pub before_attention: Option<&'static str>,
    pub after_attention: Option<&'static str>,
    pub before_mlp: Option<&'static str>,
    pub after_mlp: Option<&'static str>,
}

impl Placement {
    /// Hugging Face's names: `post_attention_layernorm` has stood in each of three places.
    pub(in crate::model) const fn names(self) -> NormNames {
        match self {
            Self::Before => NormNames {
                before_attention: Some("input_layernorm"),
                after_attention: None,
                before_mlp: Some("post_attention_layernorm"),
                after_mlp: None,
            },
            Self::After => NormNames {
                before_attention: None,
                after_attention: Some("post_attention_layernorm"),
                before_mlp: None,
                after_mlp: Some("post_feedforward_layernorm"),
            },
            Self::Around => NormNames {
                before_attention: Some("input_layernorm"),
                after_attention: Some("post_attention_layernorm"),
                before_mlp: Some("pre_feedforward_layernorm"),
                after_mlp: Some("post_feedforward_layernorm"),
            },
        }
    }
}

impl NormNames {
    fn in_order(&self) -> impl Iterator<Item = &'static str> {
        [self.before_attention, self.after_attention, self.before_mlp, self.after_mlp].into_iter().flatten()
    }
}

impl DecoderConfig {
    /// The same description, if all of its values are within bounds and fit each other.
    pub(in crate::model) fn checked(self) -> Result<Self, ModelError> {
        let Self { vocab_size, hidden_size, num_attention_heads, num_key_value_heads, head_dim, .. } = self;
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let reason =
                format!("{num_attention_heads} is not a multiple of num_key_value_heads {num_key_value_heads}");
            return Err(ModelError::config("num_attention_heads", reason));
        }
        if !head_dim.is_multiple_of(2) {
            let reason = format!("{head_dim} is odd; rotary embedding turns pairs");
            return Err(ModelError::config("head_dim", reason));
        }
        if u64::from(num_attention_heads) * u64::from(head_dim) > MAX_WIDTH {
            return Err(ModelError::config("num_attention_heads", format!("times head_dim is above {MAX_WIDTH}")));
        }
        if u64::from(vocab_size) * u64::from(hidden_size) > MAX_EMBEDDING {
            return Err(ModelError::config("vocab_size", format!("times hidden_size is above {MAX_EMBEDDING}")));
        }
        if self.parameters() > MAX_PARAMETERS {
            let reason = format!("and the widths make {} parameters, more than {MAX_PARAMETERS}", self.parameters());
            return Err(ModelError::config("num_hidden_layers", reason));
        }
        Ok(self)
    }

    /// Width of all query heads together.
    pub(in crate::model) fn query_width(&self) -> u64 {
        u64::from(self.num_attention_heads) * u64::from(self.head_dim)
    }

    /// Width of all key heads together, which is that of the value heads, too.
    pub(in crate::model) fn key_width(&self) -> u64 {
        u64::from(self.num_key_value_heads) * u64::from(self.head_dim)
    }

    /// Names and shapes of all parameters, in registration order: that of Hugging Face's `named_parameters`.
    pub fn parameter_shapes(&self) -> Vec<(String, Vec<u64>)> {
        let mut shapes = vec![(EMBEDDING.to_owned(), vec![self.vocab_size.into(), self.hidden_size.into()])];
        for layer in 0..self.layers.len() {
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
        embeddings + self.layers.len() as u64 * layer + u64::from(self.hidden_size)
    }

    fn layer_shapes(&self, layer: usize) -> Vec<(String, Vec<u64>)> {
        let prefix = layer_prefix(layer);
        let hidden = u64::from(self.hidden_size);
        let intermediate = u64::from(self.intermediate_size);
        let (queries, keys) = (self.query_width(), self.key_width());
        let Biases { inputs, output, mlp } = self.biases;
        let mut shapes = Vec::with_capacity(16);
        let mut linear = |name: &str, outputs: u64, inputs: u64, bias: bool| {
            shapes.push((format!("{prefix}{name}.weight"), vec![outputs, inputs]));
            if bias {
                shapes.push((format!("{prefix}{name}.bias"), vec![outputs]));
            }
        };
        if self.fused {
            linear("self_attn.o_proj", hidden, queries, output);
            linear("self_attn.qkv_proj", queries + 2 * keys, hidden, inputs);
        } else {
            linear("self_attn.q_proj", queries, hidden, inputs);
            linear("self_attn.k_proj", keys, hidden, inputs);
            linear("self_attn.v_proj", keys, hidden, inputs);
            linear("self_attn.o_proj", hidden, queries, output);
        }
        let mut norm = |name: &str, width: u64| shapes.push((format!("{prefix}{name}.weight"), vec![width]));
        match self.query_key_norm {
            None => {}
            Some(QueryKeyNorm::Head) => {
                norm("self_attn.q_norm", self.head_dim.into());
                norm("self_attn.k_norm", self.head_dim.into());
            }
            Some(QueryKeyNorm::Whole) => {
                norm("self_attn.q_norm", queries);
                norm("self_attn.k_norm", keys);
            }
        }
        let mut linear = |name: &str, outputs: u64, inputs: u64| {
            shapes.push((format!("{prefix}{name}.weight"), vec![outputs, inputs]));
            if mlp {
                shapes.push((format!("{prefix}{name}.bias"), vec![outputs]));
            }
        };
        if self.fused {
            linear("mlp.gate_up_proj", 2 * intermediate, hidden);
        } else {
            linear("mlp.gate_proj", intermediate, hidden);
            linear("mlp.up_proj", intermediate, hidden);
        }
        linear("mlp.down_proj", hidden, intermediate);
        shapes.extend(self.placement.names().in_order().map(|name| (format!("{prefix}{name}.weight"), vec![hidden])));
        shapes
    }
}

/// Name of the token embedding.
pub(in crate::model) const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the last norm's scale.
pub(super) const FINAL_NORM: &str = "model.norm.weight";
/// Name of the output layer; absent when tied.
pub(in crate::model) const OUTPUT: &str = "lm_head.weight";

/// What the names of all layers' parameters begin with.
const LAYERS: &str = "model.layers.";

/// The prefix of the names of a layer's parameters.
pub(super) fn layer_prefix(layer: usize) -> String {
    format!("{LAYERS}{layer}.")
}

/// The layer that a parameter of this name belongs to; `None`: to none.
pub(super) fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix(LAYERS)?.split_once('.')?.0.parse().ok()
}
