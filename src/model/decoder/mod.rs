//! One decoder for all families: token embeddings, blocks of attention and a gated feed-forward layer, a linear head.
//!
//! It computes a [`DecoderConfig`], as Hugging Face's models of the families in `super::families` do: RMSNorm before
//! each half of a block, after it, or both; rotary positions; grouped-query attention, over a window where a layer has
//! one; a gate with SiLU or GELU.
//!
//! With [`Precision::Bf16`] the residual stream and all matrix products are bf16; mean squares of RMSNorm, rotary
//! turns, softmax and the loss are fp32. What a family does not use costs it a branch and no operation: a Llama's
//! tensors go through the same operations in the same order as in the first version, so that its runs resume to the
//! bit. [`Model::use_fused`] replaces some of them by functions of one pass, in runs that are created so.

mod attention;
pub(super) mod config;

use std::collections::HashMap;

use tch::{Device, Kind, TchError, Tensor};

pub(super) use self::attention::mask_elements;
use self::{
    attention::Attention,
    config::{
        Activation, DecoderConfig, EMBEDDING, FINAL_NORM, NormScale, OUTPUT, QueryKeyNorm, layer_of, layer_prefix,
    },
};
use super::{
    BuildSettings, Doing, Leaves, Model, ModelError, Parameter, Positions, Spans, Stage, Targets, Weight, init,
    lora::Adapter,
    loss::{linear_cross_entropy, linear_losses},
    rope::{RopeTable, Turns},
    weight::refused,
};
use crate::{
    config::Precision,
    torch::{
        self,
        fused::{self, Fused},
    },
};

/// A decoder on one device.
pub struct Decoder {
    config: DecoderConfig,
    precision: Precision,
    device: Device,
    /// [`DecoderConfig::embedding_scale`] in the type used for computing.
    embedding_scale: Option<f64>,
    parameters: Vec<Parameter>,
    /// The factor of what adapters add, if there are any.
    adapted: Option<f64>,
    parts: Parts,
    attention: Attention,
    ropes: Vec<RopeTable>,
    /// What is computed in one pass, in place of LibTorch's operations.
    fused: Fused,
    /// `Some`: the parameters have no values yet; how to make them.
    bare: Option<BuildSettings>,
}

/// The parameters, each where it is used.
struct Parts {
    embedding: Weight,
    layers: Vec<Layer>,
    norm: Weight,
    /// The embedding itself when tied.
    output: Weight,
}

struct Layer {
    rope: Option<usize>,
    window: Option<u32>,
    before_attention: Option<Weight>,
    inputs: Inputs,
    query_norm: Option<Weight>,
    key_norm: Option<Weight>,
    attention_output: Linear,
    after_attention: Option<Weight>,
    before_mlp: Option<Weight>,
    gate: Gate,
    down: Linear,
    after_mlp: Option<Weight>,
}

/// The projections to queries, keys and values.
enum Inputs {
    Apart(Box<Apart>),
    /// Their rows are those of the three, in this order.
    Fused(Linear),
}

struct Apart {
    query: Linear,
    key: Linear,
    value: Linear,
}

/// The projections into the feed-forward layer.
enum Gate {
    Apart {
        gate: Linear,
        up: Linear,
    },
    /// Its rows are those of the gate, then those of the other.
    Fused(Linear),
}

struct Linear {
    weight: Weight,
    bias: Option<Weight>,
    adapter: Option<Adapter>,
}

impl Parts {
    fn assemble(config: &DecoderConfig, parameters: &[Parameter], adapted: Option<f64>) -> Result<Self, ModelError> {
        let named: HashMap<&str, &Weight> =
            parameters.iter().map(|parameter| (parameter.name.as_str(), &parameter.weight)).collect();
        let get = |name: &str| {
            let weight = named.get(name).ok_or_else(|| ModelError::NoParameter { name: name.to_owned() })?;
            Ok::<_, ModelError>(weight.share())
        };
        let (biases, norms) = (config.biases, config.placement.names());
        let layers = config.layers.iter().enumerate().map(|(index, layer)| {
            let prefix = layer_prefix(index);
            let norm = |name: Option<&str>| name.map(|name| get(&format!("{prefix}{name}.weight"))).transpose();
            let linear = |name: &str, bias: bool| {
                let bias = bias.then(|| get(&format!("{prefix}{name}.bias"))).transpose()?;
                let weight = format!("{prefix}{name}.weight");
                let adapter = Adapter::find(&named, &weight, adapted);
                Ok::<_, ModelError>(Linear { weight: get(&weight)?, bias, adapter })
            };
            let inputs = if config.fused {
                Inputs::Fused(linear("self_attn.qkv_proj", biases.inputs)?)
            } else {
                Inputs::Apart(Box::new(Apart {
                    query: linear("self_attn.q_proj", biases.inputs)?,
                    key: linear("self_attn.k_proj", biases.inputs)?,
                    value: linear("self_attn.v_proj", biases.inputs)?,
                }))
            };
            let gate = if config.fused {
                Gate::Fused(linear("mlp.gate_up_proj", biases.mlp)?)
            } else {
                Gate::Apart { gate: linear("mlp.gate_proj", biases.mlp)?, up: linear("mlp.up_proj", biases.mlp)? }
            };
            let inner = |name| norm(config.query_key_norm.map(|_| name));
            Ok(Layer {
                rope: layer.rope,
                window: layer.window,
                before_attention: norm(norms.before_attention)?,
                inputs,
                query_norm: inner("self_attn.q_norm")?,
                key_norm: inner("self_attn.k_norm")?,
                attention_output: linear("self_attn.o_proj", biases.output)?,
                after_attention: norm(norms.after_attention)?,
                before_mlp: norm(norms.before_mlp)?,
                gate,
                down: linear("mlp.down_proj", biases.mlp)?,
                after_mlp: norm(norms.after_mlp)?,
            })
        });
        Ok(Self {
            embedding: get(EMBEDDING)?,
            layers: layers.collect::<Result<_, ModelError>>()?,
            norm: get(FINAL_NORM)?,
            output: get(if config.tie_word_embeddings { EMBEDDING } else { OUTPUT })?,
        })
    }
}

impl Decoder {
    /// A model with fresh weights.
    pub fn new(config: DecoderConfig, settings: &BuildSettings) -> Result<Self, ModelError> {
        let shapes = config.clone();
        Self::with(config, settings, |name, shape| init::fresh(&shapes, name, shape, settings).map(Weight::Leaf))
    }

    /// A model whose parameters have extents and no values yet: see [`Leaves::first_values`].
    pub(super) fn bare(config: DecoderConfig, settings: &BuildSettings) -> Result<Self, ModelError> {
        let leaf = |_: &str, shape: &[u64]| {
            let leaf = torch::bare_leaf(&init::extents(shape), settings.device).map_err(refused)?;
            Ok(Weight::Leaf(leaf))
        };
        Ok(Self { bare: Some(*settings), ..Self::with(config, settings, leaf)? })
    }

    /// A model with the weights that `make` gives for a name and extents.
    pub(super) fn with(
        config: DecoderConfig,
        settings: &BuildSettings,
        make: impl Fn(&str, &[u64]) -> Result<Weight, TchError>,
    ) -> Result<Self, ModelError> {
        let mut parameters = Vec::new();
        for (name, shape) in config.parameter_shapes() {
            let weight = make(&name, &shape).doing("make parameters")?;
            let (stage, tied) = (stage(&name), name == EMBEDDING && config.tie_word_embeddings);
            parameters.push(Parameter { name, weight, stage, tied });
        }
        let ropes = config
            .ropes
            .iter()
            .map(|rope| RopeTable::new(rope.clone(), config.head_dim, config.context.positions, settings.device));
        Ok(Self {
            parts: Parts::assemble(&config, &parameters, None)?,
            parameters,
            adapted: None,
            attention: Attention::new(&config, settings),
            ropes: ropes.collect(),
            fused: Fused::NONE,
            bare: None,
            precision: settings.precision,
            device: settings.device,
            embedding_scale: config.embedding_scale.map(|scale| rounded(scale, settings.precision)),
            config,
        })
    }

    /// The turns of a rotary embedding for rows of `len` tokens.
    fn turns(&self, rope: usize, len: i64, spans: &Spans) -> Result<Turns, ModelError> {
        let table = self.ropes.get(rope).ok_or_else(|| ModelError::Input {
            what: "rotary embedding",
            reason: format!("{rope} is not in the model's description"),
        })?;
        table.turns(len, spans)
    }

    /// Adds a layer's attention to the residual stream `x`.
    fn attention(&self, layer: &Layer, x: &Tensor, turns: Option<&Turns>, spans: &Spans) -> Result<Tensor, TchError> {
        let normed = self.norm_before(x, layer.before_attention.as_ref())?;
        let (batch, len, _) = x.size3()?;
        let width = i64::from(self.config.head_dim);
        let heads = i64::from(self.config.num_attention_heads);
        let shared = i64::from(self.config.num_key_value_heads);

        let turned = |x: Tensor, norm: &Option<Weight>, heads: i64| {
            let split = |x: Tensor| x.f_view([batch, len, heads, width]);
            let x = match (norm, self.config.query_key_norm) {
                (Some(norm), Some(QueryKeyNorm::Head)) => self.rms_norm(&split(x)?, norm, width)?,
                (Some(norm), _) => split(self.rms_norm(&x, norm, heads * width)?)?,
                (None, _) => split(x)?,
            };
            match turns {
                Some(turns) => turns.apply(&x, self.fused.turns),
                None => Ok(x),
            }
        };
        let (query, key, value) = match &layer.inputs {
            Inputs::Apart(apart) => (
                turned(self.linear(&normed, &apart.query)?, &layer.query_norm, heads)?,
                turned(self.linear(&normed, &apart.key)?, &layer.key_norm, shared)?,
                self.linear(&normed, &apart.value)?.f_view([batch, len, shared, width])?,
            ),
            Inputs::Fused(inputs) => {
                let all = self.linear(&normed, inputs)?;
                let part = |first: i64, heads: i64| {
                    all.f_narrow(2, first * width, heads * width)?.f_reshape([batch, len, heads * width])
                };
                (
                    turned(part(0, heads)?, &layer.query_norm, heads)?,
                    turned(part(heads, shared)?, &layer.key_norm, shared)?,
                    part(heads + shared, shared)?.f_view([batch, len, shared, width])?,
                )
            }
        };
        let mixed = self.attention.mix([query, key, value], layer.window, spans)?;
        let mixed = mixed.f_reshape([batch, len, heads * width])?;
        let added = self.linear(&mixed, &layer.attention_output)?;
        x.f_add(&self.norm_after(added, layer.after_attention.as_ref())?)
    }

    /// Adds a layer's gated feed-forward part (Shazeer, arXiv 2002.05202) to the residual stream `x`.
    fn feed_forward(&self, layer: &Layer, x: &Tensor) -> Result<Tensor, TchError> {
        let normed = self.norm_before(x, layer.before_mlp.as_ref())?;
        let gated = match &layer.gate {
            Gate::Apart { gate, up } => self.gated(&self.linear(&normed, gate)?, &self.linear(&normed, up)?)?,
            Gate::Fused(both) => {
                let both = self.linear(&normed, both)?;
                if self.fused.gate {
                    fused::gate_of_both(&both, self.config.activation.into()).map_err(refused)?
                } else {
                    let width = i64::from(self.config.intermediate_size);
                    self.gated(&both.f_narrow(2, 0, width)?, &both.f_narrow(2, width, width)?)?
                }
            }
        };
        let added = self.linear(&gated, &layer.down)?;
        x.f_add(&self.norm_after(added, layer.after_mlp.as_ref())?)
    }

    /// The activated gate times what passes it.
    fn gated(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor, TchError> {
        if self.fused.gate {
            return fused::gate(gate, up, self.config.activation.into()).map_err(refused);
        }
        match self.config.activation {
            Activation::Silu => gate.f_silu()?.f_mul(up),
            Activation::GeluTanh => gate.f_gelu("tanh")?.f_mul(up),
        }
    }

    fn linear(&self, x: &Tensor, linear: &Linear) -> Result<Tensor, TchError> {
        let bias = linear.bias.as_ref().map(|bias| bias.at_use(self.kind())).transpose()?;
        let y = match linear.weight.for_product(self.kind())? {
            Some((leaf, values)) if self.fused.linear => {
                fused::linear(x, leaf, &values, bias.as_ref()).map_err(refused)?
            }
            _ => x.f_linear(&linear.weight.at_use(self.kind())?, bias)?,
        };
        match &linear.adapter {
            Some(adapter) => adapter.add(y, x, self.kind()),
            None => Ok(y),
        }
    }

    /// What half a block computes with: the residual stream, normed where there is a norm.
    fn norm_before(&self, x: &Tensor, weight: Option<&Weight>) -> Result<Tensor, TchError> {
        match weight {
            Some(weight) => self.rms_norm(x, weight, self.config.hidden_size.into()),
            None => Ok(x.shallow_clone()),
        }
    }

    /// What half a block adds to the residual stream, normed where there is a norm.
    fn norm_after(&self, x: Tensor, weight: Option<&Weight>) -> Result<Tensor, TchError> {
        match weight {
            Some(weight) => self.rms_norm(&x, weight, self.config.hidden_size.into()),
            None => Ok(x),
        }
    }

    /// RMSNorm (Zhang and Sennrich, arXiv 1910.07467) over the last `width` elements; LibTorch computes the mean square
    /// in fp32 for bf16 input too.
    fn rms_norm(&self, x: &Tensor, weight: &Weight, width: i64) -> Result<Tensor, TchError> {
        let eps = self.config.rms_norm_eps;
        if self.fused.norm {
            let (kind, plus_one) = match self.config.scale {
                NormScale::Plain => (self.kind(), false),
                NormScale::Exact => (Kind::Float, false),
                NormScale::PlusOne => (Kind::Float, true),
            };
            return fused::rms_norm(x, &weight.at_use(kind)?, eps, plus_one).map_err(refused);
        }
        let exact = match self.config.scale {
            NormScale::Plain => return x.f_rms_norm([width], Some(weight.at_use(self.kind())?), eps),
            NormScale::Exact => weight.at_use(Kind::Float)?,
            NormScale::PlusOne => weight.at_use(Kind::Float)?.f_add_scalar(1.0)?,
        };
        x.f_to_kind(Kind::Float)?.f_rms_norm([width], Some(exact), eps)?.f_to_kind(self.kind())
    }

    /// The type used for computing.
    const fn kind(&self) -> Kind {
        kind(self.precision)
    }

    /// Takes `x`, so that it is gone before the scores need memory.
    fn last_norm(&self, x: Tensor) -> Result<Tensor, ModelError> {
        self.norm_after(x, Some(&self.parts.norm)).doing("compute last norm")
    }
}

/// The type used for computing.
const fn kind(precision: Precision) -> Kind {
    match precision {
        Precision::Fp32 => Kind::Float,
        Precision::Bf16 => Kind::BFloat16,
    }
}

impl From<Activation> for fused::Activation {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::Silu => Self::Silu,
            Activation::GeluTanh => Self::GeluTanh,
        }
    }
}

/// A constant in the type used for computing: Hugging Face keeps it as a tensor of that type.
fn rounded(constant: f64, precision: Precision) -> f64 {
    match precision {
        Precision::Fp32 => f64::from(constant as f32),
        Precision::Bf16 => {
            let bits = (constant as f32).to_bits();
            // Half of the last place that is kept, less one if that place is even: ties go to the even neighbour.
            let half = 0x7fff + ((bits >> 16) & 1);
            f64::from(f32::from_bits((bits.wrapping_add(half)) & 0xffff_0000))
        }
    }
}

impl Leaves for Decoder {
    fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    fn set_parameters(&mut self, weights: Vec<Weight>) -> Result<(), ModelError> {
        if weights.len() != self.parameters.len() {
            let reason = format!("are {}, the model has {}", weights.len(), self.parameters.len());
            return Err(ModelError::Input { what: "parameters", reason });
        }
        for (own, weight) in self.parameters.iter().zip(&weights) {
            let extents = own.values().size();
            if !weight.has_extents(&extents) {
                let reason = format!("hold {} with other extents than {extents:?}", own.name);
                return Err(ModelError::Input { what: "parameters", reason });
            }
        }
        for (own, weight) in self.parameters.iter_mut().zip(weights) {
            own.weight = weight;
        }
        self.bare = None;
        self.parts = Parts::assemble(&self.config, &self.parameters, self.adapted)?;
        Ok(())
    }

    fn device(&self) -> Device {
        self.device
    }

    fn first_values(&self, parameter: usize) -> Result<Option<Tensor>, ModelError> {
        let (Some(settings), Some(parameter)) = (&self.bare, self.parameters.get(parameter)) else { return Ok(None) };
        let shape: Vec<u64> = parameter.values().size().into_iter().map(i64::unsigned_abs).collect();
        let settings = BuildSettings { device: Device::Cpu, ..*settings };
        init::fresh(&self.config, &parameter.name, &shape, &settings).map(Some).doing("make parameters")
    }

    fn needs_rounded_weights_only(&self) -> bool {
        // The other kinds of norms compute with fp32 weights.
        self.config.scale == NormScale::Plain
    }
}

impl Model for Decoder {
    fn use_fused(&mut self, functions: Fused) {
        self.fused = functions;
    }

    fn adds_in_place(&self) -> bool {
        self.fused.linear
    }

    fn adapt(&mut self, adapters: Vec<Parameter>, scale: f64) -> Result<(), ModelError> {
        self.parameters.extend(adapters);
        self.adapted = Some(scale);
        self.parts = Parts::assemble(&self.config, &self.parameters, self.adapted)?;
        Ok(())
    }

    fn embed(&self, tokens: &Tensor) -> Result<Tensor, ModelError> {
        let shape = tokens.size();
        let &[batch, len] = shape.as_slice() else {
            return Err(ModelError::Input { what: "tokens", reason: format!("have shape {shape:?}, not [batch, T]") });
        };
        if batch < 1 || len < 1 || len > i64::from(self.config.context.positions) {
            let longest = self.config.context.positions;
            let reason = format!("have shape {shape:?}; the model takes 1 to {longest} positions");
            return Err(ModelError::Input { what: "tokens", reason });
        }
        let x = self.parts.embedding.look_up(tokens, self.kind());
        let x = match self.embedding_scale {
            None => x,
            Some(scale) => x.and_then(|x| x.f_mul_scalar(scale)),
        };
        x.doing("look up token embeddings")
    }

    fn blocks(&self) -> usize {
        self.parts.layers.len()
    }

    fn block(&self, index: usize, mut x: Tensor, spans: &Spans) -> Result<Tensor, ModelError> {
        let layer = self.parts.layers.get(index).ok_or_else(|| {
            let reason = format!("{index} is asked for, the model has {}", self.blocks());
            ModelError::Input { what: "block", reason }
        })?;
        let (_, len, _) = x.size3().doing("compute attention")?;
        spans.check(&x)?;
        let turns = layer.rope.map(|rope| self.turns(rope, len, spans)).transpose()?;
        x = self.attention(layer, &x, turns.as_ref(), spans).doing("compute attention")?;
        self.feed_forward(layer, &x).doing("compute feed-forward layer")
    }

    fn head_loss(&self, x: Tensor, targets: &Targets) -> Result<Tensor, ModelError> {
        let hidden = self.last_norm(x)?.f_flatten(0, 1).doing("compute loss")?;
        linear_cross_entropy(&hidden, &self.parts.output, targets, self.fused)
    }

    fn head_losses(&self, x: Tensor, targets: &Targets) -> Result<Tensor, ModelError> {
        let hidden = self.last_norm(x)?.f_flatten(0, 1).doing("compute loss")?;
        linear_losses(&hidden, &self.parts.output, targets, self.fused)
    }

    fn head_scores(&self, x: Tensor, positions: Positions) -> Result<Tensor, ModelError> {
        let hidden = self.last_norm(x)?;
        let hidden = match positions {
            Positions::All => hidden,
            Positions::Last => hidden.f_select(1, -1).doing("compute logits")?,
        };
        let output = self.parts.output.at_use(self.kind());
        output
            .and_then(|output| hidden.f_linear(&output, None::<&Tensor>)?.f_to_kind(Kind::Float))
            .doing("compute logits")
    }

    fn attention_kernel(&self, length: u32) -> Result<Option<&'static str>, ModelError> {
        let kernel = self.attention.kernel(length.into(), self.config.head_dim.into());
        kernel.map(Some).doing("choose an attention kernel")
    }

    fn vocab_size(&self) -> u32 {
        self.config.vocab_size
    }

    fn max_sequence_length(&self) -> u32 {
        self.config.context.positions
    }
}

/// The stage that uses the parameter of this name first.
pub(super) fn stage(name: &str) -> Stage {
    match layer_of(name) {
        Some(layer) => Stage::Block(layer),
        None if name == EMBEDDING => Stage::Embed,
        None => Stage::Head,
    }
}

#[cfg(test)]
mod parity;
#[cfg(test)]
mod tests;
